//! Tables for people, and their other forms.

use std::{collections::BTreeMap, fmt::Write, net::IpAddr, sync::Arc};

use proxier::{
    ir::{Fragment, FrontendKind, Verdict, WayIn},
    model::Store,
    sim::Packet,
};
use serde::Serialize;

use crate::{
    Outcome,
    args::{Output, What},
};

/// A packet that is asked about.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) from: IpAddr,
    pub(crate) input: Option<String>,
    pub(crate) to: String,
}

impl Question {
    /// The packet, as it would come to this node.
    pub(crate) fn packet(&self, store: &Store) -> Outcome<Packet> {
        let (destination, protocol) = self.to.rsplit_once('/').unwrap_or((&self.to, "TCP"));
        let destination = destination.parse().map_err(|_not_an_address| {
            format!("--to {:?}: expected ADDRESS:PORT[/PROTOCOL]", self.to)
        })?;
        let is_own =
            self.from.is_loopback() || store.env().interface_addresses.contains(&self.from);
        let input = self.input.clone();
        Ok(Packet {
            source: self.from,
            input: (!is_own || input.is_some()).then(|| Arc::from(input.unwrap_or_default())),
            destination,
            protocol: protocol.to_ascii_uppercase().parse()?,
        })
    }
}

/// One row: names of columns and what stands in them.
type Row = Vec<(&'static str, String)>;

/// Lists what is asked for.
pub(crate) fn list(
    store: &Store,
    what: What,
    namespace: Option<&str>,
    output: Output,
) -> Outcome<String> {
    let wide = output == Output::Wide;
    let rows = match what {
        What::Services => services(store, namespace, wide),
        What::Endpoints => endpoints(store, namespace, wide),
        What::Conflicts => conflicts(store, namespace),
    };
    match output {
        Output::Text | Output::Wide if rows.is_empty() => Ok("nothing found\n".into()),
        Output::Text | Output::Wide => Ok(table(&rows)),
        Output::Name => {
            let mut names: Vec<_> = rows.iter().map(name).collect();
            names.dedup();
            Ok(names.into_iter().fold(String::new(), |text, name| text + &name + "\n"))
        }
        Output::Json | Output::Yaml => {
            let maps = rows.into_iter().map(|row| {
                let lower =
                    |(key, value): (&str, String)| (key.to_lowercase().replace(' ', "_"), value);
                row.into_iter().map(lower).collect::<BTreeMap<_, _>>()
            });
            structured(&maps.collect::<Vec<_>>(), output)
        }
    }
}

/// A value as JSON or YAML.
pub(crate) fn structured<T: Serialize>(value: &T, output: Output) -> Outcome<String> {
    Ok(match output {
        Output::Yaml => yaml_serde::to_string(value)?,
        Output::Json | Output::Name | Output::Text | Output::Wide => {
            serde_json::to_string_pretty(value)? + "\n"
        }
    })
}

fn name(row: &Row) -> String {
    let column = |key: &str| row.iter().find(|(name, _)| *name == key).map(|(_, it)| it.clone());
    match (column("NAMESPACE"), column("SERVICE")) {
        (Some(namespace), Some(service)) => format!("{namespace}/{service}"),
        _ => column("FRONTEND").unwrap_or_default(),
    }
}

fn of_namespace<'a>(
    store: &'a Store,
    namespace: Option<&'a str>,
) -> impl Iterator<Item = &'a Arc<Fragment>> {
    let wanted = move |it: &&Arc<Fragment>| {
        namespace.is_none_or(|wanted| it.id.service.namespace() == wanted)
    };
    store.fragments().filter(wanted)
}

fn services(store: &Store, namespace: Option<&str>, wide: bool) -> Vec<Row> {
    let row = |fragment: &Arc<Fragment>| {
        let frontends = fragment.frontends.iter().map(|frontend| match frontend.key.way_in {
            WayIn::Node(_) => format!("node:{}", frontend.key.port),
            WayIn::Address(_) => frontend.key.to_string(),
        });
        let frontends: Vec<_> = frontends.collect();
        let mut row = vec![
            ("NAMESPACE", fragment.id.service.namespace().to_owned()),
            ("SERVICE", fragment.id.service.name().to_owned()),
            ("PORT", port(fragment)),
            ("FRONTENDS", frontends.join(" ")),
            ("ENDPOINTS", endpoints_of(fragment)),
        ];
        if wide {
            row.push(("FAMILY", fragment.id.family.to_string()));
            row.push((
                "AFFINITY",
                fragment.affinity.map_or_else(|| "-".into(), |it| format!("{it}s")),
            ));
            let verdict = |kind: FrontendKind| {
                let frontend = fragment.frontends.iter().find(|it| it.kind == kind);
                frontend.map_or_else(|| "-".to_owned(), |it| it.verdicts.external.to_string())
            };
            row.push(("FROM OUTSIDE", verdict(FrontendKind::NodePort)));
            row.push(("TO CLUSTER IP", verdict(FrontendKind::ClusterIp)));
        }
        row
    };
    of_namespace(store, namespace).map(row).collect()
}

fn port(fragment: &Fragment) -> String {
    let name = if fragment.id.port.is_empty() { "-" } else { &*fragment.id.port };
    format!("{name}/{}", fragment.id.protocol)
}

fn endpoints_of(fragment: &Fragment) -> String {
    let reachable = fragment.reachable();
    let local = reachable.iter().filter(|member| member.local).count();
    let rejects = fragment.frontends.iter().all(|it| it.verdicts.external == Verdict::Reject);
    match (reachable.len(), local) {
        (0, _) if rejects => "none: rejected".into(),
        (0, _) => "none here: dropped".into(),
        (all, 0) => all.to_string(),
        (all, local) => format!("{all}, {local} here"),
    }
}

fn endpoints(store: &Store, namespace: Option<&str>, wide: bool) -> Vec<Row> {
    let rows = of_namespace(store, namespace).flat_map(|fragment| {
        fragment.reachable().into_iter().map(move |member| {
            let mut row = vec![
                ("NAMESPACE", fragment.id.service.namespace().to_owned()),
                ("SERVICE", fragment.id.service.name().to_owned()),
                ("PORT", port(fragment)),
                ("ENDPOINT", member.addr.to_string()),
                ("HERE", if member.local { "yes" } else { "no" }.to_owned()),
            ];
            if wide {
                row.push(("FAMILY", fragment.id.family.to_string()));
                let within = |pool: &[proxier::ir::Member]| {
                    if pool.contains(&member) { "yes" } else { "no" }
                };
                row.push(("CLUSTER POOL", within(&fragment.cluster).to_owned()));
                row.push(("LOCAL POOL", within(&fragment.local).to_owned()));
            }
            row
        })
    });
    rows.collect()
}

fn conflicts(store: &Store, namespace: Option<&str>) -> Vec<Row> {
    let concerned = |it: &proxier::model::Conflict| {
        namespace.is_none_or(|wanted| {
            it.loser.service.namespace() == wanted || it.winner.service.namespace() == wanted
        })
    };
    let row = |it: proxier::model::Conflict| {
        vec![
            ("FRONTEND", it.key.to_string()),
            ("BELONGS TO", it.winner.to_string()),
            ("GOES WITHOUT", it.loser.to_string()),
        ]
    };
    store.conflicts().filter(concerned).map(row).collect()
}

/// Columns as kubectl sets them: as wide as needed, three spaces between.
fn table(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let mut widths: Vec<_> = first.iter().map(|(name, _)| name.chars().count()).collect();
    for row in rows {
        for (width, (_, text)) in widths.iter_mut().zip(row) {
            *width = (*width).max(text.chars().count());
        }
    }
    let header = first.iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let lines = std::iter::once(header)
        .chain(rows.iter().map(|row| row.iter().map(|(_, text)| &**text).collect()));
    lines.fold(String::new(), |mut text, cells| {
        let line = cells.iter().zip(&widths).fold(String::new(), |mut line, (cell, width)| {
            write!(line, "{cell:width$}   ").unwrap_or_default();
            line
        });
        text.push_str(line.trim_end());
        text.push('\n');
        text
    })
}

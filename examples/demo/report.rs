//! What happened, for people and for programs.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use proxier::{Capabilities, Mode, Protocol, ir::Origin};
use serde_json::{Value, json};

use crate::{
    change::Change,
    cluster::Cluster,
    expect::Seen,
    screen::{Item, Screen, Style, cut, many, time},
    show::{First, Gone, Shown},
    stage::Stage,
    traffic::Case,
};

/// Most frontends that are named although they are not tried.
const LEFT_OUT_LINES: usize = 5;

/// Most lines of a plan.
const PLAN_LINES: usize = 14;

/// Says where and with whom it all happens.
pub(crate) fn opening(screen: &mut Screen, stage: &Stage, cluster: &Cluster, files: &[PathBuf]) {
    let layout = &stage.layout;
    let addrs =
        |addrs: &[IpAddr]| addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let pods: usize = layout.topology.pods.len().saturating_sub(1);
    let remote: usize = layout.topology.remotes.iter().map(|it| it.pods.len()).sum();
    screen.line(
        screen.paint(Style::Bold, "Real Services on a real kernel, in namespaces of their own"),
    );
    screen.line("");
    let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
    let ignored: Vec<_> =
        cluster.ignored.iter().map(|(name, why)| format!("{name} ({why})")).collect();
    let ignored = if ignored.is_empty() {
        String::new()
    } else {
        format!("; not for a proxier: {}", ignored.join(", "))
    };
    let (services, slices) =
        (many(cluster.services.len(), "Service"), many(cluster.slices.len(), "EndpointSlice"));
    screen.labelled("manifests", &format!("{}: {services}, {slices}{ignored}", files.join(", ")));
    let name = &layout.env.name;
    screen.labelled(
        "node",
        &format!(
            "{name} ({}) with {}; {} on other nodes",
            addrs(&layout.env.ips),
            many(pods, "pod"),
            many(remote, "pod")
        ),
    );
    for client in &layout.clients {
        let strange = client.addrs.iter().filter(|ip| ip.is_ipv4()).count() > 1
            || client.addrs.iter().filter(|ip| ip.is_ipv6()).count() > 1;
        let text = match (client.origin, strange) {
            (Origin::Node, _) => continue,
            (Origin::Pod, _) => "a pod on this node that belongs to no Service",
            (Origin::External, false) => "a client outside the cluster",
            (Origin::External, true) => {
                "a client outside the cluster; called the stranger where loadBalancerSourceRanges do not \
                 have the address it asks from"
            }
        };
        screen.labelled(client.netns, &format!("{}: {text}", addrs(&client.addrs)));
    }
    screen.labelled("", &format!("built in {}", time(stage.built)));
    for problem in cluster.problems.iter().chain(&stage.notes) {
        screen.labelled("problem", problem);
    }
}

/// Says what the first sync did.
pub(crate) fn programmed(screen: &mut Screen, capabilities: &Capabilities, first: &First) {
    screen.title(&format!("{} mode", capabilities.mode));
    screen.labelled(
        "programmed",
        &format!(
            "{} (a Service port in one family each) as {} in {}: {}, of which {} of planning",
            many(first.fragments, "fragment"),
            many(first.ops.total(), "kernel object"),
            many(first.batches, "transaction"),
            time(first.total),
            time(first.plan),
        ),
    );
    screen.labelled("node holds", &first.holds.to_string());
    for (fragment, reason) in &first.degraded {
        screen.labelled("not done", &format!("{fragment}: {reason}"));
    }
}

/// The table of one mode.
pub(crate) fn table(
    screen: &mut Screen,
    stage: &Stage,
    rows: &[(Case, Seen)],
    left_out: &[(String, String)],
) {
    let names = ["from", "answered by", "source", "connect", "verdict"];
    let dim = names.map(|name| name.to_owned()).to_vec();
    let mut items = vec![Item::Row(dim, None)];
    let mut last = None;
    for (case, seen) in rows {
        heading(&mut items, &mut last, case);
        if let Some(reason) = &case.unsupported {
            items.push(Item::Row(
                [case.from.as_str(), "", "", "", "unsupported"].map(str::to_owned).to_vec(),
                None,
            ));
            items.push(Item::Note(reason.clone()));
            continue;
        }
        let good = case.is(seen, stage);
        items.push(Item::Row(
            vec![
                case.from.clone(),
                seen.answers(),
                case.source_seen(seen),
                seen.p50.map(time).unwrap_or_default(),
                seen.verdict().to_string(),
            ],
            Some(good),
        ));
        if !good {
            items.push(Item::Note(format!("the plan says: {}", case.expected)));
        }
        items.extend(case.expected.exception(seen).map(|why| Item::Note(why.to_owned())));
    }
    screen.line("");
    screen.table(&items);
    if !left_out.is_empty() {
        screen.line("");
    }
    for (name, why) in left_out.iter().take(LEFT_OUT_LINES) {
        screen.labelled("not tried", &format!("{name}: {why}"));
    }
    if let Some(more) = left_out.len().checked_sub(LEFT_OUT_LINES + 1) {
        screen.labelled("", &format!("… and {} more, all of them programmed", more + 1));
    }
}

/// The tables of several modes, side by side.
pub(crate) fn side_by_side(screen: &mut Screen, stage: &Stage, all: &[Shown]) {
    let Some(first) = all.first() else { return };
    let modes = all.iter().map(|shown| shown.mode.to_string());
    let mut items =
        vec![Item::Row(std::iter::once("from".to_owned()).chain(modes).collect(), None)];
    let mut last = None;
    for (index, (case, _)) in first.rows.iter().enumerate() {
        heading(&mut items, &mut last, case);
        let mut cells = vec![case.from.clone()];
        let mut notes = Vec::new();
        for shown in all {
            let Some((case, seen)) = shown.rows.get(index) else { continue };
            if case.unsupported.is_some() {
                cells.push("unsupported".to_owned());
                continue;
            }
            let good = case.is(seen, stage);
            let sign = if good { "✓" } else { "✗" };
            let connect = seen.p50.map(|p50| format!(" {}", time(p50))).unwrap_or_default();
            cells.push(format!("{sign} {}{connect}", seen.verdict()));
            if !good {
                let (mode, answers, source) = (shown.mode, seen.answers(), case.source_seen(seen));
                notes.push(Item::Note(format!(
                    "{mode}: {answers} {source}; the plan says: {}",
                    case.expected
                )));
            }
        }
        items.push(Item::Row(cells, None));
        items.append(&mut notes);
    }
    screen.line("");
    screen.table(&items);
    screen.line("");
    screen.table(&figures(all));
}

/// What it took each mode.
fn figures(all: &[Shown]) -> Vec<Item> {
    let row = |name: &str, cell: &dyn Fn(&Shown) -> String| {
        let cells = all.iter().map(cell);
        Item::Row(std::iter::once(name.to_owned()).chain(cells).collect(), None)
    };
    let change = |protocol, cell: fn(&Change) -> String| {
        move |shown: &Shown| {
            let change = shown.changes.iter().find(|change| change.protocol == protocol);
            change.map(cell).unwrap_or_default()
        }
    };
    let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
    let flow = |change: &Change| {
        let name = |who: &Option<String>| who.clone().unwrap_or_else(|| "nobody".to_owned());
        format!("{} → {}", name(&change.flow.before), name(&change.flow.after))
    };
    vec![
        row("", &|shown| shown.mode.to_string()),
        row("first sync", &|shown| time(shown.first.total)),
        row("  kernel objects", &|shown| shown.first.ops.total().to_string()),
        row("  rules", &|shown| shown.first.holds.rules.to_string()),
        row("a TCP endpoint goes", &change(tcp, |it| time(it.synced.total))),
        row("  to plan", &change(tcp, |it| time(it.synced.plan))),
        row("  kernel objects", &change(tcp, |it| it.synced.ops.total().to_string())),
        row("  open connection", &change(tcp, flow)),
        row("a UDP endpoint goes", &change(udp, |it| time(it.synced.total))),
        row("  one source port", &change(udp, flow)),
        row("cleanup", &|shown| time(shown.gone.took)),
    ]
}

fn heading(items: &mut Vec<Item>, last: &mut Option<String>, case: &Case) {
    let Case { service, kind, protocol, dst, about, .. } = case;
    let text = format!("{service}  {kind}  {dst}/{protocol}");
    if last.as_ref() != Some(&text) {
        items.push(Item::Heading(text.clone(), about.clone()));
        *last = Some(text);
    }
}

/// What happened when an endpoint went.
pub(crate) fn change(screen: &mut Screen, change: &Change) {
    let Change { service, protocol, gone, gone_addr, synced, after, expected, as_planned, flow } =
        change;
    screen.title(&format!("{service}/{protocol}: endpoint {gone} ({gone_addr}) goes"));
    screen.labelled(
        "took",
        &format!(
            "{} from the event until the kernel held it{}; {} to plan; {}, {}, {}",
            time(synced.total),
            if synced.stale_flows > 0 { " and had forgotten the stale flows" } else { "" },
            time(synced.plan),
            many(synced.visited, "fragment"),
            many(synced.ops.total(), "kernel object"),
            many(synced.batches, "transaction"),
        ),
    );
    let width = screen.width() - 4;
    let lines: Vec<String> = synced.text.lines().map(abbreviated).collect();
    for line in lines.iter().take(PLAN_LINES) {
        screen.line(screen.paint(Style::Dim, &format!("    {}", cut(line, width))));
    }
    if let Some(more) = lines.len().checked_sub(PLAN_LINES + 1) {
        screen.line(screen.paint(Style::Dim, &format!("    … and {}", many(more + 1, "line"))));
    }
    let mark = screen.mark(*as_planned);
    screen.line(format!("{:<12}{} {mark}", "answers", after.answers()));
    if !as_planned {
        screen.labelled("", &format!("the plan says: {expected}"));
    }
    let name = |who: &Option<String>| who.clone().unwrap_or_else(|| "nobody".to_owned());
    let (before, after) = (name(&flow.before), name(&flow.after));
    let mark = screen.mark(flow.as_planned);
    let text = match protocol {
        Protocol::Udp => format!(
            "one source port: {before} before, {after} after ({} forgotten)",
            many(synced.stale_flows, "flow")
        ),
        Protocol::Sctp | Protocol::Tcp => {
            format!("an open connection: {before} before, {after} after")
        }
    };
    screen.line(format!("{:<12}{text} {mark}", "flow"));
}

/// A line of a plan without what is said elsewhere: a rule without its chain and its matches' names, and
/// with the endpoint that its comment names at the end.
fn abbreviated(line: &str) -> String {
    let words = line.trim_start();
    let (indent, words) = line.split_at(line.len() - words.len());
    let Some((sign, rule)) = words.split_once(" -A ") else { return line.to_owned() };
    let rule = rule.split_once(' ').map_or(rule, |(_chain, rest)| rest);
    let rule = rule.replace("-m statistic --mode random ", "");
    let parts = rule.split_once("-m comment --comment \"").and_then(|(before, rest)| {
        let (comment, after) = rest.split_once("\" ")?;
        let comment = comment.rsplit_once("-> ").map_or(comment, |(_, endpoint)| endpoint);
        Some(format!("{before}{after}  # {comment}"))
    });
    format!("{indent}{sign} {}", parts.unwrap_or(rule))
}

/// What is left in the end.
pub(crate) fn cleaned(screen: &mut Screen, gone: &Gone) {
    screen.title("Cleaned up");
    let mark = screen.mark(gone.before == gone.after);
    let links =
        if gone.before.links == gone.after.links { "" } else { ", other links than before" };
    screen.line(format!(
        "{:<12}{}{links} (took {}) {mark}",
        "node holds",
        gone.after,
        time(gone.took)
    ));
    let (untouched, of) = gone.untouched;
    let mark = screen.mark(untouched == of);
    screen.line(format!(
        "{:<12}{untouched} of {} lead past the node untouched {mark}",
        "frontends", of
    ));
}

/// Counts, and says what was not as planned.
pub(crate) fn verdict(screen: &mut Screen, stage: &Stage, shown: &Shown) -> bool {
    let failures = shown.failures(stage);
    screen.line("");
    for failure in &failures {
        screen.line(format!("{} {failure}", screen.mark(false)));
    }
    let tried = shown.tried().count();
    let good = shown.tried().filter(|(case, seen)| case.is(seen, stage)).count();
    let connections: u64 = shown.tried().map(|(_, seen)| seen.count()).sum();
    let text = format!(
        "{}: {good} of {tried} ways as planned, {connections} connections, {}",
        shown.mode,
        time(shown.took)
    );
    let style = if failures.is_empty() { Style::Green } else { Style::Red };
    screen.line(screen.paint(style, &text));
    failures.is_empty()
}

/// Everything as data.
pub(crate) fn to_json(
    stage: &Stage,
    cluster: &Cluster,
    all: &[Shown],
    unavailable: &[(Mode, String)],
) -> Value {
    let unavailable = unavailable.iter().map(|(mode, why)| json!({"mode": mode, "why": why}));
    let ignored = cluster.ignored.iter().map(|(name, why)| json!({"service": name, "why": why}));
    let clients =
        stage.layout.clients.iter().map(|it| json!({"netns": it.netns, "addresses": it.addrs}));
    json!({
        "node": stage.layout.env.name,
        "node_addresses": stage.layout.env.ips,
        "clients": clients.collect::<Vec<_>>(),
        "services": cluster.services.len(),
        "ignored": ignored.collect::<Vec<_>>(),
        "problems": cluster.problems.iter().chain(&stage.notes).collect::<Vec<_>>(),
        "modes": all.iter().map(|shown| mode_to_json(stage, shown)).collect::<Vec<_>>(),
        "unavailable": unavailable.collect::<Vec<_>>(),
    })
}

fn mode_to_json(stage: &Stage, shown: &Shown) -> Value {
    let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let row = |(case, seen): &(Case, Seen)| {
        json!({
            "service": case.service,
            "kind": case.kind,
            "address": case.dst,
            "protocol": case.protocol,
            "from": case.from,
            "client": case.source,
            "verdict": seen.verdict(),
            "answered": seen.answered.iter().map(|(name, it)| {
                let answers = json!({"count": it.count, "sources": it.sources});
                (name.clone(), answers)
            }).collect::<serde_json::Map<_, _>>(),
            "source_seen": case.source_seen(seen),
            "connect_p50_us": seen.p50.map(us),
            "expected": case.expected.to_string(),
            "unsupported": case.unsupported,
            "as_planned": case.unsupported.is_none().then(|| case.is(seen, stage)),
        })
    };
    let change = |it: &Change| {
        json!({
            "service": it.service,
            "protocol": it.protocol,
            "endpoint": it.gone,
            "address": it.gone_addr,
            "plan_us": us(it.synced.plan),
            "event_to_kernel_us": us(it.synced.total),
            "visited": it.synced.visited,
            "operations": it.synced.ops,
            "transactions": it.synced.batches,
            "stale_flows": it.synced.stale_flows,
            "plan": it.synced.text,
            "answered": it.after.counts(),
            "flow": {"before": it.flow.before, "after": it.flow.after, "as_planned": it.flow.as_planned},
            "as_planned": it.as_planned,
        })
    };
    let (first, gone) = (&shown.first, &shown.gone);
    json!({
        "mode": shown.mode,
        "as_planned": shown.failures(stage).is_empty(),
        "failures": shown.failures(stage),
        "first_sync": {
            "fragments": first.fragments,
            "operations": first.ops,
            "transactions": first.batches,
            "plan_us": us(first.plan),
            "total_us": us(first.total),
            "kernel": first.holds,
        },
        "rows": shown.rows.iter().map(row).collect::<Vec<_>>(),
        "not_shown": shown.left_out.iter().map(|(name, why)| json!({"frontend": name, "why": why})).collect::<Vec<_>>(),
        "degraded": first.degraded.iter().map(|(id, why)| json!({"fragment": id, "why": why})).collect::<Vec<_>>(),
        "changes": shown.changes.iter().map(change).collect::<Vec<_>>(),
        "cleanup": {
            "took_us": us(gone.took),
            "kernel_before": gone.before,
            "kernel_after": gone.after,
            "frontends": gone.untouched.1,
            "untouched": gone.untouched.0,
        },
    })
}

/// A mode that cannot be shown.
pub(crate) fn unavailable(screen: &mut Screen, mode: Mode, why: &str) {
    screen.labelled(mode.name(), &format!("not available: {why}"));
}

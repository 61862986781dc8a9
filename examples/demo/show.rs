//! One mode from the first sync to the last trace removed.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use proxier::{
    Degraded, Mode, OpCount, OpenContext, Protocol, Proxier, Update, ir::Origin, open, probe,
};

use crate::{
    args::Options,
    change::{self, Change},
    cluster::Cluster,
    expect::{Happened, Seen},
    keep,
    kernel::Holdings,
    report,
    screen::Screen,
    stage::{self, Stage},
    traffic::{self, Case, Cases},
};

/// What a mode did.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) mode: Mode,
    pub(crate) first: First,
    pub(crate) rows: Vec<(Case, Seen)>,
    pub(crate) left_out: Vec<(String, String)>,
    /// TCP, then UDP; without those for which there is no Service.
    pub(crate) changes: Vec<Change>,
    pub(crate) gone: Gone,
    /// All of it, time to look around excluded.
    pub(crate) took: Duration,
}

/// The first sync.
#[derive(Debug)]
pub(crate) struct First {
    pub(crate) fragments: usize,
    pub(crate) ops: OpCount,
    pub(crate) batches: usize,
    pub(crate) plan: Duration,
    pub(crate) total: Duration,
    pub(crate) holds: Holdings,
    /// Fragments that are not programmed, and why.
    pub(crate) degraded: Vec<(String, String)>,
}

/// The end.
#[derive(Debug)]
pub(crate) struct Gone {
    pub(crate) took: Duration,
    pub(crate) before: Holdings,
    pub(crate) after: Holdings,
    /// Frontends that lead nowhere in particular again, of how many.
    pub(crate) untouched: (usize, usize),
}

impl Shown {
    /// The rows of which the plan has something to say.
    pub(crate) fn tried(&self) -> impl Iterator<Item = &(Case, Seen)> {
        self.rows.iter().filter(|(case, _)| case.unsupported.is_none())
    }

    /// Everything that was not as planned, in words.
    pub(crate) fn failures(&self, stage: &Stage) -> Vec<String> {
        let mut failures = Vec::new();
        if self.tried().next().is_none() {
            failures.push("no frontend could be tried".to_owned());
        }
        for (case, seen) in self.tried().filter(|(case, seen)| !case.is(seen, stage)) {
            let Case { service, kind, protocol, dst, from, expected, .. } = case;
            failures.push(format!(
                "{service} {kind} {dst}/{protocol} from {from}: {} instead of {expected}",
                seen.verdict()
            ));
        }
        for change in &self.changes {
            if !change.as_planned {
                let Change { service, gone, expected, after, .. } = change;
                let seen = after.answers();
                failures.push(format!("{service} without {gone}: {seen} instead of {expected}"));
            }
            if !change.flow.as_planned {
                let Change { service, gone, flow, .. } = change;
                let name =
                    |who: &Option<String>| who.clone().unwrap_or_else(|| "nobody".to_owned());
                let (before, after) = (name(&flow.before), name(&flow.after));
                failures
                    .push(format!("{service}: a flow to {before} led to {after} without {gone}"));
            }
        }
        let Gone { before, after, untouched: (untouched, of), .. } = self.gone;
        if before != after || untouched != of {
            failures.push(format!(
                "after the cleanup: {after}; {untouched} of {of} frontends untouched"
            ));
        }
        failures
    }
}

/// Settings for the lab's node.
pub(crate) fn context(stage: &Stage) -> OpenContext {
    let mut context = OpenContext::default();
    context.netns = Some(stage.world.node().path());
    context
}

/// Why a mode cannot be shown; `None` when it can.
pub(crate) async fn obstacle(stage: &Stage, mode: Mode) -> Option<String> {
    let suitability = probe(mode, &context(stage)).await;
    let why = || suitability.reasons.first().cloned().unwrap_or_else(|| "not available".to_owned());
    (!suitability.available).then(why)
}

/// Shows a mode on `screen`, as it happens.
///
/// # Errors
/// The kernel cannot be programmed or read.
pub(crate) async fn show(
    stage: &Stage,
    cluster: &Cluster,
    mode: Mode,
    options: &Options,
    screen: &mut Screen,
) -> Result<Shown, Box<dyn Error>> {
    let began = Instant::now();
    let before = Holdings::of(stage.world.node()).await?;
    let mut proxier = open(mode, &context(stage)).await?;
    let mut store = cluster.store(stage.layout.env.clone());
    let update = store.take().ok_or("the manifests are incomplete")?;
    let (first, degraded) = first_sync(stage, &mut *proxier, update).await?;
    report::programmed(screen, proxier.capabilities(), &first);

    let cases = Cases::of(stage, &stage::fragments(&store), &degraded, mode);
    let seen = cases.run(options.connections).await;
    let Cases { cases, left_out } = cases;
    let rows: Vec<_> = cases.into_iter().zip(seen).collect();
    report::table(screen, stage, &rows, &left_out);

    let mut changes = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        if let Some(fragment) = change::candidate(&store, stage, protocol) {
            let proxier = &mut *proxier;
            let change =
                change::remove_endpoint(stage, cluster, &mut store, proxier, &fragment).await?;
            report::change(screen, &change);
            changes.push(change);
        }
    }
    let paused = Instant::now();
    if options.keep {
        let reached = |(case, seen): &&(Case, Seen)| {
            let by_pod = case.origin == Origin::Pod && case.protocol == Protocol::Tcp;
            by_pod && case.dst.is_ipv4() && seen.verdict() == Happened::Forwarded
        };
        let service = rows.iter().rfind(reached).map(|(case, _)| case.dst);
        keep::wait(stage, mode, service, screen).await;
    }
    let paused = paused.elapsed();

    let cleaning = Instant::now();
    proxier.cleanup().await?;
    let took = cleaning.elapsed();
    let after = Holdings::of(stage.world.node()).await?;
    let untouched = traffic::untouched(&rows).await;
    let gone = Gone { took, before, after, untouched };
    report::cleaned(screen, &gone);
    Ok(Shown { mode, first, rows, left_out, changes, gone, took: began.elapsed() - paused })
}

async fn first_sync(
    stage: &Stage,
    proxier: &mut dyn Proxier,
    update: Update,
) -> Result<(First, Vec<Degraded>), Box<dyn Error>> {
    // For people: `sync` plans by itself.
    let planning = Instant::now();
    drop(proxier.plan(&update));
    let plan = planning.elapsed();
    let syncing = Instant::now();
    let report = proxier.sync(update).await?;
    let total = syncing.elapsed();
    let degraded =
        report.degraded.iter().map(|it| (it.id.to_string(), it.reason.clone())).collect();
    let first = First {
        fragments: report.visited,
        ops: report.ops,
        batches: report.batches,
        plan,
        total,
        holds: Holdings::of(stage.world.node()).await?,
        degraded,
    };
    Ok((first, report.degraded))
}

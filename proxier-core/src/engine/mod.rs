//! The engine: turns a typed backend into a [`Proxier`]. Written once, for all modes.
//!
//! It knows what is wanted and what it installed, plans the difference, sends it, and notes the
//! outcome. When the outcome is in doubt (a lost reply, a dropped future, a refused batch that is not
//! atomic) it reads the kernel back and goes on from there; it never flushes and rewrites.

mod compare;
mod gather;
mod lane;
mod plan;
mod program;

use std::{
    fmt,
    time::{Duration, Instant},
};

use async_trait::async_trait;

use self::{
    lane::Lane,
    plan::{Plan, describe, refusal},
};
use crate::{
    name::{ByFamily, Family, FragmentId},
    proxier::{
        Capabilities, Counter, PlanSummary, PlannedOp, Proxier, Status, SyncError, SyncReport,
        Totals, Update,
    },
    spi::{Backend, Dataplane},
};

/// A [`Proxier`] made of a [`Backend`] and its [`Dataplane`].
pub struct Engine<B: Backend, D> {
    backend: B,
    dataplane: D,
    lanes: Vec<Lane<B>>,
    totals: Totals,
}

impl<B: Backend, D: Dataplane<B>> Engine<B, D> {
    /// Makes a proxier for `families`; fragments of other families are left alone. Does no I/O: the
    /// first sync reads what the kernel holds.
    #[must_use]
    pub fn new(backend: B, dataplane: D, families: &[Family]) -> Self {
        let lanes = families.iter().map(|family| Lane::new(*family)).collect();
        Self { backend, dataplane, lanes, totals: Totals::default() }
    }

    /// The pure half.
    pub const fn backend(&self) -> &B {
        &self.backend
    }

    /// The I/O half.
    pub const fn dataplane(&self) -> &D {
        &self.dataplane
    }

    /// The I/O half, to change its settings. Whatever is done to the kernel through it counts as
    /// drift.
    pub const fn dataplane_mut(&mut self) -> &mut D {
        &mut self.dataplane
    }

    /// What the engine believes the kernel to hold in a family: the union of all installed
    /// fragments' objects and the skeleton. O(everything); for audits and tests.
    #[must_use]
    pub fn predicted(&self, family: Family) -> std::collections::BTreeMap<B::Key, B::Value> {
        let lane = self.lanes.iter().find(|lane| lane.family == family);
        lane.map(|lane| lane.predicted(&self.backend)).unwrap_or_default()
    }

    fn finish(&mut self, outcome: &Result<SyncReport, SyncError>) {
        match outcome {
            Ok(_) => self.totals.syncs += 1,
            Err(_) => self.totals.failures += 1,
        }
    }

    fn count(&mut self, report: &SyncReport) {
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        self.totals.visited += wide(report.visited);
        self.totals.add += wide(report.ops.add);
        self.totals.set += wide(report.ops.set);
        self.totals.del += wide(report.ops.del);
        self.totals.drift += wide(report.drift);
        self.totals.stale_flows += wide(report.stale_flows.v4 + report.stale_flows.v6);
    }

    /// Runs `step` for every family, whatever becomes of the others.
    async fn each_lane(&mut self, step: Step<'_>) -> Result<SyncReport, SyncError> {
        let mut report = SyncReport::default();
        let mut failure = None;
        for index in 0..self.lanes.len() {
            if let Err(error) = self.run_lane(index, &step, &mut report).await {
                failure.get_or_insert(error);
            }
        }
        report.revision = self.lanes.iter().map(|lane| lane.desired).max().unwrap_or_default();
        report.degraded = self.lanes.iter().flat_map(Lane::degraded).collect();
        for lane in &self.lanes {
            for (table, count) in &lane.rules {
                report.rules.of_mut(lane.family).entry(table).or_default().there = *count;
            }
        }
        self.count(&report);
        let outcome = failure.map_or(Ok(report), Err);
        self.finish(&outcome);
        outcome
    }
}

/// What to do in each family.
enum Step<'a> {
    Audit,
    Retry,
    Sync(&'a Update),
}

#[async_trait]
impl<B: Backend, D: Dataplane<B>> Proxier for Engine<B, D> {
    fn capabilities(&self) -> &Capabilities {
        self.backend.capabilities()
    }

    fn plan(&self, update: &Update) -> PlanSummary {
        let mut summary = PlanSummary { revision: update.revision(), ..PlanSummary::default() };
        for lane in &self.lanes {
            let (items, node) = lane.items(update);
            if lane.skeleton.as_ref() != Some(&node) {
                let skeleton = Plan::skeleton(&self.backend, lane, &node);
                summary.ops.extend(skeleton.iter().map(describe::<B>));
            }
            let plan = Plan::of(&self.backend, lane, &node, &items);
            summary.visited += plan.visited;
            summary.ops.extend(plan.ops.iter().map(describe::<B>));
            summary.refused.extend(plan.refused.iter().map(refusal));
        }
        summary
    }

    async fn compare(&mut self, update: &Update) -> Result<PlanSummary, SyncError> {
        self.compare_lanes(update).await
    }

    async fn sync(&mut self, update: Update) -> Result<SyncReport, SyncError> {
        self.each_lane(Step::Sync(&update)).await
    }

    async fn retry(&mut self) -> Result<SyncReport, SyncError> {
        self.each_lane(Step::Retry).await
    }

    async fn audit(&mut self) -> Result<SyncReport, SyncError> {
        self.each_lane(Step::Audit).await
    }

    async fn cleanup(&mut self) -> Result<(), SyncError> {
        for lane in &mut self.lanes {
            *lane = Lane::new(lane.family);
        }
        self.dataplane.wipe().await.map_err(SyncError::Cleanup)
    }

    async fn counters(&mut self) -> Result<Vec<Counter>, SyncError> {
        let Self { backend, dataplane, lanes, .. } = self;
        let mut found = Vec::new();
        for lane in lanes {
            if !lane.counts() {
                continue;
            }
            let family = lane.family;
            let read = dataplane.read_counters(family).await;
            let read = read.map_err(|source| SyncError::Dump { family, source })?;
            found.extend(lane.counters(backend, &read));
        }
        Ok(found)
    }

    async fn tick(&mut self, now: Instant) -> Result<Option<Duration>, SyncError> {
        self.dataplane.tick(now).await.map_err(SyncError::Tick)
    }

    async fn foreign_change(&mut self) {
        self.dataplane.foreign_change().await;
    }

    fn objects(&self, id: &FragmentId) -> Vec<PlannedOp> {
        let lane = self.lanes.iter().find(|lane| lane.family == id.family);
        let slot = lane.and_then(|lane| lane.slots.get(id));
        let installed = slot.and_then(|slot| slot.installed.as_ref());
        installed.map(|it| Plan::objects(&self.backend, it)).unwrap_or_default()
    }

    fn status(&self) -> Status {
        let of = |family| self.lanes.iter().find(|lane| lane.family == family);
        Status {
            desired: self.lanes.iter().map(|lane| lane.desired).max().unwrap_or_default(),
            programmed: ByFamily::from_fn(|family| {
                of(family).map(|lane| lane.programmed).unwrap_or_default()
            }),
            degraded: self.lanes.iter().flat_map(Lane::degraded).collect(),
            totals: self.totals,
        }
    }
}

impl<B: Backend, D> fmt::Debug for Engine<B, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<_> = self.lanes.iter().map(|lane| (lane.family, lane.slots.len())).collect();
        f.debug_struct("Engine").field("fragments", &sizes).field("totals", &self.totals).finish()
    }
}

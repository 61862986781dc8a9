//! What a first sync would do, given what the kernel holds: without doing it.

use std::collections::BTreeMap;

use async_trait::async_trait;

use super::{Engine, lane::Lane, plan::describe, program::Run};
use crate::{
    conntrack::{FlowFilter, Forgotten},
    name::Family,
    proxier::{PlanSummary, SyncError, SyncReport, Update},
    spi::{Backend, CommitError, Dataplane, Op, Owner},
};

/// Reads what the kernel holds and keeps what would be written.
struct Dry<'a, B: Backend, D> {
    kernel: &'a mut D,
    kept: Vec<Op<B::Key, B::Value>>,
}

#[async_trait]
impl<B: Backend, D: Dataplane<B>> Dataplane<B> for Dry<'_, B, D> {
    async fn commit(&mut self, _: Family, ops: &[Op<B::Key, B::Value>]) -> Result<(), CommitError> {
        self.kept.extend_from_slice(ops);
        Ok(())
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<B::Key, B::Value>, CommitError> {
        self.kernel.dump(family).await
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        Ok(())
    }

    async fn forget_flows(
        &mut self,
        _: Family,
        _: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        Ok(Forgotten::default())
    }

    fn batch_limit(&self) -> usize {
        self.kernel.batch_limit()
    }
}

impl<B: Backend, D: Dataplane<B>> Engine<B, D> {
    pub(super) async fn compare_lanes(
        &mut self,
        update: &Update,
    ) -> Result<PlanSummary, SyncError> {
        let mut summary = PlanSummary { revision: update.revision(), ..PlanSummary::default() };
        for family in self.lanes.iter().map(|lane| lane.family).collect::<Vec<_>>() {
            let mut lane = Lane::new(family);
            let (items, node) = lane.items(update);
            lane.want(&items, node, update.revision());
            let mut dry = Dry { kernel: &mut self.dataplane, kept: Vec::new() };
            let mut report = SyncReport::default();
            let mut run = Run {
                backend: &self.backend,
                dataplane: &mut dry,
                lane: &mut lane,
                report: &mut report,
            };
            run.reconcile().await?;
            summary.visited += report.visited;
            let ops = dry.kept.into_iter().map(|op| describe::<B>(&(Owner::Skeleton, op)));
            summary.ops.extend(ops);
            summary.refused.extend(lane.degraded());
        }
        Ok(summary)
    }
}

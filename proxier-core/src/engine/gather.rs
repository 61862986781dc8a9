//! From wanted fragments and what the kernel holds to the batches that make the difference. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    lane::{Installed, Lane},
    plan::{Plan, Tagged, Wanted},
};
use crate::{
    ir::Fragment,
    name::FragmentId,
    spi::{Backend, Op, Stage},
};

pub(super) type Dump<B> = BTreeMap<<B as Backend>::Key, <B as Backend>::Value>;

/// How much more the fragments to come may be expected to share than those that were compiled.
const MOST_EXPECTED: usize = 7;

/// Fragments that are compiled onto what the kernel holds, a batch at a time.
pub(super) struct Gathering<'a, B: Backend> {
    /// What is still to be compiled.
    pub wanted: std::vec::IntoIter<(Arc<Fragment>, B::Memo)>,
    pub fallback: &'a BTreeMap<FragmentId, Installed<B>>,
    pub given_up: &'a BTreeSet<FragmentId>,
    /// What the kernel holds, and nobody has asked for so far.
    pub actual: Dump<B>,
    /// Operations that did not fit the last batch.
    pub carried: Vec<Tagged<B>>,
    /// What lets traffic in, if that is to come last.
    pub entries: Vec<Tagged<B>>,
    pub entries_last: bool,
    pub limit: usize,
}

impl<B: Backend> Gathering<'_, B> {
    /// The operations of the next batch; none at the end.
    pub(super) fn next(&mut self, backend: &B, lane: &mut Lane<B>) -> Vec<Tagged<B>> {
        let mut batch = std::mem::take(&mut self.carried);
        self.reserve(lane);
        while let Some((fragment, memo)) = self.wanted.next() {
            let id = &fragment.id;
            let mut ops = if !self.given_up.contains(id) {
                self.compile(backend, lane, &fragment, &memo)
            } else if let Some(previous) = self.fallback.get(id) {
                self.restore(backend, lane, id, previous)
            } else {
                Vec::new()
            };
            if self.entries_last {
                let is_entry = |(_, op): &mut Tagged<B>| backend.stage(op.key()) == Stage::Entry;
                self.entries.extend(ops.extract_if(.., is_entry));
            }
            if !batch.is_empty() && batch.len() + ops.len() > self.limit {
                self.carried = ops;
                return batch;
            }
            batch.append(&mut ops);
        }
        batch
    }

    /// Makes room for what fragments share, by what some of them did: a table that grows step by step
    /// takes half as much again while it grows.
    fn reserve(&self, lane: &mut Lane<B>) {
        let left = self.wanted.len();
        let done = lane.slots.len().saturating_sub(left);
        // A few do not tell much of the others: one may have thousands of endpoints.
        if left <= done.saturating_mul(MOST_EXPECTED) && done > 0 {
            lane.shared.reserve(lane.shared.len().saturating_mul(left) / done);
        }
    }

    /// What it takes for a fragment to be as wanted.
    fn compile(
        &mut self,
        backend: &B,
        lane: &mut Lane<B>,
        fragment: &Arc<Fragment>,
        memo: &B::Memo,
    ) -> Vec<Tagged<B>> {
        let node = Arc::clone(&lane.node);
        let wanted = Wanted { fragment, node: &node, memo: Some(memo) };
        match Plan::fresh(backend, lane, &fragment.id, wanted) {
            Ok(plan) => self.adopt(lane, plan),
            Err(error) => {
                lane.blame(&fragment.id, error.kind(), error.to_string());
                Vec::new()
            }
        }
    }

    /// What it takes for a fragment to be as it was before: the kernel does not take it as wanted.
    fn restore(
        &mut self,
        backend: &B,
        lane: &mut Lane<B>,
        id: &FragmentId,
        previous: &Installed<B>,
    ) -> Vec<Tagged<B>> {
        let Installed { fragment, node, memo } = previous;
        let wanted = Wanted { fragment, node, memo: Some(memo) };
        let plan = Plan::fresh(backend, lane, id, wanted);
        plan.map(|plan| self.adopt(lane, plan)).unwrap_or_default()
    }

    fn adopt(&mut self, lane: &mut Lane<B>, mut plan: Plan<B>) -> Vec<Tagged<B>> {
        rebase::<B>(&mut plan.ops, &mut self.actual);
        for (id, installed) in plan.outcomes {
            if let Some(slot) = lane.slots.get_mut(&id) {
                slot.installed = installed;
            }
        }
        lane.note_shared(plan.shared);
        plan.ops
    }
}

/// Turns creations into what is really missing, given what is there; takes that out of `actual`.
pub(super) fn rebase<B: Backend>(ops: &mut Vec<Tagged<B>>, actual: &mut Dump<B>) {
    for (owner, op) in std::mem::take(ops) {
        let op = match op {
            Op::Add(key, new) => match actual.remove(&key) {
                None => Op::Add(key, new),
                Some(old) if old == new => continue,
                Some(old) => Op::Set { key, old, new },
            },
            Op::Del(..) | Op::Set { .. } => op,
        };
        ops.push((owner, op));
    }
}

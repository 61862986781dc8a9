//! Carrying plans out, and finding out what is there when that is in doubt.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    sync::Arc,
    task::Poll,
};

use super::{
    Engine, Step,
    gather::{Dump, Gathering, rebase},
    lane::{Installed, Item, Lane, Shared, Slot},
    plan::{Plan, Tagged, sort},
};
use crate::{
    conntrack::{FlowFilter, Forgotten, stale},
    in_full,
    ir::Fragment,
    name::FragmentId,
    proxier::{SyncError, SyncReport, Verb},
    spi::{Backend, CommitError, Dataplane, Objects, Op, Owner},
};

/// How often the kernel is read back within one sync before giving up.
const MAX_RECONCILES: u32 = 3;

impl<B: Backend> Lane<B> {
    pub(super) fn predicted(&self, backend: &B) -> Dump<B> {
        let mut all = match &self.skeleton {
            Some(node) => backend.skeleton(self.family, node),
            None => BTreeMap::new(),
        };
        for it in self.slots.values().filter_map(|slot| slot.installed.as_ref()) {
            let mut objects = Objects::default();
            if backend.compile(&it.node, &it.fragment, &it.memo, &mut objects).is_ok() {
                let (own, shared) = objects.into_parts();
                all.extend(own);
                all.extend(shared);
            }
        }
        all
    }

    /// Takes note that a plan is in effect.
    fn note(&mut self, outcomes: Vec<(FragmentId, Option<Installed<B>>)>) {
        for (id, installed) in outcomes {
            match self.slots.get_mut(&id) {
                Some(slot) if installed.is_none() && slot.desired.is_none() => {
                    self.slots.remove(&id);
                    self.troubles.remove(&id);
                }
                Some(slot) => {
                    slot.installed = installed;
                    if slot.is_as_wanted() {
                        self.troubles.remove(&id);
                    }
                }
                None => {}
            }
        }
    }

    pub(super) fn note_shared(&mut self, shared: BTreeMap<B::Key, (usize, B::Value)>) {
        for (key, (holders, value)) in shared {
            if holders == 0 {
                self.shared.remove(&key);
            } else {
                self.shared.insert(key, Shared { holders, value });
            }
        }
    }

    /// Forgets the trouble of fragments that are as wanted by now.
    fn forgive(&mut self) {
        let Self { slots, troubles, .. } = self;
        troubles.retain(|id, _| slots.get(id).is_some_and(|slot| !slot.is_as_wanted()));
    }

    /// The fragments that are not as wanted.
    fn troubled(&self) -> Vec<Item> {
        let desired = |id| self.slots.get(id).and_then(|slot| slot.desired.clone());
        self.troubles.keys().map(|id| (id.clone(), desired(id))).collect()
    }
}

impl<B: Backend> Slot<B> {
    fn is_as_wanted(&self) -> bool {
        match (&self.desired, &self.installed) {
            (Some(desired), Some(it)) => {
                Arc::ptr_eq(desired, &it.fragment) || *desired == it.fragment
            }
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
}

impl<B: Backend, D: Dataplane<B>> Engine<B, D> {
    pub(super) async fn run_lane(
        &mut self,
        index: usize,
        step: &Step<'_>,
        report: &mut SyncReport,
    ) -> Result<(), SyncError> {
        let Self { backend, dataplane, lanes, .. } = self;
        let Some(lane) = lanes.get_mut(index) else { return Ok(()) };
        let mut run = Run { backend, dataplane, lane, report };
        match step {
            Step::Audit => run.reconcile().await,
            Step::Retry => run.retry().await,
            Step::Sync(update) => {
                let (items, node) = run.lane.items(update);
                run.lane.want(&items, node, update.revision());
                run.sync(items).await
            }
        }
    }
}

/// One family during one sync.
pub(super) struct Run<'a, B: Backend, D> {
    pub backend: &'a B,
    pub dataplane: &'a mut D,
    pub lane: &'a mut Lane<B>,
    pub report: &'a mut SyncReport,
}

/// What became of some operations.
enum Sent {
    Done,
    /// Nobody knows: the kernel has to be read back.
    Unknown,
    /// One fragment is to blame; with an atomic backend nothing happened.
    Refused(FragmentId),
    /// Nobody knows which; with an atomic backend nothing happened.
    RefusedSomewhere(CommitError),
}

impl<B: Backend, D: Dataplane<B>> Run<'_, B, D> {
    async fn sync(&mut self, items: Vec<Item>) -> Result<(), SyncError> {
        if self.lane.known {
            if self.lane.skeleton.as_ref() != Some(&self.lane.node) {
                self.program_skeleton().await?;
            }
            self.program(items).await?;
        } else {
            drop(items);
        }
        if !self.lane.known {
            return self.reconcile().await;
        }
        self.lane.programmed = self.lane.desired;
        Ok(())
    }

    async fn retry(&mut self) -> Result<(), SyncError> {
        let troubled = self.lane.troubled();
        let never_synced = self.lane.desired == crate::Revision::default();
        if never_synced || (self.lane.known && troubled.is_empty()) {
            return Ok(());
        }
        self.sync(troubled).await
    }

    async fn program_skeleton(&mut self) -> Result<(), SyncError> {
        let node = Arc::clone(&self.lane.node);
        let ops = Plan::skeleton(self.backend, self.lane, &node);
        match self.send(ops).await? {
            Sent::Done => {
                self.lane.skeleton = Some(node);
                Ok(())
            }
            Sent::Refused(_) | Sent::Unknown => Ok(()),
            Sent::RefusedSomewhere(source) => {
                Err(SyncError::Commit { family: self.lane.family, source })
            }
        }
    }

    /// Brings `items` where they should be. Leaves `known` unset when that is in doubt.
    ///
    /// A refused fragment is set aside and the rest is sent again; when the kernel does not say
    /// which was refused, the halves are tried, so that n fragments with one bad one among them cost
    /// about 2 log2 n extra batches.
    async fn program(&mut self, items: Vec<Item>) -> Result<(), SyncError> {
        self.report.visited += items.len();
        let mut groups = vec![items];
        while let Some(mut group) = groups.pop() {
            let node = Arc::clone(&self.lane.node);
            let plan = Plan::of(self.backend, self.lane, &node, &group);
            for (id, error) in plan.refused {
                self.lane.blame(&id, error.kind(), error.to_string());
            }
            let one_batch = plan.ops.len() <= self.dataplane.batch_limit();
            let sent = self.send(plan.ops).await?;
            let atomic = one_batch && self.backend.capabilities().atomic;
            match sent {
                Sent::Unknown => return Ok(()),
                Sent::Done => {
                    self.lane.note(plan.outcomes);
                    self.lane.note_shared(plan.shared);
                    self.forget(&plan.stale).await;
                }
                _ if !atomic => {
                    self.lane.known = false;
                    return Ok(());
                }
                Sent::Refused(culprit) => {
                    group.retain(|(id, _)| *id != culprit);
                    groups.push(group);
                }
                Sent::RefusedSomewhere(error) => match group.as_slice() {
                    [] => {}
                    [(id, _)] => self.lane.blame(id, error.kind(), in_full(&error)),
                    _ => {
                        let rest = group.split_off(group.len() / 2);
                        groups.extend([rest, group]);
                    }
                },
            }
        }
        Ok(())
    }

    /// Sends operations in batches of the data path's size. While a batch is under way the state
    /// counts as unknown, so that dropping the future is safe.
    async fn send(&mut self, ops: Vec<Tagged<B>>) -> Result<Sent, SyncError> {
        self.send_beside(ops, |_, _| ()).await
    }

    /// The same, and does some work while the kernel is busy with the first batch.
    async fn send_beside(
        &mut self,
        ops: Vec<Tagged<B>>,
        work: impl FnOnce(&B, &mut Lane<B>) + Send,
    ) -> Result<Sent, SyncError> {
        let family = self.lane.family;
        let limit = self.dataplane.batch_limit().max(1);
        let (owners, ops): (Vec<_>, Vec<_>) = ops.into_iter().unzip();
        let mut work = Some(work);
        for (owners, ops) in owners.chunks(limit).zip(ops.chunks(limit)) {
            let known = std::mem::replace(&mut self.lane.known, false);
            let mut commit = self.dataplane.commit(family, ops);
            // Whatever it does before it waits for the first time is done by this.
            let begun = poll_fn(|cx| Poll::Ready(commit.as_mut().poll(cx))).await;
            if let Some(work) = work.take() {
                work(self.backend, self.lane);
            }
            let outcome = match begun {
                Poll::Ready(outcome) => {
                    drop(commit);
                    outcome
                }
                Poll::Pending => commit.await,
            };
            match outcome {
                Ok(()) => self.lane.known = known,
                Err(CommitError::Refused { op, object, extack, errno, kind }) => {
                    self.lane.known = known;
                    let owner = op.and_then(|op| owners.get(op));
                    let culprit = match owner {
                        Some(Owner::Fragment(id)) => Some(id.clone()),
                        _ => sole_owner(owners),
                    };
                    let error = CommitError::Refused { op, object, extack, errno, kind };
                    return Ok(match culprit {
                        Some(id) => {
                            self.lane.blame(&id, kind, in_full(&error));
                            Sent::Refused(id)
                        }
                        None => Sent::RefusedSomewhere(error),
                    });
                }
                Err(CommitError::Unknown { .. }) => return Ok(Sent::Unknown),
                Err(source) => return Err(SyncError::Commit { family, source }),
            }
            self.report.batches += 1;
            ops.iter().for_each(|op| self.count(op));
        }
        if let Some(work) = work.take() {
            work(self.backend, self.lane);
        }
        Ok(Sent::Done)
    }

    /// Counts an operation that was carried out.
    fn count(&mut self, op: &Op<B::Key, B::Value>) {
        let (key, old, new) = match op {
            Op::Add(key, new) => (key, None, Some(new)),
            Op::Del(key, old) => (key, Some(old), None),
            Op::Set { key, old, new } => (key, Some(old), Some(new)),
        };
        match op.verb() {
            Verb::Add => self.report.ops.add += 1,
            Verb::Del => self.report.ops.del += 1,
            Verb::Set => self.report.ops.set += 1,
        }
        if let Some((table, count)) = old.and_then(|old| self.backend.rules(key, old)) {
            let there = self.lane.rules.entry(table).or_default();
            *there = there.saturating_sub(count);
        }
        if let Some((table, count)) = new.and_then(|new| self.backend.rules(key, new)) {
            *self.lane.rules.entry(table).or_default() += count;
            let rules = self.report.rules.of_mut(self.lane.family);
            rules.entry(table).or_default().written += count;
        }
    }

    /// Removes flows that lead nowhere. A failure is worth a warning: new flows are not affected.
    async fn forget(&mut self, filters: &[FlowFilter]) {
        if filters.is_empty() {
            return;
        }
        let family = self.lane.family;
        match self.dataplane.forget_flows(family, filters).await {
            Ok(Forgotten { flows, took }) => {
                *self.report.stale_flows.of_mut(family) += flows;
                *self.report.forgetting.of_mut(family).get_or_insert_default() += took;
            }
            Err(error) => self
                .report
                .warnings
                .push(format!("stale UDP flows of {family} may remain: {}", in_full(&error))),
        }
    }

    /// Reads the kernel back and changes only what differs from what is wanted.
    pub(super) async fn reconcile(&mut self) -> Result<(), SyncError> {
        if self.lane.desired == crate::Revision::default() {
            return Ok(());
        }
        self.report.visited += self.lane.slots.len();
        let expected = self.lane.known && self.lane.seen;
        let before = self.report.ops.total();
        let mut fallback = self.take_installed();
        let mut given_up = BTreeSet::new();
        let mut careful = false;
        let mut reads = 0;
        loop {
            match self.reconcile_once(&fallback, &given_up, careful).await? {
                Sent::Done => break,
                Sent::Refused(id) if given_up.insert(id.clone()) => {}
                // Not even what was there before is taken.
                Sent::Refused(id) if fallback.remove(&id).is_some() => {}
                Sent::Refused(_) | Sent::RefusedSomewhere(_) if !careful => careful = true,
                Sent::Refused(id) => {
                    let source = CommitError::Unknown {
                        doing: "a fragment that was given up",
                        source: std::io::Error::other(id.to_string()),
                    };
                    return Err(SyncError::Commit { family: self.lane.family, source });
                }
                Sent::RefusedSomewhere(source) => {
                    return Err(SyncError::Commit { family: self.lane.family, source });
                }
                Sent::Unknown => {
                    reads += 1;
                    if reads == MAX_RECONCILES {
                        let source = CommitError::Unknown {
                            doing: "repeated batches",
                            source: std::io::ErrorKind::Interrupted.into(),
                        };
                        return Err(SyncError::Commit { family: self.lane.family, source });
                    }
                }
            }
        }
        if expected {
            self.report.drift += self.report.ops.total() - before;
        }
        if !std::mem::replace(&mut self.lane.seen, true) {
            let installed = self.lane.slots.values().filter_map(|slot| slot.installed.as_ref());
            let filters: Vec<_> =
                installed.flat_map(|it| stale(None, Some(&it.fragment), &self.lane.node)).collect();
            self.forget(&filters).await;
        }
        self.lane.programmed = self.lane.desired;
        Ok(())
    }

    /// One attempt. Fragments are compiled one after the other and sent in batches, so that memory is
    /// bounded by the batch and by what the kernel holds already; while the kernel takes one batch, the
    /// next is compiled. What lets traffic in comes last, unless the backend says that need not be.
    ///
    /// When `careful`, every fragment is sent by itself, which shows the one that is refused.
    async fn reconcile_once(
        &mut self,
        fallback: &BTreeMap<FragmentId, Installed<B>>,
        given_up: &BTreeSet<FragmentId>,
        careful: bool,
    ) -> Result<Sent, SyncError> {
        let family = self.lane.family;
        let mut actual = self
            .dataplane
            .dump(family)
            .await
            .map_err(|source| SyncError::Dump { family, source })?;
        self.lane.rules.clear();
        for (table, count) in actual.iter().filter_map(|(key, it)| self.backend.rules(key, it)) {
            *self.lane.rules.entry(table).or_default() += count;
        }
        let wanted = self.recall(&actual);
        let node = Arc::clone(&self.lane.node);
        let mut batch = Plan::skeleton(self.backend, self.lane, &node);
        rebase::<B>(&mut batch, &mut actual);
        let mut gathering = Gathering {
            wanted: wanted.into_iter(),
            fallback,
            given_up,
            actual,
            carried: batch,
            entries: Vec::new(),
            entries_last: !careful && self.backend.entries_last(),
            limit: if careful { 0 } else { self.dataplane.batch_limit() },
        };
        let mut batch = gathering.next(self.backend, self.lane);
        while !batch.is_empty() {
            sort(self.backend, &mut batch);
            let mut next = Vec::new();
            let work = |backend: &B, lane: &mut Lane<B>| next = gathering.next(backend, lane);
            let sent = self.send_beside(batch, work).await?;
            if !matches!(sent, Sent::Done) {
                return Ok(sent);
            }
            batch = next;
        }
        let leftovers = gathering.actual.into_iter().map(|(key, value)| Op::Del(key, value));
        let leftovers = leftovers.map(|op| (Owner::Skeleton, op)).collect();
        for mut rest in [gathering.entries, leftovers] {
            sort(self.backend, &mut rest);
            let sent = self.send(rest).await?;
            if !matches!(sent, Sent::Done) {
                return Ok(sent);
            }
        }
        self.lane.skeleton = Some(node);
        self.lane.known = true;
        self.lane.forgive();
        Ok(Sent::Done)
    }

    /// Takes out what is believed to be installed.
    fn take_installed(&mut self) -> BTreeMap<FragmentId, Installed<B>> {
        self.lane.known = false;
        let slots = self.lane.slots.iter_mut();
        slots.filter_map(|(id, slot)| Some((id.clone(), slot.installed.take()?))).collect()
    }

    /// Starts from nothing. Returns every wanted fragment with the memo that the kernel's content
    /// implies.
    fn recall(&mut self, actual: &Dump<B>) -> Vec<(Arc<Fragment>, B::Memo)> {
        let Lane { slots, shared, skeleton, .. } = &mut *self.lane;
        shared.clear();
        *skeleton = None;
        slots.retain(|_, slot| slot.desired.is_some());
        slots
            .values_mut()
            .filter_map(|slot| {
                slot.installed = None;
                let desired = slot.desired.as_ref()?;
                Some((Arc::clone(desired), self.backend.recall(desired, actual)))
            })
            .collect()
    }
}

/// The fragment that all operations are for, if it is one.
fn sole_owner(owners: &[Owner]) -> Option<FragmentId> {
    let (first, rest) = owners.split_first()?;
    match first {
        Owner::Fragment(id) if rest.iter().all(|owner| owner == first) => Some(id.clone()),
        Owner::Fragment(_) | Owner::Skeleton => None,
    }
}

//! Planning: from fragments that change to operations on kernel objects. Pure.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use super::lane::{Installed, Item, Lane};
use crate::{
    conntrack::{FlowFilter, stale},
    ir::{Fragment, NodeView},
    name::FragmentId,
    proxier::{Degraded, PlannedOp},
    spi::{Backend, Objects, Op, Owner, PlanError},
};

/// An operation and on whose behalf it is done.
pub(super) type Tagged<B> = (Owner, Op<<B as Backend>::Key, <B as Backend>::Value>);

/// The operations that bring some fragments where they should be, and what to note once they are.
pub(super) struct Plan<B: Backend> {
    /// Sorted: what is created or changed, by stage; then what goes, by reverse stage.
    pub ops: Vec<Tagged<B>>,
    /// What each fragment becomes.
    pub outcomes: Vec<(FragmentId, Option<Installed<B>>)>,
    /// Holders and content of shared objects that change.
    pub shared: BTreeMap<B::Key, (usize, B::Value)>,
    /// Fragments that cannot be programmed; nothing of them will be.
    pub refused: Vec<(FragmentId, PlanError)>,
    /// Flows that the plan makes stale.
    pub stale: Vec<FlowFilter>,
    /// Fragments compared.
    pub visited: usize,
}

impl<B: Backend> Default for Plan<B> {
    fn default() -> Self {
        Self {
            ops: Vec::new(),
            outcomes: Vec::new(),
            shared: BTreeMap::new(),
            refused: Vec::new(),
            stale: Vec::new(),
            visited: 0,
        }
    }
}

/// What a fragment shall become.
pub(super) struct Wanted<'a, B: Backend> {
    pub fragment: &'a Arc<Fragment>,
    pub node: &'a Arc<NodeView>,
    pub memo: Option<&'a B::Memo>,
}

/// What one key holds and shall hold.
struct Cell<V> {
    owner: Owner,
    old: Option<V>,
    new: Option<V>,
}

type Cells<B> = BTreeMap<<B as Backend>::Key, Cell<<B as Backend>::Value>>;

impl<B: Backend> Plan<B> {
    /// Plans `items` against what `lane` has installed. Looks at nothing else.
    pub(super) fn of(backend: &B, lane: &Lane<B>, node: &Arc<NodeView>, items: &[Item]) -> Self {
        let mut plan = Self::default();
        let mut cells = Cells::<B>::new();
        for (id, desired) in items {
            plan.visited += 1;
            let installed = lane.slots.get(id).and_then(|slot| slot.installed.as_ref());
            let wanted = desired.as_ref().map(|fragment| Wanted {
                fragment,
                node,
                memo: installed.map(|it| &it.memo),
            });
            if let Err(error) = plan.fragment(backend, lane, id, wanted, installed, &mut cells) {
                plan.refused.push((id.clone(), error));
                // What the mode cannot do is not done at all, whatever was there before: the kernel's
                // content stays a function of what is wanted. Compiling what is installed works.
                plan.fragment(backend, lane, id, None, installed, &mut cells).ok();
            }
        }
        plan.ops = operations(backend, cells);
        plan
    }

    /// Plans one fragment of which nothing is installed, with a memo recovered from the kernel.
    pub(super) fn fresh(
        backend: &B,
        lane: &Lane<B>,
        id: &FragmentId,
        wanted: Wanted<'_, B>,
    ) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        let mut cells = Cells::<B>::new();
        plan.fragment(backend, lane, id, Some(wanted), None, &mut cells)?;
        plan.ops = operations(backend, cells);
        Ok(plan)
    }

    /// Plans the objects that exist whatever the Services are.
    pub(super) fn skeleton(backend: &B, lane: &Lane<B>, node: &NodeView) -> Vec<Tagged<B>> {
        let objects = |node| backend.skeleton(lane.family, node);
        let old = lane.skeleton.as_ref().map(|node| objects(node)).unwrap_or_default();
        let mut cells = Cells::<B>::new();
        for (key, value) in old {
            cells.insert(key, Cell { owner: Owner::Skeleton, old: Some(value), new: None });
        }
        for (key, value) in objects(node) {
            let empty = || Cell { owner: Owner::Skeleton, old: None, new: None };
            cells.entry(key).or_insert_with(empty).new = Some(value);
        }
        operations(backend, cells)
    }

    /// Everything that an installed fragment has, in words.
    pub(super) fn objects(backend: &B, installed: &Installed<B>) -> Vec<PlannedOp> {
        let Installed { fragment, node, memo } = installed;
        let mut objects = Objects::default();
        if backend.compile(node, fragment, memo, &mut objects).is_err() {
            // It compiled before, and `compile` is pure.
            return Vec::new();
        }
        let (own, shared) = objects.into_parts();
        let owner = Owner::Fragment(fragment.id.clone());
        let mut all: Vec<Tagged<B>> = own
            .into_iter()
            .chain(shared)
            .map(|(key, value)| (owner.clone(), Op::Add(key, value)))
            .collect();
        sort(backend, &mut all);
        all.iter().map(describe::<B>).collect()
    }

    fn fragment(
        &mut self,
        backend: &B,
        lane: &Lane<B>,
        id: &FragmentId,
        wanted: Option<Wanted<'_, B>>,
        installed: Option<&Installed<B>>,
        cells: &mut Cells<B>,
    ) -> Result<(), PlanError> {
        if let (Some(wanted), Some(it)) = (&wanted, installed)
            && *wanted.node == it.node
            && *wanted.fragment == it.fragment
        {
            self.outcomes.push((id.clone(), Some(it.clone())));
            return Ok(());
        }
        if let Some(wanted) = &wanted {
            let capabilities = backend.capabilities();
            if let Some(reason) = capabilities.spreading.problem(wanted.fragment) {
                return Err(PlanError::Unsupported { mode: capabilities.mode.name(), reason });
            }
        }
        let mut old = Objects::default();
        if let Some(it) = installed {
            // It compiled before, and `compile` is pure.
            backend.compile(&it.node, &it.fragment, &it.memo, &mut old)?;
        }
        let mut new = Objects::default();
        let memo = match &wanted {
            Some(Wanted { fragment, node, memo }) => {
                let none = B::Memo::default();
                Some(backend.compile(node, fragment, memo.unwrap_or(&none), &mut new)?)
            }
            None => None,
        };
        let (old_own, old_shared) = old.into_parts();
        let (mut new_own, new_shared) = new.into_parts();
        let conflict = |key: &B::Key| Err(PlanError::Conflict { object: key.to_string() });
        if let Some(key) =
            new_own.keys().find(|key| cells.get(key).is_some_and(|cell| cell.new.is_some()))
        {
            return conflict(key);
        }
        for (key, value) in &new_shared {
            let (holders, content) = self.holders(lane, key);
            let others = holders - usize::from(old_shared.contains_key(key));
            if others > 0 && content.is_some_and(|content| content != value) {
                return conflict(key);
            }
        }

        let owner = Owner::Fragment(id.clone());
        let cell = || Cell { owner: owner.clone(), old: None, new: None };
        for (key, value) in old_own {
            if new_own.get(&key) != Some(&value) || cells.contains_key(&key) {
                cells.entry(key).or_insert_with(cell).old = Some(value);
            } else {
                new_own.remove(&key);
            }
        }
        for (key, value) in new_own {
            let cell = cells.entry(key).or_insert_with(cell);
            cell.owner = owner.clone();
            cell.new = Some(value);
        }
        self.share(lane, &owner, old_shared, new_shared, cells);
        if let Some(node) =
            wanted.as_ref().map(|it| it.node).or_else(|| installed.map(|it| &it.node))
        {
            let fragment = wanted.as_ref().map(|it| &**it.fragment);
            self.stale.extend(stale(installed.map(|it| &*it.fragment), fragment, node));
        }
        let outcome = wanted.zip(memo).map(|(wanted, memo)| Installed {
            fragment: Arc::clone(wanted.fragment),
            node: Arc::clone(wanted.node),
            memo,
        });
        self.outcomes.push((id.clone(), outcome));
        Ok(())
    }

    /// How many hold a shared object, and its content, after what is planned so far.
    fn holders<'a>(&'a self, lane: &'a Lane<B>, key: &B::Key) -> (usize, Option<&'a B::Value>) {
        let planned = self.shared.get(key).map(|(holders, value)| (*holders, Some(value)));
        let known = || lane.shared.get(key).map(|it| (it.holders, Some(&it.value)));
        planned.or_else(known).unwrap_or((0, None))
    }

    fn share(
        &mut self,
        lane: &Lane<B>,
        owner: &Owner,
        mut old: BTreeMap<B::Key, B::Value>,
        new: BTreeMap<B::Key, B::Value>,
        cells: &mut Cells<B>,
    ) {
        let both = new.into_iter().map(|(key, value)| {
            let held = usize::from(old.remove(&key).is_some());
            (key, value, held, 1)
        });
        let both: Vec<_> = both.collect();
        let gone = old.into_iter().map(|(key, value)| (key, value, 1, 0));
        for (key, value, held, wanted) in both.into_iter().chain(gone) {
            let (holders, _) = self.holders(lane, &key);
            let after = holders - held + wanted;
            let cell = Cell {
                owner: owner.clone(),
                old: lane.shared.get(&key).map(|it| it.value.clone()),
                new: (after > 0).then(|| value.clone()),
            };
            cells.insert(key.clone(), cell);
            self.shared.insert(key, (after, value));
        }
    }
}

fn operations<B: Backend>(backend: &B, cells: Cells<B>) -> Vec<Tagged<B>> {
    let mut ops: Vec<_> = cells
        .into_iter()
        .filter_map(|(key, cell)| {
            let op = match (cell.old, cell.new) {
                (None, None) => return None,
                (None, Some(new)) => Op::Add(key, new),
                (Some(old), None) => Op::Del(key, old),
                (Some(old), Some(new)) if old == new => return None,
                (Some(old), Some(new)) => Op::Set { key, old, new },
            };
            Some((cell.owner, op))
        })
        .collect();
    sort(backend, &mut ops);
    ops
}

/// What is created or changed first, by stage; then what goes, by reverse stage; equal ones by key.
pub(super) fn sort<B: Backend>(backend: &B, ops: &mut [Tagged<B>]) {
    // No two have the same key.
    ops.sort_unstable_by(|(_, a), (_, b)| {
        let stages = backend.stage(a.key()).cmp(&backend.stage(b.key()));
        match (matches!(a, Op::Del(..)), matches!(b, Op::Del(..))) {
            (false, true) => Ordering::Less,
            (true, false) => Ordering::Greater,
            (false, false) => stages.then_with(|| a.key().cmp(b.key())),
            (true, true) => stages.reverse().then_with(|| a.key().cmp(b.key())),
        }
    });
}

/// An operation in words.
pub(super) fn describe<B: Backend>((owner, op): &Tagged<B>) -> PlannedOp {
    let (before, after) = match op {
        Op::Add(_, new) => (String::new(), new.to_string()),
        Op::Del(_, old) => (old.to_string(), String::new()),
        Op::Set { old, new, .. } => (old.to_string(), new.to_string()),
    };
    PlannedOp {
        verb: op.verb(),
        object: op.key().to_string(),
        before,
        after,
        fragment: match owner {
            Owner::Fragment(id) => Some(id.clone()),
            Owner::Skeleton => None,
        },
    }
}

/// A fragment that could not be planned, in words.
pub(super) fn refusal((id, error): &(FragmentId, PlanError)) -> Degraded {
    Degraded { id: id.clone(), kind: error.kind(), reason: error.to_string(), attempts: 1 }
}

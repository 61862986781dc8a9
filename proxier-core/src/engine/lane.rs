//! What the engine knows of one family.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    ir::{Fragment, NodeView},
    name::{Family, FragmentId},
    proxier::{Change, Count, Counter, Degraded, Revision, Update},
    spi::{Backend, ErrorKind},
};

/// One family: what is wanted, and what the kernel is believed to hold.
///
/// Objects are not kept: the installed fragment, compiled again, gives them.
pub(super) struct Lane<B: Backend> {
    pub family: Family,
    /// The kernel holds what `slots`, `shared` and `skeleton` say. False before the first dump,
    /// while a commit is under way, and after one whose outcome is unknown.
    pub known: bool,
    /// There was a successful dump before, so differences from now on are drift.
    pub seen: bool,
    /// The node as wanted.
    pub node: Arc<NodeView>,
    /// The node that the installed skeleton was made for; `None` when there is no skeleton.
    pub skeleton: Option<Arc<NodeView>>,
    pub slots: BTreeMap<FragmentId, Slot<B>>,
    /// The fragments that are not as wanted.
    pub troubles: BTreeMap<FragmentId, Trouble>,
    /// Objects that several fragments may declare. Most of what an engine remembers: a hash table takes
    /// less than a tree.
    pub shared: HashMap<B::Key, Shared<B>>,
    /// How many rules the kernel holds, by table.
    pub rules: BTreeMap<&'static str, usize>,
    pub desired: Revision,
    pub programmed: Revision,
}

/// One fragment.
pub(super) struct Slot<B: Backend> {
    /// What is wanted; `None` when it is to go.
    pub desired: Option<Arc<Fragment>>,
    pub installed: Option<Installed<B>>,
}

/// What the kernel holds of a fragment.
pub(super) struct Installed<B: Backend> {
    pub fragment: Arc<Fragment>,
    pub node: Arc<NodeView>,
    pub memo: B::Memo,
}

impl<B: Backend> Clone for Installed<B> {
    fn clone(&self) -> Self {
        let (fragment, node) = (Arc::clone(&self.fragment), Arc::clone(&self.node));
        Self { fragment, node, memo: self.memo.clone() }
    }
}

/// Why a fragment is not as wanted.
pub(super) struct Trouble {
    pub kind: ErrorKind,
    pub reason: String,
    pub attempts: u32,
}

/// An object that several fragments declare.
pub(super) struct Shared<B: Backend> {
    pub holders: usize,
    pub value: B::Value,
}

/// A fragment to be planned, and what it shall become.
pub(super) type Item = (FragmentId, Option<Arc<Fragment>>);

impl<B: Backend> Lane<B> {
    pub(super) fn new(family: Family) -> Self {
        Self {
            family,
            known: false,
            seen: false,
            node: Arc::default(),
            skeleton: None,
            slots: BTreeMap::new(),
            troubles: BTreeMap::new(),
            shared: HashMap::new(),
            rules: BTreeMap::new(),
            desired: Revision::default(),
            programmed: Revision::default(),
        }
    }

    /// What an update asks of this family: the fragments to plan, and the node.
    pub(super) fn items(&self, update: &Update) -> (Vec<Item>, Arc<NodeView>) {
        match update {
            Update::Delta { node, changes, .. } => {
                let ours = changes.iter().filter(|change| change.id().family == self.family);
                let mut items: BTreeMap<_, _> = ours
                    .map(|change| match change {
                        Change::Remove(id) => (id.clone(), None),
                        Change::Upsert(fragment) => {
                            (fragment.id.clone(), Some(Arc::clone(fragment)))
                        }
                    })
                    .collect();
                let node = node.as_ref().unwrap_or(&self.node);
                if *node != self.node {
                    for (id, slot) in &self.slots {
                        items.entry(id.clone()).or_insert_with(|| slot.desired.clone());
                    }
                }
                (items.into_iter().collect(), Arc::clone(node))
            }
            Update::Reset { node, fragments, .. } => {
                let ours = fragments.iter().filter(|fragment| fragment.id.family == self.family);
                let mut items: BTreeMap<_, _> =
                    self.slots.keys().map(|id| (id.clone(), None)).collect();
                items.extend(ours.map(|it| (it.id.clone(), Some(Arc::clone(it)))));
                (items.into_iter().collect(), Arc::clone(node))
            }
        }
    }

    /// Takes note of what is wanted.
    pub(super) fn want(&mut self, items: &[Item], node: Arc<NodeView>, revision: Revision) {
        self.node = node;
        self.desired = revision;
        if self.slots.is_empty() {
            // Built at once from sorted items, the tree has no room left in its nodes.
            let slot = |(id, desired): &Item| {
                let desired = Some(Arc::clone(desired.as_ref()?));
                Some((id.clone(), Slot { desired, installed: None }))
            };
            self.slots = items.iter().filter_map(slot).collect();
            return;
        }
        for (id, desired) in items {
            if let Some(slot) = self.slots.get_mut(id) {
                slot.desired.clone_from(desired);
            } else if desired.is_some() {
                let slot = Slot { desired: desired.clone(), installed: None };
                self.slots.insert(id.clone(), slot);
            }
        }
    }

    /// Takes note that a fragment could not be programmed.
    pub(super) fn blame(&mut self, id: &FragmentId, kind: ErrorKind, reason: String) {
        if self.slots.contains_key(id) {
            let known = self.troubles.get(id);
            let attempts = known.map_or(1, |known| known.attempts.saturating_add(1));
            self.troubles.insert(id.clone(), Trouble { kind, reason, attempts });
        }
    }

    /// Says whether some installed fragment asks for counters. O(fragments).
    pub(super) fn counts(&self) -> bool {
        self.counted().next().is_some()
    }

    /// What was counted.
    pub(super) fn counters(&self, backend: &B, read: &BTreeMap<B::Key, Count>) -> Vec<Counter> {
        let each = |it: &Installed<B>| backend.counters(&it.node, &it.fragment, &it.memo, read);
        self.counted().flat_map(each).collect()
    }

    fn counted(&self) -> impl Iterator<Item = &Installed<B>> {
        let installed = self.slots.values().filter_map(|slot| slot.installed.as_ref());
        installed.filter(|it| it.fragment.counters)
    }

    /// The fragments that are not as wanted.
    pub(super) fn degraded(&self) -> impl Iterator<Item = Degraded> {
        self.troubles.iter().map(|(id, trouble)| Degraded {
            id: id.clone(),
            kind: trouble.kind,
            reason: trouble.reason.clone(),
            attempts: trouble.attempts,
        })
    }
}

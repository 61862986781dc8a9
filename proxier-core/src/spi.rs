//! What authors of backends implement: a pure half and an I/O half.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    hash::Hash,
    io,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde::Serialize;

use crate::{
    conntrack::{FlowFilter, Forgotten},
    ir::{Fragment, NodeView},
    name::{Family, FragmentId},
    proxier::{Capabilities, Count, Counter, Verb},
};

/// The pure half of a backend: which kernel objects a fragment needs.
///
/// Every method is a function of its arguments and of the settings the backend was made with. None
/// does I/O, reads a clock, draws random numbers or iterates a hash map. `compile` sees one fragment
/// at a time, so no backend can do work that grows with the cluster.
pub trait Backend: Send + Sync + 'static {
    /// The identity of a kernel object. `Display` names it to people, in one line.
    type Key: Clone + Debug + Display + Eq + Hash + Ord + Send + Sync;
    /// The content of a kernel object. `Display` shows it to people, one part a line.
    type Value: Clone + Debug + Display + Eq + Send + Sync;
    /// What must be remembered of a fragment between two plans, such as the slots of its endpoints.
    type Memo: Clone + Debug + Default + Eq + Send + Sync;

    /// What this backend can do.
    fn capabilities(&self) -> &Capabilities;

    /// The objects that exist whatever the Services are, in one family.
    fn skeleton(&self, family: Family, node: &NodeView) -> BTreeMap<Self::Key, Self::Value>;

    /// The objects of one fragment. O(objects of the fragment).
    ///
    /// Compiling again with the memo that was returned must give the same objects and memo: the
    /// engine keeps no objects in memory but compiles the installed fragment again.
    ///
    /// # Errors
    /// The fragment needs something this mode cannot do; nothing of it is then programmed.
    fn compile(
        &self,
        node: &NodeView,
        fragment: &Fragment,
        memo: &Self::Memo,
        out: &mut Objects<Self::Key, Self::Value>,
    ) -> Result<Self::Memo, PlanError>;

    /// Recovers the memo of a fragment from what the kernel holds, after a restart.
    fn recall(&self, fragment: &Fragment, dumped: &BTreeMap<Self::Key, Self::Value>) -> Self::Memo;

    /// What was counted of an installed fragment that asks for it, from what
    /// [`Dataplane::read_counters`] read. Nothing unless the mode counts.
    fn counters(
        &self,
        node: &NodeView,
        fragment: &Fragment,
        memo: &Self::Memo,
        read: &BTreeMap<Self::Key, Count>,
    ) -> Vec<Counter> {
        let (_, _, _, _) = (node, fragment, memo, read);
        Vec::new()
    }

    /// The table and the number of the rules in an object, in a mode that has rules for Services. At
    /// most as expensive as compiling it.
    fn rules(&self, key: &Self::Key, value: &Self::Value) -> Option<(&'static str, usize)> {
        let (_, _) = (key, value);
        None
    }

    /// Says whether, when everything is written anew, what lets traffic in ([`Stage::Entry`]) should wait
    /// until all the rest is there, because the kernel then has less to check. It costs memory: such
    /// operations are kept so long.
    fn entries_last(&self) -> bool {
        true
    }

    /// When an object is to be created: before those of later stages, and to be removed after them.
    fn stage(&self, key: &Self::Key) -> Stage;
}

/// The order in which objects come into being. They go in the reverse order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Stage {
    /// What everything else hangs on.
    Base,
    /// What entries lead to: chains, pools, destinations.
    Body,
    /// What lets traffic in.
    Entry,
}

/// Collects the objects of a fragment.
#[derive(Debug)]
pub struct Objects<K, V> {
    own: BTreeMap<K, V>,
    shared: BTreeMap<K, V>,
}

impl<K: Ord, V> Default for Objects<K, V> {
    fn default() -> Self {
        Self { own: BTreeMap::new(), shared: BTreeMap::new() }
    }
}

impl<K: Ord, V> Objects<K, V> {
    /// Declares an object that only this fragment has.
    pub fn own(&mut self, key: K, value: V) {
        self.own.insert(key, value);
    }

    /// Declares an object that other fragments may declare too, with the same content. It exists as
    /// long as one of them does.
    pub fn share(&mut self, key: K, value: V) {
        self.shared.insert(key, value);
    }

    pub(crate) fn into_parts(self) -> (BTreeMap<K, V>, BTreeMap<K, V>) {
        (self.own, self.shared)
    }
}

/// One change of one kernel object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op<K, V> {
    /// Create it; it does not exist.
    Add(K, V),
    /// Remove it; it has this content.
    Del(K, V),
    /// Replace its content.
    Set {
        /// The object.
        key: K,
        /// What it holds.
        old: V,
        /// What it shall hold.
        new: V,
    },
}

impl<K, V> Op<K, V> {
    /// The object.
    pub const fn key(&self) -> &K {
        match self {
            Self::Add(key, _) | Self::Del(key, _) | Self::Set { key, .. } => key,
        }
    }

    /// What happens to it.
    pub const fn verb(&self) -> Verb {
        match self {
            Self::Add(..) => Verb::Add,
            Self::Del(..) => Verb::Del,
            Self::Set { .. } => Verb::Set,
        }
    }
}

/// The I/O half of a backend: carries out operations and reads back what is there.
#[async_trait]
pub trait Dataplane<B: Backend>: Send {
    /// Carries out operations of one family, in any order that works.
    ///
    /// An atomic backend does all or nothing. Operations come sorted: created objects by stage,
    /// then removed ones by reverse stage.
    ///
    /// # Errors
    /// See [`CommitError`]; after anything but [`CommitError::Refused`] by an atomic backend the
    /// engine reads the kernel back before it goes on.
    ///
    /// # Cancel safety
    /// May be dropped at any await; the engine then reads the kernel back.
    async fn commit(
        &mut self,
        family: Family,
        ops: &[Op<B::Key, B::Value>],
    ) -> Result<(), CommitError>;

    /// Reads every object of ours in a family.
    ///
    /// # Errors
    /// The kernel's state could not be read.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn dump(&mut self, family: Family) -> Result<BTreeMap<B::Key, B::Value>, CommitError>;

    /// Removes every object of ours, without knowing which there should be.
    ///
    /// # Errors
    /// Everything that could not be removed.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn wipe(&mut self) -> Result<(), CommitError>;

    /// Removes connection-tracking entries that any of the filters calls stale.
    ///
    /// # Errors
    /// The entries could not be read or removed. Forwarding of new flows is not affected.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError>;

    /// Reads the counters of a family, by object. Nothing unless the mode counts.
    ///
    /// # Errors
    /// They could not be read.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn read_counters(
        &mut self,
        family: Family,
    ) -> Result<BTreeMap<B::Key, Count>, CommitError> {
        let _ = family;
        Ok(BTreeMap::new())
    }

    /// Does what has to be done as time passes, such as removing what was only kept until its last
    /// connection ended. Says how long it can wait until it is called again; `None` when there is
    /// nothing to wait for. Nothing, in modes that need no time.
    ///
    /// # Errors
    /// What was to be done could not be done; it is tried again next time.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn tick(&mut self, now: Instant) -> Result<Option<Duration>, CommitError> {
        let _ = now;
        Ok(None)
    }

    /// Resolves when somebody else changed objects of ours; never, where nobody tells. Changes made
    /// through this data path do not count.
    ///
    /// # Cancel safety
    /// Safe to drop; what has not been returned is returned next time.
    async fn foreign_change(&mut self) {
        std::future::pending().await
    }

    /// The most operations worth sending at once. More are split along fragments.
    fn batch_limit(&self) -> usize;
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorKind {
    /// Somebody else has what we need. A person must decide.
    Conflict,
    /// It will not work however often it is tried.
    Fatal,
    /// A privilege is missing.
    Permission,
    /// Trying again later may help.
    Retry,
    /// The kernel, or the mode, cannot do this.
    Unsupported,
}

/// A fragment cannot be programmed. Never concerns the kernel, and never another fragment.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// An object shared by several fragments would need two different contents.
    #[error("{object} is already there with different content")]
    Conflict {
        /// The object.
        object: String,
    },
    /// The mode cannot do what the fragment asks for.
    #[error("{mode} mode cannot do this: {reason}")]
    Unsupported {
        /// The mode's name.
        mode: &'static str,
        /// What it cannot do.
        reason: String,
    },
}

impl PlanError {
    /// What to do about it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Conflict { .. } => ErrorKind::Conflict,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }
}

/// The kernel did not take a batch, or did not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Somebody else owns what this backend needs.
    #[error("{object} belongs to somebody else: {hint}")]
    Foreign {
        /// The object.
        object: String,
        /// Who, and what to do.
        hint: String,
    },
    /// One operation was refused. With an atomic backend nothing of the batch is in effect.
    #[error("{object}: refused by the kernel{}", extack_suffix(.extack))]
    Refused {
        /// Index of the operation in the batch; `None` when the kernel did not say.
        op: Option<usize>,
        /// The object of the operation.
        object: String,
        /// The kernel's explanation, often empty.
        extack: String,
        /// The errno.
        #[source]
        errno: io::Error,
        /// What to do about it.
        kind: ErrorKind,
    },
    /// It is not known whether the batch is in effect.
    #[error("the outcome of {doing} is unknown")]
    Unknown {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The request could not be made.
    #[error("{doing}")]
    Transport {
        /// What was being done.
        doing: String,
        /// Why.
        #[source]
        source: io::Error,
        /// What to do about it.
        kind: ErrorKind,
    },
}

fn extack_suffix(extack: &str) -> String {
    if extack.is_empty() { String::new() } else { format!(" ({extack})") }
}

impl CommitError {
    /// What to do about it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Foreign { .. } => ErrorKind::Conflict,
            Self::Refused { kind, .. } | Self::Transport { kind, .. } => *kind,
            Self::Unknown { .. } => ErrorKind::Retry,
        }
    }
}

/// On whose behalf an operation is done.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Owner {
    /// A fragment's.
    Fragment(FragmentId),
    /// Everybody's: it exists whatever the Services are.
    Skeleton,
}

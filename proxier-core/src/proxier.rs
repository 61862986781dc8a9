//! The face of every backend: what embedders hold.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde::Serialize;

use crate::{
    ir::{Balance, Fragment, NodeView},
    name::{ByFamily, Family, FragmentId},
    spi::{CommitError, ErrorKind, PlanError},
};

/// Counts the states that were wanted one after the other. Higher is newer; 0 is "none yet".
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The next one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What is wanted, as a whole or as a difference.
#[derive(Clone, Debug)]
pub enum Update {
    /// These fragments change, all others stay.
    Delta {
        /// The state this leads to.
        revision: Revision,
        /// The node, when it changed. Then every fragment is planned anew.
        node: Option<Arc<NodeView>>,
        /// Each fragment at most once.
        changes: Vec<Change>,
    },
    /// These fragments are all there are.
    Reset {
        /// The state this leads to.
        revision: Revision,
        /// The node.
        node: Arc<NodeView>,
        /// Each fragment once.
        fragments: Vec<Arc<Fragment>>,
    },
}

impl Update {
    /// The state this leads to.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Delta { revision, .. } | Self::Reset { revision, .. } => *revision,
        }
    }
}

/// One fragment changes. Carries the whole new value, so that later changes replace earlier ones.
#[derive(Clone, Debug)]
pub enum Change {
    /// It is gone.
    Remove(FragmentId),
    /// It is new or different.
    Upsert(Arc<Fragment>),
}

impl Change {
    /// Which fragment changes.
    #[must_use]
    pub fn id(&self) -> &FragmentId {
        match self {
            Self::Remove(id) => id,
            Self::Upsert(fragment) => &fragment.id,
        }
    }
}

/// The kinds of data path.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Random DNAT chains, as kube-proxy's iptables mode has them.
    Iptables,
    /// Kernel virtual servers.
    Ipvs,
    /// Flat nf_tables maps.
    Nftables,
    /// A proxy in this process.
    Userspace,
}

impl Mode {
    /// Every mode there is, in the order of their names.
    pub const ALL: [Self; 4] = [Self::Iptables, Self::Ipvs, Self::Nftables, Self::Userspace];

    /// The name used in flags and files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Nftables => "nftables",
            Self::Userspace => "userspace",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| UnknownMode(text.into()))
    }
}

/// No mode has this name.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("unknown mode {0:?}: expected iptables, ipvs, nftables or userspace")]
pub struct UnknownMode(pub Box<str>);

/// What a backend can do.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Capabilities {
    /// The mode it implements.
    pub mode: Mode,
    /// A batch takes effect as a whole or not at all.
    pub atomic: bool,
    /// How it can spread connections.
    pub spreading: Spreading,
    /// Documented limits, one sentence each, for people.
    pub limits: Vec<&'static str>,
}

/// How a backend can spread connections over a pool, beyond its own way.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Spreading {
    /// The ways it knows; [`Balance::Default`] is understood.
    pub balance: &'static [Balance],
    /// Members may have unequal weights.
    pub weights: bool,
    /// It counts the connections of fragments that ask for it.
    pub counters: bool,
}

impl Spreading {
    /// Why a fragment cannot have what it asks for, if it cannot.
    #[must_use]
    pub fn problem(&self, fragment: &Fragment) -> Option<String> {
        let balance = fragment.balance;
        if balance != Balance::Default && !self.balance.contains(&balance) {
            Some(format!("connections cannot be spread {balance}"))
        } else if !self.weights && fragment.is_weighted() {
            Some("endpoints cannot have different weights".to_owned())
        } else if !self.counters && fragment.counters {
            Some("connections cannot be counted".to_owned())
        } else {
            None
        }
    }
}

/// What was counted of a fragment, since it was first programmed with counters.
///
/// Counters start again when the kernel's objects are made anew; they never go back otherwise. `None`
/// for what the mode does not count.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Counter {
    /// The Service port.
    pub id: FragmentId,
    /// The endpoint; `None` for the Service port as a whole.
    pub endpoint: Option<SocketAddr>,
    /// What was counted.
    pub count: Count,
}

/// Numbers of one counter.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Count {
    /// Connections made, or flows.
    pub connections: Option<u64>,
    /// Packets, both ways.
    pub packets: Option<u64>,
    /// Bytes, both ways.
    pub bytes: Option<u64>,
}

impl Count {
    /// The sum; what either side does not count is taken from the other.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let sum = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
            (one, None) | (None, one) => one,
        };
        Self {
            connections: sum(self.connections, other.connections),
            packets: sum(self.packets, other.packets),
            bytes: sum(self.bytes, other.bytes),
        }
    }
}

/// Programs one node with Services, by whatever means.
///
/// Nobody implements this by hand: [`Engine`](crate::engine::Engine) does, for every
/// [`Backend`](crate::spi::Backend).
#[async_trait]
pub trait Proxier: Send {
    /// What this proxier can do.
    fn capabilities(&self) -> &Capabilities;

    /// Says what [`sync`](Self::sync) would do. No I/O: it is computed from what this proxier
    /// believes to be installed.
    fn plan(&self, update: &Update) -> PlanSummary;

    /// Reads what the kernel holds and says what a first [`sync`](Self::sync) with this update would
    /// change. Writes nothing, and leaves what this proxier believes as it is. The update has to be a
    /// [`Update::Reset`] to make sense.
    ///
    /// # Errors
    /// The kernel's state could not be read.
    ///
    /// # Cancel safety
    /// Safe to drop.
    async fn compare(&mut self, update: &Update) -> Result<PlanSummary, SyncError>;

    /// Makes the kernel agree with the update.
    ///
    /// What cannot be programmed is in the report as degraded, with the reason; everything else is
    /// programmed all the same. The first call reads what the kernel holds and changes only the
    /// difference.
    ///
    /// # Errors
    /// Nothing could be done in some family. The update is remembered: call [`retry`](Self::retry)
    /// later, or `sync` with a newer update.
    ///
    /// # Cancel safety
    /// Safe to drop between any two polls: the update is remembered, and the next call reads the
    /// kernel back before it writes.
    async fn sync(&mut self, update: Update) -> Result<SyncReport, SyncError>;

    /// Tries again what failed or is degraded. Does nothing when nothing is.
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    ///
    /// # Cancel safety
    /// As [`sync`](Self::sync).
    async fn retry(&mut self) -> Result<SyncReport, SyncError>;

    /// Reads the kernel back, repairs any difference, and reports it as drift.
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    ///
    /// # Cancel safety
    /// As [`sync`](Self::sync).
    async fn audit(&mut self) -> Result<SyncReport, SyncError>;

    /// Removes every trace of this proxier, also of earlier runs.
    ///
    /// # Errors
    /// Everything that could not be removed.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn cleanup(&mut self) -> Result<(), SyncError>;

    /// The kernel objects that a fragment has, as far as this proxier believes, in the order in
    /// which they would be made; none when it is not programmed. O(objects of the fragment).
    fn objects(&self, id: &FragmentId) -> Vec<PlannedOp>;

    /// Does what has to be done as time passes. Says how long it can wait until it is called again, or
    /// `None` when there is nothing to wait for; a sync may change that, so call it after each.
    ///
    /// # Errors
    /// Something could not be done; call it again later.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn tick(&mut self, now: Instant) -> Result<Option<Duration>, SyncError> {
        let _ = now;
        Ok(None)
    }

    /// What was counted of the fragments that ask for it ([`Fragment::counters`]): first for the
    /// Service port, then for each endpoint the mode counts by. O(what the mode counts).
    ///
    /// # Errors
    /// The counters could not be read.
    ///
    /// # Cancel safety
    /// Safe to drop and to call again.
    async fn counters(&mut self) -> Result<Vec<Counter>, SyncError>;

    /// Resolves when somebody else changed what this proxier programmed, as far as the mode can
    /// notice: an [`audit`](Self::audit) will repair it. Costs nothing while it waits; never resolves
    /// in modes that are not told of such changes.
    ///
    /// # Cancel safety
    /// Safe to drop; what has not been returned is returned next time.
    async fn foreign_change(&mut self);

    /// Where things stand. O(degraded).
    fn status(&self) -> Status;
}

/// What a sync did.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct SyncReport {
    /// The state that was aimed for.
    pub revision: Revision,
    /// Fragments that were compared. For a delta exactly those in it.
    pub visited: usize,
    /// Kernel objects created, changed and removed.
    pub ops: OpCount,
    /// Transactions sent.
    pub batches: usize,
    /// Objects that somebody else had changed or removed, and that were repaired.
    pub drift: usize,
    /// Connection-tracking entries removed because they led to an endpoint that is gone.
    pub stale_flows: ByFamily<usize>,
    /// How long looking for such entries took, where there was something to look for.
    pub forgetting: ByFamily<Option<Duration>>,
    /// Rules by table, in a mode that has rules for Services.
    pub rules: ByFamily<BTreeMap<&'static str, RuleCount>>,
    /// Fragments that are not programmed as wanted, after this sync.
    pub degraded: Vec<Degraded>,
    /// What went wrong without consequence for what is programmed.
    pub warnings: Vec<String>,
}

/// Kernel objects by what happened to them.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct OpCount {
    /// Created.
    pub add: usize,
    /// Changed.
    pub set: usize,
    /// Removed.
    pub del: usize,
}

impl OpCount {
    /// All of them.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.add + self.set + self.del
    }
}

/// Rules of one table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct RuleCount {
    /// How many there are after the sync.
    pub there: usize,
    /// How many the sync wrote.
    pub written: usize,
}

/// A fragment that is not programmed as wanted.
///
/// When the kernel refused it, its previous state stays in force; when the mode cannot do what it asks
/// for, nothing of it is programmed.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Degraded {
    /// Which.
    pub id: FragmentId,
    /// What sort of reason.
    pub kind: ErrorKind,
    /// The reason, for people.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// Where a proxier stands.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Status {
    /// The newest state that was asked for.
    pub desired: Revision,
    /// The newest state that each family holds, degraded fragments aside.
    pub programmed: ByFamily<Revision>,
    /// Fragments that are not programmed as wanted.
    pub degraded: Vec<Degraded>,
    /// What was done since the start.
    pub totals: Totals,
}

/// What a proxier did since it was opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Totals {
    /// Successful syncs, retries and audits.
    pub syncs: u64,
    /// Failed ones.
    pub failures: u64,
    /// Fragments compared.
    pub visited: u64,
    /// Kernel objects created.
    pub add: u64,
    /// Kernel objects changed.
    pub set: u64,
    /// Kernel objects removed.
    pub del: u64,
    /// Objects repaired after somebody else's change.
    pub drift: u64,
    /// Connection-tracking entries removed.
    pub stale_flows: u64,
}

/// What a sync would do, in words and numbers.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct PlanSummary {
    /// The state it would lead to.
    pub revision: Revision,
    /// Fragments compared.
    pub visited: usize,
    /// Operations, in the order they would be sent.
    pub ops: Vec<PlannedOp>,
    /// Fragments that cannot be programmed.
    pub refused: Vec<Degraded>,
}

impl PlanSummary {
    /// Operations by kind.
    #[must_use]
    pub fn count(&self) -> OpCount {
        let mut count = OpCount::default();
        for op in &self.ops {
            match op.verb {
                Verb::Add => count.add += 1,
                Verb::Del => count.del += 1,
                Verb::Set => count.set += 1,
            }
        }
        count
    }
}

impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for op in &self.ops {
            write!(f, "{op}")?;
        }
        for refused in &self.refused {
            writeln!(f, "! {}: {}", refused.id, refused.reason)?;
        }
        Ok(())
    }
}

/// One operation on one kernel object, in words.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct PlannedOp {
    /// What would happen to it.
    pub verb: Verb,
    /// The object.
    pub object: String,
    /// Its content before, one line per part; empty for a new object.
    pub before: String,
    /// Its content after, one line per part; empty for a removed object.
    pub after: String,
    /// On whose behalf; `None` for what exists whatever the Services are.
    pub fragment: Option<FragmentId>,
}

impl fmt::Display for PlannedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.verb.sign(), self.object)?;
        let gone = |line: &&str| !self.after.lines().any(|other| other == *line);
        let new = |line: &&str| !self.before.lines().any(|other| other == *line);
        match self.verb {
            Verb::Add => self.after.lines().try_for_each(|line| writeln!(f, "    {line}")),
            Verb::Del => Ok(()),
            Verb::Set => {
                self.before.lines().filter(gone).try_for_each(|line| writeln!(f, "  - {line}"))?;
                self.after.lines().filter(new).try_for_each(|line| writeln!(f, "  + {line}"))
            }
        }
    }
}

/// What happens to an object.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// It is created.
    Add,
    /// It is removed.
    Del,
    /// Its content is replaced.
    Set,
}

impl Verb {
    const fn sign(self) -> char {
        match self {
            Self::Add => '+',
            Self::Del => '-',
            Self::Set => '~',
        }
    }
}

/// Nothing could be done in a family. The wanted state is remembered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyncError {
    /// Objects could not be removed.
    #[error("cleaning up")]
    Cleanup(#[source] CommitError),
    /// A batch could not be sent, or its outcome is unknown.
    #[error("programming {family}")]
    Commit {
        /// The family that failed; the other one was tried as well.
        family: Family,
        /// Why.
        #[source]
        source: CommitError,
    },
    /// The kernel's state could not be read.
    #[error("reading {family} back")]
    Dump {
        /// The family that failed; the other one was tried as well.
        family: Family,
        /// Why.
        #[source]
        source: CommitError,
    },
    /// The backend could not plan what has to exist whatever the Services are.
    #[error("planning {family}")]
    Plan {
        /// The family that failed; the other one was tried as well.
        family: Family,
        /// Why.
        #[source]
        source: PlanError,
    },
    /// What time asks for could not be done.
    #[error("following up on what was programmed")]
    Tick(#[source] CommitError),
}

impl SyncError {
    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Cleanup(source)
            | Self::Tick(source)
            | Self::Commit { source, .. }
            | Self::Dump { source, .. } => source.kind(),
            Self::Plan { source, .. } => source.kind(),
        }
    }
}

//! Watching a driver at work: for metrics, health checks and displays.

use std::time::Duration;

use proxier_core::{
    Status, SyncError, SyncReport,
    model::{Pending, Store},
};

/// Is told what a [`Driver`](crate::Driver) does, within the driver's own task: whatever takes time
/// here delays the next sync.
pub trait Observer: Send {
    /// An event came in, and something waits to be synced.
    fn queued(&mut self, store: &Store) {
        let _ = store;
    }

    /// A sync ended, or what waited turned out to change nothing.
    fn synced(&mut self, sync: &Synced<'_>);
}

/// A sync that has ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct Synced<'a> {
    /// Why there was a sync.
    pub cause: Cause,
    /// Services and slices that had changed since the sync before.
    pub pending: &'a Pending,
    /// The node or its settings had changed.
    pub node_changed: bool,
    /// What came of it; `None` when the changes cancelled each other out.
    pub outcome: Option<&'a Result<SyncReport, SyncError>>,
    /// Where the proxier stands.
    pub status: &'a Status,
    /// What is wanted.
    pub store: &'a Store,
    /// How long the proxier took.
    pub took: Duration,
    /// How long the first event among those that were synced had to wait, from its arrival to the
    /// end of the sync; `None` for syncs without events.
    pub latency: Option<Duration>,
}

/// Why there was a sync.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cause {
    /// The kernel was read back to find what others changed.
    Audit,
    /// Events came in.
    Events,
    /// Something had failed before.
    Retry,
}

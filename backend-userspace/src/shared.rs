//! What all workers share.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use proxier_core::ir::{FrontendKey, Origin};
use tokio::sync::Semaphore;

use crate::{
    config::{Config, Listen},
    socket::Stance,
    table::Table,
    udp::Sessions,
};

/// What all workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) table: Table,
    /// One for each connection that may still be accepted.
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) totals: Totals,
    /// The sessions of each worker.
    pub(crate) sessions: Vec<Mutex<Sessions>>,
    /// Where named frontends listen.
    pub(crate) listeners: Mutex<BTreeMap<FrontendKey, SocketAddr>>,
}

/// What is counted for the process as a whole.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// Connections and datagrams that no route, source filter or verdict lets pass.
    pub(crate) refused: AtomicU64,
    /// Connections that no endpoint could be found for.
    pub(crate) unreachable: AtomicU64,
    /// UDP sessions that had to go for others.
    pub(crate) evicted_sessions: AtomicU64,
    /// Times that accepting paused because descriptors or memory ran out.
    pub(crate) accept_pauses: AtomicU64,
    /// Datagrams lost here.
    pub(crate) lost_datagrams: AtomicU64,
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Adds several.
pub(crate) fn add(counter: &AtomicU64, several: u32) {
    counter.fetch_add(several.into(), Relaxed);
}

/// Where something came in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The kernel handed it over, and says from where it comes.
    Captured(Origin),
    /// At the address of a frontend.
    Named(FrontendKey),
}

impl Shared {
    pub(crate) fn new(config: Config, workers: usize) -> Self {
        let table = Table::new(config.limits.affinity_clients);
        let permits = config.limits.connections.min(Semaphore::MAX_PERMITS);
        let per_worker = config.limits.sessions.div_ceil(workers.max(1));
        Self {
            table,
            permits: Arc::new(Semaphore::new(permits)),
            totals: Totals::default(),
            sessions: (0..workers).map(|_| Mutex::new(Sessions::new(per_worker))).collect(),
            listeners: Mutex::default(),
            config,
        }
    }

    /// What sockets have to do with capturing.
    pub(crate) const fn stance(&self) -> Stance {
        match &self.config.listen {
            Listen::Addresses(_) => Stance::Plain,
            Listen::Capture(capture) if capture.redirects() => Stance::Marked(capture.mark()),
            Listen::Capture(_) => Stance::Transparent,
        }
    }

    pub(crate) fn listeners(&self) -> std::sync::MutexGuard<'_, BTreeMap<FrontendKey, SocketAddr>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! What the process counts, for embedders.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use proxier_core::{FragmentId, ir::FrontendKey};
use serde::Serialize;

use crate::{
    service::{Counters, Endpoint, ServiceState},
    shared::Shared,
};

/// Tells what a proxier counts; outlives it, and is cheap to clone.
#[derive(Clone, Debug)]
pub struct Monitor(pub(crate) Arc<Shared>);

/// What a proxier has counted so far.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Every Service port, in order.
    pub services: Vec<ServiceCount>,
    /// UDP sessions there are.
    pub sessions: usize,
    /// UDP sessions that had to go for others.
    pub evicted_sessions: u64,
    /// Connections and datagrams refused: by a verdict or source filter, or for want of a route.
    pub refused: u64,
    /// Connections for which no endpoint could be reached.
    pub unreachable: u64,
    /// Times that accepting paused because descriptors or memory ran out.
    pub accept_pauses: u64,
    /// Datagrams lost in the process.
    pub lost_datagrams: u64,
}

/// What was counted for a Service port.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ServiceCount {
    /// Which.
    pub id: FragmentId,
    /// All of it, endpoints that are gone included.
    pub total: Count,
    /// Each endpoint there is, by address.
    pub endpoints: Vec<EndpointCount>,
}

/// What was counted for an endpoint.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EndpointCount {
    /// Which.
    pub addr: SocketAddr,
    /// All of it.
    pub total: Count,
    /// It kept failing and is skipped for so long; `None` when it is well.
    pub skipped_for: Option<Duration>,
}

/// Connections, or UDP sessions, and what they carried.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Count {
    /// Opened so far.
    pub opened: u64,
    /// Open.
    pub active: u64,
    /// Attempts to reach an endpoint that failed.
    pub dial_failures: u64,
    /// Bytes of clients.
    pub bytes_to_endpoint: u64,
    /// Bytes of endpoints.
    pub bytes_to_client: u64,
}

impl Count {
    /// As every mode counts.
    pub(crate) const fn in_short(&self) -> proxier_core::Count {
        proxier_core::Count {
            connections: Some(self.opened),
            packets: None,
            bytes: Some(self.bytes_to_endpoint.saturating_add(self.bytes_to_client)),
        }
    }
}

impl Monitor {
    /// What has been counted so far. O(Service ports and endpoints).
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let Self(shared) = self;
        let now = Instant::now();
        let totals = &shared.totals;
        let sessions = shared.sessions.iter();
        Snapshot {
            services: shared.table.all_services().iter().map(|it| service(it, now)).collect(),
            sessions: sessions
                .map(|it| it.lock().unwrap_or_else(PoisonError::into_inner).len())
                .sum(),
            evicted_sessions: totals.evicted_sessions.load(Relaxed),
            refused: totals.refused.load(Relaxed),
            unreachable: totals.unreachable.load(Relaxed),
            accept_pauses: totals.accept_pauses.load(Relaxed),
            lost_datagrams: totals.lost_datagrams.load(Relaxed),
        }
    }

    /// Where frontends are listened for; empty for a proxier that captures.
    #[must_use]
    pub fn listeners(&self) -> BTreeMap<FrontendKey, SocketAddr> {
        self.0.listeners().clone()
    }
}

fn service(service: &ServiceState, now: Instant) -> ServiceCount {
    let pools = service.pools();
    let all: BTreeMap<_, _> =
        pools.cluster.iter().chain(&pools.local).map(|it| (it.member.addr, it)).collect();
    ServiceCount {
        id: service.id.clone(),
        total: counted(&service.counters),
        endpoints: all.into_values().map(|it| endpoint(it, now)).collect(),
    }
}

fn endpoint(endpoint: &Endpoint, now: Instant) -> EndpointCount {
    EndpointCount {
        addr: endpoint.member.addr,
        total: counted(&endpoint.counters),
        skipped_for: endpoint.health.rests_for(now),
    }
}

fn counted(counters: &Counters) -> Count {
    Count {
        opened: counters.opened.load(Relaxed),
        active: counters.active.load(Relaxed),
        dial_failures: counters.dial_failures.load(Relaxed),
        bytes_to_endpoint: counters.bytes_to_endpoint.load(Relaxed),
        bytes_to_client: counters.bytes_to_client.load(Relaxed),
    }
}

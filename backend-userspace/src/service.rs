//! The endpoints of a Service port while the process runs: whose turn it is, who stays where.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use proxier_core::{
    FragmentId,
    ir::{Member, Pool},
};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    aging::Aging,
    health::{Health, Turn},
    object::Service,
};

/// A Service port that connections are proxied for.
#[derive(Debug)]
pub(crate) struct ServiceState {
    pub(crate) id: FragmentId,
    pools: ArcSwap<Pools>,
    turns: [AtomicUsize; 2],
    /// Where each client went last, and when.
    clients: Mutex<Aging<IpAddr, SocketAddr>>,
    pub(crate) counters: Counters,
}

/// The endpoints as they are.
#[derive(Debug)]
pub(crate) struct Pools {
    pub(crate) value: Arc<Service>,
    pub(crate) cluster: Vec<Arc<Endpoint>>,
    pub(crate) local: Vec<Arc<Endpoint>>,
}

/// An endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) member: Member,
    pub(crate) health: Health,
    pub(crate) counters: Counters,
    /// Set once it is in no pool any more.
    gone: watch::Sender<bool>,
}

/// What is counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) opened: AtomicU64,
    pub(crate) active: AtomicU64,
    pub(crate) dial_failures: AtomicU64,
    pub(crate) bytes_to_endpoint: AtomicU64,
    pub(crate) bytes_to_client: AtomicU64,
}

impl ServiceState {
    pub(crate) fn new(id: FragmentId, value: Arc<Service>, limit: usize, now: Instant) -> Self {
        let none = Pools {
            value: Arc::new(Service { cluster: Vec::new(), local: Vec::new(), affinity: None }),
            cluster: Vec::new(),
            local: Vec::new(),
        };
        let state = Self {
            id,
            pools: ArcSwap::from_pointee(none),
            turns: Default::default(),
            clients: Mutex::new(Aging::new(limit)),
            counters: Counters::default(),
        };
        state.change(value, now);
        state
    }

    /// The endpoints as they are.
    pub(crate) fn pools(&self) -> Arc<Pools> {
        self.pools.load_full()
    }

    /// Replaces the endpoints; those that stay keep their health and counters. O(endpoints).
    pub(crate) fn change(&self, value: Arc<Service>, now: Instant) {
        let old = self.pools.load_full();
        let members = |pools: &Pools| -> BTreeMap<SocketAddr, Arc<Endpoint>> {
            let all = pools.cluster.iter().chain(&pools.local);
            all.map(|it| (it.member.addr, Arc::clone(it))).collect()
        };
        let mut known = members(&old);
        let mut find = |member: &Member| {
            let endpoint = known.entry(member.addr).or_insert_with(|| Endpoint::new(*member, now));
            if endpoint.member != *member {
                *endpoint = Endpoint::new(*member, now);
            }
            Arc::clone(endpoint)
        };
        let cluster = value.cluster.iter().map(&mut find).collect();
        let local = value.local.iter().map(&mut find).collect();
        let new = Arc::new(Pools { value, cluster, local });
        let kept = members(&new);
        self.pools.store(new);
        for endpoint in old.cluster.iter().chain(&old.local) {
            if !kept.contains_key(&endpoint.member.addr) {
                endpoint.gone.send_replace(true);
            }
        }
    }

    /// The Service port is no more.
    pub(crate) fn end(&self) {
        let pools = self.pools.load_full();
        for endpoint in pools.cluster.iter().chain(&pools.local) {
            endpoint.gone.send_replace(true);
        }
    }

    /// Chooses an endpoint for a client: the one it had, or the next one that was not tried and is
    /// not left alone; if all are, the next one all the same. `None` when all were tried.
    pub(crate) fn choose(
        &self,
        pool: Pool,
        client: IpAddr,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Option<Arc<Endpoint>> {
        let pools = self.pools.load();
        let members = match pool {
            Pool::Cluster => &pools.cluster,
            Pool::Local => &pools.local,
        };
        let timeout = pools.value.affinity.map(|secs| Duration::from_secs(secs.get().into()));
        let chosen = match timeout.filter(|_| tried.is_empty()) {
            Some(timeout) => self.recall(members, client, timeout, now),
            None => None,
        };
        let chosen = chosen.or_else(|| self.next(pool, members, tried, now))?;
        if let Some(timeout) = timeout {
            let mut clients = self.clients();
            clients.expire(timeout, now);
            clients.insert(client, chosen.member.addr, now);
        }
        Some(chosen)
    }

    fn recall(
        &self,
        members: &[Arc<Endpoint>],
        client: IpAddr,
        timeout: Duration,
        now: Instant,
    ) -> Option<Arc<Endpoint>> {
        let clients = self.clients();
        let (addr, age) = clients.peek(&client, now)?;
        let index = members.binary_search_by(|it| it.member.addr.cmp(addr)).ok()?;
        members
            .get(index)
            .filter(|it| age <= timeout && it.health.rests_for(now).is_none())
            .cloned()
    }

    fn next(
        &self,
        pool: Pool,
        members: &[Arc<Endpoint>],
        tried: &[SocketAddr],
        now: Instant,
    ) -> Option<Arc<Endpoint>> {
        let [cluster, local] = &self.turns;
        let turns = if pool == Pool::Cluster { cluster } else { local };
        let start = turns.fetch_add(1, Relaxed).checked_rem(members.len())?;
        let in_turn = || {
            let (before, from) = members.split_at_checked(start).unwrap_or((members, &[]));
            from.iter().chain(before).filter(|it| !tried.contains(&it.member.addr))
        };
        let well = in_turn().find(|it| it.health.rests_for(now).is_none());
        well.or_else(|| in_turn().next()).cloned()
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, Aging<IpAddr, SocketAddr>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An attempt to reach an endpoint failed.
    pub(crate) fn failed(&self, endpoint: &Endpoint, client: IpAddr, now: Instant) {
        self.counters.dial_failures.fetch_add(1, Relaxed);
        endpoint.counters.dial_failures.fetch_add(1, Relaxed);
        self.clients().remove(&client);
        if endpoint.health.failed(now) == Turn::Sickens {
            let service = &self.id;
            warn!(%service, endpoint = %endpoint.member.addr, "an endpoint keeps failing; it is skipped");
        }
    }

    /// An endpoint was reached.
    pub(crate) fn reached(&self, endpoint: &Endpoint) {
        if endpoint.health.succeeded() == Turn::Recovers {
            info!(service = %self.id, endpoint = %endpoint.member.addr, "an endpoint answers again");
        }
    }
}

impl Endpoint {
    fn new(member: Member, now: Instant) -> Arc<Self> {
        Arc::new(Self {
            member,
            health: Health::new(now),
            counters: Counters::default(),
            gone: watch::Sender::new(false),
        })
    }

    /// Waits until it is in no pool any more.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub(crate) async fn gone(&self) {
        // The sender is in `self`.
        self.gone.subscribe().wait_for(|gone| *gone).await.map(drop).unwrap_or_default();
    }
}

/// A connection or session, for as long as it lives, in the counters of its Service and endpoint.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) service: Arc<ServiceState>,
    pub(crate) endpoint: Arc<Endpoint>,
}

impl Counted {
    pub(crate) fn new(service: Arc<ServiceState>, endpoint: Arc<Endpoint>) -> Self {
        for counters in [&service.counters, &endpoint.counters] {
            counters.opened.fetch_add(1, Relaxed);
            counters.active.fetch_add(1, Relaxed);
        }
        Self { service, endpoint }
    }

    pub(crate) fn to_endpoint(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        self.service.counters.bytes_to_endpoint.fetch_add(bytes, Relaxed);
        self.endpoint.counters.bytes_to_endpoint.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn to_client(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or_default();
        self.service.counters.bytes_to_client.fetch_add(bytes, Relaxed);
        self.endpoint.counters.bytes_to_client.fetch_add(bytes, Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.service.counters.active.fetch_sub(1, Relaxed);
        self.endpoint.counters.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proxier_core::{Family, ObjectName, Protocol};

    use super::*;

    fn addr(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 80))
    }

    fn service(members: &[u8], affinity: Option<u32>) -> Arc<Service> {
        let cluster = members.iter().map(|it| Member::new(addr(*it), false)).collect();
        let affinity = affinity.and_then(std::num::NonZeroU32::new);
        Arc::new(Service { cluster, local: Vec::new(), affinity })
    }

    fn state(members: &[u8], affinity: Option<u32>, now: Instant) -> ServiceState {
        let (service_name, port) = (ObjectName::new("shop", "cart"), "web".into());
        let (protocol, family) = (Protocol::Tcp, Family::V4);
        let id = FragmentId { service: service_name, port, protocol, family };
        ServiceState::new(id, service(members, affinity), 100, now)
    }

    fn client(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn every_endpoint_has_its_turn() {
        let now = Instant::now();
        let state = state(&[1, 2, 3], None, now);
        let choose = || state.choose(Pool::Cluster, client(1), &[], now).unwrap().member.addr;
        let first: Vec<_> = (0..3).map(|_| choose()).collect();
        assert_eq!(first, [addr(1), addr(2), addr(3)]);
        assert_eq!(choose(), addr(1));
        assert!(state.choose(Pool::Local, client(1), &[], now).is_none());
        let tried = [addr(1), addr(3)];
        for _ in 0..4 {
            let chosen = state.choose(Pool::Cluster, client(1), &tried, now).unwrap();
            assert_eq!(chosen.member.addr, addr(2));
        }
        assert!(state.choose(Pool::Cluster, client(1), &[1, 2, 3].map(addr), now).is_none());
    }

    #[test]
    fn whoever_fails_is_skipped_unless_all_do() {
        let now = Instant::now();
        let state = state(&[1, 2], None, now);
        let bad = state.choose(Pool::Cluster, client(1), &[], now).unwrap();
        state.failed(&bad, client(1), now);
        state.failed(&bad, client(1), now);
        let choose = |now| state.choose(Pool::Cluster, client(1), &[], now).unwrap();
        let seen: BTreeSet<_> = (0..6).map(|_| choose(now).member.addr).collect();
        assert_eq!(seen, [addr(2)].into());
        let later = now + Duration::from_secs(2);
        let seen: BTreeSet<_> = (0..6).map(|_| choose(later).member.addr).collect();
        assert_eq!(seen.len(), 2);
        let other = state.choose(Pool::Cluster, client(1), &[bad.member.addr], now).unwrap();
        state.failed(&other, client(1), now);
        state.failed(&other, client(1), now);
        let seen: BTreeSet<_> = (0..6).map(|_| choose(now).member.addr).collect();
        assert_eq!(seen.len(), 2, "when all fail, all are tried");
    }

    #[test]
    fn a_client_stays_until_time_passes_or_its_endpoint_goes() {
        let now = Instant::now();
        let state = state(&[1, 2, 3], Some(10), now);
        let choose =
            |last, at| state.choose(Pool::Cluster, client(last), &[], at).unwrap().member.addr;
        let chosen = choose(1, now);
        assert!((0..5).all(|_| choose(1, now) == chosen));
        assert_ne!(choose(2, now), chosen);
        let at = |secs| now + Duration::from_secs(secs);
        assert_eq!((choose(1, at(9)), choose(1, at(18))), (chosen, chosen));
        assert_ne!(choose(1, at(40)), chosen);
        let chosen = choose(1, at(41));
        let rest: Vec<_> = [1, 2, 3].into_iter().filter(|it| addr(*it) != chosen).collect();
        state.change(service(&rest, Some(10)), at(41));
        assert_ne!(choose(1, at(41)), chosen);
    }

    #[test]
    fn endpoints_that_stay_keep_what_is_known_of_them() {
        let now = Instant::now();
        let state = state(&[1, 2], None, now);
        let pools = state.pools();
        let [one, two] = &pools.cluster[..] else { panic!("{pools:?}") };
        one.counters.opened.store(7, Relaxed);
        state.change(service(&[1, 3], None), now);
        let after = state.pools();
        assert!(Arc::ptr_eq(&after.cluster[0], one));
        assert!(*two.gone.borrow() && !*one.gone.borrow());
    }
}

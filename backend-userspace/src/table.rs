//! Where connections to a frontend go: the routing table of the process.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use proxier_core::{
    ByFamily, Family, FragmentId, Protocol,
    ir::{Detector, FrontendKey, Origin, WayIn},
};

use crate::{
    object::{Origins, Route, Service},
    service::ServiceState,
};

/// Shards of the routes. A change locks one of them, for the time of an insertion.
const SHARDS: usize = 64;
/// How long a route that was removed is remembered: what was captured before is accepted after, when
/// its handshake has come to an end.
const MEMORY: Duration = Duration::from_secs(3);

type Shard = RwLock<BTreeMap<FrontendKey, Arc<Live>>>;

/// The routing table. Every operation is O(log n).
#[derive(Debug)]
pub(crate) struct Table {
    routes: Vec<Shard>,
    removed: Mutex<Removed>,
    services: Mutex<BTreeMap<FragmentId, Arc<ServiceState>>>,
    origins: RwLock<ByFamily<Option<Origins>>>,
    hasher: RandomState,
    affinity_clients: usize,
}

/// A route, and the Service port that it leads to.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) route: Arc<Route>,
    pub(crate) service: Arc<ServiceState>,
}

/// Routes that were removed a moment ago.
#[derive(Debug, Default)]
struct Removed {
    routes: BTreeMap<FrontendKey, (Instant, Arc<Live>)>,
    /// Oldest first.
    queue: VecDeque<(Instant, FrontendKey)>,
}

impl Removed {
    fn remember(&mut self, key: FrontendKey, live: Arc<Live>, now: Instant) {
        self.forget(now);
        self.routes.insert(key, (now, live));
        self.queue.push_back((now, key));
    }

    fn forget(&mut self, now: Instant) {
        while let Some((at, key)) = self.queue.front().copied()
            && now.saturating_duration_since(at) > MEMORY
        {
            self.queue.pop_front();
            // It may have come back and gone again.
            if self.routes.get(&key).is_some_and(|(last, _)| *last == at) {
                self.routes.remove(&key);
            }
        }
    }
}

impl Table {
    pub(crate) fn new(affinity_clients: usize) -> Self {
        Self {
            routes: (0..SHARDS).map(|_| Shard::default()).collect(),
            removed: Mutex::default(),
            services: Mutex::default(),
            origins: RwLock::default(),
            hasher: RandomState::new(),
            affinity_clients,
        }
    }

    fn shard(&self, key: &FrontendKey) -> Option<&Shard> {
        let shards = u64::try_from(SHARDS).unwrap_or(1);
        usize::try_from(self.hasher.hash_one(key) % shards).ok().and_then(|it| self.routes.get(it))
    }

    fn services(&self) -> MutexGuard<'_, BTreeMap<FragmentId, Arc<ServiceState>>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a packet to `destination` goes: to the Service of the address, or to a node port.
    pub(crate) fn find(&self, destination: SocketAddr, protocol: Protocol) -> Option<Arc<Live>> {
        let port = destination.port().try_into().ok()?;
        let key = |way_in| FrontendKey { way_in, port, protocol };
        let ip = destination.ip();
        let keys = [key(WayIn::Address(ip)), key(WayIn::Node(Family::of(ip)))];
        let route = keys.iter().find_map(|key| self.route(key));
        route.or_else(|| {
            let mut removed = self.removed();
            removed.forget(Instant::now());
            keys.iter().find_map(|key| removed.routes.get(key).map(|(_, live)| Arc::clone(live)))
        })
    }

    /// The route of a frontend.
    pub(crate) fn route(&self, key: &FrontendKey) -> Option<Arc<Live>> {
        let shard = self.shard(key)?.read().unwrap_or_else(PoisonError::into_inner);
        shard.get(key).cloned()
    }

    /// Adds or replaces a Service port.
    pub(crate) fn set_service(&self, id: &FragmentId, value: Arc<Service>, now: Instant) {
        let mut services = self.services();
        match services.get(id) {
            Some(service) => service.change(value, now),
            None => {
                let state = ServiceState::new(id.clone(), value, self.affinity_clients, now);
                services.insert(id.clone(), Arc::new(state));
            }
        }
    }

    pub(crate) fn remove_service(&self, id: &FragmentId) {
        if let Some(service) = self.services().remove(id) {
            service.end();
        }
    }

    /// Adds or replaces a route. Says no when its Service port is unknown.
    #[must_use]
    pub(crate) fn set_route(&self, key: &FrontendKey, route: &Arc<Route>) -> bool {
        let Some(service) = self.services().get(&route.service).cloned() else { return false };
        let Some(shard) = self.shard(key) else { return false };
        let live = Arc::new(Live { route: Arc::clone(route), service });
        shard.write().unwrap_or_else(PoisonError::into_inner).insert(*key, live);
        true
    }

    pub(crate) fn remove_route(&self, key: &FrontendKey, now: Instant) {
        let Some(shard) = self.shard(key) else { return };
        let live = shard.write().unwrap_or_else(PoisonError::into_inner).remove(key);
        if let Some(live) = live {
            self.removed().remember(*key, live, now);
        }
    }

    fn removed(&self) -> MutexGuard<'_, Removed> {
        self.removed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How origins are told where the kernel does not.
    pub(crate) fn set_origins(&self, family: Family, origins: Option<Origins>) {
        let mut all = self.origins.write().unwrap_or_else(PoisonError::into_inner);
        *all.of_mut(family) = origins;
    }

    pub(crate) fn origins(&self, family: Family) -> Option<Origins> {
        self.origins.read().unwrap_or_else(PoisonError::into_inner).of(family).clone()
    }

    /// Where a client is, as far as its address tells.
    pub(crate) fn origin(&self, client: IpAddr) -> Origin {
        let all = self.origins.read().unwrap_or_else(PoisonError::into_inner);
        let origins = all.of(Family::of(client)).as_ref();
        let pods = origins.and_then(|it| it.detector.as_ref());
        if matches!(pods, Some(Detector::Source(net)) if net.contains(&client)) {
            Origin::Pod
        } else if client.is_loopback() || origins.is_some_and(|it| it.node.contains(&client)) {
            Origin::Node
        } else {
            Origin::External
        }
    }

    /// Every Service port, in order.
    pub(crate) fn all_services(&self) -> Vec<Arc<ServiceState>> {
        self.services().values().cloned().collect()
    }

    /// Every route of a family.
    pub(crate) fn all_routes(&self, family: Family) -> BTreeMap<FrontendKey, Arc<Live>> {
        let mut all = BTreeMap::new();
        for shard in &self.routes {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            let ours = shard.iter().filter(|(key, _)| family_of(key) == family);
            all.extend(ours.map(|(key, live)| (*key, Arc::clone(live))));
        }
        all
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        for shard in &self.routes {
            shard.write().unwrap_or_else(PoisonError::into_inner).clear();
        }
        *self.removed() = Removed::default();
        let services = std::mem::take(&mut *self.services());
        services.values().for_each(|service| service.end());
        Family::ALL.into_iter().for_each(|family| self.set_origins(family, None));
    }
}

pub(crate) const fn family_of(key: &FrontendKey) -> Family {
    match key.way_in {
        WayIn::Address(ip) => Family::of(ip),
        WayIn::Node(family) => family,
    }
}

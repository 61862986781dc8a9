//! The I/O half of the mode: the routing table of the process, and the kernel objects that bring
//! traffic to it.

mod error;
mod read;
mod routing;

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddr,
    num::NonZeroUsize,
    sync::{Arc, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use proxier_core::{
    ByFamily, Count, Family, FragmentId,
    conntrack::{FlowFilter, Forgotten},
    ir::{FrontendKey, Verdict},
    spi::{CommitError, Dataplane, ErrorKind},
};
use proxier_netlink::{
    NetNs,
    ct::{self, Conntrack},
    gate,
    nft::{NftError, NftSocket},
    spi::{self, read_error},
};
use tracing::{debug, trace};

use self::error::commit_error;
pub(crate) use self::{error::transport, routing::RouteSocket};
use crate::{
    backend::{Op, Ports, Userspace},
    config::{Capture, Config, Listen},
    monitor::Monitor,
    object::{Key, Route, Routing, Service, Value, part},
    shared::Shared,
    worker::Workers,
};

/// Operations sent at once where the socket takes large batches.
const BATCH_OPS: usize = 4096;
/// Bytes of an operation, about; for small sockets.
const OP_BYTES: usize = 512;
/// Threads unless the settings say otherwise.
const MOST_WORKERS: usize = 8;

/// The I/O half of the userspace mode.
pub struct UserspaceDataplane {
    shared: Arc<Shared>,
    workers: Workers,
    kernel: Option<Kernel>,
    ports: Ports,
}

/// The ways to the kernel of a proxier that captures.
struct Kernel {
    nft: NftSocket,
    conntrack: Conntrack,
    routes: RouteSocket,
    capture: Capture,
    /// Nothing was committed since the last dump.
    fresh: ByFamily<bool>,
}

/// What takes back a change of the routing table.
enum Undo {
    Route(FrontendKey, Option<Arc<Route>>),
    Service(FragmentId, Option<Arc<Service>>),
}

impl UserspaceDataplane {
    /// Opens the sockets, in a network namespace. Changes nothing.
    ///
    /// # Errors
    /// A setting is out of range, the namespace cannot be entered, or a socket cannot be opened: a
    /// proxier that captures needs `CAP_NET_ADMIN`.
    pub fn open(
        config: &Config,
        netns: &NetNs,
        families: &[Family],
    ) -> Result<Self, crate::EngineError> {
        config.validate()?;
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let default = processors.min(MOST_WORKERS);
        let count = config.limits.workers.map_or(default, NonZeroUsize::get);
        let listen = config.listen.clone();
        let shared = Arc::new(Shared::new(config.clone(), count));
        let mut workers = Workers::new(Arc::clone(&shared), netns.clone(), count);
        let (kernel, ports) = match listen {
            Listen::Addresses(_) => (None, Ports::default()),
            Listen::Capture(capture) => {
                let (nft, conntrack) = (NftSocket::open(netns)?, Conntrack::open(netns)?);
                let routes = RouteSocket::open(netns).map_err(crate::EngineError::Socket)?;
                let ports = workers.open_captured(families).map_err(crate::EngineError::Socket)?;
                let fresh = ByFamily::default();
                (Some(Kernel { nft, conntrack, routes, capture, fresh }), ports)
            }
        };
        Ok(Self { shared, workers, kernel, ports })
    }

    /// The ports of the listeners that captured traffic goes to.
    pub const fn ports(&self) -> Ports {
        self.ports
    }

    /// What is counted.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        Monitor(Arc::clone(&self.shared))
    }

    /// Carries out what is created or changed in the process. What was done is in `undo`, also after
    /// an error.
    fn admit(&self, family: Family, ops: &[Op], undo: &mut Vec<Undo>) -> Result<(), CommitError> {
        let table = &self.shared.table;
        for (index, op) in ops.iter().enumerate() {
            let (key, old, new) = match op {
                Op::Add(key, new) => (key, None, new),
                Op::Set { key, old, new } => (key, Some(old), new),
                Op::Del(..) => continue,
            };
            match (key, new) {
                (Key::Origins(_), Value::Origins(new)) => {
                    table.set_origins(family, Some(new.clone()));
                }
                (Key::Service(id), Value::Service(new)) => {
                    table.set_service(id, Arc::clone(new), Instant::now());
                    undo.push(Undo::Service(id.clone(), old.and_then(service)));
                }
                (Key::Route(key), Value::Route(new)) => {
                    let set = table.set_route(key, new);
                    undo.push(Undo::Route(*key, old.and_then(route)));
                    let listening = if set {
                        self.listen(key, new)
                    } else {
                        Err(io::Error::other("its Service port is unknown"))
                    };
                    listening.map_err(|errno| refused(index, op, errno))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Listens for a frontend where the embedder says; not where nothing would be forwarded, so that
    /// clients are refused.
    fn listen(&self, key: &FrontendKey, route: &Route) -> io::Result<()> {
        let Listen::Addresses(addresses) = &self.shared.config.listen else { return Ok(()) };
        let forwards = route.verdicts.rows().iter().any(|it| matches!(it, Verdict::Forward { .. }));
        let wanted = addresses.of(&route.service, key).filter(|_| forwards);
        let held = self.shared.listeners().get(key).copied();
        let same = |wanted: SocketAddr, held: SocketAddr| {
            wanted.ip() == held.ip() && (wanted.port() == 0 || wanted.port() == held.port())
        };
        match (wanted, held) {
            (Some(wanted), Some(held)) if same(wanted, held) => Ok(()),
            (Some(wanted), _) => {
                self.workers.close(*key);
                self.workers.listen(*key, wanted)
            }
            (None, _) => {
                self.workers.close(*key);
                Ok(())
            }
        }
    }

    /// Takes back what was done.
    fn take_back(&self, undo: Vec<Undo>) {
        let table = &self.shared.table;
        for step in undo.into_iter().rev() {
            match step {
                Undo::Route(key, Some(old)) => {
                    if table.set_route(&key, &old)
                        && let Err(error) = self.listen(&key, &old)
                    {
                        debug!(%key, %error, "cannot listen as before");
                    }
                }
                Undo::Route(key, None) => {
                    table.remove_route(&key, Instant::now());
                    self.workers.close(key);
                }
                Undo::Service(id, Some(old)) => table.set_service(&id, old, Instant::now()),
                Undo::Service(id, None) => table.remove_service(&id),
            }
        }
    }

    /// Carries out what is removed in the process.
    fn dismiss(&self, family: Family, ops: &[Op]) {
        let table = &self.shared.table;
        for op in ops {
            match op {
                Op::Del(Key::Route(key), _) => {
                    table.remove_route(key, Instant::now());
                    self.workers.close(*key);
                }
                Op::Del(Key::Service(id), _) => table.remove_service(id),
                Op::Del(Key::Origins(_), _) => table.set_origins(family, None),
                Op::Del(..) | Op::Add(..) | Op::Set { .. } => {}
            }
        }
    }

    /// Ends the threads, without holding up the runtime.
    async fn stop(&mut self) {
        let threads = self.workers.stop();
        let join = move || threads.into_iter().for_each(|thread| drop(thread.join()));
        if tokio::task::spawn_blocking(join).await.is_err() {
            debug!("the runtime is going");
        }
    }
}

impl Kernel {
    /// Carries out what concerns the kernel: all of it or nothing.
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        let fresh = std::mem::take(self.fresh.of_mut(family));
        for op in ops {
            match op {
                Op::Add(Key::Routing(_), Value::Routing(new)) => self.route(family, *new).await?,
                Op::Set { key: Key::Routing(_), new: Value::Routing(new), .. } => {
                    self.unroute(family).await?;
                    self.route(family, *new).await?;
                }
                Op::Add(..) | Op::Set { .. } | Op::Del(..) => {}
            }
        }
        let Ok(tx) = gate::encode(family, &self.capture.table, (0..).zip(ops), part) else {
            let destroyed = gate::destroy(&mut self.nft, family, &self.capture.table).await;
            destroyed.map_err(read_error)?;
            return Err(CommitError::Unknown {
                doing: "making a table of another version anew",
                source: io::ErrorKind::Interrupted.into(),
            });
        };
        trace!(%family, ops = ops.len(), bytes = tx.len_bytes(), "committing");
        if let Err(error) = self.nft.commit(&tx).await {
            let error = commit_error(error, ops, fresh);
            *self.fresh.of_mut(family) = fresh && matches!(error, CommitError::Refused { .. });
            return Err(error);
        }
        if ops.iter().any(|op| matches!(op, Op::Del(Key::Routing(_), _))) {
            self.unroute(family).await?;
        }
        Ok(())
    }

    async fn route(&self, family: Family, routing: Routing) -> Result<(), CommitError> {
        let add = self.routes.add(family, routing);
        add.await.map_err(|error| transport(format!("adding a routing rule for {family}"), error))
    }

    async fn unroute(&self, family: Family) -> Result<(), CommitError> {
        let remove = self.routes.remove(family, self.capture.routing_table);
        let doing = format!("removing the routing rule for {family}");
        remove.await.map_err(|error| transport(doing, error))
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let read = read::read(&mut self.nft, family, &self.capture.table);
        let mut found = read.await.map_err(read_error)?;
        let routing = self.routes.read(family, self.capture.routing_table).await;
        let doing = || format!("reading the routing rules of {family}");
        let routing = routing.map_err(|error| transport(doing(), error))?;
        if let Some(routing) = routing {
            found.insert(Key::Routing(family), Value::Routing(routing));
        }
        *self.fresh.of_mut(family) = true;
        Ok(found)
    }

    async fn wipe(&mut self, family: Family) -> Result<(), CommitError> {
        *self.fresh.of_mut(family) = false;
        match gate::destroy(&mut self.nft, family, &self.capture.table).await {
            // A kernel without the family has nothing of ours.
            Ok(()) | Err(NftError::Unsupported { .. }) => {}
            Err(error) => return Err(read_error(error)),
        }
        self.unroute(family).await
    }
}

fn service(value: &Value) -> Option<Arc<Service>> {
    if let Value::Service(service) = value { Some(Arc::clone(service)) } else { None }
}

fn route(value: &Value) -> Option<Arc<Route>> {
    if let Value::Route(route) = value { Some(Arc::clone(route)) } else { None }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "most errors pass")]
fn refused(index: usize, op: &Op, errno: io::Error) -> CommitError {
    let kind = match errno.kind() {
        io::ErrorKind::AddrInUse => ErrorKind::Conflict,
        io::ErrorKind::PermissionDenied => ErrorKind::Permission,
        _ => ErrorKind::Retry,
    };
    let (object, extack) = (op.key().to_string(), String::new());
    CommitError::Refused { op: Some(index), object, extack, errno, kind }
}

#[async_trait]
impl Dataplane<Userspace> for UserspaceDataplane {
    /// All operations or none: what the kernel refuses is taken back in the process.
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        self.workers.start().map_err(|error| transport("starting the workers", error))?;
        let mut undo = Vec::new();
        let mut outcome = self.admit(family, ops, &mut undo);
        if outcome.is_ok()
            && let Some(kernel) = &mut self.kernel
        {
            outcome = kernel.commit(family, ops).await;
        }
        match outcome {
            Ok(()) => {
                self.dismiss(family, ops);
                Ok(())
            }
            Err(error) => {
                self.take_back(undo);
                Err(error)
            }
        }
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let mut found = match &mut self.kernel {
            Some(kernel) => kernel.dump(family).await?,
            None => BTreeMap::new(),
        };
        let table = &self.shared.table;
        if let Some(origins) = table.origins(family) {
            found.insert(Key::Origins(family), Value::Origins(origins));
        }
        for service in table.all_services() {
            if service.id.family == family {
                let value = Arc::clone(&service.pools().value);
                found.insert(Key::Service(service.id.clone()), Value::Service(value));
            }
        }
        let routes = table.all_routes(family).into_iter();
        found.extend(
            routes.map(|(key, live)| (Key::Route(key), Value::Route(Arc::clone(&live.route)))),
        );
        debug!(%family, objects = found.len(), "read back");
        Ok(found)
    }

    /// Ends every connection, and removes everything from the kernel.
    async fn wipe(&mut self) -> Result<(), CommitError> {
        let listening: Vec<_> = self.shared.listeners().keys().copied().collect();
        listening.into_iter().for_each(|key| self.workers.close(key));
        self.stop().await;
        self.shared.table.clear();
        let Some(kernel) = &mut self.kernel else { return Ok(()) };
        let mut outcome = Ok(());
        for family in Family::ALL {
            let wiped = kernel.wipe(family).await;
            outcome = outcome.and(wiped);
        }
        outcome
    }

    /// Ends the sessions that lead nowhere, and removes the tracked flows to these frontends that
    /// another mode leads elsewhere, wherever that is.
    // KERNEL: translations are carried out as long as somebody has a NAT chain (net/netfilter/
    // nf_nat_core.c, v6.12). Once the other mode is gone, a client that uses its port again would be
    // neither translated nor captured, and a socket of ours with the port that such a flow is
    // answered on could not send.
    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        let workers = self.shared.sessions.iter();
        let ended: usize = workers
            .map(|it| it.lock().unwrap_or_else(PoisonError::into_inner).forget(filters))
            .sum();
        let Some(kernel) = &mut self.kernel else {
            return Ok(Forgotten { flows: ended, ..Forgotten::default() });
        };
        // What is redirected has to be looked at again, as in every mode that translates.
        let redirects = kernel.capture.redirects();
        let elsewhere = |flow: &ct::Flow| {
            let to = spi::answered_by(flow)?;
            (redirects || spi::sent_to(flow)? != to).then_some(to)
        };
        let anywhere = |filter: &FlowFilter| FlowFilter { keep: Vec::new(), ..filter.clone() };
        let to_frontends: Vec<_> = filters.iter().map(anywhere).collect();
        let conntrack = &mut kernel.conntrack;
        let tracked = spi::forget_flows(conntrack, family, &to_frontends, elsewhere).await?;
        Ok(Forgotten { flows: ended + tracked.flows, ..tracked })
    }

    async fn read_counters(&mut self, family: Family) -> Result<BTreeMap<Key, Count>, CommitError> {
        let mut found = BTreeMap::new();
        let services = self.monitor().snapshot().services.into_iter();
        for service in services.filter(|it| it.id.family == family) {
            for endpoint in &service.endpoints {
                let key = Key::Endpoint(service.id.clone(), endpoint.addr);
                found.insert(key, endpoint.total.in_short());
            }
            found.insert(Key::Service(service.id), service.total.in_short());
        }
        Ok(found)
    }

    fn batch_limit(&self) -> usize {
        match &self.kernel {
            Some(kernel) => (kernel.nft.max_batch_bytes() / OP_BYTES).clamp(1, BATCH_OPS),
            None => BATCH_OPS,
        }
    }
}

impl fmt::Debug for UserspaceDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserspaceDataplane").field("ports", &self.ports).finish_non_exhaustive()
    }
}

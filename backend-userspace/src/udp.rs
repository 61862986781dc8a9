//! UDP: a session for each client and frontend.
//!
//! A session has a socket connected to its endpoint, so that a refusal is noticed, and answers from
//! the address that the client sent to. A task waits for its answers, and for its end.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use nix::errno::Errno;
use proxier_core::{
    Protocol,
    conntrack::{Flow, FlowFilter},
    ir::{FrontendKey, Origin, Verdict, WayIn},
};
use proxier_netlink::{
    NetNs,
    ct::{Conntrack, Layer4, Tuple},
};
use tokio::{io::Interest, net::UdpSocket, task::AbortHandle, time::timeout_at};
use tracing::debug;

use crate::{
    aging::Aging,
    datagram::{Train, receive},
    dial::source,
    service::Counted,
    shared::{Place, Shared, add, count},
    socket::{Stance, is_taken, udp_answering, udp_outgoing},
    table::Live,
};

/// The longest datagram, and the longest train.
const DATAGRAM_BYTES: usize = 1 << 16;
/// Datagrams after which others have their turn.
const TURN: usize = 64;

/// Silence after which a session of redirected datagrams ends at the latest. Who comes from that port
/// later may want something else.
// KERNEL: connection tracking forgets a flow after nf_conntrack_udp_timeout, 30 s unless set
// (net/netfilter/nf_conntrack_proto_udp.c, v6.12).
const REDIRECTED_IDLE: Duration = Duration::from_secs(25);

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; DATAGRAM_BYTES].into());
    static CONNTRACK: RefCell<Option<Conntrack>> = const { RefCell::new(None) };
}

/// Who talks to what: client, and the address that its datagrams come in at. Where they are redirected
/// this is one of the listener's, and connection tracking sees to it that pairs differ.
type Pair = (SocketAddr, SocketAddr);

/// The sessions of one worker.
#[derive(Debug)]
pub(crate) struct Sessions {
    by_pair: Aging<Pair, Held>,
    /// Sockets that answer from the addresses of frontends; each lives as long as its sessions.
    answering: BTreeMap<SocketAddr, Weak<socket2::Socket>>,
}

/// A session in the table; its task ends when it is taken out.
#[derive(Debug)]
struct Held {
    session: Arc<Session>,
    task: AbortHandle,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A session.
#[derive(Debug)]
struct Session {
    client: SocketAddr,
    /// Where the client sends to, as far as filters are concerned.
    frontend: (WayIn, SocketAddr),
    upstream: UdpSocket,
    answer: Answer,
    counted: Counted,
    /// Answers and questions are one for one.
    one_for_one: bool,
    asked: AtomicU32,
    answered: AtomicU32,
    used: Mutex<Instant>,
}

/// How answers go out.
#[derive(Clone, Debug)]
enum Answer {
    /// From a socket of the frontend's address.
    From(Arc<socket2::Socket>),
    /// From the socket that the question came in on, and the address if it has many.
    Same(Arc<UdpSocket>, Option<IpAddr>),
}

impl Sessions {
    pub(crate) fn new(limit: usize) -> Self {
        Self { by_pair: Aging::new(limit), answering: BTreeMap::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.by_pair.len()
    }

    /// Ends the sessions that lead nowhere; returns how many.
    pub(crate) fn forget(&mut self, filters: &[FlowFilter]) -> usize {
        self.by_pair.remove_if(|_, held| filters.iter().any(|it| held.session.is_stale(it)))
    }

    pub(crate) fn clear(&mut self) {
        self.by_pair.remove_if(|_, _| true);
        self.answering.clear();
    }

    /// The socket that answers from an address.
    fn answering(&mut self, from: SocketAddr) -> io::Result<Arc<socket2::Socket>> {
        if let Some(socket) = self.answering.get(&from).and_then(Weak::upgrade) {
            return Ok(socket);
        }
        self.answering.retain(|_, socket| socket.strong_count() > 0);
        let socket = Arc::new(udp_answering(from)?);
        self.answering.insert(from, Arc::downgrade(&socket));
        Ok(socket)
    }
}

impl Session {
    fn is_stale(&self, filter: &FlowFilter) -> bool {
        let (way_in, destination) = self.frontend;
        let answered_by = self.counted.endpoint.member.addr;
        let flow = Flow { protocol: Protocol::Udp, destination, answered_by };
        let named_node_port = matches!(way_in, WayIn::Node(_)) && destination.ip().is_unspecified();
        filter.is_stale(&flow)
            || (named_node_port
                && filter.port.get() == destination.port()
                && filter.keep.binary_search(&answered_by).is_err())
    }

    fn used(&self) -> MutexGuard<'_, Instant> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When it ends unless something happens.
    fn deadline(&self, shared: &Shared) -> Instant {
        let udp = &shared.config.udp;
        let idle = match shared.stance() {
            Stance::Marked(_) => udp.idle.min(REDIRECTED_IDLE),
            Stance::Plain | Stance::Transparent => udp.idle,
        };
        let done = self.answered.load(Relaxed) >= self.asked.load(Relaxed);
        let idle = if self.one_for_one && done { udp.answered.min(idle) } else { idle };
        *self.used() + idle
    }

    fn answer(&self, train: &Train<'_>) -> Result<(), Errno> {
        match &self.answer {
            Answer::From(socket) => train.send(&**socket, Some(self.client), None),
            Answer::Same(socket, from) => train.send(&**socket, Some(self.client), *from),
        }
    }
}

/// A UDP listener of a worker.
pub(crate) struct Listener {
    pub(crate) socket: Arc<UdpSocket>,
    /// Where it is bound.
    pub(crate) at: SocketAddr,
    pub(crate) place: Place,
    pub(crate) shared: Arc<Shared>,
    /// The number of the worker.
    pub(crate) worker: usize,
}

impl Listener {
    /// Takes in datagrams, for ever.
    ///
    /// # Cancel safety
    /// Sessions go on.
    pub(crate) async fn run(self) {
        loop {
            if let Err(error) = self.socket.readable().await {
                debug!(%error, "a UDP listener is gone");
                return;
            }
            let failed = BUFFER.with_borrow_mut(|buffer| self.take_in(buffer));
            if let Err(error) = failed {
                debug!(%error, "receiving");
            }
            tokio::task::yield_now().await;
        }
    }

    /// Takes in what is there, up to a turn.
    fn take_in(&self, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..TURN {
            let socket = &*self.socket;
            let received = match socket.try_io(Interest::READABLE, || receive(socket, buffer)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            };
            let to = match self.shared.stance() {
                Stance::Marked(_) => received.to.map(|it| SocketAddr::new(it.ip(), self.at.port())),
                Stance::Plain => Some(self.at),
                Stance::Transparent => received.to,
            };
            let train = Train::new(&received, buffer);
            let forwarded = received.from.zip(to).and_then(|pair| self.forward(pair, &train));
            if forwarded.is_none() {
                add(&self.shared.totals.lost_datagrams, train.count());
            }
        }
        Ok(())
    }

    /// Passes datagrams on, in their session or a new one. `None` when they are lost.
    fn forward(&self, pair: Pair, train: &Train<'_>) -> Option<()> {
        let now = Instant::now();
        let mut tried = Vec::new();
        // An endpoint that refused costs the session, not the datagram.
        for _ in 0..2 {
            let known = self.sessions().by_pair.touch(&pair, now).map(|it| Arc::clone(&it.session));
            let session = match known {
                Some(session) => session,
                None => self.open(pair, &tried, now)?,
            };
            *session.used() = now;
            session.asked.fetch_add(train.count(), Relaxed);
            match train.send(&session.upstream, None, None) {
                Ok(()) => {
                    session.counted.to_endpoint(train.bytes.len());
                    return Some(());
                }
                // KERNEL: what would be answered like a flow that somebody else translated is not let
                // out (__nf_conntrack_confirm, v6.12). Another session has another port.
                Err(Errno::EPERM) => self.end(pair, &session),
                Err(Errno::ECONNREFUSED) => {
                    let Counted { service, endpoint } = &session.counted;
                    service.failed(endpoint, pair.0.ip(), now);
                    tried.push(endpoint.member.addr);
                    self.end(pair, &session);
                }
                Err(_) => return None,
            }
        }
        None
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        sessions(&self.shared, self.worker)
    }

    fn end(&self, pair: Pair, session: &Arc<Session>) {
        end(&self.shared, self.worker, pair, session);
    }

    /// What the routing table says to a datagram.
    fn find(&self, (client, to): Pair) -> Option<(Arc<Live>, Origin, FrontendKey)> {
        let table = &self.shared.table;
        match self.place {
            Place::Captured(origin) => {
                let to = match self.shared.stance() {
                    Stance::Marked(_) => original_destination((client, to))?,
                    Stance::Plain | Stance::Transparent => to,
                };
                let live = table.find(to, Protocol::Udp)?;
                let (way_in, port) = (WayIn::Address(to.ip()), to.port().try_into().ok()?);
                Some((live, origin, FrontendKey { way_in, port, protocol: Protocol::Udp }))
            }
            Place::Named(key) => Some((table.route(&key)?, table.origin(client.ip()), key)),
        }
    }

    /// Opens a session. `None` when the datagram is not to pass, or nothing is left for it.
    fn open(&self, pair: Pair, tried: &[SocketAddr], now: Instant) -> Option<Arc<Session>> {
        let (client, to) = pair;
        let found = self.find(pair).and_then(|(live, origin, key)| {
            let admitted = live.route.sources.as_ref().is_none_or(|it| it.admits(client.ip()));
            match live.route.verdicts.of(origin) {
                Verdict::Forward { pool, snat } if admitted => Some((live, key, pool, snat)),
                Verdict::Drop | Verdict::Forward { .. } | Verdict::Reject => None,
            }
        });
        let Some((live, key, pool, snat)) = found else {
            count(&self.shared.totals.refused);
            return None;
        };
        let service = &live.service;
        let choose = |not| service.choose(pool, client.ip(), not, now);
        let endpoint = choose(tried).or_else(|| choose(&[]))?;
        let stance = self.shared.stance();
        let addr = endpoint.member.addr;
        let from = source(&self.shared, snat, client, &endpoint);
        let upstream = match udp_outgoing(addr, from, stance) {
            Err(error)
                if is_taken(&error)
                    && let Some(from) = from =>
            {
                udp_outgoing(addr, Some(SocketAddr::new(from.ip(), 0)), stance)
            }
            other => other,
        };
        let upstream = upstream.and_then(|socket| UdpSocket::from_std(socket.into())).ok()?;
        let answer = match stance {
            Stance::Marked(_) => Answer::Same(Arc::clone(&self.socket), Some(to.ip())),
            Stance::Plain => Answer::Same(Arc::clone(&self.socket), None),
            Stance::Transparent => Answer::From(self.sessions().answering(to).ok()?),
        };
        let frontend = match key.way_in {
            WayIn::Address(ip) => SocketAddr::new(ip, key.port.get()),
            WayIn::Node(proxier_core::Family::V4) => ([0, 0, 0, 0], key.port.get()).into(),
            WayIn::Node(proxier_core::Family::V6) => ([0_u16; 8], key.port.get()).into(),
        };
        let session = Arc::new(Session {
            client,
            frontend: (key.way_in, frontend),
            upstream,
            answer,
            counted: Counted::new(Arc::clone(service), endpoint),
            one_for_one: self.shared.config.udp.answer_ports.contains(&key.port.get()),
            asked: AtomicU32::new(0),
            answered: AtomicU32::new(0),
            used: Mutex::new(now),
        });
        let waiting = wait(Arc::clone(&session), pair, Arc::clone(&self.shared), self.worker);
        let task = tokio::spawn(waiting).abort_handle();
        let held = Held { session: Arc::clone(&session), task };
        let evicted = self.sessions().by_pair.insert(pair, held, now);
        if evicted.is_some() {
            count(&self.shared.totals.evicted_sessions);
        }
        Some(session)
    }
}

/// Where redirected datagrams were sent to. `None` when nobody knows.
fn original_destination((client, local): Pair) -> Option<SocketAddr> {
    let layer4 = Layer4::Ports { src: local.port(), dst: client.port() };
    let protocol = Protocol::Udp.number();
    let reply = Tuple { src: local.ip(), dst: client.ip(), protocol, layer4, zone: None };
    CONNTRACK.with_borrow_mut(|socket| {
        let socket = match socket {
            Some(socket) => socket,
            // A worker lives in the namespace of the proxier.
            None => socket.insert(Conntrack::open(&NetNs::Current).ok()?),
        };
        // The kernel answers while it is asked: there is nothing to wait for.
        let flow = socket.answered(&reply).now_or_never()?.ok()??;
        Some(SocketAddr::new(flow.orig.dst, flow.orig.dst_port()?))
    })
}

fn sessions(shared: &Shared, worker: usize) -> MutexGuard<'_, Sessions> {
    let index = worker % shared.sessions.len().max(1);
    #[expect(
        clippy::indexing_slicing,
        reason = "there is a table for each worker, and one at least"
    )]
    shared.sessions[index].lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(shared: &Shared, worker: usize, pair: Pair, session: &Arc<Session>) {
    let mut sessions = sessions(shared, worker);
    let known = sessions.by_pair.peek(&pair, Instant::now());
    if known.is_some_and(|(held, _)| Arc::ptr_eq(&held.session, session)) {
        sessions.by_pair.remove(&pair);
    }
}

/// Waits for answers, and for the end of the session.
async fn wait(session: Arc<Session>, pair: Pair, shared: Arc<Shared>, worker: usize) {
    loop {
        let deadline = session.deadline(&shared);
        match timeout_at(deadline.into(), session.upstream.readable()).await {
            Err(_) if session.deadline(&shared) > Instant::now() => continue,
            Err(_) | Ok(Err(_)) => break,
            Ok(Ok(())) => {}
        }
        let received = BUFFER.with_borrow_mut(|buffer| take_answers(&session, buffer, &shared));
        if received.is_err() {
            let Counted { service, endpoint } = &session.counted;
            service.failed(endpoint, session.client.ip(), Instant::now());
            break;
        }
        tokio::task::yield_now().await;
    }
    end(&shared, worker, pair, &session);
}

/// Passes on the answers that are there, up to a turn.
fn take_answers(session: &Session, buffer: &mut [u8], shared: &Shared) -> io::Result<()> {
    for _ in 0..TURN {
        let upstream = &session.upstream;
        match upstream.try_io(Interest::READABLE, || receive(upstream, buffer)) {
            Ok(received) => {
                let train = Train::new(&received, buffer);
                if session.answered.fetch_add(train.count(), Relaxed) == 0 {
                    session.counted.service.reached(&session.counted.endpoint);
                }
                *session.used() = Instant::now();
                session.counted.to_client(train.bytes.len());
                if session.answer(&train).is_err() {
                    add(&shared.totals.lost_datagrams, train.count());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

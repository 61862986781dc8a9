//! One question.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::Socket;
use tokio::io::Interest;
use tokio::time::timeout_at;

use super::line::{GREETING, LONGEST_BYTES, Line};
use super::socket::{asking, icmp_error, scoped};
use super::wire::Wire;
use super::{Answer, Outcome, Protocol, Rejection, Unanswered};
use crate::lab::{LabError, Ns};

/// How long a probe waits unless told otherwise: just less than TCP's first retransmission, so
/// that a probe is one packet.
// KERNEL: TCP_TIMEOUT_INIT is 1 s (include/net/tcp.h, v6.12).
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(950);

/// Longest wait for a port that was just given up.
const PORT_PATIENCE: Duration = Duration::from_millis(200);

/// What to ask, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProbeSpec {
    /// Where to.
    pub dst: SocketAddr,
    /// Over what.
    pub protocol: Protocol,
    /// From where; port 0 lets the kernel choose one. The address need not be the namespace's own
    /// (but then it gets no answer, unless the answer is routed to it).
    pub source: Option<SocketAddr>,
    /// The link to send through; gives a link-local destination or source its scope.
    pub device: Option<String>,
    /// Longest wait for everything together.
    pub timeout: Duration,
}

impl ProbeSpec {
    /// A question with a timeout of 950 ms, from wherever the kernel chooses.
    pub fn new(protocol: Protocol, dst: SocketAddr) -> Self {
        Self { dst, protocol, source: None, device: None, timeout: DEFAULT_TIMEOUT }
    }

    /// [`new`](Self::new) over TCP.
    pub fn tcp(dst: SocketAddr) -> Self {
        Self::new(Protocol::Tcp, dst)
    }

    /// [`new`](Self::new) over UDP.
    pub fn udp(dst: SocketAddr) -> Self {
        Self::new(Protocol::Udp, dst)
    }

    /// Asks from this address, and a port of the kernel's choice.
    pub fn from_ip(self, source: impl Into<IpAddr>) -> Self {
        self.from_socket(SocketAddr::new(source.into(), 0))
    }

    /// Asks from this address and port.
    pub fn from_socket(self, source: SocketAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Asks through this link.
    pub fn through(self, device: &str) -> Self {
        Self { device: Some(device.to_owned()), ..self }
    }

    /// Waits this long at most.
    pub fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

/// Asks once, in a namespace, and says what became of it. Takes `spec.timeout` at most.
///
/// A connection is closed with a reset, so that hundreds of thousands of probes leave no ports in
/// TIME_WAIT behind. A dropped lab gives [`Outcome::Failed`].
///
/// # Cancel safety
///
/// Safe: the socket is closed when the future is dropped.
pub async fn probe(ns: &Ns, spec: &ProbeSpec) -> Outcome {
    let spec = spec.clone();
    ns.exec(async move { ask_once(&spec).await }).await.unwrap_or_else(|error| ended(error).into())
}

/// Asks once; runs in the namespace.
pub(super) async fn ask_once(spec: &ProbeSpec) -> Outcome {
    let asked = async { Asker::open(spec).await?.ask().await }.await;
    asked.map_or_else(Outcome::from, Outcome::Answered)
}

pub(super) fn ended(_error: LabError) -> Unanswered {
    Unanswered::failed("socket", &io::ErrorKind::NotConnected.into())
}

/// A connected socket that asks; for TCP, a connection.
#[derive(Debug)]
pub(super) struct Asker {
    wire: Wire,
    protocol: Protocol,
    timeout: Duration,
    local: SocketAddr,
    /// Bytes received and not yet taken as a line.
    pending: Vec<u8>,
    asked: u64,
    opened: Instant,
    connect: Duration,
}

impl Asker {
    /// Connects; runs in the namespace. A TCP connection still has to be greeted.
    pub(super) async fn open(spec: &ProbeSpec) -> Result<Self, Unanswered> {
        let opened = Instant::now();
        let socket = asking_soon(spec, opened).await?;
        let failed = |error: io::Error| Unanswered::failed("connect", &error);
        let dst = scoped(spec.dst, spec.device.as_deref()).map_err(failed)?;
        if spec.protocol != Protocol::Udp {
            // Best effort: without it, only more ports stay in TIME_WAIT.
            drop(socket.set_linger(Some(Duration::ZERO)));
            drop(socket.set_tcp_nodelay(true));
        }
        let in_progress = match socket.connect(&dst.into()) {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => true,
            Err(error) => return Err(refused(&socket, "connect", &error)),
        };
        let wire = Wire::new(socket, spec.protocol).map_err(failed)?;
        if in_progress {
            let deadline = (opened + spec.timeout).into();
            timeout_at(deadline, connected(&wire))
                .await
                .unwrap_or_else(|_late| Err(Outcome::Silent { connected: false }.into()))?;
        }
        let local = wire.socket().local_addr().map_err(failed)?;
        let local = local.as_socket().unwrap_or(spec.dst);
        Ok(Self {
            wire,
            protocol: spec.protocol,
            timeout: spec.timeout,
            local,
            pending: Vec::new(),
            asked: 0,
            opened,
            connect: opened.elapsed(),
        })
    }

    /// Asks once more, on the same socket, and waits for the answer to this very question.
    ///
    /// The first question over a connection is not sent: the greeting answers it.
    pub(super) async fn ask(&mut self) -> Result<Answer, Unanswered> {
        let greeting = self.asked == 0 && self.protocol != Protocol::Udp;
        let started = if self.asked == 0 { self.opened } else { Instant::now() };
        let deadline = tokio::time::Instant::from_std(started + self.timeout);
        let token = if greeting { GREETING.to_owned() } else { format!("q{}", self.asked) };
        self.asked += 1;
        let connected = self.protocol != Protocol::Udp;
        let waited = timeout_at(deadline, async {
            if !greeting {
                self.say(&token).await?;
            }
            self.hear(&token).await
        });
        let line =
            waited.await.unwrap_or_else(|_late| Err(Outcome::Silent { connected }.into()))?;
        let total = started.elapsed();
        let connect = if self.protocol == Protocol::Udp { total } else { self.connect };
        Ok(Answer {
            by: line.name,
            reached_at: line.reached_at,
            seen: line.seen,
            local: self.local,
            connect,
            total,
        })
    }

    pub(super) fn local(&self) -> SocketAddr {
        self.local
    }

    async fn say(&self, token: &str) -> Result<(), Unanswered> {
        let line = format!("{token}\n");
        let sent = self.wire.io(Interest::WRITABLE, |socket| socket.send(line.as_bytes())).await;
        match sent {
            Ok(_) => Ok(()),
            // KERNEL: a rule of this host that drops or rejects the datagram makes send fail with
            // EPERM. A reject also queues an ICMP error, so the answer is worth waiting for.
            Err(error)
                if self.protocol == Protocol::Udp && error.raw_os_error() == Some(libc::EPERM) =>
            {
                Ok(())
            }
            Err(error) => Err(refused(&self.wire.socket(), "send", &error)),
        }
    }

    async fn hear(&mut self, token: &str) -> Result<Line, Unanswered> {
        loop {
            let not_ours = || Unanswered::failed("understand", &io::ErrorKind::InvalidData.into());
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let bytes: Vec<u8> = self.pending.drain(..=end).collect();
                let line = Line::decode(&bytes).ok_or_else(not_ours)?;
                if line.token == token {
                    return Ok(line);
                }
                // The late answer to an earlier question.
                continue;
            }
            if self.pending.len() > LONGEST_BYTES {
                return Err(not_ours());
            }
            let mut buffer = [0; LONGEST_BYTES];
            let interest = Interest::READABLE | Interest::ERROR;
            let received = self.wire.io(interest, |mut socket| socket.read(&mut buffer)).await;
            match received {
                Ok(0) if self.protocol != Protocol::Udp => {
                    let error = io::ErrorKind::UnexpectedEof.into();
                    return Err(Unanswered::failed("receive", &error));
                }
                Ok(length) => {
                    self.pending.extend(buffer.iter().take(length));
                    if self.protocol == Protocol::Udp && !self.pending.ends_with(b"\n") {
                        return Err(not_ours());
                    }
                }
                Err(error) => return Err(refused(&self.wire.socket(), "receive", &error)),
            }
        }
    }
}

/// Makes the socket; a chosen port that was just given up may be taken for a moment longer.
// KERNEL: epoll holds a file while it looks at it, so that another thread's close may not be the
// last (fs/eventpoll.c, v6.12).
async fn asking_soon(spec: &ProbeSpec, opened: Instant) -> Result<Socket, Unanswered> {
    loop {
        match asking(spec) {
            Ok(socket) => return Ok(socket),
            Err(failure)
                if failure.kind == io::ErrorKind::AddrInUse
                    && opened.elapsed() < spec.timeout.min(PORT_PATIENCE) =>
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(failure) => return Err(Outcome::Failed(failure).into()),
        }
    }
}

/// Waits until a connect under way has succeeded or failed.
async fn connected(wire: &Wire) -> Result<(), Unanswered> {
    let look = |socket: &Socket| {
        if let Some(error) = socket.take_error()? {
            return Ok(Err(refused(socket, "connect", &error)));
        }
        if let Some(rejection) = icmp_error(socket) {
            return Ok(Err(Outcome::Rejected(rejection).into()));
        }
        match socket.peer_addr() {
            Ok(_) => Ok(Ok(())),
            Err(_not_yet) => Err(io::ErrorKind::WouldBlock.into()),
        }
    };
    wire.io(Interest::WRITABLE | Interest::ERROR, look)
        .await
        .unwrap_or_else(|error| Err(Unanswered::failed("connect", &error)))
}

/// What an error of the socket means: an ICMP error if one is queued, else a reset or a failure.
fn refused(socket: &Socket, step: &'static str, error: &io::Error) -> Unanswered {
    if let Some(rejection) = icmp_error(socket) {
        return Outcome::Rejected(rejection).into();
    }
    if error.kind() == io::ErrorKind::ConnectionRefused {
        return Outcome::Rejected(Rejection::reset()).into();
    }
    Unanswered::failed(step, error)
}

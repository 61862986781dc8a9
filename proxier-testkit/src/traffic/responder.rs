//! Endpoints that answer.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::line::{GREETING, LONGEST_BYTES, Line, is_word};
use super::wire::Wire;
use super::{Protocol, socket};
use crate::lab::{LabError, Ns};

/// An address that a [`Responder`] answers at.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Endpoint {
    /// Name in the answers; one word of at most 200 bytes. Several endpoints may share it.
    pub name: String,
    /// Address and port. The unspecified address means every address of the namespace; an address
    /// that is not assigned is accepted.
    pub at: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

impl Endpoint {
    /// An endpoint.
    pub fn new(name: &str, protocol: Protocol, at: SocketAddr) -> Self {
        Self { name: name.to_owned(), at, protocol }
    }

    /// An endpoint over TCP.
    pub fn tcp(name: &str, at: SocketAddr) -> Self {
        Self::new(name, Protocol::Tcp, at)
    }

    /// An endpoint over UDP.
    pub fn udp(name: &str, at: SocketAddr) -> Self {
        Self::new(name, Protocol::Udp, at)
    }
}

/// Answers at any number of endpoints of one namespace, until it is dropped.
///
/// Dropping it closes its listeners and all its connections.
#[derive(Debug)]
pub struct Responder {
    ns: Ns,
    served: Vec<Served>,
}

#[derive(Debug)]
struct Served {
    endpoint: Endpoint,
    answers: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Responder {
    /// Opens all endpoints and starts to answer. When it returns, every one of them is open.
    ///
    /// # Errors
    ///
    /// [`LabError::Name`] for a name that is not one word; [`LabError::Socket`] naming the
    /// endpoint that cannot be opened (with SCTP: when the kernel has none).
    ///
    /// # Panics
    ///
    /// When called from a task of the namespace itself.
    pub fn start(ns: &Ns, endpoints: impl IntoIterator<Item = Endpoint>) -> Result<Self, LabError> {
        let mut responder = Self { ns: ns.clone(), served: Vec::new() };
        responder.add(endpoints)?;
        Ok(responder)
    }

    /// Opens more endpoints.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); then those before the failing one are open.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub fn add(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Result<(), LabError> {
        let endpoints: Vec<_> = endpoints.into_iter().collect();
        if let Some(bad) = endpoints.iter().find(|endpoint| !is_word(&endpoint.name)) {
            let why = "an endpoint's name is one word of at most 200 bytes";
            return Err(LabError::Name { name: bad.name.clone(), why });
        }
        let opened = self.ns.block_on(async move {
            let mut opened = Vec::new();
            for endpoint in endpoints {
                match serve(&endpoint) {
                    Ok((answers, task)) => opened.push(Served { endpoint, answers, task }),
                    Err(error) => return (opened, Some((endpoint, error))),
                }
            }
            (opened, None)
        })?;
        let (served, failed) = opened;
        self.served.extend(served);
        match failed {
            None => Ok(()),
            Some((endpoint, source)) => Err(LabError::Socket {
                netns: self.ns.name().to_owned(),
                action: format!("answer at {}/{}", endpoint.at, endpoint.protocol),
                source,
            }),
        }
    }

    /// Closes the endpoints of a name, with their connections; says how many there were.
    ///
    /// When it returns they are closed (unless called from a task of the namespace itself).
    pub fn close(&mut self, name: &str) -> usize {
        let gone: Vec<_> =
            self.served.extract_if(.., |served| served.endpoint.name == name).collect();
        let count = gone.len();
        stop(&self.ns, gone);
        count
    }

    /// Answers given so far, by endpoint name. Endpoints that gave none are there with 0.
    ///
    /// A greeting of a connection counts as an answer.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for served in &self.served {
            *counts.entry(served.endpoint.name.clone()).or_default() +=
                served.answers.load(Ordering::Relaxed);
        }
        counts
    }

    /// Sets all counts to 0.
    pub fn reset(&self) {
        for served in &self.served {
            served.answers.store(0, Ordering::Relaxed);
        }
    }

    /// The open endpoints, in the order they were given.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.served.iter().map(|served| &served.endpoint)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        stop(&self.ns, std::mem::take(&mut self.served));
    }
}

/// Ends the tasks, and waits for that where waiting is possible.
fn stop(ns: &Ns, served: Vec<Served>) {
    for served in &served {
        served.task.abort();
    }
    if served.is_empty() || ns.is_current() {
        return;
    }
    // An error means that the lab has ended, and the tasks with it.
    drop(ns.block_on(async move {
        for served in served {
            drop(served.task.await);
        }
        // The tasks of the connections were aborted just now and are next in the queue.
        tokio::task::yield_now().await;
    }));
}

/// Opens one endpoint; runs in the namespace.
fn serve(endpoint: &Endpoint) -> io::Result<(Arc<AtomicU64>, JoinHandle<()>)> {
    let socket = socket::answering(endpoint.protocol, endpoint.at)?;
    let answers = Arc::new(AtomicU64::new(0));
    let (name, count) = (endpoint.name.clone(), Arc::clone(&answers));
    let task = match endpoint.protocol {
        Protocol::Udp => {
            tokio::spawn(serve_datagrams(Wire::new(socket, Protocol::Udp)?, name, count))
        }
        Protocol::Sctp | Protocol::Tcp => {
            let listener = TcpListener::from_std(socket.into())?;
            tokio::spawn(serve_connections(listener, name, count))
        }
    };
    Ok((answers, task))
}

async fn serve_connections(listener: TcpListener, name: String, answers: Arc<AtomicU64>) {
    let name: Arc<str> = name.into();
    let mut connections = JoinSet::new();
    loop {
        // A failed accept concerns a connection that is gone already.
        if let Ok((stream, seen)) = listener.accept().await {
            let (name, answers) = (Arc::clone(&name), Arc::clone(&answers));
            connections.spawn(async move {
                // An error means that the peer has gone, as every probe does.
                drop(converse(stream, seen, &name, &answers).await);
            });
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn converse(
    mut stream: TcpStream,
    seen: SocketAddr,
    name: &str,
    answers: &AtomicU64,
) -> io::Result<()> {
    let reached_at = stream.local_addr()?;
    // SCTP has another option for it; without it, answers are only later.
    drop(stream.set_nodelay(true));
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let mut token = GREETING.to_owned();
    loop {
        answers.fetch_add(1, Ordering::Relaxed);
        let line = Line::encode(name, reached_at, seen, token.trim());
        writer.write_all(line.as_bytes()).await?;
        token.clear();
        let longest = u64::try_from(LONGEST_BYTES).unwrap_or(u64::MAX);
        if (&mut reader).take(longest).read_line(&mut token).await? == 0 {
            return Ok(());
        }
    }
}

async fn serve_datagrams(wire: Wire, name: String, answers: Arc<AtomicU64>) {
    let mut buffer = [0; LONGEST_BYTES];
    loop {
        let received =
            wire.io(Interest::READABLE, |socket| socket::receive(socket, &mut buffer)).await;
        // An error is an ICMP message about an earlier answer; the next datagram is unaffected.
        let Ok((length, seen, reached_at)) = received else { continue };
        let question: Vec<u8> = buffer.iter().take(length).copied().collect();
        let token = String::from_utf8_lossy(&question);
        answers.fetch_add(1, Ordering::Relaxed);
        let line = Line::encode(&name, reached_at, seen, token.trim());
        // A full socket buffer loses the answer, as a network may.
        drop(socket::send_from(&wire.socket(), &line, reached_at, seen));
    }
}

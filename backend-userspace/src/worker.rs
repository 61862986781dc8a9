//! The threads that do the work, each with a runtime of its own, in the network namespace of the
//! proxier.
//!
//! They are not the embedder's: its runtime may be busy with other things, and its threads live in
//! another namespace. They start with the first thing to do and end with the proxier.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    thread::JoinHandle,
};

use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, Origin},
};
use proxier_netlink::NetNs;
use socket2::Socket;
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::mpsc,
    task::AbortHandle,
};
use tracing::error;

use crate::{
    backend::Ports,
    object::ORIGINS,
    shared::{Place, Shared},
    socket::{Stance, tcp_listener, udp_listener},
    tcp, udp,
};

/// What a worker is told.
enum Command {
    Close(FrontendKey),
    Open(Place, Protocol, Socket),
}

/// The threads.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    netns: NetNs,
    count: usize,
    /// The sockets that captured traffic goes to, for each worker.
    captured: Vec<(Origin, Protocol, Vec<Socket>)>,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    commands: mpsc::UnboundedSender<Command>,
    thread: JoinHandle<()>,
}

impl Workers {
    pub(crate) fn new(shared: Arc<Shared>, netns: NetNs, count: usize) -> Self {
        Self { shared, netns, count, captured: Vec::new(), running: Vec::new() }
    }

    /// Runs something in the namespace.
    fn inside<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        self.netns.run(f).map_err(io::Error::other)?
    }

    /// Opens the sockets that captured traffic goes to.
    pub(crate) fn open_captured(&mut self, families: &[Family]) -> io::Result<Ports> {
        let mut ports = Ports::default();
        let mut captured = Vec::new();
        for family in families {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                for origin in ORIGINS {
                    let ip = self.captured_at(*family);
                    let (sockets, port) = self.inside(|| self.group((ip, 0).into(), protocol))?;
                    ports.set(*family, protocol, origin, port);
                    captured.push((origin, protocol, sockets));
                }
            }
        }
        self.captured = captured;
        Ok(ports)
    }

    /// Where captured traffic goes to: what is redirected, to some address of this machine.
    fn captured_at(&self, family: Family) -> IpAddr {
        match (family, self.shared.stance()) {
            (Family::V4, Stance::Marked(_)) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            (Family::V6, Stance::Marked(_)) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            (Family::V4, _) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            (Family::V6, _) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        }
    }

    /// A socket for each worker, all on one port.
    fn group(&self, mut at: SocketAddr, protocol: Protocol) -> io::Result<(Vec<Socket>, u16)> {
        let stance = self.shared.stance();
        let mut sockets = Vec::new();
        for _ in 0..self.count {
            let socket = match protocol {
                Protocol::Udp => udp_listener(at, stance)?,
                Protocol::Tcp | Protocol::Sctp => {
                    tcp_listener(at, stance, self.shared.config.tcp.keepalive)?
                }
            };
            let bound = socket.local_addr()?.as_socket().map_or(0, |it| it.port());
            at.set_port(bound);
            sockets.push(socket);
        }
        Ok((sockets, at.port()))
    }

    /// Starts the threads if they do not run.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        if !self.running.is_empty() {
            return Ok(());
        }
        let running = self.inside(|| {
            (0..self.count).map(|index| start(index, Arc::clone(&self.shared))).collect()
        })?;
        self.running = running;
        for (origin, protocol, sockets) in &self.captured {
            for (worker, socket) in self.running.iter().zip(sockets) {
                worker.tell(Command::Open(
                    Place::Captured(*origin),
                    *protocol,
                    socket.try_clone()?,
                ));
            }
        }
        Ok(())
    }

    /// Tells the threads to end, and with them every connection and session.
    pub(crate) fn stop(&mut self) -> Vec<JoinHandle<()>> {
        self.running.drain(..).map(|it| it.thread).collect()
    }

    /// Listens for a frontend at an address, with every worker.
    pub(crate) fn listen(&self, key: FrontendKey, at: SocketAddr) -> io::Result<()> {
        let (sockets, port) = self.inside(|| self.group(at, key.protocol))?;
        for (worker, socket) in self.running.iter().zip(sockets) {
            worker.tell(Command::Open(Place::Named(key), key.protocol, socket));
        }
        self.shared.listeners().insert(key, SocketAddr::new(at.ip(), port));
        Ok(())
    }

    /// Stops listening for a frontend.
    pub(crate) fn close(&self, key: FrontendKey) {
        if self.shared.listeners().remove(&key).is_some() {
            self.running.iter().for_each(|worker| worker.tell(Command::Close(key)));
        }
    }
}

impl Running {
    fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            error!("a worker is gone");
        }
    }
}

fn start(index: usize, shared: Arc<Shared>) -> io::Result<Running> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (commands, receiver) = mpsc::unbounded_channel();
    let thread = std::thread::Builder::new().name(format!("proxier-{index}")).spawn(move || {
        runtime.block_on(work(index, Arc::clone(&shared), receiver));
        // What is still open is closed here, in the thread it belongs to.
        drop(runtime);
        if let Some(sessions) = shared.sessions.get(index) {
            sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        }
    })?;
    Ok(Running { commands, thread })
}

/// Does what it is told, until nobody can tell it anything.
async fn work(worker: usize, shared: Arc<Shared>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut named: BTreeMap<FrontendKey, AbortHandle> = BTreeMap::new();
    while let Some(command) = commands.recv().await {
        match command {
            Command::Close(key) => {
                if let Some(task) = named.remove(&key) {
                    task.abort();
                }
            }
            Command::Open(place, protocol, socket) => {
                match open(place, protocol, socket, worker, Arc::clone(&shared)) {
                    Ok(task) => {
                        if let Place::Named(key) = place
                            && let Some(old) = named.insert(key, task)
                        {
                            old.abort();
                        }
                    }
                    Err(error) => error!(%error, "a worker cannot listen"),
                }
            }
        }
    }
}

fn open(
    place: Place,
    protocol: Protocol,
    socket: Socket,
    worker: usize,
    shared: Arc<Shared>,
) -> io::Result<AbortHandle> {
    let task = match protocol {
        Protocol::Udp => {
            let socket = Arc::new(UdpSocket::from_std(socket.into())?);
            let at = socket.local_addr()?;
            tokio::spawn(udp::Listener { socket, at, place, shared, worker }.run())
        }
        Protocol::Tcp | Protocol::Sctp => {
            tokio::spawn(tcp::accept(TcpListener::from_std(socket.into())?, place, shared))
        }
    };
    Ok(task.abort_handle())
}

//! The client: one thread in a namespace of its own.

use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

use proxier_netlink::NetNs;
use proxier_testkit::lab::Ns;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    task::LocalSet,
};

use crate::{endpoint, peers::Contender};

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Goal {
    Connections,
    OneStream,
    ManyStreams,
    Latency,
    Datagrams,
}

impl Goal {
    pub(crate) const ALL: [Self; 5] =
        [Self::Connections, Self::OneStream, Self::ManyStreams, Self::Latency, Self::Datagrams];

    /// For the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Datagrams => "datagrams",
            Self::Latency => "latency",
            Self::ManyStreams => "streams",
            Self::OneStream => "stream",
        }
    }

    /// Where its first figure is in the table.
    pub(crate) const fn row(self) -> usize {
        match self {
            Self::Connections => 0,
            Self::OneStream => 10,
            Self::ManyStreams => 20,
            Self::Latency => 30,
            Self::Datagrams => 40,
        }
    }
}

/// Runs something in the namespace, in one thread.
fn inside<T: Send>(ns: &Ns, f: impl AsyncFnOnce() -> T + Send) -> T {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, f())
    };
    NetNs::Path(ns.path()).run(work).unwrap()
}

/// Figures of one goal: see the rows of the table.
pub(crate) fn measure(ns: &Ns, contender: Contender, goal: Goal, time: Duration) -> Vec<f64> {
    let at =
        |service| SocketAddr::from((Ipv4Addr::from(contender.address()), contender.port(service)));
    let per_second =
        |count: u64| f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / time.as_secs_f64();
    match goal {
        Goal::Connections => {
            let to = at(endpoint::ANSWER);
            let connect = async move |count: &Cell<u64>, _| {
                ask(to).await;
                count.set(count.get() + 1);
            };
            vec![per_second(inside(ns, async || tasks(64, time, connect).await))]
        }
        Goal::OneStream | Goal::ManyStreams => {
            let streams = if goal == Goal::OneStream { 1 } else { 64 };
            let kib = inside(ns, async || flood(at(endpoint::FLOOD), streams, time).await);
            vec![per_second(kib) * 1024.0 / 1e6]
        }
        Goal::Latency => {
            let mut times = inside(ns, async || {
                let (start, mut times) = (Instant::now(), Vec::new());
                while start.elapsed() < time {
                    let asked = Instant::now();
                    ask(at(endpoint::ANSWER)).await;
                    times.push(asked.elapsed().as_secs_f64() * 1e6);
                }
                times
            });
            times.sort_by(f64::total_cmp);
            let at = |per_mille: usize| times.get(times.len() * per_mille / 1000).copied();
            vec![at(500).unwrap_or_default(), at(990).unwrap_or_default()]
        }
        Goal::Datagrams => {
            let to = at(endpoint::DATAGRAM);
            let count = inside(ns, async || datagrams(to, time).await);
            vec![per_second(count)]
        }
    }
}

/// Repeats a task in so many copies for a while.
async fn tasks(
    copies: usize,
    time: Duration,
    task: impl AsyncFn(&Cell<u64>, usize) + 'static,
) -> u64 {
    let (count, task) = (Rc::new(Cell::new(0)), Rc::new(task));
    let start = Instant::now();
    let running = (0..copies).map(|copy| {
        let (count, task) = (Rc::clone(&count), Rc::clone(&task));
        tokio::task::spawn_local(async move {
            while start.elapsed() < time {
                task(&count, copy).await;
            }
        })
    });
    for task in running.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    count.get()
}

async fn ask(at: SocketAddr) {
    let asked = async {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"?").await.unwrap();
        let mut answer = [0; 64];
        while stream.read(&mut answer).await.unwrap() > 0 {}
    };
    tokio::time::timeout(Duration::from_secs(10), asked).await.unwrap();
}

/// KiB received.
async fn flood(at: SocketAddr, streams: usize, time: Duration) -> u64 {
    let bytes = Rc::new(Cell::new(0_u64));
    let start = Instant::now();
    let running = (0..streams).map(|_| {
        let bytes = Rc::clone(&bytes);
        tokio::task::spawn_local(async move {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(b"?").await.unwrap();
            let mut buffer = vec![0; 256 << 10];
            while start.elapsed() < time {
                let read = stream.read(&mut buffer).await.unwrap();
                bytes.set(bytes.get() + u64::try_from(read).unwrap());
            }
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        })
    });
    for task in running.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    bytes.get() / 1024
}

async fn datagrams(to: SocketAddr, time: Duration) -> u64 {
    let mut sockets = Vec::new();
    for _ in 0..64 {
        let socket = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        socket.connect(to).await.unwrap();
        sockets.push(socket);
    }
    tasks(64, time, async move |count, copy| {
        let Some(socket) = sockets.get(copy) else { return };
        let mut answer = [0; 64];
        if socket.send(&[1; 32]).await.is_err() {
            return;
        }
        let received = tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut answer));
        if matches!(received.await, Ok(Ok(_))) {
            count.set(count.get() + 1);
        }
    })
    .await
}

/// Opens connections that say nothing.
pub(crate) fn hold(ns: &Ns, contender: Contender, count: usize) -> Vec<std::net::TcpStream> {
    let at =
        SocketAddr::from((Ipv4Addr::from(contender.address()), contender.port(endpoint::ANSWER)));
    let connect = || {
        let connect = |number| {
            let connected = std::net::TcpStream::connect(at);
            connected.unwrap_or_else(|error| unreachable!("{contender:?} {number}: {error}"))
        };
        let held = (0..count).map(connect).collect();
        // The proxy may still be busy with the last ones.
        std::thread::sleep(Duration::from_secs(1));
        held
    };
    NetNs::Path(ns.path()).run(connect).unwrap()
}

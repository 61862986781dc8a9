//! What the tests of this crate share: proxiers without kernel rules, endpoints, and patience.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]

pub mod apart;

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_userspace::{
    Addresses, Config, Limits, Listen, Monitor, Userspace, UserspaceDataplane, engine,
};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    engine::Engine,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict, Verdicts, WayIn,
    },
};
use proxier_netlink::NetNs;
use proxier_testkit::eventually_async;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinHandle,
};

pub type TestEngine = Engine<Userspace, UserspaceDataplane>;

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A proxier that listens on loopback ports of the kernel's choice.
pub struct Proxy {
    pub engine: TestEngine,
    pub monitor: Monitor,
    revision: u64,
}

impl Proxy {
    pub fn new(change: impl FnOnce(&mut Config)) -> Self {
        let at = |_: &FragmentId, _: &FrontendKey| Some(([127, 0, 0, 1], 0).into());
        let limits = Limits { workers: 2.try_into().ok(), ..Limits::default() };
        let listen = Listen::Addresses(Addresses::new(at));
        let mut config = Config { listen, limits, ..Config::default() };
        change(&mut config);
        let engine = engine(&config, &NetNs::Current, &[Family::V4]).expect("no privilege needed");
        let monitor = engine.dataplane().monitor();
        Self { engine, monitor, revision: 0 }
    }

    /// One Service port, and where it is listened for.
    pub async fn serving(
        protocol: Protocol,
        members: &[SocketAddr],
        change: impl FnOnce(&mut Config),
    ) -> (Self, SocketAddr) {
        let mut proxy = Self::new(change);
        proxy.set(fragment(protocol, members)).await;
        let at = proxy.at(protocol);
        (proxy, at)
    }

    pub async fn set(&mut self, fragment: Fragment) {
        self.revision += 1;
        let revision = Revision(self.revision);
        let update = if self.revision == 1 {
            let node = Arc::default();
            Update::Reset { revision, node, fragments: vec![Arc::new(fragment)] }
        } else {
            let changes = vec![Change::Upsert(Arc::new(fragment))];
            Update::Delta { revision, node: None, changes }
        };
        let report = self.engine.sync(update).await.expect("a sync");
        assert_eq!(report.degraded, []);
    }

    pub fn at(&self, protocol: Protocol) -> SocketAddr {
        self.monitor.listeners()[&key(protocol)]
    }

    pub fn active(&self) -> u64 {
        self.monitor.snapshot().services.iter().map(|it| it.total.active).sum()
    }
}

pub fn key(protocol: Protocol) -> FrontendKey {
    let port = 80.try_into().expect("not zero");
    FrontendKey { way_in: WayIn::Address([10, 97, 0, 21].into()), port, protocol }
}

/// A Service port whose endpoints everybody may use.
pub fn fragment(protocol: Protocol, members: &[SocketAddr]) -> Fragment {
    let mut cluster: Vec<_> = members.iter().map(|addr| Member::new(*addr, false)).collect();
    cluster.sort_unstable();
    let forward = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Masquerade };
    let verdict = if members.is_empty() { Verdict::Reject } else { forward };
    let mut serving = members.to_vec();
    serving.sort_unstable();
    let id = FragmentId {
        service: ObjectName::new("shop", "cart"),
        port: "web".into(),
        protocol,
        family: Family::V4,
    };
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key: key(protocol),
        sources: None,
        verdicts: Verdicts::all(verdict),
    };
    Fragment {
        serving: if protocol == Protocol::Udp { serving } else { Vec::new() },
        ..Fragment::new(id, vec![frontend], cluster)
    }
}

/// A TCP endpoint that does as told with each connection, until it is dropped.
pub struct Server {
    pub addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn new<F: Future<Output = ()> + Send + 'static>(
        serve: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        });
        Self { addr, task }
    }

    /// Sends back what it receives.
    pub async fn echo() -> Self {
        Self::new(async |mut stream: TcpStream| {
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.ok();
            write.shutdown().await.ok();
        })
        .await
    }
}

/// A UDP endpoint that answers with its own port.
pub async fn datagram_server() -> Server {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((_, client)) = socket.recv_from(&mut buffer).await {
            socket.send_to(addr.port().to_string().as_bytes(), client).await.ok();
        }
    });
    Server { addr, task }
}

/// A port of which nobody listens.
pub async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// Asks once; says whether the answer is right.
pub async fn ask(at: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(at).await?;
        stream.write_all(b"hello").await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer == b"hello")
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap_or(false)
}

/// Waits for something to become true.
pub async fn until(what: &str, mut is: impl FnMut() -> bool) {
    eventually_async(PATIENCE, what, || std::future::ready(is())).await.unwrap();
}

/// Waits until a figure has stayed the same for a fifth of a second.
pub async fn until_steady<T: PartialEq>(what: &str, mut figure: impl FnMut() -> T) {
    let (mut last, mut since) = (figure(), Instant::now());
    until(what, || {
        let now = figure();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(200)
    })
    .await;
}

/// Memory that this process holds.
pub fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Open descriptors of this process.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes that follow from a seed; any shift or loss shows.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

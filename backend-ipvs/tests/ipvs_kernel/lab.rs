//! Namespaces, endpoints, clients and Services for the tests.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use proxier_backend_ipvs::{Config, Ipvs, IpvsDataplane, Sysctls, engine, prepare};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, SyncReport, Update,
    engine::Engine,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict, Verdicts, WayIn,
    },
};
use proxier_netlink::NetNs;
use proxier_testkit::backend;
use socket2::{Domain, Socket, Type};

pub(crate) type TestEngine = Engine<Ipvs, IpvsDataplane>;

pub(crate) const FRONTEND: &str = "10.97.0.21:80";
/// How long anything is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace.
pub(crate) struct Ns(pub(crate) NetNs);

impl Ns {
    pub(crate) fn new() -> Self {
        let ns = Self(NetNs::create().expect("a network namespace: tests need root"));
        ns.run("ip link set lo up");
        ns
    }

    /// As a node where the mode runs.
    pub(crate) fn prepared() -> Self {
        let ns = Self::new();
        drop(prepare(&ns.0, Sysctls { strict_arp: false }).unwrap());
        ns
    }

    pub(crate) async fn engine(&self, config: Config) -> TestEngine {
        engine(&config, &self.0, &Family::ALL).await.expect("an engine")
    }

    pub(crate) fn run(&self, line: &str) -> String {
        backend::run(&self.0, "sh", &["-c", line], "")
    }

    /// Everything of the kernel that the mode could change.
    pub(crate) fn state(&self) -> String {
        self.run("ipvsadm -S -n; nft list ruleset; ip -o link | cut -d: -f2; ip -o addr")
    }

    /// An endpoint at an address of this machine, which greets with its number.
    pub(crate) fn endpoint(&self, number: u8) -> SocketAddr {
        let addr: SocketAddr = ([10, 61, 3, number], 8080).into();
        self.run(&format!("ip addr add {}/32 dev lo", addr.ip()));
        let listener = self.0.run(|| TcpListener::bind(addr)).unwrap().unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut buffer = [0; 64];
                    stream.write_all(&[number]).ok();
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        stream.write_all(&buffer[..count]).ok();
                    }
                });
            }
        });
        addr
    }

    /// Opens a connection through the frontend; says which endpoint greets.
    pub(crate) fn connect(&self) -> (TcpStream, u8) {
        let from = Ipv4Addr::UNSPECIFIED;
        self.0.run(|| connect(from, FRONTEND.parse().unwrap())).unwrap()
    }

    /// Opens connections through the frontend, one after the other, and keeps them open; says which
    /// endpoint greets each.
    pub(crate) fn hold(&self, connections: usize) -> (Vec<TcpStream>, Vec<u8>) {
        (0..connections).map(|_| self.connect()).unzip()
    }

    /// Who greets each of some clients through a frontend. No connection is left open.
    pub(crate) fn ask(&self, clients: &[Ipv4Addr], to: SocketAddr) -> Vec<u8> {
        let ask = || clients.iter().map(|from| connect(*from, to).1).collect();
        self.0.run(ask).unwrap()
    }

    /// How many of some connections go to each endpoint.
    pub(crate) fn spread(&self, connections: usize) -> BTreeMap<u8, usize> {
        counts(&self.ask(&vec![Ipv4Addr::UNSPECIFIED; connections], FRONTEND.parse().unwrap()))
    }
}

/// How often each number is there.
pub(crate) fn counts(numbers: &[u8]) -> BTreeMap<u8, usize> {
    let mut counts = BTreeMap::new();
    for number in numbers {
        *counts.entry(*number).or_default() += 1;
    }
    counts
}

/// Opens a connection from an address to a frontend; says which endpoint greets.
fn connect(from: Ipv4Addr, to: SocketAddr) -> (TcpStream, u8) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    let connected = socket.connect_timeout(&to.into(), PATIENCE);
    connected.unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0];
    stream.read_exact(&mut greeting).unwrap();
    (stream, greeting[0])
}

/// One Service port with these endpoints and weights.
pub(crate) fn fragment(members: &[(SocketAddr, u16)], scheduler: &str) -> Fragment {
    let member = |(addr, weight): &(SocketAddr, u16)| Member {
        weight: NonZeroU16::new(*weight).unwrap(),
        ..Member::new(*addr, true)
    };
    let id = FragmentId {
        service: ObjectName::new("shop", "cart"),
        port: "web".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let frontend = frontend(FRONTEND.parse().unwrap());
    let cluster = members.iter().map(member).collect();
    Fragment {
        scheduler: Some(scheduler.into()),
        counters: true,
        ..Fragment::new(id, vec![frontend], cluster)
    }
}

/// A frontend at an address, which leads everybody to the endpoints of the cluster.
pub(crate) fn frontend(at: SocketAddr) -> Frontend {
    let forward = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Preserve };
    let port = at.port().try_into().unwrap();
    Frontend {
        kind: FrontendKind::ClusterIp,
        key: FrontendKey { way_in: WayIn::Address(at.ip()), port, protocol: Protocol::Tcp },
        sources: None,
        verdicts: Verdicts::all(forward),
    }
}

pub(crate) async fn set(engine: &mut TestEngine, revision: u64, fragment: Fragment) -> SyncReport {
    let revision = Revision(revision);
    let fragment = Arc::new(fragment);
    let update = if revision.0 == 1 {
        Update::Reset { revision, node: Arc::default(), fragments: vec![fragment] }
    } else {
        Update::Delta { revision, node: None, changes: vec![Change::Upsert(fragment)] }
    };
    engine.sync(update).await.unwrap()
}

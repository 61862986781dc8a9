//! The real kernel, and ipvsadm, nft and ip as witnesses. Each test has a network namespace of its
//! own; where the machine's kernel has no IPVS, all run in a guest.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroU16,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_ipvs::{
    Config, Ipvs, IpvsDataplane, Key, SCHEDULERS, Sysctls, engine, prepare, probe,
};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    engine::Engine,
    ir::{
        Balance, Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict,
        Verdicts, WayIn,
    },
    manifest::Manifest,
    model::{DetectLocal, Event, NodeEnv, NodePortAddresses, Store},
    spi::Dataplane,
};
use proxier_netlink::NetNs;

type TestEngine = Engine<Ipvs, IpvsDataplane>;

const EVERYTHING: &str = include_str!("everything.yaml");
const FRONTEND: &str = "10.97.0.21:80";
const PATIENCE: Duration = Duration::from_secs(30);

struct Ns(NetNs);

impl Ns {
    fn new() -> Self {
        let ns = Self(NetNs::create().expect("a network namespace: tests need root"));
        ns.run("ip link set lo up");
        ns
    }

    /// As a node where the mode runs.
    fn prepared() -> Self {
        let ns = Self::new();
        drop(prepare(&ns.0, Sysctls { strict_arp: false }).unwrap());
        ns
    }

    async fn engine(&self, config: Config) -> TestEngine {
        engine(&config, &self.0, &Family::ALL).await.expect("an engine")
    }

    fn run(&self, line: &str) -> String {
        let output = self.0.run(|| Command::new("sh").args(["-c", line]).output());
        let output = output.unwrap().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything of the kernel that the mode could change.
    fn state(&self) -> String {
        self.run("ipvsadm -S -n; nft list ruleset; ip -o link | cut -d: -f2; ip -o addr")
    }

    /// An endpoint at an address of this machine, which greets with its number.
    fn endpoint(&self, number: u8) -> SocketAddr {
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
    fn connect(&self) -> (TcpStream, u8) {
        let to = FRONTEND.parse().unwrap();
        let connect = || TcpStream::connect_timeout(&to, PATIENCE);
        let mut stream = self.0.run(connect).unwrap().expect("a connection through the frontend");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0];
        stream.read_exact(&mut greeting).unwrap();
        (stream, greeting[0])
    }

    /// How many of some connections go to each endpoint.
    fn spread(&self, connections: usize) -> BTreeMap<u8, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..connections {
            *counts.entry(self.connect().1).or_default() += 1;
        }
        counts
    }
}

fn env() -> NodeEnv {
    let nets = ["10.61.0.0/16", "fd41:61::/32"].map(|net| net.parse().unwrap());
    let addresses = ["127.0.0.1", "172.20.7.11", "::1", "fd41:7::11"];
    NodeEnv {
        name: "tern".to_owned(),
        ips: ["172.20.7.11", "fd41:7::11"].map(|ip| ip.parse().unwrap()).into(),
        interface_addresses: addresses.map(|ip| ip.parse().unwrap()).into(),
        detect_local: DetectLocal::ClusterCidr(nets.into()),
        ..NodeEnv::default()
    }
}

fn store(env: NodeEnv) -> Store {
    let manifest = Manifest::parse("everything.yaml", EVERYTHING);
    assert_eq!(manifest.problems, []);
    let mut store = Store::new(env);
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
    store.take().expect("a first update");
    store
}

async fn is_as_predicted(engine: &mut TestEngine) {
    for family in Family::ALL {
        let predicted = engine.predicted(family);
        let actual = engine.dataplane_mut().dump(family).await.unwrap();
        for (key, value) in &predicted {
            assert_eq!(actual.get(key), Some(value), "{key}");
        }
        let more: Vec<_> = actual.keys().filter(|key| !predicted.contains_key(key)).collect();
        assert!(more.is_empty(), "{more:?}");
    }
}

async fn sync(engine: &mut TestEngine, store: &mut Store) -> proxier_core::SyncReport {
    let report = engine.sync(store.reset()).await.unwrap();
    assert_eq!(report.degraded, []);
    is_as_predicted(engine).await;
    report
}

/// One Service port with these endpoints and weights.
fn fragment(members: &[(SocketAddr, u16)], scheduler: &str) -> Fragment {
    let member = |(addr, weight): &(SocketAddr, u16)| Member {
        weight: NonZeroU16::new(*weight).unwrap(),
        ..Member::new(*addr, true)
    };
    let frontend: SocketAddr = FRONTEND.parse().unwrap();
    let key = FrontendKey {
        way_in: WayIn::Address(frontend.ip()),
        port: frontend.port().try_into().unwrap(),
        protocol: Protocol::Tcp,
    };
    let forward = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Preserve };
    Fragment {
        id: FragmentId {
            service: ObjectName::new("shop", "cart"),
            port: "web".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![Frontend {
            kind: FrontendKind::ClusterIp,
            key,
            sources: None,
            verdicts: Verdicts::all(forward),
        }],
        cluster: members.iter().map(member).collect(),
        local: Vec::new(),
        affinity: None,
        health_check_node_port: None,
        serving: Vec::new(),
        balance: Balance::Default,
        scheduler: Some(scheduler.into()),
        counters: true,
    }
}

async fn set(
    engine: &mut TestEngine,
    revision: u64,
    fragment: Fragment,
) -> proxier_core::SyncReport {
    let revision = Revision(revision);
    let fragment = Arc::new(fragment);
    let update = if revision.0 == 1 {
        Update::Reset { revision, node: Arc::default(), fragments: vec![fragment] }
    } else {
        Update::Delta { revision, node: None, changes: vec![Change::Upsert(fragment)] }
    };
    engine.sync(update).await.unwrap()
}

#[tokio::test]
async fn what_is_synced_is_read_back_and_goes_without_a_trace() {
    let ns = Ns::new();
    // Foreign virtual servers, a foreign table, and a foreign link.
    ns.run(
        "ipvsadm -A -t 192.0.2.1:80 -s wlc; ipvsadm -A -f 7 -s rr; ipvsadm -A -u 172.20.7.11:53",
    );
    ns.run("nft add table ip theirs; nft add chain ip theirs c; ip link add theirs0 type dummy");
    let before = ns.state();
    let listed = vec!["172.16.0.0/12".parse().unwrap()];
    let other = NodeEnv {
        detect_local: DetectLocal::InterfaceNamePrefix("veth".to_owned()),
        node_port_addresses: NodePortAddresses::Inside(listed),
        ..env()
    };
    let mut engine = ns.engine(Config::default()).await;
    for env in [env(), other, NodeEnv { detect_local: DetectLocal::None, ..env() }] {
        sync(&mut engine, &mut store(env)).await;
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
        // nft prints what it can read.
        ns.run("nft list ruleset > $$.nft && nft -c -f $$.nft && rm $$.nft");
    }
    // The next process finds everything as it is.
    let mut next = ns.engine(Config::default()).await;
    let none = NodeEnv { detect_local: DetectLocal::None, ..env() };
    assert_eq!(sync(&mut next, &mut store(none)).await.ops.total(), 0);
    next.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn what_others_break_is_repaired() {
    let ns = Ns::new();
    let mut engine = ns.engine(Config::default()).await;
    sync(&mut engine, &mut store(env())).await;
    for breaking in [
        "ipvsadm -D -t 10.97.0.21:80",
        "ipvsadm -E -t 10.97.0.21:80 -s lc",
        "ipvsadm -d -t 10.97.0.21:80 -r 10.61.3.21:8080",
        "ip addr del 10.97.0.21/32 dev proxier-ipvs0",
        "ip link del proxier-ipvs0",
        "nft flush chain ip proxier-ipvs from-pod",
        "nft delete table ip proxier-ipvs",
        "ipvsadm -C",
    ] {
        ns.run(breaking);
        assert!(engine.audit().await.unwrap().drift > 0, "{breaking}");
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0, "{breaking}");
        is_as_predicted(&mut engine).await;
    }
}

#[tokio::test]
async fn probing_and_preparing_say_what_is_there() {
    let ns = Ns::new();
    let before = ns.state();
    let found = probe(&ns.0, &Family::ALL).await;
    assert!(found.available, "{found:?}");
    assert!(found.reasons.iter().any(|it| it.contains("conntrack is 0")), "{found:?}");
    assert_eq!(ns.state(), before);
    let prepared = prepare(&ns.0, Sysctls { strict_arp: true }).unwrap();
    assert_eq!(prepared.changed().len(), 5, "{prepared:?}");
    assert_eq!(prepare(&ns.0, Sysctls { strict_arp: true }).unwrap().changed(), []);
    prepared.undo().unwrap();
    assert_eq!(
        ns.run("cat /proc/sys/net/ipv4/vs/conntrack /proc/sys/net/ipv4/conf/all/arp_announce"),
        "0\n0\n"
    );
}

#[tokio::test]
async fn schedulers_choose_as_they_say() {
    let ns = Ns::prepared();
    let members = [1, 2].map(|number| (ns.endpoint(number), 1));
    let mut engine = ns.engine(Config::default()).await;
    // In turn.
    assert_eq!(set(&mut engine, 1, fragment(&members, "rr")).await.degraded, []);
    assert_eq!(ns.spread(12), [(1, 6), (2, 6)].into());
    // By weight, also where the unweighted one is named.
    let [a, b] = members;
    for (revision, scheduler) in [(2, "wrr"), (3, "rr")] {
        let weighted = [a, (b.0, 3)];
        assert_eq!(set(&mut engine, revision, fragment(&weighted, scheduler)).await.degraded, []);
        assert_eq!(ns.spread(16), [(1, 4), (2, 12)].into(), "{scheduler}");
    }
    // One client, one destination.
    for (revision, scheduler) in [(4, "sh"), (5, "dh"), (6, "mh")] {
        set(&mut engine, revision, fragment(&members, scheduler)).await;
        assert_eq!(ns.spread(12).len(), 1, "{scheduler}");
    }
    // The busy one is avoided.
    for (revision, scheduler) in [(7, "lc"), (8, "wlc"), (9, "sed"), (10, "nq")] {
        set(&mut engine, revision, fragment(&[a], scheduler)).await;
        let busy: Vec<_> = (0..40).map(|_| ns.connect()).collect();
        assert!(busy.iter().all(|(_, number)| *number == 1));
        set(&mut engine, revision, fragment(&members, scheduler)).await;
        let idle: Vec<_> = (0..10).map(|_| ns.connect().1).collect();
        assert_eq!(idle, [2; 10], "{scheduler}");
    }
}

#[tokio::test]
async fn unknown_schedulers_are_named_with_those_there_are() {
    let ns = Ns::prepared();
    let members = [(ns.endpoint(1), 1)];
    let mut engine = ns.engine(Config::default()).await;
    let report = set(&mut engine, 1, fragment(&members, "best")).await;
    let [degraded] = &report.degraded[..] else { panic!("{report:?}") };
    assert!(degraded.reason.contains("shop/cart asks for scheduler \"best\""), "{degraded:?}");
    assert!(SCHEDULERS.iter().all(|it| degraded.reason.contains(it)), "{degraded:?}");
    assert_eq!(set(&mut engine, 2, fragment(&members, "rr")).await.degraded, []);
    assert_eq!(ns.connect().1, 1);
}

/// Lets time pass for the proxier until a destination is gone.
async fn drained(engine: &mut TestEngine, mut now: Instant) {
    let deadline = Instant::now() + Duration::from_secs(200);
    while engine.tick(now).await.unwrap().is_some() {
        assert!(Instant::now() < deadline, "a destination still drains");
        tokio::time::sleep(Duration::from_millis(200)).await;
        now = now.max(Instant::now());
    }
}

#[tokio::test]
async fn a_removed_endpoint_serves_its_connections_to_their_end() {
    let ns = Ns::prepared();
    let [a, b] = [1, 2].map(|number| (ns.endpoint(number), 1));
    let limit = Duration::from_secs(3600);
    let config = Config { drain: Some(limit), ..Config::default() };
    let mut engine = ns.engine(config.clone()).await;
    set(&mut engine, 1, fragment(&[a], "rr")).await;
    let (mut open, first) = ns.connect();
    assert_eq!(first, 1);
    set(&mut engine, 2, fragment(&[b], "rr")).await;
    // The connection goes on; new ones go elsewhere; the destination is there with weight 0.
    let mut echo = [0; 4];
    open.write_all(b"ping").unwrap();
    open.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ping");
    assert_eq!(ns.spread(4), [(2, 4)].into());
    assert_eq!(engine.dataplane().draining().count(), 1);
    is_as_predicted(&mut engine).await;
    // The next process goes on with it, and uses it again when it comes back.
    let mut next = ns.engine(config).await;
    set(&mut next, 1, fragment(&[b], "rr")).await;
    assert_eq!(next.dataplane().draining().count(), 1);
    set(&mut next, 2, fragment(&[a, b], "rr")).await;
    assert_eq!(next.dataplane().draining().count(), 0);
    assert_eq!(ns.spread(4), [(1, 2), (2, 2)].into());
    // At the limit it goes, whoever is connected.
    set(&mut next, 3, fragment(&[b], "rr")).await;
    assert!(next.tick(Instant::now()).await.unwrap().is_some());
    drained(&mut next, Instant::now() + limit).await;
    assert!(!ns.run("ipvsadm -S -n").contains("10.61.3.1:8080"));
    assert!(next.predicted(Family::V4).contains_key(&Key::Link(Family::V4)));
    drop(open);
}

#[tokio::test]
async fn connections_are_counted() {
    let ns = Ns::prepared();
    let [a, b] = [1, 2].map(|number| (ns.endpoint(number), 1));
    let mut engine = ns.engine(Config::default()).await;
    set(&mut engine, 1, fragment(&[a, b], "rr")).await;
    ns.spread(6);
    // The kernel sums up every two seconds.
    let deadline = Instant::now() + PATIENCE;
    let counters = loop {
        let counters = engine.counters().await.unwrap();
        if counters.iter().all(|it| it.count.connections > Some(0)) {
            break counters;
        }
        assert!(Instant::now() < deadline, "waited for counters: {counters:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let of = |endpoint| {
        let found = counters.iter().find(|it| it.endpoint == endpoint).unwrap();
        found.count.connections
    };
    assert_eq!((of(None), of(Some(a.0)), of(Some(b.0))), (Some(6), Some(3), Some(3)));
    assert!(counters.iter().all(|it| it.count.bytes > Some(0)));
}

//! What it takes to load 5,000 Services with ten endpoints each, to change one of them, to audit them,
//! to restart and to clean up.
//!
//! `cargo run --release -p proxier-backend-iptables --example churn`
//!
//! Works in a network namespace of its own. Prints times and memory. Needs root, and leaves nothing
//! behind.
#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement that may as well end at once"
)]

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Instant,
};

use proxier_backend_iptables::{Config, Iptables, IptablesDataplane, engine};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    engine::Engine,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, NodeView, Pool, Snat, Verdict,
        Verdicts, WayIn,
    },
    model::{DetectLocal, NodeEnv},
    spi::{Backend, Dataplane, Objects},
};
use proxier_netlink::NetNs;

const SERVICES: u16 = 5000;
const ENDPOINTS: u8 = 10;

fn fragment(index: u16, generation: u8) -> Arc<Fragment> {
    let [high, low] = index.to_be_bytes();
    let id = FragmentId {
        service: ObjectName::new("shop", &format!("service-{index}")),
        port: "web".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let forward = |snat| Verdict::Forward { pool: Pool::Cluster, snat };
    let (pod, other) = (forward(Snat::Preserve), forward(Snat::Masquerade));
    let ip: IpAddr = Ipv4Addr::new(10, 96, high, low).into();
    let key = FrontendKey {
        way_in: WayIn::Address(ip),
        port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
    };
    let cluster = (0..ENDPOINTS).map(|n| {
        let addr = (Ipv4Addr::new(10, 128 + generation * ENDPOINTS + n, high, low), 8080);
        Member::new(addr.into(), n == 0)
    });
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key,
        sources: None,
        verdicts: Verdicts { pod, node: other, external: other },
    };
    Arc::new(Fragment::new(id, vec![frontend], cluster.collect()))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn peak_rss() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")).collect()
}

#[tokio::main]
async fn main() {
    let detect_local = DetectLocal::ClusterCidr(vec!["10.128.0.0/9".parse().unwrap()]);
    let node = Arc::new(NodeEnv { detect_local, ..NodeEnv::default() }.view());
    let fragments: Vec<_> = (0..SERVICES).map(|index| fragment(index, 0)).collect();
    let ns = NetNs::create().unwrap();
    let open = || engine(Config::default(), &ns, &Family::ALL).unwrap();
    let mut engine = open();
    time_compile(engine.backend(), &node, &fragments);
    println!("before: {}", peak_rss());

    let start = Instant::now();
    let reset = Update::Reset { revision: Revision(1), node: Arc::clone(&node), fragments };
    let report = engine.sync(reset.clone()).await.unwrap();
    println!("load: {:?}, {} batches, {} objects", start.elapsed(), report.batches, report.ops.add);
    println!("loaded: {}", peak_rss());

    let mut revision = 1;
    let mut step = async |engine: &mut Engine<Iptables, IptablesDataplane>, change: Change| {
        revision += 1;
        let update =
            Update::Delta { revision: Revision(revision), node: None, changes: vec![change] };
        let start = Instant::now();
        let report = engine.sync(update).await.unwrap();
        assert!(report.degraded.is_empty());
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut times = Vec::new();
    for round in 0..20 {
        times.push(step(&mut engine, Change::Upsert(fragment(2500, (round + 1) % 2))).await);
    }
    println!("all endpoints of a service replaced: {:.1} ms", median(times));
    let (mut removals, mut additions) = (Vec::new(), Vec::new());
    for index in 1000..1020 {
        let fragment = fragment(index, 0);
        removals.push(step(&mut engine, Change::Remove(fragment.id.clone())).await);
        additions.push(step(&mut engine, Change::Upsert(fragment)).await);
    }
    println!("first removal (reads handles): {:.1} ms", removals[0]);
    println!("a service removed: {:.1} ms, added: {:.1} ms", median(removals), median(additions));

    let start = Instant::now();
    let dump = engine.dataplane_mut().dump(Family::V4).await.unwrap();
    println!("dump: {:?}, {} objects; {}", start.elapsed(), dump.len(), peak_rss());
    drop(dump);
    let start = Instant::now();
    let report = engine.audit().await.unwrap();
    println!("audit: {:?}, drift {}; {}", start.elapsed(), report.drift, peak_rss());

    let mut engine = open();
    let start = Instant::now();
    let report = engine.sync(reset).await.unwrap();
    println!("restart: {:?}, {:?}", start.elapsed(), report.ops);

    let start = Instant::now();
    engine.cleanup().await.unwrap();
    println!("wipe: {:?}", start.elapsed());
}

fn time_compile(backend: &impl Backend, node: &NodeView, fragments: &[Arc<Fragment>]) {
    let start = Instant::now();
    for fragment in fragments {
        let mut out = Objects::default();
        backend.compile(node, fragment, &Default::default(), &mut out).unwrap();
        std::hint::black_box(&out);
    }
    println!("compile: {:?} a fragment", start.elapsed() / u32::from(SERVICES));
}

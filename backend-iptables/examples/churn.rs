//! Times at scale. Not run by default: `cargo test --release --test scale -- --ignored --nocapture`.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Instant,
};

use common::*;
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    ir::{
        Balance, Fragment, Frontend, FrontendKey, FrontendKind, Member, NodeView, Pool, Snat,
        Verdict, Verdicts, WayIn,
    },
    spi::{Backend, Dataplane, Objects},
};

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
    Arc::new(Fragment {
        id,
        frontends: vec![Frontend {
            kind: FrontendKind::ClusterIp,
            key,
            sources: None,
            verdicts: Verdicts { pod, node: other, external: other },
        }],
        cluster: cluster.collect(),
        local: Vec::new(),
        affinity: None,
        balance: Balance::Default,
        scheduler: None,
        counters: false,
        health_check_node_port: None,
        serving: Vec::new(),
    })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn peak_rss() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a while; says how long"]
async fn five_thousand_services_with_ten_endpoints() {
    let node = Arc::new(env().view());
    let fragments: Vec<_> = (0..SERVICES).map(|index| fragment(index, 0)).collect();
    let ns = Ns::new();
    let mut engine = ns.engine();
    time_compile(engine.backend(), &node, &fragments);
    println!("before: {}", peak_rss());

    let start = Instant::now();
    let reset = Update::Reset { revision: Revision(1), node: Arc::clone(&node), fragments };
    let report =
        engine.sync(reset.clone()).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("load: {:?}, {} batches, {} objects", start.elapsed(), report.batches, report.ops.add);
    println!("loaded: {}", peak_rss());

    let mut revision = 1;
    let mut step = async |engine: &mut TestEngine, change: Change| {
        revision += 1;
        let update =
            Update::Delta { revision: Revision(revision), node: None, changes: vec![change] };
        let start = Instant::now();
        let report = engine.sync(update).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
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

    let mut engine = ns.engine();
    let start = Instant::now();
    let report = engine.sync(reset).await.unwrap();
    println!("restart: {:?}, {:?}", start.elapsed(), report.ops);

    let start = Instant::now();
    engine.cleanup().await.unwrap();
    println!("wipe: {:?}", start.elapsed());
    assert_eq!(ns.run("nft", &["list", "ruleset"]), "");
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

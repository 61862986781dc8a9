//! Times, operations and memory at scale, in a network namespace of its own.
//!
//! `cargo run --release -p proxier-backend-nftables --example scale -- [SERVICES [ENDPOINTS]]`
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement, run by hand"
)]

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_nftables::{Config, engine};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    ir::{
        Balance, Detector, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Member,
        NodeView, Pool, Snat, Verdict, Verdicts, WayIn,
    },
    spi::Dataplane,
};
use proxier_netlink::NetNs;

fn node() -> Arc<NodeView> {
    let mut node = NodeView::default();
    node.0.v4 = FamilyView {
        detector: Some(Detector::Source("10.128.0.0/9".parse().unwrap())),
        ..FamilyView::default()
    };
    Arc::new(node)
}

/// One Service port with a cluster IP; `first` numbers its endpoints.
fn fragment(index: u32, endpoints: u32, first: u32) -> Arc<Fragment> {
    let forward = |snat| Verdict::Forward { pool: Pool::Cluster, snat };
    let (pod, other) = (forward(Snat::Preserve), forward(Snat::Masquerade));
    let ip: IpAddr = Ipv4Addr::from_bits(0x0a60_0000 + index).into();
    let cluster = (first..first + endpoints).map(|number| {
        let ip = Ipv4Addr::from_bits(0x0a80_0000 + index * 16 + number);
        Member::new((ip, 8080).into(), number == 0)
    });
    Arc::new(Fragment {
        id: FragmentId {
            service: ObjectName::new("shop", &format!("service-{index}")),
            port: "web".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![Frontend {
            kind: FrontendKind::ClusterIp,
            key: FrontendKey {
                way_in: WayIn::Address(ip),
                port: 80.try_into().unwrap(),
                protocol: Protocol::Tcp,
            },
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

fn memory(what: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap_or_default();
    line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |permille: usize| times.get((times.len() * permille / 1000).min(times.len() - 1));
    println!("{what}: p50 {:?}, p99 {:?}, max {:?}", at(500), at(990), times.last());
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let numbers: Vec<u32> =
        std::env::args().skip(1).map(|it| it.parse()).collect::<Result<_, _>>()?;
    let services = numbers.first().copied().unwrap_or(45_000);
    let endpoints = numbers.get(1).copied().unwrap_or(3);
    let (ns, node) = (NetNs::create()?, node());
    println!("{services} services x {endpoints} endpoints; before: {}", memory("VmRSS"));
    let fragments: Vec<_> = (0..services).map(|index| fragment(index, endpoints, 0)).collect();
    println!("with the fragments: {}", memory("VmRSS"));

    let mut proxier = engine(Config::default(), &ns, &[Family::V4])?;
    let reset = Update::Reset { revision: Revision(1), node, fragments };
    let start = Instant::now();
    let report = proxier.sync(reset.clone()).await?;
    println!(
        "first sync: {:?}, {} objects, {} batches",
        start.elapsed(),
        report.ops.add,
        report.batches
    );
    println!("memory: now {}, at most {}", memory("VmRSS"), memory("VmHWM"));

    let mut revision = 1;
    let mut ops = Vec::new();
    let mut step = async |proxier: &mut dyn Proxier, change: Change| {
        revision += 1;
        let changes = vec![change];
        let update = Update::Delta { revision: Revision(revision), node: None, changes };
        let start = Instant::now();
        let report = proxier.sync(update).await?;
        ops.push(report.ops.total());
        Ok::<_, Box<dyn Error>>(start.elapsed())
    };
    let (mut added, mut removed, mut swapped) = (Vec::new(), Vec::new(), Vec::new());
    let (mut gone, mut back) = (Vec::new(), Vec::new());
    for round in 0..2000 {
        let index = round * 7919 % services;
        let more = fragment(index, endpoints + 1, 0);
        added.push(step(&mut proxier, Change::Upsert(more)).await?);
        let same = fragment(index, endpoints, 0);
        removed.push(step(&mut proxier, Change::Upsert(Arc::clone(&same))).await?);
        let other = fragment(index, endpoints, 1);
        swapped.push(step(&mut proxier, Change::Upsert(other)).await?);
        swapped.push(step(&mut proxier, Change::Upsert(Arc::clone(&same))).await?);
        gone.push(step(&mut proxier, Change::Remove(same.id.clone())).await?);
        back.push(step(&mut proxier, Change::Upsert(same)).await?);
    }
    // The first of each makes what a new pool size needs.
    show("an endpoint comes", added.split_off(1));
    show("an endpoint goes", removed.split_off(1));
    show("an endpoint is replaced", swapped);
    show("a service goes", gone);
    show("a service comes", back);
    println!("operations: at most {:?}", ops.iter().max());

    let start = Instant::now();
    let dump = proxier.dataplane_mut().dump(Family::V4).await?;
    println!("dump: {:?}, {} objects", start.elapsed(), dump.len());
    drop(dump);
    drop(proxier);
    let mut again = engine(Config::default(), &ns, &[Family::V4])?;
    let start = Instant::now();
    let report = again.sync(reset).await?;
    println!("restart: {:?}, {} operations", start.elapsed(), report.ops.total());
    println!("memory: now {}, at most {}", memory("VmRSS"), memory("VmHWM"));
    let start = Instant::now();
    again.cleanup().await?;
    println!("cleanup: {:?}", start.elapsed());
    Ok(())
}

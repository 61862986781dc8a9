//! Times, operations and memory at scale, in a network namespace of its own.
//!
//! `cargo run --release -p proxier-backend-nftables --example scale -- [SERVICES [ENDPOINTS]]`
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "a measurement, run by hand"
)]

mod world;

use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_nftables::{Config, engine};
use proxier_core::{Change, Family, Proxier, Revision, Update, spi::Dataplane};
use proxier_netlink::NetNs;
use world::{fragment, memory_kib, node};

fn memory(what: &str) -> String {
    format!("{} KiB", memory_kib(what))
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

//! What Services add to a TCP connect: through the first, a random and the last of many, beside the
//! way straight to an endpoint and a single `dnat` rule, in turns, in a network namespace of its own.
//!
//! `cargo run --release -p proxier-backend-nftables --example latency -- [SERVICES [ROUNDS]]`
#![allow(
    clippy::disallowed_methods,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "a measurement, run by hand"
)]

mod world;

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use proxier_backend_nftables::{Config, engine};
use proxier_core::{Family, Proxier, Revision, Update};
use proxier_netlink::NetNs;
use rustix::net::{AddressFamily, SocketType, sockopt};
use world::{fragment, node, vip};

/// A pod's address: what comes from it keeps its source.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 1);
const ENDPOINTS: u32 = 3;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u32>());
    let services = args.next().transpose()?.unwrap_or(45_000).max(1);
    let rounds = args.next().transpose()?.unwrap_or(5_000).max(1);
    let ns = NetNs::create()?;
    // Every endpoint is this host, and everything leads to it.
    for line in ["link set lo up", "address add 10.128.0.0/9 dev lo", "route add default dev lo"] {
        let args = line.split(' ').collect::<Vec<_>>();
        let status = ns.run(|| Command::new("ip").args(&args).status())??;
        assert!(status.success(), "ip {line}");
    }
    let mut proxier = engine(Config::default(), &ns, &[Family::V4])?;
    let fragments = (0..services).map(|index| fragment(index, ENDPOINTS, 0)).collect();
    proxier.sync(Update::Reset { revision: Revision(1), node: node(), fragments }).await?;

    // What it takes to translate at all: one rule of another table, in front of ours.
    let floor = "add table ip floor; \
                 add chain ip floor out { type nat hook output priority -101; }; \
                 add rule ip floor out ip daddr 10.95.0.1 tcp dport 80 dnat to 10.128.0.0:8080";
    let status = ns.run(|| Command::new("nft").arg(floor).status())??;
    assert!(status.success(), "nft {floor}");

    let listener = ns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080)))??;
    thread::spawn(move || listener.incoming().for_each(drop));
    let direct: SocketAddr = (Ipv4Addr::from_bits(0x0a80_0000), 8080).into();
    let one_rule: SocketAddr = ([10, 95, 0, 1], 80).into();
    let through = |index: u32| SocketAddr::from((vip(index), 80));
    let times = ns.run(|| {
        let mut times: [Vec<Duration>; 6] = Default::default();
        for round in 0..rounds {
            let random = through(round.wrapping_mul(2_654_435_761) % services);
            // The first of a round finds caches cold: it does not count.
            connect(direct).unwrap();
            let targets = [direct, through(0), random, through(services - 1), direct, one_rule];
            // Each in each place.
            for place in 0..targets.len() {
                let which = (place + usize::try_from(round).unwrap()) % targets.len();
                times[which].push(connect(targets[which]).unwrap());
            }
        }
        times
    })?;
    let names = ["direct", "first", "random", "last", "direct again", "one dnat rule"];
    let median = |times: &[Duration]| {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        (sorted[sorted.len() / 2], sorted[sorted.len() * 99 / 100])
    };
    let (base, _) = median(&times[0]);
    println!("{services} services of {ENDPOINTS} endpoints, {rounds} connects each");
    for (name, times) in names.iter().zip(&times) {
        let (p50, p99) = median(times);
        let added = p50.as_secs_f64() * 1e6 - base.as_secs_f64() * 1e6;
        println!("{name:>13}: p50 {p50:?}, p99 {p99:?}, added {added:+.2} µs");
    }
    Ok(())
}

/// How long a connection takes from the client's address. It is reset at once, so that none is left.
fn connect(to: SocketAddr) -> rustix::io::Result<Duration> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
    rustix::net::bind(&socket, &SocketAddr::new(IpAddr::V4(CLIENT), 0))?;
    let begin = Instant::now();
    rustix::net::connect(&socket, &to)?;
    Ok(begin.elapsed())
}

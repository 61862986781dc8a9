//! What a Service adds to the time of a TCP connect, beside the direct way.
//!
//! `cargo run --release -p proxier-backend-iptables --example connect -- [SERVICES] [ENDPOINTS]
//! [ROUNDS] [tree|kube-proxy] [nft|legacy]`
//!
//! Programs so many Services with so many endpoints each in a network namespace of its own, and opens
//! connections directly to an endpoint, and through the first, a random and the last Service, in
//! turns. Prints microseconds; also how long the Services took to program, and one of them to change.
//! Needs root, and leaves nothing behind.
#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measurement that may as well end at once"
)]

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_iptables::{Config, Layout, engine, legacy_engine};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict, Verdicts, WayIn,
    },
    model::NodeEnv,
};
use proxier_netlink::NetNs;

const PORT: u16 = 9000;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u32| -> Result<u32, Box<dyn Error>> {
        Ok(args.get(at).map_or(Ok(default), |text| text.parse())?)
    };
    let (services, endpoints, rounds) = (number(0, 1000)?, number(1, 3)?, number(2, 1000)?);
    let services = services.clamp(1, 65_536);
    let layout = match args.get(3).map_or("tree", String::as_str) {
        "tree" => Layout::Tree,
        "kube-proxy" => Layout::KubeProxy,
        other => return Err(format!("{other:?}: expected tree or kube-proxy").into()),
    };
    let legacy = match args.get(4).map_or("nft", String::as_str) {
        "nft" => false,
        "legacy" => true,
        other => return Err(format!("{other:?}: expected nft or legacy").into()),
    };
    let ns = NetNs::create()?;
    ns.run(routes)??;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let config = Config::default().layout(layout);
    // Sockets belong to the runtime they are made in.
    let _guard = runtime.enter();
    let mut proxier: Box<dyn Proxier> = if legacy {
        Box::new(legacy_engine(config, &ns, &[Family::V4])?)
    } else {
        Box::new(engine(config, &ns, &[Family::V4])?)
    };
    println!("{services} Services, {endpoints} endpoints each, {layout:?}, legacy: {legacy}");
    runtime.block_on(program(&mut *proxier, services, endpoints))?;
    let random = (services / 3 + services / 7).min(services - 1);
    let targets = [
        ("direct", (endpoint(0, 0), PORT).into()),
        ("first", (vip(0), 80).into()),
        ("random", (vip(random), 80).into()),
        ("last", (vip(services - 1), 80).into()),
    ];
    for (name, mut times) in ns.run(|| connect(&targets, rounds))?? {
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
        println!("{name:>7}: p50 {:7.1} us, p90 {:7.1}, p99 {:7.1}", at(50), at(90), at(99));
    }
    Ok(())
}

/// Makes every endpoint's address the namespace's own.
fn routes() -> std::io::Result<()> {
    for args in [
        &["link", "set", "lo", "up"][..],
        &["route", "add", "local", "10.128.0.0/9", "dev", "lo"],
        &["route", "add", "10.96.0.0/16", "dev", "lo"],
    ] {
        let status = Command::new("ip").args(args).status()?;
        if !status.success() {
            return Err(std::io::Error::other(format!("ip {}: {status}", args.join(" "))));
        }
    }
    Ok(())
}

/// Programs the Services, and changes one now and then.
async fn program(
    proxier: &mut dyn Proxier,
    services: u32,
    endpoints: u32,
) -> Result<(), Box<dyn Error>> {
    let node = Arc::new(NodeEnv::default().view());
    let fragments = (0..services).map(|index| fragment(index, 0..endpoints)).collect();
    let start = Instant::now();
    let report = proxier.sync(Update::Reset { revision: Revision(1), node, fragments }).await?;
    println!("loaded: {:?}, {} objects", start.elapsed(), report.ops.add);
    let mut times = Vec::new();
    for round in 0..10 {
        // All endpoints of a Service are replaced.
        let first = endpoints * (1 - round % 2);
        let changed = fragment(services / 2, first..first + endpoints);
        let changes = vec![Change::Upsert(changed)];
        let revision = Revision(u64::from(round) + 2);
        let start = Instant::now();
        proxier.sync(Update::Delta { revision, node: None, changes }).await?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!("one Service's endpoints replaced: p50 {:?}, max {:?}", times[5], times[9]);
    Ok(())
}

fn vip(index: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 0, 0).to_bits() + index).into()
}

fn endpoint(service: u32, index: u32) -> IpAddr {
    // Pods of any Service may share an address: what counts is how many rules there are.
    let low = (service.wrapping_mul(64) + index) & 0x7f_ffff;
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() | low).into()
}

fn fragment(index: u32, endpoints: std::ops::Range<u32>) -> Arc<Fragment> {
    let id = FragmentId {
        service: ObjectName::new("shop", &format!("service-{index:05}")),
        port: "web".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let forward = |snat| Verdict::Forward { pool: Pool::Cluster, snat };
    let verdict = forward(Snat::Preserve);
    let key = FrontendKey {
        way_in: WayIn::Address(vip(index)),
        port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
    };
    let mut cluster: Vec<_> =
        endpoints.map(|n| Member::new(SocketAddr::new(endpoint(index, n), PORT), false)).collect();
    cluster.sort_unstable();
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key,
        sources: None,
        verdicts: Verdicts { pod: verdict, node: verdict, external: verdict },
    };
    Arc::new(Fragment::new(id, vec![frontend], cluster))
}

type Times = Vec<(&'static str, Vec<Duration>)>;

/// Opens connections to each target in turn.
fn connect(targets: &[(&'static str, SocketAddr)], rounds: u32) -> std::io::Result<Times> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    let mut times: Times = targets.iter().map(|(name, _)| (*name, Vec::new())).collect();
    for round in 0..rounds + rounds / 10 {
        for ((_, times), (_, target)) in times.iter_mut().zip(targets) {
            let start = Instant::now();
            let client = TcpStream::connect_timeout(target, Duration::from_secs(5))?;
            let took = start.elapsed();
            let (server, _) = listener.accept()?;
            // A reset leaves no port waiting.
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            drop((client, server));
            if round >= rounds / 10 {
                times.push(took);
            }
        }
    }
    Ok(times)
}

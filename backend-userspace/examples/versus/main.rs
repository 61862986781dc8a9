//! The userspace mode beside nginx `stream` and HAProxy `mode tcp`: the same endpoints, the same
//! client, one run.
//!
//! ```console
//! # apt-get install --no-install-recommends nginx libnginx-mod-stream haproxy
//! # cargo run --release -p proxier-backend-userspace --example versus -- --seconds 3
//! ```
//!
//! Client, proxy and endpoints are processes in three network namespaces in a row; contenders take
//! turns, run after run, and the median of the runs is printed. "direct" goes from the client to an
//! endpoint through the middle namespace, which only routes. The last column compares ours with the
//! better of the two others: above 1 is better, whatever the unit. It takes about three minutes;
//! `--only connections` (`stream`, `streams`, `latency`, `datagrams`, `idle`) takes less.
//! `--half-close` has nginx let each direction of a connection end by itself, as the others do; left to
//! itself it closes both when one has ended.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]
#![expect(clippy::unwrap_used, reason = "a benchmark: any failure ends it")]
#![expect(clippy::wildcard_enum_match_arm, reason = "the others are contenders alike")]

mod client;
mod endpoint;
mod peers;

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use proxier_testkit::lab::{self, Lab, Ns, Via};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{
    client::Goal,
    peers::{Contender, Peer},
};

/// Addresses of the middle namespace towards the client, and of the endpoints.
pub(crate) const PROXY: [u8; 4] = [10, 81, 1, 1];
pub(crate) const ENDPOINT: [u8; 4] = [10, 81, 2, 2];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // Two descriptors for each of the idle connections; only root may ask for more than it has.
    let many = Rlimit { current: Some(60_000), maximum: Some(60_000) };
    setrlimit(Resource::Nofile, many).ok();
    match args.first().map(String::as_str) {
        Some("--as-endpoint") => endpoint::serve(),
        Some("--as-proxy") => peers::proxy(),
        _ => {}
    }
    let number = |name: &str, default: u64| {
        let at = args.iter().position(|arg| arg == name);
        at.and_then(|at| args.get(at + 1)?.parse().ok()).unwrap_or(default)
    };
    if let Err(why) = lab::enter() {
        eprintln!("versus: {why}");
        return ExitCode::from(3);
    }
    let only = args.iter().position(|arg| arg == "--only").and_then(|at| args.get(at + 1));
    let plan = Plan {
        time: Duration::from_secs(number("--seconds", 2)),
        runs: number("--runs", 3),
        idle: number("--idle", 9_000),
        only: only.cloned(),
    };
    run(&plan);
    ExitCode::SUCCESS
}

/// What to do.
struct Plan {
    time: Duration,
    runs: u64,
    /// Idle connections whose memory is looked at.
    idle: u64,
    /// The one goal, by name.
    only: Option<String>,
}

impl Plan {
    fn has(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == name)
    }
}

/// Three namespaces in a row.
fn wire(lab: &Lab) -> (Ns, Ns, Ns) {
    let (client, proxy, endpoint) =
        (lab.ns("client").unwrap(), lab.ns("proxy").unwrap(), lab.ns("endpoint").unwrap());
    lab.veth((&client, "eth0"), (&proxy, "eth0")).unwrap();
    lab.veth((&proxy, "eth1"), (&endpoint, "eth0")).unwrap();
    client.addr("eth0", "10.81.1.2/24").unwrap();
    proxy.addr("eth0", "10.81.1.1/24").unwrap();
    proxy.addr("eth1", "10.81.2.1/24").unwrap();
    endpoint.addr("eth0", "10.81.2.2/24").unwrap();
    proxy.sysctl("net.ipv4.ip_forward", "1").unwrap();
    client.route("10.81.2.0/24", Via::Gateway(PROXY.into())).unwrap();
    endpoint.route("10.81.1.0/24", Via::Gateway([10, 81, 2, 1].into())).unwrap();
    for ns in [&client, &proxy, &endpoint] {
        ns.sysctl("net.ipv4.ip_local_port_range", "12000 65000").unwrap();
        ns.sysctl("net.ipv4.tcp_max_syn_backlog", "8192").unwrap();
    }
    (client, proxy, endpoint)
}

fn run(plan: &Plan) {
    let lab = Lab::new("versus").unwrap();
    let (client, proxy, endpoint) = wire(&lab);
    let _endpoints = peers::start_endpoints(&endpoint);
    let mut figures: Figures = BTreeMap::new();
    for _ in 0..plan.runs {
        for contender in Contender::ALL {
            let peer = Peer::start(contender, &proxy);
            for goal in Goal::ALL.into_iter().filter(|it| plan.has(it.name())) {
                if !contender.can(goal) {
                    continue;
                }
                let before = peer.cpu_seconds();
                let measured = client::measure(&client, contender, goal, plan.time);
                let cpu = peer.cpu_seconds() - before;
                eprintln!("{contender:?} {goal:?}: {measured:.1?}, {cpu:.2} s of CPU");
                note(&mut figures, plan.time, contender, goal, &measured, cpu);
            }
        }
    }
    for contender in Contender::ALL.into_iter().filter(|it| *it != Contender::Direct) {
        if !plan.has("idle") {
            break;
        }
        let peer = Peer::start(contender, &proxy);
        let before = peer.resident_kib();
        let held = client::hold(&client, contender, usize::try_from(plan.idle).unwrap());
        let grown = (peer.resident_kib() - before) / f64::from(u32::try_from(plan.idle).unwrap())
            * 10_000.0
            / 1024.0;
        figures.insert((90, contender), vec![grown]);
        drop(held);
    }
    table(&figures);
}

/// Figures of every run, by row and contender.
type Figures = BTreeMap<(usize, Contender), Vec<f64>>;

fn note(
    figures: &mut Figures,
    time: Duration,
    contender: Contender,
    goal: Goal,
    measured: &[f64],
    cpu: f64,
) {
    let row = goal.row();
    for (offset, value) in measured.iter().enumerate() {
        figures.entry((row + offset, contender)).or_default().push(*value);
    }
    let all = measured.first().copied().unwrap_or_default() * time.as_secs_f64();
    let each = match goal {
        Goal::Latency => return,
        // Per gigabyte, of megabytes.
        Goal::OneStream | Goal::ManyStreams => cpu / (all / 1000.0),
        // Microseconds.
        Goal::Connections | Goal::Datagrams => cpu / all * 1e6,
    };
    if contender != Contender::Direct {
        figures.entry((row + 1, contender)).or_default().push(each);
    }
}

fn table(figures: &Figures) {
    // Its place, its name, and whether more is better.
    let rows = [
        (0, "connections/s", true),
        (1, "CPU us/connection", false),
        (10, "1 stream, MB/s", true),
        (11, "1 stream, CPU s/GB", false),
        (20, "64 streams, MB/s", true),
        (21, "64 streams, CPU s/GB", false),
        (30, "connect+answer p50, us", false),
        (31, "connect+answer p99, us", false),
        (40, "UDP answers/s", true),
        (41, "CPU us/UDP answer", false),
        (90, "MiB/10,000 idle", false),
    ];
    println!(
        "{:24}{:>12}{:>12}{:>12}{:>12}{:>9}",
        "", "direct", "ours", "nginx", "haproxy", "ratio"
    );
    for (row, name, more) in rows {
        let median = |contender| {
            let mut values = figures.get(&(row, contender)).cloned().unwrap_or_default();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        if Contender::ALL.into_iter().all(|it| median(it).is_none()) {
            continue;
        }
        print_row(name, more, median);
        if row / 10 == 3 {
            // What a proxy adds to the way without one.
            let direct = median(Contender::Direct).unwrap_or_default();
            let added = |contender| match contender {
                Contender::Direct => None,
                _ => median(contender).map(|it| it - direct),
            };
            print_row(&name.replace("connect+answer", "  added"), more, added);
        }
    }
}

fn print_row(name: &str, more: bool, figure: impl Fn(Contender) -> Option<f64>) {
    print!("{name:24}");
    for contender in Contender::ALL {
        match figure(contender) {
            Some(figure) if figure < 10.0 => print!("{figure:>12.3}"),
            Some(figure) => print!("{figure:>12.0}"),
            None => print!("{:>12}", "-"),
        }
    }
    let others = [Contender::Nginx, Contender::Haproxy].into_iter().filter_map(&figure);
    let best = if more { others.reduce(f64::max) } else { others.reduce(f64::min) };
    match (figure(Contender::Ours), best) {
        (Some(ours), Some(best)) if more => println!("{:>8.2}x", ours / best),
        (Some(ours), Some(best)) => println!("{:>8.2}x", best / ours),
        _ => println!(),
    }
}

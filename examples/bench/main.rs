//! Loads a big cluster and changes one endpoint at a time, beside the iptables tools.
//!
//! ```console
//! $ cargo run --release --example bench -- --services 5000 --endpoints 10
//! ```
//!
//! Everything happens in network namespaces of its own. Each contender starts from an empty
//! namespace and gets the same rules; contenders take turns, run after run. Ours runs in a process of its
//! own, whose peak memory is printed.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod ours;
mod peers;
mod world;

use std::{error::Error, process::ExitCode, time::Duration};

use proxier_testkit::lab::{self, Lab};

use crate::{
    ours::Measured,
    peers::{Peer, Texts},
    world::Size,
};

const USAGE: &str = "\
usage: bench [--services N] [--endpoints N] [--changes N] [--runs N] [--no-peers]

  --services N    Services of the cluster (5000)
  --endpoints N   endpoints of each (10)
  --changes N     one-endpoint changes to time, each in every run (40)
  --runs N        how often everything is repeated (3)
  --no-peers      leave out iptables-legacy-restore and iptables-nft-restore";

struct Options {
    size: Size,
    runs: usize,
    peers: bool,
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == ours::CHILD).is_some() {
        return ours::child(args);
    }
    let options = match parse(args) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("bench: {message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Err(why) = lab::enter() {
        eprintln!("bench: {why}");
        return ExitCode::from(3);
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options =
        Options { size: Size { services: 5000, endpoints: 10, changes: 40 }, runs: 3, peers: true };
    while let Some(arg) = args.next() {
        let place = match arg.as_str() {
            "--services" => &mut options.size.services,
            "--endpoints" => &mut options.size.endpoints,
            "--changes" => &mut options.size.changes,
            "--runs" => &mut options.runs,
            "--no-peers" => {
                options.peers = false;
                continue;
            }
            other => return Err(format!("unknown option {other}")),
        };
        let value = args.next().ok_or_else(|| format!("{arg} needs a number"))?;
        *place = value
            .parse()
            .ok()
            .filter(|count| (1..=100_000).contains(count))
            .ok_or_else(|| format!("{arg} {value}: not a number from 1 to 100000"))?;
    }
    if options.size.services * options.size.endpoints > 1_000_000 {
        return Err("more than a million endpoints".to_owned());
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let size = options.size;
    println!(
        "{} Services x {} endpoints, {} runs, {} changes in each\n",
        size.services, size.endpoints, options.runs, size.changes
    );
    let peers = if options.peers { Peer::installed() } else { Vec::new() };
    let texts = if peers.is_empty() { None } else { Some(Texts::of(size)?) };
    let mut ours = Vec::new();
    let mut theirs: Vec<_> = peers.iter().map(|peer| (*peer, Vec::new(), Vec::new())).collect();
    for run in 1..=options.runs {
        let lab = Lab::new("bench")?;
        eprintln!("run {run} of {}: proxier", options.runs);
        ours.push(ours::measure(&lab.ns("ours")?, size)?);
        if let Some(texts) = &texts {
            for (peer, loads, changes) in &mut theirs {
                eprintln!("run {run} of {}: {}", options.runs, peer.name());
                let ns = lab.ns(peer.name())?;
                loads.push(peer.load(&ns, texts)?);
                changes.extend(peer.change(&ns, texts)?);
            }
        }
    }
    report(&ours, &theirs);
    Ok(())
}

fn report(ours: &[Measured], theirs: &[(Peer, Vec<Duration>, Vec<Duration>)]) {
    let loads: Vec<_> = ours.iter().map(|it| it.load).collect();
    let changes: Vec<_> = ours.iter().flat_map(|it| it.changes.iter().copied()).collect();
    let plans: Vec<_> = ours.iter().flat_map(|it| it.plans.iter().copied()).collect();
    let models: Vec<_> = ours.iter().map(|it| it.model).collect();
    let restarts: Vec<_> = ours.iter().map(|it| it.restart).collect();
    println!("{:<34} {:>11} {:>11} {:>11} {:>11}", "", "min", "median", "p99", "max");
    line("proxier, first sync", &loads);
    for (peer, loads, _) in theirs {
        line(&format!("{}, load", peer.name()), loads);
    }
    line("proxier, one endpoint", &changes);
    for (peer, _, changes) in theirs {
        line(&format!("{}, one endpoint", peer.name()), changes);
    }
    line("proxier, of that: planning", &plans);
    line("proxier, Services to fragments", &models);
    line("proxier, restart, nothing to do", &restarts);
    println!();
    for (peer, their_loads, their_changes) in theirs {
        println!(
            "medians: {} takes {:.1} x as long to load and {:.1} x as long to change an endpoint",
            peer.name(),
            ratio(their_loads, &loads),
            ratio(their_changes, &changes)
        );
    }
    for (run, it) in ours.iter().enumerate() {
        println!(
            "run {}: {} objects in {} batches; {} operations a change; {} on restart; peak {} MiB",
            run + 1,
            it.objects,
            it.batches,
            it.ops_per_change,
            it.restart_ops,
            it.peak_kib.div_ceil(1024)
        );
    }
}

fn ratio(theirs: &[Duration], ours: &[Duration]) -> f64 {
    percentile(theirs, 50).as_secs_f64() / percentile(ours, 50).as_secs_f64()
}

fn line(name: &str, times: &[Duration]) {
    let [min, median, p99, max] = [0, 50, 99, 100].map(|it| show(percentile(times, it)));
    println!("{name:<34} {min:>11} {median:>11} {p99:>11} {max:>11}");
}

/// The nearest-rank percentile; zero for nothing.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or_default()
}

fn show(time: Duration) -> String {
    if time < Duration::from_millis(1) {
        format!("{:.1} us", time.as_secs_f64() * 1e6)
    } else if time < Duration::from_secs(1) {
        format!("{:.1} ms", time.as_secs_f64() * 1e3)
    } else {
        format!("{:.2} s", time.as_secs_f64())
    }
}

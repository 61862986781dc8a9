//! Measures the agent from an API server to packets: start, changes, memory, idling.
//!
//! ```console
//! $ cargo build --release --example agent
//! $ cargo run --release --example agent_bench -- --services 5000 --endpoints 10
//! ```
//!
//! Everything happens in network namespaces of its own. The API server is the testkit's, in this
//! process; the agent is the real binary, in a process of its own; packets are TCP connections from the
//! node to cluster IPs, answered in another namespace.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod cluster;
mod process;

use std::{
    error::Error,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use cluster::{Cluster, NEW, OLD};
use process::Agent;
use proxier_testkit::lab;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const USAGE: &str = "\
usage: agent_bench [--mode MODE] [--services N] [--endpoints N] [--changes N] [--idle SECONDS] [--agent FILE]

  --mode MODE      auto, nftables, iptables, ipvs or userspace (auto)
  --services N     Services of the cluster (5000)
  --endpoints N    endpoints of each (10)
  --changes N      slices to change, one after the other (200)
  --idle SECONDS   how long to watch the agent do nothing (60)
  --agent FILE     the agent's binary (beside this one)";

/// Services that have to answer before the start counts as done, spread over all of them.
const SAMPLE: usize = 64;

struct Options {
    mode: String,
    services: usize,
    endpoints: usize,
    changes: usize,
    idle: u64,
    agent: PathBuf,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("agent_bench: {message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Err(why) = lab::enter() {
        eprintln!("agent_bench: {why}");
        return ExitCode::from(3);
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Outcome<Options> {
    let agent = std::env::current_exe()?.with_file_name("agent");
    let mode = "auto".to_owned();
    let mut options =
        Options { mode, services: 5000, endpoints: 10, changes: 200, idle: 60, agent };
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
        let number = || {
            let number = value.parse::<usize>().ok().filter(|count| (1..=100_000).contains(count));
            number.ok_or_else(|| format!("{arg} {value}: not a number from 1 to 100000"))
        };
        match arg.as_str() {
            "--mode" => options.mode = value,
            "--services" => options.services = number()?,
            "--endpoints" => options.endpoints = number()?,
            "--changes" => options.changes = number()?,
            "--idle" => options.idle = number()? as u64,
            "--agent" => options.agent = value.into(),
            _ => return Err(format!("unknown option {arg}").into()),
        }
    }
    if options.services * options.endpoints > 1_000_000 {
        return Err("more than a million endpoints".into());
    }
    if !options.agent.exists() {
        let path = options.agent.display();
        return Err(format!(
            "{path} is not there: `cargo build --release --example agent` makes it"
        )
        .into());
    }
    Ok(options)
}

fn run(options: &Options) -> Outcome {
    let cluster = Cluster::new(options.services, options.endpoints)?;
    println!("{} Services x {} endpoints", options.services, options.endpoints);

    let began = Instant::now();
    let agent = Agent::start(&cluster, options)?;
    let step = (options.services / SAMPLE).max(1);
    for service in (0..options.services).step_by(step).chain([options.services - 1]) {
        cluster.wait(service, OLD, &agent)?;
    }
    let started = began.elapsed();
    let silent = (0..options.services).filter(|it| cluster.ask(*it) != Some(OLD)).count();
    if silent > 0 {
        return Err(format!("{silent} Services do not answer after the start").into());
    }
    println!("mode      {}", agent.page("proxyMode")?);
    println!("start     {:.3} s from the start of the process to packets", started.as_secs_f64());
    let (resident, peak) = agent.memory()?;
    println!("memory    {resident} MiB resident after the start, {peak} MiB at most");

    changes(&cluster, &agent, options)?;
    idle(&cluster, &agent, Duration::from_secs(options.idle))
}

/// From a slice's change at the API server to the first packet at the new endpoint.
fn changes(cluster: &Cluster, agent: &Agent, options: &Options) -> Outcome {
    let mut times = Vec::with_capacity(options.changes);
    for change in 0..options.changes {
        // Large steps without order, so that no two neighbours follow each other.
        let service = change * 7919 % options.services;
        let (now, then) =
            if (change / options.services).is_multiple_of(2) { (NEW, OLD) } else { (OLD, NEW) };
        if cluster.ask(service) != Some(then) {
            return Err(format!("Service {service} does not answer as before its change").into());
        }
        let began = Instant::now();
        cluster.change(service, now);
        cluster.wait(service, now, agent)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let at = |percent: usize| {
        let index = (times.len() * percent).div_ceil(100).max(1) - 1;
        times.get(index).copied().unwrap_or_default().as_secs_f64() * 1e3
    };
    println!(
        "change    p50 {:.2} ms, p99 {:.2} ms, at most {:.2} ms from slice to packet ({} changes)",
        at(50),
        at(99),
        at(100),
        times.len()
    );
    Ok(())
}

/// What the agent does when nothing happens: it should be nothing.
fn idle(cluster: &Cluster, agent: &Agent, period: Duration) -> Outcome {
    let watching = cluster.watch_kernel()?;
    let before = (agent.cpu()?, agent.kernel_ops()?);
    let end = Instant::now() + period;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        agent.check()?;
        std::thread::park_timeout(left.min(Duration::from_secs(1)));
    }
    let after = (agent.cpu()?, agent.kernel_ops()?);
    let busy = after.0.saturating_sub(before.0).as_secs_f64() / period.as_secs_f64() * 100.0;
    println!(
        "idle      {busy:.3} % of a CPU over {} s, {} kernel operations, {} events of nf_tables",
        period.as_secs(),
        after.1 - before.1,
        watching.end()?
    );
    Ok(())
}

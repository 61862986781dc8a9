//! The IPVS mode beside the other kernel modes and `ipvsadm --restore`, on one kernel.
//!
//! ```console
//! $ cargo run --release --example modes -- 5000 10
//! ```
//!
//! Where the machine's kernel has no IPVS, all of it runs in a guest (docs/ipvs.md), and a load of the
//! nftables mode on the machine itself says how much slower the guest is. What is measured, and how,
//! is what `bench` does (docs/benchmarks.md): every measurement is a process of its own in an empty
//! namespace.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

#[expect(dead_code, reason = "`bench` uses the rest")]
#[path = "../child/mod.rs"]
mod child;
#[path = "../ended.rs"]
mod ended;
#[expect(dead_code, reason = "`bench` uses the rest")]
#[path = "../render/grid.rs"]
mod grid;
#[path = "../../guest/mod.rs"]
mod guest;
#[path = "../path.rs"]
mod path;
mod peer;
mod report;
#[expect(dead_code, reason = "`bench` uses the rest")]
#[path = "../schema.rs"]
mod schema;
#[path = "../render/units.rs"]
mod units;
#[expect(dead_code, reason = "`bench` uses the rest")]
#[path = "../world.rs"]
mod world;

use std::{
    env,
    error::Error,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use child::{Job, Samples, Task};
use ended::ended;
use guest::Stays;
use path::Course;
use proxier::Mode;
use proxier_testkit::lab::{self, Lab};
use schema::{Memory, Path, Spread};
use world::World;

const HELP: &str = "\
usage: modes [SERVICES ENDPOINTS]

Measures the modes ipvs, iptables and nftables, and ipvsadm --restore, with so many Services of so
many endpoints (5000 10): loading them, changing one endpoint (also with 100 Services), connecting
through the first and the last Service and to an endpoint directly. Takes about five minutes.

Without IPVS in the kernel it runs in a guest; docs/ipvs.md says how to get one.";

/// Services of the small world.
const SMALL: usize = 100;
const MODES: [Mode; 3] = [Mode::Ipvs, Mode::Iptables, Mode::Nftables];
/// One-endpoint changes in each world.
const CHANGES: usize = 200;
/// Connects on each way.
const CONNECTS: usize = 300;
/// Seconds for each rate.
const RATE_SECONDS: f64 = 0.5;
/// Each loop of a measurement ends after so long.
const PART: Duration = Duration::from_secs(6);
/// Nothing takes longer, or it is given up.
const BOUND: Duration = Duration::from_secs(150);
/// The first argument of the process that measures outside the guest.
const OUTSIDE: &str = "--outside";
/// What it found, in milliseconds.
const FOUND: &str = "PROXIER_MODES_OUTSIDE_MS";

/// A mode and what it took.
struct Measured {
    mode: Mode,
    small: Samples,
    big: Samples,
    path: Path,
}

fn main() -> ExitCode {
    let mut args = env::args().skip(1).peekable();
    if args.next_if(|it| it == child::CHILD).is_some() {
        return ended("modes", child::main(args));
    }
    let outside = args.next_if(|it| it == OUTSIDE).is_some();
    let args: Vec<_> = args.collect();
    if args.iter().any(|it| it == "--help" || it == "-h") {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let world = match parse(&args) {
        Ok(world) => world,
        Err(wrong) => {
            eprintln!("modes: {wrong}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    ended("modes", if outside { measure_outside(world) } else { run(world) })
}

fn parse(args: &[String]) -> Result<World, String> {
    let count = |name: &str, text: &String, most: usize| {
        let number = text.parse().ok().filter(|it| (1..=most).contains(it));
        number.ok_or_else(|| format!("{name} {text:?}: expected a number from 1 to {most}"))
    };
    match args {
        [] => Ok(World { services: 5000, endpoints: 10 }),
        [services, endpoints] => Ok(World {
            services: count("SERVICES", services, 20_000)?,
            endpoints: count("ENDPOINTS", endpoints, 50)?,
        }),
        _ => Err(format!("expected SERVICES and ENDPOINTS, found {}", args.join(" "))),
    }
}

fn run(world: World) -> Result<(), Box<dyn Error>> {
    let outside = enter(world)?;
    lab::enter()?;
    let mut modes = Vec::new();
    for mode in MODES {
        let small = World { services: SMALL.min(world.services), ..world };
        let [small, big] = [small, world].map(|world| control(mode, world));
        modes.push(Measured { mode, small: small?, big: big?, path: packets(mode, world)? });
    }
    progress("ipvsadm --restore");
    let peer = peer::measure(world)?;
    println!("{}", report::report(world, &modes, &peer, outside));
    Ok(())
}

/// Goes where IPVS is. Says how long the nftables mode took outside, in milliseconds, when this is a
/// guest.
fn enter(world: World) -> Result<Option<f64>, Box<dyn Error>> {
    if let Some(found) = env::var_os(FOUND) {
        return Ok(found.to_str().and_then(|it| it.parse().ok()));
    }
    if !std::path::Path::new("/proc/net/ip_vs").exists() {
        progress("nftables, outside the guest");
        let mut command = Command::new(env::current_exe()?);
        command.args([OUTSIDE, &world.services.to_string(), &world.endpoints.to_string()]);
        let output = command.stderr(std::process::Stdio::inherit()).output()?;
        let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        return match guest::enter(&[(FOUND, &found)])? {
            Stays::Found => Ok(None),
            Stays::Nowhere => Err(guest::ADVICE.into()),
        };
    }
    Ok(None)
}

fn measure_outside(world: World) -> Result<(), Box<dyn Error>> {
    lab::enter()?;
    let samples = control(Mode::Nftables, world)?;
    let load = Spread::of(&samples.first_sync_ms).ok_or("nothing measured")?;
    println!("{}", load.p50);
    Ok(())
}

fn job(task: Task, mode: Mode, netns: std::path::PathBuf, world: World) -> Job {
    Job { task, mode: mode.name().to_owned(), netns, world, part: PART }
}

/// Loads a world and changes it.
fn control(mode: Mode, world: World) -> Result<Samples, Box<dyn Error>> {
    progress(&format!("{mode}, {} Services x {} endpoints", world.services, world.endpoints));
    let lab = Lab::new("modes")?;
    let task = Task::Control { changes: CHANGES, rolling: 1 };
    let samples = child::run(&job(task, mode, lab.ns("node")?.path(), world), BOUND)?;
    samples.ok_or_else(|| format!("{mode} took longer than {BOUND:?}").into())
}

/// Sends packets through a node that has the world.
fn packets(mode: Mode, world: World) -> Result<Path, Box<dyn Error>> {
    progress(&format!("{mode}, packets"));
    let course = Course::new()?;
    let held = child::start::<Memory>(&job(Task::Hold, mode, course.node().path(), world), BOUND)?;
    let (running, _) = held.ok_or_else(|| format!("{mode} took longer than {BOUND:?}"))?;
    let path = course.measure(world, CONNECTS, RATE_SECONDS)?;
    drop(running);
    Ok(path)
}

fn progress(what: &str) {
    static STARTED: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let started = STARTED.get_or_init(Instant::now);
    eprintln!("modes: {:4.0} s: {what}", started.elapsed().as_secs_f64());
}

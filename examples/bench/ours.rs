//! What proxier takes.

use std::{
    collections::BTreeMap,
    error::Error,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use proxier::{
    Family, Mode, OpenContext, Proxier,
    conntrack::FlowFilter,
    engine::Engine,
    open,
    spi::{CommitError, Dataplane, Op},
};
use proxier_backend_iptables::{Config, Iptables, Key, Value};
use proxier_testkit::lab::Ns;

use crate::world::{self, Size};

/// The first argument of the measuring process.
pub(crate) const CHILD: &str = "--child";

/// What one run took.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) model: Duration,
    pub(crate) load: Duration,
    pub(crate) changes: Vec<Duration>,
    pub(crate) plans: Vec<Duration>,
    pub(crate) restart: Duration,
    pub(crate) restart_ops: u64,
    pub(crate) objects: u64,
    pub(crate) batches: u64,
    pub(crate) ops_per_change: u64,
    pub(crate) peak_kib: u64,
}

/// Measures in a process of its own.
pub(crate) fn measure(ns: &Ns, size: Size) -> Result<Measured, Box<dyn Error>> {
    let Size { services, endpoints, changes } = size;
    let output = Command::new(std::env::current_exe()?)
        .arg(CHILD)
        .arg(ns.path())
        .args([services, endpoints, changes].map(|it| it.to_string()))
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the measuring process ended with {}", output.status).into());
    }
    let mut measured = Measured::default();
    for line in String::from_utf8(output.stdout)?.lines() {
        let (key, value) = line.split_once(' ').ok_or("a line without a value")?;
        let number: u64 = value.parse()?;
        let time = Duration::from_nanos(number);
        match key {
            "model" => measured.model = time,
            "load" => measured.load = time,
            "change" => measured.changes.push(time),
            "plan" => measured.plans.push(time),
            "restart" => measured.restart = time,
            "restart_ops" => measured.restart_ops = number,
            "objects" => measured.objects = number,
            "batches" => measured.batches = number,
            "ops_per_change" => measured.ops_per_change = number,
            "peak_kib" => measured.peak_kib = number,
            other => return Err(format!("an unknown figure: {other}").into()),
        }
    }
    Ok(measured)
}

/// The measuring process: prints one figure a line.
pub(crate) fn child(args: impl Iterator<Item = String>) -> ExitCode {
    let args: Vec<_> = args.collect();
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(measure_here(&args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn measure_here(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [netns, services, endpoints, changes] = args else {
        return Err("wrong arguments".into());
    };
    let size = Size {
        services: services.parse()?,
        endpoints: endpoints.parse()?,
        changes: changes.parse()?,
    };
    let mut context = OpenContext::default();
    context.netns = Some(PathBuf::from(netns));
    context.families = vec![Family::V4];
    let mut proxier = open(Mode::Iptables, &context).await?;

    let mut store = world::store();
    for event in world::lists(size) {
        store.apply(event);
    }
    let began = Instant::now();
    let update = store.take().ok_or("an empty cluster")?;
    print("model", began.elapsed());
    let began = Instant::now();
    let report = proxier.sync(update).await?;
    print("load", began.elapsed());
    println!("objects {}\nbatches {}", report.ops.add, report.batches);

    let mut ops = 0;
    for step in 0..size.changes {
        let event = world::change(size, step);
        let began = Instant::now();
        store.apply(event);
        let update = store.take().ok_or("a change that changes nothing")?;
        let prepared = began.elapsed();
        let began = Instant::now();
        let report = proxier.sync(update).await?;
        print("change", prepared + began.elapsed());
        if report.visited != 1 {
            return Err(format!("{} fragments visited for one change", report.visited).into());
        }
        ops += report.ops.total();
    }
    println!("ops_per_change {}", ops / size.changes);
    println!("peak_kib {}", peak_kib()?);

    let mut restarted: Box<dyn Proxier> = open(Mode::Iptables, &context).await?;
    let began = Instant::now();
    let report = restarted.sync(store.reset()).await?;
    print("restart", began.elapsed());
    println!("restart_ops {}", report.ops.total());

    let mut planner = Engine::new(Iptables::new(Config::default())?, Nowhere, &[Family::V4]);
    planner.sync(store.reset()).await?;
    for step in size.changes..2 * size.changes {
        store.apply(world::change(size, step));
        let update = store.take().ok_or("a change that changes nothing")?;
        let began = Instant::now();
        planner.sync(update).await?;
        print("plan", began.elapsed());
    }
    Ok(())
}

/// A data path that leads nowhere: what is left of a sync is planning.
struct Nowhere;

#[async_trait]
impl Dataplane<Iptables> for Nowhere {
    async fn commit(&mut self, _: Family, _: &[Op<Key, Value>]) -> Result<(), CommitError> {
        Ok(())
    }

    async fn dump(&mut self, _: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        Ok(BTreeMap::new())
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        Ok(())
    }

    async fn forget_flows(&mut self, _: Family, _: &[FlowFilter]) -> Result<usize, CommitError> {
        Ok(0)
    }

    fn batch_limit(&self) -> usize {
        usize::MAX
    }
}

fn print(figure: &str, time: Duration) {
    println!("{figure} {}", time.as_nanos());
}

/// The most memory this process ever held.
fn peak_kib() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

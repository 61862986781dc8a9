//! Processes that measure one thing each, so that figures do not mix, and how they are run.

mod control;
mod counter;
mod hold;
mod long;
mod responder;

use std::{
    error::Error,
    io::{Read, Write},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use proxier::{Family, Mode, OpenContext, Proxier, Update, open};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::world::World;

pub(crate) use control::Samples;

/// The first argument of such a process; the second is a [`Job`].
pub(crate) const CHILD: &str = "--child";

/// What a process does, and where.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Job {
    pub(crate) task: Task,
    pub(crate) mode: String,
    pub(crate) netns: PathBuf,
    pub(crate) world: World,
    /// How long each part of a task may go on, when one more would do as well.
    pub(crate) part: Duration,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) enum Task {
    /// Times programming: [`Samples`].
    Control { changes: usize, rolling: usize },
    /// Programs the world and keeps it: [`Memory`](crate::schema::Memory).
    Hold,
    /// One Service with so many endpoints: [`PoolReport`](crate::schema::PoolReport).
    Pool { endpoints: usize },
    /// The endpoints of the data path.
    Respond,
    /// So many random changes: [`SoakReport`](crate::schema::SoakReport).
    Soak { changes: usize },
}

/// The body of the process.
pub(crate) fn main(mut args: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let job: Job = serde_json::from_str(&args.next().ok_or("no job")?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match job.task {
            Task::Control { changes, rolling } => {
                say(&control::measure(&job, changes, rolling).await?)
            }
            Task::Hold => hold::hold(&job).await,
            Task::Pool { endpoints } => say(&long::pool(&job, endpoints).await?),
            Task::Respond => responder::respond().await,
            Task::Soak { changes } => say(&long::soak(&job, changes).await?),
        }
    })
}

/// Tells the parent, on one line.
fn say(result: &impl Serialize) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, result)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

impl Job {
    async fn open(&self) -> Result<Box<dyn Proxier>, Box<dyn Error>> {
        let mode: Mode = self.mode.parse()?;
        Ok(open(mode, &context(self.netns.clone())).await?)
    }
}

/// How proxiers are opened here.
pub(crate) fn context(netns: PathBuf) -> OpenContext {
    let mut context = OpenContext::default();
    context.netns = Some(netns);
    context.families = vec![Family::V4];
    context
}

/// Syncs, which must leave nothing out; returns microseconds and operations.
async fn sync(proxier: &mut dyn Proxier, update: Update) -> Result<Synced, Box<dyn Error>> {
    let began = Instant::now();
    let report = proxier.sync(update).await?;
    let us = began.elapsed().as_secs_f64() * 1e6;
    if let Some(it) = report.degraded.first() {
        return Err(format!("{} is not programmed: {}", it.id, it.reason).into());
    }
    Ok(Synced { us, ops: report.ops.total(), batches: report.batches, visited: report.visited })
}

struct Synced {
    us: f64,
    ops: usize,
    batches: usize,
    visited: usize,
}

/// A line of `/proc/self/status`, in KiB.
fn status_kib(name: &str) -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let line = line.ok_or_else(|| format!("no {name} in /proc/self/status"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// A process that is running; it ends when this is dropped.
pub(crate) struct Running {
    process: Child,
    /// Its end tells the process to stop.
    stdin: Option<ChildStdin>,
}

impl Running {
    pub(crate) fn start(job: &Job) -> Result<(Self, ChildStdout), Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(CHILD).arg(serde_json::to_string(job)?);
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> Result<(Self, ChildStdout), Box<dyn Error>> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut process = command.spawn()?;
        let (stdin, stdout) = (process.stdin.take(), process.stdout.take());
        Ok((Self { process, stdin }, stdout.ok_or("no pipe")?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stdin.take());
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Runs a job to its end. `None` when it takes longer than `bound`; it is stopped then.
pub(crate) fn run<T: DeserializeOwned>(
    job: &Job,
    bound: Duration,
) -> Result<Option<T>, Box<dyn Error>> {
    let (mut running, stdout) = Running::start(job)?;
    let Some(text) = within(stdout, bound, true)? else { return Ok(None) };
    let status = running.process.wait()?;
    if !status.success() {
        return Err(format!("the measuring process ended with {status}").into());
    }
    Ok(Some(serde_json::from_str(&text)?))
}

/// Starts a job that goes on, and waits until it says that it is ready.
pub(crate) fn start<T: DeserializeOwned>(
    job: &Job,
    bound: Duration,
) -> Result<Option<(Running, T)>, Box<dyn Error>> {
    let (running, stdout) = Running::start(job)?;
    let Some(text) = within(stdout, bound, false)? else { return Ok(None) };
    if text.is_empty() {
        return Err("the measuring process ended before it was ready".into());
    }
    Ok(Some((running, serde_json::from_str(&text)?)))
}

/// Reads everything, or one line, for a bounded time.
fn within(
    mut from: ChildStdout,
    bound: Duration,
    all: bool,
) -> Result<Option<String>, Box<dyn Error>> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        let outcome = loop {
            match from.read(&mut buffer) {
                Ok(0) => break Ok(text),
                Ok(count) => text.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) => break Err(error),
            }
            if !all && text.ends_with(b"\n") {
                break Ok(text);
            }
        };
        tell.send(outcome).ok();
    });
    match told.recv_timeout(bound) {
        Ok(text) => Ok(Some(String::from_utf8(text?)?)),
        Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err("the reading thread died".into()),
    }
}

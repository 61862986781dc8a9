//! Who is measured when: contenders take turns, worlds grow, time is bounded.

mod mode;
mod peer;

use std::{
    error::Error,
    path::PathBuf,
    time::{Duration, Instant},
};

use proxier::{Mode, in_full};
use proxier_testkit::lab::Lab;
use serde::de::DeserializeOwned;

use self::{mode::ModeRun, peer::PeerRun};
use crate::{
    aims,
    args::Options,
    budget::Budget,
    child::{self, Job, Task},
    machine,
    path::Course,
    peers::Peer,
    schema::{Path, PoolReport, Report, SCHEMA, SoakReport, WorldReport},
    world::World,
};

/// All random changes of one mode may take so much of the time for everything.
const SOAKS: u32 = 24;
/// Each part of a measurement may take so much of it, when one more would do as well.
const PARTS: u32 = 360;

struct Suite<'a> {
    options: &'a Options,
    budget: Budget,
    modes: Vec<Mode>,
    peers: Vec<Peer>,
    notes: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<Report, Box<dyn Error>> {
    let (machine, budget) = (machine::describe(), Budget::new(options.budget));
    let mut notes = Vec::new();
    if machine.build == "debug" {
        notes.push("a debug build: the figures say nothing".to_owned());
    }
    let cores = f64::from(u32::try_from(machine.cores).unwrap_or(u32::MAX));
    if machine.load_before > cores / 2.0 {
        notes.push(format!("the machine was busy before the run: load {}", machine.load_before));
    }
    let modes = modes(options, &mut notes)?;
    let peers = if options.peers { peers(&mut notes) } else { Vec::new() };
    let mut suite = Suite { options, budget, modes, peers, notes };
    let (pools, soaks) = (suite.pools(), suite.soaks());
    let worlds = suite.worlds()?;
    let mut report = Report {
        schema: SCHEMA.to_owned(),
        date: machine::today(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        took_s: suite.budget.spent().as_secs_f64(),
        machine,
        worlds,
        pools,
        soaks,
        aims: Vec::new(),
        notes: suite.notes,
    };
    report.aims = aims::check(&report);
    Ok(report)
}

/// The modes that work here. Others get a note; those that were asked for must work.
fn modes(options: &Options, notes: &mut Vec<String>) -> Result<Vec<Mode>, Box<dyn Error>> {
    let lab = Lab::new("bench")?;
    let context = child::context(lab.ns("probe")?.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut modes = Vec::new();
    for mode in options.modes.clone().unwrap_or_else(|| proxier::modes().collect()) {
        let found = runtime.block_on(proxier::probe(mode, &context));
        if found.available {
            modes.push(mode);
            continue;
        }
        let why = found.reasons.first().cloned().unwrap_or_default();
        if options.modes.is_some() {
            return Err(format!("--modes {mode}: {why}").into());
        }
        notes.push(format!("{mode} mode was left out: {why}"));
    }
    if modes.is_empty() { Err("no mode works here".into()) } else { Ok(modes) }
}

fn peers(notes: &mut Vec<String>) -> Vec<Peer> {
    let (peers, missing): (Vec<_>, Vec<_>) = Peer::ALL.into_iter().partition(Peer::installed);
    let missing: Vec<_> = missing.iter().map(|peer| peer.program()).collect();
    if !missing.is_empty() {
        let note = format!("not installed, so not compared with: {}", missing.join(", "));
        progress(&note);
        notes.push(note);
    }
    peers
}

/// A world, and who was measured in it.
struct WorldRun {
    world: World,
    modes: Vec<ModeRun>,
    peers: Vec<PeerRun>,
    runs: usize,
    /// How long the last run took, in seconds.
    took: f64,
}

impl WorldRun {
    fn name(&self) -> String {
        format!("{} x {}", self.world.services, self.world.endpoints)
    }

    fn report(self) -> WorldReport {
        let World { services, endpoints } = self.world;
        let modes = self.modes.into_iter().map(ModeRun::report);
        let peers = self.peers.into_iter().map(PeerRun::report);
        WorldReport {
            services,
            endpoints,
            runs: self.runs,
            contenders: modes.chain(peers).collect(),
        }
    }
}

impl Suite<'_> {
    fn job(&self, task: Task, mode: Mode, netns: PathBuf, world: World, parts: u32) -> Job {
        let part = (self.options.budget / parts).max(Duration::from_millis(100));
        Job { task, mode: mode.name().to_owned(), netns, world, part }
    }

    /// Runs a job in an empty namespace. What goes wrong becomes a note.
    fn one<T: DeserializeOwned>(
        &self,
        task: Task,
        mode: Mode,
        world: World,
        notes: &mut Vec<String>,
    ) -> Option<T> {
        let parts = if matches!(task, Task::Soak { .. }) { SOAKS } else { PARTS };
        let what = format!("{task:?}");
        let run = || {
            let lab = Lab::new("bench")?;
            let job = self.job(task, mode, lab.ns("node")?.path(), world, parts);
            child::run(&job, self.budget.left())
        };
        match run() {
            Ok(Some(result)) => return Some(result),
            Ok(None) => notes.push(format!("{what}: the time ran out")),
            Err(error) => notes.push(format!("failed: {what}: {}", in_full(&*error))),
        }
        None
    }

    fn pools(&mut self) -> Vec<PoolReport> {
        let world = World { services: 100, endpoints: self.options.endpoints };
        self.each("one endpoint of very many", &Task::Pool { endpoints: self.options.pool }, world)
    }

    fn soaks(&mut self) -> Vec<SoakReport> {
        let soak = self.options.soak;
        let world = World { services: soak.services, endpoints: self.options.endpoints };
        self.each("random changes", &Task::Soak { changes: soak.changes }, world)
    }

    /// Every mode does one thing.
    fn each<T: DeserializeOwned>(&mut self, name: &str, task: &Task, world: World) -> Vec<T> {
        let (mut reports, mut notes) = (Vec::new(), Vec::new());
        for mode in &self.modes {
            progress(&format!("{name}: {mode}"));
            let mut own = Vec::new();
            reports.extend(self.one(task.clone(), *mode, world, &mut own));
            notes.extend(own.into_iter().map(|note| format!("{mode}: {note}")));
        }
        self.notes.append(&mut notes);
        reports
    }

    /// Each world once, then again as far as the time goes: what is rare on a machine then falls on
    /// different contenders.
    fn worlds(&mut self) -> Result<Vec<WorldReport>, Box<dyn Error>> {
        let mut worlds: Vec<WorldRun> = Vec::new();
        for world in self.options.worlds() {
            let modes = self.modes.iter().map(|mode| ModeRun::new(*mode)).collect();
            let peers = self.peers.iter().map(|peer| PeerRun::new(*peer, world)).collect();
            let mut this = WorldRun { world, modes, peers, runs: 0, took: 0.0 };
            self.skip_slow_peers(&mut this, &worlds);
            // In proportion to the world before.
            let expected = worlds.last().map_or(0.0, |last| {
                last.took * (amount(world.size()) / amount(last.world.size())).max(1.0)
            });
            if self.fits(expected) {
                self.run_world(&mut this)?;
                worlds.push(this);
            } else {
                self.notes.push(format!(
                    "{} was left out: {:.0} s were left, {expected:.0} s expected",
                    this.name(),
                    self.budget.left().as_secs_f64()
                ));
            }
        }
        for _ in 1..self.options.runs {
            for world in &mut worlds {
                if self.fits(world.took) {
                    self.run_world(world)?;
                }
            }
        }
        Ok(worlds.into_iter().map(WorldRun::report).collect())
    }

    fn fits(&self, seconds: f64) -> bool {
        let left = self.budget.left().as_secs_f64();
        left >= 1.0 && seconds <= left
    }

    fn run_world(&self, this: &mut WorldRun) -> Result<(), Box<dyn Error>> {
        let (name, began) = (this.name(), Instant::now());
        this.runs += 1;
        let here = format!("{name}, run {} of {}", this.runs, self.options.runs);
        for mode in &mut this.modes {
            progress(&format!("{here}: {}", mode.mode));
            mode.measure(self, this.world);
        }
        for peer in this.peers.iter_mut().filter(|peer| peer.worth_a_run()) {
            progress(&format!("{here}: {}", peer.peer.name()));
            peer.measure(self, this.world)?;
        }
        this.took = began.elapsed().as_secs_f64();
        if this.runs == 1 {
            for mode in &mut this.modes {
                progress(&format!("{name}, memory and packets: {}", mode.mode));
                mode.hold(self, this.world);
            }
        }
        Ok(())
    }

    /// There is no point in trying a peer that takes too long in proportion to a smaller world: peers
    /// do not grow less than in proportion.
    fn skip_slow_peers(&self, this: &mut WorldRun, smaller: &[WorldRun]) {
        for peer in &mut this.peers {
            let known = smaller.iter().rev().find_map(|world| {
                let theirs = world.peers.iter().find(|it| it.peer == peer.peer)?;
                Some((theirs.took()?, world.world.size()))
            });
            let Some((took, size)) = known else { continue };
            let expected = took * amount(this.world.size()) / amount(size);
            if expected > self.options.peer_bound.as_secs_f64() {
                peer.skip(format!("not tried: at least {expected:.0} s by a smaller world"));
            }
        }
    }

    /// Packets through a node that is programmed.
    fn packets(&self, course: &Course, world: World) -> Result<Path, Box<dyn Error>> {
        course.measure(world, self.options.connects, self.options.seconds)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a statistic")]
fn amount(count: usize) -> f64 {
    count as f64
}

fn progress(what: &str) {
    eprintln!("bench: {what}");
}

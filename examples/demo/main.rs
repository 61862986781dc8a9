//! Watch real Services being proxied, on this machine, without touching it: `make demo`.
//!
//! Builds a small cluster out of network namespaces, programs its node with the Services of some
//! Kubernetes manifests, sends real traffic through every way in, and compares what the packets did with
//! what was planned. Then an endpoint goes while traffic flows, and in the end everything does.

mod args;
mod change;
mod cluster;
mod expect;
#[path = "../guest/mod.rs"]
mod guest;
mod keep;
mod kernel;
mod layout;
#[cfg(feature = "userspace")]
mod library;
mod report;
mod screen;
mod show;
mod stage;
mod traffic;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use args::{Command, Options};
use cluster::Cluster;
use guest::Stays;
use layout::Layout;
use proxier::{Mode, in_full};
use proxier_testkit::lab::{self, LabError};
use screen::Screen;
use stage::Stage;

/// Everything was as planned.
const FINE: u8 = 0;
/// Something was not, or failed.
const DIFFERS: u8 = 1;
/// Wrong arguments or manifests.
const USAGE: u8 = 2;
/// No network namespaces here.
const IMPOSSIBLE: u8 = 3;

/// Why it ends early: the exit code, and one line.
struct Stop(u8, String);

impl From<Box<dyn std::error::Error>> for Stop {
    fn from(error: Box<dyn std::error::Error>) -> Self {
        Self(DIFFERS, in_full(&*error))
    }
}

impl From<LabError> for Stop {
    fn from(error: LabError) -> Self {
        Self(IMPOSSIBLE, format!("the lab could not be built: {}", in_full(&error)))
    }
}

fn main() -> ExitCode {
    let options = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            Screen::new(false).line(args::HELP);
            return FINE.into();
        }
        Err(wrong) => return stopped(&Stop(USAGE, wrong)),
    };
    match enter(&options).and_then(|()| run(&options)) {
        Ok(true) => FINE.into(),
        Ok(false) => DIFFERS.into(),
        Err(stop) => stopped(&stop),
    }
}

fn stopped(Stop(code, why): &Stop) -> ExitCode {
    // Without anybody to read it there is nothing to do about it.
    drop(writeln!(io::stderr(), "demo: {why}"));
    ExitCode::from(*code)
}

/// Goes where IPVS is, if that is wanted.
fn enter(options: &Options) -> Result<(), Stop> {
    // A guest has no terminal and no standard input.
    let can_move = !options.keep && !options.manifests.iter().any(|it| it.as_os_str() == "-");
    if !options.modes.contains(&Mode::Ipvs) || !can_move {
        return Ok(());
    }
    match guest::enter(&[]) {
        Ok(Stays::Nowhere) if !options.all => Err(Stop(IMPOSSIBLE, guest::ADVICE.to_owned())),
        Ok(_) => Ok(()),
        Err(error) => Err(Stop(IMPOSSIBLE, format!("the guest cannot be started: {error}"))),
    }
}

/// Returns whether everything was as planned.
fn run(options: &Options) -> Result<bool, Stop> {
    if options.library_only {
        return library_only(options);
    }
    // Before any thread exists: a process with threads cannot enter a user namespace.
    if let Err(why) = lab::enter() {
        let why = in_full(&why);
        if *options.modes != [Mode::Userspace] {
            return Err(Stop(IMPOSSIBLE, why));
        }
        drop(writeln!(io::stderr(), "demo: {why}; going on as with --library-only"));
        return library_only(options);
    }
    if let ([mode], false) = (&*options.modes, options.all)
        && !proxier::modes().any(|known| known == *mode)
    {
        return Err(Stop(USAGE, format!("{mode} mode is not part of this build")));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Stop(DIFFERS, error.to_string()))?;
    let cluster = runtime.block_on(async { Cluster::read(options) });
    let cluster = cluster.map_err(|why| Stop(USAGE, why))?;
    let mut stage = Stage::build(Layout::of(&cluster)?, &cluster)?;
    let mut store = cluster.store(stage.layout.env.clone());
    drop(store.take());
    stage.watch(&stage::fragments(&store))?;

    let screen = Screen::new(options.json);
    runtime.block_on(show_all(options, &stage, &cluster, screen))
}

/// Shows the userspace mode without namespaces and kernel rules.
#[cfg(feature = "userspace")]
fn library_only(options: &Options) -> Result<bool, Stop> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Stop(DIFFERS, error.to_string()))?;
    runtime.block_on(async {
        let cluster = Cluster::read(options).map_err(|why| Stop(USAGE, why))?;
        let mut screen = Screen::new(options.json);
        Ok(library::show(options, &cluster, &mut screen).await?)
    })
}

#[cfg(not(feature = "userspace"))]
fn library_only(_: &Options) -> Result<bool, Stop> {
    Err(Stop(USAGE, "userspace mode is not part of this build".to_owned()))
}

/// Shows every mode that was asked for. Returns whether everything was as planned.
async fn show_all(
    options: &Options,
    stage: &Stage,
    cluster: &Cluster,
    mut screen: Screen,
) -> Result<bool, Stop> {
    report::opening(&mut screen, stage, cluster, &options.manifests);
    let (mut modes, mut unavailable) = (Vec::new(), Vec::new());
    for mode in &options.modes {
        match show::obstacle(stage, *mode).await {
            None => modes.push(*mode),
            Some(why) => unavailable.push((*mode, why)),
        }
    }
    for (mode, why) in &unavailable {
        report::unavailable(&mut screen, *mode, why);
    }
    let mut all = Vec::new();
    // What several modes do is worth seeing only side by side.
    let mut muted = Screen::new(true);
    for mode in &modes {
        let screen = if modes.len() > 1 { &mut muted } else { &mut screen };
        all.push(show::show(stage, cluster, *mode, options, screen).await?);
    }
    if all.len() > 1 {
        report::side_by_side(&mut screen, stage, &all);
    }
    let mut fine = !all.is_empty() && (options.all || unavailable.is_empty());
    for shown in &all {
        fine &= report::verdict(&mut screen, stage, shown);
    }
    if options.json {
        let document = report::to_json(stage, cluster, &all, &unavailable);
        Screen::new(false).line(format!("{document:#}"));
    } else if let ([], Some((mode, why))) = (&*all, unavailable.first()) {
        return Err(Stop(DIFFERS, format!("{mode} mode cannot be shown here: {why}")));
    }
    Ok(fine)
}

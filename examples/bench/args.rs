//! The command line.

use std::{ffi::OsString, path::PathBuf, str::FromStr, time::Duration};

use lexopt::{Arg, Parser, ValueExt};
use proxier::Mode;

use crate::world::World;

pub(crate) const USAGE: &str = "\
usage: bench [OPTION...]

what is measured
  --sizes LIST       sizes of the worlds (100,1000,5000,30000,45000)
  --endpoints N      endpoints of each Service (3)
  --compare SxE      one more world, for the comparison with peers (5000x10), or `none`
  --modes LIST       modes (all of this build that the kernel can do)
  --no-peers         leave out nft, iptables-legacy-restore and iptables-nft-restore
  --no-path          leave out the data path
  --changes N        one-endpoint changes to time in each run (400)
  --rolling N        endpoints of the Service that is updated one by one (1000)
  --soak N           random changes at 10,000 Services, checked at the end (100000)
  --runs N           how often everything is measured, as far as the time goes (3)

how long
  --quick            a small run of less than a minute, to see that it works
  --budget SECONDS   for everything; the biggest worlds are dropped when it runs out (720)
  --peer-bound SEC   a peer that takes longer is reported as \"> SEC s\" (30)
  --seconds SEC      for each rate and throughput (0.3)

what becomes of it
  --report DIR       write index.html, results.json, summary.md and the plots
  --from FILE        measure nothing, render an earlier results.json";

/// What was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) sizes: Vec<usize>,
    pub(crate) endpoints: usize,
    pub(crate) compare: Option<World>,
    pub(crate) modes: Option<Vec<Mode>>,
    pub(crate) peers: bool,
    pub(crate) path: bool,
    pub(crate) changes: usize,
    pub(crate) rolling: usize,
    pub(crate) soak: Soak,
    pub(crate) pool: usize,
    pub(crate) connects: usize,
    pub(crate) runs: usize,
    pub(crate) budget: Duration,
    pub(crate) peer_bound: Duration,
    pub(crate) seconds: f64,
    pub(crate) report: Option<PathBuf>,
    pub(crate) from: Option<PathBuf>,
}

/// How many random changes, to how many Services.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Soak {
    pub(crate) services: usize,
    pub(crate) changes: usize,
}

impl Options {
    fn full() -> Self {
        Self {
            sizes: vec![100, 1000, 5000, 30_000, 45_000],
            endpoints: 3,
            compare: Some(World { services: 5000, endpoints: 10 }),
            modes: None,
            peers: true,
            path: true,
            changes: 400,
            rolling: 1000,
            soak: Soak { services: 10_000, changes: 100_000 },
            pool: 10_000,
            connects: 2000,
            runs: 3,
            budget: Duration::from_secs(720),
            peer_bound: Duration::from_secs(30),
            seconds: 0.3,
            report: None,
            from: None,
        }
    }

    fn quick() -> Self {
        Self {
            sizes: vec![20, 100],
            compare: None,
            changes: 16,
            rolling: 50,
            soak: Soak { services: 50, changes: 200 },
            pool: 500,
            connects: 100,
            runs: 1,
            budget: Duration::from_secs(50),
            peer_bound: Duration::from_secs(5),
            seconds: 0.1,
            ..Self::full()
        }
    }

    /// The worlds, small ones first.
    pub(crate) fn worlds(&self) -> Vec<World> {
        let sizes = self.sizes.iter();
        let mut worlds: Vec<_> = sizes
            .map(|&services| World { services, endpoints: self.endpoints })
            .chain(self.compare)
            .collect();
        worlds.sort_by_key(|world| (world.services, world.endpoints));
        worlds.dedup();
        worlds
    }
}

/// Reads the arguments; `None` when help was asked for.
pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let args: Vec<_> = args.map(OsString::from).collect();
    let quick = args.iter().any(|arg| arg == "--quick");
    let mut options = if quick { Options::quick() } else { Options::full() };
    let mut parser = Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(|error| error.to_string())? {
        let Arg::Long(name) = arg else {
            if arg == Arg::Short('h') {
                return Ok(None);
            }
            return Err(arg.unexpected().to_string());
        };
        let name = name.to_owned();
        if name == "help" {
            return Ok(None);
        }
        set(&mut options, &name, &mut parser)?;
    }
    check(&options)?;
    Ok(Some(options))
}

fn set(options: &mut Options, name: &str, parser: &mut Parser) -> Result<(), String> {
    let mut text = || {
        let value = parser.value().and_then(ValueExt::string);
        value.map_err(|error| format!("--{name}: {error}"))
    };
    match name {
        "quick" => {}
        "no-peers" => options.peers = false,
        "no-path" => options.path = false,
        "sizes" => {
            let sizes: Result<_, _> = text()?.split(',').map(|it| count(name, it)).collect();
            options.sizes = sizes?;
        }
        "modes" => {
            let modes = text()?;
            let modes: Result<_, _> = modes.split(',').map(str::parse::<Mode>).collect();
            options.modes = Some(modes.map_err(|error| format!("--modes: {error}"))?);
        }
        "compare" => options.compare = compare(&text()?)?,
        "endpoints" => options.endpoints = count(name, &text()?)?,
        "changes" => options.changes = count(name, &text()?)?,
        "rolling" => options.rolling = count(name, &text()?)?,
        "soak" => options.soak.changes = count(name, &text()?)?,
        "runs" => options.runs = count(name, &text()?)?,
        "budget" => options.budget = seconds(name, &text()?)?,
        "peer-bound" => options.peer_bound = seconds(name, &text()?)?,
        "seconds" => options.seconds = seconds(name, &text()?)?.as_secs_f64(),
        "report" => options.report = Some(text()?.into()),
        "from" => options.from = Some(text()?.into()),
        other => return Err(format!("unknown option --{other}")),
    }
    Ok(())
}

fn check(options: &Options) -> Result<(), String> {
    if options.worlds().iter().any(|world| world.size() > 1_000_000) {
        return Err("more than a million endpoints".to_owned());
    }
    // Addresses of the Services that come, go and roll follow those of the world.
    if options.rolling > 100_000 || options.soak.changes > 10_000_000 {
        return Err("--rolling or --soak is out of bounds".to_owned());
    }
    Ok(())
}

fn compare(text: &str) -> Result<Option<World>, String> {
    if text == "none" {
        return Ok(None);
    }
    let (services, endpoints) =
        text.split_once('x').ok_or_else(|| format!("--compare {text}: not of the form 5000x10"))?;
    let services = count("compare", services)?;
    Ok(Some(World { services, endpoints: count("compare", endpoints)? }))
}

fn number<T: Copy + FromStr + PartialOrd>(
    name: &str,
    text: &str,
    low: T,
    high: T,
) -> Result<T, String> {
    let number = text.trim().parse().ok().filter(|it| *it >= low && *it <= high);
    number.ok_or_else(|| format!("--{name} {text}: not a number that makes sense here"))
}

fn count(name: &str, text: &str) -> Result<usize, String> {
    number(name, text, 1, if name == "soak" { 10_000_000 } else { 100_000 })
}

fn seconds(name: &str, text: &str) -> Result<Duration, String> {
    number(name, text, 0.01, 86_400.0).map(Duration::from_secs_f64)
}

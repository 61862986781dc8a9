//! Runs conformance cases against the packet model, a fake kernel or a real one.
//!
//! `cargo run --release --example conformance -- --cases FILE [--mode M] [--kernel model|fake|real]
//! [--legacy] [--id N]... [--json]`; `--legacy` has the iptables mode write to x_tables.
//!
//! Prints one line for each case and, last, `N passed, N failed, N not applicable`. Exit code 0 when
//! nothing failed, 1 when something did, 2 for a call that makes no sense. A real kernel needs root
//! or unprivileged user namespaces, and no network but its own.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to a human")]

#[path = "../guest/mod.rs"]
mod guest;
mod subjects;

use std::{fs, path::PathBuf, process::ExitCode};

use async_trait::async_trait;
use proxier::{BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability, Xtables};
use proxier_testkit::{
    cases::{CaseFile, Kernel, RealKernel, Subject, Summary, run},
    lab,
};

const USAGE: &str = "usage: conformance [--cases FILE] [--mode iptables|ipvs|nftables|userspace] \
                     [--kernel model|fake|real] [--legacy] [--id N]... [--json]";

/// The cases that come with the project.
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/proxier-testkit/cases/cases.yaml");

struct Args {
    cases: PathBuf,
    /// The modes of this build when none is asked for.
    modes: Vec<Mode>,
    kernel: Which,
    /// The iptables mode writes to x_tables.
    legacy: bool,
    /// All when empty.
    ids: Vec<u64>,
    json: bool,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Which {
    Fake,
    Model,
    Real,
}

fn main() -> ExitCode {
    let args = match args(lexopt::Parser::from_env()) {
        Ok(Some(args)) => args,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match conformance(&args) {
        Ok(summary) if summary.failed == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn args(mut parser: lexopt::Parser) -> Result<Option<Args>, lexopt::Error> {
    use lexopt::{
        Arg::{Long, Short, Value},
        ValueExt,
    };
    let mut args = Args {
        cases: CASES.into(),
        modes: Vec::new(),
        kernel: Which::Model,
        legacy: false,
        ids: Vec::new(),
        json: false,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Long("cases") => args.cases = parser.value()?.into(),
            Long("mode") => match parser.value()?.string()?.as_str() {
                "all" => args.modes.clear(),
                mode => args.modes.push(mode.parse().map_err(|error| format!("{error}"))?),
            },
            Long("kernel") => {
                args.kernel = match parser.value()?.string()?.as_str() {
                    "fake" => Which::Fake,
                    "model" => Which::Model,
                    "real" => Which::Real,
                    other => return Err(format!("unknown kernel {other:?}").into()),
                };
            }
            Long("id") => args.ids.push(parser.value()?.parse()?),
            Long("legacy") => args.legacy = true,
            Long("json") => args.json = true,
            Long("help") | Short('h') => return Ok(None),
            Long(_) | Short(_) | Value(_) => return Err(arg.unexpected()),
        }
    }
    if args.modes.is_empty() {
        args.modes = proxier::modes().collect();
    }
    Ok(Some(args))
}

fn conformance(args: &Args) -> Result<Summary, String> {
    let path = args.cases.display();
    let text = fs::read_to_string(&args.cases).map_err(|error| format!("{path}: {error}"))?;
    let file = CaseFile::parse(&text).map_err(|error| format!("{path}: {error}"))?;
    let chosen = |id: u64| args.ids.is_empty() || args.ids.contains(&id);
    if let Some(id) = args.ids.iter().find(|id| file.cases().iter().all(|case| case.id != **id)) {
        return Err(format!("{path}: no case {id}"));
    }
    if args.kernel == Which::Real && args.modes.contains(&Mode::Ipvs) {
        let stays = guest::enter(&[]).map_err(|error| format!("no guest: {error}"))?;
        if stays == guest::Stays::Nowhere {
            return Err(guest::ADVICE.to_owned());
        }
    }
    if args.kernel == Which::Real {
        // Before any thread exists.
        lab::enter().map_err(|why| format!("no real kernel to run on: {why}"))?;
    }
    let subjects = subjects::all();
    let subjects: Vec<&dyn Subject> = subjects.iter().map(|it| &**it).collect();
    let mut summary = Summary::default();
    // A real kernel belongs to one mode; cases that depend on none are run in the first pass only.
    let passes: Vec<&[Mode]> = match args.kernel {
        Which::Real => args.modes.chunks(1).collect(),
        Which::Fake | Which::Model => vec![&args.modes],
    };
    for (number, modes) in passes.into_iter().enumerate() {
        let mut real = None;
        if let (Which::Real, [mode]) = (args.kernel, modes) {
            let factory = proxier::factory(*mode);
            let factory = factory.ok_or_else(|| format!("{mode} is not part of this build"))?;
            let factory = if args.legacy { Box::new(OnXtables(factory)) } else { factory };
            real = Some(RealKernel::new(factory).map_err(|error| error.to_string())?);
        }
        let mut kernel = match (args.kernel, &mut real) {
            (Which::Real, Some(real)) => Kernel::Real(real),
            (Which::Fake, _) => Kernel::Fake,
            (Which::Model | Which::Real, _) => Kernel::Model,
        };
        for case in file.cases().iter().filter(|case| chosen(case.id)) {
            for report in run(&file, case, modes, &subjects, &mut kernel) {
                if report.mode.is_none() && number > 0 {
                    continue;
                }
                summary.count(&report.verdict);
                if args.json {
                    println!("{}", report.to_json());
                } else {
                    println!("{report}");
                }
            }
        }
    }
    if args.json {
        println!("{}", summary.to_json());
    } else {
        println!("{summary}");
    }
    Ok(summary)
}

/// A factory that asks for x_tables.
struct OnXtables(Box<dyn BackendFactory>);

impl OnXtables {
    fn context(context: &OpenContext) -> OpenContext {
        let mut context = context.clone();
        context.xtables = Xtables::Legacy;
        context
    }
}

#[async_trait]
impl BackendFactory for OnXtables {
    fn mode(&self) -> Mode {
        self.0.mode()
    }

    async fn probe(&self, context: &OpenContext) -> Suitability {
        self.0.probe(&Self::context(context)).await
    }

    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
        self.0.open(&Self::context(context)).await
    }
}

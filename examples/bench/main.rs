//! Measures every mode of this build beside its peers and the floor, from small worlds to big ones.
//!
//! ```console
//! $ cargo run --release --example bench -- --report target/bench
//! ```
//!
//! Everything happens in network namespaces of its own, in bounded time. Contenders take turns, run
//! after run; each starts from an empty namespace, in a process of its own. docs/benchmarks.md says
//! how to read the figures.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod aims;
mod args;
mod budget;
mod child;
mod ended;
mod machine;
mod path;
mod peers;
mod render;
mod schema;
mod suite;
mod world;

use std::{error::Error, process::ExitCode};

use proxier_testkit::lab;

use crate::{args::Options, ended::ended, schema::Report};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == child::CHILD).is_some() {
        return ended("bench", child::main(args));
    }
    let options = match args::parse(args) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{}", args::USAGE);
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("bench: {message}\n\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    ended("bench", run(&options))
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let report = match &options.from {
        Some(file) => read(file)?,
        None => {
            lab::enter()?;
            suite::run(options)?
        }
    };
    println!("{}", render::table::terminal(&report));
    if let Some(directory) = &options.report {
        let page = render::write_report(&report, directory)?;
        eprintln!("bench: wrote {}", page.display());
    }
    Ok(())
}

fn read(file: &std::path::Path) -> Result<Report, Box<dyn Error>> {
    let name = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| format!("{name}: {error}"))?;
    let report: Report = serde_json::from_str(&text).map_err(|error| format!("{name}: {error}"))?;
    if report.schema != schema::SCHEMA {
        return Err(format!("{name}: written as {}, not {}", report.schema, schema::SCHEMA).into());
    }
    Ok(report)
}

//! The reference agent: a drop-in for kube-proxy on a node, and an example of how everything in
//! this library fits together. `agent --help` lists flags and verbs; docs/replace-kube-proxy.md
//! leads through a migration.
#![expect(clippy::print_stderr, reason = "an example talks to a human")]

mod args;
mod auto;
mod cluster;
mod config;
mod http;
mod leftovers;
mod logging;
mod metrics;
mod node_ports;
mod reload;
mod run;
mod shared;
mod show;
mod source;
mod sysctl;
mod verbs;

use std::{io::Write, process::ExitCode};

use args::Verb;
use config::{Resolved, load};
use proxier::in_full;

/// Anything that ends a verb, in words for people.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;
/// What a verb comes to.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            // A closed standard output is no reason to complain.
            error.print().ok();
            return ExitCode::from(code);
        }
    };
    if let Err(error) = logging::start(&cli.flags, matches!(cli.verb, None | Some(Verb::Run))) {
        eprintln!("agent: {error}");
        return ExitCode::from(2);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(perform(cli)),
        Err(error) => Err(format!("cannot start the runtime: {error}").into()),
    };
    match outcome {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            let text = in_full(&*error);
            for line in text.lines() {
                eprintln!("agent: {line}");
            }
            ExitCode::from(2)
        }
    }
}

async fn perform(cli: args::Cli) -> Outcome<ExitCode> {
    let flags = cli.flags;
    let verb = match cli.verb {
        Some(Verb::Completion { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut args::command(), "agent", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            return Ok(ExitCode::SUCCESS);
        }
        verb => verb.unwrap_or(Verb::Run),
    };
    let loaded = load(&flags)?;
    if let Some(path) = &flags.write_config_to {
        return write_config(path, &loaded).map(|()| ExitCode::SUCCESS);
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let settings = Resolved::new(loaded)?;
    match verb {
        Verb::Cleanup { modes } => verbs::cleanup(&settings, &modes).await,
        Verb::Run if flags.cleanup => verbs::cleanup(&settings, &[]).await,
        Verb::Run if flags.init_only => init_only(&settings).await,
        Verb::Run => run::run(&flags, settings).await.map(|()| ExitCode::SUCCESS),
        Verb::Doctor => verbs::doctor(&settings).await,
        Verb::Plan { output } => verbs::plan(&settings, output).await,
        Verb::Diff { output } => verbs::diff(&settings, output).await,
        Verb::Get { what, namespace, output } => {
            verbs::get(&settings, what, namespace.as_deref(), output).await
        }
        Verb::Explain { from, input, to, output } => {
            let question = show::Question { from, input, to };
            verbs::explain(&settings, &question, output).await
        }
        Verb::Completion { .. } => Ok(ExitCode::SUCCESS),
    }
}

async fn init_only(settings: &Resolved) -> Outcome<ExitCode> {
    let mode = auto::choose(settings).await?;
    sysctl::apply(settings, mode)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the settings in force as a configuration file.
fn write_config(path: &std::path::Path, loaded: &config::Loaded) -> Outcome {
    let text = format!(
        "{}---\n{}",
        yaml_serde::to_string(&loaded.proxy)?,
        yaml_serde::to_string(&loaded.ours)?
    );
    if path.as_os_str() == "-" {
        return print(&text);
    }
    std::fs::write(path, text).map_err(|error| {
        format!("--write-config-to {}: cannot write it: {error}", path.display()).into()
    })
}

/// Prints to standard output.
///
/// # Errors
/// It is closed; whoever reads has seen enough.
pub(crate) fn print(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

fn is_closed_pipe(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

//! Structured logs on standard error.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{
    Outcome,
    args::{Flags, Level, LogFormat},
};

/// Starts to log as the flags say; of the cluster only what a verb does not say itself.
pub(crate) fn start(flags: &Flags, is_daemon: bool) -> Outcome {
    let level = match (flags.log_level, flags.verbosity) {
        (Some(Level::Error), _) => "error",
        (Some(Level::Warn), _) => "warn",
        (Some(Level::Info), _) | (None, 0..=3) => "info",
        (Some(Level::Debug), _) | (None, 4..=5) => "debug",
        (Some(Level::Trace), _) | (None, _) => "trace",
    };
    let (source, client) = match level {
        "debug" | "trace" => (level, level),
        _ if is_daemon => (level, "off"),
        _ => ("error", "off"),
    };
    // Other people's crates are only of interest when something is wrong with them. What the client
    // repeats at every attempt the source says once, when it begins and when it ends.
    let filter =
        format!("warn,agent={level},proxier={level},proxier_kube={source},kube_client={client}");
    let filter = EnvFilter::try_new(filter)?;
    let registry = tracing_subscriber::registry().with(filter);
    match flags.log_format {
        LogFormat::Json => {
            registry
                .with(fmt::layer().json().flatten_event(true).with_writer(std::io::stderr))
                .try_init()?;
        }
        LogFormat::Text => {
            let ansi = std::io::stderr().is_terminal();
            registry
                .with(fmt::layer().with_ansi(ansi).with_target(false).with_writer(std::io::stderr))
                .try_init()?;
        }
    }
    Ok(())
}

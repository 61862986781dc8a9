//! Opening the mode at run time.

use async_trait::async_trait;
use proxier_core::{
    BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability,
    spi::{CommitError, ErrorKind},
};
use proxier_netlink::spi::{kind, netns, open_error};

use crate::{
    EngineError,
    config::{Config, ConfigError},
    engine,
    probe::probe,
};

/// Makes proxiers of the IPVS mode.
///
/// [`OpenContext::prefix`] is the name of the table, and of the link with a `0` behind it;
/// [`OpenContext::masquerade_bit`] and the bit above it are used in the connection mark. Two instances
/// in one namespace need different names, bits and, by [`engine`], mark bases.
#[derive(Clone, Copy, Debug, Default)]
pub struct Factory;

fn config(context: &OpenContext) -> Config {
    let default = Config::default();
    let (table, link) = match &context.prefix {
        Some(prefix) => (prefix.clone(), format!("{prefix}0")),
        None => (default.table, default.link),
    };
    let masquerade_bit = context.masquerade_bit;
    // The next one up, or down where there is none.
    let proxied_bit = if masquerade_bit == 31 { 30 } else { masquerade_bit.saturating_add(1) };
    Config { table, link, masquerade_bit, proxied_bit, ..Config::default() }
}

#[async_trait]
impl BackendFactory for Factory {
    fn mode(&self) -> Mode {
        Mode::Ipvs
    }

    async fn probe(&self, context: &OpenContext) -> Suitability {
        probe(&netns(context), &context.families).await
    }

    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
        match engine(&config(context), &netns(context), &context.families).await {
            Ok(engine) => Ok(Box::new(engine)),
            Err(EngineError::Config(error)) => Err(OpenError::Config {
                setting: match error {
                    ConfigError::MarkBit { .. }
                    | ConfigError::MarkBase { .. }
                    | ConfigError::SameBit { .. } => "masquerade_bit",
                    ConfigError::Link { .. } | ConfigError::Table { .. } => "prefix",
                    ConfigError::Scheduler { .. } => "config",
                },
                reason: error.to_string(),
            }),
            Err(EngineError::Open(error)) => {
                Err(OpenError::Kernel { mode: Mode::Ipvs, source: open_error(error) })
            }
            Err(EngineError::Ipvs(error)) => {
                Err(unreachable("no way to virtual servers", kind(error.kind()), error))
            }
            Err(EngineError::Link(error)) => {
                Err(unreachable("no way to links", kind(error.kind()), error))
            }
        }
    }
}

fn unreachable(
    doing: &str,
    kind: ErrorKind,
    error: impl std::error::Error + Send + Sync + 'static,
) -> OpenError {
    let (doing, source) = (doing.to_owned(), std::io::Error::other(error));
    OpenError::Kernel { mode: Mode::Ipvs, source: CommitError::Transport { doing, source, kind } }
}

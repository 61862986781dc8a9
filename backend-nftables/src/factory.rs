//! Opening the mode by name, at run time.

use async_trait::async_trait;
use proxier_core::{
    BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability, spi::CommitError,
};
use proxier_netlink::NetNs;

use crate::{Config, EngineError, dataplane::kind, engine, probe::probe};

/// Makes proxiers of the nftables mode.
#[derive(Clone, Copy, Debug, Default)]
pub struct Factory;

fn config(context: &OpenContext) -> Config {
    let mut config = Config::default();
    if let Some(prefix) = &context.prefix {
        config.table.clone_from(prefix);
    }
    config.masquerade_bit = context.masquerade_bit;
    config.takeover = context.takeover;
    config
}

fn netns(context: &OpenContext) -> NetNs {
    context.netns.clone().map_or(NetNs::Current, NetNs::Path)
}

#[async_trait]
impl BackendFactory for Factory {
    fn mode(&self) -> Mode {
        Mode::Nftables
    }

    async fn probe(&self, context: &OpenContext) -> Suitability {
        let found = probe(&netns(context)).await;
        let missing = context.families.iter().filter(|family| !found.families.contains(family));
        let missing = missing.map(|family| format!("{family} cannot be programmed"));
        let mut reasons = found.reasons;
        reasons.extend(missing);
        reasons.extend(found.warnings);
        Suitability { available: found.available, reasons }
    }

    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
        match engine(config(context), &netns(context), &context.families) {
            Ok(engine) => Ok(Box::new(engine)),
            Err(EngineError::Config(error)) => {
                Err(OpenError::Config { setting: "nftables", reason: error.to_string() })
            }
            Err(EngineError::Open(error)) => {
                let kind = kind(error.kind());
                let doing = "opening netlink sockets".to_owned();
                let source = std::io::Error::other(error);
                let source = CommitError::Transport { doing, source, kind };
                Err(OpenError::Kernel { mode: Mode::Nftables, source })
            }
        }
    }
}

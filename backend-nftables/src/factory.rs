//! Opening the mode by name, at run time.

use async_trait::async_trait;
use proxier_core::{BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability};
use proxier_netlink::spi::{netns, open_error};

use crate::{Config, EngineError, engine, probe::probe};

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
                Err(OpenError::Kernel { mode: Mode::Nftables, source: open_error(error) })
            }
        }
    }
}

//! Opening the mode by name, at run time.

use async_trait::async_trait;
use proxier_core::{BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability, Xtables};
use proxier_netlink::spi::{netns, open_error};

use crate::{
    Config, EngineError, engine, legacy_engine,
    probe::{Suitability as Found, probe, probe_legacy, tcp_be_liberal},
};

/// Makes proxiers of the iptables mode.
#[derive(Clone, Copy, Debug, Default)]
pub struct Factory;

fn config(context: &OpenContext) -> Config {
    let mut config = Config::default();
    if let Some(prefix) = &context.prefix {
        config.prefix.clone_from(prefix);
    }
    config.masquerade_bit = context.masquerade_bit;
    config.takeover = context.takeover;
    config
}

#[async_trait]
impl BackendFactory for Factory {
    fn mode(&self) -> Mode {
        Mode::Iptables
    }

    async fn probe(&self, context: &OpenContext) -> Suitability {
        let (found, _) = choose(context).await;
        let missing = context.families.iter().filter(|family| !found.families.contains(family));
        let missing = missing.map(|family| format!("{family} cannot be programmed"));
        let mut reasons = found.reasons;
        reasons.extend(missing);
        reasons.extend(found.warnings);
        Suitability { available: found.available, reasons }
    }

    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
        let netns = netns(context);
        let legacy = match context.xtables {
            Xtables::Legacy => true,
            Xtables::Nft => false,
            Xtables::Auto | _ => choose(context).await.1,
        };
        // K8S: kube-proxy reads it once, when it is made (pkg/proxy/iptables/proxier.go, v1.36).
        let config = config(context).drop_invalid(!tcp_be_liberal(&netns));
        let opened: Result<Box<dyn Proxier>, EngineError> = if legacy {
            legacy_engine(config, &netns, &context.families).map(|it| Box::new(it) as _)
        } else {
            engine(config, &netns, &context.families).map(|it| Box::new(it) as _)
        };
        opened.map_err(|error| match error {
            EngineError::Config(error) => {
                OpenError::Config { setting: "iptables", reason: error.to_string() }
            }
            EngineError::Open(error) => {
                OpenError::Kernel { mode: Mode::Iptables, source: open_error(error) }
            }
            EngineError::Tool(error) => {
                OpenError::Config { setting: "xtables", reason: error.to_string() }
            }
        })
    }
}

/// What was found of the packet filter that is asked for, and whether that is x_tables.
async fn choose(context: &OpenContext) -> (Found, bool) {
    let netns = netns(context);
    if context.xtables == Xtables::Legacy {
        return (probe_legacy(&netns).await, true);
    }
    let mut found = probe(&netns).await;
    if found.available || context.xtables == Xtables::Nft {
        return (found, false);
    }
    let mut legacy = probe_legacy(&netns).await;
    if legacy.available {
        let reasons = found.reasons.join("; ");
        legacy
            .warnings
            .push(format!("x_tables is used, because nf_tables is not there: {reasons}"));
        return (legacy, true);
    }
    found.reasons.append(&mut legacy.reasons);
    (found, false)
}

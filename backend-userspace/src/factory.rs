//! Opening the mode at run time.

use async_trait::async_trait;
use proxier_core::{
    BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability, capture_bit,
    spi::CommitError,
};
use proxier_netlink::spi::netns;

use crate::{
    EngineError,
    config::{Capture, Config, ConfigError, Listen, Method},
    dataplane::transport,
    engine,
    probe::probe,
};

/// Makes proxiers of the userspace mode that capture traffic.
///
/// [`OpenContext::prefix`] is the name of the table. The mark bit is [`capture_bit`]: another mode that
/// masquerades may be at work at the same time, and what it marks must not be routed to this process.
/// Two instances in one namespace need different names, bits and, by [`engine`], routing tables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Factory {
    /// How captured packets come to the listeners.
    pub method: Method,
}

fn config(context: &OpenContext, method: Method) -> Config {
    let default = Capture::default();
    let table = context.prefix.clone().unwrap_or_else(|| default.table.clone());
    let mark_bit = capture_bit(context.masquerade_bit);
    let listen = Listen::Capture(Capture { method, table, mark_bit, ..default });
    Config { listen, ..Config::default() }
}

#[async_trait]
impl BackendFactory for Factory {
    fn mode(&self) -> Mode {
        Mode::Userspace
    }

    async fn probe(&self, context: &OpenContext) -> Suitability {
        probe(&netns(context), self.method, &context.families).await
    }

    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
        match engine(&config(context, self.method), &netns(context), &context.families) {
            Ok(engine) => Ok(Box::new(engine)),
            Err(EngineError::Config(error)) => Err(OpenError::Config {
                setting: match error {
                    ConfigError::MarkBit { .. } => "masquerade_bit",
                    ConfigError::Table { .. } => "prefix",
                    ConfigError::DialTimeouts
                    | ConfigError::Limit
                    | ConfigError::RoutingTable { .. } => "config",
                },
                reason: error.to_string(),
            }),
            Err(error) => Err(OpenError::Kernel { mode: Mode::Userspace, source: kernel(error) }),
        }
    }
}

fn kernel(error: EngineError) -> CommitError {
    match error {
        EngineError::Socket(source) => transport("opening the listeners", source),
        EngineError::Config(_) | EngineError::Open(_) => {
            let doing = error.to_string();
            transport(doing, std::io::Error::other(error))
        }
    }
}

//! proxier's nftables mode.

mod backend;
mod codec;
mod compile;
mod config;
mod dataplane;
mod factory;
mod field;
mod names;
mod object;
mod probe;
mod render;
mod rule;
mod sets;
mod skeleton;
mod slots;

pub use backend::Nftables;
pub use compile::Memo;
pub use config::{Config, ConfigError};
pub use dataplane::NftablesDataplane;
pub use factory::Factory;
pub use object::{Key, Value};
pub use probe::{Suitability, probe};

use proxier_core::{Family, engine::Engine};
use proxier_netlink::{NetNs, OpenError};

/// A proxier could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A setting is out of range.
    #[error("the settings of the nftables mode are wrong")]
    Config(#[from] ConfigError),
    /// A socket could not be opened.
    #[error("the nftables mode has no way to the kernel")]
    Open(#[from] OpenError),
}

/// Opens a proxier of the nftables mode in a network namespace, for some families.
///
/// Changes nothing: the first sync reads what the kernel holds, and writes.
///
/// # Errors
/// A setting is out of range, or the sockets could not be opened.
pub fn engine(
    config: Config,
    netns: &NetNs,
    families: &[Family],
) -> Result<Engine<Nftables, NftablesDataplane>, EngineError> {
    let backend = Nftables::new(config)?;
    let dataplane = NftablesDataplane::open(&backend, netns)?;
    Ok(Engine::new(backend, dataplane, families))
}

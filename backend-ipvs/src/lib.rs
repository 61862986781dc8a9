//! The IPVS mode of proxier: kernel virtual servers, with the scheduler that you or a Service names.
//!
//! kube-proxy is giving its IPVS mode up; this is where its users can stay, and what it never did is
//! done here: verdicts by origin, drops where nothing is local, a scheduler for each Service, weights,
//! an end to draining.
//!
//! ```
//! use proxier_backend_ipvs::{Config, Ipvs};
//! use proxier_core::{Mode, spi::Backend};
//!
//! let config = Config { scheduler: "lc".into(), ..Config::default() };
//! assert_eq!(Ipvs::new(config)?.capabilities().mode, Mode::Ipvs);
//! # Ok::<_, proxier_backend_ipvs::ConfigError>(())
//! ```
//!
//! # What is in the kernel
//!
//! * One dummy link, which holds the addresses of Services: so packets to them come to this machine,
//!   where the kernel's virtual servers wait. An address that the node has anyway is left alone.
//! * A virtual server for each address and port of a Service, with its endpoints as destinations.
//!   Node ports, and ways in that lead different origins to different endpoints, have one for each
//!   pool instead, known by a packet mark.
//! * One nf_tables table per family (`proxier-ipvs`) with a constant number of chains and rules, and
//!   sets that hold the frontends: they tell origins apart, drop, reject, filter sources, mark packets
//!   for virtual servers, and masquerade.
//!
//! A virtual server is this mode's if its mark is in the range of the settings, or if its address is
//! on the link or in the table's sets. All others are left alone, and so are those in
//! [`Config::exclude`].
//!
//! # What it deliberately does not do
//!
//! * Sysctls, unasked. [`prepare`](prepare()) sets those that the mode needs, says what it changed,
//!   and can take it back; without `net.ipv4.vs.conntrack=1` nothing is masqueraded. Like for any node,
//!   the embedder sees to `net.ipv4.ip_forward=1`.
//! * Node ports on loopback addresses.
//!
//! # Cargo features
//!
//! None.

mod backend;
mod compile;
mod config;
mod dataplane;
mod factory;
mod mark;
mod object;
mod prepare;
mod probe;
mod render;
mod skeleton;
pub mod view;

pub use backend::Ipvs;
pub use config::{Config, ConfigError, SCHEDULERS};
pub use dataplane::IpvsDataplane;
pub use factory::Factory;
pub use object::{
    Base, Chain, ChainName, Item, Key, Rule, Server, ServerId, SetName, Shape, Value, Way,
};
pub use prepare::{Changed, Prepared, Sysctls, prepare};
pub use probe::probe;

use proxier_core::{Family, engine::Engine};
use proxier_netlink::{NetNs, OpenError, dummy::LinkError, ipvs::IpvsError};

/// A proxier could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A setting is out of range.
    #[error("the settings of the IPVS mode are wrong")]
    Config(#[from] ConfigError),
    /// The kernel has no IPVS, or does not let us.
    #[error("the IPVS mode has no way to virtual servers")]
    Ipvs(#[from] IpvsError),
    /// Links cannot be reached.
    #[error("the IPVS mode has no way to links")]
    Link(#[from] LinkError),
    /// A netlink socket could not be opened.
    #[error("the IPVS mode has no way to the kernel")]
    Open(#[from] OpenError),
}

/// Opens a proxier of the IPVS mode in a network namespace, for some families.
///
/// Opens sockets and programs nothing: the first sync reads what the kernel holds, and writes. Needs a
/// tokio runtime with I/O and time.
///
/// # Errors
/// [`EngineError::Config`]: correct the settings. The others: the namespace cannot be entered, or a
/// privilege or kernel feature is missing; see [`probe`](probe()).
///
/// # Cancel safety
/// Safe to drop.
pub async fn engine(
    config: &Config,
    netns: &NetNs,
    families: &[Family],
) -> Result<Engine<Ipvs, IpvsDataplane>, EngineError> {
    let backend = Ipvs::new(config.clone())?;
    let dataplane = IpvsDataplane::open(config, netns).await?;
    Ok(Engine::new(backend, dataplane, families))
}

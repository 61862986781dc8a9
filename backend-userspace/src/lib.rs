//! The userspace mode of proxier: the process itself accepts connections and datagrams, and passes
//! them on to endpoints.
//!
//! It is for where the kernel modes cannot go (no NAT, restricted nodes, sidecars), and it can do what
//! they cannot: try another endpoint when one refuses, skip one that keeps refusing, and count
//! connections, bytes and failures of every endpoint.
//!
//! ```no_run
//! use proxier_backend_userspace::{Config, engine};
//! use proxier_core::{Family, Proxier, model::Store};
//! use proxier_netlink::NetNs;
//!
//! # async fn run(mut store: Store) -> Result<(), Box<dyn std::error::Error>> {
//! let mut proxier = engine(&Config::default(), &NetNs::Current, &Family::ALL)?;
//! let monitor = proxier.dataplane().monitor();
//! while let Some(update) = store.take() {
//!     proxier.sync(update).await?;
//!     println!("{:#?}", monitor.snapshot());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How traffic comes to the process
//!
//! * [`Listen::Capture`], the default. One nf_tables table per family (`proxier-userspace`) with a
//!   constant number of chains and rules, and sets that hold the frontends. TPROXY hands packets to
//!   listeners on the loopback address, one for each family, protocol and origin, so that the process
//!   knows the original destination, and whether a pod, the node or somebody else is calling. The
//!   node's own packets are marked, and come back in through `lo`. What has no endpoint is rejected
//!   or dropped by the kernel, as in the other modes, not accepted and closed. A routing rule and a
//!   route in a table of their own deliver marked packets to this machine. Where that is not possible,
//!   packets are translated to the listeners, which are then open at every address of this machine and
//!   refuse who was not translated; [`Method`] says what is lost, [`probe`](probe()) what is missing.
//! * [`Listen::Addresses`]: at addresses that you name. No kernel rules, no privileges.
//!
//! # What happens to connections
//!
//! * **TCP**: endpoints take turns; a client stays with one where the Service wants affinity. An
//!   attempt that fails is made with the next endpoint ([`Tcp::dial_timeouts`]). After two failures
//!   in a row an endpoint is skipped for a second, then two, up to a minute, unless all are. Each
//!   direction ends by itself. What carries much is spliced; what is idle holds no buffer.
//!   Connections to an endpoint that is gone live on, or are drained ([`Tcp::drain`]).
//! * **UDP**: a session for each client and frontend, with a socket connected to the endpoint. It
//!   ends when idle, when its endpoint is gone or refuses, or when another needs its place.
//! * The client's address is kept where the verdict says so: the endpoint sees it, and its answers
//!   must come back through this node, as pods' do. Elsewhere it sees an address of the node.
//! * At [`Limits::connections`], and while descriptors are short, accepting pauses.
//!
//! # What it deliberately does not do
//!
//! * SCTP: refused when planned, by name.
//! * Forwarding without a process. When it ends, its connections end; captured packets are dropped
//!   until the next process takes over, which it does in one transaction, with its routes in place.
//! * Sysctls. The embedder sees to them: `net.ipv4.ip_forward` and its IPv6 counterpart, as for any
//!   node; `rp_filter` not strict on interfaces that answers of endpoints come in on asymmetrically;
//!   `net.core.somaxconn` and the limit on open files (two for each connection or session) for
//!   many clients. A host firewall must accept captured packets on its input hook: they carry the
//!   original destination.
//!
//! # Privileges and kernel
//!
//! Capturing needs `CAP_NET_ADMIN` in the user namespace that owns the network namespace, and Linux
//! 5.12 or newer with nft_fib, nft_reject, conntrack and either nft_tproxy, nft_socket and policy
//! routing or nft_nat, nft_redir and nf_conntrack_netlink.
//! Listening at named addresses needs nothing.
//!
//! # Threads and cost
//!
//! [`Limits::workers`] threads, one for each processor up to eight, each with a runtime of its own, in
//! the network namespace of the proxier. They start with the first sync. A change of one endpoint is
//! one operation in the process and none in the kernel, however many Services there are.
//!
//! # Cargo features
//!
//! None.

mod aging;
mod backend;
mod config;
mod datagram;
mod dataplane;
mod dial;
mod factory;
mod health;
mod monitor;
mod object;
mod pipe;
mod probe;
mod relay;
mod render;
mod rule;
mod service;
mod shared;
mod skeleton;
mod socket;
mod table;
mod tcp;
mod udp;
pub mod view;
mod worker;

pub use backend::{Ports, Userspace};
pub use config::{Addresses, Capture, Config, ConfigError, Limits, Listen, Method, Tcp, Udp};
pub use dataplane::UserspaceDataplane;
pub use factory::Factory;
pub use monitor::{Count, EndpointCount, Monitor, ServiceCount, Snapshot};
pub use object::{
    Base, Chain, ChainName, Item, Key, Origins, Route, Routing, Rule, Service, SetName, Shape,
    Value, Way,
};
pub use probe::probe;

use proxier_core::{Family, engine::Engine};
use proxier_netlink::{NetNs, OpenError};

/// A proxier could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A setting is out of range.
    #[error("the settings of the userspace mode are wrong")]
    Config(#[from] ConfigError),
    /// A netlink socket could not be opened.
    #[error("the userspace mode has no way to the kernel")]
    Open(#[from] OpenError),
    /// A socket could not be opened: for capturing, `CAP_NET_ADMIN` is needed.
    #[error("the userspace mode cannot open its sockets")]
    Socket(#[source] std::io::Error),
}

/// Opens a proxier of the userspace mode in a network namespace, for some families.
///
/// Opens sockets and programs nothing: the first sync reads what the kernel holds, writes, and starts
/// the threads. Needs a tokio runtime with I/O and time.
///
/// # Errors
/// [`EngineError::Config`]: correct the settings. [`EngineError::Open`], [`EngineError::Socket`]: the
/// namespace cannot be entered, or a privilege or kernel feature is missing; see [`probe`](probe()).
pub fn engine(
    config: &Config,
    netns: &NetNs,
    families: &[Family],
) -> Result<Engine<Userspace, UserspaceDataplane>, EngineError> {
    config.validate()?;
    let config = &decided(config, netns, families);
    let dataplane = UserspaceDataplane::open(config, netns, families)?;
    let backend = Userspace::new(config, dataplane.ports())?;
    Ok(Engine::new(backend, dataplane, families))
}

/// The settings with a method that works here.
fn decided(config: &Config, netns: &NetNs, families: &[Family]) -> Config {
    let mut config = config.clone();
    if let Listen::Capture(capture) = &mut config.listen {
        capture.method = probe::decide(netns, capture.method, families);
    }
    config
}

//! proxier's nftables mode: a flat data path of sets and maps, written over netlink.
//!
//! A Service is *elements* of a few sets and maps, never a chain or a rule of its own; the one
//! exception is session affinity. It does not watch anything, does not set sysctls, and runs no
//! program; `nft` lists what it writes, and can load that list.
//!
//! ```no_run
//! use proxier_backend_nftables::{Config, engine};
//! use proxier_core::{Family, Proxier, Update, model::{NodeEnv, Store}};
//! use proxier_netlink::NetNs;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut proxier = engine(Config::default(), &NetNs::Current, &Family::ALL)?;
//! let mut store = Store::new(NodeEnv::default());
//! // … apply Services and EndpointSlices to the store …
//! if let Some(update) = store.take() {
//!     let report = proxier.sync(update).await?;
//!     println!("{} operations", report.ops.total());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The table
//!
//! One table in each of the families `ip` and `ip6`. Frontends are known by address, protocol and
//! port (`service-…`), node ports by protocol and port (`node-port-…`); what follows exists for both.
//!
//! | object | holds |
//! |---|---|
//! | `cluster-ips`, `external-ips` | addresses: all other traffic passes after two look-ups |
//! | `service-of-N[-local]` | frontends whose Cluster (Local) pool has N slots |
//! | `service-endpoints[-local]` | frontend and slot → address and port |
//! | `service-masq-all`, `-unless-pod` | frontends that masquerade everybody, or all but pods |
//! | `service-by-origin` | frontends for which one look at `service-{drop,local,masq,reject}-{pod,node,outside}` is needed |
//! | `service-fenced`, `service-sources` | frontends with source ranges, and the ranges |
//! | `service-no-endpoints` | frontends that reject |
//! | `service-counted` | frontends whose connections are counted, and how many there were |
//! | `hairpin` | pairs of equal endpoint addresses |
//! | `service-spread[-local]` | frontends that spread round robin or by source → the chain that does |
//! | `affinity[-local]` | client and Service port → endpoint; written by rules, with a timeout |
//!
//! A new connection is looked up in the address sets, is marked for masquerading if its frontend says
//! so, and meets one rule for each N in use: `… @service-of-3 dnat to … . numgen random mod 3 map
//! @service-endpoints`. Endpoints keep their slot, so that one more or less changes at most five
//! elements whatever the pool's size. Up to 32 endpoints N is their number; beyond, N is rounded up
//! by at most a sixteenth, and a draw that finds its slot free is repeated.
//!
//! Drops happen in the NAT chains, which see the first packet of a connection only; rejections in
//! `input`, `forward` and `output`, for new connections that nobody translated. So are connections to
//! unused ports of a cluster IP, and those to unallocated addresses of the ServiceCIDRs are dropped.
//!
//! A Service port with session affinity has two or three chains: `remember-…` notes in `affinity`
//! where a translated connection goes, and `sticky-…` sends the next one there, by whatever frontend
//! it comes. `nft` 1.0.6 cannot express that with sets alone.
//!
//! An endpoint of weight 3 has three slots. A Service port that spreads round robin or by source has
//! a chain `spread-…` for each kind of frontend, whose rule takes the slot from `numgen inc` or `jhash`.
//!
//! # Differences from kube-proxy's nftables mode
//!
//! * Node ports answer on 127.0.0.0/8 where the node says so and the sysctl `route_localnet` is set;
//!   a guard then drops packets from the wire to 127.0.0.0/8.
//! * Any endpoint that reaches itself is masqueraded, not only one that is known to be on this node.
//! * What another table has translated is not judged again in `input`, `forward` and `output`.
//! * Source ranges are checked, and Local policies drop, where addresses are translated.
//!
//! # Privileges and kernel features
//!
//! CAP_NET_ADMIN in the user namespace of the network namespace. Linux 5.7 (counters of
//! elements); to *remove* Services with session affinity 6.2, before which a chain cannot be deleted
//! together with the last element that leads to it. [`probe()`] tries everything and names what is
//! missing.
//!
//! # Features
//!
//! None.

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
pub mod view;

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

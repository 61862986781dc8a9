//! The iptables mode of proxier: kube-proxy's chains, with its names, order, probabilities and
//! comments, in IPv4 and IPv6, written over netlink.
//!
//! What `iptables -t nat -S` lists is what people know from kube-proxy. No helper program runs: the
//! rules are nf_tables rules with the extensions that `iptables-nft` uses, byte for byte as version
//! 1.8.9 makes them, and each batch of changes is one transaction of the kernel.
//!
//! ```no_run
//! use proxier_backend_iptables::{Config, engine};
//! use proxier_core::{Family, Proxier, model::{NodeEnv, Store}};
//! use proxier_netlink::NetNs;
//!
//! # async fn run(mut store: Store) -> Result<(), Box<dyn std::error::Error>> {
//! let mut proxier = engine(Config::default(), &NetNs::Current, &Family::ALL)?;
//! while let Some(update) = store.take() {
//!     let report = proxier.sync(update).await?;
//!     println!("{} objects changed", report.ops.total());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What it deliberately does not do
//!
//! * Hosts whose rules are iptables-legacy's: both sets of rules apply, but the legacy tool does not
//!   list ours. [`probe`](probe()) warns.
//! * Sysctls. Node ports on 127.0.0.1 need `net.ipv4.conf.all.route_localnet=1`, which is for the
//!   embedder to set: it opens 127.0.0.0/8 to the network, so it should be set after the first sync,
//!   which brings the guard.
//! * kube-proxy's `nfacct` counters (localhost node ports, INVALID packets): they need objects of
//!   another kernel module that outlive the rules. Every rule counts its packets anyway.
//! * The canary chains: nf_tables announces changes, so nothing has to be polled.
//! * Leaving comments out in large clusters: kube-proxy saves time of `iptables-restore` that is not
//!   spent here, and rules without comments are hard to read.
//! * A test of foreign rules' order: a jump of ours that exists is left where it is.
//!
//! # What it shares with others
//!
//! * **Tables and built-in chains** are made if missing, with iptables' types and priorities, and
//!   carry the comment `proxier`; [`Proxier::cleanup`](proxier_core::Proxier::cleanup) removes only
//!   these, and only if nothing is in them. Policies and foreign rules are not touched.
//! * **Ownership**: the rule in `KUBE-MARK-MASQ` carries a mark that tools do not show. If the chains
//!   exist without it, another proxier made them, and the first sync fails with
//!   [`CommitError::Foreign`](proxier_core::spi::CommitError::Foreign) unless [`Config::takeover`]
//!   is set. Then what is there is adopted as kube-proxy would adopt it: only differences are
//!   written.
//! * **`KUBE-FIREWALL`** belongs to kubelet as well. Only rules with our mark are ours; equal ones of
//!   kubelet stay beside them.
//!
//! # Privileges and kernel
//!
//! `CAP_NET_ADMIN` in the user namespace that owns the network namespace. Linux 5.10 or newer with
//! nf_tables, nft_compat and the extensions that [`probe`](probe()) tries. Without `CAP_NET_ADMIN` in
//! the *initial* user namespace the socket buffers are small: batches are shorter, and a single chain
//! of several hundred endpoints may be replaced in two steps.
//!
//! # Cost
//!
//! Reading and planning a change costs what the change costs. The kernel, however, walks every chain
//! that packets can reach whenever a rule is added to a table, twice in table nat because two built-in
//! chains lead to the Services; and each new connection is compared with the Services one by one. Both
//! are properties of kube-proxy's chains. `tests/scale.rs` measures.
//!
//! # Cargo features
//!
//! None.

mod backend;
mod compile;
mod config;
mod dataplane;
mod encode;
mod factory;
pub mod names;
mod object;
mod pack;
mod probe;
mod render;
mod rule;
mod skeleton;
pub mod view;
mod xt;

pub use backend::Iptables;
pub use config::{Config, ConfigError};
pub use dataplane::IptablesDataplane;
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
    #[error("the settings of the iptables mode are wrong")]
    Config(#[from] ConfigError),
    /// A socket could not be opened.
    #[error("the iptables mode has no way to the kernel")]
    Open(#[from] OpenError),
}

/// Opens a proxier of the iptables mode in a network namespace, for some families.
///
/// Changes nothing: the first sync reads what the kernel holds, and writes. Needs a tokio runtime
/// with I/O.
///
/// # Errors
/// [`EngineError::Config`]: correct the settings. [`EngineError::Open`]: the namespace cannot be
/// entered, or the kernel has no netfilter sockets.
pub fn engine(
    config: Config,
    netns: &NetNs,
    families: &[Family],
) -> Result<Engine<Iptables, IptablesDataplane>, EngineError> {
    let backend = Iptables::new(config)?;
    let dataplane = IptablesDataplane::open(&backend, netns)?;
    Ok(Engine::new(backend, dataplane, families))
}

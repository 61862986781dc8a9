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
//! * Mixing nf_tables and x_tables: where both have rules, both apply, and each tool lists its own.
//!   [`probe`](probe()) and [`probe_legacy`] warn.
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
//! # x_tables
//!
//! Where the kernel has no nf_tables, or where the host's own rules are iptables-legacy's,
//! [`legacy_engine`] programs the same chains through `iptables-legacy-restore --noflush`, the only
//! program this crate ever runs: the kernel takes x_tables' rules a whole table at a time, in a form
//! that iptables alone can make. What differs:
//!
//! * Every change replaces a whole table: 0.7 s with 5,000 Services of ten endpoints, whatever
//!   changed. So changes want to be collected; [`Pause::Adaptive`](proxier_core::pace::Pause) waits
//!   in proportion.
//! * Tables are replaced one after the other, filter first.
//! * Our mark is a comment, `proxier`.
//! * The kernel tells nobody of changes: what others flush is found by the next audit.
//! * It waits up to 5 s for others that hold `/run/xtables.lock`.
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
//! chains lead to the Services. `examples/churn.rs` measures.
//!
//! kube-proxy compares each new connection with the Services one by one. Here chains branch, by four
//! bits of the address or five of the node port: `KUBE-IP-0A60` leads on to addresses in
//! 10.96.0.0/16, `KUBE-NP-TCP-30720-31743` to these node ports. In table filter `KUBE-EIP-…` and
//! `KUBE-FIP-…` do the same for what is refused and what is fenced. Names of IPv6 networks are
//! hashes. A pool of more than 64 endpoints is split into about as many parts, `KUBE-SVP-…`, as a
//! part has endpoints, so that a change rewrites two chains of that length; the probabilities are
//! rounded to ten decimals as kube-proxy's are, so that with 10,000 endpoints none gets a share that
//! is wrong by more than one millionth of it. Pools with session affinity are not split.
//! An endpoint's chain sets the mark of a hairpin itself instead of jumping to `KUBE-MARK-MASQ`, which
//! is one chain less to check. [`Layout::KubeProxy`] has kube-proxy's lists and jumps instead.
//! `examples/connect.rs` measures what a Service adds to a connect.
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
mod legacy;
pub mod names;
mod object;
mod pack;
mod probe;
mod render;
mod rule;
mod skeleton;
mod tree;
pub mod view;
mod xt;

pub use backend::Iptables;
pub use config::{Config, ConfigError, Layout};
pub use dataplane::IptablesDataplane;
pub use factory::Factory;
pub use legacy::{LegacyDataplane, ToolError};
pub use object::{Key, Value};
pub use probe::{Suitability, probe, probe_legacy};

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
    /// The programs that x_tables needs cannot be used.
    #[error("the iptables mode has no way to x_tables")]
    Tool(#[from] ToolError),
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

/// Opens a proxier of the iptables mode on x_tables, through iptables-legacy's programs.
///
/// Changes nothing: the first sync reads what the kernel holds, and writes. Needs a tokio runtime
/// with I/O. Runs `iptables-legacy -V`, for which it blocks some milliseconds.
///
/// # Errors
/// [`EngineError::Config`]: correct the settings. [`EngineError::Tool`]: install iptables-legacy.
/// [`EngineError::Open`]: the namespace cannot be entered, or the kernel has no netfilter sockets.
pub fn legacy_engine(
    config: Config,
    netns: &NetNs,
    families: &[Family],
) -> Result<Engine<Iptables, LegacyDataplane>, EngineError> {
    let backend = Iptables::for_x_tables(config)?;
    let dataplane = LegacyDataplane::open(&backend, netns)?;
    Ok(Engine::new(backend, dataplane, families))
}

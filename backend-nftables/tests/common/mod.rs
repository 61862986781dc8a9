//! What the tests of this crate share: worlds, namespaces, and the tools that look at them.
#![allow(dead_code, unused_imports, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]

use std::collections::BTreeMap;

use proxier_backend_nftables::{Config, Key, Nftables, NftablesDataplane, Value, engine};
pub use proxier_core::in_full;
use proxier_core::{
    Family, Update,
    engine::Engine,
    model::{DetectLocal, NodeEnv, NodePortAddresses},
};
use proxier_netlink::NetNs;
use proxier_testkit::backend;
pub use proxier_testkit::backend::{assert_consistent, assert_same, store, sync};

pub type TestEngine = Engine<Nftables, NftablesDataplane>;
pub type Objects = BTreeMap<Key, Value>;

/// The node of the worlds.
pub fn env() -> NodeEnv {
    NodeEnv {
        service_cidrs: ["10.96.0.0/12", "fd41:97::/64"].map(|net| net.parse().unwrap()).into(),
        ..backend::node()
    }
}

/// The same node with every setting that changes rules set otherwise.
pub fn other_env() -> NodeEnv {
    NodeEnv {
        detect_local: DetectLocal::InterfaceNamePrefix("veth".to_owned()),
        node_port_addresses: NodePortAddresses::Inside(vec!["172.16.0.0/12".parse().unwrap()]),
        localhost_node_ports: false,
        service_cidrs: Vec::new(),
        ..env()
    }
}

/// A node that cannot tell pods, and masquerades everything.
pub fn blind_env() -> NodeEnv {
    NodeEnv { detect_local: DetectLocal::None, masquerade_all: true, ..env() }
}

/// A world with a Service of each kind.
pub const EVERYTHING: &str = include_str!("../golden/everything.yaml");

/// A namespace of its own for a test.
pub struct Ns(pub NetNs);

impl Ns {
    pub fn new() -> Self {
        Self(NetNs::create().expect("a network namespace: tests need root"))
    }

    pub fn engine(&self) -> TestEngine {
        self.engine_with(Config::default())
    }

    pub fn engine_with(&self, config: Config) -> TestEngine {
        engine(config, &self.0, &Family::ALL).expect("an engine")
    }

    /// Runs a program inside; returns its output.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        self.feed(program, args, "")
    }

    /// Runs a program inside with some input; returns its output.
    pub fn feed(&self, program: &str, args: &[&str], input: &str) -> String {
        backend::run(&self.0, program, args, input)
    }

    /// What `nft` lists.
    pub fn ruleset(&self) -> String {
        self.run("nft", &["list", "ruleset"])
    }
}

/// The same state under a later number.
pub fn at(update: Update, revision: u64) -> Update {
    match update {
        Update::Reset { node, fragments, .. } => {
            Update::Reset { revision: proxier_core::Revision(revision), node, fragments }
        }
        other @ Update::Delta { .. } => other,
    }
}

//! What the tests of this crate share: worlds, namespaces, and the tools that look at them.
#![allow(dead_code, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Command, Stdio},
};

use proxier_backend_nftables::{Config, Key, Nftables, NftablesDataplane, Value, engine};
use proxier_core::{
    Family, Proxier, SyncReport, Update,
    engine::Engine,
    manifest::Manifest,
    model::{DetectLocal, Event, NodeEnv, NodePortAddresses, Store},
    spi::Dataplane,
};
use proxier_netlink::NetNs;

pub type TestEngine = Engine<Nftables, NftablesDataplane>;
pub type Objects = BTreeMap<Key, Value>;

/// The node of the worlds.
pub fn env() -> NodeEnv {
    let nets = ["10.61.0.0/16", "fd41:61::/32"].map(|net| net.parse().unwrap());
    let addresses = ["127.0.0.1", "172.20.7.11", "::1", "fd41:7::11"];
    NodeEnv {
        name: "tern".to_owned(),
        ips: ["172.20.7.11", "fd41:7::11"].map(|ip| ip.parse().unwrap()).into(),
        interface_addresses: addresses.map(|ip| ip.parse().unwrap()).into(),
        detect_local: DetectLocal::ClusterCidr(nets.into()),
        service_cidrs: ["10.96.0.0/12", "fd41:97::/64"].map(|net| net.parse().unwrap()).into(),
        ..NodeEnv::default()
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

/// A store with the objects of manifests, and its first update.
pub fn store(env: NodeEnv, yaml: &str) -> (Store, Update) {
    let manifest = Manifest::parse("world.yaml", yaml);
    let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
    assert!(problems.is_empty(), "{problems:?}");
    let mut store = Store::new(env);
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
    let update = store.take().expect("a first update");
    (store, update)
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
        let output = self
            .0
            .run(|| {
                let mut child = Command::new(program)
                    .args(args)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap_or_else(|error| panic!("{program}: {error}"));
                child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
                child.wait_with_output().unwrap()
            })
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What `nft` lists.
    pub fn ruleset(&self) -> String {
        self.run("nft", &["list", "ruleset"])
    }
}

/// Syncs and expects everything to be programmed.
pub async fn sync(engine: &mut TestEngine, update: Update) -> SyncReport {
    let report = engine.sync(update).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(report.degraded, [], "nothing is degraded");
    assert_eq!(report.warnings, [] as [String; 0], "no warnings");
    assert_consistent(engine).await;
    report
}

/// The kernel holds what the engine believes.
pub async fn assert_consistent(engine: &mut TestEngine) {
    for family in Family::ALL {
        let predicted = engine.predicted(family);
        let actual = engine.dataplane_mut().dump(family).await.expect("a dump");
        assert_same(&predicted, &actual);
    }
}

pub fn assert_same(predicted: &Objects, actual: &Objects) {
    for (key, value) in predicted {
        let found = actual.get(key).unwrap_or_else(|| panic!("missing: {key}"));
        assert_eq!(found, value, "{key}\nis\n{found}\nand should be\n{value}");
    }
    for key in actual.keys() {
        assert!(predicted.contains_key(key), "unexpected: {key}");
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
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

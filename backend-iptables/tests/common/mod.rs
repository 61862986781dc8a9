//! What the tests of this crate share: worlds, namespaces, and the tools that look at them.
#![allow(dead_code, unused_imports, reason = "each test binary uses some of it")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use proxier_backend_iptables::{Config, Iptables, IptablesDataplane, Key, Value, engine};
pub use proxier_core::in_full;
use proxier_core::{
    Family, ObjectName,
    engine::Engine,
    model::{DetectLocal, Event, NodeEnv, NodePortAddresses, ObjectKey},
    spi::Dataplane,
};
use proxier_netlink::NetNs;
use proxier_testkit::backend;
pub use proxier_testkit::backend::{assert_consistent, assert_same, node as env, store, sync};

pub type TestEngine = Engine<Iptables, IptablesDataplane>;
type Objects = BTreeMap<Key, Value>;

/// The same node with every setting that changes rules set otherwise.
pub fn other_env() -> NodeEnv {
    NodeEnv {
        detect_local: DetectLocal::InterfaceNamePrefix("veth".to_owned()),
        node_port_addresses: NodePortAddresses::Inside(vec!["172.16.0.0/12".parse().unwrap()]),
        localhost_node_ports: false,
        ..env()
    }
}

/// A node that cannot tell pods, and masquerades everything.
pub fn blind_env() -> NodeEnv {
    NodeEnv { detect_local: DetectLocal::None, masquerade_all: true, ..env() }
}

/// The world with one Service for each form of rule.
pub const EVERYTHING: &str = include_str!("../golden/everything/world.yaml");
/// The worked example.
pub const WORKED_EXAMPLE: &str = include_str!("../golden/worked-example/world.yaml");

/// A namespace of its own for a test.
pub struct Ns(pub NetNs);

impl Ns {
    pub fn new() -> Self {
        Self(NetNs::create().expect("a network namespace: tests need root"))
    }

    pub fn engine(&self) -> TestEngine {
        self.engine_with(Config::default())
    }

    /// One that writes what kube-proxy writes, to the byte.
    pub fn exact_engine(&self) -> TestEngine {
        self.engine_with(Config::default().exact(true))
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

    /// The rules of a table as the tool lists them, by chain.
    pub fn listing(&self, family: Family, table: &str) -> Vec<String> {
        let text = self.run(tool(family), &["-t", table, "-S"]);
        text.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }
}

pub const fn tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-nft",
        Family::V6 => "ip6tables-nft",
    }
}

/// The rules of a family's objects in a table, as `iptables -S` would list them, sorted.
pub fn rules_of(objects: &Objects, table: &str) -> Vec<String> {
    let mut rules: Vec<_> = objects
        .iter()
        .filter(|(key, _)| key.to_string().split(' ').nth(2) == Some(table))
        .flat_map(|(key, value)| key.listing(value))
        .collect();
    rules.sort();
    rules
}

/// Rules as bags of words, sorted: equal when the rules say the same in another order.
pub fn in_any_order(rules: &[String]) -> Vec<Vec<String>> {
    let bag = |rule: &String| {
        let mut words: Vec<_> = rule.split(' ').map(str::to_owned).collect();
        words.sort_unstable();
        words
    };
    let mut all: Vec<_> = rules.iter().map(bag).collect();
    all.sort();
    all
}

/// A namespace that holds these addresses and reaches the cluster IPs.
pub fn ns_with(addresses: &[&str]) -> Ns {
    let ns = Ns::new();
    ns.run("ip", &["link", "set", "lo", "up"]);
    for addr in addresses {
        ns.run("ip", &["address", "add", addr, "dev", "lo"]);
    }
    ns.run("ip", &["route", "add", "10.97.0.0/16", "dev", "lo"]);
    ns
}

/// Programs the worked example and opens connections to a Service of it: they reach one endpoint, as
/// it has session affinity, and none when no endpoint is left.
pub async fn connections_follow<D: Dataplane<Iptables>>(ns: &Ns, engine: &mut Engine<Iptables, D>) {
    let (mut store, update) = store(env(), WORKED_EXAMPLE);
    sync(engine, update).await;
    for addr in ["10.61.3.32:9000", "10.61.4.32:9000"] {
        let listener = ns.0.run(|| TcpListener::bind(addr)).unwrap().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                stream.write_all(addr.as_bytes()).ok();
            }
        });
    }
    let ask = || -> std::io::Result<String> {
        let addr: SocketAddr = "10.97.1.11:80".parse().unwrap();
        let connected = ns.0.run(|| TcpStream::connect_timeout(&addr, Duration::from_secs(2)));
        let mut text = String::new();
        connected.unwrap()?.read_to_string(&mut text)?;
        Ok(text)
    };
    let first = ask().unwrap();
    for _ in 0..20 {
        assert_eq!(ask().unwrap(), first);
    }
    let slice = ObjectKey::EndpointSlice(ObjectName::new("edge", "near-1"));
    store.apply(Event::Delete(slice));
    sync(engine, store.take().unwrap()).await;
    assert!(ask().is_err(), "nobody is left to answer");
}

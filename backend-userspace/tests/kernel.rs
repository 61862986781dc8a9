//! The real kernel, and nft and ip as witnesses. Each test has a network namespace of its own.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

use proxier_backend_userspace::{
    Capture, Config, Key, Listen, Method, Userspace, UserspaceDataplane, Value, engine, probe,
};
use proxier_core::{
    Family, Proxier, SyncReport,
    engine::Engine,
    model::{DetectLocal, NodeEnv, NodePortAddresses, Store},
};
use proxier_netlink::NetNs;
use proxier_testkit::backend::{self, node as env};

type TestEngine = Engine<Userspace, UserspaceDataplane>;

const EVERYTHING: &str = include_str!("everything.yaml");

struct Ns(NetNs);

impl Ns {
    fn new() -> Self {
        let ns = Self(NetNs::create().expect("a network namespace: tests need root"));
        ns.run("ip link set lo up");
        ns
    }

    fn engine(&self) -> TestEngine {
        self.engine_with(Method::Auto)
    }

    fn engine_with(&self, method: Method) -> TestEngine {
        let listen = Listen::Capture(Capture { method, ..Capture::default() });
        let config = Config { listen, ..Config::default() };
        engine(&config, &self.0, &Family::ALL).expect("an engine")
    }

    fn run(&self, line: &str) -> String {
        backend::run(&self.0, "sh", &["-c", line], "")
    }

    /// Everything of the kernel that the mode could change.
    fn state(&self) -> String {
        self.run(
            "nft list ruleset; ip rule; ip -6 rule; ip route show table all; \
             ip -6 route show table all",
        )
    }
}

fn world(env: NodeEnv) -> Store {
    let (store, _) = backend::store(env, EVERYTHING);
    store
}

async fn sync(engine: &mut TestEngine, store: &Store) -> SyncReport {
    backend::sync(engine, store.reset()).await
}

#[tokio::test]
async fn what_is_synced_is_what_is_read_back_and_nft_can_load_it() {
    read_back(Method::Tproxy, ["tproxy to 127.0.0.1:", "tproxy to [::1]:"]).await;
}

#[tokio::test]
async fn so_it_is_where_traffic_is_redirected() {
    read_back(Method::Redirect, ["dnat to 172.20.7.11:", "dnat to [fd41:7::11]:"]).await;
}

async fn read_back(method: Method, leads: [&str; 2]) {
    let listed = vec!["172.16.0.0/12".parse().unwrap(), "127.0.0.0/8".parse().unwrap()];
    let other = NodeEnv {
        detect_local: DetectLocal::InterfaceNamePrefix("veth".to_owned()),
        node_port_addresses: NodePortAddresses::Inside(listed),
        ..env()
    };
    let odd = vec!["10.61.0.0/13".parse().unwrap(), "fd41:60::/27".parse().unwrap()];
    let blind = NodeEnv { detect_local: DetectLocal::None, localhost_node_ports: false, ..env() };
    let interface = DetectLocal::BridgeInterface("cni0".to_owned());
    let ns = Ns::new();
    let before = ns.state();
    let mut engine = ns.engine_with(method);
    let worlds = [
        env(),
        other,
        NodeEnv { detect_local: DetectLocal::ClusterCidr(odd), ..env() },
        NodeEnv { detect_local: interface, ..env() },
        blind,
    ];
    for env in worlds {
        sync(&mut engine, &world(env)).await;
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
        // nft prints what it can read.
        let text = ns.run("nft list ruleset");
        ns.run("nft list ruleset > $$.nft && nft -c -f $$.nft && rm $$.nft");
        assert!(leads.iter().all(|lead| text.contains(lead)), "{text}");
    }
    let again = sync(&mut engine, &world(env())).await;
    assert!(again.ops.total() > 0);
    engine.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
    sync(&mut engine, &world(env())).await;
    engine.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn the_next_process_takes_over_with_its_own_listeners_only() {
    let ns = Ns::new();
    let before = ns.state();
    let store = world(env());
    let mut first = ns.engine();
    sync(&mut first, &store).await;
    let mut second = ns.engine();
    let report = sync(&mut second, &store).await;
    let kernel = |key: &&Key| !matches!(key, Key::Route(_) | Key::Service(_));
    let of_process = Family::ALL.into_iter().flat_map(|it| second.predicted(it).into_keys());
    let of_process = of_process.filter(|key| !kernel(&key)).count();
    assert_eq!((report.ops.add, report.ops.set, report.ops.del), (of_process, 6, 0));
    drop((first, second));
    // One that never synced cleans up after both.
    ns.engine().cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn another_method_takes_over_from_either() {
    let ns = Ns::new();
    let before = ns.state();
    let unknown = NodeEnv { interface_addresses: Vec::new(), ..env() };
    for method in [Method::Tproxy, Method::Redirect, Method::Tproxy, Method::Redirect] {
        let mut engine = ns.engine_with(method);
        // The table has chains of another kind: it is made anew, and what was there before is gone.
        let store = world(unknown.clone());
        if engine.sync(store.reset()).await.is_err() {
            engine.sync(store.reset()).await.unwrap();
        }
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
        let (text, redirects) = (ns.state(), method == Method::Redirect);
        assert_eq!(text.contains("tproxy to"), !redirects, "{text}");
        assert_eq!(text.contains("redirect to :"), redirects, "{text}");
        assert_eq!(text.contains("lookup 29520"), !redirects, "{text}");
    }
    ns.engine().cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn what_others_break_is_repaired_and_counted() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, &world(env())).await;
    let table = "ip proxier-userspace";
    for (breaking, drift) in [
        (format!("nft flush chain {table} capture-pod"), 1),
        (format!("nft delete element {table} frontends '{{ 10.97.0.21 . tcp . 80 }}'"), 1),
        (format!("nft add chain {table} stray; nft add rule {table} stray counter"), 1),
        ("ip rule del priority 90".to_owned(), 1),
        ("ip -6 route flush table 29520".to_owned(), 1),
        (format!("nft insert rule {table} output accept"), 1),
    ] {
        ns.run(&breaking);
        let report = engine.audit().await.unwrap();
        assert_eq!(report.drift, drift, "{breaking}");
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0, "{breaking}");
    }
    ns.run(&format!("nft delete table {table}"));
    assert!(engine.audit().await.unwrap().drift > 50);
    assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
    // A set of another shape cannot be changed: the table is made anew.
    ns.run(&format!(
        "nft delete table {table}; nft add table {table}; \
         nft add set {table} frontends '{{ type ipv4_addr; }}'"
    ));
    engine.audit().await.unwrap();
    assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
}

#[tokio::test]
async fn two_instances_share_a_namespace() {
    let ns = Ns::new();
    let before = ns.state();
    let mut one = ns.engine();
    let capture = Capture {
        method: Method::Auto,
        table: "other".to_owned(),
        mark_bit: 15,
        routing_table: 29_521,
        rule_priority: 91,
    };
    let config = Config { listen: Listen::Capture(capture), ..Config::default() };
    let mut two = engine(&config, &ns.0, &Family::ALL).unwrap();
    sync(&mut one, &world(env())).await;
    let alone = ns.state();
    sync(&mut two, &world(env())).await;
    two.cleanup().await.unwrap();
    assert_eq!(ns.state(), alone);
    assert_eq!(one.audit().await.unwrap().ops.total(), 0);
    one.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn probing_says_yes_and_leaves_nothing() {
    let ns = Ns::new();
    let before = ns.state();
    for method in [Method::Auto, Method::Redirect, Method::Tproxy] {
        let found = probe(&ns.0, method, &Family::ALL).await;
        assert!(found.available, "{found:?}");
        assert_eq!(found.reasons.is_empty(), method != Method::Redirect, "{found:?}");
        assert_eq!(ns.state(), before);
    }
}

#[tokio::test]
async fn kernel_objects_do_not_depend_on_the_number_of_services() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, &world(env())).await;
    let all = engine.predicted(Family::V4);
    let rules = all.values().map(|it| if let Value::Chain(it) = it { it.rules.len() } else { 0 });
    assert_eq!(rules.sum::<usize>(), 78);
}

//! x_tables, through iptables-legacy's programs, which are also the witness.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use common::*;
use proptest::{collection::vec, prelude::*};
use proxier_backend_iptables::{
    Config, Iptables, Layout, LegacyDataplane, legacy_engine, probe_legacy,
};
use proxier_core::{
    Family, Proxier, SyncReport, Update,
    engine::Engine,
    model::{Event, NodeEnv, Store},
    spi::{Backend, CommitError, Dataplane, ErrorKind, Op, Stage},
    testing::generate,
};

type LegacyEngine = Engine<Iptables, LegacyDataplane>;

fn open(ns: &Ns, config: Config) -> LegacyEngine {
    legacy_engine(config, &ns.0, &Family::ALL).unwrap_or_else(|error| panic!("{}", in_full(&error)))
}

const fn tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-legacy",
        Family::V6 => "ip6tables-legacy",
    }
}

/// The rules of a table as the tool lists them, without our mark.
fn listing(ns: &Ns, family: Family, table: &str) -> Vec<String> {
    let text = ns.run(tool(family), &["-t", table, "-S"]);
    let rules = text.lines().filter(|line| line.starts_with("-A"));
    let bare =
        |rule: &str| rule.replace(" -m comment --comment proxier", "").replace(" (proxier)", "");
    rules.map(bare).collect()
}

async fn sync(engine: &mut LegacyEngine, update: Update) -> SyncReport {
    let report = engine.sync(update).await.unwrap_or_else(|error| panic!("{}", in_full(&error)));
    assert_eq!(report.degraded, [], "nothing is degraded");
    assert_consistent(engine).await;
    report
}

/// The kernel holds what the engine believes.
async fn assert_consistent(engine: &mut LegacyEngine) {
    for family in Family::ALL {
        let predicted = engine.predicted(family);
        let actual = engine.dataplane_mut().dump(family).await.expect("a dump");
        assert_same(&predicted, &actual);
    }
}

fn assert_clean(ns: &Ns) {
    for (family, table) in
        Family::ALL.into_iter().flat_map(|family| [(family, "nat"), (family, "filter")])
    {
        let text = ns.run(tool(family), &["-t", table, "-S"]);
        let foreign = text.lines().filter(|line| !line.starts_with("-P"));
        assert_eq!(foreign.collect::<Vec<_>>(), Vec::<&str>::new(), "{family} {table}");
    }
}

#[tokio::test]
async fn the_tool_lists_what_plans_show() {
    let worlds = [
        (env(), Layout::Tree),
        (env(), Layout::KubeProxy),
        (other_env(), Layout::Tree),
        (blind_env(), Layout::Tree),
    ];
    for (env, layout) in worlds {
        let ns = Ns::new();
        let config = Config::default().layout(layout);
        let mut engine = open(&ns, config.clone());
        let (store, update) = store(env, EVERYTHING);
        sync(&mut engine, update).await;
        for family in Family::ALL {
            for table in ["nat", "filter"] {
                let mut listed = listing(&ns, family, table);
                listed.sort();
                assert_eq!(listed, rules_of(&engine.predicted(family), table), "{family} {table}");
            }
        }
        let report = sync(&mut open(&ns, config), store.reset()).await;
        assert_eq!(report.ops.total(), 0, "a restart changes nothing");
        engine.cleanup().await.unwrap();
        assert_clean(&ns);
    }
}

#[tokio::test]
async fn jumps_and_services_stand_in_the_order_people_know() {
    let (ns, nft) = (Ns::new(), Ns::new());
    let config = Config::default().layout(Layout::KubeProxy).exact(true);
    let (store, update) = store(env(), EVERYTHING);
    sync(&mut open(&ns, config.clone()), update).await;
    common::sync(&mut nft.engine_with(config), store.reset()).await;
    for (family, table) in
        Family::ALL.into_iter().flat_map(|family| [(family, "nat"), (family, "filter")])
    {
        let by_chain = |mut rules: Vec<String>| {
            // Chains are listed in an order of each tool's own; rules of a chain are not.
            rules.sort_by_key(|rule| rule.split(' ').nth(1).map(str::to_owned));
            rules
        };
        let legacy = by_chain(listing(&ns, family, table));
        assert_eq!(legacy, by_chain(nft.listing(family, table)), "{family} {table}");
    }
}

#[tokio::test]
async fn what_others_did_is_repaired() {
    let ns = Ns::new();
    let mut engine = open(&ns, Config::default());
    let (_, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let nat = |args: &[&str]| ns.run("iptables-legacy", &[&["-t", "nat"], args].concat());
    let before = listing(&ns, Family::V4, "nat");
    nat(&["-F", "KUBE-POSTROUTING"]);
    nat(&["-D", "KUBE-SERVICES", "1"]);
    nat(&["-I", "KUBE-SERVICES", "-d", "10.9.9.9", "-j", "RETURN"]);
    nat(&["-A", "KUBE-SERVICES", "-m", "length", "--length", "10:20", "-j", "RETURN"]);
    nat(&["-A", "KUBE-MARK-MASQ", "-j", "RETURN"]);
    let report = engine.audit().await.unwrap();
    assert!(report.drift >= 5, "{report:?}");
    assert_consistent(&mut engine).await;
    let sorted = |mut rules: Vec<String>| {
        rules.sort();
        rules
    };
    assert_eq!(sorted(listing(&ns, Family::V4, "nat")), sorted(before));
    let services = nat(&["-S", "KUBE-SERVICES"]);
    assert!(services.lines().last().unwrap().contains("NOTE: this must be the last rule"));

    // Everything flushed, as a firewall's restart does.
    nat(&["-F"]);
    nat(&["-X"]);
    assert!(engine.audit().await.unwrap().drift > 50);
    assert_consistent(&mut engine).await;
}

#[tokio::test]
async fn rules_of_others_stay() {
    let ns = Ns::new();
    let foreign = "*filter\n:KUBE-FIREWALL - [0:0]\n:THEIRS - [0:0]\n-A INPUT -j KUBE-FIREWALL\n\
                   -A KUBE-FIREWALL -d 192.0.2.9/32 -j DROP\n-A FORWARD -j THEIRS\nCOMMIT\n";
    ns.feed("iptables-legacy-restore", &["--noflush"], foreign);
    let before = ns.run("iptables-legacy", &["-S"]);
    let mut engine = open(&ns, Config::default());
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let rules = listing(&ns, Family::V4, "filter");
    assert!(rules.iter().any(|it| it == "-A KUBE-FIREWALL -d 192.0.2.9/32 -j DROP"), "{rules:?}");
    assert!(rules.iter().any(|it| it.contains("block incoming localnet")), "{rules:?}");
    // Without node ports on localhost the guard goes, and kubelet's rule does not.
    store.apply(Event::Node(Box::new(other_env())));
    sync(&mut engine, store.take().unwrap()).await;
    let rules = listing(&ns, Family::V4, "filter");
    assert!(rules.iter().any(|it| it == "-A KUBE-FIREWALL -d 192.0.2.9/32 -j DROP"), "{rules:?}");
    assert!(!rules.iter().any(|it| it.contains("block incoming localnet")), "{rules:?}");
    store.apply(Event::Node(Box::new(env())));
    sync(&mut engine, store.take().unwrap()).await;
    engine.cleanup().await.unwrap();
    assert_eq!(ns.run("iptables-legacy", &["-S"]), before);
}

#[tokio::test]
async fn chains_of_a_kube_proxy_are_refused_or_taken_over() {
    let ns = Ns::new();
    let theirs = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                  -A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000\nCOMMIT\n";
    ns.feed("iptables-legacy-restore", &["--noflush"], theirs);
    let (store, update) = store(env(), EVERYTHING);
    let mut engine = open(&ns, Config::default());
    let error = engine.sync(update).await.unwrap_err();
    assert!(in_full(&error).contains("belongs to somebody else"), "{}", in_full(&error));
    sync(&mut open(&ns, Config::default().takeover(true)), store.reset()).await;
}

#[tokio::test]
async fn what_is_refused_is_named_and_nothing_of_it_is_done() {
    let ns = Ns::new();
    let mut engine = open(&ns, Config::default());
    let (_, update) = store(env(), WORKED_EXAMPLE);
    let Update::Reset { node, .. } = &update else { panic!("a reset") };
    let backend = Iptables::new(Config::default()).unwrap();
    let mut ops: Vec<_> = backend
        .skeleton(Family::V4, node)
        .into_iter()
        .filter(|(key, _)| !key.to_string().starts_with("chain ip nat KUBE-MARK-MASQ"))
        .map(|(key, value)| Op::Add(key, value))
        .collect();
    ops.sort_by_key(|op| backend.stage(op.key()));
    engine.dataplane_mut().dump(Family::V4).await.unwrap();
    // The first jump leads to a chain that is not there.
    let bad = ops.iter().position(|op| backend.stage(op.key()) == Stage::Entry).unwrap();
    ops.retain(|op| !op.key().to_string().ends_with("filter KUBE-EXTERNAL-SERVICES"));
    let error = engine.dataplane_mut().commit(Family::V4, &ops).await.unwrap_err();
    let CommitError::Refused { op: Some(op), object, kind, .. } = &error else {
        panic!("{}", in_full(&error))
    };
    assert!(*op >= bad - 1, "{op}");
    assert!(object.contains("INPUT") || object.contains("FORWARD"), "{object}");
    // The tool takes a chain that is not there for a target that it does not have.
    assert_eq!(*kind, ErrorKind::Unsupported);
    assert_clean(&ns);
}

#[tokio::test]
async fn the_probe_warns_of_both_worlds() {
    let ns = Ns::new();
    let found = probe_legacy(&ns.0).await;
    assert!(found.available, "{found:?}");
    assert_eq!(found.families, Family::ALL);
    assert_eq!(found.warnings, [] as [String; 0]);
    ns.run("iptables-nft", &["-A", "INPUT", "-d", "192.0.2.9", "-j", "DROP"]);
    let found = probe_legacy(&ns.0).await;
    assert!(found.warnings.iter().any(|it| it.contains("ip filter")), "{found:?}");
}

#[tokio::test]
async fn connections_reach_an_endpoint() {
    let ns = ns_with(&["10.61.3.32", "10.61.4.32"]);
    connections_follow(&ns, &mut open(&ns, Config::default())).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_holds_what_any_history_says(history in vec(generate::burst(), 1..6)) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let ns = Ns::new();
            let mut engine = open(&ns, Config::default());
            let mut store = Store::new(NodeEnv::default());
            store.apply(Event::Services(Vec::new()));
            store.apply(Event::EndpointSlices(Vec::new()));
            sync(&mut engine, store.take().unwrap()).await;
            for burst in history {
                for event in burst {
                    store.apply(event);
                }
                if let Some(update) = store.take() {
                    sync(&mut engine, update).await;
                }
            }
            let report = sync(&mut open(&ns, Config::default()), store.reset()).await;
            assert_eq!(report.ops.total(), 0, "a restart changes nothing");
            engine.cleanup().await.unwrap();
            assert_clean(&ns);
        });
    }
}

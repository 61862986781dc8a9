//! The real kernel, and iptables as witness. Each test has a network namespace of its own.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use common::*;
use proxier_backend_iptables::{Config, Iptables, IptablesDataplane, Layout, probe};
use proxier_core::{
    Family, Proxier, SyncReport, Update,
    model::{Event, NodeEnv, ObjectKey},
    spi::{Backend, CommitError, Dataplane, ErrorKind, Op, Stage},
};

#[tokio::test]
async fn what_is_synced_is_what_is_read_back() {
    for env in [env(), other_env(), blind_env()] {
        let ns = Ns::new();
        let mut engine = ns.engine();
        let (_, update) = store(env, EVERYTHING);
        let report = sync(&mut engine, update).await;
        assert!(report.ops.add > 100, "{report:?}");
    }
}

#[tokio::test]
async fn iptables_lists_what_plans_show() {
    for env in [env(), other_env(), blind_env()] {
        let ns = Ns::new();
        let mut engine = ns.exact_engine();
        let (_, update) = store(env, EVERYTHING);
        sync(&mut engine, update).await;
        for family in Family::ALL {
            for table in ["nat", "filter"] {
                let mut listed = ns.listing(family, table);
                listed.sort();
                assert_eq!(listed, rules_of(&engine.predicted(family), table), "{family} {table}");
            }
        }
    }
}

#[tokio::test]
async fn comments_kept_with_rules_are_listed_behind_the_other_matches() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    for family in Family::ALL {
        for table in ["nat", "filter"] {
            let listed = in_any_order(&ns.listing(family, table));
            let planned = in_any_order(&rules_of(&engine.predicted(family), table));
            assert_eq!(listed, planned, "{family} {table}");
        }
    }
    // Rules of either form are taken for what they say.
    assert_eq!(sync(&mut ns.exact_engine(), store.reset()).await.ops.total(), 0);
}

#[tokio::test]
async fn jumps_stand_in_the_order_people_know() {
    let ns = Ns::new();
    ns.run("iptables-nft", &["-A", "FORWARD", "-i", "eth9", "-j", "DROP"]);
    let mut engine = ns.engine();
    let (_, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let targets = |chain: &str| -> Vec<String> {
        let listing = ns.run("iptables-nft", &["-S", chain]);
        let rules = listing.lines().filter(|line| line.starts_with("-A"));
        rules.map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect()
    };
    let forward = ["PROXY-FIREWALL", "FORWARD", "SERVICES", "EXTERNAL-SERVICES"];
    let mut forward: Vec<_> = forward.iter().map(|it| format!("KUBE-{it}")).collect();
    forward.push("DROP".to_owned());
    assert_eq!(targets("FORWARD"), forward);
    let input = ["FIREWALL", "PROXY-FIREWALL", "NODEPORTS", "EXTERNAL-SERVICES"];
    assert_eq!(targets("INPUT"), input.map(|it| format!("KUBE-{it}")));
    assert_eq!(
        targets("OUTPUT"),
        ["FIREWALL", "PROXY-FIREWALL", "SERVICES"].map(|it| format!("KUBE-{it}"))
    );
}

#[tokio::test]
async fn services_stand_in_order_and_node_ports_last() {
    let ns = Ns::new();
    let mut engine = ns.engine_with(Config::default().layout(Layout::KubeProxy));
    let (mut store, update) = store(other_env(), EVERYTHING);
    sync(&mut engine, update).await;
    let rules = |ns: &Ns| -> Vec<String> {
        let listing = ns.run("iptables-nft", &["-t", "nat", "-S", "KUBE-SERVICES"]);
        let comments = listing.lines().filter_map(|line| line.split('"').nth(1));
        comments.map(str::to_owned).collect()
    };
    let before = rules(&ns);
    assert!(before.last().unwrap().starts_with("kubernetes service nodeports"));
    let services = &before[..before.len() - 1];
    assert!(services.is_sorted(), "{services:?}");
    // A newcomer goes before the node ports, and the node's addresses change at the end.
    store.apply(Event::Delete(ObjectKey::Service(proxier_core::ObjectName::new("edge", "wide"))));
    store.apply(Event::Node(Box::new(env())));
    let report = sync(&mut engine, store.take().unwrap()).await;
    assert!(report.ops.del > 0);
    assert!(rules(&ns).last().unwrap().starts_with("kubernetes service nodeports"));
}

#[tokio::test]
async fn rules_are_counted_by_table() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    // How many a sync wrote; how many there are has to be what iptables lists.
    let written = |report: &SyncReport| {
        let tables =
            Family::ALL.into_iter().flat_map(|family| ["nat", "filter"].map(|it| (family, it)));
        let each = tables.map(|(family, table)| {
            let count = report.rules.of(family)[table];
            assert_eq!(count.there, ns.listing(family, table).len(), "{family} {table}");
            count.written
        });
        each.sum::<usize>()
    };
    let all = written(&sync(&mut engine, update).await);
    assert!(all > 100, "{all}");
    store.apply(Event::Delete(ObjectKey::Service(proxier_core::ObjectName::new("edge", "wide"))));
    assert_eq!(written(&sync(&mut engine, store.take().unwrap()).await), 0);
    store.apply(Event::Node(Box::new(other_env())));
    let changed = written(&sync(&mut engine, store.take().unwrap()).await);
    assert!((1..all).contains(&changed), "{changed} of {all}");
    // Somebody takes some away, and they are written again.
    ns.run("iptables-nft", &["-t", "nat", "-F", "KUBE-POSTROUTING"]);
    assert_eq!(written(&engine.audit().await.unwrap()), 3);
    assert_eq!(written(&sync(&mut ns.engine(), store.reset()).await), 0);
}

#[tokio::test]
async fn a_restart_changes_nothing() {
    for env in [env(), other_env()] {
        let ns = Ns::new();
        let (store, update) = store(env, EVERYTHING);
        sync(&mut ns.engine(), update).await;
        let before = ns.run("nft", &["list", "ruleset"]);
        let report = sync(&mut ns.engine(), store.reset()).await;
        assert_eq!(report.ops.total(), 0, "{report:?}");
        assert_eq!(ns.run("nft", &["list", "ruleset"]), before);
    }
}

#[tokio::test]
async fn settings_of_the_node_change_in_place() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    for env in [other_env(), blind_env(), env()] {
        store.apply(Event::Node(Box::new(env)));
        sync(&mut engine, store.take().unwrap()).await;
    }
}

#[tokio::test]
async fn an_audit_repairs_what_others_did() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (_, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    assert_eq!(engine.audit().await.unwrap().drift, 0);

    let nat = |args: &[&str]| {
        let all: Vec<_> = ["-t", "nat"].iter().chain(args).copied().collect();
        ns.run("iptables-nft", &all);
    };
    let svc = "KUBE-SVC-QDFYEKLMT6VVGSSH";
    let home = proxier_backend_iptables::names::service_chain(
        "KUBE",
        proxier_backend_iptables::names::ServiceChain::Local,
        "shop/home:web",
        proxier_core::Protocol::Tcp,
    );
    nat(&["-F", "KUBE-POSTROUTING"]);
    nat(&["-D", "PREROUTING", "1"]);
    nat(&["-D", "KUBE-SERVICES", "2"]);
    nat(&["-F", home.as_str()]);
    nat(&["-I", "KUBE-SERVICES", "-d", "10.9.9.9", "-j", "RETURN"]);
    nat(&["-I", "KUBE-SERVICES", "-m", "length", "--length", "10:20", "-j", "RETURN"]);
    nat(&["-N", svc]);
    nat(&["-A", "KUBE-MARK-MASQ", "-j", "RETURN"]);
    // Not our business.
    nat(&["-A", "OUTPUT", "-d", "10.8.8.8", "-j", "RETURN"]);
    nat(&["-N", "USERS-OWN"]);
    let report = engine.audit().await.unwrap();
    assert_eq!((report.drift, report.degraded), (8, Vec::new()));
    assert_consistent(&mut engine).await;
    let listing = ns.run("iptables-nft", &["-t", "nat", "-S"]);
    assert!(listing.contains("10.8.8.8") && listing.contains("USERS-OWN"), "{listing}");
    assert!(!listing.contains("10.9.9.9") && !listing.contains(svc), "{listing}");
    assert_eq!(engine.audit().await.unwrap().drift, 0);
}

#[tokio::test]
async fn rules_that_must_be_last_are_put_back_there() {
    let ns = Ns::new();
    let mut engine = ns.engine_with(Config::default().exact(true).layout(Layout::KubeProxy));
    let (_, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let chain = ["-t", "nat", "-S", "KUBE-SERVICES"];
    let listing = ns.run("iptables-nft", &chain);
    let first = listing.lines().nth(1).unwrap().replace("-A", "-t nat -A").replace('"', "");
    let words: Vec<_> = first.split(" --comment ").collect();
    let (comment, rest) = words[1].split_once(" -m ").unwrap();
    let mut args: Vec<_> = words[0].split(' ').collect();
    args.extend(["--comment", comment, "-m"]);
    args.extend(rest.split(' '));
    ns.run("iptables-nft", &["-t", "nat", "-D", "KUBE-SERVICES", "1"]);
    ns.run("iptables-nft", &args);
    let report = engine.audit().await.unwrap();
    assert_eq!((report.drift, report.ops.set), (1, 1), "{report:?}");
    let listing = ns.run("iptables-nft", &chain);
    assert!(listing.lines().last().unwrap().contains("NOTE: this must be the last rule"));
    assert_consistent(&mut engine).await;
}

#[tokio::test]
async fn everything_flushed_is_written_again() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let before = ns.run("nft", &["list", "ruleset"]);
    ns.run("nft", &["flush", "ruleset"]);
    // Nobody told the engine; the next change finds out.
    store.apply(Event::Delete(ObjectKey::Service(proxier_core::ObjectName::new("shop", "void"))));
    sync(&mut engine, store.take().unwrap()).await;
    let without_void = ns.run("iptables-nft", &["-S", "KUBE-SERVICES"]);
    assert!(!without_void.contains("shop/void"));
    ns.run("nft", &["flush", "ruleset"]);
    engine.audit().await.unwrap();
    assert_consistent(&mut engine).await;
    assert!(before.len() > 1000);
}

/// Rules of others, of every kind, where ours are.
const OTHERS: &str = r#"
table ip nat {
    chain PREROUTING {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 192.0.2.1 dnat to 192.0.2.2
    }
    chain FOREIGN {
        ip saddr 10.0.0.1 return
    }
}
table ip filter {
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        ip daddr 192.0.2.1 accept
    }
    chain KUBE-FIREWALL {
        ip daddr 127.0.0.0/8 ip saddr != 127.0.0.0/8 drop
    }
    chain INPUT {
        type filter hook input priority filter; policy accept;
        jump KUBE-FIREWALL
    }
}
table inet other {
    chain c {
        type filter hook input priority 5; policy accept;
        counter
    }
}
"#;

#[tokio::test]
async fn cleaning_up_leaves_everything_as_it_was() {
    for others in ["", OTHERS] {
        let ns = Ns::new();
        ns.feed("nft", &["-f", "-"], others);
        let before = ns.run("nft", &["list", "ruleset"]);
        let mut engine = ns.engine();
        let (_, update) = store(env(), EVERYTHING);
        sync(&mut engine, update.clone()).await;
        let with_us = ns.run("nft", &["list", "ruleset"]);
        assert!(others.is_empty() || with_us.contains("policy drop"), "policies stay");
        // Leftovers of earlier versions, and jumps that others made to our chains.
        ns.run("iptables-nft", &["-t", "nat", "-N", "KUBE-SVC-AAAAAAAAAAAAAAAA"]);
        ns.run("iptables-nft", &["-t", "nat", "-A", "OUTPUT", "-j", "KUBE-SVC-AAAAAAAAAAAAAAAA"]);
        engine.cleanup().await.unwrap();
        assert_eq!(ns.run("nft", &["list", "ruleset"]), before);
        // Again, from another process, and the engine goes on afterwards.
        ns.engine().cleanup().await.unwrap();
        assert_eq!(ns.run("nft", &["list", "ruleset"]), before);
        sync(&mut engine, update).await;
        assert_eq!(ns.run("nft", &["list", "ruleset"]), with_us);
    }
}

#[tokio::test]
async fn what_others_put_into_our_tables_keeps_them() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (_, update) = store(env(), WORKED_EXAMPLE);
    sync(&mut engine, update).await;
    ns.run("iptables-nft", &["-t", "nat", "-A", "PREROUTING", "-d", "192.0.2.9", "-j", "ACCEPT"]);
    ns.run("iptables-nft", &["-A", "KUBE-FIREWALL", "-d", "192.0.2.9", "-j", "DROP"]);
    engine.cleanup().await.unwrap();
    let left = ns.run("iptables-nft", &["-t", "nat", "-S"]) + &ns.run("iptables-nft", &["-S"]);
    let rules: Vec<_> = left.lines().filter(|line| !line.starts_with("-P")).collect();
    assert_eq!(
        rules,
        [
            "-A PREROUTING -d 192.0.2.9/32 -j ACCEPT",
            "-N KUBE-FIREWALL",
            "-A KUBE-FIREWALL -d 192.0.2.9/32 -j DROP"
        ]
    );
    assert_eq!(ns.run("nft", &["list", "tables", "ip6"]), "");
}

#[tokio::test]
async fn kubelets_guard_stays_when_ours_goes() {
    let ns = Ns::new();
    ns.feed("nft", &["-f", "-"], OTHERS);
    let firewall = || ns.run("nft", &["list", "chain", "ip", "filter", "KUBE-FIREWALL"]);
    let before = firewall();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), WORKED_EXAMPLE);
    sync(&mut engine, update).await;
    assert!(firewall().contains("ct status dnat"), "{}", firewall());
    let unguarded = NodeEnv { localhost_node_ports: false, ..env() };
    store.apply(Event::Node(Box::new(unguarded.clone())));
    sync(&mut engine, store.take().unwrap()).await;
    assert_eq!(firewall(), before);
    assert_eq!(engine.audit().await.unwrap().drift, 0);

    // Where nobody else uses the chain it goes.
    let ns = Ns::new();
    let mut engine = ns.engine();
    store.apply(Event::Node(Box::new(env())));
    store.take();
    sync(&mut engine, store.reset()).await;
    assert!(ns.run("iptables-nft", &["-S"]).contains("-N KUBE-FIREWALL"));
    store.apply(Event::Node(Box::new(unguarded)));
    sync(&mut engine, store.take().unwrap()).await;
    assert!(!ns.run("iptables-nft", &["-S"]).contains("KUBE-FIREWALL"));
}

/// A little of what a kube-proxy leaves.
const KUBE_PROXY: &str = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
-A KUBE-POSTROUTING -m mark ! --mark 0x00004000/0x00004000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x00004000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-SERVICES -m comment --comment \"old/one cluster IP\" -m tcp -p tcp -d 10.97.9.9 --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
COMMIT
";

#[tokio::test]
async fn chains_of_a_kube_proxy_are_refused_or_taken_over() {
    let ns = Ns::new();
    ns.feed("iptables-nft-restore", &["--noflush"], KUBE_PROXY);
    let before = ns.run("nft", &["list", "ruleset"]);
    let (store, update) = store(env(), EVERYTHING);
    let mut engine = ns.engine();
    let error = engine.sync(update.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(
        in_full(&error),
        "reading IPv4 back: chain ip nat KUBE-SERVICES belongs to somebody else: it was made by \
         another proxier (kube-proxy?); stop that and clean up, choose another prefix, or set takeover"
    );
    assert_eq!(ns.run("iptables-nft", &["-t", "nat", "-S"]).matches("KUBE-MARK-MASQ").count(), 2);
    assert!(before.contains("KUBE-SVC-AAAAAAAAAAAAAAAA"));

    // Under another name both can be there.
    let mut other = ns.engine_with(Config::default().prefix("OTHER"));
    sync(&mut other, update.clone()).await;
    let listing = ns.run("iptables-nft", &["-t", "nat", "-S"]);
    assert!(listing.contains("old/one cluster IP") && listing.contains("-N OTHER-SERVICES"));
    other.cleanup().await.unwrap();
    ns.engine().cleanup().await.unwrap_or_else(|error| panic!("{}", in_full(&error)));
    ns.feed("iptables-nft-restore", &["--noflush"], KUBE_PROXY);

    let mut taker = ns.engine_with(Config::default().takeover(true));
    sync(&mut taker, update).await;
    let listing = ns.run("iptables-nft", &["-t", "nat", "-S"]);
    assert!(!listing.contains("AAAAAAAAAAAAAAAA"), "{listing}");
    assert_eq!(listing.matches("-A PREROUTING").count(), 1, "{listing}");
    // From now on it is ours.
    let report = sync(&mut ns.engine(), store.reset()).await;
    assert_eq!(report.ops.total(), 0);
}

#[tokio::test]
async fn two_proxiers_share_a_namespace() {
    let ns = Ns::new();
    let (_, update) = store(env(), EVERYTHING);
    let mut first = ns.engine();
    let mut second = ns.engine_with(Config::default().prefix("CUBE").masquerade_bit(15));
    sync(&mut first, update.clone()).await;
    sync(&mut second, update).await;
    assert_consistent(&mut first).await;
    assert_eq!(first.audit().await.unwrap().drift, 0);
    second.cleanup().await.unwrap();
    assert_consistent(&mut first).await;
    first.cleanup().await.unwrap();
    assert_eq!(ns.run("nft", &["list", "ruleset"]), "");
}

#[tokio::test]
async fn tables_that_are_not_iptables_are_refused_with_words() {
    let ns = Ns::new();
    let odd = "table ip nat {\n chain PREROUTING {\n type nat hook prerouting priority 7;\n}\n}\n";
    ns.feed("nft", &["-f", "-"], odd);
    let (_, update) = store(env(), EVERYTHING);
    let error = ns.engine().sync(update.clone()).await.unwrap_err();
    assert_eq!(
        in_full(&error),
        "reading IPv4 back: chain ip nat PREROUTING belongs to somebody else: it is not the chain of \
         this name that iptables makes; iptables would refuse the table as well"
    );

    let ns = Ns::new();
    let mut owner = proxier_netlink::nft::NftSocket::open(&ns.0).unwrap();
    let mut tx = proxier_netlink::nft::Transaction::new();
    let family = proxier_netlink::nft::Family::Ipv4;
    tx.table(proxier_netlink::nft::TableSpec::new(family, "filter").owner());
    owner.commit(&tx).await.unwrap();
    let error = in_full(&ns.engine().sync(update).await.unwrap_err());
    assert!(error.contains("table ip filter belongs to somebody else"), "{error}");
    assert!(error.contains("flag owner"), "{error}");
}

/// Operations that make a state, in an order in which each needs only those before it.
async fn operations(update: &Update, family: Family) -> Vec<Op<Key, Value>> {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, update.clone()).await;
    let stage = |key: &Key| engine.backend().stage(key);
    let mut all: Vec<_> = engine.predicted(family).into_iter().collect();
    all.sort_by(|(a, _), (b, _)| {
        let back = stage(a) == Stage::Body;
        let keys = if back { b.cmp(a) } else { a.cmp(b) };
        stage(a).cmp(&stage(b)).then(keys)
    });
    all.into_iter().map(|(key, value)| Op::Add(key, value)).collect()
}

type Key = proxier_backend_iptables::Key;
type Value = proxier_backend_iptables::Value;

#[tokio::test]
async fn a_start_that_was_cut_short_is_repaired() {
    let (store, update) = store(env(), EVERYTHING);
    let backend = Iptables::new(Config::default()).unwrap();
    let ops = operations(&update, Family::V4).await;
    let bodies = ops.iter().filter(|op| backend.stage(op.key()) <= Stage::Body).count();
    for cut in [1, 5, 20, bodies / 2, bodies, bodies + 3, ops.len() - 1] {
        let ns = Ns::new();
        let mut dataplane = IptablesDataplane::open(&backend, &ns.0).unwrap();
        let (done, _) = ops.split_at(cut);
        dataplane.commit(Family::V4, done).await.unwrap();
        let report = sync(&mut ns.engine(), store.reset()).await;
        assert!(report.ops.del == 0 && report.ops.set == 0, "{cut}: {report:?}");
    }
}

#[tokio::test]
async fn a_batch_is_all_or_nothing_and_says_which_operation() {
    let ns = Ns::new();
    let (_, update) = store(env(), WORKED_EXAMPLE);
    let mut engine = ns.engine();
    sync(&mut engine, update.clone()).await;
    let before = ns.run("nft", &["list", "ruleset"]);
    let backend = Iptables::new(Config::default()).unwrap();
    let mut ops = operations(&update, Family::V4).await;
    let mark = ops.iter().position(|op| op.key().to_string().ends_with("KUBE-MARK-MASQ")).unwrap();
    let (key, value) = match ops.remove(mark) {
        Op::Add(key, value) => (key, value),
        Op::Del(..) | Op::Set { .. } => panic!("an addition"),
    };
    // In use, so it cannot go.
    let deletion = [Op::Del(key, value)];
    let mut dataplane = IptablesDataplane::open(&backend, &ns.0).unwrap();
    let error = dataplane.commit(Family::V4, &deletion).await.unwrap_err();
    assert!(matches!(error, CommitError::Unknown { .. }), "{error:?}");
    dataplane.dump(Family::V4).await.unwrap();
    let error = dataplane.commit(Family::V4, &deletion).await.unwrap_err();
    let CommitError::Refused { op, object, kind, .. } = error else { panic!("{error:?}") };
    assert_eq!((op, kind), (Some(0), ErrorKind::Conflict));
    assert_eq!(object, "chain ip nat KUBE-MARK-MASQ");
    assert_eq!(ns.run("nft", &["list", "ruleset"]), before);
}

#[tokio::test]
async fn the_probe_finds_everything_and_leaves_nothing() {
    let ns = Ns::new();
    let found = probe(&ns.0).await;
    assert!(found.available, "{found:?}");
    assert_eq!((found.families, found.reasons), (Family::ALL.to_vec(), Vec::new()));
    assert_eq!(ns.run("nft", &["list", "ruleset"]), "");
    // What is there stays as it is, and what is missing is named.
    ns.feed("nft", &["-f", "-"], OTHERS);
    let before = ns.run("nft", &["list", "ruleset"]);
    assert!(probe(&ns.0).await.available);
    assert_eq!(ns.run("nft", &["list", "ruleset"]), before);
    let gone = probe(&proxier_netlink::NetNs::Path("/nonexistent/netns".into())).await;
    assert!(!gone.available && gone.reasons.len() == 1, "{gone:?}");
}

#[tokio::test]
async fn stale_udp_flows_are_forgotten() {
    let ns = ns_with(&["10.61.3.21", "10.61.4.21", "10.61.5.21"]);
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let send = || {
        let socket = std::net::UdpSocket::bind("10.61.3.21:0").unwrap();
        socket.send_to(b"question", "10.97.2.1:53").unwrap();
    };
    for _ in 0..3 {
        ns.0.run(send).unwrap();
    }
    store.apply(Event::Delete(ObjectKey::EndpointSlice(proxier_core::ObjectName::new(
        "shop", "cart-4",
    ))));
    let report = sync(&mut engine, store.take().unwrap()).await;
    assert_eq!((report.stale_flows.v4, report.stale_flows.v6), (3, 0), "{report:?}");
}

#[tokio::test]
async fn connections_reach_an_endpoint() {
    let ns = ns_with(&["10.61.3.32", "10.61.4.32"]);
    connections_follow(&ns, &mut ns.engine()).await;
}

//! The real kernel, and `nft` as witness. Each test has a network namespace of its own.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod common;

use common::*;
use proxier_backend_nftables::Config;
use proxier_core::{
    Family, ObjectName, Proxier, Update,
    model::{Event, ObjectKey},
    spi::ErrorKind,
};
use proxier_netlink::{Event as Heard, Events};

fn delete(service: &str) -> Event {
    Event::Delete(ObjectKey::Service(ObjectName::new("shop", service)))
}

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

/// `nft` prints our tables, and what it prints it can load.
#[tokio::test]
async fn the_listing_loads_back() {
    for env in [env(), other_env(), blind_env()] {
        let (ns, copy) = (Ns::new(), Ns::new());
        let mut engine = ns.engine();
        let (store, update) = store(env, EVERYTHING);
        sync(&mut engine, update).await;
        let listing = ns.ruleset();
        copy.feed("nft", &["-f", "-"], &listing);
        assert_eq!(copy.ruleset(), listing);
        // Not only to `nft`: most of it is taken for ours.
        let report = copy.engine().sync(store.reset()).await.unwrap();
        assert!(report.degraded.is_empty(), "{report:?}");
    }
}

#[tokio::test]
async fn the_probe_finds_everything_and_leaves_nothing() {
    let ns = Ns::new();
    let found = proxier_backend_nftables::probe(&ns.0).await;
    assert_eq!((found.available, found.reasons), (true, Vec::new()));
    assert_eq!(found.families, Family::ALL);
    assert_eq!(ns.ruleset(), "");
}

#[tokio::test]
async fn a_restart_changes_nothing() {
    for env in [env(), other_env()] {
        let ns = Ns::new();
        let (store, update) = store(env, EVERYTHING);
        sync(&mut ns.engine(), update).await;
        let before = ns.ruleset();
        let report = sync(&mut ns.engine(), store.reset()).await;
        assert_eq!(report.ops.total(), 0, "{report:?}");
        assert_eq!(ns.ruleset(), before);
    }
}

/// Proved by one who hears of every change of nf_tables.
#[tokio::test]
async fn a_restart_writes_nothing() {
    let ns = Ns::new();
    let (store, update) = store(env(), EVERYTHING);
    sync(&mut ns.engine(), update).await;
    let mut events = Events::open(&ns.0).unwrap();
    let mut again = ns.engine();
    assert_eq!(again.sync(store.reset()).await.unwrap().batches, 0);
    assert_eq!(again.audit().await.unwrap().batches, 0);
    ns.run("nft", &["add", "table", "inet", "marker"]);
    let next = tokio::time::timeout(std::time::Duration::from_secs(10), events.next()).await;
    let next = next.expect("waited for the marker").unwrap();
    assert!(matches!(&next, Heard::Change(it) if it.table == "marker"), "{next:?} came first");
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

    let before = ns.ruleset();
    let nft = |command: &str| ns.run("nft", &command.split(' ').collect::<Vec<_>>());
    nft("delete element ip proxier cluster-ips { 10.97.2.1 }");
    nft("add element ip proxier cluster-ips { 10.97.99.99 }");
    nft("add element ip proxier service-masq-all { 10.97.2.1 . icmp . 80 }");
    nft("flush chain ip proxier nat-postrouting");
    nft("insert rule ip proxier service-pool ip saddr 10.9.9.9 drop");
    nft("add rule ip proxier service-sizes ip saddr 10.9.9.9 drop");
    nft("add chain ip proxier strange");
    nft("add set ip proxier strange { type ipv4_addr ; }");
    nft("flush chain ip6 proxier service-sizes");
    // Not our business.
    nft("add table inet other");
    let report = engine.audit().await.unwrap();
    assert!(report.drift >= 9, "{report:?}");
    assert_eq!(report.degraded, []);
    assert_consistent(&mut engine).await;
    assert_eq!(engine.audit().await.unwrap().drift, 0);
    let after = ns.ruleset();
    assert!(after.contains("table inet other") && !after.contains("strange"), "{after}");
    let lines = |text: &str| text.lines().count();
    assert_eq!(lines(&after), lines(&before) + lines("table inet other {\n}"));
}

#[tokio::test]
async fn everything_flushed_is_written_again() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    ns.run("nft", &["flush", "ruleset"]);
    // Nobody told the engine; the next change finds out.
    store.apply(delete("cart"));
    sync(&mut engine, store.take().unwrap()).await;
    assert!(ns.ruleset().contains("10.97.1.12"));
    // Somebody made a table of that name, with our comment but other content.
    ns.run("nft", &["flush", "ruleset"]);
    let fake = "table ip proxier {\n comment \"made by proxier, layout 0\"\n set hairpin { type inet_service; }\n}\n";
    ns.feed("nft", &["-f", "-"], fake);
    engine.audit().await.unwrap();
    assert_consistent(&mut engine).await;
    let text = ns.ruleset().replace("layout 3", "layout 0");
    ns.run("nft", &["flush", "ruleset"]);
    ns.feed("nft", &["-f", "-"], &text);
    assert!(engine.audit().await.unwrap().drift > 0);
    assert_consistent(&mut engine).await;
}

/// Tables of others.
const OTHERS: &str = r"
table ip nat {
    chain PREROUTING {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 192.0.2.1 dnat to 192.0.2.2
    }
}
table inet proxier {
    chain c {
        type filter hook input priority 5; policy accept;
    }
}
";

#[tokio::test]
async fn cleaning_up_leaves_everything_as_it_was() {
    for others in ["", OTHERS] {
        let ns = Ns::new();
        ns.feed("nft", &["-f", "-"], others);
        let before = ns.ruleset();
        let mut engine = ns.engine();
        let (_, update) = store(env(), EVERYTHING);
        sync(&mut engine, update.clone()).await;
        let with_us = ns.ruleset();
        engine.cleanup().await.unwrap();
        assert_eq!(ns.ruleset(), before);
        // Again, from another process, and the engine goes on afterwards.
        ns.engine().cleanup().await.unwrap();
        assert_eq!(ns.ruleset(), before);
        sync(&mut engine, update).await;
        assert_eq!(ns.ruleset(), with_us);
    }
}

#[tokio::test]
async fn a_table_of_somebody_else_is_refused_or_taken_over() {
    let ns = Ns::new();
    ns.feed("nft", &["-f", "-"], "table ip proxier {\n chain theirs {\n }\n}\n");
    let before = ns.ruleset();
    let (store, update) = store(env(), EVERYTHING);
    let error = ns.engine().sync(update.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(
        in_full(&error).contains("table ip proxier belongs to somebody else"),
        "{}",
        in_full(&error)
    );
    for config in [Config::default(), Config::default().takeover(true)] {
        ns.engine_with(config).cleanup().await.unwrap();
        assert!(ns.ruleset().contains(before.trim()), "theirs stays");
    }
    let mut taker = ns.engine_with(Config::default().takeover(true));
    sync(&mut taker, update).await;
    assert!(!ns.ruleset().contains("theirs"));
    // From now on it is ours.
    assert_eq!(sync(&mut ns.engine(), store.reset()).await.ops.total(), 0);
}

#[tokio::test]
async fn two_proxiers_share_a_namespace() {
    let ns = Ns::new();
    let (_, update) = store(env(), EVERYTHING);
    let mut first = ns.engine();
    let mut second = ns.engine_with(Config::default().table("second").masquerade_bit(15));
    sync(&mut first, update.clone()).await;
    let alone = ns.ruleset();
    sync(&mut second, update).await;
    assert_eq!(first.audit().await.unwrap().drift, 0);
    second.cleanup().await.unwrap();
    assert_eq!(ns.ruleset(), alone);
    first.cleanup().await.unwrap();
    assert_eq!(ns.ruleset(), "");
}

#[tokio::test]
async fn affinities_that_lead_nowhere_are_forgotten() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let world = include_str!("golden/shop.yaml");
    let (mut both, update) = store(env(), world);
    sync(&mut engine, update).await;
    let listing = ns.ruleset();
    // What a rule would write: a client, the Service port, and where it was sent.
    let member = |ip: &str| {
        let set = listing.split("set affinity-members {").nth(1).unwrap();
        let element = set.split(&format!("{ip} . ")).nth(1).unwrap();
        element.split([',', ' ', '\n', '}']).filter(|it| !it.is_empty()).take(3).collect::<String>()
    };
    let id = member("10.61.3.22").replace('.', " . ");
    let remember = |client: &str, ip: &str| {
        let element = format!("{{ {client} . {id} timeout 1h : {ip} }}");
        ns.run("nft", &["add", "element", "ip", "proxier", "affinity", &element]);
    };
    remember("192.0.2.50", "10.61.3.22");
    remember("192.0.2.51", "10.61.4.22");
    assert_eq!(engine.audit().await.unwrap().drift, 0, "those are fine");
    remember("192.0.2.52", "10.61.9.9");
    assert_eq!(engine.audit().await.unwrap().drift, 1, "nobody has that address");
    assert!(!ns.ruleset().contains("192.0.2.52"));
    // An endpoint goes, and its clients are forgotten with it.
    let without: String = world
        .lines()
        .filter(|line| !line.contains("10.61.4.22"))
        .fold(String::new(), |text, line| text + line + "\n");
    let fewer = proxier_core::manifest::Manifest::parse("world.yaml", &without);
    both.apply(Event::EndpointSlices(fewer.slices().cloned().collect()));
    sync(&mut engine, both.take().unwrap()).await;
    let listing = ns.ruleset();
    assert!(listing.contains("192.0.2.50") && !listing.contains("192.0.2.51"), "{listing}");
}

#[tokio::test]
async fn what_others_removed_meanwhile_is_no_trouble() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    engine.sync(update).await.unwrap();
    ns.run("nft", &["delete", "element", "ip", "proxier", "cluster-ips", "{ 10.97.2.1 }"]);
    store.apply(delete("cart"));
    sync(&mut engine, store.take().unwrap()).await;
}

/// One Service with so many endpoints, all of them local.
fn large(endpoints: u16) -> Update {
    let mut text = "kind: Service\nmetadata: {name: large, namespace: shop}\n\
                    spec: {clusterIP: 10.97.0.9, ports: [{port: 80}]}\n"
        .to_owned();
    for part in 0..endpoints.div_ceil(1000) {
        text += &format!(
            "---\nkind: EndpointSlice\nmetadata: {{name: large-{part}, namespace: shop, \
             labels: {{kubernetes.io/service-name: large}}}}\naddressType: IPv4\n\
             ports: [{{name: \"\", port: 8080}}]\nendpoints:\n"
        );
        for index in part * 1000..((part + 1) * 1000).min(endpoints) {
            let [high, low] = index.to_be_bytes();
            text += &format!("- {{addresses: [10.61.{high}.{low}], nodeName: tern}}\n");
        }
    }
    store(env(), &text).1
}

#[tokio::test]
async fn one_endpoint_of_ten_thousand_takes_few_operations() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, large(10_000)).await;
    // 10,240 slots serve all of these.
    for (revision, endpoints) in (2..).zip([9_999, 10_000, 9_998, 9_999]) {
        let ops = sync(&mut engine, at(large(endpoints), revision)).await.ops.total();
        assert!(ops <= 5, "{ops} operations");
    }
}

#[tokio::test]
async fn one_endpoint_takes_at_most_five_operations() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, large(3)).await;
    let mut revision = 1;
    for endpoints in [4, 3, 4, 5, 4] {
        revision += 1;
        let update = at(large(endpoints), revision);
        let ops = sync(&mut engine, update).await.ops.total();
        assert!(ops <= 5, "{ops} operations for {endpoints} endpoints");
    }
}

/// A Service of each way to spread, for the tests of drift and of `nft`.
const SPREAD: &str = "
kind: Service
metadata: {name: turns, namespace: shop, annotations: {proxier.dev/balance: round-robin}}
spec: {type: NodePort, clusterIP: 10.97.9.1, ports: [{port: 80, nodePort: 31090}]}
---
kind: Service
metadata: {name: hashed, namespace: shop, annotations: {proxier.dev/balance: source-hash}}
spec: {clusterIP: 'fd41:97::91', ipFamilies: [IPv6], ports: [{port: 80}]}
---
kind: Service
metadata: {name: heavy, namespace: shop, annotations: {proxier.dev/endpoint-weights: 10.61.9.1=4}}
spec: {clusterIP: 10.97.9.3, ports: [{port: 80}]}
---
kind: EndpointSlice
metadata: {name: turns-1, namespace: shop, labels: {kubernetes.io/service-name: turns}}
addressType: IPv4
ports: [{name: '', port: 8080}]
endpoints: [{addresses: [10.61.9.1]}, {addresses: [10.61.9.2]}, {addresses: [10.61.9.3]}]
---
kind: EndpointSlice
metadata: {name: hashed-1, namespace: shop, labels: {kubernetes.io/service-name: hashed}}
addressType: IPv6
ports: [{name: '', port: 8080}]
endpoints: [{addresses: ['fd41:61::1']}, {addresses: ['fd41:61::2']}]
---
kind: EndpointSlice
metadata: {name: heavy-1, namespace: shop, labels: {kubernetes.io/service-name: heavy}}
addressType: IPv4
ports: [{name: '', port: 8080}]
endpoints: [{addresses: [10.61.9.1]}, {addresses: [10.61.9.2]}]
";

#[tokio::test]
async fn every_way_to_spread_is_read_back_and_loads_back() {
    let (ns, copy) = (Ns::new(), Ns::new());
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), SPREAD);
    sync(&mut engine, update).await;
    let listing = ns.ruleset();
    for part in
        ["numgen inc mod 3 map @service-endpoints", "jhash ip6 saddr mod 251", "@service-of-5"]
    {
        assert!(listing.contains(part), "{part} in\n{listing}");
    }
    copy.feed("nft", &["-f", "-"], &listing);
    assert_eq!(copy.ruleset(), listing);
    let report = sync(&mut ns.engine(), store.reset()).await;
    assert_eq!(report.ops.total(), 0, "a restart changes nothing: {report:?}");
    for name in ["turns", "hashed", "heavy"] {
        store.apply(delete(name));
        sync(&mut engine, store.take().unwrap()).await;
    }
    assert!(!ns.ruleset().contains("chain spread-"), "chains go with their Services");
}

/// What is done to our table is noticed at once, and what we do ourselves is not.
#[tokio::test]
async fn foreign_changes_are_noticed_and_own_ones_are_not() {
    const SOON: std::time::Duration = std::time::Duration::from_secs(5);
    let ns = Ns::new();
    let mut engine = ns.engine();
    let (mut store, update) = store(env(), EVERYTHING);
    sync(&mut engine, update).await;
    let silent = async |engine: &mut TestEngine| {
        let moment = std::time::Duration::from_millis(50);
        tokio::time::timeout(moment, engine.foreign_change()).await.is_err()
    };
    assert!(silent(&mut engine).await, "nothing happened yet");
    store.apply(delete("void"));
    sync(&mut engine, store.take().unwrap()).await;
    ns.run("nft", &["add", "table", "inet", "other"]);
    assert!(silent(&mut engine).await, "neither our own changes nor other tables matter");
    for command in [
        "delete element ip proxier cluster-ips { 10.97.2.1 }",
        "flush set ip6 proxier cluster-ips",
        "flush chain ip proxier nat-postrouting",
        "delete table ip proxier",
        "flush ruleset",
    ] {
        ns.run("nft", &command.split(' ').collect::<Vec<_>>());
        let noticed = tokio::time::timeout(SOON, engine.foreign_change()).await;
        assert!(noticed.is_ok(), "waited for a notice of: nft {command}");
        let report = engine.audit().await.unwrap();
        assert!(report.drift > 0 && report.degraded.is_empty(), "{command}: {report:?}");
        assert_consistent(&mut engine).await;
        assert!(silent(&mut engine).await, "the repair of {command} is our own change");
    }
}

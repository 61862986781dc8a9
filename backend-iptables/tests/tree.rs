//! The tree of chains and the parts of large pools, on the real kernel with real connections.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use common::*;
use proxier_backend_iptables::{Config, Layout};
use proxier_core::{
    Change, Family, FragmentId, ObjectName, OpCount, Protocol, Proxier, Revision, Update,
    ir::{
        Balance, Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict,
        Verdicts, WayIn,
    },
};

/// A Service with one cluster IP.
fn service(
    name: &str,
    ip: [u8; 4],
    members: impl IntoIterator<Item = SocketAddr>,
) -> Arc<Fragment> {
    let members = members.into_iter().map(|addr| Member::new(addr, false));
    Arc::new(fragment(name, ip, members.collect()))
}

fn fragment(name: &str, ip: [u8; 4], mut cluster: Vec<Member>) -> Fragment {
    let id = FragmentId {
        service: ObjectName::new("shop", name),
        port: "web".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let forward = |snat| Verdict::Forward { pool: Pool::Cluster, snat };
    let (pod, other) = (forward(Snat::Preserve), forward(Snat::Masquerade));
    let key = FrontendKey {
        way_in: WayIn::Address(IpAddr::from(ip)),
        port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
    };
    cluster.sort_unstable();
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key,
        sources: None,
        verdicts: Verdicts { pod, node: other, external: other },
    };
    Fragment::new(id, vec![frontend], cluster)
}

/// So many endpoints, in the pods' network.
fn endpoints(count: u16) -> Vec<SocketAddr> {
    let of = |index: u16| {
        let [high, low] = index.to_be_bytes();
        (Ipv4Addr::new(10, 61, high, low), 9000).into()
    };
    (1..=count).map(of).collect()
}

fn reset(fragments: Vec<Arc<Fragment>>) -> Update {
    Update::Reset { revision: Revision(1), node: Arc::new(env().view()), fragments }
}

async fn change(engine: &mut TestEngine, revision: u64, change: Change) -> OpCount {
    let update = Update::Delta { revision: Revision(revision), node: None, changes: vec![change] };
    sync(engine, update).await.ops
}

/// How often each address answered so many connections to a Service.
fn answers(ns: &Ns, service: &str, connections: usize) -> BTreeMap<IpAddr, usize> {
    let service: SocketAddr = service.parse().unwrap();
    ns.0.run(|| {
        let listener = TcpListener::bind("0.0.0.0:9000").unwrap();
        let mut counts = BTreeMap::new();
        for _ in 0..connections {
            let client = TcpStream::connect_timeout(&service, Duration::from_secs(2)).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            *counts.entry(accepted.local_addr().unwrap().ip()).or_default() += 1;
            drop(client);
        }
        counts
    })
    .unwrap()
}

/// A namespace where every pod's address is its own.
fn ns_of_pods() -> Ns {
    let ns = Ns::new();
    ns.run("ip", &["link", "set", "lo", "up"]);
    ns.run("ip", &["route", "add", "local", "10.61.0.0/16", "dev", "lo"]);
    ns.run("ip", &["route", "add", "10.96.0.0/16", "dev", "lo"]);
    ns
}

#[tokio::test]
async fn one_layout_becomes_the_other_at_a_restart() {
    let (ns, fresh) = (Ns::new(), Ns::new());
    let (store, update) = store(env(), EVERYTHING);
    let exact = Config::default().layout(Layout::KubeProxy);
    let trees = |ns: &Ns| -> Vec<_> {
        let list = |(family, table)| ns.listing(family, table);
        let all = Family::ALL.into_iter().flat_map(|it| [(it, "nat"), (it, "filter")]);
        let mut rules: Vec<_> = all.flat_map(list).collect();
        rules.sort();
        rules
    };
    sync(&mut ns.engine_with(exact.clone()), update).await;
    let before = trees(&ns);
    sync(&mut ns.engine(), store.reset()).await;
    sync(&mut fresh.engine(), store.reset()).await;
    assert_eq!(trees(&ns), trees(&fresh));
    assert_ne!(trees(&ns), before);
    sync(&mut ns.engine_with(exact), store.reset()).await;
    assert_eq!(trees(&ns), before);
}

#[tokio::test]
async fn a_service_brings_the_chains_that_lead_to_it_and_takes_them_away() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, reset(Vec::new())).await;
    let empty = ns.listing(Family::V4, "nat");
    let one = |name, ip| service(name, ip, endpoints(1));
    // SVC, SEP and the rule that leads there; with them, as many chains and jumps as are new.
    let cases = [("a", [10, 96, 0, 1], 5), ("b", [10, 96, 0, 9], 0), ("c", [10, 96, 9, 1], 2)];
    let mut revision = 1;
    for (name, ip, steps) in cases {
        revision += 1;
        let ops = change(&mut engine, revision, Change::Upsert(one(name, ip))).await;
        assert_eq!((ops.add, ops.set, ops.del), (3 + 2 * steps, 0, 0), "{name}");
    }
    for (name, steps) in [("a", 0), ("c", 2), ("b", 5)] {
        revision += 1;
        let id = one(name, [10, 96, 0, 1]).id.clone();
        let ops = change(&mut engine, revision, Change::Remove(id)).await;
        assert_eq!((ops.add, ops.set, ops.del), (0, 0, 3 + 2 * steps), "{name}");
    }
    assert_eq!(ns.listing(Family::V4, "nat"), empty);
}

#[tokio::test]
async fn a_jump_of_the_tree_is_put_back_before_the_node_ports() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    sync(&mut engine, reset(vec![service("a", [10, 96, 0, 1], endpoints(2))])).await;
    let rule = ["KUBE-SERVICES", "-d", "10.0.0.0/8", "-j", "KUBE-IP-0A"];
    for verb in ["-D", "-A"] {
        ns.run("iptables-nft", &[&["-t", "nat", verb], &rule[..]].concat());
    }
    ns.run("iptables-nft", &["-t", "nat", "-F", "KUBE-IP-0A6000"]);
    let report = engine.audit().await.unwrap();
    // The node ports' rule is not the last any more, and a jump is missing.
    assert_eq!((report.drift, report.ops.set, report.ops.add), (2, 1, 1), "{report:?}");
    assert_consistent(&mut engine).await;
    let listing = ns.run("iptables-nft", &["-t", "nat", "-S", "KUBE-SERVICES"]);
    assert!(listing.lines().last().unwrap().contains("NOTE: this must be the last rule"));
}

#[tokio::test]
async fn one_endpoint_of_many_rewrites_its_part() {
    let ns = Ns::new();
    let mut engine = ns.engine();
    let all = endpoints(1000);
    sync(&mut engine, reset(vec![service("big", [10, 96, 0, 1], all.clone())])).await;
    let listing = ns.listing(Family::V4, "nat");
    let longest = |prefix: &str| {
        let mut lengths = BTreeMap::<&str, usize>::new();
        for chain in listing.iter().filter_map(|rule| rule.split(' ').nth(1)) {
            *lengths.entry(chain).or_default() += usize::from(chain.starts_with(prefix));
        }
        lengths.into_values().max().unwrap()
    };
    // The hairpin rule comes with the parts.
    assert_eq!(longest("KUBE-SVC-"), 33);
    assert!(longest("KUBE-SVP-") < 60, "{}", longest("KUBE-SVP-"));
    let fewer: Vec<_> = all.iter().copied().filter(|addr| addr.ip() != all[500].ip()).collect();
    let fewer = service("big", [10, 96, 0, 1], fewer);
    let ops = change(&mut engine, 2, Change::Upsert(fewer)).await;
    assert_eq!((ops.add, ops.set, ops.del), (0, 2, 1));
    let ops = change(&mut engine, 3, Change::Upsert(service("big", [10, 96, 0, 1], all))).await;
    assert_eq!((ops.add, ops.set, ops.del), (1, 2, 0));
}

#[tokio::test]
async fn endpoints_of_a_split_pool_get_equal_shares() {
    let ns = ns_of_pods();
    let mut engine = ns.engine();
    let members = endpoints(100);
    sync(&mut engine, reset(vec![service("big", [10, 96, 0, 1], members.clone())])).await;
    let counts = answers(&ns, "10.96.0.1:80", 5000);
    for addr in members {
        // Fifty are expected, with a standard deviation of seven.
        let count = counts.get(&addr.ip()).copied().unwrap_or_default();
        assert!((15..=90).contains(&count), "{addr}: {count}");
    }
}

#[tokio::test]
async fn every_service_of_many_is_reached() {
    let ns = ns_of_pods();
    let mut engine = ns.engine();
    let members = endpoints(250);
    let services: Vec<_> = members
        .iter()
        .map(|member| {
            let SocketAddr::V4(member) = member else { panic!("IPv4") };
            let [_, _, high, low] = member.ip().octets();
            // Each in another place of the tree.
            let ip = [10, 96, low.reverse_bits(), low ^ high];
            service(&format!("s{low}"), ip, [SocketAddr::V4(*member)])
        })
        .collect();
    sync(&mut engine, reset(services.clone())).await;
    for service in services {
        let WayIn::Address(ip) = service.frontends[0].key.way_in else { panic!("an address") };
        let counts = answers(&ns, &format!("{ip}:80"), 1);
        assert_eq!(counts, BTreeMap::from([(service.cluster[0].addr.ip(), 1)]), "{ip}");
    }
}

#[tokio::test]
async fn weights_are_shares_of_connections() {
    let ns = ns_of_pods();
    let mut engine = ns.engine();
    // Split into parts, so that both kinds of probability count.
    let weighted = |addr: SocketAddr, weight: u16| Member {
        weight: NonZeroU16::new(weight).unwrap(),
        ..Member::new(addr, false)
    };
    let members = endpoints(80).into_iter().zip((0..80).map(|n| if n < 4 { 100 } else { 1 }));
    let members: Vec<_> = members.map(|(addr, weight)| weighted(addr, weight)).collect();
    let heavy = fragment("heavy", [10, 96, 0, 1], members.clone());
    let few = vec![weighted(members[0].addr, 3), weighted(members[1].addr, 1)];
    let few = fragment("few", [10, 96, 0, 2], few);
    sync(&mut engine, reset(vec![Arc::new(heavy), Arc::new(few)])).await;
    let counts = answers(&ns, "10.96.0.1:80", 4000);
    for member in &members[..4] {
        // 840 are expected, with a standard deviation of 26.
        let count = counts[&member.addr.ip()];
        assert!((700..=980).contains(&count), "{}: {count}", member.addr);
    }
    let light: usize = members[4..].iter().filter_map(|it| counts.get(&it.addr.ip())).sum();
    assert!((500..=780).contains(&light), "{light}");
    let counts = answers(&ns, "10.96.0.2:80", 2000);
    let first = counts[&members[0].addr.ip()];
    assert!((1400..=1600).contains(&first), "{first}");
}

#[tokio::test]
async fn endpoints_take_turns() {
    let ns = ns_of_pods();
    let mut engine = ns.engine();
    let members: Vec<_> = endpoints(70).into_iter().map(|addr| Member::new(addr, false)).collect();
    let mut turns = fragment("turns", [10, 96, 0, 1], members.clone());
    turns.balance = Balance::RoundRobin;
    sync(&mut engine, reset(vec![Arc::new(turns)])).await;
    for _ in 0..3 {
        let counts = answers(&ns, "10.96.0.1:80", 70);
        assert_eq!(counts.len(), 70, "each once: {counts:?}");
    }
    let text = ns.run("iptables-nft", &["-t", "nat", "-S"]);
    assert!(text.contains("-m statistic --mode nth --every 70 --packet 0"));
}

#[tokio::test]
async fn connections_are_counted_by_endpoint() {
    let ns = ns_of_pods();
    let mut engine = ns.engine();
    let members: Vec<_> = endpoints(3).into_iter().map(|addr| Member::new(addr, false)).collect();
    let mut counted = fragment("counted", [10, 96, 0, 1], members.clone());
    counted.counters = true;
    let silent = service("silent", [10, 96, 0, 2], endpoints(3));
    sync(&mut engine, reset(vec![Arc::new(counted.clone()), silent])).await;
    answers(&ns, "10.96.0.2:80", 5);
    let answered = answers(&ns, "10.96.0.1:80", 60);
    let counters = engine.counters().await.unwrap();
    assert_eq!(counters.len(), 4, "{counters:?}");
    for counter in counters {
        assert_eq!(counter.id, counted.id);
        let connections = counter.count.connections.unwrap();
        match counter.endpoint {
            None => assert_eq!(connections, 60),
            Some(addr) => assert_eq!(connections, answered[&addr.ip()] as u64, "{addr}"),
        }
    }
}

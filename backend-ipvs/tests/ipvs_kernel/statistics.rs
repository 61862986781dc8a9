//! What is counted, beside what ipvsadm prints.

use std::{collections::BTreeMap, net::SocketAddr};

use proxier_backend_ipvs::Config;
use proxier_core::{
    Count, Counter, Family, Protocol, Proxier,
    ir::{Fragment, Frontend, FrontendKey, FrontendKind, WayIn},
};
use proxier_testkit::eventually_async;

use crate::lab::{FRONTEND, Ns, PATIENCE, fragment, frontend, set};

/// Connections through each of the three frontends.
const CONNECTIONS: usize = 6;

/// The sum of all virtual servers, and that of each destination, as ipvsadm prints them.
fn printed(ns: &Ns) -> BTreeMap<Option<SocketAddr>, Count> {
    let mut sums: BTreeMap<_, Count> = BTreeMap::new();
    for line in ns.run("ipvsadm -L -n --stats --exact").lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let numbers: Vec<u64> = words.iter().skip(2).filter_map(|it| it.parse().ok()).collect();
        let [connections, in_packets, out_packets, in_bytes, out_bytes] = numbers[..] else {
            continue;
        };
        let endpoint = (words[0] == "->").then(|| words[1].parse().unwrap());
        let sum = sums.entry(endpoint).or_default();
        *sum = sum.plus(Count {
            connections: Some(connections),
            packets: Some(in_packets + out_packets),
            bytes: Some(in_bytes + out_bytes),
        });
    }
    sums
}

fn counted(counters: Vec<Counter>) -> BTreeMap<Option<SocketAddr>, Count> {
    counters.into_iter().map(|it| (it.endpoint, it.count)).collect()
}

#[tokio::test]
async fn connections_packets_and_bytes_are_counted_as_ipvsadm_counts_them() {
    let ns = Ns::prepared();
    ns.run("ip addr add 172.20.7.11/32 dev lo");
    let endpoints = [1, 2].map(|number| ns.endpoint(number));
    let own = FRONTEND.parse().unwrap();
    let second = SocketAddr::from(([10, 97, 0, 22], 80));
    // Known by a mark.
    let port = 31_080;
    let way_in = WayIn::Node(Family::V4);
    let key = FrontendKey { way_in, port: port.try_into().unwrap(), protocol: Protocol::Tcp };
    let node_port = Frontend { kind: FrontendKind::NodePort, key, ..frontend(own) };
    let frontends = vec![frontend(own), frontend(second), node_port];
    let members = endpoints.map(|it| (it, 1));
    let mut engine = ns.engine(Config::default()).await;
    let report = set(&mut engine, 1, Fragment { frontends, ..fragment(&members, "rr") }).await;
    assert_eq!(report.degraded, []);

    let nobody = [std::net::Ipv4Addr::UNSPECIFIED; CONNECTIONS];
    for to in [own, second, SocketAddr::from(([172, 20, 7, 11], port))] {
        ns.ask(&nobody, to);
    }
    let everything = u64::try_from(3 * CONNECTIONS).unwrap();
    // KERNEL: it sums up every two seconds (net/netfilter/ipvs/ip_vs_est.c, v6.1); packets of
    // connections that end may still be counted then.
    let mut seen = (BTreeMap::new(), BTreeMap::new());
    let engine = tokio::sync::Mutex::new(engine);
    let seen_both = tokio::sync::Mutex::new(&mut seen);
    let are_equal = || async {
        let ours = counted(engine.lock().await.counters().await.unwrap());
        let theirs = printed(&ns);
        let is_whole = |it: &Count| it.connections == Some(everything);
        let fine = ours == theirs && ours.get(&None).is_some_and(is_whole);
        **seen_both.lock().await = (ours, theirs);
        fine
    };
    let waited = eventually_async(PATIENCE, "counters as ipvsadm prints them", are_equal).await;
    let (ours, theirs) = seen;
    assert!(waited.is_ok(), "{waited:?}\nours: {ours:#?}\nipvsadm's: {theirs:#?}");

    // A handshake, a greeting and the end: packets both ways, with their headers.
    let half = Some(everything / 2);
    for endpoint in endpoints {
        let count = ours[&Some(endpoint)];
        assert_eq!(count.connections, half, "{ours:#?}");
        assert!(count.packets >= half.map(|it| it * 6) && count.bytes > count.packets, "{ours:#?}");
    }
    assert_eq!(ours.len(), 3, "{ours:#?}");
}

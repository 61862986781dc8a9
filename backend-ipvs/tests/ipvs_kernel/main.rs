//! The real kernel, and ipvsadm, nft and ip as witnesses. Each test has a network namespace of its
//! own; where the machine's kernel has no IPVS, all run in a guest.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod lab;
mod leftovers;
mod schedulers;
mod statistics;

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use proxier_backend_ipvs::{Config, Key, Sysctls, prepare, probe};
use proxier_core::{
    Family, Proxier, SyncReport,
    model::{DetectLocal, NodeEnv, NodePortAddresses, Store},
};

use proxier_testkit::backend::{self, assert_consistent, node as env};

use crate::lab::{Ns, TestEngine, fragment, set};

const EVERYTHING: &str = include_str!("../everything.yaml");

fn world(env: NodeEnv) -> Store {
    let (store, _) = backend::store(env, EVERYTHING);
    store
}

async fn sync(engine: &mut TestEngine, store: &Store) -> SyncReport {
    backend::sync(engine, store.reset()).await
}

#[tokio::test]
async fn what_is_synced_is_read_back_and_goes_without_a_trace() {
    let ns = Ns::new();
    // Foreign virtual servers, a foreign table, and a foreign link.
    ns.run(
        "ipvsadm -A -t 192.0.2.1:80 -s wlc; ipvsadm -A -f 7 -s rr; ipvsadm -A -u 172.20.7.11:53",
    );
    ns.run("nft add table ip theirs; nft add chain ip theirs c; ip link add theirs0 type dummy");
    let before = ns.state();
    let listed = vec!["172.16.0.0/12".parse().unwrap()];
    let other = NodeEnv {
        detect_local: DetectLocal::InterfaceNamePrefix("veth".to_owned()),
        node_port_addresses: NodePortAddresses::Inside(listed),
        ..env()
    };
    let mut engine = ns.engine(Config::default()).await;
    for env in [env(), other, NodeEnv { detect_local: DetectLocal::None, ..env() }] {
        sync(&mut engine, &world(env)).await;
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0);
        // nft prints what it can read.
        ns.run("nft list ruleset > $$.nft && nft -c -f $$.nft && rm $$.nft");
    }
    // The next process finds everything as it is.
    let mut next = ns.engine(Config::default()).await;
    let none = NodeEnv { detect_local: DetectLocal::None, ..env() };
    assert_eq!(sync(&mut next, &world(none)).await.ops.total(), 0);
    next.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

#[tokio::test]
async fn what_others_break_is_repaired() {
    let ns = Ns::new();
    let mut engine = ns.engine(Config::default()).await;
    sync(&mut engine, &world(env())).await;
    for breaking in [
        "ipvsadm -D -t 10.97.0.21:80",
        "ipvsadm -E -t 10.97.0.21:80 -s lc",
        "ipvsadm -d -t 10.97.0.21:80 -r 10.61.3.21:8080",
        "ip addr del 10.97.0.21/32 dev proxier-ipvs0",
        "ip link del proxier-ipvs0",
        "nft flush chain ip proxier-ipvs from-pod",
        "nft delete table ip proxier-ipvs",
        "ipvsadm -C",
    ] {
        ns.run(breaking);
        assert!(engine.audit().await.unwrap().drift > 0, "{breaking}");
        assert_eq!(engine.audit().await.unwrap().ops.total(), 0, "{breaking}");
        assert_consistent(&mut engine).await;
    }
}

#[tokio::test]
async fn probing_and_preparing_say_what_is_there() {
    let ns = Ns::new();
    let before = ns.state();
    let found = probe(&ns.0, &Family::ALL).await;
    assert!(found.available, "{found:?}");
    assert!(found.reasons.iter().any(|it| it.contains("conntrack is 0")), "{found:?}");
    assert_eq!(ns.state(), before);
    let prepared = prepare(&ns.0, Sysctls { strict_arp: true }).unwrap();
    assert_eq!(prepared.changed().len(), 5, "{prepared:?}");
    assert_eq!(prepare(&ns.0, Sysctls { strict_arp: true }).unwrap().changed(), []);
    prepared.undo().unwrap();
    assert_eq!(
        ns.run("cat /proc/sys/net/ipv4/vs/conntrack /proc/sys/net/ipv4/conf/all/arp_announce"),
        "0\n0\n"
    );
}

#[tokio::test]
async fn a_removed_endpoint_serves_its_connections_to_their_end() {
    let ns = Ns::prepared();
    let [a, b] = [1, 2].map(|number| (ns.endpoint(number), 1));
    let limit = Duration::from_secs(3600);
    let config = Config { drain: Some(limit), ..Config::default() };
    let mut engine = ns.engine(config.clone()).await;
    set(&mut engine, 1, fragment(&[a], "rr")).await;
    let (mut open, first) = ns.connect();
    assert_eq!(first, 1);
    set(&mut engine, 2, fragment(&[b], "rr")).await;
    // The connection goes on; new ones go elsewhere; the destination is there with weight 0.
    let mut echo = [0; 4];
    open.write_all(b"ping").unwrap();
    open.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ping");
    assert_eq!(ns.spread(4), [(2, 4)].into());
    assert_eq!(engine.dataplane().draining().count(), 1);
    assert_consistent(&mut engine).await;
    // The next process goes on with it, and uses it again when it comes back.
    let mut next = ns.engine(config).await;
    set(&mut next, 1, fragment(&[b], "rr")).await;
    assert_eq!(next.dataplane().draining().count(), 1);
    set(&mut next, 2, fragment(&[a, b], "rr")).await;
    assert_eq!(next.dataplane().draining().count(), 0);
    assert_eq!(ns.spread(4), [(1, 2), (2, 2)].into());
    // At the limit it goes, whoever is connected.
    set(&mut next, 3, fragment(&[b], "rr")).await;
    assert!(next.tick(Instant::now()).await.unwrap().is_some());
    assert_eq!(next.tick(Instant::now() + limit).await.unwrap(), None);
    assert!(!ns.run("ipvsadm -S -n").contains("10.61.3.1:8080"));
    assert!(next.predicted(Family::V4).contains_key(&Key::Link(Family::V4)));
    drop(open);
}

//! What each scheduler promises, shown with connections.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use proxier_backend_ipvs::{Config, SCHEDULERS};
use proxier_core::ir::Fragment;
use proxier_netlink::ipvs::Ipvs;

use crate::lab::{FRONTEND, Ns, counts, fragment, frontend, set};

/// Clients with addresses of their own.
const CLIENTS: u8 = 250;

/// Two endpoints, connections that are opened one after the other and stay open, and how many of
/// them each endpoint has in the end.
struct Row {
    scheduler: &'static str,
    weights: [u16; 2],
    connections: usize,
    expected: [usize; 2],
}

#[rustfmt::skip]
const ROWS: [Row; 12] = [
    Row { scheduler: "rr", weights: [1, 1], connections: 12, expected: [6, 6] },
    // By weight, also where the one without weights is named.
    Row { scheduler: "rr", weights: [1, 3], connections: 16, expected: [4, 12] },
    Row { scheduler: "wrr", weights: [1, 3], connections: 16, expected: [4, 12] },
    Row { scheduler: "lc", weights: [1, 1], connections: 12, expected: [6, 6] },
    Row { scheduler: "lc", weights: [1, 3], connections: 16, expected: [4, 12] },
    Row { scheduler: "wlc", weights: [1, 3], connections: 16, expected: [4, 12] },
    Row { scheduler: "sed", weights: [1, 3], connections: 16, expected: [4, 12] },
    // The strong one answers first for as long as it has less than its share.
    Row { scheduler: "sed", weights: [1, 10], connections: 9, expected: [0, 9] },
    // An idle one is preferred, however weak it is.
    Row { scheduler: "nq", weights: [1, 10], connections: 9, expected: [1, 8] },
    // The heaviest gets everything.
    Row { scheduler: "fo", weights: [1, 3], connections: 8, expected: [0, 8] },
    // The heaviest gets one more than its weight says, then the next.
    Row { scheduler: "ovf", weights: [2, 3], connections: 6, expected: [2, 4] },
    // All clients of a destination stay where it is served.
    Row { scheduler: "lblc", weights: [4, 4], connections: 4, expected: [4, 0] },
];

#[tokio::test]
async fn each_endpoint_gets_its_share() {
    for Row { scheduler, weights, connections, expected } in ROWS {
        let ns = Ns::prepared();
        let [a, b] = weights;
        let members = [(ns.endpoint(1), a), (ns.endpoint(2), b)];
        let mut engine = ns.engine(Config::default()).await;
        assert_eq!(set(&mut engine, 1, fragment(&members, scheduler)).await.degraded, []);
        let (_open, answers) = ns.hold(connections);
        let mut found = [1, 2].map(|it| answers.iter().filter(|answer| **answer == it).count());
        if scheduler == "lblc" {
            // Which one is the kernel's choice.
            found.sort_unstable_by(|a, b| b.cmp(a));
        }
        assert_eq!(found, expected, "{scheduler} with weights {weights:?}: {answers:?}");
    }
}

#[tokio::test]
async fn round_robin_goes_round() {
    let ns = Ns::prepared();
    let members = [1, 2, 3].map(|number| (ns.endpoint(number), 1));
    let mut engine = ns.engine(Config::default()).await;
    set(&mut engine, 1, fragment(&members, "rr")).await;
    let (_open, answers) = ns.hold(9);
    assert_eq!(counts(&answers), [(1, 3), (2, 3), (3, 3)].into());
    assert!(answers.windows(4).all(|four| four[0] == four[3]), "{answers:?}");
}

#[tokio::test]
async fn a_busy_endpoint_is_avoided() {
    let ns = Ns::prepared();
    let members = [1, 2].map(|number| (ns.endpoint(number), 1));
    let [busy, _] = members;
    let mut engine = ns.engine(Config::default()).await;
    for (revision, scheduler) in (1..).zip(["lc", "wlc", "sed", "nq"]) {
        set(&mut engine, 2 * revision - 1, fragment(&[busy], scheduler)).await;
        let (_open, answers) = ns.hold(40);
        assert_eq!(answers, [1; 40], "{scheduler}");
        set(&mut engine, 2 * revision, fragment(&members, scheduler)).await;
        assert_eq!(ns.hold(10).1, [2; 10], "{scheduler}");
    }
}

/// Addresses that clients have.
fn clients(ns: &Ns) -> Vec<Ipv4Addr> {
    ns.run("ip route add local 10.62.0.0/16 dev lo");
    (1..=CLIENTS).map(|it| Ipv4Addr::new(10, 62, it % 7, it)).collect()
}

/// How many clients of the endpoints that stay are moved to another one as an endpoint goes.
async fn moved(scheduler: &str, drain: Option<Duration>) -> (usize, usize) {
    let ns = Ns::prepared();
    let clients = clients(&ns);
    let to = FRONTEND.parse().unwrap();
    let members = [1, 2, 3, 4, 5].map(|number| (ns.endpoint(number), 1));
    let mut engine = ns.engine(Config { drain, ..Config::default() }).await;
    set(&mut engine, 1, fragment(&members, scheduler)).await;
    let before = ns.ask(&clients, to);
    assert_eq!(ns.ask(&clients, to), before, "{scheduler}: each client stays");
    let (shares, fair) = (counts(&before), clients.len() / members.len());
    assert!(shares.len() == 5 && shares.values().all(|it| *it > fair / 3), "{shares:?}");

    let [a, b, _, d, e] = members;
    set(&mut engine, 2, fragment(&[a, b, d, e], scheduler)).await;
    let after = ns.ask(&clients, to);
    assert!(!after.contains(&3), "{scheduler}: {after:?}");
    let stay = before.iter().zip(&after).filter(|(old, _)| **old != 3);
    let (total, moved) = (stay.clone().count(), stay.filter(|(old, new)| old != new).count());

    set(&mut engine, 3, fragment(&members, scheduler)).await;
    assert_eq!(engine.dataplane().draining().count(), 0);
    (moved, total)
}

#[tokio::test]
async fn hashing_by_source_keeps_clients_and_mh_moves_few_when_an_endpoint_goes() {
    // While an endpoint drains, only its own clients go elsewhere.
    for scheduler in ["mh", "sh"] {
        assert_eq!(moved(scheduler, None).await.0, 0, "{scheduler}");
    }
    // When it is gone, `sh` hashes everybody anew: four fifths move. `mh` does not.
    let (by_mh, total) = moved("mh", Some(Duration::ZERO)).await;
    let (by_sh, _) = moved("sh", Some(Duration::ZERO)).await;
    println!("of {total} clients of the endpoints that stay, {by_mh} move by mh, {by_sh} by sh");
    assert!(by_mh * 10 < total && by_sh * 2 > total, "mh {by_mh}, sh {by_sh} of {total}");
}

#[tokio::test]
async fn nobody_is_refused_or_sent_to_an_endpoint_that_is_to_go() {
    let ns = Ns::prepared();
    let clients = clients(&ns);
    // More than the connections that are held: `ovf` takes no more.
    let members = [1, 2, 3].map(|number| (ns.endpoint(number), 20));
    let vips = [21, 22, 23, 24, 25, 26].map(|it| SocketAddr::from(([10, 97, 0, it], 80)));
    let mut engine = ns.engine(Config::default()).await;
    let there = Ipvs::open(&ns.0).await.unwrap().schedulers().await.unwrap();
    assert!(there.len() >= 13, "{there:?}");
    for (round, scheduler) in (0..).zip(there) {
        let of = |members: &[_]| Fragment {
            frontends: vips.map(frontend).into(),
            ..fragment(members, scheduler)
        };
        set(&mut engine, 2 * round + 1, of(&members)).await;
        let (_open, _) = ns.hold(12);
        set(&mut engine, 2 * round + 2, of(&members[1..])).await;
        for to in vips {
            let answers = ns.ask(&clients[..20], to);
            assert!(!answers.contains(&1), "{scheduler}: {answers:?}");
        }
    }
}

#[tokio::test]
async fn hashing_by_destination_keeps_a_destination_for_all_clients() {
    let ns = Ns::prepared();
    let clients = clients(&ns);
    let members = [1, 2, 3].map(|number| (ns.endpoint(number), 1));
    let vips = [21, 22, 23, 24, 25, 26].map(|it| SocketAddr::from(([10, 97, 0, it], 80)));
    let frontends = vips.map(frontend).into();
    let mut engine = ns.engine(Config::default()).await;
    set(&mut engine, 1, Fragment { frontends, ..fragment(&members, "dh") }).await;
    let mut chosen = Vec::new();
    for to in vips {
        let answers = ns.ask(&clients[..20], to);
        assert_eq!(counts(&answers).len(), 1, "{to}: {answers:?}");
        chosen.push(answers[0]);
    }
    assert!(counts(&chosen).len() > 1, "destinations are spread: {chosen:?}");
    let again: Vec<_> = vips.iter().map(|to| ns.ask(&clients[20..21], *to)[0]).collect();
    assert_eq!(again, chosen);
}

#[tokio::test]
async fn unknown_schedulers_are_named_with_those_there_are() {
    let ns = Ns::prepared();
    let members = [(ns.endpoint(1), 1)];
    let mut engine = ns.engine(Config::default()).await;
    let report = set(&mut engine, 1, fragment(&members, "best")).await;
    let [degraded] = &report.degraded[..] else { panic!("{report:?}") };
    assert!(degraded.reason.contains("shop/cart asks for scheduler \"best\""), "{degraded:?}");
    assert!(SCHEDULERS.iter().all(|it| degraded.reason.contains(it)), "{degraded:?}");
    assert_eq!(set(&mut engine, 2, fragment(&members, "rr")).await.degraded, []);
    assert_eq!(ns.connect().1, 1);
}

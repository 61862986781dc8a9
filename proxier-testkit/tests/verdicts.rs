//! Reject, drop and silence are told apart; masquerade and moved flows are seen.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxier_testkit::lab::Ns;
use proxier_testkit::require_lab;
use proxier_testkit::topology::{Topology, World};
use proxier_testkit::traffic::{
    Conversation, Endpoint, How, Many, Outcome, ProbeSpec, Protocol, Rejection, Responder, Stopped,
    probe, probe_many,
};

const VIPS: [&str; 2] = ["10.97.0.21", "fd41:97::21"];

fn nft(ns: &Ns, rules: &str) {
    ns.command_with_input("nft", ["-f", "-"], rules).expect("nft takes the rules");
}

fn vip(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(text.parse().expect("an address"), port)
}

/// Responders on port 8080 of both pods.
fn pods(world: &World) -> Vec<Responder> {
    let start = |name: &str| {
        let endpoints = world.addrs(name).into_iter().flat_map(|ip| {
            let at = SocketAddr::new(ip, 8080);
            [Endpoint::tcp(name, at), Endpoint::udp(name, at)]
        });
        let ns = world.ns(name).expect("a host of the world");
        Responder::start(&ns, endpoints).expect("the endpoints open")
    };
    ["pod_a", "pod_b", "remote_a"].into_iter().map(start).collect()
}

/// A chain that refuses ports 81 to 84 of every address in four ways.
const REFUSALS: &str = "
table inet refusals {
  chain refuse {
    meta l4proto { tcp, udp } th dport 81 reject
    meta l4proto { tcp, udp } th dport 82 drop
    tcp dport 83 reject with tcp reset
    meta l4proto { tcp, udp } th dport 84 reject with icmpx admin-prohibited
  }
  chain forward { type filter hook forward priority 0; jump refuse; }
  chain input { type filter hook input priority 0; jump refuse; }
  chain output { type filter hook output priority 0; jump refuse; }
}";

async fn outcome(from: &Ns, protocol: Protocol, dst: SocketAddr) -> Outcome {
    let patience = Duration::from_millis(400);
    probe(from, &ProbeSpec::new(protocol, dst).within(patience)).await
}

#[tokio::test]
async fn every_refusal_is_told_from_every_other() {
    require_lab!();
    let world = Topology::standard().build("refusals").unwrap();
    nft(world.node(), REFUSALS);
    let mut cases = tokio::task::JoinSet::new();
    for from in ["client", "pod_a", "remote_a", "node"] {
        for to in VIPS.into_iter().chain(["172.20.7.11", "fd41:7::11"]) {
            let ns = world.ns(from).unwrap();
            cases.spawn(async move {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    refusals_of_rules(&ns, to, protocol).await;
                }
                let reset = outcome(&ns, Protocol::Tcp, vip(to, 83)).await;
                assert_eq!(reset.rejection(), Some(&Rejection::reset()), "{from} to {to}: {reset}");
                if !VIPS.contains(&to) {
                    refusals_of_the_kernel(&ns, to).await;
                }
            });
        }
    }
    while let Some(case) = cases.join_next().await {
        case.unwrap();
    }
}

async fn refusals_of_rules(from: &Ns, to: &str, protocol: Protocol) {
    let (case, v4) = (format!("{} to {to}/{protocol}", from.name()), vip(to, 0).is_ipv4());
    let rejected = outcome(from, protocol, vip(to, 81)).await;
    let rejection = rejected.rejection().expect(&case);
    assert_eq!(rejection.how, How::IcmpPortUnreachable, "{case}");
    assert!(rejection.by.is_some_and(|by| by.is_ipv4() == v4), "{case}: {rejection}");
    assert!(rejected.is_rejected() && !rejected.is_silent());

    let dropped = outcome(from, protocol, vip(to, 82)).await;
    assert!(dropped.is_silent(), "{case}: {dropped}");

    let prohibited = outcome(from, protocol, vip(to, 84)).await;
    let (kind, code) = if v4 { (3, 13) } else { (1, 1) };
    let how = prohibited.rejection().map(|rejection| rejection.how);
    assert_eq!(how, Some(How::IcmpOther { kind, code }), "{case}: {prohibited}");
    assert!(!prohibited.is_rejected());
}

/// Nobody listens.
async fn refusals_of_the_kernel(from: &Ns, to: &str) {
    let tcp = outcome(from, Protocol::Tcp, vip(to, 85)).await;
    assert_eq!(tcp.rejection(), Some(&Rejection::reset()), "{} to {to}: {tcp}", from.name());
    let udp = outcome(from, Protocol::Udp, vip(to, 85)).await;
    let how = udp.rejection().map(|rejection| rejection.how);
    assert_eq!(how, Some(How::IcmpPortUnreachable), "{} to {to}: {udp}", from.name());
}

#[tokio::test]
async fn five_hundred_rejects_look_all_alike() {
    require_lab!();
    let world = Topology::standard().build("limits").unwrap();
    nft(world.node(), REFUSALS);
    for to in VIPS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let spec = ProbeSpec::new(protocol, vip(to, 81));
            let tally = probe_many(world.client(), &spec, &Many::new(500)).await;
            assert_eq!((tally.rejects(), tally.rejected.len()), (500, 1), "{to}: {tally}");
        }
    }
}

#[tokio::test]
async fn translation_and_masquerade_are_seen_and_a_flow_is_balanced() {
    require_lab!();
    let world = Topology::standard().build("masquerade").unwrap();
    let responders = pods(&world);
    nft(
        world.node(),
        "
table inet balance {
  chain pre {
    type nat hook prerouting priority dstnat;
    ip daddr 10.97.0.21 meta l4proto { tcp, udp } dnat ip to numgen random mod 2 map { 0 : 10.61.3.21, 1 : 10.61.4.21 }
    ip6 daddr fd41:97::21 meta l4proto { tcp, udp } dnat ip6 to numgen random mod 2 map { 0 : fd41:61:0:3::21, 1 : fd41:61:0:4::21 }
  }
  chain post {
    type nat hook postrouting priority srcnat;
    th dport 8080 ct status dnat meta mark 1 masquerade fully-random
    ct status dnat ip saddr 192.0.2.77 masquerade
    ct status dnat ip saddr 10.61.3.21 ip daddr 10.61.3.21 masquerade
    ct status dnat ip6 saddr fd41:61:0:3::21 ip6 daddr fd41:61:0:3::21 masquerade
  }
}",
    );
    let many = Many::new(200).until_seen(["pod_a", "remote_a"]);
    for to in VIPS {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            // Also a pod that may reach itself, and a pod beside one of the endpoints.
            for from in ["client", "pod_b", "remote_b", "pod_a"] {
                let ns = world.ns(from).unwrap();
                let spec = ProbeSpec::new(protocol, vip(to, 8080));
                let tally = probe_many(&ns, &spec, &many).await;
                assert_eq!(tally.stopped, Stopped::Seen, "{from} to {to}/{protocol}: {tally}");
                assert_eq!(tally.answers(), tally.total(), "{from} to {to}: {tally}");
                let remote = &tally.answered["remote_a"];
                assert_eq!((remote.source_kept, remote.source_changed), (remote.count, 0));
                let hairpin = &tally.answered["pod_a"];
                assert_eq!(hairpin.source_changed > 0, from == "pod_a", "{hairpin:?}");
            }
        }
    }
    // The other address of the client is masqueraded.
    let second: IpAddr = "192.0.2.77".parse().unwrap();
    let spec = ProbeSpec::tcp(vip("10.97.0.21", 8080)).from_ip(second);
    let tally = probe_many(world.client(), &spec, &many).await;
    assert!(tally.seen().iter().all(|ip| *ip != second) && tally.answers() > 0, "{tally:?}");
    assert!(tally.answered.values().all(|endpoint| endpoint.source_kept == 0), "{tally:?}");
    assert!(responders.iter().flat_map(Responder::counts).any(|(_, count)| count > 10));
}

#[tokio::test]
async fn a_connection_survives_its_rules_and_a_flow_moves_when_it_is_forgotten() {
    require_lab!();
    let world = Topology::standard().build("conversation").unwrap();
    let mut responders = pods(&world);
    let to = |ip: &str| {
        nft(
            world.node(),
            &format!(
                "table ip move\ndelete table ip move\ntable ip move {{
                   chain pre {{ type nat hook prerouting priority dstnat;
                     ip daddr 10.97.0.21 meta l4proto {{ tcp, udp }} dnat to {ip}; }}
                 }}"
            ),
        );
    };
    to("10.61.3.21");
    let tcp = ProbeSpec::tcp(vip("10.97.0.21", 8080));
    let udp = ProbeSpec::udp(vip("10.97.0.21", 8080)).within(Duration::from_millis(400));
    let mut connection = Conversation::open(world.client(), &tcp).await.unwrap();
    let mut flow = Conversation::open(world.client(), &udp).await.unwrap();
    assert_eq!(connection.opening().map(|answer| answer.by.as_str()), Some("pod_a"));
    assert_eq!(flow.ask().await.by(), Some("pod_a"));
    to("10.61.3.22");
    for _ in 0..3 {
        assert_eq!(connection.ask().await.by(), Some("pod_a"));
        assert_eq!(flow.ask().await.by(), Some("pod_a"));
    }
    assert_eq!(probe(world.client(), &tcp).await.by(), Some("pod_b"));
    let moved = udp.clone().from_socket(flow.local());
    drop(flow);
    // The entry stays for the very same flow, until something deletes it.
    let mut again = Conversation::open(world.client(), &moved).await.unwrap();
    assert_eq!(again.ask().await.by(), Some("pod_a"));
    // An endpoint that goes refuses the flow that still leads to it.
    assert_eq!(responders.iter_mut().map(|responder| responder.close("pod_a")).sum::<usize>(), 4);
    let gone = again.ask().await;
    assert!(gone.is_rejected(), "{gone}");
    assert!(connection.ask().await.answer().is_none());
}

#[tokio::test]
async fn many_probes_stop_in_time_even_if_nobody_answers() {
    require_lab!();
    let world = Topology::standard().build("bounded").unwrap();
    nft(world.node(), REFUSALS);
    let spec = ProbeSpec::tcp(vip(VIPS[0], 82)).within(Duration::from_millis(100));
    let many = Many::new(1_000_000).parallel(4).within(Duration::from_millis(500));
    let started = Instant::now();
    let tally = probe_many(world.client(), &spec, &many).await;
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!((tally.stopped, tally.silent), (Stopped::Deadline, tally.total()));
}

#[tokio::test]
async fn forged_link_local_and_impossible_sources() {
    require_lab!();
    let world = Topology::standard().build("sources").unwrap();
    let at = vip("10.61.3.21", 8080);
    let pod = world.ns("pod_a").unwrap();
    let any6 = vip("::", 8080);
    let _pod = Responder::start(
        &pod,
        [Endpoint::tcp("pod_a", at), Endpoint::udp("six", any6), Endpoint::tcp("six", any6)],
    )
    .unwrap();
    // Nobody knows the way to the forged address: the question arrives, the answer does not.
    let forged = ProbeSpec::tcp(at)
        .from_ip(IpAddr::from([198, 51, 100, 9]))
        .within(Duration::from_millis(300));
    let lost = probe(world.client(), &forged).await;
    assert!(lost.rejection().is_some() || lost.is_silent(), "{lost}");
    // Once the client owns it and the router knows the way, it is a source like any other.
    world.client().own("198.51.100.9").unwrap();
    world.fabric().route("198.51.100.9", proxier_testkit::lab::Via::Dev("out-client")).unwrap();
    let found = probe(world.client(), &forged).await;
    assert_eq!(
        found.answer().map(|answer| answer.seen.ip()),
        forged.source.map(|s| s.ip()),
        "{found}"
    );
    // A link-local address needs the link's name.
    let list =
        pod.command("ip", ["-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]).unwrap();
    let text = list.split_whitespace().find(|word| word.starts_with("fe80")).unwrap();
    let ip: IpAddr = text.split('/').next().unwrap().parse().unwrap();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let spec = ProbeSpec::new(protocol, SocketAddr::new(ip, 8080)).through("cni0");
        let outcome = probe(world.node(), &spec).await;
        assert_eq!(outcome.by(), Some("six"), "{outcome}");
    }
    // No such link.
    let nowhere = probe(world.node(), &ProbeSpec::tcp(at).through("eth7")).await;
    assert!(matches!(nowhere, Outcome::Failed(_)), "{nowhere}");
    // No route at all.
    let alone = world.lab().ns("alone").unwrap();
    let Outcome::Failed(failure) = probe(&alone, &ProbeSpec::tcp(at)).await else { panic!() };
    assert_eq!(failure.kind, std::io::ErrorKind::NetworkUnreachable);
}

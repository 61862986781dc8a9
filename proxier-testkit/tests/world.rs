//! The standard world: everybody who must talk can talk, and quickly.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxier_testkit::lab::{Lab, LabError, Ns};
use proxier_testkit::require_lab;
use proxier_testkit::topology::{HostSpec, LinkSpec, NodeSpec, RemoteSpec, Topology, World};
use proxier_testkit::traffic::{
    Conversation, Endpoint, How, Many, Outcome, ProbeSpec, Protocol, Responder, probe, probe_many,
    sctp_supported,
};

const HOSTS: [&str; 7] = ["client", "node", "other", "pod_a", "pod_b", "remote_a", "remote_b"];

/// A responder in each of the hosts, on port 8080 of all its addresses.
fn respond_everywhere(world: &World) -> Vec<Responder> {
    let start = |name: &str| {
        let endpoints = world.addrs(name).into_iter().flat_map(|ip| {
            let at = SocketAddr::new(ip, 8080);
            [Endpoint::tcp(name, at), Endpoint::udp(name, at)]
        });
        let ns = world.ns(name).expect("a host of the world");
        Responder::start(&ns, endpoints).expect("the endpoints open")
    };
    HOSTS.into_iter().map(start).collect()
}

async fn ask(ns: &Ns, protocol: Protocol, ip: IpAddr, port: u16) -> Outcome {
    probe(ns, &ProbeSpec::new(protocol, SocketAddr::new(ip, port))).await
}

#[tokio::test]
async fn everybody_reaches_everybody_over_tcp_and_udp_in_both_families() {
    require_lab!();
    let world = Topology::standard().build("pairs").unwrap();
    let _responders = respond_everywhere(&world);
    for from in HOSTS {
        let ns = world.ns(from).unwrap();
        for to in HOSTS {
            for ip in world.addrs(to) {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    let outcome = ask(&ns, protocol, ip, 8080).await;
                    let answer = outcome.answer();
                    let answer =
                        answer.unwrap_or_else(|| panic!("{from} to {ip}/{protocol}: {outcome}"));
                    assert_eq!(answer.by, to);
                    assert_eq!(answer.reached_at, SocketAddr::new(ip, 8080));
                    assert!(answer.source_kept(), "{from} to {ip}: {answer}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_standard_world_is_made_quickly() {
    require_lab!();
    // About 0.1 s on an idle machine with two cores. The bound leaves room for twenty other
    // processes that do the same.
    let make = |_| {
        let started = Instant::now();
        let _world = Topology::standard().build("quick").unwrap();
        started.elapsed()
    };
    let quickest = (0..8).map(make).find(|took| *took < Duration::from_secs(5));
    assert!(quickest.is_some());
}

#[tokio::test]
async fn sctp_is_asked_and_answered_where_the_kernel_has_it() {
    require_lab!();
    let world = Topology::standard().build("sctp").unwrap();
    let pod = world.ns("pod_a").unwrap();
    for ip in world.addrs("pod_a") {
        let at = SocketAddr::new(ip, 5355);
        let started = Responder::start(&pod, [Endpoint::new("pod_a", Protocol::Sctp, at)]);
        let spec = ProbeSpec::new(Protocol::Sctp, at);
        let outcome = probe(world.client(), &spec).await;
        if sctp_supported(&pod).unwrap() {
            assert!(started.is_ok(), "{started:?}");
            assert_eq!(outcome.by(), Some("pod_a"), "{outcome}");
            let mut conversation = Conversation::open(world.client(), &spec).await.unwrap();
            assert_eq!(conversation.ask().await.by(), Some("pod_a"));
            drop(started);
            assert!(conversation.ask().await.answer().is_none());
            let closed = probe(world.client(), &spec).await;
            assert!(closed.is_rejected(), "{closed}");
        } else {
            assert!(matches!(started, Err(LabError::Socket { .. })));
            assert!(matches!(outcome, Outcome::Failed(_)), "{outcome}");
        }
    }
}

#[tokio::test]
async fn a_thousand_tcp_probes_take_about_a_second() {
    require_lab!();
    let world = Topology::standard().build("rate").unwrap();
    let _responders = respond_everywhere(&world);
    let at = SocketAddr::new(world.v4("pod_a").unwrap(), 8080);
    for spec in [ProbeSpec::tcp(at), ProbeSpec::udp(at)] {
        let tally = probe_many(world.client(), &spec, &Many::new(1000)).await;
        println!(
            "{} {tally} p50 {:?} p99 {:?}",
            spec.protocol,
            tally.connect.percentile(50),
            tally.connect.percentile(99)
        );
        assert_eq!(tally.count("pod_a"), 1000, "{tally}");
        assert!(tally.elapsed < Duration::from_secs(3), "{tally}");
        assert!(tally.connect.percentile(50) < Some(Duration::from_millis(100)));
    }
}

#[tokio::test]
async fn what_the_node_leaves_alone_ends_at_the_owner_or_without_a_route() {
    require_lab!();
    let world = Topology::standard().build("owned").unwrap();
    for (vip, no_route) in [
        ("10.97.0.21", How::IcmpOther { kind: 3, code: 0 }),
        ("fd41:97::21", How::IcmpOther { kind: 1, code: 0 }),
    ] {
        let ip: IpAddr = vip.parse().unwrap();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for from in ["client", "pod_a", "remote_a", "node", "other"] {
                let outcome = ask(&world.ns(from).unwrap(), protocol, ip, 80).await;
                assert_eq!(
                    outcome.rejection().map(|rejection| rejection.how),
                    Some(no_route),
                    "{from} to {vip}/{protocol}: {outcome}"
                );
            }
        }
    }
    world.own("10.97.0.0/16").unwrap();
    world.own("fd41:97::/108").unwrap();
    let any = |text: &str| SocketAddr::new(text.parse().unwrap(), 80);
    let endpoints = ["0.0.0.0", "::"]
        .into_iter()
        .flat_map(|ip| [Endpoint::tcp("untouched", any(ip)), Endpoint::udp("untouched", any(ip))]);
    let _owner = Responder::start(world.fabric(), endpoints).unwrap();
    for vip in ["10.97.0.21", "fd41:97::21"] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for from in ["client", "pod_a", "remote_a", "node", "other"] {
                let ns = world.ns(from).unwrap();
                let outcome = ask(&ns, protocol, vip.parse().unwrap(), 80).await;
                let answer = outcome.answer();
                let answer =
                    answer.unwrap_or_else(|| panic!("{from} to {vip}/{protocol}: {outcome}"));
                assert_eq!((answer.by.as_str(), answer.reached_at), ("untouched", any(vip)));
            }
        }
    }
}

/// Other names, two further nodes, a second link, a link-local address, no IPv6 on some.
#[tokio::test]
async fn a_world_is_made_from_any_data() {
    require_lab!();
    let uplink = LinkSpec::new("eth0", ["172.20.7.1/24", "fd41:7::11/64", "fe80::b/64"]).unwrap();
    let bridge = LinkSpec::new("cni0", ["10.61.3.1/24", "fd41:61:0:3::1/64"]).unwrap();
    let mut node = NodeSpec::new("tern", uplink, bridge);
    node.extra.push(LinkSpec::new("eth1", ["172.21.7.11/24"]).unwrap());
    let heron = RemoteSpec::new("heron", ["172.20.7.12", "fd41:7::12"], ["10.61.4.0/24"]).unwrap();
    let egret = RemoteSpec::new("egret", ["172.20.7.13"], ["10.61.5.0/24"]).unwrap();
    let many: Vec<_> = (20..120).map(|last| format!("10.61.3.{last}")).collect();
    let topology = Topology::new(node, HostSpec::new("outside", ["192.0.2.55"]).unwrap())
        .outside(HostSpec::new("second-client", ["192.0.2.77", "2001:db8:55::9"]).unwrap())
        .pod(HostSpec::new("pod-here", ["10.61.3.9", "fd41:61:0:3::9"]).unwrap())
        .pod(HostSpec::new("endpoints-here-with-a-long-name", many).unwrap())
        .remote(heron.pod(HostSpec::new("pod-there", ["10.61.4.9"]).unwrap()))
        .remote(egret.pod(HostSpec::new("endpoints-there", ["10.61.5.40", "10.61.5.41"]).unwrap()));
    let world = topology.build("any").unwrap();
    assert_eq!((world.client().name(), world.pods().count()), ("outside", 2));
    assert_eq!(world.remote_pods().count(), 2);
    let any = ["0.0.0.0:80".parse().unwrap(), "[::]:80".parse().unwrap()];
    let open = |ns: Ns| Responder::start(&ns, any.map(|at| Endpoint::tcp(ns.name(), at))).unwrap();
    let _open: Vec<_> = world.lab().namespaces().into_iter().map(open).collect();
    for (from, to, by) in [
        ("outside", "172.21.7.11", "tern"),
        ("outside", "10.61.3.119", "endpoints-here-with-a-long-name"),
        ("outside", "192.0.2.77", "second-client"),
        ("pod-there", "10.61.5.41", "endpoints-there"),
        ("endpoints-there", "10.61.3.9", "pod-here"),
        ("second-client", "fd41:7::11", "tern"),
        ("second-client", "fd41:61:0:3::9", "pod-here"),
        ("egret", "172.20.7.1", "tern"),
        ("tern", "10.61.4.9", "pod-there"),
        ("tern", "127.0.0.1", "tern"),
        ("tern", "::1", "tern"),
    ] {
        let outcome = ask(&world.ns(from).unwrap(), Protocol::Tcp, to.parse().unwrap(), 80).await;
        assert_eq!(outcome.by(), Some(by), "{from} to {to}: {outcome}");
    }
    let link_local = "[fe80::b]:80".parse().unwrap();
    let through = ProbeSpec::tcp(link_local).through("eth0");
    assert_eq!(probe(&world.ns("heron").unwrap(), &through).await.by(), Some("tern"));

    let astray = RemoteSpec::new("astray", ["172.99.0.1"], ["10.61.9.0/24"]).unwrap();
    let error = Topology::standard().remote(astray).build("astray").unwrap_err();
    assert!(matches!(error, LabError::Topology { .. }), "{error}");
}

#[test]
fn a_namespace_or_link_that_exists_is_named_in_the_error() {
    require_lab!();
    let lab = Lab::new("errors").unwrap();
    let ns = lab.ns("one").unwrap();
    assert!(matches!(lab.ns("one"), Err(LabError::Name { .. })));
    ns.bridge("br0").unwrap();
    ns.addr("br0", "10.0.0.1/24").unwrap();
    let again = ns.addr("br0", "10.0.0.1/24").unwrap_err();
    assert_eq!(again.to_string(), "one: add address 10.0.0.1/24 to br0");
    let LabError::Kernel { source, .. } = again else { panic!("{again}") };
    assert_eq!(source.kind(), std::io::ErrorKind::AlreadyExists);
    let missing = ns.addr("eth9", "10.0.0.1/24").unwrap_err();
    assert_eq!(std::error::Error::source(&missing).unwrap().to_string(), "no link eth9");
    assert!(matches!(ns.bridge("a-name-of-17-byte"), Err(LabError::Name { .. })));
    let failed = ns.command("nft", ["list", "table", "ip", "nothing"]).unwrap_err();
    assert!(failed.to_string().contains("nft list table ip nothing"), "{failed}");
}

//! A flood of connections that never come about, against a proxier that captures.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::Arc,
};

use common::*;
use proxier_backend_userspace::{Config, Limits, engine};
use proxier_core::{Family, Protocol, Proxier, Revision, Update};
use proxier_netlink::NetNs;
use proxier_testkit::{
    lab::{Lab, Ns, Via},
    require_lab,
    traffic::{self, Endpoint, Many, ProbeSpec, Responder, probe_many},
};
use socket2::{Domain, Socket, Type};

/// More than the queues of all listeners of an origin hold.
const SYNS: u32 = 30_000;
const NODE: Ipv4Addr = Ipv4Addr::new(10, 82, 1, 1);
const FRONTEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 97, 0, 21), 80);

fn wire(lab: &Lab) -> (Ns, Ns) {
    let (client, node) = (lab.ns("client").unwrap(), lab.ns("node").unwrap());
    lab.veth((&client, "eth0"), (&node, "eth0")).unwrap();
    client.addr("eth0", "10.82.1.2/24").unwrap();
    node.addr("eth0", "10.82.1.1/24").unwrap();
    client.route("10.97.0.0/16", Via::Gateway(NODE.into())).unwrap();
    // What is answered to those who do not exist gets lost there.
    node.default_route([10, 82, 1, 2].into()).unwrap();
    node.sysctl("net.ipv4.ip_forward", "1").unwrap();
    node.sysctl("net.ipv4.conf.all.rp_filter", "0").unwrap();
    (client, node)
}

/// The sum of TCP (RFC 9293, 3.1).
fn sum(words: &[u8]) -> u16 {
    let words = words.chunks(2).map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A packet that asks for a connection.
fn syn(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let addresses = [from.ip().octets(), to.ip().octets()].concat();
    let mut tcp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    tcp.extend([0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 5 << 4, 2, 0xfa, 0xf0, 0, 0, 0, 0]);
    let pseudo = [&addresses[..], &[0, 6, 0, 20], &tcp].concat();
    tcp[16..18].copy_from_slice(&sum(&pseudo).to_be_bytes());
    // The kernel fills in length, identification and sum.
    [&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0], &addresses[..], &tcp].concat()
}

/// Sends them all, each from somebody else.
fn flood() {
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(255.into())).unwrap();
    for number in 0..SYNS {
        let from = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number);
        let packet = syn(SocketAddrV4::new(from, 40_000), FRONTEND);
        raw.send_to(&packet, &SocketAddr::from(FRONTEND).into()).unwrap();
    }
}

/// A figure of the kernel's statistics of a namespace.
fn statistic(ns: &Ns, name: &str) -> u64 {
    let text =
        ns.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).unwrap().unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|it| it.split(' ').collect()).collect();
    let index = lines[0].iter().position(|it| *it == name).unwrap();
    lines[1][index].parse().unwrap()
}

#[test]
fn a_flood_of_half_open_connections_keeps_nobody_out() {
    require_lab!();
    let lab = Lab::new("flood").unwrap();
    let (client, node) = wire(&lab);
    let at = SocketAddr::new(IpAddr::V4(NODE), 9000);
    let _endpoint =
        Responder::start(&node, [Endpoint::new("echo", traffic::Protocol::Tcp, at)]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let limits = Limits { workers: 2.try_into().ok(), ..Limits::default() };
        let config = Config { limits, ..Config::default() };
        let mut engine = engine(&config, &NetNs::Path(node.path()), &[Family::V4]).unwrap();
        let fragments = vec![Arc::new(fragment(Protocol::Tcp, &[at]))];
        let update = Update::Reset { revision: Revision(1), node: Arc::default(), fragments };
        assert_eq!(engine.sync(update).await.unwrap().degraded, []);
        let monitor = engine.dataplane().monitor();

        let ask = ProbeSpec::tcp(FRONTEND.into());
        assert_eq!(probe_many(&client, &ask, &Many::new(20)).await.answers(), 20);
        let (held, cookies) = (descriptors(), statistic(&node, "SyncookiesSent"));
        let flooding = client.clone();
        let flooding = tokio::task::spawn_blocking(move || flooding.run(flood));
        let mut asked = 20;
        while !flooding.is_finished() || asked < 220 {
            let tally = probe_many(&client, &ask, &Many::new(100).parallel(8)).await;
            assert_eq!(tally.answers(), 100, "{tally:?}");
            asked += 100;
        }
        flooding.await.unwrap().unwrap();
        assert!(statistic(&node, "SyncookiesSent") > cookies, "no queue was ever full");
        until("the connections that came about end", || {
            monitor.snapshot().services[0].total.active == 0
        })
        .await;
        // The process has heard of those only that came about.
        let snapshot = monitor.snapshot();
        assert_eq!((snapshot.services[0].total.opened, snapshot.unreachable), (asked, 0));
        assert!(descriptors() <= held + 8, "{held} before, {} after", descriptors());
        engine.cleanup().await.unwrap();
    });
}

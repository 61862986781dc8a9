//! Listing and deleting flows that real packets made.

#![cfg(test)]

mod common;

use std::net::UdpSocket;

use common::Lab;
use proxier_netlink::ErrorKind;
use proxier_netlink::ct::{Conntrack, CtFamily, Layer4};
use proxier_netlink::nft::*;

/// A namespace with loopback up, flows tracked, and 10.96.0.1:53/udp translated to 127.0.0.1:5353.
async fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.run("ip link set lo up && ip addr add 10.96.0.1/32 dev lo");
    lab.apply(|tx| {
        tx.new_table(Family::Ipv4, "t");
        let base = BaseChain {
            kind: ChainType::Nat,
            hook: Hook::Output,
            priority: -100,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(Family::Ipv4, "t", "out").base(base));
        tx.rule(RuleSpec::append(Family::Ipv4, "t", "out"), |e| {
            e.payload(PayloadBase::NETWORK, 16, 4, Reg::R1);
            e.cmp(Reg::R1, CmpOp::EQ, &[10, 96, 0, 1]);
            e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[17]);
            e.immediate_data(Reg::R1, &[127, 0, 0, 1]);
            e.immediate_data(Reg::R2, &5353_u16.to_be_bytes());
            e.nat(Nat::dnat(Family::Ipv4, Reg::R1, Some(Reg::R2)));
        });
        tx.new_table(Family::Ipv6, "t");
        let base = BaseChain { kind: ChainType::Filter, priority: 0, ..base };
        tx.chain(ChainSpec::new(Family::Ipv6, "t", "out").base(base));
        tx.rule(RuleSpec::append(Family::Ipv6, "t", "out"), |e| {
            e.ct(CtKey::STATE, Reg::R1, None);
        });
    })
    .await;
    lab
}

/// Sends one packet from each of `count` sockets and keeps them.
fn send(lab: &Lab, count: usize, from: &str, to: &str) -> Vec<UdpSocket> {
    let one = || {
        let socket = UdpSocket::bind(from).unwrap();
        socket.send_to(b"x", to).unwrap();
        socket
    };
    lab.ns.run(|| (0..count).map(|_| one()).collect()).unwrap()
}

fn tool(lab: &Lab, family: &str) -> usize {
    lab.run(&format!("conntrack -L -f {family} -p udp 2>/dev/null | wc -l")).trim().parse().unwrap()
}

#[tokio::test]
async fn flows_are_listed_with_both_directions() {
    let lab = lab().await;
    let mut ct = Conntrack::open(&lab.ns).unwrap();
    assert!(ct.list(CtFamily::Ipv4, None).await.unwrap().is_empty());
    let sockets = send(&lab, 1, "127.0.0.1:0", "10.96.0.1:53");
    let _v6 = send(&lab, 2, "[::1]:0", "[::1]:9");
    let flows = ct.list(CtFamily::Ipv4, Some(17)).await.unwrap();
    assert_eq!(flows.len(), 1);
    let flow = flows[0];
    let port = sockets[0].local_addr().unwrap().port();
    assert_eq!((flow.orig.dst.to_string(), flow.orig.dst_port()), ("10.96.0.1".into(), Some(53)));
    assert_eq!((flow.orig.protocol, flow.orig.src_port()), (17, Some(port)));
    assert_eq!(flow.reply.src.to_string(), "127.0.0.1");
    assert_eq!(flow.reply.src_port(), Some(5353));
    assert!(flow.status.contains(CtStatus::DST_NAT | CtStatus::CONFIRMED));
    assert!(flow.timeout_secs.unwrap() > 0 && flow.mark == 0 && flow.zone.is_none());
    assert!(ct.list(CtFamily::Ipv4, Some(6)).await.unwrap().is_empty());
    let v6 = ct.list(CtFamily::Ipv6, Some(17)).await.unwrap();
    assert_eq!((v6.len(), tool(&lab, "ipv6")), (2, 2));
    assert!(v6.iter().all(|f| matches!(f.orig.layer4, Layer4::Ports { dst: 9, .. })));
}

#[tokio::test]
async fn one_flow_can_be_deleted_and_only_that() {
    let lab = lab().await;
    let mut ct = Conntrack::open(&lab.ns).unwrap();
    let _sockets = send(&lab, 3, "127.0.0.1:0", "10.96.0.1:53");
    let flows = ct.list(CtFamily::Ipv4, Some(17)).await.unwrap();
    assert_eq!((flows.len(), tool(&lab, "ipv4")), (3, 3));
    assert_eq!(ct.answered(&flows[1].reply).await.unwrap().map(|it| it.id), Some(flows[1].id));
    assert!(ct.delete(&flows[1]).await.unwrap());
    assert_eq!(ct.answered(&flows[1].reply).await.unwrap(), None);
    assert_eq!(tool(&lab, "ipv4"), 2);
    assert!(!ct.delete(&flows[1]).await.unwrap());
    // The same addresses with another identifier are another flow.
    let mut other = flows[0];
    other.id = other.id.wrapping_add(1);
    assert!(!ct.delete(&other).await.unwrap());
    let left = ct.list(CtFamily::Ipv4, None).await.unwrap();
    assert!(left.len() == 2 && !left.iter().any(|f| f.id == flows[1].id));
}

#[tokio::test]
async fn flows_to_a_dead_endpoint_are_deleted_and_others_stay() {
    let lab = lab().await;
    let mut ct = Conntrack::open(&lab.ns).unwrap();
    let _stale = send(&lab, 500, "127.0.0.1:0", "10.96.0.1:53");
    let _kept = send(&lab, 100, "127.0.0.1:0", "127.0.0.1:7");
    let _v6 = send(&lab, 130, "[::1]:0", "[::1]:9");
    let dead = "127.0.0.1".parse::<std::net::IpAddr>().unwrap();
    let deleted = ct
        .delete_matching(CtFamily::Ipv4, |flow| {
            flow.orig.protocol == 17
                && flow.orig.dst_port() == Some(53)
                && (flow.reply.src, flow.reply.src_port()) == (dead, Some(5353))
        })
        .await
        .unwrap();
    assert_eq!((deleted, tool(&lab, "ipv4"), tool(&lab, "ipv6")), (500, 100, 130));
    assert_eq!(ct.delete_matching(CtFamily::Ipv6, |_| true).await.unwrap(), 130);
    assert_eq!((tool(&lab, "ipv4"), tool(&lab, "ipv6")), (100, 0));
    assert_eq!(ct.delete_matching(CtFamily::Ipv6, |_| true).await.unwrap(), 0);
}

#[tokio::test]
async fn icmp_flows_can_be_deleted_too() {
    let lab = lab().await;
    let ping = "command -v ping >/dev/null || exit 0; ping -c1 -W1 127.0.0.1 >/dev/null; echo sent";
    let sent = lab.run(ping).contains("sent");
    let mut ct = Conntrack::open(&lab.ns).unwrap();
    let flows = ct.list(CtFamily::Ipv4, Some(1)).await.unwrap();
    assert_eq!(flows.len(), usize::from(sent));
    for flow in flows {
        assert!(matches!(flow.orig.layer4, Layer4::Icmp { kind: 8, code: 0, .. }));
        assert!(ct.delete(&flow).await.unwrap());
    }
}

#[tokio::test]
async fn errors_have_kinds() {
    let lab = Lab::new();
    lab.ns
        .run(|| {
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective = rustix::thread::CapabilitySet::empty();
            sets.permitted = rustix::thread::CapabilitySet::empty();
            rustix::thread::set_capabilities(None, sets).unwrap();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut ct = Conntrack::open(&proxier_netlink::NetNs::Current).unwrap();
                let error = ct.list(CtFamily::Ipv4, None).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Permission);
                assert!(error.to_string().contains("needs CAP_NET_ADMIN"), "{error}");
                let error = proxier_netlink::Events::open(&proxier_netlink::NetNs::Current);
                let error = error.map(drop).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Permission, "{error}");
            });
        })
        .unwrap();
}

#[tokio::test]
async fn flows_of_a_zone_are_told_apart() {
    let mut lab = lab().await;
    let _plain = send(&lab, 1, "127.0.0.1:0", "127.0.0.1:7");
    lab.apply(|tx| {
        let base = BaseChain {
            kind: ChainType::Filter,
            hook: Hook::Output,
            priority: -300,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(Family::Ipv4, "t", "raw").base(base));
        tx.rule(RuleSpec::append(Family::Ipv4, "t", "raw"), |e| {
            e.immediate_data(Reg::R1, &5_u16.to_ne_bytes()).ct_set(CtKey::ZONE, Reg::R1, None);
        });
    })
    .await;
    let _zoned = send(&lab, 1, "127.0.0.1:0", "127.0.0.1:7");
    let mut ct = Conntrack::open(&lab.ns).unwrap();
    let flows = ct.list(CtFamily::Ipv4, Some(17)).await.unwrap();
    let zones: Vec<_> = flows.iter().filter_map(|f| f.zone).collect();
    assert_eq!((flows.len(), zones), (2, vec![5]));
    let zoned = flows.iter().find(|f| f.zone == Some(5)).unwrap();
    // The same addresses without the zone are no flow.
    let mut elsewhere = *zoned;
    elsewhere.zone = None;
    assert!(!ct.delete(&elsewhere).await.unwrap());
    assert!(ct.delete(zoned).await.unwrap());
    let left = ct.list(CtFamily::Ipv4, Some(17)).await.unwrap();
    assert!(left.len() == 1 && left[0].zone.is_none());
}

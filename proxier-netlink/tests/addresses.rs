//! The addresses of interfaces, and how they change.

#![cfg(test)]

mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::Lab;
use proxier_netlink::Addresses;

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The next list, or a panic that says what was waited for.
async fn next(addresses: &mut Addresses, what: &str) -> Vec<IpAddr> {
    let limit = Duration::from_secs(10);
    let next = tokio::time::timeout(limit, addresses.next()).await;
    next.unwrap_or_else(|_| panic!("waited for {what}")).unwrap()
}

#[tokio::test]
async fn addresses_are_told_as_they_come_and_go() {
    let lab = Lab::new();
    lab.run("ip link add d0 type veth peer name d1 && ip link set lo up && ip link set d0 up");
    lab.run("ip address add 172.20.7.11/24 dev d0 && ip link set d1 up");
    let mut addresses = Addresses::open(&lab.ns).unwrap();
    let first = next(&mut addresses, "the first list").await;
    assert_eq!(first, ips(&["127.0.0.1", "172.20.7.11", "::1"]), "link-local ones are left out");
    lab.run("ip address add 172.20.7.12/24 dev d0");
    let more = next(&mut addresses, "an address that came").await;
    assert_eq!(more, ips(&["127.0.0.1", "172.20.7.11", "172.20.7.12", "::1"]));
    lab.run("ip address add 10.9.9.1 peer 10.9.9.2 dev d1");
    assert!(next(&mut addresses, "one with a peer").await.contains(&"10.9.9.1".parse().unwrap()));
    lab.run("ip address add fd41:7::11/64 dev d0 nodad");
    assert!(next(&mut addresses, "one of IPv6").await.contains(&"fd41:7::11".parse().unwrap()));
    lab.run("ip link del d0");
    let rest = next(&mut addresses, "the end of an interface").await;

    assert_eq!(rest, ips(&["127.0.0.1", "::1"]));
}

#[tokio::test]
async fn what_changes_nothing_is_not_told() {
    let lab = Lab::new();
    lab.run("ip link set lo up && ip address add 10.1.1.1/32 dev lo");
    let mut addresses = Addresses::open(&lab.ns).unwrap();
    next(&mut addresses, "the first list").await;
    // The same address on another interface, and one that lives a moment.
    lab.run("ip link add d0 type veth peer name d1 && ip address add 10.1.1.1/32 dev d0");
    lab.run("ip address add 10.1.1.2/32 dev lo && ip address del 10.1.1.2/32 dev lo");
    lab.run("ip address add 10.1.1.3/32 dev lo");
    let now = next(&mut addresses, "the last address").await;
    assert_eq!(now, ips(&["10.1.1.1", "10.1.1.3", "127.0.0.1", "::1"]));
}

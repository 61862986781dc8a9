//! The nftables mode under a driver: what others do, and what the node does. Needs namespaces (see
//! CONTRIBUTING.md) and `nft`.
#![cfg(all(feature = "addresses", feature = "manifests", feature = "nftables"))]
#![allow(clippy::panic, clippy::unwrap_used, reason = "any failure fails the test")]

use std::time::Duration;

use proxier::{
    Driver, Handle, Mode, OpenContext, Pacing, Standing,
    manifest::Manifest,
    model::{Event, NodeEnv, NodePortAddresses},
};
use proxier_testkit::{
    eventually_async,
    lab::{Lab, Ns},
    require_lab,
};

/// How long anything is waited for.
const LIMIT: Duration = Duration::from_secs(20);

const SHOP: &str = "
kind: Service
metadata: {name: cart, namespace: shop}
spec: {type: NodePort, clusterIP: 10.97.0.21, ports: [{port: 80, nodePort: 31080}]}
---
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: '', port: 8080}]
endpoints: [{addresses: [10.61.3.21]}, {addresses: [10.61.3.22]}]
";

/// Starts a driver of the nftables mode that has programmed the shop.
async fn start(ns: &Ns, env: NodeEnv) -> Handle {
    let mut context = OpenContext::default();
    context.netns = Some(ns.path());
    let proxier = proxier::open(Mode::Nftables, &context).await.unwrap();
    let (driver, handle) = Driver::new(proxier, env, Pacing::default());
    tokio::spawn(driver.run(std::future::pending()));
    let manifest = Manifest::parse("shop.yaml", SHOP);
    handle.send(Event::Services(manifest.services().cloned().collect())).await.unwrap();
    handle.send(Event::EndpointSlices(manifest.slices().cloned().collect())).await.unwrap();
    assert_eq!(handle.settle().await.unwrap().failure, None);
    handle
}

fn nft(ns: &Ns, line: &str) -> String {
    ns.command("nft", line.split(' ')).unwrap()
}

/// Waits until the driver stands so.
async fn wait(handle: &Handle, what: &str, is_so: impl FnMut(&Standing) -> bool) {
    let mut standing = handle.standing();
    let wait = tokio::time::timeout(LIMIT, standing.wait_for(is_so));
    wait.await.unwrap_or_else(|_| panic!("waited for {what}")).unwrap();
}

#[test]
fn what_others_remove_is_back_without_being_asked() {
    require_lab!();
    let lab = Lab::new("drift").unwrap();
    let node = lab.ns("node").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let handle = start(&node, NodeEnv::default()).await;
        let before = nft(&node, "list ruleset");
        for damage in [
            "delete element ip proxier cluster-ips { 10.97.0.21 }",
            "flush map ip proxier service-endpoints",
            "flush chain ip proxier nat-prerouting",
            "add element ip proxier cluster-ips { 10.97.0.99 }",
            "delete table ip proxier",
            "flush ruleset",
        ] {
            let drift = handle.standing().borrow().proxier.totals.drift;
            nft(&node, damage);
            wait(&handle, damage, |standing| standing.proxier.totals.drift > drift).await;
            // The other family may be repaired by a second look.
            wait_for_same(&node, &before, damage).await;
        }
        // Its own changes, and those of other tables, are none of these.
        let drift = handle.standing().borrow().proxier.totals.drift;
        nft(&node, "add table inet other");
        handle
            .send(Event::Node(Box::new(NodeEnv { masquerade_all: true, ..NodeEnv::default() })))
            .await
            .unwrap();
        handle.settle().await.unwrap();
        assert_eq!(handle.audit().await.unwrap().proxier.totals.drift, drift);
    });
}

/// Waits until the node's rules are what they were.
async fn wait_for_same(node: &Ns, before: &str, what: &str) {
    let same = || async { sorted(&nft(node, "list ruleset")) == sorted(before) };
    eventually_async(LIMIT, what, same).await.unwrap();
}

/// Lines in an order of their own: elements are listed in none.
fn sorted(listing: &str) -> Vec<&str> {
    let mut words: Vec<_> = listing.split_whitespace().map(|it| it.trim_end_matches(',')).collect();
    words.sort_unstable();
    words
}

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    require_lab!();
    let lab = Lab::new("addresses").unwrap();
    let node = lab.ns("node").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let nets = vec!["172.20.0.0/16".parse().unwrap()];
        let env =
            NodeEnv { node_port_addresses: NodePortAddresses::Inside(nets), ..NodeEnv::default() };
        let handle = start(&node, env.clone()).await;
        let follower = handle.clone();
        let path = node.path();
        let task =
            tokio::spawn(async move { proxier::follow_addresses(Some(&path), &follower).await });
        let ip = |line: &str| drop(node.command("ip", line.split(' ')).unwrap());
        let listed = |wanted: &'static [&'static str]| {
            let node = &node;
            async move {
                let what = format!("node ports on {wanted:?}");
                let is_so = || async {
                    let list = nft(node, "list set ip proxier node-port-addresses");
                    let known = ["172.20.7.11", "172.20.7.12", "172.21.7.11"];
                    known.iter().all(|ip| list.contains(ip) == wanted.contains(ip))
                };
                eventually_async(LIMIT, &what, is_so).await.unwrap();
            }
        };
        ip("address add 172.20.7.11/32 dev lo");
        listed(&["172.20.7.11"]).await;
        ip("address add 172.21.7.11/32 dev lo");
        ip("address add 172.20.7.12/32 dev lo");
        listed(&["172.20.7.11", "172.20.7.12"]).await;
        // What the Node object says does not bring back older addresses.
        let named = NodeEnv { name: "tern".to_owned(), ..env };
        handle.send(Event::Node(Box::new(named))).await.unwrap();
        handle.settle().await.unwrap();
        listed(&["172.20.7.11", "172.20.7.12"]).await;
        ip("address del 172.20.7.11/32 dev lo");
        listed(&["172.20.7.12"]).await;
        task.abort();
    });
}

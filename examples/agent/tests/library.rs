//! From an API server to packets, in every mode that needs no guest kernel: what an embedder puts
//! together. Needs namespaces (see CONTRIBUTING.md).
#![allow(clippy::unwrap_used, reason = "any failure fails the test")]

#[path = "../../../tests/rig/modes.rs"]
mod modes;

use std::time::Duration;

use modes::modes_here;

use proxier::{
    Driver, Handle, Mode, OpenContext, Pacing,
    model::{DetectLocal, NodeEnv},
};
use proxier_kube::{
    Kind, Options, SourceStatus, Watch,
    kube::{Client, Config},
};
use proxier_testkit::{
    apiserver::ApiServer,
    eventually_async, require_lab,
    topology::{Topology, World},
    traffic::{Endpoint, ProbeSpec, Responder, probe},
};
use serde_json::{Value, json};
use tokio::sync::watch;

/// How long anything is waited for.
const LIMIT: Duration = Duration::from_secs(20);

fn service(ports: &Value) -> Value {
    json!({"kind": "Service", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"type": "NodePort", "clusterIP": "10.97.0.21", "ports": ports}})
}

fn slice(address: &str) -> Value {
    json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "cart-1", "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "cart"}},
        "endpoints": [{"addresses": [address]}], "ports": [{"name": "", "port": 8080}]})
}

/// What an embedder has: a driver, a source that feeds it, and the status of the source.
async fn start(
    world: &World,
    mode: Mode,
    server: &ApiServer,
) -> (Handle, watch::Receiver<SourceStatus>) {
    let mut context = OpenContext::default();
    context.netns = Some(world.node().path());
    let proxier = proxier::open(mode, &context).await.unwrap();
    let settings = NodeEnv {
        name: "tern".to_owned(),
        interface_addresses: world.addrs("node"),
        detect_local: DetectLocal::ClusterCidr(vec!["10.61.0.0/16".parse().unwrap()]),
        ..NodeEnv::default()
    };
    let (driver, handle) = Driver::new(proxier, settings.clone(), Pacing::default());
    tokio::spawn(driver.run(std::future::pending()));
    let client = Client::try_from(Config::new(server.url().parse().unwrap())).unwrap();
    let mut options = Options::default();
    options.first_retry = Duration::from_millis(5);
    options.longest_retry = Duration::from_millis(50);
    let source = Watch::new(client, settings, options);
    let (status, sink) = (source.status(), handle.clone());
    tokio::spawn(async move {
        let send = move |event| {
            let sink = sink.clone();
            async move { sink.send(event).await }
        };
        source.run(send, std::future::pending()).await.unwrap();
    });
    (handle, status)
}

/// Waits until `to` is answered so, asked from the client; `None`: by nobody.
async fn answered(world: &World, to: &str, by: Option<&str>) {
    let spec = ProbeSpec::tcp(to.parse().unwrap()).within(Duration::from_millis(300));
    let client = world.client();
    let what = format!("{to} to be answered by {by:?}");
    let spec = &spec;
    eventually_async(LIMIT, &what, || async move { probe(client, spec).await.by() == by })
        .await
        .unwrap();
}

async fn from_server_to_packets(mode: Mode) {
    let world = Topology::standard().build("cluster").unwrap();
    let respond = |pod: &str, ip: &str| {
        let at = format!("{ip}:8080").parse().unwrap();
        Responder::start(&world.ns(pod).unwrap(), [Endpoint::tcp(pod, at)]).unwrap()
    };
    let _a = respond("pod_a", "10.61.3.21");
    let _b = respond("pod_b", "10.61.3.22");
    let mut server = ApiServer::start(Duration::from_millis(100)).await.unwrap();
    let address = json!([{"type": "InternalIP", "address": "172.20.7.11"}]);
    server.apply(json!({"kind": "Node", "metadata": {"name": "tern"},
        "status": {"addresses": address}}));
    server.apply(json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.97.0.0/16"]}}));
    let ports = json!([{"port": 80, "nodePort": 31080}]);
    server.apply(service(&ports));
    server.apply(slice("10.61.3.21"));

    let (handle, status) = start(&world, mode, &server).await;
    for to in ["10.97.0.21:80", "172.20.7.11:31080"] {
        answered(&world, to, Some("pod_a")).await;
    }
    server.apply(slice("10.61.3.22"));
    answered(&world, "10.97.0.21:80", Some("pod_b")).await;

    // Gone for a while: forwarding goes on, and what was missed follows without a list.
    server.close().await;
    let mut gone = status.clone();
    let all = |it: &SourceStatus| it.troubles().count() == Kind::ALL.len();
    tokio::time::timeout(LIMIT, gone.wait_for(all)).await.expect("all in trouble").unwrap();
    answered(&world, "10.97.0.21:80", Some("pod_b")).await;
    server.apply(slice("10.61.3.21"));
    server.reopen().await.unwrap();
    answered(&world, "10.97.0.21:80", Some("pod_a")).await;
    assert_eq!(status.borrow().of(Kind::EndpointSlices).counts.lists, 1);

    // An object that cannot be read counts as deleted; repaired, it is back.
    server.apply(service(&json!("none")));
    answered(&world, "10.97.0.21:80", None).await;
    assert_eq!(status.borrow().of(Kind::Services).problems.len(), 1);
    server.apply(service(&ports));
    answered(&world, "10.97.0.21:80", Some("pod_a")).await;
    server.delete("services", "shop/cart");
    answered(&world, "172.20.7.11:31080", None).await;
    assert_eq!(handle.settle().await.unwrap().failure, None);
}

#[test]
fn what_the_api_server_says_is_what_packets_meet() {
    require_lab!();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for mode in modes_here() {
        runtime.block_on(from_server_to_packets(mode));
    }
}

//! What a real kube-apiserver 1.36 was recorded to say.

use std::time::Duration;

use proxier_kube::Kind;
use proxier_testkit::apiserver::{ApiServer, Fault};
use serde_json::{Value, json};

use super::rig::{Rig, client, options};

const CIDRS: &str = include_str!("../fixtures/servicecidrs.list.json");
const EXPIRED: &str = include_str!("../fixtures/services.watch-expired.jsonl");
const NODE: &str = include_str!("../fixtures/node.json");
const REFUSED: &str = include_str!("../fixtures/services.watch-initial-events-refused.jsonl");
const SERVICES: &str = include_str!("../fixtures/services.list.json");
const SERVICES_WATCH: &str = include_str!("../fixtures/services.watch.jsonl");
const SLICES: &str = include_str!("../fixtures/endpointslices.list.json");
const SLICES_WATCH: &str = include_str!("../fixtures/endpointslices.watch.jsonl");

const fn verbatim(verb: &'static str, resource: &'static str, body: &'static str) -> Fault {
    Fault::Verbatim { verb, resource, body }
}

async fn recorded() -> ApiServer {
    let server = ApiServer::start(Duration::from_millis(100)).await.unwrap();
    server.apply(serde_json::from_str(NODE).unwrap());
    for resource in ["endpointslices", "servicecidrs", "services"] {
        server.fail(verbatim("stream", resource, REFUSED));
    }
    server.fail(verbatim("list", "servicecidrs", CIDRS));
    server.fail(verbatim("list", "services", SERVICES));
    server.fail(verbatim("list", "endpointslices", SLICES));
    server
}

fn names(rig: &Rig) -> Vec<String> {
    rig.services().iter().map(|it| it.name().to_string()).collect()
}

#[tokio::test]
async fn a_recorded_server_is_understood() {
    let server = recorded().await;
    server.fail(verbatim("watch", "services", SERVICES_WATCH));
    server.fail(verbatim("watch", "endpointslices", SLICES_WATCH));
    let rig = Rig::start_with(server, "lab-node", options(true));
    rig.until("lists and watches", |rig| names(rig) == ["shop/edge", "shop/web"]).await;
    let events = |rig: &Rig, kind| rig.status.borrow().of(kind).counts.events;
    rig.until("both events of slices", |rig| events(rig, Kind::EndpointSlices) == 2).await;
    // Two endpoints with two ports each; those of the other slice came and went.
    rig.until("endpoints", |rig| rig.endpoints("web") == 4).await;
    let status = rig.status.borrow().clone();
    assert!(status.started && status.troubles().next().is_none(), "{status:#?}");
    assert!(Kind::ALL.iter().all(|kind| status.of(*kind).problems.is_empty()), "{status:#?}");
    let store = rig.store.lock().unwrap();
    assert_eq!(store.env().ips, ["10.245.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(store.env().service_cidrs, ["10.96.0.0/16".parse().unwrap()]);
}

#[tokio::test]
async fn a_recorded_expiry_leads_to_a_list() {
    let server = recorded().await;
    server.fail(verbatim("watch", "services", EXPIRED));
    let rig = Rig::start_with(server, "lab-node", options(true));
    rig.until("a second list", |rig| *rig.resets.lock().unwrap() >= 2).await;
    assert_eq!(names(&rig), ["shop/dns", "shop/edge", "shop/web"]);
}

/// The testkit's server says what the real one says, versions apart.
#[tokio::test]
async fn the_server_of_the_testkit_speaks_as_recorded() {
    let server = ApiServer::start(Duration::from_millis(100)).await.unwrap();
    let ask = |path: &'static str| {
        let client = client(&server);
        async move {
            let request = http::Request::get(path).body(Vec::new()).unwrap();
            client.request_text(request).await.unwrap()
        }
    };
    let lists = [
        ("/apis/discovery.k8s.io/v1/endpointslices", "EndpointSlice", SLICES),
        ("/apis/networking.k8s.io/v1/servicecidrs", "ServiceCIDR", CIDRS),
        ("/api/v1/services", "Service", SERVICES),
    ];
    for (path, kind, text) in lists {
        let mut recorded: Value = serde_json::from_str(text).unwrap();
        for item in recorded["items"].as_array().unwrap() {
            let mut item = item.clone();
            item["kind"] = json!(kind);
            server.apply(item);
        }
        let mut said: Value = serde_json::from_str(&ask(path).await).unwrap();
        for list in [&mut recorded, &mut said] {
            list["metadata"]["resourceVersion"].take();
            for item in list["items"].as_array_mut().unwrap() {
                item["metadata"]["resourceVersion"].take();
            }
        }
        assert_eq!(said, recorded, "{path}");
    }
    server.compact();
    let expired = ask("/api/v1/services?watch=true&resourceVersion=1").await;
    server.fail(Fault::NoStreamingLists);
    let refused = ask("/api/v1/services?watch=true&sendInitialEvents=true").await;
    for (said, recorded) in [(expired, EXPIRED), (refused, REFUSED)] {
        let mut said: Value = serde_json::from_str(&said).unwrap();
        let mut recorded: Value = serde_json::from_str(recorded).unwrap();
        for line in [&mut said, &mut recorded] {
            let message = line["object"]["message"].take();
            let words: String =
                message.as_str().unwrap().chars().filter(|it| !it.is_numeric()).collect();
            line["object"]["message"] = json!(words);
        }
        assert_eq!(said, recorded);
    }
}

//! The source against an API server with good and bad days.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxier_core::{
    ObjectName,
    model::{self, Event, NodeEnv, Store, api},
};
use proxier_kube::kube::{Client, Config};
use proxier_kube::{Kind, Notice, Options, Recorder, Regarding, SourceStatus, TroubleKind, Watch};
use proxier_testkit::{
    apiserver::{ApiServer, Fault},
    eventually_async,
};
use serde_json::{Value, json};
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(30);

fn service(name: &str, ip: &str) -> Value {
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
}

fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|it| json!({"addresses": [it]})).collect();
    json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "", "port": 8080}]})
}

fn node(address: &str) -> Value {
    json!({"kind": "Node", "metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
}

fn client(server: &ApiServer) -> Client {
    let mut config = Config::new(server.url().parse().unwrap());
    config.default_retry = false;
    Client::try_from(config).unwrap()
}

/// A source that runs, and the store it fills.
struct Rig {
    server: ApiServer,
    store: Arc<Mutex<Store>>,
    resets: Arc<Mutex<usize>>,
    status: watch::Receiver<SourceStatus>,
    task: tokio::task::JoinHandle<()>,
}

impl Rig {
    async fn start(server: ApiServer, streaming: bool) -> Self {
        let mut options = Options::default();
        options.streaming_lists = streaming;
        options.page_size = 3;
        options.first_retry = Duration::from_millis(2);
        options.longest_retry = Duration::from_millis(20);
        options.stall = Duration::from_secs(2);
        let client = client(&server);
        let settings = NodeEnv { name: "node-a".into(), ..NodeEnv::default() };
        let source = Watch::new(client, settings.clone(), options);
        let status = source.status();
        let store = Arc::new(Mutex::new(Store::new(settings)));
        let resets = Arc::new(Mutex::new(0));
        let (sink_store, sink_resets) = (Arc::clone(&store), Arc::clone(&resets));
        let task = tokio::spawn(async move {
            let sink = |event: Event| {
                if matches!(event, Event::Services(_)) {
                    *sink_resets.lock().unwrap() += 1;
                }
                sink_store.lock().unwrap().apply(event);
                std::future::ready(Ok::<_, Infallible>(()))
            };
            source.run(sink, std::future::pending()).await.unwrap();
        });
        Self { server, store, resets, status, task }
    }

    /// What a fresh start would read from the server's objects.
    fn expected(&self) -> Vec<model::Service> {
        let read = |object: &Value| {
            let object: api::Service = serde_json::from_value(object.clone()).ok()?;
            model::Service::read(&object).value
        };
        self.server.objects("services").iter().filter_map(read).collect()
    }

    fn endpoints(&self, service: &str) -> usize {
        let store = self.store.lock().unwrap();
        let name = ObjectName::new("shop", service);
        let found = store.endpoints(&name, proxier_core::Family::V4);
        found.values().map(Vec::len).sum()
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let met = eventually_async(DEADLINE, what, || std::future::ready(condition(self))).await;
        if let Err(overdue) = met {
            panic!("{overdue}\nstatus {:#?}\nseen {:?}", self.status.borrow(), self.server.seen());
        }
    }

    async fn until_equal(&self) {
        self.until("the store equals the server", |rig| {
            let store = rig.store.lock().unwrap();
            store.services().cloned().collect::<Vec<_>>() == rig.expected()
        })
        .await;
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn server() -> ApiServer {
    let server = ApiServer::start(Duration::from_millis(100)).await.unwrap();
    server.apply(node("192.0.2.1"));
    server.apply(json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16"]}}));
    for index in 1..=10 {
        server.apply(service(&format!("s{index}"), &format!("10.96.0.{index}")));
    }
    server.apply(slice("s1", &["10.61.0.1", "10.61.0.2"]));
    server
}

#[tokio::test]
async fn the_first_lists_come_once_and_complete() {
    for streaming in [true, false] {
        let rig = Rig::start(server().await, streaming).await;
        rig.until("the start", |rig| rig.status.borrow().started).await;
        rig.until_equal().await;
        rig.until("endpoints", |rig| rig.endpoints("s1") == 2).await;
        let store = rig.store.lock().unwrap();
        assert_eq!(store.env().ips, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(store.env().service_cidrs, ["10.96.0.0/16".parse().unwrap()]);
        assert_eq!(*rig.resets.lock().unwrap(), 1, "streaming {streaming}");
        assert!(rig.status.borrow().node.is_eligible());
        let pages = if streaming { 0 } else { 4 };
        assert_eq!(rig.server.count("list", "services"), pages);
    }
}

#[tokio::test]
async fn changes_follow_and_exclusions_delete() {
    let rig = Rig::start(server().await, true).await;
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(slice("s1", &["10.61.0.1"]));
    rig.until("one endpoint less", |rig| rig.endpoints("s1") == 1).await;
    let mut hidden = service("s2", "10.96.0.2");
    hidden["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": ""});
    rig.server.apply(hidden);
    rig.server.delete("services", "shop/s3");
    rig.server.apply(node("192.0.2.9"));
    rig.until_equal().await;
    rig.until("the node's address", |rig| {
        rig.store.lock().unwrap().env().ips == ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()]
    })
    .await;
    rig.server.delete("nodes", "node-a");
    rig.until("the node's end", |rig| !rig.status.borrow().node.is_eligible()).await;
    assert!(!rig.store.lock().unwrap().env().ips.is_empty(), "forwarding goes on");
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_asked_for_pages() {
    let server = server().await;
    server.fail(Fault::NoStreamingLists);
    let rig = Rig::start(server, true).await;
    rig.until_equal().await;
    assert_eq!(rig.server.count("list", "services"), 4);
}

#[tokio::test]
async fn after_every_bad_day_the_store_equals_the_server() {
    let refuse =
        |verb, code, retry_after| Fault::Refuse { verb, resource: "services", code, retry_after };
    let faults = [
        (refuse("watch", 500, None), TroubleKind::Server),
        (refuse("watch", 429, None), TroubleKind::Throttled),
        (refuse("watch", 401, None), TroubleKind::Unauthorized),
        (refuse("watch", 403, None), TroubleKind::Forbidden),
        (Fault::Broken(60), TroubleKind::Unreachable),
    ];
    for (fault, kind) in faults {
        let rig = Rig::start(server().await, true).await;
        rig.until("the start", |rig| rig.status.borrow().started).await;
        rig.server.fail(fault.clone());
        rig.server.cut();
        rig.server.apply(service("s1", "10.96.1.1"));
        rig.server.delete("services", "shop/s9");
        let what = format!("the status to say {kind} of {fault:?}");
        rig.until(&what, |rig| {
            let status = rig.status.borrow();
            status.troubles().any(|(_, it)| it.trouble.kind == kind)
        })
        .await;
        rig.server.heal();
        rig.until_equal().await;
        rig.until("all well", |rig| rig.status.borrow().troubles().next().is_none()).await;
        assert_eq!(
            *rig.resets.lock().unwrap(),
            1,
            "a watch is resumed, not listed anew: {fault:?}"
        );
    }
}

#[tokio::test]
async fn a_watch_that_falls_silent_is_opened_again() {
    let rig = Rig::start(server().await, true).await;
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(service("s1", "10.96.1.1"));
    rig.until_equal().await;
    rig.server.fail(Fault::Silent);
    rig.server.delete("services", "shop/s9");
    rig.until("a stall", |rig| rig.status.borrow().of(Kind::Services).counts.stalls == 1).await;
    rig.server.heal();
    rig.until_equal().await;
    let counts = rig.status.borrow().of(Kind::ServiceCidrs).counts;
    assert!(counts.watches > 1, "a quiet watch is opened again as well: {counts:?}");
    assert_eq!(
        (counts.stalls, counts.failures, counts.lists),
        (0, 0, 1),
        "and quiet is no trouble"
    );
}

#[tokio::test]
async fn lists_survive_bad_days_too() {
    let faults = [Fault::ExpiredPages, Fault::Broken(200), Fault::Truncated(200)];
    for fault in faults {
        let server = server().await;
        server.fail(fault.clone());
        let rig = Rig::start(server, false).await;
        rig.until("a failure", |rig| rig.status.borrow().of(Kind::Services).counts.failures > 0)
            .await;
        if fault != Fault::ExpiredPages {
            assert!(!rig.status.borrow().started, "nothing before complete lists: {fault:?}");
            rig.server.heal();
        }
        rig.until_equal().await;
    }
}

#[tokio::test]
async fn an_expired_version_costs_one_list() {
    let rig = Rig::start(server().await, true).await;
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(service("s11", "10.96.0.11"));
    rig.server.delete("services", "shop/s5");
    rig.server.compact();
    rig.server.cut();
    rig.until("a second list", |rig| *rig.resets.lock().unwrap() == 2).await;
    rig.until_equal().await;
    assert_eq!(rig.status.borrow().of(Kind::Services).counts.lists, 2);
}

#[tokio::test]
async fn a_garbage_object_costs_only_itself() {
    let server = server().await;
    let mut garbage = service("s4", "10.96.0.4");
    garbage["spec"]["ports"] = json!("none");
    server.apply(garbage.clone());
    let rig = Rig::start(server, true).await;
    rig.until_equal().await;
    let problems = rig.status.borrow().of(Kind::Services).problems.clone();
    assert!(
        problems[0].1[0].to_string().starts_with("services shop/s4: spec.ports: "),
        "{problems:?}"
    );
    garbage["metadata"]["name"] = json!("s6");
    rig.server.apply(garbage);
    rig.server.apply(service("s4", "10.96.0.4"));
    rig.until_equal().await;
}

#[tokio::test]
async fn without_service_cidrs_the_node_is_programmed_all_the_same() {
    let server = server().await;
    for verb in ["list", "watch"] {
        let resource = "servicecidrs";
        server.fail(Fault::Refuse { verb, resource, code: 403, retry_after: None });
    }
    let rig = Rig::start(server, true).await;
    rig.until_equal().await;
    let status = rig.status.borrow().clone();
    let (_, standing) = status.troubles().next().unwrap();
    assert!(standing.trouble.to_string().contains("grant verb"), "{}", standing.trouble);
}

#[tokio::test]
async fn equal_notices_are_one_event() {
    let server = server().await;
    let client = client(&server);
    let (recorder, publisher) = Recorder::new(client, "proxier", "node-a");
    let service = Regarding::Service(ObjectName::new("shop", "s1"));
    for _ in 0..50 {
        recorder.publish(Notice::warning(service.clone(), "Refused", "Program", "no room"));
    }
    drop(recorder);
    publisher.run().await;
    let events = server.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["reason"], "Refused");
    assert_eq!(events[0]["regarding"]["name"], "s1");
}

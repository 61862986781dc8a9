//! A server, a source, and the store it fills.

use std::{
    convert::Infallible,
    ops::Deref,
    sync::{Arc, Mutex},
    time::Duration,
};

use proxier_core::{
    ObjectName,
    model::{self, Event, NodeEnv, Store, api},
};
use proxier_kube::{
    Options, SourceStatus, Watch,
    kube::{Client, Config},
};
use proxier_testkit::{apiserver::ApiServer, eventually_async};
use serde_json::{Value, json};
use tokio::sync::watch;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) fn service(name: &str, ip: &str) -> Value {
    json!({"kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
}

pub(crate) fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|it| json!({"addresses": [it]})).collect();
    json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": {"name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "", "port": 8080}]})
}

pub(crate) fn node(address: &str) -> Value {
    json!({"kind": "Node", "metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}})
}

pub(crate) fn client(server: &ApiServer) -> Client {
    let mut config = Config::new(server.url().parse().unwrap());
    config.default_retry = false;
    Client::try_from(config).unwrap()
}

/// Quick to try again, and small pages.
pub(crate) fn options(streaming: bool) -> Options {
    let mut options = Options::default();
    options.streaming_lists = streaming;
    options.page_size = 3;
    options.first_retry = Duration::from_millis(2);
    options.longest_retry = Duration::from_millis(20);
    options.stall = Duration::from_secs(2);
    options
}

/// A source that runs, and the store it fills.
pub(crate) struct Source {
    pub(crate) store: Arc<Mutex<Store>>,
    pub(crate) resets: Arc<Mutex<usize>>,
    pub(crate) status: watch::Receiver<SourceStatus>,
    task: tokio::task::JoinHandle<()>,
}

impl Source {
    pub(crate) fn start(client: Client, node: &str, options: Options) -> Self {
        let settings = NodeEnv { name: node.into(), ..NodeEnv::default() };
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
        Self { store, resets, status, task }
    }

    pub(crate) fn services(&self) -> Vec<model::Service> {
        self.store.lock().unwrap().services().cloned().collect()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a fresh start would read from the server's objects.
pub(crate) fn expected(server: &ApiServer) -> Vec<model::Service> {
    let read = |object: &Value| {
        let object: api::Service = serde_json::from_value(object.clone()).ok()?;
        model::Service::read(&object).value
    };
    let mut services: Vec<_> = server.objects("services").iter().filter_map(read).collect();
    services.sort_by(|a, b| a.name().cmp(b.name()));
    services
}

/// A server and a source.
pub(crate) struct Rig {
    pub(crate) server: ApiServer,
    source: Source,
}

impl Deref for Rig {
    type Target = Source;

    fn deref(&self) -> &Source {
        &self.source
    }
}

impl Rig {
    pub(crate) fn start(server: ApiServer, streaming: bool) -> Self {
        Self::start_with(server, "node-a", options(streaming))
    }

    pub(crate) fn start_with(server: ApiServer, node: &str, options: Options) -> Self {
        Self::start_as(client(&server), server, node, options)
    }

    /// The same, with a client of one's own.
    pub(crate) fn start_as(
        client: Client,
        server: ApiServer,
        node: &str,
        options: Options,
    ) -> Self {
        Self { server, source: Source::start(client, node, options) }
    }

    pub(crate) fn endpoints(&self, service: &str) -> usize {
        let store = self.store.lock().unwrap();
        let name = ObjectName::new("shop", service);
        let found = store.endpoints(&name, proxier_core::Family::V4);
        found.values().map(Vec::len).sum()
    }

    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let met = eventually_async(DEADLINE, what, || std::future::ready(condition(self))).await;
        if let Err(overdue) = met {
            panic!("{overdue}\nstatus {:#?}\nseen {:?}", self.status.borrow(), self.server.seen());
        }
    }

    pub(crate) async fn until_equal(&self) {
        self.until("the store equals the server", |rig| rig.services() == expected(&rig.server))
            .await;
    }
}

pub(crate) const BOOKMARKS: Duration = Duration::from_millis(100);

pub(crate) async fn server() -> ApiServer {
    filled(ApiServer::start(BOOKMARKS).await.unwrap())
}

/// Puts a node, a range of cluster IPs and ten Services there.
pub(crate) fn filled(server: ApiServer) -> ApiServer {
    server.apply(node("192.0.2.1"));
    server.apply(json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16"]}}));
    for index in 1..=10 {
        server.apply(service(&format!("s{index}"), &format!("10.96.0.{index}")));
    }
    server.apply(slice("s1", &["10.61.0.1", "10.61.0.2"]));
    server
}

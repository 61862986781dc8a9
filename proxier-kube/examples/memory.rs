//! Memory and time it takes to read a cluster: `memory [SERVICES [ENDPOINTS]]`.
//!
//! An API server of the testkit runs as a process of its own, so that what is measured here is the
//! source and the store it fills, and nothing else.

#![expect(clippy::print_stdout, reason = "a program for the terminal")]

use std::{
    convert::Infallible,
    error::Error,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use proxier_core::model::{NodeEnv, Store};
use proxier_kube::{
    Options, Watch,
    kube::{Client, Config},
};
use proxier_testkit::apiserver::{ApiServer, Fault};
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let serves = arguments.first().is_some_and(|it| it == "serve");
    if serves {
        arguments.remove(0);
    }
    let number = |at: usize, default: usize| arguments.get(at).map_or(Ok(default), |it| it.parse());
    let (services, endpoints) = (number(0, 5000)?, number(1, 10)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if serves {
        return runtime.block_on(serve(services, endpoints));
    }
    for streaming in [true, false] {
        runtime.block_on(measure(services, endpoints, streaming))?;
    }
    Ok(())
}

async fn measure(services: usize, endpoints: usize, streaming: bool) -> Outcome<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", &services.to_string(), &endpoints.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut url = String::new();
    BufReader::new(child.stdout.take().ok_or("no pipe")?).read_line(&mut url)?;
    let client = Client::try_from(Config::new(url.trim().parse()?))?;
    let before = resident("VmRSS:")?;
    let settings = NodeEnv { name: "node-a".into(), ..NodeEnv::default() };
    let mut options = Options::default();
    options.streaming_lists = streaming;
    let mut store = Store::new(settings.clone());
    let mut updates = 0_usize;
    let (done, filled) = tokio::sync::watch::channel(false);
    let begun = Instant::now();
    let sink = |event| {
        store.apply(event);
        if let Some(update) = store.take() {
            updates += 1;
            drop(update);
            done.send_replace(true);
        }
        std::future::ready(Ok::<(), Infallible>(()))
    };
    let mut filled = filled;
    let stop = async move {
        filled.wait_for(|it| *it).await.ok();
    };
    Watch::new(client, settings, options).run(sink, stop).await?;
    let took = begun.elapsed();
    println!(
        "{services} x {endpoints}, {}: {updates} update after {took:.2?}; resident {:.1} MiB before, \
         {:.1} MiB after, {:.1} MiB at most",
        if streaming { "streaming lists" } else { "pages" },
        before,
        resident("VmRSS:")?,
        resident("VmHWM:")?,
    );
    assert_eq!(store.services().count(), services, "not all Services are there");
    // Its input ends, and so does the server.
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

/// A line of this process's status, in MiB.
fn resident(field: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|it| it.strip_prefix(field)).ok_or("no such line")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

async fn serve(services: usize, endpoints: usize) -> Outcome<()> {
    let server = ApiServer::start(Duration::from_secs(60)).await?;
    server.apply(json!({"kind": "Node", "metadata": {"name": "node-a"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}));
    server.apply(json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/12"]}}));
    server.apply_all((0..services).map(service));
    server.apply_all((0..services).map(|index| slice(index, endpoints)));
    println!("{}", server.url());
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    ended.await??;
    server.fail(Fault::Silent);
    Ok(())
}

fn metadata(name: &str, index: usize, labels: &Value) -> Value {
    // As the real server has them: more bytes than what matters.
    let fields: serde_json::Map<String, Value> =
        (0..12).map(|it| (format!("f:field-{it}"), json!({".": {}, "f:inner": {}}))).collect();
    json!({"name": name, "namespace": format!("team-{}", index % 50), "labels": labels,
        "uid": format!("45cd7cd7-4bb7-41c1-8fbd-{index:012}"),
        "creationTimestamp": "2026-11-22T04:25:29Z",
        "managedFields": [{"manager": "controller", "operation": "Update", "apiVersion": "v1",
            "time": "2026-11-22T04:25:29Z", "fieldsType": "FieldsV1", "fieldsV1": fields}]})
}

fn service(index: usize) -> Value {
    let ip = format!("10.{}.{}.{}", 96 + index / 62_500, index / 250 % 250, index % 250 + 1);
    json!({"kind": "Service", "metadata": metadata(&format!("s{index}"), index, &json!({"app": "x"})),
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
            "selector": {"app": format!("s{index}")}, "sessionAffinity": "None"},
        "status": {"loadBalancer": {}}})
}

fn slice(index: usize, endpoints: usize) -> Value {
    let endpoint = |it: usize| {
        let at = index * endpoints + it;
        let address = format!("10.{}.{}.{}", 128 + at / 62_500, at / 250 % 250, at % 250 + 1);
        json!({"addresses": [address], "nodeName": format!("node-{}", at % 100), "zone": "zone-a",
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "x", "name": format!("s{index}-{it}"),
                "uid": format!("45cd7cd7-4bb7-41c1-8fbd-{at:012}")}})
    };
    let labels = json!({"kubernetes.io/service-name": format!("s{index}")});
    let endpoints: Vec<_> = (0..endpoints).map(endpoint).collect();
    json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
        "metadata": metadata(&format!("s{index}-x7k2p"), index, &labels),
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}]})
}

//! The agent as the proxier of a cluster: from an API server to packets. Needs namespaces (see
//! CONTRIBUTING.md).
#![expect(clippy::indexing_slicing, reason = "any failure fails the test")]
#![expect(clippy::unwrap_used, reason = "any failure fails the test")]

mod rig;

use std::time::Duration;

use proxier_testkit::{
    apiserver::{ApiServer, Fault},
    eventually,
    lab::{Lab, Ns},
    require_lab,
};
use rig::{A, Agent, B, Folder, Site, ask_in, config};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Where pods find the Service `cart`.
const CART: &str = "10.97.0.21:80";

fn service(name: &str, ip: &str, more: &Value) -> Value {
    let mut service = json!({
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"clusterIP": ip, "ports": [{"name": "web", "port": 80}]},
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        service["spec"][field] = value.clone();
    }
    service
}

/// The slice of a Service, with endpoints on this node.
fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> =
        addresses.iter().map(|it| json!({"addresses": [it], "nodeName": "tern"})).collect();
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-1"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080}],
        "endpoints": endpoints,
    })
}

fn node(taints: &Value) -> Value {
    json!({
        "kind": "Node",
        "metadata": {"name": "tern"},
        "spec": {"taints": taints},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.20.7.11"}]},
    })
}

fn refuse(verb: &'static str, resource: &'static str, code: u16) -> Fault {
    Fault::Refuse { verb, resource, code, retry_after: None }
}

/// An API server in a namespace, with a node and a network for cluster IPs.
fn server(ns: &Ns) -> ApiServer {
    let server = ns.block_on(ApiServer::start(Duration::from_millis(500))).unwrap().unwrap();
    server.apply_all([
        node(&json!([])),
        json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.97.0.0/16"]}}),
    ]);
    server
}

fn kubeconfig(folder: &Folder, server: &ApiServer) -> String {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
         clusters: [{{name: a, cluster: {{server: '{}'}}}}]\n\
         contexts: [{{name: a, context: {{cluster: a, user: a}}}}]\nusers: [{{name: a, user: {{}}}}]\n",
        server.url()
    );
    folder.write("kubeconfig", &text)
}

/// A node of a cluster with one Service, `cart`.
struct Cluster {
    site: Site,
    server: ApiServer,
    config: String,
}

impl Cluster {
    fn new(name: &str, mode: &str) -> Self {
        let site = Site::new(name);
        let server = server(site.world.node());
        server
            .apply_all([service("cart", "10.97.0.21", &json!({})), slice("cart", &["10.61.3.21"])]);
        let kubeconfig = kubeconfig(&site.folder, &server);
        let more = format!("clientConnection: {{kubeconfig: {kubeconfig}}}\n");
        let config = format!("--config={}", site.folder.write("config.conf", &config(mode, &more)));
        Self { site, server, config }
    }

    fn agent(&self) -> Agent {
        self.site.agent(&[&self.config])
    }

    fn answers(&self) -> Vec<String> {
        self.site.answers("pod_b", CART)
    }

    /// The Event of this reason.
    fn event(&self, reason: &str) -> Option<Value> {
        self.server.events().into_iter().find(|it| it["reason"] == reason)
    }

    /// Makes the API server unreachable: connections are reset, new ones are refused.
    fn outage(&self) {
        let port = self.server.url().rsplit(':').next().unwrap().to_owned();
        let rules = format!(
            "table inet outage {{ chain output {{ type filter hook output priority 0; \
             tcp dport {port} reject with tcp reset; }}; }}"
        );
        self.nft(&rules);
        self.server.cut();
    }

    fn end_outage(&self) {
        self.nft("delete table inet outage");
    }

    fn nft(&self, rules: &str) {
        self.site.world.node().command_with_input("nft", ["-f", "-"], rules).unwrap();
    }
}

/// What an operator reads where a role lacks `verb` for EndpointSlices.
fn missing(verb: &str) -> String {
    format!(
        "cannot {verb} endpointslices.discovery.k8s.io: forbidden: grant verb \"{verb}\" on resource \
         \"endpointslices\" in API group \"discovery.k8s.io\""
    )
}

/// Whether `/healthz` says that this verb is missing.
fn names_verb(body: &Value, verb: &str) -> bool {
    body["watch"]["trouble"].as_str().is_some_and(|it| it.contains(&missing(verb)))
}

/// The JSON of `/healthz`; `null` while nobody answers.
fn health_of(agent: &Agent) -> Value {
    let text = agent.get("127.0.0.1:10256/healthz").map(|(_, text)| text).unwrap_or_default();
    let body = text.split("\r\n\r\n").nth(1).unwrap_or_default();
    serde_json::from_str(body).unwrap_or_default()
}

/// The JSON of `/healthz`, with the status.
fn healthz(agent: &Agent) -> (u16, Value) {
    let (status, text) = agent.get("127.0.0.1:10256/healthz").unwrap();
    let body = text.split("\r\n\r\n").nth(1).unwrap_or_default();
    (status, serde_json::from_str(body).unwrap_or_default())
}

#[test]
fn a_cluster_becomes_packets_until_clean_up() {
    require_lab!();
    for mode in ["nftables", "iptables"] {
        let cluster = Cluster::new(&format!("cluster-{mode}"), mode);
        let agent = cluster.agent();
        agent.wait_started();
        assert_eq!(cluster.answers(), [A], "{}", agent.log());

        cluster.server.apply(slice("cart", &["10.61.3.22"]));
        agent.wait("the new endpoint to answer", || cluster.answers() == [B]);
        cluster
            .server
            .apply_all([service("dns", "10.97.0.22", &json!({})), slice("dns", &["10.61.3.21"])]);
        agent.wait("the new Service to answer", || {
            cluster.site.answers("pod_b", "10.97.0.22:80") == [A]
        });
        cluster.server.delete("services", "shop/dns");
        agent.wait("the Service to be gone", || {
            cluster.site.answers("pod_b", "10.97.0.22:80").is_empty()
        });

        let before = cluster.site.ruleset();
        assert!(agent.end(Signal::TERM).success());
        assert_eq!(cluster.site.ruleset(), before, "SIGTERM leaves rules in place");
        assert_eq!(cluster.answers(), [B]);
        let cleaned = ask_in(cluster.site.world.node(), &["cleanup", &cluster.config]);
        assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
        assert_eq!(cluster.site.ruleset(), "", "clean-up leaves nothing");
    }
}

#[test]
fn an_outage_of_the_server_is_told_and_disturbs_nothing() {
    require_lab!();
    let cluster = Cluster::new("cluster-outage", "nftables");
    let agent = cluster.agent();
    agent.wait_started();
    let lists = || {
        let seen = cluster.server.seen();
        seen.iter()
            .filter(|it| it.verb == "list" || it.query.contains_key("sendInitialEvents"))
            .count()
    };
    let before = (lists(), cluster.site.ruleset());

    cluster.outage();
    agent.wait("the outage in /healthz", || {
        let (status, body) = healthz(&agent);
        let trouble = body["watch"]["trouble"].as_str().unwrap_or_default().to_owned();
        status == 200 && trouble.contains("check the server's address and the network")
    });
    assert_eq!(agent.get("127.0.0.1:10256/livez").unwrap().0, 200, "a restart would not help");
    agent.wait("the outage in the metrics", || {
        agent.metric("proxier_source_trouble_seconds").is_some_and(|it| it > 0.0)
    });
    cluster.server.apply(slice("cart", &["10.61.3.22"]));
    assert_eq!(cluster.answers(), [A], "what was known last is in force");

    cluster.end_outage();
    agent.wait("what was missed", || cluster.answers() == [B]);
    agent.wait("the end of the outage in /healthz", || healthz(&agent).1.get("watch").is_none());
    assert_eq!(lists(), before.0, "watches go on where they were, without lists");
    cluster.server.apply(slice("cart", &["10.61.3.21"]));
    agent.wait("the endpoint of before", || cluster.answers() == [A]);
    assert_eq!(cluster.site.ruleset(), before.1);
}

#[test]
fn a_start_that_is_not_allowed_is_visible_and_heals() {
    require_lab!();
    let cluster = Cluster::new("cluster-rbac", "nftables");
    for verb in ["list", "watch"] {
        cluster.server.fail(refuse(verb, "endpointslices", 403));
    }
    let agent = cluster.agent();
    agent.wait("the missing verb in /healthz", || {
        let body = health_of(&agent);
        body["starting"] == true && names_verb(&body, "list")
    });
    agent.wait("the missing verb in the log", || agent.log().contains(&missing("list")));
    assert_eq!(cluster.site.ruleset(), "", "nothing is programmed before complete lists");
    cluster.server.heal();
    agent.wait_started();
    assert_eq!(cluster.answers(), [A]);
}

#[test]
fn a_watch_that_is_not_allowed_is_visible_while_lists_serve() {
    require_lab!();
    let cluster = Cluster::new("cluster-rbac-watch", "nftables");
    cluster.server.fail(refuse("watch", "endpointslices", 403));
    let agent = cluster.agent();
    agent.wait_started();
    assert_eq!(cluster.answers(), [A], "a list is enough to start");
    agent.wait("the missing verb in /healthz", || names_verb(&health_of(&agent), "watch"));
    assert!(!agent.log().contains(&missing("list")), "{}", agent.log());
    cluster.server.heal();
    cluster.server.apply(slice("cart", &["10.61.3.22"]));
    agent.wait("the new endpoint to answer", || cluster.answers() == [B]);
    agent.wait("the end in /healthz", || health_of(&agent).get("watch").is_none());
}

#[test]
fn a_node_that_is_to_go_takes_no_new_traffic() {
    require_lab!();
    let cluster = Cluster::new("cluster-drain", "nftables");
    let agent = cluster.agent();
    agent.wait_started();
    let taint = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    cluster.server.apply(node(&taint));
    agent.wait("503", || {
        let (status, body) = healthz(&agent);
        status == 503 && body["nodeEligible"] == false && body["healthy"] == true
    });
    assert_eq!(agent.get("127.0.0.1:10256/livez").unwrap().0, 200);
    assert!(agent.metric("kubeproxy_proxy_healthz_total{code=\"503\"}").is_some());
    cluster.server.apply(node(&json!([])));
    agent.wait("200", || healthz(&agent).0 == 200);
}

#[test]
fn what_cannot_be_programmed_becomes_events() {
    require_lab!();
    let cluster = Cluster::new("cluster-events", "nftables");
    let squatter =
        cluster.site.world.node().run(|| std::net::TcpListener::bind("0.0.0.0:32080")).unwrap();
    let health = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32080});
    let taken = json!({"externalIPs": ["198.51.100.71"]});
    let mut late = service("late", "10.97.0.24", &taken);
    late["metadata"]["creationTimestamp"] = json!("2026-02-01T00:00:00Z");
    cluster.server.apply_all([
        service("checked", "10.97.0.22", &health),
        service("early", "10.97.0.23", &taken),
        late,
    ]);
    let agent = cluster.agent();
    for (reason, service, word) in [
        ("FailedToStartServiceHealthcheck", "checked", "32080"),
        ("FrontendConflict", "late", "already belongs to shop/early"),
    ] {
        agent.wait(reason, || cluster.event(reason).is_some());
        let event = cluster.event(reason).unwrap();
        let regarding = &event["regarding"];
        assert_eq!((&regarding["kind"], &regarding["name"]), (&json!("Service"), &json!(service)));
        assert_eq!(
            (&event["type"], &event["metadata"]["namespace"]),
            (&json!("Warning"), &json!("shop"))
        );
        assert!(event["note"].as_str().unwrap().contains(word), "{event}");
    }
    assert_eq!(cluster.answers(), [A], "everything else works");
    drop((agent, squatter));

    // The userspace mode does not know SCTP, and says so.
    let cluster = Cluster::new("cluster-sctp", "userspace");
    let sctp = json!({"ports": [{"name": "web", "port": 80, "protocol": "SCTP"}]});
    cluster.server.apply(service("sctp", "10.97.0.25", &sctp));
    let agent = cluster.agent();
    agent.wait("FailedToProgram", || cluster.event("FailedToProgram").is_some());
    let event = cluster.event("FailedToProgram").unwrap();
    assert_eq!(event["regarding"]["name"], "sctp");
    assert!(event["note"].as_str().unwrap().contains("SCTP"), "{event}");
    agent.wait("the metric", || {
        agent.metric("proxier_degraded_fragments{reason=\"unsupported\"}") == Some(1.0)
    });
}

#[test]
fn what_the_server_refuses_is_one_line_that_says_what_to_do() {
    require_lab!();
    let lab = Lab::new("cluster-cli").unwrap();
    let ns = lab.ns("node").unwrap();
    let server = server(&ns);
    let folder = Folder::new("cluster-cli");
    let kubeconfig = format!("--kubeconfig={}", kubeconfig(&folder, &server));
    let expired = "services: the server does not accept the credentials (expired token?)";
    for (code, resource, line) in
        [(401, "services", expired.to_owned()), (403, "endpointslices", missing("list"))]
    {
        for verb in ["list", "watch"] {
            server.fail(refuse(verb, resource, code));
        }
        let output = ask_in(&ns, &["get", "services", &kubeconfig, "--hostname-override=tern"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let lines: Vec<_> = text.lines().filter(|it| it.starts_with("agent: ")).collect();
        assert!(matches!(&*lines, [one] if one.contains(&line)), "{code}: {text}");
        assert_eq!(output.status.code(), Some(2));
        let output = ask_in(&ns, &["doctor", &kubeconfig, "--hostname-override=tern"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.lines().any(|it| it.starts_with("WRONG") && it.contains(&line)), "{text}");
        assert_eq!(output.status.code(), Some(1));
        server.heal();
    }
    server.apply(service("cart", "10.97.0.21", &json!({})));
    let output =
        ask_in(&ns, &["get", "services", "-o=name", &kubeconfig, "--hostname-override=tern"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("shop/cart"), "{output:?}");
    let output = ask_in(&ns, &["doctor", &kubeconfig, "--hostname-override=gull"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("there is no Node \"gull\": give its name with --hostname-override"),
        "{text}"
    );
}

#[test]
fn auto_takes_the_best_mode_and_says_why() {
    require_lab!();
    let cluster = Cluster::new("cluster-auto", "auto");
    let agent = cluster.agent();
    agent.wait_started();
    let (_, mode) = agent.get("127.0.0.1:10249/proxyMode").unwrap();
    assert!(mode.ends_with("nftables"), "{mode}");
    let chose = |log: &str| {
        log.lines().any(|it| {
            it.contains("chose the mode") && it.contains("mode=nftables") && it.contains("why=")
        })
    };

    assert!(chose(&agent.log()), "{}", agent.log());
}

#[test]
fn lists_and_plans_come_from_the_cluster() {
    require_lab!();
    let cluster = Cluster::new("cluster-verbs", "nftables");
    let node = cluster.site.world.node();
    let agent = cluster.agent();
    agent.wait_started();
    for (verb, word) in [
        (&["diff"][..], "the kernel holds what is wanted"),
        (&["plan"][..], "10.97.0.21"),
        (&["get", "endpoints"][..], "10.61.3.21:8080"),
        (&["explain", "--from=10.61.3.22", "--to=10.97.0.21:80"][..], "shop/cart"),
    ] {
        let args = [verb, &[&cluster.config, "--hostname-override=tern"]].concat();
        let output = ask_in(node, &args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(word), "{verb:?}: {output:?}");
    }
    assert!(eventually(Duration::from_secs(5), "packets", || cluster.answers() == [A]).is_ok());
}

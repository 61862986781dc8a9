//! The agent as a daemon, with real packets. Needs namespaces (see CONTRIBUTING.md).

mod rig;

use proxier_testkit::require_lab;
use rig::{A, Agent, B, Site, config, get};
use rustix::process::Signal;

/// A Service with a health-check node port, and its endpoints on this node.
fn manifest(name: &str, ip: &str, node_port: u16, endpoints: &[&str]) -> String {
    let endpoints: Vec<_> =
        endpoints.iter().map(|it| format!("{{addresses: [{it}], nodeName: tern}}")).collect();
    format!(
        "kind: Node\nmetadata: {{name: tern}}\nstatus: {{addresses: [{{type: InternalIP, address: 172.20.7.11}}]}}\n\
         ---\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{type: LoadBalancer, \
         clusterIP: {ip}, externalTrafficPolicy: Local, healthCheckNodePort: {}, \
         ports: [{{name: web, port: 80, nodePort: {node_port}}}]}}\n\
         ---\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: shop, labels: \
         {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
         ports: [{{name: web, port: 8080}}]\nendpoints: [{}]\n",
        node_port + 1000,
        endpoints.join(", ")
    )
}

struct Node {
    site: Site,
    config: String,
    manifests: String,
}

impl Node {
    fn new(name: &str, mode: &str) -> Self {
        let site = Site::new(name);
        site.folder
            .write("manifests/cart.yaml", &manifest("cart", "10.97.0.21", 31080, &["10.61.3.21"]));
        let config = site.folder.write("config.conf", &config(mode, ""));
        let manifests = site.folder.path("manifests");
        Self { site, config, manifests }
    }

    fn agent(&self) -> Agent {
        let args = [format!("--config={}", self.config), format!("--manifests={}", self.manifests)];
        self.site.agent(&args.each_ref().map(String::as_str))
    }
}

#[test]
fn packets_flow_from_start_to_restart_and_files_are_followed() {
    require_lab!();
    for mode in ["nftables", "iptables"] {
        let node = Node::new(&format!("agent-{mode}"), mode);
        let agent = node.agent();
        agent.wait_started();
        assert_eq!(node.site.answers("pod_b", "10.97.0.21:80"), [A]);
        assert!(agent.get("127.0.0.1:10249/proxyMode").unwrap().1.ends_with(mode));
        let total = "kubeproxy_sync_proxy_rules_iptables_total{table=\"nat\",ip_family=\"IPv4\"}";
        let rules = (mode == "iptables").then(|| {
            let listed = node.site.world.node().command("iptables-nft", ["-t", "nat", "-S"]);
            f64::from(u32::try_from(listed.unwrap().matches("-A ").count()).unwrap())
        });
        assert_eq!(agent.metric(total), rules);

        let two = manifest("cart", "10.97.0.21", 31080, &["10.61.3.21", "10.61.3.22"]);
        node.site.folder.write("manifests/cart.yaml", &two);
        agent.wait("both endpoints to answer", || {
            node.site.answers("pod_b", "10.97.0.21:80") == [A, B]
        });

        let before = node.site.ruleset();
        assert!(agent.end(Signal::TERM).success());
        assert_eq!(node.site.ruleset(), before, "SIGTERM leaves rules in place");
        assert_eq!(node.site.answers("pod_b", "10.97.0.21:80"), [A, B]);

        let agent = node.agent();
        agent.wait_started();
        assert!(!agent.end(Signal::KILL).success());
        assert_eq!(node.site.ruleset(), before, "a restart changes nothing");
        let agent = node.agent();
        agent.wait_started();
        let ops = ["add", "set", "del"].map(|op| {
            agent.metric(&format!("proxier_kernel_ops_total{{op=\"{op}\"}}")).unwrap_or_default()
        });
        assert_eq!(ops, [0.0; 3], "a restart writes nothing");
        assert_eq!(node.site.ruleset(), before);
    }
}

#[test]
fn health_of_node_and_services_is_served_as_kube_proxy_does() {
    require_lab!();
    let node = Node::new("agent-health", "nftables");
    let agent = node.agent();
    agent.wait_started();
    let (_, healthz) = agent.get("127.0.0.1:10256/healthz").unwrap();
    let body = healthz.split("\r\n\r\n").nth(1).unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&true.into(), &true.into()), "{body}");
    assert_eq!(body["status"]["IPv4"]["healthy"], true, "{body}");
    assert!(healthz.to_lowercase().contains("x-content-type-options: nosniff"), "{healthz}");
    assert!(body.get("starting").is_none(), "{body}");

    let client = node.site.world.client().clone();
    let near = "172.20.7.11:32080/";
    agent.wait("the health-check node port to answer", || {
        get(&client, near).is_some_and(|(status, _)| status == 200)
    });
    let (_, text) = get(&client, near).unwrap();
    assert!(text.to_lowercase().contains("x-load-balancing-endpoint-weight: 1"), "{text}");
    assert!(
        text.ends_with("{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"cart\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"),
        "{text}"
    );
    node.site.folder.write("manifests/cart.yaml", &manifest("cart", "10.97.0.21", 31080, &[]));
    agent.wait("503 without endpoints", || {
        get(&client, near).is_some_and(|(status, _)| status == 503)
    });
    node.site.folder.write("manifests/cart.yaml", &manifest("cart", "10.97.0.21", 31090, &[]));
    agent.wait("the old port to close", || get(&client, near).is_none());
}

#[test]
fn a_health_port_in_use_is_said_once_and_taken_at_the_next_sync() {
    require_lab!();
    let node = Node::new("agent-port", "nftables");
    let squatter = node
        .site
        .world
        .node()
        .run(|| std::net::TcpListener::bind("0.0.0.0:32080"))
        .unwrap()
        .unwrap();
    let agent = node.agent();
    agent.wait_started();
    agent
        .wait("the refusal in the log", || agent.log().contains("FailedToStartServiceHealthcheck"));
    assert_eq!(node.site.answers("pod_b", "10.97.0.21:80"), [A], "the Service works all the same");
    drop(squatter);
    let two = manifest("cart", "10.97.0.21", 31080, &["10.61.3.21", "10.61.3.22"]);
    node.site.folder.write("manifests/cart.yaml", &two);
    let client = node.site.world.client().clone();
    agent.wait("the port to be served", || {
        get(&client, "172.20.7.11:32080/").is_some_and(|(status, _)| status == 200)
    });
    assert_eq!(agent.log().matches("FailedToStartServiceHealthcheck").count(), 1);
}

#[test]
fn a_changed_configuration_is_applied_and_a_broken_one_is_not() {
    require_lab!();
    let node = Node::new("agent-reload", "nftables");
    let agent = node.agent();
    agent.wait_started();
    assert_eq!(node.site.answers("client", "172.20.7.11:31080"), [A]);
    node.site
        .folder
        .write("config.conf", &config("nftables", "nodePortAddresses: [10.9.9.0/24]\n"));
    agent.wait("node ports to close", || {
        node.site.answers("client", "172.20.7.11:31080").is_empty()
    });
    node.site.folder.write("config.conf", &config("nftables", "nodePortAdresses: []\n"));
    agent.wait("the complaint", || agent.log().contains("nodePortAdresses: unknown field"));
    assert!(node.site.answers("client", "172.20.7.11:31080").is_empty());
    node.site.folder.write("config.conf", &config("iptables", ""));
    agent.wait("node ports to open", || node.site.answers("client", "172.20.7.11:31080") == [A]);
    agent.wait("the other mode", || {
        agent.get("127.0.0.1:10249/proxyMode").is_some_and(|(_, text)| text.ends_with("iptables"))
    });
    let rules = node.site.ruleset();
    assert!(rules.contains("KUBE-SERVICES") && !rules.contains("table ip proxier"), "{rules}");
    assert_eq!(agent.metric("proxier_build_info{version=\"0.1.0\",mode=\"iptables\"}"), Some(1.0));
    node.site.folder.write(
        "config.conf",
        &config("iptables", "oomScoreAdj: 1\n").replace("oomScoreAdj: 0\n", ""),
    );
    agent.wait("the hint", || {
        agent.log().contains("restart the agent for these to take effect fields=\"oomScoreAdj\"")
            || agent.log().contains("fields=oomScoreAdj")
    });
}

#[test]
fn a_config_map_that_is_swapped_is_followed() {
    require_lab!();
    let mut node = Node::new("agent-volume", "nftables");
    // As the kubelet mounts a ConfigMap: links to a directory that is exchanged as a whole.
    let folder = &node.site.folder;
    folder.write("volume/..1/config.conf", &config("nftables", ""));
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, folder.path(name)).unwrap();
    link("..1", "volume/..data");
    link("..data/config.conf", "volume/config.conf");
    node.config = folder.path("volume/config.conf");
    let agent = node.agent();
    agent.wait_started();
    assert_eq!(node.site.answers("client", "172.20.7.11:31080"), [A]);
    folder
        .write("volume/..2/config.conf", &config("nftables", "nodePortAddresses: [10.9.9.0/24]\n"));
    link("..2", "volume/..data_tmp");
    std::fs::rename(folder.path("volume/..data_tmp"), folder.path("volume/..data")).unwrap();
    agent.wait("node ports to close", || {
        node.site.answers("client", "172.20.7.11:31080").is_empty()
    });
}

#[test]
fn pages_for_people_answer() {
    require_lab!();
    let node = Node::new("agent-pages", "nftables");
    let agent = node.agent();
    agent.wait_started();
    for (page, holds) in [
        ("configz", "\"clusterCIDR\":\"10.61.0.0/16\""),
        ("flagz", "--config="),
        ("metrics/slis", ""),
        ("statusz", "\"mode\":\"nftables\""),
        ("healthz", "ok"),
        ("debug/ir", "shop/cart"),
        ("debug/plan", "\"ops\":[]"),
        ("debug/explain?from=10.61.3.22&to=10.97.0.21:80", "10.61.3.21:8080"),
    ] {
        let (status, text) = agent.get(&format!("127.0.0.1:10249/{page}")).unwrap();
        assert!(status == 200 && text.contains(holds), "{page}: {text}");
    }
    let (status, text) =
        agent.get("127.0.0.1:10249/debug/explain?from=10.61.3.22&to=nowhere").unwrap();
    assert!(status == 400 && text.contains("ADDRESS:PORT"), "{text}");
}

#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    require_lab!();
    let node = Node::new("agent-addresses", "nftables");
    let more = "nodePortAddresses: [172.20.7.0/24]\n";
    node.site.folder.write("config.conf", &config("nftables", more));
    let agent = node.agent();
    agent.wait_started();
    let at = "172.20.7.99:31080";
    let ip = |verb: &str| {
        let args = ["address", verb, "172.20.7.99/32", "dev", "lo"];
        node.site.world.node().command("ip", args).unwrap()
    };
    assert!(node.site.answers("pod_b", at).is_empty(), "not the node's yet");
    ip("add");
    agent.wait("the node port at the new address", || node.site.answers("pod_b", at) == [A]);
    ip("del");
    agent.wait("the address to be gone", || node.site.answers("pod_b", at).is_empty());
}

#[test]
fn an_idle_agent_does_nothing() {
    require_lab!();
    let node = Node::new("agent-idle", "nftables");
    let agent = node.agent();
    agent.wait_started();
    let syncs = agent.metric("proxier_commit_duration_seconds_count");
    let touched = manifest("cart", "10.97.0.21", 31080, &["10.61.3.21"]) + "# touched\n";
    node.site.folder.write("manifests/cart.yaml", &touched);
    node.site.folder.write(
        "manifests/dns.yaml",
        &manifest("dns", "10.97.0.22", 31081, &["10.61.3.22"])
            .replace("name: tern}", "name: other}"),
    );
    agent.wait("the new Service", || node.site.answers("pod_a", "10.97.0.22:80") == [B]);
    let after = agent.metric("proxier_commit_duration_seconds_count");
    assert_eq!(after, syncs.map(|it| it + 1.0), "a comment is no reason to sync");
}

#[test]
fn takeover_removes_what_others_left() {
    require_lab!();
    let node = Node::new("agent-takeover", "iptables");
    let agent = node.agent();
    agent.wait_started();
    assert!(agent.end(Signal::TERM).success());
    // What a kube-proxy in nftables mode leaves, and what is nobody's business.
    let tables = "table ip kube-proxy { chain services { }; }; table ip6 kube-proxy { chain services { }; }; \
                  table ip mine { chain kube-proxy { }; }";
    node.site.world.node().command_with_input("nft", ["-f", "-"], tables).unwrap();
    let left = |what: &str| node.site.ruleset().contains(what);
    assert!(left("KUBE-SERVICES") && left("ip6 kube-proxy"));

    let text = config("nftables", "") + "takeover: true\n";
    node.site.folder.write("config.conf", &text);
    let agent = node.agent();
    agent.wait_started();
    agent.wait("the rules of before to go", || {
        !left("KUBE-SERVICES") && !left("ip kube-proxy") && !left("ip6 kube-proxy")
    });
    assert!(left("table ip mine") && left("table ip proxier"), "{}", node.site.ruleset());
    assert_eq!(node.site.answers("pod_b", "10.97.0.21:80"), [A]);
}

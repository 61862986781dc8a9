//! What happens to real packets, in every mode of this build. Needs namespaces (see CONTRIBUTING.md).
//! The IPVS mode has its turn in `ipvs.rs`, on a kernel that has IPVS.
#![expect(clippy::unwrap_used, reason = "any failure fails the test")]

#[path = "rig/modes.rs"]
mod modes;
mod rig;

use std::{
    io::{BufRead, BufReader, Write},
    process::Command,
    time::Duration,
};

use modes::modes_here;
use proxier::{Mode, Update, open};
use proxier_testkit::{
    require_lab,
    traffic::{Conversation, Endpoint, Many, ProbeSpec, Responder, probe_many},
};
use rig::{Rig, context, service};

const WEB: &str = "ports: [{name: web, port: 80, nodePort: 31080}]";
const A: &str = "10.61.3.21:8080";
const B: &str = "10.61.3.22:8080";
const REMOTE: &str = "10.61.4.21:8080";
const LOCAL_AND_REMOTE: &[(&str, &str)] = &[("10.61.3.21", ""), ("10.61.4.21", "")];
const GONE: &str = ", conditions: {ready: false, serving: true, terminating: true}";

fn tcp(dst: &str) -> ProbeSpec {
    ProbeSpec::tcp(dst.parse().unwrap())
}

fn udp(dst: &str) -> ProbeSpec {
    ProbeSpec::udp(dst.parse().unwrap())
}

fn v4(spec: &str) -> String {
    format!("clusterIP: 10.97.0.21, {spec}")
}

/// Runs a test in every mode of this build.
fn every_mode(test: impl AsyncFn(Mode)) {
    require_lab!();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for mode in modes_here() {
        runtime.block_on(test(mode));
    }
}

#[test]
fn a_cluster_ip_reaches_every_endpoint_and_only_pods_keep_their_source() {
    every_mode(async |mode| {
        let shop = service("cart", &v4(WEB), "", LOCAL_AND_REMOTE);
        let rig = Rig::new("cluster-ip", mode, &shop).await;
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A, REMOTE], true).await;
        rig.forwards("remote_b", tcp("10.97.0.21:80"), &[A, REMOTE], true).await;
        rig.forwards("node", tcp("10.97.0.21:80"), &[A, REMOTE], false).await;
        rig.forwards("client", tcp("10.97.0.21:80"), &[A, REMOTE], false).await;
    });
}

#[test]
fn external_frontends_with_cluster_policy_masquerade_everybody() {
    every_mode(async |mode| {
        let spec = v4(&format!("type: LoadBalancer, externalIPs: [198.51.100.7], {WEB}"));
        let shop = service("cart", &spec, "{ip: 203.0.113.7}", LOCAL_AND_REMOTE);
        let rig = Rig::new("external", mode, &shop).await;
        for dst in ["198.51.100.7:80", "203.0.113.7:80", "172.20.7.11:31080"] {
            for from in ["client", "pod_b", "node"] {
                rig.forwards(from, tcp(dst), &[A, REMOTE], false).await;
            }
        }
        if mode == Mode::Ipvs {
            // No virtual server answers on loopback addresses, as its limits say.
            return;
        }
        // The kernel lets nothing from 127.0.0.0/8 out of the node unless it is told to.
        rig.world.node().sysctl("net.ipv4.conf.all.route_localnet", "1").unwrap();
        rig.forwards("node", tcp("127.0.0.1:31080"), &[A, REMOTE], false).await;
    });
}

#[test]
fn local_policy_keeps_outside_sources_and_short_circuits_the_rest() {
    every_mode(async |mode| {
        let spec = |ip: &str, vip: &str, port: u16| {
            format!(
                "type: LoadBalancer, clusterIP: {ip}, externalTrafficPolicy: Local, \
                 healthCheckNodePort: {}, externalIPs: [{vip}], \
                 ports: [{{name: web, port: 80, nodePort: {port}}}]",
                port + 1000
            )
        };
        let near = spec("10.97.0.21", "198.51.100.7", 31080);
        let far = spec("10.97.0.22", "198.51.100.8", 31081);
        let shop = service("near", &near, "", LOCAL_AND_REMOTE)
            + &service("far", &far, "", &[("10.61.4.21", "")]);
        let rig = Rig::new("local", mode, &shop).await;
        for dst in ["198.51.100.7:80", "172.20.7.11:31080"] {
            rig.forwards("client", tcp(dst), &[A], true).await;
            rig.forwards("pod_b", tcp(dst), &[A, REMOTE], true).await;
            rig.forwards("node", tcp(dst), &[A, REMOTE], false).await;
        }
        for dst in ["198.51.100.8:80", "172.20.7.11:31081"] {
            rig.drops("client", tcp(dst)).await;
            rig.forwards("pod_b", tcp(dst), &[REMOTE], true).await;
            rig.forwards("node", tcp(dst), &[REMOTE], false).await;
        }
    });
}

#[test]
fn internal_local_policy_uses_this_node_or_drops() {
    every_mode(async |mode| {
        let spec = |ip: &str| {
            format!(
                "clusterIP: {ip}, internalTrafficPolicy: Local, ports: [{{name: web, port: 80}}]"
            )
        };
        let shop = service("near", &spec("10.97.0.21"), "", LOCAL_AND_REMOTE)
            + &service("far", &spec("10.97.0.22"), "", &[("10.61.4.21", "")]);
        let rig = Rig::new("internal", mode, &shop).await;
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A], true).await;
        rig.drops("pod_b", tcp("10.97.0.22:80")).await;
        rig.drops("client", tcp("10.97.0.22:80")).await;
    });
}

#[test]
fn source_ranges_fence_load_balancer_addresses_only() {
    every_mode(async |mode| {
        let spec =
            v4(&format!("type: LoadBalancer, loadBalancerSourceRanges: [192.0.2.48/28], {WEB}"));
        let shop = service("cart", &spec, "{ip: 203.0.113.7}", LOCAL_AND_REMOTE);
        let rig = Rig::new("ranges", mode, &shop).await;
        let vip = || tcp("203.0.113.7:80");
        let outside = std::net::IpAddr::from([192, 0, 2, 77]);
        rig.forwards(
            "client",
            vip().from_ip(std::net::IpAddr::from([192, 0, 2, 55])),
            &[A, REMOTE],
            false,
        )
        .await;
        rig.drops("client", vip().from_ip(outside)).await;
        rig.drops("pod_b", vip()).await;
        let node_port = tcp("172.20.7.11:31080").from_ip(outside);
        rig.forwards("client", node_port, &[A, REMOTE], false).await;
    });
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded() {
    every_mode(async |mode| {
        let shop = service("cart", &v4(WEB), "", &[("10.61.3.21", "")]);
        let rig = Rig::new("hairpin", mode, &shop).await;
        rig.forwards("pod_a", tcp("10.97.0.21:80"), &[A], false).await;
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A], true).await;
    });
}

#[test]
fn without_endpoints_traffic_is_rejected_and_what_is_no_service_is_untouched() {
    every_mode(async |mode| {
        let ports = "ports: [{name: web, port: 80, nodePort: 31080}, \
                     {name: dns, port: 53, protocol: UDP, nodePort: 31053}]";
        let spec = format!(
            "clusterIP: 10.97.0.21, clusterIPs: [10.97.0.21, 'fd41:97::21'], ipFamilies: [IPv4, IPv6], \
             type: LoadBalancer, externalIPs: [198.51.100.7], {ports}"
        );
        let rig = Rig::new("reject", mode, &service("empty", &spec, "", &[])).await;
        for from in ["client", "pod_b", "node"] {
            rig.rejects(from, tcp("10.97.0.21:80")).await;
            rig.rejects(from, tcp("[fd41:97::21]:80")).await;
        }
        for dst in ["198.51.100.7:53", "172.20.7.11:31053", "10.97.0.21:53", "[fd41:97::21]:53"] {
            rig.rejects("client", udp(dst)).await;
        }
        // What no Service claims goes to whoever owns it.
        rig.world.own("198.51.100.7/32").unwrap();
        let owner = Endpoint::tcp("owner", "198.51.100.7:81".parse().unwrap());
        let _owner = Responder::start(rig.world.fabric(), [owner]).unwrap();
        if mode == Mode::Ipvs {
            // The address is this node's then, as its limits say.
            rig.rejects("pod_b", tcp("198.51.100.7:81")).await;
        } else {
            rig.forwards("pod_b", tcp("198.51.100.7:81"), &["owner"], true).await;
        }
    });
}

#[test]
fn affinity_holds_until_its_timeout_and_only_for_its_client() {
    every_mode(async |mode| {
        let spec = v4(&format!(
            "sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: 2}}}}, {WEB}"
        ));
        let all = [("10.61.3.21", ""), ("10.61.3.22", ""), ("10.61.4.21", ""), ("10.61.4.22", "")];
        let rig = Rig::new("affinity", mode, &service("cart", &spec, "", &all)).await;
        let client = rig.world.client().clone();
        let dst = tcp("10.97.0.21:80");
        let mut choices = std::collections::BTreeSet::new();
        // The first connections of a client must not race each other.
        let first = async |spec: &ProbeSpec| {
            probe_many(&client, spec, &Many::new(1)).await.names().first().unwrap().to_string()
        };
        for _ in 0..12 {
            let chosen = first(&dst).await;
            let tally = probe_many(&client, &dst, &Many::new(20)).await;
            assert_eq!(tally.names(), [chosen.as_str()].into(), "{tally}");
            choices.insert(chosen);
            // KERNEL: what IPVS remembers of a client lives as long as its connections, and those for
            // two minutes after their end (ip_vs_conn_expire, v6.12): too long to wait for.
            if choices.len() > 1 || mode == Mode::Ipvs {
                return;
            }
            // Only time without any connection ends an affinity.
            tokio::time::sleep(Duration::from_millis(3100)).await;
        }
        panic!("{mode}: the client always came back to {choices:?}");
    });
}

#[test]
fn endpoints_that_are_about_to_go_serve_while_there_is_nothing_better() {
    every_mode(async |mode| {
        let fading = [("10.61.3.21", GONE), ("10.61.4.21", GONE)];
        let mut rig = Rig::new("fading", mode, &service("cart", &v4(WEB), "", &fading)).await;
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A, REMOTE], true).await;
        let better = [("10.61.3.21", GONE), ("10.61.3.22", ""), ("10.61.4.21", GONE)];
        rig.apply(&service("cart", &v4(WEB), "", &better)).await;
        rig.forwards("client", tcp("10.97.0.21:80"), &[B], false).await;
    });
}

#[test]
fn both_families_are_served() {
    every_mode(async |mode| {
        let spec = format!(
            "clusterIP: 10.97.0.21, clusterIPs: [10.97.0.21, 'fd41:97::21'], ipFamilies: [IPv4, IPv6], \
             type: LoadBalancer, externalIPs: ['2001:db8:e::7'], externalTrafficPolicy: Local, \
             healthCheckNodePort: 32000, {WEB}"
        );
        let endpoints = [("10.61.3.21", ""), ("fd41:61:0:3::21", ""), ("fd41:61:0:4::21", "")];
        let rig = Rig::new("dual", mode, &service("cart", &spec, "", &endpoints)).await;
        let (near, far) = ("[fd41:61:0:3::21]:8080", "[fd41:61:0:4::21]:8080");
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A], true).await;
        rig.forwards("pod_b", tcp("[fd41:97::21]:80"), &[near, far], true).await;
        rig.forwards("node", tcp("[fd41:97::21]:80"), &[near, far], false).await;
        rig.forwards("client", tcp("[2001:db8:e::7]:80"), &[near], true).await;
        rig.forwards("client", tcp("[fd41:7::11]:31080"), &[near], true).await;
    });
}

#[test]
fn a_udp_flow_moves_when_its_endpoint_goes_and_a_tcp_connection_stays() {
    every_mode(async |mode| {
        let spec = v4("ports: [{name: web, port: 80}, {name: dns, port: 53, protocol: UDP}]");
        let shop = |endpoints: &[(&str, &str)]| service("dns", &spec, "", endpoints);
        let mut rig = Rig::new("flow", mode, &shop(LOCAL_AND_REMOTE)).await;
        let client = rig.world.ns("pod_b").unwrap();
        let mut flow = Conversation::open(&client, &udp("10.97.0.21:53")).await.unwrap();
        let mut connection = Conversation::open(&client, &tcp("10.97.0.21:80")).await.unwrap();
        let dns = resolve(&mut flow).await.unwrap();
        let web = connection.ask().await.by().unwrap().to_owned();
        for _ in 0..3 {
            assert_eq!(resolve(&mut flow).await.as_deref(), Some(dns.as_str()));
        }
        let gone = if dns.starts_with("10.61.3") { "10.61.3.21" } else { "10.61.4.21" };
        let rest: Vec<_> = LOCAL_AND_REMOTE.iter().copied().filter(|(ip, _)| *ip != gone).collect();
        let report = rig.apply(&shop(&rest)).await;
        assert_eq!((report.stale_flows.v4, report.stale_flows.v6), (1, 0), "{report:?}");
        let moved = resolve(&mut flow).await;
        assert_eq!(moved, Some(format!("{}:5353", rest[0].0)));
        assert_eq!(connection.ask().await.by(), Some(web.as_str()));

        // The last endpoint goes: the flow is answered by nobody, not by a ghost.
        rig.apply(&shop(&[])).await;
        assert!(flow.ask().await.by().is_none());
        rig.apply(&shop(LOCAL_AND_REMOTE)).await;
        assert!(resolve(&mut flow).await.is_some());
    });
}

/// Who answers; asks again as a resolver does, since a datagram may get lost.
async fn resolve(flow: &mut Conversation) -> Option<String> {
    for _ in 0..3 {
        if let Some(by) = flow.ask().await.by() {
            return Some(by.to_owned());
        }
    }
    None
}

/// The modes that come after one, and before it: IPVS beside all others, where the kernel has it.
fn heirs(before: Mode) -> Vec<Mode> {
    let here: Vec<_> = modes_here().collect();
    let all = if here.contains(&Mode::Ipvs) { proxier::modes().collect() } else { here };
    all.into_iter().filter(|after| *after != before).collect()
}

#[test]
fn a_flow_of_a_mode_that_is_gone_is_taken_over_by_the_next() {
    every_mode(async |before| {
        for after in heirs(before) {
            let spec = "clusterIP: 10.97.0.21, ports: [{name: dns, port: 53, protocol: UDP}]";
            let mut rig =
                Rig::new("heir", before, &service("dns", spec, "", LOCAL_AND_REMOTE)).await;
            if before == Mode::Ipvs {
                // The kernel would end the flows that IPVS leaves, at some time of its own.
                rig.world.node().sysctl("net.ipv4.vs.expire_nodest_conn", "0").unwrap();
            }
            // Masqueraded, so that the endpoint answers the node, and kept.
            for from in ["client", "pod_b"] {
                let ns = rig.world.ns(from).unwrap();
                let mut flow = Conversation::open(&ns, &udp("10.97.0.21:53")).await.unwrap();
                assert!(flow.ask().await.by().is_some(), "{from} in {before} mode");
                rig.proxier.cleanup().await.unwrap();
                rig.proxier = open(after, &context(&rig.world)).await.unwrap();
                rig.proxier.sync(rig.store.reset()).await.unwrap();
                let answer = flow.ask().await;
                assert!(answer.by().is_some(), "{from}, {after} after {before}: {answer:?}");
                rig.proxier.cleanup().await.unwrap();
                rig.proxier = open(before, &context(&rig.world)).await.unwrap();
                rig.proxier.sync(rig.store.reset()).await.unwrap();
            }
        }
    });
}

#[test]
fn a_restart_writes_nothing_and_a_killed_process_is_made_good() {
    every_mode(async |mode| {
        let text = |number: u8| {
            let services = (0..number).map(|index| {
                let spec = format!("clusterIP: 10.97.1.{index}, ports: [{{name: web, port: 80}}]");
                service(&format!("svc-{index}"), &spec, "", LOCAL_AND_REMOTE)
            });
            services.collect::<String>()
        };
        let mut rig = Rig::new("restart", mode, &text(40)).await;
        let mut second = open(mode, &context(&rig.world)).await.unwrap();
        let report = second.sync(rig.store.reset()).await.unwrap();
        if mode == Mode::Userspace {
            // Routes live in a process, and its listeners have ports of their own: of the kernel's
            // objects only the three chains of each family that lead to those are written.
            assert_eq!((report.ops.set, report.ops.del), (6, 0), "{report:?}");
        } else {
            assert_eq!(report.ops.total(), 0, "{report:?}");
        }
        drop(second);

        let manifest = std::env::temp_dir().join(format!("proxier-killed-{}", std::process::id()));
        std::fs::write(&manifest, text(60)).unwrap();
        for delay_ms in [0_u64, 5, 15, 30, 60] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &killed_process_name(), "--nocapture"])
                .env("PROXIER_TEST_NETNS", rig.world.node().path())
                .env("PROXIER_TEST_MODE", mode.name())
                .env("PROXIER_TEST_MANIFEST", &manifest)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(said.any(|line| line.unwrap().ends_with(SYNCED)), "the process works");
            // It is to be killed at any point of its work: only time leads there.
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
            child.kill().unwrap();
            child.wait().unwrap();
            let mut next = open(mode, &context(&rig.world)).await.unwrap();
            next.sync(rig.store.reset()).await.unwrap();
            assert_eq!(next.audit().await.unwrap().ops.total(), 0);
        }
        std::fs::remove_file(&manifest).unwrap();
        if mode == Mode::Userspace {
            // The others took the traffic, and are gone: it has to be captured again.
            assert_eq!(rig.proxier.audit().await.unwrap().drift, 6);
        }
        rig.check().await;
        rig.forwards("pod_b", tcp("10.97.1.39:80"), &[A, REMOTE], true).await;
    });
}

/// What the process that is killed says when it has synced once.
const SYNCED: &str = "synced";

/// As the test harness calls it: without the name of the crate.
fn killed_process_name() -> String {
    let inside = module_path!().split("::").skip(1).chain(["killed_process"]);
    inside.collect::<Vec<_>>().join("::")
}

/// Not a test of its own: the process that is killed above. It goes back and forth between two states.
#[test]
fn killed_process() {
    let Ok(netns) = std::env::var("PROXIER_TEST_NETNS") else { return };
    let mode: Mode = std::env::var("PROXIER_TEST_MODE").unwrap().parse().unwrap();
    let text = std::fs::read_to_string(std::env::var("PROXIER_TEST_MANIFEST").unwrap()).unwrap();
    let manifest = proxier::manifest::Manifest::parse("test", &text);
    let mut context = proxier::OpenContext::default();
    context.netns = Some(netns.into());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut proxier = open(mode, &context).await.unwrap();
        for round in 0..1000 {
            let mut store = proxier::model::Store::new(proxier::model::NodeEnv::default());
            let half = manifest.services().skip(round % 2 * 30).take(30).cloned().collect();
            store.apply(proxier::model::Event::Services(half));
            store
                .apply(proxier::model::Event::EndpointSlices(manifest.slices().cloned().collect()));
            let Some(Update::Reset { node, fragments, .. }) = store.take() else { return };
            let revision = proxier::Revision(u64::try_from(round).unwrap() + 1);
            proxier.sync(Update::Reset { revision, node, fragments }).await.unwrap();
            if round == 0 {
                writeln!(std::io::stdout(), "{SYNCED}").unwrap();
            }
        }
    });
}

#[test]
fn cleanup_leaves_what_was_there_before() {
    every_mode(async |mode| {
        let foreign = "table ip mine {
 chain c {
 type filter hook input priority 0
 tcp dport 7 accept
 }
}
";
        let world = proxier_testkit::topology::Topology::standard().build("cleanup").unwrap();
        world.node().command_with_input("nft", ["-f", "-"], foreign).unwrap();
        world
            .node()
            .command(
                "iptables-nft",
                ["-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "7", "-j", "RETURN"],
            )
            .unwrap();
        let list = || world.node().command("nft", ["list", "ruleset"]).unwrap();
        let before = list();
        let manifest = service("cart", &v4(WEB), "", LOCAL_AND_REMOTE);
        let manifest = proxier::manifest::Manifest::parse("test", &manifest);
        let mut store = proxier::model::Store::new(rig::env(&world));
        store.apply(proxier::model::Event::Services(manifest.services().cloned().collect()));
        store.apply(proxier::model::Event::EndpointSlices(manifest.slices().cloned().collect()));
        let mut proxier = open(mode, &context(&world)).await.unwrap();
        proxier.sync(store.take().unwrap()).await.unwrap();
        assert_ne!(list(), before);
        // A process that knows nothing cleans up after another one.
        drop(proxier);
        let mut other = open(mode, &context(&world)).await.unwrap();
        other.cleanup().await.unwrap();
        assert_eq!(list(), before);
        other.cleanup().await.unwrap();
        assert_eq!(list(), before);
    });
}

#[test]
fn sctp_ports_are_programmed_or_refused_by_name() {
    every_mode(async |mode| {
        let spec = v4("ports: [{name: web, port: 80}, {name: sip, port: 5060, protocol: SCTP}]");
        let mut rig = Rig::new("sctp", mode, &service("voip", &spec, "", LOCAL_AND_REMOTE)).await;
        rig.forwards("pod_b", tcp("10.97.0.21:80"), &[A, REMOTE], true).await;
        let degraded = rig.proxier.status().degraded;
        match rig.mode {
            Mode::Userspace => assert_eq!(degraded[0].id.to_string(), "shop/voip:sip/SCTP/IPv4"),
            Mode::Iptables | Mode::Ipvs | Mode::Nftables => {
                assert_eq!(degraded, []);
                assert!(rig.ruleset().contains("sctp"), "{}", rig.ruleset());
            }
        }
        rig.check().await;
    });
}

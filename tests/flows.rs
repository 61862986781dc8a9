//! Conformance cases and random flows with real packets, in every mode of this build. Needs namespaces
//! (see CONTRIBUTING.md). The IPVS mode has its turn in `ipvs.rs`.

#[path = "rig/modes.rs"]
mod modes;

use modes::modes_here;
use proptest::{collection::vec, prelude::*, sample::select, strategy::ValueTree};
use proxier::{Mode, sim::Outcome};
use proxier_testkit::{
    cases::{Case, CaseFile, Kernel, RealKernel, Report, Verdict, run, trace},
    require_lab,
};
use serde_json::{Value, json};

/// The files of cases that come with the project.
const FILES: [(&str, &str); 2] = [
    ("cases.yaml", include_str!("../proxier-testkit/cases/cases.yaml")),
    ("extra.yaml", include_str!("../proxier-testkit/cases/extra.yaml")),
];

fn is_flow(kind: &str) -> bool {
    matches!(kind, "affinity" | "flow")
}

#[test]
fn every_flow_comes_out_on_the_real_kernel() {
    require_lab!();
    for mode in modes_here() {
        let factory = proxier::factory(mode).expect("a mode of this build");
        let mut real = RealKernel::new(factory).expect("a runtime starts");
        let mut failed = Vec::new();
        for (name, text) in FILES {
            let file = CaseFile::parse(text).expect("the file is well-formed");
            for case in file.cases().iter().filter(|case| is_flow(&case.kind)) {
                let reports = run(&file, case, &[mode], &[], &mut Kernel::Real(&mut real));
                let is_failed = |it: &Report<'_>| matches!(it.verdict, Verdict::Failed { .. });
                failed.extend(
                    reports.iter().filter(|it| is_failed(it)).map(|it| format!("{name}: {it}")),
                );
            }
        }
        assert!(failed.is_empty(), "{mode}: {} failed\n{}", failed.len(), failed.join("\n"));
    }
}

/// A Service and its slice, as cases describe them. Every number has addresses of its own.
fn described(number: u8) -> impl Strategy<Value = (Value, Value)> {
    let kinds = select(&["ClusterIP", "NodePort", "LoadBalancer"][..]);
    let policies = || select(&["Cluster", "Local"][..]);
    let ranges = select(vec![vec![], vec!["192.0.2.48/28"], vec!["172.20.7.0/24"]]);
    let endpoint = (any::<bool>(), 11_u8..15, 0_u8..7, prop::option::weighted(0.3, 0_u8..2));
    let slices = vec(endpoint, 0..5);
    (kinds, policies(), policies(), ranges, any::<bool>(), slices).prop_map(
        move |(kind, external, internal, ranges, is_udp, endpoints)| {
            let proto = if is_udp { "UDP" } else { "TCP" };
            let node_port = if kind == "ClusterIP" { 0 } else { 31_000 + u16::from(number) };
            let service = json!({
                "type": kind, "etp": external, "itp": internal, "source_ranges": ranges,
                "cluster_ips": [format!("10.96.0.{number}")],
                "external_ips": [format!("198.51.100.{number}")],
                "ingress": [{"ip": format!("203.0.113.{number}")}],
                "ports": [{"name": "p", "port": 80, "proto": proto, "node_port": node_port}],
            });
            let endpoints = endpoints.iter().map(|(here, host, state, zone)| {
                let zones = zone.map(|zone| vec![format!("zone-{zone}")]);
                json!({
                    "addr": format!("10.61.{}.{host}", if *here { 3 } else { 4 }),
                    "node": if *here { "tern" } else { "heron" },
                    "ready": *state < 4, "serving": *state != 5, "terminating": *state >= 4,
                    "zones": zones,
                })
            });
            let slice = json!({
                "service": format!("shop/s{number}"), "family": "IPv4",
                "ports": [{"name": "p", "port": 8000 + u16::from(number), "proto": proto}],
                "endpoints": endpoints.collect::<Vec<_>>(),
            });
            (service, slice)
        },
    )
}

/// A file of random flows whose expected outcomes are the model's.
fn random_file(count: u64, mode: Mode) -> CaseFile {
    let sources = [
        json!({"origin": "pod", "ip": "10.61.3.9", "iface": "cni0"}),
        json!({"origin": "pod", "ip": "10.61.3.11", "iface": "cni0"}),
        json!({"origin": "host", "ip": "172.20.7.11"}),
        json!({"origin": "host", "ip": "127.0.0.1"}),
        json!({"origin": "wire", "ip": "172.20.7.12", "iface": "eth0"}),
        json!({"origin": "wire", "ip": "192.0.2.50", "iface": "eth0"}),
        json!({"origin": "wire", "ip": "192.0.2.9", "iface": "eth0"}),
    ];
    let detectors = [
        json!({"mode": "ClusterCIDR", "cidrs": ["10.61.0.0/16"]}),
        json!({"mode": "BridgeInterface", "iface": "cni0"}),
        json!({"mode": "none"}),
    ];
    let ways = ["10.96.0.", "198.51.100.", "203.0.113.", "node", "lo"];
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let drawn = (
        (described(1), described(2)),
        (select(sources.to_vec()), select(ways.to_vec()), 1_u8..3),
        (select(detectors.to_vec()), any::<bool>(), any::<bool>()),
    );
    let mut cases = Vec::new();
    for id in 1..=count {
        let tree = drawn.new_tree(&mut runner).expect("nothing is rejected");
        let ((one, two), (src, way, number), (detector, restricted, all)) = tree.current();
        let (service, _) = if number == 1 { &one } else { &two };
        let proto = service.pointer("/ports/0/proto").and_then(Value::as_str);
        let proto = proto.unwrap_or_default().to_lowercase();
        let dst = match way {
            "node" => format!("172.20.7.11:{}/{proto}", 31_000 + u16::from(number)),
            "lo" => format!("172.21.7.11:{}/{proto}", 31_000 + u16::from(number)),
            prefix => format!("{prefix}{number}:80/{proto}"),
        };
        // Only the node itself can talk from 127.0.0.1, and only to itself.
        let is_lo = src.get("ip") == Some(&json!("127.0.0.1"));
        let dst = if is_lo { dst.replace("172.20.7.11", "127.0.0.1") } else { dst };
        if is_lo && !dst.starts_with("127.") {
            continue;
        }
        let addresses = if restricted { json!(["172.20.7.0/24"]) } else { json!([]) };
        cases.push(json!({
            "id": id, "kind": "flow", "also": ["ipvs"], "world": "random", "src": src, "dst": dst,
            "name": "a random flow",
            "with": {
                "services": {"shop/s1": one.0, "shop/s2": two.0},
                "slices": {"s1": one.1, "s2": two.1},
                "config": {
                    "detect_local": detector, "node_port_addresses": addresses,
                    "masquerade_all": all,
                },
            },
        }));
    }
    let file = |cases: &[Value]| {
        let text = json!({
            "schema": "svcproxy-cases/1",
            "nodes": {
                "tern": {
                    "ips": ["172.20.7.11"], "pod_cidrs": ["10.61.3.0/24"], "zone": "zone-1",
                    "ifaces": {
                        "lo": ["127.0.0.1/8"], "eth0": ["172.20.7.11/24"],
                        "eth1": ["172.21.7.11/24"], "cni0": ["10.61.3.1/24"],
                    },
                },
                "heron": {"ips": ["172.20.7.12"]},
            },
            "worlds": {"random": {"node": "tern"}},
            "cases": cases,
        });
        CaseFile::parse(&text.to_string()).expect("the file is well-formed")
    };
    let asked = file(&cases);
    for (case, value) in asked.cases().iter().zip(&mut cases) {
        value["expect"] = expectation(&asked, case, mode);
    }
    file(&cases)
}

/// What the model says, as cases say it.
fn expectation(file: &CaseFile, case: &Case, mode: Mode) -> Value {
    let Some(trace) = trace(file, case, mode) else { return Value::Null };
    let verdict = |verdict: &str| json!({"verdict": verdict});
    match trace.outcome {
        Outcome::Accept => verdict("accept"),
        Outcome::Drop => verdict("drop"),
        Outcome::Forward { to } => {
            let snat: serde_json::Map<_, _> = to
                .iter()
                .map(|it| (it.addr.to_string(), json!(it.source.is_masquerade())))
                .collect();
            let to: Vec<_> = to.iter().map(|it| it.addr.to_string()).collect();
            json!({"verdict": "dnat", "to": to, "snat": snat})
        }
        Outcome::Reject => verdict("reject"),
        Outcome::Untouched => verdict("none"),
    }
}

#[test]
fn a_sample_of_random_flows_comes_out_on_the_real_kernel() {
    require_lab!();
    let mode = modes_here().next().expect("a mode of this build");
    let file = random_file(80, mode);
    let factory = proxier::factory(mode).expect("a mode of this build");
    let mut real = RealKernel::new(factory).expect("a runtime starts");
    let mut kernel = Kernel::Real(&mut real);
    for case in file.cases() {
        for report in run(&file, case, &[mode], &[], &mut kernel) {
            let detail = case.part("with").to_string();
            assert!(matches!(report.verdict, Verdict::Passed { .. }), "{detail}\n{report}");
        }
    }
}

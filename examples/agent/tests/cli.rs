//! What the agent says when something is wrong: one clear line that says what to do.

mod rig;

use std::{
    io::Read,
    process::{Command, Output, Stdio},
};

use proxier_testkit::{lab::Lab, require_lab};
use rig::{Agent, Folder, ask, binary};

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests");

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The agent refuses, and says this in one line.
fn refuses(args: &[&str], line: &str) {
    let output = ask(args);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    let errors: Vec<_> =
        text.lines().filter(|it| it.starts_with("agent: ") || it.starts_with("error: ")).collect();
    assert!(matches!(&*errors, [one] if one.contains(line)), "{args:?}: {text}");
}

#[test]
fn help_names_every_verb_and_kube_proxys_flags() {
    let output = ask(&["--help"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for word in [
        "doctor",
        "plan",
        "diff",
        "get",
        "explain",
        "cleanup",
        "completion",
        "--config",
        "--kubeconfig",
        "--proxy-mode",
        "--cluster-cidr",
        "--detect-local-mode",
        "--nodeport-addresses",
        "--init-only",
        "--iptables-min-sync-period",
        "--ipvs-strict-arp",
        "--conntrack-tcp-timeout-established",
        "--healthz-bind-address",
        "--bind-address-hard-fail",
        "--oom-score-adj",
        "--write-config-to",
    ] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
}

#[test]
fn what_is_wrong_with_flags_is_said_in_a_line() {
    refuses(&["--no-such-flag"], "--no-such-flag");
    refuses(
        &["--cluster-cidr=10.244.0.0/33"],
        "clusterCIDR (--cluster-cidr): \"10.244.0.0/33\" is not a CIDR",
    );
    refuses(&["--cluster-cidr=10.1.0.0/16,10.2.0.0/16"], "neither one CIDR nor one of each family");
    refuses(&["--nodeport-addresses=10.0.0.0/8,primary"], "\"primary\" cannot be combined");
    refuses(&["--proxy-mode=fast"], "\"fast\" is not auto, nftables, iptables, ipvs or userspace");
    refuses(&["--iptables-masquerade-bit=32"], "32 is not within 0 and 31");
    refuses(
        &["--iptables-sync-period=1s", "--iptables-min-sync-period=2s"],
        "minSyncPeriod: 2s is longer than",
    );
    refuses(
        &["--detect-local-mode=BridgeInterface"],
        "needs detectLocal.bridgeInterface (--pod-bridge-interface)",
    );
    refuses(&["--healthz-bind-address=nowhere"], "\"nowhere\" is not ADDRESS:PORT");
    refuses(&["--config=/no/such/file"], "--config /no/such/file: cannot read it");
    refuses(&["get", "services", "--manifests=/no/such/file"], "/no/such/file: cannot find it");
}

#[test]
fn settings_are_written_as_a_file_that_means_the_same() {
    let folder = Folder::new("cli-config");
    let first = folder.path("first.conf");
    let flags = ["--cluster-cidr=10.7.0.0/16", "--proxy-mode=iptables", "--conntrack-min=7"];
    assert!(ask(&[&flags[..], &["--write-config-to", &first]].concat()).status.success());
    let text = std::fs::read_to_string(&first).unwrap();
    assert!(text.contains("clusterCIDR: 10.7.0.0/16") && text.contains("min: 7"), "{text}");
    let second = folder.path("second.conf");
    assert!(ask(&["--config", &first, "--write-config-to", &second]).status.success());
    assert_eq!(std::fs::read_to_string(&second).unwrap(), text);

    let output = ask(&[
        "--config",
        &first,
        "--cluster-cidr=10.8.0.0/16",
        "get",
        "conflicts",
        "--manifests",
        MANIFESTS,
    ]);
    assert!(
        said(&output).contains("ignored, because --config is given: --cluster-cidr"),
        "{}",
        said(&output)
    );
}

#[test]
fn the_configuration_of_the_daemon_set_is_taken() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/configmap.yaml");
    let map: serde_json::Value =
        yaml_serde::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let folder = Folder::new("cli-deploy");
    let config = folder.write("config.conf", map["data"]["config.conf"].as_str().unwrap());
    let output = ask(&["--config", &config, "--write-config-to=-"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", said(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("takeover: true") && text.contains("mode: auto"), "{text}");
    let kubeconfig = folder.write("kubeconfig", map["data"]["kubeconfig.conf"].as_str().unwrap());
    refuses(&["get", "services", "--kubeconfig", &kubeconfig], "no way to the cluster: kubeconfig");
}

#[test]
fn listings_come_in_every_form() {
    let list = |args: &[&str]| {
        let args = [args, &["--manifests", MANIFESTS]].concat();
        let output = ask(&args);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = list(&["get", "svc", "-n", "shop"]);
    assert!(text.starts_with("NAMESPACE   SERVICE"), "{text}");
    assert!(text.contains("10.96.112.9:80/TCP") && !text.contains("kube-dns"), "{text}");
    assert!(list(&["get", "svc", "-o", "wide"]).contains("AFFINITY"));
    assert!(list(&["get", "endpoints", "-o", "name"]).contains("shop/cart\n"));
    let json: serde_json::Value =
        serde_json::from_str(&list(&["get", "svc", "-o", "json"])).unwrap();
    assert!(json.as_array().unwrap().iter().any(|it| it["service"] == "cart"), "{json}");
    assert!(list(&["get", "ep", "-o", "yaml"]).contains("service: cart"));
    let text = list(&[
        "explain",
        "--from=10.244.1.11",
        "--to=10.96.112.9:80",
        "--cluster-cidr=10.244.0.0/16",
    ]);
    assert!(text.contains("shop/cart"), "{text}");
    assert!(list(&["completion", "bash"]).contains("_agent()"));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let mut child = Command::new(binary())
        .args(["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(status.success() && text.is_empty(), "{status}: {text}");
}

#[test]
fn the_kernel_is_compared_without_being_written() {
    require_lab!();
    let lab = Lab::new("agent-diff").unwrap();
    let node = lab.ns("node").unwrap();
    let folder = Folder::new("diff");
    let agent = |args: &[&str]| {
        let args = [args, &["--manifests", MANIFESTS, "--hostname-override=tern"]].concat();
        node.run(|| Command::new(binary()).args(args).output()).unwrap().unwrap()
    };
    for mode in ["nftables", "iptables"] {
        let mode = format!("--proxy-mode={mode}");
        let differs = agent(&["diff", &mode]);
        assert_eq!(differs.status.code(), Some(1), "{}", said(&differs));
        let ruleset = || node.command("nft", ["-s", "list", "ruleset"]).unwrap();
        assert_eq!(ruleset(), "", "comparing writes nothing");
        let running = Agent::start(
            &node,
            &folder,
            &[
                &mode,
                "--conntrack-max-per-core=0",
                "--oom-score-adj=0",
                "--iptables-localhost-nodeports=false",
                "--manifests",
                MANIFESTS,
            ],
        );
        running.wait_started();
        let same = agent(&["diff", &mode, "--iptables-localhost-nodeports=false"]);
        assert_eq!(same.status.code(), Some(0), "{}", String::from_utf8_lossy(&same.stdout));
        running.end(rustix::process::Signal::TERM);
        let cleaned = agent(&["cleanup"]);
        assert!(cleaned.status.success(), "{}", said(&cleaned));
        assert_eq!(ruleset(), "", "clean-up leaves nothing");
    }
}

#[test]
fn a_port_in_use_and_a_missing_privilege_are_said() {
    require_lab!();
    let lab = Lab::new("agent-refused").unwrap();
    let node = lab.ns("node").unwrap();
    let _squatter = node.run(|| std::net::TcpListener::bind("0.0.0.0:10256")).unwrap().unwrap();
    let output = node.run(|| {
        Command::new(binary())
            .args(["--bind-address-hard-fail", "--conntrack-max-per-core=0", "--oom-score-adj=0"])
            .args(["--proxy-mode=nftables", "--manifests", MANIFESTS])
            .output()
    });
    let text = said(&output.unwrap().unwrap());
    assert!(
        text.contains("agent: --healthz-bind-address 0.0.0.0:10256: cannot listen there"),
        "{text}"
    );
    assert!(text.contains("stop what uses the port"), "{text}");

    let output = node.run(|| {
        Command::new("setpriv")
            .args(["--bounding-set=-all", "--inh-caps=-all"])
            .arg(binary())
            .args(["doctor", "--manifests", MANIFESTS])
            .output()
    });
    let output = output.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("CAP_NET_ADMIN is missing: run as root, or grant it"), "{text}");
    assert!(text.contains("no mode can work here"), "{text}");
}

#[test]
fn trouble_with_the_cluster_is_said_in_a_line() {
    refuses(
        &["get", "services"],
        "no way to the cluster: neither a service account nor a kubeconfig",
    );
    refuses(&["get", "services", "--kubeconfig=/no/such/file"], "/no/such/file");
    let folder = Folder::new("cli-kubeconfig");
    // Nothing listens on the discard port of the loopback address.
    let kubeconfig = folder.write(
        "kubeconfig",
        "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
         clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]\n\
         contexts: [{name: a, context: {cluster: a, user: a}}]\nusers: [{name: a, user: {}}]\n",
    );
    let args = ["get", "services", "--kubeconfig", &kubeconfig];
    refuses(&args, "Connection refused (os error 111): check the server's address and the network");
}

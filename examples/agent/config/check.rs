//! Checking settings, all of them, before anything is done with them.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use proxier::{
    Family, Mode, OpenContext, Pacing,
    model::{DetectLocal, NodeEnv, NodePortAddresses, parse_ip, parse_net},
    pace::Pause,
};

use super::{GoDuration, KubeProxyConfiguration, Loaded};

/// Where a server listens; `None`: nowhere.
pub(crate) type Listen = Option<SocketAddr>;

/// Settings that make sense.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) loaded: Loaded,
    /// `None`: the best one.
    pub(crate) mode: Option<Mode>,
    pub(crate) node_name: String,
    pub(crate) health: Listen,
    pub(crate) metrics: Listen,
}

/// Collects what is wrong.
#[derive(Default)]
struct Check(Vec<String>);

impl Check {
    fn that(&mut self, fine: bool, field: &str, what: impl std::fmt::Display) {
        if !fine {
            self.0.push(format!("{field}: {what}"));
        }
    }

    fn take<T>(&mut self, field: &str, value: Result<T, String>) -> Option<T> {
        value.map_err(|what| self.that(false, field, what)).ok()
    }
}

impl Resolved {
    /// Checks everything.
    ///
    /// # Errors
    /// All that is wrong, a line each.
    pub(crate) fn new(loaded: Loaded) -> Result<Self, String> {
        let mut check = Check::default();
        let config = &loaded.proxy;
        let mode = match &*config.mode {
            "auto" | "" => None,
            name => {
                let known = name.parse::<Mode>().map_err(|_unknown| {
                    format!("{name:?} is not auto, nftables, iptables, ipvs or userspace")
                });
                check.take("mode (--proxy-mode)", known)
            }
        };
        numbers(config, &mut check);
        periods(config, &mut check);
        check.take("clusterCIDR (--cluster-cidr)", cidr_pair(&config.cluster_cidr));
        check.take("nodePortAddresses (--nodeport-addresses)", node_ports(config, None));
        check.take("detectLocalMode (--detect-local-mode)", detect_local(config));
        for cidr in &config.ipvs.exclude_cidrs {
            check.take("ipvs.excludeCIDRs (--ipvs-exclude-cidrs)", net(cidr));
        }
        let is_ip = parse_ip(&config.bind_address).is_some();
        check.that(
            is_ip,
            "bindAddress (--bind-address)",
            format!("{:?} is not an IP address", config.bind_address),
        );
        let health = &config.healthz_bind_address;
        let health =
            check.take("healthzBindAddress (--healthz-bind-address)", listen(health, 10256));
        let metrics = &config.metrics_bind_address;
        let metrics =
            check.take("metricsBindAddress (--metrics-bind-address)", listen(metrics, 10249));
        let name = check.take("hostnameOverride (--hostname-override)", node_name(config));
        match (check.0.is_empty(), health, metrics, name) {
            (true, Some(health), Some(metrics), Some(node_name)) => {
                Ok(Self { mode, node_name, health, metrics, loaded })
            }
            _ => Err(check.0.join("\n")),
        }
    }

    /// The settings in force, by document.
    pub(crate) fn configz(&self) -> serde_json::Value {
        serde_json::json!({
            "kubeproxy.config.k8s.io": self.loaded.proxy,
            "proxier.config": self.loaded.ours,
        })
    }

    /// Services come from a cluster.
    pub(crate) fn is_cluster(&self) -> bool {
        self.loaded.ours.manifests.is_empty()
    }

    /// The settings that decide which packets go where, with what is not known of the node left
    /// empty.
    pub(crate) fn env(&self, mode: Mode) -> NodeEnv {
        let config = &self.loaded.proxy;
        NodeEnv {
            name: self.node_name.clone(),
            detect_local: detect_local(config).unwrap_or(DetectLocal::None),
            masquerade_all: match mode {
                Mode::Nftables => config.nftables.masquerade_all,
                Mode::Iptables | Mode::Ipvs | Mode::Userspace => config.iptables.masquerade_all,
            },
            node_port_addresses: node_ports(config, Some(mode))
                .unwrap_or_else(|_checked| NodePortAddresses::Inside(Vec::new())),
            localhost_node_ports: config.iptables.localhost_node_ports,
            ..NodeEnv::default()
        }
    }

    /// How to open a proxier.
    pub(crate) fn context(&self, mode: Mode) -> OpenContext {
        let (config, ours) = (&self.loaded.proxy, &self.loaded.ours);
        let mut context = OpenContext::default();
        context.netns = Some(ours.netns.clone()).filter(|path| *path != PathBuf::new());
        context.prefix = Some(ours.prefix.clone()).filter(|it| !it.is_empty());
        context.takeover = ours.takeover;
        let bit = match mode {
            Mode::Nftables => config.nftables.masquerade_bit,
            Mode::Iptables | Mode::Ipvs | Mode::Userspace => config.iptables.masquerade_bit,
        };
        context.masquerade_bit = u8::try_from(bit).unwrap_or(14);
        context
    }

    /// When to sync: kube-proxy's minimum is the longest pause, which is taken only when syncs take
    /// long.
    pub(crate) fn pacing(&self, mode: Mode) -> Pacing {
        let ours = &self.loaded.ours;
        let mut pacing = Pacing::default();
        let (_, min) = self.sync_periods(mode);
        pacing.pause = Pause::Adaptive { limit: min };
        pacing.audit = ours.audit_period.0;
        pacing.max_retry = ours.max_retry.0;
        pacing
    }

    /// A change that waits for so long makes the node unhealthy.
    pub(crate) fn health_timeout(&self, mode: Mode) -> Duration {
        self.sync_periods(mode).0 * 2
    }

    fn sync_periods(&self, mode: Mode) -> (Duration, Duration) {
        let config = &self.loaded.proxy;
        let (sync, min) = match mode {
            Mode::Iptables | Mode::Userspace => {
                (config.iptables.sync_period, config.iptables.min_sync_period)
            }
            Mode::Ipvs => (config.ipvs.sync_period, config.ipvs.min_sync_period),
            Mode::Nftables => (config.nftables.sync_period, config.nftables.min_sync_period),
        };
        (sync.0, min.0)
    }
}

fn numbers(config: &KubeProxyConfiguration, check: &mut Check) {
    let (ours, other) = (config.iptables.masquerade_bit, config.nftables.masquerade_bit);
    let field = "iptables.masqueradeBit (--iptables-masquerade-bit)";
    let mut bit = |field: &str, bit| {
        check.that((0..=31).contains(&bit), field, format!("{bit} is not within 0 and 31"));
    };
    bit(field, ours);
    // The flag sets both: one mistake is one line.
    if other != ours {
        bit("nftables.masqueradeBit", other);
    }
    let adj = config.oom_score_adj;
    let field = "oomScoreAdj (--oom-score-adj)";
    check.that((-1000..=1000).contains(&adj), field, format!("{adj} is not within -1000 and 1000"));
    for (field, value) in [
        ("conntrack.maxPerCore (--conntrack-max-per-core)", config.conntrack.max_per_core),
        ("conntrack.min (--conntrack-min)", config.conntrack.min),
        ("clientConnection.burst (--kube-api-burst)", config.client_connection.burst),
    ] {
        check.that(value >= 0, field, format!("{value} is negative"));
    }
}

fn periods(config: &KubeProxyConfiguration, check: &mut Check) {
    let iptables = (config.iptables.sync_period, config.iptables.min_sync_period);
    let nftables = (config.nftables.sync_period, config.nftables.min_sync_period);
    let ipvs = (config.ipvs.sync_period, config.ipvs.min_sync_period);
    for (name, (sync, min)) in [("iptables", iptables), ("ipvs", ipvs), ("nftables", nftables)] {
        // The flags set both: one mistake is one line.
        if name == "nftables" && nftables == iptables {
            continue;
        }
        check.that(
            sync > GoDuration::default(),
            &format!("{name}.syncPeriod"),
            "must be greater than 0",
        );
        let what = format!("{min} is longer than {name}.syncPeriod, {sync}");
        check.that(min <= sync, &format!("{name}.minSyncPeriod"), what);
    }
}

fn net(text: &str) -> Result<IpNet, String> {
    let parsed = parse_net(text.trim()).map(|(net, _)| net);
    parsed.ok_or_else(|| format!("{text:?} is not a CIDR such as 10.244.0.0/16"))
}

/// One network, or one of each family.
fn cidr_pair(text: &str) -> Result<Vec<IpNet>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let nets = text.split(',').map(net).collect::<Result<Vec<_>, _>>()?;
    let families: Vec<_> = nets.iter().map(|net| Family::of(net.addr())).collect();
    match &*families {
        [_] => Ok(nets),
        [one, other] if one != other => Ok(nets),
        _ => Err(format!("{text:?} is neither one CIDR nor one of each family")),
    }
}

fn node_ports(
    config: &KubeProxyConfiguration,
    mode: Option<Mode>,
) -> Result<NodePortAddresses, String> {
    // K8S: the nftables mode answers on the node's own addresses when nothing is said
    // (pkg/proxy/nftables, v1.36).
    if config.node_port_addresses.is_empty() && mode == Some(Mode::Nftables) {
        return Ok(NodePortAddresses::Primary);
    }
    NodePortAddresses::parse(&config.node_port_addresses)
}

fn detect_local(config: &KubeProxyConfiguration) -> Result<DetectLocal, String> {
    let named = |name: &str, field: &str| {
        if name.is_empty() { Err(format!("needs {field}")) } else { Ok(name.to_owned()) }
    };
    let local = &config.detect_local;
    match &*config.detect_local_mode {
        "ClusterCIDR" => {
            Ok(DetectLocal::ClusterCidr(cidr_pair(&config.cluster_cidr).unwrap_or_default()))
        }
        "NodeCIDR" => Ok(DetectLocal::NodeCidr),
        "BridgeInterface" => {
            named(&local.bridge_interface, "detectLocal.bridgeInterface (--pod-bridge-interface)")
                .map(DetectLocal::BridgeInterface)
        }
        "InterfaceNamePrefix" => named(
            &local.interface_name_prefix,
            "detectLocal.interfaceNamePrefix (--pod-interface-name-prefix)",
        )
        .map(DetectLocal::InterfaceNamePrefix),
        other => Err(format!(
            "{other:?} is not ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
        )),
    }
}

/// An address with or without a port.
fn listen(text: &str, port: u16) -> Result<Listen, String> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(at) = text.parse::<SocketAddr>() {
        return Ok(Some(at));
    }
    let ip = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    ip.map(|ip| Some(SocketAddr::new(ip, port)))
        .map_err(|_not_an_address| format!("{text:?} is not ADDRESS:PORT"))
}

fn node_name(config: &KubeProxyConfiguration) -> Result<String, String> {
    let name = match config.hostname_override.trim() {
        "" => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map_err(|error| format!("not given, and the host has no name: {error}"))?,
        name => name.to_owned(),
    };
    match name.trim().to_lowercase() {
        name if name.is_empty() => Err("must not be empty".into()),
        name => Ok(name),
    }
}

//! `kubeproxy.config.k8s.io/v1alpha1` KubeProxyConfiguration, and what we add to it.
// K8S: staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go and defaults.go, v1.36.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::GoDuration;

macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $kind:ty = $default:expr),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub(crate) struct $name {
            $($(#[$meta])* pub(crate) $field: $kind,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

section!(
    /// What kube-proxy is configured with.
    KubeProxyConfiguration {
        api_version: String = "kubeproxy.config.k8s.io/v1alpha1".into(),
        kind: String = "KubeProxyConfiguration".into(),
        mode: String = "auto".into(),
        hostname_override: String = String::new(),
        bind_address: String = "0.0.0.0".into(),
        healthz_bind_address: String = "0.0.0.0:10256".into(),
        metrics_bind_address: String = "127.0.0.1:10249".into(),
        bind_address_hard_fail: bool = false,
        enable_profiling: bool = false,
        show_hidden_metrics_for_version: String = String::new(),
        #[serde(rename = "clusterCIDR")]
        cluster_cidr: String = String::new(),
        detect_local_mode: String = "ClusterCIDR".into(),
        detect_local: DetectLocalSettings = DetectLocalSettings::default(),
        node_port_addresses: Vec<String> = Vec::new(),
        iptables: Iptables = Iptables::default(),
        ipvs: Ipvs = Ipvs::default(),
        nftables: Nftables = Nftables::default(),
        conntrack: Conntrack = Conntrack::default(),
        config_sync_period: GoDuration = GoDuration::seconds(900),
        oom_score_adj: i32 = -999,
        client_connection: ClientConnection = ClientConnection::default(),
        feature_gates: BTreeMap<String, bool> = BTreeMap::new(),
        logging: Value = Value::Null,
        #[serde(skip_serializing_if = "Value::is_null")]
        winkernel: Value = Value::Null,
        #[serde(rename = "portRange", skip_serializing_if = "String::is_empty")]
        port_range: String = String::new(),
        #[serde(rename = "udpIdleTimeout", skip_serializing_if = "is_zero")]
        udp_idle_timeout: GoDuration = GoDuration::default(),
        #[serde(skip_serializing_if = "is_false")]
        windows_run_as_service: bool = false,
    }
);

section!(
    /// How local pods are told.
    DetectLocalSettings {
        bridge_interface: String = String::new(),
        interface_name_prefix: String = String::new(),
        #[serde(rename = "clusterCIDRs", skip_serializing_if = "Vec::is_empty")]
        cluster_cidrs: Vec<String> = Vec::new(),
    }
);

section!(
    /// The iptables mode.
    Iptables {
        masquerade_bit: i32 = 14,
        masquerade_all: bool = false,
        localhost_node_ports: bool = true,
        sync_period: GoDuration = GoDuration::seconds(30),
        min_sync_period: GoDuration = GoDuration::seconds(1),
    }
);

section!(
    /// The nftables mode.
    Nftables {
        masquerade_bit: i32 = 14,
        masquerade_all: bool = false,
        sync_period: GoDuration = GoDuration::seconds(30),
        min_sync_period: GoDuration = GoDuration::seconds(1),
    }
);

section!(
    /// The ipvs mode.
    Ipvs {
        scheduler: String = "rr".into(),
        #[serde(rename = "excludeCIDRs")]
        exclude_cidrs: Vec<String> = Vec::new(),
        #[serde(rename = "strictARP")]
        strict_arp: bool = false,
        tcp_timeout: GoDuration = GoDuration::default(),
        tcp_fin_timeout: GoDuration = GoDuration::default(),
        udp_timeout: GoDuration = GoDuration::default(),
        sync_period: GoDuration = GoDuration::seconds(30),
        min_sync_period: GoDuration = GoDuration::default(),
    }
);

section!(
    /// Limits of connection tracking.
    Conntrack {
        max_per_core: i32 = 32_768,
        min: i32 = 131_072,
        tcp_established_timeout: GoDuration = GoDuration::seconds(86_400),
        tcp_close_wait_timeout: GoDuration = GoDuration::seconds(3_600),
        tcp_be_liberal: bool = false,
        udp_timeout: GoDuration = GoDuration::default(),
        udp_stream_timeout: GoDuration = GoDuration::default(),
    }
);

section!(
    /// How to talk to the API server.
    ClientConnection {
        kubeconfig: String = String::new(),
        accept_content_types: String = String::new(),
        content_type: String = String::new(),
        qps: f32 = 5.0,
        burst: i32 = 10,
    }
);

section!(
    /// What kube-proxy does not have: a second document in the file.
    ProxierConfiguration {
        api_version: String = "proxier.config/v1alpha1".into(),
        kind: String = "ProxierConfiguration".into(),
        /// Where Services come from instead of a cluster.
        manifests: Vec<PathBuf> = Vec::new(),
        /// The network namespace to program; the agent's own when empty.
        netns: PathBuf = PathBuf::new(),
        /// How often the kernel is read back.
        audit_period: GoDuration = GoDuration::seconds(600),
        /// The longest pause between two attempts of what failed.
        max_retry: GoDuration = GoDuration::seconds(300),
        /// Take over from another proxier, instead of refusing to start beside it.
        takeover: bool = false,
        /// What names in the kernel begin with; the mode's own default when empty.
        prefix: String = String::new(),
        /// Write sysctls as kube-proxy does.
        sysctls: bool = true,
    }
);

const fn is_zero(duration: &GoDuration) -> bool {
    duration.0.is_zero()
}

const fn is_false(value: &bool) -> bool {
    !*value
}

impl KubeProxyConfiguration {
    /// What is empty or zero in a file means the default, as kube-proxy reads it.
    pub(crate) fn fill(&mut self) {
        let default = Self::default();
        let fill = |field: &mut String, default: &String| {
            if field.is_empty() {
                field.clone_from(default);
            }
        };
        fill(&mut self.mode, &default.mode);
        fill(&mut self.bind_address, &default.bind_address);
        let v6 = self.bind_address.contains(':');
        let (health, metrics) =
            if v6 { ("[::]:10256", "[::1]:10249") } else { ("0.0.0.0:10256", "127.0.0.1:10249") };
        fill(&mut self.healthz_bind_address, &health.to_owned());
        fill(&mut self.metrics_bind_address, &metrics.to_owned());
        fill(&mut self.detect_local_mode, &default.detect_local_mode);
        fill(&mut self.ipvs.scheduler, &default.ipvs.scheduler);
        self.iptables.sync_period = self.iptables.sync_period.or_seconds(30);
        self.iptables.min_sync_period = self.iptables.min_sync_period.or_seconds(1);
        self.nftables.sync_period = self.nftables.sync_period.or_seconds(30);
        self.nftables.min_sync_period = self.nftables.min_sync_period.or_seconds(1);
        self.ipvs.sync_period = self.ipvs.sync_period.or_seconds(30);
        self.config_sync_period = self.config_sync_period.or_seconds(900);
        if self.client_connection.qps == 0.0 {
            self.client_connection.qps = 5.0;
        }
        if self.client_connection.burst == 0 {
            self.client_connection.burst = 10;
        }
    }

    /// Fields that are set and have no effect here.
    pub(crate) fn ignored(&self) -> Vec<&'static str> {
        let set = |value: &Value| match value {
            Value::Object(fields) => fields.values().any(|it| {
                !matches!(it, Value::Null | Value::Bool(false)) && it.as_str() != Some("")
            }),
            Value::Null => false,
            Value::Array(_) | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
        };
        let fields = [
            ("winkernel", set(&self.winkernel)),
            ("windowsRunAsService", self.windows_run_as_service),
            ("portRange", !self.port_range.is_empty()),
            ("udpIdleTimeout", !self.udp_idle_timeout.0.is_zero()),
            ("enableProfiling", self.enable_profiling),
            ("showHiddenMetricsForVersion", !self.show_hidden_metrics_for_version.is_empty()),
        ];
        fields.into_iter().filter(|(_, is_set)| *is_set).map(|(name, _)| name).collect()
    }
}

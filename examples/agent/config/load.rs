//! Reading the configuration file, and flags in its place.

use std::path::Path;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{KubeProxyConfiguration, ProxierConfiguration};
use crate::{Outcome, args::Flags};

/// The settings as given, before they are checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Loaded {
    pub(crate) proxy: KubeProxyConfiguration,
    pub(crate) ours: ProxierConfiguration,
    /// The API server's URL, where it overrides the kubeconfig's.
    pub(crate) master: Option<String>,
    /// What was ignored, in words.
    pub(crate) warnings: Vec<String>,
}

/// Takes the settings from the file that the flags name, or from the flags.
pub(crate) fn load(flags: &Flags) -> Outcome<Loaded> {
    let mut loaded = match &flags.config {
        Some(path) => {
            let mut loaded = read(path)?;
            let ignored: Vec<_> =
                flags.settings.given().iter().map(|name| format!("--{name}")).collect();
            if !ignored.is_empty() {
                loaded.warnings.push(format!(
                    "ignored, because --config is given: {}; set them in {}",
                    ignored.join(", "),
                    path.display()
                ));
            }
            loaded
        }
        None => from_flags(flags)?,
    };
    if let Some(name) = &flags.hostname_override {
        loaded.proxy.hostname_override.clone_from(name);
    }
    loaded.master.clone_from(&flags.master);
    if let Some(path) = &flags.kubeconfig {
        loaded.proxy.client_connection.kubeconfig = path.display().to_string();
    }
    if !flags.manifests.is_empty() {
        loaded.ours.manifests.clone_from(&flags.manifests);
    }
    Ok(loaded)
}

fn read(path: &Path) -> Outcome<Loaded> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--config {}: cannot read it: {error}", path.display()))?;
    parse(&text).map_err(|error| format!("--config {}: {error}", path.display()).into())
}

/// Reads a stream of YAML documents.
pub(crate) fn parse(text: &str) -> Result<Loaded, String> {
    let mut loaded = Loaded::default();
    let mut found = false;
    for document in yaml_serde::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| error.to_string())?;
        let Some(value) = without_nulls(value) else { continue };
        let text =
            |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
        match (&*text("apiVersion"), &*text("kind")) {
            ("kubeproxy.config.k8s.io/v1alpha1", "KubeProxyConfiguration") => {
                loaded.proxy = typed(value)?;
                loaded.proxy.fill();
                found = true;
            }
            ("proxier.config/v1alpha1", "ProxierConfiguration") => loaded.ours = typed(value)?,
            (version, kind) => {
                return Err(format!(
                    "apiVersion {version:?}, kind {kind:?}: expected kubeproxy.config.k8s.io/v1alpha1 \
                     KubeProxyConfiguration or proxier.config/v1alpha1 ProxierConfiguration"
                ));
            }
        }
    }
    if !found {
        return Err("holds no KubeProxyConfiguration".into());
    }
    let ignored = loaded.proxy.ignored();
    if !ignored.is_empty() {
        loaded.warnings.push(format!("settings without effect here: {}", ignored.join(", ")));
    }
    loaded.gates();
    Ok(loaded)
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner().to_string();
        // A field that is not known is named by both.
        if path == "." { inner } else { format!("{path}: {inner}") }
    })
}

/// kubeadm writes `null` for what is not set.
fn without_nulls(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(fields) => Some(Value::Object(
            fields.into_iter().filter_map(|(key, it)| Some((key, without_nulls(it)?))).collect(),
        )),
        Value::Array(items) => {
            Some(Value::Array(items.into_iter().filter_map(without_nulls).collect()))
        }
        other @ (Value::Bool(_) | Value::Number(_) | Value::String(_)) => Some(other),
    }
}

impl Loaded {
    /// kube-proxy's feature gates are locked or of no consequence to us.
    fn gates(&mut self) {
        if !self.proxy.feature_gates.is_empty() {
            let names: Vec<_> = self.proxy.feature_gates.keys().cloned().collect();
            self.warnings.push(format!("feature gates without effect here: {}", names.join(", ")));
        }
    }
}

fn from_flags(flags: &Flags) -> Outcome<Loaded> {
    let mut loaded = Loaded::default();
    let Loaded { proxy, warnings, .. } = &mut loaded;
    let given = flags.settings.clone();
    macro_rules! set {
        ($($flag:ident => $($field:ident).+),* $(,)?) => {
            $(if let Some(value) = given.$flag { proxy.$($field).+ = value.into(); })*
        };
    }
    if let Some(bit) = given.iptables_masquerade_bit {
        proxy.nftables.masquerade_bit = bit;
    }
    if let Some(all) = given.masquerade_all {
        proxy.nftables.masquerade_all = all;
    }
    if let Some(period) = given.iptables_sync_period {
        proxy.nftables.sync_period = period;
    }
    if let Some(period) = given.iptables_min_sync_period {
        proxy.nftables.min_sync_period = period;
    }
    if let Some(address) = &given.bind_address {
        proxy.bind_address.clone_from(address);
        proxy.healthz_bind_address.clear();
        proxy.metrics_bind_address.clear();
        proxy.fill();
    }
    if let Some(gates) = &given.feature_gates {
        for gate in gates.split(',').filter(|it| !it.is_empty()) {
            let parsed = gate.split_once('=').and_then(|(name, on)| Some((name, on.parse().ok()?)));
            let Some((name, on)) = parsed else {
                return Err(
                    format!("--feature-gates: {gate:?} is not NAME=true or NAME=false").into()
                );
            };
            proxy.feature_gates.insert(name.to_owned(), on);
        }
    }
    set! {
        proxy_mode => mode,
        healthz_bind_address => healthz_bind_address,
        metrics_bind_address => metrics_bind_address,
        bind_address_hard_fail => bind_address_hard_fail,
        cluster_cidr => cluster_cidr,
        detect_local_mode => detect_local_mode,
        pod_bridge_interface => detect_local.bridge_interface,
        pod_interface_name_prefix => detect_local.interface_name_prefix,
        masquerade_all => iptables.masquerade_all,
        iptables_masquerade_bit => iptables.masquerade_bit,
        iptables_localhost_nodeports => iptables.localhost_node_ports,
        iptables_sync_period => iptables.sync_period,
        iptables_min_sync_period => iptables.min_sync_period,
        ipvs_sync_period => ipvs.sync_period,
        ipvs_min_sync_period => ipvs.min_sync_period,
        ipvs_scheduler => ipvs.scheduler,
        ipvs_exclude_cidrs => ipvs.exclude_cidrs,
        ipvs_strict_arp => ipvs.strict_arp,
        ipvs_tcp_timeout => ipvs.tcp_timeout,
        ipvs_tcpfin_timeout => ipvs.tcp_fin_timeout,
        ipvs_udp_timeout => ipvs.udp_timeout,
        nodeport_addresses => node_port_addresses,
        conntrack_max_per_core => conntrack.max_per_core,
        conntrack_min => conntrack.min,
        conntrack_tcp_timeout_established => conntrack.tcp_established_timeout,
        conntrack_tcp_timeout_close_wait => conntrack.tcp_close_wait_timeout,
        conntrack_tcp_be_liberal => conntrack.tcp_be_liberal,
        conntrack_udp_timeout => conntrack.udp_timeout,
        conntrack_udp_timeout_stream => conntrack.udp_stream_timeout,
        config_sync_period => config_sync_period,
        oom_score_adj => oom_score_adj,
        profiling => enable_profiling,
        kube_api_qps => client_connection.qps,
        kube_api_burst => client_connection.burst,
    }
    if proxy.enable_profiling {
        warnings.push("settings without effect here: --profiling".into());
    }
    loaded.gates();
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape that kubeadm writes: zeros, empty strings and nulls where nothing is set.
    const KUBEADM: &str = "
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: ''
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}
metricsBindAddress: ''
mode: ''
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ''
showHiddenMetricsForVersion: ''
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: '', rootHnsEndpointName: '', sourceVip: ''}
";

    #[test]
    fn what_kubeadm_writes_means_the_defaults() {
        let loaded = parse(KUBEADM).unwrap();
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        let mut expected = KubeProxyConfiguration {
            cluster_cidr: "10.244.0.0/16".into(),
            logging: loaded.proxy.logging.clone(),
            winkernel: loaded.proxy.winkernel.clone(),
            ..KubeProxyConfiguration::default()
        };
        expected.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".into();
        assert_eq!(loaded.proxy, expected);
    }

    #[test]
    fn what_is_not_known_is_named_with_its_place() {
        let wrong = KUBEADM.replace("masqueradeBit: null", "masqueradBit: 3");
        let error = parse(&wrong).unwrap_err();
        assert!(error.starts_with("iptables.masqueradBit: unknown field"), "{error}");
        let error = parse(&KUBEADM.replace("oomScoreAdj: null", "oomScoreAdj: low")).unwrap_err();
        assert!(error.starts_with("oomScoreAdj: invalid type"), "{error}");
        let error = parse(&KUBEADM.replace("v1alpha1", "v1beta1")).unwrap_err();
        assert!(error.contains("v1beta1"), "{error}");
    }

    #[test]
    fn a_second_document_holds_what_kube_proxy_does_not_have() {
        let ours = "---\napiVersion: proxier.config/v1alpha1\nkind: ProxierConfiguration\nauditPeriod: 1m\n";
        let loaded = parse(&format!("{KUBEADM}{ours}")).unwrap();
        assert_eq!(loaded.ours.audit_period.to_string(), "1m0s");
        let error = parse(&format!("{KUBEADM}{ours}auditperiod: 3s\n")).unwrap_err();
        assert!(error.starts_with("auditperiod: unknown field"), "{error}");
    }

    #[test]
    fn windows_settings_warn() {
        let loaded = parse(&KUBEADM.replace("enableDSR: false", "enableDSR: true")).unwrap();
        assert_eq!(loaded.warnings, ["settings without effect here: winkernel"]);
    }
}

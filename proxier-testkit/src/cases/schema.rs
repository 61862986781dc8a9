//! The parts of a world, as they are written.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// A node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NodeSpec {
    /// Its own addresses.
    #[serde(deserialize_with = "nullable")]
    pub ips: Vec<String>,
    /// The networks of its pods.
    #[serde(deserialize_with = "nullable")]
    pub pod_cidrs: Vec<String>,
    /// Its zone.
    #[serde(deserialize_with = "nullable")]
    pub zone: String,
    /// Interfaces with their addresses.
    #[serde(deserialize_with = "nullable")]
    pub ifaces: BTreeMap<String, Vec<String>>,
    /// Addresses that are assigned to it as well.
    #[serde(deserialize_with = "nullable")]
    pub extra_local: Vec<String>,
}

/// How a packet comes to the node.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
#[expect(clippy::exhaustive_enums, reason = "the schema has these three")]
pub enum Origin {
    /// The node made it.
    Host,
    /// It is routed in from a pod of the node.
    Pod,
    /// It comes from outside.
    Wire,
}

/// Settings of the proxier.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Settings {
    /// How local pods are told apart.
    pub detect_local: DetectLocalSpec,
    /// All traffic to cluster IPs is masqueraded.
    pub masquerade_all: bool,
    /// CIDRs, or the word `primary`.
    pub node_port_addresses: Vec<String>,
    /// Node ports answer on 127.0.0.0/8, where the mode can.
    pub localhost_node_ports: bool,
    /// The ranges of cluster IPs.
    pub service_cidrs: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            detect_local: DetectLocalSpec::default(),
            masquerade_all: false,
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
            service_cidrs: Vec::new(),
        }
    }
}

/// How local pods are told apart.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DetectLocalSpec {
    /// `ClusterCIDR`, `NodeCIDR`, `BridgeInterface`, `InterfaceNamePrefix` or `none`.
    pub mode: String,
    /// Networks of pods.
    pub cidrs: Vec<String>,
    /// Interface, or the start of its name.
    pub iface: String,
}

impl Default for DetectLocalSpec {
    fn default() -> Self {
        Self { mode: "none".to_owned(), cidrs: Vec::new(), iface: String::new() }
    }
}

/// A Service.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ServiceSpec {
    /// `namespace/name`.
    #[serde(deserialize_with = "nullable")]
    pub key: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub service_type: Option<String>,
    /// `IPv4`, `IPv6`.
    #[serde(deserialize_with = "nullable")]
    pub families: Vec<String>,
    /// Parallel to the families.
    #[serde(deserialize_with = "nullable")]
    pub cluster_ips: Vec<String>,
    /// External IPs.
    #[serde(deserialize_with = "nullable")]
    pub external_ips: Vec<String>,
    /// What the load balancer's controller assigned.
    #[serde(deserialize_with = "nullable")]
    pub ingress: Vec<IngressSpec>,
    /// Who may use the load balancer's addresses.
    #[serde(deserialize_with = "nullable")]
    pub source_ranges: Vec<String>,
    /// `externalTrafficPolicy`.
    pub etp: Option<String>,
    /// `internalTrafficPolicy`.
    pub itp: Option<String>,
    /// Health-check node port.
    #[serde(deserialize_with = "nullable")]
    pub hc_node_port: i64,
    /// Seconds, 0 for none.
    #[serde(deserialize_with = "nullable")]
    pub affinity: i64,
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<PortSpec>,
}

/// An ingress point.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct IngressSpec {
    /// Address.
    #[serde(deserialize_with = "nullable")]
    pub ip: String,
    /// `VIP` or `Proxy`.
    pub mode: Option<String>,
    /// Host name.
    #[serde(deserialize_with = "nullable")]
    pub hostname: String,
}

/// A Service port.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct PortSpec {
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Number.
    #[serde(deserialize_with = "nullable")]
    pub port: i64,
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(deserialize_with = "nullable")]
    pub proto: String,
    /// Node port, 0 for none.
    #[serde(deserialize_with = "nullable")]
    pub node_port: i64,
}

/// An EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SliceSpec {
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// The Service; without it the slice has no service-name label.
    pub service: Option<String>,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub family: Option<String>,
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<SlicePortSpec>,
    /// Endpoints.
    #[serde(deserialize_with = "nullable")]
    pub endpoints: Vec<EndpointSpec>,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SlicePortSpec {
    /// Name.
    pub name: Option<String>,
    /// Number.
    pub port: Option<i64>,
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(deserialize_with = "nullable")]
    pub proto: String,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EndpointSpec {
    /// Its address, or
    pub addr: Option<String>,
    /// its addresses.
    #[serde(deserialize_with = "nullable")]
    pub addrs: Vec<String>,
    /// The node it runs on.
    pub node: Option<String>,
    /// Condition.
    pub ready: Option<bool>,
    /// Condition.
    pub serving: Option<bool>,
    /// Condition.
    pub terminating: Option<bool>,
    /// Zones that should use it.
    #[serde(deserialize_with = "nullable")]
    pub zones: Vec<String>,
    /// Nodes that should use it.
    #[serde(deserialize_with = "nullable")]
    pub nodes: Vec<String>,
}

fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

//! Kubernetes objects, reduced to the fields a proxier reads.
//!
//! These types take what the API server or a manifest says, unchecked; [`Service::read`] and its
//! siblings check it. Unknown fields are skipped, `null` means absent.
//!
//! [`Service::read`]: crate::model::Service::read

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// The fields of `metadata` that are read.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Metadata {
    /// Name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// Namespace; empty for objects outside namespaces.
    #[serde(deserialize_with = "nullable")]
    pub namespace: String,
    /// Labels.
    #[serde(deserialize_with = "nullable")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339 in UTC, as the API server prints it. Decides who is older.
    pub creation_timestamp: Option<String>,
    /// Set while the object is being deleted.
    pub deletion_timestamp: Option<String>,
}

/// `v1` Service.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Service {
    /// Metadata.
    pub metadata: Metadata,
    /// Spec.
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceSpec,
    /// Status.
    #[serde(deserialize_with = "nullable")]
    pub status: ServiceStatus,
}

/// `v1` ServiceSpec.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `ClusterIP` (default), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub service_type: Option<String>,
    /// The first cluster IP; `None` for headless Services.
    #[serde(rename = "clusterIP", deserialize_with = "nullable")]
    pub cluster_ip: String,
    /// Cluster IPs, parallel to `ip_families`.
    #[serde(rename = "clusterIPs", deserialize_with = "nullable")]
    pub cluster_ips: Vec<String>,
    /// `IPv4`, `IPv6`.
    #[serde(deserialize_with = "nullable")]
    pub ip_families: Vec<String>,
    /// Ports.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<ServicePort>,
    /// External IPs.
    #[serde(rename = "externalIPs", deserialize_with = "nullable")]
    pub external_ips: Vec<String>,
    /// CIDRs that may reach the load balancer's addresses.
    #[serde(deserialize_with = "nullable")]
    pub load_balancer_source_ranges: Vec<String>,
    /// `None` (default) or `ClientIP`.
    pub session_affinity: Option<String>,
    /// Affinity settings.
    pub session_affinity_config: Option<SessionAffinityConfig>,
    /// `Cluster` (default) or `Local`.
    pub external_traffic_policy: Option<String>,
    /// `Cluster` (default) or `Local`.
    pub internal_traffic_policy: Option<String>,
    /// Port of the per-Service health check.
    #[serde(deserialize_with = "nullable")]
    pub health_check_node_port: i64,
}

/// `v1` ServicePort.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    /// Name, empty for a single unnamed port.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    /// `TCP` (default), `UDP` or `SCTP`.
    #[serde(deserialize_with = "nullable")]
    pub protocol: String,
    /// Port number, host order.
    #[serde(deserialize_with = "nullable")]
    pub port: i64,
    /// Node port, 0 for none.
    #[serde(deserialize_with = "nullable")]
    pub node_port: i64,
}

/// `v1` SessionAffinityConfig.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SessionAffinityConfig {
    /// Settings of `ClientIP` affinity.
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// `v1` ClientIPConfig.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClientIpConfig {
    /// Seconds.
    pub timeout_seconds: Option<i64>,
}

/// `v1` ServiceStatus.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceStatus {
    /// What the load balancer's controller assigned.
    #[serde(deserialize_with = "nullable")]
    pub load_balancer: LoadBalancerStatus,
}

/// `v1` LoadBalancerStatus.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LoadBalancerStatus {
    /// Ingress points.
    #[serde(deserialize_with = "nullable")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// `v1` LoadBalancerIngress.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LoadBalancerIngress {
    /// Address; empty when the balancer is known by host name only.
    #[serde(deserialize_with = "nullable")]
    pub ip: String,
    /// `VIP` (default) or `Proxy`.
    pub ip_mode: Option<String>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Metadata.
    pub metadata: Metadata,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(deserialize_with = "nullable")]
    pub address_type: String,
    /// Ports, which hold for every endpoint of the slice.
    #[serde(deserialize_with = "nullable")]
    pub ports: Vec<EndpointPort>,
    /// Endpoints.
    #[serde(deserialize_with = "nullable")]
    pub endpoints: Vec<Endpoint>,
}

/// `discovery.k8s.io/v1` EndpointPort.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointPort {
    /// Name; absent ports are skipped, the empty name joins with the unnamed Service port.
    pub name: Option<String>,
    /// `TCP` (default), `UDP` or `SCTP`.
    #[serde(deserialize_with = "nullable")]
    pub protocol: String,
    /// Port number, host order.
    pub port: Option<i64>,
}

/// `discovery.k8s.io/v1` Endpoint.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    /// Addresses, of which the first counts.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<String>,
    /// The node it runs on.
    pub node_name: Option<String>,
    /// Conditions.
    #[serde(deserialize_with = "nullable")]
    pub conditions: EndpointConditions,
    /// Topology hints.
    #[serde(deserialize_with = "nullable")]
    pub hints: EndpointHints,
}

/// `discovery.k8s.io/v1` EndpointConditions.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointConditions {
    /// Absent means true.
    pub ready: Option<bool>,
    /// Absent means true.
    pub serving: Option<bool>,
    /// Absent means false.
    pub terminating: Option<bool>,
}

/// `discovery.k8s.io/v1` EndpointHints.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndpointHints {
    /// Zones that should use the endpoint.
    #[serde(deserialize_with = "nullable")]
    pub for_zones: Vec<Hint>,
    /// Nodes that should use the endpoint.
    #[serde(deserialize_with = "nullable")]
    pub for_nodes: Vec<Hint>,
}

/// `discovery.k8s.io/v1` ForZone and ForNode.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Hint {
    /// The zone's or node's name.
    #[serde(deserialize_with = "nullable")]
    pub name: String,
}

/// `v1` Node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Node {
    /// Metadata.
    pub metadata: Metadata,
    /// Spec.
    #[serde(deserialize_with = "nullable")]
    pub spec: NodeSpec,
    /// Status.
    #[serde(deserialize_with = "nullable")]
    pub status: NodeStatus,
}

/// `v1` NodeSpec.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeSpec {
    /// Pod networks of the node.
    #[serde(rename = "podCIDRs", deserialize_with = "nullable")]
    pub pod_cidrs: Vec<String>,
    /// Taints.
    #[serde(deserialize_with = "nullable")]
    pub taints: Vec<Taint>,
}

/// `v1` Taint.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Taint {
    /// Key.
    #[serde(deserialize_with = "nullable")]
    pub key: String,
}

/// `v1` NodeStatus.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeStatus {
    /// Addresses.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<NodeAddress>,
}

/// `v1` NodeAddress.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname`, …
    #[serde(rename = "type", deserialize_with = "nullable")]
    pub address_type: String,
    /// The address.
    #[serde(deserialize_with = "nullable")]
    pub address: String,
}

/// `networking.k8s.io/v1` ServiceCIDR.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ServiceCidr {
    /// Metadata.
    pub metadata: Metadata,
    /// Spec.
    #[serde(deserialize_with = "nullable")]
    pub spec: ServiceCidrSpec,
}

/// `networking.k8s.io/v1` ServiceCIDRSpec.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ServiceCidrSpec {
    /// The ranges.
    #[serde(deserialize_with = "nullable")]
    pub cidrs: Vec<String>,
}

// K8S: Go prints empty slices and maps as `null`, for instance `endpoints: null`.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

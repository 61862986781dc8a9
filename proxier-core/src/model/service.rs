//! Services, checked and normalised (behaviour of kube-proxy 1.36).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use ipnet::IpNet;
use serde::Serialize;

use super::{
    address::{parse_ip, parse_net},
    api,
    problem::{Checker, Read, is_dns_like},
    tuning::Tuning,
};
use crate::{
    ir::Balance,
    name::{Family, ObjectName, Protocol},
};

/// Hides a Service from this proxier, whatever its value.
// K8S: k8s.io/kubernetes pkg/proxy/apis/well_known_labels.go, LabelServiceProxyName.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// Affinity lasts this long when the object does not say: three hours.
// K8S: k8s.io/api core/v1 types.go, DefaultClientIPServiceAffinitySeconds.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// The type of a Service.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub enum ServiceType {
    /// Reachable inside the cluster.
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// A DNS alias: nothing to proxy.
    ExternalName,
    /// Also reachable through a load balancer's addresses.
    LoadBalancer,
    /// Also reachable on a port of every node.
    NodePort,
}

/// Which endpoints a kind of traffic may use.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub enum TrafficPolicy {
    /// All of the cluster's.
    #[default]
    Cluster,
    /// Those on the node that the traffic reaches.
    Local,
}

/// One port of a Service.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ServicePort {
    /// Name, empty for the unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port number on cluster, external and load balancer addresses.
    pub port: NonZeroU16,
    /// Port number on node addresses.
    pub node_port: Option<NonZeroU16>,
}

/// A Service that a proxier has to do something about.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Service {
    name: ObjectName,
    created: Option<Arc<str>>,
    service_type: ServiceType,
    cluster_ips: [Option<IpAddr>; 2],
    external_ips: Box<[IpAddr]>,
    lb_vips: Box<[IpAddr]>,
    source_ranges: Box<[IpNet]>,
    affinity: Option<NonZeroU32>,
    external_policy: TrafficPolicy,
    internal_policy: TrafficPolicy,
    health_check_node_port: Option<NonZeroU16>,
    ports: Box<[ServicePort]>,
    /// `None` for a Service without annotations of ours.
    tuning: Option<Box<Tuning>>,
}

impl Service {
    /// Reads a Service as the API describes it.
    ///
    /// The value is `None` for a Service that is not proxied here: headless, `ExternalName`,
    /// labelled for another proxier, without any cluster IP, or with an unusable name.
    #[must_use]
    pub fn read(object: &api::Service) -> Read<Self> {
        let api::Service { metadata, spec, status } = object;
        let mut check = Checker::new("Service", &metadata.namespace, &metadata.name);
        if !check.name("metadata.namespace", &metadata.namespace)
            | !check.name("metadata.name", &metadata.name)
        {
            return check.done(None);
        }
        let service_type = match spec.service_type.as_deref() {
            None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
            Some("NodePort") => ServiceType::NodePort,
            Some("LoadBalancer") => ServiceType::LoadBalancer,
            Some("ExternalName") => ServiceType::ExternalName,
            Some(other) => {
                check.report("spec.type", format!("unknown type {other:?}: read as ClusterIP"));
                ServiceType::ClusterIp
            }
        };
        if service_type == ServiceType::ExternalName
            || metadata.labels.contains_key(PROXY_NAME_LABEL)
        {
            return check.done(None);
        }
        let cluster_ips = cluster_ips(spec, &mut check);
        if cluster_ips == [None, None] {
            return check.done(None);
        }
        let mut policy = |field: &str, value: Option<&str>| match value {
            None | Some("" | "Cluster") => TrafficPolicy::Cluster,
            Some("Local") => TrafficPolicy::Local,
            Some(other) => {
                check.report(field, format!("unknown policy {other:?}: read as Cluster"));
                TrafficPolicy::Cluster
            }
        };
        let external_policy =
            policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref());
        let internal_policy =
            policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref());
        let health_check_node_port = health_check_node_port(
            spec,
            service_type == ServiceType::LoadBalancer && external_policy == TrafficPolicy::Local,
            &mut check,
        );
        let service = Self {
            name: ObjectName::new(&metadata.namespace, &metadata.name),
            created: metadata.creation_timestamp.as_deref().map(Arc::from),
            service_type,
            cluster_ips,
            external_ips: addresses(
                "spec.externalIPs",
                spec.external_ips.iter().map(String::as_str).enumerate(),
                &mut check,
            ),
            lb_vips: addresses(
                "status.loadBalancer.ingress",
                vips(&status.load_balancer.ingress),
                &mut check,
            ),
            source_ranges: source_ranges(&spec.load_balancer_source_ranges, &mut check),
            affinity: affinity(spec, &mut check),
            external_policy,
            internal_policy,
            health_check_node_port,
            ports: ports(&spec.ports, &mut check),
            tuning: tuning(&metadata.annotations, &mut check),
        };
        check.done(Some(service))
    }

    /// The names in it that other Services have, too.
    pub(super) fn names_mut(&mut self) -> impl Iterator<Item = &mut Arc<str>> {
        self.ports.iter_mut().map(|port| &mut port.name)
    }

    /// Namespace and name.
    #[must_use]
    pub const fn name(&self) -> &ObjectName {
        &self.name
    }

    /// Creation time as the API server prints it (RFC 3339, UTC), which orders as text.
    #[must_use]
    pub fn created(&self) -> Option<&Arc<str>> {
        self.created.as_ref()
    }

    /// How connections are spread.
    #[must_use]
    pub fn balance(&self) -> Balance {
        self.tuning.as_ref().map(|tuning| tuning.balance).unwrap_or_default()
    }

    /// The IPVS scheduler it asks for.
    #[must_use]
    pub fn scheduler(&self) -> Option<&Arc<str>> {
        self.tuning.as_ref()?.scheduler.as_ref()
    }

    /// Says whether its connections are to be counted.
    #[must_use]
    pub fn counters(&self) -> bool {
        self.tuning.as_ref().is_some_and(|tuning| tuning.counters)
    }

    /// The weight the Service gives to an endpoint, if it does. 0 means no new connections.
    #[must_use]
    pub fn endpoint_weight(&self, ip: IpAddr) -> Option<u16> {
        self.tuning.as_ref()?.weight(ip)
    }

    /// The cluster IP of a family.
    #[must_use]
    pub const fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        let [v4, v6] = self.cluster_ips;
        match family {
            Family::V4 => v4,
            Family::V6 => v6,
        }
    }

    /// The normalised ports of one family; none when the Service has no cluster IP of it.
    pub fn views(&self, family: Family) -> impl Iterator<Item = PortView<'_>> {
        let cluster_ip = self.cluster_ip(family);
        self.ports.iter().filter_map(move |port| {
            Some(PortView { service: self, port, family, cluster_ip: cluster_ip? })
        })
    }
}

/// One port of a Service in one family, as everything below the model sees it.
#[derive(Clone, Copy, Debug)]
pub struct PortView<'a> {
    /// The Service.
    pub service: &'a Service,
    /// The port.
    pub port: &'a ServicePort,
    /// The family.
    pub family: Family,
    /// The cluster IP of that family.
    pub cluster_ip: IpAddr,
}

impl<'a> PortView<'a> {
    /// External IPs of the family.
    pub fn external_ips(&self) -> impl Iterator<Item = IpAddr> + use<'a> {
        let family = self.family;
        self.service.external_ips.iter().copied().filter(move |ip| family.has(ip))
    }

    /// Load balancer addresses of the family that lead to this node.
    pub fn lb_vips(&self) -> impl Iterator<Item = IpAddr> + use<'a> {
        let family = self.family;
        self.service.lb_vips.iter().copied().filter(move |ip| family.has(ip))
    }

    /// The networks that may reach the load balancer addresses; empty means anyone.
    ///
    /// A `/0` among them means anyone, and so does a list that names only the other family, as
    /// in kube-proxy.
    #[must_use]
    pub fn source_ranges(&self) -> Vec<IpNet> {
        let of_family = |net: &&IpNet| self.family.has(&net.addr());
        let ranges: Vec<_> = self.service.source_ranges.iter().filter(of_family).copied().collect();
        if ranges.iter().any(|net| net.prefix_len() == 0) { Vec::new() } else { ranges }
    }

    /// How long a client stays with its endpoint, in seconds.
    #[must_use]
    pub const fn affinity(&self) -> Option<NonZeroU32> {
        self.service.affinity
    }

    /// Traffic from outside uses only endpoints of this node.
    #[must_use]
    pub fn external_local(&self) -> bool {
        let service = self.service;
        let can_be_external =
            matches!(service.service_type, ServiceType::NodePort | ServiceType::LoadBalancer)
                || !service.external_ips.is_empty();
        can_be_external && service.external_policy == TrafficPolicy::Local
    }

    /// Traffic to the cluster IP uses only endpoints of this node.
    #[must_use]
    pub fn internal_local(&self) -> bool {
        self.service.internal_policy == TrafficPolicy::Local
    }

    /// The port of the Service's health check, if it has one.
    #[must_use]
    pub const fn health_check_node_port(&self) -> Option<NonZeroU16> {
        self.service.health_check_node_port
    }

    /// There is a way in from outside the cluster in this family.
    #[must_use]
    pub fn externally_accessible(&self) -> bool {
        self.port.node_port.is_some()
            || self.lb_vips().next().is_some()
            || self.external_ips().next().is_some()
    }

    /// Some traffic may use the whole cluster's endpoints.
    #[must_use]
    pub fn uses_cluster_endpoints(&self) -> bool {
        !self.internal_local() || self.externally_accessible()
    }

    /// Some traffic may use this node's endpoints only.
    #[must_use]
    pub fn uses_local_endpoints(&self) -> bool {
        self.internal_local() || (self.external_local() && self.externally_accessible())
    }
}

fn tuning(annotations: &BTreeMap<String, String>, check: &mut Checker) -> Option<Box<Tuning>> {
    let tuning = Tuning::read(annotations, check);
    (tuning != Tuning::default()).then(|| Box::new(tuning))
}

// K8S: pkg/proxy/util GetClusterIPByFamily, v1.36: objects from before dual stack name no family.
fn cluster_ips(spec: &api::ServiceSpec, check: &mut Checker) -> [Option<IpAddr>; 2] {
    let mut found = [None, None];
    if matches!(spec.cluster_ip.as_str(), "" | "None")
        && !spec.cluster_ips.first().is_some_and(|ip| !matches!(ip.as_str(), "" | "None"))
    {
        return found;
    }
    let mut take = |field: String, text: &str| match parse_ip(text) {
        Some(ip) => {
            let [v4, v6] = &mut found;
            let slot = if Family::V4.has(&ip) { v4 } else { v6 };
            slot.get_or_insert(ip);
        }
        None => check.report(field, format!("{text:?} is not an IP address: skipped")),
    };
    if spec.ip_families.is_empty() {
        let text = if spec.cluster_ip.is_empty() {
            spec.cluster_ips.first()
        } else {
            Some(&spec.cluster_ip)
        };
        if let Some(text) = text {
            take("spec.clusterIP".into(), text);
        }
        return found;
    }
    let single = std::slice::from_ref(&spec.cluster_ip);
    let listed = if spec.cluster_ips.is_empty() { single } else { &*spec.cluster_ips };
    for (index, (text, _)) in listed.iter().zip(&spec.ip_families).enumerate() {
        take(format!("spec.clusterIPs[{index}]"), text);
    }
    found
}

#[expect(single_use_lifetimes, reason = "an anonymous lifetime is not stable in impl Trait")]
fn addresses<'a>(
    field: &str,
    texts: impl Iterator<Item = (usize, &'a str)>,
    check: &mut Checker,
) -> Box<[IpAddr]> {
    let mut found = Vec::new();
    for (index, text) in texts {
        match parse_ip(text) {
            Some(ip) if !found.contains(&ip) => found.push(ip),
            Some(_) => {}
            None => check.report(
                format!("{field}[{index}]"),
                format!("{text:?} is not an IP address: skipped"),
            ),
        }
    }
    found.into()
}

// K8S: KEP-1860: addresses in `Proxy` mode must be reached through the real balancer.
fn vips(ingress: &[api::LoadBalancerIngress]) -> impl Iterator<Item = (usize, &str)> {
    let leads_here = |(_, point): &(usize, &api::LoadBalancerIngress)| {
        !point.ip.is_empty() && matches!(point.ip_mode.as_deref(), None | Some("" | "VIP"))
    };
    ingress.iter().enumerate().filter(leads_here).map(|(index, point)| (index, point.ip.as_str()))
}

fn source_ranges(texts: &[String], check: &mut Checker) -> Box<[IpNet]> {
    let mut found = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let field = || format!("spec.loadBalancerSourceRanges[{index}]");
        match parse_net(text) {
            Some((net, cleared)) => {
                if cleared {
                    check.report(field(), format!("{text:?} has host bits set: read as {net}"));
                }
                found.push(net);
            }
            None => check.report(field(), format!("{text:?} is not a CIDR: skipped")),
        }
    }
    found.into()
}

fn affinity(spec: &api::ServiceSpec, check: &mut Checker) -> Option<NonZeroU32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            check.report(
                "spec.sessionAffinity",
                format!("unknown affinity {other:?}: read as None"),
            );
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config
        .and_then(|client_ip| client_ip.timeout_seconds)
        .unwrap_or_else(|| DEFAULT_AFFINITY_SECONDS.into());
    let valid = u32::try_from(seconds).ok().and_then(NonZeroU32::new);
    if valid.is_none() {
        check.report(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not a number of seconds: read as {DEFAULT_AFFINITY_SECONDS}"),
        );
    }
    valid.or_else(|| NonZeroU32::new(DEFAULT_AFFINITY_SECONDS))
}

fn health_check_node_port(
    spec: &api::ServiceSpec,
    applies: bool,
    check: &mut Checker,
) -> Option<NonZeroU16> {
    if !applies {
        return None;
    }
    let port = spec.health_check_node_port;
    let valid = u16::try_from(port).ok().and_then(NonZeroU16::new);
    if valid.is_none() {
        check.report(
            "spec.healthCheckNodePort",
            format!("{port} is not a port number: the Service has no health check"),
        );
    }
    valid
}

fn ports(listed: &[api::ServicePort], check: &mut Checker) -> Box<[ServicePort]> {
    let mut found: Vec<ServicePort> = Vec::with_capacity(listed.len());
    let mut names = BTreeSet::new();
    for (index, port) in listed.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let number = |value: i64| u16::try_from(value).ok().and_then(NonZeroU16::new);
        let protocol = match port.protocol.parse() {
            Ok(protocol) => protocol,
            Err(error) => {
                check.report(field("protocol"), format!("{error}: the port is skipped"));
                continue;
            }
        };
        let Some(port_number) = number(port.port) else {
            check.report(
                field("port"),
                format!("{} is not a port number (1-65535): the port is skipped", port.port),
            );
            continue;
        };
        if port.name.len() > 63 || !is_dns_like(&port.name) {
            check.report(
                field("name"),
                format!("{:?} is not a port name: the port is skipped", port.name),
            );
            continue;
        }
        if !names.insert((port.name.clone(), protocol)) {
            check.report(
                field("name"),
                format!("{:?}/{protocol} is already taken: the port is skipped", port.name),
            );
            continue;
        }
        let node_port = number(port.node_port);
        if port.node_port != 0 && node_port.is_none() {
            check.report(
                field("nodePort"),
                format!("{} is not a port number: the port has no node port", port.node_port),
            );
        }
        let name = port.name.as_str().into();
        found.push(ServicePort { name, protocol, port: port_number, node_port });
    }
    found.into()
}

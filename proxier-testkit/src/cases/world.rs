//! From what a case says to what the core takes.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use proxier_core::{
    Update,
    model::{
        DetectLocal, EndpointSlice, Event, NodeEnv, NodePortAddresses, Service, Store, api,
        parse_ip, parse_net,
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{
    Case, CaseError, CaseFile, NodeSpec, ServiceSpec, Settings, SliceSpec,
    schema::{DetectLocalSpec, EndpointSpec, SlicePortSpec},
};

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A named world with the changes of a case applied.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CaseWorld {
    /// Name of the world in the file.
    pub name: String,
    /// Name of the node under test.
    pub node_name: String,
    /// The node under test.
    pub node: NodeSpec,
    /// Settings.
    pub settings: Settings,
    /// Services.
    pub services: Vec<ServiceSpec>,
    /// EndpointSlices.
    pub slices: Vec<SliceSpec>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct With {
    config: Map<String, Value>,
    node: Map<String, Value>,
    services: Map<String, Value>,
    slices: Map<String, Value>,
    drop_services: Vec<String>,
    drop_slices: Vec<String>,
}

impl CaseWorld {
    /// The world of a case.
    ///
    /// # Errors
    /// A part that is missing or cannot be understood.
    pub fn of(file: &CaseFile, case: &Case) -> Result<Self, CaseError> {
        let name: String = case.read("world")?;
        let world = file.worlds.get(&name);
        let world = world.ok_or_else(|| case.wrong("world", format!("no world {name:?}")))?;
        let with: With = case.read_or("with", With::default())?;
        let node_name = world.get("node").and_then(Value::as_str).unwrap_or_default().to_owned();
        let node = file.nodes.get(&node_name);
        let node = node.ok_or_else(|| case.wrong("world", format!("no node {node_name:?}")))?;
        let mut settings = file.config_defaults.clone();
        for changes in [world.get("config").unwrap_or(&Value::Null), &Value::Object(with.config)] {
            settings = merged(&settings, changes);
        }
        let list =
            |part: &str| world.get(part).and_then(Value::as_array).cloned().unwrap_or_default();
        let services = edited(list("services"), "key", &with.services, &with.drop_services);
        let slices = edited(list("slices"), "name", &with.slices, &with.drop_slices);
        Ok(Self {
            node: read(case, "node", merged(node, &Value::Object(with.node)))?,
            settings: read(case, "config", or_empty(settings))?,
            services: read(case, "services", Value::Array(services))?,
            slices: read(case, "slices", Value::Array(slices))?,
            name,
            node_name,
        })
    }

    /// What the core has to know of the node.
    ///
    /// # Errors
    /// What cannot be understood, in words.
    pub fn env(&self) -> Result<NodeEnv, String> {
        env(&self.node_name, &self.node, &self.settings)
    }

    /// The Services and slices as the API would list them.
    pub fn events(&self) -> [Event; 2] {
        let services = self.services.iter().filter_map(|it| Service::read(&api_service(it)).value);
        [Event::Services(services.collect()), Event::EndpointSlices(read_slices(&self.slices))]
    }

    /// The core's state of this world, and the update that leads there.
    ///
    /// # Errors
    /// What cannot be understood, in words.
    pub fn store(&self) -> Result<(Store, Update), String> {
        let mut store = Store::new(self.env()?);
        for event in self.events() {
            store.apply(event);
        }
        let update = store.take().ok_or("the store has nothing to say")?;
        Ok((store, update))
    }
}

/// The slices that a proxier uses.
pub(super) fn read_slices(slices: &[SliceSpec]) -> Vec<EndpointSlice> {
    slices.iter().filter_map(|it| EndpointSlice::read(&api_slice(it)).value).collect()
}

/// What the core has to know of a node with these settings.
pub(super) fn env(name: &str, node: &NodeSpec, settings: &Settings) -> Result<NodeEnv, String> {
    let mut env = NodeEnv {
        name: name.to_owned(),
        zone: node.zone.clone(),
        ips: all(&node.ips, ip)?,
        pod_cidrs: all(&node.pod_cidrs, net)?,
        interface_addresses: interface_addresses(node)?,
        service_cidrs: all(&settings.service_cidrs, net)?,
        masquerade_all: settings.masquerade_all,
        node_port_addresses: NodePortAddresses::parse(&settings.node_port_addresses)?,
        localhost_node_ports: settings.localhost_node_ports,
        ..NodeEnv::default()
    };
    let DetectLocalSpec { mode, cidrs, iface } = &settings.detect_local;
    env.detect_local = match mode.as_str() {
        "BridgeInterface" => DetectLocal::BridgeInterface(iface.clone()),
        "ClusterCIDR" => DetectLocal::ClusterCidr(all(cidrs, net)?),
        "InterfaceNamePrefix" => DetectLocal::InterfaceNamePrefix(iface.clone()),
        "NodeCIDR" => {
            if !cidrs.is_empty() {
                env.pod_cidrs = all(cidrs, net)?;
            }
            DetectLocal::NodeCidr
        }
        "" | "None" | "none" => DetectLocal::None,
        other => return Err(format!("unknown mode of detect_local: {other:?}")),
    };
    Ok(env)
}

/// The addresses on a node's interfaces.
fn interface_addresses(node: &NodeSpec) -> Result<Vec<IpAddr>, String> {
    let bare = |text: &String| ip(text.split('/').next().unwrap_or_default());
    let assigned = node.ifaces.values().flatten().chain(&node.extra_local);
    let mut addresses: Vec<_> = assigned.map(bare).collect::<Result<_, _>>()?;
    if node.ifaces.is_empty() {
        addresses.extend(all(&node.ips, ip)?);
        addresses.extend(["127.0.0.1", "::1"].iter().filter_map(|it| parse_ip(it)));
    }
    Ok(addresses)
}

/// A node of the file by its name; the first one that has interfaces when there is no name.
pub(super) fn node_of(
    file: &CaseFile,
    case: &Case,
    name: Option<&str>,
) -> Result<(String, Value), CaseError> {
    let complete = |(_, node): &(&String, &Value)| node.get("ifaces").is_some();
    let found = match name {
        Some(name) => file.nodes.get_key_value(name),
        None => file.nodes.iter().find(complete).or_else(|| file.nodes.iter().next()),
    };
    let (name, node) = found.ok_or_else(|| case.wrong("node", "there is no such node"))?;
    Ok((name.clone(), node.clone()))
}

/// A copy of a mapping with some keys replaced.
pub(super) fn merged(base: &Value, changes: &Value) -> Value {
    let mut map = base.as_object().cloned().unwrap_or_default();
    if let Some(changes) = changes.as_object() {
        map.extend(changes.clone());
    }
    Value::Object(map)
}

pub(super) fn read<T: DeserializeOwned>(
    case: &Case,
    part: &str,
    value: Value,
) -> Result<T, CaseError> {
    T::deserialize(value).map_err(|error| case.wrong(part, error))
}

fn or_empty(value: Value) -> Value {
    if value.is_null() { Value::Object(Map::new()) } else { value }
}

/// A list of mappings with some of them changed, added and dropped, known by one of their keys.
fn edited(
    mut list: Vec<Value>,
    key: &str,
    changes: &Map<String, Value>,
    gone: &[String],
) -> Vec<Value> {
    let name = |value: &Value| value.get(key).and_then(Value::as_str).map(str::to_owned);
    for (wanted, change) in changes {
        if let Some(known) = list.iter_mut().find(|it| name(it).as_ref() == Some(wanted)) {
            *known = merged(known, change);
        } else {
            let identity = Map::from_iter([(key.to_owned(), Value::String(wanted.clone()))]);
            list.push(merged(&Value::Object(identity), change));
        }
    }
    list.retain(|it| name(it).is_none_or(|name| !gone.contains(&name)));
    list
}

pub(super) fn ip(text: &str) -> Result<IpAddr, String> {
    parse_ip(text).ok_or_else(|| format!("{text:?} is not an address"))
}

pub(super) fn net(text: &str) -> Result<IpNet, String> {
    parse_net(text).map(|(net, _)| net).ok_or_else(|| format!("{text:?} is not a network"))
}

pub(super) fn all<T>(
    texts: &[String],
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    texts.iter().map(|text| read(text)).collect()
}

/// A Service as the API would show it.
pub(super) fn api_service(spec: &ServiceSpec) -> api::Service {
    let (namespace, name) = split(if spec.key.is_empty() { "s/a" } else { &spec.key });
    let ports = spec.ports.iter().map(|port| api::ServicePort {
        name: port.name.clone(),
        protocol: port.proto.clone(),
        port: port.port,
        node_port: port.node_port,
    });
    let has_affinity = spec.affinity != 0;
    let timeout_seconds = Some(spec.affinity);
    api::Service {
        metadata: metadata(namespace, name, &spec.labels),
        spec: api::ServiceSpec {
            service_type: spec.service_type.clone(),
            cluster_ip: spec.cluster_ips.first().cloned().unwrap_or_default(),
            cluster_ips: spec.cluster_ips.clone(),
            ip_families: spec.families.clone(),
            ports: ports.collect(),
            external_ips: spec.external_ips.clone(),
            load_balancer_source_ranges: spec.source_ranges.clone(),
            session_affinity: has_affinity.then(|| "ClientIP".to_owned()),
            session_affinity_config: has_affinity.then_some(api::SessionAffinityConfig {
                client_ip: Some(api::ClientIpConfig { timeout_seconds }),
            }),
            external_traffic_policy: spec.etp.clone(),
            internal_traffic_policy: spec.itp.clone(),
            health_check_node_port: spec.hc_node_port,
        },
        status: api::ServiceStatus {
            load_balancer: api::LoadBalancerStatus {
                ingress: spec
                    .ingress
                    .iter()
                    .map(|it| api::LoadBalancerIngress {
                        ip: it.ip.clone(),
                        ip_mode: it.mode.clone(),
                    })
                    .collect(),
            },
        },
    }
}

/// An EndpointSlice as the API would show it.
fn api_slice(spec: &SliceSpec) -> api::EndpointSlice {
    let (namespace, service) = split(spec.service.as_deref().unwrap_or("s/"));
    let mut metadata = metadata(namespace, &spec.name, &spec.labels);
    if spec.service.is_some() {
        metadata.labels.insert(SERVICE_NAME_LABEL.to_owned(), service.to_owned());
    }
    let port = |SlicePortSpec { name, port, proto }: &SlicePortSpec| api::EndpointPort {
        name: name.clone(),
        protocol: proto.clone(),
        port: *port,
    };
    api::EndpointSlice {
        metadata,
        address_type: spec.family.clone().unwrap_or_else(|| guessed_family(spec)),
        ports: spec.ports.iter().map(port).collect(),
        endpoints: spec.endpoints.iter().map(api_endpoint).collect(),
    }
}

/// A slice that does not name its family has that of its first address.
fn guessed_family(spec: &SliceSpec) -> String {
    let mut addresses = spec.endpoints.iter().flat_map(|it| it.addr.iter().chain(&it.addrs));
    let v6 = addresses.next().is_some_and(|address| address.contains(':'));
    if v6 { "IPv6" } else { "IPv4" }.to_owned()
}

fn api_endpoint(spec: &EndpointSpec) -> api::Endpoint {
    let hints = |names: &[String]| -> Vec<api::Hint> {
        names.iter().map(|name| api::Hint { name: name.clone() }).collect()
    };
    api::Endpoint {
        addresses: spec.addr.iter().chain(&spec.addrs).cloned().collect(),
        node_name: spec.node.clone(),
        conditions: api::EndpointConditions {
            ready: spec.ready,
            serving: spec.serving,
            terminating: spec.terminating,
        },
        hints: api::EndpointHints { for_zones: hints(&spec.zones), for_nodes: hints(&spec.nodes) },
    }
}

fn metadata(namespace: &str, name: &str, labels: &BTreeMap<String, String>) -> api::Metadata {
    api::Metadata {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        labels: labels.clone(),
        ..api::Metadata::default()
    }
}

pub(super) fn split(key: &str) -> (&str, &str) {
    key.split_once('/').unwrap_or(("default", key))
}

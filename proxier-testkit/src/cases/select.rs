//! Kinds `select`, `merge`, `model` and `nodeaddr`: what the core makes of objects.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use proxier_core::{
    Family,
    ir::NodePorts,
    model::{NodePortAddresses, PortView, Service, Store},
    name::ObjectName,
    select::{Candidate, Selection, Wanted, select},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Case, CaseError, CaseFile, NodeSpec, PortSpec, ServiceSpec, Settings, SliceSpec, Verdict,
    world::{api_service, env, merged, node_of, read, read_slices, split},
};

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SelectService {
    external: bool,
    itp: Option<String>,
    etp: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SelectEndpoint {
    node: Option<String>,
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: bool,
    zones: Option<Vec<String>>,
    nodes: Option<Vec<String>>,
}

struct Hints {
    zones: Vec<Arc<str>>,
    nodes: Vec<Arc<str>>,
}

pub(super) fn run_select(case: &Case) -> Result<Verdict, CaseError> {
    let service: SelectService = case.read_or("service", SelectService::default())?;
    let node: String = case.read_or("node", String::new())?;
    let zone: String = case.read_or("zone", String::new())?;
    let endpoints: BTreeMap<String, SelectEndpoint> = case.read_or("endpoints", BTreeMap::new())?;
    let mut by_address = BTreeMap::new();
    for (text, endpoint) in endpoints {
        let addr: SocketAddr = text.parse().map_err(|error| case.wrong(&text, error))?;
        let names = |names: Option<Vec<String>>| -> Vec<Arc<str>> {
            names.unwrap_or_default().into_iter().map(Arc::from).collect()
        };
        let hints =
            Hints { zones: names(endpoint.zones.clone()), nodes: names(endpoint.nodes.clone()) };
        by_address.insert(addr, (text, endpoint, hints));
    }
    let candidates: Vec<_> = by_address
        .iter()
        .map(|(addr, (_, endpoint, hints))| {
            let ready = endpoint.ready.unwrap_or(true);
            Candidate {
                addr: *addr,
                local: !node.is_empty() && endpoint.node.as_ref() == Some(&node),
                ready,
                serving: endpoint.serving.unwrap_or(ready),
                terminating: endpoint.terminating,
                weight: 1,
                zone_hints: &hints.zones,
                node_hints: &hints.nodes,
            }
        })
        .collect();
    let selection = select(&candidates, wanted(&service), &node, &zone);
    let texts: Vec<&String> = by_address.values().map(|(text, ..)| text).collect();
    let expected = sorted(case.get("expect"));
    Ok(Verdict::compare(&expected, &selection_value(&selection, &texts)))
}

/// What a Service asks of the selection, by way of the model.
fn wanted(service: &SelectService) -> Wanted {
    let port = PortSpec {
        name: "p".to_owned(),
        port: 80,
        node_port: if service.external { 30_000 } else { 0 },
        ..PortSpec::default()
    };
    let spec = ServiceSpec {
        service_type: service.external.then(|| "NodePort".to_owned()),
        cluster_ips: vec!["10.0.0.1".to_owned()],
        etp: service.etp.clone(),
        itp: service.itp.clone(),
        ports: vec![port],
        ..ServiceSpec::default()
    };
    let service = Service::read(&api_service(&spec)).value;
    let view = service.as_ref().and_then(|service| service.views(Family::V4).next());
    view.map_or(Wanted { cluster: true, local: false }, |view| Wanted {
        cluster: view.uses_cluster_endpoints(),
        local: view.uses_local_endpoints(),
    })
}

fn selection_value(selection: &Selection, texts: &[&String]) -> Value {
    let set = |indices: &Vec<usize>| -> Value {
        indices.iter().filter_map(|index| texts.get(*index)).map(|text| json!(text)).collect()
    };
    sorted(&json!({
        "cluster": selection.cluster.as_ref().map(set),
        "local": selection.local.as_ref().map(set),
        "reachable": set(&selection.reachable()),
        "any": selection.has_any,
    }))
}

/// A value whose lists of texts are sorted: they stand for sets.
pub(super) fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(items) => {
            let mut items: Vec<_> = items.iter().map(sorted).collect();
            items.sort_by_key(Value::to_string);
            Value::Array(items)
        }
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), sorted(value))).collect(),
        Value::Bool(_) | Value::Null | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

pub(super) fn run_merge(file: &CaseFile, case: &Case) -> Result<Verdict, CaseError> {
    let slices: Vec<SliceSpec> = case.read("slices")?;
    let family = family(case)?;
    let node: Option<String> = case.read_or("node", None)?;
    let (name, node) = node_of(file, case, node.as_deref())?;
    let node: NodeSpec = read(case, "node", node)?;
    let env = env(&name, &node, &Settings::default()).map_err(|error| case.wrong("node", error))?;
    let mut store = Store::new(env);
    store.apply(proxier_core::model::Event::EndpointSlices(read_slices(&slices)));
    let mut actual = Map::new();
    let services: std::collections::BTreeSet<_> =
        slices.iter().filter_map(|slice| slice.service.clone()).collect();
    for service in services {
        let (namespace, name) = split(&service);
        let endpoints = store.endpoints(&ObjectName::new(namespace, name), family);
        for ((port, protocol), candidates) in endpoints {
            let flags: Map<String, Value> =
                candidates.iter().map(|it| (it.addr.to_string(), json!(flags(it)))).collect();
            if !flags.is_empty() {
                actual.insert(format!("{service}:{port}/{protocol}"), Value::Object(flags));
            }
        }
    }
    let mut expected = case.get("expect").as_object().cloned().unwrap_or_default();
    expected.retain(|_, flags| flags.as_object().is_none_or(|flags| !flags.is_empty()));
    let (expected, actual) = (Value::Object(expected), Value::Object(actual));
    Ok(if expected == actual { Verdict::PASSED } else { Verdict::failed(expected, actual) })
}

fn flags(it: &Candidate<'_>) -> String {
    let all = [(it.local, 'L'), (it.ready, 'R'), (it.serving, 'S'), (it.terminating, 'T')];
    all.iter().map(|(set, flag)| if *set { *flag } else { '-' }).collect()
}

pub(super) fn run_model(case: &Case) -> Result<Verdict, CaseError> {
    let spec: ServiceSpec = case.read("service")?;
    let family = family(case)?;
    let service = Service::read(&api_service(&spec)).value;
    let views = service.iter().flat_map(|service| service.views(family));
    let actual: Map<String, Value> = views
        .map(|view| (format!("{}/{}", view.port.name, view.port.protocol), model_value(&view)))
        .collect();
    let expected = case.get("expect").as_object().cloned().unwrap_or_default();
    let (expected, actual) = (sorted(&Value::Object(expected)), sorted(&Value::Object(actual)));
    let ports = |value: &Value| -> Vec<String> {
        value.as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default()
    };
    if ports(&expected) != ports(&actual) {
        return Ok(Verdict::failed(expected, actual));
    }
    Ok(Verdict::compare(&expected, &actual))
}

fn model_value(view: &PortView<'_>) -> Value {
    let texts = |all: &mut dyn Iterator<Item = IpAddr>| -> Vec<String> {
        all.map(|ip| ip.to_string()).collect()
    };
    let port = |port: Option<std::num::NonZeroU16>| port.map_or(0, std::num::NonZeroU16::get);
    json!({
        "cluster_ip": view.cluster_ip.to_string(),
        "port": view.port.port,
        "proto": view.port.protocol.to_string(),
        "node_port": port(view.port.node_port),
        "external_ips": texts(&mut view.external_ips()),
        "vips": texts(&mut view.lb_vips()),
        "ranges": view.source_ranges().iter().map(ToString::to_string).collect::<Vec<_>>(),
        "affinity": view.affinity().map_or(0, std::num::NonZeroU32::get),
        "etp_local": view.external_local(),
        "itp_local": view.internal_local(),
        "hc_node_port": port(view.health_check_node_port()),
        "external": view.externally_accessible(),
        "uses_cluster": view.uses_cluster_endpoints(),
        "uses_local": view.uses_local_endpoints(),
    })
}

pub(super) fn run_nodeaddr(file: &CaseFile, case: &Case) -> Result<Verdict, CaseError> {
    let value: Vec<String> = case.read_or("value", Vec::new())?;
    let family = family(case)?;
    let name: Option<String> = case.read_or("node", None)?;
    let (name, node) = node_of(file, case, name.as_deref())?;
    let node: NodeSpec = read(case, "facts", merged(&node, case.get("facts")))?;
    let mut env =
        env(&name, &node, &Settings::default()).map_err(|error| case.wrong("node", error))?;
    env.node_port_addresses =
        NodePortAddresses::parse(&value).map_err(|error| case.wrong("value", error))?;
    let mut actual = json!({"match_all": true, "v4_loopback": env.v4_loopback(family)});
    if let NodePorts::Listed(ips) = env.node_ports(family) {
        let ips: Vec<_> = ips.iter().map(ToString::to_string).collect();
        actual = merged(&actual, &json!({"match_all": false, "ips": ips}));
    } else if let Some(map) = actual.as_object_mut() {
        map.insert("ips".to_owned(), json!([]));
    }
    Ok(Verdict::compare(&sorted(case.get("expect")), &sorted(&actual)))
}

pub(super) fn family(case: &Case) -> Result<Family, CaseError> {
    case.read_or("family", Family::V4)
}

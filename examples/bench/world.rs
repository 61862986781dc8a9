//! The cluster that is measured.

use std::net::Ipv4Addr;

use proxier::model::{EndpointSlice, Event, NodeEnv, Object, Service, Store, api};

/// How big it is, and how often it changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) changes: usize,
}

/// A node somewhere in the cluster.
pub(crate) fn store() -> Store {
    Store::new(NodeEnv {
        name: "node-0".to_owned(),
        detect_local: proxier::model::DetectLocal::ClusterCidr(
            "10.128.0.0/9".parse().into_iter().collect(),
        ),
        ..NodeEnv::default()
    })
}

/// Everything the API server would list.
pub(crate) fn lists(size: Size) -> [Event; 2] {
    let services = (0..size.services).filter_map(|index| Service::read(&service(index)).value);
    let slices = (0..size.services).filter_map(|index| slice(size, index, None));
    [Event::EndpointSlices(slices.collect()), Event::Services(services.collect())]
}

/// The `step`th change: an endpoint of some Service goes, or comes back.
pub(crate) fn change(size: Size, step: usize) -> Event {
    let index = victim(size, step);
    let missing = step.is_multiple_of(2).then_some(size.endpoints / 2);
    let nothing = || Event::Services(Vec::new());
    slice(size, index, missing).map_or_else(nothing, |it| Event::Apply(Object::EndpointSlice(it)))
}

/// Which Service the `step`th change is about: two steps each, all over the cluster.
pub(crate) fn victim(size: Size, step: usize) -> usize {
    (step / 2).wrapping_mul(7919) % size.services
}

fn metadata(index: usize) -> api::Metadata {
    api::Metadata {
        name: format!("service-{index}"),
        namespace: "bench".to_owned(),
        creation_timestamp: Some("2026-01-01T00:00:00Z".to_owned()),
        ..api::Metadata::default()
    }
}

fn address(base: [u8; 4], offset: usize) -> String {
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from_be_bytes(base).saturating_add(offset)).to_string()
}

fn service(index: usize) -> api::Service {
    let ip = address([10, 64, 0, 1], index);
    api::Service {
        metadata: metadata(index),
        spec: api::ServiceSpec {
            cluster_ip: ip.clone(),
            cluster_ips: vec![ip],
            ip_families: vec!["IPv4".to_owned()],
            ports: vec![api::ServicePort {
                name: "http".to_owned(),
                protocol: "TCP".to_owned(),
                port: 80,
                node_port: 0,
            }],
            ..api::ServiceSpec::default()
        },
        status: api::ServiceStatus::default(),
    }
}

fn slice(size: Size, index: usize, missing: Option<usize>) -> Option<EndpointSlice> {
    let endpoint = |number: usize| api::Endpoint {
        addresses: vec![address([10, 128, 0, 1], index * size.endpoints + number)],
        node_name: Some(format!("node-{}", number % 3)),
        ..api::Endpoint::default()
    };
    let mut metadata = metadata(index);
    let service = metadata.name.clone();
    metadata.labels.insert("kubernetes.io/service-name".to_owned(), service);
    metadata.name.push_str("-abcde");
    let object = api::EndpointSlice {
        metadata,
        address_type: "IPv4".to_owned(),
        ports: vec![api::EndpointPort {
            name: Some("http".to_owned()),
            protocol: "TCP".to_owned(),
            port: Some(8080),
        }],
        endpoints: (0..size.endpoints)
            .filter(|number| Some(*number) != missing)
            .map(endpoint)
            .collect(),
    };
    EndpointSlice::read(&object).value
}

//! The clusters that are measured, as the API server would tell about them.

use std::net::Ipv4Addr;

use proxier::{
    ObjectName,
    model::{DetectLocal, EndpointSlice, Event, NodeEnv, Object, ObjectKey, Service, Store, api},
};
use serde::{Deserialize, Serialize};

/// Where cluster IPs, endpoints, endpoints that come later, and the pool that rolls begin. The data
/// path routes by these prefixes.
const CLUSTER_IPS: [u8; 4] = [10, 64, 0, 1];
const ENDPOINTS: [u8; 4] = [10, 128, 0, 1];
const NEWCOMERS: [u8; 4] = [10, 160, 0, 1];
const POOL: [u8; 4] = [10, 184, 0, 1];

/// Endpoints in one slice, as the EndpointSlice controller makes them.
const SLICE: usize = 100;

pub(crate) const PORT: u16 = 80;
pub(crate) const TARGET_PORT: u16 = 8080;

/// How big it is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct World {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
}

/// A node somewhere in the cluster.
pub(crate) fn store() -> Store {
    Store::new(NodeEnv {
        name: "node-0".to_owned(),
        detect_local: DetectLocal::ClusterCidr("10.128.0.0/9".parse().into_iter().collect()),
        ..NodeEnv::default()
    })
}

/// The cluster IP of a Service.
pub(crate) fn cluster_ip(index: usize) -> Ipv4Addr {
    address(CLUSTER_IPS, index)
}

/// An endpoint of a Service.
pub(crate) fn endpoint(world: World, index: usize, number: usize) -> Ipv4Addr {
    address(ENDPOINTS, index * world.endpoints + number)
}

fn address(base: [u8; 4], offset: usize) -> Ipv4Addr {
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from_be_bytes(base).saturating_add(offset))
}

impl World {
    /// All endpoints.
    pub(crate) fn size(self) -> usize {
        self.services * self.endpoints
    }

    /// Everything the API server would list.
    pub(crate) fn lists(self) -> [Event; 2] {
        let all = 0..self.services;
        let slices = all.clone().map(|index| self.slice(index, |_| true, &[]));
        let services = all.map(service);
        [Event::EndpointSlices(slices.collect()), Event::Services(services.collect())]
    }

    /// The `step`th change. Four in a row are about one Service: an endpoint goes, comes back, is
    /// replaced by another, and takes its place again.
    pub(crate) fn change(self, step: usize) -> Event {
        self.one_endpoint((step / 4).wrapping_mul(7919) % self.services, step % 4)
    }

    /// An endpoint of a Service goes (0), is replaced by another (2), or is back (1, 3).
    pub(crate) fn one_endpoint(self, index: usize, what: usize) -> Event {
        let (gone, more) = (self.endpoints / 2, [address(NEWCOMERS, index)]);
        let (stays, more): (bool, &[_]) = match what {
            0 => (false, &[]),
            2 => (false, &more),
            _ => (true, &[]),
        };
        apply(self.slice(index, |number| stays || number != gone, more))
    }

    /// A Service that is not in the lists comes.
    pub(crate) fn added(self, number: usize) -> Vec<Event> {
        let index = self.services + number;
        let slice = apply(self.slice(index, |_| true, &[]));
        vec![slice, Event::Apply(Object::Service(service(index)))]
    }

    /// A Service goes.
    pub(crate) fn removed(index: usize) -> Vec<Event> {
        let name = name(index);
        let slice = ObjectName::new("bench", &format!("{name}-0"));
        vec![
            Event::Delete(ObjectKey::Service(ObjectName::new("bench", &name))),
            Event::Delete(ObjectKey::EndpointSlice(slice)),
        ]
    }

    fn slice(self, index: usize, keep: impl Fn(usize) -> bool, more: &[Ipv4Addr]) -> EndpointSlice {
        let own = (0..self.endpoints).filter(|number| keep(*number));
        let own = own.map(|number| endpoint(self, index, number));
        slice(&name(index), 0, own.chain(more.iter().copied()))
    }
}

/// One Service with very many endpoints.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pool {
    /// Its number among the Services.
    pub(crate) index: usize,
    pub(crate) endpoints: usize,
}

impl Pool {
    /// The Service comes, with all its endpoints.
    pub(crate) fn added(self) -> Vec<Event> {
        let slices = (0..self.endpoints.div_ceil(SLICE)).map(|part| self.part(part, 0, None));
        slices.chain([Event::Apply(Object::Service(service(self.index)))]).collect()
    }

    /// A rolling update has replaced so many.
    pub(crate) fn replaced(self, count: usize) -> Event {
        self.part(count.saturating_sub(1) / SLICE, count, None)
    }

    /// One endpoint is gone.
    pub(crate) fn without(self, number: usize) -> Event {
        self.part(number / SLICE, 0, Some(number))
    }

    /// Everything is as in the beginning in the slice of an endpoint.
    pub(crate) fn restored(self, number: usize) -> Event {
        self.part(number / SLICE, 0, None)
    }

    fn part(self, part: usize, replaced: usize, gone: Option<usize>) -> Event {
        let numbers = part * SLICE..((part + 1) * SLICE).min(self.endpoints);
        let addresses = numbers.filter(|number| Some(*number) != gone).map(|number| {
            // A replacement has an address that no endpoint had before.
            let shift = if number < replaced { self.endpoints } else { 0 };
            address(POOL, number + shift)
        });
        apply(slice(&name(self.index), part, addresses))
    }
}

fn apply(slice: EndpointSlice) -> Event {
    Event::Apply(Object::EndpointSlice(slice))
}

/// Names in the order of their numbers.
fn name(index: usize) -> String {
    format!("service-{index:06}")
}

fn metadata(name: String) -> api::Metadata {
    api::Metadata {
        name,
        namespace: "bench".to_owned(),
        creation_timestamp: Some("2026-01-01T00:00:00Z".to_owned()),
        ..api::Metadata::default()
    }
}

fn service(index: usize) -> Service {
    let ip = cluster_ip(index).to_string();
    let object = api::Service {
        metadata: metadata(name(index)),
        spec: api::ServiceSpec {
            cluster_ip: ip.clone(),
            cluster_ips: vec![ip],
            ip_families: vec!["IPv4".to_owned()],
            ports: vec![api::ServicePort {
                name: "http".to_owned(),
                protocol: "TCP".to_owned(),
                port: PORT.into(),
                ..api::ServicePort::default()
            }],
            ..api::ServiceSpec::default()
        },
        ..api::Service::default()
    };
    Service::read(&object).value.expect("a Service that can be read")
}

fn slice(service: &str, part: usize, addresses: impl Iterator<Item = Ipv4Addr>) -> EndpointSlice {
    let endpoint = |(number, address): (usize, Ipv4Addr)| api::Endpoint {
        addresses: vec![address.to_string()],
        node_name: Some(format!("node-{}", number % 3)),
        ..api::Endpoint::default()
    };
    let mut metadata = metadata(format!("{service}-{part}"));
    metadata.labels.insert("kubernetes.io/service-name".to_owned(), service.to_owned());
    let object = api::EndpointSlice {
        metadata,
        address_type: "IPv4".to_owned(),
        ports: vec![api::EndpointPort {
            name: Some("http".to_owned()),
            protocol: "TCP".to_owned(),
            port: Some(TARGET_PORT.into()),
        }],
        endpoints: addresses.enumerate().map(endpoint).collect(),
    };
    EndpointSlice::read(&object).value.expect("a slice that can be read")
}

//! EndpointSlices, checked and normalised.

use std::{net::IpAddr, num::NonZeroU16, sync::Arc, time::SystemTime};

use serde::Serialize;

use super::{
    address::parse_ip,
    api,
    names::Names,
    problem::{Checker, Read},
    tuning::slice_weight,
};
use crate::name::{Family, ObjectName, Protocol};

/// Names the Service of a slice.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Marks slices of headless Services.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Says when the change was made that led to this state of the slice.
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// One port of a slice; it holds for every endpoint of the slice.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SlicePort {
    /// Name, empty for the unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port number on the endpoints.
    pub port: NonZeroU16,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Endpoint {
    /// Its address.
    pub ip: IpAddr,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// Ready for new connections.
    pub ready: bool,
    /// Able to answer, terminating or not.
    pub serving: bool,
    /// About to go.
    pub terminating: bool,
    /// Who should use it, if anybody in particular.
    pub hints: Option<Box<Hints>>,
}

/// Who should use an endpoint.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Hints {
    /// The zones that should.
    pub zones: Box<[Arc<str>]>,
    /// The nodes that should.
    pub nodes: Box<[Arc<str>]>,
}

impl Endpoint {
    /// Zones that should use it; empty without hints.
    #[must_use]
    pub fn zone_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map(|hints| &*hints.zones).unwrap_or_default()
    }

    /// Nodes that should use it; empty without hints.
    #[must_use]
    pub fn node_hints(&self) -> &[Arc<str>] {
        self.hints.as_ref().map(|hints| &*hints.nodes).unwrap_or_default()
    }
}

/// Some of the endpoints of a Service, in one family.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct EndpointSlice {
    name: ObjectName,
    service: ObjectName,
    family: Family,
    weight: Option<u16>,
    ports: Box<[SlicePort]>,
    endpoints: Box<[Endpoint]>,
    #[serde(skip)]
    triggered: Option<SystemTime>,
}

impl EndpointSlice {
    /// Reads an EndpointSlice as the API describes it.
    ///
    /// The value is `None` for a slice no proxier uses: of a headless Service, of address type
    /// `FQDN`, without the service-name label, or with an unusable name.
    #[must_use]
    pub fn read(object: &api::EndpointSlice) -> Read<Self> {
        let metadata = &object.metadata;
        let mut check = Checker::new("EndpointSlice", &metadata.namespace, &metadata.name);
        if !check.name("metadata.namespace", &metadata.namespace)
            | !check.name("metadata.name", &metadata.name)
        {
            return check.done(None);
        }
        let service = metadata.labels.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty());
        let Some(service) = service else { return check.done(None) };
        if metadata.labels.contains_key(HEADLESS_LABEL) {
            return check.done(None);
        }
        let family = match object.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return check.done(None),
            other => {
                check.report(
                    "addressType",
                    format!("{other:?} is neither IPv4 nor IPv6: the slice is ignored"),
                );
                return check.done(None);
            }
        };
        // One copy of each name in the slice.
        let mut names = Names::default();
        let slice = Self {
            name: ObjectName::new(&metadata.namespace, &metadata.name),
            service: ObjectName::new(&metadata.namespace, service),
            family,
            weight: slice_weight(&metadata.annotations, &mut check),
            ports: ports(&object.ports, &mut check),
            endpoints: object
                .endpoints
                .iter()
                .enumerate()
                .filter_map(|(index, endpoint)| {
                    read_endpoint(index, endpoint, family, &mut names, &mut check)
                })
                .collect(),
            // What is no time is ignored, as kube-proxy does: it serves statistics only.
            triggered: metadata
                .annotations
                .get(TRIGGER_ANNOTATION)
                .and_then(|text| text.parse::<jiff::Timestamp>().ok())
                .map(SystemTime::from),
        };
        check.done(Some(slice))
    }

    /// Namespace and name of the slice.
    #[must_use]
    pub const fn name(&self) -> &ObjectName {
        &self.name
    }

    /// The Service it belongs to.
    #[must_use]
    pub const fn service(&self) -> &ObjectName {
        &self.service
    }

    /// The family of its addresses.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    /// The weight of its endpoints, if one is given. 0 means no new connections.
    #[must_use]
    pub const fn weight(&self) -> Option<u16> {
        self.weight
    }

    /// When the change was made that led to this state, if that is known.
    #[must_use]
    pub const fn triggered(&self) -> Option<SystemTime> {
        self.triggered
    }

    /// Whether a proxier makes the same of both: when they came about does not count.
    #[must_use]
    pub fn means_the_same(&self, other: &Self) -> bool {
        let Self { name, service, family, weight, ports, endpoints, triggered: _ } = self;
        (name, service, family, weight, ports, endpoints)
            == (
                &other.name,
                &other.service,
                &other.family,
                &other.weight,
                &other.ports,
                &other.endpoints,
            )
    }

    /// The names in it that other slices have, too.
    pub(super) fn names_mut(&mut self) -> impl Iterator<Item = &mut Arc<str>> {
        let ports = self.ports.iter_mut().map(|port| &mut port.name);
        let endpoints = self.endpoints.iter_mut().flat_map(|endpoint| {
            let hints = endpoint.hints.iter_mut();
            let hints = hints.flat_map(|it| it.zones.iter_mut().chain(&mut it.nodes));
            endpoint.node.iter_mut().chain(hints)
        });
        ports.chain(endpoints)
    }

    /// Its ports.
    #[must_use]
    pub fn ports(&self) -> &[SlicePort] {
        &self.ports
    }

    /// Its endpoints.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }
}

fn ports(listed: &[api::EndpointPort], check: &mut Checker) -> Box<[SlicePort]> {
    let mut found = Vec::with_capacity(listed.len());
    for (index, port) in listed.iter().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        // K8S: a missing name or number means "all ports", which no proxier supports.
        let (Some(name), Some(number @ 1..)) = (&port.name, port.port) else { continue };
        let protocol = match port.protocol.parse() {
            Ok(protocol) => protocol,
            Err(error) => {
                check.report(field("protocol"), format!("{error}: the port is skipped"));
                continue;
            }
        };
        match u16::try_from(number).ok().and_then(NonZeroU16::new) {
            Some(port) => found.push(SlicePort { name: name.as_str().into(), protocol, port }),
            None => check.report(
                field("port"),
                format!("{number} is not a port number (1-65535): the port is skipped"),
            ),
        }
    }
    found.into()
}

fn read_endpoint(
    index: usize,
    endpoint: &api::Endpoint,
    family: Family,
    names: &mut Names,
    check: &mut Checker,
) -> Option<Endpoint> {
    let field = || format!("endpoints[{index}].addresses");
    let Some(text) = endpoint.addresses.first() else {
        check.report(field(), "no address: the endpoint is skipped");
        return None;
    };
    let Some(ip) = parse_ip(text) else {
        check.report(field(), format!("{text:?} is not an IP address: the endpoint is skipped"));
        return None;
    };
    if !family.has(&ip) {
        check.report(field(), format!("{ip} in a slice of {family}: the endpoint is skipped"));
        return None;
    }
    let mut hints = |listed: &[api::Hint]| {
        listed.iter().map(|hint| names.intern(&hint.name)).collect::<Box<[_]>>()
    };
    let hints =
        Hints { zones: hints(&endpoint.hints.for_zones), nodes: hints(&endpoint.hints.for_nodes) };
    Some(Endpoint {
        ip,
        node: endpoint.node_name.as_deref().map(|name| names.intern(name)),
        ready: endpoint.conditions.ready.unwrap_or(true),
        serving: endpoint.conditions.serving.unwrap_or(true),
        terminating: endpoint.conditions.terminating.unwrap_or(false),
        hints: (hints != Hints::default()).then(|| Box::new(hints)),
    })
}

//! The four kinds of objects that are watched.

use std::fmt;

use ipnet::IpNet;
use proxier_core::{
    ObjectName,
    model::{EndpointSlice, Problem, Read, Service, api, parse_net},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::gather::{Feed, Message};

/// A kind of object that is watched.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Kind {
    /// `discovery.k8s.io/v1` EndpointSlices.
    EndpointSlices,
    /// The own `v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDRs.
    ServiceCidrs,
    /// `v1` Services.
    Services,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] =
        [Self::EndpointSlices, Self::Node, Self::ServiceCidrs, Self::Services];

    /// The resource as RBAC rules name it, without its group.
    #[must_use]
    pub const fn resource(self) -> &'static str {
        match self {
            Self::EndpointSlices => "endpointslices",
            Self::Node => "nodes",
            Self::ServiceCidrs => "servicecidrs",
            Self::Services => "services",
        }
    }

    /// The API group as RBAC rules name it; empty for the core group.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::EndpointSlices => "discovery.k8s.io",
            Self::Node | Self::Services => "",
            Self::ServiceCidrs => "networking.k8s.io",
        }
    }

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
            Self::Node => "/api/v1/nodes",
            Self::ServiceCidrs => "/apis/networking.k8s.io/v1/servicecidrs",
            Self::Services => "/api/v1/services",
        }
    }
}

impl fmt::Display for Kind {
    /// As kubectl names it: `endpointslices.discovery.k8s.io`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.group() {
            "" => f.pad(self.resource()),
            group => write!(f, "{}.{group}", self.resource()),
        }
    }
}

/// What to ask the server for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    pub(crate) labels: Option<&'static str>,
    pub(crate) fields: Option<String>,
}

/// A kind at compile time: from JSON to what the core takes.
pub(crate) trait Watched: Send + 'static {
    const KIND: Kind;
    /// The object as the API has it. Lives only while it is read.
    type Api: DeserializeOwned + Send;
    /// What is passed on.
    type Item: Send;

    fn selection(node: &str) -> Selection;
    /// Applies what the server's selectors should have applied, and checks.
    fn read(object: Self::Api) -> Read<Self::Item>;
    fn name(item: &Self::Item) -> ObjectName;
    fn message(feed: Feed<Self::Item>) -> Message;
}

pub(crate) struct Services;
pub(crate) struct Slices;
pub(crate) struct OwnNode;
pub(crate) struct Cidrs;

// K8S: the selectors of cmd/kube-proxy/app/server.go, v1.36. The core applies them again, for
// servers and proxies in between that do not.
impl Watched for Services {
    const KIND: Kind = Kind::Services;
    type Api = api::Service;
    type Item = Service;

    fn selection(_node: &str) -> Selection {
        Selection {
            labels: Some("!service.kubernetes.io/service-proxy-name"),
            fields: Some("spec.clusterIP!=None".to_owned()),
        }
    }

    fn read(object: api::Service) -> Read<Service> {
        Service::read(&object)
    }

    fn name(item: &Service) -> ObjectName {
        item.name().clone()
    }

    fn message(feed: Feed<Service>) -> Message {
        Message::Services(feed)
    }
}

impl Watched for Slices {
    const KIND: Kind = Kind::EndpointSlices;
    type Api = api::EndpointSlice;
    type Item = EndpointSlice;

    fn selection(_node: &str) -> Selection {
        Selection { labels: Some("!service.kubernetes.io/headless"), fields: None }
    }

    fn read(object: api::EndpointSlice) -> Read<EndpointSlice> {
        EndpointSlice::read(&object)
    }

    fn name(item: &EndpointSlice) -> ObjectName {
        item.name().clone()
    }

    fn message(feed: Feed<EndpointSlice>) -> Message {
        Message::Slices(feed)
    }
}

impl Watched for OwnNode {
    const KIND: Kind = Kind::Node;
    type Api = api::Node;
    type Item = api::Node;

    fn selection(node: &str) -> Selection {
        Selection { labels: None, fields: Some(format!("metadata.name={node}")) }
    }

    fn read(object: api::Node) -> Read<api::Node> {
        Read { value: Some(object), problems: Vec::new() }
    }

    fn name(item: &api::Node) -> ObjectName {
        ObjectName::new("", &item.metadata.name)
    }

    fn message(feed: Feed<api::Node>) -> Message {
        Message::Node(feed)
    }
}

/// The ranges of one ServiceCIDR.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Ranges {
    pub(crate) name: ObjectName,
    pub(crate) nets: Vec<IpNet>,
}

impl Watched for Cidrs {
    const KIND: Kind = Kind::ServiceCidrs;
    type Api = api::ServiceCidr;
    type Item = Ranges;

    fn selection(_node: &str) -> Selection {
        Selection::default()
    }

    fn read(object: api::ServiceCidr) -> Read<Ranges> {
        let (mut nets, mut problems) = (Vec::new(), Vec::new());
        for (index, text) in object.spec.cidrs.iter().enumerate() {
            match parse_net(text) {
                Some((net, _)) => nets.push(net),
                None => problems.push(Problem {
                    object: format!("ServiceCIDR {}", object.metadata.name),
                    field: format!("spec.cidrs[{index}]"),
                    message: format!("{text:?} is not a CIDR: skipped"),
                }),
            }
        }
        let name = ObjectName::new("", &object.metadata.name);
        Read { value: Some(Ranges { name, nets }), problems }
    }

    fn name(item: &Ranges) -> ObjectName {
        item.name.clone()
    }

    fn message(feed: Feed<Ranges>) -> Message {
        Message::Cidrs(feed)
    }
}

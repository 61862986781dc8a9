//! Keys and values: what the mode consists of, in the kernel and in the process.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
};

use proxier_core::{
    Family, FragmentId,
    ir::{Detector, FrontendKey, FrontendKind, Member, Origin, SourceFilter, Verdicts},
};
pub(crate) use proxier_netlink::gate::ORIGINS;
pub use proxier_netlink::gate::{Base, Chain, Item, Rule, Shape, Way};
use proxier_netlink::gate::{Kind, Part};

/// The identity of an object.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Key {
    /// The nf_tables table of a family.
    Table(Family),
    /// A set in it.
    Set(Family, SetName),
    /// A chain in it, with its rules.
    Chain(Family, ChainName),
    /// The routing rule and route that deliver captured packets to this machine.
    Routing(Family),
    /// In the process: how origins are told where the kernel does not.
    Origins(Family),
    /// In the process: the endpoints of a Service port.
    Service(FragmentId),
    /// In the process: what happens to connections to a frontend.
    Route(FrontendKey),
    /// An element of a set.
    Element(SetName, Item),
    /// In the process: an endpoint of a Service port, which is counted. Part of no plan: a change of
    /// endpoints is one of [`Service`](Self::Service).
    Endpoint(FragmentId, SocketAddr),
}

/// A set of the table.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SetName {
    /// Who may use the frontends in [`Fenced`](Self::Fenced).
    Allowed(Way),
    /// Frontends that drop what comes from an origin.
    Dropped(Way, Origin),
    /// Frontends that only some sources may use.
    Fenced(Way),
    /// Every frontend.
    Frontends(Way),
    /// The addresses node ports answer on, where they are listed.
    NodeAddresses,
    /// Frontends that reject what comes from an origin.
    Rejected(Way, Origin),
}

impl SetName {
    /// Every set.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let by_way = |way| {
            let by_origin = ORIGINS
                .into_iter()
                .flat_map(move |it| [Self::Dropped(way, it), Self::Rejected(way, it)]);
            [Self::Allowed(way), Self::Fenced(way), Self::Frontends(way)]
                .into_iter()
                .chain(by_origin)
        };
        Way::ALL.into_iter().flat_map(by_way).chain([Self::NodeAddresses])
    }

    /// What its keys are.
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Allowed(way) => Kind::Sources(way),
            Self::Dropped(way, _)
            | Self::Fenced(way)
            | Self::Frontends(way)
            | Self::Rejected(way, _) => Kind::Frontends(way),
            Self::NodeAddresses => Kind::Addresses,
        }
    }
}

/// A chain of the table.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ChainName {
    /// Hands packets from an origin to the process.
    Capture(Origin),
    /// Sends the node's own packets back in.
    CaptureOwn,
    /// Tells the origin of a packet to a frontend.
    Classify(Way),
    /// Tells the origin of the node's own packet.
    ClassifyOwn(Way),
    /// A chain that this version does not know.
    Foreign(String),
    /// What happens to packets from an origin.
    From(Way, Origin),
    /// What happens to the node's own packets.
    FromOwn(Way, Origin),
    /// The node's own packets.
    Output,
    /// Keeps others from translating what was captured.
    Keep,
    /// Keeps others from translating the node's own captured packets.
    KeepOwn,
    /// Packets that leave, also through `lo`.
    Postrouting,
    /// Packets that arrive, also through `lo`.
    Prerouting,
}

/// The origins that the node's own packets can have.
pub(crate) const OWN_ORIGINS: [Origin; 2] = [Origin::Pod, Origin::Node];

impl ChainName {
    /// Every chain.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let hooks = [Self::Prerouting, Self::Output, Self::Postrouting, Self::CaptureOwn];
        let hooks = hooks.into_iter().chain([Self::Keep, Self::KeepOwn]);
        let by_way = |way| {
            let from = ORIGINS.map(|origin| Self::From(way, origin));
            let own = OWN_ORIGINS.map(|origin| Self::FromOwn(way, origin));
            [Self::Classify(way), Self::ClassifyOwn(way)].into_iter().chain(from).chain(own)
        };
        let ways = Way::ALL.into_iter().flat_map(by_way);
        hooks.chain(ORIGINS.map(Self::Capture)).chain(ways)
    }
}

/// The content of an object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Value {
    /// A chain: where it hangs, and its rules.
    Chain(Chain),
    /// It is there, and that is all.
    Exists,
    /// How origins are told.
    Origins(Origins),
    /// What happens to connections to a frontend.
    Route(Arc<Route>),
    /// The routing rule and route.
    Routing(Routing),
    /// The endpoints of a Service port.
    Service(Arc<Service>),
    /// The shape of a set.
    Set(Shape),
}

/// What an object is to nf_tables; `None` for what is not its business.
pub(crate) fn part<'a>(key: &'a Key, value: &'a Value) -> Option<Part<'a>> {
    match (key, value) {
        (Key::Table(_), _) => Some(Part::Table),
        (Key::Set(_, set), _) => {
            Some(Part::Set { name: set.to_string(), kind: set.kind(), is_map: false })
        }
        (Key::Chain(_, name), Value::Chain(chain)) => Some(Part::Chain(name.to_string(), chain)),
        (Key::Element(set, item), _) => {
            let (key, key_end) = set.kind().pack(item);
            Some(Part::Element { set: set.to_string(), key, key_end, mark: None })
        }
        _ => None,
    }
}

/// The routing rule and route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Routing {
    /// The rule's mark, and mask.
    pub mark: u32,
    /// The table.
    pub table: u32,
    /// The rule's priority.
    pub priority: u32,
}

/// How origins are told by the address of the client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Origins {
    /// Recognises pods; only [`Detector::Source`] can.
    pub detector: Option<Detector>,
    /// The node's addresses.
    pub node: Vec<IpAddr>,
}

/// The endpoints of a Service port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    /// Endpoints of the whole cluster, sorted.
    pub cluster: Vec<Member>,
    /// Endpoints of this node, sorted.
    pub local: Vec<Member>,
    /// Seconds that a client stays with its endpoint.
    pub affinity: Option<NonZeroU32>,
}

/// What happens to connections to a frontend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// Whose endpoints.
    pub service: FragmentId,
    /// Why the frontend exists.
    pub kind: FrontendKind,
    /// Who may use it.
    pub sources: Option<SourceFilter>,
    /// What happens, by origin.
    pub verdicts: Verdicts,
}

//! Keys and values: what the mode consists of, in the kernel and in the process.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
};

use ipnet::IpNet;
use proxier_core::{
    Family, FragmentId,
    ir::{Detector, FrontendKey, FrontendKind, Member, Origin, SourceFilter, Verdicts},
};
use proxier_netlink::nft::Expr;

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

/// The two forms of frontends, which have sets of their own.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Way {
    /// An address of the Service.
    Address,
    /// An address of the node.
    NodePort,
}

impl Way {
    /// Both, in the order in which packets are compared with them.
    pub const ALL: [Self; 2] = [Self::Address, Self::NodePort];

    /// The form of a frontend.
    #[must_use]
    pub const fn of(key: &FrontendKey) -> Self {
        match key.way_in {
            proxier_core::ir::WayIn::Address(_) => Self::Address,
            proxier_core::ir::WayIn::Node(_) => Self::NodePort,
        }
    }
}

/// Every origin.
pub(crate) const ORIGINS: [Origin; 3] = [Origin::Pod, Origin::Node, Origin::External];

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

/// What an element of a set is.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Item {
    /// An address.
    Address(IpAddr),
    /// A frontend and sources that may use it.
    Allowed(FrontendKey, IpNet),
    /// A frontend.
    Frontend(FrontendKey),
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

/// A chain.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chain {
    /// Where it hangs; `None` when packets reach it from other chains only.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain hangs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Base {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// The number of the hook.
    pub hook: u32,
    /// Its place among the chains there.
    pub priority: i32,
}

/// A rule.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rule {
    /// What it does, for people; kept with it as its comment.
    pub text: String,
    /// What it does.
    pub exprs: Vec<Expr<'static>>,
}

/// The shape of a set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// The number of the key's type.
    pub key_type: u32,
    /// Bytes of the key.
    pub key_bytes: u32,
    /// Elements are intervals.
    pub intervals: bool,
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

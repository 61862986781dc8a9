//! Keys and values: what the mode consists of in the kernel.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
};

use ipnet::IpNet;
use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, Origin, WayIn},
};
use proxier_netlink::nft::Expr;

/// The identity of an object.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Key {
    /// The nf_tables table of a family.
    Table(Family),
    /// A set or map in it.
    Set(Family, SetName),
    /// A chain in it, with its rules.
    Chain(Family, ChainName),
    /// The dummy link that holds the addresses of a family.
    Link(Family),
    /// A virtual server.
    Server(ServerId),
    /// A destination of a virtual server.
    Destination(ServerId, SocketAddr),
    /// An address that this node answers for.
    Address(IpAddr),
    /// An element of a set or map.
    Element(SetName, Item),
}

/// What a virtual server is known by.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ServerId {
    /// Packets to an address and port.
    Frontend {
        /// The address.
        ip: IpAddr,
        /// The port.
        port: NonZeroU16,
        /// The protocol.
        protocol: Protocol,
    },
    /// Packets with a mark.
    Mark(Family, u32),
}

impl ServerId {
    /// The family of its packets.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::Frontend { ip: IpAddr::V4(_), .. } => Family::V4,
            Self::Frontend { ip: IpAddr::V6(_), .. } => Family::V6,
            Self::Mark(family, _) => *family,
        }
    }
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
            WayIn::Address(_) => Self::Address,
            WayIn::Node(_) => Self::NodePort,
        }
    }
}

/// Every origin.
pub(crate) const ORIGINS: [Origin; 3] = [Origin::Pod, Origin::Node, Origin::External];

/// A set or map of the table.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SetName {
    /// The addresses of Services that are not the node's own otherwise.
    Addresses,
    /// Who may use the frontends in [`Fenced`](Self::Fenced).
    Allowed(Way),
    /// Frontends that drop what comes from an origin.
    Dropped(Way, Origin),
    /// Frontends that only some sources may use.
    Fenced(Way),
    /// Every frontend.
    Frontends(Way),
    /// The addresses of endpoints, twice: as source and as destination.
    Hairpin,
    /// Map: the marks that lead from frontends to virtual servers, by origin.
    Marks(Way, Origin),
    /// Frontends that masquerade what comes from an origin.
    Masquerade(Way, Origin),
    /// The addresses node ports answer on, where they are listed.
    NodeAddresses,
    /// Map: whose a mark is that is not named after a node port.
    Owners,
    /// Frontends that reject what comes from an origin.
    Rejected(Way, Origin),
}

impl SetName {
    /// Every set.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let by_way = |way| {
            let by_origin = ORIGINS.into_iter().flat_map(move |it| {
                [
                    Self::Dropped(way, it),
                    Self::Marks(way, it),
                    Self::Masquerade(way, it),
                    Self::Rejected(way, it),
                ]
            });
            [Self::Allowed(way), Self::Fenced(way), Self::Frontends(way)]
                .into_iter()
                .chain(by_origin)
        };
        Way::ALL.into_iter().flat_map(by_way).chain([
            Self::Addresses,
            Self::Hairpin,
            Self::NodeAddresses,
            Self::Owners,
        ])
    }

    /// Its elements carry marks.
    pub(crate) const fn is_map(self) -> bool {
        matches!(self, Self::Marks(..) | Self::Owners)
    }
}

/// A chain of the table.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ChainName {
    /// Tells the origin of a packet to a frontend.
    Classify(Way),
    /// Tells the origin of the node's own packet.
    ClassifyOwn(Way),
    /// A chain that this version does not know.
    Foreign(String),
    /// What happens to packets from an origin.
    From(Way, Origin),
    /// Takes our marks off what leaves.
    Leaving,
    /// Gives what leaves another source.
    Masquerade,
    /// The node's own packets.
    Output,
    /// Packets that arrive.
    Prerouting,
}

impl ChainName {
    /// Every chain.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let hooks = [Self::Prerouting, Self::Output, Self::Leaving, Self::Masquerade];
        let by_way = |way| {
            let from = ORIGINS.map(|origin| Self::From(way, origin));
            [Self::Classify(way), Self::ClassifyOwn(way)].into_iter().chain(from)
        };
        hooks.into_iter().chain(Way::ALL.into_iter().flat_map(by_way))
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
    /// A mark.
    Mark(Family, u32),
}

/// The content of an object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Value {
    /// A chain: where it hangs, and its rules.
    Chain(Chain),
    /// It is there, and that is all.
    Exists,
    /// What an element of a map leads to.
    Mark(u32),
    /// How a virtual server spreads connections.
    Server(Server),
    /// The shape of a set.
    Set(Shape),
    /// The weight of a destination.
    Weight(u32),
}

/// How a virtual server spreads connections.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Server {
    /// The kernel's name of the scheduler.
    pub scheduler: Arc<str>,
    /// Seconds that a client stays with its destination.
    pub persistence: Option<u32>,
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
    /// `filter` or `nat`.
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
    /// Elements carry a mark.
    pub is_map: bool,
}

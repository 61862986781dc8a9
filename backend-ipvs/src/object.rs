//! Keys and values: what the mode consists of in the kernel.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
};

use proxier_core::{Family, Protocol, ir::Origin};
pub(crate) use proxier_netlink::gate::ORIGINS;
pub use proxier_netlink::gate::{Base, Chain, Item, Rule, Shape, Way};
use proxier_netlink::gate::{Kind, Part};

use crate::backend::Op;

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
    /// Frontends whose virtual server is ours: noted before it is made, and until it is gone, so that
    /// a process that dies in between leaves none behind that nobody knows.
    Servers,
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
            Self::Servers,
        ])
    }

    /// What its keys are.
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::Addresses | Self::NodeAddresses => Kind::Addresses,
            Self::Allowed(way) => Kind::Sources(way),
            Self::Dropped(way, _)
            | Self::Fenced(way)
            | Self::Frontends(way)
            | Self::Marks(way, _)
            | Self::Masquerade(way, _)
            | Self::Rejected(way, _) => Kind::Frontends(way),
            Self::Servers => Kind::Frontends(Way::Address),
            Self::Hairpin => Kind::Hairpin,
            Self::Owners => Kind::Marks,
        }
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
    /// What hashes to a destination that is to go is led to another one, and not refused.
    pub fallback: bool,
}

impl Server {
    /// A virtual server of ours.
    pub(crate) fn new(scheduler: Arc<str>, persistence: Option<u32>) -> Self {
        // KERNEL: the schedulers that have a flag for it; without, they refuse what hashes to a
        // destination of weight 0 (net/netfilter/ipvs/ip_vs_sh.c, ip_vs_mh.c, v6.12).
        let fallback = matches!(&*scheduler, "mh" | "sh");
        Self { scheduler, persistence, fallback }
    }
}

/// What an object is to nf_tables; `None` for what is not its business.
pub(crate) fn part<'a>(key: &'a Key, value: &'a Value) -> Option<Part<'a>> {
    match (key, value) {
        (Key::Table(_), _) => Some(Part::Table),
        (Key::Set(_, set), _) => {
            let (kind, is_map) = (set.kind(), set.is_map());
            Some(Part::Set { name: set.to_string(), kind, is_map })
        }
        (Key::Chain(_, name), Value::Chain(chain)) => Some(Part::Chain(name.to_string(), chain)),
        (Key::Element(set, item), value) => {
            let (key, key_end) = set.kind().pack(item);
            let mark = if let Value::Mark(mark) = value { Some(*mark) } else { None };
            Some(Part::Element { set: set.to_string(), key, key_end, mark })
        }
        _ => None,
    }
}

/// When an operation on nf_tables is carried out: virtual servers are made between the first and the
/// second, and removed between the second and the third.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    /// Notes whose the virtual servers are that are to come.
    Claim,
    /// Leads packets.
    Lead,
    /// Forgets whose the virtual servers were that are gone.
    Release,
}

impl Phase {
    /// When an operation is carried out; `None` if it is not about nf_tables.
    pub(crate) fn of(op: &Op) -> Option<Self> {
        match op.key() {
            Key::Link(_) | Key::Server(_) | Key::Destination(..) | Key::Address(_) => None,
            Key::Element(SetName::Servers, _) if matches!(op, Op::Del(..)) => Some(Self::Release),
            Key::Table(_) | Key::Set(_, SetName::Servers) | Key::Element(SetName::Servers, _) => {
                Some(Self::Claim)
            }
            Key::Set(..) | Key::Chain(..) | Key::Element(..) => Some(Self::Lead),
        }
    }
}

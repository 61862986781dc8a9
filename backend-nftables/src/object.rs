//! The kernel objects of this mode: their identity and their content.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use proxier_core::{
    Family, FragmentId, Protocol,
    ir::{FrontendKey, Origin, Pool, WayIn},
};
use sha2::{Digest, Sha256};

use crate::rule::Rule;

/// The identity of a kernel object: the table, a set, a chain, a rule, or an element of a set.
///
/// A Service is elements only. What is written for it can be read back and recognised without any
/// memory of what was written.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key {
    pub(crate) family: Family,
    pub(crate) object: Object,
}

/// Objects sort by kind, elements by the set they are in.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Object {
    Table,
    Set(SetName),
    Chain(ChainName),
    /// The rule that serves the frontends of one pool size.
    Pick(Pick),
    Element(Element),
    /// Something in our table that is not ours.
    Stray(Box<Stray>),
}

/// Where the destination address of a frontend comes from.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Space {
    /// Any address of the node: the key is protocol and port.
    NodePort,
    /// The key is address, protocol and port.
    Service,
}

impl Space {
    pub(crate) const ALL: [Self; 2] = [Self::NodePort, Self::Service];

    pub(crate) const fn of(key: &FrontendKey) -> Self {
        match key.way_in {
            WayIn::Address(_) => Self::Service,
            WayIn::Node(_) => Self::NodePort,
        }
    }
}

/// The pools, for iteration.
pub(crate) const POOLS: [Pool; 2] = [Pool::Cluster, Pool::Local];

/// The origins, for iteration.
pub(crate) const ORIGINS: [Origin; 3] = [Origin::External, Origin::Node, Origin::Pod];

/// A set or map.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum SetName {
    /// Who was sent where: written by rules, with a timeout.
    Affinity(Pool),
    /// Addresses that Services have.
    Addresses(AddressKind),
    /// Endpoints by frontend and slot.
    Endpoints(Space, Pool),
    /// Frontends about which something is to be said.
    Frontends(Space, Says),
    /// Addresses of endpoints, as pairs of equal ones.
    Hairpin,
    /// The endpoints that an affinity may lead to.
    Members(Pool),
    /// Addresses on which node ports answer, if not on all.
    NodeAddresses,
    /// The chains that remember where a client of a frontend was sent.
    Remember(Space),
    /// Frontends whose pool has so many endpoints.
    Size(Space, Pool, Size),
    /// The sources that may use frontends.
    Sources(Space),
    /// The chains that spread connections in an unusual way.
    Spread(Space, Pool),
    /// The chains that recall where a client of a frontend was sent.
    Sticky(Space, Pool),
}

/// What an address is.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum AddressKind {
    ClusterIp,
    External,
}

/// What a set says of the frontends in it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Says {
    /// It depends on the origin what happens, or is unusual: look at the sets below.
    ByOrigin,
    /// Their connections are counted.
    Counted,
    /// Packets of this origin are dropped.
    Drop(Origin),
    /// Only some sources may use it.
    Fenced,
    /// Packets of this origin use the Local pool.
    Local(Origin),
    /// Packets of this origin are masqueraded.
    Masquerade(Origin),
    /// All packets are masqueraded.
    MasqueradeAll,
    /// All packets but those of local pods are masqueraded.
    MasqueradeUnlessPod,
    /// All packets are rejected.
    NoEndpoints,
    /// Packets of this origin are rejected.
    Reject(Origin),
}

impl Says {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let each = ORIGINS.into_iter().flat_map(|origin| {
            [
                Self::Drop(origin),
                Self::Local(origin),
                Self::Masquerade(origin),
                Self::Reject(origin),
            ]
        });
        let whole = [
            Self::ByOrigin,
            Self::Counted,
            Self::Fenced,
            Self::MasqueradeAll,
            Self::MasqueradeUnlessPod,
            Self::NoEndpoints,
        ];
        each.chain(whole)
    }
}

/// A chain.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum ChainName {
    /// Sees the packets of a hook.
    Base(Hook),
    /// New packets to this machine that were not translated.
    CheckInput,
    /// New packets to elsewhere that were not translated.
    CheckPassing,
    /// Tells origins apart.
    ByOrigin(Space),
    /// What holds for one origin.
    From(Space, Origin),
    /// Rules by pool size, each an object of its own.
    Picks(Space, Pool),
    /// Picks an endpoint.
    Pool(Space, Pool),
    /// Rejects where there is no endpoint.
    Refuse(Space),
    /// The same where it depends on the origin.
    RefuseByOrigin(Space),
    /// Remembers where clients of one Service port were sent.
    Remember(PortId),
    /// New packets that were translated.
    Seen,
    /// Packets to frontends of one kind.
    Space(Space),
    /// Spreads the connections of one Service port in an unusual way.
    Spread(PortId, Space, Pool),
    /// Sends clients of one Service port where they were sent before.
    Sticky(PortId, Pool),
}

/// A hook with a base chain of ours.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Hook {
    FilterForward,
    FilterInput,
    FilterOutput,
    NatOutput,
    NatPostrouting,
    NatPrerouting,
}

/// Identifies a Service port with affinity: 64 bits of the SHA-256 of its fragment's name.
///
/// The packet path has no shorter name for "the same Service port by whatever frontend".
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct PortId(pub(crate) [u32; 2]);

impl PortId {
    pub(crate) fn of(id: &FragmentId) -> Self {
        Self::digest(id.to_string().as_bytes())
    }

    /// The identity of the endpoints with this port among those of the Service port.
    pub(crate) fn at(self, port: u16) -> Self {
        let [high, low] = self.0.map(u32::to_be_bytes);
        Self::digest(&[&high[..], &low, &port.to_be_bytes()].concat())
    }

    fn digest(bytes: &[u8]) -> Self {
        let mut words = Sha256::digest(bytes)
            .chunks_exact(4)
            .filter_map(|word| word.try_into().ok().map(u32::from_be_bytes))
            .collect::<Vec<_>>()
            .into_iter();
        Self([words.next().unwrap_or_default(), words.next().unwrap_or_default()])
    }
}

/// A rule that serves the frontends of one pool size.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Pick {
    pub(crate) space: Space,
    pub(crate) pool: Pool,
    pub(crate) size: Size,
    pub(crate) protocol: Protocol,
    /// How often a slot was drawn before that turned out to be free.
    pub(crate) turn: u8,
}

impl Pick {
    /// The rules of a size: it takes several draws where some slots may be free, and at last the
    /// first slot, which never is.
    pub(crate) fn turns(
        space: Space,
        pool: Pool,
        size: Size,
        protocol: Protocol,
    ) -> impl Iterator<Item = Self> {
        let last = if size.is_exact() { 0 } else { Size::DRAWS };
        (0..=last).map(move |turn| Self { space, pool, size, protocol, turn })
    }

    /// What the slot is drawn from.
    pub(crate) const fn modulus(self) -> u32 {
        if self.turn == Size::DRAWS { 1 } else { self.size.slots() }
    }

    /// Says whether it exists whatever the Services are.
    pub(crate) fn is_usual(self) -> bool {
        self.size.is_usual(self.space, self.pool) && self.protocol != Protocol::Sctp
    }
}

/// The size of a pool: how many endpoints it has, or a little more than that.
///
/// Up to 32 endpoints it is their number. Beyond, it is rounded up by at most a sixteenth, so that
/// few changes make it another one; a draw that finds its slot free is repeated. Five draws leave
/// less than one connection in a million without an endpoint; that one gets the first.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Size(u32);

impl Size {
    /// How often a slot is drawn.
    pub(crate) const DRAWS: u8 = 5;
    /// Pools up to this size have no free slots.
    const EXACT: u32 = 32;
    /// Up to this size, what is needed for most Services is there always.
    // KERNEL: a rule that looks into a map makes the kernel walk the map when it is added
    // (net/netfilter/nf_tables_api.c nf_tables_bind_set, v6.12): 12 ms for 135,000 endpoints.
    const USUAL: u32 = 16;

    /// The size of a pool with so many endpoints, at least one.
    pub(crate) fn of(endpoints: usize) -> Self {
        let endpoints = u32::try_from(endpoints).unwrap_or(u32::MAX >> 1).max(1);
        if endpoints <= Self::EXACT {
            return Self(endpoints);
        }
        let step = 1 << ((endpoints - 1).ilog2() - 4);
        Self(endpoints.next_multiple_of(step))
    }

    /// The size of this number of slots, if there is one.
    pub(crate) fn parse(slots: u32) -> Option<Self> {
        let size = Self::of(usize::try_from(slots).ok()?);
        (size.0 == slots).then_some(size)
    }

    pub(crate) const fn slots(self) -> u32 {
        self.0
    }

    const fn is_exact(self) -> bool {
        self.0 <= Self::EXACT
    }

    /// Says whether its set exists whatever the Services are.
    pub(crate) fn is_usual(self, space: Space, pool: Pool) -> bool {
        space == Space::Service && pool == Pool::Cluster && self.0 <= Self::USUAL
    }

    /// Every usual size.
    pub(crate) fn usual() -> impl Iterator<Item = Self> {
        (1..=Self::USUAL).map(Self)
    }
}

/// An element of a set or map.
///
/// The order is that in which they come into being: what frontends lead to, then frontends, and the
/// addresses by which any of it is found last.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Element {
    Endpoint {
        pool: Pool,
        frontend: FrontendKey,
        slot: u32,
    },
    Frontend {
        says: Says,
        frontend: FrontendKey,
    },
    Source(Box<(FrontendKey, IpNet)>),
    Hairpin(IpAddr),
    Member {
        pool: Pool,
        id: PortId,
        ip: IpAddr,
    },
    Size {
        pool: Pool,
        size: Size,
        frontend: FrontendKey,
    },
    Remember(FrontendKey),
    Spread {
        pool: Pool,
        frontend: FrontendKey,
    },
    Sticky {
        pool: Pool,
        frontend: FrontendKey,
    },
    Address {
        kind: AddressKind,
        ip: IpAddr,
    },
    NodeAddress(IpAddr),
    /// One that is not ours, by its bytes.
    Odd {
        set: SetName,
        key: Box<[u8]>,
    },
}

impl Element {
    pub(crate) fn set(&self) -> SetName {
        match self {
            Self::Endpoint { pool, frontend, .. } => SetName::Endpoints(Space::of(frontend), *pool),
            Self::Frontend { says, frontend } => SetName::Frontends(Space::of(frontend), *says),
            Self::Source(source) => SetName::Sources(Space::of(&source.0)),
            Self::Hairpin(_) => SetName::Hairpin,
            Self::Member { pool, .. } => SetName::Members(*pool),
            Self::Size { pool, size, frontend } => SetName::Size(Space::of(frontend), *pool, *size),
            Self::Remember(frontend) => SetName::Remember(Space::of(frontend)),
            Self::Spread { pool, frontend } => SetName::Spread(Space::of(frontend), *pool),
            Self::Sticky { pool, frontend } => SetName::Sticky(Space::of(frontend), *pool),
            Self::Address { kind, .. } => SetName::Addresses(*kind),
            Self::NodeAddress(_) => SetName::NodeAddresses,
            Self::Odd { set, .. } => *set,
        }
    }
}

/// Something in our table that is not ours.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Stray {
    Rule { chain: String, handle: u64 },
    Chain(String),
    Set(String),
}

/// The content of a kernel object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Value(pub(crate) Content);

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    /// A chain and its rules, in order.
    Chain(Arc<Chain>),
    /// An endpoint.
    Endpoint(Endpoint),
    /// All there is to say is in the key.
    Exists,
    /// Something else than it should be, in words.
    Odd(Box<str>),
    /// The chain that an element leads to.
    Leads(ChainName),
}

/// A chain and its rules, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Chain {
    /// For people: which Service it is for.
    pub(crate) comment: Option<Box<str>>,
    pub(crate) rules: Vec<Rule>,
}

/// An address and a port; smaller than a socket address.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) struct Endpoint {
    pub(crate) ip: IpAddr,
    pub(crate) port: u16,
}

impl Key {
    pub(crate) const fn new(family: Family, object: Object) -> Self {
        Self { family, object }
    }

    /// The family of the object.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }
}

impl Value {
    pub(crate) const EXISTS: Self = Self(Content::Exists);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_or_a_sixteenth_more() {
        let mut sizes = std::collections::BTreeSet::new();
        for endpoints in 1..=20_000 {
            let size = Size::of(endpoints);
            let slots = size.slots() as usize;
            assert!(
                slots >= endpoints && (slots - endpoints) * 16 < endpoints.max(16),
                "{endpoints}"
            );
            assert!(slots == endpoints || !size.is_exact());
            assert_eq!(Size::parse(size.slots()), Some(size));
            sizes.insert(size);
        }
        assert_eq!(sizes.len(), 32 + 16 * 9 + 4);
        assert_eq!(Size::parse(35), None);
    }
}

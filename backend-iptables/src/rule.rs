//! One rule as a value: what it matches, and what it does. Borrows its texts.

use std::{net::SocketAddr, num::NonZeroU32};

use ipnet::IpNet;
use proxier_core::{Family, Protocol};

/// What a rule matches. Each part is optional; all that are there must hold.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Matches<'a> {
    pub(crate) comment: Option<&'a str>,
    /// It carries our mark, which tells our rules from equal ones of others.
    pub(crate) owned: bool,
    pub(crate) source: Option<Net>,
    pub(crate) destination: Option<Net>,
    pub(crate) interface: Option<Interface<'a>>,
    pub(crate) transport: Option<Transport>,
    pub(crate) ct_state: Option<CtStates>,
    pub(crate) local: Option<Side>,
    pub(crate) recent: Option<Recent<'a>>,
    /// Holds at random, in so many of 2^31 cases.
    pub(crate) chance: Option<u32>,
    /// Holds for every n-th packet that gets so far, beginning with the first.
    pub(crate) every: Option<NonZeroU32>,
    pub(crate) mark: Option<MarkMatch>,
}

/// What a rule does to packets it matches.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Target<'a> {
    Accept,
    /// Translates the destination.
    Dnat(SocketAddr),
    Drop,
    Jump(&'a str),
    /// Clears the bits of `mask`, then inverts those of `value`.
    Mark {
        value: u32,
        mask: u32,
    },
    Masquerade {
        random_fully: bool,
    },
    /// Nothing: the rule is a note.
    Nothing,
    /// Port unreachable.
    Reject(Family),
    Return,
}

/// A source or destination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Net {
    pub(crate) not: bool,
    pub(crate) net: IpNet,
}

impl Net {
    pub(crate) const fn is(net: IpNet) -> Self {
        Self { not: false, net }
    }

    pub(crate) const fn is_not(net: IpNet) -> Self {
        Self { not: true, net }
    }
}

/// An input interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Interface<'a> {
    pub(crate) not: bool,
    pub(crate) name: &'a str,
    /// Any interface whose name begins so.
    pub(crate) prefix: bool,
}

/// A transport protocol, and perhaps a destination port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Transport {
    pub(crate) protocol: Protocol,
    pub(crate) port: Port,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Port {
    /// `-p tcp`.
    Unasked,
    /// `-p tcp -m tcp`: any port, by way of the match.
    Any,
    /// `-p tcp -m tcp --dport`.
    Is(u16),
    /// From the first to the last, both included.
    Within(u16, u16),
}

/// States of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct CtStates {
    pub(crate) not: bool,
    /// `CtStates::NEW` and the like.
    pub(crate) mask: u16,
}

// KERNEL: XT_CONNTRACK_STATE_BIT and its companions
// (include/uapi/linux/netfilter/xt_conntrack.h, v6.12).
impl CtStates {
    pub(crate) const INVALID: u16 = 1;
    pub(crate) const ESTABLISHED: u16 = 1 << 1;
    pub(crate) const RELATED: u16 = 1 << 2;
    pub(crate) const NEW: u16 = 1 << 3;
    pub(crate) const DNAT: u16 = 1 << 7;

    /// The states, in the order and with the names that iptables lists.
    pub(crate) const NAMES: [(u16, &'static str); 7] = [
        (Self::INVALID, "INVALID"),
        (Self::NEW, "NEW"),
        (Self::RELATED, "RELATED"),
        (Self::ESTABLISHED, "ESTABLISHED"),
        (1 << 8, "UNTRACKED"),
        (1 << 6, "SNAT"),
        (Self::DNAT, "DNAT"),
    ];

    pub(crate) const fn is(mask: u16) -> Self {
        Self { not: false, mask }
    }
}

/// The address that must be one of the node's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Destination,
    Source,
}

/// A list of sources that were seen recently.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Recent<'a> {
    pub(crate) name: &'a str,
    pub(crate) family: Family,
    pub(crate) action: RecentAction,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum RecentAction {
    /// Holds if the source was seen in the last so many seconds; forgets those that were not.
    Check(u32),
    /// Notes the source.
    Set,
}

/// Bits of the packet mark.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct MarkMatch {
    pub(crate) not: bool,
    pub(crate) value: u32,
    pub(crate) mask: u32,
}

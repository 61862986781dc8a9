//! Where the modes differ. Everything else they have in common.

use serde::Serialize;

use crate::proxier::Mode;

/// What happens to a packet that no frontend claims.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stray {
    /// It is dropped.
    Drop,
    /// It is rejected.
    Reject,
    /// It goes its way.
    Untouched,
}

/// Which chosen endpoints are recognised as the source of the packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hairpin {
    /// Any.
    Any,
    /// Those that are known to run on this node.
    Local,
}

/// How a Local policy tells sources apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// By the three rows of the verdict table.
    ByOrigin,
    /// Not at all: endpoints of this node if there are any, else all of them.
    PreferLocal,
}

/// The documented differences between modes, as a value: what a packet model has to know of a mode.
///
/// [`of`](Self::of) has those of kube-proxy 1.36, whose modes these are, but for deliberate deviations
/// (`docs/deviations.md`).
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Traits {
    /// To a port or a protocol of a cluster IP that no Service port has.
    pub unused_port: Stray,
    /// To a port of an external or load balancer address that no Service port has.
    pub unused_external_port: Stray,
    /// To an address in the ServiceCIDRs that no Service has.
    pub unallocated: Stray,
    /// The node's own packets to an external address elsewhere are refused when no endpoint may
    /// take them, as everybody else's are.
    pub refuses_own: bool,
    /// A node port that refuses does so on every address of the node, also where node ports do not
    /// answer.
    pub refuses_everywhere: bool,
    /// The source filter also holds where there is no endpoint: drop instead of reject.
    pub filters_dead: bool,
    /// Node ports can answer on 127.0.0.0/8.
    pub localhost: bool,
    /// Node ports can answer on link-local IPv6 addresses.
    pub link_local: bool,
    /// Health-check node ports are let in explicitly.
    pub lets_health_checks_in: bool,
    /// Packets to 127.0.0.0/8 from elsewhere are dropped while node ports answer there.
    pub guards_localhost: bool,
    /// Who is recognised as talking to itself.
    pub hairpin: Hairpin,
    /// How a Local policy works.
    pub policy: Policy,
    /// Each frontend remembers its clients by itself.
    pub affinity_by_frontend: bool,
}

impl Traits {
    /// The traits of a mode.
    #[must_use]
    pub const fn of(mode: Mode) -> Self {
        match mode {
            Mode::Iptables => IPTABLES,
            Mode::Ipvs => IPVS,
            Mode::Nftables => NFTABLES,
            Mode::Userspace => USERSPACE,
        }
    }
}

/// kube-proxy's iptables mode: what it refuses it refuses in chains of their own, by destination.
const IPTABLES: Traits = Traits {
    unused_port: Stray::Untouched,
    unused_external_port: Stray::Untouched,
    unallocated: Stray::Untouched,
    refuses_own: false,
    refuses_everywhere: true,
    filters_dead: false,
    localhost: true,
    link_local: true,
    lets_health_checks_in: true,
    guards_localhost: true,
    hairpin: Hairpin::Any,
    policy: Policy::ByOrigin,
    affinity_by_frontend: false,
};

/// kube-proxy's nftables mode, but for hairpin, which finds every endpoint, and for node ports on
/// 127.0.0.0/8, which it has not.
const NFTABLES: Traits = Traits {
    unused_port: Stray::Reject,
    unused_external_port: Stray::Untouched,
    unallocated: Stray::Drop,
    refuses_own: true,
    refuses_everywhere: false,
    filters_dead: true,
    localhost: true,
    link_local: true,
    lets_health_checks_in: false,
    guards_localhost: true,
    hairpin: Hairpin::Any,
    policy: Policy::ByOrigin,
    affinity_by_frontend: false,
};

/// Virtual servers with the verdict table in front of them; kube-proxy's IPVS mode has it not. All
/// addresses of Services are bound to a link of the node, and are refused where nobody serves.
const IPVS: Traits = Traits {
    unused_port: Stray::Reject,
    unused_external_port: Stray::Reject,
    unallocated: Stray::Untouched,
    refuses_own: true,
    refuses_everywhere: false,
    filters_dead: true,
    localhost: false,
    link_local: true,
    lets_health_checks_in: false,
    guards_localhost: false,
    hairpin: Hairpin::Any,
    policy: Policy::ByOrigin,
    affinity_by_frontend: true,
};

/// A proxy in a process that honours the verdict table.
const USERSPACE: Traits = Traits {
    unused_port: Stray::Untouched,
    unused_external_port: Stray::Untouched,
    unallocated: Stray::Untouched,
    refuses_own: true,
    refuses_everywhere: false,
    filters_dead: true,
    localhost: true,
    link_local: true,
    lets_health_checks_in: false,
    guards_localhost: false,
    hairpin: Hairpin::Any,
    policy: Policy::ByOrigin,
    affinity_by_frontend: false,
};

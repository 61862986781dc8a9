//! What becomes of a packet, in values and in words.

use std::{fmt, net::SocketAddr, time::Duration};

use serde::Serialize;

use crate::{
    ir::{Fragment, Frontend, FrontendKey, FrontendKind, Origin, Pool, Snat},
    name::FragmentId,
};

/// What becomes of a packet, and why.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Trace {
    /// Where it comes from, as far as policy cares.
    pub origin: Origin,
    /// Whose it is.
    pub matched: Option<Matched>,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Why, in the order of the decisions.
    pub reasons: Vec<Reason>,
}

impl Trace {
    pub(super) fn decide(&mut self, outcome: Outcome, reason: Reason) {
        self.outcome = outcome;
        self.reasons.push(reason);
    }
}

/// The frontend a packet has come to.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Matched {
    /// The Service port.
    pub id: FragmentId,
    /// What packets to it look like.
    pub key: FrontendKey,
    /// Why it exists.
    pub kind: FrontendKind,
}

impl Matched {
    pub(super) fn new(fragment: &Fragment, frontend: &Frontend) -> Self {
        Self { id: fragment.id.clone(), key: frontend.key, kind: frontend.kind }
    }
}

/// What becomes of a packet.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is let in explicitly, whatever other rules say.
    Accept,
    /// Nothing, silently.
    Drop,
    /// It goes to one of these, at random.
    Forward {
        /// Sorted by address.
        to: Vec<Target>,
    },
    /// The sender is told that nobody is there.
    Reject,
    /// It goes its way as if there were no Services.
    Untouched,
}

/// Where a packet may go.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Target {
    /// The endpoint.
    pub addr: SocketAddr,
    /// It runs on this node.
    pub local: bool,
    /// What becomes of the source address.
    pub source: Rewrite,
}

/// What became of one packet by the kernel objects of a mode, as far as they decide it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub enum Fate {
    /// A rule let it in.
    Accepted,
    /// A rule dropped it.
    Dropped,
    /// It goes to an endpoint.
    Forwarded {
        /// Where to.
        to: SocketAddr,
        /// Its source becomes one of the host's.
        masqueraded: bool,
    },
    /// Its source becomes one of the host's, and nothing else.
    Masqueraded,
    /// It was rejected.
    Rejected,
    /// It went its way.
    Untouched,
}

/// What becomes of the source address, and why.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rewrite {
    /// It becomes one of the node's: the policy wants it.
    ByPolicy,
    /// It becomes one of the node's: the endpoint is the source itself, and would answer itself
    /// directly otherwise.
    Hairpin,
    /// It stays.
    Kept,
}

impl Rewrite {
    /// Says whether the endpoint sees another address than the client's.
    #[must_use]
    pub const fn is_masquerade(self) -> bool {
        matches!(self, Self::ByPolicy | Self::Hairpin)
    }
}

/// Why something was decided.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum Reason {
    /// It is a port on which a Service has its health checked.
    HealthCheck,
    /// It is from elsewhere, for 127.0.0.0/8.
    LocalhostGuard,
    /// Nobody has an endpoint.
    NoEndpoints,
    /// No Service has this address, and no node port this port.
    NoFrontend,
    /// A Local policy excludes every endpoint there is.
    NoLocalEndpoints,
    /// There is such a node port, but not on this address.
    NodePortClosed,
    /// The mode does not look at what the node itself sends there.
    OwnTrafficUnchecked,
    /// The policy of the frontend for this origin.
    Policy {
        /// The frontend.
        kind: FrontendKind,
        /// The endpoints.
        pool: Pool,
        /// The source address.
        snat: Snat,
    },
    /// Session affinity.
    Remembered {
        /// The endpoint of the last connection.
        member: SocketAddr,
        /// How long ago it was.
        age: Duration,
    },
    /// The source is outside the Service's source ranges.
    SourceNotAllowed,
    /// No Service has this address, which is one of those that Services get.
    Unallocated,
    /// A Service has this address, but none this port of it.
    UnusedPort,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Forward { to } => {
                f.write_str("forward to")?;
                to.iter().try_for_each(|target| write!(f, " {target}"))
            }
            Self::Reject => f.write_str("reject"),
            Self::Untouched => f.write_str("untouched"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = match self.source {
            Rewrite::ByPolicy => " (masqueraded)",
            Rewrite::Hairpin => " (itself, masqueraded)",
            Rewrite::Kept => "",
        };
        write!(f, "{}{suffix}", self.addr)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HealthCheck => f.write_str("a Service has its health checked on this port"),
            Self::LocalhostGuard => f.write_str("127.0.0.0/8 is closed to all but the node"),
            Self::NoEndpoints => f.write_str("there is no endpoint anywhere"),
            Self::NoFrontend => f.write_str("no Service has this address and port"),
            Self::NoLocalEndpoints => f.write_str("the Local policy leaves no endpoint"),
            Self::NodePortClosed => f.write_str("node ports do not answer on this address"),
            Self::OwnTrafficUnchecked => {
                f.write_str("this mode does not look at what the node sends to other hosts")
            }
            Self::Policy { kind, pool, snat } => {
                let pool = match pool {
                    Pool::Cluster => "every endpoint of the cluster",
                    Pool::Local => "endpoints of this node",
                };
                let source = match snat {
                    Snat::Masquerade => "masqueraded",
                    Snat::Preserve => "source kept",
                };
                write!(f, "{kind}: {pool}, {source}")
            }
            Self::Remembered { member, age } => {
                write!(f, "session affinity: went to {member} {} s ago", age.as_secs())
            }
            Self::SourceNotAllowed => f.write_str("the source is outside loadBalancerSourceRanges"),
            Self::Unallocated => f.write_str("no Service has this address of the Service ranges"),
            Self::UnusedPort => f.write_str("no Service port of this address has this number"),
        }
    }
}

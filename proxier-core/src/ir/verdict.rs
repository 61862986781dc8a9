//! What happens to a packet, by where it comes from.

use std::fmt;

use serde::Serialize;

/// Where a packet comes from, as far as policy cares.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Origin {
    /// Anywhere else.
    External,
    /// This node: a source address that the kernel calls local.
    Node,
    /// A local pod, by the node's detector. Tested first.
    Pod,
}

/// Which endpoints a packet may use.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Pool {
    /// [`Fragment::cluster`](super::Fragment::cluster).
    Cluster,
    /// [`Fragment::local`](super::Fragment::local).
    Local,
}

/// What becomes of the source address of a forwarded packet.
///
/// A packet whose chosen endpoint is its own source is masqueraded in any case (hairpin).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Snat {
    /// It becomes one of the node's.
    Masquerade,
    /// It stays.
    Preserve,
}

/// What happens to the first packet of a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Verdict {
    /// Nothing, silently: another node has endpoints, so a load balancer should try there.
    Drop,
    /// It goes to a random member of the pool, which is not empty.
    Forward {
        /// The pool.
        pool: Pool,
        /// The source address.
        snat: Snat,
    },
    /// An ICMP port unreachable: there is no endpoint anywhere.
    Reject,
}

/// The verdict for each origin.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Verdicts {
    /// For local pods. Equal to `external` when the node has no detector.
    pub pod: Verdict,
    /// For the node itself.
    pub node: Verdict,
    /// For everyone else.
    pub external: Verdict,
}

impl Verdicts {
    /// The same verdict for every origin.
    #[must_use]
    pub const fn all(verdict: Verdict) -> Self {
        Self { pod: verdict, node: verdict, external: verdict }
    }

    /// The verdict for one origin.
    #[must_use]
    pub const fn of(&self, origin: Origin) -> Verdict {
        match origin {
            Origin::External => self.external,
            Origin::Node => self.node,
            Origin::Pod => self.pod,
        }
    }

    /// The rows, pod first.
    #[must_use]
    pub const fn rows(&self) -> [Verdict; 3] {
        [self.pod, self.node, self.external]
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Drop => "drop",
            Self::Forward { pool: Pool::Cluster, snat: Snat::Masquerade } => "cluster, masquerade",
            Self::Forward { pool: Pool::Cluster, snat: Snat::Preserve } => "cluster, source kept",
            Self::Forward { pool: Pool::Local, snat: Snat::Masquerade } => "local, masquerade",
            Self::Forward { pool: Pool::Local, snat: Snat::Preserve } => "local, source kept",
            Self::Reject => "reject",
        })
    }
}

//! Fragments, frontends and members.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use ipnet::IpNet;
use serde::Serialize;

use super::{Balance, Verdicts};
use crate::name::{Family, FragmentId, Protocol};

/// One Service port in one family: everything a backend has to know about it.
///
/// Fragments are values: equal fragments mean equal kernel objects.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Fragment {
    /// Whose it is.
    pub id: FragmentId,
    /// The ways in, sorted by kind and key. Keys of different fragments are disjoint;
    /// [`Store`](crate::model::Store) sees to it, and embedders with fragments of their own must.
    pub frontends: Vec<Frontend>,
    /// Endpoints of [`Pool::Cluster`](super::Pool::Cluster), sorted, no duplicates; empty when no
    /// verdict leads there.
    pub cluster: Vec<Member>,
    /// Endpoints of [`Pool::Local`](super::Pool::Local), likewise.
    pub local: Vec<Member>,
    /// A client stays with its endpoint until so many seconds pass without a new connection.
    pub affinity: Option<NonZeroU32>,
    /// How new connections are spread over a pool.
    pub balance: Balance,
    /// The IPVS scheduler that is asked for; other modes do not look at it.
    pub scheduler: Option<Arc<str>>,
    /// Its connections are to be counted, for [`Proxier::counters`](crate::Proxier::counters).
    pub counters: bool,
    /// The node answers health checks for this Service on this TCP port.
    pub health_check_node_port: Option<NonZeroU16>,
    /// For UDP: every endpoint that still serves, whether new flows may use it or not. Flows to
    /// any other endpoint are stale. Sorted; empty for other protocols.
    pub serving: Vec<SocketAddr>,
}

impl Fragment {
    /// A Service port with these frontends and endpoints of the cluster, and nothing out of the
    /// ordinary. Both have to be sorted.
    #[must_use]
    pub const fn new(id: FragmentId, frontends: Vec<Frontend>, cluster: Vec<Member>) -> Self {
        Self {
            id,
            frontends,
            cluster,
            local: Vec::new(),
            affinity: None,
            balance: Balance::Default,
            scheduler: None,
            counters: false,
            health_check_node_port: None,
            serving: Vec::new(),
        }
    }

    /// The members of a pool.
    #[must_use]
    pub fn pool(&self, pool: super::Pool) -> &[Member] {
        match pool {
            super::Pool::Cluster => &self.cluster,
            super::Pool::Local => &self.local,
        }
    }

    /// Every member of any pool, sorted, each once.
    #[must_use]
    pub fn reachable(&self) -> Vec<Member> {
        let mut all = Vec::with_capacity(self.cluster.len() + self.local.len());
        all.extend_from_slice(&self.cluster);
        all.extend_from_slice(&self.local);
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Says whether some members of one pool are to have more connections than others.
    #[must_use]
    pub fn is_weighted(&self) -> bool {
        let uneven = |members: &[Member]| {
            members.windows(2).any(|pair| matches!(pair, [a, b] if a.weight != b.weight))
        };
        uneven(&self.cluster) || uneven(&self.local)
    }

    /// The cluster IP's frontend.
    #[must_use]
    pub fn cluster_ip(&self) -> Option<&Frontend> {
        self.frontends.iter().find(|frontend| frontend.kind == FrontendKind::ClusterIp)
    }

    /// The frontends for traffic from outside the cluster.
    pub fn external(&self) -> impl Iterator<Item = &Frontend> {
        self.frontends.iter().filter(|frontend| frontend.kind != FrontendKind::ClusterIp)
    }
}

/// One way in.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Frontend {
    /// Why it exists.
    pub kind: FrontendKind,
    /// What packets to it look like.
    pub key: FrontendKey,
    /// Who may use it; `None` for anyone. Others are dropped, before anything else is decided.
    pub sources: Option<SourceFilter>,
    /// What happens.
    pub verdicts: Verdicts,
}

/// Why a frontend exists.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// `spec.externalIPs`.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    NodePort,
}

/// What packets to a frontend look like. No two fragments share one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct FrontendKey {
    /// Destination address.
    pub way_in: WayIn,
    /// Destination port.
    pub port: NonZeroU16,
    /// Protocol.
    pub protocol: Protocol,
}

/// The destination address of a frontend.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum WayIn {
    /// This one.
    Address(IpAddr),
    /// Any of the node's, as [`NodePorts`](super::NodePorts) says.
    Node(Family),
}

/// The sources that may use a frontend.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SourceFilter {
    /// Networks, in the order given.
    pub ranges: Vec<IpNet>,
    /// The Service's own load balancer addresses, where the node itself is in a range: the node's
    /// packets to an address that it holds carry that address as source.
    pub vips: Vec<IpAddr>,
}

impl SourceFilter {
    /// Says whether `source` may pass.
    #[must_use]
    pub fn admits(&self, source: IpAddr) -> bool {
        self.ranges.iter().any(|net| net.contains(&source)) || self.vips.contains(&source)
    }
}

/// One endpoint in a pool.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Member {
    /// Address and port.
    pub addr: SocketAddr,
    /// It runs on this node.
    pub local: bool,
    /// Its share of new connections, relative to the others in the pool: 1 to [`MAX_WEIGHT`].
    ///
    /// [`MAX_WEIGHT`]: super::MAX_WEIGHT
    pub weight: NonZeroU16,
}

impl Member {
    /// A member of weight 1.
    #[must_use]
    pub const fn new(addr: SocketAddr, local: bool) -> Self {
        Self { addr, local, weight: NonZeroU16::MIN }
    }
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::NodePort => "NodePort",
        })
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way_in, port, protocol } = self;
        match way_in {
            WayIn::Address(ip) => write!(f, "{}/{protocol}", SocketAddr::new(*ip, port.get())),
            WayIn::Node(family) => write!(f, "node:{port}/{protocol} ({family})"),
        }
    }
}

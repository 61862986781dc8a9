//! Which endpoints a Service port may use: a pure function shared by all backends.
//!
//! Follows section 5 of kube-proxy's behaviour (`pkg/proxy/topology.go`, `CategorizeEndpoints`,
//! v1.36).

use std::{net::SocketAddr, sync::Arc};

/// An endpoint of one Service port, merged from all its slices.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Candidate<'a> {
    /// Address and port; identifies the endpoint inside its Service port.
    pub addr: SocketAddr,
    /// On this node.
    pub local: bool,
    /// Ready for new connections.
    pub ready: bool,
    /// Able to answer.
    pub serving: bool,
    /// About to go.
    pub terminating: bool,
    /// Its share of new connections, relative to the others'; 0 for none.
    pub weight: u16,
    /// Zones that should use it.
    pub zone_hints: &'a [Arc<str>],
    /// Nodes that should use it.
    pub node_hints: &'a [Arc<str>],
}

/// What a Service port asks of the selection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// Some traffic may use the whole cluster's endpoints.
    pub cluster: bool,
    /// Some traffic may use this node's endpoints only.
    pub local: bool,
}

/// The selected endpoints, as indices into the candidates, ascending.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Selection {
    /// The Cluster set; `None` when not wanted.
    pub cluster: Option<Vec<usize>>,
    /// The Local set; `None` when not wanted.
    pub local: Option<Vec<usize>>,
    /// There is a usable endpoint somewhere. Without one traffic is rejected, with one that a
    /// Local policy excludes it is dropped.
    pub has_any: bool,
}

impl Selection {
    /// The union of the sets in use, ascending.
    #[must_use]
    pub fn reachable(&self) -> Vec<usize> {
        let mut all: Vec<_> = self.cluster.iter().chain(&self.local).flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// Selects among `candidates` for the node `node` in zone `zone` (each empty when unknown).
///
/// Candidates of weight 0 count as if they were not there. O(candidates).
#[must_use]
pub fn select(candidates: &[Candidate<'_>], wanted: Wanted, node: &str, zone: &str) -> Selection {
    if candidates.is_empty() {
        return Selection::default();
    }
    let mut selection = Selection::default();
    if wanted.cluster {
        let topology = Topology::of(candidates, node, zone);
        let cluster = pick(candidates, |it| topology.permits(it), |_| true);
        selection.has_any = !cluster.is_empty();
        selection.cluster = Some(cluster);
    }
    if wanted.local {
        let local = pick(candidates, |it| it.local, |it| it.local);
        selection.has_any |= candidates.iter().any(|it| it.weight > 0 && (it.ready || fading(it)));
        selection.local = Some(local);
    }
    selection
}

/// Serving and terminating: used when nothing is ready (KEP-1669).
const fn fading(candidate: &Candidate<'_>) -> bool {
    candidate.serving && candidate.terminating
}

/// The ready ones that `permits`; without any, the fading ones that `may_fall_back`.
fn pick(
    candidates: &[Candidate<'_>],
    permits: impl Fn(&Candidate<'_>) -> bool,
    may_fall_back: impl Fn(&Candidate<'_>) -> bool,
) -> Vec<usize> {
    let indices = |keep: &dyn Fn(&Candidate<'_>) -> bool| -> Vec<usize> {
        let kept = candidates.iter().enumerate().filter(|(_, it)| it.weight > 0 && keep(it));
        kept.map(|(index, _)| index).collect()
    };
    let ready = indices(&|it| it.ready && permits(it));
    if ready.is_empty() { indices(&|it| fading(it) && may_fall_back(it)) } else { ready }
}

/// How hints narrow the Cluster set.
enum Topology<'a> {
    Anywhere,
    Node(&'a str),
    Zone(&'a str),
}

impl<'a> Topology<'a> {
    // K8S: KEP-2433 and KEP-4444: hints count only when every ready endpoint has them and one of
    // them is for us; the mode is chosen once, without a second fallback.
    fn of(candidates: &[Candidate<'_>], node: &'a str, zone: &'a str) -> Self {
        let ready = || candidates.iter().filter(|it| it.ready && it.weight > 0);
        let usable = |hints: for<'c> fn(&Candidate<'c>) -> &'c [Arc<str>], name: &str| {
            !name.is_empty()
                && ready().all(|it| !hints(it).is_empty())
                && ready().any(|it| names(hints(it), name))
        };
        if usable(|it| it.node_hints, node) {
            Self::Node(node)
        } else if usable(|it| it.zone_hints, zone) {
            Self::Zone(zone)
        } else {
            Self::Anywhere
        }
    }

    fn permits(&self, candidate: &Candidate<'_>) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Node(node) => names(candidate.node_hints, node),
            Self::Zone(zone) => names(candidate.zone_hints, zone),
        }
    }
}

fn names(hints: &[Arc<str>], name: &str) -> bool {
    hints.iter().any(|hint| **hint == *name)
}

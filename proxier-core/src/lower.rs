//! From a Service port and its endpoints to a fragment. The verdict table is computed here and
//! nowhere else.

use std::{net::IpAddr, num::NonZeroU16, sync::Arc};

use crate::{
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, SourceFilter, Verdict,
        Verdicts, WayIn,
    },
    model::{NodeEnv, PortView},
    name::{FragmentId, Protocol},
    select::{Candidate, Selection, Wanted, select},
};

/// The identity of a Service port in a family.
#[must_use]
pub fn fragment_id(view: &PortView<'_>) -> FragmentId {
    FragmentId {
        service: view.service.name().clone(),
        port: Arc::clone(&view.port.name),
        protocol: view.port.protocol,
        family: view.family,
    }
}

/// The frontends a Service port asks for, sorted by kind, each key once.
///
/// When a Service lists one address twice, as external IP and as load balancer address, the
/// latter's source filter applies: what may be fenced is.
#[must_use]
pub fn frontends(view: &PortView<'_>) -> Vec<(FrontendKind, FrontendKey)> {
    let protocol = view.port.protocol;
    let key = |way_in, port: NonZeroU16| FrontendKey { way_in, port, protocol };
    let at = |ip: IpAddr| key(WayIn::Address(ip), view.port.port);
    let vips: Vec<_> = view.lb_vips().filter(|ip| *ip != view.cluster_ip).collect();
    let mut found = vec![(FrontendKind::ClusterIp, at(view.cluster_ip))];
    let plain = view.external_ips().filter(|ip| *ip != view.cluster_ip && !vips.contains(ip));
    found.extend(plain.map(|ip| (FrontendKind::ExternalIp, at(ip))));
    found.extend(vips.iter().map(|ip| (FrontendKind::LoadBalancer, at(*ip))));
    if let Some(port) = view.port.node_port {
        found.push((FrontendKind::NodePort, key(WayIn::Node(view.family), port)));
    }
    found.sort_unstable();
    found
}

/// Lowers a Service port. `owns` says which of its frontends no older Service claims.
///
/// O(frontends + candidates); candidates must be sorted by address, each address once.
#[must_use]
pub fn lower(
    view: &PortView<'_>,
    candidates: &[Candidate<'_>],
    env: &NodeEnv,
    owns: impl Fn(&FrontendKey) -> bool,
) -> Fragment {
    let wanted =
        Wanted { cluster: view.uses_cluster_endpoints(), local: view.uses_local_endpoints() };
    let selection = select(candidates, wanted, &env.name, &env.zone);
    let internal = internal_verdicts(view, &selection, env);
    let external = external_verdicts(view, &selection, env);
    let sources = source_filter(view, env);
    let mut frontends: Vec<_> = frontends(view)
        .into_iter()
        .filter(|(_, key)| owns(key))
        .map(|(kind, key)| Frontend {
            kind,
            key,
            sources: sources.clone().filter(|_| kind == FrontendKind::LoadBalancer),
            verdicts: if kind == FrontendKind::ClusterIp { internal } else { external },
        })
        .collect();
    // There are many fragments, and they stay.
    frontends.shrink_to_fit();
    let members = |indices: Option<Vec<usize>>| {
        let picked = indices.into_iter().flatten().filter_map(|index| candidates.get(index));
        let member = |it: &Candidate<'_>| Member {
            addr: it.addr,
            local: it.local,
            // Nobody of weight 0 is selected.
            weight: NonZeroU16::new(it.weight).unwrap_or(NonZeroU16::MIN),
        };
        let mut members: Vec<_> = picked.map(member).collect();
        members.shrink_to_fit();
        members
    };
    let mut serving = Vec::new();
    if view.port.protocol == Protocol::Udp {
        serving.extend(candidates.iter().filter(|it| it.serving).map(|it| it.addr));
        serving.shrink_to_fit();
    }
    Fragment {
        id: fragment_id(view),
        frontends,
        cluster: members(selection.cluster),
        local: members(selection.local),
        affinity: view.affinity(),
        balance: view.service.balance(),
        scheduler: view.service.scheduler().map(Arc::clone),
        counters: view.service.counters(),
        health_check_node_port: view.health_check_node_port(),
        serving,
    }
}

const fn forward(pool: Pool, snat: Snat) -> Verdict {
    Verdict::Forward { pool, snat }
}

fn is_empty(set: Option<&Vec<usize>>) -> bool {
    set.is_none_or(Vec::is_empty)
}

fn internal_verdicts(view: &PortView<'_>, selection: &Selection, env: &NodeEnv) -> Verdicts {
    if !selection.has_any {
        return Verdicts::all(Verdict::Reject);
    }
    let (pool, set) = if view.internal_local() {
        (Pool::Local, selection.local.as_ref())
    } else {
        (Pool::Cluster, selection.cluster.as_ref())
    };
    if is_empty(set) {
        return Verdicts::all(Verdict::Drop);
    }
    let masquerade = |needed| if needed { Snat::Masquerade } else { Snat::Preserve };
    let has_detector = env.detector(view.family).is_some();
    let pod = forward(pool, masquerade(env.masquerade_all));
    let other = forward(pool, masquerade(env.masquerade_all || has_detector));
    Verdicts { pod, node: other, external: other }
}

fn external_verdicts(view: &PortView<'_>, selection: &Selection, env: &NodeEnv) -> Verdicts {
    if !selection.has_any {
        return Verdicts::all(Verdict::Reject);
    }
    if !view.external_local() {
        return Verdicts::all(forward(Pool::Cluster, Snat::Masquerade));
    }
    let external = if is_empty(selection.local.as_ref()) {
        Verdict::Drop
    } else {
        forward(Pool::Local, Snat::Preserve)
    };
    // Pods and the node see what they would see if their traffic left and came back: the whole
    // cluster. Without a detector pods cannot be told from the rest.
    let pod = match env.detector(view.family) {
        Some(_) => forward(Pool::Cluster, Snat::Preserve),
        None => external,
    };
    Verdicts { pod, node: forward(Pool::Cluster, Snat::Masquerade), external }
}

fn source_filter(view: &PortView<'_>, env: &NodeEnv) -> Option<SourceFilter> {
    let ranges = view.source_ranges();
    if ranges.is_empty() {
        return None;
    }
    let node = env.ip(view.family);
    let covers_node = ranges.iter().any(|net| net.contains(&node));
    let vips = if covers_node { view.lb_vips().collect() } else { Vec::new() };
    Some(SourceFilter { ranges, vips })
}

//! Why a packet goes where it goes, for people and programs.
//!
//! [`explain`] asks the packet model ([`sim`](crate::sim)) and adds what only the Services know: which
//! endpoints were left out, and why. Nothing is read from the kernel. O(log n) in the number of
//! Services, O(endpoints) of the one that the packet meets.

use std::{fmt, net::SocketAddr, num::NonZeroU16, sync::Arc};

use serde::Serialize;

use crate::{
    ir::{Balance, Detector, Fragment, FrontendKind, Origin, Pool, SourceFilter},
    model::{PortView, Store},
    name::Family,
    proxier::{PlannedOp, Proxier},
    select::Candidate,
    sim::{Matched, Outcome, Packet, Reason, Sim, Target, Trace, Traits},
};

/// Why a packet goes where it goes.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Explanation {
    /// The packet.
    pub packet: Packet,
    /// Whose it is.
    pub matched: Option<Matched>,
    /// Where it comes from, as far as policy cares.
    pub origin: Origin,
    /// How that was told.
    pub origin_told_by: String,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Why, in the order of the decisions.
    pub reasons: Vec<String>,
    /// Who may use the frontend, where that is restricted.
    pub sources: Option<SourceFilter>,
    /// The policy that decided.
    pub policy: Option<String>,
    /// How connections are spread over the pool.
    pub balance: Balance,
    /// The weights of the endpoints in the pool, where they differ.
    pub weights: Vec<(SocketAddr, NonZeroU16)>,
    /// Every endpoint of the Service port that does not get the packet.
    pub left_out: Vec<LeftOut>,
    /// Why the source address changes, or why not (an endpoint that talks to itself apart); empty
    /// when nothing is forwarded.
    pub masquerade: String,
    /// The kernel objects that carry it out, as far as they are the Service port's own.
    pub kernel: Vec<PlannedOp>,
}

/// An endpoint that does not get the packet.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct LeftOut {
    /// The endpoint.
    pub addr: SocketAddr,
    /// Why.
    pub why: String,
}

/// Explains a packet, with what `store` last made of Services and slices. `proxier`, if there is
/// one, says which objects of its own carry it out.
#[must_use]
pub fn explain(
    store: &Store,
    traits: &Traits,
    packet: &Packet,
    proxier: Option<&dyn Proxier>,
) -> Explanation {
    let node = store.env().view();
    let Trace { origin, matched, outcome, reasons } =
        Sim::new(&node, traits, store).trace(packet, &[]);
    let mut explanation = Explanation {
        packet: packet.clone(),
        origin,
        origin_told_by: told_by(store, packet, origin),
        reasons: reasons.iter().map(ToString::to_string).collect(),
        sources: None,
        policy: None,
        balance: Balance::Default,
        weights: Vec::new(),
        left_out: Vec::new(),
        masquerade: String::new(),
        kernel: Vec::new(),
        matched: None,
        outcome,
    };
    let Some(matched) = matched else { return explanation };
    if let Some(proxier) = proxier {
        explanation.kernel = proxier.objects(&matched.id);
    }
    if let Some((fragment, frontend)) = store.frontend(&matched.key) {
        explanation.sources.clone_from(&frontend.sources);
        explanation.balance = fragment.balance;
        explanation.weights = weights(fragment, &explanation.outcome);
    }
    let service = store.service(&matched.id.service);
    let view = service.and_then(|service| {
        let mut views = service.views(matched.id.family);
        views.find(|view| {
            view.port.name == matched.id.port && view.port.protocol == matched.id.protocol
        })
    });
    if let Some(view) = view {
        let pool = reasons.iter().find_map(|reason| {
            if let Reason::Policy { pool, .. } = reason { Some(*pool) } else { None }
        });
        explanation.policy = Some(policy(&view, matched.kind, origin, pool));
        explanation.left_out = left_out(store, &view, pool, &explanation.outcome, &reasons);
        if let Outcome::Forward { .. } = explanation.outcome {
            explanation.masquerade = masquerade(store, &view, matched.kind, origin);
        }
    }
    explanation.matched = Some(matched);
    explanation
}

/// The weights of those who may get the packet, where they differ.
fn weights(fragment: &Fragment, outcome: &Outcome) -> Vec<(SocketAddr, NonZeroU16)> {
    let Outcome::Forward { to } = outcome else { return Vec::new() };
    let members = fragment.reachable();
    let mut weights: Vec<_> = members.iter().map(|member| (member.addr, member.weight)).collect();
    weights.retain(|(addr, _)| to.iter().any(|target| target.addr == *addr));
    let differ = weights.windows(2).any(|pair| matches!(pair, [(_, a), (_, b)] if a != b));
    if differ { weights } else { Vec::new() }
}

/// How the origin of a packet was told.
fn told_by(store: &Store, packet: &Packet, origin: Origin) -> String {
    let detector = store.env().detector(Family::of(packet.source));
    match (origin, detector) {
        (Origin::Pod, Some(Detector::Source(net))) => format!("its source is in {net}"),
        (Origin::Pod, Some(Detector::Interface(name))) => format!("it came in on {name}"),
        (Origin::Pod, Some(Detector::InterfacePrefix(prefix))) => {
            format!("it came in on an interface whose name starts with {prefix}")
        }
        (Origin::Pod | Origin::Node, None) | (Origin::Node, Some(_)) => {
            format!("{} is an address of the node", packet.source)
        }
        (Origin::External, None) => {
            "neither the node's; pods cannot be told apart without a detector".to_owned()
        }
        (Origin::External, Some(_)) => "neither a local pod's nor the node's".to_owned(),
    }
}

fn policy(view: &PortView<'_>, kind: FrontendKind, origin: Origin, pool: Option<Pool>) -> String {
    let (field, is_local) = match kind {
        FrontendKind::ClusterIp => ("internalTrafficPolicy", view.internal_local()),
        FrontendKind::ExternalIp | FrontendKind::LoadBalancer | FrontendKind::NodePort => {
            ("externalTrafficPolicy", view.external_local())
        }
    };
    let set = if is_local { "Local" } else { "Cluster" };
    let short_circuit = is_local && kind != FrontendKind::ClusterIp && origin != Origin::External;
    match (pool, short_circuit) {
        (Some(Pool::Cluster), true) => {
            format!("{field}={set}, which binds neither pods nor the node: every endpoint")
        }
        (Some(Pool::Cluster), false) => format!("{field}={set}: every endpoint"),
        (Some(Pool::Local), _) => format!("{field}={set}: endpoints of this node"),
        (None, _) => format!("{field}={set}"),
    }
}

/// The endpoints that do not get the packet, and why.
fn left_out(
    store: &Store,
    view: &PortView<'_>,
    pool: Option<Pool>,
    outcome: &Outcome,
    reasons: &[Reason],
) -> Vec<LeftOut> {
    let used: &[Target] = match outcome {
        Outcome::Forward { to } => to,
        Outcome::Accept | Outcome::Drop | Outcome::Reject | Outcome::Untouched => &[],
    };
    let candidates = store.candidates(view);
    let is_used = |it: &&Candidate<'_>| used.iter().any(|target| target.addr == it.addr);
    let no_local = reasons.contains(&Reason::NoLocalEndpoints);
    let local_only = pool == Some(Pool::Local) || no_local;
    let others = candidates.iter().filter(|it| !is_used(it));
    let (node, zone) = (&*store.env().name, &*store.env().zone);
    let why = |it: &Candidate<'_>| {
        if it.weight == 0 {
            "its weight is 0".to_owned()
        } else if local_only && !it.local {
            "not on this node".to_owned()
        } else if it.ready {
            excluded_by_hint(&candidates, it, node, zone)
        } else {
            match (it.serving, it.terminating) {
                (true, true) => "terminating, and others are ready",
                (false, true) => "terminating and not serving",
                (_, false) => "not ready",
            }
            .to_owned()
        }
    };
    others.map(|it| LeftOut { addr: it.addr, why: why(it) }).collect()
}

/// Which hint leaves a ready endpoint out; the frontend's own refusal if none does.
fn excluded_by_hint(
    candidates: &[Candidate<'_>],
    it: &Candidate<'_>,
    node: &str,
    zone: &str,
) -> String {
    let ready = || candidates.iter().filter(|it| it.ready && it.weight > 0);
    let names = |hints: &[Arc<str>], name: &str| hints.iter().any(|hint| **hint == *name);
    let list = |hints: &[Arc<str>]| hints.join(", ");
    let by_node =
        ready().all(|it| !it.node_hints.is_empty()) && ready().any(|it| names(it.node_hints, node));
    if by_node && !names(it.node_hints, node) {
        format!("node hint {} is not {node}", list(it.node_hints))
    } else if !by_node && !it.zone_hints.is_empty() && !names(it.zone_hints, zone) {
        format!("zone hint {} is not {zone}", list(it.zone_hints))
    } else {
        "the packet is not forwarded".to_owned()
    }
}

fn masquerade(store: &Store, view: &PortView<'_>, kind: FrontendKind, origin: Origin) -> String {
    let has_detector = store.env().detector(view.family).is_some();
    let reason = match (kind, origin) {
        (FrontendKind::ClusterIp, _) if store.env().masquerade_all => {
            "masqueraded: all traffic to cluster IPs is"
        }
        (FrontendKind::ClusterIp, Origin::Pod) => "kept: a local pod to a cluster IP",
        (FrontendKind::ClusterIp, _) if has_detector => {
            "masqueraded: to a cluster IP, not from a local pod"
        }
        (FrontendKind::ClusterIp, _) => "kept: without a detector nobody is a stranger",
        (_, Origin::Node) if view.external_local() => "masqueraded: the node's own traffic",
        (_, _) if view.external_local() => "kept: a Local policy keeps the source",
        (_, _) => "masqueraded: under a Cluster policy answers have to come back this way",
    };
    reason.to_owned()
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.matched {
            Some(Matched { id, key, kind }) => {
                writeln!(f, "matched   frontend {key} of {} ({kind})", id.port_text())?;
            }
            None => writeln!(f, "matched   no frontend")?,
        }
        let origin = match self.origin {
            Origin::External => "external",
            Origin::Node => "node",
            Origin::Pod => "pod",
        };
        writeln!(f, "origin    {origin} ({})", self.origin_told_by)?;
        if let Some(SourceFilter { ranges, vips }) = &self.sources {
            let nets = ranges.iter().map(ToString::to_string);
            let all: Vec<_> = nets.chain(vips.iter().map(ToString::to_string)).collect();
            writeln!(f, "fence     {} only", all.join(" "))?;
        }
        if let Some(policy) = &self.policy {
            writeln!(f, "policy    {policy}")?;
        }
        if let Outcome::Forward { to } = &self.outcome {
            write!(f, "pool      {} of {}:", to.len(), to.len() + self.left_out.len())?;
            for target in to {
                write!(f, " {target}{}", if target.local { "*" } else { "" })?;
                let weight = self.weights.iter().find(|(addr, _)| *addr == target.addr);
                weight.map_or(Ok(()), |(_, weight)| write!(f, " x{weight}"))?;
            }
            let has_local = to.iter().any(|target| target.local);
            writeln!(f, "{}", if has_local { "      (* on this node)" } else { "" })?;
        }
        if self.balance != Balance::Default && matches!(self.outcome, Outcome::Forward { .. }) {
            writeln!(f, "balance   {}", self.balance)?;
        }
        if !self.left_out.is_empty() {
            let each = self.left_out.iter().map(|it| format!("{} {}", it.addr, it.why));
            writeln!(f, "left out  {}", each.collect::<Vec<_>>().join(" · "))?;
        }
        if !self.masquerade.is_empty() {
            writeln!(f, "source    {}", self.masquerade)?;
        }
        let outcome = match self.outcome {
            Outcome::Accept => "let in",
            Outcome::Drop => "dropped",
            Outcome::Forward { .. } => "forwarded",
            Outcome::Reject => "rejected",
            Outcome::Untouched => "untouched",
        };
        writeln!(f, "outcome   {outcome}: {}", self.reasons.join("; "))?;
        let mut label = "kernel   ";
        for PlannedOp { object, after, .. } in &self.kernel {
            writeln!(f, "{label} {object}")?;
            after.lines().try_for_each(|line| writeln!(f, "            {line}"))?;
            label = "         ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::Engine,
        model::{DetectLocal, EndpointSlice, Event, NodeEnv, Service, api},
        proxier::Mode,
        testing::{FakeKernel, Toy},
    };

    fn store() -> Store {
        let mut store = Store::new(NodeEnv {
            name: "tern".into(),
            zone: "a".into(),
            interface_addresses: vec!["172.20.7.11".parse().unwrap()],
            detect_local: DetectLocal::ClusterCidr(vec!["10.61.0.0/16".parse().unwrap()]),
            ..NodeEnv::default()
        });
        let mut service = api::Service::default();
        (service.metadata.namespace, service.metadata.name) = ("shop".into(), "cart".into());
        service.spec.service_type = Some("NodePort".into());
        service.spec.external_traffic_policy = Some("Local".into());
        service.spec.cluster_ip = "10.97.0.21".into();
        service.spec.ports =
            vec![api::ServicePort { port: 80, node_port: 31000, ..api::ServicePort::default() }];
        let mut slice = api::EndpointSlice { address_type: "IPv4".into(), ..Default::default() };
        (slice.metadata.namespace, slice.metadata.name) = ("shop".into(), "cart-1".into());
        slice.metadata.labels.insert("kubernetes.io/service-name".into(), "cart".into());
        slice.ports = vec![api::EndpointPort {
            name: Some(String::new()),
            port: Some(8080),
            ..Default::default()
        }];
        let endpoint = |ip: &str, node: &str, ready, zone: &str| api::Endpoint {
            addresses: vec![ip.into()],
            node_name: Some(node.into()),
            conditions: api::EndpointConditions { ready: Some(ready), ..Default::default() },
            hints: api::EndpointHints {
                for_zones: vec![api::Hint { name: zone.into() }],
                ..Default::default()
            },
        };
        slice.endpoints = vec![
            endpoint("10.61.3.21", "tern", true, "a"),
            endpoint("10.61.4.21", "heron", true, "b"),
            endpoint("10.61.4.22", "heron", false, "a"),
        ];
        store.apply(Event::Services(Service::read(&service).value.into_iter().collect()));
        let slices = EndpointSlice::read(&slice).value.into_iter().collect();
        store.apply(Event::EndpointSlices(slices));
        store
    }

    #[tokio::test]
    async fn an_explanation_names_what_decided() {
        let mut store = store();
        let backend = Toy::new(true);
        let kernel = FakeKernel::new(&backend, 100);
        let mut engine = Engine::new(backend, kernel, &Family::ALL);
        engine.sync(store.take().unwrap()).await.unwrap();
        let packet = |source: &str, destination: &str| Packet {
            source: source.parse().unwrap(),
            input: Some("eth0".into()),
            destination: destination.parse().unwrap(),
            protocol: crate::Protocol::Tcp,
        };
        let text = |packet: &Packet| {
            explain(&store, &Traits::of(Mode::Nftables), packet, Some(&engine)).to_string()
        };
        let inside = text(&packet("10.61.3.21", "10.97.0.21:80"));
        for part in [
            "matched   frontend 10.97.0.21:80/TCP of shop/cart (ClusterIP)\n",
            "origin    pod (its source is in 10.61.0.0/16)\n",
            "policy    internalTrafficPolicy=Cluster: every endpoint\n",
            "pool      1 of 3: 10.61.3.21:8080 (itself, masqueraded)*      (* on this node)\n",
            "left out  10.61.4.21:8080 zone hint b is not a · 10.61.4.22:8080 not ready\n",
            "source    kept: a local pod to a cluster IP\n",
            "outcome   forwarded: ClusterIP: every endpoint of the cluster, source kept\n",
            "kernel    1 size 1\n",
        ] {
            assert!(inside.contains(part), "{part}\n{inside}");
        }
        let outside = text(&packet("192.0.2.1", "172.20.7.11:31000"));
        assert!(
            outside.contains("externalTrafficPolicy=Local: endpoints of this node"),
            "{outside}"
        );
        assert!(outside.contains("10.61.4.21:8080 not on this node"), "{outside}");
        let stray = text(&packet("192.0.2.1", "10.97.0.21:81"));
        assert!(stray.contains("matched   no frontend\n"), "{stray}");
        assert!(stray.contains("outcome   rejected"), "{stray}");
    }

    #[test]
    fn weights_are_shown_where_they_differ() {
        let mut store = store();
        let mut service = api::Service::default();
        (service.metadata.namespace, service.metadata.name) = ("shop".into(), "cart".into());
        service.spec.cluster_ip = "10.97.0.21".into();
        service.spec.ports = vec![api::ServicePort { port: 80, ..api::ServicePort::default() }];
        let annotations = [
            ("proxier.dev/endpoint-weights", "10.61.4.21=3, 10.61.4.22=0"),
            ("proxier.dev/balance", "source-hash"),
        ];
        service.metadata.annotations =
            annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        store.apply(Event::Services(Service::read(&service).value.into_iter().collect()));
        let mut slice = api::EndpointSlice { address_type: "IPv4".into(), ..Default::default() };
        (slice.metadata.namespace, slice.metadata.name) = ("shop".into(), "cart-1".into());
        slice.metadata.labels.insert("kubernetes.io/service-name".into(), "cart".into());
        slice.metadata.annotations.insert("proxier.dev/weight".into(), "2".into());
        slice.ports = vec![api::EndpointPort {
            name: Some(String::new()),
            port: Some(8080),
            ..Default::default()
        }];
        slice.endpoints = ["10.61.3.21", "10.61.4.21", "10.61.4.22"]
            .map(|ip| api::Endpoint { addresses: vec![ip.into()], ..Default::default() })
            .into();
        let slices = EndpointSlice::read(&slice).value.into_iter().collect();
        store.apply(Event::EndpointSlices(slices));
        let Some(_) = store.take() else { panic!("nothing to do") };
        let packet = Packet {
            source: "192.0.2.1".parse().unwrap(),
            input: Some("eth0".into()),
            destination: "10.97.0.21:80".parse().unwrap(),
            protocol: crate::Protocol::Tcp,
        };
        let text = explain(&store, &Traits::of(Mode::Nftables), &packet, None).to_string();
        for part in [
            "pool      2 of 3: 10.61.3.21:8080 (masqueraded) x2 10.61.4.21:8080 (masqueraded) x3\n",
            "balance   source-hash\n",
            "left out  10.61.4.22:8080 its weight is 0\n",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}

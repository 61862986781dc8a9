//! A packet model over the IR: what must become of the first packet of a connection, and why.
//!
//! This is the reference truth. Every backend is compared with it, and `explain`
//! is built on it. It knows fragments and the node, and of a mode only its documented [`Traits`];
//! it knows nothing of rules.

mod index;
mod outcome;
mod traits;

use std::{
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

pub use self::{
    index::{Index, Lookup},
    outcome::{Fate, Matched, Outcome, Reason, Rewrite, Target, Trace},
    traits::{Hairpin, Policy, Stray, Traits},
};
use crate::{
    ir::{
        Detector, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Member, NodePorts,
        NodeView, Origin, Pool, Snat, Verdict, WayIn,
    },
    name::{Family, FragmentId, Protocol},
};

/// The first packet of a connection, as it meets the node.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// The interface it came in on; `None` for the node's own packets.
    pub input: Option<Arc<str>>,
    /// Where it wants to go.
    pub destination: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

/// A connection that was made earlier.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Remembered {
    /// Who made it.
    pub client: IpAddr,
    /// Through which frontend.
    pub key: FrontendKey,
    /// Of which Service port.
    pub id: FragmentId,
    /// Where it went.
    pub member: SocketAddr,
    /// How long ago.
    pub age: Duration,
}

/// Decides about packets on one node.
#[derive(Debug)]
pub struct Sim<'a, L> {
    node: &'a NodeView,
    traits: &'a Traits,
    lookup: &'a L,
}

impl<'a, L: Lookup> Sim<'a, L> {
    /// A model of a node with these fragments.
    #[must_use]
    pub const fn new(node: &'a NodeView, traits: &'a Traits, lookup: &'a L) -> Self {
        Self { node, traits, lookup }
    }

    /// What becomes of a packet, and why. `memory` holds earlier connections, for session affinity.
    ///
    /// O(log n) in the number of fragments, O(members) in the size of the pool.
    #[must_use]
    pub fn trace(&self, packet: &Packet, memory: &[Remembered]) -> Trace {
        let family = Family::of(packet.destination.ip());
        let view = self.node.of(family);
        let origin = origin(view, packet);
        let mut trace =
            Trace { origin, matched: None, outcome: Outcome::Untouched, reasons: Vec::new() };
        let found = NonZeroU16::new(packet.destination.port())
            .filter(|_| family.has(&packet.source))
            .and_then(|port| self.find(view, family, packet, port));
        match found {
            Some(Found { fragment, frontend, answers }) => {
                trace.matched = Some(Matched::new(fragment, frontend));
                if answers {
                    self.forward(view, packet, (fragment, frontend), memory, &mut trace);
                } else {
                    refuse_where_closed(frontend, &mut trace);
                }
            }
            None => self.stray(view, family, packet, &mut trace),
        }
        self.guard(view, packet, &mut trace);
        trace
    }

    /// Closes 127.0.0.0/8 to what comes from elsewhere and was not forwarded.
    fn guard(&self, view: &FamilyView, packet: &Packet, trace: &mut Trace) {
        let ip = packet.destination.ip();
        let guarded = self.traits.guards_localhost && view.localhost_node_ports;
        let is_guarded = guarded && ip.is_ipv4() && ip.is_loopback();
        let forwarded = matches!(trace.outcome, Outcome::Forward { .. });
        if is_guarded && !packet.source.is_loopback() && !forwarded {
            trace.reasons.clear();
            trace.decide(Outcome::Drop, Reason::LocalhostGuard);
        }
    }

    fn find(
        &self,
        view: &FamilyView,
        family: Family,
        packet: &Packet,
        port: NonZeroU16,
    ) -> Option<Found<'a>> {
        let ip = packet.destination.ip();
        let key = |way_in| FrontendKey { way_in, port, protocol: packet.protocol };
        if let Some((fragment, frontend)) = self.lookup.frontend(&key(WayIn::Address(ip))) {
            return Some(Found { fragment, frontend, answers: true });
        }
        if !is_local(view, ip) {
            return None;
        }
        let (fragment, frontend) = self.lookup.frontend(&key(WayIn::Node(family)))?;
        let answers = self.node_ports_answer(view, ip);
        (answers || self.traits.refuses_everywhere).then_some(Found { fragment, frontend, answers })
    }

    /// Says whether node ports answer on an address of the node.
    fn node_ports_answer(&self, view: &FamilyView, ip: IpAddr) -> bool {
        if ip.is_loopback() {
            let here = match &view.node_ports {
                NodePorts::All => true,
                NodePorts::Listed(listed) => listed.contains(&ip),
            };
            return here && ip.is_ipv4() && self.traits.localhost && view.localhost_node_ports;
        }
        if !self.traits.link_local && matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return false;
        }
        match &view.node_ports {
            NodePorts::All => true,
            NodePorts::Listed(listed) => listed.contains(&ip),
        }
    }

    fn forward(
        &self,
        view: &FamilyView,
        packet: &Packet,
        (fragment, frontend): (&Fragment, &Frontend),
        memory: &[Remembered],
        trace: &mut Trace,
    ) {
        let verdict = self.verdict(view, fragment, frontend, trace.origin);
        if verdict == Verdict::Reject && !self.traits.filters_dead {
            return self.refuse(view, packet, (fragment, frontend), Refusal::Reject, trace);
        }
        if frontend.sources.as_ref().is_some_and(|filter| !filter.admits(packet.source)) {
            trace.decide(Outcome::Drop, Reason::SourceNotAllowed);
            return;
        }
        match verdict {
            Verdict::Drop => {
                self.refuse(view, packet, (fragment, frontend), Refusal::Drop, trace);
            }
            Verdict::Reject => {
                self.refuse(view, packet, (fragment, frontend), Refusal::Reject, trace);
            }
            Verdict::Forward { pool, snat } => {
                trace.reasons.push(Reason::Policy { kind: frontend.kind, pool, snat });
                let mut members: Vec<_> = fragment.pool(pool).to_vec();
                if let Some(timeout) = fragment.affinity
                    && let Some((member, age)) =
                        self.recall(packet, fragment, frontend, memory, timeout, &members)
                {
                    trace.reasons.push(Reason::Remembered { member: member.addr, age });
                    members = vec![member];
                }
                let to = members.iter().map(|member| self.target(packet, *member, snat)).collect();
                trace.outcome = Outcome::Forward { to };
            }
        }
    }

    /// The verdict of the table, unless the mode has its own way with Local policies.
    fn verdict(
        &self,
        view: &FamilyView,
        fragment: &Fragment,
        frontend: &Frontend,
        origin: Origin,
    ) -> Verdict {
        let verdict = frontend.verdicts.of(origin);
        if self.traits.policy == Policy::ByOrigin || verdict == Verdict::Reject {
            return verdict;
        }
        let external = frontend.verdicts.external;
        let is_local =
            matches!(external, Verdict::Drop | Verdict::Forward { pool: Pool::Local, .. });
        if !is_local {
            return verdict;
        }
        let snat = match verdict {
            Verdict::Forward { snat, .. } if frontend.kind == FrontendKind::ClusterIp => snat,
            Verdict::Drop
                if frontend.kind == FrontendKind::ClusterIp
                    && origin != Origin::Pod
                    && view.detector.is_some() =>
            {
                Snat::Masquerade
            }
            Verdict::Drop | Verdict::Forward { .. } | Verdict::Reject => Snat::Preserve,
        };
        if !fragment.local.is_empty() {
            Verdict::Forward { pool: Pool::Local, snat }
        } else if fragment.cluster.is_empty() {
            Verdict::Reject
        } else {
            Verdict::Forward { pool: Pool::Cluster, snat }
        }
    }

    /// Drops or rejects, unless the mode does not look at the packet.
    fn refuse(
        &self,
        view: &FamilyView,
        packet: &Packet,
        (_, frontend): (&Fragment, &Frontend),
        refusal: Refusal,
        trace: &mut Trace,
    ) {
        let leaves = packet.input.is_none() && !is_local(view, packet.destination.ip());
        if leaves && frontend.kind != FrontendKind::ClusterIp && !self.traits.refuses_own {
            trace.decide(Outcome::Untouched, Reason::OwnTrafficUnchecked);
        } else {
            refusal.tell(trace);
        }
    }

    /// The youngest connection of the client that session affinity still honours.
    fn recall(
        &self,
        packet: &Packet,
        fragment: &Fragment,
        frontend: &Frontend,
        memory: &[Remembered],
        timeout: NonZeroU32,
        members: &[Member],
    ) -> Option<(Member, Duration)> {
        let timeout = Duration::from_secs(timeout.get().into());
        let counts = |it: &&Remembered| {
            it.client == packet.source
                && it.id == fragment.id
                && it.age <= timeout
                && (!self.traits.affinity_by_frontend || it.key == frontend.key)
        };
        let known = memory.iter().filter(counts).filter_map(|it| {
            let member = members.iter().find(|member| member.addr == it.member)?;
            Some((*member, it.age))
        });
        known.min_by_key(|(_, age)| *age)
    }

    fn target(&self, packet: &Packet, member: Member, snat: Snat) -> Target {
        let recognised = self.traits.hairpin == Hairpin::Any || member.local;
        let source = if snat == Snat::Masquerade {
            Rewrite::ByPolicy
        } else if recognised && member.addr.ip() == packet.source {
            Rewrite::Hairpin
        } else {
            Rewrite::Kept
        };
        Target { addr: member.addr, local: member.local, source }
    }

    /// Decides about a packet that no frontend claims.
    fn stray(&self, view: &FamilyView, family: Family, packet: &Packet, trace: &mut Trace) {
        let ip = packet.destination.ip();
        let port = NonZeroU16::new(packet.destination.port());
        if is_local(view, ip) {
            let is_check = |port| self.lookup.has_health_check(family, port);
            if self.traits.lets_health_checks_in
                && packet.protocol == Protocol::Tcp
                && port.is_some_and(is_check)
            {
                return trace.decide(Outcome::Accept, Reason::HealthCheck);
            }
        }
        let (stray, reason) = match self.lookup.kind_of(ip) {
            Some(FrontendKind::ClusterIp) => (self.traits.unused_port, Reason::UnusedPort),
            Some(_) => (self.traits.unused_external_port, Reason::UnusedPort),
            None if view.service_cidrs.iter().any(|net| net.contains(&ip)) => {
                (self.traits.unallocated, Reason::Unallocated)
            }
            None => (Stray::Untouched, Reason::NoFrontend),
        };
        let outcome = match stray {
            Stray::Drop => Outcome::Drop,
            Stray::Reject => Outcome::Reject,
            Stray::Untouched => Outcome::Untouched,
        };
        trace.decide(outcome, reason);
    }
}

/// A frontend that a packet has come to.
struct Found<'a> {
    fragment: &'a Arc<Fragment>,
    frontend: &'a Frontend,
    /// It forwards here, and does not only refuse.
    answers: bool,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Refusal {
    Drop,
    Reject,
}

impl Refusal {
    fn tell(self, trace: &mut Trace) {
        match self {
            Self::Drop => trace.decide(Outcome::Drop, Reason::NoLocalEndpoints),
            Self::Reject => trace.decide(Outcome::Reject, Reason::NoEndpoints),
        }
    }
}

/// On an address where node ports do not answer, but refuse all the same: nothing was translated,
/// so that whoever sent the packet meets what outside clients meet.
fn refuse_where_closed(frontend: &Frontend, trace: &mut Trace) {
    match frontend.verdicts.external {
        Verdict::Drop => Refusal::Drop.tell(trace),
        Verdict::Reject => Refusal::Reject.tell(trace),
        Verdict::Forward { .. } => {
            trace.matched = None;
            trace.decide(Outcome::Untouched, Reason::NodePortClosed);
        }
    }
}

/// Where a packet comes from, as far as policy cares.
#[must_use]
pub fn origin(view: &FamilyView, packet: &Packet) -> Origin {
    let input = packet.input.as_deref();
    let is_pod = match &view.detector {
        Some(Detector::Interface(name)) => input == Some(name),
        Some(Detector::InterfacePrefix(prefix)) => {
            input.is_some_and(|input| input.starts_with(prefix))
        }
        Some(Detector::Source(net)) => net.contains(&packet.source),
        None => false,
    };
    if is_pod {
        Origin::Pod
    } else if is_local(view, packet.source) {
        Origin::Node
    } else {
        Origin::External
    }
}

/// Says whether the kernel calls an address local.
fn is_local(view: &FamilyView, ip: IpAddr) -> bool {
    ip.is_loopback() || view.addresses.contains(&ip)
}

#[cfg(test)]
mod tests;

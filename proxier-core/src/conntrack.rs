//! Which tracked UDP flows a change makes stale.
//!
//! A UDP client that keeps sending from one port keeps its conntrack entry alive, and with it the
//! endpoint that was chosen once. When that endpoint goes, the entry has to go too. TCP needs
//! nothing of the kind: its connections end by themselves.
//!
//! kube-proxy does this only when endpoints change and only while some endpoint serves
//! (`pkg/proxy/conntrack/cleanup.go`, v1.36); here a change of the Service and the loss of its last
//! endpoint count too.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use serde::Serialize;

use crate::{
    ir::{Fragment, FrontendKey, NodeView, WayIn},
    name::{Family, Protocol},
};

/// A tracked flow, as far as staleness goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Flow {
    /// Protocol.
    pub protocol: Protocol,
    /// Where the client sends to.
    pub destination: SocketAddr,
    /// Who answers. Equal to `destination` when nothing was translated.
    pub answered_by: SocketAddr,
}

/// Flows to one frontend that are answered by none of its endpoints.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct FlowFilter {
    /// Protocol.
    pub protocol: Protocol,
    /// Addresses clients send to; `None` for any address (a node port where the node's addresses
    /// are not known).
    pub destinations: Option<Vec<IpAddr>>,
    /// Port clients send to.
    pub port: NonZeroU16,
    /// Flows answered by one of these are fine. Sorted.
    pub keep: Vec<SocketAddr>,
}

impl FlowFilter {
    /// The flows to `key` that are not answered by one of `keep` (sorted).
    fn new(key: &FrontendKey, keep: Vec<SocketAddr>, node: &NodeView) -> Self {
        let destinations = match key.way_in {
            WayIn::Address(ip) => Some(vec![ip]),
            WayIn::Node(family) => {
                let known = &node.of(family).addresses;
                (!known.is_empty()).then(|| known.clone())
            }
        };
        Self { protocol: key.protocol, destinations, port: key.port, keep }
    }

    /// Says whether `flow` goes nowhere.
    #[must_use]
    pub fn is_stale(&self, flow: &Flow) -> bool {
        flow.protocol == self.protocol
            && flow.destination.port() == self.port.get()
            && self.destinations.as_ref().is_none_or(|ips| ips.contains(&flow.destination.ip()))
            && self.keep.binary_search(&flow.answered_by).is_err()
    }
}

/// Flows that were removed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Forgotten {
    /// How many.
    pub flows: usize,
    /// How long looking for them and removing them took.
    pub took: Duration,
}

/// The flows that become stale when a fragment changes from `old` to `new`.
///
/// Pure; O(frontends x serving endpoints). Nothing for protocols other than UDP.
#[must_use]
pub fn stale(old: Option<&Fragment>, new: Option<&Fragment>, node: &NodeView) -> Vec<FlowFilter> {
    let is_udp = |fragment: &&Fragment| fragment.id.protocol == Protocol::Udp;
    let (old, new) = (old.filter(is_udp), new.filter(is_udp));
    let mut found = Vec::new();
    if let Some(new) = new {
        let lost = |old: &Fragment| old.serving.iter().any(|it| !new.serving.contains(it));
        for frontend in &new.frontends {
            let known = old.is_some_and(|old| {
                old.frontends
                    .iter()
                    .any(|it| it.key == frontend.key && it.verdicts == frontend.verdicts)
            });
            if !known || old.is_some_and(lost) {
                found.push(FlowFilter::new(&frontend.key, new.serving.clone(), node));
            }
        }
    }
    if let Some(old) = old {
        let kept = |key| new.is_some_and(|new| new.frontends.iter().any(|it| it.key == key));
        let gone = old.frontends.iter().filter(|frontend| !kept(frontend.key));
        found.extend(gone.map(|frontend| FlowFilter::new(&frontend.key, Vec::new(), node)));
    }
    found
}

/// The family of a flow.
#[must_use]
pub const fn family_of(flow: &Flow) -> Family {
    Family::of(flow.destination.ip())
}

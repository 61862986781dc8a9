//! The pure half of the mode.

use std::{collections::BTreeMap, sync::Arc};

use ipnet::IpNet;
use proxier_core::{
    ByFamily, Capabilities, Count, Counter, Family, Mode, Protocol, Spreading,
    ir::{Balance, Fragment, Frontend, NodeView, Origin, Verdict},
    spi::{Backend, Objects, PlanError, Stage},
};

use crate::{
    config::{Capture, Config, ConfigError, Listen},
    object::{Item, Key, ORIGINS, Origins, Route, Service, SetName, Value, Way},
    skeleton::skeleton,
};

/// An operation of this mode.
pub(crate) type Op = proxier_core::spi::Op<Key, Value>;

/// The ports of the listeners that captured traffic goes to, on the loopback address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ports(ByFamily<[[u16; 3]; 2]>);

impl Default for Ports {
    /// Some ports, for plans without a process.
    fn default() -> Self {
        Self(ByFamily { v4: [[40_001, 40_002, 40_003]; 2], v6: [[40_001, 40_002, 40_003]; 2] })
    }
}

impl Ports {
    /// The port for a family, protocol and origin.
    #[must_use]
    pub fn of(&self, family: Family, protocol: Protocol, origin: Origin) -> u16 {
        let [tcp, udp] = self.0.of(family);
        let [pod, node, external] = if protocol == Protocol::Udp { udp } else { tcp };
        match origin {
            Origin::External => *external,
            Origin::Node => *node,
            Origin::Pod => *pod,
        }
    }

    /// Sets a port.
    pub(crate) fn set(&mut self, family: Family, protocol: Protocol, origin: Origin, to: u16) {
        let [tcp, udp] = self.0.of_mut(family);
        let [pod, node, external] = if protocol == Protocol::Udp { udp } else { tcp };
        *match origin {
            Origin::External => external,
            Origin::Node => node,
            Origin::Pod => pod,
        } = to;
    }
}

/// The pure half of the userspace mode: which routes and set elements a fragment needs.
#[derive(Debug)]
pub struct Userspace {
    capture: Option<Capture>,
    ports: Ports,
    capabilities: Capabilities,
}

impl Userspace {
    /// Makes the pure half, for listeners on these ports.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(config: &Config, ports: Ports) -> Result<Self, ConfigError> {
        config.validate()?;
        let capture = match &config.listen {
            Listen::Addresses(_) => None,
            Listen::Capture(capture) => Some(capture.clone()),
        };
        let mut limits = vec![
            "SCTP is refused.",
            "Every connection passes through the process and ends with it.",
        ];
        if capture.is_none() {
            limits.push(
                "Without kernel rules, what would be dropped is refused, and endpoints see an \
                 address of the node.",
            );
        }
        if capture.as_ref().is_some_and(Capture::redirects) {
            limits.push(
                "Traffic is redirected: endpoints see an address of the node, and UDP sessions end \
                 after 25 seconds of silence at the latest.",
            );
        }
        let capabilities = Capabilities {
            mode: Mode::Userspace,
            atomic: true,
            spreading: Spreading {
                balance: &[Balance::RoundRobin],
                weights: false,
                counters: true,
            },
            limits,
        };
        Ok(Self { capture, ports, capabilities })
    }
}

impl Backend for Userspace {
    type Key = Key;
    type Value = Value;
    type Memo = ();

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn skeleton(&self, family: Family, node: &NodeView) -> BTreeMap<Key, Value> {
        match &self.capture {
            Some(capture) => skeleton(capture, &self.ports, family, node.of(family)),
            None => {
                let view = node.of(family);
                let (detector, node) = (view.detector.clone(), view.addresses.clone());
                [(Key::Origins(family), Value::Origins(Origins { detector, node }))].into()
            }
        }
    }

    fn compile(
        &self,
        _: &NodeView,
        fragment: &Fragment,
        (): &(),
        out: &mut Objects<Key, Value>,
    ) -> Result<(), PlanError> {
        if fragment.id.protocol == Protocol::Sctp {
            return Err(PlanError::Unsupported {
                mode: Mode::Userspace.name(),
                reason: format!("{} is SCTP; TCP and UDP are proxied", fragment.id),
            });
        }
        let service = Service {
            cluster: fragment.cluster.clone(),
            local: fragment.local.clone(),
            affinity: fragment.affinity,
        };
        out.own(Key::Service(fragment.id.clone()), Value::Service(Arc::new(service)));
        for frontend in &fragment.frontends {
            let route = Route {
                service: fragment.id.clone(),
                kind: frontend.kind,
                sources: frontend.sources.clone(),
                verdicts: frontend.verdicts,
            };
            out.own(Key::Route(frontend.key), Value::Route(Arc::new(route)));
            if self.capture.is_some() {
                elements(frontend, |set, item| out.own(Key::Element(set, item), Value::Exists));
            }
        }
        Ok(())
    }

    fn recall(&self, _: &Fragment, _: &BTreeMap<Key, Value>) {}

    fn counters(
        &self,
        _: &NodeView,
        fragment: &Fragment,
        (): &(),
        read: &BTreeMap<Key, Count>,
    ) -> Vec<Counter> {
        let id = &fragment.id;
        let counter = |key, endpoint| {
            read.get(&key).map(|count| Counter { id: id.clone(), endpoint, count: *count })
        };
        let of_endpoint = |addr| counter(Key::Endpoint(id.clone(), addr), Some(addr));
        let endpoints = fragment.reachable().into_iter().filter_map(|it| of_endpoint(it.addr));
        counter(Key::Service(id.clone()), None).into_iter().chain(endpoints).collect()
    }

    fn stage(&self, key: &Key) -> Stage {
        match key {
            Key::Table(_) | Key::Set(..) | Key::Chain(..) | Key::Routing(_) => Stage::Base,
            Key::Origins(_) => Stage::Base,
            Key::Element(SetName::NodeAddresses, _) => Stage::Base,
            Key::Element(SetName::Frontends(_), _) => Stage::Entry,
            Key::Element(..) | Key::Endpoint(..) | Key::Route(_) | Key::Service(_) => Stage::Body,
        }
    }
}

/// The elements of a frontend.
fn elements(frontend: &Frontend, mut add: impl FnMut(SetName, Item)) {
    let (key, way) = (frontend.key, Way::of(&frontend.key));
    add(SetName::Frontends(way), Item::Frontend(key));
    for origin in ORIGINS {
        match frontend.verdicts.of(origin) {
            Verdict::Drop => add(SetName::Dropped(way, origin), Item::Frontend(key)),
            Verdict::Reject => add(SetName::Rejected(way, origin), Item::Frontend(key)),
            Verdict::Forward { .. } => {}
        }
    }
    if let Some(sources) = &frontend.sources {
        add(SetName::Fenced(way), Item::Frontend(key));
        let vips = sources.vips.iter().map(|ip| IpNet::from(*ip));
        let nets: Vec<_> = sources.ranges.iter().copied().chain(vips).collect();
        // KERNEL: a set of intervals takes none that overlap (net/netfilter/nft_set_pipapo.c, v6.12).
        for net in IpNet::aggregate(&nets) {
            add(SetName::Allowed(way), Item::Allowed(key, net));
        }
    }
}

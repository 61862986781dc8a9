//! The objects that exist whatever the Services are. Pure.
//!
//! A packet to a frontend goes from its hook to `classify`, which tells its origin, to `from-ORIGIN`,
//! which drops or rejects what the verdict table says, and from there to `capture-ORIGIN`, which hands
//! it to the listener of that origin: so the process knows the origin without asking anybody. The
//! node's own packets are marked instead, are routed to `lo` by that mark, and come back in.
//!
//! Where packets are redirected, both hooks are of destination NAT, which sees first packets only, and
//! `capture-ORIGIN` translates them, the node's own too.
//!
//! Another mode that translates addresses may be at work at the same time, while one is exchanged for
//! the other. What was captured is translated to where it goes anyway, before others are asked.

use std::{collections::BTreeMap, iter, net::IpAddr};

use proxier_core::{
    Family, Protocol,
    ir::{FamilyView, NodePorts, Origin},
};
use proxier_netlink::{
    gate::{MANGLE, RuleBuilder, classify, classify_own, enter},
    nft::Hook,
};

use crate::{
    backend::Ports,
    config::Capture,
    object::{Base, Chain, ChainName, Item, Key, Routing, Rule, SetName, Value, Way},
    rule::Capture as _,
};

/// Before everybody else's destination NAT.
// KERNEL: NF_IP_PRI_NAT_DST (include/uapi/linux/netfilter_ipv4.h, v6.12) is -100. The first NAT chain
// that says something about a connection has the say (net/netfilter/nf_nat_core.c nf_nat_inet_fn).
// A NAT chain of ours also keeps alive what another mode has translated: translation stops for all
// connections of a namespace with its last NAT chain.
const BEFORE_NAT: i32 = -101;
/// The objects of one family.
pub(crate) fn skeleton(
    capture: &Capture,
    ports: &Ports,
    family: Family,
    node: &FamilyView,
) -> BTreeMap<Key, Value> {
    let mut all = BTreeMap::new();
    all.insert(Key::Table(family), Value::Exists);
    let (mark, table) = (capture.mark(), capture.routing_table);
    let redirects = capture.redirects();
    if !redirects {
        let routing = Routing { mark, table, priority: capture.rule_priority };
        all.insert(Key::Routing(family), Value::Routing(routing));
    }
    for set in SetName::all() {
        all.insert(Key::Set(family, set), Value::Set(set.kind().shape(family, false)));
    }
    for ip in listed(node, family) {
        all.insert(Key::Element(SetName::NodeAddresses, Item::Address(ip)), Value::Exists);
    }
    let builder = Builder { mark, ports, family, node, redirects };
    for name in ChainName::all().filter(|name| !redirects || is_for_redirecting(name)) {
        let chain = Chain { base: base(&name, redirects), rules: builder.rules(&name) };
        all.insert(Key::Chain(family, name), Value::Chain(chain));
    }
    all
}

/// The listed addresses that node ports answer on.
fn listed(node: &FamilyView, family: Family) -> impl Iterator<Item = IpAddr> {
    let listed = match &node.node_ports {
        NodePorts::All => &[][..],
        NodePorts::Listed(listed) => listed,
    };
    let answers = move |ip: &IpAddr| {
        family.has(ip) && (!ip.is_loopback() || (ip.is_ipv4() && node.localhost_node_ports))
    };
    listed.iter().copied().filter(answers)
}

/// What is translated needs neither marks nor protection.
const fn is_for_redirecting(name: &ChainName) -> bool {
    use ChainName::{CaptureOwn, Keep, KeepOwn, Postrouting};
    !matches!(name, CaptureOwn | Keep | KeepOwn | Postrouting)
}

fn base(name: &ChainName, redirects: bool) -> Option<Base> {
    let (kind, hook, priority) = match name {
        ChainName::Output if redirects => ("nat", Hook::Output, BEFORE_NAT),
        ChainName::Prerouting if redirects => ("nat", Hook::Prerouting, BEFORE_NAT),
        ChainName::Keep => ("nat", Hook::Prerouting, BEFORE_NAT),
        ChainName::KeepOwn => ("nat", Hook::Output, BEFORE_NAT),
        ChainName::Output => ("route", Hook::Output, MANGLE),
        ChainName::Postrouting => ("filter", Hook::Postrouting, MANGLE),
        ChainName::Prerouting => ("filter", Hook::Prerouting, MANGLE),
        ChainName::Capture(_)
        | ChainName::CaptureOwn
        | ChainName::Classify(_)
        | ChainName::ClassifyOwn(_)
        | ChainName::Foreign(_)
        | ChainName::From(..)
        | ChainName::FromOwn(..) => return None,
    };
    Some(Base { kind: kind.to_owned(), hook: hook as u32, priority })
}

struct Builder<'a> {
    mark: u32,
    ports: &'a Ports,
    family: Family,
    node: &'a FamilyView,
    redirects: bool,
}

impl Builder<'_> {
    fn rules(&self, chain: &ChainName) -> Vec<Rule> {
        match chain {
            ChainName::Capture(origin) => self.capture(*origin),
            ChainName::CaptureOwn => vec![
                self.rule("remember the connection").protocol(Protocol::Tcp).set_ct_mark(self.mark),
                self.rule("route to this machine").set_mark(self.mark).accept(),
            ],
            ChainName::Classify(way) => {
                classify(self.family, self.node, |origin| ChainName::From(*way, origin))
            }
            ChainName::ClassifyOwn(way) => {
                classify_own(self.family, self.node, |origin| ChainName::FromOwn(*way, origin))
            }
            ChainName::Foreign(_) => Vec::new(),
            ChainName::From(way, origin) => {
                self.refuse(*way, *origin, &ChainName::Capture(*origin))
            }
            ChainName::FromOwn(way, origin) if self.redirects => {
                self.refuse(*way, *origin, &ChainName::Capture(*origin))
            }
            ChainName::FromOwn(way, origin) => self.refuse(*way, *origin, &ChainName::CaptureOwn),
            ChainName::Keep | ChainName::KeepOwn => {
                vec![self.captured("captured: it stays as it is").keep_destination()]
            }
            ChainName::Output => self.output(),
            ChainName::Postrouting => {
                // Others may take the bit for something else, such as "masquerade".
                let captured = self.captured("forget the mark").leaves_by("lo");
                vec![captured.clear_mark(self.mark).end()]
            }
            ChainName::Prerouting => self.prerouting(),
        }
    }

    fn prerouting(&self) -> Vec<Rule> {
        if self.redirects {
            return self.enter_all(ChainName::Classify);
        }
        let mut rules = vec![
            self.rule("translated by somebody else").translated().accept(),
            self.tcp("a connection we have").not_new().ours().set_mark(self.mark).accept(),
        ];
        rules.extend(self.enter_all(ChainName::Classify));
        // KERNEL: a UDP socket that answers for a frontend would be found before the listener, so
        // this comes last for UDP (net/ipv4/netfilter/nf_tproxy_ipv4.c, v6.12, asks for connected
        // sockets only). ICMP errors about our connections are found as well.
        rules.push(self.rule("an answer to us").ours().set_mark(self.mark).accept());
        rules
    }

    fn output(&self) -> Vec<Rule> {
        if self.redirects {
            let sent_by_us = self.captured("sent by us").accept();
            return iter::once(sent_by_us).chain(self.enter_all(ChainName::ClassifyOwn)).collect();
        }
        let known = self.tcp("a captured connection").ct_marked(self.mark).original();
        let mut rules = vec![
            self.rule("translated by somebody else").translated().accept(),
            self.rule("sent by us").transparent().accept(),
            known.set_mark(self.mark).accept(),
        ];
        rules.extend(self.enter_all(ChainName::ClassifyOwn));
        rules
    }

    fn enter_all(&self, next: fn(Way) -> ChainName) -> Vec<Rule> {
        Way::ALL.into_iter().flat_map(|way| self.enter(way, &next(way))).collect()
    }

    /// Packets to a frontend: closed to some sources, or on to their origin.
    fn enter(&self, way: Way, next: &ChainName) -> [Rule; 2] {
        let sets = [SetName::Fenced(way), SetName::Allowed(way), SetName::Frontends(way)];
        let to = |rule: RuleBuilder| match (way, &self.node.node_ports) {
            (Way::Address, _) => rule,
            (Way::NodePort, NodePorts::Listed(_)) => {
                rule.destination().lookup(SetName::NodeAddresses, false)
            }
            (Way::NodePort, NodePorts::All) if self.node.localhost_node_ports => {
                rule.local_destination()
            }
            (Way::NodePort, NodePorts::All) => rule.local_destination().not_to_loopback(),
        };
        enter(self.family, way, sets, to, next)
    }

    /// Drops and rejects new connections and all datagrams; the rest goes on.
    fn refuse(&self, way: Way, origin: Origin, next: &ChainName) -> Vec<Rule> {
        let (dropped, rejected) = (SetName::Dropped(way, origin), SetName::Rejected(way, origin));
        vec![
            self.tcp("a connection goes on").not_new().goto(next),
            self.rule("no endpoint here").frontend(way).lookup(dropped, false).drop(),
            self.rule("no endpoint").frontend(way).lookup(rejected, false).reject(),
            self.rule("an endpoint").goto(next),
        ]
    }

    fn capture(&self, origin: Origin) -> Vec<Rule> {
        let [tcp, udp] = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| self.ports.of(self.family, protocol, origin));
        if self.redirects {
            let at = self.node.addresses.iter().copied().find(is_for_everybody);
            return vec![
                self.tcp("to the listener").redirect(at, tcp),
                self.udp("to the listener").redirect(at, udp),
            ];
        }
        vec![
            self.tcp("to the listener").set_mark(self.mark).tproxy(tcp).accept(),
            self.udp("to the listener").set_mark(self.mark).tproxy(udp).accept(),
            // The client tries again, and by then there may be a process.
            self.rule("nobody listens").drop(),
        ]
    }

    fn rule(&self, text: &str) -> RuleBuilder {
        RuleBuilder::new(self.family, text)
    }

    fn tcp(&self, text: &str) -> RuleBuilder {
        self.rule(text).protocol(Protocol::Tcp)
    }

    fn udp(&self, text: &str) -> RuleBuilder {
        self.rule(text).protocol(Protocol::Udp)
    }

    /// A rule for packets with our mark.
    fn captured(&self, text: &str) -> RuleBuilder {
        self.rule(text).marked(self.mark, self.mark)
    }
}

/// Packets from anywhere can have it as their destination.
fn is_for_everybody(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !link_local
}

#[cfg(test)]
mod tests {
    use proxier_core::ir::Detector;
    use proxier_netlink::nft::{Expr, Verdict};

    use super::*;
    use crate::object::{ORIGINS, OWN_ORIGINS};

    #[test]
    fn every_chain_that_is_led_to_exists_and_names_are_short() {
        let node = FamilyView {
            detector: Some(Detector::Source("10.61.0.0/16".parse().unwrap())),
            ..FamilyView::default()
        };
        let all = skeleton(&Capture::default(), &Ports::default(), Family::V4, &node);
        let names: Vec<_> = ChainName::all().map(|name| name.to_string()).collect();
        let mut rules = 0;
        for value in all.values() {
            let Value::Chain(chain) = value else { continue };
            rules += chain.rules.len();
            for expr in chain.rules.iter().flat_map(|rule| &rule.exprs) {
                if let Expr::Verdict(Verdict::Goto(to)) = expr {
                    assert!(names.contains(&to.to_string()), "{to}");
                }
            }
        }
        assert_eq!(rules, 78);
        let sets = SetName::all().map(|set| set.to_string());
        assert!(names.into_iter().chain(sets).all(|name| name.len() <= 28));
        assert_eq!(
            ChainName::all().count(),
            3 + 1 + 2 + 3 + 2 * (2 + ORIGINS.len() + OWN_ORIGINS.len())
        );
    }
}

//! The objects that exist whatever the Services are. Pure.
//!
//! A packet to a frontend goes from its hook to `classify`, which tells its origin, and to
//! `from-ORIGIN`, which drops or rejects what the verdict table says, notes in the connection's mark
//! whether it is masqueraded, and marks the packet where a virtual server is known by its mark. All
//! this is before the kernel's virtual servers see the packet, which they do on its way in, or on its
//! way out of the node's own processes.

use std::{collections::BTreeMap, net::IpAddr};

use proxier_core::{
    Family, Protocol,
    ir::{FamilyView, NodePorts, Origin},
};
use proxier_netlink::{
    gate::{MANGLE, RuleBuilder, classify, classify_own, enter},
    nft::{Expr, Hook, MetaKey, NatFlags, PayloadBase, Reg, SetRef},
};

use crate::{
    config::Config,
    mark,
    object::{Base, Chain, ChainName, Item, Key, Rule, SetName, Value, Way},
};

// KERNEL: NF_IP_PRI_NAT_SRC (include/uapi/linux/netfilter_ipv4.h, v6.12); the same for IPv6.
const NAT_SRC: i32 = 100;
/// The objects of one family.
pub(crate) fn skeleton(config: &Config, family: Family, node: &FamilyView) -> BTreeMap<Key, Value> {
    let mut all = BTreeMap::new();
    all.insert(Key::Table(family), Value::Exists);
    all.insert(Key::Link(family), Value::Exists);
    for set in SetName::all() {
        all.insert(Key::Set(family, set), Value::Set(set.kind().shape(family, set.is_map())));
    }
    for ip in listed(node, family) {
        all.insert(Key::Element(SetName::NodeAddresses, Item::Address(ip)), Value::Exists);
    }
    let builder = Builder { config, family, node };
    for name in ChainName::all() {
        let chain = Chain { base: base(&name), rules: builder.rules(&name) };
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
    listed.iter().copied().filter(move |ip| family.has(ip) && !ip.is_loopback())
}

fn base(name: &ChainName) -> Option<Base> {
    let (kind, hook, priority) = match name {
        ChainName::Leaving => ("filter", Hook::Postrouting, MANGLE),
        ChainName::Masquerade => ("nat", Hook::Postrouting, NAT_SRC),
        ChainName::Output => ("filter", Hook::Output, MANGLE),
        ChainName::Prerouting => ("filter", Hook::Prerouting, MANGLE),
        ChainName::Classify(_)
        | ChainName::ClassifyOwn(_)
        | ChainName::Foreign(_)
        | ChainName::From(..) => return None,
    };
    Some(Base { kind: kind.to_owned(), hook: hook as u32, priority })
}

struct Builder<'a> {
    config: &'a Config,
    family: Family,
    node: &'a FamilyView,
}

impl Builder<'_> {
    fn rules(&self, chain: &ChainName) -> Vec<Rule> {
        match chain {
            ChainName::Classify(way) => {
                classify(self.family, self.node, |origin| ChainName::From(*way, origin))
            }
            ChainName::ClassifyOwn(way) => {
                classify_own(self.family, self.node, |origin| ChainName::From(*way, origin))
            }
            ChainName::Foreign(_) => Vec::new(),
            ChainName::From(way, origin) => self.from(*way, *origin),
            ChainName::Leaving => {
                let rule = self.rule("the mark has done its work");
                let ours = rule.marked(!((1 << mark::BITS) - 1), self.config.mark_base);
                vec![unmark(ours)]
            }
            ChainName::Masquerade => self.masquerade(),
            ChainName::Output => self.enter_all(ChainName::ClassifyOwn),
            ChainName::Prerouting => self.enter_all(ChainName::Classify),
        }
    }

    fn enter_all(&self, classify: fn(Way) -> ChainName) -> Vec<Rule> {
        let connection =
            self.rule("a connection goes on").not_protocol(Protocol::Udp).not_new().accept();
        let mut rules = vec![connection];
        for way in Way::ALL {
            rules.extend(self.enter(way, &classify(way)));
        }
        // The addresses are this machine's: its daemons must not answer there.
        let unused = self.rule("an unused port").destination().lookup(SetName::Addresses, false);
        rules.push(unused.begins().reject());
        rules
    }

    /// Packets to a frontend: closed to some sources, or on to their origin.
    fn enter(&self, way: Way, next: &ChainName) -> [Rule; 2] {
        let sets = [SetName::Fenced(way), SetName::Allowed(way), SetName::Frontends(way)];
        let to = |rule: RuleBuilder| match (way, &self.node.node_ports) {
            (Way::Address, _) => rule,
            (Way::NodePort, NodePorts::Listed(_)) => {
                rule.destination().lookup(SetName::NodeAddresses, false)
            }
            // The addresses of Services are this machine's, too.
            (Way::NodePort, NodePorts::All) => {
                let rule = rule.local_destination().destination();
                rule.lookup(SetName::Addresses, true).not_to_loopback()
            }
        };
        enter(self.family, way, sets, to, next)
    }

    /// What becomes of packets from an origin; the rest is up to the virtual server.
    fn from(&self, way: Way, origin: Origin) -> Vec<Rule> {
        let (masquerade, proxied) = self.config.bits();
        let (dropped, rejected) = (SetName::Dropped(way, origin), SetName::Rejected(way, origin));
        let by_policy = SetName::Masquerade(way, origin);
        let mut rules = vec![
            self.rule("no endpoint here").frontend(way).lookup(dropped, false).begins().drop(),
            self.rule("no endpoint").frontend(way).lookup(rejected, false).begins().reject(),
            self.rule("proxied").begins().set_ct_mark(proxied),
            self.rule("to be masqueraded")
                .frontend(way)
                .lookup(by_policy, false)
                .begins()
                .set_ct_mark(masquerade),
        ];
        if origin == Origin::Node {
            // The kernel takes a Service's address as source when it calls the Service, as it is
            // local: answers to it would never come back from another node.
            let own = self.rule("a source that is everywhere").source();
            let own = own.lookup(SetName::Addresses, false).begins();
            rules.push(own.set_ct_mark(masquerade));
        }
        let marks = SetName::Marks(way, origin);
        rules.push(set_mark_from(self.rule("to a server by mark").frontend(way), marks));
        rules.push(self.rule("to a server").accept());
        rules
    }

    fn masquerade(&self) -> Vec<Rule> {
        let (by_policy, proxied) = self.config.bits();
        vec![
            masquerade(self.rule("by policy").ct_marked(by_policy | proxied)),
            masquerade(self.to_itself(self.rule("to itself").ct_marked(proxied))),
        ]
    }

    fn rule(&self, text: &str) -> RuleBuilder {
        RuleBuilder::new(self.family, text)
    }

    /// A rule for packets whose source is the endpoint that was chosen.
    fn to_itself(&self, rule: RuleBuilder) -> RuleBuilder {
        let (slots, offset, len) = match self.family {
            Family::V4 => (1, 16, 4),
            Family::V6 => (4, 24, 16),
        };
        let rule = rule.source().payload(PayloadBase::NETWORK, offset, len, Reg::slot(slots));
        rule.lookup(SetName::Hairpin, false)
    }
}

/// Takes the mark off.
fn unmark(rule: RuleBuilder) -> Rule {
    rule.push(Expr::Immediate { dreg: Reg::R1, value: vec![0; 4].into() })
        .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
        .end()
}

/// Gives the packet the mark that a map has for what was loaded.
fn set_mark_from(rule: RuleBuilder, set: SetName) -> Rule {
    let set = SetRef { name: set.to_string().into(), id: None };
    rule.push(Expr::Lookup { set, sreg: Reg::R1, dreg: Some(Reg::R1), invert: false })
        .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
        .end()
}

fn masquerade(rule: RuleBuilder) -> Rule {
    rule.push(Expr::Masquerade { flags: NatFlags::FULLY_RANDOM, ports: None }).end()
}

#[cfg(test)]
mod tests {
    use proxier_core::ir::Detector;
    use proxier_netlink::nft::Verdict;

    use super::*;

    #[test]
    fn every_chain_that_is_led_to_exists_and_names_are_short() {
        let node = FamilyView {
            detector: Some(Detector::Source("10.61.0.0/16".parse().unwrap())),
            ..FamilyView::default()
        };
        let all = skeleton(&Config::default(), Family::V4, &node);
        let names: Vec<_> = ChainName::all().map(|name| name.to_string()).collect();
        let sets: Vec<_> = SetName::all().map(|set| set.to_string()).collect();
        for value in all.values() {
            let Value::Chain(chain) = value else { continue };
            for expr in chain.rules.iter().flat_map(|rule| &rule.exprs) {
                if let Expr::Verdict(Verdict::Goto(to)) = expr {
                    assert!(names.contains(&to.to_string()), "{to}");
                }
                if let Expr::Lookup { set, .. } = expr {
                    assert!(sets.contains(&set.name.to_string()), "{set:?}");
                }
            }
        }
        let mut distinct: Vec<_> = names.iter().chain(&sets).collect();
        assert!(distinct.iter().all(|name| name.len() <= 28));
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() >= names.len().max(sets.len()));
    }
}

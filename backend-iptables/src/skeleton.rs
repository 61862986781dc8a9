//! What exists whatever the Services are. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use proxier_core::{
    Family,
    ir::{FamilyView, NodePorts},
};

use crate::{
    config::Config,
    names::{ChainName, FixedNames},
    object::{BaseChain, ChainKind, Content, Key, Place, RulesBuilder, Table, Value},
    rule::{CtStates, MarkMatch, Matches, Net, Side, Target},
};

/// A jump from a built-in chain to one of ours.
pub(crate) struct Jump {
    pub(crate) from: BaseChain,
    pub(crate) matches: Matches<'static>,
    pub(crate) to: ChainName,
}

impl Jump {
    pub(crate) fn key(&self, family: Family) -> Key {
        Key::jump(family, self.from, &self.matches)
    }
}

/// The jumps from built-in chains, in the order in which each is put at the head when it is missing.
// K8S: pkg/proxy/iptables/proxier.go iptablesJumpChains, v1.36; texts and order are what people and
// tools know.
pub(crate) fn jumps(names: &FixedNames) -> Vec<Jump> {
    use BaseChain::{
        FilterForward, FilterInput, FilterOutput, NatOutput, NatPostrouting, NatPrerouting,
    };
    const EXTERNAL: &str = "kubernetes externally-visible service portals";
    const FIREWALL: &str = "kubernetes load balancer firewall";
    const FORWARD: &str = "kubernetes forwarding rules";
    const HEALTH: &str = "kubernetes health check service ports";
    const POSTROUTING: &str = "kubernetes postrouting rules";
    const SERVICES: &str = "kubernetes service portals";

    let jump = |from, to, comment| Jump {
        from,
        to,
        matches: Matches { comment: Some(comment), ..Matches::default() },
    };
    let new = |from, to, comment| {
        let jump = jump(from, to, comment);
        let ct_state = Some(CtStates::is(CtStates::NEW));
        Jump { matches: Matches { ct_state, ..jump.matches }, ..jump }
    };
    let firewall = |from| Jump {
        from,
        to: names.firewall,
        matches: Matches { owned: true, ..Matches::default() },
    };
    vec![
        new(FilterInput, names.external_services, EXTERNAL),
        new(FilterForward, names.external_services, EXTERNAL),
        jump(FilterInput, names.node_ports, HEALTH),
        new(FilterForward, names.services, SERVICES),
        new(FilterOutput, names.services, SERVICES),
        jump(FilterForward, names.forward, FORWARD),
        new(FilterInput, names.proxy_firewall, FIREWALL),
        new(FilterOutput, names.proxy_firewall, FIREWALL),
        new(FilterForward, names.proxy_firewall, FIREWALL),
        jump(NatOutput, names.services, SERVICES),
        jump(NatPrerouting, names.services, SERVICES),
        jump(NatPostrouting, names.postrouting, POSTROUTING),
        firewall(FilterInput),
        firewall(FilterOutput),
    ]
}

/// The objects of one family.
pub(crate) fn skeleton(
    config: &Config,
    names: &FixedNames,
    family: Family,
    node: &FamilyView,
) -> BTreeMap<Key, Value> {
    let mut all = BTreeMap::new();
    let guarded = localhost(family, node);
    for table in Table::ALL {
        all.insert(Key::table_key(family, table), Value(Content::Exists));
    }
    for chain in BaseChain::ALL {
        all.insert(Key::base(family, chain), Value(Content::Exists));
    }
    for (table, name) in shared_chains(names, guarded) {
        all.insert(Key::chain(family, table, ChainKind::Fixed, name), Value(Content::Shared));
    }
    for (table, name, rules) in fixed_chains(config, names) {
        all.insert(Key::chain(family, table, ChainKind::Fixed, name), rules);
    }
    for jump in jumps(names) {
        if guarded || jump.to != names.firewall {
            let to = Target::Jump(jump.to.as_str());
            all.insert(jump.key(family), Value::entry(&to, Place::Head));
        }
    }
    node_port_rules(&mut all, names, family, node);
    if guarded {
        let key = Key::entry(family, Table::Filter, names.firewall, &localhost_guard());
        all.insert(key, Value::entry(&Target::Drop, Place::Head));
    }
    all
}

/// Chains whose rules are objects of their own.
pub(crate) fn shared_chains(names: &FixedNames, guarded: bool) -> Vec<(Table, ChainName)> {
    let mut all = vec![
        (Table::Filter, names.services),
        (Table::Filter, names.external_services),
        (Table::Filter, names.node_ports),
        (Table::Filter, names.proxy_firewall),
        (Table::Nat, names.services),
        (Table::Nat, names.node_ports),
    ];
    if guarded {
        all.push((Table::Filter, names.firewall));
    }
    all
}

/// Chains whose rules are always the same.
fn fixed_chains(config: &Config, names: &FixedNames) -> [(Table, ChainName, Value); 3] {
    let mark = config.mark();
    let none = Matches::default();
    let marked = |not| Matches { mark: Some(MarkMatch { not, value: mark, mask: mark }), ..none };
    let comment = |text| Matches { comment: Some(text), ..none };

    let mut mark_masq = RulesBuilder::new(&names.mark_masq);
    // This rule carries our mark: a kube-proxy that takes over rewrites it, which tells us.
    let ours = Matches { owned: true, ..none };
    mark_masq.push(&ours, &Target::Mark { value: mark, mask: mark });

    let mut postrouting = RulesBuilder::new(&names.postrouting);
    postrouting.push(&marked(true), &Target::Return);
    postrouting.push(&none, &Target::Mark { value: mark, mask: 0 });
    let snat = comment("kubernetes service traffic requiring SNAT");
    postrouting.push(&snat, &Target::Masquerade { random_fully: config.random_fully });

    let mut forward = RulesBuilder::new(&names.forward);
    let states = |mask| Some(CtStates::is(mask));
    if config.drop_invalid {
        let invalid = Matches { ct_state: states(CtStates::INVALID), ..none };
        forward.push(&invalid, &Target::Drop);
    }
    let accepted = comment("kubernetes forwarding rules");
    forward.push(&Matches { mark: marked(false).mark, ..accepted }, &Target::Accept);
    let known = comment("kubernetes forwarding conntrack rule");
    let ct_state = states(CtStates::RELATED | CtStates::ESTABLISHED);
    forward.push(&Matches { ct_state, ..known }, &Target::Accept);
    [
        (Table::Nat, names.mark_masq, mark_masq.build()),
        (Table::Nat, names.postrouting, postrouting.build()),
        (Table::Filter, names.forward, forward.build()),
    ]
}

/// The comment of the rules at the end of nat `KUBE-SERVICES`.
pub(crate) const NODE_PORTS: &str =
    "kubernetes service nodeports; NOTE: this must be the last rule in this chain";

fn node_port_rules(
    all: &mut BTreeMap<Key, Value>,
    names: &FixedNames,
    family: Family,
    node: &FamilyView,
) {
    let base = Matches { comment: Some(NODE_PORTS), ..Matches::default() };
    let to = Target::Jump(names.node_ports.as_str());
    let mut add = |matches: &Matches<'_>| {
        let key = Key::entry(family, Table::Nat, names.services, matches);
        all.insert(key, Value::entry(&to, Place::Tail));
    };
    match &node.node_ports {
        NodePorts::All => {
            let destination = (!localhost(family, node)).then(|| Net::is_not(loopback(family)));
            add(&Matches { destination, local: Some(Side::Destination), ..base });
        }
        NodePorts::Listed(addresses) => {
            let served = |ip: &&IpAddr| !ip.is_loopback() || localhost(family, node);
            for ip in addresses.iter().filter(served) {
                let destination = Some(Net::is(IpNet::from(*ip)));
                add(&Matches { destination, ..base });
            }
        }
    }
}

/// Says whether node ports answer on 127.0.0.0/8; IPv6 cannot.
const fn localhost(family: Family, node: &FamilyView) -> bool {
    matches!(family, Family::V4) && node.localhost_node_ports
}

/// The loopback network.
fn loopback(family: Family) -> IpNet {
    let (ip, len): (IpAddr, u8) = match family {
        Family::V4 => (Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        Family::V6 => (Ipv6Addr::LOCALHOST.into(), 128),
    };
    IpNet::new_assert(ip, len)
}

/// Keeps others from reaching 127.0.0.0/8, which `route_localnet` opens.
fn localhost_guard() -> Matches<'static> {
    let loopback = loopback(Family::V4);
    Matches {
        comment: Some("block incoming localnet connections"),
        owned: true,
        source: Some(Net::is_not(loopback)),
        destination: Some(Net::is(loopback)),
        ct_state: Some(CtStates {
            not: true,
            mask: CtStates::RELATED | CtStates::ESTABLISHED | CtStates::DNAT,
        }),
        ..Matches::default()
    }
}

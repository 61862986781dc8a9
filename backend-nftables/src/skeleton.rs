//! What exists whatever the Services are: sets, chains and their rules. Pure.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use proxier_core::{
    Family, Protocol,
    ir::{Detector, FamilyView, NodePorts, Origin, Pool},
};
use proxier_netlink::nft::{CtState, Verdict};

use crate::{
    config::Config,
    field::{Field, Side},
    object::{
        AddressKind, Chain, ChainName, Content, Element, Hook, Key, Object, Pick, Says, SetName,
        Size, Space, Value,
    },
    rule::{Interface, Rule, RuleBuilder},
    sets::frontend,
};

/// Longest name of an interface.
// KERNEL: IFNAMSIZ less the NUL (include/uapi/linux/if.h, v6.12).
const INTERFACE_BYTES: usize = 15;

/// The objects that exist whatever the Services are.
pub(crate) fn skeleton(config: &Config, family: Family, node: &FamilyView) -> BTreeMap<Key, Value> {
    let mut out = BTreeMap::new();
    let mut add = |object, value| out.insert(Key::new(family, object), value);
    add(Object::Table, Value::EXISTS);
    for set in SetName::fixed().filter(|set| !matches!(set, SetName::Affinity(_))) {
        add(Object::Set(set), Value::EXISTS);
    }
    for size in Size::usual() {
        let (space, pool) = (Space::Service, Pool::Cluster);
        add(Object::Set(SetName::Size(space, pool, size)), Value::EXISTS);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for pick in Pick::turns(space, pool, size, protocol) {
                add(Object::Pick(pick), Value::EXISTS);
            }
        }
    }
    let rules = Rules { mark: config.mark(), captured: config.captured(), family, node };
    for name in ChainName::fixed() {
        let rules = rules.of(name);
        add(Object::Chain(name), Value(Content::Chain(Arc::new(Chain { comment: None, rules }))));
    }
    if let NodePorts::Listed(listed) = &node.node_ports {
        for ip in listed.iter().filter(|ip| !is_closed_loopback(**ip, node)) {
            add(Object::Element(Element::NodeAddress(*ip)), Value::EXISTS);
        }
    }
    out
}

/// Says whether node ports never answer on an address, being loopback.
fn is_closed_loopback(ip: IpAddr, node: &FamilyView) -> bool {
    ip.is_loopback() && !(ip.is_ipv4() && node.localhost_node_ports)
}

/// The rule that serves frontends whose pool has so many endpoints.
pub(crate) fn pick(family: Family, pick: Pick) -> Rule {
    let Pick { space, pool, size, protocol, .. } = pick;
    let key = frontend(space);
    let slot = [key, &[Field::Random(pick.modulus())]].concat();
    // `nft` wants the protocol in front of a translation of ports.
    RuleBuilder::new(family)
        .protocol(protocol)
        .within(key, SetName::Size(space, pool, size))
        .translate(&slot, SetName::Endpoints(space, pool))
}

/// Why a detector cannot be expressed, if it cannot.
pub(crate) fn detector_problem(node: &FamilyView) -> Option<String> {
    match &node.detector {
        Some(Detector::Interface(name) | Detector::InterfacePrefix(name))
            if name.is_empty() || name.len() > INTERFACE_BYTES =>
        {
            Some(format!("no interface is called {name:?}"))
        }
        Some(_) | None => None,
    }
}

/// Packets to 127.0.0.0/8 or ::1.
const fn loopback(family: Family) -> IpNet {
    match family {
        Family::V4 => {
            IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8))
        }
        Family::V6 => IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
    }
}

struct Rules<'a> {
    mark: u32,
    captured: u32,
    family: Family,
    node: &'a FamilyView,
}

impl Rules<'_> {
    fn of(&self, chain: ChainName) -> Vec<Rule> {
        match chain {
            ChainName::Base(hook) => self.base(hook),
            ChainName::ByOrigin(space) => self.by_origin(space),
            ChainName::CheckInput => self.check_input(),
            ChainName::CheckPassing => self.check_passing(),
            ChainName::From(space, origin) => self.from(space, origin),
            // The rules of picks are objects of their own, others belong to Services.
            ChainName::Picks(..)
            | ChainName::Remember(_)
            | ChainName::Spread(..)
            | ChainName::Sticky(..) => Vec::new(),
            ChainName::Pool(space, pool) => vec![
                self.about(space, Says::Counted).build(),
                self.rule().follow(frontend(space), SetName::Sticky(space, pool)),
                self.rule().follow(frontend(space), SetName::Spread(space, pool)),
                self.rule().goto(ChainName::Picks(space, pool)),
            ],
            ChainName::Refuse(space) => vec![
                self.about(space, Says::NoEndpoints).reject(),
                self.about(space, Says::ByOrigin).goto(ChainName::RefuseByOrigin(space)),
            ],
            ChainName::RefuseByOrigin(space) => self.refuse_by_origin(space),
            ChainName::Seen => self.seen(),
            ChainName::Space(space) => self.space(space),
        }
    }

    fn base(&self, hook: Hook) -> Vec<Rule> {
        let new = |to| self.rule().state(CtState::NEW, true).goto(to);
        match hook {
            Hook::FilterForward | Hook::FilterOutput => vec![new(ChainName::CheckPassing)],
            Hook::FilterInput => {
                let mut rules = Vec::new();
                if self.family == Family::V4 && self.node.localhost_node_ports {
                    // With the sysctl route_localnet on, the wire leads to 127.0.0.0/8.
                    let ours = loopback(self.family);
                    rules.push(
                        self.rule()
                            .source(ours, false)
                            .destination(ours, true)
                            .state(CtState::ESTABLISHED | CtState::RELATED, false)
                            .translated(false)
                            .verdict(Verdict::Drop),
                    );
                }
                rules.push(new(ChainName::CheckInput));
                rules
            }
            Hook::NatOutput | Hook::NatPrerouting => {
                let to = |kind| self.rule().within(&[Field::Daddr], SetName::Addresses(kind));
                let services = ChainName::Space(Space::Service);
                vec![
                    to(AddressKind::ClusterIp).jump(services),
                    to(AddressKind::External).jump(services),
                    self.to_node().goto(ChainName::Space(Space::NodePort)),
                ]
            }
            Hook::NatPostrouting => {
                let to_itself = [Field::Saddr, Field::Daddr];
                vec![
                    self.rule().take_mark(self.mark).masquerade(),
                    self.rule().translated(true).within(&to_itself, SetName::Hairpin).masquerade(),
                ]
            }
        }
    }

    /// Packets to an address on which node ports answer.
    fn to_node(&self) -> RuleBuilder {
        match &self.node.node_ports {
            NodePorts::All => {
                let all = self.rule().own(Side::Destination);
                if self.family == Family::V4 && self.node.localhost_node_ports {
                    all
                } else {
                    all.destination(loopback(self.family), false)
                }
            }
            NodePorts::Listed(_) => self.rule().within(&[Field::Daddr], SetName::NodeAddresses),
        }
    }

    fn space(&self, space: Space) -> Vec<Rule> {
        let mut rules = Vec::new();
        if space == Space::NodePort {
            // An address of the node may be one of a Service, too. That comes first.
            let dead = SetName::Frontends(Space::Service, Says::NoEndpoints);
            let key = frontend(Space::Service);
            rules.push(self.rule().within(key, dead).verdict(Verdict::Accept));
        }
        rules.push(self.about(space, Says::MasqueradeAll).set_mark(self.mark).build());
        let unless_pod = self.pod(self.about(space, Says::MasqueradeUnlessPod), false);
        rules.extend(unless_pod.map(|rule| rule.set_mark(self.mark).build()));
        rules.push(self.about(space, Says::ByOrigin).goto(ChainName::ByOrigin(space)));
        rules.push(self.rule().goto(ChainName::Pool(space, Pool::Cluster)));
        rules
    }

    fn by_origin(&self, space: Space) -> Vec<Rule> {
        let source = [&[Field::Saddr][..], frontend(space)].concat();
        let fenced = self.about(space, Says::Fenced);
        let mut rules =
            vec![fenced.outside(&source, SetName::Sources(space)).verdict(Verdict::Drop)];
        let to = |origin| ChainName::From(space, origin);
        rules.extend(self.pod(self.rule(), true).map(|rule| rule.goto(to(Origin::Pod))));
        rules.push(self.rule().own(Side::Source).goto(to(Origin::Node)));
        rules.push(self.rule().goto(to(Origin::External)));
        rules
    }

    fn from(&self, space: Space, origin: Origin) -> Vec<Rule> {
        vec![
            self.about(space, Says::Drop(origin)).verdict(Verdict::Drop),
            self.about(space, Says::Reject(origin)).verdict(Verdict::Accept),
            self.about(space, Says::Masquerade(origin)).set_mark(self.mark).build(),
            self.about(space, Says::Local(origin)).goto(ChainName::Pool(space, Pool::Local)),
            self.rule().goto(ChainName::Pool(space, Pool::Cluster)),
        ]
    }

    fn check_input(&self) -> Vec<Rule> {
        vec![
            self.rule().translated(true).goto(ChainName::Seen),
            self.rule().jump(ChainName::Refuse(Space::Service)),
            self.to_node().goto(ChainName::Refuse(Space::NodePort)),
        ]
    }

    fn check_passing(&self) -> Vec<Rule> {
        let cluster_ips = SetName::Addresses(AddressKind::ClusterIp);
        let mut rules = vec![
            self.rule().translated(true).goto(ChainName::Seen),
            self.rule().jump(ChainName::Refuse(Space::Service)),
            // Another mode, which is about to take over or to go, delivers it to a process.
            self.rule().marked(self.captured).verdict(Verdict::Accept),
            self.rule().within(&[Field::Daddr], cluster_ips).reject(),
        ];
        let unallocated = self.node.service_cidrs.iter();
        rules.extend(
            unallocated.map(|net| self.rule().destination(*net, true).verdict(Verdict::Drop)),
        );
        rules
    }

    fn refuse_by_origin(&self, space: Space) -> Vec<Rule> {
        let mut rules = Vec::new();
        let reject = |rule: RuleBuilder, origin| {
            let set = SetName::Frontends(space, Says::Reject(origin));
            rule.within(frontend(space), set).reject()
        };
        let back = Verdict::Return;
        if let Some(pod) = self.pod(self.rule(), true) {
            rules.push(reject(pod, Origin::Pod));
            rules.extend(self.pod(self.rule(), true).map(|rule| rule.verdict(back.clone())));
        }
        rules.push(reject(self.rule().own(Side::Source), Origin::Node));
        rules.push(self.rule().own(Side::Source).verdict(back));
        rules.push(reject(self.rule(), Origin::External));
        rules
    }

    /// Remembers, by the first packet's destination, where a packet is sent.
    fn seen(&self) -> Vec<Rule> {
        let original = [Field::OriginalDaddr, Field::Proto, Field::OriginalDport];
        let each = |space, key: &[Field]| {
            [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| {
                // `nft` knows the type of the original port only where it knows the protocol, and
                // takes that from a port.
                let rule = self.rule().protocol(protocol).port(0, false);
                rule.follow(key, SetName::Remember(space))
            })
        };
        let [_, port @ ..] = &original;
        each(Space::Service, &original).into_iter().chain(each(Space::NodePort, port)).collect()
    }

    /// Adds "comes from a local pod" (or the contrary); `None` where nothing can tell.
    fn pod(&self, rule: RuleBuilder, is: bool) -> Option<RuleBuilder> {
        detector_problem(self.node).is_none().then_some(())?;
        Some(match self.node.detector.as_ref()? {
            Detector::Interface(name) => rule.interface(Interface::Is(name), is),
            Detector::InterfacePrefix(name) => rule.interface(Interface::StartsWith(name), is),
            Detector::Source(net) => rule.source(*net, is),
        })
    }

    /// Packets to frontends in a set.
    fn about(&self, space: Space, says: Says) -> RuleBuilder {
        self.rule().within(frontend(space), SetName::Frontends(space, says))
    }

    const fn rule(&self) -> RuleBuilder {
        RuleBuilder::new(self.family)
    }
}

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

use ipnet::IpNet;
use proxier_core::{
    ByFamily, Family, Protocol,
    ir::{Detector, FamilyView, NodePorts, Origin},
};
use proxier_netlink::nft::{
    self, CmpOp, CtDirection, CtKey, CtState, CtStatus, Expr, FibFlags, FibResult, Hook, MetaKey,
    NatFlags, PayloadBase, Reg, RejectKind, SetRef, SocketKey, Verdict,
};

use crate::{
    backend::Ports,
    config::Capture,
    dataplane::nft_family,
    object::{Base, Chain, ChainName, Item, Key, Routing, Rule, SetName, Value, Way},
    pack::{ip_bytes, shape},
};

/// Before destination NAT, after connection tracking.
// KERNEL: NF_IP_PRI_MANGLE (include/uapi/linux/netfilter_ipv4.h, v6.12); the same for IPv6.
const MANGLE: i32 = -150;
/// Before everybody else's destination NAT.
// KERNEL: NF_IP_PRI_NAT_DST (include/uapi/linux/netfilter_ipv4.h, v6.12) is -100. The first NAT chain
// that says something about a connection has the say (net/netfilter/nf_nat_core.c nf_nat_inet_fn).
// A NAT chain of ours also keeps alive what another mode has translated: translation stops for all
// connections of a namespace with its last NAT chain.
const BEFORE_NAT: i32 = -101;
/// What `fib` says of an address of this machine.
// KERNEL: RTN_LOCAL (include/uapi/linux/rtnetlink.h, v6.12).
const RTN_LOCAL: u32 = 2;
/// ICMP and ICMPv6 codes for "port unreachable".
const PORT_UNREACHABLE: ByFamily<u8> = ByFamily { v4: 3, v6: 4 };
/// Bytes of an interface's name.
const IFNAMSIZ: usize = 16;

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
        all.insert(Key::Set(family, set), Value::Set(shape(family, set)));
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
                self.rule("remember the connection").tcp().set_ct_mark().end(),
                self.rule("route to this machine").set_mark().accept(),
            ],
            ChainName::Classify(way) => self.classify(*way),
            ChainName::ClassifyOwn(way) => self.classify_own(*way),
            ChainName::Foreign(_) => Vec::new(),
            ChainName::From(way, origin) => {
                self.refuse(*way, *origin, &ChainName::Capture(*origin))
            }
            ChainName::FromOwn(way, origin) if self.redirects => {
                self.refuse(*way, *origin, &ChainName::Capture(*origin))
            }
            ChainName::FromOwn(way, origin) => self.refuse(*way, *origin, &ChainName::CaptureOwn),
            ChainName::Keep | ChainName::KeepOwn => {
                vec![self.rule("captured: it stays as it is").marked().keep_destination()]
            }
            ChainName::Output => self.output(),
            ChainName::Postrouting => {
                // Others may take the bit for something else, such as "masquerade".
                vec![self.rule("forget the mark").through_lo().marked().clear_mark().end()]
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
            self.rule("a connection we have").tcp().not_new().ours().set_mark().accept(),
        ];
        rules.extend(self.enter_all(ChainName::Classify));
        // KERNEL: a UDP socket that answers for a frontend would be found before the listener, so
        // this comes last for UDP (net/ipv4/netfilter/nf_tproxy_ipv4.c, v6.12, asks for connected
        // sockets only). ICMP errors about our connections are found as well.
        rules.push(self.rule("an answer to us").ours().set_mark().accept());
        rules
    }

    fn output(&self) -> Vec<Rule> {
        if self.redirects {
            let sent_by_us = self.rule("sent by us").marked().accept();
            return iter::once(sent_by_us).chain(self.enter_all(ChainName::ClassifyOwn)).collect();
        }
        let known = self.rule("a captured connection").tcp().ct_marked().original();
        let mut rules = vec![
            self.rule("translated by somebody else").translated().accept(),
            self.rule("sent by us").transparent().accept(),
            known.set_mark().accept(),
        ];
        rules.extend(self.enter_all(ChainName::ClassifyOwn));
        rules
    }

    fn enter_all(&self, next: fn(Way) -> ChainName) -> Vec<Rule> {
        Way::ALL.into_iter().flat_map(|way| self.enter(way, &next(way))).collect()
    }

    /// Packets to a frontend: closed to some sources, or on to their origin.
    fn enter(&self, way: Way, next: &ChainName) -> [Rule; 2] {
        let to = |rule: RuleBuilder, set| {
            let rule = rule.frontend(way).lookup(set, false);
            match way {
                Way::Address => rule,
                Way::NodePort => rule.node_address(self.node),
            }
        };
        let closed = to(self.rule("a source that may not"), SetName::Fenced(way))
            .begins()
            .frontend_and_source(way)
            .lookup(SetName::Allowed(way), true);
        let open = to(self.rule("to a frontend"), SetName::Frontends(way));
        [closed.drop(), open.goto(next)]
    }

    fn classify(&self, way: Way) -> Vec<Rule> {
        let to = |origin| ChainName::From(way, origin);
        let mut rules = Vec::new();
        if let Some(detector) = &self.node.detector
            && let Some(rule) = self.rule("from a pod").detected(detector)
        {
            rules.push(rule.goto(&to(Origin::Pod)));
        }
        rules.push(self.rule("from the node").local_source().goto(&to(Origin::Node)));
        rules.push(self.rule("from elsewhere").goto(&to(Origin::External)));
        rules
    }

    fn classify_own(&self, way: Way) -> Vec<Rule> {
        let to = |origin| ChainName::FromOwn(way, origin);
        let mut rules = Vec::new();
        if let Some(detector @ Detector::Source(_)) = &self.node.detector
            && let Some(rule) = self.rule("from an address of pods").detected(detector)
        {
            rules.push(rule.goto(&to(Origin::Pod)));
        }
        rules.push(self.rule("from the node").goto(&to(Origin::Node)));
        rules
    }

    /// Drops and rejects new connections and all datagrams; the rest goes on.
    fn refuse(&self, way: Way, origin: Origin, next: &ChainName) -> Vec<Rule> {
        let (dropped, rejected) = (SetName::Dropped(way, origin), SetName::Rejected(way, origin));
        vec![
            self.rule("a connection goes on").tcp().not_new().goto(next),
            self.rule("no endpoint here").frontend(way).lookup(dropped, false).drop(),
            self.rule("no endpoint").frontend(way).lookup(rejected, false).reject(),
            self.rule("an endpoint").goto(next),
        ]
    }

    fn capture(&self, origin: Origin) -> Vec<Rule> {
        let [tcp, udp] = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| self.ports.of(self.family, protocol, origin));
        if self.redirects {
            let at = self.node.addresses.iter().find(|ip| is_for_everybody(ip));
            return vec![
                self.rule("to the listener").tcp().redirect(at, tcp),
                self.rule("to the listener").udp().redirect(at, udp),
            ];
        }
        vec![
            self.rule("to the listener").tcp().set_mark().tproxy(tcp).accept(),
            self.rule("to the listener").udp().set_mark().tproxy(udp).accept(),
            // The client tries again, and by then there may be a process.
            self.rule("nobody listens").drop(),
        ]
    }

    fn rule(&self, text: &str) -> RuleBuilder {
        let (family, mark) = (self.family, self.mark);
        RuleBuilder { family, mark, rule: Rule { text: text.to_owned(), exprs: Vec::new() } }
    }
}

/// A rule under construction.
struct RuleBuilder {
    family: Family,
    mark: u32,
    rule: Rule,
}

impl RuleBuilder {
    fn push(mut self, expr: Expr<'static>) -> Self {
        self.rule.exprs.push(expr);
        self
    }

    fn meta(self, key: MetaKey, dreg: Reg) -> Self {
        self.push(Expr::Meta { key, dreg })
    }

    fn cmp(self, op: CmpOp, value: &[u8]) -> Self {
        self.push(Expr::Cmp { sreg: Reg::R1, op, value: value.to_vec().into() })
    }

    fn bitwise(self, mask: u32, xor: u32) -> Self {
        let (mask, xor) = (mask.to_ne_bytes().to_vec(), xor.to_ne_bytes().to_vec());
        let (sreg, dreg) = (Reg::R1, Reg::R1);
        self.push(Expr::Bitwise { sreg, dreg, mask: mask.into(), xor: xor.into() })
    }

    fn payload(self, base: PayloadBase, offset: u32, len: u32, dreg: Reg) -> Self {
        self.push(Expr::Payload { base, offset, len, dreg })
    }

    fn tcp(self) -> Self {
        self.meta(MetaKey::L4PROTO, Reg::R1).cmp(CmpOp::EQ, &[Protocol::Tcp.number()])
    }

    fn udp(self) -> Self {
        self.meta(MetaKey::L4PROTO, Reg::R1).cmp(CmpOp::EQ, &[Protocol::Udp.number()])
    }

    fn socket(self, key: SocketKey, value: u8) -> Self {
        let dreg = Reg::R1;
        self.push(Expr::Socket { key, dreg, level: None }).cmp(CmpOp::EQ, &[value])
    }

    fn transparent(self) -> Self {
        self.socket(SocketKey::TRANSPARENT, 1)
    }

    /// A transparent socket of somebody is waiting for exactly this.
    fn ours(self) -> Self {
        self.transparent().socket(SocketKey::WILDCARD, 0)
    }

    fn set_mark(self) -> Self {
        let mark = self.mark;
        self.meta(MetaKey::MARK, Reg::R1)
            .bitwise(!mark, mark)
            .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
    }

    fn clear_mark(self) -> Self {
        let mark = self.mark;
        self.meta(MetaKey::MARK, Reg::R1)
            .bitwise(!mark, 0)
            .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
    }

    fn marked(self) -> Self {
        let mark = self.mark;
        self.meta(MetaKey::MARK, Reg::R1).bitwise(mark, 0).cmp(CmpOp::EQ, &mark.to_ne_bytes())
    }

    fn ct(self, key: CtKey) -> Self {
        self.push(Expr::Ct { key, dreg: Reg::R1, direction: None })
    }

    fn set_ct_mark(self) -> Self {
        let mark = self.mark;
        let set = Expr::CtSet { key: CtKey::MARK, sreg: Reg::R1, direction: None };
        self.ct(CtKey::MARK).bitwise(!mark, mark).push(set)
    }

    fn ct_marked(self) -> Self {
        let mark = self.mark;
        self.ct(CtKey::MARK).bitwise(mark, 0).cmp(CmpOp::EQ, &mark.to_ne_bytes())
    }

    /// Another proxier, or another mode, took the connection before.
    fn translated(self) -> Self {
        self.ct(CtKey::STATUS).bitwise(CtStatus::DST_NAT.0, 0).cmp(CmpOp::NE, &[0; 4])
    }

    fn original(self) -> Self {
        self.ct(CtKey::DIRECTION).cmp(CmpOp::EQ, &[CtDirection::ORIGINAL.0])
    }

    fn begins(self) -> Self {
        self.ct(CtKey::STATE).bitwise(CtState::NEW.0, 0).cmp(CmpOp::NE, &[0; 4])
    }

    fn not_new(self) -> Self {
        self.ct(CtKey::STATE).cmp(CmpOp::NE, &CtState::NEW.0.to_ne_bytes())
    }

    fn fib(self, flags: FibFlags, op: CmpOp) -> Self {
        self.push(Expr::Fib { result: FibResult::ADDRTYPE, flags, dreg: Reg::R1 })
            .cmp(op, &RTN_LOCAL.to_ne_bytes())
    }

    fn local_source(self) -> Self {
        self.fib(FibFlags::SADDR, CmpOp::EQ)
    }

    fn through_lo(self) -> Self {
        self.meta(MetaKey::OIFNAME, Reg::R1).cmp(CmpOp::EQ, &ifname("lo"))
    }

    /// Offset of the source or destination address, and its length.
    const fn address(&self, destination: bool) -> (u32, u32) {
        match (self.family, destination) {
            (Family::V4, false) => (12, 4),
            (Family::V4, true) => (16, 4),
            (Family::V6, false) => (8, 16),
            (Family::V6, true) => (24, 16),
        }
    }

    /// Loads the key of the frontend, and gives the first free slot.
    fn load_frontend(self, way: Way) -> (Self, u8) {
        let (offset, len) = self.address(true);
        let (rule, slot) = match (way, self.family) {
            (Way::Address, Family::V4) => {
                (self.payload(PayloadBase::NETWORK, offset, len, Reg::R1), 1)
            }
            (Way::Address, Family::V6) => {
                (self.payload(PayloadBase::NETWORK, offset, len, Reg::R1), 4)
            }
            (Way::NodePort, _) => (self, 0),
        };
        let rule = rule.meta(MetaKey::L4PROTO, Reg::slot(slot)).payload(
            PayloadBase::TRANSPORT,
            2,
            2,
            Reg::slot(slot + 1),
        );
        (rule, slot + 2)
    }

    fn frontend(self, way: Way) -> Self {
        self.load_frontend(way).0
    }

    fn frontend_and_source(self, way: Way) -> Self {
        let (offset, len) = self.address(false);
        let (rule, slot) = self.load_frontend(way);
        rule.payload(PayloadBase::NETWORK, offset, len, Reg::slot(slot))
    }

    fn lookup(self, set: SetName, invert: bool) -> Self {
        let set = SetRef { name: set.to_string().into(), id: None };
        self.push(Expr::Lookup { set, sreg: Reg::R1, dreg: None, invert })
    }

    /// The destination is an address that node ports answer on.
    fn node_address(self, node: &FamilyView) -> Self {
        let (offset, len) = self.address(true);
        match &node.node_ports {
            NodePorts::Listed(_) => self
                .payload(PayloadBase::NETWORK, offset, len, Reg::R1)
                .lookup(SetName::NodeAddresses, false),
            NodePorts::All => {
                let rule = self.fib(FibFlags::DADDR, CmpOp::EQ);
                match rule.family {
                    Family::V4 if node.localhost_node_ports => rule,
                    Family::V4 => rule
                        .payload(PayloadBase::NETWORK, offset, 1, Reg::R1)
                        .cmp(CmpOp::NE, &[127]),
                    Family::V6 => rule
                        .payload(PayloadBase::NETWORK, offset, len, Reg::R1)
                        .cmp(CmpOp::NE, &std::net::Ipv6Addr::LOCALHOST.octets()),
                }
            }
        }
    }

    /// `None` when the detector says nothing about this family.
    fn detected(self, detector: &Detector) -> Option<Self> {
        match detector {
            Detector::Interface(name) => {
                Some(self.meta(MetaKey::IIFNAME, Reg::R1).cmp(CmpOp::EQ, &ifname(name)))
            }
            Detector::InterfacePrefix(prefix) => {
                Some(self.meta(MetaKey::IIFNAME, Reg::R1).cmp(CmpOp::EQ, prefix.as_bytes()))
            }
            Detector::Source(net) if self.family.has(&net.addr()) => Some(self.source_in(net)),
            Detector::Source(_) => None,
        }
    }

    fn source_in(self, net: &IpNet) -> Self {
        let (offset, len) = self.address(false);
        let network = ip_bytes(net.network());
        let whole = u32::from(net.prefix_len() / 8);
        if net.prefix_len() == 0 {
            return self;
        }
        if net.prefix_len().is_multiple_of(8) {
            let bytes = network.get(..usize::from(net.prefix_len() / 8)).unwrap_or(&network);
            return self
                .payload(PayloadBase::NETWORK, offset, whole, Reg::R1)
                .cmp(CmpOp::EQ, bytes);
        }
        let (sreg, dreg) = (Reg::R1, Reg::R1);
        let mask = ip_bytes(net.netmask()).into();
        let xor = vec![0; network.len()].into();
        self.payload(PayloadBase::NETWORK, offset, len, Reg::R1)
            .push(Expr::Bitwise { sreg, dreg, mask, xor })
            .cmp(CmpOp::EQ, &network)
    }

    fn tproxy(self, port: u16) -> Self {
        let (address, family) = match self.family {
            Family::V4 => (vec![127, 0, 0, 1], nft::Family::Ipv4),
            Family::V6 => (std::net::Ipv6Addr::LOCALHOST.octets().to_vec(), nft::Family::Ipv6),
        };
        let port = port.to_be_bytes().to_vec();
        self.push(Expr::Immediate { dreg: Reg::R1, value: address.into() })
            .push(Expr::Immediate { dreg: Reg::R2, value: port.into() })
            .push(Expr::Tproxy { family, addr: Some(Reg::R1), port: Some(Reg::R2) })
    }

    /// Translates the destination to an address of this machine and, where none is known, to one of
    /// the interface that the packet came in on.
    // KERNEL: there the interface has to have one, which those of pods need not have
    // (net/netfilter/nf_nat_redirect.c, v6.12).
    fn redirect(self, at: Option<&IpAddr>, port: u16) -> Rule {
        let family = nft_family(self.family);
        let port = port.to_be_bytes().to_vec().into();
        let Some(at) = at else {
            let ports = Some((Reg::R1, Reg::R1));
            let rule = self.push(Expr::Immediate { dreg: Reg::R1, value: port });
            return rule.push(Expr::Redirect { flags: NatFlags::default(), ports }).rule;
        };
        self.push(Expr::Immediate { dreg: Reg::R1, value: ip_bytes(*at).into() })
            .push(Expr::Immediate { dreg: Reg::slot(4), value: port })
            .push(Expr::Nat(nft::Nat::dnat(family, Reg::R1, Some(Reg::slot(4)))))
            .rule
    }

    /// Translates the destination to what it is.
    fn keep_destination(self) -> Rule {
        let (offset, len) = self.address(true);
        let family = nft_family(self.family);
        let rule = self.payload(PayloadBase::NETWORK, offset, len, Reg::R1);
        rule.push(Expr::Nat(nft::Nat::dnat(family, Reg::R1, None))).rule
    }

    fn reject(self) -> Rule {
        let code = *PORT_UNREACHABLE.of(self.family);
        self.push(Expr::Reject { kind: RejectKind::ICMP, code }).rule
    }

    fn accept(self) -> Rule {
        self.push(Expr::Verdict(Verdict::Accept)).rule
    }

    fn drop(self) -> Rule {
        self.push(Expr::Verdict(Verdict::Drop)).rule
    }

    fn goto(self, chain: &ChainName) -> Rule {
        self.push(Expr::Verdict(Verdict::Goto(chain.to_string().into()))).rule
    }

    fn end(self) -> Rule {
        self.rule
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

fn ifname(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

#[cfg(test)]
mod tests {
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

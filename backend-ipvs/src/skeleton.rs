//! The objects that exist whatever the Services are. Pure.
//!
//! A packet to a frontend goes from its hook to `classify`, which tells its origin, and to
//! `from-ORIGIN`, which drops or rejects what the verdict table says, notes in the connection's mark
//! whether it is masqueraded, and marks the packet where a virtual server is known by its mark. All
//! this is before the kernel's virtual servers see the packet, which they do on its way in, or on its
//! way out of the node's own processes.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use proxier_core::{
    ByFamily, Family, Protocol,
    ir::{Detector, FamilyView, NodePorts, Origin},
};
use proxier_netlink::nft::{
    CmpOp, CtKey, CtState, Expr, FibFlags, FibResult, Hook, MetaKey, NatFlags, PayloadBase, Reg,
    RejectKind, SetRef, Verdict,
};

use crate::{
    config::Config,
    mark,
    object::{Base, Chain, ChainName, Item, Key, Rule, SetName, Value, Way},
    pack::{ip_bytes, shape},
};

/// Before destination NAT and virtual servers, after connection tracking.
// KERNEL: NF_IP_PRI_MANGLE (include/uapi/linux/netfilter_ipv4.h, v6.12); the same for IPv6.
const MANGLE: i32 = -150;
// KERNEL: NF_IP_PRI_NAT_SRC (include/uapi/linux/netfilter_ipv4.h, v6.12); the same for IPv6.
const NAT_SRC: i32 = 100;
/// What `fib` says of an address of this machine.
// KERNEL: RTN_LOCAL (include/uapi/linux/rtnetlink.h, v6.12).
const RTN_LOCAL: u32 = 2;
/// ICMP and ICMPv6 codes for "port unreachable".
const PORT_UNREACHABLE: ByFamily<u8> = ByFamily { v4: 3, v6: 4 };
/// Bytes of an interface's name.
const IFNAMSIZ: usize = 16;

/// The objects of one family.
pub(crate) fn skeleton(config: &Config, family: Family, node: &FamilyView) -> BTreeMap<Key, Value> {
    let mut all = BTreeMap::new();
    all.insert(Key::Table(family), Value::Exists);
    all.insert(Key::Link(family), Value::Exists);
    for set in SetName::all() {
        all.insert(Key::Set(family, set), Value::Set(shape(family, set)));
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
            ChainName::Classify(way) => self.classify(*way),
            ChainName::ClassifyOwn(way) => self.classify_own(*way),
            ChainName::Foreign(_) => Vec::new(),
            ChainName::From(way, origin) => self.from(*way, *origin),
            ChainName::Leaving => {
                vec![self.rule("the mark has done its work").marked(self.config.mark_base).unmark()]
            }
            ChainName::Masquerade => self.masquerade(),
            ChainName::Output => self.enter_all(ChainName::ClassifyOwn),
            ChainName::Prerouting => self.enter_all(ChainName::Classify),
        }
    }

    fn enter_all(&self, classify: fn(Way) -> ChainName) -> Vec<Rule> {
        let connection = self.rule("a connection goes on").not(Protocol::Udp).not_new().accept();
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
        let to = |origin| ChainName::From(way, origin);
        let mut rules = Vec::new();
        if let Some(detector @ Detector::Source(_)) = &self.node.detector
            && let Some(rule) = self.rule("from an address of pods").detected(detector)
        {
            rules.push(rule.goto(&to(Origin::Pod)));
        }
        rules.push(self.rule("from the node").goto(&to(Origin::Node)));
        rules
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
        rules.push(self.rule("to a server by mark").frontend(way).set_mark_from(marks));
        rules.push(self.rule("to a server").accept());
        rules
    }

    fn masquerade(&self) -> Vec<Rule> {
        let (masquerade, proxied) = self.config.bits();
        vec![
            self.rule("by policy").ct_marked(masquerade | proxied).masquerade(),
            self.rule("to itself").ct_marked(proxied).itself().masquerade(),
        ]
    }

    fn rule(&self, text: &str) -> RuleBuilder {
        RuleBuilder { family: self.family, rule: Rule { text: text.to_owned(), exprs: Vec::new() } }
    }
}

/// A rule under construction.
struct RuleBuilder {
    family: Family,
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

    fn not(self, protocol: Protocol) -> Self {
        self.meta(MetaKey::L4PROTO, Reg::R1).cmp(CmpOp::NE, &[protocol.number()])
    }

    /// The mark is one of ours.
    fn marked(self, base: u32) -> Self {
        self.meta(MetaKey::MARK, Reg::R1)
            .bitwise(!((1 << mark::BITS) - 1), 0)
            .cmp(CmpOp::EQ, &base.to_ne_bytes())
    }

    fn unmark(self) -> Rule {
        self.push(Expr::Immediate { dreg: Reg::R1, value: vec![0; 4].into() })
            .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
            .rule
    }

    /// Gives the packet the mark that a map has for what was loaded.
    fn set_mark_from(self, set: SetName) -> Rule {
        let set = SetRef { name: set.to_string().into(), id: None };
        self.push(Expr::Lookup { set, sreg: Reg::R1, dreg: Some(Reg::R1), invert: false })
            .push(Expr::MetaSet { key: MetaKey::MARK, sreg: Reg::R1 })
            .rule
    }

    fn ct(self, key: CtKey) -> Self {
        self.push(Expr::Ct { key, dreg: Reg::R1, direction: None })
    }

    fn set_ct_mark(self, bits: u32) -> Rule {
        let set = Expr::CtSet { key: CtKey::MARK, sreg: Reg::R1, direction: None };
        self.ct(CtKey::MARK).bitwise(!bits, bits).push(set).rule
    }

    /// The connection's mark has all these bits.
    fn ct_marked(self, bits: u32) -> Self {
        self.ct(CtKey::MARK).bitwise(bits, 0).cmp(CmpOp::EQ, &bits.to_ne_bytes())
    }

    fn begins(self) -> Self {
        self.ct(CtKey::STATE).bitwise(CtState::NEW.0, 0).cmp(CmpOp::NE, &[0; 4])
    }

    fn not_new(self) -> Self {
        self.ct(CtKey::STATE).bitwise(CtState::NEW.0, 0).cmp(CmpOp::EQ, &[0; 4])
    }

    fn fib(self, flags: FibFlags, op: CmpOp) -> Self {
        self.push(Expr::Fib { result: FibResult::ADDRTYPE, flags, dreg: Reg::R1 })
            .cmp(op, &RTN_LOCAL.to_ne_bytes())
    }

    fn local_source(self) -> Self {
        self.fib(FibFlags::SADDR, CmpOp::EQ)
    }

    fn source(self) -> Self {
        let (offset, len) = self.address(false);
        self.payload(PayloadBase::NETWORK, offset, len, Reg::R1)
    }

    fn destination(self) -> Self {
        let (offset, len) = self.address(true);
        self.payload(PayloadBase::NETWORK, offset, len, Reg::R1)
    }

    /// The source is the endpoint that was chosen.
    fn itself(self) -> Self {
        let slots = if self.family == Family::V4 { 1 } else { 4 };
        let (offset, len) = self.address(true);
        self.source()
            .payload(PayloadBase::NETWORK, offset, len, Reg::slot(slots))
            .lookup(SetName::Hairpin, false)
    }

    fn masquerade(self) -> Rule {
        self.push(Expr::Masquerade { flags: NatFlags::FULLY_RANDOM, ports: None }).rule
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
        match &node.node_ports {
            NodePorts::Listed(_) => self.destination().lookup(SetName::NodeAddresses, false),
            NodePorts::All => {
                let rule = self.fib(FibFlags::DADDR, CmpOp::EQ);
                let rule = rule.destination().lookup(SetName::Addresses, true);
                match rule.family {
                    Family::V4 => {
                        let (offset, _) = rule.address(true);
                        let rule = rule.payload(PayloadBase::NETWORK, offset, 1, Reg::R1);
                        rule.cmp(CmpOp::NE, &[127])
                    }
                    Family::V6 => {
                        rule.destination().cmp(CmpOp::NE, &std::net::Ipv6Addr::LOCALHOST.octets())
                    }
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
}

fn ifname(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

#[cfg(test)]
mod tests {
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

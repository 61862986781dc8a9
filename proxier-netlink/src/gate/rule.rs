//! Rules. Pure.

use std::fmt::Display;

use ipnet::IpNet;
use proxier_core::{
    ByFamily, Family, Protocol,
    ir::{Detector, FamilyView, Origin},
};

use super::{Rule, Way, ip_bytes};
use crate::nft::{
    CmpOp, CtKey, CtState, Expr, FibFlags, FibResult, MetaKey, PayloadBase, Reg, RejectKind,
    SetRef, Verdict,
};

/// What `fib` says of an address of this machine.
// KERNEL: RTN_LOCAL (include/uapi/linux/rtnetlink.h, v6.12).
const RTN_LOCAL: u32 = 2;
/// ICMP and ICMPv6 codes for "port unreachable".
const PORT_UNREACHABLE: ByFamily<u8> = ByFamily { v4: 3, v6: 4 };
/// Bytes of an interface's name.
const IFNAMSIZ: usize = 16;

/// The rules that packets to frontends of one form meet: some are closed to the source, the others go
/// on to a chain. `to` adds to a rule that has met a frontend what else it shall meet.
///
/// The sets are: frontends that only some sources may use, who may use them, and every frontend.
pub fn enter<S: Display>(
    family: Family,
    way: Way,
    [fenced, allowed, frontends]: [S; 3],
    to: impl Fn(RuleBuilder) -> RuleBuilder,
    next: impl Display,
) -> [Rule; 2] {
    let rule = |text, set: S| to(RuleBuilder::new(family, text).frontend(way).lookup(set, false));
    let closed = rule("a source that may not", fenced).begins();
    let closed = closed.frontend_and_source(way).lookup(allowed, true);
    [closed.drop(), rule("to a frontend", frontends).goto(next)]
}

/// The rules that tell the origin of a packet: on to the chain of each.
pub fn classify<C: Display>(
    family: Family,
    node: &FamilyView,
    to: impl Fn(Origin) -> C,
) -> Vec<Rule> {
    let rule = |text| RuleBuilder::new(family, text);
    let detector = node.detector.as_ref();
    let from_pod = detector.and_then(|it| rule("from a pod").detected(it));
    let rules = [
        from_pod.map(|rule| rule.goto(to(Origin::Pod))),
        Some(rule("from the node").local_source().goto(to(Origin::Node))),
        Some(rule("from elsewhere").goto(to(Origin::External))),
    ];
    rules.into_iter().flatten().collect()
}

/// The rules that tell the origin of a packet of the node's own: no interface says that it is a pod's.
pub fn classify_own<C: Display>(
    family: Family,
    node: &FamilyView,
    to: impl Fn(Origin) -> C,
) -> Vec<Rule> {
    let rule = |text| RuleBuilder::new(family, text);
    let detector = node.detector.as_ref().filter(|it| matches!(it, Detector::Source(_)));
    let from_pod = detector.and_then(|it| rule("from an address of pods").detected(it));
    let from_pod = from_pod.map(|rule| rule.goto(to(Origin::Pod)));
    from_pod.into_iter().chain([rule("from the node").goto(to(Origin::Node))]).collect()
}

/// A rule under construction: what a packet has to be, in order, and what becomes of it.
///
/// What is loaded goes to [`Reg::R1`] and the registers after it.
#[derive(Clone, Debug)]
pub struct RuleBuilder {
    family: Family,
    rule: Rule,
}

impl RuleBuilder {
    /// A rule for every packet of a family, with a comment.
    #[must_use]
    pub fn new(family: Family, text: &str) -> Self {
        Self { family, rule: Rule { text: text.to_owned(), exprs: Vec::new() } }
    }

    /// The family of the packets.
    #[must_use]
    pub const fn family(&self) -> Family {
        self.family
    }

    /// Adds an expression.
    #[must_use]
    pub fn push(mut self, expr: Expr<'static>) -> Self {
        self.rule.exprs.push(expr);
        self
    }

    /// Loads a property of the packet.
    #[must_use]
    pub fn meta(self, key: MetaKey, dreg: Reg) -> Self {
        self.push(Expr::Meta { key, dreg })
    }

    /// What was loaded compares so with a value.
    #[must_use]
    pub fn cmp(self, op: CmpOp, value: &[u8]) -> Self {
        self.push(Expr::Cmp { sreg: Reg::R1, op, value: value.to_vec().into() })
    }

    /// Changes the word that was loaded: `(word & mask) ^ xor`.
    #[must_use]
    pub fn bitwise(self, mask: u32, xor: u32) -> Self {
        let (mask, xor) = (mask.to_ne_bytes().to_vec(), xor.to_ne_bytes().to_vec());
        let (sreg, dreg) = (Reg::R1, Reg::R1);
        self.push(Expr::Bitwise { sreg, dreg, mask: mask.into(), xor: xor.into() })
    }

    /// Loads bytes of the packet.
    #[must_use]
    pub fn payload(self, base: PayloadBase, offset: u32, len: u32, dreg: Reg) -> Self {
        self.push(Expr::Payload { base, offset, len, dreg })
    }

    /// Its protocol is this one.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        self.meta(MetaKey::L4PROTO, Reg::R1).cmp(CmpOp::EQ, &[protocol.number()])
    }

    /// Its protocol is another one.
    #[must_use]
    pub fn not_protocol(self, protocol: Protocol) -> Self {
        self.meta(MetaKey::L4PROTO, Reg::R1).cmp(CmpOp::NE, &[protocol.number()])
    }

    /// Its mark is `value`, under a mask.
    #[must_use]
    pub fn marked(self, mask: u32, value: u32) -> Self {
        self.meta(MetaKey::MARK, Reg::R1).bitwise(mask, 0).cmp(CmpOp::EQ, &value.to_ne_bytes())
    }

    /// Loads a property of the connection.
    #[must_use]
    pub fn ct(self, key: CtKey) -> Self {
        self.push(Expr::Ct { key, dreg: Reg::R1, direction: None })
    }

    /// The connection's mark has all these bits.
    #[must_use]
    pub fn ct_marked(self, bits: u32) -> Self {
        self.ct(CtKey::MARK).bitwise(bits, 0).cmp(CmpOp::EQ, &bits.to_ne_bytes())
    }

    /// Sets bits of the connection's mark.
    #[must_use]
    pub fn set_ct_mark(self, bits: u32) -> Rule {
        let set = Expr::CtSet { key: CtKey::MARK, sreg: Reg::R1, direction: None };
        self.ct(CtKey::MARK).bitwise(!bits, bits).push(set).rule
    }

    /// The connection begins with it.
    #[must_use]
    pub fn begins(self) -> Self {
        self.ct(CtKey::STATE).bitwise(CtState::NEW.0, 0).cmp(CmpOp::NE, &[0; 4])
    }

    /// The connection is known.
    #[must_use]
    pub fn not_new(self) -> Self {
        self.ct(CtKey::STATE).cmp(CmpOp::NE, &CtState::NEW.0.to_ne_bytes())
    }

    /// An address is one of this machine.
    #[must_use]
    pub fn local(self, flags: FibFlags) -> Self {
        self.push(Expr::Fib { result: FibResult::ADDRTYPE, flags, dreg: Reg::R1 })
            .cmp(CmpOp::EQ, &RTN_LOCAL.to_ne_bytes())
    }

    /// The source is an address of this machine.
    #[must_use]
    pub fn local_source(self) -> Self {
        self.local(FibFlags::SADDR)
    }

    /// The destination is an address of this machine.
    #[must_use]
    pub fn local_destination(self) -> Self {
        self.local(FibFlags::DADDR)
    }

    /// The destination is not one that stays on the machine.
    #[must_use]
    pub fn not_to_loopback(self) -> Self {
        let (offset, len) = self.address(true);
        match self.family {
            Family::V4 => {
                self.payload(PayloadBase::NETWORK, offset, 1, Reg::R1).cmp(CmpOp::NE, &[127])
            }
            Family::V6 => self
                .payload(PayloadBase::NETWORK, offset, len, Reg::R1)
                .cmp(CmpOp::NE, &std::net::Ipv6Addr::LOCALHOST.octets()),
        }
    }

    /// It leaves by an interface.
    #[must_use]
    pub fn leaves_by(self, interface: &str) -> Self {
        self.meta(MetaKey::OIFNAME, Reg::R1).cmp(CmpOp::EQ, &ifname(interface))
    }

    /// Loads the source.
    #[must_use]
    pub fn source(self) -> Self {
        let (offset, len) = self.address(false);
        self.payload(PayloadBase::NETWORK, offset, len, Reg::R1)
    }

    /// Loads the destination.
    #[must_use]
    pub fn destination(self) -> Self {
        let (offset, len) = self.address(true);
        self.payload(PayloadBase::NETWORK, offset, len, Reg::R1)
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

    /// Loads the key of the frontend.
    #[must_use]
    pub fn frontend(self, way: Way) -> Self {
        self.load_frontend(way).0
    }

    /// Loads the key of the frontend, and the source.
    #[must_use]
    pub fn frontend_and_source(self, way: Way) -> Self {
        let (offset, len) = self.address(false);
        let (rule, slot) = self.load_frontend(way);
        rule.payload(PayloadBase::NETWORK, offset, len, Reg::slot(slot))
    }

    /// What was loaded is in a set; or is not.
    #[must_use]
    pub fn lookup(self, set: impl Display, invert: bool) -> Self {
        let set = SetRef { name: set.to_string().into(), id: None };
        self.push(Expr::Lookup { set, sreg: Reg::R1, dreg: None, invert })
    }

    /// It is a pod's; `None` when the detector says nothing about this family.
    pub fn detected(self, detector: &Detector) -> Option<Self> {
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

    /// The source is in a network.
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

    /// Answers that the port is unreachable.
    #[must_use]
    pub fn reject(self) -> Rule {
        let code = *PORT_UNREACHABLE.of(self.family);
        self.push(Expr::Reject { kind: RejectKind::ICMP, code }).rule
    }

    /// Lets it pass.
    #[must_use]
    pub fn accept(self) -> Rule {
        self.push(Expr::Verdict(Verdict::Accept)).rule
    }

    /// Drops it.
    #[must_use]
    pub fn drop(self) -> Rule {
        self.push(Expr::Verdict(Verdict::Drop)).rule
    }

    /// Goes on in another chain.
    #[must_use]
    pub fn goto(self, chain: impl Display) -> Rule {
        self.push(Expr::Verdict(Verdict::Goto(chain.to_string().into()))).rule
    }

    /// Does what was added, and no more.
    #[must_use]
    pub fn end(self) -> Rule {
        self.rule
    }
}

fn ifname(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

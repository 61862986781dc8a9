//! Rules: what they are made of, and how they are built.

use std::borrow::Cow;

use ipnet::IpNet;
use proxier_core::{Family, Protocol};
use proxier_netlink::nft::{
    CmpOp, CtKey, CtState, CtStatus, Dynset, DynsetOp, Expr, FibFlags, FibResult, MetaKey, Nat,
    NatFlags, PayloadBase, Reg, RejectKind, SetRef, Verdict,
};

use crate::{
    field::{Field, Side, nft_family},
    object::{ChainName, SetName},
};

/// The type of an address that the kernel calls its own.
// KERNEL: RTN_LOCAL (include/uapi/linux/rtnetlink.h, v6.12).
const LOCAL: u32 = 2;

/// Registers begin here.
const FIRST: Reg = Reg::R1;

/// A rule: its expressions, in order.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct Rule(pub(crate) Box<[Expr<'static>]>);

/// Which packets by their input interface.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Interface<'a> {
    Is(&'a str),
    StartsWith(&'a str),
}

/// Collects the expressions of a rule: matches first, then what is done.
#[derive(Debug)]
#[must_use]
pub(crate) struct RuleBuilder {
    family: Family,
    exprs: Vec<Expr<'static>>,
}

impl RuleBuilder {
    pub(crate) const fn new(family: Family) -> Self {
        Self { family, exprs: Vec::new() }
    }

    /// Goes on if the fields are in a set.
    pub(crate) fn within(self, fields: &[Field], set: SetName) -> Self {
        self.lookup(fields, set, None, false)
    }

    /// Goes on if the fields are not in a set.
    pub(crate) fn outside(self, fields: &[Field], set: SetName) -> Self {
        self.lookup(fields, set, None, true)
    }

    /// Goes on if the source is (not) in a network.
    pub(crate) fn source(self, net: IpNet, is: bool) -> Self {
        self.network(Side::Source, net, is)
    }

    /// Goes on if the destination is (not) in a network.
    pub(crate) fn destination(self, net: IpNet, is: bool) -> Self {
        self.network(Side::Destination, net, is)
    }

    /// Goes on if an address is one of this machine's.
    pub(crate) fn own(mut self, side: Side) -> Self {
        let flags = match side {
            Side::Destination => FibFlags::DADDR,
            Side::Source => FibFlags::SADDR,
        };
        self.exprs.push(Expr::Fib { result: FibResult::ADDRTYPE, flags, dreg: FIRST });
        self.cmp(CmpOp::EQ, &LOCAL.to_ne_bytes())
    }

    /// Goes on if the packet came in on an interface (or not).
    pub(crate) fn interface(mut self, interface: Interface<'_>, is: bool) -> Self {
        self.exprs.push(Expr::Meta { key: MetaKey::IIFNAME, dreg: FIRST });
        let mut name = [0; 16];
        let (text, len) = match interface {
            Interface::Is(text) => (text, name.len()),
            Interface::StartsWith(text) => (text, text.len().min(name.len())),
        };
        for (to, from) in name.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        self.cmp(equal(is), name.get(..len).unwrap_or_default())
    }

    /// Goes on for one protocol.
    pub(crate) fn protocol(mut self, protocol: Protocol) -> Self {
        self.exprs.push(Expr::Meta { key: MetaKey::L4PROTO, dreg: FIRST });
        self.cmp(CmpOp::EQ, &[protocol.number()])
    }

    /// Goes on if the destination port is (not) this one.
    pub(crate) fn port(mut self, port: u16, is: bool) -> Self {
        Field::Dport.load(self.family, 0, &mut self.exprs);
        self.cmp(equal(is), &port.to_be_bytes())
    }

    /// Goes on if the connection has one of these states (or none of them).
    pub(crate) fn state(self, states: CtState, any: bool) -> Self {
        self.ct_bits(CtKey::STATE, states.0, any)
    }

    /// Goes on if the destination was translated (or not).
    pub(crate) fn translated(self, is: bool) -> Self {
        self.ct_bits(CtKey::STATUS, CtStatus::DST_NAT.0, is)
    }

    /// Sets a bit of the mark.
    pub(crate) fn set_mark(mut self, mark: u32) -> Self {
        self.exprs.push(Expr::Meta { key: MetaKey::MARK, dreg: FIRST });
        self.change_mark(!mark, mark)
    }

    /// Goes on if a bit of the mark is set.
    pub(crate) fn marked(mut self, mark: u32) -> Self {
        self.exprs.push(Expr::Meta { key: MetaKey::MARK, dreg: FIRST });
        self.bits(mark, true)
    }

    /// Goes on if a bit of the mark is set, and clears it.
    pub(crate) fn take_mark(mut self, mark: u32) -> Self {
        self = self.marked(mark);
        self.exprs.push(Expr::Meta { key: MetaKey::MARK, dreg: FIRST });
        self.change_mark(u32::MAX, mark)
    }

    /// Remembers where the packet goes.
    pub(crate) fn remember(mut self, client: &[Field], map: SetName, seconds: u32) -> Self {
        let slot = self.load(client);
        Field::Daddr.load(self.family, slot, &mut self.exprs);
        self.exprs.push(Expr::Dynset(Dynset {
            set: set_ref(map),
            op: DynsetOp::UPDATE,
            key: FIRST,
            data: Some(Reg::slot(slot)),
            timeout_ms: Some(u64::from(seconds) * 1000),
            invert: false,
        }));
        self
    }

    /// Goes where an element of a map leads.
    pub(crate) fn follow(self, fields: &[Field], map: SetName) -> Rule {
        self.lookup(fields, map, Some(Reg::VERDICT), false).build()
    }

    /// Sends the packet to the address and port that a map has for the fields.
    pub(crate) fn translate(self, fields: &[Field], map: SetName) -> Rule {
        let port = Reg::slot(Field::Daddr.slots(self.family));
        self.lookup(fields, map, Some(FIRST), false).nat(port)
    }

    /// Sends the packet to the address that a map has for the fields, and a port.
    pub(crate) fn translate_to_port(self, fields: &[Field], map: SetName, port: u16) -> Rule {
        let mut this = self.lookup(fields, map, Some(FIRST), false);
        let value = Cow::Owned(port.to_be_bytes().to_vec());
        this.exprs.push(Expr::Immediate { dreg: Reg::R2, value });
        this.nat(Reg::R2)
    }

    pub(crate) fn masquerade(mut self) -> Rule {
        self.exprs.push(Expr::Masquerade { flags: NatFlags::FULLY_RANDOM, ports: None });
        self.build()
    }

    /// Tells the sender that nobody is there.
    pub(crate) fn reject(mut self) -> Rule {
        // KERNEL: ICMP_PORT_UNREACH, ICMPV6_PORT_UNREACH (include/uapi/linux/icmp.h, icmpv6.h, v6.12).
        let code = match self.family {
            Family::V4 => 3,
            Family::V6 => 4,
        };
        self.exprs.push(Expr::Reject { kind: RejectKind::ICMP, code });
        self.build()
    }

    pub(crate) fn jump(self, chain: ChainName) -> Rule {
        self.verdict(Verdict::Jump(Cow::Owned(chain.to_string())))
    }

    pub(crate) fn goto(self, chain: ChainName) -> Rule {
        self.verdict(Verdict::Goto(Cow::Owned(chain.to_string())))
    }

    pub(crate) fn verdict(mut self, verdict: Verdict<'static>) -> Rule {
        self.exprs.push(Expr::Verdict(verdict));
        self.build()
    }

    pub(crate) fn build(self) -> Rule {
        Rule(self.exprs.into())
    }

    /// Loads fields from the first register on; returns the slot behind them.
    fn load(&mut self, fields: &[Field]) -> u8 {
        let mut slot = 0;
        for field in fields {
            field.load(self.family, slot, &mut self.exprs);
            slot += field.slots(self.family);
        }
        slot
    }

    fn lookup(mut self, fields: &[Field], set: SetName, dreg: Option<Reg>, invert: bool) -> Self {
        self.load(fields);
        self.exprs.push(Expr::Lookup { set: set_ref(set), sreg: FIRST, dreg, invert });
        self
    }

    fn network(mut self, side: Side, net: IpNet, is: bool) -> Self {
        let octets = match net.network() {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let bits = usize::from(net.prefix_len());
        let len = if bits == 0 { octets.len() } else { bits.div_ceil(8) };
        // As `nft` does it: whole bytes are compared as they are, others behind a mask.
        let (len, masked) =
            if bits.is_multiple_of(8) && bits != 0 { (len, false) } else { (octets.len(), true) };
        self.exprs.push(Expr::Payload {
            base: PayloadBase::NETWORK,
            offset: side.offset(self.family),
            len: u32::try_from(len).unwrap_or_default(),
            dreg: FIRST,
        });
        if masked {
            let mask = (0..len).map(|byte| {
                let ones = bits.saturating_sub(byte * 8).min(8);
                if ones == 0 { 0 } else { 0xff_u8 << (8 - ones) }
            });
            let (mask, xor) = (mask.collect::<Vec<_>>(), vec![0; len]);
            self.exprs.push(Expr::Bitwise {
                sreg: FIRST,
                dreg: FIRST,
                mask: mask.into(),
                xor: xor.into(),
            });
        }
        self.cmp(equal(is), octets.get(..len).unwrap_or_default())
    }

    fn ct_bits(mut self, key: CtKey, bits: u32, any: bool) -> Self {
        self.exprs.push(Expr::Ct { key, dreg: FIRST, direction: None });
        self.bits(bits, any)
    }

    /// Goes on if any (or none) of some bits of the first register is set.
    fn bits(mut self, bits: u32, any: bool) -> Self {
        self.exprs.push(bitwise(bits, 0));
        self.cmp(equal(!any), &[0; 4])
    }

    fn change_mark(mut self, mask: u32, xor: u32) -> Self {
        self.exprs.push(bitwise(mask, xor));
        self.exprs.push(Expr::MetaSet { key: MetaKey::MARK, sreg: FIRST });
        self
    }

    fn cmp(mut self, op: CmpOp, value: &[u8]) -> Self {
        self.exprs.push(Expr::Cmp { sreg: FIRST, op, value: Cow::Owned(value.to_vec()) });
        self
    }

    fn nat(mut self, port: Reg) -> Rule {
        self.exprs.push(Expr::Nat(Nat::dnat(nft_family(self.family), FIRST, Some(port))));
        self.build()
    }
}

const fn equal(is: bool) -> CmpOp {
    if is { CmpOp::EQ } else { CmpOp::NE }
}

fn bitwise(mask: u32, xor: u32) -> Expr<'static> {
    let bytes = |number: u32| Cow::Owned(number.to_ne_bytes().to_vec());
    Expr::Bitwise { sreg: FIRST, dreg: FIRST, mask: bytes(mask), xor: bytes(xor) }
}

fn set_ref(set: SetName) -> SetRef<'static> {
    SetRef { name: Cow::Owned(set.to_string()), id: None }
}

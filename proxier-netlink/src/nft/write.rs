//! Writing expressions into a message.

use std::borrow::Cow;

use super::attr::*;
use super::expr::{Dynset, Expr, Hash, Limit, Nat, SetRef, Xt};
use super::types::{
    ByteorderOp, CmpOp, CtDirection, CtKey, Family, FibFlags, FibResult, MetaKey, NatFlags,
    NumgenKind, PayloadBase, Reg, RejectKind, SocketKey, Verdict,
};
use crate::enc::Writer;

/// The expressions of a rule under construction.
///
/// Each method appends one expression and returns the writer, so that calls can be chained. Values
/// are bytes as the kernel compares them: addresses and ports in network order, marks in the host's.
#[derive(Debug)]
pub struct ExprWriter<'w> {
    writer: &'w mut Writer,
}

impl<'w> ExprWriter<'w> {
    pub(crate) fn new(writer: &'w mut Writer) -> Self {
        Self { writer }
    }

    /// Appends any expression.
    pub fn push(&mut self, expr: &Expr<'_>) -> &mut Self {
        put(self.writer, expr);
        self
    }

    /// Jumps to a chain; back here at its end.
    pub fn jump(&mut self, chain: &str) -> &mut Self {
        self.immediate_verdict(Verdict::Jump(Cow::Borrowed(chain)))
    }

    /// Goes to a chain and does not come back.
    pub fn goto(&mut self, chain: &str) -> &mut Self {
        self.immediate_verdict(Verdict::Goto(Cow::Borrowed(chain)))
    }

    /// Ends the rule with a verdict.
    pub fn immediate_verdict(&mut self, verdict: Verdict<'_>) -> &mut Self {
        self.push(&Expr::Verdict(verdict))
    }

    /// Loads a constant.
    pub fn immediate_data(&mut self, dreg: Reg, value: &[u8]) -> &mut Self {
        self.push(&Expr::Immediate { dreg, value: Cow::Borrowed(value) })
    }

    /// Loads a property of the packet that is not in it.
    pub fn meta(&mut self, key: MetaKey, dreg: Reg) -> &mut Self {
        self.push(&Expr::Meta { key, dreg })
    }

    /// Sets a property of the packet that is not in it.
    pub fn meta_set(&mut self, key: MetaKey, sreg: Reg) -> &mut Self {
        self.push(&Expr::MetaSet { key, sreg })
    }

    /// Loads `len` bytes of the packet.
    pub fn payload(&mut self, base: PayloadBase, offset: u32, len: u32, dreg: Reg) -> &mut Self {
        self.push(&Expr::Payload { base, offset, len, dreg })
    }

    /// Goes on only if the comparison holds.
    pub fn cmp(&mut self, sreg: Reg, op: CmpOp, value: &[u8]) -> &mut Self {
        self.push(&Expr::Cmp { sreg, op, value: Cow::Borrowed(value) })
    }

    /// Goes on only if the value is between two others, or with `invert` only if it is not.
    pub fn range(&mut self, sreg: Reg, invert: bool, from: &[u8], to: &[u8]) -> &mut Self {
        let (from, to) = (Cow::Borrowed(from), Cow::Borrowed(to));
        self.push(&Expr::Range { sreg, invert, from, to })
    }

    /// `dreg = (sreg & mask) ^ xor`; both operands are as long as the value.
    pub fn bitwise(&mut self, sreg: Reg, dreg: Reg, mask: &[u8], xor: &[u8]) -> &mut Self {
        let (mask, xor) = (Cow::Borrowed(mask), Cow::Borrowed(xor));
        self.push(&Expr::Bitwise { sreg, dreg, mask, xor })
    }

    /// Converts a value of `len` bytes, in units of `size` bytes, between byte orders.
    pub fn byteorder(
        &mut self,
        sreg: Reg,
        dreg: Reg,
        op: ByteorderOp,
        len: u32,
        size: u32,
    ) -> &mut Self {
        self.push(&Expr::Byteorder { sreg, dreg, op, len, size })
    }

    /// Loads a property of the connection.
    pub fn ct(&mut self, key: CtKey, dreg: Reg, direction: Option<CtDirection>) -> &mut Self {
        self.push(&Expr::Ct { key, dreg, direction })
    }

    /// Sets a property of the connection.
    pub fn ct_set(&mut self, key: CtKey, sreg: Reg, direction: Option<CtDirection>) -> &mut Self {
        self.push(&Expr::CtSet { key, sreg, direction })
    }

    /// Looks a route up.
    pub fn fib(&mut self, result: FibResult, flags: FibFlags, dreg: Reg) -> &mut Self {
        self.push(&Expr::Fib { result, flags, dreg })
    }

    /// Goes on if the key is in the set (with `invert`: if not); with `dreg` loads its value.
    #[expect(single_use_lifetimes, reason = "stable Rust wants a name inside `impl Trait`")]
    pub fn lookup<'a>(
        &mut self,
        set: impl Into<SetRef<'a>>,
        sreg: Reg,
        dreg: Option<Reg>,
        invert: bool,
    ) -> &mut Self {
        self.push(&Expr::Lookup { set: set.into(), sreg, dreg, invert })
    }

    /// Makes a number from `offset` to `offset + modulus - 1`, 4 bytes in host order.
    pub fn numgen(&mut self, kind: NumgenKind, modulus: u32, offset: u32, dreg: Reg) -> &mut Self {
        self.push(&Expr::Numgen { dreg, modulus, kind, offset })
    }

    /// Computes a hash.
    pub fn hash(&mut self, hash: Hash) -> &mut Self {
        self.push(&Expr::Hash(hash))
    }

    /// Translates an address.
    pub fn nat(&mut self, nat: Nat) -> &mut Self {
        self.push(&Expr::Nat(nat))
    }

    /// Gives the packet the address of the output interface as source.
    pub fn masquerade(&mut self, flags: NatFlags) -> &mut Self {
        self.push(&Expr::Masquerade { flags, ports: None })
    }

    /// Translates the destination to this machine; `ports` holds the port in network order.
    pub fn redir(&mut self, port: Option<Reg>, flags: NatFlags) -> &mut Self {
        self.push(&Expr::Redirect { flags, ports: port.map(|reg| (reg, reg)) })
    }

    /// Drops the packet and tells the sender.
    pub fn reject(&mut self, kind: RejectKind, code: u8) -> &mut Self {
        self.push(&Expr::Reject { kind, code })
    }

    /// Counts packets and bytes from zero.
    pub fn counter(&mut self) -> &mut Self {
        self.push(&Expr::Counter { packets: 0, bytes: 0 })
    }

    /// Adds, refreshes or deletes an element of a set.
    pub fn dynset(&mut self, dynset: Dynset<'_>) -> &mut Self {
        self.push(&Expr::Dynset(dynset))
    }

    /// Goes on while a rate is not exceeded.
    pub fn limit(&mut self, limit: Limit) -> &mut Self {
        self.push(&Expr::Limit(limit))
    }

    /// Hands the packet to a local transparent socket; registers hold address and port.
    pub fn tproxy(&mut self, family: Family, addr: Option<Reg>, port: Option<Reg>) -> &mut Self {
        self.push(&Expr::Tproxy { family, addr, port })
    }

    /// Loads a property of the socket the packet is for.
    pub fn socket(&mut self, key: SocketKey, dreg: Reg, level: Option<u32>) -> &mut Self {
        self.push(&Expr::Socket { key, dreg, level })
    }

    /// A match of iptables; `info` is its C structure, padded to a multiple of 8 bytes.
    pub fn xt_match(&mut self, name: &str, rev: u32, info: &[u8]) -> &mut Self {
        self.push(&Expr::Match(Xt { name: Cow::Borrowed(name), rev, info: Cow::Borrowed(info) }))
    }

    /// A target of iptables; `info` is its C structure, padded to a multiple of 8 bytes.
    pub fn xt_target(&mut self, name: &str, rev: u32, info: &[u8]) -> &mut Self {
        self.push(&Expr::Target(Xt { name: Cow::Borrowed(name), rev, info: Cow::Borrowed(info) }))
    }
}

/// Appends one element of a list of expressions.
fn put(w: &mut Writer, expr: &Expr<'_>) {
    let elem = w.nest(LIST_ELEM);
    w.str(EXPR_NAME, name(expr));
    if let Expr::Other { raw, .. } = expr {
        let data = w.nest(EXPR_DATA);
        w.raw(raw);
        w.end_nest(data);
    } else {
        let data = w.nest(EXPR_DATA);
        put_data(w, expr);
        w.end_nest(data);
    }
    w.end_nest(elem);
}

fn name<'e>(expr: &'e Expr<'_>) -> &'e str {
    match expr {
        Expr::Bitwise { .. } => "bitwise",
        Expr::Byteorder { .. } => "byteorder",
        Expr::Cmp { .. } => "cmp",
        Expr::Counter { .. } => "counter",
        Expr::Ct { .. } | Expr::CtSet { .. } => "ct",
        Expr::Dynset(_) => "dynset",
        Expr::Fib { .. } => "fib",
        Expr::Hash(_) => "hash",
        Expr::Immediate { .. } | Expr::Verdict(_) => "immediate",
        Expr::Limit(_) => "limit",
        Expr::Lookup { .. } => "lookup",
        Expr::Masquerade { .. } => "masq",
        Expr::Match(_) => "match",
        Expr::Meta { .. } | Expr::MetaSet { .. } => "meta",
        Expr::Nat(_) => "nat",
        Expr::Numgen { .. } => "numgen",
        Expr::Other { name, .. } => name,
        Expr::Payload { .. } => "payload",
        Expr::Range { .. } => "range",
        Expr::Redirect { .. } => "redir",
        Expr::Reject { .. } => "reject",
        Expr::Socket { .. } => "socket",
        Expr::Target(_) => "target",
        Expr::Tproxy { .. } => "tproxy",
    }
}

/// Writes the attributes of one expression.
fn put_data(w: &mut Writer, expr: &Expr<'_>) {
    match expr {
        Expr::Bitwise { sreg, dreg, mask, xor } => {
            w.be32(BITWISE_SREG, sreg.number());
            w.be32(BITWISE_DREG, dreg.number());
            w.be32(BITWISE_LEN, u32::try_from(mask.len()).unwrap_or(u32::MAX));
            put_value(w, BITWISE_MASK, mask);
            put_value(w, BITWISE_XOR, xor);
        }
        Expr::Byteorder { sreg, dreg, op, len, size } => {
            w.be32(BYTEORDER_SREG, sreg.number());
            w.be32(BYTEORDER_DREG, dreg.number());
            w.be32(BYTEORDER_OP, op.0);
            w.be32(BYTEORDER_LEN, *len);
            w.be32(BYTEORDER_SIZE, *size);
        }
        Expr::Cmp { sreg, op, value } => {
            w.be32(CMP_SREG, sreg.number());
            w.be32(CMP_OP, op.0);
            put_value(w, CMP_DATA, value);
        }
        Expr::Counter { packets, bytes } => {
            if (*bytes, *packets) != (0, 0) {
                w.be64(COUNTER_BYTES, *bytes);
                w.be64(COUNTER_PACKETS, *packets);
            }
        }
        Expr::Ct { key, dreg, direction } => {
            w.be32(CT_DREG, dreg.number());
            put_ct(w, *key, *direction);
        }
        Expr::CtSet { key, sreg, direction } => {
            w.be32(CT_SREG, sreg.number());
            put_ct(w, *key, *direction);
        }
        Expr::Dynset(dynset) => put_dynset(w, dynset),
        Expr::Fib { result, flags, dreg } => {
            w.be32(FIB_DREG, dreg.number());
            w.be32(FIB_RESULT, result.0);
            w.be32(FIB_FLAGS, flags.0);
        }
        Expr::Hash(hash) => put_hash(w, hash),
        Expr::Immediate { dreg, value } => {
            w.be32(IMMEDIATE_DREG, dreg.number());
            put_value(w, IMMEDIATE_DATA, value);
        }
        Expr::Limit(limit) => {
            w.be64(LIMIT_RATE, limit.rate);
            w.be64(LIMIT_UNIT, limit.unit_secs);
            w.be32(LIMIT_BURST, limit.burst);
            w.be32(LIMIT_TYPE, limit.kind.0);
            w.be32(LIMIT_FLAGS, u32::from(limit.invert));
        }
        Expr::Lookup { set, sreg, dreg, invert } => {
            w.str(LOOKUP_SET, &set.name);
            if let Some(id) = set.id {
                w.be32(LOOKUP_SET_ID, id);
            }
            w.be32(LOOKUP_SREG, sreg.number());
            put_reg(w, LOOKUP_DREG, *dreg);
            if *invert {
                w.be32(LOOKUP_FLAGS, 1);
            }
        }
        Expr::Masquerade { flags, ports } => {
            put_flags(w, MASQ_FLAGS, *flags);
            put_range(w, MASQ_REG_PROTO_MIN, *ports);
        }
        Expr::Match(xt) | Expr::Target(xt) => {
            w.str(XT_NAME, &xt.name);
            w.be32(XT_REV, xt.rev);
            w.bytes(XT_INFO, &xt.info);
        }
        Expr::Meta { key, dreg } => {
            w.be32(META_DREG, dreg.number());
            w.be32(META_KEY, key.0);
        }
        Expr::MetaSet { key, sreg } => {
            w.be32(META_KEY, key.0);
            w.be32(META_SREG, sreg.number());
        }
        Expr::Nat(nat) => {
            w.be32(NAT_TYPE, nat.kind.0);
            w.be32(NAT_FAMILY, u32::from(nat.family.number()));
            put_range(w, NAT_REG_ADDR_MIN, nat.addr);
            put_range(w, NAT_REG_PROTO_MIN, nat.ports);
            put_flags(w, NAT_FLAGS, nat.flags);
        }
        Expr::Numgen { dreg, modulus, kind, offset } => {
            w.be32(NG_DREG, dreg.number());
            w.be32(NG_MODULUS, *modulus);
            w.be32(NG_TYPE, kind.0);
            w.be32(NG_OFFSET, *offset);
        }
        Expr::Other { .. } => {}
        Expr::Payload { base, offset, len, dreg } => {
            w.be32(PAYLOAD_DREG, dreg.number());
            w.be32(PAYLOAD_BASE, base.0);
            w.be32(PAYLOAD_OFFSET, *offset);
            w.be32(PAYLOAD_LEN, *len);
        }
        Expr::Range { sreg, invert, from, to } => {
            w.be32(RANGE_SREG, sreg.number());
            w.be32(RANGE_OP, u32::from(*invert));
            put_value(w, RANGE_FROM, from);
            put_value(w, RANGE_TO, to);
        }
        Expr::Redirect { flags, ports } => {
            put_range(w, REDIR_REG_PROTO_MIN, *ports);
            put_flags(w, REDIR_FLAGS, *flags);
        }
        Expr::Reject { kind, code } => {
            w.be32(REJECT_TYPE, kind.0);
            w.u8(REJECT_ICMP_CODE, *code);
        }
        Expr::Socket { key, dreg, level } => {
            w.be32(SOCKET_KEY, key.0);
            w.be32(SOCKET_DREG, dreg.number());
            if let Some(level) = level {
                w.be32(SOCKET_LEVEL, *level);
            }
        }
        Expr::Tproxy { family, addr, port } => {
            w.be32(TPROXY_FAMILY, u32::from(family.number()));
            put_reg(w, TPROXY_REG_ADDR, *addr);
            put_reg(w, TPROXY_REG_PORT, *port);
        }
        Expr::Verdict(verdict) => {
            w.be32(IMMEDIATE_DREG, Reg::VERDICT.number());
            put_verdict(w, IMMEDIATE_DATA, verdict);
        }
    }
}

fn put_dynset(w: &mut Writer, dynset: &Dynset<'_>) {
    w.str(DYNSET_SET_NAME, &dynset.set.name);
    if let Some(id) = dynset.set.id {
        w.be32(DYNSET_SET_ID, id);
    }
    w.be32(DYNSET_OP, dynset.op.0);
    w.be32(DYNSET_SREG_KEY, dynset.key.number());
    put_reg(w, DYNSET_SREG_DATA, dynset.data);
    if let Some(timeout) = dynset.timeout_ms {
        w.be64(DYNSET_TIMEOUT, timeout);
    }
    if dynset.invert {
        w.be32(DYNSET_FLAGS, 1);
    }
}

fn put_hash(w: &mut Writer, hash: &Hash) {
    if let Some((sreg, len)) = hash.input {
        w.be32(HASH_SREG, sreg.number());
        w.be32(HASH_LEN, len);
    }
    w.be32(HASH_DREG, hash.dreg.number());
    w.be32(HASH_MODULUS, hash.modulus);
    if let Some(seed) = hash.seed {
        w.be32(HASH_SEED, seed);
    }
    if hash.offset != 0 {
        w.be32(HASH_OFFSET, hash.offset);
    }
    w.be32(HASH_TYPE, hash.kind.0);
}

fn put_ct(w: &mut Writer, key: CtKey, direction: Option<CtDirection>) {
    w.be32(CT_KEY, key.0);
    if let Some(direction) = direction {
        w.u8(CT_DIRECTION, direction.0);
    }
}

/// Writes the first register of a pair, and the second if it is another one.
fn put_range(w: &mut Writer, min: u16, range: Option<(Reg, Reg)>) {
    if let Some((first, last)) = range {
        w.be32(min, first.number());
        if last != first {
            w.be32(min + 1, last.number());
        }
    }
}

fn put_flags(w: &mut Writer, kind: u16, flags: NatFlags) {
    if flags != NatFlags::NONE {
        w.be32(kind, flags.0);
    }
}

fn put_reg(w: &mut Writer, kind: u16, reg: Option<Reg>) {
    if let Some(reg) = reg {
        w.be32(kind, reg.number());
    }
}

pub(crate) fn put_value(w: &mut Writer, kind: u16, value: &[u8]) {
    let data = w.nest(kind);
    w.bytes(DATA_VALUE, value);
    w.end_nest(data);
}

pub(crate) fn put_verdict(w: &mut Writer, kind: u16, verdict: &Verdict<'_>) {
    let data = w.nest(kind);
    let nest = w.nest(DATA_VERDICT);
    let (code, chain) = match verdict {
        Verdict::Accept => (NF_ACCEPT, None),
        Verdict::Break => (NFT_BREAK, None),
        Verdict::Continue => (NFT_CONTINUE, None),
        Verdict::Drop => (NF_DROP, None),
        Verdict::Goto(chain) => (NFT_GOTO, Some(chain)),
        Verdict::Jump(chain) => (NFT_JUMP, Some(chain)),
        Verdict::Return => (NFT_RETURN, None),
    };
    w.be32(VERDICT_CODE, code.cast_unsigned());
    if let Some(chain) = chain {
        w.str(VERDICT_CHAIN, chain);
    }
    w.end_nest(nest);
    w.end_nest(data);
}

pub(crate) const NF_DROP: i32 = 0;
pub(crate) const NF_ACCEPT: i32 = 1;
pub(crate) const NFT_CONTINUE: i32 = -1;
pub(crate) const NFT_BREAK: i32 = -2;
pub(crate) const NFT_JUMP: i32 = -3;
pub(crate) const NFT_GOTO: i32 = -4;
pub(crate) const NFT_RETURN: i32 = -5;

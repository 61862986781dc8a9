//! Reading expressions out of a message. Total: arbitrary bytes give some expression.

use std::borrow::Cow;

use super::attr::*;
use super::element::Counter;
use super::expr::{Dynset, Expr, Hash, Limit, Nat, SetRef, Xt};
use super::types::{
    ByteorderOp, CmpOp, CtDirection, CtKey, DynsetOp, Family, FibFlags, FibResult, HashKind,
    LimitKind, MetaKey, NatFlags, NatKind, NumgenKind, PayloadBase, Reg, RejectKind, SocketKey,
    Verdict,
};
use super::write::{NF_ACCEPT, NF_DROP, NFT_BREAK, NFT_CONTINUE, NFT_GOTO, NFT_JUMP, NFT_RETURN};
use crate::dec::{Attrs, Table, text};

/// Attributes of an expression by type; no expression this crate knows has more.
type Data<'a> = Table<'a, 12>;

/// Iterator over the expressions of a listed rule, borrowed from the receive buffer.
#[derive(Clone, Debug, Default)]
pub struct Exprs<'a>(pub(crate) Attrs<'a>);

impl<'a> Iterator for Exprs<'a> {
    type Item = Expr<'a>;

    fn next(&mut self) -> Option<Expr<'a>> {
        loop {
            let (kind, value) = self.0.next()?;
            if kind == LIST_ELEM {
                return Some(expr(Attrs(value)));
            }
        }
    }
}

fn expr(elem: Attrs<'_>) -> Expr<'_> {
    let elem = elem.table::<3>();
    let name = elem.raw(EXPR_NAME).map(text).unwrap_or_default();
    let data = elem.nested(EXPR_DATA);
    known(&name, &data.table()).unwrap_or(Expr::Other { name, raw: Cow::Borrowed(data.0) })
}

/// What a counter beside an element has counted, if the expression is one.
pub(crate) fn counter(elem: Attrs<'_>) -> Option<Counter> {
    let Expr::Counter { packets, bytes } = expr(elem) else { return None };
    Some(Counter { packets, bytes })
}

/// The expression, if all its attributes are understood.
fn known<'a>(name: &str, d: &Data<'a>) -> Option<Expr<'a>> {
    match name {
        "bitwise" => bitwise(d),
        "byteorder" => byteorder(d),
        "cmp" => cmp(d),
        "counter" => counted(d),
        "ct" => ct(d),
        "dynset" => dynset(d),
        "fib" => fib(d),
        "hash" => hash(d),
        "immediate" => immediate(d),
        "limit" => limit(d),
        "lookup" => lookup(d),
        "masq" => masquerade(d),
        "match" => xt(d).map(Expr::Match),
        "meta" => meta(d),
        "nat" => nat(d),
        "numgen" => numgen(d),
        "payload" => payload(d),
        "range" => range(d),
        "redir" => redirect(d),
        "reject" => reject(d),
        "socket" => socket(d),
        "target" => xt(d).map(Expr::Target),
        "tproxy" => tproxy(d),
        _ => None,
    }
}

fn bitwise<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [BITWISE_SREG, BITWISE_DREG, BITWISE_LEN, BITWISE_OP, BITWISE_MASK, BITWISE_XOR];
    if !only(d, &known) || d.be32(BITWISE_OP).unwrap_or_default() != 0 {
        return None;
    }
    Some(Expr::Bitwise {
        sreg: reg(d, BITWISE_SREG)?,
        dreg: reg(d, BITWISE_DREG)?,
        mask: value(d, BITWISE_MASK)?,
        xor: value(d, BITWISE_XOR)?,
    })
}

fn byteorder<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [BYTEORDER_SREG, BYTEORDER_DREG, BYTEORDER_OP, BYTEORDER_LEN, BYTEORDER_SIZE];
    only(d, &known).then_some(())?;
    Some(Expr::Byteorder {
        sreg: reg(d, BYTEORDER_SREG)?,
        dreg: reg(d, BYTEORDER_DREG)?,
        op: ByteorderOp(d.be32(BYTEORDER_OP)?),
        len: d.be32(BYTEORDER_LEN)?,
        size: d.be32(BYTEORDER_SIZE)?,
    })
}

fn cmp<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[CMP_SREG, CMP_OP, CMP_DATA]).then_some(())?;
    Some(Expr::Cmp {
        sreg: reg(d, CMP_SREG)?,
        op: CmpOp(d.be32(CMP_OP)?),
        value: value(d, CMP_DATA)?,
    })
}

fn counted<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[COUNTER_BYTES, COUNTER_PACKETS, COUNTER_PAD]).then_some(())?;
    let count = |kind| d.be64(kind).unwrap_or_default();
    Some(Expr::Counter { packets: count(COUNTER_PACKETS), bytes: count(COUNTER_BYTES) })
}

fn ct<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[CT_DREG, CT_SREG, CT_KEY, CT_DIRECTION]).then_some(())?;
    let key = CtKey(d.be32(CT_KEY)?);
    let direction = d.u8(CT_DIRECTION).map(CtDirection);
    match (reg(d, CT_DREG), reg(d, CT_SREG)) {
        (Some(dreg), None) => Some(Expr::Ct { key, dreg, direction }),
        (None, Some(sreg)) => Some(Expr::CtSet { key, sreg, direction }),
        _ => None,
    }
}

fn dynset<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [
        DYNSET_SET_NAME,
        DYNSET_SET_ID,
        DYNSET_OP,
        DYNSET_SREG_KEY,
        DYNSET_SREG_DATA,
        DYNSET_TIMEOUT,
        DYNSET_PAD,
        DYNSET_FLAGS,
    ];
    let flags = d.be32(DYNSET_FLAGS).unwrap_or_default();
    if !only(d, &known) || flags > 1 {
        return None;
    }
    Some(Expr::Dynset(Dynset {
        set: SetRef { name: d.str(DYNSET_SET_NAME)?, id: d.be32(DYNSET_SET_ID) },
        op: DynsetOp(d.be32(DYNSET_OP)?),
        key: reg(d, DYNSET_SREG_KEY)?,
        data: reg(d, DYNSET_SREG_DATA),
        // KERNEL: listed even if not given, then as 0 (net/netfilter/nft_dynset.c, v6.12).
        timeout_ms: d.be64(DYNSET_TIMEOUT).filter(|timeout| *timeout != 0),
        invert: flags == 1,
    }))
}

fn fib<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[FIB_DREG, FIB_RESULT, FIB_FLAGS]).then_some(())?;
    Some(Expr::Fib {
        result: FibResult(d.be32(FIB_RESULT)?),
        flags: FibFlags(d.be32(FIB_FLAGS)?),
        dreg: reg(d, FIB_DREG)?,
    })
}

fn hash<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [HASH_SREG, HASH_DREG, HASH_LEN, HASH_MODULUS, HASH_SEED, HASH_OFFSET, HASH_TYPE];
    only(d, &known).then_some(())?;
    Some(Expr::Hash(Hash {
        kind: HashKind(d.be32(HASH_TYPE).unwrap_or_default()),
        input: reg(d, HASH_SREG).zip(d.be32(HASH_LEN)),
        dreg: reg(d, HASH_DREG)?,
        modulus: d.be32(HASH_MODULUS)?,
        seed: d.be32(HASH_SEED),
        offset: d.be32(HASH_OFFSET).unwrap_or_default(),
    }))
}

fn immediate<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[IMMEDIATE_DREG, IMMEDIATE_DATA]).then_some(())?;
    match reg(d, IMMEDIATE_DREG)? {
        Reg::VERDICT => verdict(d.nested(IMMEDIATE_DATA)).map(Expr::Verdict),
        dreg => Some(Expr::Immediate { dreg, value: value(d, IMMEDIATE_DATA)? }),
    }
}

fn limit<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [LIMIT_RATE, LIMIT_UNIT, LIMIT_BURST, LIMIT_TYPE, LIMIT_FLAGS, LIMIT_PAD];
    let flags = d.be32(LIMIT_FLAGS).unwrap_or_default();
    if !only(d, &known) || flags > 1 {
        return None;
    }
    Some(Expr::Limit(Limit {
        kind: LimitKind(d.be32(LIMIT_TYPE).unwrap_or_default()),
        rate: d.be64(LIMIT_RATE)?,
        unit_secs: d.be64(LIMIT_UNIT)?,
        burst: d.be32(LIMIT_BURST)?,
        invert: flags == 1,
    }))
}

fn lookup<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [LOOKUP_SET, LOOKUP_SREG, LOOKUP_DREG, LOOKUP_SET_ID, LOOKUP_FLAGS];
    let flags = d.be32(LOOKUP_FLAGS).unwrap_or_default();
    if !only(d, &known) || flags > 1 {
        return None;
    }
    Some(Expr::Lookup {
        set: SetRef { name: d.str(LOOKUP_SET)?, id: d.be32(LOOKUP_SET_ID) },
        sreg: reg(d, LOOKUP_SREG)?,
        dreg: reg(d, LOOKUP_DREG),
        invert: flags == 1,
    })
}

fn masquerade<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[MASQ_FLAGS, MASQ_REG_PROTO_MIN, MASQ_REG_PROTO_MAX]).then_some(())?;
    Some(Expr::Masquerade { flags: flags(d, MASQ_FLAGS), ports: pair(d, MASQ_REG_PROTO_MIN) })
}

fn meta<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[META_DREG, META_SREG, META_KEY]).then_some(())?;
    let key = MetaKey(d.be32(META_KEY)?);
    match (reg(d, META_DREG), reg(d, META_SREG)) {
        (Some(dreg), None) => Some(Expr::Meta { key, dreg }),
        (None, Some(sreg)) => Some(Expr::MetaSet { key, sreg }),
        _ => None,
    }
}

fn nat<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let known = [
        NAT_TYPE,
        NAT_FAMILY,
        NAT_REG_ADDR_MIN,
        NAT_REG_ADDR_MAX,
        NAT_REG_PROTO_MIN,
        NAT_REG_PROTO_MAX,
        NAT_FLAGS,
    ];
    only(d, &known).then_some(())?;
    Some(Expr::Nat(Nat {
        kind: NatKind(d.be32(NAT_TYPE)?),
        family: family(d.be32(NAT_FAMILY)?)?,
        addr: pair(d, NAT_REG_ADDR_MIN),
        ports: pair(d, NAT_REG_PROTO_MIN),
        flags: flags(d, NAT_FLAGS),
    }))
}

fn numgen<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[NG_DREG, NG_MODULUS, NG_TYPE, NG_OFFSET]).then_some(())?;
    Some(Expr::Numgen {
        dreg: reg(d, NG_DREG)?,
        modulus: d.be32(NG_MODULUS)?,
        kind: NumgenKind(d.be32(NG_TYPE)?),
        offset: d.be32(NG_OFFSET).unwrap_or_default(),
    })
}

fn payload<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[PAYLOAD_DREG, PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN]).then_some(())?;
    Some(Expr::Payload {
        base: PayloadBase(d.be32(PAYLOAD_BASE)?),
        offset: d.be32(PAYLOAD_OFFSET)?,
        len: d.be32(PAYLOAD_LEN)?,
        dreg: reg(d, PAYLOAD_DREG)?,
    })
}

fn range<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    let op = d.be32(RANGE_OP)?;
    if !only(d, &[RANGE_SREG, RANGE_OP, RANGE_FROM, RANGE_TO]) || op > 1 {
        return None;
    }
    Some(Expr::Range {
        sreg: reg(d, RANGE_SREG)?,
        invert: op == 1,
        from: value(d, RANGE_FROM)?,
        to: value(d, RANGE_TO)?,
    })
}

fn redirect<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[REDIR_REG_PROTO_MIN, REDIR_REG_PROTO_MAX, REDIR_FLAGS]).then_some(())?;
    Some(Expr::Redirect { flags: flags(d, REDIR_FLAGS), ports: pair(d, REDIR_REG_PROTO_MIN) })
}

fn reject<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[REJECT_TYPE, REJECT_ICMP_CODE]).then_some(())?;
    Some(Expr::Reject {
        kind: RejectKind(d.be32(REJECT_TYPE)?),
        // KERNEL: not listed for a reset (net/netfilter/nft_reject.c, v6.12).
        code: d.u8(REJECT_ICMP_CODE).unwrap_or_default(),
    })
}

fn socket<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[SOCKET_KEY, SOCKET_DREG, SOCKET_LEVEL]).then_some(())?;
    Some(Expr::Socket {
        key: SocketKey(d.be32(SOCKET_KEY)?),
        dreg: reg(d, SOCKET_DREG)?,
        level: d.be32(SOCKET_LEVEL),
    })
}

fn tproxy<'a>(d: &Data<'a>) -> Option<Expr<'a>> {
    only(d, &[TPROXY_FAMILY, TPROXY_REG_ADDR, TPROXY_REG_PORT]).then_some(())?;
    Some(Expr::Tproxy {
        family: family(d.be32(TPROXY_FAMILY)?)?,
        addr: reg(d, TPROXY_REG_ADDR),
        port: reg(d, TPROXY_REG_PORT),
    })
}

fn xt<'a>(d: &Data<'a>) -> Option<Xt<'a>> {
    only(d, &[XT_NAME, XT_REV, XT_INFO]).then_some(())?;
    Some(Xt {
        name: d.str(XT_NAME)?,
        rev: d.be32(XT_REV)?,
        info: Cow::Borrowed(d.raw(XT_INFO).unwrap_or_default()),
    })
}

/// Reads the content of a data attribute that holds a verdict.
pub(crate) fn verdict(data: Attrs<'_>) -> Option<Verdict<'_>> {
    let nest = data.table::<3>().nested(DATA_VERDICT).table::<4>();
    let chain = || nest.str(VERDICT_CHAIN);
    Some(match nest.be32(VERDICT_CODE)?.cast_signed() {
        NF_ACCEPT => Verdict::Accept,
        NF_DROP => Verdict::Drop,
        NFT_BREAK => Verdict::Break,
        NFT_CONTINUE => Verdict::Continue,
        NFT_GOTO => Verdict::Goto(chain()?),
        NFT_JUMP => Verdict::Jump(chain()?),
        NFT_RETURN => Verdict::Return,
        _ => return None,
    })
}

/// Whether the attributes present are all known.
fn only(d: &Data<'_>, known: &[u16]) -> bool {
    d.only(known.iter().fold(0, |mask, kind| mask | 1 << kind))
}

fn reg(d: &Data<'_>, kind: u16) -> Option<Reg> {
    d.be32(kind).map(Reg::from_number)
}

/// A pair of registers, of which the second may be left out if it is the first.
fn pair(d: &Data<'_>, min: u16) -> Option<(Reg, Reg)> {
    let first = reg(d, min)?;
    Some((first, reg(d, min + 1).unwrap_or(first)))
}

/// The flags a user gave.
// KERNEL: nft_nat and nft_redir add NF_NAT_RANGE_MAP_IPS (1) and _PROTO_SPECIFIED (2) for the
// registers that are present, and list them (net/netfilter/nft_nat.c, nft_redir.c, v6.12).
fn flags(d: &Data<'_>, kind: u16) -> NatFlags {
    NatFlags(d.be32(kind).unwrap_or_default() & !3)
}

fn value<'a>(d: &Data<'a>, kind: u16) -> Option<Cow<'a, [u8]>> {
    d.nested(kind).find(DATA_VALUE).map(Cow::Borrowed)
}

fn family(number: u32) -> Option<Family> {
    let family = Family::from_number(u8::try_from(number).ok()?);
    (number == u32::from(family.number())).then_some(family)
}

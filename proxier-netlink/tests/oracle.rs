//! The encoder against libnftnl: the same objects, encoded by both, compared attribute by attribute.
//!
//! Needs `libnftnl-dev libmnl-dev pkg-config` at build time, and no privilege.

#![cfg(test)]

use std::ffi::CStr;
use std::ptr::NonNull;

use nftnl::expr::{Bitwise, Cmp, CmpOp as NCmp, Conntrack, Counter, Expression, Immediate, Lookup};
use nftnl::expr::{Masquerade, Meta, Nat as NNat, NatType, Payload, Register, Verdict as NVerdict};
use nftnl::nftnl_sys as sys;
use nftnl::{Batch, Chain, MsgType, NlMsg, ProtoFamily, Rule, Table};
use proxier_netlink::nft::*;

/// An attribute: its type and its value, which is bytes or attributes.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Node {
    Leaf(u16, Vec<u8>),
    Nest(u16, Vec<Self>),
}

impl Node {
    fn kind(&self) -> u16 {
        match self {
            Self::Leaf(kind, _) | Self::Nest(kind, _) => *kind,
        }
    }
}

/// A message: type, flags without NLM_F_ACK, family, attributes.
type Message = (u16, u16, u8, Vec<Node>);

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

/// Reads attributes; those of a message are sorted by type, those of a list stay in order.
fn nodes(mut bytes: &[u8]) -> Vec<Node> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (len, kind) = (usize::from(u16_at(bytes, 0)), u16_at(bytes, 2));
        let value = &bytes[4..len];
        out.push(match kind & 0x8000 {
            0 => Node::Leaf(kind, value.to_vec()),
            _ => Node::Nest(kind & 0x3fff, nodes(value)),
        });
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    let mut kinds: Vec<_> = out.iter().map(Node::kind).collect();
    kinds.dedup();
    if kinds.len() == out.len() {
        out.sort_by_key(Node::kind);
    }
    out
}

fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut out = Vec::new();
    while bytes.len() >= 20 {
        let len = usize::try_from(u32::from_ne_bytes(bytes[..4].try_into().unwrap())).unwrap();
        let (kind, flags) = (u16_at(bytes, 4), u16_at(bytes, 6));
        if kind >> 8 == 10 {
            out.push((kind, flags & !4, bytes[16], nodes(&bytes[20..len])));
        }
        bytes = &bytes[len..];
    }
    out
}

fn theirs(write: impl FnOnce(&mut Batch)) -> Vec<Message> {
    let mut batch = Batch::new();
    write(&mut batch);
    let bytes: Vec<u8> = batch.finalize().iter().flatten().copied().collect();
    messages(&bytes)
}

fn encode(write: impl FnOnce(&mut Transaction)) -> Vec<Message> {
    let mut tx = Transaction::new();
    write(&mut tx);
    messages(&tx.to_bytes())
}

/// One message of each, compared; `flags` are those the two set differently on purpose.
fn same(theirs: &[Message], ours: &[Message], flags: u16) {
    assert_eq!((theirs.len(), ours.len()), (1, 1));
    let ((kind_a, flags_a, family_a, a), (kind_b, flags_b, family_b, b)) = (&theirs[0], &ours[0]);
    assert_eq!((kind_a, flags_a & !flags, family_a), (kind_b, flags_b & !flags, family_b));
    assert_eq!(a, b);
}

fn add<T: NlMsg>(message: &T) -> Vec<Message> {
    theirs(|batch| batch.add(message, MsgType::Add))
}

const CREATE: u16 = 0x400;
const EXCL: u16 = 0x200;

#[test]
fn tables_are_encoded_alike() {
    for (theirs, family) in [
        (ProtoFamily::Ipv4, Family::Ipv4),
        (ProtoFamily::Ipv6, Family::Ipv6),
        (ProtoFamily::Inet, Family::Inet),
    ] {
        let table = Table::new(c"proxier", theirs);
        same(&add(&table), &encode(|tx| tx.new_table(family, "proxier")), CREATE);
        let mut del = self::theirs(|batch| batch.add(&table, MsgType::Del));
        // libnftnl repeats the flags, which mean nothing to a deletion.
        del[0].3.retain(|node| node.kind() == 1);
        same(&del, &encode(|tx| tx.del_table(family, "proxier")), 0);
    }
}

#[test]
fn chains_are_encoded_alike() {
    let table = Table::new(c"nat", ProtoFamily::Ipv4);
    let mut chain = Chain::new(c"KUBE-SVC-X", &table);
    same(&add(&chain), &encode(|tx| tx.new_chain(Family::Ipv4, "nat", "KUBE-SVC-X")), 0);
    let del = theirs(|batch| batch.add(&chain, MsgType::Del));
    same(&del, &encode(|tx| tx.del_chain(Family::Ipv4, "nat", "KUBE-SVC-X")), 0);
    chain.set_hook(nftnl::Hook::PostRouting, -7);
    chain.set_type(nftnl::ChainType::Nat);
    chain.set_policy(nftnl::Policy::Drop);
    let base = BaseChain {
        kind: ChainType::Nat,
        hook: Hook::Postrouting,
        priority: -7,
        policy: Policy::Drop,
    };
    let spec = ChainSpec::new(Family::Ipv4, "nat", "KUBE-SVC-X").base(base);
    same(&add(&chain), &encode(|tx| tx.chain(spec)), 0);
}

/// Compares a rule with one expression, made through the crate `nftnl` and by us.
fn expression(theirs: &impl Expression, ours_expr: &Expr<'_>) {
    let table = Table::new(c"nat", ProtoFamily::Ipv4);
    let chain = Chain::new(c"x", &table);
    let mut rule = Rule::new(&chain);
    rule.add_expr(theirs);
    let spec = RuleSpec::append(Family::Ipv4, "nat", "x");
    let ours = encode(|tx| {
        tx.rule(spec, |e| {
            e.push(ours_expr);
        });
    });
    same(&add(&rule), &ours, EXCL);
}

#[test]
fn rules_are_encoded_alike() {
    let table = Table::new(c"nat", ProtoFamily::Ipv6);
    let chain = Chain::new(c"x", &table);
    let mut rule = Rule::new(&chain);
    rule.add_expr(&Meta::L4Proto);
    rule.add_expr(&Cmp::new(NCmp::Eq, 6_u8));
    rule.add_expr(&Counter);
    rule.add_expr(&NVerdict::Jump { chain: c"y".to_owned() });
    rule.set_comment(c"shop/cart").unwrap();
    rule.set_position(42);
    let ours = |place: fn(Family, &'static str, &'static str, u64) -> RuleSpec<'static>| {
        encode(|tx| {
            let spec = place(Family::Ipv6, "nat", "x", 42).comment("shop/cart");
            tx.rule(spec, |e| {
                e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[6]);
                e.counter().jump("y");
            });
        })
    };
    same(&add(&rule), &ours(RuleSpec::after), EXCL);

    let mut rule = Rule::new(&chain);
    rule.set_handle(42);
    let del = theirs(|batch| batch.add(&rule, MsgType::Del));
    same(&del, &encode(|tx| tx.del_rule(Family::Ipv6, "nat", "x", 42)), 0);
}

#[test]
fn expressions_of_nftnl_are_encoded_alike() {
    use nftnl::expr::{Ipv4HeaderField, NetworkHeaderField, TcpHeaderField, TransportHeaderField};
    let r1 = Reg::R1;
    for (key, ours) in [
        (Meta::Protocol, MetaKey::PROTOCOL),
        (Meta::IifName, MetaKey::IIFNAME),
        (Meta::OifName, MetaKey::OIFNAME),
        (Meta::L4Proto, MetaKey::L4PROTO),
        (Meta::NfProto, MetaKey::NFPROTO),
        (Meta::SkUid, MetaKey::SKUID),
        (Meta::PRandom, MetaKey::PRANDOM),
        (Meta::Mark { set: false }, MetaKey::MARK),
    ] {
        expression(&key, &Expr::Meta { key: ours, dreg: r1 });
    }
    expression(&Meta::Mark { set: true }, &Expr::MetaSet { key: MetaKey::MARK, sreg: r1 });
    for (key, ours) in [
        (Conntrack::State, CtKey::STATE),
        (Conntrack::Status, CtKey::STATUS),
        (Conntrack::Mark { set: false }, CtKey::MARK),
    ] {
        expression(&key, &Expr::Ct { key: ours, dreg: r1, direction: None });
    }
    let mark = Expr::CtSet { key: CtKey::MARK, sreg: r1, direction: None };
    expression(&Conntrack::Mark { set: true }, &mark);
    for (op, ours) in [
        (NCmp::Eq, CmpOp::EQ),
        (NCmp::Neq, CmpOp::NE),
        (NCmp::Lt, CmpOp::LT),
        (NCmp::Lte, CmpOp::LE),
        (NCmp::Gt, CmpOp::GT),
        (NCmp::Gte, CmpOp::GE),
    ] {
        let bytes: &[u8] = &[10, 0, 0, 1, 7];
        let ours = Expr::Cmp { sreg: r1, op: ours, value: bytes.into() };
        expression(&Cmp::new(op, bytes), &ours);
    }
    let (mask, xor): (&[u8], &[u8]) = (&[255, 255, 0, 0], &[0, 0, 0, 1]);
    let ours = Expr::Bitwise { sreg: r1, dreg: r1, mask: mask.into(), xor: xor.into() };
    expression(&Bitwise::new(mask, xor), &ours);
    let address = Payload::Network(NetworkHeaderField::Ipv4(Ipv4HeaderField::Daddr));
    let ours = Expr::Payload { base: PayloadBase::NETWORK, offset: 16, len: 4, dreg: r1 };
    expression(&address, &ours);
    let port = Payload::Transport(TransportHeaderField::Tcp(TcpHeaderField::Dport));
    let ours = Expr::Payload { base: PayloadBase::TRANSPORT, offset: 2, len: 2, dreg: r1 };
    expression(&port, &ours);
    let data = Immediate::new([10_u8, 0, 0, 1], Register::Reg3);
    expression(&data, &Expr::Immediate { dreg: Reg::R3, value: [10, 0, 0, 1][..].into() });
    expression(&Counter, &Expr::Counter { packets: 0, bytes: 0 });
    expression(&Masquerade, &Expr::Masquerade { flags: NatFlags::NONE, ports: None });
    for port_register in [None, Some(Register::Reg2)] {
        let (nat_type, ip_register) = (NatType::DNat, Register::Reg1);
        let nat = NNat { nat_type, family: ProtoFamily::Ipv4, ip_register, port_register };
        let ours = Nat::dnat(Family::Ipv4, r1, port_register.map(|_| Reg::R2));
        expression(&nat, &Expr::Nat(ours));
    }
    for (verdict, ours) in [
        (NVerdict::Accept, Verdict::Accept),
        (NVerdict::Drop, Verdict::Drop),
        (NVerdict::Continue, Verdict::Continue),
        (NVerdict::Break, Verdict::Break),
        (NVerdict::Return, Verdict::Return),
        (NVerdict::Jump { chain: c"KUBE-SVC-X".to_owned() }, Verdict::Jump("KUBE-SVC-X".into())),
        (NVerdict::Goto { chain: c"KUBE-SVC-X".to_owned() }, Verdict::Goto("KUBE-SVC-X".into())),
    ] {
        expression(&verdict, &Expr::Verdict(ours));
    }
    let table = Table::new(c"nat", ProtoFamily::Ipv4);
    let set: nftnl::set::Set<'_, std::net::Ipv4Addr> =
        nftnl::set::Set::new_named(c"vips", 5, &table, ProtoFamily::Ipv4);
    let set_ref = SetRef { name: "vips".into(), id: Some(5) };
    let ours = Expr::Lookup { set: set_ref, sreg: r1, dreg: None, invert: false };
    expression(&Lookup::new(&set), &ours);
}

/// The value of an attribute of libnftnl.
enum Value {
    Bytes(&'static [u8]),
    /// Bytes that libnftnl keeps and frees.
    Owned(&'static [u8]),
    Text(&'static CStr),
    U32(u32),
    U64(u64),
    U8(u8),
}

/// An expression the crate `nftnl` does not wrap, made by libnftnl all the same.
struct Raw(&'static CStr, Vec<(u32, Value)>);

impl Expression for Raw {
    #[expect(unsafe_code, reason = "libnftnl is a C library")]
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        // SAFETY: the name ends with NUL; the function makes its own copy.
        let expr = unsafe { sys::nftnl_expr_alloc(self.0.as_ptr()) };
        let expr = NonNull::new(expr).expect("libnftnl knows the expression");
        for (attribute, value) in &self.1 {
            let (e, kind) = (expr.as_ptr(), u16::try_from(*attribute).unwrap());
            // SAFETY: `e` is an expression that was just made. Pointers are valid for the length
            // given; libnftnl copies what they point to, except for the data of matches and
            // targets, which it takes over and frees: these come from malloc.
            unsafe {
                match value {
                    Value::Bytes(bytes) => {
                        let len = u32::try_from(bytes.len()).unwrap();
                        sys::nftnl_expr_set(e, kind, bytes.as_ptr().cast(), len);
                    }
                    Value::Owned(bytes) => {
                        let copy = libc::malloc(bytes.len()).cast::<u8>();
                        assert!(!copy.is_null());
                        copy.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                        let len = u32::try_from(bytes.len()).unwrap();
                        sys::nftnl_expr_set(e, kind, copy.cast(), len);
                    }
                    Value::Text(text) => {
                        sys::nftnl_expr_set_str(e, kind, text.as_ptr());
                    }
                    Value::U32(n) => sys::nftnl_expr_set_u32(e, kind, *n),
                    Value::U64(n) => sys::nftnl_expr_set_u64(e, kind, *n),
                    Value::U8(n) => sys::nftnl_expr_set_u8(e, kind, *n),
                }
            }
        }
        expr
    }
}

#[test]
fn expressions_of_libnftnl_are_encoded_alike() {
    use Value::{Bytes, Owned, Text, U8, U32, U64};
    let (r1, r2, r3, r4) = (Reg::R1, Reg::R2, Reg::R3, Reg::R4);
    let xt = |name: &'static str, rev, info: &'static [u8]| Xt {
        name: name.into(),
        rev,
        info: info.into(),
    };
    let cases: Vec<(Raw, Expr<'static>)> = vec![
        (
            Raw(
                c"numgen",
                vec![
                    (sys::NFTNL_EXPR_NG_DREG, U32(1)),
                    (sys::NFTNL_EXPR_NG_MODULUS, U32(7)),
                    (sys::NFTNL_EXPR_NG_TYPE, U32(1)),
                    (sys::NFTNL_EXPR_NG_OFFSET, U32(2)),
                ],
            ),
            Expr::Numgen { dreg: r1, modulus: 7, kind: NumgenKind::RANDOM, offset: 2 },
        ),
        (
            Raw(
                c"fib",
                vec![
                    (sys::NFTNL_EXPR_FIB_DREG, U32(1)),
                    (sys::NFTNL_EXPR_FIB_RESULT, U32(3)),
                    (sys::NFTNL_EXPR_FIB_FLAGS, U32(2)),
                ],
            ),
            Expr::Fib { result: FibResult::ADDRTYPE, flags: FibFlags::DADDR, dreg: r1 },
        ),
        (
            Raw(
                c"masq",
                vec![
                    (sys::NFTNL_EXPR_MASQ_FLAGS, U32(16)),
                    (sys::NFTNL_EXPR_MASQ_REG_PROTO_MIN, U32(1)),
                    (sys::NFTNL_EXPR_MASQ_REG_PROTO_MAX, U32(2)),
                ],
            ),
            Expr::Masquerade { flags: NatFlags::FULLY_RANDOM, ports: Some((r1, r2)) },
        ),
        (
            Raw(
                c"redir",
                vec![
                    (sys::NFTNL_EXPR_REDIR_REG_PROTO_MIN, U32(1)),
                    (sys::NFTNL_EXPR_REDIR_FLAGS, U32(4)),
                ],
            ),
            Expr::Redirect { flags: NatFlags::RANDOM, ports: Some((r1, r1)) },
        ),
        (
            Raw(
                c"nat",
                vec![
                    (sys::NFTNL_EXPR_NAT_TYPE, U32(0)),
                    (sys::NFTNL_EXPR_NAT_FAMILY, U32(10)),
                    (sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, U32(1)),
                    (sys::NFTNL_EXPR_NAT_REG_ADDR_MAX, U32(2)),
                    (sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, U32(3)),
                    (sys::NFTNL_EXPR_NAT_REG_PROTO_MAX, U32(4)),
                    (sys::NFTNL_EXPR_NAT_FLAGS, U32(8)),
                ],
            ),
            Expr::Nat(Nat {
                kind: NatKind::SNAT,
                family: Family::Ipv6,
                addr: Some((r1, r2)),
                ports: Some((r3, r4)),
                flags: NatFlags::PERSISTENT,
            }),
        ),
        (
            Raw(
                c"reject",
                vec![(sys::NFTNL_EXPR_REJECT_TYPE, U32(2)), (sys::NFTNL_EXPR_REJECT_CODE, U8(1))],
            ),
            Expr::Reject { kind: RejectKind::ICMPX, code: 1 },
        ),
        (
            Raw(
                c"lookup",
                vec![
                    (sys::NFTNL_EXPR_LOOKUP_SET, Text(c"services")),
                    (sys::NFTNL_EXPR_LOOKUP_SREG, U32(1)),
                    (sys::NFTNL_EXPR_LOOKUP_DREG, U32(0)),
                ],
            ),
            Expr::Lookup {
                set: "services".into(),
                sreg: r1,
                dreg: Some(Reg::VERDICT),
                invert: false,
            },
        ),
        (
            Raw(
                c"lookup",
                vec![
                    (sys::NFTNL_EXPR_LOOKUP_SET, Text(c"vips")),
                    (sys::NFTNL_EXPR_LOOKUP_SREG, U32(1)),
                    (sys::NFTNL_EXPR_LOOKUP_FLAGS, U32(1)),
                ],
            ),
            Expr::Lookup { set: "vips".into(), sreg: r1, dreg: None, invert: true },
        ),
        (
            Raw(
                c"dynset",
                vec![
                    (sys::NFTNL_EXPR_DYNSET_SET_NAME, Text(c"affinity")),
                    (sys::NFTNL_EXPR_DYNSET_OP, U32(1)),
                    (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(1)),
                    (sys::NFTNL_EXPR_DYNSET_SREG_DATA, U32(2)),
                    (sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(10_800_000)),
                    (sys::NFTNL_EXPR_DYNSET_FLAGS, U32(1)),
                ],
            ),
            Expr::Dynset(Dynset {
                set: "affinity".into(),
                op: DynsetOp::UPDATE,
                key: r1,
                data: Some(r2),
                timeout_ms: Some(10_800_000),
                invert: true,
            }),
        ),
        (
            Raw(
                c"hash",
                vec![
                    (sys::NFTNL_EXPR_HASH_SREG, U32(2)),
                    (sys::NFTNL_EXPR_HASH_DREG, U32(1)),
                    (sys::NFTNL_EXPR_HASH_LEN, U32(8)),
                    (sys::NFTNL_EXPR_HASH_MODULUS, U32(5)),
                    (sys::NFTNL_EXPR_HASH_SEED, U32(99)),
                    (sys::NFTNL_EXPR_HASH_OFFSET, U32(3)),
                    (sys::NFTNL_EXPR_HASH_TYPE, U32(0)),
                ],
            ),
            Expr::Hash(Hash {
                kind: HashKind::JENKINS,
                input: Some((r2, 8)),
                dreg: r1,
                modulus: 5,
                seed: Some(99),
                offset: 3,
            }),
        ),
        (
            Raw(
                c"tproxy",
                vec![
                    (sys::NFTNL_EXPR_TPROXY_FAMILY, U32(2)),
                    (sys::NFTNL_EXPR_TPROXY_REG_ADDR, U32(1)),
                    (sys::NFTNL_EXPR_TPROXY_REG_PORT, U32(2)),
                ],
            ),
            Expr::Tproxy { family: Family::Ipv4, addr: Some(r1), port: Some(r2) },
        ),
        (
            Raw(
                c"limit",
                vec![
                    (sys::NFTNL_EXPR_LIMIT_RATE, U64(10)),
                    (sys::NFTNL_EXPR_LIMIT_UNIT, U64(60)),
                    (sys::NFTNL_EXPR_LIMIT_BURST, U32(5)),
                    (sys::NFTNL_EXPR_LIMIT_TYPE, U32(1)),
                    (sys::NFTNL_EXPR_LIMIT_FLAGS, U32(1)),
                ],
            ),
            Expr::Limit(Limit {
                kind: LimitKind::BYTES,
                rate: 10,
                unit_secs: 60,
                burst: 5,
                invert: true,
            }),
        ),
        (
            Raw(
                c"range",
                vec![
                    (sys::NFTNL_EXPR_RANGE_SREG, U32(1)),
                    (sys::NFTNL_EXPR_RANGE_OP, U32(1)),
                    (sys::NFTNL_EXPR_RANGE_FROM_DATA, Bytes(&[0, 80])),
                    (sys::NFTNL_EXPR_RANGE_TO_DATA, Bytes(&[0, 90])),
                ],
            ),
            Expr::Range {
                sreg: r1,
                invert: true,
                from: [0, 80][..].into(),
                to: [0, 90][..].into(),
            },
        ),
        (
            Raw(
                c"byteorder",
                vec![
                    (sys::NFTNL_EXPR_BYTEORDER_SREG, U32(1)),
                    (sys::NFTNL_EXPR_BYTEORDER_DREG, U32(2)),
                    (sys::NFTNL_EXPR_BYTEORDER_OP, U32(1)),
                    (sys::NFTNL_EXPR_BYTEORDER_LEN, U32(4)),
                    (sys::NFTNL_EXPR_BYTEORDER_SIZE, U32(2)),
                ],
            ),
            Expr::Byteorder { sreg: r1, dreg: r2, op: ByteorderOp::HTON, len: 4, size: 2 },
        ),
        (
            Raw(
                c"socket",
                vec![
                    (sys::NFTNL_EXPR_SOCKET_KEY, U32(3)),
                    (sys::NFTNL_EXPR_SOCKET_DREG, U32(1)),
                    (sys::NFTNL_EXPR_SOCKET_LEVEL, U32(2)),
                ],
            ),
            Expr::Socket { key: SocketKey::CGROUPV2, dreg: r1, level: Some(2) },
        ),
        (
            Raw(
                c"ct",
                vec![
                    (sys::NFTNL_EXPR_CT_DREG, U32(1)),
                    (sys::NFTNL_EXPR_CT_KEY, U32(12)),
                    (sys::NFTNL_EXPR_CT_DIR, U8(0)),
                ],
            ),
            Expr::Ct { key: CtKey::PROTO_DST, dreg: r1, direction: Some(CtDirection::ORIGINAL) },
        ),
        (
            Raw(
                c"match",
                vec![
                    (sys::NFTNL_EXPR_MT_NAME, Text(c"addrtype")),
                    (sys::NFTNL_EXPR_MT_REV, U32(1)),
                    (sys::NFTNL_EXPR_MT_INFO, Owned(&[1, 2, 3, 4, 5, 6, 7, 8])),
                ],
            ),
            Expr::Match(xt("addrtype", 1, &[1, 2, 3, 4, 5, 6, 7, 8])),
        ),
        (
            Raw(
                c"target",
                vec![
                    (sys::NFTNL_EXPR_TG_NAME, Text(c"MARK")),
                    (sys::NFTNL_EXPR_TG_REV, U32(2)),
                    (sys::NFTNL_EXPR_TG_INFO, Owned(&[8, 7, 6, 5, 4, 3, 2, 1])),
                ],
            ),
            Expr::Target(xt("MARK", 2, &[8, 7, 6, 5, 4, 3, 2, 1])),
        ),
    ];
    for (theirs, ours) in &cases {
        expression(theirs, ours);
    }
}

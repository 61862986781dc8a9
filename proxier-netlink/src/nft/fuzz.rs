//! Readers of nf_tables messages against bytes no kernel sends.

use proptest::prelude::*;

use super::error::Refusal;
use super::*;
use crate::dec::Messages;

/// A transaction with something of everything that has structure.
fn sample() -> Transaction {
    let mut tx = Transaction::new();
    let family = Family::Ipv4;
    tx.table(TableSpec::new(family, "t").userdata(&[0, 2, b'x', 0]));
    let base = BaseChain {
        kind: ChainType::Nat,
        hook: Hook::Output,
        priority: -100,
        policy: Policy::Accept,
    };
    tx.chain(ChainSpec::new(family, "t", "c").base(base));
    tx.new_set(
        SetSpec::map(family, "t", "m", DataType::IPV4, DataType::VERDICT)
            .size(3)
            .interval_fields(&[4, 2]),
    );
    let to = Verdict::Goto("c".into());
    tx.add_elements(family, "t", "m", [Element::new(&[1; 4]).verdict(&to).comment("c")]);
    tx.rule(RuleSpec::after(family, "t", "c", 7).comment("c"), |e| {
        e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[6]);
        e.payload(PayloadBase::NETWORK, 16, 4, Reg::R1).bitwise(Reg::R1, Reg::R1, &[3; 4], &[0; 4]);
        e.ct(CtKey::STATE, Reg::R1, Some(CtDirection::REPLY)).counter();
        e.lookup("m", Reg::R1, Some(Reg::VERDICT), false);
        e.xt_match("comment", 0, &[7; 256]).masquerade(NatFlags::FULLY_RANDOM);
        e.nat(Nat::dnat(family, Reg::R1, Some(Reg::R2))).goto("c");
    });
    tx
}

/// Gives a message to every reader.
fn read_all(tx: &Transaction, message: Message<'_>) {
    let _ = TableDump::read(message).map(|t| t.comment().map(str::to_owned));
    let _ = ChainDump::read(message).map(|c| c.comment().map(str::to_owned));
    let _ = SetDump::read(message).map(|s| s.comment().map(str::to_owned));
    element::elements(message).for_each(|e| {
        e.to_owned();
    });
    if let Some(rule) = RuleRef::read(message) {
        let owned = rule.to_owned();
        let mut again = Transaction::new();
        again.rule(RuleSpec::append(Family::Ipv4, "t", "c"), |e| {
            owned.exprs.iter().for_each(|expr| {
                e.push(expr);
            });
        });
    }
    if let Some((_, attrs)) = message.nfnl() {
        for kind in 0..26 {
            drop(event_attrs(MessageKind(kind), attrs));
        }
    }
    let _ = dump::generation(message);
    let mut answers = Answers { tx, failed: None, whole: None, others: 0, handles: Vec::new() };
    answers.read(message);
}

proptest! {
    #[test]
    fn no_damaged_message_makes_a_reader_panic(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let tx = sample();
        let mut bytes = tx.to_bytes();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        Messages::new(&bytes).for_each(|m| read_all(&tx, m));
        Messages::new(&noise).for_each(|m| read_all(&tx, m));
        read_all(&tx, Message { kind: 0x0a06, flags: 0, seq: 1, portid: 0, payload: &noise });
    }

    #[test]
    fn any_answer_about_any_message_can_be_told(
        index in 0_u32..8, errno in 0_i32..140, offset in proptest::option::of(0_u32..3000),
    ) {
        let tx = sample();
        let ack = Ack { errno, text: None, offset, missing: None };
        let refusal = Refusal::new(&tx, index, ack, 2);
        prop_assert!(!refusal.to_string().is_empty());
        let _ = refusal.kind();
    }
}

#[test]
fn an_offset_in_a_message_is_named() {
    let tx = sample();
    let message = tx.message(4).unwrap();
    let at = |needle: &[u8]| {
        let found = message.payload.windows(needle.len()).position(|w| w == needle).unwrap();
        // The attribute begins 4 bytes before its value, the message 16 before its payload.
        u32::try_from(found + 16 - 4).unwrap()
    };
    let tell = |offset| {
        let ack = Ack { errno: libc::ENOENT, text: None, offset: Some(offset), missing: None };
        let refusal = Refusal::new(&tx, 4, ack, 0);
        (refusal.attribute.clone().unwrap(), refusal.unsupported.clone(), refusal.kind())
    };
    let unsupported = crate::ErrorKind::Unsupported;
    let conflict = crate::ErrorKind::Conflict;
    assert_eq!(tell(at(b"c\0")), ("chain".into(), None, conflict));
    assert_eq!(tell(at(b"lookup\0")), ("expressions[6] lookup".into(), None, conflict));
    let payload = ("expressions[2] payload".into(), Some("expression payload".into()), unsupported);
    assert_eq!(tell(at(b"payload\0")), payload);
    let xt = (
        "expressions[7] match".into(),
        Some("iptables match comment revision 0".into()),
        unsupported,
    );
    assert_eq!(tell(at(b"match\0")), xt);
}

//! Tables, chains and rules against the real kernel, its tools and our own reader.

#![cfg(test)]

mod common;

use std::borrow::Cow;

use common::Lab;
use proxier_netlink::nft::*;

const IP: Family = Family::Ipv4;

/// A base chain for every expression: `nat`, `filter` and `mangle` before routing.
fn chains(tx: &mut Transaction, family: Family) {
    tx.new_table(family, "t");
    let base = |kind, hook, priority| BaseChain { kind, hook, priority, policy: Policy::Accept };
    for (name, base) in [
        ("dnat", base(ChainType::Nat, Hook::Prerouting, -100)),
        ("snat", base(ChainType::Nat, Hook::Postrouting, 100)),
        ("pre", base(ChainType::Filter, Hook::Prerouting, -150)),
        ("fwd", base(ChainType::Filter, Hook::Forward, 0)),
    ] {
        tx.chain(ChainSpec::new(family, "t", name).base(base));
    }
    tx.new_chain(family, "t", "x");
}

fn bytes(value: &[u8]) -> Cow<'static, [u8]> {
    Cow::Owned(value.to_vec())
}

fn xt(name: &'static str, rev: u32, info: &[u8]) -> Xt<'static> {
    Xt { name: Cow::Borrowed(name), rev, info: bytes(info) }
}

/// Expressions by the chain they may be in; each rule is written, listed and compared.
fn rules() -> Vec<(&'static str, Vec<Expr<'static>>)> {
    let (r1, r2, r3) = (Reg::R1, Reg::R2, Reg::R3);
    let data = |dreg, value: &[u8]| Expr::Immediate { dreg, value: bytes(value) };
    let meta = |key| Expr::Meta { key, dreg: r1 };
    let ct = |key, direction| Expr::Ct { key, dreg: r1, direction };
    let l4proto = |proto: u8| {
        vec![meta(MetaKey::L4PROTO), Expr::Cmp { sreg: r1, op: CmpOp::EQ, value: bytes(&[proto]) }]
    };
    let with = |mut head: Vec<Expr<'static>>, tail: Vec<Expr<'static>>| {
        head.extend(tail);
        head
    };
    let mut all = vec![
        ("x", vec![]),
        ("x", vec![meta(MetaKey::MARK), Expr::MetaSet { key: MetaKey::MARK, sreg: r1 }]),
        ("x", vec![ct(CtKey::STATE, None)]),
        ("x", vec![ct(CtKey::PROTO_DST, Some(CtDirection::ORIGINAL))]),
        ("x", vec![ct(CtKey::DST_IP, Some(CtDirection::REPLY))]),
        (
            "x",
            vec![
                data(r1, &[1, 0, 0, 0]),
                Expr::CtSet { key: CtKey::MARK, sreg: r1, direction: None },
            ],
        ),
        ("x", vec![Expr::Counter { packets: 3, bytes: 4 }]),
        (
            "x",
            vec![
                Expr::Payload {
                    base: PayloadBase::NETWORK,
                    offset: 16,
                    len: 4,
                    dreg: Reg::slot(1),
                },
                Expr::Bitwise {
                    sreg: Reg::slot(1),
                    dreg: r2,
                    mask: bytes(&[255, 255, 240, 0]),
                    xor: bytes(&[0, 0, 0, 1]),
                },
                Expr::Cmp { sreg: r2, op: CmpOp::NE, value: bytes(&[10, 0, 16, 1]) },
                Expr::Range { sreg: r2, invert: true, from: bytes(&[1; 4]), to: bytes(&[2; 4]) },
                Expr::Byteorder { sreg: r2, dreg: r3, op: ByteorderOp::NTOH, len: 4, size: 4 },
            ],
        ),
        ("x", vec![Expr::Lookup { set: "s".into(), sreg: r1, dreg: None, invert: true }]),
        ("x", vec![Expr::Lookup { set: "m".into(), sreg: r1, dreg: Some(r2), invert: false }]),
        (
            "x",
            vec![Expr::Lookup {
                set: "v".into(),
                sreg: r1,
                dreg: Some(Reg::VERDICT),
                invert: false,
            }],
        ),
        ("x", vec![Expr::Numgen { dreg: r1, modulus: 7, kind: NumgenKind::RANDOM, offset: 2 }]),
        (
            "x",
            vec![Expr::Numgen { dreg: r1, modulus: 9, kind: NumgenKind::INCREMENTAL, offset: 0 }],
        ),
        (
            "x",
            vec![Expr::Hash(Hash {
                kind: HashKind::JENKINS,
                input: Some((r2, 8)),
                dreg: r1,
                modulus: 4,
                seed: Some(99),
                offset: 1,
            })],
        ),
        (
            "x",
            vec![Expr::Hash(Hash {
                kind: HashKind::SYMMETRIC,
                input: None,
                dreg: r1,
                modulus: 4,
                seed: None,
                offset: 0,
            })],
        ),
        (
            "x",
            vec![Expr::Limit(Limit {
                kind: LimitKind::PACKETS,
                rate: 100,
                unit_secs: 60,
                burst: 5,
                invert: true,
            })],
        ),
        (
            "x",
            vec![Expr::Dynset(Dynset {
                set: "d".into(),
                op: DynsetOp::UPDATE,
                key: r1,
                data: None,
                timeout_ms: Some(10_000),
                invert: true,
            })],
        ),
        (
            "x",
            vec![Expr::Dynset(Dynset {
                set: "dm".into(),
                op: DynsetOp::ADD,
                key: r1,
                data: Some(r2),
                timeout_ms: None,
                invert: false,
            })],
        ),
        (
            "x",
            vec![Expr::Match(xt("comment", 0, &{
                let mut info = [0; 256];
                info[..5].copy_from_slice(b"hello");
                info
            }))],
        ),
        ("x", vec![Expr::Match(xt("mark", 1, &[1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))]),
        ("x", vec![Expr::Target(xt("MARK", 2, &[0, 64, 0, 0, 0, 64, 0, 0]))]),
        ("x", vec![Expr::Verdict(verdict("goto"))]),
        ("pre", vec![Expr::Fib { result: FibResult::ADDRTYPE, flags: FibFlags::DADDR, dreg: r1 }]),
        (
            "pre",
            vec![Expr::Fib {
                result: FibResult::OIF,
                flags: FibFlags::SADDR | FibFlags::IIF | FibFlags::PRESENT,
                dreg: r1,
            }],
        ),
        ("pre", vec![Expr::Socket { key: SocketKey::TRANSPARENT, dreg: r1, level: None }]),
        (
            "pre",
            with(
                l4proto(6),
                vec![
                    data(r1, &[0x1f, 0x90]),
                    Expr::Tproxy { family: IP, addr: None, port: Some(r1) },
                ],
            ),
        ),
        (
            "pre",
            with(
                l4proto(17),
                vec![
                    data(r1, &[127, 0, 0, 1]),
                    data(r2, &[0x1f, 0x90]),
                    Expr::Tproxy { family: IP, addr: Some(r1), port: Some(r2) },
                ],
            ),
        ),
        ("fwd", vec![Expr::Reject { kind: RejectKind::ICMP, code: 3 }]),
        ("fwd", with(l4proto(6), vec![Expr::Reject { kind: RejectKind::TCP_RESET, code: 0 }])),
        ("dnat", vec![data(r1, &[10, 0, 0, 1]), Expr::Nat(Nat::dnat(IP, r1, None))]),
        (
            "dnat",
            with(
                l4proto(6),
                vec![
                    data(r1, &[10, 0, 0, 1]),
                    data(r2, &[0, 80]),
                    Expr::Nat(Nat {
                        flags: NatFlags::PERSISTENT | NatFlags::FULLY_RANDOM,
                        ..Nat::dnat(IP, r1, Some(r2))
                    }),
                ],
            ),
        ),
        (
            "dnat",
            with(
                l4proto(6),
                vec![
                    data(r1, &[10, 0, 0, 1]),
                    data(r2, &[10, 0, 0, 9]),
                    data(r3, &[0, 80]),
                    data(Reg::R4, &[0, 99]),
                    Expr::Nat(Nat {
                        kind: NatKind::DNAT,
                        family: IP,
                        addr: Some((r1, r2)),
                        ports: Some((r3, Reg::R4)),
                        flags: NatFlags::NONE,
                    }),
                ],
            ),
        ),
        (
            "dnat",
            with(
                l4proto(6),
                vec![
                    data(r1, &[0, 80]),
                    Expr::Redirect { flags: NatFlags::RANDOM, ports: Some((r1, r1)) },
                ],
            ),
        ),
        ("dnat", vec![Expr::Redirect { flags: NatFlags::NONE, ports: None }]),
        ("snat", vec![data(r1, &[10, 0, 0, 1]), Expr::Nat(Nat::snat(IP, r1, None))]),
        ("snat", vec![Expr::Masquerade { flags: NatFlags::NONE, ports: None }]),
        ("snat", vec![Expr::Masquerade { flags: NatFlags::FULLY_RANDOM, ports: None }]),
        (
            "snat",
            with(
                l4proto(17),
                vec![
                    data(r1, &[4, 0]),
                    data(r2, &[8, 0]),
                    Expr::Masquerade { flags: NatFlags::NONE, ports: Some((r1, r2)) },
                ],
            ),
        ),
    ];
    for name in ["accept", "drop", "return", "continue", "jump"] {
        all.push(("fwd", vec![Expr::Verdict(verdict(name))]));
    }
    all
}

fn verdict(name: &str) -> Verdict<'static> {
    match name {
        "accept" => Verdict::Accept,
        "drop" => Verdict::Drop,
        "return" => Verdict::Return,
        "continue" => Verdict::Continue,
        "jump" => Verdict::Jump("x".into()),
        _ => Verdict::Goto("leaf".into()),
    }
}

fn sets(tx: &mut Transaction) {
    let (v4, port) = (DataType::IPV4, DataType::PORT);
    tx.new_set(SetSpec::set(IP, "t", "s", v4));
    tx.new_set(SetSpec::map(IP, "t", "m", v4, port).id(2));
    tx.new_set(SetSpec::map(IP, "t", "v", v4, DataType::VERDICT).id(3));
    let dynamic = SetFlags::EVAL;
    tx.new_set(SetSpec::set(IP, "t", "d", v4).id(4).flags(dynamic).timeout_ms(60_000).size(100));
    tx.new_set(SetSpec::map(IP, "t", "dm", v4, v4).id(5).flags(dynamic).timeout_ms(60_000).size(9));
    tx.new_chain(IP, "t", "leaf");
}

#[tokio::test]
async fn every_expression_survives_the_kernel() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        chains(tx, IP);
        sets(tx);
    })
    .await;
    for (chain, mut exprs) in rules() {
        // KERNEL: reading a register that nothing was loaded into is refused, since 6.3.
        let loads =
            (0..4).map(|n| Expr::Immediate { dreg: Reg::slot(4 * n), value: bytes(&[0; 16]) });
        exprs = loads.chain(exprs).collect();
        lab.apply(|tx| {
            tx.rule(RuleSpec::append(IP, "t", chain).comment("c"), |e| {
                for expr in &exprs {
                    e.push(expr);
                }
            });
        })
        .await;
        let listed = lab.sock.rules(RuleFilter::chain(IP, "t", chain)).await.unwrap();
        let last = listed.last().unwrap();
        assert_eq!(last.exprs, exprs);
        assert_eq!(last.comment(), Some("c"));
        // What was listed can be written again.
        lab.apply(|tx| {
            tx.rule(RuleSpec::replace(IP, "t", chain, last.handle), |e| {
                for expr in &last.exprs {
                    e.push(expr);
                }
            });
        })
        .await;
    }
    let total = lab.sock.rules(RuleFilter::family(IP)).await.unwrap().len();
    assert_eq!(total, rules().len());
    lab.run("nft list ruleset");
}

/// The order of the rules of chain `x`, by their comments.
async fn order(lab: &mut Lab) -> String {
    let filter = RuleFilter::chain(IP, "t", "x");
    let visit = |all: &mut String, rule: RuleRef<'_>| all.push_str(rule.comment().unwrap_or("?"));
    lab.sock.fold_rules(filter, String::new, visit).await.unwrap()
}

#[tokio::test]
async fn rules_go_where_they_are_told() {
    let mut lab = Lab::new();
    let at = |spec: RuleSpec<'static>, name| spec.comment(name).echo();
    let handles = lab
        .apply(|tx| {
            chains(tx, IP);
            tx.rule(at(RuleSpec::append(IP, "t", "x"), "b"), |e| {
                e.counter();
            });
            tx.rule(at(RuleSpec::append(IP, "t", "x"), "d").id(77), |_| ());
            tx.rule(at(RuleSpec::insert(IP, "t", "x"), "a"), |_| ());
            tx.rule(at(RuleSpec::before_id(IP, "t", "x", 77), "c"), |_| ());
            tx.rule(at(RuleSpec::after_id(IP, "t", "x", 77), "e"), |_| ());
        })
        .await;
    assert_eq!(handles.len(), 5);
    assert_eq!(order(&mut lab).await, "abcde");
    let (b, d) = (handles[0], handles[1]);
    lab.apply(|tx| {
        tx.rule(at(RuleSpec::before(IP, "t", "x", b), "1"), |_| ());
        tx.rule(at(RuleSpec::after(IP, "t", "x", b), "2"), |_| ());
        tx.rule(at(RuleSpec::replace(IP, "t", "x", d), "D"), |_| ());
    })
    .await;
    assert_eq!(order(&mut lab).await, "a1b2cDe");
    lab.apply(|tx| tx.del_rule(IP, "t", "x", b)).await;
    assert_eq!(order(&mut lab).await, "a12cDe");
    // Flush and refill in one transaction: how a chain is rewritten.
    lab.apply(|tx| {
        tx.flush_chain(IP, "t", "x");
        tx.rule(at(RuleSpec::append(IP, "t", "x"), "z"), |_| ());
    })
    .await;
    assert_eq!(order(&mut lab).await, "z");
    lab.apply(|tx| tx.flush_table(IP, "t")).await;
    assert_eq!(order(&mut lab).await, "");
}

#[tokio::test]
async fn echoed_handles_name_operation_and_message() {
    let mut lab = Lab::new();
    let mut tx = Transaction::new();
    tx.op(10);
    chains(&mut tx, IP);
    tx.op(11);
    let first = tx.rule(RuleSpec::append(IP, "t", "x").echo(), |_| ());
    tx.rule(RuleSpec::append(IP, "t", "x"), |_| ());
    tx.op(12);
    let second = tx.rule(RuleSpec::insert(IP, "t", "x").echo(), |_| ());
    let committed = lab.sock.commit(&tx).await.unwrap();
    let got: Vec<_> = committed.handles.iter().map(|h| (h.tag, h.index)).collect();
    assert_eq!(got, [(Some(11), first), (Some(12), second)]);
    let rules = lab.sock.rules(RuleFilter::table(IP, "t")).await.unwrap();
    assert_eq!(rules[0].handle, committed.handles[1].handle);
    assert_eq!(rules[1].handle, committed.handles[0].handle);
}

#[tokio::test]
async fn tables_and_chains_are_listed_as_they_were_made() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        tx.table(TableSpec::new(IP, "t").userdata(&[0, 3, b'h', b'i', 0]).dormant());
        tx.table(TableSpec::new(Family::Inet, "mine").owner());
        tx.new_table(Family::Ipv6, "t");
        let base = BaseChain {
            kind: ChainType::Filter,
            hook: Hook::Input,
            priority: -7,
            policy: Policy::Drop,
        };
        tx.chain(ChainSpec::new(IP, "t", "in").base(base).comment("base"));
        tx.chain(ChainSpec::new(IP, "t", "x").userdata(&[9, 1, 5]));
        tx.rule(RuleSpec::append(IP, "t", "in"), |e| {
            e.jump("x");
        });
    })
    .await;
    let tables = lab.sock.tables(Family::Unspec).await.unwrap();
    assert_eq!(tables.len(), 3);
    let t = tables.iter().find(|t| t.family == IP).unwrap();
    assert_eq!((t.name.as_str(), t.flags, t.owner), ("t", TableDump::DORMANT, None));
    assert_eq!((t.comment(), t.uses), (Some("hi"), 2));
    let mine = tables.iter().find(|t| t.family == Family::Inet).unwrap();
    assert_eq!((mine.flags, mine.owner), (TableDump::OWNER, Some(lab.sock.portid())));
    assert_eq!(lab.sock.tables(Family::Ipv6).await.unwrap().len(), 1);

    let chains = lab.sock.chains(IP).await.unwrap();
    let base = chains.iter().find(|c| c.name == "in").unwrap();
    let hook = base.base.as_ref().unwrap();
    assert_eq!((hook.kind.as_str(), hook.hook, hook.priority), ("filter", 1, -7));
    assert_eq!((hook.policy, base.comment(), base.uses), (Policy::Drop, Some("base"), 1));
    let x = chains.iter().find(|c| c.name == "x").unwrap();
    assert_eq!((x.base.is_none(), x.uses, &x.userdata[..]), (true, 1, &[9, 1, 5][..]));

    lab.apply(|tx| {
        tx.new_table(IP, "t");
        tx.del_table(Family::Ipv6, "t");
        tx.destroy_table(Family::Ipv6, "never");
        tx.flush_chain(IP, "t", "in");
        tx.del_chain(IP, "t", "x");
    })
    .await;
    let tables = lab.sock.tables(IP).await.unwrap();
    assert_eq!((tables.len(), tables[0].flags), (1, 0));
    assert_eq!(lab.sock.chains(IP).await.unwrap().len(), 1);
}

/// 16 bytes of an interface name, cut as long as the name: any suffix.
fn cmp_dport(e: &mut ExprWriter<'_>, proto: u8, port: u16) {
    e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[proto]);
    e.payload(PayloadBase::TRANSPORT, 2, 2, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &port.to_be_bytes());
}

#[tokio::test]
async fn iptables_lists_what_was_written() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        tx.new_table(IP, "nat");
        let base = BaseChain {
            kind: ChainType::Nat,
            hook: Hook::Prerouting,
            priority: -100,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(IP, "nat", "PREROUTING").base(base));
        for chain in ["KUBE-SERVICES", "KUBE-SVC-X", "KUBE-SEP-A"] {
            tx.new_chain(IP, "nat", chain);
        }
        tx.rule(RuleSpec::append(IP, "nat", "PREROUTING").comment("portals"), |e| {
            e.counter().jump("KUBE-SERVICES");
        });
        tx.rule(RuleSpec::append(IP, "nat", "KUBE-SERVICES").comment("shop/cart"), |e| {
            e.payload(PayloadBase::NETWORK, 16, 4, Reg::R1);
            e.cmp(Reg::R1, CmpOp::EQ, &[10, 96, 0, 10]);
            cmp_dport(e, 6, 80);
            e.counter().jump("KUBE-SVC-X");
        });
        // struct xt_statistic_info: mode 0 (random), probability in units of 2^-31.
        let mut statistic = [0; 24];
        statistic[4..8].copy_from_slice(&0x4000_0000_u32.to_ne_bytes());
        tx.rule(RuleSpec::append(IP, "nat", "KUBE-SVC-X"), |e| {
            e.xt_match("statistic", 0, &statistic).counter().jump("KUBE-SEP-A");
        });
        // struct nf_nat_range2: flags, two addresses, two ports, base port.
        let mut range = [0; 48];
        range[..4].copy_from_slice(&3_u32.to_ne_bytes());
        for at in [4, 20] {
            range[at..at + 4].copy_from_slice(&[10, 1, 1, 1]);
        }
        for at in [36, 38] {
            range[at..at + 2].copy_from_slice(&8080_u16.to_be_bytes());
        }
        let spec = RuleSpec::append(IP, "nat", "KUBE-SEP-A").compat(Compat { proto: 6, flags: 0 });
        tx.rule(spec, |e| {
            e.meta(MetaKey::L4PROTO, Reg::R1).cmp(Reg::R1, CmpOp::EQ, &[6]);
            // struct xt_tcp: all ports.
            e.xt_match("tcp", 0, &[0, 0, 255, 255, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
            e.counter().xt_target("DNAT", 2, &range);
        });
    })
    .await;
    let listed = lab.run("iptables -t nat -S");
    let expected = [
        "-P PREROUTING ACCEPT",
        "-N KUBE-SEP-A",
        "-N KUBE-SERVICES",
        "-N KUBE-SVC-X",
        "-A PREROUTING -m comment --comment portals -j KUBE-SERVICES",
        "-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.1.1.1:8080",
        "-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 \
         -m comment --comment \"shop/cart\" -j KUBE-SVC-X",
        "-A KUBE-SVC-X -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A",
    ];
    for line in expected {
        let line = line.replace('"', "");
        assert!(listed.lines().any(|l| l.replace('"', "") == line), "`{line}` is not in\n{listed}");
    }
    // A compat the extension checks is refused if it is wrong.
    let mut tx = Transaction::new();
    tx.op(5);
    tx.rule(RuleSpec::append(IP, "nat", "KUBE-SEP-A"), |e| {
        e.xt_match("tcp", 0, &[0; 16]);
    });
    let error = lab.sock.commit(&tx).await.unwrap_err();
    assert_eq!((error.tag(), error.kind()), (Some(5), proxier_netlink::ErrorKind::Fatal));
}

#[tokio::test]
async fn nft_lists_what_was_written() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        chains(tx, IP);
        tx.rule(RuleSpec::append(IP, "t", "x").comment("why"), |e| {
            e.ct(CtKey::STATE, Reg::R1, None);
            let states = CtState::ESTABLISHED | CtState::RELATED;
            e.bitwise(Reg::R1, Reg::R1, &states.0.to_ne_bytes(), &[0; 4]);
            e.cmp(Reg::R1, CmpOp::NE, &[0; 4]).counter().immediate_verdict(Verdict::Accept);
        });
        tx.rule(RuleSpec::append(IP, "t", "pre"), |e| {
            e.fib(FibResult::ADDRTYPE, FibFlags::DADDR, Reg::R1);
            e.cmp(Reg::R1, CmpOp::EQ, &2_u32.to_ne_bytes()).goto("x");
        });
        tx.rule(RuleSpec::append(IP, "t", "dnat"), |e| {
            cmp_dport(e, 17, 53);
            e.immediate_data(Reg::R1, &[10, 0, 0, 1])
                .immediate_data(Reg::R2, &53_u16.to_be_bytes());
            e.nat(Nat::dnat(IP, Reg::R1, Some(Reg::R2)));
        });
        tx.rule(RuleSpec::append(IP, "t", "snat"), |e| {
            e.meta(MetaKey::MARK, Reg::R1);
            e.bitwise(Reg::R1, Reg::R1, &0x4000_u32.to_ne_bytes(), &[0; 4]);
            e.cmp(Reg::R1, CmpOp::NE, &[0; 4]).masquerade(NatFlags::FULLY_RANDOM);
        });
        tx.rule(RuleSpec::append(IP, "t", "fwd"), |e| {
            e.reject(RejectKind::ICMP, 3);
        });
    })
    .await;
    let listed = lab.run("nft list table ip t");
    for line in [
        "ct state established,related counter packets 0 bytes 0 accept comment \"why\"",
        "fib daddr type local goto x",
        "udp dport 53 dnat to 10.0.0.1:53",
        "meta mark & 0x00004000 != 0x00000000 masquerade fully-random",
        "reject",
        "type nat hook prerouting priority dstnat; policy accept;",
    ] {
        assert!(listed.lines().any(|l| l.trim() == line), "`{line}` is not in\n{listed}");
    }
}

#[tokio::test]
async fn chains_are_listed_as_the_table_is() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        for table in ["t", "u"] {
            tx.new_table(IP, table);
            for chain in ["a", "b", "empty", "c"] {
                tx.new_chain(IP, table, chain);
            }
            for n in 0..300_usize {
                let chain = ["a", "b", "c"][n % 3];
                tx.rule(RuleSpec::append(IP, table, chain).comment(&n.to_string()), |_| ());
            }
        }
    })
    .await;
    let whole = lab.sock.rules(RuleFilter::table(IP, "t")).await.unwrap();
    assert_eq!(whole.len(), 300);
    let chains = ["c", "nowhere", "empty", "a"];
    let start = || vec![Vec::new(); chains.len()];
    let visit = |all: &mut Vec<Vec<RuleDump>>, index: usize, rule: RuleRef<'_>| {
        all[index].push(rule.to_owned());
    };
    let parts = lab.sock.fold_chains(IP, "t", &chains, start, visit).await.unwrap();
    for (chain, part) in chains.iter().zip(parts) {
        let of_chain: Vec<_> = whole.iter().filter(|rule| rule.chain == *chain).cloned().collect();
        assert_eq!(part, of_chain, "{chain}");
    }
}

#[tokio::test]
async fn rules_of_other_programs_are_read_and_can_be_written_again() {
    let mut lab = Lab::new();
    lab.run(
        "nft -f - <<END
        table ip t {
            quota q { over 10 mbytes }
            set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } }
            chain a {
                log prefix \"x\" group 3 quota name \"q\"
                ip saddr @nets tcp dport 80-90 ct state new accept
                meta mark set ct mark and 0xff
                ip dscp set cs1
                tcp flags syn tcp option maxseg exists
                limit rate 10/second burst 7 packets ct helper \"ftp\"
                ip id set ip id counter packets 7 bytes 900
            }
            chain b { }
        }
END",
    );
    let listed = lab.sock.rules(RuleFilter::chain(IP, "t", "a")).await.unwrap();
    assert!(listed.len() >= 6);
    let others = listed.iter().flat_map(|r| &r.exprs).filter(|e| matches!(e, Expr::Other { .. }));
    assert!(others.count() >= 4);
    lab.apply(|tx| {
        for rule in &listed {
            tx.rule(RuleSpec::append(IP, "t", "b").userdata(&rule.userdata), |e| {
                for expr in &rule.exprs {
                    e.push(expr);
                }
            });
        }
    })
    .await;
    let body = |chain: &str| {
        let text = lab.run(&format!("nft list chain ip t {chain}"));
        let lines = text.lines().skip_while(|l| !l.contains("chain")).skip(1);
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(body("a"), body("b"));
    let absent = lab.sock.rules(RuleFilter::chain(IP, "no", "no")).await.unwrap();
    assert!(absent.is_empty());
}

//! Sets, maps and elements against the real kernel and `nft`.

#![cfg(test)]

mod common;

use common::Lab;
use proxier_netlink::nft::*;

const IP: Family = Family::Ipv4;

/// address . protocol . port, as the registers have it: each padded to 4 bytes.
fn frontend(address: [u8; 4], protocol: u8, port: u16) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&address);
    key[4] = protocol;
    key[8..10].copy_from_slice(&port.to_be_bytes());
    key
}

#[tokio::test]
async fn sets_and_elements_are_listed_as_they_were_made() {
    let mut lab = Lab::new();
    let key = DataType::concat(&[DataType::IPV4, DataType::L4PROTO, DataType::PORT]);
    assert_eq!((key.number, key.len), ((7 << 6 | 12) << 6 | 13, 12));
    let to = Verdict::Goto("x".into());
    lab.apply(|tx| {
        tx.new_table(IP, "t");
        tx.new_chain(IP, "t", "x");
        tx.new_set(SetSpec::set(IP, "t", "vips", DataType::IPV4).comment("addresses"));
        tx.new_set(SetSpec::map(IP, "t", "services", key, DataType::VERDICT).id(2).size(1000));
        let slot = DataType::concat(&[DataType::IPV4, DataType::MARK]);
        let endpoint = DataType::concat(&[DataType::IPV4, DataType::PORT]);
        let eps = SetSpec::map(IP, "t", "eps", slot, endpoint).id(3);
        tx.new_set(eps.key_order(ByteOrder::Host));
        let timed = SetSpec::set(IP, "t", "timed", DataType::IPV4).id(4).timeout_ms(3_600_000);
        tx.new_set(timed.flags(SetFlags::EVAL));
        tx.new_set(SetSpec::set(IP, "t", "nets", DataType::IPV4).id(5).flags(SetFlags::INTERVAL));
        let two = DataType::concat(&[DataType::IPV4, DataType::PORT]);
        tx.new_set(SetSpec::set(IP, "t", "ranges", two).id(6).interval_fields(&[4, 2]));

        tx.add_elements(
            IP,
            "t",
            "vips",
            [[10, 0, 0, 1], [10, 0, 0, 2]].iter().map(|k| Element::new(k).comment("shop/cart")),
        );
        let http = frontend([10, 0, 0, 1], 6, 80);
        tx.add_elements(IP, "t", "services", [Element::new(&http).verdict(&to)]);
        let mut slot = [10, 0, 0, 1, 0, 0, 0, 0];
        slot[4..].copy_from_slice(&1_u32.to_ne_bytes());
        tx.add_elements(IP, "t", "eps", [Element::new(&slot).data(&[10, 1, 1, 1, 31, 144, 0, 0])]);
        tx.add_elements(IP, "t", "timed", [Element::new(&[1; 4]).timeout_ms(60_000)]);
        tx.add_elements(
            IP,
            "t",
            "nets",
            [Element::new(&[10, 0, 0, 0]), Element::new(&[11, 0, 0, 0]).interval_end()],
        );
        tx.add_elements(
            IP,
            "t",
            "ranges",
            [Element::new(&[10, 0, 0, 0, 0, 80, 0, 0]).key_end(&[10, 0, 0, 9, 0, 90, 0, 0])],
        );
    })
    .await;

    let sets = lab.sock.sets(IP, Some("t")).await.unwrap();
    let set = |name: &str| sets.iter().find(|s| s.name == name).unwrap();
    assert_eq!(sets.len(), 6);
    assert_eq!(set("vips").comment(), Some("addresses"));
    assert_eq!((set("services").key, set("services").size), (key, Some(1000)));
    assert_eq!(set("services").data.unwrap().number, DataType::VERDICT.number);
    assert_eq!(set("eps").userdata, [0, 4, 1, 0, 0, 0]);
    assert_eq!(set("timed").timeout_ms, Some(3_600_000));
    assert!(set("timed").flags.contains(SetFlags::EVAL | SetFlags::TIMEOUT));
    assert_eq!(set("ranges").fields, [4, 2]);
    assert_eq!(lab.sock.sets(Family::Ipv6, None).await.unwrap(), []);

    let vips = lab.sock.elements(IP, "t", "vips").await.unwrap();
    assert_eq!(vips.len(), 2);
    assert!(vips.iter().all(|e| e.comment() == Some("shop/cart") && e.value.is_none()));
    let services = lab.sock.elements(IP, "t", "services").await.unwrap();
    assert_eq!(services[0].value, Some(ElementValue::Verdict(to.clone())));
    let eps = lab.sock.elements(IP, "t", "eps").await.unwrap();
    let value = vec![10, 1, 1, 1, 31, 144, 0, 0];
    assert_eq!(eps[0].value, Some(ElementValue::Data(value.into())));
    let timed = lab.sock.elements(IP, "t", "timed").await.unwrap();
    assert_eq!(timed[0].timeout_ms, Some(60_000));
    assert!(timed[0].expires_ms.unwrap() <= 60_000);
    let ranges = lab.sock.elements(IP, "t", "ranges").await.unwrap();
    assert_eq!(ranges[0].key_end.as_deref(), Some(&[10, 0, 0, 9, 0, 90, 0, 0][..]));

    let listed = lab.run("nft list table ip t");
    for text in [
        "comment \"addresses\"",
        "10.0.0.1 comment \"shop/cart\"",
        "10.0.0.1 . tcp . 80 : goto x",
        "10.0.0.1 . 0x00000001 : 10.1.1.1 . 8080",
        "1.1.1.1 timeout 1m expires",
        "elements = { 10.0.0.0/8 }",
        "10.0.0.0-10.0.0.9 . 80-90",
    ] {
        assert!(listed.contains(text), "`{text}` is not in\n{listed}");
    }

    // An element whose value changes: delete and add in one transaction.
    let http = frontend([10, 0, 0, 1], 6, 80);
    lab.apply(|tx| {
        tx.del_elements(IP, "t", "services", [Element::new(&http)]);
        tx.add_elements(IP, "t", "services", [Element::new(&http).verdict(&Verdict::Drop)]);
        tx.flush_set(IP, "t", "vips");
        tx.del_set(IP, "t", "timed");
    })
    .await;
    let services = lab.sock.elements(IP, "t", "services").await.unwrap();
    assert_eq!(services[0].value, Some(ElementValue::Verdict(Verdict::Drop)));
    assert!(lab.sock.elements(IP, "t", "vips").await.unwrap().is_empty());
    let gone = lab.sock.elements(IP, "t", "timed").await.unwrap_err();
    assert_eq!(gone.kind(), proxier_netlink::ErrorKind::Conflict);
}

#[tokio::test]
async fn any_number_of_elements_fits() {
    let mut lab = Lab::new();
    let keys: Vec<[u8; 4]> = (0..20_000_u32).map(u32::to_be_bytes).collect();
    let mut tx = Transaction::new();
    tx.new_table(IP, "t");
    tx.new_set(SetSpec::set(IP, "t", "s", DataType::IPV4));
    let before = tx.len();
    tx.add_elements(IP, "t", "s", []);
    assert_eq!(tx.len(), before);
    tx.add_elements(IP, "t", "s", keys.iter().map(|k| Element::new(k)));
    assert!((5..8).contains(&(tx.len() - before)), "{} messages", tx.len() - before);
    lab.sock.commit(&tx).await.unwrap();
    let mut listed = lab
        .sock
        .fold_elements(IP, "t", "s", Vec::new, |all, e| all.push(e.key.to_vec()))
        .await
        .unwrap();
    listed.sort();
    assert_eq!(listed, keys);
    lab.apply(|tx| tx.del_elements(IP, "t", "s", keys[1..].iter().map(|k| Element::new(k)))).await;
    assert_eq!(lab.sock.elements(IP, "t", "s").await.unwrap().len(), 1);
    // The refused element is told by set; the operation by tag.
    let mut tx = Transaction::new();
    tx.op(4);
    tx.del_elements(IP, "t", "s", [Element::new(&keys[0]), Element::new(&keys[5])]);
    let error = lab.sock.commit(&tx).await.unwrap_err();
    let expected = "DELSETELEM ip t s (operation 4): refused by the kernel (ENOENT) at elements[1]";
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn anonymous_maps_and_dynamic_sets_work_in_one_transaction() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        tx.new_table(IP, "t");
        let base = BaseChain {
            kind: ChainType::Nat,
            hook: Hook::Prerouting,
            priority: -100,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(IP, "t", "pre").base(base));
        for chain in ["ep-0", "ep-1"] {
            tx.new_chain(IP, "t", chain);
        }
        let kind = DataType::integer(4);
        let spec = SetSpec::map(IP, "t", "__map%d", kind, DataType::VERDICT).anonymous(7);
        tx.new_set(spec.size(2).key_order(ByteOrder::Host));
        let to = [Verdict::Goto("ep-0".into()), Verdict::Goto("ep-1".into())];
        let keys = [0_u32.to_ne_bytes(), 1_u32.to_ne_bytes()];
        let elements = keys.iter().zip(&to).map(|(k, v)| Element::new(k).verdict(v));
        tx.add_elements_by_id(IP, "t", ("__map%d", 7), elements);
        let flags = SetFlags::EVAL;
        let affinity = SetSpec::map(IP, "t", "affinity", DataType::IPV4, DataType::IPV4).id(8);
        tx.new_set(affinity.flags(flags).timeout_ms(1000).size(65_535));
        tx.rule(RuleSpec::append(IP, "t", "pre"), |e| {
            e.numgen(NumgenKind::RANDOM, 2, 0, Reg::R1);
            e.lookup(SetRef::anonymous("__map%d", 7), Reg::R1, Some(Reg::VERDICT), false);
        });
        tx.rule(RuleSpec::append(IP, "t", "ep-0"), |e| {
            e.payload(PayloadBase::NETWORK, 12, 4, Reg::R1);
            e.immediate_data(Reg::R2, &[10, 1, 1, 1]);
            e.dynset(Dynset {
                set: "affinity".into(),
                op: DynsetOp::UPDATE,
                key: Reg::R1,
                data: Some(Reg::R2),
                timeout_ms: None,
                invert: false,
            });
            e.nat(Nat::dnat(IP, Reg::R2, None));
        });
    })
    .await;
    let listed = lab.run("nft list table ip t");
    for text in [
        "numgen random mod 2 vmap { 0 : goto ep-0, 1 : goto ep-1 }",
        "update @affinity { ip saddr : 10.1.1.1 } dnat to 10.1.1.1",
    ] {
        assert!(listed.contains(text), "`{text}` is not in\n{listed}");
    }
}

#[tokio::test]
async fn counters_of_elements_count_what_is_found() {
    let mut lab = Lab::new();
    lab.run("ip link set lo up");
    lab.apply(|tx| {
        tx.new_table(IP, "t");
        let hook = BaseChain {
            kind: ChainType::Filter,
            hook: Hook::Output,
            priority: 0,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(IP, "t", "out").base(hook));
        tx.new_set(SetSpec::set(IP, "t", "counted", DataType::IPV4).counted());
        let keys = [[127, 0, 0, 2], [127, 0, 0, 3]];
        tx.add_elements(IP, "t", "counted", keys.iter().map(|key| Element::new(key)));
        tx.rule(RuleSpec::append(IP, "t", "out"), |e| {
            e.payload(PayloadBase::NETWORK, 16, 4, Reg::R1);
            e.lookup("counted", Reg::R1, None, false);
        });
    })
    .await;
    let send = || {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // Nobody listens; the packets are counted on their way out.
        for _ in 0..3 {
            socket.send_to(b"hello", "127.0.0.2:9").ok();
        }
    };
    lab.ns.run(send).unwrap();
    assert!(lab.sock.sets(IP, Some("t")).await.unwrap()[0].counted);
    let mut counts: Vec<_> =
        lab.sock.elements(IP, "t", "counted").await.unwrap().iter().map(|it| it.counter).collect();
    counts.sort_by_key(|counter| counter.map(|it| it.packets));
    let none = Counter { packets: 0, bytes: 0 };
    assert_eq!(counts, [Some(none), Some(Counter { packets: 3, bytes: 3 * (20 + 8 + 5) })]);
}

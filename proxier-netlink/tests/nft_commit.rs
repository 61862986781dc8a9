//! Commits that fail, race, are abandoned or are large.

#![cfg(test)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Lab;
use proxier_netlink::nft::*;
use proxier_netlink::{ErrorKind, NetNs};
use rustix::thread::CapabilitySet;

const IP: Family = Family::Ipv4;

fn refused(error: NftError) -> Box<Refusal> {
    let NftError::Refused(refusal) = error else { panic!("not a refusal: {error:?}") };
    refusal
}

#[tokio::test]
async fn a_refusal_names_the_operation_and_nothing_is_in_effect() {
    let mut lab = Lab::new();
    let mut tx = Transaction::new();
    tx.op(1);
    tx.new_table(IP, "t");
    tx.new_chain(IP, "t", "x");
    tx.op(2);
    tx.rule(RuleSpec::append(IP, "t", "absent"), |e| {
        e.counter();
    });
    tx.op(3);
    tx.rule(RuleSpec::append(IP, "t", "x"), |e| {
        e.counter().jump("nowhere");
    });
    tx.del_chain(IP, "t", "gone");
    let error = lab.sock.commit(&tx).await.unwrap_err();
    assert_eq!((error.tag(), error.kind()), (Some(2), ErrorKind::Conflict));
    let refusal = refused(error);
    assert_eq!((refusal.index, refusal.others), (2, 2));
    assert_eq!((refusal.message, refusal.errno()), (MessageKind::NEWRULE, libc::ENOENT));
    assert_eq!(refusal.attribute.as_deref(), Some("chain"));
    let text = refusal.to_string();
    let expected = "NEWRULE ip t absent (operation 2): refused by the kernel (ENOENT) at chain; \
                    2 more messages refused";
    assert_eq!(text, expected);
    assert!(lab.sock.tables(IP).await.unwrap().is_empty());
}

#[tokio::test]
async fn kinds_of_refusals() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        tx.new_table(IP, "t");
        for chain in ["a", "b"] {
            tx.new_chain(IP, "t", chain);
        }
        let base = BaseChain {
            kind: ChainType::Filter,
            hook: Hook::Forward,
            priority: 0,
            policy: Policy::Accept,
        };
        tx.chain(ChainSpec::new(IP, "t", "base").base(base));
        tx.rule(RuleSpec::append(IP, "t", "base"), |e| {
            e.jump("a");
        });
        tx.rule(RuleSpec::append(IP, "t", "a"), |e| {
            e.jump("b");
        });
    })
    .await;
    type Build = fn(&mut Transaction);
    let cases: [(Build, i32, ErrorKind); 7] = [
        (|tx| tx.table(TableSpec::new(IP, "t").exclusive()), libc::EEXIST, ErrorKind::Conflict),
        (
            |tx| tx.chain(ChainSpec::new(IP, "t", "a").exclusive()),
            libc::EEXIST,
            ErrorKind::Conflict,
        ),
        (|tx| tx.del_chain(IP, "t", "a"), libc::EBUSY, ErrorKind::Conflict),
        (|tx| tx.del_table(IP, "gone"), libc::ENOENT, ErrorKind::Conflict),
        (
            |tx| {
                tx.rule(RuleSpec::append(IP, "t", "b"), |e| {
                    e.jump("a");
                });
            },
            libc::EMLINK,
            ErrorKind::Fatal,
        ),
        (
            |tx| {
                let odd = Expr::Other { name: "flux".into(), raw: (&[][..]).into() };
                tx.rule(RuleSpec::append(IP, "t", "b"), |e| {
                    e.push(&odd);
                });
            },
            libc::ENOENT,
            ErrorKind::Unsupported,
        ),
        (
            |tx| {
                tx.rule(RuleSpec::append(IP, "t", "b"), |e| {
                    e.xt_match("flux", 3, &[0; 8]);
                });
            },
            libc::ENOENT,
            ErrorKind::Unsupported,
        ),
    ];
    for (n, (build, errno, kind)) in cases.into_iter().enumerate() {
        let mut tx = Transaction::new();
        build(&mut tx);
        let refusal = refused(lab.sock.commit(&tx).await.unwrap_err());
        assert_eq!((refusal.errno(), refusal.kind()), (errno, kind), "case {n}: {refusal}");
    }
}

#[tokio::test]
async fn a_lost_race_is_stale_and_can_be_run_again() {
    let mut lab = Lab::new();
    let mut other = NftSocket::open(&lab.ns).unwrap();
    let before = lab.sock.generation().await.unwrap();
    let mut foreign = Transaction::new();
    foreign.new_table(IP, "foreign");
    other.commit(&foreign).await.unwrap();
    assert_ne!(lab.sock.generation().await.unwrap(), before);

    let mut tx = Transaction::at(before);
    tx.new_table(IP, "t");
    let error = lab.sock.commit(&tx).await.unwrap_err();
    assert!(matches!(error, NftError::Stale), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(lab.sock.tables(IP).await.unwrap().len(), 1);

    // The first attempt loses to a writer that comes between reading and committing.
    let mut attempts = 0;
    let committed = lab.sock.transact(3, async |sock, tx| {
        attempts += 1;
        let tables = sock.tables(IP).await?;
        if attempts == 1 {
            foreign.new_table(IP, "more");
            other.commit(&foreign).await?;
        }
        tx.new_table(IP, &format!("after-{}", tables.len()));
        Ok(())
    });
    committed.await.unwrap();
    assert_eq!(attempts, 2);
    let names: Vec<_> = lab.sock.tables(IP).await.unwrap().into_iter().map(|t| t.name).collect();
    assert_eq!(names, ["foreign", "more", "after-2"]);

    let mut tries = 0;
    let lost = lab
        .sock
        .transact(2, async |_, tx| {
            tries += 1;
            foreign.clear();
            // A new one each time: a commit that changes nothing makes no generation.
            foreign.new_table(IP, &format!("again-{tries}"));
            other.commit(&foreign).await?;
            tx.new_table(IP, "never");
            Ok(())
        })
        .await;
    assert!(matches!(lost, Err(NftError::Stale)));
    assert_eq!(tries, 2);
}

/// `count` rules of about 300 bytes in chain `x`.
fn many(count: u32) -> Transaction {
    let mut tx = Transaction::new();
    tx.new_table(IP, "t");
    tx.new_chain(IP, "t", "x");
    for n in 0..count {
        tx.rule(RuleSpec::append(IP, "t", "x").comment("shop/cart endpoint"), |e| {
            e.payload(PayloadBase::NETWORK, 16, 4, Reg::R1);
            e.cmp(Reg::R1, CmpOp::EQ, &n.to_be_bytes());
            e.counter().immediate_verdict(Verdict::Return);
        });
    }
    tx
}

async fn count_rules(sock: &mut NftSocket) -> u32 {
    sock.fold_rules(RuleFilter::table(IP, "t"), || 0, |n, _| *n += 1).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_thousand_rules_go_in_at_once_and_come_back() {
    let mut lab = Lab::new();
    let task = tokio::spawn(async move {
        let tx = many(60_000);
        assert!(tx.len_bytes() > 10 << 20);
        lab.sock.commit(&tx).await.unwrap();
        count_rules(&mut lab.sock).await
    });
    assert_eq!(task.await.unwrap(), 60_000);
}

#[tokio::test]
async fn futures_can_be_dropped_at_any_point() {
    let mut lab = Lab::new();
    let tx = many(24_000);
    assert!(tx.len_bytes() > 256 << 10);
    // Polled once: the send is on its way on another thread.
    let first = tokio::time::timeout(Duration::ZERO, lab.sock.commit(&tx)).await;
    drop(first);
    // The next use waits for it, and is not confused by its answers.
    assert_eq!(count_rules(&mut lab.sock).await, 24_000);
    let mut abandoned = 0;
    for _ in 0..3 {
        let listing = lab.sock.fold_rules(RuleFilter::table(IP, "t"), || (), |(), _| ());
        tokio::select! {
            biased;
            _ = listing => {}
            () = tokio::task::yield_now() => abandoned += 1,
        }
        lab.sock.generation().await.unwrap();
    }
    assert_eq!(count_rules(&mut lab.sock).await, 24_000);
    assert!(abandoned > 0, "no list was abandoned, so nothing was tested");
    // A short commit that is dropped unpolled does nothing; polled once it is complete.
    let mut short = Transaction::new();
    short.new_table(IP, "u");
    drop(lab.sock.commit(&short));
    assert_eq!(lab.sock.tables(IP).await.unwrap().len(), 1);
    lab.sock.commit(&short).await.unwrap();
    assert_eq!(lab.sock.tables(IP).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_never_shows_half_a_commit() {
    let mut lab = Lab::new();
    lab.apply(|tx| {
        *tx = many(2_000);
        tx.new_chain(IP, "t", "y");
    })
    .await;
    let mut writer = NftSocket::open(&lab.ns).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let task = tokio::spawn(async move {
        let mut pairs = 0_u32;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            let mut tx = Transaction::new();
            // One at the very head, one at the very tail: half of it shows as an odd number.
            tx.rule(RuleSpec::insert(IP, "t", "x"), |_| ());
            tx.rule(RuleSpec::append(IP, "t", "y"), |_| ());
            writer.commit(&tx).await.unwrap();
            pairs += 1;
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        pairs
    });
    let (mut whole, mut interrupted) = (0, 0);
    for round in 0..40 {
        let visit = |n: &mut u32, _: RuleRef<'_>| *n += 1;
        let visit_chains = |n: &mut u32, _: usize, _: RuleRef<'_>| *n += 1;
        let listed = match round % 2 {
            0 => lab.sock.fold_rules(RuleFilter::table(IP, "t"), || 0, visit).await,
            _ => lab.sock.fold_chains(IP, "t", &["x", "y"], || 0, visit_chains).await,
        };
        match listed {
            Ok(rules) => {
                assert_eq!(rules % 2, 0);
                whole += 1;
            }
            Err(NftError::Interrupted { .. }) => interrupted += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let pairs = task.await.unwrap();
    assert!(whole + interrupted == 40 && pairs > 0);
    assert_eq!(count_rules(&mut lab.sock).await, 2_000 + 2 * pairs);
}

#[tokio::test]
async fn a_disturbed_list_begins_again_and_not_for_ever() {
    let mut lab = Lab::new();
    lab.apply(|tx| *tx = many(2_000)).await;
    let ns = lab.ns.clone();
    let mut tables = 0;
    let mut disturb = || {
        tables += 1;
        let mut nft = std::process::Command::new("nft");
        nft.args(["add", "table", "ip", &format!("foreign-{tables}")]);
        assert!(ns.run(|| nft.status()).unwrap().unwrap().success());
    };
    // Someone commits while the first attempt is being read.
    let mut starts = 0;
    let start = || {
        starts += 1;
        (starts, 0)
    };
    let visit = |(attempt, rules): &mut (u32, u32), _: RuleRef<'_>| {
        *rules += 1;
        if (*attempt, *rules) == (1, 1) {
            disturb();
        }
    };
    let state = lab.sock.fold_rules(RuleFilter::table(IP, "t"), start, visit).await.unwrap();
    assert_eq!(state, (2, 2_000));
    // Someone commits while each attempt is being read.
    let mut starts = 0;
    let start = || {
        starts += 1;
        0
    };
    let visit = |rules: &mut u32, _: RuleRef<'_>| {
        *rules += 1;
        if *rules == 1 {
            disturb();
        }
    };
    let error = lab.sock.fold_rules(RuleFilter::table(IP, "t"), start, visit).await.unwrap_err();
    assert!(matches!(error, NftError::Interrupted { .. }), "{error:?}");
    assert_eq!((error.kind(), starts), (ErrorKind::Retry, 5));
    assert_eq!(count_rules(&mut lab.sock).await, 2_000);
}

#[tokio::test]
async fn what_cannot_be_encoded_is_told_and_not_sent() {
    let mut lab = Lab::new();
    let mut tx = Transaction::new();
    tx.new_table(IP, "t");
    tx.op(9);
    tx.rule(RuleSpec::append(IP, "t", "x"), |e| {
        for _ in 0..200 {
            e.xt_match("comment", 0, &[1; 500]);
        }
    });
    let error = lab.sock.commit(&tx).await.unwrap_err();
    assert!(matches!(error, NftError::AttributeTooLong { tag: Some(9), index: 1 }), "{error:?}");
    tx.clear();
    lab.sock.commit(&tx).await.unwrap();
    tx.new_table(IP, "t");
    lab.sock.commit(&tx).await.unwrap();
}

/// Runs a future in a thread of the namespace that has no capabilities.
fn without_privilege<F: Future<Output = ()>>(ns: &NetNs, f: impl FnOnce() -> F + Send) {
    ns.run(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective = CapabilitySet::empty();
        sets.permitted = CapabilitySet::empty();
        sets.inheritable = CapabilitySet::empty();
        rustix::thread::set_capabilities(None, sets).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(f());
    })
    .unwrap();
}

#[tokio::test]
async fn without_privilege_the_error_says_so() {
    let lab = Lab::new();
    without_privilege(&lab.ns, async || {
        let mut sock = NftSocket::open(&NetNs::Current).unwrap();
        let mut tx = Transaction::new();
        tx.op(1);
        tx.new_table(IP, "t");
        let error = sock.commit(&tx).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let text =
            "committing a transaction: needs CAP_NET_ADMIN in the namespace's user namespace";
        assert_eq!(error.to_string(), text);
        let error = sock.tables(IP).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let error = sock.generation().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
    });
}

#[tokio::test]
async fn without_privilege_the_socket_knows_how_much_it_can_send() {
    let lab = Lab::new();
    assert!(lab.sock.max_batch_bytes() > 100 << 20);
    without_privilege(&lab.ns, async || {
        let mut sock = NftSocket::open(&NetNs::Current).unwrap();
        let limit = sock.max_batch_bytes();
        assert!(limit < 100 << 20);
        let mut tx = Transaction::new();
        while tx.len_bytes() <= limit {
            tx.table(TableSpec::new(IP, "t").userdata(&[0; 50_000]));
        }
        let error = sock.commit(&tx).await.unwrap_err();
        assert!(matches!(error, NftError::TooLarge { bytes, .. } if bytes == tx.len_bytes()));
        // One message less fits; it gets as far as the check of privileges.
        let mut fits = Transaction::new();
        for _ in 1..tx.len() {
            fits.table(TableSpec::new(IP, "t").userdata(&[0; 50_000]));
        }
        let error = sock.commit(&fits).await.unwrap_err();
        assert!(matches!(error, NftError::Permission { .. }), "{error:?}");
    });
}

#[tokio::test]
async fn an_owned_table_is_closed_to_others() {
    let mut lab = Lab::new();
    lab.apply(|tx| tx.table(TableSpec::new(IP, "t").owner())).await;
    let mut other = NftSocket::open(&lab.ns).unwrap();
    let mut tx = Transaction::new();
    tx.new_chain(IP, "t", "x");
    let refusal = refused(other.commit(&tx).await.unwrap_err());
    assert_eq!(refusal.kind(), ErrorKind::Permission);
    assert!(refusal.to_string().ends_with("; the table may belong to another socket"));
}

#[test]
fn without_a_runtime_there_is_an_error_and_no_panic() {
    let error = NftSocket::open(&NetNs::Current).unwrap_err();
    assert_eq!(error.to_string(), "cannot open a netlink socket outside a tokio runtime");
}

/// Embedders run backends as tasks of a multi-threaded runtime: all futures have to be `Send`.
#[tokio::test(flavor = "multi_thread")]
async fn everything_can_be_done_in_a_task() {
    let lab = Lab::new();
    let Lab { ns, mut sock } = lab;
    let task = tokio::spawn(async move {
        let build = async |sock: &mut NftSocket, tx: &mut Transaction| {
            let tables = sock.tables(IP).await?;
            tx.new_table(IP, &format!("t-{}", tables.len()));
            Ok(())
        };
        sock.transact(2, build).await.unwrap();
        let visit = |n: &mut u32, _: RuleRef<'_>| *n += 1;
        sock.fold_rules(RuleFilter::table(IP, "t-0"), || 0, visit).await.unwrap();
        sock.sets(IP, Some("t-0")).await.unwrap();
        sock.elements(IP, "t-0", "s").await.unwrap_err();
        let mut ct = proxier_netlink::ct::Conntrack::open(&ns).unwrap();
        ct.delete_matching(proxier_netlink::ct::CtFamily::Ipv4, |_| true).await.unwrap();
        let mut events = proxier_netlink::Events::open(&ns).unwrap();
        sock.chains(Family::Unspec).await.unwrap();
        tokio::time::timeout(Duration::from_millis(1), events.next()).await.unwrap_err();
    });
    task.await.unwrap();
}

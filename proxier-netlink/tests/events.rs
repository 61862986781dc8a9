//! Notifications of what was committed, by whom.

#![cfg(test)]

mod common;

use std::time::Duration;

use common::Lab;
use proxier_netlink::nft::*;
use proxier_netlink::{Change, Event, Events};

const IP: Family = Family::Ipv4;

async fn next(events: &mut Events) -> Event {
    let wait = tokio::time::timeout(Duration::from_secs(10), events.next());
    wait.await.expect("an event within 10 s").unwrap()
}

/// All changes up to the end of a commit.
async fn commit(events: &mut Events) -> Vec<Change> {
    let mut all = Vec::new();
    loop {
        match next(events).await {
            Event::Change(change) => {
                let last = change.kind == MessageKind::NEWGEN;
                all.push(change);
                if last {
                    return all;
                }
            }
            Event::Lost | _ => panic!("notifications were lost"),
        }
    }
}

#[tokio::test]
async fn changes_are_told_with_their_writer() {
    let mut lab = Lab::new();
    let mut events = Events::open(&lab.ns).unwrap();
    let handles = lab
        .apply(|tx| {
            tx.new_table(IP, "t");
            tx.new_chain(IP, "t", "x");
            tx.new_set(SetSpec::set(IP, "t", "s", DataType::IPV4));
            tx.add_elements(IP, "t", "s", [Element::new(&[1; 4])]);
            tx.rule(RuleSpec::append(IP, "t", "x").echo(), |e| {
                e.counter();
            });
        })
        .await;
    let changes = commit(&mut events).await;
    let kinds: Vec<_> = changes.iter().map(|c| c.kind).collect();
    let expected = [
        MessageKind::NEWTABLE,
        MessageKind::NEWCHAIN,
        MessageKind::NEWSET,
        MessageKind::NEWSETELEM,
        MessageKind::NEWRULE,
        MessageKind::NEWGEN,
    ];
    assert_eq!(kinds, expected);
    assert!(changes.iter().all(|c| c.portid == lab.sock.portid()));
    assert!(changes[..5].iter().all(|c| (c.family, c.table.as_str()) == (IP, "t")));
    assert_eq!(changes[1].chain.as_deref(), Some("x"));
    assert_eq!(changes[3].name.as_deref(), Some("s"));
    assert_eq!((changes[4].chain.as_deref(), changes[4].handle), (Some("x"), Some(handles[0])));
    assert_eq!(changes[5].generation, Some(lab.sock.generation().await.unwrap()));
    // The kernel names the thread: see `Change::thread`.
    assert!(changes[5].thread.as_ref().is_some_and(|(thread, _)| *thread > 0));
}

#[tokio::test]
async fn ones_own_changes_can_be_left_out() {
    let mut lab = Lab::new();
    let mut events = Events::open(&lab.ns).unwrap();
    events.ignore(lab.sock.portid());
    lab.apply(|tx| tx.new_table(IP, "mine")).await;
    lab.run("nft add table ip foreign");
    let changes = commit(&mut events).await;
    assert_eq!(changes.len(), 2);
    assert_eq!(changes[0].table, "foreign");
    assert_eq!(changes[1].thread.as_ref().map(|(_, name)| name.as_str()), Some("nft"));
}

#[tokio::test]
async fn waiting_can_be_dropped_without_losing_anything() {
    let mut lab = Lab::new();
    let mut events = Events::open(&lab.ns).unwrap();
    for _ in 0..3 {
        let early = tokio::time::timeout(Duration::from_millis(1), events.next()).await;
        assert!(early.is_err());
    }
    lab.apply(|tx| tx.new_table(IP, "t")).await;
    let mut seen = Vec::new();
    while seen.len() < 2 {
        if let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await {
            seen.push(event.unwrap());
        }
    }
    assert!(matches!(&seen[0], Event::Change(c) if c.kind == MessageKind::NEWTABLE));
}

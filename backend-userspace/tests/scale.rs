//! The cost of a change does not depend on how many Services there are.
#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "any failure fails the test"
)]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::fragment;
use proxier_backend_userspace::{Addresses, Config, Listen, engine};
use proxier_core::{
    Change, Family, ObjectName, Protocol, Proxier, Revision, Update,
    ir::{Fragment, WayIn},
};
use proxier_netlink::NetNs;

fn numbered(index: u32, endpoints: u8) -> Fragment {
    let members: Vec<_> = (1..=endpoints).map(|it| ([10, 61, 0, it], 8080).into()).collect();
    let mut fragment = fragment(Protocol::Tcp, &members);
    fragment.id.service = ObjectName::new("shop", &format!("svc-{index}"));
    let ip = std::net::Ipv4Addr::from_bits(0x0a60_0000 + index);
    fragment.frontends[0].key.way_in = WayIn::Address(ip.into());
    fragment
}

/// Loads so many Services, then changes one at a time; the median time of a change.
async fn median(services: u32) -> Duration {
    let listen = Listen::Addresses(Addresses::new(|_, _| None));
    let config = Config { listen, ..Config::default() };
    let mut engine = engine(&config, &NetNs::Current, &[Family::V4]).unwrap();
    let fragments = (0..services).map(|index| Arc::new(numbered(index, 3))).collect();
    let start = Instant::now();
    let (revision, node) = (Revision(1), Arc::default());
    engine.sync(Update::Reset { revision, node, fragments }).await.unwrap();
    let loaded = start.elapsed();
    let mut times = Vec::new();
    for round in 0..400_u32 {
        let changed = numbered(round * 97 % services, if round % 2 == 0 { 2 } else { 4 });
        let changes = vec![Change::Upsert(Arc::new(changed))];
        let update =
            Update::Delta { revision: Revision(u64::from(round) + 2), node: None, changes };
        let start = Instant::now();
        let report = engine.sync(update).await.unwrap();
        times.push(start.elapsed());
        assert_eq!((report.visited, report.ops.total()), (1, 1));
    }
    times.sort_unstable();
    println!("{services} Services: loaded in {loaded:?}, a change {:?}", times[200]);
    times[200]
}

#[tokio::test]
async fn a_change_among_forty_five_thousand_costs_what_one_among_a_thousand_does() {
    let (few, many) = (median(1_000).await, median(45_000).await);
    // A tree is a little deeper; a copy of everything would be forty-five times as long.
    assert!(many < few * 8 + Duration::from_micros(200), "{few:?}, {many:?}");
}

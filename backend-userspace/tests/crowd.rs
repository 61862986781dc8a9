//! Twenty thousand connections at once. Client, proxier and endpoints are processes of their own.
//!
//! The proxier needs two descriptors for each. Where a process may not have so many, whoever starts it,
//! there are as many connections as it can have, and the test says so.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use common::{
    apart::{self, Apart, allow},
    *,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use proxier_testkit::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const MOST: usize = 20_000;
/// Memory of the process for a connection that is idle: a task, two registrations, its counters.
const EACH_KIB: usize = 6;
/// What else may come and go: pipes, and connections that are about to end.
const SPARE: usize = 64;
const LONG: Duration = Duration::from_secs(60);

async fn gather(at: SocketAddr, crowd: usize) -> Vec<TcpStream> {
    let connecting = stream::iter((0..crowd).map(|_| TcpStream::connect(at)));
    connecting.buffer_unordered(64).try_collect().await.unwrap()
}

fn wait(proxier: &mut Apart, active: usize) {
    let wanted = u64::try_from(active).unwrap();
    let what = format!("{active} connections are held");
    eventually(LONG, &what, || proxier.has().active == wanted).unwrap();
}

#[tokio::test]
async fn twenty_thousand_connections_are_held_and_served() {
    let descriptors = allow(2 * MOST as u64 + 1_000);
    let crowd = usize::try_from(descriptors - 1_000).unwrap() / 2;
    println!("{crowd} connections, with {descriptors} descriptors for each process");
    let endpoints = Apart::endpoints("a_process_apart", descriptors);
    let mut proxier = Apart::proxier("a_process_apart", descriptors, &endpoints.at);
    let at = proxier.at[0];
    assert!(ask(at).await);
    wait(&mut proxier, 0);
    let before = proxier.has();
    let mut peaks = Vec::new();
    for _ in 0..2 {
        let start = Instant::now();
        let mut streams = gather(at, crowd).await;
        wait(&mut proxier, crowd);
        let full = proxier.has();
        println!("{crowd} connections after {:?}: {full:?}", start.elapsed());
        let descriptors = full.descriptors - before.descriptors;
        assert!((2 * crowd..2 * crowd + SPARE).contains(&descriptors), "{full:?}");
        assert!(full.resident_kib - before.resident_kib < crowd * EACH_KIB, "{full:?}");
        assert_eq!(full.accept_pauses, 0);
        peaks.push(full.resident_kib);
        // Whoever comes now is served, and whoever has been silent, too.
        assert!(ask(at).await);
        for stream in streams.iter_mut().step_by(10) {
            stream.write_all(b"x").await.unwrap();
        }
        for stream in streams.iter_mut().step_by(10) {
            let answer = tokio::time::timeout(PATIENCE, stream.read_u8());
            assert_eq!(answer.await.unwrap().unwrap(), b'x');
        }
        drop(streams);
        wait(&mut proxier, 0);
        let after = proxier.has();
        assert!(after.descriptors < before.descriptors + SPARE, "{after:?}");
    }
    // The second time needs no more than the first.
    assert!(peaks[1] < peaks[0] + peaks[0] / 10, "{peaks:?} KiB");
    proxier.end();
    endpoints.end();
}

/// Not a test of its own: the processes that are started above.
#[test]
fn a_process_apart() {
    apart::be_one();
}

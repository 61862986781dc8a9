//! Under load: nothing is lost and nothing is leaked. One test, so that it has the process for itself.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use common::{apart::Apart, *};
use futures_util::FutureExt;
use proxier_core::Protocol;
use proxier_testkit::eventually_async;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_come_and_go_and_nothing_is_lost_or_leaked() {
    let mut servers = Vec::new();
    for _ in 0..4 {
        servers.push(Server::echo().await);
    }
    let all: Vec<_> = servers.iter().map(|it| it.addr).collect();
    let (mut proxy, at) =
        Proxy::serving(Protocol::Tcp, &all, |config| config.limits.pooled_pipes = 1).await;
    assert!(ask(at).await);
    until("the first connection ends", || proxy.active() == 0).await;
    let before = descriptors();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                while !stop.load(Relaxed) {
                    assert!(ask(at).await);
                    done.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    // Long streams go on all the while.
    let streams: Vec<_> = (0..6_u64)
        .map(|seed| {
            tokio::spawn(async move {
                let sent = noise(seed * 2 + 1, 8 << 20);
                let (mut read, mut write) = TcpStream::connect(at).await.unwrap().into_split();
                let expected = sent.clone();
                let writer = tokio::spawn(async move {
                    for piece in sent.chunks(50_000) {
                        write.write_all(piece).await.unwrap();
                    }
                    write.shutdown().await.unwrap();
                });
                let mut received = Vec::new();
                read.read_to_end(&mut received).await.unwrap();
                writer.await.unwrap();
                assert!(received == expected, "stream {seed} is damaged");
            })
        })
        .collect();
    for round in 0..400_usize {
        let without = all[round % all.len()];
        let some: Vec<_> = all.iter().copied().filter(|it| *it != without).collect();
        proxy.set(fragment(Protocol::Tcp, &some)).await;
        tokio::task::yield_now().await;
    }
    until("enough connections were made", || done.load(Relaxed) > 2000).await;
    for stream in streams {
        tokio::time::timeout(PATIENCE, stream).await.unwrap().unwrap();
    }
    stop.store(true, Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    // Many at once that say nothing.
    let mut idle = Vec::new();
    for _ in 0..1500 {
        idle.push(TcpStream::connect(at).await.unwrap());
    }
    until("they are all held", || proxy.active() == 1500).await;
    drop(idle);
    until("all connections end", || proxy.active() == 0).await;
    // Each of the two workers keeps a pipe.
    until("descriptors are given back", || descriptors() <= before + 4 + 2 * 2).await;
    drop((proxy, servers));

    a_crowd_that_does_not_read_costs_little_memory().await;
    recovers_when_descriptors_run_out().await;
}

/// Whoever does not read costs a piece of 16 KiB at most.
async fn a_crowd_that_does_not_read_costs_little_memory() {
    const CROWD: usize = 300;
    static PIECE: [u8; 1 << 20] = [7; 1 << 20];
    let pump =
        Server::new(async |mut stream: TcpStream| while stream.write_all(&PIECE).await.is_ok() {})
            .await;
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[pump.addr], |_| {}).await;
    assert_eq!(TcpStream::connect(at).await.unwrap().read_u8().await.unwrap(), 7);
    let before = resident_kib();
    let mut crowd = Vec::new();
    for _ in 0..CROWD {
        crowd.push(TcpStream::connect(at).await.unwrap());
    }
    let sent = || proxy.monitor.snapshot().services[0].total.bytes_to_client;
    until("everybody has something to read", || {
        sent() > u64::try_from(CROWD).unwrap() * (64 << 10)
    })
    .await;
    until_steady("the buffers are full", sent).await;
    let grown = resident_kib().saturating_sub(before);
    // Their clients and endpoints are in this process, too.
    assert!(grown < CROWD * 40, "{grown} KiB for {CROWD} connections");
    drop(crowd);
    until("they end", || proxy.active() == 0).await;
}

/// The proxy is another process, with few descriptors.
async fn recovers_when_descriptors_run_out() {
    let echo = Server::echo().await;
    let mut proxier = Apart::proxier("a_process_apart", 120, &[echo.addr]);
    let at = proxier.at[0];
    for _ in 0..3 {
        let mut streams = Vec::new();
        for _ in 0..300 {
            streams.push(TcpStream::connect(at).await.unwrap());
        }
        // Those that found a place are answered; the others wait, and accepting pauses.
        let mut served = 0;
        for stream in &mut streams {
            stream.write_all(b"x").await.unwrap();
        }
        for stream in &mut streams {
            served += usize::from(stream.read_u8().now_or_never().is_some_and(|it| it.is_ok()));
        }
        assert!(served < 120, "{served} with 120 descriptors");
        drop(streams);
        // It may reset a few of those that come while it recovers.
        let answered = AtomicUsize::new(0);
        eventually_async(PATIENCE, "twenty are answered", || async {
            ask(at).await && answered.fetch_add(1, Relaxed) == 19
        })
        .await
        .unwrap();
    }
    let pauses = proxier.has().accept_pauses;
    assert!(pauses >= 1, "descriptors never ran out, so nothing was tested");
    proxier.end();
}

/// Not a test of its own: the process that is started above.
#[test]
fn a_process_apart() {
    apart::be_one();
}

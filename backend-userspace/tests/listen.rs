//! Without kernel rules and without privileges: what happens to connections and datagrams.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::{collections::BTreeSet, io, net::SocketAddr, num::NonZeroU32, time::Duration};

use common::*;
use proxier_core::{Count, Counter, Protocol, Proxier, ir::SourceFilter};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

#[tokio::test]
async fn a_connection_tries_other_endpoints_and_whoever_keeps_refusing_is_skipped() {
    let (good, bad) = (Server::echo().await, nobody().await);
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[good.addr, bad], |_| {}).await;
    for _ in 0..20 {
        assert!(ask(at).await);
    }
    let snapshot = proxy.monitor.snapshot();
    let [service] = &snapshot.services[..] else { panic!("{snapshot:?}") };
    assert_eq!(service.total.opened, 20);
    for endpoint in &service.endpoints {
        assert_eq!(endpoint.skipped_for.is_some(), endpoint.addr == bad, "{service:?}");
        // Two failures in a row, and it is left alone.
        assert_eq!(endpoint.total.dial_failures, if endpoint.addr == bad { 2 } else { 0 });
    }
    assert_eq!(service.total.bytes_to_endpoint, 20 * 5);
    assert_eq!(service.total.bytes_to_client, 20 * 5);
}

#[tokio::test]
async fn whoever_holds_any_proxier_can_ask_what_was_counted() {
    let servers = [Server::echo().await, Server::echo().await];
    let mut addrs = servers.each_ref().map(|it| it.addr);
    addrs.sort_unstable();
    let mut proxy = Proxy::new(|_| {});
    let mut wanted = fragment(Protocol::Tcp, &addrs);
    let id = wanted.id.clone();
    proxy.set(wanted.clone()).await;
    for _ in 0..6 {
        assert!(ask(proxy.at(Protocol::Tcp)).await);
    }
    assert_eq!(proxy.engine.counters().await.unwrap(), []);
    wanted.counters = true;
    proxy.set(wanted).await;
    until("the connections end", || proxy.active() == 0).await;
    let counter = |endpoint, connections| {
        let (connections, bytes) = (Some(connections), Some(connections * 10));
        Counter { id: id.clone(), endpoint, count: Count { connections, packets: None, bytes } }
    };
    let expected = [counter(None, 6), counter(Some(addrs[0]), 3), counter(Some(addrs[1]), 3)];
    assert_eq!(proxy.engine.counters().await.unwrap(), expected);
}

#[tokio::test]
async fn where_every_endpoint_refuses_the_client_is_reset_soon() {
    let bad = [nobody().await, nobody().await];
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &bad, |_| {}).await;
    // The reset may be there before the client has noticed that it is connected.
    let ask = async { TcpStream::connect(at).await?.read_u8().await };
    let error = timeout(PATIENCE, ask).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.monitor.snapshot().unreachable, 1);
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    // The endpoint answers when it has heard everything.
    let late = Server::new(async |mut stream: TcpStream| {
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        stream.write_all(&heard.len().to_le_bytes()).await.unwrap();
    })
    .await;
    let (_proxy, at) = Proxy::serving(Protocol::Tcp, &[late.addr], |_| {}).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(&noise(1, 300_000)).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, 300_000_usize.to_le_bytes());

    // The endpoint says its last word first, and goes on listening.
    let early = Server::new(async |mut stream: TcpStream| {
        stream.write_all(b"bye").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"still here");
    })
    .await;
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[early.addr], |_| {}).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!((answer.as_slice(), proxy.active()), (&b"bye"[..], 1));
    stream.write_all(b"still here").await.unwrap();
    drop(stream);
    until("the connection ends", || proxy.active() == 0).await;
    assert_eq!(proxy.monitor.snapshot().services[0].total.bytes_to_endpoint, 10);
}

async fn streams_arrive(splice: bool) {
    const BYTES: usize = 6 << 20;
    let echo = Server::echo().await;
    let (proxy, at) =
        Proxy::serving(Protocol::Tcp, &[echo.addr], |config| config.tcp.splice = splice).await;
    let streams = (0..12_u64).map(|seed| {
        tokio::spawn(async move {
            let sent = noise(seed * 2 + 1, BYTES);
            let expected = sent.clone();
            let (mut read, mut write) = TcpStream::connect(at).await.unwrap().into_split();
            let writer = tokio::spawn(async move {
                // Small and large pieces.
                let (small, large) = sent.split_at(100_000);
                for piece in small.chunks(777) {
                    write.write_all(piece).await.unwrap();
                }
                write.write_all(large).await.unwrap();
                write.shutdown().await.unwrap();
            });
            let mut received = Vec::with_capacity(BYTES);
            read.read_to_end(&mut received).await.unwrap();
            writer.await.unwrap();
            assert!(received == expected, "stream {seed} is damaged");
        })
    });
    for stream in streams.collect::<Vec<_>>() {
        timeout(PATIENCE, stream).await.unwrap().unwrap();
    }
    until("the connections end", || proxy.active() == 0).await;
    let total = proxy.monitor.snapshot().services[0].total;
    let all = u64::try_from(12 * BYTES).unwrap();
    assert_eq!((total.bytes_to_endpoint, total.bytes_to_client), (all, all));
}

#[tokio::test(flavor = "multi_thread")]
async fn long_streams_arrive_whole_when_spliced() {
    streams_arrive(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_streams_arrive_whole_when_copied() {
    streams_arrive(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_slows_the_writer_down() {
    const BYTES: usize = 48 << 20;
    let pump = Server::new(async |mut stream: TcpStream| {
        stream.write_all(&noise(5, BYTES)).await.ok();
    })
    .await;
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[pump.addr], |_| {}).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    let sent = || proxy.monitor.snapshot().services[0].total.bytes_to_client;
    // Whatever fits the kernel's buffers, and then nothing more.
    until_steady("the buffers are full", sent).await;
    let last = sent();
    assert!(
        last < u64::try_from(BYTES).unwrap() / 2,
        "{last} bytes went to a client that reads none"
    );
    let mut received = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut received)).await.unwrap().unwrap();
    assert!(received == noise(5, BYTES));
}

#[tokio::test]
async fn slow_writers_keep_nobody_up_and_lose_nothing() {
    const CROWD: usize = 200;
    const ROUNDS: usize = 24;
    let echo = Server::echo().await;
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[echo.addr], |_| {}).await;
    let mut crowd = Vec::new();
    for seed in 0..CROWD {
        let sent = noise(u64::try_from(seed).unwrap() * 2 + 1, ROUNDS);
        crowd.push((TcpStream::connect(at).await.unwrap(), sent));
    }
    for round in 0..ROUNDS {
        for (stream, sent) in &mut crowd {
            stream.write_all(&sent[round..=round]).await.unwrap();
        }
        // Somebody who is in a hurry.
        assert!(ask(at).await);
        for (stream, sent) in &mut crowd {
            let received = timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap();
            assert_eq!(received, sent[round]);
        }
    }
    assert_eq!(proxy.active(), u64::try_from(CROWD).unwrap());
    drop(crowd);
    until("they end", || proxy.active() == 0).await;
}

#[tokio::test]
async fn the_last_words_and_the_end_arrive_also_when_they_come_at_once() {
    // Small answers and large ones; the end is there before anybody reads.
    for length in [1, 700, 16 << 10, (16 << 10) + 1, 200_000] {
        let hasty = Server::new(move |mut stream: TcpStream| async move {
            stream.write_all(&noise(3, length)).await.unwrap();
        })
        .await;
        let (proxy, at) = Proxy::serving(Protocol::Tcp, &[hasty.addr], |_| {}).await;
        for _ in 0..20 {
            let mut stream = TcpStream::connect(at).await.unwrap();
            let mut received = Vec::new();
            timeout(PATIENCE, stream.read_to_end(&mut received)).await.unwrap().unwrap();
            assert!(received == noise(3, length), "{} of {length}", received.len());
        }
        until("they end", || proxy.active() == 0).await;
    }
}

#[tokio::test]
async fn a_broken_end_breaks_the_other() {
    let breaks = Server::new(async |mut stream: TcpStream| {
        stream.read_u8().await.unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[breaks.addr], |_| {}).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    let error = timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    until("the connection ends", || proxy.active() == 0).await;
}

#[tokio::test]
async fn an_endpoint_that_never_answers_does_not_keep_what_clients_have_left() {
    // It accepts, and then neither reads nor says anything.
    let (held, holding) = std::sync::mpsc::channel();
    let mute = Server::new(move |stream| {
        held.send(stream).unwrap();
        std::future::ready(())
    })
    .await;
    let limit = Duration::from_millis(300);
    let (proxy, at) = Proxy::serving(Protocol::Tcp, &[mute.addr], |config| {
        config.tcp.half_closed = Some(limit);
    })
    .await;
    let mut patient = TcpStream::connect(at).await.unwrap();
    patient.write_all(b"hello").await.unwrap();
    for _ in 0..50 {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
    }
    until("all are passed on", || proxy.monitor.snapshot().services[0].total.opened == 51).await;
    until("those that left are forgotten", || proxy.active() == 1).await;
    // Who waits without having ended is not concerned.
    until_steady("the patient one stays", || proxy.active()).await;
    assert_eq!((proxy.active(), holding.try_iter().count()), (1, 51));
    drop(patient);
    until("the last one is forgotten", || proxy.active() == 0).await;
}

#[tokio::test]
async fn no_more_connections_than_the_limit_are_served_at_once() {
    let echo = Server::echo().await;
    let (proxy, at) =
        Proxy::serving(Protocol::Tcp, &[echo.addr], |config| config.limits.connections = 3).await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        streams.push(stream);
    }
    until("as many as may are served", || proxy.active() == 3).await;
    until_steady("nobody else is served", || proxy.active()).await;
    assert_eq!(proxy.active(), 3);
    // As those end, the others are served.
    while let Some(mut stream) = streams.pop() {
        until("others wait for their turn", || proxy.active() <= 3).await;
        if timeout(Duration::from_millis(100), stream.read_u8()).await.is_err() {
            streams.insert(0, stream);
        }
    }
    until("all are done", || proxy.active() == 0).await;
    assert_eq!(proxy.monitor.snapshot().services[0].total.opened, 8);
}

#[tokio::test]
async fn without_endpoints_and_for_the_wrong_source_there_is_a_refusal() {
    let echo = Server::echo().await;
    let (mut proxy, at) = Proxy::serving(Protocol::Tcp, &[echo.addr], |_| {}).await;
    assert!(ask(at).await);
    proxy.set(fragment(Protocol::Tcp, &[])).await;
    until("the listener closes", || std::net::TcpStream::connect(at).is_err()).await;
    let error = TcpStream::connect(at).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);

    let mut fenced = fragment(Protocol::Tcp, &[echo.addr]);
    let ranges = vec!["192.0.2.0/24".parse().unwrap()];
    fenced.frontends[0].sources = Some(SourceFilter { ranges, vips: Vec::new() });
    proxy.set(fenced).await;
    assert!(!ask(proxy.at(Protocol::Tcp)).await);
    assert_eq!(proxy.monitor.snapshot().refused, 1);
    proxy.set(fragment(Protocol::Tcp, &[echo.addr])).await;
    assert!(ask(proxy.at(Protocol::Tcp)).await);
    proxy.engine.cleanup().await.unwrap();
    assert!(proxy.monitor.listeners().is_empty() && proxy.monitor.snapshot().services.is_empty());
}

#[tokio::test]
async fn connections_to_an_endpoint_that_is_gone_live_on_or_are_drained() {
    for drain in [None, Some(Duration::from_millis(50))] {
        let (old, new) = (Server::echo().await, Server::echo().await);
        let (mut proxy, at) =
            Proxy::serving(Protocol::Tcp, &[old.addr], |config| config.tcp.drain = drain).await;
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        stream.read_u8().await.unwrap();
        proxy.set(fragment(Protocol::Tcp, &[new.addr])).await;
        assert!(ask(at).await);
        if drain.is_some() {
            let error = timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        } else {
            stream.write_all(b"y").await.unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), b'y');
        }
    }
}

#[tokio::test]
async fn affinity_is_kept_for_a_client() {
    let servers = [Server::echo().await, Server::echo().await, Server::echo().await];
    let mut proxy = Proxy::new(|_| {});
    let mut wanted = fragment(Protocol::Tcp, &servers.each_ref().map(|it| it.addr));
    wanted.affinity = NonZeroU32::new(100);
    proxy.set(wanted).await;
    for _ in 0..9 {
        assert!(ask(proxy.at(Protocol::Tcp)).await);
    }
    let snapshot = proxy.monitor.snapshot();
    let used: Vec<_> = snapshot.services[0].endpoints.iter().map(|it| it.total.opened).collect();
    assert_eq!(used.iter().max(), Some(&9), "{used:?}");
}

async fn question(socket: &UdpSocket, at: SocketAddr) -> Option<String> {
    let mut buffer = [0; 64];
    socket.send_to(b"?", at).await.unwrap();
    let answered = timeout(Duration::from_secs(2), socket.recv_from(&mut buffer)).await;
    let (bytes, from) = answered.ok()?.unwrap();
    assert_eq!(from, at);
    Some(String::from_utf8(buffer[..bytes].to_vec()).unwrap())
}

#[tokio::test]
async fn datagrams_of_a_client_stay_with_an_endpoint_until_it_goes() {
    let servers = [datagram_server().await, datagram_server().await];
    let (mut proxy, at) =
        Proxy::serving(Protocol::Udp, &servers.each_ref().map(|it| it.addr), |_| {}).await;
    let mut seen = BTreeSet::new();
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let first = question(&client, at).await.unwrap();
    for _ in 0..4 {
        assert_eq!(question(&client, at).await.as_ref(), Some(&first));
        let other = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        seen.insert(question(&other, at).await.unwrap());
    }
    assert_eq!(seen.len(), 2, "everybody has a turn");
    let rest: Vec<_> =
        servers.iter().map(|it| it.addr).filter(|it| it.port().to_string() != first).collect();
    proxy.set(fragment(Protocol::Udp, &rest)).await;
    assert_eq!(question(&client, at).await, Some(rest[0].port().to_string()));
}

#[tokio::test]
async fn a_datagram_that_is_refused_moves_on() {
    let (good, bad) = (datagram_server().await, nobody().await);
    let (proxy, at) = Proxy::serving(Protocol::Udp, &[good.addr, bad], |_| {}).await;
    for _ in 0..6 {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut answered = false;
        for _ in 0..3 {
            // The refusal comes after the question, which is lost.
            client.send_to(b"?", at).await.unwrap();
            let mut buffer = [0; 64];
            let answer = timeout(Duration::from_millis(300), client.recv_from(&mut buffer)).await;
            answered |= answer.is_ok();
        }
        assert!(answered);
    }
    let snapshot = proxy.monitor.snapshot();
    let bad_one = snapshot.services[0].endpoints.iter().find(|it| it.addr == bad).unwrap();
    assert!(bad_one.total.dial_failures >= 2, "{snapshot:?}");
}

#[tokio::test]
async fn answered_questions_end_a_session_soon_and_only_where_it_is_one_for_one() {
    let server = datagram_server().await;
    for (ports, ends) in [(vec![80], true), (vec![], false)] {
        let (proxy, at) = Proxy::serving(Protocol::Udp, &[server.addr], |config| {
            config.udp.answer_ports = ports;
            config.udp.answered = Duration::from_millis(50);
        })
        .await;
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        assert!(question(&client, at).await.is_some());
        let sessions = || proxy.monitor.snapshot().sessions;
        if ends {
            until("the session ends", || sessions() == 0).await;
        } else {
            until_steady("the session stays", sessions).await;
            assert_eq!(sessions(), 1);
        }
    }
}

#[tokio::test]
async fn a_train_of_datagrams_arrives_whole_and_in_pieces_of_the_same_length() {
    const EACH: usize = 700;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let echo = tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((bytes, client)) = socket.recv_from(&mut buffer).await {
            socket.send_to(&buffer[..bytes], client).await.ok();
        }
    });
    let (proxy, at) = Proxy::serving(Protocol::Udp, &[addr], |_| {}).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(at).await.unwrap();
    // One system call, thirty datagrams, the last of them shorter.
    let sent = noise(9, 29 * EACH + 123);
    let segment = u16::try_from(EACH).unwrap();
    nix::sys::socket::sendmsg::<()>(
        std::os::fd::AsRawFd::as_raw_fd(&client),
        &[io::IoSlice::new(&sent)],
        &[nix::sys::socket::ControlMessage::UdpGsoSegments(&segment)],
        nix::sys::socket::MsgFlags::empty(),
        None,
    )
    .unwrap();
    let (mut received, mut lengths) = (Vec::new(), Vec::new());
    let mut buffer = [0; 2048];
    while received.len() < sent.len() {
        let bytes = timeout(PATIENCE, client.recv(&mut buffer)).await.unwrap().unwrap();
        received.extend_from_slice(&buffer[..bytes]);
        lengths.push(bytes);
    }
    assert!(received == sent);
    assert_eq!(lengths, [vec![EACH; 29], vec![123]].concat());
    let total = proxy.monitor.snapshot().services[0].total;
    assert_eq!(total.bytes_to_endpoint, u64::try_from(sent.len()).unwrap());
    assert_eq!(proxy.monitor.snapshot().lost_datagrams, 0);
    echo.abort();
}

#[tokio::test]
async fn sessions_are_bounded_and_end_when_idle() {
    let server = datagram_server().await;
    let (proxy, at) = Proxy::serving(Protocol::Udp, &[server.addr], |config| {
        config.limits.sessions = 8;
        config.udp.idle = Duration::from_millis(400);
        config.udp.answer_ports = vec![80];
        config.udp.answered = Duration::from_millis(400);
    })
    .await;
    let mut clients = Vec::new();
    for _ in 0..40 {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        assert!(question(&client, at).await.is_some());
        clients.push(client);
        assert!(proxy.monitor.snapshot().sessions <= 8);
    }
    assert!(proxy.monitor.snapshot().evicted_sessions >= 32 - 8);
    until("idle sessions end", || proxy.monitor.snapshot().sessions == 0).await;
    assert!(question(&clients[0], at).await.is_some());
}

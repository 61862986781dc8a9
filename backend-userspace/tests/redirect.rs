//! Redirecting, where TPROXY is not to be had: the conformance cases with real packets, and what is
//! different from TPROXY.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use common::{PATIENCE, TestEngine, fragment};
use proxier_backend_userspace::{Capture, Config, Factory, Listen, Method, Tcp, engine};
use proxier_core::{
    Family, Mode, Protocol, Proxier, Revision, Update,
    ir::{Fragment, Origin, WayIn},
};
use proxier_netlink::NetNs;
use proxier_testkit::{
    cases::{CaseFile, Kernel, RealKernel, Verdict, run},
    require_lab,
};

/// The files of cases that come with the project.
const FILES: [&str; 2] = [
    include_str!("../../proxier-testkit/cases/cases.yaml"),
    include_str!("../../proxier-testkit/cases/extra.yaml"),
];

/// What happens to a flow, whatever its endpoint sees of the client.
fn whoever_it_comes_from(verdict: &str) -> String {
    verdict.replace(" source kept", "").replace(" masqueraded", "")
}

#[test]
fn every_flow_goes_where_it_should_from_an_address_of_the_node() {
    require_lab!();
    let factory = Factory { method: Method::Redirect };
    let mut real = RealKernel::new(Box::new(factory)).unwrap();
    let (mut kept, mut changed, mut failed) = (0, 0, Vec::new());
    for text in FILES {
        let file = CaseFile::parse(text).unwrap();
        let flows = file.cases().iter().filter(|it| matches!(&*it.kind, "affinity" | "flow"));
        for case in flows {
            let mut kernel = Kernel::Real(&mut real);
            for report in run(&file, case, &[Mode::Userspace], &[], &mut kernel) {
                match &report.verdict {
                    Verdict::Failed { expected, actual, .. }
                        if whoever_it_comes_from(expected) == whoever_it_comes_from(actual)
                            && !actual.contains(" source kept") =>
                    {
                        changed += 1;
                    }
                    Verdict::Failed { .. } => failed.push(report.to_string()),
                    Verdict::Passed { .. } => kept += 1,
                    _ => {}
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} failed\n{}", failed.len(), failed.join("\n"));
    assert!(kept > 30 && changed > 10, "{kept} came out, {changed} with another source");
}

/// A namespace with a way to Services.
fn namespace() -> NetNs {
    let ns = NetNs::create().expect("a network namespace: tests need root");
    let line = "ip link set lo up && ip address add 172.20.7.11/32 dev lo && \
                ip route add 10.97.0.0/16 dev lo src 172.20.7.11";
    let prepare = || std::process::Command::new("sh").args(["-c", line]).status();
    assert!(ns.run(prepare).unwrap().unwrap().success());
    ns
}

/// Redirects there, to Services of which one attempt is made to reach an endpoint.
async fn redirect<const N: usize>(ns: &NetNs, services: [Fragment; N]) -> TestEngine {
    let listen = Listen::Capture(Capture { method: Method::Redirect, ..Capture::default() });
    let tcp = Tcp { dial_timeouts: vec![Duration::from_millis(100)], ..Tcp::default() };
    let config = Config { listen, tcp, ..Config::default() };
    let mut engine = engine(&config, ns, &[Family::V4]).unwrap();
    let (revision, fragments) = (Revision(1), services.map(Arc::new).into());
    let update = Update::Reset { revision, node: Arc::default(), fragments };
    assert_eq!(engine.sync(update).await.unwrap().degraded, []);
    engine
}

fn connect(ns: &NetNs, to: SocketAddr) -> std::io::Result<TcpStream> {
    ns.run(|| TcpStream::connect_timeout(&to, PATIENCE)).map_err(std::io::Error::other)?
}

/// A Service port at 10.97.0.`host`:80.
fn service(host: u8, protocol: Protocol, member: SocketAddr) -> Fragment {
    let mut fragment = fragment(protocol, &[member]);
    fragment.id.port = host.to_string().into();
    fragment.frontends[0].key.way_in = WayIn::Address([10, 97, 0, host].into());
    fragment
}

/// The end that a client sees.
fn end(connected: std::io::Result<TcpStream>) -> ErrorKind {
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) => return error.kind(),
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read(&mut [0]).map_or_else(|error| error.kind(), |_| ErrorKind::UnexpectedEof)
}

#[tokio::test]
async fn one_client_port_talks_to_two_services() {
    let ns = namespace();
    let open = || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let [one, two, client] = [(); 3].map(|()| ns.run(open).unwrap());
    let members = [&one, &two].map(|it| it.local_addr().unwrap());
    let services = [service(1, Protocol::Udp, members[0]), service(2, Protocol::Udp, members[1])];
    let _engine = redirect(&ns, services).await;
    let mut buffer = [0; 16];
    for round in 0..3_u8 {
        for (host, server) in [(1, &one), (2, &two)] {
            let frontend = SocketAddr::from(([10, 97, 0, host], 80));
            client.send_to(&[round, host], frontend).unwrap();
            let (bytes, proxy) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..bytes], [round, host]);
            server.send_to(&[host, round], proxy).unwrap();
            let (bytes, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..bytes], from), (&[host, round][..], frontend));
        }
    }
}

#[tokio::test]
async fn what_the_proxy_sends_is_not_redirected_again() {
    let ns = namespace();
    // Whoever takes a Service for an endpoint finds nobody there.
    let own = SocketAddr::from(([10, 97, 0, 1], 80));
    let engine = redirect(&ns, [service(1, Protocol::Tcp, own)]).await;
    assert_eq!(end(connect(&ns, own)), ErrorKind::ConnectionReset);
    let snapshot = engine.dataplane().monitor().snapshot();
    assert_eq!((snapshot.unreachable, snapshot.services[0].total.dial_failures), (1, 1));
}

#[tokio::test]
async fn who_was_not_redirected_is_refused() {
    let ns = namespace();
    let server = ns.run(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
    let member = server.local_addr().unwrap();
    let engine = redirect(&ns, [service(1, Protocol::Tcp, member)]).await;
    let port = engine.dataplane().ports().of(Family::V4, Protocol::Tcp, Origin::Node);
    assert_eq!(end(connect(&ns, ([127, 0, 0, 1], port).into())), ErrorKind::ConnectionReset);
    let mut client = connect(&ns, ([10, 97, 0, 1], 80).into()).unwrap();
    client.write_all(b"hello").unwrap();
    let (mut served, _) = server.accept().unwrap();
    let mut buffer = [0; 5];
    served.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
}

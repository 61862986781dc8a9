//! Real packets of a host to itself: what only many connections show. Needs root and `ip`.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod common;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use common::*;
use proxier_core::{
    Proxier,
    model::{DetectLocal, NodeEnv},
};

/// Where every endpoint listens.
const PORT: u16 = 8080;
const NODE: &str = "172.20.7.11";

/// A namespace whose loopback has the node's address and those of all endpoints, and leads everywhere.
struct Host {
    ns: Ns,
    /// Where every endpoint listens. Made once: programs that other tests start hold it for a moment.
    listener: TcpListener,
}

impl Host {
    fn engine(&self) -> TestEngine {
        self.ns.engine()
    }
}

fn host() -> Host {
    let ns = Ns::new();
    for command in [
        "link set lo up",
        "address add 172.20.7.11/32 dev lo",
        "address add 172.20.7.12/32 dev lo",
        "address add 10.61.0.0/16 dev lo",
        "route add default dev lo src 172.20.7.11",
    ] {
        ns.run("ip", &command.split(' ').collect::<Vec<_>>());
    }
    let listener = ns.0.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap()).unwrap();
    Host { ns, listener }
}

fn env_of_host() -> NodeEnv {
    let addresses = ["127.0.0.1", NODE, "172.20.7.12"].map(|ip| ip.parse().unwrap());
    NodeEnv {
        interface_addresses: addresses.into(),
        detect_local: DetectLocal::None,
        service_cidrs: Vec::new(),
        ..env()
    }
}

/// A Service with endpoints 10.61.0.1 and on.
fn world(spec: &str, endpoints: u8) -> String {
    let mut text = format!(
        "kind: Service\nmetadata: {{name: cart, namespace: shop}}\nspec: {{{spec}}}\n---\n\
         kind: EndpointSlice\nmetadata: {{name: cart-1, namespace: shop, \
         labels: {{kubernetes.io/service-name: cart}}}}\naddressType: IPv4\n\
         ports: [{{name: \"\", port: {PORT}}}]\nendpoints:\n"
    );
    for index in 1..=endpoints {
        writeln!(text, "- {{addresses: [10.61.0.{index}], nodeName: tern}}").unwrap();
    }
    text
}

/// Connects from an address, and says which endpoint took it.
fn connect(host: &Host, from: &str, to: &str, times: u32) -> BTreeMap<Ipv4Addr, u32> {
    let (from, to): (SocketAddr, SocketAddr) =
        (format!("{from}:0").parse().unwrap(), to.parse().unwrap());
    let talk = || {
        let listener = host.listener.try_clone().unwrap();
        let server = thread::spawn(move || {
            let mut seen = BTreeMap::new();
            for _ in 0..times {
                let (stream, _) = listener.accept().unwrap();
                let SocketAddr::V4(at) = stream.local_addr().unwrap() else { panic!("IPv4") };
                *seen.entry(*at.ip()).or_default() += 1;
            }
            seen
        });
        for _ in 0..times {
            bound(from, to);
        }
        server.join().unwrap()
    };
    host.ns.0.run(talk).unwrap()
}

/// A connection from an address, closed at once.
fn bound(from: SocketAddr, to: SocketAddr) {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &from).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
    rustix::net::connect(&stream, &to).unwrap();
}

#[tokio::test]
async fn every_endpoint_of_a_pool_with_free_slots_gets_its_share() {
    let host = host();
    let mut engine = host.engine();
    // 40 endpoints have 40 slots, 41 have 42.
    for (revision, endpoints) in (1..).zip([3_u8, 41]) {
        let update =
            store(env_of_host(), &world("clusterIP: 10.97.0.1, ports: [{port: 80}]", endpoints));
        sync(&mut engine, at(update.1, revision)).await;
        let times = u32::from(endpoints) * 60;
        let seen = connect(&host, NODE, "10.97.0.1:80", times);
        assert_eq!(seen.len(), usize::from(endpoints));
        // Five standard deviations and more.
        assert!(seen.values().all(|count| (20..110).contains(count)), "{seen:?}");
    }
}

#[tokio::test]
async fn a_client_comes_back_to_its_endpoint_by_every_frontend() {
    let host = host();
    let mut engine = host.engine();
    let spec = "type: NodePort, clusterIP: 10.97.0.1, externalIPs: [198.51.100.7], \
                sessionAffinity: ClientIP, ports: [{port: 80, nodePort: 31080}]";
    sync(&mut engine, store(env_of_host(), &world(spec, 40)).1).await;
    let frontends = ["10.97.0.1:80", "198.51.100.7:80", "172.20.7.11:31080"];
    let first = connect(&host, NODE, frontends[0], 1);
    let mut others = BTreeMap::new();
    for to in frontends {
        assert_eq!(
            connect(&host, NODE, to, 20).keys().collect::<Vec<_>>(),
            first.keys().collect::<Vec<_>>()
        );
        others.extend(connect(&host, "172.20.7.12", to, 1));
    }
    assert_eq!(others.len(), 1, "another client has one endpoint, too");
    engine.audit().await.unwrap();
    assert_eq!(engine.audit().await.unwrap().drift, 0, "what rules remember is not drift");

    // Its endpoint goes; it is given another, and keeps that.
    let gone = *first.keys().next().unwrap();
    let text = world(spec, 40);
    let text: String = text
        .lines()
        .filter(|line| !line.contains(&format!("[{gone}]")))
        .fold(String::new(), |text, line| text + line + "\n");
    sync(&mut engine, at(store(env_of_host(), &text).1, 2)).await;
    let second = connect(&host, NODE, frontends[0], 1);
    assert!(!second.contains_key(&gone));
    for to in frontends {
        assert_eq!(
            connect(&host, NODE, to, 20).keys().collect::<Vec<_>>(),
            second.keys().collect::<Vec<_>>()
        );
    }
    assert_eq!(engine.audit().await.unwrap().drift, 0);
}

/// The world with an annotation of the Service.
fn annotated(annotation: &str, endpoints: u8) -> String {
    let text = world("clusterIP: 10.97.0.1, ports: [{port: 80}]", endpoints);
    text.replacen(
        "{name: cart, namespace: shop}",
        &format!("{{name: cart, namespace: shop, annotations: {{{annotation}}}}}"),
        1,
    )
}

#[tokio::test]
async fn weights_are_shares_of_connections() {
    let host = host();
    let mut engine = host.engine();
    let weights = "proxier.dev/endpoint-weights: '10.61.0.1=30,10.61.0.2=10,10.61.0.3=0'";
    sync(&mut engine, store(env_of_host(), &annotated(weights, 3)).1).await;
    let seen = connect(&host, NODE, "10.97.0.1:80", 400);
    let count = |last| seen.get(&Ipv4Addr::new(10, 61, 0, last)).copied().unwrap_or_default();
    // Six standard deviations.
    assert!((248..=352).contains(&count(1)), "{seen:?}");
    assert_eq!((count(1) + count(2), count(3)), (400, 0), "{seen:?}");
}

#[tokio::test]
async fn round_robin_takes_turns() {
    let host = host();
    let mut engine = host.engine();
    let update = store(env_of_host(), &annotated("proxier.dev/balance: round-robin", 40)).1;
    sync(&mut engine, update).await;
    let seen = connect(&host, NODE, "10.97.0.1:80", 120);
    assert_eq!((seen.len(), seen.values().all(|count| *count == 3)), (40, true), "{seen:?}");
}

#[tokio::test]
async fn a_source_keeps_its_endpoint_and_sources_are_spread() {
    let host = host();
    let mut engine = host.engine();
    let update = |endpoints| {
        store(env_of_host(), &annotated("proxier.dev/balance: source-hash", endpoints)).1
    };
    sync(&mut engine, update(8)).await;
    let sources: Vec<_> = (0..60).map(|n| format!("10.61.77.{n}")).collect();
    let ask = |source: &String| {
        let seen = connect(&host, source, "10.97.0.1:80", 3);
        assert_eq!(seen.len(), 1, "{source} has one endpoint: {seen:?}");
        *seen.keys().next().unwrap()
    };
    let before: Vec<_> = sources.iter().map(ask).collect();
    let used: std::collections::BTreeSet<_> = before.iter().collect();
    assert!(used.len() >= 6, "{used:?}");
    // One endpoint goes: only its own clients, and very few others, move.
    sync(&mut engine, at(update(7), 2)).await;
    let gone = Ipv4Addr::new(10, 61, 0, 8);
    let moved = sources.iter().zip(before).filter(|(source, was)| ask(source) != *was);
    let needless = moved.filter(|(_, was)| *was != gone).count();
    assert!(needless <= 12, "{needless} of 60 moved without need");
}

#[tokio::test]
async fn connections_are_counted_by_service_port() {
    let host = host();
    let mut engine = host.engine();
    let spec = "type: NodePort, clusterIP: 10.97.0.1, ports: [{port: 80, nodePort: 31080}]";
    let counted = |endpoints| {
        let text = world(spec, endpoints).replacen(
            "namespace: shop}",
            "namespace: shop, annotations: {proxier.dev/counters: 'true'}}",
            1,
        );
        store(env_of_host(), &text).1
    };
    sync(&mut engine, counted(3)).await;
    let connections = async |engine: &mut TestEngine| {
        let counters = engine.counters().await.unwrap();
        let [counter] = counters.as_slice() else { panic!("{counters:?}") };
        assert_eq!((counter.id.to_string(), counter.endpoint), ("shop/cart/TCP/IPv4".into(), None));
        counter.count.connections
    };
    assert_eq!(connections(&mut engine).await, Some(0));
    connect(&host, NODE, "10.97.0.1:80", 7);
    connect(&host, NODE, "172.20.7.11:31080", 5);
    assert_eq!(connections(&mut engine).await, Some(12), "by either frontend");
    // Neither a change of endpoints nor another process makes it forget.
    sync(&mut engine, at(counted(2), 2)).await;
    let mut other = host.engine();
    assert_eq!(sync(&mut other, counted(2)).await.ops.total(), 0);
    connect(&host, NODE, "10.97.0.1:80", 1);
    assert_eq!(connections(&mut other).await, Some(13));
    let listing = host.ns.ruleset();
    assert!(listing.contains("10.97.0.1 . tcp . 80 counter packets 8"), "{listing}");
    // Without the annotation nothing is counted, nor kept.
    sync(&mut engine, at(store(env_of_host(), &world(spec, 2)).1, 3)).await;
    assert_eq!(engine.counters().await.unwrap(), []);
    assert!(!host.ns.ruleset().contains("counter packets"));
}

//! A cluster of many Services: its API server, its node, and what answers for its endpoints.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use proxier_testkit::{
    apiserver::ApiServer,
    lab::{Lab, Ns, Via},
};
use serde_json::{Value, json};

use crate::{Outcome, process::Agent};

/// What the endpoints of the start say.
pub(crate) const OLD: u8 = b'o';
/// What an endpoint says that comes with a change.
pub(crate) const NEW: u8 = b'n';

const OLD_PORT: u16 = 8080;
const NEW_PORT: u16 = 8081;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// The first cluster IP and the first endpoint.
const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const ENDPOINTS: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);

/// A node, and everything it talks to.
pub(crate) struct Cluster {
    pub(crate) server: ApiServer,
    pub(crate) node: Ns,
    endpoints: usize,
    connects: mpsc::SyncSender<Request>,
    _lab: Lab,
}

/// A connection to make, and where to say what came of it.
type Request = (SocketAddr, mpsc::SyncSender<Option<u8>>);

impl Cluster {
    pub(crate) fn new(services: usize, endpoints: usize) -> Outcome<Self> {
        let lab = Lab::new("agent-bench")?;
        let (node, pods) = (lab.ns("node")?, lab.ns("pods")?);
        lab.veth((&node, "pods"), (&pods, "node"))?;
        node.addr("pods", "172.20.7.11/24")?;
        pods.addr("node", "172.20.7.1/24")?;
        node.up("pods")?;
        pods.up("node")?;
        node.route("10.128.0.0/9", Via::Gateway(Ipv4Addr::new(172, 20, 7, 1).into()))?;
        // Cluster IPs need a route before they are translated.
        node.route("10.96.0.0/12", Via::Gateway(Ipv4Addr::new(172, 20, 7, 1).into()))?;
        pods.own("10.128.0.0/9")?;
        for (port, says) in [(OLD_PORT, OLD), (NEW_PORT, NEW)] {
            let listener = pods.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))??;
            thread::spawn(move || respond(&listener, says));
        }
        let server = node.block_on(ApiServer::start(Duration::from_secs(60)))??;
        server.apply_all([
            json!({"kind": "Node", "metadata": {"name": "tern"},
                "status": {"addresses": [{"type": "InternalIP", "address": "172.20.7.11"}]}}),
            json!({"kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
                "spec": {"cidrs": ["10.96.0.0/12"]}}),
        ]);
        server.apply_all((0..services).map(service));
        server.apply_all((0..services).map(|it| slice(it, endpoints, OLD)));
        let connects = connector(node.clone());
        Ok(Self { server, node, endpoints, connects, _lab: lab })
    }

    /// Gives a Service other endpoints.
    pub(crate) fn change(&self, service: usize, says: u8) {
        let endpoints = if says == OLD { self.endpoints } else { 1 };
        self.server.apply(slice(service, endpoints, says));
    }

    /// What a Service says to the node, if it says something.
    pub(crate) fn ask(&self, service: usize) -> Option<u8> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let to = SocketAddr::new(address(SERVICES, service), 80);
        self.connects.send((to, sender)).ok()?;
        receiver.recv().ok()?
    }

    /// Asks until the answer is this one.
    pub(crate) fn wait(&self, service: usize, says: u8, agent: &Agent) -> Outcome {
        let end = Instant::now() + PATIENCE;
        while self.ask(service) != Some(says) {
            agent.check()?;
            if Instant::now() > end {
                return Err(format!("Service {service} does not say {:?}", char::from(says)).into());
            }
        }
        Ok(())
    }

    /// Counts what changes in the node's nf_tables, as the kernel tells it.
    pub(crate) fn watch_kernel(&self) -> Outcome<Monitor> {
        let mut command = Command::new("nft");
        command.arg("monitor").stdout(Stdio::piped()).stdin(Stdio::null());
        let child = self.node.run(move || command.spawn())?;
        Ok(Monitor(child.map_err(|error| format!("nft monitor: {error}"))?))
    }
}

/// A running `nft monitor`.
pub(crate) struct Monitor(Child);

impl Monitor {
    /// Ends it. Returns how many lines it printed.
    pub(crate) fn end(mut self) -> Outcome<usize> {
        self.0.kill()?;
        let mut text = String::new();
        if let Some(out) = &mut self.0.stdout {
            out.read_to_string(&mut text)?;
        }
        self.0.wait()?;
        Ok(text.lines().count())
    }
}

fn respond(listener: &TcpListener, says: u8) {
    for stream in listener.incoming() {
        // Whoever asked may have gone.
        stream.and_then(|mut stream| stream.write_all(&[says])).ok();
    }
}

/// A thread of the node that makes connections, so that making one does not cost entering a namespace.
fn connector(node: Ns) -> mpsc::SyncSender<Request> {
    let (sender, requests) = mpsc::sync_channel::<Request>(1);
    thread::spawn(move || {
        node.run(move || {
            for (to, answer) in requests {
                answer.send(connect(to).ok()).ok();
            }
        })
    });
    sender
}

fn connect(to: SocketAddr) -> std::io::Result<u8> {
    // Without rules the network refuses at once; a lost packet is asked for again soon.
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(50))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut said = [0];
    stream.read_exact(&mut said)?;
    Ok(said[0])
}

fn address(first: Ipv4Addr, index: usize) -> IpAddr {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    Ipv4Addr::from(u32::from(first).saturating_add(index)).into()
}

fn service(index: usize) -> Value {
    let ip = address(SERVICES, index).to_string();
    json!({
        "kind": "Service",
        "metadata": {"name": format!("s{index:05}"), "namespace": "bench", "uid": format!("{index:036}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": format!("s{index:05}")}},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app": format!("s{index:05}")},
            "ports": [{"name": "web", "port": 80, "protocol": "TCP", "targetPort": OLD_PORT}]},
        "status": {"loadBalancer": {}},
    })
}

fn slice(service: usize, endpoints: usize, says: u8) -> Value {
    let port = if says == OLD { OLD_PORT } else { NEW_PORT };
    let name = format!("s{service:05}");
    let endpoint = |index: usize| {
        json!({
            "addresses": [address(ENDPOINTS, service * endpoints + index).to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", index % 100),
            "targetRef": {"kind": "Pod", "name": format!("{name}-{index}"), "namespace": "bench"},
        })
    };
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": format!("{name}-x7k2p"), "namespace": "bench",
            "labels": {"kubernetes.io/service-name": name, "app": name}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": port, "protocol": "TCP"}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
    })
}

//! Exchanging the mode of a driver while real traffic flows. Needs namespaces (see CONTRIBUTING.md).
#![expect(clippy::unwrap_used, reason = "any failure fails the test")]

#[expect(dead_code, reason = "other tests use the rest")]
mod rig;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use proxier::{
    Driver, Handle, Mode, Pacing, Proxier, Swap, SwapError, manifest::Manifest, model::Event, open,
};
use proxier_testkit::{
    lab::Ns,
    require_lab,
    traffic::{Conversation, Many, ProbeSpec, Tally, probe_many},
};
use rig::{Rig, context, env, service};
use tokio::{sync::watch, task::JoinHandle};

const VIP: &str = "10.97.0.21:80";
const SPEC: &str = "clusterIP: 10.97.0.21, ports: [{name: web, port: 80}]";
const ENDPOINTS: &[(&str, &str)] = &[("10.61.3.21", ""), ("10.61.4.21", "")];
/// Exchanges in the long test.
const EXCHANGES: usize = 10;
/// Connections between two exchanges, from each client.
const BETWEEN: u64 = 200;
/// Connections under way at a time, of each client.
const PARALLEL: u8 = 4;
/// Longer than any test.
const LINGER: Duration = Duration::from_secs(600);

/// A driver on the node of a rig's world.
struct Node {
    rig: Rig,
    handle: Handle,
    task: JoinHandle<Box<dyn Proxier>>,
}

impl Node {
    async fn new(name: &str, mode: Mode, manifest: &str) -> Self {
        let rig = Rig::new(name, mode, manifest).await;
        let proxier = open(mode, &context(&rig.world)).await.unwrap();
        let (driver, handle) = Driver::new(proxier, env(&rig.world), Pacing::default());
        let task = tokio::spawn(driver.run(std::future::pending()));
        let manifest = Manifest::parse("test", manifest);
        let slices = manifest.slices().cloned().collect();
        handle.send(Event::EndpointSlices(slices)).await.unwrap();
        handle.send(Event::Services(manifest.services().cloned().collect())).await.unwrap();
        assert_eq!(handle.settle().await.unwrap().failure, None);
        Self { rig, handle, task }
    }

    async fn swap(&self, to: Mode, options: Swap) -> Result<proxier::Swapped, SwapError> {
        let proxier = open(to, &context(&self.rig.world)).await.unwrap();
        self.handle.swap(proxier, options).await
    }

    /// Stops the driver; returns the proxier that was in force.
    async fn stop(self) -> Box<dyn Proxier> {
        drop(self.handle);
        self.task.await.unwrap()
    }
}

/// A client that connects again and again.
struct Client {
    stop: Arc<AtomicBool>,
    asked: watch::Receiver<u64>,
    task: JoinHandle<Vec<Tally>>,
}

impl Client {
    fn start(ns: Ns) -> Self {
        let (stop, (count, asked)) = (Arc::new(AtomicBool::new(false)), watch::channel(0));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut tallies = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let tally =
                    probe_many(&ns, &tcp(VIP), &Many::new(20).parallel(PARALLEL.into())).await;
                count.send_modify(|count| *count += tally.total());
                tallies.push(tally);
            }
            tallies
        });
        Self { stop, asked, task }
    }

    /// Waits until more has been asked.
    async fn go_on(&mut self) {
        let enough = *self.asked.borrow() + BETWEEN;
        let more = self.asked.wait_for(|asked| *asked >= enough);
        let waited = tokio::time::timeout(Duration::from_secs(60), more).await;
        waited.expect("a client goes on asking").expect("the client is there");
    }

    async fn stop(self) -> Vec<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

fn tcp(dst: &str) -> ProbeSpec {
    ProbeSpec::tcp(dst.parse().unwrap())
}

/// The modes that can be opened on this host.
async fn modes(node: &Node) -> Vec<Mode> {
    let mut usable = Vec::new();
    for mode in proxier::modes() {
        if proxier::probe(mode, &context(&node.rig.world)).await.available {
            usable.push(mode);
        }
    }
    assert!(usable.len() > 1, "there is something to exchange: {usable:?}");
    usable
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_connection_fails_while_modes_are_exchanged() {
    require_lab!();
    let shop = service("cart", SPEC, "", ENDPOINTS);
    let node = Node::new("swap", Mode::Iptables, &shop).await;
    let modes = modes(&node).await;
    let mut clients =
        ["pod_b", "node", "client"].map(|name| Client::start(node.rig.world.ns(name).unwrap()));
    for exchange in 1..=EXCHANGES {
        let [from, to] = [exchange - 1, exchange].map(|at| modes[at % modes.len()]);
        let swapped = node.swap(to, Swap::default().linger(LINGER)).await.unwrap();
        assert_eq!((swapped.from, swapped.to), (from, to));
        let audit = node.handle.audit().await.unwrap().last.unwrap();
        assert_eq!(audit.ops.total(), 0, "{to} took over whole");
        for client in &mut clients {
            client.go_on().await;
        }
    }
    for client in clients {
        let tallies = client.stop().await;
        // Virtual servers take the connections along that are under way as they go; new ones work.
        let cut = if modes.contains(&Mode::Ipvs) { PARALLEL.into() } else { 0 };
        let is_bad = |it: &&Tally| {
            let lost = it.total() - it.answers();
            lost > cut || it.rejects() + it.silent > 0
        };
        let bad: Vec<_> = tallies.iter().filter(is_bad).collect();
        assert!(bad.is_empty(), "{} bad rounds, the first: {}", bad.len(), bad[0]);
    }
    let mut last = node.stop().await;
    assert_eq!(last.capabilities().mode, modes[EXCHANGES % modes.len()]);
    assert_eq!(last.audit().await.unwrap().ops.total(), 0, "the last mode is whole");
}

#[tokio::test]
async fn a_connection_lives_on_when_its_mode_goes() {
    require_lab!();
    let shop = service("cart", SPEC, "", ENDPOINTS);
    let node = Node::new("swap-live", Mode::Iptables, &shop).await;
    let pod = node.rig.world.ns("pod_b").unwrap();
    let mut translated = Conversation::open(&pod, &tcp(VIP)).await.unwrap();
    let by = translated.opening().unwrap().by.clone();

    node.swap(Mode::Userspace, Swap::default()).await.unwrap();
    assert_eq!(translated.ask().await.by(), Some(&*by), "translated by the old mode");
    let mut carried = Conversation::open(&pod, &tcp(VIP)).await.unwrap();

    node.swap(Mode::Nftables, Swap::default().linger(LINGER)).await.unwrap();
    assert_eq!(translated.ask().await.by(), Some(&*by), "two modes later");
    assert!(carried.ask().await.by().is_some(), "carried by a process that lingers");
    let tables = node.rig.ruleset();
    assert!(!tables.contains("KUBE-SVC"), "the first mode is gone:\n{tables}");

    let last = node.stop().await;
    assert_eq!(last.capabilities().mode, Mode::Nftables);
}

#[tokio::test]
async fn a_mode_that_cannot_do_what_is_done_does_not_take_over() {
    require_lab!();
    let sip = "clusterIP: 10.97.0.22, ports: [{name: sip, port: 5060, protocol: SCTP}]";
    let shop = [service("cart", SPEC, "", ENDPOINTS), service("voip", sip, "", ENDPOINTS)].concat();
    let node = Node::new("swap-no", Mode::Nftables, &shop).await;
    let before = node.rig.ruleset();

    let refused = node.swap(Mode::Userspace, Swap::default()).await.unwrap_err();
    let SwapError::Degraded { degraded, .. } = &refused else { panic!("{refused}") };
    assert_eq!(degraded.len(), 1, "{refused}");
    assert!(refused.to_string().contains("shop/voip:sip"), "{refused}");
    let same = node.swap(Mode::Nftables, Swap::default()).await.unwrap_err();
    assert!(matches!(same, SwapError::SameMode(Mode::Nftables)), "{same}");
    assert_eq!(node.rig.ruleset(), before, "nothing has changed");
    node.rig.forwards("pod_b", tcp(VIP), &["10.61.3.21:8080", "10.61.4.21:8080"], true).await;

    let swapped = node.swap(Mode::Userspace, Swap::default().accept_degraded(true)).await.unwrap();
    assert_eq!(swapped.report.unwrap().degraded.len(), 1);
    let standing = node.handle.settle().await.unwrap();
    assert_eq!(standing.proxier.degraded.len(), 1);
    node.rig.forwards("pod_b", tcp(VIP), &["10.61.3.21:8080", "10.61.4.21:8080"], true).await;
}

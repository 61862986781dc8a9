//! A node in a lab that is programmed from manifests, for tests with real packets.
#![expect(clippy::unwrap_used, reason = "a test harness: any failure fails the test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::SocketAddr,
};

use proxier::{
    Mode, OpenContext, Proxier, SyncReport, Update,
    manifest::Manifest,
    model::{DetectLocal, Event, NodeEnv, Store},
    open,
};
use proxier_testkit::{
    lab::Ns,
    topology::{Topology, World},
    traffic::{Endpoint, Many, ProbeSpec, Responder, Tally, probe_many},
};

/// The standard world, a proxier on its node, and responders on every endpoint.
pub(crate) struct Rig {
    pub(crate) world: World,
    pub(crate) store: Store,
    pub(crate) proxier: Box<dyn Proxier>,
    pub(crate) mode: Mode,
    responders: BTreeMap<String, Responder>,
}

/// The settings of the tests: pods are 10.61.0.0/16.
pub(crate) fn env(world: &World) -> NodeEnv {
    let nets = ["10.61.0.0/16", "fd41:61::/48"];
    NodeEnv {
        name: "tern".to_owned(),
        ips: ["172.20.7.11", "fd41:7::11"].iter().map(|ip| ip.parse().unwrap()).collect(),
        interface_addresses: world.addrs("node"),
        detect_local: DetectLocal::ClusterCidr(nets.iter().map(|it| it.parse().unwrap()).collect()),
        ..NodeEnv::default()
    }
}

/// How to open a proxier on the node of a world.
pub(crate) fn context(world: &World) -> OpenContext {
    let mut context = OpenContext::default();
    context.netns = Some(world.node().path());
    context
}

impl Rig {
    /// Builds the world and programs it.
    pub(crate) async fn new(name: &str, mode: Mode, manifest: &str) -> Self {
        Self::with(name, mode, manifest, |_| {}).await
    }

    /// As [`new`](Self::new), with other settings.
    pub(crate) async fn with(
        name: &str,
        mode: Mode,
        manifest: &str,
        change: impl FnOnce(&mut NodeEnv),
    ) -> Self {
        let world = Topology::standard().build(name).unwrap();
        let mut env = env(&world);
        change(&mut env);
        let proxier = open(mode, &context(&world)).await.unwrap();
        let store = Store::new(env);
        let mut rig = Self { world, store, proxier, mode, responders: BTreeMap::new() };
        rig.apply(manifest).await;
        rig
    }

    /// Programs what `manifest` says, starts responders for its endpoints, and checks that the kernel
    /// holds exactly what was predicted.
    pub(crate) async fn apply(&mut self, manifest: &str) -> SyncReport {
        let update = self.update(manifest).expect("the manifest changes something");
        let report = self.proxier.sync(update).await.unwrap();
        let unexpected: Vec<_> =
            report.degraded.iter().filter(|it| it.id.protocol != proxier::Protocol::Sctp).collect();
        assert!(unexpected.is_empty(), "{unexpected:#?}");
        self.check().await;
        report
    }

    /// Reads what `manifest` says without programming it.
    pub(crate) fn update(&mut self, manifest: &str) -> Option<Update> {
        let manifest = Manifest::parse("test", manifest);
        assert_eq!(manifest.problems, []);
        self.serve(&manifest);
        self.store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
        self.store.apply(Event::Services(manifest.services().cloned().collect()));
        self.store.take()
    }

    /// The kernel holds exactly what was predicted.
    pub(crate) async fn check(&mut self) {
        let report = self.proxier.audit().await.unwrap();
        assert_eq!(report.ops.total(), 0, "dump and prediction differ\n{}", self.ruleset());
    }

    /// Asks up to 60 times; stops when everybody in `expected` has answered.
    pub(crate) async fn ask(&self, from: &str, spec: ProbeSpec, expected: &[&str]) -> Tally {
        let ns = self.world.ns(from).unwrap();
        let many = Many::new(if expected.is_empty() { 6 } else { 60 });
        probe_many(&ns, &spec, &many.until_seen(expected.iter().copied())).await
    }

    /// Everybody in `expected` answers, and nobody else; the source is kept or not.
    pub(crate) async fn forwards(
        &self,
        from: &str,
        spec: ProbeSpec,
        expected: &[&str],
        kept: bool,
    ) {
        let tally = self.ask(from, spec.clone(), expected).await;
        let who = format!("{from} -> {spec:?}: {tally}\n{}", self.ruleset());
        assert_eq!(tally.names(), expected.iter().copied().collect::<BTreeSet<_>>(), "{who}");
        assert_eq!(tally.answers(), tally.total(), "{who}");
        // Ports say nothing about a source that is kept: two connections from one port to two
        // frontends of one endpoint get different ones. Masquerade changes the port at least.
        let own: BTreeSet<_> = self.world.addrs(from).into_iter().collect();
        for answered in tally.answered.values() {
            if kept {
                assert!(answered.seen.is_subset(&own), "{who}");
            } else {
                assert_eq!(answered.source_kept, 0, "{who}");
            }
        }
    }

    /// Everything is answered by a rejection.
    pub(crate) async fn rejects(&self, from: &str, spec: ProbeSpec) {
        let tally = self.ask(from, spec.clone(), &[]).await;
        assert_eq!(tally.rejects(), 6, "{from} -> {spec:?}: {tally}\n{}", self.ruleset());
    }

    /// Nothing is answered.
    pub(crate) async fn drops(&self, from: &str, spec: ProbeSpec) {
        let tally = self.ask(from, spec.clone(), &[]).await;
        assert_eq!(tally.silent, 6, "{from} -> {spec:?}: {tally}\n{}", self.ruleset());
    }

    /// What the kernel holds, as nft lists it.
    pub(crate) fn ruleset(&self) -> String {
        self.world.node().command("nft", ["list", "ruleset"]).unwrap()
    }

    /// Starts responders that are not there yet, each named after its address.
    fn serve(&mut self, manifest: &Manifest) {
        for slice in manifest.slices() {
            for (port, endpoint) in slice
                .ports()
                .iter()
                .flat_map(|port| slice.endpoints().iter().map(move |it| (port, it)))
            {
                let at = SocketAddr::new(endpoint.ip, port.port.get());
                let Some(ns) = self.home(at) else { continue };
                let name = at.to_string();
                if self.responders.contains_key(&name) {
                    continue;
                }
                let both = [Endpoint::tcp(&name, at), Endpoint::udp(&name, at)];
                self.responders.insert(name, Responder::start(&ns, both).unwrap());
            }
        }
    }

    fn home(&self, at: SocketAddr) -> Option<Ns> {
        let mut pods = self.world.pods().chain(self.world.remote_pods());
        pods.find(|ns| self.world.addrs(ns.name()).contains(&at.ip()))
    }
}

/// A Service `shop/NAME` and its slices: `spec` is the Service's, `endpoints` are addresses with what
/// else is to be said of them.
pub(crate) fn service(name: &str, spec: &str, status: &str, endpoints: &[(&str, &str)]) -> String {
    let mut text = format!(
        "---\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n\
         status: {{loadBalancer: {{ingress: [{status}]}}}}\n"
    );
    for (family, colon) in [("IPv4", false), ("IPv6", true)] {
        let ours = endpoints.iter().filter(|(ip, _)| ip.contains(':') == colon);
        write!(
            text,
            "---\nkind: EndpointSlice\nmetadata: {{name: {name}-{}, namespace: shop, \
             labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: {family}\n\
             ports: [{{name: web, port: 8080}}, {{name: dns, port: 5353, protocol: UDP}}, \
             {{name: sip, port: 5060, protocol: SCTP}}]\nendpoints:\n",
            family.to_lowercase()
        )
        .unwrap();
        for (ip, rest) in ours {
            let local = matches!(ip.rsplit([':', '.']).nth(1), Some("3")) || ip.contains(":3::");
            let node = if local { "tern" } else { "heron" };
            writeln!(text, "- {{addresses: [\"{ip}\"], nodeName: {node}{rest}}}").unwrap();
        }
    }
    text
}

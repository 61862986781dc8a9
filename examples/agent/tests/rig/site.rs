//! A node with two pods behind it, for an agent to run on.

use proxier_testkit::{
    topology::{Topology, World},
    traffic::{Endpoint, Many, ProbeSpec, Responder, probe_many},
};

use super::{Agent, Folder};

/// What `pod_a` answers at, and with.
pub(crate) const A: &str = "10.61.3.21:8080";
/// What `pod_b` answers at, and with.
pub(crate) const B: &str = "10.61.3.22:8080";

/// The node `tern` of the standard topology, and a folder for what its agent reads and logs.
pub(crate) struct Site {
    pub(crate) world: World,
    pub(crate) folder: Folder,
    _responders: Vec<Responder>,
}

impl Site {
    pub(crate) fn new(name: &str) -> Self {
        let world = Topology::standard().build(name).unwrap();
        let responders = [("pod_a", A), ("pod_b", B)].map(|(pod, at)| {
            let endpoint = Endpoint::tcp(at, at.parse().unwrap());
            Responder::start(&world.ns(pod).unwrap(), [endpoint]).unwrap()
        });
        Self { world, folder: Folder::new(name), _responders: responders.into() }
    }

    /// Runs the agent on the node.
    pub(crate) fn agent(&self, args: &[&str]) -> Agent {
        Agent::start(self.world.node(), &self.folder, args)
    }

    /// Who answers when somebody asks.
    pub(crate) fn answers(&self, from: &str, dst: &str) -> Vec<String> {
        let ns = self.world.ns(from).unwrap();
        let spec = ProbeSpec::tcp(dst.parse().unwrap());
        let tally = ns.block_on({
            let ns = ns.clone();
            async move { probe_many(&ns, &spec, &Many::new(16)).await }
        });
        tally.unwrap().names().into_iter().map(str::to_owned).collect()
    }

    pub(crate) fn ruleset(&self) -> String {
        self.world.node().command("nft", ["-s", "list", "ruleset"]).unwrap()
    }
}

/// Settings for a namespace: host-wide sysctls are not to be had there.
pub(crate) fn config(mode: &str, more: &str) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {mode}\n\
         clusterCIDR: 10.61.0.0/16\noomScoreAdj: 0\n{more}---\n\
         apiVersion: proxier.config/v1alpha1\nkind: ProxierConfiguration\nsysctls: false\n"
    )
}

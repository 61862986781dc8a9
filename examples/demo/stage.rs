//! The network, built, with everybody in it who answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use proxier::{
    Protocol, in_full,
    ir::{Fragment, WayIn},
    model::Store,
};
use proxier_testkit::{
    lab::{LabError, Ns, Via},
    topology::World,
    traffic::{self, Endpoint, Responder, sctp_supported},
};

use crate::{
    cluster::Cluster,
    layout::{Layout, NODE},
};

/// The name of whoever answers packets that nobody redirected.
pub(crate) const UNTOUCHED: &str = "untouched";

/// The built network. All of it ends with this value, or with the process.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) layout: Layout,
    pub(crate) world: World,
    /// The kernel has SCTP sockets.
    pub(crate) sctp: bool,
    pub(crate) built: Duration,
    /// What could not be set up.
    pub(crate) notes: Vec<String>,
    /// Dropped before the world.
    responders: Vec<Responder>,
}

impl Stage {
    /// Builds the network and lets every endpoint of the cluster answer.
    ///
    /// # Errors
    /// The kernel refuses, or the addresses contradict each other.
    pub(crate) fn build(layout: Layout, cluster: &Cluster) -> Result<Self, LabError> {
        let began = Instant::now();
        let world = layout.topology.clone().build("demo")?;
        for stray in &layout.strays {
            world.node().route(*stray, Via::Dev(&layout.topology.node.bridge.name))?;
        }
        for (netns, address) in &layout.adopted {
            world.ns(netns)?.own(*address)?;
        }
        let sctp = sctp_supported(world.node())?;
        let (notes, responders) = (Vec::new(), Vec::new());
        let mut stage = Self { layout, world, sctp, built: Duration::ZERO, notes, responders };
        stage.open_endpoints(cluster)?;
        stage.built = began.elapsed();
        Ok(stage)
    }

    /// Lets somebody answer at the very address of each frontend: packets that get there were left
    /// alone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn watch(&mut self, fragments: &[&Fragment]) -> Result<(), LabError> {
        let mut owned = BTreeSet::new();
        let mut wanted: BTreeMap<&str, BTreeSet<(SocketAddr, Protocol)>> = BTreeMap::new();
        for frontend in fragments.iter().flat_map(|fragment| &fragment.frontends) {
            let Some(dst) = self.address(frontend.key.way_in, frontend.key.port.get()) else {
                continue;
            };
            let known = self.layout.env.ips.contains(&dst.ip());
            if !known && owned.insert(dst.ip()) {
                self.world.own(dst.ip())?;
            }
            let netns = if known { NODE } else { "fabric" };
            wanted.entry(netns).or_default().insert((dst, frontend.key.protocol));
        }
        for (netns, addrs) in wanted {
            let endpoints = addrs.into_iter().map(|(at, protocol)| (UNTOUCHED, protocol, at));
            self.open(netns, endpoints.collect())?;
        }
        Ok(())
    }

    /// Where to connect for a way in; `None` in a family that the node does not have.
    pub(crate) fn address(&self, way_in: WayIn, port: u16) -> Option<SocketAddr> {
        let ip = match way_in {
            WayIn::Address(ip) => ip,
            WayIn::Node(family) => self.layout.env.ips.iter().copied().find(|ip| family.has(ip))?,
        };
        Some(SocketAddr::new(ip, port))
    }

    /// The namespace of that name.
    pub(crate) fn ns(&self, name: &str) -> Result<Ns, LabError> {
        self.world.ns(name)
    }

    /// The address belongs to the node itself.
    pub(crate) fn is_nodes(&self, ip: IpAddr) -> bool {
        self.layout.env.interface_addresses.contains(&ip)
    }

    fn open_endpoints(&mut self, cluster: &Cluster) -> Result<(), LabError> {
        let mut wanted: BTreeMap<&str, BTreeSet<(SocketAddr, Protocol)>> = BTreeMap::new();
        for slice in &cluster.slices {
            for endpoint in slice.endpoints() {
                let Some(home) = self.layout.homes.get(&endpoint.ip) else { continue };
                let ports = slice.ports().iter();
                let at = ports.map(|it| (SocketAddr::new(endpoint.ip, it.port.get()), it.protocol));
                wanted.entry(home).or_default().extend(at);
            }
        }
        let named = |(at, protocol): (SocketAddr, _)| {
            let label = self.layout.labels.get(&at.ip()).map_or("?", String::as_str);
            (label.to_owned(), protocol, at)
        };
        let wanted: Vec<(String, Vec<_>)> = wanted
            .into_iter()
            .map(|(home, addrs)| (home.to_owned(), addrs.into_iter().map(named).collect()))
            .collect();
        for (home, endpoints) in wanted {
            let borrowed =
                endpoints.iter().map(|(name, protocol, at)| (name.as_str(), *protocol, *at));
            self.open(&home, borrowed.collect())?;
        }
        Ok(())
    }

    fn open(
        &mut self,
        netns: &str,
        endpoints: Vec<(&str, Protocol, SocketAddr)>,
    ) -> Result<(), LabError> {
        let sctp = self.sctp;
        let usable = endpoints.into_iter().filter(|it| sctp || it.1 != Protocol::Sctp);
        let mut left: Vec<_> =
            usable.map(|(name, protocol, at)| Endpoint::new(name, wire(protocol), at)).collect();
        let mut responder = Responder::start(&self.world.ns(netns)?, [])?;
        if let Err(error) = responder.add(left.clone()) {
            // Those before the failing one are open; the others get another chance one by one.
            left.drain(..=responder.endpoints().count());
            self.notes.push(in_full(&error));
            for endpoint in left {
                if let Err(error) = responder.add([endpoint]) {
                    self.notes.push(in_full(&error));
                }
            }
        }
        self.responders.push(responder);
        Ok(())
    }
}

/// What a store wants programmed.
pub(crate) fn fragments(store: &Store) -> Vec<&Fragment> {
    store.fragments().map(|fragment| &**fragment).collect()
}

/// The protocol as the probes name it.
pub(crate) const fn wire(protocol: Protocol) -> traffic::Protocol {
    match protocol {
        Protocol::Sctp => traffic::Protocol::Sctp,
        Protocol::Tcp => traffic::Protocol::Tcp,
        Protocol::Udp => traffic::Protocol::Udp,
    }
}

//! Who sits where: from worlds and flows to a topology. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use proxier_core::Protocol;

use super::super::{
    CaseFile, CaseWorld, NodeSpec, Origin,
    flow::Flow,
    world::{ip, net},
};

/// The namespace of the node under test.
pub(super) const NODE: &str = "node";
/// The namespace of endpoints on it that are no clients.
const PODS: &str = "pods";
/// The namespace of clients outside.
const CLIENT: &str = "client";
/// The namespace of endpoints that are on no node.
const ELSEWHERE: &str = "elsewhere";
/// The bridge of a node that has none.
const NO_BRIDGE: &str = "br-none";

/// Where a client is, as a case says it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct SourceKey {
    origin: Origin,
    address: IpAddr,
    iface: String,
    /// It must be on the very link: it talks to a link-local address.
    on_link: bool,
}

impl SourceKey {
    pub(super) fn of(flow: &Flow) -> Self {
        let to_link_local = is_link_local(flow.packet.destination.ip());
        Self {
            origin: flow.source.origin,
            address: flow.packet.source,
            iface: flow.packet.input.as_deref().unwrap_or_default().to_owned(),
            on_link: to_link_local && flow.source.origin != Origin::Host,
        }
    }
}

/// An address that means something on one link only.
pub(super) const fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Where an endpoint is.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Home {
    /// On the node under test.
    Here,
    /// On no node.
    Outside,
    /// On another node.
    There(String),
}

/// The namespace of a client, and how the node finds the way back to it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Seat {
    pub(super) ns: String,
    pub(super) way_back: WayBack,
}

/// How the node's answers find a client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum WayBack {
    /// By themselves.
    Known,
    /// Through a link of their own.
    Link(String),
    /// Through the router, although the address looks like one behind another link.
    Router,
}

/// What the cases of a group need.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    world: String,
    /// Without what only some cases change, and what namespaces do not show.
    pub(super) node: NodeSpec,
    others: BTreeMap<String, Vec<IpAddr>>,
    homes: BTreeMap<IpAddr, Home>,
    pub(super) endpoints: BTreeSet<(SocketAddr, Protocol)>,
    pub(super) targets: BTreeSet<(SocketAddr, Protocol)>,
    sources: BTreeSet<SourceKey>,
}

impl Layout {
    pub(super) fn new(world: &CaseWorld) -> Self {
        Self {
            world: world.name.clone(),
            node: fixed(&world.node),
            others: BTreeMap::new(),
            homes: BTreeMap::new(),
            endpoints: BTreeSet::new(),
            targets: BTreeSet::new(),
            sources: BTreeSet::new(),
        }
    }

    /// Says whether a case of this world may share the namespaces.
    pub(super) fn is_for(&self, world: &CaseWorld) -> bool {
        self.world == world.name && self.node == fixed(&world.node)
    }

    /// Makes room for a flow.
    ///
    /// # Errors
    /// An address would have to be in two places, or cannot be understood.
    pub(super) fn add(
        &mut self,
        file: &CaseFile,
        world: &CaseWorld,
        flow: &Flow,
    ) -> Result<(), String> {
        for (name, node) in &file.nodes {
            if *name != world.node_name {
                let ips = node.get("ips").and_then(|ips| ips.as_array()).into_iter().flatten();
                let ips = ips.filter_map(|it| it.as_str()).map(ip).collect::<Result<_, _>>()?;
                self.others.insert(name.clone(), ips);
            }
        }
        for slice in &world.slices {
            for endpoint in &slice.endpoints {
                let Some(text) = endpoint.addr.iter().chain(&endpoint.addrs).next() else {
                    continue;
                };
                let Ok(address) = ip(text) else { continue };
                self.place(address, endpoint.node.as_deref(), &world.node_name)?;
                for port in &slice.ports {
                    let number = port.port.and_then(|port| u16::try_from(port).ok());
                    if let (Some(number @ 1..), Ok(protocol)) = (number, port.proto.parse()) {
                        self.endpoints.insert((SocketAddr::new(address, number), protocol));
                    }
                }
            }
        }
        let key = SourceKey::of(flow);
        let twin = |it: &&SourceKey| it.address == key.address && **it != key;
        if self.sources.iter().find(twin).is_some_and(|it| self.seat(it) != self.seat(&key)) {
            return Err(format!("{} is in two places", key.address));
        }
        self.sources.insert(key);
        self.targets.insert((flow.packet.destination, flow.packet.protocol));
        Ok(())
    }

    fn place(&mut self, address: IpAddr, node: Option<&str>, here: &str) -> Result<(), String> {
        let home = match node {
            Some(name) if name == here => Home::Here,
            Some(name) if self.others.contains_key(name) => Home::There(name.to_owned()),
            _ if self.is_pod_address(address) => Home::Here,
            _ => Home::Outside,
        };
        let known = self.homes.entry(address).or_insert_with(|| home.clone());
        if *known == home { Ok(()) } else { Err(format!("{address} is in two places")) }
    }

    fn is_pod_address(&self, address: IpAddr) -> bool {
        nets(&self.node.pod_cidrs).iter().any(|net| net.contains(&address))
    }

    /// Says whether the node looks for an address on one of its links.
    fn is_connected(&self, address: IpAddr) -> bool {
        let assigned = self.node.ifaces.values().flat_map(|texts| nets(texts));
        { assigned }.any(|net| net.contains(&address))
    }

    /// Says whether an address is the node's.
    pub(super) fn is_node(&self, address: IpAddr) -> bool {
        let assigned = self.node.ifaces.values().flat_map(|texts| nets(texts));
        address.is_loopback() || assigned.map(|net| net.addr()).any(|ip| ip == address)
    }

    /// The link of the node that has an address.
    pub(super) fn link_of(&self, address: IpAddr) -> Option<String> {
        let has = |texts: &Vec<String>| nets(texts).iter().any(|net| net.addr() == address);
        self.node.ifaces.iter().find(|(_, texts)| has(texts)).map(|(name, _)| name.clone())
    }

    /// The link to the other nodes: the one with the node's own address.
    pub(super) fn uplink(&self) -> Result<String, String> {
        let own = self.node.ips.first().and_then(|text| ip(text).ok());
        let has_own = |texts: &Vec<String>| nets(texts).iter().any(|net| Some(net.addr()) == own);
        let mut links = self.node.ifaces.iter().filter(|(_, texts)| has_own(texts));
        links
            .next()
            .map(|(name, _)| name.clone())
            .ok_or_else(|| "the node has no uplink".to_owned())
    }

    /// The link to the node's pods.
    pub(super) fn bridge(&self) -> String {
        let pods = nets(&self.node.pod_cidrs);
        let of_pods = |texts: &Vec<String>| {
            nets(texts).iter().any(|net| pods.iter().any(|pods| pods.contains(&net.addr())))
        };
        let by_network = self.node.ifaces.iter().find(|(_, texts)| of_pods(texts));
        by_network.map_or_else(|| NO_BRIDGE.to_owned(), |(name, _)| name.clone())
    }

    /// Links that are neither loopback nor to pods or nodes.
    pub(super) fn extra(&self) -> Vec<String> {
        let taken = ["lo".to_owned(), self.uplink().unwrap_or_default(), self.bridge()];
        let mut names: BTreeSet<String> = self.node.ifaces.keys().cloned().collect();
        names.extend(self.direct().into_keys());
        names.retain(|name| !taken.contains(name));
        names.into_iter().collect()
    }

    /// Clients behind a link that leads nowhere else, by link.
    pub(super) fn direct(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let mut found: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for key in self.sources.iter().filter(|key| !key.on_link) {
            if let WayBack::Link(iface) = self.seat(key).way_back {
                found.entry(iface).or_default().push(key.address);
            }
        }
        found
    }

    /// Clients on the nodes' network that are no nodes: namespaces and addresses.
    pub(super) fn on_lan(&self) -> BTreeMap<String, IpAddr> {
        let uplink = self.uplink().unwrap_or_default();
        let on_lan = |key: &&SourceKey| key.on_link && key.iface == uplink;
        let keys = self.sources.iter().filter(on_lan);
        keys.map(|key| (self.seat(key).ns, key.address)).collect()
    }

    /// Where a client sits.
    pub(super) fn seat(&self, key: &SourceKey) -> Seat {
        let SourceKey { origin, address, iface, on_link } = key;
        let known = |ns: String| Seat { ns, way_back: WayBack::Known };
        let bridge = self.bridge();
        let uplink = self.uplink().unwrap_or_default();
        if *origin == Origin::Host {
            return known(NODE.to_owned());
        }
        if *on_link && *iface == uplink {
            return Seat { ns: format!("lan-{address}"), way_back: WayBack::Link(uplink) };
        }
        if *iface == bridge || (iface.is_empty() && *origin == Origin::Pod) {
            return known(own_ns(*address));
        }
        if *iface != uplink && !iface.is_empty() {
            return Seat { ns: format!("on-{iface}"), way_back: WayBack::Link(iface.clone()) };
        }
        if let Some((name, _)) = self.others.iter().find(|(_, ips)| ips.contains(address)) {
            return known(remote_ns(name));
        }
        match self.homes.get(address) {
            Some(Home::There(_)) => known(own_ns(*address)),
            Some(Home::Outside) => known(ELSEWHERE.to_owned()),
            Some(Home::Here) => Seat { ns: forged_ns(*address), way_back: WayBack::Router },
            None if self.is_pod_address(*address) || self.is_connected(*address) => {
                Seat { ns: forged_ns(*address), way_back: WayBack::Router }
            }
            None => known(CLIENT.to_owned()),
        }
    }

    /// The namespace that answers at an endpoint's address.
    pub(super) fn endpoint_ns(&self, address: IpAddr) -> Option<String> {
        let own = own_ns(address);
        let is_client = self.sources.iter().any(|key| self.seat(key).ns == own);
        match self.homes.get(&address) {
            None => is_client.then_some(own),
            Some(_) if is_client => Some(own),
            Some(Home::Here) => Some(PODS.to_owned()),
            Some(Home::There(node)) => Some(format!("pods-{node}")),
            Some(Home::Outside) => Some(ELSEWHERE.to_owned()),
        }
    }

    /// The namespace of the other node that has an address.
    pub(super) fn other_node_ns(&self, address: IpAddr) -> Option<String> {
        let (name, _) = self.others.iter().find(|(_, ips)| ips.contains(&address))?;
        self.remotes().iter().any(|it| it.name == *name).then(|| remote_ns(name))
    }

    /// Hosts on the node's bridge: name and addresses.
    pub(super) fn pods(&self) -> BTreeMap<String, Vec<IpAddr>> {
        let mut hosts: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for (address, _) in self.homes.iter().filter(|(_, home)| **home == Home::Here) {
            if let Some(ns) = self.endpoint_ns(*address) {
                hosts.entry(ns).or_default().push(*address);
            }
        }
        let bridge = self.bridge();
        for SourceKey { origin, address, iface, .. } in &self.sources {
            let on_bridge = *iface == bridge || (iface.is_empty() && *origin == Origin::Pod);
            if on_bridge && *origin != Origin::Host {
                let addresses = hosts.entry(own_ns(*address)).or_default();
                if !addresses.contains(address) {
                    addresses.push(*address);
                }
            }
        }
        hosts
    }

    /// The other nodes that somebody needs.
    pub(super) fn remotes(&self) -> Vec<Remote> {
        let used = |name: &String| {
            self.homes.values().any(|home| *home == Home::There(name.clone()))
                || self.sources.iter().any(|key| self.seat(key).ns == remote_ns(name))
        };
        let remote = |(name, addrs): (&String, &Vec<IpAddr>)| {
            let mut pods: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
            for (address, home) in &self.homes {
                if *home == Home::There(name.clone())
                    && let Some(ns) = self.endpoint_ns(*address)
                {
                    pods.entry(ns).or_default().push(*address);
                }
            }
            Remote { name: name.clone(), ns: remote_ns(name), addrs: addrs.clone(), pods }
        };
        self.others.iter().filter(|(name, _)| used(name)).map(remote).collect()
    }

    /// Hosts outside, the clients first.
    pub(super) fn outside(&self) -> Vec<(String, Vec<IpAddr>)> {
        let mut hosts: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        for key in &self.sources {
            let Seat { ns, way_back } = self.seat(key);
            if ns == CLIENT || way_back == WayBack::Router {
                hosts.entry(ns).or_default().insert(key.address);
            }
        }
        for (address, _) in self.homes.iter().filter(|(_, home)| **home == Home::Outside) {
            hosts.entry(ELSEWHERE.to_owned()).or_default().insert(*address);
        }
        // A host without addresses does no harm.
        let clients = hosts.remove(CLIENT).unwrap_or_default();
        let mut all = vec![(CLIENT.to_owned(), clients.into_iter().collect())];
        all.extend(hosts.into_iter().map(|(name, ips)| (name, ips.into_iter().collect())));
        all
    }
}

/// Another node.
pub(super) struct Remote {
    pub(super) name: String,
    pub(super) ns: String,
    pub(super) addrs: Vec<IpAddr>,
    /// Its endpoints: namespaces and their addresses.
    pub(super) pods: BTreeMap<String, Vec<IpAddr>>,
}

fn fixed(node: &NodeSpec) -> NodeSpec {
    let mut fixed = NodeSpec { extra_local: Vec::new(), zone: String::new(), ..node.clone() };
    if fixed.ifaces.is_empty() {
        let with_length =
            |text: &String| format!("{text}/{}", if text.contains(':') { 64 } else { 24 });
        let addresses = fixed.ips.iter().map(with_length).collect();
        fixed.ifaces.insert("eth0".to_owned(), addresses);
    }
    fixed
}

/// The namespace of a client or endpoint that needs one for itself.
fn own_ns(address: IpAddr) -> String {
    format!("pod-{address}")
}

fn forged_ns(address: IpAddr) -> String {
    format!("forged-{address}")
}

fn remote_ns(name: &str) -> String {
    format!("remote-{name}")
}

/// The networks among some texts.
pub(super) fn nets(texts: &[String]) -> Vec<IpNet> {
    let parse = |text: &String| text.parse().ok().or_else(|| net(text).ok());
    texts.iter().filter_map(parse).collect()
}

//! Where everything of a cluster goes in a small network of namespaces. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use proxier::{
    Family, ObjectName,
    ir::Origin,
    model::{DetectLocal, Endpoint, NodeEnv, Service},
};
use proxier_testkit::{
    lab::LabError,
    topology::{HostSpec, LinkSpec, NodeSpec, RemoteSpec, Topology},
};

use crate::cluster::Cluster;

/// Endpoint addresses that get somebody who answers. Frontends of Services beyond are not shown.
const MAX_ADDRESSES: usize = 300;

/// Namespaces for endpoints; further addresses share them.
const MAX_PODS: usize = 40;

/// Other nodes; endpoints of further ones are put on these.
const MAX_NODES: usize = 8;

/// Names of namespaces that are always there.
pub(crate) const NODE: &str = "node";
pub(crate) const POD: &str = "pod";
pub(crate) const OUTSIDE: &str = "outside";
const ELSEWHERE: &str = "elsewhere";

/// The bridge of the node's pods.
const BRIDGE: &str = "cni0";

/// The network to build, and who is who in it.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) topology: Topology,
    /// The node as the proxier is to see it.
    pub(crate) env: NodeEnv,
    /// What each endpoint address is called: its Service and a letter.
    pub(crate) labels: BTreeMap<IpAddr, String>,
    /// The namespace of each endpoint address.
    pub(crate) homes: BTreeMap<IpAddr, String>,
    /// Local endpoints outside the bridge's own networks.
    pub(crate) strays: Vec<IpAddr>,
    /// Addresses of other nodes outside the nodes' network, with the namespace that is to have them.
    pub(crate) adopted: Vec<(String, IpAddr)>,
    pub(crate) clients: Vec<Client>,
}

/// Somebody who connects.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) origin: Origin,
    pub(crate) netns: &'static str,
    pub(crate) addrs: Vec<IpAddr>,
}

impl Layout {
    /// Finds a place for everything.
    ///
    /// # Errors
    /// An address of the manifests fits nowhere.
    pub(crate) fn of(cluster: &Cluster) -> Result<Self, LabError> {
        let mut plan = Planner::new(cluster);
        for service in &cluster.services {
            plan.place(service.name());
        }
        plan.finish()
    }

    /// The first address of a family that a client of this origin has.
    pub(crate) fn client_addr(&self, origin: Origin, family: Family) -> Option<IpAddr> {
        let client = self.clients.iter().find(|client| client.origin == origin)?;
        client.addrs.iter().copied().find(|ip| family.has(ip))
    }
}

/// Everything placed so far.
struct Planner<'a> {
    cluster: &'a Cluster,
    env: NodeEnv,
    /// The nodes' network in each family the node has.
    lan: Vec<IpNet>,
    /// The networks of the bridge, each with the node's address in it.
    bridge: Vec<IpNet>,
    labels: BTreeMap<IpAddr, String>,
    homes: BTreeMap<IpAddr, String>,
    pods: Vec<HostSpec>,
    remotes: BTreeMap<String, RemoteSpec>,
    adopted: Vec<(String, IpAddr)>,
    /// Every address that somebody has.
    taken: BTreeSet<IpAddr>,
}

impl<'a> Planner<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        let mut env = cluster.env.clone();
        if env.ips.is_empty() {
            env.ips = vec![
                Ipv4Addr::new(172, 20, 7, 11).into(),
                Ipv6Addr::new(0xfd41, 7, 0, 0, 0, 0, 0, 0x11).into(),
            ];
        }
        let endpoints = cluster.slices.iter().flat_map(|slice| slice.endpoints());
        let mut taken: BTreeSet<IpAddr> = endpoints.map(|endpoint| endpoint.ip).collect();
        let views = |service: &'a Service| Family::ALL.into_iter().flat_map(|it| service.views(it));
        for view in cluster.services.iter().flat_map(views) {
            taken.extend(view.external_ips().chain(view.lb_vips()).chain([view.cluster_ip]));
        }
        taken.extend(env.ips.iter().chain(cluster.others.values().flat_map(|node| &node.ips)));
        let mut plan = Self {
            cluster,
            env,
            lan: Vec::new(),
            bridge: Vec::new(),
            labels: BTreeMap::new(),
            homes: BTreeMap::new(),
            pods: Vec::new(),
            remotes: BTreeMap::new(),
            adopted: Vec::new(),
            taken,
        };
        for family in Family::ALL {
            plan.lay_family(family);
        }
        plan
    }

    /// Chooses the networks of the nodes and of the bridge in a family, if the node has it.
    fn lay_family(&mut self, family: Family) {
        let Some(ip) = self.env.ips.iter().copied().find(|ip| family.has(ip)) else { return };
        let (usual, widest, bridge) = match family {
            Family::V4 => (24, 12, IpNet::from(IpAddr::V4(Ipv4Addr::new(198, 19, 255, 0)))),
            Family::V6 => {
                (64, 40, IpNet::from(IpAddr::V6(Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, 0))))
            }
        };
        let mut length = usual;
        for other in self.cluster.others.values().flat_map(|node| &node.ips) {
            let holds = |length: u8| IpNet::new(ip, length).is_ok_and(|net| net.contains(other));
            length = (widest..=length).rev().find(|length| holds(*length)).unwrap_or(length);
        }
        self.lan.extend(IpNet::new(ip, length));
        let pods = self.env.pod_cidrs.iter().copied().find(|net| family.has(&net.addr()));
        let pods = pods.or_else(|| IpNet::new(bridge.addr(), usual).ok());
        if let Some((gateway, pods)) = pods.and_then(|net| Some((self.free(net, 1)?, net))) {
            self.bridge.extend(IpNet::new(gateway, pods.prefix_len()));
        }
    }

    /// Takes the first free address of a network, beginning with the `from`th.
    fn free(&mut self, net: IpNet, from: u32) -> Option<IpAddr> {
        let nth = |offset: u32| match net.network() {
            IpAddr::V4(base) => {
                u32::from(base).checked_add(offset).map(Ipv4Addr::from).map(IpAddr::V4)
            }
            IpAddr::V6(base) => {
                u128::from(base).checked_add(offset.into()).map(Ipv6Addr::from).map(IpAddr::V6)
            }
        };
        let free = (from..from.saturating_add(4096))
            .filter_map(nth)
            .take_while(|ip| net.contains(ip))
            .find(|ip| !self.taken.contains(ip) && *ip != net.broadcast());
        self.taken.extend(free);
        free
    }

    /// Gives every endpoint of a Service a name and a home, unless there are too many already.
    fn place(&mut self, service: &ObjectName) {
        for family in Family::ALL {
            if !self.lan.iter().any(|net| family.has(&net.addr())) {
                continue;
            }
            let cluster = self.cluster;
            let slices = cluster.slices.iter().filter(|slice| slice.service() == service);
            let endpoints = slices.filter(|it| it.family() == family).flat_map(|it| it.endpoints());
            for (index, endpoint) in endpoints.enumerate() {
                if self.labels.contains_key(&endpoint.ip) || self.labels.len() >= MAX_ADDRESSES {
                    continue;
                }
                let label = self.label(service, index, endpoint);
                if let Some(home) = self.home(&label, endpoint) {
                    self.labels.insert(endpoint.ip, label);
                    self.homes.insert(endpoint.ip, home);
                }
            }
        }
    }

    /// `cart-a`; the namespace goes in front when another Service of this name came first, and the
    /// family behind when an IPv6 address turns out to be another pod's.
    fn label(&self, service: &ObjectName, index: usize, endpoint: &Endpoint) -> String {
        let letter = match u8::try_from(index) {
            Ok(small @ 0..26) => char::from(b'a' + small).to_string(),
            _ => (index + 1).to_string(),
        };
        let plain = format!("{}-{letter}", service.name());
        let full = format!("{}.{plain}", service.namespace());
        let fits = |label: &String| {
            if self.cluster.others.contains_key(label) {
                return false;
            }
            let mut same = self.labels.iter().filter(|(_, known)| *known == label);
            same.all(|(ip, _)| {
                let endpoints = self.cluster.slices.iter().filter(|it| it.service() == service);
                let mut endpoints = endpoints.flat_map(|it| it.endpoints());
                let twin = endpoints.find(|other| other.ip == *ip);
                ip.is_ipv4() != endpoint.ip.is_ipv4()
                    && twin.is_some_and(|it| it.node == endpoint.node)
            })
        };
        [plain, full.clone()].into_iter().find(fits).unwrap_or_else(|| format!("{full}-v6"))
    }

    /// The namespace of an endpoint; makes one where there is none yet.
    fn home(&mut self, label: &str, endpoint: &Endpoint) -> Option<String> {
        let ip = endpoint.ip;
        if self.env.ips.contains(&ip) {
            return Some(NODE.to_owned());
        }
        let mut others = self.cluster.others.values();
        if let Some(name) = others.find(|it| it.ips.contains(&ip)).map(|it| it.name.clone()) {
            let remote = self.remote(&name)?;
            let netns = remote.name.clone();
            if !remote.addrs.contains(&ip) {
                remote.pod_nets.push(ip.into());
                self.adopted.push((netns.clone(), ip));
            }
            return Some(netns);
        }
        let room = self.pods.len() + self.remotes.values().map(|it| it.pods.len()).sum::<usize>()
            < MAX_PODS;
        match endpoint.node.as_deref() {
            Some(node) if node == self.env.name => Some(add_pod(&mut self.pods, label, ip, room)),
            None if self.lan.iter().any(|net| net.contains(&ip)) => {
                let host = RemoteSpec::new::<IpAddr, IpNet>(label, [ip], []).ok()?;
                self.remotes.insert(label.to_owned(), host);
                Some(label.to_owned())
            }
            node => {
                let remote = self.remote(node.unwrap_or(ELSEWHERE))?;
                if !remote.pod_nets.iter().any(|net| net.contains(&ip)) {
                    remote.pod_nets.push(ip.into());
                }
                Some(add_pod(&mut remote.pods, label, ip, room))
            }
        }
    }

    /// Another node, or one that stands for it when there are too many.
    fn remote(&mut self, name: &str) -> Option<&mut RemoteSpec> {
        let full = self.remotes.len() >= MAX_NODES && !self.remotes.contains_key(name);
        let reserved = [NODE, POD, OUTSIDE, "fabric"].contains(&name);
        let name = if full || reserved { ELSEWHERE } else { name };
        if !self.remotes.contains_key(name) {
            let known = self.cluster.others.get(name);
            let lan = self.lan.clone();
            let addr = |plan: &mut Self, net: IpNet| {
                let mut own = known.into_iter().flat_map(|node| &node.ips).copied();
                own.find(|ip| net.contains(ip)).or_else(|| plan.free(net, 200))
            };
            let addrs: Vec<_> = lan.into_iter().filter_map(|net| addr(self, net)).collect();
            let nets = known.map(|node| node.pod_cidrs.clone()).unwrap_or_default();
            self.remotes.insert(name.to_owned(), RemoteSpec::new(name, addrs, nets).ok()?);
        }
        self.remotes.get_mut(name)
    }

    fn finish(mut self) -> Result<Layout, LabError> {
        let bridge = self.bridge.clone();
        let pod: Vec<_> = bridge.iter().filter_map(|net| self.free(*net, 250)).collect();
        let outside = self.outside();
        let local = self.pods.iter().flat_map(|pod| &pod.addrs).copied();
        let strays: Vec<_> =
            local.filter(|ip| !bridge.iter().any(|net| net.contains(ip))).collect();
        let recognisable = |net: &IpNet| self.env.pod_cidrs.contains(&net.trunc());
        self.env.detect_local = if strays.is_empty() && bridge.iter().all(recognisable) {
            DetectLocal::NodeCidr
        } else {
            DetectLocal::BridgeInterface(BRIDGE.to_owned())
        };
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let own: Vec<IpAddr> = self.lan.iter().map(IpNet::addr).collect();
        let node_addrs = own.iter().copied().chain(bridge.iter().map(IpNet::addr));
        self.env.interface_addresses = node_addrs.chain(loopback).collect();

        let uplink = LinkSpec::new("eth0", self.lan)?;
        let spec = NodeSpec::new(NODE, uplink, LinkSpec::new(BRIDGE, bridge)?);
        let mut topology = Topology::new(spec, HostSpec::new(OUTSIDE, outside.clone())?);
        topology = topology.pod(HostSpec::new(POD, pod.clone())?);
        topology.pods.extend(self.pods);
        topology.remotes.extend(self.remotes.into_values());
        let client = |origin, netns, addrs| Client { origin, netns, addrs };
        let clients = vec![
            client(Origin::Pod, POD, pod),
            client(Origin::Node, NODE, own),
            client(Origin::External, OUTSIDE, outside),
        ];
        let (env, labels, homes, adopted) = (self.env, self.labels, self.homes, self.adopted);
        Ok(Layout { topology, env, labels, homes, strays, adopted, clients })
    }

    /// Addresses of the client outside: of each family one, and as many more as it takes for every
    /// source filter to admit one and to refuse another.
    fn outside(&mut self) -> Vec<IpAddr> {
        const SPARE: [&str; 7] = [
            "192.0.2.55",
            "198.18.0.55",
            "100.64.0.55",
            "2.0.2.55",
            "2001:db8:55::9",
            "2001:db8:77::9",
            "2001:2::9",
        ];
        let known = |ip: &IpAddr| {
            let nodes = self.cluster.others.values().chain([&self.env]);
            let mut nets =
                nodes.flat_map(|node| &node.pod_cidrs).chain(&self.lan).chain(&self.bridge);
            nets.any(|net| net.contains(ip)) || self.taken.contains(ip)
        };
        let spare: Vec<IpAddr> =
            SPARE.iter().filter_map(|text| text.parse().ok()).filter(|ip| !known(ip)).collect();
        let first = |family: Family| spare.iter().copied().find(move |ip| family.has(ip));
        let mut chosen: Vec<_> = Family::ALL.into_iter().filter_map(first).collect();
        let services = self.cluster.services.iter();
        let views =
            services.flat_map(|it| Family::ALL.into_iter().flat_map(|family| it.views(family)));
        let mut wanted = Vec::new();
        for view in views {
            let ranges = view.source_ranges();
            if ranges.is_empty() {
                continue;
            }
            let admits = |ip: &IpAddr| ranges.iter().any(|net| net.contains(ip));
            if !chosen.iter().any(admits) {
                wanted.push(ranges.clone());
            }
            if !chosen.iter().any(|ip| view.family.has(ip) && !admits(ip)) {
                chosen.extend(spare.iter().find(|ip| view.family.has(ip) && !admits(ip)));
            }
        }
        for ranges in wanted {
            let is_chosen = |ip: &IpAddr| ranges.iter().any(|net| net.contains(ip));
            if !chosen.iter().any(is_chosen) {
                chosen.extend(ranges.iter().find_map(|net| self.free(*net, 7)));
            }
        }
        chosen
    }
}

/// Makes a pod, gives a pod of that name another address, or, without room, any pod.
fn add_pod(pods: &mut Vec<HostSpec>, label: &str, ip: IpAddr, room: bool) -> String {
    let place = match pods.iter().position(|pod| pod.name == label) {
        None if !room && !pods.is_empty() => {
            pods.iter().enumerate().min_by_key(|(_, pod)| pod.addrs.len()).map(|(place, _)| place)
        }
        place => place,
    };
    if let Some(pod) = place.and_then(|place| pods.get_mut(place)) {
        pod.addrs.push(ip);
        return pod.name.clone();
    }
    pods.extend(HostSpec::new(label, [ip]));
    label.to_owned()
}

//! Making a topology real.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use super::{HostSpec, LinkSpec, RemoteSpec, Topology};
use crate::lab::{Lab, LabError, Ns, ToNet, V4_GATEWAY, V6_GATEWAY, Via, default_of};

/// Table of what comes from outside, or from another node's pods: everything to the node.
const TO_NODE: u32 = 100;
/// Table of what `fabric` owns, asked only for packets from the nodes.
const OWNED: u32 = 200;
const TO_NODE_PRIORITY: u32 = 10;
const OWNED_PRIORITY: u32 = 20;
const LAN: &str = "lan0";
/// Longest wait for the kernel's background work in one namespace; on an idle machine it takes
/// milliseconds.
const SETTLE: Duration = Duration::from_secs(10);

/// A built [`Topology`]; it ends when this value is dropped.
#[derive(Debug)]
pub struct World {
    lab: Lab,
    topology: Topology,
    node: Ns,
    fabric: Ns,
    client: Ns,
}

impl World {
    pub(super) fn build(topology: Topology, name: &str) -> Result<Self, LabError> {
        let wrong = |what: &str, why| LabError::Topology { what: what.to_owned(), why };
        let client = topology.outside.first().ok_or_else(|| wrong(name, "no host outside"))?;
        if topology.node.uplink.addrs.is_empty() {
            return Err(wrong(&topology.node.name, "the uplink has no address"));
        }
        let lab = Lab::new(name)?;
        let (node, fabric) = (lab.ns(&topology.node.name)?, lab.ns("fabric")?);
        let client = lab.ns(&client.name)?;
        let world = Self { lab, topology, node, fabric, client };
        world.wire_node()?;
        world.wire_pods()?;
        for remote in &world.topology.remotes {
            world.wire_remote(remote)?;
        }
        world.wire_outside()?;
        world.lab.namespaces().iter().try_for_each(|ns| ns.settle(SETTLE))?;
        Ok(world)
    }

    /// Makes `fabric` own an address or a prefix, for packets that come from a node and that no
    /// node owns. A responder there then answers what the node under test left untouched.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`], [`LabError::Kernel`].
    pub fn own(&self, prefix: impl ToNet) -> Result<(), LabError> {
        self.fabric.route_in(OWNED, prefix, Via::Local)
    }

    /// The namespace of that name.
    ///
    /// # Errors
    ///
    /// [`LabError::Name`] when the topology has none.
    pub fn ns(&self, name: &str) -> Result<Ns, LabError> {
        self.lab.find(name).ok_or_else(|| LabError::Name {
            name: name.to_owned(),
            why: "the topology has no such namespace",
        })
    }

    /// The node under test.
    pub fn node(&self) -> &Ns {
        &self.node
    }

    /// The router.
    pub fn fabric(&self) -> &Ns {
        &self.fabric
    }

    /// The first host outside the cluster.
    pub fn client(&self) -> &Ns {
        &self.client
    }

    /// Pods of the node under test, in order.
    pub fn pods(&self) -> impl Iterator<Item = Ns> {
        self.topology.pods.iter().filter_map(|pod| self.lab.find(&pod.name))
    }

    /// Pods of the other nodes, in order.
    pub fn remote_pods(&self) -> impl Iterator<Item = Ns> {
        let pods = self.topology.remotes.iter().flat_map(|remote| &remote.pods);
        pods.filter_map(|pod| self.lab.find(&pod.name))
    }

    /// The addresses of a namespace, as the topology gives them. `fabric` has none of its own.
    pub fn addrs(&self, name: &str) -> Vec<IpAddr> {
        let Topology { node, pods, remotes, outside } = &self.topology;
        if node.name == name {
            let links = [&node.uplink, &node.bridge].into_iter().chain(&node.extra);
            return links.flat_map(|link| &link.addrs).map(IpNet::addr).collect();
        }
        if let Some(remote) = remotes.iter().find(|remote| remote.name == name) {
            return remote.addrs.clone();
        }
        let hosts = pods.iter().chain(outside).chain(remotes.iter().flat_map(|r| &r.pods));
        hosts.filter(|host| host.name == name).flat_map(|host| host.addrs.clone()).collect()
    }

    /// The first IPv4 address of a namespace.
    ///
    /// # Errors
    ///
    /// [`LabError::Topology`] when it has none.
    pub fn v4(&self, name: &str) -> Result<IpAddr, LabError> {
        self.first_addr(name, IpAddr::is_ipv4)
    }

    /// The first IPv6 address of a namespace.
    ///
    /// # Errors
    ///
    /// [`LabError::Topology`] when it has none.
    pub fn v6(&self, name: &str) -> Result<IpAddr, LabError> {
        self.first_addr(name, IpAddr::is_ipv6)
    }

    /// The lab, for more namespaces and links, [`keep`](Lab::keep) and
    /// [`enter_hints`](Lab::enter_hints).
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The description it was built from.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    fn first_addr(&self, name: &str, fits: fn(&IpAddr) -> bool) -> Result<IpAddr, LabError> {
        let why = "the host has no address of the family";
        let missing = || LabError::Topology { what: name.to_owned(), why };
        self.addrs(name).into_iter().find(fits).ok_or_else(missing)
    }

    /// The node's links, its way out, and the nodes' network in `fabric`.
    fn wire_node(&self) -> Result<(), LabError> {
        let spec = &self.topology.node;
        let (node, fabric) = (&self.node, &self.fabric);
        forward(fabric)?;
        // KERNEL: a packet for a connection of this namespace finds its socket before its route,
        // and ip_forward drops packets that have a socket (net/ipv4/ip_forward.c, v6.12). Packets
        // from outside for an owned address are to make the detour through the node.
        fabric.sysctl("net.ipv4.ip_early_demux", "0")?;
        forward(node)?;
        fabric.bridge(LAN)?;
        fabric.rule_iif(OWNED_PRIORITY, LAN, OWNED)?;
        self.join_lan(node, &spec.uplink, 0)?;
        node.bridge(&spec.bridge.name)?;
        add_addrs(node, &spec.bridge)?;
        for uplink in first_of_each_family(spec.uplink.addrs.iter().copied(), IpNet::addr) {
            let gateway = self.gateway(uplink)?;
            let own = IpNet::new_assert(gateway, uplink.prefix_len());
            fabric.addr(LAN, own)?;
            node.default_route(gateway)?;
            fabric.route_in(TO_NODE, default_of(gateway), Via::Gateway(uplink.addr()))?;
            for pods in same_family(spec.bridge.addrs.iter().copied(), gateway) {
                fabric.route(pods, Via::Gateway(uplink.addr()))?;
            }
        }
        for (number, link) in spec.extra.iter().enumerate() {
            self.lab.veth((node, &link.name), (fabric, &format!("extra{number}")))?;
            add_addrs(node, link)?;
        }
        Ok(())
    }

    /// The pods of the node under test, on its bridge.
    fn wire_pods(&self) -> Result<(), LabError> {
        let bridge = &self.topology.node.bridge;
        for (number, spec) in self.topology.pods.iter().enumerate() {
            let pod = self.lab.ns(&spec.name)?;
            let port = port_name("veth-", &spec.name, number);
            self.lab.veth((&pod, "eth0"), (&self.node, &port))?;
            self.node.enslave(&bridge.name, &port)?;
            add_host_addrs(&pod, spec)?;
            let gateways = first_of_each_family(bridge.addrs.iter().map(IpNet::addr), |ip| *ip);
            for gateway in gateways {
                pod.route(gateway, Via::Dev("eth0"))?;
                pod.default_route(gateway)?;
            }
        }
        Ok(())
    }

    /// Another node with its pods.
    fn wire_remote(&self, spec: &RemoteSpec) -> Result<(), LabError> {
        let node_links = &self.topology.node.uplink.addrs;
        let remote = self.lab.ns(&spec.name)?;
        forward(&remote)?;
        let addrs = spec.addrs.iter().map(|addr| {
            let net = node_links.iter().find(|net| net.contains(addr)).ok_or_else(|| {
                let why = "the address of another node is not in the network of the node's uplink";
                LabError::Topology { what: addr.to_string(), why }
            })?;
            Ok(IpNet::new_assert(*addr, net.prefix_len()))
        });
        let addrs = addrs.collect::<Result<_, LabError>>()?;
        let link = LinkSpec { name: "eth0".to_owned(), addrs };
        let number = self.lab.namespaces().len();
        self.join_lan(&remote, &link, number)?;
        for node in first_of_each_family(node_links.iter().map(IpNet::addr), |ip| *ip) {
            // On the link whatever the remote's own addresses are: it may have none of the family.
            let to_node = Via::GatewayOn(node, "eth0");
            remote.route(default_of(node), to_node)?;
            remote.route_in(TO_NODE, default_of(node), to_node)?;
        }
        for addr in first_of_each_family(spec.addrs.iter().copied(), |ip| *ip) {
            for pods in same_family(spec.pod_nets.iter().copied(), addr) {
                self.node.route(pods, Via::Gateway(addr))?;
                if let Some(node) = same_family(node_links.iter().copied(), addr).next() {
                    self.fabric.route(pods, Via::Gateway(node.addr()))?;
                }
            }
        }
        for (number, pod) in spec.pods.iter().enumerate() {
            let port = port_name("veth-", &pod.name, number);
            let ns = self.lab.ns(&pod.name)?;
            self.stub(&ns, pod, &remote, &port)?;
        }
        Ok(())
    }

    /// The hosts outside, each behind a link of its own.
    fn wire_outside(&self) -> Result<(), LabError> {
        for (number, spec) in self.topology.outside.iter().enumerate() {
            let port = port_name("out-", &spec.name, number);
            let host = match self.lab.find(&spec.name) {
                Some(host) if number == 0 => host,
                _ => self.lab.ns(&spec.name)?,
            };
            self.stub(&host, spec, &self.fabric, &port)?;
        }
        Ok(())
    }

    /// Links a host to a router point to point; the router sends all it says to the node.
    fn stub(&self, host: &Ns, spec: &HostSpec, router: &Ns, port: &str) -> Result<(), LabError> {
        self.lab.veth((host, "eth0"), (router, port))?;
        router.addr(port, IpAddr::from(V4_GATEWAY))?;
        router.addr(port, IpNet::new_assert(V6_GATEWAY.into(), 64))?;
        add_host_addrs(host, spec)?;
        for gateway in [V4_GATEWAY.into(), V6_GATEWAY.into()] {
            host.route(default_of(gateway), Via::GatewayOn(gateway, "eth0"))?;
        }
        for addr in &spec.addrs {
            router.route(*addr, Via::Dev(port))?;
        }
        router.rule_iif(TO_NODE_PRIORITY, port, TO_NODE)
    }

    /// Links a node to the others.
    fn join_lan(&self, node: &Ns, link: &LinkSpec, number: usize) -> Result<(), LabError> {
        let port = port_name("lan-", node.name(), number);
        self.lab.veth((node, &link.name), (&self.fabric, &port))?;
        self.fabric.enslave(LAN, &port)?;
        add_addrs(node, link)
    }

    /// The first address of the nodes' network that no node has.
    fn gateway(&self, uplink: IpNet) -> Result<IpAddr, LabError> {
        let Topology { node, remotes, .. } = &self.topology;
        let taken = |candidate: &IpAddr| {
            node.uplink.addrs.iter().any(|net| net.addr() == *candidate)
                || remotes.iter().any(|remote| remote.addrs.contains(candidate))
        };
        let why = "no address is left for the router";
        let usable = uplink.hosts().take(1024).filter(|host| *host != uplink.network());
        { usable }
            .find(|host| !taken(host))
            .ok_or_else(|| LabError::Topology { what: uplink.to_string(), why })
    }
}

fn forward(ns: &Ns) -> Result<(), LabError> {
    ns.sysctl("net.ipv4.ip_forward", "1")?;
    ns.sysctl("net.ipv6.conf.all.forwarding", "1")
}

fn add_addrs(ns: &Ns, link: &LinkSpec) -> Result<(), LabError> {
    link.addrs.iter().try_for_each(|addr| ns.addr(&link.name, *addr))
}

fn add_host_addrs(ns: &Ns, host: &HostSpec) -> Result<(), LabError> {
    host.addrs.iter().try_for_each(|addr| ns.addr("eth0", *addr))
}

/// `PREFIX` and the host's name if a link name can hold both, else its number.
fn port_name(prefix: &str, host: &str, number: usize) -> String {
    let name = format!("{prefix}{host}");
    if name.len() <= 15 { name } else { format!("{prefix}{number}") }
}

fn first_of_each_family<T>(
    all: impl Iterator<Item = T>,
    addr: impl Fn(&T) -> IpAddr,
) -> impl Iterator<Item = T> {
    let (mut v4, mut v6) = (false, false);
    all.filter(move |item| {
        // A link-local address is nobody's gateway.
        let (seen, usable) = match addr(item) {
            IpAddr::V4(_) => (&mut v4, true),
            IpAddr::V6(ip) => (&mut v6, !ip.is_unicast_link_local()),
        };
        usable && !std::mem::replace(seen, usable || *seen)
    })
}

fn same_family(nets: impl Iterator<Item = IpNet>, addr: IpAddr) -> impl Iterator<Item = IpNet> {
    nets.filter(move |net| {
        let link_local = matches!(net, IpNet::V6(v6) if v6.addr().is_unicast_link_local());
        net.addr().is_ipv4() == addr.is_ipv4() && !link_local
    })
}

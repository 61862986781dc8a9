//! The node and how Services are proxied on it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::Serialize;

use super::{
    address::{parse_ip, parse_net},
    api,
    problem::{Checker, Problem},
};
use crate::{
    ir::{Detector, FamilyView, NodePorts, NodeView},
    name::{ByFamily, Family},
};

/// The zone of a node.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// How traffic from this node's pods is recognised.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub enum DetectLocal {
    /// By the interface it comes in on.
    BridgeInterface(String),
    /// By a source address in the cluster's pod networks; pods of other nodes match too. The
    /// first network of a family counts, and a family without one has no detector.
    ClusterCidr(Vec<IpNet>),
    /// By the start of the name of the interface it comes in on.
    InterfaceNamePrefix(String),
    /// By a source address in the node's own pod networks ([`NodeEnv::pod_cidrs`]).
    NodeCidr,
    /// Not at all.
    None,
}

/// Which of the node's addresses node ports answer on.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub enum NodePortAddresses {
    /// Those inside these networks. A family without a network answers on all addresses, and so
    /// does one with a `/0`.
    Inside(Vec<IpNet>),
    /// Those of the Node object ([`NodeEnv::ips`]).
    Primary,
}

impl NodePortAddresses {
    /// Reads the setting as kube-proxy takes it: CIDRs, or the single word `primary`.
    ///
    /// # Errors
    /// The first entry that is neither, or `primary` beside something else, in words.
    pub fn parse<T: AsRef<str>>(entries: &[T]) -> Result<Self, String> {
        let is_primary = |entry: &T| entry.as_ref() == "primary";
        if let [entry] = entries
            && is_primary(entry)
        {
            return Ok(Self::Primary);
        }
        if entries.iter().any(is_primary) {
            return Err("\"primary\" cannot be combined with networks".into());
        }
        let net = |entry: &T| {
            parse_net(entry.as_ref())
                .map(|(net, _)| net)
                .ok_or_else(|| format!("{:?} is neither a CIDR nor \"primary\"", entry.as_ref()))
        };
        entries.iter().map(net).collect::<Result<_, _>>().map(Self::Inside)
    }
}

/// The node that is programmed, and the settings that decide which packets go where.
///
/// Together with the Services and EndpointSlices this is all the input there is: the desired state
/// is a pure function of the three.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct NodeEnv {
    /// Name of the Node object. While it is empty no endpoint counts as local.
    pub name: String,
    /// The zone, empty when unknown.
    pub zone: String,
    /// The node's own addresses as the Node object lists them, best first.
    pub ips: Vec<IpAddr>,
    /// The node's pod networks.
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses on the node's interfaces, loopback included. Needed for
    /// [`NodePortAddresses::Inside`] and to tell node ports from other ports in connection
    /// tracking.
    pub interface_addresses: Vec<IpAddr>,
    /// The ranges cluster IPs come from.
    pub service_cidrs: Vec<IpNet>,
    /// How local pods are recognised.
    pub detect_local: DetectLocal,
    /// Masquerade all traffic to cluster IPs.
    pub masquerade_all: bool,
    /// Where node ports answer.
    pub node_port_addresses: NodePortAddresses,
    /// Node ports answer on 127.0.0.0/8 as well, in modes that can.
    pub localhost_node_ports: bool,
}

impl Default for NodeEnv {
    /// A node without name or addresses, with kube-proxy's defaults.
    fn default() -> Self {
        Self {
            name: String::new(),
            zone: String::new(),
            ips: Vec::new(),
            pod_cidrs: Vec::new(),
            interface_addresses: Vec::new(),
            service_cidrs: Vec::new(),
            detect_local: DetectLocal::ClusterCidr(Vec::new()),
            masquerade_all: false,
            node_port_addresses: NodePortAddresses::Inside(Vec::new()),
            localhost_node_ports: true,
        }
    }
}

impl NodeEnv {
    /// Takes name, zone, addresses and pod networks from the Node object. Everything else of the
    /// object is of no consequence.
    pub fn observe(&mut self, node: &api::Node) -> Vec<Problem> {
        let mut check = Checker::new("Node", "", &node.metadata.name);
        self.name.clone_from(&node.metadata.name);
        self.zone = node.metadata.labels.get(ZONE_LABEL).cloned().unwrap_or_default();
        self.ips.clear();
        // K8S: InternalIP before ExternalIP, as in component-helpers node/util GetNodeHostIPs.
        for wanted in ["InternalIP", "ExternalIP"] {
            for (index, address) in node.status.addresses.iter().enumerate() {
                if address.address_type != wanted {
                    continue;
                }
                match parse_ip(&address.address) {
                    Some(ip) => self.ips.push(ip),
                    None => check.report(
                        format!("status.addresses[{index}]"),
                        format!("{:?} is not an IP address: skipped", address.address),
                    ),
                }
            }
        }
        self.pod_cidrs.clear();
        for (index, text) in node.spec.pod_cidrs.iter().enumerate() {
            match parse_net(text) {
                Some((net, _)) => self.pod_cidrs.push(net),
                None => check.report(
                    format!("spec.podCIDRs[{index}]"),
                    format!("{text:?} is not a CIDR: skipped"),
                ),
            }
        }
        check.done(Some(())).problems
    }

    /// The node's own address in a family; loopback while none is known.
    #[must_use]
    pub fn ip(&self, family: Family) -> IpAddr {
        let known = self.ips.iter().copied().find(|ip| family.has(ip));
        known.unwrap_or(match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        })
    }

    /// What backends need to know of the node.
    #[must_use]
    pub fn view(&self) -> NodeView {
        NodeView(ByFamily::from_fn(|family| FamilyView {
            detector: self.detector(family),
            node_ports: self.node_ports(family),
            localhost_node_ports: self.localhost_node_ports && self.v4_loopback(family),
            addresses: self.addresses_of(family),
            service_cidrs: of_family(&self.service_cidrs, family).collect(),
        }))
    }

    /// How packets of local pods are told apart in a family; `None` when they cannot be.
    #[must_use]
    pub fn detector(&self, family: Family) -> Option<Detector> {
        match &self.detect_local {
            DetectLocal::BridgeInterface(name) => Some(Detector::Interface(name.clone())),
            DetectLocal::ClusterCidr(nets) => of_family(nets, family).next().map(Detector::Source),
            DetectLocal::InterfaceNamePrefix(prefix) => {
                Some(Detector::InterfacePrefix(prefix.clone()))
            }
            DetectLocal::NodeCidr => {
                of_family(&self.pod_cidrs, family).next().map(Detector::Source)
            }
            DetectLocal::None => None,
        }
    }

    /// The addresses node ports answer on in a family.
    #[must_use]
    pub fn node_ports(&self, family: Family) -> NodePorts {
        let nets = self.node_port_nets(family);
        if nets.is_empty() || nets.iter().any(|net| net.prefix_len() == 0) {
            return NodePorts::All;
        }
        let mut listed = self.addresses_of(family);
        listed.retain(|ip| nets.iter().any(|net| net.contains(ip)));
        NodePorts::Listed(listed)
    }

    /// Says whether the node-port addresses of a family include one of 127.0.0.0/8.
    #[must_use]
    pub fn v4_loopback(&self, family: Family) -> bool {
        let nets = self.node_port_nets(family);
        let holds_loopback = |net: &IpNet| {
            net.addr().is_loopback() || net.contains(&IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)))
        };
        family == Family::V4 && (nets.is_empty() || nets.iter().any(holds_loopback))
    }

    fn node_port_nets(&self, family: Family) -> Vec<IpNet> {
        match &self.node_port_addresses {
            NodePortAddresses::Inside(nets) => of_family(nets, family).collect(),
            NodePortAddresses::Primary => {
                let own = self.ips.iter().copied().filter(|ip| family.has(ip) && !ip.is_loopback());
                own.map(IpNet::from).collect()
            }
        }
    }

    fn addresses_of(&self, family: Family) -> Vec<IpAddr> {
        let mut addresses: Vec<_> =
            self.interface_addresses.iter().copied().filter(|ip| family.has(ip)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

fn of_family(nets: &[IpNet], family: Family) -> impl Iterator<Item = IpNet> {
    nets.iter().copied().filter(move |net| family.has(&net.addr()))
}

//! A small cluster of namespaces: the node under test, its pods, other nodes, clients outside.
//!
//! ```text
//!   client ──┐                       ┌── eth0 node ── cni0 ──┬── pod_a
//!   (other)──┴── fabric ── lan0 ─────┤                       └── pod_b
//!                 (owned)            └── eth0 other ──┬── remote_a
//!                                                     └── remote_b
//! ```
//!
//! Who talks to whom through what, so that a reply never has a shorter way home than through the
//! node under test:
//!
//! - Outside hosts send everything to `fabric`, which sends everything of theirs to the node under
//!   test, whatever the destination. So any Service address works without being announced.
//! - Pods own a host prefix and send everything to their node, also what is for a pod beside them.
//! - Another node sends everything that its pods say to the node under test, also what is for
//!   another pod of its own.
//! - The node under test sends what it does not know to `fabric`. There nobody owns the Service
//!   ranges, and the sender gets ICMP 3/0 (v6: 1/0); the kernel sends an IPv4 host five of these at
//!   once and then one a second (ip_error in net/ipv4/route.c), so that more look like drops.
//!   [`World::own`] makes `fabric` own ranges: then a [`Responder`](crate::traffic::Responder) there
//!   shows which packets the node left untouched.

mod build;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use build::World;

use crate::lab::{LabError, ToNet};

/// A host with addresses: a pod, or a client outside.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct HostSpec {
    /// Name of its namespace.
    pub name: String,
    /// Its addresses, the preferred one of each family first. Many are fine: one namespace can
    /// stand for all the endpoints that need not talk to each other.
    pub addrs: Vec<IpAddr>,
}

/// A link of the node under test.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct LinkSpec {
    /// Link name.
    pub name: String,
    /// Its addresses, the preferred one of each family first.
    pub addrs: Vec<IpNet>,
}

/// The node under test.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct NodeSpec {
    /// Name of its namespace.
    pub name: String,
    /// The link to the other nodes and, through `fabric`, to everything else.
    pub uplink: LinkSpec,
    /// The bridge of its pods; the first address of each family is the pods' gateway.
    pub bridge: LinkSpec,
    /// More links. They lead to `fabric`, which has no address there.
    pub extra: Vec<LinkSpec>,
}

/// Another node.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct RemoteSpec {
    /// Name of its namespace.
    pub name: String,
    /// Its addresses, inside the prefixes of the uplink of the node under test.
    pub addrs: Vec<IpAddr>,
    /// The prefixes of its pods.
    pub pod_nets: Vec<IpNet>,
    /// Its pods, each with a namespace of its own.
    pub pods: Vec<HostSpec>,
}

/// A description of a small cluster; [`build`](Self::build) makes it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Topology {
    /// The node under test.
    pub node: NodeSpec,
    /// Pods on the node under test.
    pub pods: Vec<HostSpec>,
    /// Other nodes.
    pub remotes: Vec<RemoteSpec>,
    /// Hosts outside the cluster; the first is the [`World::client`].
    pub outside: Vec<HostSpec>,
}

impl HostSpec {
    /// A host with these addresses.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`].
    pub fn new<A: ToNet>(name: &str, addrs: impl IntoIterator<Item = A>) -> Result<Self, LabError> {
        let addrs = addrs.into_iter().map(|addr| Ok(addr.to_net()?.addr()));
        Ok(Self { name: name.to_owned(), addrs: addrs.collect::<Result<_, LabError>>()? })
    }
}

impl LinkSpec {
    /// A link with these addresses, each with its prefix length.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`].
    pub fn new<A: ToNet>(name: &str, addrs: impl IntoIterator<Item = A>) -> Result<Self, LabError> {
        let addrs = addrs.into_iter().map(|addr| addr.to_net()).collect::<Result<_, _>>()?;
        Ok(Self { name: name.to_owned(), addrs })
    }
}

impl NodeSpec {
    /// A node without further links.
    pub fn new(name: &str, uplink: LinkSpec, bridge: LinkSpec) -> Self {
        Self { name: name.to_owned(), uplink, bridge, extra: Vec::new() }
    }
}

impl RemoteSpec {
    /// A node without pods.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`].
    pub fn new<A: ToNet, P: ToNet>(
        name: &str,
        addrs: impl IntoIterator<Item = A>,
        pod_nets: impl IntoIterator<Item = P>,
    ) -> Result<Self, LabError> {
        let HostSpec { name, addrs } = HostSpec::new(name, addrs)?;
        let pod_nets = pod_nets.into_iter().map(|net| net.to_net()).collect::<Result<_, _>>()?;
        Ok(Self { name, addrs, pod_nets, pods: Vec::new() })
    }

    /// With one more pod.
    pub fn pod(mut self, pod: HostSpec) -> Self {
        self.pods.push(pod);
        self
    }
}

impl Topology {
    /// A node and one client; add the rest.
    pub fn new(node: NodeSpec, client: HostSpec) -> Self {
        Self { node, pods: Vec::new(), remotes: Vec::new(), outside: vec![client] }
    }

    /// The usual world.
    ///
    /// | namespace | addresses |
    /// |---|---|
    /// | `client` | 192.0.2.55, 192.0.2.77, 2001:db8:55::9 |
    /// | `fabric` | 172.20.7.1, fd41:7::1 |
    /// | `node` | eth0 172.20.7.11/24, fd41:7::11/64; cni0 10.61.3.1/24, fd41:61:0:3::1/64 |
    /// | `pod_a` | 10.61.3.21, fd41:61:0:3::21 |
    /// | `pod_b` | 10.61.3.22, fd41:61:0:3::22 |
    /// | `other` | 172.20.7.12, fd41:7::12; pods in 10.61.4.0/24, fd41:61:0:4::/64 |
    /// | `remote_a` | 10.61.4.21, fd41:61:0:4::21 |
    /// | `remote_b` | 10.61.4.22, fd41:61:0:4::22 |
    pub fn standard() -> Self {
        let v4 = |a, b, c, d| IpAddr::V4(Ipv4Addr::new(a, b, c, d));
        let pod_v6 = |net, host| Ipv6Addr::new(0xfd41, 0x61, 0, net, 0, 0, 0, host);
        let node_v6 = |host| Ipv6Addr::new(0xfd41, 7, 0, 0, 0, 0, 0, host);
        let host = |name: &str, addrs: &[IpAddr]| HostSpec {
            name: name.to_owned(),
            addrs: addrs.to_vec(),
        };
        let pod = |name, net: u8, last: u8, v6_last| {
            host(name, &[v4(10, 61, net, last), pod_v6(u16::from(net), v6_last).into()])
        };
        let link = |name: &str, v4: Ipv4Addr, v6: Ipv6Addr| LinkSpec {
            name: name.to_owned(),
            addrs: vec![Ipv4Net::new_assert(v4, 24).into(), Ipv6Net::new_assert(v6, 64).into()],
        };
        let client_v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x55, 0, 0, 0, 0, 9);
        let client = host("client", &[v4(192, 0, 2, 55), v4(192, 0, 2, 77), client_v6.into()]);
        let uplink = link("eth0", Ipv4Addr::new(172, 20, 7, 11), node_v6(0x11));
        let bridge = link("cni0", Ipv4Addr::new(10, 61, 3, 1), pod_v6(3, 1));
        let other = RemoteSpec {
            name: "other".to_owned(),
            addrs: vec![v4(172, 20, 7, 12), node_v6(0x12).into()],
            pod_nets: vec![
                Ipv4Net::new_assert(Ipv4Addr::new(10, 61, 4, 0), 24).into(),
                Ipv6Net::new_assert(pod_v6(4, 0), 64).into(),
            ],
            pods: vec![pod("remote_a", 4, 21, 0x21), pod("remote_b", 4, 22, 0x22)],
        };
        Self::new(NodeSpec::new("node", uplink, bridge), client)
            .pod(pod("pod_a", 3, 21, 0x21))
            .pod(pod("pod_b", 3, 22, 0x22))
            .remote(other)
    }

    /// With one more pod on the node under test.
    pub fn pod(mut self, pod: HostSpec) -> Self {
        self.pods.push(pod);
        self
    }

    /// With one more node.
    pub fn remote(mut self, node: RemoteSpec) -> Self {
        self.remotes.push(node);
        self
    }

    /// With one more host outside.
    pub fn outside(mut self, host: HostSpec) -> Self {
        self.outside.push(host);
        self
    }

    /// Makes the namespaces and wires them; takes well under a second.
    ///
    /// # Errors
    ///
    /// [`LabError::Topology`] for a description without sense (no client, no address of the node),
    /// otherwise what the [`Lab`](crate::lab::Lab) says.
    pub fn build(self, name: &str) -> Result<World, LabError> {
        World::build(self, name)
    }
}

//! A layout made real: namespaces, endpoints, and a proxier that programs the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use proxier_core::{BackendFactory, OpenContext, Protocol as Transport, Proxier, in_full};
use proxier_netlink::{
    NetNs,
    ct::{Conntrack, CtFamily},
};
use tokio::runtime::Runtime;

use super::{
    RealError,
    layout::{Layout, NODE, Seat, SourceKey, WayBack, is_link_local, nets},
    look::{UNTOUCHED, look},
};
use crate::{
    cases::{
        CaseWorld, FlowVerdict, Verdict,
        flow::{Flow, judged},
        world::ip,
    },
    lab::{LabError, Ns, V4_GATEWAY, V6_GATEWAY, Via, default_of},
    topology::{HostSpec, LinkSpec, NodeSpec, RemoteSpec, Topology, World},
    traffic::{Endpoint, Protocol, Responder, sctp_supported},
};

/// The bridge of the nodes' network, in the router.
const LAN: &str = "lan0";
/// Longest wait for a new link.
const SETTLE: Duration = Duration::from_secs(10);

/// A layout made real.
pub(super) struct Rig {
    // Fields drop in this order: the proxier closes its sockets before the namespaces go.
    proxier: Box<dyn Proxier>,
    conntrack: Conntrack,
    _responders: Vec<Responder>,
    layout: Layout,
    world: World,
    has_sctp: bool,
    plan: String,
}

impl Rig {
    /// Makes the namespaces, starts the endpoints and opens the proxier.
    pub(super) fn build(
        runtime: &Runtime,
        factory: &dyn BackendFactory,
        layout: &Layout,
    ) -> Result<Self, RealError> {
        let world = topology(layout)?.build("conformance")?;
        wire_extra_links(layout, &world)?;
        answer_through_the_node(&world)?;
        // What an agent sets for node ports on 127.0.0.0/8.
        world.node().sysctl("net.ipv4.conf.all.route_localnet", "1")?;
        let has_sctp = sctp_supported(world.node())?;
        let responders = responders(layout, &world, has_sctp)?;
        let mut context = OpenContext::default();
        context.netns = Some(world.node().path());
        let proxier = runtime.block_on(factory.open(&context))?;
        let conntrack = runtime
            .block_on(async { Conntrack::open(&NetNs::Fd(world.node().fd())) })
            .map_err(|error| RealError::Program(in_full(&error)))?;
        let layout = layout.clone();
        let plan = String::new();
        Ok(Self { proxier, conntrack, _responders: responders, layout, world, has_sctp, plan })
    }

    /// Programs the world of a case and looks at its flow.
    pub(super) fn judge(&mut self, runtime: &Runtime, world: &CaseWorld, flow: &Flow) -> Verdict {
        if flow.packet.protocol == Transport::Sctp && !self.has_sctp {
            return Verdict::not_applicable("the kernel has no SCTP");
        }
        let flushed = self.flush(runtime, flow);
        let seen = match flushed.and_then(|()| self.seen(runtime, world, flow, None)) {
            Ok(seen) => seen,
            Err(error) => FlowVerdict::Other(error.to_string()),
        };
        self.verdict(flow, &seen)
    }

    pub(super) fn verdict(&self, flow: &Flow, seen: &FlowVerdict) -> Verdict {
        judged(flow, seen, || self.detail())
    }

    /// What becomes of a flow when the node is programmed.
    pub(super) fn seen(
        &mut self,
        runtime: &Runtime,
        world: &CaseWorld,
        flow: &Flow,
        count: Option<usize>,
    ) -> Result<FlowVerdict, RealError> {
        let node = self.world.node().clone();
        let extra: Vec<IpAddr> =
            world.node.extra_local.iter().filter_map(|it| ip(it).ok()).collect();
        let seat = self.layout.seat(&SourceKey::of(flow));
        extra.iter().try_for_each(|address| node.own(*address))?;
        let way_back = self.way_back(&seat, flow.packet.source)?;
        let programmed = self.program(runtime, world);
        let seen = programmed.and_then(|()| {
            let client = self.world.ns(&seat.ns)?;
            Ok(runtime.block_on(look(&client, &node, flow, &self.layout, count))?)
        });
        if let Some((address, via)) = way_back {
            node.del_route(address, via.as_via())?;
        }
        extra.iter().try_for_each(|address| node.del_addr("lo", *address))?;
        seen
    }

    /// Removes the node's tracked connections. One of an earlier case that ended at the same endpoint
    /// may have taken the very port of the client: then the kernel gives it another, masqueraded or
    /// not.
    // KERNEL: nf_nat_setup_info binds the source of every connection so that its reply is unique
    // (net/netfilter/nf_nat_core.c, get_unique_tuple, v6.12).
    pub(super) fn flush(&mut self, runtime: &Runtime, flow: &Flow) -> Result<(), RealError> {
        let family = match flow.packet.destination {
            SocketAddr::V4(_) => CtFamily::Ipv4,
            SocketAddr::V6(_) => CtFamily::Ipv6,
        };
        let flushed = runtime.block_on(self.conntrack.delete_matching(family, |_| true));
        flushed.map(drop).map_err(|error| RealError::Program(in_full(&error)))
    }

    /// Programs a world.
    pub(super) fn program(
        &mut self,
        runtime: &Runtime,
        world: &CaseWorld,
    ) -> Result<(), RealError> {
        let (_, update) = world.store().map_err(RealError::World)?;
        self.plan = self.proxier.plan(&update).to_string();
        let report = runtime.block_on(self.proxier.sync(update));
        let report = report.map_err(|error| RealError::Program(in_full(&error)))?;
        match report.degraded.first() {
            Some(degraded) => {
                Err(RealError::Program(format!("{}: {}", degraded.id, degraded.reason)))
            }
            None => Ok(()),
        }
    }

    /// Opens the way back to a client where there is none by itself.
    fn way_back(&self, seat: &Seat, address: IpAddr) -> Result<Option<(IpAddr, Way)>, LabError> {
        let way = match &seat.way_back {
            WayBack::Known => return Ok(None),
            WayBack::Link(link) => Way::Link(link.clone()),
            WayBack::Router => match self.router(address) {
                Some(router) => Way::Router(router),
                None => return Ok(None),
            },
        };
        self.world.node().route(address, way.as_via())?;
        Ok(Some((address, way)))
    }

    /// The router's address on the nodes' network: the first that no node has.
    fn router(&self, of: IpAddr) -> Option<IpAddr> {
        let Topology { node, remotes, .. } = self.world.topology();
        let uplinks = || node.uplink.addrs.iter();
        let uplink = uplinks()
            .find(|net| net.addr().is_ipv4() == of.is_ipv4() && !is_link_local(net.addr()))?;
        let taken = |host: &IpAddr| {
            uplinks().any(|net| net.addr() == *host)
                || remotes.iter().any(|remote| remote.addrs.contains(host))
        };
        uplink.hosts().take(1024).find(|host| *host != uplink.network() && !taken(host))
    }

    /// The node under test.
    pub(super) fn node(&self) -> &Ns {
        self.world.node()
    }

    /// What helps to understand a failure.
    fn detail(&self) -> String {
        let node = self.world.node();
        let rules = match node.command("nft", ["list", "ruleset"]) {
            Ok(rules) => rules,
            Err(error) => format!("(no ruleset: {})", in_full(&error)),
        };
        format!(
            "--- last plan\n{}--- ruleset of the node\n{rules}--- namespaces, while this process \
             lives\n{}",
            self.plan,
            self.world.lab().enter_hints()
        )
    }
}

/// A way that is opened for one case.
enum Way {
    Link(String),
    Router(IpAddr),
}

impl Way {
    fn as_via(&self) -> Via<'_> {
        match self {
            Self::Link(link) => Via::Dev(link),
            Self::Router(router) => Via::Gateway(*router),
        }
    }
}

fn topology(layout: &Layout) -> Result<Topology, RealError> {
    let uplink = layout.uplink().map_err(RealError::World)?;
    let link = |name: &str| {
        let addrs = layout.node.ifaces.get(name).map(|texts| nets(texts)).unwrap_or_default();
        LinkSpec { name: name.to_owned(), addrs }
    };
    let uplink = link(&uplink);
    let mut node = NodeSpec::new(NODE, uplink.clone(), link(&layout.bridge()));
    let direct = layout.direct();
    node.extra
        .extend(layout.extra().iter().filter(|it| !direct.contains_key(*it)).map(|it| link(it)));
    let host = |(name, addrs): (String, Vec<IpAddr>)| HostSpec { name, addrs };
    let mut outside = layout.outside().into_iter().map(host);
    let client = outside.next().ok_or_else(|| RealError::World("no client".to_owned()))?;
    let mut topology = Topology::new(node, client);
    topology.outside.extend(outside);
    topology.pods.extend(layout.pods().into_iter().map(host));
    for remote in layout.remotes() {
        let addrs: Vec<_> = { remote.addrs }
            .into_iter()
            .filter(|addr| uplink.addrs.iter().any(|net| net.contains(addr)))
            .collect();
        let pod_nets = remote.pods.values().flatten().map(|ip| IpNet::from(*ip)).collect();
        let pods = remote.pods.into_iter().map(host).collect();
        topology.remotes.push(RemoteSpec { name: remote.ns, addrs, pod_nets, pods });
    }
    Ok(topology)
}

/// Links that lead to one client, further addresses, and routes to pods off the bridge's network.
fn wire_extra_links(layout: &Layout, world: &World) -> Result<(), LabError> {
    let node = world.node();
    for address in nets(layout.node.ifaces.get("lo").map(Vec::as_slice).unwrap_or_default()) {
        if !address.addr().is_loopback() {
            node.own(address.addr())?;
        }
    }
    for (link, clients) in layout.direct() {
        let host = world.lab().ns(&format!("on-{link}"))?;
        world.lab().veth((&host, "eth0"), (node, &link))?;
        node.addr(&link, IpAddr::from(V4_GATEWAY))?;
        node.addr(&link, IpNet::new_assert(V6_GATEWAY.into(), 64))?;
        let addresses = layout.node.ifaces.get(&link).map(|texts| nets(texts)).unwrap_or_default();
        addresses.iter().try_for_each(|address| node.addr(&link, *address))?;
        clients.iter().try_for_each(|client| host.addr("eth0", *client))?;
        for gateway in [V4_GATEWAY.into(), V6_GATEWAY.into()] {
            host.route(default_of(gateway), Via::GatewayOn(gateway, "eth0"))?;
        }
    }
    let fabric = world.fabric();
    for (number, (ns, address)) in layout.on_lan().into_iter().enumerate() {
        let host = world.lab().ns(&ns)?;
        let port = format!("lan-host{number}");
        world.lab().veth((&host, "eth0"), (fabric, &port))?;
        fabric.enslave(LAN, &port)?;
        host.addr("eth0", address)?;
        host.settle(SETTLE)?;
    }
    let bridge = layout.bridge();
    let connected = layout.node.ifaces.get(&bridge).map(|texts| nets(texts)).unwrap_or_default();
    for address in layout.pods().into_values().flatten() {
        if !connected.iter().any(|net| net.contains(&address)) {
            node.route(address, Via::Dev(&bridge))?;
        }
    }
    Ok(())
}

/// Sends what `fabric` itself says through the node: an answer on a shorter way home would leave the
/// node with half a connection, the rest of which it may drop as invalid.
fn answer_through_the_node(world: &World) -> Result<(), LabError> {
    /// A routing table, and the place of its rule, that the topology does not use.
    const TABLE: u32 = 300;
    const PRIORITY: u32 = 30;
    let fabric = world.fabric();
    fabric.rule_iif(PRIORITY, "lo", TABLE)?;
    for is_v4 in [true, false] {
        let mut uplinks = world.topology().node.uplink.addrs.iter().map(IpNet::addr);
        let usable = |ip: &IpAddr| ip.is_ipv4() == is_v4 && !is_link_local(*ip);
        if let Some(node) = uplinks.find(usable) {
            fabric.route_in(TABLE, default_of(node), Via::Gateway(node))?;
        }
    }
    Ok(())
}

/// Endpoints, and somebody at every destination who answers what was left untouched.
fn responders(layout: &Layout, world: &World, sctp: bool) -> Result<Vec<Responder>, LabError> {
    let mut wanted: BTreeMap<String, BTreeSet<(String, SocketAddr, Transport)>> = BTreeMap::new();
    let mut want = |ns: String, name: String, at, protocol| {
        wanted.entry(ns).or_default().insert((name, at, protocol));
    };
    for (at, protocol) in &layout.endpoints {
        if let Some(ns) = layout.endpoint_ns(at.ip()) {
            want(ns, at.to_string(), *at, *protocol);
        }
    }
    let mut owned = BTreeSet::new();
    for (at, protocol) in &layout.targets {
        let any: IpAddr = match at.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let any = SocketAddr::new(any, at.port());
        if let Some(ns) = layout.endpoint_ns(at.ip()) {
            want(ns, at.to_string(), *at, *protocol);
            continue;
        }
        let there = layout.other_node_ns(at.ip());
        if there.is_none() && !layout.is_node(at.ip()) {
            if owned.insert(at.ip()) {
                world.own(at.ip())?;
            }
            want(world.fabric().name().to_owned(), UNTOUCHED.to_owned(), any, *protocol);
        }
        // An address that some case gives to the node is answered there, too.
        want(there.unwrap_or_else(|| NODE.to_owned()), UNTOUCHED.to_owned(), any, *protocol);
    }
    let mut responders = Vec::new();
    for (ns, endpoints) in wanted {
        let usable = endpoints.into_iter().filter(|(_, _, it)| sctp || *it != Transport::Sctp);
        let endpoints = usable.map(|(name, at, it)| Endpoint::new(&name, transport(it), at));
        responders.push(Responder::start(&world.ns(&ns)?, endpoints)?);
    }
    Ok(responders)
}

pub(super) const fn transport(protocol: Transport) -> Protocol {
    match protocol {
        Transport::Sctp => Protocol::Sctp,
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    }
}

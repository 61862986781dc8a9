//! Links, addresses, routes and rules of a namespace, through rtnetlink.

use std::fmt::Display;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::RuleAction;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use super::{LabError, Ns, ToNet, settle};

/// Longest link name, without the final NUL.
// KERNEL: IFNAMSIZ is 16 (include/uapi/linux/if.h).
const LONGEST_NAME_BYTES: usize = 15;

/// The main routing table.
// KERNEL: RT_TABLE_MAIN (include/uapi/linux/rtnetlink.h).
const MAIN_TABLE: u32 = 254;

/// Where a route leads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Via<'a> {
    /// Directly onto a link.
    Dev(&'a str),
    /// To a router on a connected network.
    Gateway(IpAddr),
    /// To a router that is taken to be on this link, whatever its address.
    GatewayOn(IpAddr, &'a str),
    /// To the namespace itself: every address of the prefix counts as its own.
    Local,
    /// Nowhere: senders get an ICMP host unreachable (v4) or no route (v6).
    Unreachable,
}

impl Ns {
    /// Makes a bridge, without spanning tree or multicast snooping, and brings it up.
    ///
    /// # Errors
    ///
    /// [`LabError::Name`], [`LabError::Kernel`].
    pub fn bridge(&self, name: &str) -> Result<(), LabError> {
        checked(name)?;
        let message = LinkBridge::new(name).mcast_snooping(false).build();
        self.change(format!("add bridge {name}"), move |netlink| async move {
            said(netlink.link().add(message).execute().await)
        })
    }

    /// Makes a link a port of a bridge.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn enslave(&self, bridge: &str, port: &str) -> Result<(), LabError> {
        let (bridge_name, port_name) = (bridge.to_owned(), port.to_owned());
        self.change(format!("make {port} a port of {bridge}"), move |netlink| async move {
            let message = LinkUnspec::new_with_index(index(&port_name)?)
                .controller(index(&bridge_name)?)
                .build();
            said(netlink.link().set(message).execute().await)
        })
    }

    /// Brings a link up.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn up(&self, link: &str) -> Result<(), LabError> {
        let name = link.to_owned();
        self.change(format!("bring up {link}"), move |netlink| async move {
            up_in(&netlink, &name).await
        })
    }

    /// Takes a link down.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn down(&self, link: &str) -> Result<(), LabError> {
        let name = link.to_owned();
        self.change(format!("take down {link}"), move |netlink| async move {
            let message = LinkUnspec::new_with_index(index(&name)?).down().build();
            said(netlink.link().set(message).execute().await)
        })
    }

    /// Removes a link; of a veth pair, both ends go.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn delete_link(&self, link: &str) -> Result<(), LabError> {
        let name = link.to_owned();
        self.change(format!("delete {link}"), move |netlink| async move {
            said(netlink.link().del(index(&name)?).execute().await)
        })
    }

    /// The names of all links, sorted.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn links(&self) -> Result<Vec<String>, LabError> {
        self.change("list links".to_owned(), |netlink| async move {
            let found = netlink.link().get().execute().try_collect::<Vec<_>>().await;
            let mut names: Vec<_> = said(found)?.into_iter().filter_map(link_name).collect();
            names.sort();
            Ok(names)
        })
    }

    /// Gives a link an address (`"10.0.0.1/24"`); v6 without duplicate address detection.
    ///
    /// On a link that works, the address is usable when this returns; otherwise as soon as the
    /// link does, see [`settle`](Self::settle).
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`]; [`LabError::Kernel`], also when the link has the address already.
    pub fn addr(&self, link: &str, address: impl ToNet) -> Result<(), LabError> {
        let (net, name) = (address.to_net()?, link.to_owned());
        self.change(format!("add address {net} to {link}"), move |netlink| async move {
            let link = index(&name)?;
            let mut request = netlink.address().add(link, net.addr(), net.prefix_len());
            if net.addr().is_ipv6() {
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            }
            said(request.execute().await)?;
            match net.addr() {
                IpAddr::V4(_) => Ok(()),
                IpAddr::V6(ip) => settle::usable(&netlink, ip, link).await,
            }
        })
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`]; [`LabError::Kernel`], also when the link does not have it.
    pub fn del_addr(&self, link: &str, address: impl ToNet) -> Result<(), LabError> {
        let (net, name) = (address.to_net()?, link.to_owned());
        self.change(format!("delete address {net} from {link}"), move |netlink| async move {
            let message = netlink.address().add(index(&name)?, net.addr(), net.prefix_len());
            let message = { message }.message_mut().clone();
            said(netlink.address().del(message).execute().await)
        })
    }

    /// Makes an address or a whole prefix the namespace's own.
    ///
    /// A single address is added to `lo`; a prefix becomes a local route, so that packets to any
    /// address in it are delivered, and a socket may bind them (v6: with free bind).
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`], [`LabError::Kernel`].
    pub fn own(&self, address: impl ToNet) -> Result<(), LabError> {
        let net = address.to_net()?;
        if net.prefix_len() == net.max_prefix_len() {
            return self.addr("lo", net);
        }
        // KERNEL: RT_TABLE_LOCAL is 255 (include/uapi/linux/rtnetlink.h).
        self.route_in(255, net, Via::Local)
    }

    /// Adds a route to the main table. `"0.0.0.0/0"` and `"::/0"` are the default routes.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`]; [`LabError::Kernel`], also when there is such a route.
    pub fn route(&self, dst: impl ToNet, via: Via<'_>) -> Result<(), LabError> {
        self.route_in(MAIN_TABLE, dst, via)
    }

    /// Adds the default route of the gateway's family.
    ///
    /// # Errors
    ///
    /// As [`route`](Self::route).
    pub fn default_route(&self, gateway: IpAddr) -> Result<(), LabError> {
        self.route(default_of(gateway), Via::Gateway(gateway))
    }

    /// Adds a route to a table by number; see [`rule_iif`](Self::rule_iif).
    ///
    /// # Errors
    ///
    /// As [`route`](Self::route).
    pub fn route_in(&self, table: u32, dst: impl ToNet, via: Via<'_>) -> Result<(), LabError> {
        let (net, hop) = (dst.to_net()?, Hop::new(via));
        let action = format!("add route {net} {via} to table {table}");
        self.change(action, move |netlink| async move {
            said(netlink.route().add(hop.message(net, table)?).execute().await)
        })
    }

    /// Deletes a route from the main table.
    ///
    /// # Errors
    ///
    /// [`LabError::Parse`]; [`LabError::Kernel`], also when there is no such route.
    pub fn del_route(&self, dst: impl ToNet, via: Via<'_>) -> Result<(), LabError> {
        let (net, hop) = (dst.to_net()?, Hop::new(via));
        self.change(format!("delete route {net} {via}"), move |netlink| async move {
            said(netlink.route().del(hop.message(net, MAIN_TABLE)?).execute().await)
        })
    }

    /// Lets packets that come in on a link look into a table first, in both families.
    ///
    /// Rules are asked in the order of their priority; the namespace's own addresses come before
    /// all of them (0), the main table last (32766).
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`].
    pub fn rule_iif(&self, priority: u32, link: &str, table: u32) -> Result<(), LabError> {
        let name = link.to_owned();
        let action = format!("add rule {priority}: from {link} lookup {table}");
        self.change(action, move |netlink| async move {
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let mut rule = netlink
                    .rule()
                    .add()
                    .input_interface(name.as_str())
                    .table_id(table)
                    .priority(priority)
                    .action(RuleAction::ToTable);
                rule.message_mut().header.family = family;
                said(rule.execute().await)?;
            }
            Ok(())
        })
    }

    /// Runs one change in the namespace and names it when it fails.
    pub(super) fn change<T, F>(
        &self,
        action: String,
        work: impl FnOnce(Handle) -> F + Send + 'static,
    ) -> Result<T, LabError>
    where
        T: Send + 'static,
        F: Future<Output = io::Result<T>> + Send + 'static,
    {
        let netlink = self.netlink();
        self.block_on(async move { work(netlink).await })?.map_err(|source| LabError::Kernel {
            netns: self.name().to_owned(),
            action,
            source,
        })
    }
}

impl Display for Via<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Via::Dev(link) => write!(f, "dev {link}"),
            Via::Gateway(gateway) => write!(f, "via {gateway}"),
            Via::GatewayOn(gateway, link) => write!(f, "via {gateway} dev {link}"),
            Via::Local => f.write_str("local"),
            Via::Unreachable => f.write_str("unreachable"),
        }
    }
}

/// [`Via`] with nothing borrowed, to travel to the namespace's thread.
struct Hop {
    kind: RouteType,
    gateway: Option<IpAddr>,
    link: Option<String>,
}

impl Hop {
    fn new(via: Via<'_>) -> Self {
        let (kind, gateway, link) = match via {
            Via::Dev(link) => (RouteType::Unicast, None, Some(link)),
            Via::Gateway(gateway) => (RouteType::Unicast, Some(gateway), None),
            Via::GatewayOn(gateway, link) => (RouteType::Unicast, Some(gateway), Some(link)),
            Via::Local => (RouteType::Local, None, Some("lo")),
            Via::Unreachable => (RouteType::Unreachable, None, None),
        };
        Self { kind, gateway, link: link.map(str::to_owned) }
    }

    fn message(&self, net: IpNet, table: u32) -> io::Result<RouteMessage> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let scope = match (self.kind, self.gateway) {
            (RouteType::Local, _) => RouteScope::Host,
            (RouteType::Unicast, None) => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .map_err(invalid)?
            .table_id(table)
            .kind(self.kind)
            .scope(scope);
        if let Some(gateway) = self.gateway {
            builder = builder.gateway(gateway).map_err(invalid)?;
        }
        if let Some(link) = &self.link {
            builder = builder.output_interface(index(link)?);
        }
        if self.gateway.is_some() && self.link.is_some() {
            builder = builder.onlink();
        }
        Ok(builder.build())
    }
}

/// The default route's prefix of an address's family.
pub(crate) fn default_of(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

/// Makes a veth pair across two namespaces; the second end is created in the other one at once.
pub(super) fn veth(a: (&Ns, &str), b: (&Ns, &str, RawFd)) -> Result<(), LabError> {
    let ((a_ns, a_link), (b_ns, b_link, b_fd)) = (a, b);
    checked(a_link)?;
    checked(b_link)?;
    let peer = LinkMessageBuilder::<LinkUnspec>::new().name(b_link).setns_by_fd(b_fd).build();
    let message = LinkMessageBuilder::<LinkVeth>::new(a_link, b_link)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .up()
        .build();
    let action = format!("add veth {a_link} with peer {b_link} in {}", b_ns.name());
    a_ns.change(action, move |netlink| async move {
        said(netlink.link().add(message).execute().await)
    })?;
    b_ns.up(b_link)
}

/// Brings a link up; runs in the namespace of the handle.
pub(super) async fn up_in(netlink: &Handle, name: &str) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index(name)?).up().build();
    said(netlink.link().set(message).execute().await)
}

/// Brings up `lo` in the namespace of this thread, without leaving a thread behind.
pub(super) fn loopback_up() -> io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        up_in(&netlink, "lo").await
    })
}

fn index(name: &str) -> io::Result<u32> {
    if_nametoindex(name).map_err(|errno| {
        if errno == nix::Error::ENODEV {
            io::Error::new(io::ErrorKind::NotFound, format!("no link {name}"))
        } else {
            errno.into()
        }
    })
}

fn checked(name: &str) -> Result<(), LabError> {
    let why = if name.is_empty() || name == "." || name == ".." {
        "not a link name"
    } else if name.len() > LONGEST_NAME_BYTES {
        "a link name has 15 bytes at most"
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        "a link name has no slash, colon or space"
    } else {
        return Ok(());
    };
    Err(LabError::Name { name: name.to_owned(), why })
}

fn link_name(message: LinkMessage) -> Option<String> {
    message.attributes.into_iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute { Some(name) } else { None }
    })
}

/// The kernel's errno out of an rtnetlink error.
pub(super) fn said<T>(result: Result<T, rtnetlink::Error>) -> io::Result<T> {
    result.map_err(|error| {
        if let rtnetlink::Error::NetlinkError(message) = &error {
            message.to_io()
        } else {
            io::Error::other(error)
        }
    })
}

/// The IPv4 counterpart of [`V6_GATEWAY`].
pub(crate) const V4_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The link-local gateway that routers of a lab have on every point-to-point link.
pub(crate) const V6_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_are_checked_before_the_kernel_sees_them() {
        assert!(checked("eth0").is_ok());
        assert!(checked("fifteen-bytes-x").is_ok());
        for bad in ["", "..", "sixteen-bytes-xx", "a/b", "a b", "eth0:1"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}

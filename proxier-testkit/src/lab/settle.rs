//! Waiting until the kernel has finished what it does in the background.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, State};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{Handle, RouteMessageBuilder};

use super::link::said;
use super::{LabError, Ns};

/// Pause between two looks; a look costs about as much.
const PAUSE: Duration = Duration::from_micros(500);

/// Longest wait for one address of a link that works.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(10);

impl Ns {
    /// Waits until every link that is up works, and every IPv6 address on these is usable.
    ///
    /// The kernel does both in the background, usually within a few milliseconds: links report
    /// their carrier, bridges open their ports, addresses get their local route. A bridge without
    /// ports is not waited for. [`World`](crate::topology::World)s have settled,
    /// and [`addr`](Self::addr) waits for its own address.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`] with [`io::ErrorKind::TimedOut`] after `deadline`, naming the link or
    /// address that is late: usually a veth whose other end is down.
    ///
    /// # Panics
    ///
    /// When called from a task of the namespace itself.
    pub fn settle(&self, deadline: Duration) -> Result<(), LabError> {
        self.change("wait for links and addresses".to_owned(), move |netlink| async move {
            let started = Instant::now();
            while let Some(late) = late(&netlink).await? {
                if started.elapsed() > deadline {
                    let text = format!("{late} is not ready after {deadline:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                tokio::time::sleep(PAUSE).await;
            }
            Ok(())
        })
    }
}

/// Waits until an address of a link that works is usable; gives up after a while.
pub(super) async fn usable(netlink: &Handle, ip: Ipv6Addr, index: u32) -> io::Result<()> {
    let query = netlink.link().get().match_index(index).execute();
    let links: Vec<_> = said(query.try_collect().await)?;
    let started = Instant::now();
    while links.iter().all(works) && !is_local(netlink, ip, index).await? {
        if started.elapsed() > ADDRESS_PATIENCE {
            let text = format!("not usable after {ADDRESS_PATIENCE:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// The first link or address that is not ready.
// KERNEL: carrier goes from the driver to the bridge and to IPv6 through linkwatch's work queue
// (net/core/link_watch.c), a new address gets its local route in addrconf's (addrconf_dad_work in
// net/ipv6/addrconf.c), even without duplicate address detection (v6.12).
async fn late(netlink: &Handle) -> io::Result<Option<String>> {
    let links: Vec<_> = said(netlink.link().get().execute().try_collect().await)?;
    let has_ports = |bridge: &LinkMessage| {
        let port_of = |link: &LinkMessage| {
            link.attributes.contains(&LinkAttribute::Controller(bridge.header.index))
        };
        links.iter().any(port_of)
    };
    let mut ready = Vec::new();
    for link in &links {
        let up = link.header.flags.contains(LinkFlags::Up);
        if link.header.flags.contains(LinkFlags::Loopback) || up && works(link) {
            ready.push(link.header.index);
        } else if up && (has_ports(link) || !is_bridge(link)) {
            return Ok(Some(format!("link {}", name_of(link))));
        }
    }
    let addresses: Vec<_> = said(netlink.address().get().execute().try_collect().await)?;
    for message in addresses {
        let of_ready = ready.contains(&message.header.index);
        if message.header.family != AddressFamily::Inet6 || !of_ready {
            continue;
        }
        for attribute in message.attributes {
            if let AddressAttribute::Address(IpAddr::V6(ip)) = attribute
                && !is_local(netlink, ip, message.header.index).await?
            {
                return Ok(Some(format!("address {ip}")));
            }
        }
    }
    Ok(None)
}

// KERNEL: a link whose carrier was never off stays in the state `unknown`, which counts as up
// (netif_oper_up, include/linux/netdevice.h, v6.12).
fn works(link: &LinkMessage) -> bool {
    let is = |state| link.attributes.contains(&LinkAttribute::OperState(state));
    let carrier = link.header.flags.contains(LinkFlags::LowerUp);
    is(State::Up) || is(State::Unknown) && carrier
}

/// Whether packets to the address are delivered here.
async fn is_local(netlink: &Handle, ip: Ipv6Addr, index: u32) -> io::Result<bool> {
    let mut query = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, 128);
    if ip.is_unicast_link_local() {
        query = query.output_interface(index);
    }
    let found: Result<Option<_>, _> =
        { netlink.route().get(query.build()) }.execute().try_next().await;
    // No route at all is an error, and means the same.
    Ok(found.ok().flatten().is_some_and(|route| route.header.kind == RouteType::Local))
}

fn is_bridge(link: &LinkMessage) -> bool {
    use rtnetlink::packet_route::link::{InfoKind, LinkInfo};
    let kind = LinkInfo::Kind(InfoKind::Bridge);
    link.attributes.iter().any(
        |attribute| matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&kind)),
    )
}

fn name_of(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute { Some(name.clone()) } else { None }
    });
    name.unwrap_or_else(|| format!("number {}", link.header.index))
}

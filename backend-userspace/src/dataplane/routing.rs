//! The routing rule and route that deliver marked packets to this machine.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use futures_util::{StreamExt, TryStreamExt, pin_mut};
use nix::libc::EOPNOTSUPP;
use proxier_core::Family;
use proxier_netlink::NetNs;
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use crate::object::Routing;

/// The index of `lo`.
// KERNEL: LOOPBACK_IFINDEX (include/net/flow.h, v6.12), the same in every namespace.
const LO: u32 = 1;

/// A mark, priority and routing table that are nobody's: "none", in ASCII.
const NOBODYS: u32 = 0x6e6f_6e65;

/// A connection to rtnetlink in a network namespace.
#[derive(Clone, Debug)]
pub(crate) struct RouteSocket(Handle);

impl RouteSocket {
    /// Opens the connection; its task runs on the current tokio runtime and ends with it.
    pub(crate) fn open(netns: &NetNs) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let open = || {
            let _entered = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            Ok(Self(handle))
        };
        netns.run(open).map_err(io::Error::other)?
    }

    /// Makes rule and route, as far as they are not there.
    pub(crate) async fn add(&self, family: Family, routing: Routing) -> io::Result<()> {
        let mut rule = self.0.rule().add().table_id(routing.table).priority(routing.priority);
        rule = rule.action(RuleAction::ToTable);
        let message = rule.message_mut();
        message.header.family = address_family(family);
        let (mark, mask) =
            (RuleAttribute::FwMark(routing.mark), RuleAttribute::FwMask(routing.mark));
        message.attributes.extend([mark, mask]);
        exists_is_fine(rule.execute().await)?;
        let route = route(family, routing.table);
        exists_is_fine(self.0.route().add(route).execute().await)
    }

    /// Finds out whether rules can be changed, by removing one that nobody has.
    pub(crate) async fn try_rules(&self, family: Family) -> io::Result<()> {
        let mut rule = RuleMessage::default();
        rule.header.family = address_family(family);
        rule.header.action = RuleAction::ToTable;
        let (mark, priority) = (RuleAttribute::FwMark(NOBODYS), RuleAttribute::Priority(NOBODYS));
        rule.attributes.extend([RuleAttribute::Table(NOBODYS), mark, priority]);
        match said(self.0.rule().del(rule).execute().await) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Removes every rule that leads to our table, and every route in it.
    pub(crate) async fn remove(&self, family: Family, table: u32) -> io::Result<()> {
        for rule in self.rules(family).await? {
            if table_of_rule(&rule) == table {
                said(self.0.rule().del(rule).execute().await)?;
            }
        }
        for route in self.routes(family, table).await? {
            said(self.0.route().del(route).execute().await)?;
        }
        Ok(())
    }

    /// What leads to our table, if it is whole.
    pub(crate) async fn read(&self, family: Family, table: u32) -> io::Result<Option<Routing>> {
        let rules = self.rules(family).await?;
        let Some(rule) = rules.into_iter().find(|rule| table_of_rule(rule) == table) else {
            return Ok(None);
        };
        let routes = self.routes(family, table).await?;
        let is_ours = |route: &RouteMessage| {
            route.header.kind == RouteType::Local && route.header.destination_prefix_length == 0
        };
        if !routes.iter().any(is_ours) {
            return Ok(None);
        }
        let (mut mark, mut mask, mut priority) = (0, 0, 0);
        for attribute in &rule.attributes {
            if let RuleAttribute::FwMark(it) = attribute {
                mark = *it;
            } else if let RuleAttribute::FwMask(it) = attribute {
                mask = *it;
            } else if let RuleAttribute::Priority(it) = attribute {
                priority = *it;
            }
        }
        // A mask that differs makes it another rule.
        Ok((mark == mask).then_some(Routing { mark, table, priority }))
    }

    async fn rules(&self, family: Family) -> io::Result<Vec<RuleMessage>> {
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let stream = self.0.rule().get(version).execute();
        match said(stream.try_collect().await) {
            // A kernel without policy routing has no rules.
            Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => Ok(Vec::new()),
            other => other,
        }
    }

    async fn routes(&self, family: Family, table: u32) -> io::Result<Vec<RouteMessage>> {
        let stream = self.0.route().get(route(family, table)).execute();
        pin_mut!(stream);
        let mut found = Vec::new();
        while let Some(route) = stream.next().await {
            let route = said(route)?;
            if table_of_route(&route) == table {
                found.push(route);
            }
        }
        Ok(found)
    }
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Everything is local.
fn route(family: Family, table: u32) -> RouteMessage {
    let kind = |message: &mut RouteMessage| {
        message.header.kind = RouteType::Local;
        message.header.scope = RouteScope::Host;
    };
    let mut message = match family {
        Family::V4 => {
            RouteMessageBuilder::<Ipv4Addr>::new().table_id(table).output_interface(LO).build()
        }
        Family::V6 => {
            RouteMessageBuilder::<Ipv6Addr>::new().table_id(table).output_interface(LO).build()
        }
    };
    kind(&mut message);
    message
}

fn table_of_rule(rule: &RuleMessage) -> u32 {
    let long = rule.attributes.iter().find_map(|attribute| {
        if let RuleAttribute::Table(table) = attribute { Some(*table) } else { None }
    });
    long.unwrap_or_else(|| rule.header.table.into())
}

fn table_of_route(route: &RouteMessage) -> u32 {
    let long = route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Table(table) = attribute { Some(*table) } else { None }
    });
    long.unwrap_or_else(|| route.header.table.into())
}

fn exists_is_fine(result: Result<(), rtnetlink::Error>) -> io::Result<()> {
    said(result).or_else(|error| {
        if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
    })
}

/// The kernel's errno out of an rtnetlink error.
fn said<T>(result: Result<T, rtnetlink::Error>) -> io::Result<T> {
    result.map_err(|error| {
        if let rtnetlink::Error::NetlinkError(message) = &error {
            message.to_io()
        } else {
            io::Error::other(error)
        }
    })
}

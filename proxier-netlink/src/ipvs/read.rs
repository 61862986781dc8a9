//! Reading what the kernel says about virtual servers. Total: no bytes make it panic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::types::{
    AddressFamily, Dest, DestEntry, Forward, Info, Persistence, Protocol, Service, ServiceEntry,
    ServiceFlags, Stats, Timeouts, VirtualServer,
};
use super::wire::{self, cmd, dest, svc, top};
use crate::dec::{Attrs, Message, Table, be16, be32, ne32, ne64};

type ServiceAttrs<'a> = Table<'a, { svc::COUNT }>;

/// A virtual server of a list; `None` for other messages and families this library cannot name.
pub(super) fn service(message: Message<'_>) -> Option<ServiceEntry> {
    let (command, attrs) = message.generic()?;
    if command != cmd::NEW_SERVICE {
        return None;
    }
    let t = attrs.table::<2>().nested(top::SERVICE).table();
    let key = key(&t)?;
    let flags = t.ne32(svc::FLAGS).unwrap_or_default();
    let persistence = (flags & wire::PERSISTENT != 0).then(|| Persistence {
        timeout_secs: t.ne32(svc::TIMEOUT).unwrap_or_default(),
        prefix_len: prefix_len(&t, key.family()),
    });
    Some(ServiceEntry {
        service: Service {
            key,
            // KERNEL: "none" where there is no scheduler (ip_vs_genl_fill_service, v6.12).
            scheduler: t.str(svc::SCHED_NAME).unwrap_or_default().into_owned(),
            persistence,
            flags: ServiceFlags(flags & ServiceFlags::SETTABLE.0),
        },
        engine: t.str(svc::PE_NAME).filter(|name| !name.is_empty()).map(Into::into),
        stats: stats(t.raw(svc::STATS64).or_else(|| t.raw(svc::STATS))),
    })
}

/// A destination of a list, of a virtual server of this family.
pub(super) fn dest_entry(message: Message<'_>, family: AddressFamily) -> Option<DestEntry> {
    let (command, attrs) = message.generic()?;
    if command != cmd::NEW_DEST {
        return None;
    }
    let t = attrs.table::<3>().nested(top::DEST).table::<{ dest::COUNT }>();
    let number = |kind| t.ne32(kind).unwrap_or_default();
    Some(DestEntry {
        dest: dest_of(&t, family)?,
        active: number(dest::ACTIVE_CONNS),
        inactive: number(dest::INACT_CONNS),
        persistent: number(dest::PERSIST_CONNS),
        stats: stats(t.raw(dest::STATS64).or_else(|| t.raw(dest::STATS))),
    })
}

/// What a request of our own is about.
pub(super) struct Request {
    pub(super) key: VirtualServer,
    pub(super) service: Option<Service>,
    pub(super) dest: Option<Dest>,
}

/// Reads a request back, for an error.
pub(super) fn request(message: Message<'_>) -> Option<Request> {
    let (command, attrs) = message.generic()?;
    let t = attrs.table::<3>();
    let s = t.nested(top::SERVICE).table();
    let key = key(&s)?;
    let as_listed = matches!(command, cmd::NEW_SERVICE | cmd::SET_SERVICE);
    let d = t.nested(top::DEST).table();
    Some(Request {
        key,
        service: as_listed.then(|| Service {
            key,
            scheduler: s.str(svc::SCHED_NAME).unwrap_or_default().into_owned(),
            persistence: None,
            flags: ServiceFlags(s.ne32(svc::FLAGS).unwrap_or_default() & ServiceFlags::SETTABLE.0),
        }),
        dest: dest_of(&d, key.family()),
    })
}

pub(super) fn timeouts(message: Message<'_>) -> Option<Timeouts> {
    let (command, attrs) = message.generic()?;
    if command != cmd::SET_CONFIG {
        return None;
    }
    let t = attrs.table::<7>();
    Some(Timeouts {
        tcp_secs: t.ne32(top::TIMEOUT_TCP)?,
        tcp_fin_secs: t.ne32(top::TIMEOUT_TCP_FIN)?,
        // Not told by a kernel without IPVS over UDP.
        udp_secs: t.ne32(top::TIMEOUT_UDP).unwrap_or_default(),
    })
}

pub(super) fn info(message: Message<'_>) -> Option<Info> {
    let (command, attrs) = message.generic()?;
    if command != cmd::SET_INFO {
        return None;
    }
    let t = attrs.table::<3>();
    let [_, major, minor, patch] = t.ne32(top::INFO_VERSION)?.to_be_bytes();
    Some(Info { version: (major, minor, patch), table_size: t.ne32(top::INFO_TABLE)? })
}

fn key(t: &ServiceAttrs<'_>) -> Option<VirtualServer> {
    let family = AddressFamily::from_number(t.ne16(svc::AF)?)?;
    if let Some(mark) = t.ne32(svc::FWMARK).filter(|mark| *mark != 0) {
        return Some(VirtualServer::Mark { mark, family });
    }
    Some(VirtualServer::Address {
        address: address(t.raw(svc::ADDR)?, family)?,
        port: be16(t.raw(svc::PORT)?)?,
        protocol: Protocol(u8::try_from(t.ne16(svc::PROTOCOL)?).ok()?),
    })
}

/// A mask with holes, which only a foreign virtual server can have, reads as its leading ones.
fn prefix_len(t: &ServiceAttrs<'_>, family: AddressFamily) -> u8 {
    let Some(raw) = t.raw(svc::NETMASK) else { return family.bits() };
    let len = match family {
        AddressFamily::Ipv4 => be32(raw).map(u32::leading_ones),
        AddressFamily::Ipv6 => ne32(raw),
    };
    len.and_then(|len| u8::try_from(len).ok()).unwrap_or_else(|| family.bits())
}

fn dest_of(t: &Table<'_, { dest::COUNT }>, service: AddressFamily) -> Option<Dest> {
    // KERNEL: told since 3.18; before, it is that of the virtual server.
    let family = match t.ne16(dest::ADDR_FAMILY) {
        Some(number) => AddressFamily::from_number(number)?,
        None => service,
    };
    let number = |kind| t.ne32(kind).unwrap_or_default();
    Some(Dest {
        address: address(t.raw(dest::ADDR)?, family)?,
        port: be16(t.raw(dest::PORT)?)?,
        forward: Forward(number(dest::FWD_METHOD) & Forward::MASK),
        weight: number(dest::WEIGHT),
        upper_threshold: number(dest::U_THRESH),
        lower_threshold: number(dest::L_THRESH),
    })
}

fn address(raw: &[u8], family: AddressFamily) -> Option<IpAddr> {
    Some(match family {
        AddressFamily::Ipv4 => Ipv4Addr::from(*raw.first_chunk::<4>()?).into(),
        AddressFamily::Ipv6 => Ipv6Addr::from(*raw.first_chunk::<16>()?).into(),
    })
}

/// Reads either kind of counters: they have the same types, and different widths.
// KERNEL: IPVS_STATS_ATTR_*: connections, packets in and out, bytes in and out, then the rates
// (include/uapi/linux/ip_vs.h, v6.12).
fn stats(raw: Option<&[u8]>) -> Stats {
    let t = Attrs(raw.unwrap_or_default()).table::<11>();
    let number = |kind| {
        let raw = t.raw(kind).unwrap_or_default();
        ne64(raw).or_else(|| ne32(raw).map(u64::from)).unwrap_or_default()
    };
    Stats {
        connections: number(1),
        in_packets: number(2),
        out_packets: number(3),
        in_bytes: number(4),
        out_bytes: number(5),
        connection_rate: number(6),
        in_packet_rate: number(7),
        out_packet_rate: number(8),
        in_byte_rate: number(9),
        out_byte_rate: number(10),
    }
}

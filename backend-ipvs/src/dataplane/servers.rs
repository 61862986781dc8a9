//! Virtual servers and destinations as the kernel's IPVS has them.

use proxier_core::{
    Family, Protocol,
    spi::{CommitError, ErrorKind},
};
use proxier_netlink::{
    ipvs::{
        self, AddressFamily, Dest, IpvsError, OpKind, Persistence, Refusal, Service, ServiceEntry,
        ServiceFlags, VirtualServer,
    },
    spi::{kind, locate},
};

use crate::{
    backend::Op,
    mark,
    object::{Server, ServerId},
};

/// The flag that says "another one if that one is to go"; `mh` and `sh` have the same.
// KERNEL: IP_VS_SVC_F_SCHED_SH_FALLBACK, IP_VS_SVC_F_SCHED_MH_FALLBACK are both
// IP_VS_SVC_F_SCHED1 (include/uapi/linux/ip_vs.h, v6.12).
const FALLBACK: ServiceFlags = ServiceFlags::MH_FALLBACK;
const PROTOCOLS: [Protocol; 3] = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp];

pub(super) const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Ipv4,
        Family::V6 => AddressFamily::Ipv6,
    }
}

/// The kernel's key of a virtual server.
pub(super) fn virtual_server(id: ServerId) -> VirtualServer {
    match id {
        ServerId::Frontend { ip, port, protocol } => {
            VirtualServer::address(ip, port.get(), ipvs::Protocol(protocol.number()))
        }
        ServerId::Mark(family, mark) => VirtualServer::mark(mark, address_family(family)),
    }
}

/// Ours of the kernel's key; `None` for what this mode never makes.
pub(super) fn server_id(key: VirtualServer) -> Option<ServerId> {
    Some(match key {
        VirtualServer::Address { address: ip, port, protocol } => ServerId::Frontend {
            ip,
            port: port.try_into().ok()?,
            protocol: PROTOCOLS.into_iter().find(|it| it.number() == protocol.0)?,
        },
        VirtualServer::Mark { mark, family: AddressFamily::Ipv4 } => {
            ServerId::Mark(Family::V4, mark)
        }
        VirtualServer::Mark { mark, family: AddressFamily::Ipv6 } => {
            ServerId::Mark(Family::V6, mark)
        }
    })
}

pub(super) fn service(id: ServerId, server: &Server) -> Service {
    let service = Service::new(virtual_server(id), &*server.scheduler);
    let flag = if server.fallback { FALLBACK } else { ServiceFlags::default() };
    let service = service.flags(flag);
    match server.persistence {
        Some(seconds) => service.persistent(Persistence::new(seconds, address_family(id.family()))),
        None => service,
    }
}

pub(super) fn server(entry: &ServiceEntry) -> Server {
    let Service { scheduler, persistence, flags, .. } = &entry.service;
    Server {
        scheduler: scheduler.as_str().into(),
        persistence: persistence.map(|it| it.timeout_secs),
        fallback: *flags == FALLBACK,
    }
}

pub(super) const fn dest(to: std::net::SocketAddr, weight: u32) -> Dest {
    Dest::new(to.ip(), to.port()).weight(weight)
}

/// Datagrams: a destination that is to go goes at once, as its clients can move at any packet.
pub(super) fn is_udp(id: ServerId, avoid: u8) -> bool {
    match id {
        ServerId::Frontend { protocol, .. } => protocol == Protocol::Udp,
        ServerId::Mark(_, mark) => mark::is_udp(mark, avoid),
    }
}

/// The error of the first operation that the kernel refused.
pub(super) fn refused(refusal: &Refusal, ops: &[Op]) -> CommitError {
    let errno = std::io::Error::from_raw_os_error(refusal.ack.errno());
    let surprise = kind(refusal.kind()) == ErrorKind::Conflict && refusal.op != OpKind::NewService;
    if surprise {
        // What was there is gone, or the other way round.
        return CommitError::Unknown {
            doing: "changing virtual servers that somebody else changed",
            source: errno,
        };
    }
    let (op, object) = locate(ops, refusal.tag);
    let theirs = refusal.op == OpKind::NewService && kind(refusal.kind()) == ErrorKind::Conflict;
    CommitError::Refused {
        op,
        object: object.unwrap_or_else(|| refusal.to_string()),
        extack: if theirs {
            "somebody else has a virtual server there".to_owned()
        } else {
            refusal.why().unwrap_or_default()
        },
        errno,
        kind: kind(refusal.kind()),
    }
}

/// The error of a batch of which nobody knows how much was executed.
pub(super) fn lost(error: IpvsError) -> CommitError {
    CommitError::Unknown { doing: "changing virtual servers", source: std::io::Error::other(error) }
}

/// The error of something that changes nothing.
pub(super) fn failed(error: IpvsError) -> CommitError {
    let kind = kind(error.kind());
    CommitError::Transport { doing: error.to_string(), source: std::io::Error::other(error), kind }
}

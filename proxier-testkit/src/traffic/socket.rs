//! Sockets with the options that probes and responders need, and the kernel's error queue.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike,
    SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Failure, How, ProbeSpec, Protocol, Rejection};
use crate::lab::{LabError, Ns};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Bytes for control messages: an extended error with an IPv6 address, or packet information.
const CONTROL_BYTES: usize = 256;

/// Whether the kernel gives out SCTP sockets in this namespace.
///
/// # Errors
///
/// [`LabError::Ended`].
pub fn sctp_supported(ns: &Ns) -> Result<bool, LabError> {
    ns.run(|| new(Protocol::Sctp, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).is_ok())
}

/// Prepares a probe's socket up to, but not including, connect.
pub(super) fn asking(spec: &ProbeSpec) -> Result<Socket, Failure> {
    let socket = new(spec.protocol, spec.dst).map_err(|error| Failure::new("socket", &error))?;
    prepare_asking(&socket, spec).map_err(|error| Failure::new("bind", &error))?;
    Ok(socket)
}

/// Makes a socket that listens (TCP, SCTP) or receives (UDP) at an address, which need not be
/// assigned.
pub(super) fn answering(protocol: Protocol, at: SocketAddr) -> io::Result<Socket> {
    let socket = new(protocol, at)?;
    allow_foreign(&socket, at.ip())?;
    match at {
        SocketAddr::V4(_) if protocol == Protocol::Udp => {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            if protocol == Protocol::Udp {
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
            }
        }
        SocketAddr::V4(_) => {}
    }
    // For UDP as well: a proxy on this node answers from addresses and ports of its own choice, which
    // a wildcard socket would keep from it otherwise.
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    if protocol != Protocol::Udp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

/// Takes ICMP errors off the socket's error queue and returns the first.
pub(super) fn icmp_error(socket: &Socket) -> Option<Rejection> {
    let mut data = [0; 64];
    let mut control = [0; CONTROL_BYTES];
    // Bounded: the queue is finite, and nothing asks while it is read.
    for _ in 0..16 {
        let mut iov = [IoSliceMut::new(&mut data)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags)
                .ok()?;
        if let Some(rejection) = message.cmsgs().ok()?.find_map(|control| rejection_of(&control)) {
            return Some(rejection);
        }
    }
    None
}

/// Receives a datagram: its length, its sender and the address it was sent to.
pub(super) fn receive(
    socket: &Socket,
    buffer: &mut [u8],
) -> io::Result<(usize, SocketAddr, SocketAddr)> {
    let mut control = [0; CONTROL_BYTES];
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut iov,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let peer = message.address.as_ref().and_then(socket_addr).ok_or_else(no_address)?;
    let bound = socket.local_addr()?.as_socket().ok_or_else(no_address)?;
    let at = message.cmsgs()?.find_map(|control| arrived_at(&control, bound.port()));
    Ok((message.bytes, peer, at.unwrap_or(bound)))
}

/// Sends a datagram from a chosen address.
pub(super) fn send_from(
    socket: &Socket,
    text: &str,
    from: SocketAddr,
    to: SocketAddr,
) -> io::Result<()> {
    let (fd, iov) = (socket.as_raw_fd(), [IoSlice::new(text.as_bytes())]);
    match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(*from.ip()).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &iov, &control, MsgFlags::MSG_DONTWAIT, Some(&SockaddrIn::from(to)))?;
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: from.ip().octets() },
                ipi6_ifindex: from.scope_id(),
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &iov, &control, MsgFlags::MSG_DONTWAIT, Some(&SockaddrIn6::from(to)))?;
        }
        (SocketAddr::V4(_), SocketAddr::V6(_)) | (SocketAddr::V6(_), SocketAddr::V4(_)) => {
            return Err(no_address());
        }
    }
    Ok(())
}

/// The destination with the scope that a link-local address needs.
pub(super) fn scoped(dst: SocketAddr, device: Option<&str>) -> io::Result<SocketAddr> {
    match (dst, device) {
        (SocketAddr::V6(v6), Some(device)) if v6.ip().is_unicast_link_local() => {
            let index = if_nametoindex(device)?;
            Ok(SocketAddrV6::new(*v6.ip(), v6.port(), 0, index).into())
        }
        _ => Ok(dst),
    }
}

fn new(protocol: Protocol, family_of: SocketAddr) -> io::Result<Socket> {
    let (kind, number) = match protocol {
        Protocol::Sctp => (Type::STREAM, libc::IPPROTO_SCTP),
        Protocol::Tcp => (Type::STREAM, libc::IPPROTO_TCP),
        Protocol::Udp => (Type::DGRAM, libc::IPPROTO_UDP),
    };
    let socket = Socket::new(Domain::for_address(family_of), kind, Some(number.into()))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn prepare_asking(socket: &Socket, spec: &ProbeSpec) -> io::Result<()> {
    // KERNEL: without it the error queue stays empty, and a TCP/IPv6 connect does not notice
    // ICMPv6 errors before it times out (ip(7), ipv6(7)).
    if spec.dst.is_ipv6() {
        setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
    }
    if let Some(device) = &spec.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(source) = spec.source {
        if source.port() == 0 {
            // Choose the port at connect time: it only has to be free towards this destination.
            setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
        } else {
            socket.set_reuse_address(true)?;
        }
        let at = SockAddr::from(scoped(source, spec.device.as_deref())?);
        match socket.bind(&at) {
            // Only where it has to be: packet filters can tell transparent sockets from others.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                allow_foreign(socket, source.ip())?;
                socket.bind(&at)?;
            }
            other => other?,
        }
    }
    Ok(())
}

/// Lets a socket use addresses that the namespace does not own.
// KERNEL: free bind allows the bind; only a transparent socket may also send from an address that
// is not local (ip_route_output_key_hash_rcu checks the source, v6.12).
fn allow_foreign(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv6() {
        socket.set_freebind_v6(true)?;
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_freebind_v4(true)?;
        socket.set_ip_transparent_v4(true)
    }
}

fn rejection_of(control: &ControlMessageOwned) -> Option<Rejection> {
    // KERNEL: SO_EE_ORIGIN_ICMP and SO_EE_ORIGIN_ICMP6 mark errors that came as packets
    // (include/uapi/linux/errqueue.h).
    let (error, by) = if let ControlMessageOwned::Ipv4RecvErr(error, from) = control {
        let ip = |from: libc::sockaddr_in| Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr));
        (error, from.map(|from| IpAddr::V4(ip(from))))
    } else if let ControlMessageOwned::Ipv6RecvErr(error, from) = control {
        (error, from.map(|from| IpAddr::V6(Ipv6Addr::from(from.sin6_addr.s6_addr))))
    } else {
        return None;
    };
    // KERNEL: port unreachable is ICMP 3/3 (RFC 792) and ICMPv6 1/4 (RFC 4443).
    let how = match (error.ee_origin, error.ee_type, error.ee_code) {
        (libc::SO_EE_ORIGIN_ICMP, 3, 3) | (libc::SO_EE_ORIGIN_ICMP6, 1, 4) => {
            How::IcmpPortUnreachable
        }
        (libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6, kind, code) => {
            How::IcmpOther { kind, code }
        }
        // An error of this host, not a packet.
        _ => return None,
    };
    Some(Rejection { how, by })
}

fn arrived_at(control: &ControlMessageOwned, port: u16) -> Option<SocketAddr> {
    if let ControlMessageOwned::Ipv4PacketInfo(info) = control {
        let ip = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
        Some(SocketAddrV4::new(ip, port).into())
    } else if let ControlMessageOwned::Ipv6PacketInfo(info) = control {
        let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
        let scope = if ip.is_unicast_link_local() { info.ipi6_ifindex } else { 0 };
        Some(SocketAddrV6::new(ip, port, 0, scope).into())
    } else {
        None
    }
}

fn socket_addr(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| SocketAddrV4::from(*v4).into());
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into()))
        .filter(|_| storage.len() > 0)
}

fn no_address() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "no usable socket address")
}

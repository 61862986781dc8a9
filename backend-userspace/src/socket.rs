//! Sockets as the proxy needs them. They live in the network namespace of the calling thread.

use std::{io, net::SocketAddr, os::fd::AsFd, time::Duration};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// Connections that wait to be accepted; the kernel allows `net.core.somaxconn` at most.
const BACKLOG: i32 = 4096;
/// Datagrams that wait, in bytes; the kernel allows `net.core.rmem_max` at most.
const DATAGRAM_BUFFER_BYTES: usize = 4 << 20;
/// Unanswered questions after which a peer is given up.
const KEEPALIVE_PROBES: u32 = 9;

/// What a socket has to do with capturing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stance {
    /// Traffic is redirected; what this socket sends carries a mark and is left alone.
    Marked(u32),
    /// Nothing.
    Plain,
    /// Traffic is handed over as it is; the socket may use addresses that are not this machine's.
    Transparent,
}

/// A listening TCP socket, with everything that accepted sockets inherit.
pub(crate) fn tcp_listener(
    at: SocketAddr,
    stance: Stance,
    keepalive: Duration,
) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(at), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    prepare(&socket, at, stance)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_tcp_nodelay(true)?;
    set_keepalive(&socket, keepalive)?;
    socket.bind(&at.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// A TCP socket to connect with, from an address that need not be this machine's if it is transparent.
pub(crate) fn tcp_outgoing(
    to: SocketAddr,
    from: Option<SocketAddr>,
    stance: Stance,
) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    prepare(&socket, to, stance)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(from) = from {
        // Two connections from one address and port are fine as long as they go to different places.
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    Ok(socket)
}

/// A UDP socket that many clients send to. One that has to do with capturing says where to: the
/// original destination, or the address of this machine that it was translated to.
pub(crate) fn udp_listener(at: SocketAddr, stance: Stance) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(at), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    prepare(&socket, at, stance)?;
    socket.set_reuse_port(true)?;
    // As much as the system allows.
    socket.set_recv_buffer_size(DATAGRAM_BUFFER_BYTES)?;
    match (stance, at.is_ipv4()) {
        (Stance::Plain, _) => {}
        (Stance::Marked(_), true) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
        (Stance::Marked(_), false) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
        (Stance::Transparent, true) => setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?,
        (Stance::Transparent, false) => setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?,
    }
    socket.bind(&at.into())?;
    take_trains(&socket);
    Ok(socket)
}

/// A UDP socket connected to an endpoint.
pub(crate) fn udp_outgoing(
    to: SocketAddr,
    from: Option<SocketAddr>,
    stance: Stance,
) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    prepare(&socket, to, stance)?;
    if let Some(from) = from {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect(&to.into())?;
    take_trains(&socket);
    Ok(socket)
}

/// Makes a UDP socket take datagrams that arrive as one as one. A kernel that cannot gives them one
/// by one.
fn take_trains(socket: &Socket) {
    setsockopt(socket, sockopt::UdpGroSegment, &true).ok();
}

/// A UDP socket that sends from an address that need not be this machine's.
pub(crate) fn udp_answering(from: SocketAddr) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(from), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    prepare(&socket, from, Stance::Transparent)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// Where a connection was sent to before it was translated.
pub(crate) fn original_destination(
    stream: &impl AsFd,
    local: SocketAddr,
) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let original = match local {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    original?.as_socket().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn prepare(socket: &Socket, at: SocketAddr, stance: Stance) -> io::Result<()> {
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    match (stance, at.is_ipv4()) {
        (Stance::Plain, _) => Ok(()),
        (Stance::Marked(mark), _) => socket.set_mark(mark),
        (Stance::Transparent, true) => socket.set_ip_transparent_v4(true),
        (Stance::Transparent, false) => socket.set_ip_transparent_v6(true),
    }
}

/// Makes the kernel ask a peer that says nothing whether it is there.
pub(crate) fn set_keepalive(socket: &Socket, idle: Duration) -> io::Result<()> {
    let idle = idle.max(Duration::from_secs(1));
    let interval = (idle / 10).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval);
    socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_PROBES))
}

/// Says whether the process or the system has run out of something, for now.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOBUFS | ENOMEM))
}

/// Says whether an address could not be had as a source.
pub(crate) fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

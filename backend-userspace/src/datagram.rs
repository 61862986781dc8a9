//! Datagrams in trains: what one sender sent in equal pieces is received and sent at once.

use std::{
    cell::RefCell,
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo, sockaddr_in, sockaddr_in6},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
    },
};

thread_local! {
    static CONTROL: RefCell<Vec<u8>> =
        RefCell::new(nix::cmsg_space!(sockaddr_in, sockaddr_in6, in_pktinfo, in6_pktinfo, i32));
}

/// What was received at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes of all datagrams.
    pub(crate) bytes: usize,
    /// Bytes of each datagram but the last, where there are several.
    pub(crate) segment: Option<u16>,
    /// Who sent them, where the socket is not connected.
    pub(crate) from: Option<SocketAddr>,
    /// Where to, as far as the socket tells; port 0 where it tells the address only.
    pub(crate) to: Option<SocketAddr>,
}

/// One or more datagrams in a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Train<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) segment: Option<u16>,
}

impl<'a> Train<'a> {
    pub(crate) fn new(received: &Received, buffer: &'a [u8]) -> Self {
        let bytes = buffer.get(..received.bytes).unwrap_or_default();
        Self { bytes, segment: received.segment }
    }

    /// How many datagrams these are.
    pub(crate) fn count(&self) -> u32 {
        let several = self.segment.map(|each| self.bytes.len().div_ceil(usize::from(each).max(1)));
        several.map_or(1, |count| u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// Sends them: where the socket is not connected, to somebody; where it has many addresses, from
    /// one of them.
    pub(crate) fn send(
        &self,
        socket: &impl AsRawFd,
        to: Option<SocketAddr>,
        from: Option<IpAddr>,
    ) -> Result<(), Errno> {
        let send = |bytes, segment| send(socket, bytes, segment, to, from);
        let Some(segment) = self.segment else { return send(self.bytes, None) };
        match send(self.bytes, Some(segment)) {
            // KERNEL: a train has to fit the path in pieces, and to leave by a device that can take
            // it apart, whoever does (udp_send_skb in net/ipv4/udp.c, v6.12).
            Err(Errno::EINVAL | Errno::EIO | Errno::EMSGSIZE | Errno::EOPNOTSUPP) => {
                let mut pieces = self.bytes.chunks(usize::from(segment).max(1));
                pieces.try_for_each(|piece| send(piece, None))
            }
            other => other,
        }
    }
}

fn send(
    socket: &impl AsRawFd,
    bytes: &[u8],
    segment: Option<u16>,
    to: Option<SocketAddr>,
    from: Option<IpAddr>,
) -> Result<(), Errno> {
    let (v4, v6) = from.map_or((None, None), source);
    let segment = segment.as_ref().map(ControlMessage::UdpGsoSegments);
    let from = v4.as_ref().map(ControlMessage::Ipv4PacketInfo);
    let from = from.or_else(|| v6.as_ref().map(ControlMessage::Ipv6PacketInfo));
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let (fd, to) = (socket.as_raw_fd(), to.map(SockaddrStorage::from));
    let control: &[_] = match (segment, from) {
        (Some(segment), Some(from)) => &[segment, from],
        (Some(one), None) | (None, Some(one)) => &[one],
        (None, None) => &[],
    };
    sendmsg(fd, &[IoSlice::new(bytes)], control, flags, to.as_ref()).map(drop)
}

/// An address to send from, as the kernel is told.
fn source(from: IpAddr) -> (Option<in_pktinfo>, Option<in6_pktinfo>) {
    match from {
        IpAddr::V4(ip) => {
            let address = in_addr { s_addr: u32::from_ne_bytes(ip.octets()) };
            let any = in_addr { s_addr: 0 };
            (Some(in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: address, ipi_addr: any }), None)
        }
        IpAddr::V6(ip) => {
            let address = in6_addr { s6_addr: ip.octets() };
            (None, Some(in6_pktinfo { ipi6_addr: address, ipi6_ifindex: 0 }))
        }
    }
}

/// Receives what one sender sent, as much as there is of equal length.
#[expect(clippy::wildcard_enum_match_arm, reason = "nothing else was asked for")]
pub(crate) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Received> {
    CONTROL.with_borrow_mut(|control| {
        let mut slices = [IoSliceMut::new(buffer)];
        let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let message = recvmsg::<SockaddrStorage>(fd, &mut slices, Some(control), flags)?;
        let bytes = message.bytes;
        let from = message.address.as_ref().and_then(address);
        let mut received = Received { bytes, segment: None, from, to: None };
        for told in message.cmsgs()? {
            match told {
                ControlMessageOwned::Ipv4OrigDstAddr(to) => {
                    let to = nix::sys::socket::SockaddrIn::from(to);
                    received.to = Some(SocketAddr::new(to.ip().into(), to.port()));
                }
                ControlMessageOwned::Ipv6OrigDstAddr(to) => {
                    let to = nix::sys::socket::SockaddrIn6::from(to);
                    received.to = Some(std::net::SocketAddrV6::from(to).into());
                }
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    let ip = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    received.to = Some(SocketAddr::new(ip.into(), 0));
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    received.to = Some(SocketAddr::new(ip.into(), 0));
                }
                ControlMessageOwned::UdpGroSegments(each) => {
                    let each = u16::try_from(each).ok().filter(|it| *it > 0);
                    received.segment = each.filter(|it| usize::from(*it) < bytes);
                }
                _ => {}
            }
        }
        Ok(received)
    })
}

fn address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = || {
        let it = address.as_sockaddr_in()?;
        Some(SocketAddr::new(it.ip().into(), it.port()))
    };
    let v6 = || Some(std::net::SocketAddrV6::from(*address.as_sockaddr_in6()?).into());
    v4().or_else(v6)
}

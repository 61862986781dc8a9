//! Datagrams in trains: what one sender sent in equal pieces is received and sent at once.

use std::{
    cell::RefCell,
    io::{self, IoSlice, IoSliceMut},
    net::SocketAddr,
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg,
    },
};

thread_local! {
    static CONTROL: RefCell<Vec<u8>> =
        RefCell::new(nix::cmsg_space!(nix::libc::sockaddr_in, nix::libc::sockaddr_in6, i32));
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
    /// Where to, as far as the socket tells.
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

    /// Sends them, to somebody where the socket is not connected.
    pub(crate) fn send(&self, socket: &impl AsRawFd, to: Option<SocketAddr>) -> Result<(), Errno> {
        let Some(segment) = self.segment else { return send(socket, self.bytes, None, to) };
        match send(socket, self.bytes, Some(segment), to) {
            // KERNEL: a train has to fit the path in pieces, and to leave by a device that can take
            // it apart, whoever does (udp_send_skb in net/ipv4/udp.c, v6.12).
            Err(Errno::EINVAL | Errno::EIO | Errno::EMSGSIZE | Errno::EOPNOTSUPP) => {
                let mut pieces = self.bytes.chunks(usize::from(segment).max(1));
                pieces.try_for_each(|piece| send(socket, piece, None, to))
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
) -> Result<(), Errno> {
    let fd = socket.as_raw_fd();
    let to = to.map(SockaddrStorage::from);
    let segment = segment.as_ref().map(|it| [ControlMessage::UdpGsoSegments(it)]);
    let control = segment.as_ref().map(|it| it.as_slice()).unwrap_or_default();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg(fd, &[IoSlice::new(bytes)], control, flags, to.as_ref()).map(drop)
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

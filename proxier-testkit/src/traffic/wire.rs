//! A socket that tokio watches, whatever its protocol.

use std::io;

use socket2::{SockRef, Socket};
use tokio::io::Interest;
use tokio::net::{TcpStream, UdpSocket};

use super::Protocol;

/// A non-blocking socket registered with the runtime of this thread.
#[derive(Debug)]
pub(super) enum Wire {
    /// TCP, or SCTP in the one-to-one style, which has the same calls.
    Stream(TcpStream),
    Datagram(UdpSocket),
}

impl Wire {
    pub(super) fn new(socket: Socket, protocol: Protocol) -> io::Result<Self> {
        match protocol {
            Protocol::Sctp | Protocol::Tcp => TcpStream::from_std(socket.into()).map(Self::Stream),
            Protocol::Udp => UdpSocket::from_std(socket.into()).map(Self::Datagram),
        }
    }

    /// Runs `work` whenever the socket may be ready, until it does not say `WouldBlock`.
    pub(super) async fn io<T>(
        &self,
        interest: Interest,
        mut work: impl FnMut(&Socket) -> io::Result<T>,
    ) -> io::Result<T> {
        let socket = self.socket();
        match self {
            Self::Stream(stream) => stream.async_io(interest, || work(&socket)).await,
            Self::Datagram(datagram) => datagram.async_io(interest, || work(&socket)).await,
        }
    }

    pub(super) fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Stream(stream) => SockRef::from(stream),
            Self::Datagram(datagram) => SockRef::from(datagram),
        }
    }
}

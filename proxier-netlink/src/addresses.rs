//! The addresses on the interfaces of a namespace, as they change.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::ack::ErrorKind;
use crate::batch::{NLM_F_DUMP, NLM_F_REQUEST};
use crate::dec::{Attrs, Message};
use crate::enc::Writer;
use crate::netns::NetNs;
use crate::sock::{OpenError, SockError, Socket};

// KERNEL: include/uapi/linux/rtnetlink.h and if_addr.h, v6.12.
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
const IFADDRMSG_BYTES: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const AF_UNSPEC: u8 = 0;

/// The addresses on the interfaces of a network namespace, and how they change.
///
/// Link-local addresses of IPv6 are left out: every interface of a pod brings one, and none means
/// anything without its interface.
#[derive(Debug)]
pub struct Addresses {
    listing: Socket,
    changes: Socket,
    /// What was told last; `None` before the first time.
    known: Option<BTreeSet<IpAddr>>,
    /// Something happened since the last list.
    stale: bool,
}

/// Addresses could not be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressesError {
    /// The kernel refused to list them, or the socket failed. Open them anew.
    #[error("cannot list the addresses of interfaces")]
    Io {
        /// What the system said.
        #[source]
        errno: io::Error,
    },
}

impl AddressesError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { errno } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
        }
    }
}

impl From<SockError> for AddressesError {
    fn from(error: SockError) -> Self {
        let errno = match error {
            SockError::Io { errno, .. } => errno,
            SockError::Kernel(ack) => io::Error::from_raw_os_error(ack.errno),
            SockError::Interrupted | SockError::Overrun => io::ErrorKind::Interrupted.into(),
            SockError::Malformed => io::ErrorKind::InvalidData.into(),
        };
        Self::Io { errno }
    }
}

impl Addresses {
    /// Begins to listen. Needs no privilege beyond entering the namespace.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the namespace cannot be entered, or there is no tokio runtime.
    ///
    /// # Panics
    ///
    /// If the tokio runtime was built without I/O.
    pub fn open(netns: &NetNs) -> Result<Self, OpenError> {
        // In this order: what changes after the list is made is told.
        let changes = Socket::open_route(netns, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)?;
        let listing = Socket::open_route(netns, 0)?;
        Ok(Self { listing, changes, known: None, stale: true })
    }

    /// The addresses, sorted: at once when asked first, and later each time they are others.
    ///
    /// # Errors
    ///
    /// [`AddressesError::Io`]; of kind [`ErrorKind::Retry`] when asking again may help.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no change is lost.
    pub async fn next(&mut self) -> Result<Vec<IpAddr>, AddressesError> {
        loop {
            if !self.stale {
                match self.changes.listen(&mut |_| ()).await {
                    // What was lost shows in the list.
                    Ok(()) | Err(SockError::Overrun | SockError::Malformed) => {}
                    Err(SockError::Io { errno, .. })
                        if errno.raw_os_error() == Some(libc::EMSGSIZE) => {}
                    Err(error) => return Err(error.into()),
                }
                self.stale = true;
            }
            let found = self.list().await?;
            self.stale = false;
            if self.known.as_ref() != Some(&found) {
                let all = found.iter().copied().collect();
                self.known = Some(found);
                return Ok(all);
            }
        }
    }

    async fn list(&mut self) -> Result<BTreeSet<IpAddr>, SockError> {
        let seq = self.listing.next_seq();
        let mut w = Writer::with_capacity(32);
        let mark = w.message(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, seq, AF_UNSPEC, 0);
        w.end_message(mark);
        let mut visit = |all: &mut BTreeSet<IpAddr>, message: Message<'_>| {
            all.extend(address(message).filter(|ip| !is_link_local(*ip)));
        };
        self.listing.dump(w.as_bytes(), seq, &mut BTreeSet::new, &mut visit).await
    }
}

/// The address that a message tells of.
fn address(message: Message<'_>) -> Option<IpAddr> {
    let attrs = message.payload.get(IFADDRMSG_BYTES..)?;
    let attrs = Attrs(attrs).table::<3>();
    // Where an interface has a peer, `IFA_ADDRESS` is the peer's.
    let bytes = attrs.raw(IFA_LOCAL).or_else(|| attrs.raw(IFA_ADDRESS));
    let bytes = bytes.filter(|_| message.kind == RTM_NEWADDR)?;
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|octets| Ipv4Addr::from(octets).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|octets| Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

//! A link of type dummy that holds addresses, so that the kernel takes them for its own.

use std::io;
use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt, stream};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkDummy, LinkUnspec};

use crate::ack::ErrorKind;
use crate::netns::{NetNs, NetNsError};

/// Requests under way at once. The kernel serves them one by one; more would only queue.
const AT_ONCE: usize = 64;

/// A link and what it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Dummy {
    /// Its index in the network namespace.
    pub index: u32,
    /// Whether it was not there before.
    pub created: bool,
}

/// An address of a link.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub struct LinkAddress {
    /// The index of the link.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// The length of its prefix.
    pub prefix_len: u8,
}

/// One address that could not be added or removed. The others were not affected.
#[derive(Debug, thiserror::Error)]
#[error("{doing} address {address}: refused by the kernel")]
#[non_exhaustive]
pub struct AddressRefusal {
    /// The address.
    pub address: IpAddr,
    /// What was to be done.
    pub doing: &'static str,
    /// What the kernel said.
    #[source]
    pub errno: io::Error,
}

impl AddressRefusal {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self.errno.raw_os_error().unwrap_or_default() {
            // The link is gone.
            libc::ENODEV => ErrorKind::Conflict,
            errno => ErrorKind::of_errno(errno),
        }
    }
}

/// Links could not be asked or told something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The kernel refused, or the socket failed.
    #[error("{doing}{}", hint(errno))]
    Io {
        /// What was to be done, to which link.
        doing: String,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
    /// The network namespace could not be entered.
    #[error("cannot open an rtnetlink socket")]
    NetNs(#[from] NetNsError),
    /// There is no tokio runtime in the calling thread.
    #[error("cannot open an rtnetlink socket outside a tokio runtime")]
    NoRuntime,
    /// The name belongs to a link of another type, which is left alone.
    #[error("link {name} is there and is not of type dummy: remove it, or configure another name")]
    NotDummy {
        /// The link.
        name: String,
    },
}

impl LinkError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { errno, .. } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
            Self::NetNs(_) | Self::NoRuntime | Self::NotDummy { .. } => ErrorKind::Fatal,
        }
    }
}

fn hint(errno: &io::Error) -> &'static str {
    match errno.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "; the kernel has no links of type dummy (module dummy)",
        Some(libc::EPERM) => "; needs CAP_NET_ADMIN in the namespace's user namespace",
        _ => "",
    }
}

/// A connection to the links of one network namespace.
#[derive(Clone, Debug)]
pub struct Links(Handle);

impl Links {
    /// Opens a connection. Its task runs on the current tokio runtime, and ends with the last clone.
    ///
    /// # Errors
    ///
    /// [`LinkError::NetNs`], [`LinkError::NoRuntime`], [`LinkError::Io`].
    ///
    /// # Panics
    ///
    /// If the tokio runtime was built without I/O.
    pub fn open(netns: &NetNs) -> Result<Self, LinkError> {
        let runtime =
            tokio::runtime::Handle::try_current().map_err(|_no_runtime| LinkError::NoRuntime)?;
        let open = || {
            let _entered = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            Ok(Self(handle))
        };
        netns
            .run(open)?
            .map_err(|errno| LinkError::Io { doing: "opening an rtnetlink socket".into(), errno })
    }

    /// The index of the dummy link of this name, if it is there.
    ///
    /// # Errors
    ///
    /// [`LinkError::NotDummy`], [`LinkError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn find_dummy(&self, name: &str) -> Result<Option<u32>, LinkError> {
        Ok(self.dummy(name).await?.map(|link| link.header.index))
    }

    /// Makes a dummy link of this name unless it is there, and takes it up or leaves it as it is.
    ///
    /// # Errors
    ///
    /// [`LinkError::NotDummy`]; [`LinkError::Io`], of kind [`ErrorKind::Unsupported`] if the kernel
    /// has no such links.
    ///
    /// # Cancel safety
    ///
    /// The link may have been made. Calling again is harmless.
    pub async fn ensure_dummy(&self, name: &str, up: bool) -> Result<Dummy, LinkError> {
        let mut created = false;
        let found = match self.dummy(name).await? {
            Some(link) => Some(link),
            None => {
                let add = self.0.link().add(LinkDummy::new(name).build()).execute().await;
                match said(add) {
                    Ok(()) => created = true,
                    // Someone was faster.
                    Err(errno) if errno.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(errno) => return Err(failed("making dummy link", name, errno)),
                }
                self.dummy(name).await?
            }
        };
        let Some(link) = found else {
            let gone = io::Error::from_raw_os_error(libc::ENODEV);
            return Err(failed("making dummy link", name, gone));
        };
        let index = link.header.index;
        if up && !link.header.flags.contains(LinkFlags::Up) {
            let message = LinkUnspec::new_with_index(index).up().build();
            let set = said(self.0.link().set(message).execute().await);
            set.map_err(|errno| failed("taking up link", name, errno))?;
        }
        Ok(Dummy { index, created })
    }

    /// Deletes the dummy link of this name with its addresses; `false` if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::NotDummy`]: nothing was deleted. [`LinkError::Io`].
    ///
    /// # Cancel safety
    ///
    /// The link may have been deleted. Calling again is harmless.
    pub async fn delete_dummy(&self, name: &str) -> Result<bool, LinkError> {
        let Some(link) = self.dummy(name).await? else { return Ok(false) };
        match said(self.0.link().del(link.header.index).execute().await) {
            Ok(()) => Ok(true),
            Err(errno) if errno.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(errno) => Err(failed("deleting link", name, errno)),
        }
    }

    /// The addresses of all links, of both families, in one list.
    ///
    /// # Errors
    ///
    /// [`LinkError::Io`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn addresses(&self) -> Result<Vec<LinkAddress>, LinkError> {
        let mut all = Vec::new();
        let mut messages = std::pin::pin!(self.0.address().get().execute());
        while let Some(message) = messages.next().await {
            let message = said(message)
                .map_err(|errno| LinkError::Io { doing: "listing addresses".into(), errno })?;
            all.extend(address_of(&message));
        }
        Ok(all)
    }

    /// Adds addresses to a link, each as a host of its own (/32, /128); returns those refused.
    ///
    /// An address the link has already is fine.
    ///
    /// # Cancel safety
    ///
    /// Some may have been added. Calling again is harmless.
    pub async fn add_addresses(&self, index: u32, addresses: &[IpAddr]) -> Vec<AddressRefusal> {
        let add = |address: IpAddr| async move {
            let request = self.0.address().add(index, address, host_prefix(address));
            finish("adding", address, libc::EEXIST, request.execute().await)
        };
        all_at_once(addresses, add).await
    }

    /// Removes what [`add_addresses`](Self::add_addresses) added; returns the addresses refused.
    ///
    /// An address the link does not have is fine, and so is a link that is gone.
    ///
    /// # Cancel safety
    ///
    /// Some may have been removed. Calling again is harmless.
    pub async fn remove_addresses(&self, index: u32, addresses: &[IpAddr]) -> Vec<AddressRefusal> {
        let remove = |address: IpAddr| async move {
            let mut add = self.0.address().add(index, address, host_prefix(address));
            let message: AddressMessage = std::mem::take(add.message_mut());
            let removed = self.0.address().del(message).execute().await;
            let refusal = finish("removing", address, libc::EADDRNOTAVAIL, removed);
            refusal.filter(|r| r.errno.raw_os_error() != Some(libc::ENODEV))
        };
        all_at_once(addresses, remove).await
    }

    async fn dummy(&self, name: &str) -> Result<Option<LinkMessage>, LinkError> {
        let found = self.0.link().get().match_name(name.to_owned()).execute().try_next().await;
        match said(found) {
            Ok(Some(link)) if is_dummy(&link) => Ok(Some(link)),
            Ok(Some(_)) => Err(LinkError::NotDummy { name: name.to_owned() }),
            Ok(None) => Ok(None),
            Err(errno) if errno.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(errno) => Err(failed("looking for link", name, errno)),
        }
    }
}

async fn all_at_once<F: Future<Output = Option<AddressRefusal>>>(
    addresses: &[IpAddr],
    request: impl Fn(IpAddr) -> F,
) -> Vec<AddressRefusal> {
    // Made before they are polled: a stream that borrows is not `Send` for every lifetime.
    let requests: Vec<_> = addresses.iter().map(|address| request(*address)).collect();
    stream::iter(requests).buffered(AT_ONCE).filter_map(std::future::ready).collect().await
}

fn finish(
    doing: &'static str,
    address: IpAddr,
    fine: i32,
    result: Result<(), rtnetlink::Error>,
) -> Option<AddressRefusal> {
    let errno = said(result).err()?;
    (errno.raw_os_error() != Some(fine)).then_some(AddressRefusal { address, doing, errno })
}

const fn host_prefix(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn is_dummy(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        let LinkAttribute::LinkInfo(info) = attribute else { return false };
        info.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Dummy)))
    })
}

// KERNEL: IFA_LOCAL is the address; IFA_ADDRESS is the peer's on a point-to-point link, and the only
// one IPv6 tells otherwise (net/ipv4/devinet.c, net/ipv6/addrconf.c, v6.12).
fn address_of(message: &AddressMessage) -> Option<LinkAddress> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        if let AddressAttribute::Local(address) = attribute {
            local = Some(*address);
        } else if let AddressAttribute::Address(address) = attribute {
            other = Some(*address);
        }
    }
    let (index, prefix_len) = (message.header.index, message.header.prefix_len);
    Some(LinkAddress { index, address: local.or(other)?, prefix_len })
}

fn failed(doing: &str, name: &str, errno: io::Error) -> LinkError {
    LinkError::Io { doing: format!("{doing} {name}"), errno }
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

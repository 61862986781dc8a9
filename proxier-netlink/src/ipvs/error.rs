//! What went wrong, with which virtual server or destination, and what to do.

use std::{fmt, io};

use super::types::{Dest, Service, VirtualServer};
use crate::ack::{Ack, ErrorKind, errno_name};
use crate::netns::NetNs;
use crate::sock::{OpenError, SockError};

/// What an operation does.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub enum OpKind {
    /// Deletes a destination.
    DelDest,
    /// Deletes a virtual server.
    DelService,
    /// Adds a destination.
    NewDest,
    /// Adds a virtual server.
    NewService,
    /// Changes a destination.
    SetDest,
    /// Changes a virtual server.
    SetService,
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DelDest => "deleting destination",
            Self::DelService => "deleting virtual server",
            Self::NewDest => "adding destination",
            Self::NewService => "adding virtual server",
            Self::SetDest => "changing destination",
            Self::SetService => "changing virtual server",
        })
    }
}

/// One operation that the kernel refused. The others of its batch were not affected.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Refusal {
    /// The caller's operation: see [`Batch::op`](super::Batch::op).
    pub tag: Option<u32>,
    /// What it was to do.
    pub op: OpKind,
    /// With which virtual server.
    pub key: Option<VirtualServer>,
    /// The virtual server to be, for [`OpKind::NewService`] and [`OpKind::SetService`].
    pub service: Option<Service>,
    /// The destination. Only its address and port for [`OpKind::DelDest`].
    pub dest: Option<Dest>,
    /// What the kernel said.
    pub ack: Ack,
}

impl Refusal {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self.ack.errno() {
            libc::ENOENT if self.is_about_a_service() => ErrorKind::Unsupported,
            libc::ESRCH => ErrorKind::Conflict,
            errno => ErrorKind::of_errno(errno),
        }
    }

    /// The scheduler the kernel does not have, if that is why it refused.
    // KERNEL: ENOENT for a virtual server is the answer to an unknown scheduler, after the kernel has
    // tried to load the module ip_vs_NAME (net/netfilter/ipvs/ip_vs_ctl.c, ip_vs_sched.c, v6.12).
    pub fn unknown_scheduler(&self) -> Option<&str> {
        let unknown = self.ack.errno() == libc::ENOENT && self.is_about_a_service();
        self.service.as_ref().filter(|_| unknown).map(|s| s.scheduler.as_str())
    }

    /// Whether it was to delete what is not there.
    pub fn is_already_gone(&self) -> bool {
        matches!(self.op, OpKind::DelDest | OpKind::DelService)
            && matches!(self.ack.errno(), libc::ENOENT | libc::ESRCH)
    }

    fn is_about_a_service(&self) -> bool {
        matches!(self.op, OpKind::NewService | OpKind::SetService)
    }

    /// The reason in words, where the errno alone does not tell.
    pub fn why(&self) -> Option<String> {
        if let Some(scheduler) = self.unknown_scheduler() {
            return Some(format!(
                "the kernel has no scheduler {scheduler:?}: module ip_vs_{scheduler} is missing"
            ));
        }
        let dest_op = matches!(self.op, OpKind::DelDest | OpKind::NewDest | OpKind::SetDest);
        let text = match (self.ack.errno(), self.op) {
            (libc::EEXIST, _) => "it is there already",
            (libc::ESRCH, _) => "there is no such virtual server",
            (libc::ENOENT, _) => "the virtual server has no such destination",
            (libc::EPERM, _) => "needs CAP_NET_ADMIN in the namespace's user namespace",
            (libc::EAFNOSUPPORT, _) => "the kernel's IPVS was built without IPv6",
            (libc::EPROTONOSUPPORT, _) => "the kernel's IPVS was built without this protocol",
            (libc::ERANGE, _) if dest_op => {
                "the weight is above 2147483647, or the lower threshold above the upper one"
            }
            // KERNEL: __ip_vs_new_dest asks the routing tables, which are empty until then.
            (libc::EINVAL, OpKind::NewDest | OpKind::SetDest) => {
                "not an address of one host (broadcast or multicast), or loopback was never up \
                 in this network namespace"
            }
            (libc::EINVAL | libc::ERANGE, OpKind::NewService | OpKind::SetService) => {
                "the scheduler's name is longer than 15 bytes, or the prefix length is not one"
            }
            _ => return None,
        };
        Some(text.to_owned())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(dest) = &self.dest {
            write!(f, " {} of", std::net::SocketAddr::new(dest.address, dest.port))?;
        }
        if let Some(key) = &self.key {
            write!(f, " {key}")?;
        }
        write!(f, ": refused by the kernel ({})", self.ack)?;
        self.why().map_or(Ok(()), |why| write!(f, "; {why}"))
    }
}

impl std::error::Error for Refusal {}

/// IPVS could not be asked or told something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IpvsError {
    /// The socket could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel has no IPVS.
    #[error(
        "the kernel has no IPVS in {netns} ({}): module ip_vs is not there or could not be loaded",
        errno_name(ack.errno())
    )]
    NoIpvs {
        /// Where.
        netns: NetNs,
        /// What the kernel said when asked for the family.
        ack: Ack,
    },
    /// The kernel refused.
    #[error("{what}: refused by the kernel ({ack}){}", hint(ack))]
    Kernel {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        ack: Ack,
        /// The same as an error of the system.
        #[source]
        errno: io::Error,
    },
    /// A list was interrupted five times in a row.
    #[error("{what}: interrupted, several times in a row")]
    Interrupted {
        /// What was asked.
        what: &'static str,
    },
    /// The socket failed.
    #[error("{what}: cannot {doing}")]
    Io {
        /// What was asked.
        what: &'static str,
        /// The step that failed.
        doing: &'static str,
        /// What the system said.
        #[source]
        errno: io::Error,
    },
    /// The kernel's answer could not be read, or there was none.
    #[error("{what}: the kernel's answer is damaged or missing")]
    Malformed {
        /// What was asked.
        what: &'static str,
    },
    /// Answers were lost: some operations may have been refused. List, and plan again.
    #[error("{what}: answers were lost")]
    Overrun {
        /// What was asked.
        what: &'static str,
    },
}

impl IpvsError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open(error) => error.kind(),
            Self::NoIpvs { .. } => ErrorKind::Unsupported,
            Self::Kernel { ack, .. } => ErrorKind::of_errno(ack.errno()),
            Self::Io { errno, .. } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
            Self::Interrupted { .. } => ErrorKind::Retry,
            Self::Overrun { .. } => ErrorKind::Conflict,
            Self::Malformed { .. } => ErrorKind::Fatal,
        }
    }

    pub(super) fn from_sock(what: &'static str, error: SockError) -> Self {
        match error {
            SockError::Interrupted => Self::Interrupted { what },
            SockError::Io { doing, errno } => Self::Io { what, doing, errno },
            SockError::Kernel(ack) => Self::Kernel { what, errno: ack.io(), ack },
            SockError::Malformed => Self::Malformed { what },
            SockError::Overrun => Self::Overrun { what },
        }
    }
}

fn hint(ack: &Ack) -> &'static str {
    match ack.errno() {
        libc::EPERM => "; needs CAP_NET_ADMIN in the namespace's user namespace",
        _ => "",
    }
}

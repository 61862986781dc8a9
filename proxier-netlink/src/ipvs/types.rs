//! Virtual servers, destinations and what the kernel counts for them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::wire;

/// The schedulers of Linux, by the names they have in the kernel.
// KERNEL: net/netfilter/ipvs/Kconfig, v6.12. `twos` came with 6.2.
pub const SCHEDULERS: [&str; 14] =
    ["dh", "fo", "lblc", "lblcr", "lc", "mh", "nq", "ovf", "rr", "sed", "sh", "twos", "wlc", "wrr"];

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum AddressFamily {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl AddressFamily {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }

    pub(super) const fn number(self) -> u16 {
        match self {
            Self::Ipv4 => wire::AF_INET,
            Self::Ipv6 => wire::AF_INET6,
        }
    }

    pub(super) const fn from_number(number: u16) -> Option<Self> {
        match number {
            wire::AF_INET => Some(Self::Ipv4),
            wire::AF_INET6 => Some(Self::Ipv6),
            _ => None,
        }
    }

    /// Bits of an address: the longest prefix.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Ipv4 => 32,
            Self::Ipv6 => 128,
        }
    }

    /// `0.0.0.0` or `::`.
    pub const fn unspecified(self) -> IpAddr {
        match self {
            Self::Ipv4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Ipv6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

impl fmt::Display for AddressFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// A transport protocol, by its number.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Protocol(pub u8);

impl Protocol {
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// SCTP.
    pub const SCTP: Self = Self(132);
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TCP => f.write_str("tcp"),
            Self::UDP => f.write_str("udp"),
            Self::SCTP => f.write_str("sctp"),
            Self(number) => write!(f, "protocol {number}"),
        }
    }
}

/// What identifies a virtual server in its network namespace.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum VirtualServer {
    /// Traffic to an address and port. Port 0 is every port without a virtual server of its own,
    /// and needs persistence.
    Address {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
        /// The protocol.
        protocol: Protocol,
    },
    /// Packets with a mark (`meta mark`), of one family and any protocol.
    Mark {
        /// The mark; 0 is no mark.
        mark: u32,
        /// The family.
        family: AddressFamily,
    },
}

impl VirtualServer {
    /// The virtual server of an address and port.
    pub const fn address(address: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self::Address { address, port, protocol }
    }

    /// The virtual server of a mark.
    pub const fn mark(mark: u32, family: AddressFamily) -> Self {
        Self::Mark { mark, family }
    }

    /// The family of its traffic.
    pub const fn family(&self) -> AddressFamily {
        match *self {
            Self::Address { address, .. } => AddressFamily::of(address),
            Self::Mark { family, .. } => family,
        }
    }
}

impl fmt::Display for VirtualServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Address { address, port, protocol } => {
                write!(f, "{protocol} {}", std::net::SocketAddr::new(address, port))
            }
            Self::Mark { mark, family } => write!(f, "fwmark {mark} ({family})"),
        }
    }
}

/// Clients stay with the destination they had.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Persistence {
    /// Seconds since the last connection after which a client may get another destination; not 0.
    pub timeout_secs: u32,
    /// Clients with this prefix in common count as one. 32 or 128: each by itself.
    pub prefix_len: u8,
}

impl Persistence {
    /// Each client by itself.
    pub const fn new(timeout_secs: u32, family: AddressFamily) -> Self {
        Self { timeout_secs, prefix_len: family.bits() }
    }
}

/// Flags of a virtual server other than persistence, as bits.
///
/// What the scheduler flags mean depends on the scheduler.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceFlags(pub u32);

impl ServiceFlags {
    /// No flags.
    pub const NONE: Self = Self(0);
    /// UDP: every packet is scheduled, none makes a connection.
    pub const ONE_PACKET: Self = Self(0x4);
    /// `sh`: goes on to another destination where the chosen one has weight 0 or is overloaded.
    pub const SH_FALLBACK: Self = Self(0x8);
    /// `sh`: hashes the source port too.
    pub const SH_PORT: Self = Self(0x10);
    /// `mh`: as [`SH_FALLBACK`](Self::SH_FALLBACK).
    pub const MH_FALLBACK: Self = Self(0x8);
    /// `mh`: hashes the source port too.
    pub const MH_PORT: Self = Self(0x10);
    /// The third flag schedulers may have; none of Linux uses it.
    pub const SCHED_3: Self = Self(0x20);

    /// All that a user may set.
    pub(super) const SETTABLE: Self = Self(0x3c);

    /// Whether all of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for ServiceFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A virtual server and how it schedules.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Service {
    /// Which one.
    pub key: VirtualServer,
    /// The scheduler's name, at most 15 bytes: see [`SCHEDULERS`].
    pub scheduler: String,
    /// Whether clients stay with their destination.
    pub persistence: Option<Persistence>,
    /// The rest. Bits the kernel keeps for itself are neither sent nor told.
    pub flags: ServiceFlags,
}

impl Service {
    /// A virtual server without persistence and flags.
    pub fn new(key: VirtualServer, scheduler: impl Into<String>) -> Self {
        Self { key, scheduler: scheduler.into(), persistence: None, flags: ServiceFlags::NONE }
    }

    /// With these flags.
    #[must_use]
    pub fn flags(mut self, flags: ServiceFlags) -> Self {
        self.flags = flags;
        self
    }

    /// With clients that stay.
    #[must_use]
    pub fn persistent(mut self, persistence: Persistence) -> Self {
        self.persistence = Some(persistence);
        self
    }
}

/// How packets reach a destination.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Forward(pub u32);

impl Forward {
    /// NAT: the destination address and port are rewritten, and back in replies (`-m`).
    pub const MASQUERADE: Self = Self(0);
    /// Delivered on this host. The kernel's own choice, not a user's.
    pub const LOCAL: Self = Self(1);
    /// IP in IP (`-i`).
    pub const TUNNEL: Self = Self(2);
    /// Unchanged, to the destination's link address (`-g`).
    pub const DIRECT_ROUTE: Self = Self(3);
    /// Past IPVS, where there is no destination. The kernel's own choice.
    pub const BYPASS: Self = Self(4);

    pub(super) const MASK: u32 = 7;
}

/// A destination: a real server of one virtual server.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Dest {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// How packets get there.
    pub forward: Forward,
    /// Its share; 0 gets no new connections but keeps those it has. At most 2^31 - 1.
    pub weight: u32,
    /// No new connections above so many; 0: no limit.
    pub upper_threshold: u32,
    /// New ones again below so many; 0: three quarters of the upper one. Not above it.
    pub lower_threshold: u32,
}

impl Dest {
    /// Weight 1, NAT, no thresholds.
    pub const fn new(address: IpAddr, port: u16) -> Self {
        Self {
            address,
            port,
            forward: Forward::MASQUERADE,
            weight: 1,
            upper_threshold: 0,
            lower_threshold: 0,
        }
    }

    /// With this weight.
    #[must_use]
    pub const fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }
}

/// What the kernel counted, and its estimates of current rates.
///
/// A kernel before 4.1 counts connections and packets in 32 bits, which wrap.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub in_packets: u64,
    /// Packets to clients.
    pub out_packets: u64,
    /// Bytes from clients.
    pub in_bytes: u64,
    /// Bytes to clients.
    pub out_bytes: u64,
    /// Connections per second.
    pub connection_rate: u64,
    /// Packets per second from clients.
    pub in_packet_rate: u64,
    /// Packets per second to clients.
    pub out_packet_rate: u64,
    /// Bytes per second from clients.
    pub in_byte_rate: u64,
    /// Bytes per second to clients.
    pub out_byte_rate: u64,
}

/// A virtual server as the kernel has it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct ServiceEntry {
    /// Which, and how.
    pub service: Service,
    /// The persistence engine (`sip`), if it has one.
    pub engine: Option<String>,
    /// Traffic of all its destinations, also of those that are gone.
    pub stats: Stats,
}

/// A destination as the kernel has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct DestEntry {
    /// Which, and how.
    pub dest: Dest,
    /// Established connections.
    pub active: u32,
    /// Others: opening, closing, UDP.
    pub inactive: u32,
    /// Clients that are bound to it by persistence.
    pub persistent: u32,
    /// Its traffic.
    pub stats: Stats,
}

/// Seconds without a packet after which a connection is forgotten; of the whole namespace.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Timeouts {
    /// Established TCP connections. 0 in a request: as it is.
    pub tcp_secs: u32,
    /// TCP connections after a FIN. 0 in a request: as it is.
    pub tcp_fin_secs: u32,
    /// UDP. 0 in a request: as it is.
    pub udp_secs: u32,
}

/// About the kernel's IPVS.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct Info {
    /// Major, minor, patch.
    pub version: (u8, u8, u8),
    /// Buckets of the table of connections.
    pub table_size: u32,
}

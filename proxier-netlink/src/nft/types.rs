//! Names for the numbers of nf_tables.
//!
//! All numbers are those of `include/uapi/linux/netfilter/nf_tables.h` at v6.12. The types that
//! mirror a kernel enumeration are open: a number this crate has no name for is kept, not lost.

use std::borrow::Cow;
use std::fmt;

/// A type around a number with names for the known values.
macro_rules! open_enum {
    ($(#[$meta:meta])* $name:ident($repr:ty) { $($key:ident = $value:literal $doc:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(
            /// The number as the kernel has it.
            pub $repr,
        );

        impl $name {
            $(#[doc = $doc] pub const $key: Self = Self($value);)*
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($value => f.write_str(stringify!($key)),)*
                    other => write!(f, concat!(stringify!($name), "({})"), other),
                }
            }
        }
    };
}

/// A type around a bit mask.
macro_rules! open_flags {
    ($(#[$meta:meta])* $name:ident { $($key:ident = $value:literal $doc:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(
            /// The bits as the kernel has them.
            pub u32,
        );

        impl $name {
            /// No bit.
            pub const NONE: Self = Self(0);
            $(#[doc = $doc] pub const $key: Self = Self($value);)*

            /// Whether all bits of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

/// The protocol family of a table.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u8)]
pub enum Family {
    /// ARP.
    Arp = 3,
    /// Ethernet bridges.
    Bridge = 7,
    /// IPv4 and IPv6 in one table.
    Inet = 1,
    /// IPv4; the tables of iptables are here.
    Ipv4 = 2,
    /// IPv6; the tables of ip6tables are here.
    Ipv6 = 10,
    /// One network device.
    Netdev = 5,
    /// All families in a request to list, or a family this crate does not know.
    Unspec = 0,
}

impl Family {
    pub(crate) const fn number(self) -> u8 {
        self as u8
    }

    pub(crate) const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Inet,
            2 => Self::Ipv4,
            3 => Self::Arp,
            5 => Self::Netdev,
            7 => Self::Bridge,
            10 => Self::Ipv6,
            _ => Self::Unspec,
        }
    }
}

impl fmt::Display for Family {
    /// The family as `nft` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Arp => "arp",
            Self::Bridge => "bridge",
            Self::Inet => "inet",
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
            Self::Netdev => "netdev",
            Self::Unspec => "unspec",
        })
    }
}

/// The number of a state of nf_tables in one network namespace; each commit makes a new one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation(pub u32);

open_enum! {
    /// What a message does to what.
    MessageKind(u8) {
        NEWTABLE = 0 "Makes or changes a table.";
        GETTABLE = 1 "Lists tables.";
        DELTABLE = 2 "Deletes a table with all it holds.";
        NEWCHAIN = 3 "Makes or changes a chain.";
        GETCHAIN = 4 "Lists chains.";
        DELCHAIN = 5 "Deletes a chain.";
        NEWRULE = 6 "Makes or replaces a rule.";
        GETRULE = 7 "Lists rules.";
        DELRULE = 8 "Deletes one rule, or all of a chain or table.";
        NEWSET = 9 "Makes a set or map.";
        GETSET = 10 "Lists sets.";
        DELSET = 11 "Deletes a set.";
        NEWSETELEM = 12 "Adds elements to a set.";
        GETSETELEM = 13 "Lists elements of a set.";
        DELSETELEM = 14 "Deletes elements of a set, or all.";
        NEWGEN = 15 "Announces that a commit is complete.";
        GETGEN = 16 "Asks for the generation.";
        TRACE = 17 "Tells what a traced packet met.";
        NEWOBJ = 18 "Makes a stateful object.";
        GETOBJ = 19 "Lists stateful objects.";
        DELOBJ = 20 "Deletes a stateful object.";
        NEWFLOWTABLE = 22 "Makes a flow table.";
        GETFLOWTABLE = 23 "Lists flow tables.";
        DELFLOWTABLE = 24 "Deletes a flow table.";
    }
}

/// A register of the virtual machine: 64 bytes as 16 slots of 4, or 4 registers of 16.
///
/// Values of more than 4 bytes occupy the slots that follow. Slots 0, 4, 8 and 12 *are* the
/// registers 1 to 4; there is one value for both, as in what the kernel lists.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Reg(u32);

impl Reg {
    /// The register that holds the verdict.
    pub const VERDICT: Self = Self(0);
    /// The first 16 bytes.
    pub const R1: Self = Self(1);
    /// The second 16 bytes.
    pub const R2: Self = Self(2);
    /// The third 16 bytes.
    pub const R3: Self = Self(3);
    /// The last 16 bytes.
    pub const R4: Self = Self(4);

    /// The register that begins with 4-byte slot `index`; the kernel refuses slots over 15.
    pub const fn slot(index: u8) -> Self {
        Self::from_number(index as u32 + FIRST_SLOT)
    }

    pub(crate) const fn number(self) -> u32 {
        self.0
    }

    // KERNEL: nft_dump_register lists a slot that is a multiple of four as the 16-byte register
    // (net/netfilter/nf_tables_api.c, v6.12).
    pub(crate) const fn from_number(number: u32) -> Self {
        if number >= FIRST_SLOT && number < FIRST_SLOT + 16 && number.is_multiple_of(4) {
            return Self(number / 4 - 1);
        }
        Self(number)
    }
}

/// `NFT_REG32_00`
const FIRST_SLOT: u32 = 8;

/// What happens to a packet.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Verdict<'a> {
    /// The packet passes this hook.
    Accept,
    /// The next rule.
    Break,
    /// The next expression.
    Continue,
    /// The packet is dropped.
    Drop,
    /// On to another chain, and not back.
    Goto(Cow<'a, str>),
    /// On to another chain, and back at its end.
    Jump(Cow<'a, str>),
    /// Back to the chain that jumped here.
    Return,
}

impl Verdict<'_> {
    /// A copy that borrows nothing.
    pub fn into_owned(self) -> Verdict<'static> {
        match self {
            Self::Accept => Verdict::Accept,
            Self::Break => Verdict::Break,
            Self::Continue => Verdict::Continue,
            Self::Drop => Verdict::Drop,
            Self::Goto(chain) => Verdict::Goto(Cow::Owned(chain.into_owned())),
            Self::Jump(chain) => Verdict::Jump(Cow::Owned(chain.into_owned())),
            Self::Return => Verdict::Return,
        }
    }
}

open_enum! {
    /// A property of a packet that is not in the packet.
    MetaKey(u32) {
        LEN = 0 "Length of the packet, 4 bytes, host order.";
        PROTOCOL = 1 "EtherType, 2 bytes.";
        PRIORITY = 2 "Traffic control class, 4 bytes, host order.";
        MARK = 3 "Packet mark, 4 bytes, host order.";
        IIF = 4 "Index of the input interface, 4 bytes, host order.";
        OIF = 5 "Index of the output interface, 4 bytes, host order.";
        IIFNAME = 6 "Name of the input interface, 16 bytes.";
        OIFNAME = 7 "Name of the output interface, 16 bytes.";
        IIFTYPE = 8 "Type of the input interface, 2 bytes, host order.";
        OIFTYPE = 9 "Type of the output interface, 2 bytes, host order.";
        SKUID = 10 "User of the sending socket, 4 bytes, host order.";
        SKGID = 11 "Group of the sending socket, 4 bytes, host order.";
        NFTRACE = 12 "Whether the packet is traced, 1 byte.";
        NFPROTO = 15 "Network protocol, 1 byte.";
        L4PROTO = 16 "Transport protocol, 1 byte.";
        PKTTYPE = 19 "Unicast, broadcast, multicast, ..., 1 byte.";
        CPU = 20 "Number of the processor, 4 bytes, host order.";
        CGROUP = 23 "Control group, 4 bytes, host order.";
        PRANDOM = 24 "A random number, 4 bytes.";
    }
}

open_enum! {
    /// A property of a packet's connection.
    CtKey(u32) {
        STATE = 0 "State as a bit mask, 4 bytes, host order.";
        DIRECTION = 1 "Original (0) or reply (1), 1 byte.";
        STATUS = 2 "Status as a bit mask, 4 bytes, host order.";
        MARK = 3 "Connection mark, 4 bytes, host order.";
        EXPIRATION = 5 "Time to live in milliseconds, 4 bytes, host order.";
        L3PROTOCOL = 7 "Network protocol, 1 byte.";
        SRC = 8 "Source address, by family of the table; needs a direction.";
        DST = 9 "Destination address, by family of the table; needs a direction.";
        PROTOCOL = 10 "Transport protocol, 1 byte; needs a direction.";
        PROTO_SRC = 11 "Source port, 2 bytes; needs a direction.";
        PROTO_DST = 12 "Destination port, 2 bytes; needs a direction.";
        ZONE = 17 "Zone, 2 bytes, host order.";
        SRC_IP = 19 "IPv4 source address; needs a direction.";
        DST_IP = 20 "IPv4 destination address; needs a direction.";
        SRC_IP6 = 21 "IPv6 source address; needs a direction.";
        DST_IP6 = 22 "IPv6 destination address; needs a direction.";
        ID = 23 "Identifier, 4 bytes.";
    }
}

open_flags! {
    /// States of a connection, as [`CtKey::STATE`] loads them.
    // KERNEL: NF_CT_STATE_BIT (include/uapi/linux/netfilter/nf_conntrack_common.h, v6.12).
    CtState {
        INVALID = 1 "Not trackable.";
        ESTABLISHED = 2 "A reply was seen.";
        RELATED = 4 "Belongs to another connection.";
        NEW = 8 "The first packet.";
        UNTRACKED = 64 "Exempt from tracking.";
    }
}

open_flags! {
    /// Status of a connection: what [`CtKey::STATUS`] loads and conntrack lists.
    // KERNEL: enum ip_conntrack_status (include/uapi/linux/netfilter/nf_conntrack_common.h, v6.12).
    CtStatus {
        EXPECTED = 0x1 "Was expected by another connection.";
        SEEN_REPLY = 0x2 "Packets went both ways.";
        ASSURED = 0x4 "Never removed early.";
        CONFIRMED = 0x8 "Its first packet left the machine.";
        SRC_NAT = 0x10 "Its source is translated.";
        DST_NAT = 0x20 "Its destination is translated.";
        DYING = 0x200 "Being removed.";
        OFFLOAD = 0x4000 "Forwarded by a flow table.";
    }
}

open_enum! {
    /// One direction of a connection.
    CtDirection(u8) {
        ORIGINAL = 0 "That of the first packet.";
        REPLY = 1 "The other.";
    }
}

open_enum! {
    /// Where in a packet an offset counts from.
    PayloadBase(u32) {
        LINK = 0 "The link-layer header.";
        NETWORK = 1 "The IPv4 or IPv6 header.";
        TRANSPORT = 2 "The TCP, UDP or SCTP header.";
    }
}

open_enum! {
    /// A comparison, byte by byte from the first.
    CmpOp(u32) {
        EQ = 0 "Equal.";
        NE = 1 "Not equal.";
        LT = 2 "Less.";
        LE = 3 "Less or equal.";
        GT = 4 "Greater.";
        GE = 5 "Greater or equal.";
    }
}

open_enum! {
    /// A conversion between byte orders.
    ByteorderOp(u32) {
        NTOH = 0 "Network to host.";
        HTON = 1 "Host to network.";
    }
}

open_enum! {
    /// What a look-up in the routing table gives.
    FibResult(u32) {
        OIF = 1 "Index of the output interface, 4 bytes, host order.";
        OIFNAME = 2 "Name of the output interface, 16 bytes.";
        ADDRTYPE = 3 "Type of the address (RTN_LOCAL is 2), 4 bytes, host order.";
    }
}

open_flags! {
    /// What a look-up in the routing table depends on.
    FibFlags {
        SADDR = 0x1 "Looks the source address up.";
        DADDR = 0x2 "Looks the destination address up.";
        MARK = 0x4 "With the packet mark.";
        IIF = 0x8 "Only via the input interface.";
        OIF = 0x10 "Only via the output interface.";
        PRESENT = 0x20 "Whether there is a result, as 0 or 1.";
    }
}

open_enum! {
    /// How numbers follow each other.
    NumgenKind(u32) {
        INCREMENTAL = 0 "Each one more than the last.";
        RANDOM = 1 "Random.";
    }
}

open_enum! {
    /// Which address is translated.
    NatKind(u32) {
        SNAT = 0 "The source.";
        DNAT = 1 "The destination.";
    }
}

open_flags! {
    /// How a translation picks from several possibilities.
    // KERNEL: NF_NAT_RANGE_* (include/uapi/linux/netfilter/nf_nat.h, v6.12).
    NatFlags {
        RANDOM = 0x4 "Random source ports.";
        PERSISTENT = 0x8 "The same client gets the same address.";
        FULLY_RANDOM = 0x10 "Random source ports from the kernel's generator.";
    }
}

open_enum! {
    /// How a sender learns of a rejection.
    RejectKind(u32) {
        ICMP = 0 "ICMP or ICMPv6 unreachable; the code is that of the family.";
        TCP_RESET = 1 "TCP reset.";
        ICMPX = 2 "Unreachable with a code for both families, in `inet` tables.";
    }
}

open_enum! {
    /// A property of the socket a packet is for.
    SocketKey(u32) {
        TRANSPARENT = 0 "Whether it is transparent, 1 byte.";
        MARK = 1 "Its mark, 4 bytes, host order.";
        WILDCARD = 2 "Whether it is bound to any address, 1 byte.";
        CGROUPV2 = 3 "Control group at a level, 8 bytes.";
    }
}

open_enum! {
    /// A hash function.
    HashKind(u32) {
        JENKINS = 0 "Jenkins' hash of a register.";
        SYMMETRIC = 1 "The flow hash of the packet, equal in both directions.";
    }
}

open_enum! {
    /// What a rule does to an element of a set.
    DynsetOp(u32) {
        ADD = 0 "Adds if absent.";
        UPDATE = 1 "Adds, or makes the timeout start again.";
        DELETE = 2 "Deletes if present.";
    }
}

open_enum! {
    /// What a limit counts.
    LimitKind(u32) {
        PACKETS = 0 "Packets.";
        BYTES = 1 "Bytes.";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_one_name() {
        assert_eq!(Reg::slot(0), Reg::R1);
        assert_eq!(Reg::slot(12), Reg::R4);
        assert_eq!(Reg::slot(1).number(), 9);
        assert_eq!(Reg::slot(15).number(), 23);
        for n in 0..16 {
            assert_eq!(Reg::from_number(Reg::slot(n).number()), Reg::slot(n));
        }
    }

    #[test]
    fn families_survive_their_number() {
        use Family::{Arp, Bridge, Inet, Ipv4, Ipv6, Netdev, Unspec};
        for family in [Arp, Bridge, Inet, Ipv4, Ipv6, Netdev, Unspec] {
            assert_eq!(Family::from_number(family.number()), family);
        }
    }

    #[test]
    fn unknown_numbers_are_kept() {
        assert_eq!(format!("{:?} {:?}", MetaKey::MARK, MetaKey(99)), "MARK MetaKey(99)");
    }
}

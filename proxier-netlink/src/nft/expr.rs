//! Expressions: the instructions a rule is made of, as values.
//!
//! One type serves writing and reading. It borrows: strings and byte strings of an expression read
//! from a dump point into the receive buffer until [`Expr::into_owned`].

use std::borrow::Cow;

use super::types::{
    ByteorderOp, CmpOp, CtDirection, CtKey, DynsetOp, Family, FibFlags, FibResult, HashKind,
    LimitKind, MetaKey, NatFlags, NatKind, NumgenKind, PayloadBase, Reg, RejectKind, SocketKey,
    Verdict,
};

/// One expression.
///
/// An expression of the kernel that this crate does not know, or knows with attributes it does not,
/// is [`Expr::Other`]; nothing is silently lost.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Expr<'a> {
    /// `dreg = (sreg & mask) ^ xor`; both operands have the length of the value.
    Bitwise {
        /// Where the value is.
        sreg: Reg,
        /// Where the result goes.
        dreg: Reg,
        /// Bits that are kept.
        mask: Cow<'a, [u8]>,
        /// Bits that are then inverted.
        xor: Cow<'a, [u8]>,
    },
    /// Swaps bytes where the host's order is not the network's.
    Byteorder {
        /// Where the value is.
        sreg: Reg,
        /// Where the result goes.
        dreg: Reg,
        /// From which order to which.
        op: ByteorderOp,
        /// Length of the value in bytes.
        len: u32,
        /// Length of one unit: 2, 4 or 8 bytes.
        size: u32,
    },
    /// Goes on only if the comparison holds.
    Cmp {
        /// Where the value is.
        sreg: Reg,
        /// The comparison.
        op: CmpOp,
        /// What is compared with.
        value: Cow<'a, [u8]>,
    },
    /// Counts what comes by.
    Counter {
        /// Packets so far.
        packets: u64,
        /// Bytes so far.
        bytes: u64,
    },
    /// Loads a property of the connection.
    Ct {
        /// Which.
        key: CtKey,
        /// Where it goes.
        dreg: Reg,
        /// Of which direction, for the keys that have two.
        direction: Option<CtDirection>,
    },
    /// Sets a property of the connection.
    CtSet {
        /// Which.
        key: CtKey,
        /// Where the value is.
        sreg: Reg,
        /// Of which direction, for the keys that have two.
        direction: Option<CtDirection>,
    },
    /// Adds, refreshes or deletes an element of a set.
    Dynset(Dynset<'a>),
    /// Looks a route up.
    Fib {
        /// What is wanted.
        result: FibResult,
        /// What it depends on.
        flags: FibFlags,
        /// Where it goes.
        dreg: Reg,
    },
    /// Hashes.
    Hash(Hash),
    /// Loads a constant.
    Immediate {
        /// Where it goes.
        dreg: Reg,
        /// The constant.
        value: Cow<'a, [u8]>,
    },
    /// Goes on while a rate is not exceeded.
    Limit(Limit),
    /// Goes on if the key is in the set; loads the element's value if it is a map.
    Lookup {
        /// The set.
        set: SetRef<'a>,
        /// Where the key is.
        sreg: Reg,
        /// Where the value goes; [`Reg::VERDICT`] for verdict maps; `None` for sets.
        dreg: Option<Reg>,
        /// Goes on if the key is *not* in the set.
        invert: bool,
    },
    /// Gives the packet the address of the output interface as source.
    Masquerade {
        /// How a port is picked.
        flags: NatFlags,
        /// Registers with the first and last source port, network order.
        ports: Option<(Reg, Reg)>,
    },
    /// A match of iptables.
    Match(Xt<'a>),
    /// Loads a property of the packet that is not in it.
    Meta {
        /// Which.
        key: MetaKey,
        /// Where it goes.
        dreg: Reg,
    },
    /// Sets a property of the packet that is not in it.
    MetaSet {
        /// Which.
        key: MetaKey,
        /// Where the value is.
        sreg: Reg,
    },
    /// Translates an address.
    Nat(Nat),
    /// Makes numbers.
    Numgen {
        /// Where they go, 4 bytes in host order.
        dreg: Reg,
        /// How many different ones.
        modulus: u32,
        /// How they follow each other.
        kind: NumgenKind,
        /// The smallest.
        offset: u32,
    },
    /// An expression this crate cannot represent.
    ///
    /// Most can be written again as they were read.
    // KERNEL: a few are listed in a form that is refused, such as an `exthdr` that sets a TCP option
    // (EINVAL on 6.18).
    Other {
        /// Its name.
        name: Cow<'a, str>,
        /// Its attributes, encoded.
        raw: Cow<'a, [u8]>,
    },
    /// Loads bytes of the packet.
    Payload {
        /// From where the offset counts.
        base: PayloadBase,
        /// Bytes from there.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// Where they go.
        dreg: Reg,
    },
    /// Goes on only if a value is (not) between two others, both included.
    Range {
        /// Where the value is.
        sreg: Reg,
        /// Goes on if the value is *outside*.
        invert: bool,
        /// The smallest.
        from: Cow<'a, [u8]>,
        /// The largest.
        to: Cow<'a, [u8]>,
    },
    /// Translates the destination to this machine.
    Redirect {
        /// How a port is picked.
        flags: NatFlags,
        /// Registers with the first and last destination port, network order.
        ports: Option<(Reg, Reg)>,
    },
    /// Drops the packet and tells the sender.
    Reject {
        /// How.
        kind: RejectKind,
        /// The ICMP code; 0 for a reset.
        code: u8,
    },
    /// Loads a property of the socket the packet is for.
    Socket {
        /// Which.
        key: SocketKey,
        /// Where it goes.
        dreg: Reg,
        /// The level, for control groups.
        level: Option<u32>,
    },
    /// A target of iptables.
    Target(Xt<'a>),
    /// Hands the packet to a local transparent socket.
    Tproxy {
        /// The family of the address; [`Family::Unspec`] for both.
        family: Family,
        /// Register with the address.
        addr: Option<Reg>,
        /// Register with the port, network order.
        port: Option<Reg>,
    },
    /// Ends the rule with a verdict.
    Verdict(Verdict<'a>),
}

/// Adds, refreshes or deletes an element of a set from the packet path.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Dynset<'a> {
    /// The set; it must have been made with the flag for this.
    pub set: SetRef<'a>,
    /// What is done.
    pub op: DynsetOp,
    /// Where the key is.
    pub key: Reg,
    /// Where the value is, if the set is a map.
    pub data: Option<Reg>,
    /// Time to live in milliseconds; `None` for that of the set.
    pub timeout_ms: Option<u64>,
    /// Goes on only if the element was *not* added.
    pub invert: bool,
}

/// Computes a hash.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Hash {
    /// The function.
    pub kind: HashKind,
    /// Where the input is and its length in bytes; `None` for [`HashKind::SYMMETRIC`].
    pub input: Option<(Reg, u32)>,
    /// Where the hash goes, 4 bytes in host order.
    pub dreg: Reg,
    /// How many different values, at least 2.
    pub modulus: u32,
    /// The seed; `None` lets the kernel pick one.
    pub seed: Option<u32>,
    /// The smallest value.
    pub offset: u32,
}

/// A rate.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Limit {
    /// What is counted.
    pub kind: LimitKind,
    /// How many per unit of time.
    pub rate: u64,
    /// The unit of time in seconds.
    pub unit_secs: u64,
    /// How many at once beyond that.
    pub burst: u32,
    /// Goes on while the rate *is* exceeded.
    pub invert: bool,
}

/// Translates an address, a port or both.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Nat {
    /// Which address.
    pub kind: NatKind,
    /// The family of the address; matters in `inet` tables.
    pub family: Family,
    /// Registers with the first and last address.
    pub addr: Option<(Reg, Reg)>,
    /// Registers with the first and last port, network order.
    pub ports: Option<(Reg, Reg)>,
    /// How a choice is made.
    pub flags: NatFlags,
}

impl Nat {
    /// Translates the destination to the address (and port) in these registers.
    pub const fn dnat(family: Family, addr: Reg, port: Option<Reg>) -> Self {
        Self::to(NatKind::DNAT, family, addr, port)
    }

    /// Translates the source to the address (and port) in these registers.
    pub const fn snat(family: Family, addr: Reg, port: Option<Reg>) -> Self {
        Self::to(NatKind::SNAT, family, addr, port)
    }

    const fn to(kind: NatKind, family: Family, addr: Reg, port: Option<Reg>) -> Self {
        let ports = match port {
            Some(port) => Some((port, port)),
            None => None,
        };
        Self { kind, family, addr: Some((addr, addr)), ports, flags: NatFlags::NONE }
    }
}

/// A match or target of iptables: its name, revision and C structure.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Xt<'a> {
    /// The name, as after `-m` or `-j`.
    pub name: Cow<'a, str>,
    /// The revision of the structure.
    pub rev: u32,
    /// The structure, padded to a multiple of 8 bytes.
    // KERNEL: the length must be XT_ALIGN of the size the extension registered
    // (net/netfilter/nft_compat.c, v6.12). A dump has zeros beyond what is the user's.
    pub info: Cow<'a, [u8]>,
}

/// A set as a rule names it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct SetRef<'a> {
    /// Its name; for an anonymous set of the same transaction the template, such as `__set%d`.
    pub name: Cow<'a, str>,
    /// The number it has in the same transaction; needed if it is anonymous. Not in dumps.
    pub id: Option<u32>,
}

impl<'a> SetRef<'a> {
    /// An anonymous set of the same transaction.
    pub const fn anonymous(template: &'a str, id: u32) -> Self {
        Self { name: Cow::Borrowed(template), id: Some(id) }
    }
}

impl<'a> From<&'a str> for SetRef<'a> {
    fn from(name: &'a str) -> Self {
        Self { name: Cow::Borrowed(name), id: None }
    }
}

impl<'a> From<&'a String> for SetRef<'a> {
    fn from(name: &'a String) -> Self {
        name.as_str().into()
    }
}

impl SetRef<'_> {
    fn into_owned(self) -> SetRef<'static> {
        SetRef { name: text(self.name), id: self.id }
    }
}

impl Xt<'_> {
    fn into_owned(self) -> Xt<'static> {
        Xt { name: text(self.name), rev: self.rev, info: bytes(self.info) }
    }
}

impl Dynset<'_> {
    fn into_owned(self) -> Dynset<'static> {
        let Self { set, op, key, data, timeout_ms, invert } = self;
        Dynset { set: set.into_owned(), op, key, data, timeout_ms, invert }
    }
}

impl Expr<'_> {
    /// A copy that borrows nothing.
    pub fn into_owned(self) -> Expr<'static> {
        match self {
            Self::Bitwise { sreg, dreg, mask, xor } => {
                Expr::Bitwise { sreg, dreg, mask: bytes(mask), xor: bytes(xor) }
            }
            Self::Byteorder { sreg, dreg, op, len, size } => {
                Expr::Byteorder { sreg, dreg, op, len, size }
            }
            Self::Cmp { sreg, op, value } => Expr::Cmp { sreg, op, value: bytes(value) },
            Self::Counter { packets, bytes } => Expr::Counter { packets, bytes },
            Self::Ct { key, dreg, direction } => Expr::Ct { key, dreg, direction },
            Self::CtSet { key, sreg, direction } => Expr::CtSet { key, sreg, direction },
            Self::Dynset(dynset) => Expr::Dynset(dynset.into_owned()),
            Self::Fib { result, flags, dreg } => Expr::Fib { result, flags, dreg },
            Self::Hash(hash) => Expr::Hash(hash),
            Self::Immediate { dreg, value } => Expr::Immediate { dreg, value: bytes(value) },
            Self::Limit(limit) => Expr::Limit(limit),
            Self::Lookup { set, sreg, dreg, invert } => {
                Expr::Lookup { set: set.into_owned(), sreg, dreg, invert }
            }
            Self::Masquerade { flags, ports } => Expr::Masquerade { flags, ports },
            Self::Match(xt) => Expr::Match(xt.into_owned()),
            Self::Meta { key, dreg } => Expr::Meta { key, dreg },
            Self::MetaSet { key, sreg } => Expr::MetaSet { key, sreg },
            Self::Nat(nat) => Expr::Nat(nat),
            Self::Numgen { dreg, modulus, kind, offset } => {
                Expr::Numgen { dreg, modulus, kind, offset }
            }
            Self::Other { name, raw } => Expr::Other { name: text(name), raw: bytes(raw) },
            Self::Payload { base, offset, len, dreg } => Expr::Payload { base, offset, len, dreg },
            Self::Range { sreg, invert, from, to } => {
                Expr::Range { sreg, invert, from: bytes(from), to: bytes(to) }
            }
            Self::Redirect { flags, ports } => Expr::Redirect { flags, ports },
            Self::Reject { kind, code } => Expr::Reject { kind, code },
            Self::Socket { key, dreg, level } => Expr::Socket { key, dreg, level },
            Self::Target(xt) => Expr::Target(xt.into_owned()),
            Self::Tproxy { family, addr, port } => Expr::Tproxy { family, addr, port },
            Self::Verdict(verdict) => Expr::Verdict(verdict.into_owned()),
        }
    }
}

fn text(value: Cow<'_, str>) -> Cow<'static, str> {
    Cow::Owned(value.into_owned())
}

fn bytes(value: Cow<'_, [u8]>) -> Cow<'static, [u8]> {
    Cow::Owned(value.into_owned())
}

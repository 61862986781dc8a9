//! What rules look at: fields of packets and flows, one behind the other in registers.

use proxier_core::Family;
use proxier_netlink::nft::{
    CtDirection, CtKey, Expr, Hash, HashKind, MetaKey, NumgenKind, PayloadBase, Reg,
};
pub(crate) use proxier_netlink::spi::{family_name, nft_family};

/// One part of the key of a set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Field {
    /// Destination address.
    Daddr,
    /// Destination port.
    Dport,
    /// Always this number.
    Fixed(u32),
    /// Destination address of the connection's first packet, before translation.
    OriginalDaddr,
    /// Destination port, likewise.
    OriginalDport,
    /// Numbers below this one, one after the other.
    Next(u32),
    /// Transport protocol.
    Proto,
    /// A random number below this one.
    Random(u32),
    /// Source address.
    Saddr,
    /// 32 bits that depend on the source address and this seed; IPv6 only.
    SaddrHash(u32),
    /// A number below this one that depends on the source address.
    SourceHash(u32),
}

/// Result of a hash is below this.
const HASH_MODULUS: u32 = u32::MAX;
/// Any number will do, as long as every node has the same.
const SOURCE_SEED: u32 = 0x7072_6f78;

impl Field {
    /// Four-byte slots it takes in a register or key.
    pub(crate) const fn slots(self, family: Family) -> u8 {
        match self {
            Self::Daddr | Self::OriginalDaddr | Self::Saddr => match family {
                Family::V4 => 1,
                Family::V6 => 4,
            },
            Self::Dport
            | Self::Fixed(_)
            | Self::Next(_)
            | Self::OriginalDport
            | Self::Proto
            | Self::Random(_)
            | Self::SaddrHash(_)
            | Self::SourceHash(_) => 1,
        }
    }

    /// Appends what loads it into the slots from `slot` on.
    pub(crate) fn load(self, family: Family, slot: u8, exprs: &mut Vec<Expr<'static>>) {
        let dreg = Reg::slot(slot);
        let original = Some(CtDirection::ORIGINAL);
        let expr = match self {
            Self::Daddr => address(family, Side::Destination, dreg),
            Self::Dport => Expr::Payload { base: PayloadBase::TRANSPORT, offset: 2, len: 2, dreg },
            Self::Fixed(number) => {
                Expr::Numgen { dreg, modulus: 1, kind: NumgenKind::INCREMENTAL, offset: number }
            }
            Self::Next(modulus) => {
                Expr::Numgen { dreg, modulus, kind: NumgenKind::INCREMENTAL, offset: 0 }
            }
            Self::OriginalDaddr => {
                let key = match family {
                    Family::V4 => CtKey::DST_IP,
                    Family::V6 => CtKey::DST_IP6,
                };
                Expr::Ct { key, dreg, direction: original }
            }
            Self::OriginalDport => Expr::Ct { key: CtKey::PROTO_DST, dreg, direction: original },
            Self::Proto => Expr::Meta { key: MetaKey::L4PROTO, dreg },
            Self::Random(modulus) => {
                Expr::Numgen { dreg, modulus, kind: NumgenKind::RANDOM, offset: 0 }
            }
            Self::Saddr => address(family, Side::Source, dreg),
            Self::SaddrHash(seed) => hash(family, dreg, HASH_MODULUS, seed, exprs),
            Self::SourceHash(modulus) => hash(family, dreg, modulus, SOURCE_SEED, exprs),
        };
        exprs.push(expr);
    }

    /// As `nft` writes it.
    pub(crate) fn text(self, family: Family) -> String {
        let ip = family_name(family);
        match self {
            Self::Daddr => format!("{ip} daddr"),
            Self::Dport => "th dport".to_owned(),
            Self::Fixed(number) => number.to_string(),
            Self::OriginalDaddr => format!("ct original {ip} daddr"),
            Self::OriginalDport => "ct original proto-dst".to_owned(),
            Self::Next(modulus) => format!("numgen inc mod {modulus}"),
            Self::Proto => "meta l4proto".to_owned(),
            Self::Random(modulus) => format!("numgen random mod {modulus}"),
            Self::Saddr => format!("{ip} saddr"),
            Self::SaddrHash(seed) => {
                format!("jhash {ip} saddr mod {HASH_MODULUS} seed {seed:#x}")
            }
            Self::SourceHash(modulus) => {
                format!("jhash {ip} saddr mod {modulus} seed {SOURCE_SEED:#x}")
            }
        }
    }

    /// The field that an expression loads, if it is one of ours.
    #[expect(clippy::wildcard_enum_match_arm, reason = "no other expression loads a field")]
    pub(crate) fn of(expr: &Expr<'_>, family: Family) -> Option<(Self, Reg)> {
        let dreg = match expr {
            Expr::Payload { dreg, .. }
            | Expr::Numgen { dreg, .. }
            | Expr::Ct { dreg, .. }
            | Expr::Meta { dreg, .. }
            | Expr::Hash(Hash { dreg, .. }) => *dreg,
            _ => return None,
        };
        let candidates = [
            Self::Daddr,
            Self::Dport,
            Self::OriginalDaddr,
            Self::OriginalDport,
            Self::Proto,
            Self::Saddr,
            match expr {
                Expr::Numgen { modulus: 1, offset, kind: NumgenKind::INCREMENTAL, .. } => {
                    Self::Fixed(*offset)
                }
                Expr::Numgen { modulus, kind: NumgenKind::INCREMENTAL, .. } => Self::Next(*modulus),
                Expr::Numgen { modulus, .. } => Self::Random(*modulus),
                Expr::Hash(Hash { modulus, .. }) if *modulus != HASH_MODULUS => {
                    Self::SourceHash(*modulus)
                }
                Expr::Hash(Hash { seed: Some(seed), .. }) => Self::SaddrHash(*seed),
                _ => Self::Proto,
            },
        ];
        let slot = (0..16).find(|slot| Reg::slot(*slot) == dreg)?;
        let field = candidates.into_iter().find(|field| {
            let mut exprs = Vec::with_capacity(2);
            field.load(family, slot, &mut exprs);
            exprs.last() == Some(expr)
        })?;
        Some((field, dreg))
    }
}

/// An end of a packet's way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Destination,
    Source,
}

impl Side {
    /// Bytes of the header in front of the address.
    pub(crate) const fn offset(self, family: Family) -> u32 {
        match (family, self) {
            (Family::V4, Self::Source) => 12,
            (Family::V4, Self::Destination) => 16,
            (Family::V6, Self::Source) => 8,
            (Family::V6, Self::Destination) => 24,
        }
    }
}

fn address(family: Family, side: Side, dreg: Reg) -> Expr<'static> {
    let len = match family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    Expr::Payload { base: PayloadBase::NETWORK, offset: side.offset(family), len, dreg }
}

/// Hashes the source address.
fn hash(
    family: Family,
    dreg: Reg,
    modulus: u32,
    seed: u32,
    exprs: &mut Vec<Expr<'static>>,
) -> Expr<'static> {
    // Behind all keys that hold hashes.
    let spare = Reg::slot(8);
    exprs.push(address(family, Side::Source, spare));
    let bytes = u32::from(Field::Saddr.slots(family)) * 4;
    Expr::Hash(Hash {
        kind: HashKind::JENKINS,
        input: Some((spare, bytes)),
        dreg,
        modulus,
        seed: Some(seed),
        offset: 0,
    })
}

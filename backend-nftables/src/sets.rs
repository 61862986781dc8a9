//! What each set holds: the types of its keys and values, for the kernel and for `nft`.

use proxier_core::Family;
use proxier_netlink::nft::{DataType, SetDump, SetFlags, SetSpec, Transaction};

use crate::{
    field::{Field, nft_family},
    object::{Says, SetName, Space},
};

/// The most clients that are remembered in one pool's map, over all Services.
// KERNEL: a map that rules write to has all its buckets from the start, 8 bytes each
// (net/netfilter/nft_set_hash.c nft_rhash_init, v6.12): 4 MiB.
const MAX_CLIENTS: u32 = 262_144;

/// What a set is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Layout {
    /// The parts of the key, as packets have them.
    pub(crate) fields: Vec<Field>,
    data: Data,
    interval: bool,
    dynamic: bool,
    counted: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Data {
    Address,
    Endpoint,
    None,
    Verdict,
}

/// The fields that frontends of a space are known by.
pub(crate) const fn frontend(space: Space) -> &'static [Field] {
    match space {
        Space::NodePort => &[Field::Proto, Field::Dport],
        Space::Service => &[Field::Daddr, Field::Proto, Field::Dport],
    }
}

/// The fields that a client is known by to session affinity.
// The dynset statement of nft 1.0.6 takes keys of 16 bytes and no more.
pub(crate) const fn client(family: Family) -> &'static [Field] {
    match family {
        Family::V4 => &[Field::Saddr],
        Family::V6 => &[Field::SaddrHash(1), Field::SaddrHash(2)],
    }
}

impl SetName {
    pub(crate) fn layout(self, family: Family) -> Layout {
        let id = [Field::Fixed(0), Field::Fixed(0)];
        let plain = |fields: &[Field]| Layout {
            fields: fields.to_vec(),
            data: Data::None,
            interval: false,
            dynamic: false,
            counted: false,
        };
        let map = |fields: &[Field], data| Layout { data, ..plain(fields) };
        match self {
            Self::Affinity(_) => {
                let fields = [client(family), &id].concat();
                Layout { dynamic: true, ..map(&fields, Data::Address) }
            }
            Self::Addresses(_) | Self::NodeAddresses => plain(&[Field::Daddr]),
            Self::Endpoints(space, _) => {
                let fields = [frontend(space), &[Field::Random(2)]].concat();
                map(&fields, Data::Endpoint)
            }
            Self::Frontends(space, Says::Counted) => {
                Layout { counted: true, ..plain(frontend(space)) }
            }
            Self::Frontends(space, _) | Self::Size(space, _, _) => plain(frontend(space)),
            Self::Hairpin => plain(&[Field::Saddr, Field::Daddr]),
            Self::Members(_) => plain(&[&[Field::Daddr][..], &id].concat()),
            Self::Remember(space) | Self::Spread(space, _) | Self::Sticky(space, _) => {
                map(frontend(space), Data::Verdict)
            }
            Self::Sources(space) => {
                let fields = [&[Field::Saddr][..], frontend(space)].concat();
                Layout { interval: true, ..plain(&fields) }
            }
        }
    }
}

impl Layout {
    /// Slots of the key.
    pub(crate) fn slots(&self, family: Family) -> u8 {
        self.fields.iter().map(|field| field.slots(family)).sum()
    }

    fn key(&self, family: Family) -> DataType {
        let types: Vec<_> = self.fields.iter().map(|field| data_type(*field, family)).collect();
        DataType::concat(&types)
    }

    fn data(&self, family: Family) -> Option<DataType> {
        let address = data_type(Field::Daddr, family);
        match self.data {
            Data::Address => Some(address),
            Data::Endpoint => Some(DataType::concat(&[address, DataType::PORT])),
            Data::None => None,
            Data::Verdict => Some(DataType::VERDICT),
        }
    }

    fn flags(&self) -> SetFlags {
        let mut flags = SetFlags::NONE;
        if self.data != Data::None {
            flags = flags | SetFlags::MAP;
        }
        if self.interval {
            flags = flags | SetFlags::CONCAT | SetFlags::INTERVAL;
        }
        if self.dynamic {
            flags = flags | SetFlags::EVAL | SetFlags::TIMEOUT;
        }
        flags
    }

    /// Bytes of each field.
    fn field_bytes(&self, family: Family) -> Vec<u32> {
        self.fields.iter().map(|field| data_type(*field, family).len).collect()
    }

    /// What `nft` needs to list numbers without a type of their own; empty where it needs nothing.
    fn userdata(&self, family: Family) -> Vec<u8> {
        let has_numbers =
            self.fields.iter().any(|field| data_type(*field, family) == DataType::integer(4));
        if !has_numbers {
            return Vec::new();
        }
        let mut out = Vec::new();
        put(&mut out, KEY_TYPEOF, &type_of(&self.fields, family));
        let data: &[Field] = match self.data {
            Data::Address => &[Field::Daddr],
            Data::Endpoint => &[Field::Daddr, Field::Dport],
            Data::None | Data::Verdict => &[],
        };
        if !data.is_empty() {
            put(&mut out, DATA_TYPEOF, &type_of(data, family));
        }
        out
    }
}

const fn data_type(field: Field, family: Family) -> DataType {
    match field {
        Field::Daddr | Field::OriginalDaddr | Field::Saddr => match family {
            Family::V4 => DataType::IPV4,
            Family::V6 => DataType::IPV6,
        },
        Field::Dport | Field::OriginalDport => DataType::PORT,
        Field::Fixed(_)
        | Field::Next(_)
        | Field::Random(_)
        | Field::SaddrHash(_)
        | Field::SourceHash(_) => DataType::integer(4),
        Field::Proto => DataType::L4PROTO,
    }
}

/// Makes a set.
pub(crate) fn make(tx: &mut Transaction, table: &str, family: Family, set: SetName) {
    let layout = set.layout(family);
    let name = set.to_string();
    let (key, bytes) = (layout.key(family), layout.field_bytes(family));
    let userdata = layout.userdata(family);
    let kernel = nft_family(family);
    let mut spec = match layout.data(family) {
        Some(data) => SetSpec::map(kernel, table, &name, key, data),
        None => SetSpec::set(kernel, table, &name, key),
    };
    spec = spec.flags(layout.flags());
    if layout.interval {
        spec = spec.interval_fields(&bytes);
    }
    if layout.counted {
        spec = spec.counted();
    }
    if layout.dynamic {
        spec = spec.size(MAX_CLIENTS);
    }
    if !userdata.is_empty() {
        spec = spec.userdata(&userdata);
    }
    tx.new_set(spec);
}

/// Says whether a set of the kernel is what it should be.
pub(crate) fn is_as_made(dump: &SetDump, family: Family, set: SetName) -> bool {
    let layout = set.layout(family);
    let (key, data) = (layout.key(family), layout.data(family));
    let same_data = match (dump.data, data) {
        // KERNEL: the length of a verdict is not listed.
        (Some(found), Some(wanted)) => found.number == wanted.number,
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    };
    dump.key == key && same_data && dump.flags == layout.flags() && dump.counted == layout.counted
}

// The bytes user space keeps with a set so that it can be listed as `typeof`. The numbers are those of
// `libnftnl/udata.h` at 1.2.4 and of `enum expr_types`, `udata_*` in nft 1.0.6, which are their ABI.
const KEY_TYPEOF: u8 = 3;
const DATA_TYPEOF: u8 = 4;
const EXPR_PAYLOAD: u32 = 7;
const EXPR_META: u32 = 9;
const EXPR_CONCAT: u32 = 13;
const EXPR_NUMGEN: u32 = 23;
const PROTO_TH: u32 = 11;
const PROTO_IP: u32 = 12;
const PROTO_IP6: u32 = 13;
const META_L4PROTO: u32 = 16;

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(value);
}

fn expression(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() + 8);
    put(&mut out, 0, &kind.to_ne_bytes());
    put(&mut out, 1, data);
    out
}

fn numbers(values: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, value) in (0..).zip(values) {
        put(&mut out, kind, &value.to_ne_bytes());
    }
    out
}

/// An example of an expression whose type is meant.
fn type_of(fields: &[Field], family: Family) -> Vec<u8> {
    let each = fields.iter().map(|field| match (field, family) {
        (Field::Saddr, Family::V4) => expression(EXPR_PAYLOAD, &numbers(&[PROTO_IP, 11])),
        (Field::Daddr | Field::OriginalDaddr, Family::V4) => {
            expression(EXPR_PAYLOAD, &numbers(&[PROTO_IP, 12]))
        }
        (Field::Saddr, Family::V6) => expression(EXPR_PAYLOAD, &numbers(&[PROTO_IP6, 8])),
        (Field::Daddr | Field::OriginalDaddr, Family::V6) => {
            expression(EXPR_PAYLOAD, &numbers(&[PROTO_IP6, 9]))
        }
        (Field::Dport | Field::OriginalDport, _) => {
            expression(EXPR_PAYLOAD, &numbers(&[PROTO_TH, 2]))
        }
        (Field::Proto, _) => expression(EXPR_META, &numbers(&[META_L4PROTO])),
        (Field::Fixed(_) | Field::Next(_) | Field::SaddrHash(_) | Field::SourceHash(_), _) => {
            expression(EXPR_NUMGEN, &numbers(&[0, 2, 0]))
        }
        (Field::Random(_), _) => expression(EXPR_NUMGEN, &numbers(&[1, 2, 0])),
    });
    let each: Vec<_> = each.collect();
    if let [only] = each.as_slice() {
        return only.clone();
    }
    let mut parts = Vec::new();
    for (index, part) in (0..).zip(&each) {
        put(&mut parts, index, part);
    }
    expression(EXPR_CONCAT, &parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_fits_what_the_kernel_takes() {
        for family in Family::ALL {
            for set in SetName::fixed() {
                let layout = set.layout(family);
                assert!(layout.key(family).len <= 64, "{set}");
                assert!(layout.userdata(family).len() <= 256, "{set}");
                assert_eq!(layout.key(family).len, u32::from(layout.slots(family)) * 4, "{set}");
            }
        }
    }
}

//! Sets, and their elements as bytes and back. Pure.

use std::{
    fmt::{self, Display},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, WayIn},
};

use super::Way;
use crate::nft::{DataType, SetDump, SetFlags};

/// What the keys of a set are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Addresses.
    Addresses,
    /// Frontends of one form.
    Frontends(Way),
    /// Addresses, twice: as source and as destination.
    Hairpin,
    /// Marks.
    Marks,
    /// Frontends of one form, and networks of sources.
    Sources(Way),
}

impl Kind {
    /// The type of its keys.
    #[must_use]
    pub fn key(self, family: Family) -> DataType {
        let address = match family {
            Family::V4 => DataType::IPV4,
            Family::V6 => DataType::IPV6,
        };
        let (protocol, port) = (DataType::L4PROTO, DataType::PORT);
        match self {
            Self::Addresses => address,
            Self::Frontends(Way::Address) => DataType::concat(&[address, protocol, port]),
            Self::Frontends(Way::NodePort) => DataType::concat(&[protocol, port]),
            Self::Hairpin => DataType::concat(&[address, address]),
            Self::Marks => DataType::MARK,
            Self::Sources(Way::Address) => DataType::concat(&[address, protocol, port, address]),
            Self::Sources(Way::NodePort) => DataType::concat(&[protocol, port, address]),
        }
    }

    /// For keys that are intervals: the bytes of their fields.
    #[must_use]
    pub const fn fields(self, family: Family) -> Option<&'static [u32]> {
        match (self, family) {
            (Self::Sources(Way::Address), Family::V4) => Some(&[4, 1, 2, 4]),
            (Self::Sources(Way::Address), Family::V6) => Some(&[16, 1, 2, 16]),
            (Self::Sources(Way::NodePort), Family::V4) => Some(&[1, 2, 4]),
            (Self::Sources(Way::NodePort), Family::V6) => Some(&[1, 2, 16]),
            _ => None,
        }
    }

    /// The shape of such a set, or map to marks.
    #[must_use]
    pub fn shape(self, family: Family, is_map: bool) -> Shape {
        let (key, intervals) = (self.key(family), self.fields(family).is_some());
        Shape { key_type: key.number, key_bytes: key.len, intervals, is_map }
    }

    /// The first and, for intervals, the last key of an element.
    #[must_use]
    pub fn pack(self, item: &Item) -> (Vec<u8>, Option<Vec<u8>>) {
        match item {
            Item::Address(ip) if self == Self::Hairpin => (ip_bytes(*ip).repeat(2), None),
            Item::Address(ip) => (ip_bytes(*ip), None),
            Item::Allowed(key, net) => {
                let mut first = frontend(key);
                let mut last = first.clone();
                first.extend(ip_bytes(net.network()));
                last.extend(ip_bytes(net.broadcast()));
                (first, Some(last))
            }
            Item::Frontend(key) => (frontend(key), None),
            Item::Mark(_, mark) => (mark.to_ne_bytes().to_vec(), None),
        }
    }

    /// What an element means; `None` when nobody of us would have made it.
    #[must_use]
    pub fn unpack(self, family: Family, first: &[u8], last: Option<&[u8]>) -> Option<Item> {
        match self {
            Self::Addresses => {
                let (ip, rest) = take_ip(family, first)?;
                rest.is_empty().then_some(Item::Address(ip))
            }
            Self::Frontends(way) => {
                let (key, rest) = take_frontend(family, way, first)?;
                rest.is_empty().then_some(Item::Frontend(key))
            }
            Self::Hairpin => {
                let (ip, rest) = take_ip(family, first)?;
                (take_ip(family, rest)? == (ip, &[])).then_some(Item::Address(ip))
            }
            Self::Marks => Some(Item::Mark(family, u32::from_ne_bytes(first.try_into().ok()?))),
            Self::Sources(way) => {
                let (key, rest) = take_frontend(family, way, first)?;
                let (from, _) = take_ip(family, rest)?;
                let (_, rest) = take_frontend(family, way, last?)?;
                let (to, _) = take_ip(family, rest)?;
                Some(Item::Allowed(key, net(from, to)?))
            }
        }
    }
}

/// The shape of a set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shape {
    /// The number of the key's type.
    pub key_type: u32,
    /// Bytes of the key.
    pub key_bytes: u32,
    /// Elements are intervals.
    pub intervals: bool,
    /// Elements carry a mark.
    pub is_map: bool,
}

impl Shape {
    /// The shape of a set as it is.
    pub(super) fn of(set: &SetDump) -> Self {
        let intervals = set.flags.contains(SetFlags::INTERVAL);
        let is_map = set.flags.contains(SetFlags::MAP);
        Self { key_type: set.key.number, key_bytes: set.key.len, intervals, is_map }
    }
}

impl Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.intervals { "intervals" } else { "elements" };
        writeln!(f, "{what} of {} bytes, type {}", self.key_bytes, self.key_type)
    }
}

/// What an element of a set is.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Item {
    /// An address.
    Address(IpAddr),
    /// A frontend and sources that may use it.
    Allowed(FrontendKey, IpNet),
    /// A frontend.
    Frontend(FrontendKey),
    /// A mark.
    Mark(Family, u32),
}

impl Item {
    /// The family of the table it is in.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::Address(ip) => Family::of(*ip),
            Self::Allowed(key, _) | Self::Frontend(key) => match key.way_in {
                WayIn::Address(ip) => Family::of(ip),
                WayIn::Node(family) => family,
            },
            Self::Mark(family, _) => *family,
        }
    }
}

impl Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "{ip}"),
            Self::Allowed(key, net) => write!(f, "{key} from {net}"),
            Self::Frontend(key) => write!(f, "{key}"),
            Self::Mark(_, mark) => write!(f, "{mark:#x}"),
        }
    }
}

/// The bytes of an address.
#[must_use]
pub fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn frontend(key: &FrontendKey) -> Vec<u8> {
    let mut bytes = match key.way_in {
        WayIn::Address(ip) => ip_bytes(ip),
        WayIn::Node(_) => Vec::new(),
    };
    // Each field is padded to four bytes.
    let [high, low] = key.port.get().to_be_bytes();
    bytes.extend([key.protocol.number(), 0, 0, 0, high, low, 0, 0]);
    bytes
}

fn take_ip(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => {
            let (ip, rest) = bytes.split_first_chunk::<4>()?;
            Some((Ipv4Addr::from(*ip).into(), rest))
        }
        Family::V6 => {
            let (ip, rest) = bytes.split_first_chunk::<16>()?;
            Some((Ipv6Addr::from(*ip).into(), rest))
        }
    }
}

fn take_frontend(family: Family, way: Way, bytes: &[u8]) -> Option<(FrontendKey, &[u8])> {
    let (way_in, rest) = match way {
        Way::Address => {
            let (ip, rest) = take_ip(family, bytes)?;
            (WayIn::Address(ip), rest)
        }
        Way::NodePort => (WayIn::Node(family), bytes),
    };
    let ([protocol, _, _, _, high, low, _, _], rest) = rest.split_first_chunk::<8>()?;
    let port = u16::from_be_bytes([*high, *low]).try_into().ok()?;
    let protocol = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .find(|it| it.number() == *protocol)?;
    Some((FrontendKey { way_in, port, protocol }, rest))
}

/// The network from its first to its last address.
fn net(from: IpAddr, to: IpAddr) -> Option<IpNet> {
    let net = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let host = (from.to_bits() ^ to.to_bits()).count_ones();
            IpNet::V4(Ipv4Net::new(from, u8::try_from(32 - host).ok()?).ok()?)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let host = (from.to_bits() ^ to.to_bits()).count_ones();
            IpNet::V6(Ipv6Net::new(from, u8::try_from(128 - host).ok()?).ok()?)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    (net.network() == from && net.broadcast() == to).then_some(net)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(way_in: WayIn) -> FrontendKey {
        FrontendKey { way_in, port: 8443.try_into().unwrap(), protocol: Protocol::Udp }
    }

    #[test]
    fn what_is_packed_can_be_unpacked() {
        for (family, ip, nets) in [
            (Family::V4, "10.97.0.21", ["192.0.2.0/24", "192.0.2.7/32", "0.0.0.0/0"]),
            (Family::V6, "fd41:97::21", ["2001:db8::/32", "2001:db8::7/128", "::/0"]),
        ] {
            let ip = ip.parse().unwrap();
            let address = Item::Address(ip);
            let mut items = vec![
                (Kind::Addresses, address.clone()),
                (Kind::Hairpin, address),
                (Kind::Marks, Item::Mark(family, 0x5000_7591)),
            ];
            for way_in in [WayIn::Address(ip), WayIn::Node(family)] {
                let key = key(way_in);
                items.push((Kind::Frontends(Way::of(&key)), Item::Frontend(key)));
                let nets = nets.map(|net| Item::Allowed(key, net.parse().unwrap()));
                items.extend(nets.map(|item| (Kind::Sources(Way::of(&key)), item)));
            }
            for (kind, item) in items {
                let (first, last) = kind.pack(&item);
                let bytes = usize::try_from(kind.key(family).len).unwrap();
                assert_eq!(first.len(), bytes, "{kind:?}");
                assert_eq!(last.is_some(), kind.fields(family).is_some(), "{kind:?}");
                assert_eq!(item.family(), family);
                assert_eq!(kind.unpack(family, &first, last.as_deref()), Some(item), "{kind:?}");
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_not_understood() {
        let unpack = |bytes| Kind::Frontends(Way::Address).unpack(Family::V4, bytes, None);
        assert_eq!(unpack(&[10, 0, 0, 1, 47, 0, 0, 0, 0, 80, 0, 0]), None);
        assert_eq!(unpack(&[10, 0, 0, 1]), None);
        assert_eq!(net("10.0.0.1".parse().unwrap(), "10.0.0.4".parse().unwrap()), None);
    }
}

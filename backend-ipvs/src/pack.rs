//! Elements as bytes, and back. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, WayIn},
};
use proxier_netlink::nft::{DataType, SetFlags};

use crate::object::{Item, SetName, Shape, Way};

/// The fields of [`SetName::Allowed`], in bytes.
const V4_FIELDS: &[u32] = &[4, 1, 2, 4];
const V6_FIELDS: &[u32] = &[16, 1, 2, 16];
const V4_PORT_FIELDS: &[u32] = &[1, 2, 4];
const V6_PORT_FIELDS: &[u32] = &[1, 2, 16];

/// The bytes of an address.
pub(crate) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

const fn address_type(family: Family) -> DataType {
    match family {
        Family::V4 => DataType::IPV4,
        Family::V6 => DataType::IPV6,
    }
}

/// The type of a set's keys and, for sets of intervals, their fields.
pub(crate) fn layout(family: Family, set: SetName) -> (DataType, &'static [u32]) {
    let address = address_type(family);
    let (protocol, port) = (DataType::L4PROTO, DataType::PORT);
    match set {
        SetName::Addresses | SetName::NodeAddresses => (address, &[]),
        SetName::Hairpin => (DataType::concat(&[address, address]), &[]),
        SetName::Owners => (DataType::MARK, &[]),
        SetName::Allowed(Way::Address) => {
            let fields = if family == Family::V4 { V4_FIELDS } else { V6_FIELDS };
            (DataType::concat(&[address, protocol, port, address]), fields)
        }
        SetName::Allowed(Way::NodePort) => {
            let fields = if family == Family::V4 { V4_PORT_FIELDS } else { V6_PORT_FIELDS };
            (DataType::concat(&[protocol, port, address]), fields)
        }
        SetName::Dropped(Way::Address, _)
        | SetName::Fenced(Way::Address)
        | SetName::Frontends(Way::Address)
        | SetName::Marks(Way::Address, _)
        | SetName::Masquerade(Way::Address, _)
        | SetName::Rejected(Way::Address, _) => (DataType::concat(&[address, protocol, port]), &[]),
        SetName::Dropped(Way::NodePort, _)
        | SetName::Fenced(Way::NodePort)
        | SetName::Frontends(Way::NodePort)
        | SetName::Marks(Way::NodePort, _)
        | SetName::Masquerade(Way::NodePort, _)
        | SetName::Rejected(Way::NodePort, _) => (DataType::concat(&[protocol, port]), &[]),
    }
}

/// The shape of a set as it should be.
pub(crate) fn shape(family: Family, set: SetName) -> Shape {
    let (key, fields) = layout(family, set);
    let (intervals, is_map) = (!fields.is_empty(), set.is_map());
    Shape { key_type: key.number, key_bytes: key.len, intervals, is_map }
}

/// The shape of a set as it is.
pub(crate) fn shape_of(key: DataType, flags: SetFlags) -> Shape {
    let intervals = flags.contains(SetFlags::INTERVAL);
    let is_map = flags.contains(SetFlags::MAP);
    Shape { key_type: key.number, key_bytes: key.len, intervals, is_map }
}

/// The first and, for intervals, the last key of an element.
pub(crate) fn pack(set: SetName, item: &Item) -> (Vec<u8>, Option<Vec<u8>>) {
    match item {
        Item::Address(ip) if set == SetName::Hairpin => (ip_bytes(*ip).repeat(2), None),
        Item::Mark(_, mark) => (mark.to_ne_bytes().to_vec(), None),
        Item::Address(ip) => (ip_bytes(*ip), None),
        Item::Frontend(key) => (frontend(key), None),
        Item::Allowed(key, net) => {
            let mut first = frontend(key);
            let mut last = first.clone();
            first.extend(ip_bytes(net.network()));
            last.extend(ip_bytes(net.broadcast()));
            (first, Some(last))
        }
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

/// What an element of a set means; `None` when this mode would not have made it.
pub(crate) fn unpack(
    family: Family,
    set: SetName,
    first: &[u8],
    last: Option<&[u8]>,
) -> Option<Item> {
    match set {
        SetName::Hairpin => {
            let (ip, rest) = take_ip(family, first)?;
            (take_ip(family, rest)? == (ip, &[])).then_some(Item::Address(ip))
        }
        SetName::Owners => Some(Item::Mark(family, u32::from_ne_bytes(first.try_into().ok()?))),
        SetName::Addresses | SetName::NodeAddresses => {
            let (ip, rest) = take_ip(family, first)?;
            rest.is_empty().then_some(Item::Address(ip))
        }
        SetName::Allowed(way) => {
            let (key, rest) = take_frontend(family, way, first)?;
            let (from, _) = take_ip(family, rest)?;
            let (_, rest) = take_frontend(family, way, last?)?;
            let (to, _) = take_ip(family, rest)?;
            Some(Item::Allowed(key, net(from, to)?))
        }
        SetName::Dropped(way, _)
        | SetName::Fenced(way)
        | SetName::Frontends(way)
        | SetName::Marks(way, _)
        | SetName::Masquerade(way, _)
        | SetName::Rejected(way, _) => {
            let (key, rest) = take_frontend(family, way, first)?;
            rest.is_empty().then_some(Item::Frontend(key))
        }
    }
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
                (SetName::NodeAddresses, address.clone()),
                (SetName::Hairpin, address),
                (SetName::Owners, Item::Mark(family, 0x5000_7591)),
            ];
            for way_in in [WayIn::Address(ip), WayIn::Node(family)] {
                let key = key(way_in);
                items.push((SetName::Frontends(Way::of(&key)), Item::Frontend(key)));
                let nets = nets.map(|net| Item::Allowed(key, net.parse().unwrap()));
                items.extend(nets.map(|item| (SetName::Allowed(Way::of(&key)), item)));
            }
            for (set, item) in items {
                let (first, last) = pack(set, &item);
                let (layout, fields) = layout(family, set);
                assert_eq!(first.len(), usize::try_from(layout.len).unwrap(), "{set}");
                assert_eq!(last.is_some(), !fields.is_empty(), "{set}");
                assert_eq!(unpack(family, set, &first, last.as_deref()), Some(item), "{set}");
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_not_understood() {
        let set = SetName::Frontends(Way::Address);
        assert_eq!(unpack(Family::V4, set, &[10, 0, 0, 1, 47, 0, 0, 0, 0, 80, 0, 0], None), None);
        assert_eq!(unpack(Family::V4, set, &[10, 0, 0, 1], None), None);
        assert_eq!(net("10.0.0.1".parse().unwrap(), "10.0.0.4".parse().unwrap()), None);
    }
}

//! Elements as the bytes of keys and values, as the kernel has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, WayIn},
};

use crate::object::{Element, Endpoint, PortId, SetName, Space};

/// Appends the key of an element.
pub(crate) fn put_key(out: &mut Vec<u8>, element: &Element) {
    match element {
        Element::Endpoint { frontend, slot, .. } => {
            put_frontend(out, frontend);
            out.extend_from_slice(&slot.to_ne_bytes());
        }
        Element::Frontend { frontend, .. }
        | Element::Size { frontend, .. }
        | Element::Remember(frontend)
        | Element::Spread { frontend, .. }
        | Element::Sticky { frontend, .. } => put_frontend(out, frontend),
        Element::Source(source) => {
            put_ip(out, source.1.network());
            put_frontend(out, &source.0);
        }
        Element::Hairpin(ip) => {
            put_ip(out, *ip);
            put_ip(out, *ip);
        }
        Element::Member { id, ip, .. } => {
            put_ip(out, *ip);
            id.0.iter().for_each(|word| out.extend_from_slice(&word.to_ne_bytes()));
        }
        Element::Address { ip, .. } | Element::NodeAddress(ip) => put_ip(out, *ip),
        Element::Odd { key, .. } => out.extend_from_slice(key),
    }
}

/// Appends the end of an interval; nothing if the element is none.
pub(crate) fn put_key_end(out: &mut Vec<u8>, element: &Element) {
    if let Element::Source(source) = element {
        put_ip(out, source.1.broadcast());
        put_frontend(out, &source.0);
    }
}

/// Appends an endpoint as the value of an element.
pub(crate) fn put_endpoint(out: &mut Vec<u8>, endpoint: Endpoint) {
    put_ip(out, endpoint.ip);
    put_port(out, endpoint.port);
}

fn put_frontend(out: &mut Vec<u8>, frontend: &FrontendKey) {
    if let WayIn::Address(ip) = frontend.way_in {
        put_ip(out, ip);
    }
    out.extend_from_slice(&[frontend.protocol.number(), 0, 0, 0]);
    put_port(out, frontend.port.get());
}

fn put_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
        IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
    }
}

fn put_port(out: &mut Vec<u8>, port: u16) {
    out.extend_from_slice(&port.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
}

/// The element with this key, if it is one that we could have written.
pub(crate) fn element(
    set: SetName,
    family: Family,
    key: &[u8],
    key_end: Option<&[u8]>,
) -> Option<Element> {
    let mut reader = Reader { family, rest: key };
    let element = match set {
        SetName::Affinity(_) => return None,
        SetName::Addresses(kind) => Element::Address { kind, ip: reader.ip()? },
        SetName::Endpoints(space, pool) => {
            let frontend = reader.frontend(space)?;
            Element::Endpoint { pool, frontend, slot: reader.number()? }
        }
        SetName::Frontends(space, says) => {
            Element::Frontend { says, frontend: reader.frontend(space)? }
        }
        SetName::Hairpin => {
            let ip = reader.ip()?;
            (reader.ip()? == ip).then_some(Element::Hairpin(ip))?
        }
        SetName::Members(pool) => {
            let ip = reader.ip()?;
            let id = PortId([reader.number()?, reader.number()?]);
            Element::Member { pool, id, ip }
        }
        SetName::NodeAddresses => Element::NodeAddress(reader.ip()?),
        SetName::Remember(space) => Element::Remember(reader.frontend(space)?),
        SetName::Size(space, pool, size) => {
            Element::Size { pool, size, frontend: reader.frontend(space)? }
        }
        SetName::Sources(space) => {
            let first = reader.ip()?;
            let frontend = reader.frontend(space)?;
            let mut end = Reader { family, rest: key_end? };
            let net = network(first, end.ip()?)?;
            (end.frontend(space)? == frontend).then_some(())?;
            Element::Source(Box::new((frontend, net)))
        }
        SetName::Spread(space, pool) => Element::Spread { pool, frontend: reader.frontend(space)? },
        SetName::Sticky(space, pool) => Element::Sticky { pool, frontend: reader.frontend(space)? },
    };
    reader.rest.is_empty().then_some(element)
}

/// Where an affinity leads: the Service port and address that its key and value name.
pub(crate) fn affinity(family: Family, key: &[u8], value: &[u8]) -> Option<(PortId, IpAddr)> {
    let words = key.get(key.len().checked_sub(8)?..)?;
    let mut words = Reader { family, rest: words };
    let id = PortId([words.number()?, words.number()?]);
    Some((id, Reader { family, rest: value }.ip()?))
}

/// The endpoint with this value.
pub(crate) fn endpoint(family: Family, value: &[u8]) -> Option<Endpoint> {
    let mut reader = Reader { family, rest: value };
    let endpoint = Endpoint { ip: reader.ip()?, port: reader.port()? };
    reader.rest.is_empty().then_some(endpoint)
}

/// The network between two addresses, if it is one.
fn network(first: IpAddr, last: IpAddr) -> Option<IpNet> {
    let (bits, width) = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => ((a.to_bits() ^ b.to_bits()).leading_zeros(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => ((a.to_bits() ^ b.to_bits()).leading_zeros(), 128),
        _ => return None,
    };
    let net = IpNet::new(first, u8::try_from(bits.min(width)).ok()?).ok()?;
    (net.network() == first && net.broadcast() == last).then_some(net)
}

struct Reader<'a> {
    family: Family,
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    fn ip(&mut self) -> Option<IpAddr> {
        Some(match self.family {
            Family::V4 => Ipv4Addr::from(self.take::<4>()?).into(),
            Family::V6 => Ipv6Addr::from(self.take::<16>()?).into(),
        })
    }

    fn number(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn port(&mut self) -> Option<u16> {
        let [high, low, ..] = self.take::<4>()?;
        Some(u16::from_be_bytes([high, low]))
    }

    fn frontend(&mut self, space: Space) -> Option<FrontendKey> {
        let way_in = match space {
            Space::NodePort => WayIn::Node(self.family),
            Space::Service => WayIn::Address(self.ip()?),
        };
        let [number, ..] = self.take::<4>()?;
        let protocol = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|protocol| protocol.number() == number)?;
        Some(FrontendKey { way_in, port: self.port()?.try_into().ok()?, protocol })
    }
}

#[cfg(test)]
mod tests {
    use proxier_core::ir::Pool;

    use super::*;
    use crate::object::{AddressKind, Says, Size};

    #[test]
    fn what_is_written_is_read_back() {
        for (family, ip, net) in
            [(Family::V4, "10.96.0.1", "192.0.2.48/28"), (Family::V6, "fd00::1", "2001:db8::/33")]
        {
            let ip: IpAddr = ip.parse().unwrap();
            let port = 443.try_into().unwrap();
            let id = PortId([0xdead_beef, 1]);
            let pool = Pool::Local;
            for way_in in [WayIn::Address(ip), WayIn::Node(family)] {
                let frontend = FrontendKey { way_in, port, protocol: Protocol::Sctp };
                for element in [
                    Element::Endpoint { pool, frontend, slot: 70_000 },
                    Element::Frontend { says: Says::Fenced, frontend },
                    Element::Source(Box::new((frontend, net.parse().unwrap()))),
                    Element::Source(Box::new((frontend, IpNet::new(ip, 0).unwrap().trunc()))),
                    Element::Hairpin(ip),
                    Element::Member { pool, id, ip },
                    Element::Size { pool, size: Size::of(3), frontend },
                    Element::Remember(frontend),
                    Element::Spread { pool, frontend },
                    Element::Sticky { pool, frontend },
                    Element::Address { kind: AddressKind::External, ip },
                    Element::NodeAddress(ip),
                ] {
                    let (mut key, mut end) = (Vec::new(), Vec::new());
                    put_key(&mut key, &element);
                    put_key_end(&mut end, &element);
                    let set = element.set();
                    assert_eq!(key.len(), usize::from(set.layout(family).slots(family)) * 4);
                    let read = super::element(set, family, &key, Some(&end));
                    assert_eq!(read.as_ref(), Some(&element));
                    key.push(0);
                    assert_eq!(super::element(set, family, &key, Some(&end)), None);
                }
            }
            let mut value = Vec::new();
            put_endpoint(&mut value, Endpoint { ip, port: 8080 });
            assert_eq!(endpoint(family, &value), Some(Endpoint { ip, port: 8080 }));
        }
    }
}

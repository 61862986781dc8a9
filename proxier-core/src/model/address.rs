//! Reading addresses as leniently as kube-proxy does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Reads an address; octets of IPv4 may carry leading zeros and are decimal nevertheless.
///
/// An IPv4-mapped IPv6 address is IPv4, as in Go's `net.ParseIP`.
// K8S: apimachinery's lenient parser keeps manifests working that predate Go 1.17, which made
// leading zeros an error (https://github.com/kubernetes/kubernetes/issues/100895).
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if text.contains(':') {
        return text.parse::<Ipv6Addr>().ok().map(|address| IpAddr::V6(address).to_canonical());
    }
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parse_decimal(parts.next()?)?;
    }
    parts.next().is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
}

/// Reads `address/length` with surrounding blanks. The flag says that host bits were set and
/// have been cleared.
pub fn parse_net(text: &str) -> Option<(IpNet, bool)> {
    let (address, length) = text.trim().split_once('/')?;
    let net = IpNet::new(parse_ip(address)?, parse_decimal(length)?).ok()?;
    Some((net.trunc(), net.trunc() != net))
}

fn parse_decimal(text: &str) -> Option<u8> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<String> {
        parse_ip(text).map(|address| address.to_string())
    }

    #[test]
    fn leading_zeros_are_decimal() {
        assert_eq!(ip("010.061.003.002").as_deref(), Some("10.61.3.2"));
        assert_eq!(ip("FD41:0:0::7").as_deref(), Some("fd41::7"));
        assert_eq!(ip("::ffff:10.1.2.3").as_deref(), Some("10.1.2.3"));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "None", "10.1.2", "10.1.2.3.4", "10.1.2.256", "+1.2.3.4", "1.2.3.4/32"] {
            assert_eq!(ip(text), None, "{text}");
        }
    }

    #[test]
    fn host_bits_are_cleared_and_told() {
        let net = |text| parse_net(text).map(|(net, cleared)| (net.to_string(), cleared));
        assert_eq!(net(" 192.0.2.49/28 "), Some(("192.0.2.48/28".into(), true)));
        assert_eq!(net("192.000.002.048/028"), Some(("192.0.2.48/28".into(), false)));
        assert_eq!(net("192.0.2.48"), None);
        assert_eq!(net("192.0.2.48/33"), None);
        assert_eq!(net("2001:DB8::/32"), Some(("2001:db8::/32".into(), false)));
    }
}

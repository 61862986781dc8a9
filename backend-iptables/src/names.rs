//! Names of chains, as kube-proxy computes them. Pure.
//!
//! People look for these names, dashboards parse them, and a kube-proxy that comes after us finds
//! and adopts them. So they are public.

use std::{fmt, fmt::Write, net::SocketAddr};

use data_encoding::BASE32_NOPAD;
use proxier_core::Protocol;
use sha2::{Digest, Sha256};

/// Longest name of a chain in bytes.
// KERNEL: XT_EXTENSION_MAXNAMELEN less the NUL (include/uapi/linux/netfilter/x_tables.h, v6.12).
const MAX_BYTES: usize = 28;
/// Characters of hash in a name.
pub(crate) const HASH_CHARS: usize = 16;

/// The name of a chain: at most 28 bytes of ASCII, kept in place.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ChainName {
    bytes: [u8; MAX_BYTES],
    len: u8,
}

impl ChainName {
    /// A name, if it is short enough and printable ASCII.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        let len = u8::try_from(name.len()).ok().filter(|_| printable)?;
        let mut bytes = [0; MAX_BYTES];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self { bytes, len })
    }

    /// Joins parts of a name; what is too long is cut. The parts are ASCII and, by
    /// [`Config::validate`](crate::Config::validate), short enough.
    fn join(parts: [&str; 3]) -> Self {
        let mut bytes = [0; MAX_BYTES];
        let text = parts.iter().flat_map(|part| part.bytes());
        let len = bytes.iter_mut().zip(text).map(|(to, from)| *to = from).count();
        Self { bytes, len: u8::try_from(len).unwrap_or_default() }
    }

    /// A name that is known to be short and ASCII.
    pub(crate) fn cut(name: &str) -> Self {
        Self::join([name, "", ""])
    }

    /// A number that follows from the hash at the end of the name: any of so many as often as any
    /// other.
    pub(crate) fn spread(&self) -> usize {
        let bytes = self.bytes.get(..usize::from(self.len)).unwrap_or_default();
        let digits =
            bytes.iter().rev().take(4).filter_map(|byte| BASE32_DIGITS.find(char::from(*byte)));
        digits.fold(0, |number, digit| number * 32 + digit)
    }

    /// A name that is known to be short.
    pub(crate) fn fixed(name: &'static str) -> Self {
        Self::join([name, "", ""])
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..usize::from(self.len)).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The kinds of chains that a Service port has.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ServiceChain {
    /// `FW`: admits the sources that may use the load balancer's address.
    Firewall,
    /// `EXT`: traffic from outside the cluster.
    External,
    /// `SVC`: picks one of all endpoints.
    Cluster,
    /// `SVL`: picks one of the endpoints on this node.
    Local,
}

impl ServiceChain {
    /// Every kind, those that lead on to others first.
    pub const ALL: [Self; 4] = [Self::Firewall, Self::External, Self::Cluster, Self::Local];

    const fn infix(self) -> &'static str {
        match self {
            Self::Firewall => "-FW-",
            Self::External => "-EXT-",
            Self::Cluster => "-SVC-",
            Self::Local => "-SVL-",
        }
    }
}

const ENDPOINT: &str = "-SEP-";
const PART: &str = "-SVP-";
const BASE32_DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// The name of a chain of a Service port: the `KUBE-SVC-…` family.
///
/// `port_text` is `namespace/name:port`, or `namespace/name` for the unnamed port: see
/// [`FragmentId::port_text`](proxier_core::FragmentId::port_text).
#[must_use]
pub fn service_chain(
    prefix: &str,
    kind: ServiceChain,
    port_text: &str,
    protocol: Protocol,
) -> ChainName {
    PortHash::new(port_text, protocol).chain(prefix, kind)
}

/// The name of an endpoint's chain: `KUBE-SEP-…`.
#[must_use]
pub fn endpoint_chain(
    prefix: &str,
    port_text: &str,
    protocol: Protocol,
    endpoint: SocketAddr,
) -> ChainName {
    PortHash::new(port_text, protocol).endpoint_chain(prefix, endpoint)
}

/// What the names of one Service port's chains have in common.
// K8S: pkg/proxy/iptables/proxier.go portProtoHash and servicePortEndpointChainName, v1.36: base32
// of SHA-256 over the concatenated texts, first sixteen characters.
pub(crate) struct PortHash {
    state: Sha256,
    text: [u8; HASH_CHARS],
}

impl PortHash {
    pub(crate) fn new(port_text: &str, protocol: Protocol) -> Self {
        let state = Sha256::new().chain_update(port_text).chain_update(protocol.lower());
        let text = hash_text(state.clone());
        Self { state, text }
    }

    pub(crate) fn chain(&self, prefix: &str, kind: ServiceChain) -> ChainName {
        name(prefix, kind.infix(), &self.text)
    }

    /// The chain of some of the endpoints of a pool.
    pub(crate) fn part_chain(&self, prefix: &str, pool: ServiceChain, index: usize) -> ChainName {
        let mut state = self.state.clone();
        // A digest takes any bytes.
        write!(Update(&mut state), "{}{index}", pool.infix()).unwrap_or_default();
        name(prefix, PART, &hash_text(state))
    }

    pub(crate) fn endpoint_chain(&self, prefix: &str, endpoint: SocketAddr) -> ChainName {
        let mut state = self.state.clone();
        // A digest takes any bytes.
        write!(Update(&mut state), "{endpoint}").unwrap_or_default();
        name(prefix, ENDPOINT, &hash_text(state))
    }
}

/// A hash in the form that names have.
pub(crate) fn hash_of(text: &str) -> String {
    let hash = hash_text(Sha256::new().chain_update(text));
    std::str::from_utf8(&hash).unwrap_or_default().to_owned()
}

/// Says whether a text has the form of a hash in a name.
pub(crate) fn is_hash(text: &str) -> bool {
    let digit = |it| matches!(it, b'A'..=b'Z' | b'2'..=b'7');
    text.len() == HASH_CHARS && text.bytes().all(digit)
}

struct Update<'a>(&'a mut Sha256);

impl Write for Update<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text);
        Ok(())
    }
}

fn name(prefix: &str, infix: &str, hash: &[u8; HASH_CHARS]) -> ChainName {
    ChainName::join([prefix, infix, std::str::from_utf8(hash).unwrap_or_default()])
}

fn hash_text(state: Sha256) -> [u8; HASH_CHARS] {
    let mut text = [0; HASH_CHARS];
    if let Some(head) = state.finalize().first_chunk::<10>() {
        BASE32_NOPAD.encode_mut(head, &mut text);
    }
    text
}

/// The names of the chains that exist whatever the Services are.
#[derive(Clone, Debug)]
pub(crate) struct FixedNames {
    pub(crate) services: ChainName,
    pub(crate) node_ports: ChainName,
    pub(crate) postrouting: ChainName,
    pub(crate) mark_masq: ChainName,
    pub(crate) external_services: ChainName,
    pub(crate) forward: ChainName,
    pub(crate) proxy_firewall: ChainName,
    pub(crate) firewall: ChainName,
}

impl FixedNames {
    pub(crate) fn new(prefix: &str) -> Self {
        let name = |rest| ChainName::join([prefix, "-", rest]);
        Self {
            services: name("SERVICES"),
            node_ports: name("NODEPORTS"),
            postrouting: name("POSTROUTING"),
            mark_masq: name("MARK-MASQ"),
            external_services: name("EXTERNAL-SERVICES"),
            forward: name("FORWARD"),
            proxy_firewall: name("PROXY-FIREWALL"),
            firewall: name("FIREWALL"),
        }
    }
}

/// What a name in table nat says about the chain of a Service port, if it is one of ours.
pub(crate) fn service_kind(prefix: &str, chain: &str) -> Option<ServiceKind> {
    let rest = chain.strip_prefix(prefix)?;
    if rest.strip_prefix(ENDPOINT).is_some_and(is_hash) {
        return Some(ServiceKind::Endpoint);
    }
    if rest.strip_prefix(PART).is_some_and(is_hash) {
        return Some(ServiceKind::Part);
    }
    let of = |kind: &ServiceChain| rest.strip_prefix(kind.infix()).is_some_and(is_hash);
    ServiceChain::ALL.into_iter().find(of).map(ServiceKind::Port)
}

/// Chains of one Service port, by what is in them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ServiceKind {
    Endpoint,
    Part,
    Port(ServiceChain),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kube_proxy() {
        use Protocol::{Tcp, Udp};
        use ServiceChain::{Cluster, External, Firewall, Local};
        let chain = |kind, text, protocol| service_chain("KUBE", kind, text, protocol);
        let cart = [(Cluster, "SVC"), (Local, "SVL"), (External, "EXT")];
        for (kind, infix) in cart {
            let expected = format!("KUBE-{infix}-KN4ZOSFCOD3IPONJ");
            assert_eq!(chain(kind, "shop/cart:web", Tcp).as_str(), expected);
        }
        let names = chain(Firewall, "shop/names:q", Udp);
        assert_eq!(names.as_str(), "KUBE-FW-ENK42DHEO3I6TWQX");
        let endpoint = |text, addr: &str| endpoint_chain("KUBE", text, Tcp, addr.parse().unwrap());
        let cart = endpoint("shop/cart:web", "10.61.3.21:8080");
        assert_eq!(cart.as_str(), "KUBE-SEP-PKOGBAKNYKBT6ODB");
        let near = chain(Cluster, "edge/near:api", Tcp);
        assert_eq!(near.as_str(), "KUBE-SVC-QDFYEKLMT6VVGSSH");
        let near = endpoint("edge/near:api", "10.61.3.32:9000");
        assert_eq!(near.as_str(), "KUBE-SEP-OPWUWBMMUIEBWKRW");
        let near = endpoint("edge/near:api", "10.61.4.32:9000");
        assert_eq!(near.as_str(), "KUBE-SEP-4MTSZDFYLCDGS7HV");
    }

    #[test]
    fn the_longest_names_fit() {
        let fixed = FixedNames::new("KUBEPRO");
        assert_eq!(fixed.external_services.as_str(), "KUBEPRO-EXTERNAL-SERVICES");
        let chain = endpoint_chain("KUBEPRO", "a/b", Protocol::Sctp, ([1, 2, 3, 4], 5).into());
        assert_eq!(chain.as_str().len(), MAX_BYTES);
        assert_eq!(service_kind("KUBEPRO", chain.as_str()), Some(ServiceKind::Endpoint));
    }

    #[test]
    fn foreign_names_are_not_taken_for_ours() {
        let kind = |name| service_kind("KUBE", name);
        assert_eq!(
            kind("KUBE-FW-ENK42DHEO3I6TWQX"),
            Some(ServiceKind::Port(ServiceChain::Firewall))
        );
        for name in ["KUBE-SVC-", "KUBE-SVC-ENK42DHEO3I6TWQ1", "KUBE-SVC-ENK42", "CUBE-SVC-X"] {
            assert_eq!(kind(name), None, "{name}");
        }
        assert!(ChainName::new("KUBE-SVC-ENK42DHEO3I6TWQX").is_some());
        assert!(ChainName::new("a-chain-name-that-is-too-long").is_none());
        assert!(ChainName::new("naïve").is_none());
    }
}

//! The tree of chains that leads from a fixed chain to the Services. Pure.
//!
//! kube-proxy compares a new connection with one Service after the other. Here a chain holds at most
//! one rule for each value of the next four bits, so the way to a Service among 30,000 is some fifty
//! rules. A chain of the tree exists as long as a Service hangs on it, and its name follows from what
//! leads there, so that a dump tells what belongs to the tree.

use std::{fmt::Write, net::IpAddr};

use ipnet::IpNet;
use proxier_core::{
    Protocol,
    ir::{FrontendKey, WayIn},
};

use crate::{
    names::{ChainName, FixedNames, HASH_CHARS, hash_of, is_hash},
    object::Table,
    rule::{Matches, Net, Port, Transport},
};

/// Lengths of the networks on the way to an address. The last bits are left to the rules themselves.
///
/// The first step is the widest: addresses of one cluster share it, and what is none of them leaves.
// KERNEL: at most 16 chains may wait for a return (NFT_JUMP_STACK_SIZE, nf_tables.h, v6.12). From a
// built-in chain through SERVICES, five of these, FW, EXT, SVC, a part of it and SEP to MARK-MASQ it
// is twelve.
const V4_STEPS: [u8; 5] = [8, 16, 20, 24, 28];
const V6_STEPS: [u8; 5] = [96, 112, 116, 120, 124];
/// Ports that share a chain, at each step, as a power of two.
const PORT_STEPS: [u32; 2] = [10, 5];

/// A fixed chain with many rules that differ in address or port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tree {
    /// Addresses from outside that have no endpoint for them, in the filter table.
    External,
    /// Addresses with source ranges.
    Firewall,
    /// Ports of health checks.
    Health,
    /// Node ports.
    NodePorts,
    /// Cluster IPs without endpoints.
    Refused,
    /// Addresses of Services.
    Services,
}

impl Tree {
    const ALL: [Self; 6] = [
        Self::External,
        Self::Firewall,
        Self::Health,
        Self::NodePorts,
        Self::Refused,
        Self::Services,
    ];

    pub(crate) const fn table(self) -> Table {
        match self {
            Self::External | Self::Firewall | Self::Health | Self::Refused => Table::Filter,
            Self::NodePorts | Self::Services => Table::Nat,
        }
    }

    /// The chain it grows from.
    pub(crate) const fn root(self, names: &FixedNames) -> ChainName {
        match self {
            Self::External => names.external_services,
            Self::Firewall => names.proxy_firewall,
            Self::Health | Self::NodePorts => names.node_ports,
            Self::Refused | Self::Services => names.services,
        }
    }

    /// What names begin with; one for each tree of a table.
    const fn tag(self) -> &'static str {
        match self {
            Self::External => "EIP",
            Self::Firewall => "FIP",
            Self::Health | Self::NodePorts => "NP",
            Self::Refused | Self::Services => "IP",
        }
    }

    /// The way to a frontend: chain after chain, with what leads there.
    pub(crate) fn way(self, prefix: &str, key: &FrontendKey) -> Vec<(Matches<'static>, ChainName)> {
        match key.way_in {
            WayIn::Address(ip) => self.to_address(prefix, ip),
            WayIn::Node(_) => self.to_port(prefix, key.protocol, key.port.get()),
        }
    }

    fn to_address(self, prefix: &str, ip: IpAddr) -> Vec<(Matches<'static>, ChainName)> {
        let steps = match ip {
            IpAddr::V4(_) => V4_STEPS,
            IpAddr::V6(_) => V6_STEPS,
        };
        let nets = steps.into_iter().filter_map(|len| IpNet::new(ip, len).ok());
        nets.map(|net| {
            let net = net.trunc();
            let matches = Matches { destination: Some(Net::is(net)), ..Matches::default() };
            (matches, self.name(prefix, &address_text(net)))
        })
        .collect()
    }

    /// The way to a port.
    pub(crate) fn to_port(
        self,
        prefix: &str,
        protocol: Protocol,
        port: u16,
    ) -> Vec<(Matches<'static>, ChainName)> {
        let block = |bits: u32| {
            let rest = u16::MAX >> (u16::BITS - bits);
            let (first, last) = (port & !rest, port | rest);
            let transport = Transport { protocol, port: Port::Within(first, last) };
            let matches = Matches { transport: Some(transport), ..Matches::default() };
            (matches, self.name(prefix, &format!("{}-{first}-{last}", upper(protocol))))
        };
        PORT_STEPS.map(block).into()
    }

    fn name(self, prefix: &str, rest: &str) -> ChainName {
        let mut name = String::with_capacity(32);
        for part in [prefix, "-", self.tag(), "-", rest] {
            name.push_str(part);
        }
        ChainName::cut(&name)
    }
}

/// An IPv4 network as its hexadecimal digits; an IPv6 network, which would be too long, as a hash.
fn address_text(net: IpNet) -> String {
    match net {
        IpNet::V4(net) => {
            let digits = usize::from(net.prefix_len() / 4);
            let mut text = net.addr().octets().iter().fold(String::new(), |mut text, byte| {
                write!(text, "{byte:02X}").unwrap_or_default();
                text
            });
            text.truncate(digits);
            text
        }
        IpNet::V6(net) => hash_of(&net.to_string()),
    }
}

const fn upper(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Sctp => "SCTP",
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
    }
}

/// Says whether a chain of this name in this table belongs to a tree.
pub(crate) fn is_branch(prefix: &str, table: Table, chain: &str) -> bool {
    let rest = chain.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    let Some((tag, rest)) = rest.and_then(|rest| rest.split_once('-')) else { return false };
    let ours = Tree::ALL.iter().any(|tree| tree.table() == table && tree.tag() == tag);
    ours && (is_address(rest) || is_block(rest))
}

fn is_address(text: &str) -> bool {
    let hex = |byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F');
    let is_v4 = V4_STEPS.iter().any(|len| usize::from(len / 4) == text.len());
    (is_v4 && text.bytes().all(hex)) || (text.len() == HASH_CHARS && is_hash(text))
}

fn is_block(text: &str) -> bool {
    let Some((protocol, rest)) = text.split_once('-') else { return false };
    let Some((first, last)) = rest.split_once('-') else { return false };
    let Some((first, last)) = first.parse::<u16>().ok().zip(last.parse::<u16>().ok()) else {
        return false;
    };
    let known = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp].map(upper).contains(&protocol);
    known && PORT_STEPS.iter().any(|bits| u32::from(last.wrapping_sub(first)) + 1 == 1 << bits)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use proxier_core::Family;

    use super::*;

    fn names(tree: Tree, way_in: WayIn, port: u16) -> Vec<String> {
        let key =
            FrontendKey { way_in, port: NonZeroU16::new(port).unwrap(), protocol: Protocol::Sctp };
        let way = tree.way("KUBE", &key);
        way.iter().map(|(matches, chain)| format!("{matches} -> {chain}")).collect()
    }

    #[test]
    fn an_address_is_reached_by_its_leading_bits() {
        let way = names(Tree::Services, WayIn::Address([10, 96, 29, 254].into()), 80);
        assert_eq!(
            way,
            [
                " -d 10.0.0.0/8 -> KUBE-IP-0A",
                " -d 10.96.0.0/16 -> KUBE-IP-0A60",
                " -d 10.96.16.0/20 -> KUBE-IP-0A601",
                " -d 10.96.29.0/24 -> KUBE-IP-0A601D",
                " -d 10.96.29.240/28 -> KUBE-IP-0A601DF",
            ]
        );
        let way = names(Tree::External, WayIn::Address("fd00::abcd:1234".parse().unwrap()), 80);
        assert!(way[4].starts_with(" -d fd00::abcd:1230/124 -> KUBE-EIP-"), "{way:?}");
    }

    #[test]
    fn a_port_is_reached_by_its_blocks() {
        let way = names(Tree::NodePorts, WayIn::Node(Family::V4), 30_740);
        let first = " -p sctp -m sctp --dport 30720:31743 -> KUBE-NP-SCTP-30720-31743";
        let second = " -p sctp -m sctp --dport 30720:30751 -> KUBE-NP-SCTP-30720-30751";
        assert_eq!(way, [first, second]);
    }

    #[test]
    fn every_chain_of_a_tree_is_known_by_its_name() {
        let ways_in = [
            WayIn::Address([255; 4].into()),
            WayIn::Address([0xff; 16].into()),
            WayIn::Node(Family::V6),
        ];
        for (tree, way_in) in Tree::ALL.iter().flat_map(|tree| ways_in.map(|it| (tree, it))) {
            let key = FrontendKey { way_in, port: NonZeroU16::MAX, protocol: Protocol::Sctp };
            for (_, chain) in tree.way("KUBEPRO", &key) {
                assert!(is_branch("KUBEPRO", tree.table(), chain.as_str()), "{chain}");
                assert!(!is_branch("KUBE", tree.table(), chain.as_str()), "{chain}");
                assert_eq!(ChainName::new(chain.as_str()), Some(chain), "nothing is cut off");
            }
        }
        for chain in
            ["KUBE-IP-", "KUBE-IP-0A6", "KUBE-IP-0a60", "KUBE-NP-TCP-1-2", "KUBE-NP-ICMP-0-31"]
        {
            assert!(!is_branch("KUBE", Table::Nat, chain), "{chain}");
        }
        assert!(!is_branch("KUBE", Table::Nat, "KUBE-FIP-0A60"));
    }
}

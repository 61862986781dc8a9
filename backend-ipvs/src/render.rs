//! Objects in words. Pure.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
};

use proxier_netlink::{gate::origin_name as origin, spi::family_name as nft};

use crate::object::{ChainName, Key, ServerId, SetName, Value, Way};

const fn suffix(way: Way) -> &'static str {
    match way {
        Way::Address => "",
        Way::NodePort => "-ports",
    }
}

impl Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses => f.write_str("addresses"),
            Self::Allowed(way) => write!(f, "allowed{}", suffix(*way)),
            Self::Dropped(way, from) => write!(f, "dropped-{}{}", origin(*from), suffix(*way)),
            Self::Fenced(way) => write!(f, "fenced{}", suffix(*way)),
            Self::Frontends(Way::Address) => f.write_str("frontends"),
            Self::Frontends(Way::NodePort) => f.write_str("node-ports"),
            Self::Hairpin => f.write_str("hairpin"),
            Self::Marks(way, from) => write!(f, "marks-{}{}", origin(*from), suffix(*way)),
            Self::Masquerade(way, from) => {
                write!(f, "masquerade-{}{}", origin(*from), suffix(*way))
            }
            Self::NodeAddresses => f.write_str("node-addresses"),
            Self::Owners => f.write_str("mark-owners"),
            Self::Rejected(way, from) => write!(f, "rejected-{}{}", origin(*from), suffix(*way)),
            Self::Servers => f.write_str("servers"),
        }
    }
}

impl Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Classify(way) => write!(f, "classify{}", suffix(*way)),
            Self::ClassifyOwn(way) => write!(f, "classify-own{}", suffix(*way)),
            Self::Foreign(name) => f.write_str(name),
            Self::From(way, from) => write!(f, "from-{}{}", origin(*from), suffix(*way)),
            Self::Leaving => f.write_str("leaving"),
            Self::Masquerade => f.write_str("masquerading"),
            Self::Output => f.write_str("output"),
            Self::Prerouting => f.write_str("prerouting"),
        }
    }
}

impl Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frontend { ip, port, protocol } => {
                write!(f, "{}/{protocol}", SocketAddr::new(*ip, port.get()))
            }
            Self::Mark(family, mark) => write!(f, "mark {mark:#x} ({family})"),
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "address {ip}"),
            Self::Chain(family, name) => write!(f, "chain {} {name}", nft(*family)),
            Self::Destination(server, to) => write!(f, "destination {to} of server {server}"),
            Self::Element(set, item) => {
                write!(f, "element {} {set} {item}", nft(item.family()))
            }
            Self::Link(family) => write!(f, "link for {family}"),
            Self::Server(id) => write!(f, "server {id}"),
            Self::Set(family, name) => write!(f, "set {} {name}", nft(*family)),
            Self::Table(family) => write!(f, "table {}", nft(*family)),
        }
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(chain) => write!(f, "{chain}"),
            Self::Exists => Ok(()),
            Self::Mark(mark) => writeln!(f, "mark {mark:#x}"),
            Self::Server(server) => {
                writeln!(f, "scheduler {}", server.scheduler)?;
                if let Some(seconds) = server.persistence {
                    writeln!(f, "persistent {seconds} s")?;
                }
                if server.fallback { writeln!(f, "with a fallback") } else { Ok(()) }
            }
            Self::Set(shape) => write!(f, "{shape}"),
            Self::Weight(weight) => writeln!(f, "weight {weight}"),
        }
    }
}

//! Objects in words. Pure.

use std::{
    fmt::{self, Display},
    net::SocketAddr,
};

use proxier_core::{
    Family,
    ir::{Origin, WayIn},
};

use crate::object::{Chain, ChainName, Item, Key, Rule, ServerId, SetName, Value, Way};

/// The family as nft writes it.
const fn nft(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

const fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::External => "external",
        Origin::Node => "node",
        Origin::Pod => "pod",
    }
}

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
                let family = match item {
                    Item::Address(ip) => Family::of(*ip),
                    Item::Allowed(key, _) | Item::Frontend(key) => match key.way_in {
                        WayIn::Address(ip) => Family::of(ip),
                        WayIn::Node(family) => family,
                    },
                    Item::Mark(family, _) => *family,
                };
                write!(f, "element {} {set} {item}", nft(family))
            }
            Self::Link(family) => write!(f, "link for {family}"),
            Self::Server(id) => write!(f, "server {id}"),
            Self::Set(family, name) => write!(f, "set {} {name}", nft(*family)),
            Self::Table(family) => write!(f, "table {}", nft(*family)),
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(Chain { base, rules }) => {
                if let Some(base) = base {
                    writeln!(f, "{} hook {} priority {}", base.kind, base.hook, base.priority)?;
                }
                rules.iter().try_for_each(|rule| writeln!(f, "{rule}"))
            }
            Self::Exists => Ok(()),
            Self::Mark(mark) => writeln!(f, "mark {mark:#x}"),
            Self::Server(server) => {
                writeln!(f, "scheduler {}", server.scheduler)?;
                match server.persistence {
                    Some(seconds) => writeln!(f, "persistent {seconds} s"),
                    None => Ok(()),
                }
            }
            Self::Set(shape) => {
                let what = if shape.intervals { "intervals" } else { "elements" };
                writeln!(f, "{what} of {} bytes, type {}", shape.key_bytes, shape.key_type)
            }
            Self::Weight(weight) => writeln!(f, "weight {weight}"),
        }
    }
}

//! Objects in words. Pure.

use std::fmt::{self, Display};

use proxier_core::{
    Family,
    ir::{Origin, WayIn},
};

use crate::object::{Chain, ChainName, Item, Key, Rule, SetName, Value, Way};

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
        Way::NodePort => "-node-ports",
    }
}

impl Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed(way) => write!(f, "allowed{}", suffix(*way)),
            Self::Dropped(way, from) => write!(f, "dropped-{}{}", origin(*from), suffix(*way)),
            Self::Fenced(way) => write!(f, "fenced{}", suffix(*way)),
            Self::Frontends(Way::Address) => f.write_str("frontends"),
            Self::Frontends(Way::NodePort) => f.write_str("node-ports"),
            Self::NodeAddresses => f.write_str("node-addresses"),
            Self::Rejected(way, from) => write!(f, "rejected-{}{}", origin(*from), suffix(*way)),
        }
    }
}

impl Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capture(from) => write!(f, "capture-{}", origin(*from)),
            Self::CaptureOwn => f.write_str("capture-own"),
            Self::Classify(way) => write!(f, "classify{}", suffix(*way)),
            Self::ClassifyOwn(way) => write!(f, "classify-own{}", suffix(*way)),
            Self::Foreign(name) => f.write_str(name),
            Self::From(way, from) => write!(f, "from-{}{}", origin(*from), suffix(*way)),
            Self::FromOwn(way, from) => write!(f, "own-{}{}", origin(*from), suffix(*way)),
            Self::Keep => f.write_str("keep"),
            Self::KeepOwn => f.write_str("keep-own"),
            Self::Output => f.write_str("output"),
            Self::Postrouting => f.write_str("postrouting"),
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
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(family, name) => write!(f, "chain {} {name}", nft(*family)),
            Self::Element(set, item) => {
                let family = match item {
                    Item::Address(ip) => Family::of(*ip),
                    Item::Allowed(key, _) | Item::Frontend(key) => match key.way_in {
                        WayIn::Address(ip) => Family::of(ip),
                        WayIn::Node(family) => family,
                    },
                };
                write!(f, "element {} {set} {item}", nft(family))
            }
            Self::Origins(family) => write!(f, "origins {family}"),
            Self::Route(key) => write!(f, "route {key}"),
            Self::Routing(family) => write!(f, "routing {family}"),
            Self::Endpoint(id, addr) => write!(f, "endpoint {addr} of {id}"),
            Self::Service(id) => write!(f, "service {id}"),
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
            Self::Origins(origins) => {
                if let Some(detector) = &origins.detector {
                    writeln!(f, "pods: {detector:?}")?;
                }
                origins.node.iter().try_for_each(|ip| writeln!(f, "node: {ip}"))
            }
            Self::Route(route) => {
                let [pod, node, external] = route.verdicts.rows();
                writeln!(f, "{} of {}", route.kind, route.service)?;
                if let Some(sources) = &route.sources {
                    let ranges = sources.ranges.iter().map(ToString::to_string);
                    let vips = sources.vips.iter().map(ToString::to_string);
                    writeln!(f, "only from {}", ranges.chain(vips).collect::<Vec<_>>().join(", "))?;
                }
                writeln!(f, "pod: {pod}\nnode: {node}\nexternal: {external}")
            }
            Self::Routing(it) => {
                let (mark, table) = (it.mark, it.table);
                writeln!(f, "rule {}: mark {mark:#x}/{mark:#x} lookup {table}", it.priority)?;
                writeln!(f, "table {table}: local default dev lo")
            }
            Self::Service(service) => {
                for member in &service.cluster {
                    writeln!(f, "cluster {}", member.addr)?;
                }
                for member in &service.local {
                    writeln!(f, "local {}", member.addr)?;
                }
                match service.affinity {
                    Some(seconds) => writeln!(f, "affinity {seconds} s"),
                    None => Ok(()),
                }
            }
            Self::Set(shape) => {
                let what = if shape.intervals { "intervals" } else { "elements" };
                writeln!(f, "{what} of {} bytes, type {}", shape.key_bytes, shape.key_type)
            }
        }
    }
}

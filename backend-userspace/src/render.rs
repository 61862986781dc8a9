//! Objects in words. Pure.

use std::fmt::{self, Display};

use proxier_netlink::{gate::origin_name as origin, spi::family_name as nft};

use crate::object::{ChainName, Key, SetName, Value, Way};

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

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(family, name) => write!(f, "chain {} {name}", nft(*family)),
            Self::Element(set, item) => {
                write!(f, "element {} {set} {item}", nft(item.family()))
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

impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(chain) => write!(f, "{chain}"),
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
            Self::Set(shape) => write!(f, "{shape}"),
        }
    }
}

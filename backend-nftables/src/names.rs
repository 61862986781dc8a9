//! The names of sets and chains, and what they mean when read back.

use std::fmt;

use proxier_core::ir::{Origin, Pool};

use crate::object::{
    AddressKind, ChainName, Hook, ORIGINS, POOLS, PortId, Says, SetName, Size, Space,
};

impl Space {
    /// What names begin with.
    const fn prefix(self) -> &'static str {
        match self {
            Self::NodePort => "node-port",
            Self::Service => "service",
        }
    }
}

/// What the name of something for a pool ends with.
const fn suffix(pool: Pool) -> &'static str {
    match pool {
        Pool::Cluster => "",
        Pool::Local => "-local",
    }
}

const fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::External => "outside",
        Origin::Node => "node",
        Origin::Pod => "pod",
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addresses(AddressKind::ClusterIp) => f.write_str("cluster-ips"),
            Self::Addresses(AddressKind::External) => f.write_str("external-ips"),
            Self::Affinity(pool) => write!(f, "affinity{}", suffix(*pool)),
            Self::Endpoints(space, pool) => {
                write!(f, "{}-endpoints{}", space.prefix(), suffix(*pool))
            }
            Self::Frontends(space, says) => write!(f, "{}-{says}", space.prefix()),
            Self::Hairpin => f.write_str("hairpin"),
            Self::Members(pool) => write!(f, "affinity-members{}", suffix(*pool)),
            Self::NodeAddresses => f.write_str("node-port-addresses"),
            Self::Remember(space) => write!(f, "{}-remember", space.prefix()),
            Self::Size(space, pool, size) => {
                write!(f, "{}-of-{}{}", space.prefix(), size.slots(), suffix(*pool))
            }
            Self::Sources(space) => write!(f, "{}-sources", space.prefix()),
            Self::Spread(space, pool) => write!(f, "{}-spread{}", space.prefix(), suffix(*pool)),
            Self::Sticky(space, pool) => write!(f, "{}-sticky{}", space.prefix(), suffix(*pool)),
        }
    }
}

impl fmt::Display for Says {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByOrigin => f.write_str("by-origin"),
            Self::Counted => f.write_str("counted"),
            Self::Drop(from) => write!(f, "drop-{}", origin(*from)),
            Self::Fenced => f.write_str("fenced"),
            Self::Local(from) => write!(f, "local-{}", origin(*from)),
            Self::Masquerade(from) => write!(f, "masq-{}", origin(*from)),
            Self::MasqueradeAll => f.write_str("masq-all"),
            Self::MasqueradeUnlessPod => f.write_str("masq-unless-pod"),
            Self::NoEndpoints => f.write_str("no-endpoints"),
            Self::Reject(from) => write!(f, "reject-{}", origin(*from)),
        }
    }
}

impl SetName {
    /// Every set that exists whatever the Services are.
    pub(crate) fn fixed() -> impl Iterator<Item = Self> {
        let by_space = Space::ALL.into_iter().flat_map(|space| {
            let by_pool = POOLS.into_iter().flat_map(move |pool| {
                [Self::Endpoints(space, pool), Self::Spread(space, pool), Self::Sticky(space, pool)]
            });
            Says::all()
                .map(move |says| Self::Frontends(space, says))
                .chain(by_pool)
                .chain([Self::Remember(space), Self::Sources(space)])
        });
        let by_pool =
            POOLS.into_iter().flat_map(|pool| [Self::Affinity(pool), Self::Members(pool)]);
        by_space.chain(by_pool).chain([
            Self::Addresses(AddressKind::ClusterIp),
            Self::Addresses(AddressKind::External),
            Self::Hairpin,
            Self::NodeAddresses,
        ])
    }

    /// The set of this name, if it is one of ours.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::parse_size(name).or_else(|| Self::fixed().find(|set| set.to_string() == name))
    }

    fn parse_size(name: &str) -> Option<Self> {
        let space = Space::ALL.into_iter().find(|space| name.starts_with(space.prefix()))?;
        let rest = name.strip_prefix(space.prefix())?.strip_prefix("-of-")?;
        let (number, pool) = match rest.strip_suffix(suffix(Pool::Local)) {
            Some(number) => (number, Pool::Local),
            None => (rest, Pool::Cluster),
        };
        let set = Self::Size(space, pool, Size::parse(number.parse().ok()?)?);
        (set.to_string() == name).then_some(set)
    }
}

impl Hook {
    pub(crate) const ALL: [Self; 6] = [
        Self::FilterForward,
        Self::FilterInput,
        Self::FilterOutput,
        Self::NatOutput,
        Self::NatPostrouting,
        Self::NatPrerouting,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::FilterForward => "filter-forward",
            Self::FilterInput => "filter-input",
            Self::FilterOutput => "filter-output",
            Self::NatOutput => "nat-output",
            Self::NatPostrouting => "nat-postrouting",
            Self::NatPrerouting => "nat-prerouting",
        }
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [high, low] = self.0;
        write!(f, "{high:08x}{low:08x}")
    }
}

impl PortId {
    fn parse(text: &str) -> Option<Self> {
        let part = |range| u32::from_str_radix(text.get(range)?, 16).ok();
        let id = Self([part(0..8)?, part(8..16)?]);
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base(hook) => f.write_str(hook.name()),
            Self::ByOrigin(space) => write!(f, "{}-by-origin", space.prefix()),
            Self::CheckInput => f.write_str("check-input"),
            Self::CheckPassing => f.write_str("check-passing"),
            Self::From(space, from) => write!(f, "{}-from-{}", space.prefix(), origin(*from)),
            Self::Picks(space, pool) => write!(f, "{}-sizes{}", space.prefix(), suffix(*pool)),
            Self::Pool(space, pool) => write!(f, "{}-pool{}", space.prefix(), suffix(*pool)),
            Self::Refuse(space) => write!(f, "{}-refuse", space.prefix()),
            Self::RefuseByOrigin(space) => write!(f, "{}-refuse-by-origin", space.prefix()),
            Self::Remember(id) => write!(f, "remember-{id}"),
            Self::Seen => f.write_str("translated"),
            Self::Space(space) => write!(f, "{}s", space.prefix()),
            Self::Spread(id, space, pool) => {
                write!(f, "spread-{id}-{}{}", space.prefix(), suffix(*pool))
            }
            Self::Sticky(id, pool) => write!(f, "sticky-{id}{}", suffix(*pool)),
        }
    }
}

impl ChainName {
    /// Every chain that exists whatever the Services are.
    pub(crate) fn fixed() -> impl Iterator<Item = Self> {
        let by_space = Space::ALL.into_iter().flat_map(|space| {
            let by_pool = POOLS
                .into_iter()
                .flat_map(move |pool| [Self::Picks(space, pool), Self::Pool(space, pool)]);
            ORIGINS.into_iter().map(move |origin| Self::From(space, origin)).chain(by_pool).chain([
                Self::ByOrigin(space),
                Self::Refuse(space),
                Self::RefuseByOrigin(space),
                Self::Space(space),
            ])
        });
        let bases = Hook::ALL.into_iter().map(Self::Base);
        by_space.chain(bases).chain([Self::CheckInput, Self::CheckPassing, Self::Seen])
    }

    /// The chain of this name, if it is one of ours.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        if let Some(id) = name.strip_prefix("remember-") {
            return Some(Self::Remember(PortId::parse(id)?));
        }
        if let Some(rest) = name.strip_prefix("spread-") {
            let id = PortId::parse(rest.get(..16)?)?;
            let mut all = Space::ALL
                .into_iter()
                .flat_map(|space| POOLS.into_iter().map(move |pool| Self::Spread(id, space, pool)));
            return all.find(|chain| chain.to_string() == name);
        }
        if let Some(rest) = name.strip_prefix("sticky-") {
            return Some(match rest.strip_suffix(suffix(Pool::Local)) {
                Some(id) => Self::Sticky(PortId::parse(id)?, Pool::Local),
                None => Self::Sticky(PortId::parse(rest)?, Pool::Cluster),
            });
        }
        Self::fixed().find(|chain| chain.to_string() == name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_distinct_short_and_read_back() {
        let sizes = Space::ALL.into_iter().flat_map(|space| {
            POOLS.into_iter().map(move |pool| SetName::Size(space, pool, Size::of(10_000)))
        });
        let sets: Vec<_> = SetName::fixed().chain(sizes).collect();
        let mut names = BTreeSet::new();
        for set in sets {
            let name = set.to_string();
            assert_eq!(SetName::parse(&name), Some(set), "{name}");
            assert!(name.len() <= 28, "{name}");
            assert!(names.insert(name));
        }
        let id = PortId([0xdead_beef, 7]);
        let affinity =
            [ChainName::Remember(id)].into_iter().chain(POOLS.map(|it| ChainName::Sticky(id, it)));
        let mut names = BTreeSet::new();
        let spread = Space::ALL
            .into_iter()
            .flat_map(|space| POOLS.into_iter().map(move |it| ChainName::Spread(id, space, it)));
        for chain in ChainName::fixed().chain(affinity).chain(spread) {
            let name = chain.to_string();
            assert_eq!(ChainName::parse(&name), Some(chain), "{name}");
            assert!(names.insert(name));
        }
        for name in [
            "",
            "service-of-",
            "service-of-03",
            "service-of-35",
            "service-of-3-local-local",
            "sticky-7",
        ] {
            assert_eq!((SetName::parse(name), ChainName::parse(name)), (None, None), "{name}");
        }
    }
}

//! The kernel objects of this mode: their identity and their content.

use std::fmt;

use proxier_core::Family;
use proxier_netlink::spi::family_name;

use crate::{
    names::{ChainName, ServiceChain},
    pack::{self, Unpacker, pack_matches, pack_target},
    rule::{Matches, Target},
};

/// The identity of a kernel object: a table, a chain, or a rule in a chain that many Services share.
///
/// A rule in a shared or built-in chain is known by what it matches, comment included; so a dump
/// finds keys without any memory of what was written, and a Service's change touches its own rules
/// only. The rules of all other chains belong to the chain.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Key(pub(crate) Object);

/// Objects sort so that, among those of one stage, what leads on to others comes first.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Object {
    Table {
        family: Family,
        table: Table,
    },
    /// A chain of iptables' own.
    Base {
        family: Family,
        chain: BaseChain,
    },
    Chain {
        family: Family,
        table: Table,
        kind: ChainKind,
        name: ChainName,
    },
    /// One rule.
    Entry {
        family: Family,
        /// It is in a chain of iptables' own.
        is_jump: bool,
        table: Table,
        chain: ChainName,
        /// What it matches, packed.
        matches: Box<[u8]>,
    },
    /// A rule in a chain of ours that is not ours.
    Foreign {
        family: Family,
        table: Table,
        chain: ChainName,
        handle: u64,
    },
}

/// A table that has chains of ours.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Table {
    Filter,
    Nat,
}

impl Table {
    pub(crate) const ALL: [Self; 2] = [Self::Filter, Self::Nat];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }
}

/// The chains of iptables' own that lead to ours.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum BaseChain {
    FilterForward,
    FilterInput,
    FilterOutput,
    NatOutput,
    NatPostrouting,
    NatPrerouting,
}

impl BaseChain {
    pub(crate) const ALL: [Self; 6] = [
        Self::FilterForward,
        Self::FilterInput,
        Self::FilterOutput,
        Self::NatOutput,
        Self::NatPostrouting,
        Self::NatPrerouting,
    ];

    pub(crate) const fn table(self) -> Table {
        match self {
            Self::FilterForward | Self::FilterInput | Self::FilterOutput => Table::Filter,
            Self::NatOutput | Self::NatPostrouting | Self::NatPrerouting => Table::Nat,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::FilterForward => "FORWARD",
            Self::FilterInput => "INPUT",
            Self::FilterOutput | Self::NatOutput => "OUTPUT",
            Self::NatPostrouting => "POSTROUTING",
            Self::NatPrerouting => "PREROUTING",
        }
    }
}

/// What is in a chain of ours, in the order in which chains lead on to each other.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum ChainKind {
    /// It exists whatever the Services are.
    Fixed,
    /// A node of the tree between a fixed chain and the Services.
    Branch,
    Service(ServiceChain),
    /// Some of the endpoints of a large pool.
    Part,
    Endpoint,
}

/// The content of a kernel object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Value(pub(crate) Content);

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    /// A table or a built-in chain: it exists, that is all.
    Exists,
    /// A chain whose rules are objects of their own.
    Shared,
    /// A chain with all its rules.
    Rules(Rules),
    /// What a rule does, packed, and where it is.
    Entry { target: Box<[u8]>, place: Place },
    /// A rule that is not ours.
    Unknown,
}

/// Where in its chain a rule has to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Place {
    /// Anywhere before those at the tail.
    Head,
    /// Behind all others.
    Tail,
}

/// All rules of a chain, in order: its name, then the rules, packed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Rules(Box<[u8]>);

/// Collects the rules of a chain.
#[derive(Debug)]
pub(crate) struct RulesBuilder(Vec<u8>);

impl RulesBuilder {
    pub(crate) fn new(chain: &ChainName) -> Self {
        let name = chain.as_str().as_bytes();
        let mut bytes = Vec::with_capacity(256);
        bytes.push(u8::try_from(name.len()).unwrap_or_default());
        bytes.extend_from_slice(name);
        Self(bytes)
    }

    pub(crate) fn push(&mut self, matches: &Matches<'_>, target: &Target<'_>) {
        pack::pack_rule(&mut self.0, matches, target);
    }

    pub(crate) fn push_unreadable(&mut self) {
        pack::pack_unreadable(&mut self.0);
    }

    pub(crate) fn build(self) -> Value {
        Value(Content::Rules(Rules(self.0.into())))
    }
}

impl Rules {
    pub(crate) fn chain(&self) -> &str {
        let name = self.0.split_first().and_then(|(len, rest)| rest.get(..usize::from(*len)));
        name.and_then(|name| std::str::from_utf8(name).ok()).unwrap_or_default()
    }

    /// The rules; `None` for one that could not be understood.
    pub(crate) fn iter(&self) -> Unpacker<'_> {
        let rest = self.0.split_first().and_then(|(len, rest)| rest.get(usize::from(*len)..));
        Unpacker(rest.unwrap_or_default())
    }
}

impl Key {
    /// The family of the object.
    #[must_use]
    pub const fn family(&self) -> Family {
        match &self.0 {
            Object::Table { family, .. }
            | Object::Base { family, .. }
            | Object::Chain { family, .. }
            | Object::Entry { family, .. }
            | Object::Foreign { family, .. } => *family,
        }
    }

    /// The rules of the object with this content, as `iptables -S` lists them.
    #[must_use]
    pub fn listing(&self, value: &Value) -> Vec<String> {
        match (&self.0, &value.0) {
            (Object::Entry { .. }, Content::Entry { .. }) => {
                vec![format!("{}{}", EntryText(self), value.target_text())]
            }
            (_, Content::Rules(_)) => value.to_string().lines().map(str::to_owned).collect(),
            _ => Vec::new(),
        }
    }

    pub(crate) const fn table_key(family: Family, table: Table) -> Self {
        Self(Object::Table { family, table })
    }

    pub(crate) const fn base(family: Family, chain: BaseChain) -> Self {
        Self(Object::Base { family, chain })
    }

    pub(crate) const fn chain(
        family: Family,
        table: Table,
        kind: ChainKind,
        name: ChainName,
    ) -> Self {
        Self(Object::Chain { family, table, kind, name })
    }

    /// A rule in a shared chain.
    pub(crate) fn entry(
        family: Family,
        table: Table,
        chain: ChainName,
        matches: &Matches<'_>,
    ) -> Self {
        let matches = packed(matches);
        Self(Object::Entry { family, is_jump: false, table, chain, matches })
    }

    /// A rule in a built-in chain.
    pub(crate) fn jump(family: Family, chain: BaseChain, matches: &Matches<'_>) -> Self {
        let matches = packed(matches);
        let (table, chain) = (chain.table(), ChainName::fixed(chain.name()));
        Self(Object::Entry { family, is_jump: true, table, chain, matches })
    }
}

fn packed(matches: &Matches<'_>) -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(96);
    pack_matches(&mut bytes, matches);
    bytes.into()
}

impl Value {
    pub(crate) fn entry(target: &Target<'_>, place: Place) -> Self {
        let mut bytes = Vec::with_capacity(32);
        pack_target(&mut bytes, target);
        Self(Content::Entry { target: bytes.into(), place })
    }

    /// A blank and the target of an entry, if it has one.
    fn target_text(&self) -> String {
        match &self.0 {
            Content::Entry { target, .. } => match Unpacker(target).target() {
                None | Some(Target::Nothing) => String::new(),
                Some(target) => format!(" {target}"),
            },
            Content::Exists | Content::Shared | Content::Rules(_) | Content::Unknown => {
                String::new()
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = family_name(self.family());
        match &self.0 {
            Object::Table { table, .. } => write!(f, "table {ip} {table}"),
            Object::Base { chain, .. } => {
                write!(f, "chain {ip} {} {}", chain.table(), chain.name())
            }
            Object::Chain { table, name, .. } => write!(f, "chain {ip} {table} {name}"),
            Object::Entry { table, .. } => write!(f, "rule {ip} {table} {}", EntryText(self)),
            Object::Foreign { table, chain, handle, .. } => {
                write!(f, "unknown rule {ip} {table} {chain} handle {handle}")
            }
        }
    }
}

/// The rule of an entry up to its target.
struct EntryText<'a>(&'a Key);

impl fmt::Display for EntryText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Object::Entry { chain, matches, .. } = &self.0.0 else { return Ok(()) };
        write!(f, "-A {chain}{}", Unpacker(matches).matches().unwrap_or_default())
    }
}

impl fmt::Display for Value {
    /// The rules as `iptables -S` lists them; for a rule in a shared chain, whose key says the rest,
    /// its target.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Content::Exists | Content::Shared => Ok(()),
            Content::Rules(rules) => rules.fmt(f),
            Content::Entry { target, place } => {
                if let Some(target) = Unpacker(target).target() {
                    target.fmt(f)?;
                }
                match place {
                    Place::Head => Ok(()),
                    Place::Tail => f.write_str(" (last)"),
                }
            }
            Content::Unknown => f.write_str("(not one of ours)"),
        }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = self.chain();
        for rule in self.iter() {
            match rule {
                Some((matches, Target::Nothing)) => writeln!(f, "-A {chain}{matches}")?,
                Some((matches, target)) => writeln!(f, "-A {chain}{matches} {target}")?,
                None => writeln!(f, "-A {chain} (not one of ours)")?,
            }
        }
        Ok(())
    }
}

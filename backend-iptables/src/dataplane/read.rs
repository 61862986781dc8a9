//! From listed rules to objects. Pure: the socket is elsewhere.

use std::collections::{BTreeMap, HashMap, btree_map};

use proxier_core::Family;
use proxier_netlink::nft::{ChainDump, RuleRef};

use super::batch::{hook, our_chain};
use crate::{
    encode::{self, OBJECT_MARK},
    names::{ChainName, FixedNames},
    object::{BaseChain, ChainKind, Content, Key, Object, Place, RulesBuilder, Table, Value},
    rule::{Matches, Target},
    skeleton::{NODE_PORTS, jumps, shared_chains},
};

/// Everything of ours in a family.
pub(crate) type Objects = BTreeMap<Key, Value>;

/// What to look for.
pub(crate) struct Scope<'a> {
    pub(crate) family: Family,
    pub(crate) prefix: &'a str,
    pub(crate) names: &'a FixedNames,
    /// The jumps that rules of ours make, and where to.
    jumps: HashMap<Key, ChainName>,
}

impl<'a> Scope<'a> {
    pub(crate) fn new(family: Family, prefix: &'a str, names: &'a FixedNames) -> Self {
        let jumps = jumps(names).iter().map(|jump| (jump.key(family), jump.to)).collect();
        Self { family, prefix, names, jumps }
    }

    /// The objects that a list of chains shows: chains of ours, empty, and built-in chains.
    ///
    /// # Errors
    /// A chain with the name of a built-in one that is not what iptables makes.
    pub(super) fn chains(&self, chains: &[ChainDump]) -> Result<Objects, OddChain> {
        let mut found = Objects::new();
        for chain in chains {
            let Some(table) = Table::ALL.into_iter().find(|it| it.name() == chain.table) else {
                continue;
            };
            let base = BaseChain::ALL
                .into_iter()
                .find(|it| it.table() == table && it.name() == chain.name);
            if let Some(base) = base {
                check_base(base, chain)?;
                found.insert(Key::base(self.family, base), Value(Content::Exists));
                continue;
            }
            let kind = our_chain(self.prefix, self.names, table, &chain.name);
            let ours = kind.zip(ChainName::new(&chain.name)).filter(|_| chain.base.is_none());
            let Some((kind, name)) = ours else { continue };
            let value = if self.is_shared(table, kind, &name) {
                Value(Content::Shared)
            } else {
                RulesBuilder::new(&name).build()
            };
            found.insert(Key::chain(self.family, table, kind, name), value);
        }
        Ok(found)
    }

    /// The chains of a table whose rules matter: built-in ones and ours.
    pub(super) fn interesting<'c>(
        &self,
        chains: &'c [ChainDump],
        table: Table,
    ) -> impl Iterator<Item = &'c str> {
        // Of a chain's uses one is each rule, and one each jump to it.
        let chains = chains.iter().filter(move |it| it.table == table.name() && it.uses > 0);
        let ours = move |chain: &&str| !matches!(self.place(table, chain), Where::Elsewhere);
        chains.map(|chain| &*chain.name).filter(ours)
    }

    /// Starts reading the rules of a chain.
    pub(crate) fn chain(&self, table: Table, chain: &str) -> ChainReader<'_> {
        let place = self.place(table, chain);
        let rules = match &place {
            Where::Owned(_, name) => Some(RulesBuilder::new(name)),
            Where::Base(_) | Where::Elsewhere | Where::Shared(_) => None,
        };
        ChainReader { scope: self, table, place, rules, entries: Vec::new(), foreign: Vec::new() }
    }

    fn place(&self, table: Table, chain: &str) -> Where {
        let base = BaseChain::ALL.into_iter().find(|it| it.table() == table && it.name() == chain);
        let kind = our_chain(self.prefix, self.names, table, chain).zip(ChainName::new(chain));
        match (base, kind) {
            (Some(base), _) => Where::Base(base),
            (None, Some((kind, name))) if self.is_shared(table, kind, &name) => Where::Shared(name),
            (None, Some((kind, name))) => Where::Owned(kind, name),
            (None, None) => Where::Elsewhere,
        }
    }

    /// Says whether the rules of a chain are objects of their own.
    pub(crate) fn is_shared(&self, table: Table, kind: ChainKind, name: &ChainName) -> bool {
        match kind {
            ChainKind::Branch => true,
            ChainKind::Fixed => shared_chains(self.names, true).contains(&(table, *name)),
            ChainKind::Endpoint | ChainKind::Part | ChainKind::Service(_) => false,
        }
    }

    pub(crate) fn firewall(&self) -> Key {
        Key::chain(self.family, Table::Filter, ChainKind::Fixed, self.names.firewall)
    }

    /// Says whether an object belongs to the firewall chain, which we share with kubelet.
    pub(crate) fn is_about_firewall(&self, key: &Key) -> bool {
        match &key.0 {
            Object::Entry { is_jump: true, .. } => {
                self.jumps.get(key).is_some_and(|to| *to == self.names.firewall)
            }
            Object::Entry { table, chain, .. } => {
                *table == Table::Filter && *chain == self.names.firewall
            }
            Object::Table { .. }
            | Object::Base { .. }
            | Object::Chain { .. }
            | Object::Foreign { .. } => false,
        }
    }

    /// Leaves the firewall chain out unless something in or at it is ours, or it is ours and nobody
    /// else uses it.
    pub(super) fn drop_foreign_firewall(&self, found: &mut Objects, chains: &[ChainDump]) {
        let in_use = found.keys().any(|key| self.is_about_firewall(key));
        let left_by_us = chains.iter().any(|chain| {
            chain.table == Table::Filter.name()
                && chain.name == self.names.firewall.as_str()
                && chain.userdata == OBJECT_MARK
                && chain.uses == 0
        });
        if !in_use && !left_by_us {
            found.remove(&self.firewall());
        }
    }
}

/// A chain with a built-in name that is not what iptables makes.
#[derive(Debug)]
pub(super) struct OddChain(pub(super) BaseChain);

fn check_base(base: BaseChain, chain: &ChainDump) -> Result<(), OddChain> {
    let wanted = hook(base);
    let kind = match base.table() {
        Table::Filter => "filter",
        Table::Nat => "nat",
    };
    match &chain.base {
        Some(it)
            if it.hook == wanted.hook as u32
                && it.priority == wanted.priority
                && it.kind == kind =>
        {
            Ok(())
        }
        _ => Err(OddChain(base)),
    }
}

/// What a chain is to us.
#[derive(Clone, Copy, Debug)]
enum Where {
    Base(BaseChain),
    Elsewhere,
    Owned(ChainKind, ChainName),
    Shared(ChainName),
}

/// Turns the rules of one chain into objects as they come.
pub(crate) struct ChainReader<'s> {
    scope: &'s Scope<'s>,
    table: Table,
    place: Where,
    /// The chain under construction, if its rules belong to it.
    rules: Option<RulesBuilder>,
    /// Rules that are objects of their own, and their handles.
    entries: Vec<(Key, Value, u64)>,
    /// Handles of rules that are not ours in a chain that is.
    foreign: Vec<u64>,
}

impl ChainReader<'_> {
    /// Takes one rule of nf_tables in.
    pub(super) fn read(&mut self, rule: &RuleRef<'_>) {
        if !matches!(self.place, Where::Elsewhere) {
            encode::read(rule, self.scope.family, |it| self.take(it, rule.handle));
        }
    }

    /// Takes one rule in, in the order of the chain; `None` for one that could not be understood.
    pub(crate) fn take(&mut self, rule: Option<(&Matches<'_>, &Target<'_>)>, handle: u64) {
        let scope = self.scope;
        match self.place {
            Where::Elsewhere => {}
            Where::Owned(..) => match (&mut self.rules, rule) {
                (Some(builder), Some((matches, target))) => builder.push(matches, target),
                (Some(builder), None) => builder.push_unreadable(),
                (None, _) => {}
            },
            Where::Base(base) => {
                let Some((matches, Target::Jump(chain))) = rule else { return };
                let key = Key::jump(scope.family, base, matches);
                if scope.jumps.get(&key).is_some_and(|to| to.as_str() == *chain) {
                    let value = Value::entry(&Target::Jump(chain), Place::Head);
                    self.entries.push((key, value, handle));
                }
            }
            Where::Shared(name) => self.shared(name, rule, handle),
        }
    }

    fn shared(&mut self, chain: ChainName, rule: Option<(&Matches<'_>, &Target<'_>)>, handle: u64) {
        let (scope, table) = (self.scope, self.table);
        let is_firewall = table == Table::Filter && chain == scope.names.firewall;
        let Some((matches, target)) = rule.filter(|(matches, _)| matches.owned || !is_firewall)
        else {
            // Others have rules there.
            if !is_firewall {
                self.foreign.push(handle);
            }
            return;
        };
        let nodes = table == Table::Nat && chain == scope.names.services;
        let tail = nodes && matches.comment == Some(NODE_PORTS);
        let place = if tail { Place::Tail } else { Place::Head };
        if nodes && !tail {
            self.displace_tails();
        }
        let key = Key::entry(scope.family, table, chain, matches);
        self.entries.push((key, Value::entry(target, place), handle));
    }

    /// Rules that have to be last turn out not to be.
    fn displace_tails(&mut self) {
        for (_, Value(content), _) in self.entries.iter_mut().rev() {
            let Content::Entry { place: place @ Place::Tail, .. } = content else { break };
            *place = Place::Head;
        }
    }

    /// Adds the objects found, and tells the handles.
    pub(crate) fn finish(self, found: &mut Objects, mut tell: impl FnMut(&Key, u64)) {
        let Self { scope, table, place, rules, entries, mut foreign } = self;
        let family = scope.family;
        let chain = match place {
            Where::Owned(kind, name) => {
                if let Some(rules) = rules {
                    found.insert(Key::chain(family, table, kind, name), rules.build());
                }
                return;
            }
            Where::Base(base) => ChainName::fixed(base.name()),
            Where::Shared(name) => name,
            Where::Elsewhere => return,
        };
        for (key, value, handle) in entries {
            match found.entry(key) {
                // A second rule like one of ours is one too many.
                btree_map::Entry::Occupied(_) => foreign.push(handle),
                btree_map::Entry::Vacant(entry) => {
                    tell(entry.key(), handle);
                    entry.insert(value);
                }
            }
        }
        for handle in foreign {
            let key = Key(Object::Foreign { family, table, chain, handle });
            found.insert(key, Value(Content::Unknown));
        }
    }
}

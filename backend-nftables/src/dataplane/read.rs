//! Reading back what our table holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use proxier_core::{Count, Family, Protocol, ir::Pool};
use proxier_netlink::nft::{
    ChainDump, ElementRef, ElementValue, Expr, NftError, NftSocket, Policy, RuleFilter, RuleRef,
    Verdict,
};

use super::batch::{Handles, base, leads};
use crate::{
    codec,
    field::nft_family,
    object::{
        Chain, ChainName, Content, Element, Key, Object, POOLS, Pick, PortId, Says, SetName, Space,
        Stray, Value,
    },
    rule::Rule,
    sets,
    skeleton::pick,
};

type Dump = BTreeMap<Key, Value>;

/// Reads one family's table.
pub(super) struct Reader<'a> {
    pub nft: &'a mut NftSocket,
    pub table: &'a str,
    pub family: Family,
}

impl Reader<'_> {
    /// Everything in the table but the table itself; `None` if its sets are not ours.
    pub(super) async fn read(&mut self) -> Result<Option<Dump>, NftError> {
        let mut found = Dump::new();
        let kernel = nft_family(self.family);
        let mut known = Vec::new();
        for dump in self.nft.sets(kernel, Some(self.table)).await? {
            match SetName::parse(&dump.name) {
                Some(set) if sets::is_as_made(&dump, self.family, set) => {
                    self.insert(&mut found, Object::Set(set), Value::EXISTS);
                    known.push(set);
                }
                Some(_) => return Ok(None),
                None => self.stray(&mut found, Stray::Set(dump.name)),
            }
        }
        self.chains(&mut found).await?;
        for set in &known {
            if !matches!(set, SetName::Affinity(_)) {
                self.elements(*set, &mut found).await?;
            }
        }
        for pool in POOLS {
            if known.contains(&SetName::Affinity(pool)) {
                self.affinities(pool, &mut found).await?;
            }
        }
        Ok(Some(found))
    }

    async fn chains(&mut self, found: &mut Dump) -> Result<(), NftError> {
        let chains = self.nft.chains(nft_family(self.family)).await?;
        let table = self.table;
        for dump in chains.iter().filter(|chain| chain.table == table) {
            let Some(name) = ChainName::parse(&dump.name) else {
                self.stray(found, Stray::Chain(dump.name.clone()));
                continue;
            };
            let rules = self.rules(&dump.name).await?;
            let picks = matches!(name, ChainName::Picks(..));
            let content = if has_right_hook(dump, name) {
                let own = if picks { Vec::new() } else { rules_of(&rules) };
                let comment = dump.comment().map(Into::into);
                Content::Chain(Arc::new(Chain { comment, rules: own }))
            } else {
                Content::Odd("at another hook".into())
            };
            self.insert(found, Object::Chain(name), Value(content));
            if picks {
                self.picks(found, name, &dump.name, rules);
            }
        }
        Ok(())
    }

    async fn rules(&mut self, chain: &str) -> Result<Vec<(u64, Rule)>, NftError> {
        let filter = RuleFilter::chain(nft_family(self.family), self.table, chain);
        let visit = |all: &mut Vec<_>, rule: RuleRef<'_>| {
            let exprs = rule.exprs().map(Expr::into_owned).collect();
            all.push((rule.handle, Rule(exprs)));
        };
        self.nft.fold_rules(filter, Vec::new, visit).await
    }

    /// Reads the rules of a chain in which each is an object of its own.
    fn picks(&self, found: &mut Dump, name: ChainName, text: &str, rules: Vec<(u64, Rule)>) {
        for (handle, rule) in rules {
            let known = known_picks(self.family, name, &rule);
            let mut keys = known.map(|it| Key::new(self.family, Object::Pick(it)));
            match keys.find(|key| !found.contains_key(key)) {
                Some(key) => drop(found.insert(key, Value::EXISTS)),
                None => self.stray(found, Stray::Rule { chain: text.to_owned(), handle }),
            }
        }
    }

    /// The handles of the rules that some keys stand for.
    pub(super) async fn handles(&mut self, wanted: &[Key]) -> Result<Handles, NftError> {
        let mut handles = Handles::new();
        let chains: BTreeSet<_> = wanted
            .iter()
            .filter_map(|key| {
                let Object::Pick(it) = &key.object else { return None };
                Some(ChainName::Picks(it.space, it.pool))
            })
            .collect();
        for chain in chains {
            for (handle, rule) in self.rules(&chain.to_string()).await? {
                let known = known_picks(self.family, chain, &rule);
                let mut keys = known.map(|it| Key::new(self.family, Object::Pick(it)));
                if let Some(key) = keys.find(|key| !handles.contains_key(key)) {
                    handles.insert(key, handle);
                }
            }
        }
        Ok(handles)
    }

    async fn elements(&mut self, set: SetName, found: &mut Dump) -> Result<(), NftError> {
        let family = self.family;
        let name = set.to_string();
        let visit = |all: &mut Vec<_>, element: ElementRef<'_>| {
            all.push(object(set, family, &element));
        };
        let all =
            self.nft.fold_elements(nft_family(family), self.table, &name, Vec::new, visit).await?;
        found.extend(all);
        Ok(())
    }

    /// Finds affinities that lead where none may lead.
    async fn affinities(&mut self, pool: Pool, found: &mut Dump) -> Result<(), NftError> {
        let family = self.family;
        let member = |(id, ip)| {
            let element = Element::Member { pool, id, ip };
            found.contains_key(&Key::new(family, Object::Element(element)))
        };
        let stale = self.stale(pool, |to| !to.is_some_and(member)).await?;
        for key in stale {
            let element = Element::Odd { set: SetName::Affinity(pool), key };
            self.insert(found, Object::Element(element), Value(Content::Odd("stale".into())));
        }
        Ok(())
    }

    /// The keys of affinities for which `is_stale` holds, unless they are about to expire.
    pub(super) async fn stale(
        &mut self,
        pool: Pool,
        is_stale: impl Fn(Option<(PortId, IpAddr)>) -> bool,
    ) -> Result<Vec<Box<[u8]>>, NftError> {
        let (family, name) = (self.family, SetName::Affinity(pool).to_string());
        let visit = |all: &mut Vec<Box<[u8]>>, element: ElementRef<'_>| {
            let to = match &element.value {
                Some(ElementValue::Data(value)) => codec::affinity(family, element.key, value),
                _ => None,
            };
            let lives = element.expires_ms.is_none_or(|left| left > EXPIRES_ANYWAY_MS);
            if lives && is_stale(to) {
                all.push(element.key.into());
            }
        };
        self.nft.fold_elements(nft_family(family), self.table, &name, Vec::new, visit).await
    }

    /// The connections that were counted, by frontend.
    pub(super) async fn counters(&mut self) -> Result<BTreeMap<Key, Count>, NftError> {
        let family = self.family;
        let mut found = BTreeMap::new();
        for space in Space::ALL {
            let set = SetName::Frontends(space, Says::Counted);
            let visit = |all: &mut Vec<_>, it: ElementRef<'_>| {
                let element = codec::element(set, family, it.key, it.key_end);
                all.extend(element.zip(it.counter));
            };
            let name = set.to_string();
            let kernel = nft_family(family);
            let all = self.nft.fold_elements(kernel, self.table, &name, Vec::new, visit).await?;
            found.extend(all.into_iter().map(|(element, counter)| {
                let key = Key::new(family, Object::Element(element));
                // The chains that count see the first packet of a connection only.
                (key, Count { connections: Some(counter.packets), ..Count::default() })
            }));
        }
        Ok(found)
    }

    fn insert(&self, found: &mut Dump, object: Object, value: Value) {
        found.insert(Key::new(self.family, object), value);
    }

    fn stray(&self, found: &mut Dump, stray: Stray) {
        let odd = Value(Content::Odd("not one of ours".into()));
        self.insert(found, Object::Stray(Box::new(stray)), odd);
    }
}

/// Affinities with less time left are not worth deleting: they might be gone by then.
const EXPIRES_ANYWAY_MS: u64 = 1000;

fn rules_of(rules: &[(u64, Rule)]) -> Vec<Rule> {
    rules.iter().map(|(_, rule)| rule.clone()).collect()
}

fn has_right_hook(dump: &ChainDump, name: ChainName) -> bool {
    match (name, &dump.base) {
        (ChainName::Base(hook), Some(found)) => {
            let wanted = base(hook);
            let kind = match wanted.kind {
                proxier_netlink::nft::ChainType::Filter => "filter",
                proxier_netlink::nft::ChainType::Nat => "nat",
                proxier_netlink::nft::ChainType::Route => "route",
            };
            found.kind == kind
                && found.hook == wanted.hook as u32
                && found.priority == wanted.priority
                && found.policy == Policy::Accept
        }
        (ChainName::Base(_), None) => false,
        (_, found) => found.is_none(),
    }
}

/// What a rule may pick for, in order, if it is one that we could have written. Draws of one size are
/// the same rule, several times.
fn known_picks(family: Family, chain: ChainName, rule: &Rule) -> impl Iterator<Item = Pick> {
    let size = rule.0.iter().find_map(|expr| match (chain, expr) {
        (ChainName::Picks(space, pool), Expr::Lookup { set, .. }) => {
            match SetName::parse(&set.name) {
                Some(SetName::Size(its_space, its_pool, size)) => {
                    (its_space == space && its_pool == pool).then_some((space, pool, size))
                }
                _ => None,
            }
        }
        _ => None,
    });
    let each = size.into_iter().flat_map(|(space, pool, size)| {
        [Protocol::Sctp, Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .flat_map(move |protocol| Pick::turns(space, pool, size, protocol))
    });
    each.filter(move |it| pick(family, *it) == *rule)
}

/// The object that an element is.
fn object(set: SetName, family: Family, found: &ElementRef<'_>) -> (Key, Value) {
    let plain = found.timeout_ms.is_none() && found.userdata.is_empty();
    let element = codec::element(set, family, found.key, found.key_end).filter(|_| plain);
    let (element, value) = match element {
        Some(element) => {
            let value = value(&element, family, found.value.as_ref());
            (element, value)
        }
        None => {
            let key = found.key.into();
            (Element::Odd { set, key }, Content::Odd("not one of ours".into()))
        }
    };
    (Key::new(family, Object::Element(element)), Value(value))
}

fn value(element: &Element, family: Family, found: Option<&ElementValue<'_>>) -> Content {
    let odd = || Content::Odd("leads elsewhere".into());
    match (element, found) {
        (Element::Endpoint { .. }, Some(ElementValue::Data(bytes))) => {
            codec::endpoint(family, bytes).map_or_else(odd, Content::Endpoint)
        }
        (
            Element::Sticky { .. } | Element::Spread { .. } | Element::Remember(_),
            Some(ElementValue::Verdict(verdict)),
        ) => {
            let chain = match verdict {
                Verdict::Goto(chain) | Verdict::Jump(chain) => ChainName::parse(chain),
                Verdict::Accept
                | Verdict::Break
                | Verdict::Continue
                | Verdict::Drop
                | Verdict::Return => None,
            };
            match chain.filter(|chain| leads(*chain) == *verdict) {
                Some(chain) => Content::Leads(chain),
                None => odd(),
            }
        }
        (_, None) => Content::Exists,
        (_, Some(_)) => odd(),
    }
}

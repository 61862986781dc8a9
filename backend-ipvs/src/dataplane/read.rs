//! Reading the kernel's objects back.

use std::collections::BTreeMap;

use proxier_core::Family;
use proxier_netlink::nft::{ElementValue, NftError, NftSocket, RuleFilter};
use tracing::debug;

use super::batch::nft_family;
use crate::{
    object::{Base, Chain, ChainName, Key, Rule, SetName, Value},
    pack::{shape_of, unpack},
};

/// Reads every object of the table of a family.
pub(super) async fn read(
    nft: &mut NftSocket,
    family: Family,
    table: &str,
) -> Result<BTreeMap<Key, Value>, NftError> {
    let kernel = nft_family(family);
    let mut found = BTreeMap::new();
    if !nft.tables(kernel).await?.iter().any(|it| it.name == table) {
        return Ok(found);
    }
    found.insert(Key::Table(family), Value::Exists);
    let names: BTreeMap<_, _> = ChainName::all().map(|name| (name.to_string(), name)).collect();
    for chain in nft.chains(kernel).await? {
        if chain.table != table {
            continue;
        }
        let foreign = || ChainName::Foreign(chain.name.clone());
        let name = names.get(&chain.name).cloned().unwrap_or_else(foreign);
        let rules = nft.rules(RuleFilter::chain(kernel, table, &chain.name)).await?;
        let rules = rules.into_iter().map(|rule| Rule {
            text: rule.comment().unwrap_or_default().to_owned(),
            exprs: rule.exprs,
        });
        let base =
            chain.base.map(|it| Base { kind: it.kind, hook: it.hook, priority: it.priority });
        let chain = Chain { base, rules: rules.collect() };
        found.insert(Key::Chain(family, name), Value::Chain(chain));
    }
    let names: BTreeMap<_, _> = SetName::all().map(|set| (set.to_string(), set)).collect();
    for set in nft.sets(kernel, Some(table)).await? {
        let Some(name) = names.get(&set.name).copied() else { continue };
        let shape = shape_of(set.key, set.flags);
        found.insert(Key::Set(family, name), Value::Set(shape));
        let visit = |items: &mut Vec<_>, element: proxier_netlink::nft::ElementRef<'_>| {
            let mark = match &element.value {
                Some(ElementValue::Data(data)) => (**data).try_into().ok(),
                Some(_) | None => None,
            };
            let value = mark.map_or(Value::Exists, |mark| Value::Mark(u32::from_ne_bytes(mark)));
            items.push(unpack(family, name, element.key, element.key_end).zip(Some(value)));
        };
        let items = nft.fold_elements(kernel, table, &set.name, Vec::new, visit).await?;
        for item in items {
            match item {
                Some((item, value)) => drop(found.insert(Key::Element(name, item), value)),
                None => debug!(%family, set = %name, "an element that is not ours"),
            }
        }
    }
    Ok(found)
}

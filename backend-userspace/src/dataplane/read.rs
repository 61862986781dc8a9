//! Reading the kernel's objects back.

use std::collections::BTreeMap;

use proxier_core::Family;
use proxier_netlink::{
    gate::{self, Content},
    nft::{ElementRef, NftError, NftSocket},
};
use tracing::debug;

use crate::object::{ChainName, Key, SetName, Value};

/// Reads every object of the table of a family.
pub(super) async fn read(
    nft: &mut NftSocket,
    family: Family,
    table: &str,
) -> Result<BTreeMap<Key, Value>, NftError> {
    let sets: BTreeMap<_, _> = SetName::all().map(|set| (set.to_string(), set)).collect();
    let element = |set: &str, element: &ElementRef<'_>| {
        let name = *sets.get(set)?;
        let item = name.kind().unpack(family, element.key, element.key_end);
        if item.is_none() {
            debug!(%family, set, "an element that is not ours");
        }
        Some((Key::Element(name, item?), Value::Exists))
    };
    let Some(Content { chains, sets: found, elements }) =
        gate::read(nft, family, table, element).await?
    else {
        return Ok(BTreeMap::new());
    };
    let names: BTreeMap<_, _> = ChainName::all().map(|name| (name.to_string(), name)).collect();
    let chains = chains.into_iter().map(|(name, chain)| {
        let name = names.get(&name).cloned().unwrap_or(ChainName::Foreign(name));
        (Key::Chain(family, name), Value::Chain(chain))
    });
    let found = found
        .into_iter()
        .filter_map(|(name, shape)| Some((Key::Set(family, *sets.get(&name)?), Value::Set(shape))));
    let table = (Key::Table(family), Value::Exists);
    Ok([table].into_iter().chain(chains).chain(found).chain(elements).collect())
}

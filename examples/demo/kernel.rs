//! What the node's kernel holds, counted without any tool.

use std::fmt;

use proxier_netlink::{
    NetNs,
    nft::{Family, NftSocket, RuleFilter},
};
use proxier_testkit::lab::Ns;
use serde::Serialize;

use crate::screen::many;

/// Everything that proxiers make, counted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Holdings {
    pub(crate) tables: usize,
    pub(crate) chains: usize,
    pub(crate) sets: usize,
    pub(crate) rules: usize,
    pub(crate) links: usize,
}

impl Holdings {
    /// Counts what is in a namespace.
    pub(crate) async fn of(ns: &Ns) -> Result<Self, Box<dyn std::error::Error>> {
        let mut nft = NftSocket::open(&NetNs::Path(ns.path()))?;
        let all = Family::Unspec;
        Ok(Self {
            tables: nft.tables(all).await?.len(),
            chains: nft.chains(all).await?.len(),
            sets: nft.sets(all, None).await?.len(),
            rules: nft.fold_rules(RuleFilter::family(all), || 0, |count, _| *count += 1).await?,
            links: ns.links()?.len(),
        })
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tables, chains, sets, rules, .. } = *self;
        let counts = [(tables, "table"), (chains, "chain"), (sets, "set"), (rules, "rule")];
        let text: Vec<_> = counts.iter().map(|(count, what)| many(*count, what)).collect();
        f.write_str(&text.join(", "))
    }
}

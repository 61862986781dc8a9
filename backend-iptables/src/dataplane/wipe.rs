//! Removing every trace, without knowing what there should be.

use std::{borrow::Cow, collections::BTreeSet};

use proxier_core::{Family, spi::CommitError};
use proxier_netlink::{
    nft::{ChainDump, Expr, NftError, NftSocket, RuleFilter, RuleRef, Transaction, Verdict},
    spi::read_error,
};
use tracing::debug;

use super::{
    IptablesDataplane,
    batch::{nft_family, our_chain},
    check_owner,
};
use crate::{
    encode::{OBJECT_MARK, RULE_MARK},
    names::FixedNames,
    object::{ChainKind, Table},
};

/// How often removing what others might be changing is tried.
const ATTEMPTS: u32 = 5;

/// A rule by where it is.
struct RuleAt {
    table: Table,
    chain: String,
    handle: u64,
    /// It carries our mark: it is in, or leads to, the firewall chain.
    marked: bool,
}

/// A chain of ours.
type OurChain = (Table, ChainKind, String);

impl IptablesDataplane {
    /// Removes everything of ours in one family.
    pub(super) async fn wipe_family(&mut self, family: Family) -> Result<(), CommitError> {
        let Self { nft, config, names, .. } = self;
        let kernel = nft_family(family);
        let tables = match nft.tables(kernel).await {
            // A kernel without the family has nothing of ours.
            Err(NftError::Unsupported { .. }) => return Ok(()),
            other => other.map_err(read_error)?,
        };
        check_owner(&tables, nft.portid())?;
        let chains = nft.chains(kernel).await.map_err(read_error)?;
        let scope = Wipe { family, prefix: &config.prefix, names };
        let ours = scope.our_chains(&chains);
        let rules = scope.rules(nft, &chains, &ours).await.map_err(read_error)?;
        debug!(%family, chains = ours.len(), rules = rules.len(), "removing");
        scope.remove(nft, &chains, &ours, &rules).await.map_err(read_error)?;
        scope.remove_empty(nft).await.map_err(read_error)
    }
}

struct Wipe<'a> {
    family: Family,
    prefix: &'a str,
    names: &'a FixedNames,
}

impl Wipe<'_> {
    /// Chains of ours, in the order in which they lead on to each other; without the firewall chain,
    /// which others may use.
    fn our_chains(&self, chains: &[ChainDump]) -> BTreeSet<OurChain> {
        let ours = chains.iter().filter(|chain| chain.base.is_none()).filter_map(|chain| {
            let table = Table::ALL.into_iter().find(|table| table.name() == chain.table)?;
            let kind = our_chain(self.prefix, self.names, table, &chain.name)?;
            (!self.is_firewall(table, &chain.name)).then(|| (table, kind, chain.name.clone()))
        });
        ours.collect()
    }

    fn is_firewall(&self, table: Table, chain: &str) -> bool {
        table == Table::Filter && chain == self.names.firewall.as_str()
    }

    /// Rules outside our chains that are ours or lead to our chains.
    async fn rules(
        &self,
        nft: &mut NftSocket,
        chains: &[ChainDump],
        ours: &BTreeSet<OurChain>,
    ) -> Result<Vec<RuleAt>, NftError> {
        let mut found = Vec::new();
        for chain in chains {
            let Some(table) = Table::ALL.into_iter().find(|it| it.name() == chain.table) else {
                continue;
            };
            let inside = our_chain(self.prefix, self.names, table, &chain.name).is_some();
            if inside && !self.is_firewall(table, &chain.name) {
                continue;
            }
            let filter = RuleFilter::chain(nft_family(self.family), table.name(), &chain.name);
            let visit = |found: &mut Vec<RuleAt>, rule: RuleRef<'_>| {
                let about_firewall = self.is_firewall(table, &rule.chain)
                    || jumps(&rule).any(|to| self.is_firewall(table, &to));
                let marked = about_firewall && rule.userdata == RULE_MARK;
                if marked || self.leads_to_us(table, &rule, ours) {
                    let chain = rule.chain.clone().into_owned();
                    found.push(RuleAt { table, chain, handle: rule.handle, marked });
                }
            };
            found.append(&mut nft.fold_rules(filter, Vec::new, visit).await?);
        }
        Ok(found)
    }

    fn leads_to_us(&self, table: Table, rule: &RuleRef<'_>, ours: &BTreeSet<OurChain>) -> bool {
        jumps(rule).any(|chain| {
            let kind = our_chain(self.prefix, self.names, table, &chain);
            kind.is_some_and(|kind| ours.contains(&(table, kind, chain.into_owned())))
        })
    }

    /// Removes rules and chains, cut where one transaction would not take them.
    async fn remove(
        &self,
        nft: &mut NftSocket,
        chains: &[ChainDump],
        ours: &BTreeSet<OurChain>,
        rules: &[RuleAt],
    ) -> Result<(), NftError> {
        let kernel = nft_family(self.family);
        let limit = nft.max_batch_bytes().saturating_sub(4096);
        let mut tx = Transaction::new();
        for RuleAt { table, chain, handle, .. } in rules {
            tx.del_rule(kernel, table.name(), chain, *handle);
        }
        let (fixed, services): (Vec<_>, Vec<_>) = ours
            .iter()
            .partition(|(_, kind, _)| matches!(kind, ChainKind::Fixed | ChainKind::Branch));
        for (table, _, chain) in &fixed {
            tx.flush_chain(kernel, table.name(), chain);
        }
        for (table, _, chain) in services.into_iter().chain(fixed) {
            if tx.len_bytes() > limit {
                nft.commit(&tx).await?;
                tx.clear();
            }
            tx.del_chain(kernel, table.name(), chain);
        }
        let marked = rules.iter().filter(|rule| rule.marked).count();
        let free = chains.iter().any(|chain| {
            chain.table == Table::Filter.name()
                && chain.name == self.names.firewall.as_str()
                && chain.userdata == OBJECT_MARK
                && usize::try_from(chain.uses).is_ok_and(|uses| uses <= marked)
        });
        if free {
            tx.del_chain(kernel, Table::Filter.name(), self.names.firewall.as_str());
        }
        nft.commit(&tx).await.map(drop)
    }

    /// Removes built-in chains and tables that we made, if nothing is in them.
    async fn remove_empty(&self, nft: &mut NftSocket) -> Result<(), NftError> {
        for _ in 0..ATTEMPTS {
            // Whatever somebody else puts there after this makes the commit fail.
            let mut tx = Transaction::at(nft.generation().await?);
            self.collect_empty(nft, &mut tx).await?;
            match nft.commit(&tx).await {
                Err(NftError::Stale) => {}
                other => return other.map(drop),
            }
        }
        Err(NftError::Stale)
    }

    async fn collect_empty(
        &self,
        nft: &mut NftSocket,
        tx: &mut Transaction,
    ) -> Result<(), NftError> {
        let kernel = nft_family(self.family);
        let chains = nft.chains(kernel).await?;
        for table in nft.tables(kernel).await? {
            if !Table::ALL.iter().any(|it| it.name() == table.name) {
                continue;
            }
            let mut removed = 0;
            for chain in chains.iter().filter(|chain| chain.table == table.name) {
                if chain.userdata == OBJECT_MARK && chain.base.is_some() && chain.uses == 0 {
                    tx.del_chain(kernel, &table.name, &chain.name);
                    removed += 1;
                }
            }
            if table.userdata == OBJECT_MARK && table.uses == removed {
                tx.del_table(kernel, &table.name);
            }
        }
        Ok(())
    }
}

/// The chains that a rule leads to.
fn jumps<'r>(rule: &RuleRef<'r>) -> impl Iterator<Item = Cow<'r, str>> {
    rule.exprs().filter_map(|expr| {
        let Expr::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) = expr else {
            return None;
        };
        Some(chain)
    })
}

//! The I/O half of the mode: transactions, reading back, removing.

mod batch;
pub(crate) mod error;
mod handles;
mod read;
mod wipe;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use proxier_core::{
    ByFamily, Count, Family,
    conntrack::{FlowFilter, Forgotten},
    spi::{CommitError, Dataplane},
};
use proxier_netlink::{
    NetNs, OpenError,
    ct::Conntrack,
    nft::{Committed, Expr, NftSocket, RuleFilter, RuleRef, TableDump, Transaction},
    spi::{self, read_error},
};
use tracing::{debug, trace};

use self::{
    batch::{Batch, Context, UnknownHandle},
    error::Failure,
    handles::Handles,
};
pub(crate) use self::{
    batch::{nft_family, our_chain},
    read::{ChainReader, Objects, Scope},
};
use crate::{
    backend::{Iptables, Op},
    config::Config,
    names::{ChainName, FixedNames},
    object::{ChainKind, Content, Key, Object, Table, Value},
};

/// Operations sent at once where the socket takes large batches.
const BATCH_OPS: usize = 4096;
/// How many chains are listed as one: that somebody else commits meanwhile is found out once for all of
/// them, and makes the list begin again.
const CHAINS_AT_ONCE: usize = 64;
/// A second refusal within this time is not blamed on somebody else's changes.
const SURPRISE: Duration = Duration::from_secs(5);
/// Bytes of an operation, about; for small sockets.
const OP_BYTES: usize = 2048;

/// The I/O half of the iptables mode: one netlink socket to nf_tables, one to conntrack.
pub struct IptablesDataplane {
    nft: NftSocket,
    conntrack: Conntrack,
    config: Config,
    names: FixedNames,
    families: ByFamily<FamilyState>,
}

/// What is known of one family.
#[derive(Debug, Default)]
struct FamilyState {
    handles: Handles,
    /// The chains were found to be ours, or free.
    admitted: bool,
    /// When the kernel last held something else than was thought.
    surprised: Option<Instant>,
}

impl IptablesDataplane {
    /// Opens the sockets. Reads and changes nothing.
    ///
    /// # Errors
    /// [`OpenError`]: the namespace cannot be entered, there is no tokio runtime, or the kernel has
    /// no netfilter sockets.
    pub fn open(backend: &Iptables, netns: &NetNs) -> Result<Self, OpenError> {
        Ok(Self {
            nft: NftSocket::open(netns)?,
            conntrack: Conntrack::open(netns)?,
            config: backend.config().clone(),
            names: backend.names().clone(),
            families: ByFamily::default(),
        })
    }

    /// Encodes and sends operations.
    async fn send(&mut self, family: Family, ops: &[Op]) -> Result<(), Sent> {
        let drop_firewall = self.firewall_is_free(family, ops).await.map_err(Sent::Failed)?;
        let context = Context {
            family,
            prefix: &self.config.prefix,
            names: &self.names,
            handles: &self.families.of(family).handles,
            limit_bytes: self.nft.max_batch_bytes(),
            more: ops.len() >= self.batch_limit(),
            drop_firewall,
            exact: self.config.exact,
        };
        let batch = Batch::encode(&context, ops).map_err(|UnknownHandle| Sent::NeedsHandles)?;
        let Batch { transactions, echo } = batch;
        let bytes: usize = transactions.iter().map(Transaction::len_bytes).sum();
        trace!(%family, ops = ops.len(), bytes, "committing");
        for (index, transaction) in transactions.iter().enumerate() {
            match self.nft.commit(transaction).await {
                Ok(committed) => self.learn(family, ops, echo, &committed),
                Err(error) => {
                    let failure = Failure::of(error);
                    let surprise = failure.is_surprise() && self.surprise(family);
                    if index > 0 || surprise {
                        return Err(Sent::Failed(CommitError::Unknown {
                            doing: "a transaction on objects that somebody else changed",
                            source: failure.into_errno(),
                        }));
                    }
                    return Err(Sent::Failed(failure.explain(ops)));
                }
            }
        }
        self.forget_handles(family, ops, echo);
        Ok(())
    }

    /// Takes note that the kernel holds something else than was thought. Says whether reading it back
    /// may help: not if that was just done because of another surprise.
    fn surprise(&mut self, family: Family) -> bool {
        let (now, state) = (Instant::now(), self.families.of_mut(family));
        let last = state.surprised.replace(now);
        last.is_none_or(|last| now.duration_since(last) > SURPRISE)
    }

    /// Takes note of the handles of new rules.
    fn learn(&mut self, family: Family, ops: &[Op], echo: bool, committed: &Committed) {
        if !echo {
            return;
        }
        let handles = &mut self.families.of_mut(family).handles;
        for rule in &committed.handles {
            let index = rule.tag.and_then(|tag| usize::try_from(tag).ok());
            if let Some(op) = index.and_then(|index| ops.get(index)) {
                handles.insert(op.key(), rule.handle);
            }
        }
    }

    /// Forgets the handles of rules that are gone, or that have another one now.
    fn forget_handles(&mut self, family: Family, ops: &[Op], echo: bool) {
        let handles = &mut self.families.of_mut(family).handles;
        for op in ops {
            let gone = match op {
                Op::Del(..) => true,
                Op::Set { .. } => !echo,
                Op::Add(..) => false,
            };
            if gone && matches!(op.key().0, Object::Entry { .. }) {
                handles.remove(op.key());
            }
        }
    }

    /// Reads the handles of all rules in the chains where operations need some that are not known.
    async fn load_handles(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        let scope = Scope::new(family, &self.config.prefix, &self.names);
        let handles = &mut self.families.of_mut(family).handles;
        let chains: BTreeSet<_> = ops
            .iter()
            .filter(|op| !matches!(op, Op::Add(..)) && handles.find(op.key()).is_none())
            .filter_map(|op| match &op.key().0 {
                Object::Entry { table, chain, .. } => Some((*table, *chain)),
                Object::Table { .. }
                | Object::Base { .. }
                | Object::Chain { .. }
                | Object::Foreign { .. } => None,
            })
            .collect();
        for (table, chain) in &chains {
            let filter = RuleFilter::chain(nft_family(family), table.name(), chain.as_str());
            let start = || scope.chain(*table, chain.as_str());
            let read = self.nft.fold_rules(filter, start, |reader, rule| reader.read(&rule));
            let read = read.await.map_err(read_error)?;
            read.finish(&mut Objects::new(), |key, handle| handles.insert(key, handle));
        }
        debug!(%family, chains = chains.len(), "read the handles of shared rules");
        Ok(())
    }

    /// Says whether the firewall chain, if `ops` remove it, is used by nobody else. Then every rule in
    /// it, and every jump to it, is among `ops`.
    async fn firewall_is_free(&mut self, family: Family, ops: &[Op]) -> Result<bool, CommitError> {
        let scope = Scope::new(family, &self.config.prefix, &self.names);
        let firewall = self.names.firewall;
        let goes = ops.iter().any(
            |op| matches!(op, Op::Del(Key(Object::Chain { name, .. }), _) if *name == firewall),
        );
        if !goes {
            return Ok(false);
        }
        let removed = ops
            .iter()
            .filter(|op| matches!(op, Op::Del(..)) && scope.is_about_firewall(op.key()))
            .count();
        let chains = self.nft.chains(nft_family(family)).await.map_err(read_error)?;
        let uses = chains
            .iter()
            .find(|chain| chain.table == Table::Filter.name() && chain.name == firewall.as_str())
            .map(|chain| (chain.uses, chain.userdata == crate::encode::OBJECT_MARK));
        Ok(uses.is_some_and(|(uses, ours)| {
            ours && usize::try_from(uses).is_ok_and(|uses| uses <= removed)
        }))
    }
}

/// Refuses to go on where the chains are another proxier's; `admitted` says that they were found not
/// to be.
pub(crate) fn check_admission(
    config: &Config,
    names: &FixedNames,
    family: Family,
    found: &Objects,
    admitted: &mut bool,
) -> Result<(), CommitError> {
    if *admitted || config.takeover {
        *admitted = true;
        return Ok(());
    }
    let fixed = |name| Key::chain(family, Table::Nat, ChainKind::Fixed, name);
    let (services, mark) = (fixed(names.services), fixed(names.mark_masq));
    let marked = match found.get(&mark) {
        Some(Value(Content::Rules(rules))) => {
            let mut rules = rules.iter().peekable();
            rules.peek().is_none() || rules.flatten().any(|(matches, _)| matches.owned)
        }
        _ => true,
    };
    if found.contains_key(&services) && !marked {
        return Err(CommitError::Foreign {
            object: services.to_string(),
            hint: "it was made by another proxier (kube-proxy?); stop that and clean up, choose \
                   another prefix, or set takeover"
                .to_owned(),
        });
    }
    *admitted = true;
    Ok(())
}

/// Why operations were not sent, or not taken.
enum Sent {
    Failed(CommitError),
    NeedsHandles,
}

/// Refuses tables that only another process may change.
fn check_owner(tables: &[TableDump], own_port: u32) -> Result<(), CommitError> {
    for table in tables {
        let ours = Table::ALL.iter().any(|it| it.name() == table.name);
        if ours && table.flags & TableDump::OWNER != 0 && table.owner != Some(own_port) {
            let port = table.owner.map_or_else(|| "unknown".to_owned(), |port| port.to_string());
            return Err(CommitError::Foreign {
                object: format!("table {} {}", table.family, table.name),
                hint: format!(
                    "only the process with netlink port {port} may change it (flag owner); \
                     iptables would fail as well"
                ),
            });
        }
    }
    Ok(())
}

#[async_trait]
impl Dataplane<Iptables> for IptablesDataplane {
    /// One transaction: all operations take effect together. Only where the socket's buffer is too
    /// small for that (see [`batch_limit`](Self::batch_limit)) it may be several, and an error after
    /// the first is [`CommitError::Unknown`].
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        match self.send(family, ops).await {
            Ok(()) => return Ok(()),
            Err(Sent::Failed(error)) => return Err(error),
            Err(Sent::NeedsHandles) => {}
        }
        self.load_handles(family, ops).await?;
        match self.send(family, ops).await {
            Ok(()) => Ok(()),
            Err(Sent::Failed(error)) => Err(error),
            Err(Sent::NeedsHandles) => Err(CommitError::Unknown {
                doing: "changing a rule that somebody else removed",
                source: std::io::ErrorKind::NotFound.into(),
            }),
        }
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let kernel = nft_family(family);
        let tables = self.nft.tables(kernel).await.map_err(read_error)?;
        check_owner(&tables, self.nft.portid())?;
        let chains = self.nft.chains(kernel).await.map_err(read_error)?;
        let scope = Scope::new(family, &self.config.prefix, &self.names);
        let mut found = scope.chains(&chains).map_err(|odd| CommitError::Foreign {
            object: Key::base(family, odd.0).to_string(),
            hint:
                "it is not the chain of this name that iptables makes; iptables would refuse the \
                   table as well"
                    .to_owned(),
        })?;
        let existing =
            Table::ALL.into_iter().filter(|it| tables.iter().any(|t| t.name == it.name()));
        found.extend(existing.map(|table| (Key::table_key(family, table), Value(Content::Exists))));
        let handles = &mut self.families.of_mut(family).handles;
        handles.clear();
        // KERNEL: a list of a table's rules begins again from its first chain for every 32 KiB
        // (net/netfilter/nf_tables_api.c nf_tables_dump_rules, v6.12): 18 s for 115,000 rules in
        // 55,000 chains. One list a chain takes less than 1 s.
        for table in Table::ALL {
            let chains: Vec<_> = scope.interesting(&chains, table).collect();
            for chains in chains.chunks(CHAINS_AT_ONCE) {
                let start = || chains.iter().map(|chain| scope.chain(table, chain)).collect();
                let visit =
                    |readers: &mut Vec<ChainReader<'_>>, index: usize, rule: RuleRef<'_>| {
                        if let Some(reader) = readers.get_mut(index) {
                            reader.read(&rule);
                        }
                    };
                let read = self.nft.fold_chains(kernel, table.name(), chains, start, visit).await;
                for reader in read.map_err(read_error)? {
                    reader.finish(&mut found, |key, handle| handles.insert(key, handle));
                }
            }
        }
        scope.drop_foreign_firewall(&mut found, &chains);
        let admitted = &mut self.families.of_mut(family).admitted;
        check_admission(&self.config, &self.names, family, &found, admitted)?;
        debug!(%family, objects = found.len(), "read back");
        Ok(found)
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        let mut errors = Vec::new();
        for family in Family::ALL {
            if let Err(error) = self.wipe_family(family).await {
                errors.push((family, error));
            }
            *self.families.of_mut(family) = FamilyState::default();
        }
        spi::combine(errors)
    }

    /// What the last rule of each endpoint's chain counted.
    async fn read_counters(&mut self, family: Family) -> Result<BTreeMap<Key, Count>, CommitError> {
        let kernel = nft_family(family);
        let chains = self.nft.chains(kernel).await.map_err(read_error)?;
        let of_endpoint = |chain: &str| {
            let kind = our_chain(&self.config.prefix, &self.names, Table::Nat, chain);
            kind == Some(ChainKind::Endpoint)
        };
        let chains: Vec<_> = chains
            .iter()
            .filter(|chain| chain.table == Table::Nat.name() && of_endpoint(&chain.name))
            .map(|chain| &*chain.name)
            .collect();
        let mut counts = BTreeMap::new();
        for chains in chains.chunks(CHAINS_AT_ONCE) {
            let start = || vec![None; chains.len()];
            let visit = |last: &mut Vec<Option<u64>>, index: usize, rule: RuleRef<'_>| {
                if let Some(last) = last.get_mut(index) {
                    *last = packets(&rule);
                }
            };
            let read = self.nft.fold_chains(kernel, Table::Nat.name(), chains, start, visit).await;
            for (chain, connections) in chains.iter().zip(read.map_err(read_error)?) {
                let Some(name) = ChainName::new(chain) else { continue };
                let key = Key::chain(family, Table::Nat, ChainKind::Endpoint, name);
                counts.insert(key, Count { connections, ..Count::default() });
            }
        }
        Ok(counts)
    }

    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        spi::forget_flows(&mut self.conntrack, family, filters, spi::translated_to).await
    }

    fn batch_limit(&self) -> usize {
        (self.nft.max_batch_bytes() / OP_BYTES).clamp(1, BATCH_OPS)
    }
}

/// How many packets passed a rule.
fn packets(rule: &RuleRef<'_>) -> Option<u64> {
    rule.exprs().find_map(|expr| {
        let Expr::Counter { packets, .. } = expr else { return None };
        Some(packets)
    })
}

impl fmt::Debug for IptablesDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IptablesDataplane").field("config", &self.config).finish_non_exhaustive()
    }
}

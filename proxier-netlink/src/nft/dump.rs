//! Reading nf_tables back.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use super::attr::*;
use super::element::{self, ElementDump, ElementRef};
use super::error::NftError;
use super::rule::{RuleDump, RuleRef};
use super::set::SetDump;
use super::types::{Family, Generation, MessageKind};
use super::{ChainDump, NftSocket, TableDump, Transaction};
use crate::batch::{NFNL_SUBSYS_NFTABLES, NLM_F_DUMP, NLM_F_REQUEST};
use crate::dec::Message;
use crate::enc::Writer;
use crate::sock::{DUMP_ATTEMPTS, NLMSG_ERROR};

/// How often a set is listed until that shows nothing twice.
// KERNEL: after many elements came or went, the hash table of a set gets another size in the
// background, a bucket at a time. A dump meanwhile shows some elements twice and leaves others out,
// and does not say so (lib/rhashtable.c rht_deferred_worker, net/netfilter/nft_set_hash.c
// nft_rhash_walk, v6.12).
const REHASH_ATTEMPTS: usize = 20;

/// Which rules to list.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct RuleFilter<'a> {
    family: Family,
    table: Option<&'a str>,
    chain: Option<&'a str>,
}

impl<'a> RuleFilter<'a> {
    /// All rules of a family; [`Family::Unspec`] for all families.
    pub const fn family(family: Family) -> Self {
        Self { family, table: None, chain: None }
    }

    /// The rules of one table.
    pub const fn table(family: Family, table: &'a str) -> Self {
        Self { family, table: Some(table), chain: None }
    }

    /// The rules of one chain.
    pub const fn chain(family: Family, table: &'a str, chain: &'a str) -> Self {
        Self { family, table: Some(table), chain: Some(chain) }
    }

    // KERNEL: filters of a rule dump are honoured since 4.15; older kernels list all, so the reader
    // checks again.
    fn accepts(&self, rule: &RuleRef<'_>) -> bool {
        (self.family == Family::Unspec || self.family == rule.family)
            && self.table.is_none_or(|table| rule.table == table)
            && self.chain.is_none_or(|chain| rule.chain == chain)
    }
}

/// # Listing
///
/// Every list shows one state of the kernel: when a commit of someone else disturbs it, it is begun
/// again, up to five times; a list of elements also when it shows one twice. Objects that do not exist
/// make empty lists, except where said.
///
/// Errors: [`NftError::Interrupted`] (try later), [`NftError::Permission`],
/// [`NftError::Unsupported`], [`NftError::Request`], [`NftError::Io`], [`NftError::Malformed`],
/// [`NftError::Overrun`] (try again).
///
/// Cancel safety: all are cancel safe. A list that was abandoned half-way is read to its end by the
/// next use of the socket.
impl NftSocket {
    /// The present generation.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn generation(&mut self) -> Result<Generation, NftError> {
        const WHAT: &str = "reading the generation";
        let (request, seq) = self.request(MessageKind::GETGEN, 0, Family::Unspec, |_| {});
        let mut answer = Err(NftError::Malformed { what: WHAT });
        self.sock
            .exchange([request.as_bytes(), &[]], &mut |message| {
                if message.seq == seq {
                    answer = read_generation(WHAT, message);
                }
            })
            .await
            .map_err(|error| NftError::from_sock(WHAT, error))?;
        answer
    }

    /// All tables of a family; [`Family::Unspec`] for all families.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn tables(&mut self, family: Family) -> Result<Vec<TableDump>, NftError> {
        self.list("listing tables", MessageKind::GETTABLE, family, |_| {}, TableDump::read).await
    }

    /// All chains of a family; [`Family::Unspec`] for all families.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn chains(&mut self, family: Family) -> Result<Vec<ChainDump>, NftError> {
        self.list("listing chains", MessageKind::GETCHAIN, family, |_| {}, ChainDump::read).await
    }

    /// All sets and maps of a family, or of one table of it.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing); [`NftError::Request`] with ENOENT if the table does not exist.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn sets(
        &mut self,
        family: Family,
        table: Option<&str>,
    ) -> Result<Vec<SetDump>, NftError> {
        let filter = |w: &mut Writer| {
            if let Some(table) = table {
                w.str(SET_TABLE, table);
            }
        };
        self.list("listing sets", MessageKind::GETSET, family, filter, SetDump::read).await
    }

    /// All rules the filter accepts, in the order of each chain.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn rules(&mut self, filter: RuleFilter<'_>) -> Result<Vec<RuleDump>, NftError> {
        self.fold_rules(filter, Vec::new, |all, rule| all.push(rule.to_owned())).await
    }

    /// Visits all rules the filter accepts, in the order of each chain, without copying them.
    ///
    /// `visit` collects what it wants in a state that `start` makes. A list that was disturbed is
    /// begun again with a new state, so that the result never holds a rule twice. Memory is one
    /// receive buffer and the state.
    ///
    /// The kernel's time is quadratic in the number of rules that pass the filter: 60,000 take it
    /// about 2 s. Where there are many chains, [`fold_chains`](Self::fold_chains) takes far less.
    // KERNEL: to go on after each 32 KiB, a rule dump walks all rules from the first again; a dump of
    // a chain starts at that chain (net/netfilter/nf_tables_api.c __nf_tables_dump_rules, v6.12).
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn fold_rules<S>(
        &mut self,
        filter: RuleFilter<'_>,
        mut start: impl FnMut() -> S,
        mut visit: impl FnMut(&mut S, RuleRef<'_>),
    ) -> Result<S, NftError> {
        self.fold_filters(&[filter], &mut start, &mut |state, _, rule| visit(state, rule)).await
    }

    /// Visits the rules of some chains of a table, in the order of each chain, without copying them;
    /// the number that `visit` is given says which chain. See [`fold_rules`](Self::fold_rules).
    ///
    /// All of it shows one state of the kernel. Each chain costs a request, and what is disturbed
    /// begins again with the first: cut a long list.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn fold_chains<S>(
        &mut self,
        family: Family,
        table: &str,
        chains: &[&str],
        mut start: impl FnMut() -> S,
        mut visit: impl FnMut(&mut S, usize, RuleRef<'_>),
    ) -> Result<S, NftError> {
        let filters = chains.iter().map(|chain| RuleFilter::chain(family, table, chain));
        self.fold_filters(&filters.collect::<Vec<_>>(), &mut start, &mut visit).await
    }

    async fn fold_filters<S>(
        &mut self,
        filters: &[RuleFilter<'_>],
        start: &mut impl FnMut() -> S,
        visit: &mut impl FnMut(&mut S, usize, RuleRef<'_>),
    ) -> Result<S, NftError> {
        let request = |filter: &RuleFilter<'_>| {
            self.request(MessageKind::GETRULE, NLM_F_DUMP, filter.family, |w| {
                if let Some(table) = filter.table {
                    w.str(RULE_TABLE, table);
                }
                if let Some(chain) = filter.chain {
                    w.str(RULE_CHAIN, chain);
                }
            })
        };
        let requests: Vec<_> = filters.iter().map(request).collect();
        let mut visit = |state: &mut S, index: usize, message: Message<'_>| {
            let accepts =
                |rule: &RuleRef<'_>| filters.get(index).is_some_and(|it| it.accepts(rule));
            if let Some(rule) = RuleRef::read(message).filter(accepts) {
                visit(state, index, rule);
            }
        };
        self.fold_requests("listing rules", &requests, start, &mut visit).await
    }

    /// All elements of a set.
    ///
    /// # Errors
    ///
    /// See [Listing](#listing); [`NftError::Request`] with ENOENT if the set does not exist.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn elements(
        &mut self,
        family: Family,
        table: &str,
        set: &str,
    ) -> Result<Vec<ElementDump>, NftError> {
        self.fold_elements(family, table, set, Vec::new, |all, e| all.push(e.to_owned())).await
    }

    /// Visits all elements of a set without copying them; see [`fold_rules`](Self::fold_rules).
    ///
    /// # Errors
    ///
    /// See [Listing](#listing); [`NftError::Request`] with ENOENT if the set does not exist.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn fold_elements<S>(
        &mut self,
        family: Family,
        table: &str,
        set: &str,
        mut start: impl FnMut() -> S,
        mut visit: impl FnMut(&mut S, ElementRef<'_>),
    ) -> Result<S, NftError> {
        const WHAT: &str = "listing elements";
        let attrs = |w: &mut Writer| {
            w.str(ELEM_LIST_TABLE, table);
            w.str(ELEM_LIST_SET, set);
        };
        let hasher = RandomState::new();
        let mut start = || (start(), HashSet::new(), false);
        let mut visit = |(state, seen, twice): &mut (S, HashSet<u64>, bool),
                         message: Message<'_>| {
            element::elements(message).for_each(|element| {
                let identity = (element.key, element.key_end, element.flags);
                *twice |= !seen.insert(hasher.hash_one(identity));
                visit(state, element);
            });
        };
        let kind = MessageKind::GETSETELEM;
        for _ in 0..REHASH_ATTEMPTS {
            let (state, _, twice) =
                self.fold(WHAT, kind, family, attrs, &mut start, &mut visit).await?;
            if !twice {
                return Ok(state);
            }
        }
        Err(NftError::Interrupted { what: WHAT })
    }

    async fn list<T>(
        &mut self,
        what: &'static str,
        kind: MessageKind,
        family: Family,
        attrs: impl FnOnce(&mut Writer),
        read: impl Fn(Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>, NftError> {
        let mut visit = |all: &mut Vec<T>, message: Message<'_>| all.extend(read(message));
        self.fold(what, kind, family, attrs, &mut Vec::new, &mut visit).await
    }

    async fn fold<S>(
        &mut self,
        what: &'static str,
        kind: MessageKind,
        family: Family,
        attrs: impl FnOnce(&mut Writer),
        start: &mut impl FnMut() -> S,
        visit: &mut impl FnMut(&mut S, Message<'_>),
    ) -> Result<S, NftError> {
        let request = self.request(kind, NLM_F_DUMP, family, attrs);
        let mut visit = |state: &mut S, _: usize, message: Message<'_>| visit(state, message);
        self.fold_requests(what, &[request], start, &mut visit).await
    }

    /// Carries out some requests for lists as if they were one. `visit` is told which one a message
    /// answers.
    async fn fold_requests<S>(
        &mut self,
        what: &'static str,
        requests: &[(Writer, u32)],
        start: &mut impl FnMut() -> S,
        visit: &mut impl FnMut(&mut S, usize, Message<'_>),
    ) -> Result<S, NftError> {
        'attempt: for _ in 0..DUMP_ATTEMPTS {
            let before = self.generation().await?;
            let mut state = start();
            for (index, (request, seq)) in requests.iter().enumerate() {
                let mut visit = |message: Message<'_>| visit(&mut state, index, message);
                let undisturbed = self.sock.dump_once(request.as_bytes(), *seq, &mut visit).await;
                if !undisturbed.map_err(|error| NftError::from_sock(what, error))? {
                    continue 'attempt;
                }
            }
            // KERNEL: a commit takes effect first and changes the generation later, so that a list
            // can show part of it and look undisturbed (net/netfilter/nf_tables_api.c
            // nf_tables_commit; seen on 6.18). A batch waits for the commit that is under way.
            match self.send_batch(what, &Transaction::at(before)).await {
                Ok(_) => return Ok(state),
                Err(NftError::Stale) => {}
                Err(error) => return Err(error),
            }
        }
        Err(NftError::Interrupted { what })
    }

    fn request(
        &mut self,
        kind: MessageKind,
        flags: u16,
        family: Family,
        attrs: impl FnOnce(&mut Writer),
    ) -> (Writer, u32) {
        let seq = self.sock.next_seq();
        let mut w = Writer::with_capacity(128);
        let number = NFNL_SUBSYS_NFTABLES << 8 | u16::from(kind.0);
        let mark = w.message(number, NLM_F_REQUEST | flags, seq, family.number(), 0);
        attrs(&mut w);
        w.end_message(mark);
        (w, seq)
    }
}

fn read_generation(what: &'static str, message: Message<'_>) -> Result<Generation, NftError> {
    if message.kind == NLMSG_ERROR {
        let ack = crate::ack::Ack::read(message.payload, message.flags);
        return Err(ack.map_or(NftError::Malformed { what }, |ack| NftError::from_ack(what, ack)));
    }
    generation(message).ok_or(NftError::Malformed { what })
}

/// The generation in a NEWGEN message.
pub(crate) fn generation(message: Message<'_>) -> Option<Generation> {
    let (_, attrs) = message.nfnl()?;
    attrs.table::<2>().be32(GEN_ID).map(Generation)
}

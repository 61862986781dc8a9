//! A table as a transaction, and as it is read back.

use std::fmt::Display;

use proxier_core::{Family, spi::Op};

use super::{Base, Chain, Kind, Rule, Shape};
use crate::nft::{
    BaseChain, ByteOrder, ChainSpec, ChainType, DataType, Element, ElementRef, Hook, NftError,
    NftSocket, Policy, RuleFilter, RuleSpec, SetFlags, SetSpec, TableSpec, Transaction,
};
use crate::{
    NetNs,
    spi::{self, nft_family},
};

/// What an object is to the table.
#[derive(Clone, Debug)]
pub enum Part<'a> {
    /// A chain and its name.
    Chain(String, &'a Chain),
    /// An element.
    Element {
        /// The set it is in.
        set: String,
        /// Its key; for an interval the first.
        key: Vec<u8>,
        /// For an interval, the last key.
        key_end: Option<Vec<u8>>,
        /// In a map, the mark it leads to.
        mark: Option<u32>,
    },
    /// A set, or a map to marks.
    Set {
        /// Its name.
        name: String,
        /// What its keys are.
        kind: Kind,
        /// It is a map.
        is_map: bool,
    },
    /// The table itself.
    Table,
}

/// Objects have another shape than this version gives them: the table has to be made anew.
#[derive(Clone, Copy, Debug)]
pub struct Misshapen;

/// Encodes the operations that concern a table; each message has the tag of its operation.
///
/// # Errors
/// A chain hangs somewhere else, or a set has other elements.
pub fn encode<'a, K, V>(
    family: Family,
    table: &str,
    ops: impl IntoIterator<Item = (u32, &'a Op<K, V>)>,
    part: impl Fn(&'a K, &'a V) -> Option<Part<'a>>,
) -> Result<Transaction, Misshapen>
where
    K: 'a,
    V: 'a,
{
    let mut batch = Batch { tx: Transaction::new(), family, table };
    let ops = ops.into_iter();
    let changes: Vec<_> = ops.map(|(tag, op)| (tag, Change::of(op, &part))).collect();
    // Rules lead to chains and sets that come later in the order of keys.
    for (tag, change) in &changes {
        batch.tx.op(*tag);
        batch.shell(change)?;
    }
    for (tag, change) in &changes {
        batch.tx.op(*tag);
        batch.content(change);
    }
    for (tag, change) in &changes {
        batch.tx.op(*tag);
        batch.remove(change);
    }
    Ok(batch.tx)
}

/// What an operation removes and adds.
struct Change<'a> {
    old: Option<Part<'a>>,
    new: Option<Part<'a>>,
}

impl<'a> Change<'a> {
    fn of<K, V>(op: &'a Op<K, V>, part: &impl Fn(&'a K, &'a V) -> Option<Part<'a>>) -> Self {
        match op {
            Op::Add(key, new) => Self { old: None, new: part(key, new) },
            Op::Del(key, old) => Self { old: part(key, old), new: None },
            Op::Set { key, old, new } => Self { old: part(key, old), new: part(key, new) },
        }
    }
}

struct Batch<'a> {
    tx: Transaction,
    family: Family,
    table: &'a str,
}

impl Batch<'_> {
    /// Makes tables, sets and chains.
    fn shell(&mut self, change: &Change<'_>) -> Result<(), Misshapen> {
        let kernel = nft_family(self.family);
        match (&change.old, &change.new) {
            (None, Some(Part::Table)) => {
                self.tx.table(TableSpec::new(kernel, self.table));
            }
            (None, Some(Part::Set { name, kind, is_map })) => self.set(name, *kind, *is_map),
            (None, Some(Part::Chain(name, chain))) => self.chain(name, chain),
            (Some(Part::Chain(name, old)), Some(Part::Chain(_, new))) if old.base == new.base => {
                self.tx.flush_chain(kernel, self.table, name);
            }
            (Some(Part::Chain(..) | Part::Set { .. }), Some(_)) => return Err(Misshapen),
            _ => {}
        }
        Ok(())
    }

    fn set(&mut self, name: &str, kind: Kind, is_map: bool) {
        let (kernel, key) = (nft_family(self.family), kind.key(self.family));
        self.tx.new_set(match kind.fields(self.family) {
            None if is_map => {
                let map = SetSpec::map(kernel, self.table, name, key, DataType::MARK);
                // For nft, which would print marks the wrong way round.
                let map = map.data_order(ByteOrder::Host);
                if kind == Kind::Marks { map.key_order(ByteOrder::Host) } else { map }
            }
            None => SetSpec::set(kernel, self.table, name, key),
            Some(fields) => SetSpec::set(kernel, self.table, name, key)
                .interval_fields(fields)
                .flags(SetFlags::INTERVAL),
        });
    }

    fn chain(&mut self, name: &str, chain: &Chain) {
        let mut spec = ChainSpec::new(nft_family(self.family), self.table, name);
        if let Some(Base { kind, hook, priority }) = &chain.base {
            spec = spec.base(BaseChain {
                kind: match kind.as_str() {
                    "nat" => ChainType::Nat,
                    "route" => ChainType::Route,
                    _ => ChainType::Filter,
                },
                hook: match hook {
                    0 => Hook::Prerouting,
                    1 => Hook::Input,
                    2 => Hook::Forward,
                    3 => Hook::Output,
                    _ => Hook::Postrouting,
                },
                priority: *priority,
                policy: Policy::Accept,
            });
        }
        self.tx.chain(spec);
    }

    /// Makes rules and elements.
    fn content(&mut self, change: &Change<'_>) {
        match (&change.old, &change.new) {
            (_, Some(Part::Chain(name, chain))) => {
                for rule in &chain.rules {
                    let spec = RuleSpec::append(nft_family(self.family), self.table, name);
                    self.tx.rule(spec.comment(&rule.text), |writer| {
                        for expr in &rule.exprs {
                            writer.push(expr);
                        }
                    });
                }
            }
            (old, Some(new @ Part::Element { .. })) => {
                if let Some(old) = old {
                    self.element(old, false);
                }
                self.element(new, true);
            }
            _ => {}
        }
    }

    fn element(&mut self, part: &Part<'_>, add: bool) {
        let Part::Element { set, key, key_end, mark } = part else { return };
        let mark = mark.map(u32::to_ne_bytes);
        let mut element = Element::new(key);
        if let Some(last) = key_end {
            element = element.key_end(last);
        }
        if let Some(mark) = mark.as_ref().filter(|_| add) {
            element = element.data(mark);
        }
        let kernel = nft_family(self.family);
        if add {
            self.tx.add_elements(kernel, self.table, set, [element]);
        } else {
            self.tx.del_elements(kernel, self.table, set, [element]);
        }
    }

    fn remove(&mut self, change: &Change<'_>) {
        let kernel = nft_family(self.family);
        match (&change.old, &change.new) {
            (Some(old @ Part::Element { .. }), None) => self.element(old, false),
            (Some(Part::Chain(name, _)), None) => {
                self.tx.flush_chain(kernel, self.table, name);
                self.tx.del_chain(kernel, self.table, name);
            }
            _ => {}
        }
    }
}

/// A name that is nobody's.
const TRIAL: &str = "proxier-probe";

/// Tries objects in a transaction that is then given up: nothing is left behind. It may load kernel
/// modules.
///
/// # Errors
/// What the kernel lacks, or does not let us do, in words.
///
/// # Cancel safety
/// Cancel safe.
pub async fn try_out<K: Display, V>(
    netns: &NetNs,
    family: Family,
    objects: impl IntoIterator<Item = (K, V)>,
    part: impl for<'a> Fn(&'a K, &'a V) -> Option<Part<'a>>,
) -> Result<(), String> {
    let mut nft = NftSocket::open(netns).map_err(|error| error.to_string())?;
    let ops: Vec<_> = objects.into_iter().map(|(key, value)| Op::Add(key, value)).collect();
    // What is only added has no other shape.
    let mut tx = encode(family, TRIAL, (0..).zip(&ops), part).unwrap_or_default();
    let end = u32::try_from(ops.len()).unwrap_or(u32::MAX);
    tx.op(end);
    tx.del_chain(nft_family(family), TRIAL, TRIAL);
    match nft.commit(&tx).await {
        // Everything but the deletion of what does not exist was taken.
        Err(NftError::Refused(refusal)) if refusal.tag == Some(end) => Ok(()),
        Err(NftError::Refused(refusal)) => {
            let (_, object) = spi::locate(&ops, refusal.tag);
            let object = object.unwrap_or_default();
            Err(match &refusal.unsupported {
                Some(missing) => format!("the kernel has no {missing} ({object})"),
                None => format!("{object}: {}", refusal.ack),
            })
        }
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("the kernel took what cannot be".to_owned()),
    }
}

/// Removes a table with everything in it, if there is one.
///
/// # Errors
/// As [`NftSocket::commit`].
///
/// # Cancel safety
/// Cancel safe: it is removed or not.
pub async fn destroy(nft: &mut NftSocket, family: Family, table: &str) -> Result<(), NftError> {
    let kernel = nft_family(family);
    if nft.tables(kernel).await?.iter().any(|it| it.name == table) {
        let mut tx = Transaction::new();
        tx.destroy_table(kernel, table);
        nft.commit(&tx).await?;
    }
    Ok(())
}

/// What a table holds.
#[derive(Clone, Debug)]
pub struct Content<E> {
    /// Its chains, by name.
    pub chains: Vec<(String, Chain)>,
    /// Its sets and maps, by name.
    pub sets: Vec<(String, Shape)>,
    /// The elements of all sets, as they were understood.
    pub elements: Vec<E>,
}

/// Reads a table with everything in it; `None` when there is none. `element` understands elements of
/// a set, by its name, or does not.
///
/// # Errors
/// As [`NftSocket::rules`] and its like.
///
/// # Cancel safety
/// Cancel safe.
pub async fn read<E>(
    nft: &mut NftSocket,
    family: Family,
    table: &str,
    element: impl Fn(&str, &ElementRef<'_>) -> Option<E>,
) -> Result<Option<Content<E>>, NftError> {
    let kernel = nft_family(family);
    if !nft.tables(kernel).await?.iter().any(|it| it.name == table) {
        return Ok(None);
    }
    let mut content = Content { chains: Vec::new(), sets: Vec::new(), elements: Vec::new() };
    for chain in nft.chains(kernel).await?.into_iter().filter(|it| it.table == table) {
        let rules = nft.rules(RuleFilter::chain(kernel, table, &chain.name)).await?;
        let rules = rules.into_iter().map(|rule| Rule {
            text: rule.comment().unwrap_or_default().to_owned(),
            exprs: rule.exprs,
        });
        let base =
            chain.base.map(|it| Base { kind: it.kind, hook: it.hook, priority: it.priority });
        content.chains.push((chain.name, Chain { base, rules: rules.collect() }));
    }
    for set in nft.sets(kernel, Some(table)).await? {
        let visit = |found: &mut Vec<E>, it: ElementRef<'_>| found.extend(element(&set.name, &it));
        let found = nft.fold_elements(kernel, table, &set.name, Vec::new, visit).await?;
        content.elements.extend(found);
        let shape = Shape::of(&set);
        content.sets.push((set.name, shape));
    }
    Ok(Some(content))
}

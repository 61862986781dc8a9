//! Operations on kernel objects as a transaction. Pure.

use proxier_core::Family;
use proxier_netlink::nft::{
    BaseChain, ByteOrder, ChainSpec, ChainType, DataType, Element, Hook, Policy, RuleSpec,
    SetFlags, SetSpec, TableSpec, Transaction,
};

use crate::{
    backend::Op,
    object::{Base, Chain, ChainName, Item, Key, SetName, Value},
    pack::{layout, pack},
};

/// The kernel's name for a family.
pub(crate) const fn nft_family(family: Family) -> proxier_netlink::nft::Family {
    match family {
        Family::V4 => proxier_netlink::nft::Family::Ipv4,
        Family::V6 => proxier_netlink::nft::Family::Ipv6,
    }
}

/// A transaction under construction.
pub(crate) struct Batch<'a> {
    tx: Transaction,
    family: Family,
    table: &'a str,
}

/// Objects have another shape than this version gives them: the table has to be made anew.
#[derive(Debug)]
pub(crate) struct Misshapen;

impl<'a> Batch<'a> {
    /// Encodes the operations that concern nf_tables.
    pub(crate) fn encode(
        family: Family,
        table: &'a str,
        ops: &[Op],
    ) -> Result<Transaction, Misshapen> {
        let mut batch = Self { tx: Transaction::new(), family, table };
        // Rules lead to chains and sets that come later in the order of keys.
        for (index, op) in (0..).zip(ops) {
            batch.tx.op(index);
            batch.shell(op)?;
        }
        for (index, op) in (0..).zip(ops) {
            batch.tx.op(index);
            batch.content(op);
        }
        for (index, op) in (0..).zip(ops) {
            batch.tx.op(index);
            batch.remove(op);
        }
        Ok(batch.tx)
    }

    /// Makes tables, sets and chains.
    fn shell(&mut self, op: &Op) -> Result<(), Misshapen> {
        let kernel = nft_family(self.family);
        match op {
            Op::Add(Key::Table(_), _) => {
                self.tx.table(TableSpec::new(kernel, self.table));
            }
            Op::Add(Key::Set(family, set), _) => self.set(*family, *set),
            Op::Add(Key::Chain(_, name), Value::Chain(chain)) => self.chain(name, chain),
            Op::Set { key: Key::Set(..), .. } => return Err(Misshapen),
            Op::Set { key: Key::Chain(_, name), old, new } => {
                let (Value::Chain(old), Value::Chain(new)) = (old, new) else {
                    return Err(Misshapen);
                };
                if old.base != new.base {
                    return Err(Misshapen);
                }
                self.tx.flush_chain(kernel, self.table, &name.to_string());
            }
            Op::Add(..) | Op::Del(..) | Op::Set { .. } => {}
        }
        Ok(())
    }

    fn set(&mut self, family: Family, set: SetName) {
        let (key, fields) = layout(family, set);
        let name = set.to_string();
        let kernel = nft_family(family);
        let spec = SetSpec::set(kernel, self.table, &name, key);
        if set.is_map() {
            let map = SetSpec::map(kernel, self.table, &name, key, DataType::MARK);
            // For nft, which would print marks the wrong way round.
            let map = map.data_order(ByteOrder::Host);
            self.tx.new_set(if set == SetName::Owners {
                map.key_order(ByteOrder::Host)
            } else {
                map
            });
        } else if fields.is_empty() {
            self.tx.new_set(spec);
        } else {
            self.tx.new_set(spec.interval_fields(fields).flags(SetFlags::INTERVAL));
        }
    }

    fn chain(&mut self, name: &ChainName, chain: &Chain) {
        let name = name.to_string();
        let mut spec = ChainSpec::new(nft_family(self.family), self.table, &name);
        if let Some(Base { kind, hook, priority }) = &chain.base {
            spec = spec.base(BaseChain {
                kind: if kind == "nat" { ChainType::Nat } else { ChainType::Filter },
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
    fn content(&mut self, op: &Op) {
        match op {
            Op::Add(Key::Chain(_, name), Value::Chain(chain))
            | Op::Set { key: Key::Chain(_, name), new: Value::Chain(chain), .. } => {
                let name = name.to_string();
                for rule in &chain.rules {
                    let spec = RuleSpec::append(nft_family(self.family), self.table, &name);
                    self.tx.rule(spec.comment(&rule.text), |writer| {
                        for expr in &rule.exprs {
                            writer.push(expr);
                        }
                    });
                }
            }
            Op::Add(Key::Element(set, item), value) => self.element(*set, item, Some(value)),
            Op::Set { key: Key::Element(set, item), new, .. } => {
                self.element(*set, item, None);
                self.element(*set, item, Some(new));
            }
            Op::Add(..) | Op::Del(..) | Op::Set { .. } => {}
        }
    }

    /// Adds an element with a value, or removes it.
    fn element(&mut self, set: SetName, item: &Item, value: Option<&Value>) {
        let (first, last) = pack(set, item);
        let mark = match value {
            Some(Value::Mark(mark)) => Some(mark.to_ne_bytes()),
            _ => None,
        };
        let mut element = Element::new(&first);
        if let Some(last) = &last {
            element = element.key_end(last);
        }
        if let Some(mark) = &mark {
            element = element.data(mark);
        }
        let (kernel, set) = (nft_family(self.family), set.to_string());
        if value.is_some() {
            self.tx.add_elements(kernel, self.table, &set, [element]);
        } else {
            self.tx.del_elements(kernel, self.table, &set, [element]);
        }
    }

    fn remove(&mut self, op: &Op) {
        let kernel = nft_family(self.family);
        match op {
            Op::Del(Key::Element(set, item), _) => self.element(*set, item, None),
            Op::Del(Key::Chain(_, name), _) => {
                let name = name.to_string();
                self.tx.flush_chain(kernel, self.table, &name);
                self.tx.del_chain(kernel, self.table, &name);
            }
            Op::Del(..) | Op::Add(..) | Op::Set { .. } => {}
        }
    }
}

//! From operations to a transaction.

use std::collections::BTreeMap;

use proxier_core::Family;
use proxier_netlink::nft::{
    self, BaseChain, ChainSpec, ChainType, Policy, RuleSpec, TableSpec, Transaction, Verdict,
};

use crate::{
    backend::Op,
    codec,
    field::nft_family,
    object::{ChainName, Content, Element, Hook, Key, Object, Pick, SetName, Stray, Value},
    rule::Rule,
    sets,
    skeleton::pick,
};

/// Handles of rules that operations remove, by chain.
pub(crate) type Handles = BTreeMap<Key, u64>;

/// What a transaction is made for.
pub(crate) struct Batch<'a> {
    pub(crate) table: &'a str,
    pub(crate) mark: &'a [u8],
    pub(crate) family: Family,
    pub(crate) handles: &'a Handles,
    /// One element a message, so that a refusal names its operation.
    pub(crate) careful: bool,
}

/// What is known of a base chain.
pub(crate) const fn base(hook: Hook) -> BaseChain {
    // KERNEL: NF_IP_PRI_NAT_DST, _FILTER, _NAT_SRC (include/uapi/linux/netfilter_ipv4.h, v6.12).
    let (kind, at, priority) = match hook {
        Hook::FilterForward => (ChainType::Filter, nft::Hook::Forward, 0),
        Hook::FilterInput => (ChainType::Filter, nft::Hook::Input, 0),
        Hook::FilterOutput => (ChainType::Filter, nft::Hook::Output, 0),
        Hook::NatOutput => (ChainType::Nat, nft::Hook::Output, -100),
        Hook::NatPostrouting => (ChainType::Nat, nft::Hook::Postrouting, 100),
        Hook::NatPrerouting => (ChainType::Nat, nft::Hook::Prerouting, -100),
    };
    BaseChain { kind, hook: at, priority, policy: Policy::Accept }
}

/// An operation and its number.
type Numbered<'o> = (u32, &'o Op);

impl Batch<'_> {
    /// Encodes operations into a transaction, in an order that works whatever theirs is: what holds
    /// others first, then what goes from sets, then what comes into them, then rules; then what
    /// held others goes.
    pub(crate) fn encode(&self, ops: &[Op]) -> Transaction {
        let mut tx = Transaction::with_capacity(ops.len() * 96 + 256);
        let numbered = || (0..).zip(ops);
        for (index, op) in numbered() {
            self.make(&mut tx, index, op);
        }
        let removed = numbered().filter(|(_, op)| matches!(op, Op::Del(..) | Op::Set { .. }));
        self.elements(&mut tx, removed, false);
        let added = numbered().filter(|(_, op)| matches!(op, Op::Add(..) | Op::Set { .. }));
        self.elements(&mut tx, added, true);
        for (index, op) in numbered() {
            self.rules(&mut tx, index, op);
        }
        for (index, op) in numbered() {
            self.unmake_chain(&mut tx, index, op);
        }
        for (index, op) in numbered() {
            self.unmake(&mut tx, index, op);
        }
        tx
    }

    /// Makes tables, sets and chains.
    fn make(&self, tx: &mut Transaction, index: u32, op: &Op) {
        let (key, is_new) = match op {
            Op::Add(key, _) => (key, true),
            Op::Set { key, .. } => (key, false),
            Op::Del(..) => return,
        };
        let kernel = nft_family(self.family);
        tx.op(index);
        match &key.object {
            Object::Table => {
                if !is_new {
                    tx.del_table(kernel, self.table);
                }
                tx.table(TableSpec::new(kernel, self.table).userdata(self.mark).exclusive());
            }
            Object::Set(set) => sets::make(tx, self.table, self.family, *set),
            Object::Chain(name) => {
                let (text, value) = (name.to_string(), new_value(op));
                if matches!(op, Op::Set { old: Value(Content::Odd(_)), .. }) {
                    tx.del_chain(kernel, self.table, &text);
                }
                let mut spec = ChainSpec::new(kernel, self.table, &text);
                if let ChainName::Base(hook) = name {
                    spec = spec.base(base(*hook));
                }
                if let Some(Content::Chain(chain)) = value
                    && let Some(comment) = &chain.comment
                {
                    spec = spec.comment(comment);
                }
                tx.chain(spec);
            }
            Object::Pick(_) | Object::Element(_) | Object::Stray(_) => {}
        }
    }

    /// Adds elements, or removes them, those of one set in one message.
    #[expect(single_use_lifetimes, reason = "stable Rust wants a name inside `impl Trait`")]
    fn elements<'o>(
        &self,
        tx: &mut Transaction,
        ops: impl Iterator<Item = Numbered<'o>>,
        add: bool,
    ) {
        let mut run = Run { bytes: Vec::new(), elements: Vec::new(), set: None };
        let elements = ops.filter_map(|(index, op)| {
            let Object::Element(element) = &op.key().object else { return None };
            Some((index, element, op))
        });
        for (index, element, op) in elements {
            let set = element.set();
            if run.set != Some(set) || self.careful {
                self.flush(tx, &mut run, add);
                tx.op(index);
                run.set = Some(set);
            }
            let value = if add { new_value(op) } else { None };
            run.push(element, value);
        }
        self.flush(tx, &mut run, add);
    }

    fn flush(&self, tx: &mut Transaction, run: &mut Run, add: bool) {
        let Some(set) = run.set.take() else { return };
        let (kernel, name) = (nft_family(self.family), set.to_string());
        let elements = run.elements.iter().map(|part| {
            let bytes =
                |range: &(usize, usize)| run.bytes.get(range.0..range.1).unwrap_or_default();
            let mut element = nft::Element::new(bytes(&part.key));
            if part.end.0 != part.end.1 {
                element = element.key_end(bytes(&part.end));
            }
            if part.data.0 != part.data.1 {
                element = element.data(bytes(&part.data));
            }
            match &part.verdict {
                Some(verdict) => element.verdict(verdict),
                None => element,
            }
        });
        if add {
            tx.add_elements(kernel, self.table, &name, elements);
        } else {
            tx.del_elements(kernel, self.table, &name, elements);
        }
        run.bytes.clear();
        run.elements.clear();
    }

    /// Writes the rules of chains.
    fn rules(&self, tx: &mut Transaction, index: u32, op: &Op) {
        let kernel = nft_family(self.family);
        tx.op(index);
        match (&op.key().object, new_value(op)) {
            (Object::Chain(name), Some(Content::Chain(chain))) => {
                let name = name.to_string();
                let had_rules = matches!(op, Op::Set { old: Value(Content::Chain(_)), .. });
                if had_rules {
                    tx.flush_chain(kernel, self.table, &name);
                }
                for rule in &chain.rules {
                    self.append(tx, &name, rule);
                }
            }
            (Object::Pick(it), Some(_)) => {
                let Pick { space, pool, .. } = *it;
                let name = ChainName::Picks(space, pool).to_string();
                self.append(tx, &name, &pick(self.family, *it));
            }
            (Object::Pick(it), None) => {
                let Pick { space, pool, .. } = *it;
                if let Some(handle) = self.handles.get(op.key()) {
                    let name = ChainName::Picks(space, pool).to_string();
                    tx.del_rule(kernel, self.table, &name, *handle);
                }
            }
            (Object::Stray(stray), None) => {
                if let Stray::Rule { chain, handle } = &**stray {
                    tx.del_rule(kernel, self.table, chain, *handle);
                }
            }
            _ => {}
        }
    }

    fn append(&self, tx: &mut Transaction, chain: &str, rule: &Rule) {
        tx.rule(RuleSpec::append(nft_family(self.family), self.table, chain), |w| {
            for expr in &rule.0 {
                w.push(expr);
            }
        });
    }

    fn unmake_chain(&self, tx: &mut Transaction, index: u32, op: &Op) {
        let Op::Del(key, _) = op else { return };
        let kernel = nft_family(self.family);
        tx.op(index);
        match &key.object {
            Object::Chain(name) => tx.del_chain(kernel, self.table, &name.to_string()),
            Object::Stray(stray) => {
                if let Stray::Chain(name) = &**stray {
                    tx.del_chain(kernel, self.table, name);
                }
            }
            Object::Table | Object::Set(_) | Object::Pick(_) | Object::Element(_) => {}
        }
    }

    fn unmake(&self, tx: &mut Transaction, index: u32, op: &Op) {
        let Op::Del(key, _) = op else { return };
        let kernel = nft_family(self.family);
        tx.op(index);
        match &key.object {
            Object::Table => tx.del_table(kernel, self.table),
            Object::Set(set) => tx.del_set(kernel, self.table, &set.to_string()),
            Object::Stray(stray) => {
                if let Stray::Set(name) = &**stray {
                    tx.del_set(kernel, self.table, name);
                }
            }
            Object::Chain(_) | Object::Pick(_) | Object::Element(_) => {}
        }
    }
}

fn new_value(op: &Op) -> Option<&Content> {
    match op {
        Op::Add(_, Value(new)) | Op::Set { new: Value(new), .. } => Some(new),
        Op::Del(..) => None,
    }
}

/// Elements of one set that follow each other, encoded.
struct Run {
    bytes: Vec<u8>,
    elements: Vec<Part>,
    set: Option<SetName>,
}

/// Where the parts of an element are among the bytes.
struct Part {
    key: (usize, usize),
    end: (usize, usize),
    data: (usize, usize),
    verdict: Option<Verdict<'static>>,
}

impl Run {
    fn push(&mut self, element: &Element, value: Option<&Content>) {
        let start = self.bytes.len();
        codec::put_key(&mut self.bytes, element);
        let key = (start, self.bytes.len());
        codec::put_key_end(&mut self.bytes, element);
        let end = (key.1, self.bytes.len());
        let mut verdict = None;
        match value {
            Some(Content::Endpoint(endpoint)) => codec::put_endpoint(&mut self.bytes, *endpoint),
            Some(Content::Leads(chain)) => verdict = Some(leads(*chain)),
            _ => {}
        }
        let data = (end.1, self.bytes.len());
        self.elements.push(Part { key, end, data, verdict });
    }
}

/// How an element leads to a chain: where a client was sent before is tried, and then gone on.
pub(crate) fn leads(chain: ChainName) -> Verdict<'static> {
    let name = chain.to_string().into();
    let comes_back = matches!(chain, ChainName::Sticky(..));
    if comes_back { Verdict::Jump(name) } else { Verdict::Goto(name) }
}

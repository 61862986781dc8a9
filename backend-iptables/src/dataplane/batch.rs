//! From operations to the messages of one transaction. Pure.

use std::collections::HashSet;

use proxier_core::Family;
use proxier_netlink::nft::{self, ChainSpec, RuleSpec, TableSpec, Transaction};
pub(crate) use proxier_netlink::spi::nft_family;

use super::handles::Handles;
use crate::{
    backend::Op,
    encode::{self, OBJECT_MARK, RULE_MARK},
    names::{ChainName, FixedNames, service_kind},
    object::{BaseChain, ChainKind, Content, Key, Object, Place, Rules, Table, Value},
    pack::Unpacker,
    rule::{Matches, Target},
    skeleton::jumps,
    tree::is_branch,
};

/// Bytes kept free of a transaction's limit: more than the longest rule of ours.
const SLACK_BYTES: usize = 4096;
/// Most rules whose handles are asked for with the commit. For more, the echoes might not fit the
/// receive buffer of a process without privileges in the initial user namespace.
const MAX_ECHOES: usize = 128;

/// What the messages are made with.
pub(super) struct Context<'a> {
    pub(super) family: Family,
    pub(super) prefix: &'a str,
    pub(super) names: &'a FixedNames,
    pub(super) handles: &'a Handles,
    /// Longest transaction.
    pub(super) limit_bytes: usize,
    /// More operations of the same plan follow; rules may name chains that do not exist yet.
    pub(super) more: bool,
    /// The shared firewall chain may go.
    pub(super) drop_firewall: bool,
    /// Comments are matches, as kube-proxy writes them.
    pub(super) exact: bool,
}

/// One or, if they do not fit, several transactions.
pub(super) struct Batch {
    pub(super) transactions: Vec<Transaction>,
    /// Handles are asked for.
    pub(super) echo: bool,
}

/// A rule has to be changed whose handle is not known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct UnknownHandle;

/// What iptables-nft makes of a built-in chain: type, hook and priority.
// KERNEL: NF_IP_PRI_NAT_DST is -100, NF_IP_PRI_FILTER 0, NF_IP_PRI_NAT_SRC 100
// (include/uapi/linux/netfilter_ipv4.h, v6.12).
pub(crate) const fn hook(chain: BaseChain) -> nft::BaseChain {
    use nft::{ChainType, Hook, Policy};
    let (kind, hook, priority) = match chain {
        BaseChain::FilterForward => (ChainType::Filter, Hook::Forward, 0),
        BaseChain::FilterInput => (ChainType::Filter, Hook::Input, 0),
        BaseChain::FilterOutput => (ChainType::Filter, Hook::Output, 0),
        BaseChain::NatOutput => (ChainType::Nat, Hook::Output, -100),
        BaseChain::NatPostrouting => (ChainType::Nat, Hook::Postrouting, 100),
        BaseChain::NatPrerouting => (ChainType::Nat, Hook::Prerouting, -100),
    };
    nft::BaseChain { kind, hook, priority, policy: Policy::Accept }
}

impl Batch {
    /// Encodes operations: what everything hangs on, new chains, their rules, shared rules, and what
    /// goes.
    pub(super) fn encode(context: &Context<'_>, ops: &[Op]) -> Result<Self, UnknownHandle> {
        let is_new_entry =
            |op: &&Op| !matches!(op, Op::Del(..)) && matches!(op.key().0, Object::Entry { .. });
        let entries = ops.iter().filter(is_new_entry).count();
        let mut encoder = Encoder {
            context,
            family: nft_family(context.family),
            done: Vec::new(),
            tx: Transaction::new(),
            echo: (1..=MAX_ECHOES).contains(&entries),
        };
        encoder.bases(ops);
        encoder.chains(ops);
        encoder.rules(ops);
        encoder.entries(ops)?;
        encoder.removals(ops)?;
        let Encoder { mut done, tx, echo, .. } = encoder;
        done.push(tx);
        Ok(Self { transactions: done, echo })
    }
}

/// Operations with their index.
fn numbered(ops: &[Op]) -> impl DoubleEndedIterator<Item = (u32, &Op)> {
    // A batch has fewer operations than that.
    ops.iter().enumerate().map(|(index, op)| (u32::try_from(index).unwrap_or(u32::MAX), op))
}

struct Encoder<'a> {
    context: &'a Context<'a>,
    family: nft::Family,
    done: Vec<Transaction>,
    tx: Transaction,
    echo: bool,
}

impl Encoder<'_> {
    /// The transaction, with room for one more message.
    fn tx(&mut self, op: u32) -> &mut Transaction {
        if self.tx.len_bytes() + SLACK_BYTES > self.context.limit_bytes {
            self.done.push(std::mem::take(&mut self.tx));
        }
        self.tx.op(op);
        &mut self.tx
    }

    fn bases(&mut self, ops: &[Op]) {
        let family = self.family;
        for (index, op) in numbered(ops) {
            match op {
                Op::Add(Key(Object::Table { table, .. }), _) => {
                    let spec = TableSpec::new(family, table.name()).userdata(OBJECT_MARK);
                    self.tx(index).table(spec);
                }
                Op::Add(Key(Object::Base { chain, .. }), _) => {
                    // Making it again would set its policy, which may be somebody else's. So it must
                    // not exist, as the last dump said.
                    let spec = ChainSpec::new(family, chain.table().name(), chain.name())
                        .base(hook(*chain))
                        .userdata(OBJECT_MARK)
                        .exclusive();
                    self.tx(index).chain(spec);
                }
                Op::Add(..) | Op::Del(..) | Op::Set { .. } => {}
            }
        }
    }

    fn chains(&mut self, ops: &[Op]) {
        let family = self.family;
        let mut new = HashSet::new();
        for (index, op) in numbered(ops) {
            if let Op::Add(Key(Object::Chain { table, name, .. }), _) = op {
                let mut spec = ChainSpec::new(family, table.name(), name.as_str());
                if *name == self.context.names.firewall {
                    spec = spec.userdata(OBJECT_MARK);
                }
                self.tx(index).chain(spec);
                if self.context.more {
                    new.insert(*name);
                }
            }
        }
        if self.context.more {
            self.forward_chains(ops, &mut new);
        }
    }

    /// Makes chains that rules of this batch lead to and a later batch will fill.
    fn forward_chains(&mut self, ops: &[Op], made: &mut HashSet<ChainName>) {
        let family = self.family;
        for (index, op) in numbered(ops) {
            let Some(rules) = new_rules(op) else { continue };
            for (_, target) in rules.iter().flatten() {
                let Target::Jump(chain) = target else { continue };
                let ours =
                    service_kind(self.context.prefix, chain).and_then(|_| ChainName::new(chain));
                if let Some(name) = ours.filter(|name| made.insert(*name)) {
                    self.tx(index).new_chain(family, Table::Nat.name(), name.as_str());
                }
            }
        }
    }

    fn rules(&mut self, ops: &[Op]) {
        let (family, context) = (self.family, self.context);
        for (index, op) in numbered(ops) {
            let Key(Object::Chain { table, name, .. }) = op.key() else { continue };
            let Some(rules) = new_rules(op) else { continue };
            let (table, chain) = (table.name(), name.as_str());
            self.tx(index).flush_chain(family, table, chain);
            for (matches, target) in rules.iter().flatten() {
                let append = RuleSpec::append(family, table, chain);
                let (spec, matches) = dress(append, matches, context.exact);
                self.tx(index).rule(spec, |w| encode::write(w, context.family, &matches, &target));
            }
        }
    }

    fn entries(&mut self, ops: &[Op]) -> Result<(), UnknownHandle> {
        // Replacing and removing first: what is added may have to come before or behind what stays.
        for (index, op) in numbered(ops) {
            match op {
                Op::Set { key, old: Value(old), new } => {
                    let Content::Entry { place: before, .. } = old else { continue };
                    let Content::Entry { place: after, .. } = &new.0 else { continue };
                    let handle = self.context.handles.find(key).ok_or(UnknownHandle)?;
                    if before == after {
                        self.entry(index, key, new, Some(handle));
                    } else {
                        self.del_entry(index, key, handle);
                        self.entry(index, key, new, None);
                    }
                }
                Op::Del(key, Value(Content::Entry { .. })) => {
                    let handle = self.context.handles.find(key).ok_or(UnknownHandle)?;
                    self.del_entry(index, key, handle);
                }
                Op::Del(Key(Object::Foreign { table, chain, handle, .. }), _) => {
                    let family = self.family;
                    self.tx(index).del_rule(family, table.name(), chain.as_str(), *handle);
                }
                Op::Add(..) | Op::Del(..) => {}
            }
        }
        let is_jump = |key: &Key| matches!(key.0, Object::Entry { is_jump: true, .. });
        // Each goes to the head, so the last is the first: in a chain they then stand in order.
        for (index, op) in numbered(ops).rev() {
            if let Op::Add(key, value @ Value(Content::Entry { place: Place::Head, .. })) = op
                && !is_jump(key)
            {
                self.entry(index, key, value, None);
            }
        }
        for (index, op) in numbered(ops) {
            if let Op::Add(key, value @ Value(Content::Entry { place: Place::Tail, .. })) = op {
                self.entry(index, key, value, None);
            }
        }
        let mut new_jumps: Vec<_> = numbered(ops)
            .filter_map(|(index, op)| match op {
                Op::Add(key, value) if is_jump(key) => Some((index, key, value)),
                Op::Add(..) | Op::Del(..) | Op::Set { .. } => None,
            })
            .collect();
        if !new_jumps.is_empty() {
            let order: Vec<_> =
                jumps(self.context.names).iter().map(|it| it.key(self.context.family)).collect();
            new_jumps.sort_by_key(|(_, key, _)| order.iter().position(|other| other == *key));
        }
        for (index, key, value) in new_jumps {
            self.entry(index, key, value, None);
        }
        Ok(())
    }

    /// Adds a rule of its own, or puts it in the place of another.
    fn entry(&mut self, op: u32, key: &Key, value: &Value, replaces: Option<u64>) {
        let Object::Entry { table, chain, matches, .. } = &key.0 else { return };
        let Content::Entry { target, place } = &value.0 else { return };
        let parts = Unpacker(matches).matches().zip(Unpacker(target).target());
        let Some((matches, target)) = parts else { return };
        let (family, table, chain) = (self.family, table.name(), chain.as_str());
        let mut rule = match (replaces, place) {
            (Some(handle), _) => RuleSpec::replace(family, table, chain, handle),
            (None, Place::Head) => RuleSpec::insert(family, table, chain),
            (None, Place::Tail) => RuleSpec::append(family, table, chain),
        };
        if self.echo {
            rule = rule.echo();
        }
        let ip = self.context.family;
        let (spec, matches) = dress(rule, matches, self.context.exact);
        self.tx(op).rule(spec, |w| encode::write(w, ip, &matches, &target));
    }

    fn del_entry(&mut self, op: u32, key: &Key, handle: u64) {
        let Object::Entry { table, chain, .. } = &key.0 else { return };
        let family = self.family;
        self.tx(op).del_rule(family, table.name(), chain.as_str(), handle);
    }

    /// Removes chains. They come in the order in which they lead on to each other, and a chain's
    /// rules go with it.
    fn removals(&mut self, ops: &[Op]) -> Result<(), UnknownHandle> {
        let family = self.family;
        for (index, op) in numbered(ops) {
            if let Op::Del(Key(Object::Chain { table, name, .. }), _) = op
                && (*name != self.context.names.firewall || self.context.drop_firewall)
            {
                self.tx(index).del_chain(family, table.name(), name.as_str());
            }
        }
        Ok(())
    }
}

/// The rules that an operation puts into a chain.
fn new_rules(op: &Op) -> Option<&Rules> {
    match op {
        Op::Add(_, Value(Content::Rules(rules)))
        | Op::Set { new: Value(Content::Rules(rules)), .. } => Some(rules),
        Op::Add(..) | Op::Del(..) | Op::Set { .. } => None,
    }
}

/// What a rule carries besides its expressions, and what is left to be expressed.
///
/// Unless it has to be `exact`, the comment goes with the rule: `iptables` lists it all the same, and
/// the kernel has a match less to load, to check at every change, and to evaluate for every packet.
fn dress<'a>(
    mut spec: RuleSpec<'a>,
    mut matches: Matches<'a>,
    exact: bool,
) -> (RuleSpec<'a>, Matches<'a>) {
    if let Some(compat) = encode::compat(&matches) {
        spec = spec.compat(compat);
    }
    if matches.owned {
        return (spec.userdata(RULE_MARK), matches);
    }
    if let Some(text) = matches.comment.filter(|_| !exact) {
        spec = spec.comment(text);
        matches.comment = None;
    }
    (spec, matches)
}

/// Says whether a chain with this name in this table is one of ours, and of which kind.
pub(crate) fn our_chain(
    prefix: &str,
    names: &FixedNames,
    table: Table,
    chain: &str,
) -> Option<ChainKind> {
    use crate::names::ServiceKind;
    let fixed: &[ChainName] = match table {
        Table::Filter => &[
            names.services,
            names.external_services,
            names.forward,
            names.node_ports,
            names.proxy_firewall,
            names.firewall,
        ],
        Table::Nat => &[names.services, names.node_ports, names.postrouting, names.mark_masq],
    };
    if fixed.iter().any(|name| name.as_str() == chain) {
        return Some(ChainKind::Fixed);
    }
    if is_branch(prefix, table, chain) {
        return Some(ChainKind::Branch);
    }
    if table != Table::Nat {
        return None;
    }
    service_kind(prefix, chain).map(|kind| match kind {
        ServiceKind::Endpoint => ChainKind::Endpoint,
        ServiceKind::Part => ChainKind::Part,
        ServiceKind::Port(kind) => ChainKind::Service(kind),
    })
}

#[cfg(test)]
mod tests {
    use proxier_core::{ir::NodeView, spi::Backend};

    use super::*;
    use crate::{Config, Iptables, names::ServiceChain, object::RulesBuilder};

    /// A chain with so many jumps to chains of endpoints.
    fn chain(rules: u16) -> Op {
        let hash = |n: u16| format!("KUBE-SEP-{}", "A".repeat(11) + &base32(n));
        let name = ChainName::new("KUBE-SVC-QDFYEKLMT6VVGSSH").unwrap();
        let mut builder = RulesBuilder::new(&name);
        for n in 0..rules {
            let comment = format!("edge/near:api -> {n}");
            let matches = Matches { comment: Some(&comment), ..Matches::default() };
            builder.push(&matches, &Target::Jump(&hash(n)));
        }
        let kind = ChainKind::Service(ServiceChain::Cluster);
        Op::Add(Key::chain(Family::V4, Table::Nat, kind, name), builder.build())
    }

    fn base32(n: u16) -> String {
        let digit = |shift: u32| {
            char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[usize::from(n >> shift & 31)])
        };
        ['A', digit(15), digit(10), digit(5), digit(0)].iter().collect()
    }

    fn context<'a>(
        names: &'a FixedNames,
        handles: &'a Handles,
        limit_bytes: usize,
        more: bool,
    ) -> Context<'a> {
        let (family, prefix) = (Family::V4, "KUBE");
        Context {
            family,
            prefix,
            names,
            handles,
            limit_bytes,
            more,
            drop_firewall: false,
            exact: true,
        }
    }

    #[test]
    fn what_does_not_fit_one_transaction_is_several() {
        let (names, handles) = (FixedNames::new("KUBE"), Handles::default());
        let ops = [chain(600)];
        let whole = Batch::encode(&context(&names, &handles, usize::MAX, false), &ops).unwrap();
        assert_eq!(whole.transactions.len(), 1);
        let limit = 64 << 10;
        let cut = Batch::encode(&context(&names, &handles, limit, false), &ops).unwrap();
        assert!(cut.transactions.len() > 3);
        assert!(cut.transactions.iter().all(|tx| tx.len_bytes() <= limit));
        let messages =
            |batch: &Batch| batch.transactions.iter().map(Transaction::len).sum::<usize>();
        assert_eq!(messages(&cut), messages(&whole));
    }

    #[test]
    fn chains_of_a_later_batch_are_made_when_rules_lead_there() {
        let (names, handles) = (FixedNames::new("KUBE"), Handles::default());
        let ops = [chain(10)];
        let len = |more| {
            let batch = Batch::encode(&context(&names, &handles, usize::MAX, more), &ops).unwrap();
            batch.transactions[0].len()
        };
        assert_eq!(len(true), len(false) + 10);
    }

    #[test]
    fn handles_are_asked_for_in_small_batches_and_needed_to_remove() {
        let backend = Iptables::new(Config::default()).unwrap();
        let (names, mut handles) = (FixedNames::new("KUBE"), Handles::default());
        let skeleton = backend.skeleton(Family::V4, &NodeView::default());
        let ops: Vec<_> = skeleton.into_iter().map(|(key, value)| Op::Add(key, value)).collect();
        let encode = |handles: &Handles, ops: &[Op]| {
            Batch::encode(&context(&names, handles, usize::MAX, false), ops)
        };
        assert!(encode(&handles, &ops).unwrap().echo);
        let removal = |op: &Op| match op {
            Op::Add(key, value) => Op::Del(key.clone(), value.clone()),
            Op::Del(..) | Op::Set { .. } => op.clone(),
        };
        let removals: Vec<_> = ops.iter().map(removal).collect();
        assert_eq!(encode(&handles, &removals).err(), Some(UnknownHandle));
        for op in &ops {
            handles.insert(op.key(), 7);
        }
        assert!(!encode(&handles, &removals).unwrap().echo);
    }
}

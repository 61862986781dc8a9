//! From operations to the input of `iptables-restore --noflush`. Pure.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Write,
    io,
};

use proxier_core::{
    Family,
    spi::{CommitError, ErrorKind},
};

use super::parse;
use crate::{
    backend::Op,
    dataplane::{Scope, our_chain},
    names::{ChainName, FixedNames},
    object::{ChainKind, Content, Key, Object, Place, Table, Value},
    pack::Unpacker,
    rule::{Matches, Target},
    skeleton::jumps,
};

/// The comment of a rule that carries our mark: here a rule has no other place for it.
pub(super) const MARK: &str = "proxier";
/// The end of the comment of such a rule that has a comment of its own.
pub(super) const MARK_SUFFIX: &str = " (proxier)";

/// What the input is made with.
pub(super) struct Context<'a> {
    pub(super) family: Family,
    pub(super) names: &'a FixedNames,
    pub(super) foreign: &'a HashMap<Key, String>,
    pub(super) has_firewall: bool,
    pub(super) drop_firewall: bool,
}

/// Input, and what each line is for.
#[derive(Debug, Default)]
pub(super) struct Input {
    pub(super) text: String,
    pub(super) lines: Vec<Line>,
}

/// What a line is for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Line {
    Commit,
    /// An operation, and its object.
    Op(usize, String),
    Other,
}

/// A rule has to be removed that was not listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct UnknownRule;

impl Input {
    /// The input for operations; empty if they ask for nothing.
    pub(super) fn of(context: &Context<'_>, ops: &[Op]) -> Result<Self, UnknownRule> {
        let mut input = Self::default();
        for table in Table::ALL {
            let mut part = Part { context, table, input: Self::default() };
            part.rules_that_go(ops)?;
            part.chains(ops);
            part.entries(ops);
            part.chains_that_go(ops);
            let part = part.input;
            if !part.lines.is_empty() {
                input.line(Line::Other, &format!("*{table}"));
                input.text.push_str(&part.text);
                input.lines.extend(part.lines);
                input.line(Line::Commit, "COMMIT");
            }
        }
        Ok(input)
    }

    fn line(&mut self, line: Line, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
        self.lines.push(line);
    }
}

/// The input for one table.
struct Part<'a> {
    context: &'a Context<'a>,
    table: Table,
    input: Input,
}

impl Part<'_> {
    fn line(&mut self, op: (usize, &Op), text: &str) {
        self.input.line(Line::Op(op.0, op.1.key().to_string()), text);
    }

    /// Operations on objects of this table, with their index.
    fn ops<'o>(&self, ops: &'o [Op]) -> Vec<(usize, &'o Op)> {
        let of_table = |op: &Op| match &op.key().0 {
            Object::Table { .. } | Object::Base { .. } => false,
            Object::Chain { table, .. }
            | Object::Entry { table, .. }
            | Object::Foreign { table, .. } => *table == self.table,
        };
        ops.iter().enumerate().filter(|(_, op)| of_table(op)).collect()
    }

    /// Rules that are removed or replaced, except those that go with their chain.
    fn rules_that_go(&mut self, ops: &[Op]) -> Result<(), UnknownRule> {
        let ops = self.ops(ops);
        let gone: HashSet<ChainName> = ops
            .iter()
            .filter_map(|(_, op)| match op {
                Op::Del(Key(Object::Chain { name, .. }), _)
                    if *name != self.context.names.firewall =>
                {
                    Some(*name)
                }
                Op::Add(..) | Op::Del(..) | Op::Set { .. } => None,
            })
            .collect();
        for (index, op) in ops {
            let (key, old) = match op {
                Op::Del(key, old) | Op::Set { key, old, .. } => (key, old),
                Op::Add(..) => continue,
            };
            match &key.0 {
                Object::Entry { chain, .. } if !gone.contains(chain) => {
                    let Some(rule) = entry(key, old) else { continue };
                    self.line((index, op), &format!("-D {rule}"));
                }
                Object::Foreign { .. } => {
                    let rule = self.context.foreign.get(key).ok_or(UnknownRule)?;
                    self.line((index, op), &format!("-D {rule}"));
                }
                Object::Table { .. }
                | Object::Base { .. }
                | Object::Chain { .. }
                | Object::Entry { .. } => {}
            }
        }
        Ok(())
    }

    /// Chains, made if they are missing and emptied if not, and their rules.
    fn chains(&mut self, ops: &[Op]) {
        let ops = self.ops(ops);
        let keeps = |name: &ChainName| *name == self.context.names.firewall;
        for (index, op) in &ops {
            let Key(Object::Chain { name, .. }) = op.key() else { continue };
            let is_kept = keeps(name) && (self.context.has_firewall || matches!(op, Op::Del(..)));
            if !is_kept {
                self.line((*index, op), &format!(":{name} - [0:0]"));
            }
        }
        for (index, op) in &ops {
            let (Op::Add(_, Value(Content::Rules(rules)))
            | Op::Set { new: Value(Content::Rules(rules)), .. }) = op
            else {
                continue;
            };
            let chain = rules.chain();
            for (matches, target) in rules.iter().flatten() {
                self.line((*index, op), &format!("-A {}", rule(chain, &matches, &target)));
            }
        }
    }

    /// Shared rules that are new or replace others.
    fn entries(&mut self, ops: &[Op]) {
        let new = |(index, op): (usize, &'_ Op)| match op {
            Op::Add(key, value) | Op::Set { key, new: value, .. } => {
                Some((index, key.clone(), value.clone()))
            }
            Op::Del(..) => None,
        };
        let mut new: Vec<_> = self.ops(ops).into_iter().filter_map(new).collect();
        // Each goes to the head, so the last is the first: in a chain they then stand in order, and
        // jumps in that in which they are put there.
        let order: Vec<_> =
            jumps(self.context.names).iter().map(|jump| jump.key(self.context.family)).collect();
        let rank = |key: &Key| order.iter().position(|other| other == key);
        new.reverse();
        new.sort_by_key(|(_, key, _)| rank(key));
        for (index, key, value) in new {
            let Content::Entry { place, .. } = value.0 else { continue };
            let Some(rule) = entry(&key, &value) else { continue };
            let verb = match place {
                Place::Head => "-I",
                Place::Tail => "-A",
            };
            self.input.line(Line::Op(index, key.to_string()), &format!("{verb} {rule}"));
        }
    }

    fn chains_that_go(&mut self, ops: &[Op]) {
        for (index, op) in self.ops(ops) {
            if let Op::Del(Key(Object::Chain { name, .. }), _) = op
                && (*name != self.context.names.firewall || self.context.drop_firewall)
            {
                self.line((index, op), &format!("-X {name}"));
            }
        }
    }
}

/// A shared rule, as the tool takes it behind `-A`.
fn entry(key: &Key, value: &Value) -> Option<String> {
    let Object::Entry { chain, matches, .. } = &key.0 else { return None };
    let Content::Entry { target, .. } = &value.0 else { return None };
    let (matches, target) = Unpacker(matches).matches().zip(Unpacker(target).target())?;
    Some(rule(chain.as_str(), &matches, &target))
}

/// A rule as the tool takes it behind `-A`.
fn rule(chain: &str, matches: &Matches<'_>, target: &Target<'_>) -> String {
    let comment = match (matches.owned, matches.comment) {
        (false, comment) => comment.map(Cow::Borrowed),
        (true, None) => Some(MARK.into()),
        (true, Some(comment)) => Some(format!("{comment}{MARK_SUFFIX}").into()),
    };
    let matches = Matches { comment: comment.as_deref(), ..*matches };
    let mut text = format!("{chain}{matches}");
    if *target != Target::Nothing {
        // A string takes any text.
        write!(text, " {target}").unwrap_or_default();
    }
    text
}

/// The error for the engine: which line failed, and whether an earlier table is changed already.
pub(super) fn explain(lines: &[Line], errors: String, kind: ErrorKind) -> CommitError {
    let failed = line_number(&errors);
    let before = lines.iter().take(failed.map_or(usize::MAX, |line| line.saturating_sub(1)));
    if failed.is_some() && before.clone().any(|line| *line == Line::Commit) {
        return CommitError::Unknown {
            doing: "iptables-restore, which failed behind the first table",
            source: io::Error::other(errors),
        };
    }
    if failed.is_none() {
        let doing = "running iptables-restore".to_owned();
        return CommitError::Transport { doing, source: io::Error::other(errors), kind };
    }
    let (op, object) = match failed.and_then(|line| lines.get(line.checked_sub(1)?)) {
        Some(Line::Op(op, object)) => (Some(*op), object.clone()),
        Some(Line::Commit | Line::Other) | None => (None, "a table".to_owned()),
    };
    CommitError::Refused {
        op,
        object,
        extack: errors,
        errno: io::ErrorKind::InvalidInput.into(),
        kind,
    }
}

/// The line that the tool complains about: "line 5 failed", or "Error occurred at line: 5".
fn line_number(errors: &str) -> Option<usize> {
    let (_, rest) = errors.rsplit_once("line")?;
    let digits: String =
        rest.trim_start_matches([':', ' ']).chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// The input that removes everything of ours from a table; empty if there is nothing.
pub(super) fn removal(scope: &Scope<'_>, table: Table, listing: &str) -> Input {
    let firewall = scope.names.firewall;
    let is_firewall = |chain: &str| table == Table::Filter && chain == firewall.as_str();
    let ours = |chain: &str| our_chain(scope.prefix, scope.names, table, chain);
    let mut chains = BTreeSet::<(ChainKind, &str)>::new();
    for chain in listing.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next()) {
        if let Some(kind) = ours(chain).filter(|_| !is_firewall(chain)) {
            chains.insert((kind, chain));
        }
    }
    let mut input = Input::default();
    let (mut uses, mut has_firewall) = (0, listing.contains(&format!("\n:{firewall} ")));
    has_firewall &= table == Table::Filter;
    for rule in listing.lines().filter_map(|line| line.strip_prefix("-A ")) {
        let chain = rule.split(' ').next().unwrap_or_default();
        let target = parse::target_chain(rule);
        let about_firewall = is_firewall(chain) || target.is_some_and(is_firewall);
        uses += usize::from(about_firewall);
        let leads_to_us = target.is_some_and(|it| ours(it).is_some() && !is_firewall(it));
        let inside = ours(chain).is_some() && !is_firewall(chain);
        if !inside && (leads_to_us || (about_firewall && parse::is_marked(rule))) {
            uses -= usize::from(about_firewall);
            input.line(Line::Other, &format!("-D {rule}"));
        }
    }
    let any_firewall = has_firewall && input.text.contains(firewall.as_str());
    for (_, chain) in &chains {
        input.line(Line::Other, &format!(":{chain} - [0:0]"));
    }
    for (_, chain) in &chains {
        input.line(Line::Other, &format!("-X {chain}"));
    }
    if any_firewall && uses == 0 {
        input.line(Line::Other, &format!("-X {firewall}"));
    }
    if !input.text.is_empty() {
        input.text = format!("*{table}\n{}COMMIT\n", input.text);
        input.lines.insert(0, Line::Other);
        input.lines.push(Line::Commit);
    }
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tools_complaints_name_a_line() {
        assert_eq!(line_number("iptables-restore: line 12 failed"), Some(12));
        let text = "iptables-restore v1.8.9 (legacy): Couldn't load match `x'; \
                    Error occurred at line: 7; Try `iptables-restore -h'";
        assert_eq!(line_number(text), Some(7));
        assert_eq!(line_number("Another app is currently holding the xtables lock"), None);
    }

    #[test]
    fn what_fails_behind_a_commit_leaves_doubt() {
        let lines = [
            Line::Other,
            Line::Op(3, "chain ip filter A".to_owned()),
            Line::Commit,
            Line::Other,
            Line::Op(4, "chain ip nat B".to_owned()),
            Line::Commit,
        ];
        let error = |line| explain(&lines, format!("line {line} failed"), ErrorKind::Fatal);
        assert!(matches!(error(2), CommitError::Refused { op: Some(3), .. }));
        assert!(matches!(error(3), CommitError::Refused { op: None, .. }));
        assert!(matches!(error(5), CommitError::Unknown { .. }));
    }
}

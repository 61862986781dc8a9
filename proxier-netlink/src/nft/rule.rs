//! Rules.

use std::borrow::Cow;

use super::attr::*;
use super::expr::Expr;
use super::read::Exprs;
use super::types::{Family, MessageKind};
use super::udata;
use super::write::ExprWriter;
use crate::batch::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_ECHO, NLM_F_REPLACE, Transaction};
use crate::dec::{Attrs, Message};

/// Where a rule goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    After(u64),
    AfterId(u32),
    Append,
    Before(u64),
    BeforeId(u32),
    Insert,
    Replace(u64),
}

/// What iptables extensions need to know of a rule: the protocol it is for.
// KERNEL: used while the rule is made and not listed (nf_tables_fill_rule_info, v6.12).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Compat {
    /// The protocol that was given with `-p`, 0 for none.
    pub proto: u32,
    /// [`Compat::INVERT`] or 0.
    pub flags: u32,
}

impl Compat {
    /// The rule is for all *other* protocols.
    // KERNEL: NFT_RULE_COMPAT_F_INV; bit 0 is unused (nf_tables.h, v6.12).
    pub const INVERT: u32 = 2;
}

/// A rule to make or replace: everything but its expressions.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct RuleSpec<'a> {
    family: Family,
    table: &'a str,
    chain: &'a str,
    place: Place,
    comment: Option<&'a str>,
    userdata: Option<&'a [u8]>,
    compat: Option<Compat>,
    id: Option<u32>,
    echo: bool,
}

impl<'a> RuleSpec<'a> {
    /// A rule at the end of a chain.
    pub const fn append(family: Family, table: &'a str, chain: &'a str) -> Self {
        Self::at(family, table, chain, Place::Append)
    }

    /// A rule at the head of a chain.
    pub const fn insert(family: Family, table: &'a str, chain: &'a str) -> Self {
        Self::at(family, table, chain, Place::Insert)
    }

    /// A rule behind the one with this handle.
    pub const fn after(family: Family, table: &'a str, chain: &'a str, handle: u64) -> Self {
        Self::at(family, table, chain, Place::After(handle))
    }

    /// A rule in front of the one with this handle.
    pub const fn before(family: Family, table: &'a str, chain: &'a str, handle: u64) -> Self {
        Self::at(family, table, chain, Place::Before(handle))
    }

    /// A rule behind one of the same transaction, by its [`id`](Self::id).
    pub const fn after_id(family: Family, table: &'a str, chain: &'a str, id: u32) -> Self {
        Self::at(family, table, chain, Place::AfterId(id))
    }

    /// A rule in front of one of the same transaction, by its [`id`](Self::id).
    pub const fn before_id(family: Family, table: &'a str, chain: &'a str, id: u32) -> Self {
        Self::at(family, table, chain, Place::BeforeId(id))
    }

    /// A rule in the place of the one with this handle, which it deletes.
    pub const fn replace(family: Family, table: &'a str, chain: &'a str, handle: u64) -> Self {
        Self::at(family, table, chain, Place::Replace(handle))
    }

    const fn at(family: Family, table: &'a str, chain: &'a str, place: Place) -> Self {
        Self {
            family,
            table,
            chain,
            place,
            comment: None,
            userdata: None,
            compat: None,
            id: None,
            echo: false,
        }
    }

    /// Keeps a comment with the rule, where `nft` and `iptables` list it.
    ///
    /// At most 253 bytes; a longer one is cut. It costs no time per packet.
    pub const fn comment(mut self, comment: &'a str) -> Self {
        self.comment = Some(comment);
        self
    }

    /// Keeps bytes with the rule, at most 256; wins over [`comment`](Self::comment).
    pub const fn userdata(mut self, userdata: &'a [u8]) -> Self {
        self.userdata = Some(userdata);
        self
    }

    /// Tells iptables extensions the protocol; those that check it refuse the rule otherwise.
    pub const fn compat(mut self, compat: Compat) -> Self {
        self.compat = Some(compat);
        self
    }

    /// Names the rule within the transaction.
    pub const fn id(mut self, id: u32) -> Self {
        self.id = Some(id);
        self
    }

    /// Asks for the handle of the rule: see [`Committed::handles`](super::Committed::handles).
    ///
    /// The answers have to fit the receive buffer. 60,000 do with CAP_NET_ADMIN in the initial user
    /// namespace; elsewhere ask for some hundred per transaction, or read the rules back.
    pub const fn echo(mut self) -> Self {
        self.echo = true;
        self
    }
}

impl Transaction {
    /// Makes or replaces a rule; `body` appends its expressions. Returns the message's number.
    pub fn rule(&mut self, spec: RuleSpec<'_>, body: impl FnOnce(&mut ExprWriter<'_>)) -> u32 {
        let place = match spec.place {
            Place::After(_) | Place::AfterId(_) | Place::Append => NLM_F_CREATE | NLM_F_APPEND,
            Place::Before(_) | Place::BeforeId(_) | Place::Insert => NLM_F_CREATE,
            Place::Replace(_) => NLM_F_REPLACE,
        };
        let echo = if spec.echo { NLM_F_ECHO } else { 0 };
        let message = self.begin(MessageKind::NEWRULE, place | echo, spec.family);
        let w = self.writer();
        w.str(RULE_TABLE, spec.table);
        w.str(RULE_CHAIN, spec.chain);
        match spec.place {
            Place::After(handle) | Place::Before(handle) => w.be64(RULE_POSITION, handle),
            Place::AfterId(id) | Place::BeforeId(id) => w.be32(RULE_POSITION_ID, id),
            Place::Append | Place::Insert => {}
            Place::Replace(handle) => w.be64(RULE_HANDLE, handle),
        }
        if let Some(id) = spec.id {
            w.be32(RULE_ID, id);
        }
        let list = w.nest(RULE_EXPRESSIONS);
        body(&mut ExprWriter::new(w));
        w.end_nest(list);
        if let Some(compat) = spec.compat {
            let nest = w.nest(RULE_COMPAT);
            w.be32(COMPAT_PROTO, compat.proto);
            w.be32(COMPAT_FLAGS, compat.flags);
            w.end_nest(nest);
        }
        if let Some(userdata) = spec.userdata {
            w.bytes(RULE_USERDATA, userdata);
        } else if let Some(comment) = spec.comment {
            let mut buf = udata::Buffer::default();
            buf.put_text(udata::COMMENT, comment);
            w.bytes(RULE_USERDATA, buf.as_bytes());
        }
        self.end(message);
        message.0
    }

    /// Deletes the rule with this handle.
    pub fn del_rule(&mut self, family: Family, table: &str, chain: &str, handle: u64) {
        self.delete_rules(family, table, Some(chain), Some(handle));
    }

    /// Deletes all rules of a chain; the chain stays.
    pub fn flush_chain(&mut self, family: Family, table: &str, chain: &str) {
        self.delete_rules(family, table, Some(chain), None);
    }

    /// Deletes all rules of a table; chains and sets stay.
    pub fn flush_table(&mut self, family: Family, table: &str) {
        self.delete_rules(family, table, None, None);
    }

    fn delete_rules(
        &mut self,
        family: Family,
        table: &str,
        chain: Option<&str>,
        rule: Option<u64>,
    ) {
        let message = self.begin(MessageKind::DELRULE, 0, family);
        let w = self.writer();
        w.str(RULE_TABLE, table);
        if let Some(chain) = chain {
            w.str(RULE_CHAIN, chain);
        }
        if let Some(handle) = rule {
            w.be64(RULE_HANDLE, handle);
        }
        self.end(message);
    }
}

/// A rule as the kernel lists it, borrowed from the receive buffer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RuleRef<'a> {
    /// The family of its table.
    pub family: Family,
    /// The name of its table.
    pub table: Cow<'a, str>,
    /// The name of its chain.
    pub chain: Cow<'a, str>,
    /// Its handle.
    pub handle: u64,
    /// The handle of the rule in front of it, where the kernel says.
    pub position: Option<u64>,
    /// The caller's bytes.
    pub userdata: &'a [u8],
    exprs: Attrs<'a>,
}

impl<'a> RuleRef<'a> {
    /// Its expressions; each call starts from the first. Decoding happens here.
    pub fn exprs(&self) -> Exprs<'a> {
        Exprs(self.exprs)
    }

    /// The expressions as the kernel encoded them: equal bytes mean equal expressions.
    ///
    /// Counters are part of it.
    pub fn exprs_raw(&self) -> &'a [u8] {
        self.exprs.0
    }

    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&'a str> {
        udata::comment(self.userdata, udata::COMMENT)
    }

    /// A copy that borrows nothing.
    pub fn to_owned(&self) -> RuleDump {
        RuleDump {
            family: self.family,
            table: self.table.clone().into_owned(),
            chain: self.chain.clone().into_owned(),
            handle: self.handle,
            userdata: self.userdata.to_vec(),
            exprs: self.exprs().map(Expr::into_owned).collect(),
        }
    }

    pub(crate) fn read(message: Message<'a>) -> Option<Self> {
        let (family, attrs) = message.nfnl()?;
        let t = attrs.table::<9>();
        Some(Self {
            family: Family::from_number(family),
            table: t.str(RULE_TABLE)?,
            chain: t.str(RULE_CHAIN).unwrap_or_default(),
            handle: t.be64(RULE_HANDLE).unwrap_or_default(),
            position: t.be64(RULE_POSITION),
            userdata: t.raw(RULE_USERDATA).unwrap_or_default(),
            exprs: t.nested(RULE_EXPRESSIONS),
        })
    }
}

/// A rule as the kernel lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct RuleDump {
    /// The family of its table.
    pub family: Family,
    /// The name of its table.
    pub table: String,
    /// The name of its chain.
    pub chain: String,
    /// Its handle.
    pub handle: u64,
    /// The caller's bytes.
    pub userdata: Vec<u8>,
    /// Its expressions in order.
    pub exprs: Vec<Expr<'static>>,
}

impl RuleDump {
    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&str> {
        udata::comment(&self.userdata, udata::COMMENT)
    }
}

//! Chains.

use super::attr::*;
use super::types::{Family, MessageKind};
use super::udata;
use crate::batch::{NLM_F_CREATE, NLM_F_EXCL, Transaction};
use crate::dec::{Attrs, Message, text};

/// What a base chain is for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum ChainType {
    /// Filters.
    Filter,
    /// Translates addresses: sees the first packet of a connection only.
    Nat,
    /// Filters, and routes again if a rule changes what routing depends on.
    Route,
}

impl ChainType {
    const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// Where in a packet's way a base chain is, for the IP families.
// KERNEL: enum nf_inet_hooks (include/uapi/linux/netfilter.h, v6.12).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum Hook {
    /// Before routing.
    Prerouting = 0,
    /// To this machine.
    Input = 1,
    /// Through this machine.
    Forward = 2,
    /// From this machine.
    Output = 3,
    /// After routing.
    Postrouting = 4,
}

/// What happens at the end of a base chain.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(u32)]
pub enum Policy {
    /// The packet passes.
    #[default]
    Accept = 1,
    /// The packet is dropped.
    Drop = 0,
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct BaseChain {
    /// What it is for.
    pub kind: ChainType,
    /// Where.
    pub hook: Hook,
    /// Its place among the base chains there: smaller is earlier.
    pub priority: i32,
    /// What happens at its end.
    pub policy: Policy,
}

/// A chain to make or change.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ChainSpec<'a> {
    family: Family,
    table: &'a str,
    name: &'a str,
    base: Option<BaseChain>,
    userdata: Option<&'a [u8]>,
    comment: Option<&'a str>,
    exclusive: bool,
}

impl<'a> ChainSpec<'a> {
    /// A chain that packets reach by jumps.
    pub const fn new(family: Family, table: &'a str, name: &'a str) -> Self {
        Self { family, table, name, base: None, userdata: None, comment: None, exclusive: false }
    }

    /// A chain that sees the packets of a hook.
    pub const fn base(mut self, base: BaseChain) -> Self {
        self.base = Some(base);
        self
    }

    /// Keeps bytes of the caller's with it, at most 256.
    pub const fn userdata(mut self, userdata: &'a [u8]) -> Self {
        self.userdata = Some(userdata);
        self
    }

    /// Keeps a comment with it; not together with [`userdata`](Self::userdata), which wins.
    pub const fn comment(mut self, comment: &'a str) -> Self {
        self.comment = Some(comment);
        self
    }

    /// Makes the commit fail with EEXIST if the chain exists.
    pub const fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }
}

impl Transaction {
    /// Makes a regular chain if it does not exist.
    pub fn new_chain(&mut self, family: Family, table: &str, name: &str) {
        self.chain(ChainSpec::new(family, table, name));
    }

    /// Makes a chain if it does not exist; changes its policy if it does.
    pub fn chain(&mut self, spec: ChainSpec<'_>) {
        let exclusive = if spec.exclusive { NLM_F_EXCL } else { 0 };
        let message = self.begin(MessageKind::NEWCHAIN, NLM_F_CREATE | exclusive, spec.family);
        let w = self.writer();
        w.str(CHAIN_TABLE, spec.table);
        w.str(CHAIN_NAME, spec.name);
        if let Some(base) = spec.base {
            let hook = w.nest(CHAIN_HOOK);
            w.be32(HOOK_HOOKNUM, base.hook as u32);
            w.be32(HOOK_PRIORITY, base.priority.cast_unsigned());
            w.end_nest(hook);
            w.be32(CHAIN_POLICY, base.policy as u32);
            w.str(CHAIN_TYPE, base.kind.name());
        }
        if let Some(userdata) = spec.userdata {
            w.bytes(CHAIN_USERDATA, userdata);
        } else if let Some(comment) = spec.comment {
            let mut buf = udata::Buffer::default();
            buf.put_text(udata::COMMENT, comment);
            w.bytes(CHAIN_USERDATA, buf.as_bytes());
        }
        self.end(message);
    }

    /// Deletes a chain with its rules; EBUSY while something jumps to it.
    pub fn del_chain(&mut self, family: Family, table: &str, name: &str) {
        let message = self.begin(MessageKind::DELCHAIN, 0, family);
        let w = self.writer();
        w.str(CHAIN_TABLE, table);
        w.str(CHAIN_NAME, name);
        self.end(message);
    }
}

/// The hook of a listed base chain.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct BaseDump {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// The number of the hook; for the IP families [`Hook`] as a number.
    pub hook: u32,
    /// Its place among the base chains there.
    pub priority: i32,
    /// What happens at its end.
    pub policy: Policy,
    /// The device, in family `netdev`.
    pub device: Option<String>,
}

/// A chain as the kernel lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct ChainDump {
    /// The family of its table.
    pub family: Family,
    /// The name of its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Its handle.
    pub handle: u64,
    /// Rules in it, and jumps and elements that lead to it.
    pub uses: u32,
    /// Its hook, if it is a base chain.
    pub base: Option<BaseDump>,
    /// The caller's bytes.
    pub userdata: Vec<u8>,
}

impl ChainDump {
    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&str> {
        udata::comment(&self.userdata, udata::COMMENT)
    }

    pub(crate) fn read(message: Message<'_>) -> Option<Self> {
        let (family, attrs) = message.nfnl()?;
        let t = Attrs::table::<13>(attrs);
        let base = t.raw(CHAIN_HOOK).map(|hook| {
            let hook = Attrs(hook).table::<4>();
            BaseDump {
                kind: t.raw(CHAIN_TYPE).map(text).unwrap_or_default().into_owned(),
                hook: hook.be32(HOOK_HOOKNUM).unwrap_or_default(),
                priority: hook.be32(HOOK_PRIORITY).unwrap_or_default().cast_signed(),
                policy: match t.be32(CHAIN_POLICY) {
                    Some(0) => Policy::Drop,
                    _ => Policy::Accept,
                },
                device: hook.str(HOOK_DEV).map(std::borrow::Cow::into_owned),
            }
        });
        Some(Self {
            family: Family::from_number(family),
            table: t.str(CHAIN_TABLE)?.into_owned(),
            name: t.str(CHAIN_NAME)?.into_owned(),
            handle: t.be64(CHAIN_HANDLE).unwrap_or_default(),
            uses: t.be32(CHAIN_USE).unwrap_or_default(),
            base,
            userdata: t.raw(CHAIN_USERDATA).unwrap_or_default().to_vec(),
        })
    }
}

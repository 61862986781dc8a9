//! Why nf_tables refused, told in terms of what was asked.

use std::io;

use super::attr::*;
use super::types::{Family, MessageKind};
use crate::ack::{Ack, ErrorKind};
use crate::batch::Transaction;
use crate::dec::{Attrs, Message, be32, be64, text};
use crate::enc::{ATTR_HEADER, NFNL_HEADER};
use crate::sock::SockError;

/// A transaction was not committed, or a request not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// Something in the transaction is too long to be encoded: 64 KiB is most an attribute takes.
    #[error("message {index} of the transaction does not fit the 64 KiB of a netlink attribute")]
    AttributeTooLong {
        /// The operation it belongs to.
        tag: Option<u32>,
        /// The number of the message.
        index: u32,
    },
    /// A dump was disturbed by commits of others each time it was tried.
    #[error("{what}: interrupted by changes, several times in a row")]
    Interrupted {
        /// What was asked.
        what: &'static str,
    },
    /// The socket failed.
    #[error("{what}: cannot {doing}")]
    Io {
        /// What was asked.
        what: &'static str,
        /// The step that failed.
        doing: &'static str,
        /// What the system said.
        #[source]
        errno: io::Error,
    },
    /// The kernel's answer could not be read.
    #[error("{what}: the kernel's answer is damaged")]
    Malformed {
        /// What was asked.
        what: &'static str,
    },
    /// Answers were lost: the transaction may or may not be in effect. Audit, then plan again.
    #[error("{what}: answers were lost, its outcome is unknown")]
    Overrun {
        /// What was asked.
        what: &'static str,
    },
    /// The privilege to do this is missing; nothing is in effect.
    #[error("{what}: needs CAP_NET_ADMIN in the namespace's user namespace")]
    Permission {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
    /// A message of a transaction was refused; nothing of the transaction is in effect.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// A request outside a transaction, or a transaction as a whole, was refused.
    #[error("{what}: refused by the kernel ({ack})")]
    Request {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        ack: Ack,
    },
    /// Someone else committed since the generation the transaction was built for; nothing of it is
    /// in effect. Read again, build again.
    #[error("nf_tables has changed since the transaction was built")]
    Stale,
    /// The transaction is longer than one send of this socket takes; nothing was sent. Cut it.
    #[error("the transaction has {bytes} bytes, the socket takes {limit} at once")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The longest possible: `NftSocket::max_batch_bytes`.
        limit: usize,
    },
    /// The kernel has no nf_tables.
    #[error("{what}: the kernel has no nf_tables, or not for this family")]
    Unsupported {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
}

impl NftError {
    /// The system's error below this one; a general one where there is none.
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others have none")]
    pub fn into_io_error(self) -> io::Error {
        match self {
            Self::Io { errno, .. }
            | Self::Permission { errno, .. }
            | Self::Unsupported { errno, .. } => errno,
            Self::Request { ack, .. } => io::Error::from_raw_os_error(ack.errno()),
            Self::Refused(refusal) => io::Error::from_raw_os_error(refusal.errno()),
            Self::Interrupted { .. } | Self::Stale => io::ErrorKind::Interrupted.into(),
            Self::Malformed { .. } | Self::Overrun { .. } => io::ErrorKind::InvalidData.into(),
            _ => io::ErrorKind::Other.into(),
        }
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::AttributeTooLong { .. } | Self::Malformed { .. } | Self::TooLarge { .. } => {
                ErrorKind::Fatal
            }
            Self::Interrupted { .. } | Self::Overrun { .. } => ErrorKind::Retry,
            Self::Io { errno, .. } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
            Self::Permission { .. } => ErrorKind::Permission,
            Self::Refused(refusal) => refusal.kind(),
            Self::Request { ack, .. } => ErrorKind::of_errno(ack.errno),
            Self::Stale => ErrorKind::Conflict,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }

    /// The operation that failed, if it was one.
    pub fn tag(&self) -> Option<u32> {
        match self {
            Self::AttributeTooLong { tag, .. } => *tag,
            Self::Refused(refusal) => refusal.tag,
            Self::Interrupted { .. }
            | Self::Io { .. }
            | Self::Malformed { .. }
            | Self::Overrun { .. }
            | Self::Permission { .. }
            | Self::Request { .. }
            | Self::Stale
            | Self::TooLarge { .. }
            | Self::Unsupported { .. } => None,
        }
    }

    pub(crate) fn from_sock(what: &'static str, error: SockError) -> Self {
        match error {
            SockError::Interrupted => Self::Interrupted { what },
            SockError::Io { doing, errno } => Self::Io { what, doing, errno },
            SockError::Kernel(ack) => Self::from_ack(what, ack),
            SockError::Malformed => Self::Malformed { what },
            SockError::Overrun => Self::Overrun { what },
        }
    }

    /// An error that is not about one message of a transaction.
    pub(crate) fn from_ack(what: &'static str, ack: Ack) -> Self {
        match ack.errno {
            libc::EPERM => Self::Permission { what, errno: ack.io() },
            // KERNEL: the generation in BATCH_BEGIN is not the present one
            // (net/netfilter/nfnetlink.c nfnetlink_rcv_batch, v6.12).
            libc::ERESTART => Self::Stale,
            libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => {
                Self::Unsupported { what, errno: ack.io() }
            }
            _ => Self::Request { what, ack },
        }
    }
}

/// One refused message of a transaction.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.describe())]
#[non_exhaustive]
pub struct Refusal {
    /// The caller's operation: see `Transaction::op`.
    pub tag: Option<u32>,
    /// The number of the message in the transaction, from 0.
    pub index: u32,
    /// What it was to do.
    pub message: MessageKind,
    /// To what: family, table, and chain, set or handle.
    pub object: String,
    /// What the kernel said.
    pub ack: Ack,
    /// The attribute the kernel points at, as a path such as `expressions[2] lookup`.
    pub attribute: Option<String>,
    /// What the kernel does not have, such as `expression fib`, `iptables match addrtype revision
    /// 1`, `chain type nat` or `family inet`.
    pub unsupported: Option<String>,
    /// How many other messages of the transaction were refused.
    pub others: u32,
    #[source]
    errno: io::Error,
}

impl Refusal {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match &self.unsupported {
            Some(_) => ErrorKind::Unsupported,
            None => ErrorKind::of_errno(self.ack.errno),
        }
    }

    /// The errno, positive.
    pub fn errno(&self) -> i32 {
        self.ack.errno
    }

    pub(crate) fn new(tx: &Transaction, index: u32, ack: Ack, others: u32) -> Self {
        let mut refusal = Self {
            tag: tx.tag_of(index),
            index,
            message: MessageKind(u8::MAX),
            object: String::new(),
            attribute: None,
            unsupported: None,
            others,
            errno: ack.io(),
            ack,
        };
        if let Some(message) = tx.message(index) {
            let [kind, _] = message.kind.to_le_bytes();
            refusal.message = MessageKind(kind);
            refusal.object = object(message);
            if let Some(offset) = refusal.ack.offset.and_then(|o| usize::try_from(o).ok()) {
                let (path, expr) = attribute_at(message, offset);
                refusal.attribute = path;
                refusal.unsupported = expr.filter(|_| refusal.ack.errno == libc::ENOENT);
            }
            if refusal.unsupported.is_none() {
                refusal.unsupported = lacking_kind(message, &refusal);
            }
        }
        refusal
    }

    fn describe(&self) -> String {
        let mut out = format!("{:?} {}", self.message, self.object);
        let mut add = |text: std::fmt::Arguments<'_>| out.push_str(&text.to_string());
        if let Some(tag) = self.tag {
            add(format_args!(" (operation {tag})"));
        }
        match &self.unsupported {
            Some(expr) => add(format_args!(": the kernel has no {expr}")),
            None => add(format_args!(": refused by the kernel ({})", self.ack)),
        }
        if let Some(attribute) = &self.attribute {
            add(format_args!(" at {attribute}"));
        }
        match self.ack.errno {
            libc::EPERM => add(format_args!("; the table may belong to another socket")),
            // KERNEL: nft_parse_register_load, since 6.3 (net/netfilter/nf_tables_api.c, v6.12).
            libc::ENODATA => add(format_args!("; reads a register that nothing was loaded into")),
            _ => {}
        }
        match self.others {
            0 => {}
            n => add(format_args!("; {n} more messages refused")),
        }
        out
    }
}

/// Names what a message is about: family, table, and what is in it.
fn object(message: Message<'_>) -> String {
    let Some((family, attrs)) = message.nfnl() else { return String::new() };
    let mut out = Family::from_number(family).to_string();
    let [kind, _] = message.kind.to_le_bytes();
    let (names, handle): (&[u16], _) = match MessageKind(kind) {
        MessageKind::NEWTABLE | MessageKind::DELTABLE => (&[TABLE_NAME], None),
        MessageKind::NEWCHAIN | MessageKind::DELCHAIN => (&[CHAIN_TABLE, CHAIN_NAME], None),
        MessageKind::NEWRULE | MessageKind::DELRULE => {
            (&[RULE_TABLE, RULE_CHAIN], Some(RULE_HANDLE))
        }
        MessageKind::NEWSET | MessageKind::DELSET => (&[SET_TABLE, SET_NAME], None),
        _ => (&[ELEM_LIST_TABLE, ELEM_LIST_SET], None),
    };
    for name in names {
        if let Some(name) = attrs.find(*name) {
            out.push(' ');
            out.push_str(&text(name));
        }
    }
    if let Some(handle) = handle.and_then(|kind| attrs.find(kind)).and_then(be64) {
        out.push_str(&format!(" handle {handle}"));
    }
    out
}

/// The path to the attribute that starts `offset` bytes into a message, and the expression the
/// kernel lacks if that is what it points at.
fn attribute_at(message: Message<'_>, offset: usize) -> (Option<String>, Option<String>) {
    let [kind, _] = message.kind.to_le_bytes();
    let Some((_, mut attrs)) = message.nfnl() else { return (None, None) };
    let mut at = NFNL_HEADER;
    let Some((kind_at, value, start)) = enclosing(&mut attrs, &mut at, offset) else {
        return (None, None);
    };
    let mut path = top_level(MessageKind(kind), kind_at);
    if start == offset || kind_at != list_attribute(MessageKind(kind)) {
        return (Some(path), None);
    }
    let (mut list, mut at, mut index) = (Attrs(value), start + ATTR_HEADER, 0_u32);
    let found = loop {
        let before = list;
        match step(&mut list, &mut at) {
            Some((_, value, start)) if offset < at => break Some((value, start, before)),
            Some(_) => index += 1,
            None => break None,
        }
    };
    let Some((elem, ..)) = found else { return (Some(path), None) };
    path.push_str(&format!("[{index}]"));
    if MessageKind(kind) != MessageKind::NEWRULE {
        return (Some(path), None);
    }
    let elem = Attrs(elem).table::<3>();
    let name = elem.raw(EXPR_NAME).map(text).unwrap_or_default();
    path.push(' ');
    path.push_str(&name);
    (Some(path), lacking(&name, elem.nested(EXPR_DATA)))
}

/// The type of chain or the family the kernel lacks, if that is why it refused.
fn lacking_kind(message: Message<'_>, refusal: &Refusal) -> Option<String> {
    let (family, attrs) = message.nfnl()?;
    match (refusal.message, refusal.ack.errno) {
        (MessageKind::NEWCHAIN, libc::ENOENT) if refusal.attribute.as_deref() == Some("type") => {
            Some(format!("chain type {}", text(attrs.find(CHAIN_TYPE)?)))
        }
        (MessageKind::NEWTABLE, libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {
            Some(format!("family {}", Family::from_number(family)))
        }
        _ => None,
    }
}

/// What an ENOENT at this expression says the kernel lacks; `None` where it can mean a missing set,
/// chain or object.
fn lacking(name: &str, data: Attrs<'_>) -> Option<String> {
    match name {
        "dynset" | "immediate" | "lookup" | "objref" => None,
        "match" | "target" => {
            let xt = data.find(XT_NAME).map(text).unwrap_or_default();
            let rev = data.find(XT_REV).and_then(be32).unwrap_or_default();
            Some(format!("iptables {name} {xt} revision {rev}"))
        }
        _ => Some(format!("expression {name}")),
    }
}

/// Reads one attribute and moves `at` behind it; returns its type, value and start.
fn step<'a>(attrs: &mut Attrs<'a>, at: &mut usize) -> Option<(u16, &'a [u8], usize)> {
    let start = *at;
    let (kind, value) = attrs.next()?;
    *at = start + (ATTR_HEADER + value.len()).next_multiple_of(4);
    Some((kind, value, start))
}

/// The attribute that contains an offset.
fn enclosing<'a>(
    attrs: &mut Attrs<'a>,
    at: &mut usize,
    offset: usize,
) -> Option<(u16, &'a [u8], usize)> {
    loop {
        let found = step(attrs, at)?;
        if offset < *at {
            return Some(found);
        }
    }
}

fn list_attribute(kind: MessageKind) -> u16 {
    if kind == MessageKind::NEWRULE { RULE_EXPRESSIONS } else { ELEM_LIST_ELEMENTS }
}

fn top_level(message: MessageKind, kind: u16) -> String {
    let names: &[(u16, &str)] = match message {
        MessageKind::NEWTABLE | MessageKind::DELTABLE => &[
            (TABLE_NAME, "name"),
            (TABLE_FLAGS, "flags"),
            (TABLE_HANDLE, "handle"),
            (TABLE_USERDATA, "userdata"),
        ],
        MessageKind::NEWCHAIN | MessageKind::DELCHAIN => &[
            (CHAIN_TABLE, "table"),
            (CHAIN_HANDLE, "handle"),
            (CHAIN_NAME, "name"),
            (CHAIN_HOOK, "hook"),
            (CHAIN_POLICY, "policy"),
            (CHAIN_TYPE, "type"),
            (CHAIN_USERDATA, "userdata"),
        ],
        MessageKind::NEWRULE | MessageKind::DELRULE => &[
            (RULE_TABLE, "table"),
            (RULE_CHAIN, "chain"),
            (RULE_HANDLE, "handle"),
            (RULE_EXPRESSIONS, "expressions"),
            (RULE_COMPAT, "compat"),
            (RULE_POSITION, "position"),
            (RULE_USERDATA, "userdata"),
            (RULE_POSITION_ID, "position id"),
        ],
        MessageKind::NEWSET | MessageKind::DELSET => &[
            (SET_TABLE, "table"),
            (SET_NAME, "name"),
            (SET_FLAGS, "flags"),
            (SET_KEY_TYPE, "key type"),
            (SET_KEY_LEN, "key length"),
            (SET_DATA_TYPE, "data type"),
            (SET_DATA_LEN, "data length"),
            (SET_DESC, "description"),
            (SET_TIMEOUT, "timeout"),
            (SET_USERDATA, "userdata"),
        ],
        _ => &[
            (ELEM_LIST_TABLE, "table"),
            (ELEM_LIST_SET, "set"),
            (ELEM_LIST_ELEMENTS, "elements"),
            (ELEM_LIST_SET_ID, "set id"),
        ],
    };
    let name = names.iter().find(|(number, _)| *number == kind).map(|(_, name)| *name);
    name.map_or_else(|| format!("attribute {kind}"), str::to_owned)
}

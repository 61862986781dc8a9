//! Elements of sets and maps.

use std::borrow::Cow;

use super::attr::*;
use super::types::{Family, MessageKind, Verdict};
use super::write::{put_value, put_verdict};
use super::{read, udata};
use crate::batch::{NLM_F_CREATE, Transaction};
use crate::dec::{Attrs, Message};
use crate::enc::Writer;

/// Bytes of elements after which another message is begun.
// KERNEL: nla_len is 16 bits (include/uapi/linux/netlink.h, v6.12), so the list of elements of one
// message is below 64 KiB; an element is below 600 bytes.
const MAX_LIST_BYTES: usize = 60_000;

/// An element to add or delete.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Element<'a> {
    key: &'a [u8],
    key_end: Option<&'a [u8]>,
    value: Value<'a>,
    interval_end: bool,
    timeout_ms: Option<u64>,
    comment: Option<&'a str>,
}

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Bytes(&'a [u8]),
    None,
    Verdict(&'a Verdict<'a>),
}

impl<'a> Element<'a> {
    /// An element without a value.
    pub const fn new(key: &'a [u8]) -> Self {
        Self {
            key,
            key_end: None,
            value: Value::None,
            interval_end: false,
            timeout_ms: None,
            comment: None,
        }
    }

    /// Gives it a value.
    pub const fn data(mut self, value: &'a [u8]) -> Self {
        self.value = Value::Bytes(value);
        self
    }

    /// Gives it a verdict.
    pub const fn verdict(mut self, verdict: &'a Verdict<'a>) -> Self {
        self.value = Value::Verdict(verdict);
        self
    }

    /// Makes it an interval up to this key, included; for sets with interval fields.
    pub const fn key_end(mut self, key: &'a [u8]) -> Self {
        self.key_end = Some(key);
        self
    }

    /// Makes it the end of an interval, not included; for interval sets with one field.
    pub const fn interval_end(mut self) -> Self {
        self.interval_end = true;
        self
    }

    /// Makes it expire after so many milliseconds.
    pub const fn timeout_ms(mut self, timeout_ms: u64) -> Self {
        self.timeout_ms = Some(timeout_ms);
        self
    }

    /// Keeps a comment with it.
    pub const fn comment(mut self, comment: &'a str) -> Self {
        self.comment = Some(comment);
        self
    }
}

#[expect(single_use_lifetimes, reason = "stable Rust wants a name inside `impl Trait`")]
impl Transaction {
    /// Adds elements, in as many messages as it takes; none if there are none.
    ///
    /// An element that exists with the same value is left as it is; with another value it is
    /// refused with EEXIST: delete it first, in the same transaction.
    pub fn add_elements<'a>(
        &mut self,
        family: Family,
        table: &str,
        set: &str,
        elements: impl IntoIterator<Item = Element<'a>>,
    ) {
        self.elements(MessageKind::NEWSETELEM, family, (table, set, None), elements);
    }

    /// Adds elements to a set made in the same transaction, by its number.
    pub fn add_elements_by_id<'a>(
        &mut self,
        family: Family,
        table: &str,
        (set, id): (&str, u32),
        elements: impl IntoIterator<Item = Element<'a>>,
    ) {
        self.elements(MessageKind::NEWSETELEM, family, (table, set, Some(id)), elements);
    }

    /// Deletes elements by their keys; ENOENT if one does not exist.
    pub fn del_elements<'a>(
        &mut self,
        family: Family,
        table: &str,
        set: &str,
        elements: impl IntoIterator<Item = Element<'a>>,
    ) {
        self.elements(MessageKind::DELSETELEM, family, (table, set, None), elements);
    }

    /// Deletes all elements of a set; the set stays.
    pub fn flush_set(&mut self, family: Family, table: &str, set: &str) {
        let message = self.begin(MessageKind::DELSETELEM, 0, family);
        let w = self.writer();
        w.str(ELEM_LIST_TABLE, table);
        w.str(ELEM_LIST_SET, set);
        self.end(message);
    }

    fn elements<'a>(
        &mut self,
        kind: MessageKind,
        family: Family,
        (table, set, id): (&str, &str, Option<u32>),
        elements: impl IntoIterator<Item = Element<'a>>,
    ) {
        let flags = if kind == MessageKind::NEWSETELEM { NLM_F_CREATE } else { 0 };
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            let message = self.begin(kind, flags, family);
            let w = self.writer();
            w.str(ELEM_LIST_TABLE, table);
            w.str(ELEM_LIST_SET, set);
            if let Some(id) = id {
                w.be32(ELEM_LIST_SET_ID, id);
            }
            let list = w.nest(ELEM_LIST_ELEMENTS);
            while w.since(list) < MAX_LIST_BYTES {
                let Some(element) = elements.next() else { break };
                put_element(w, &element);
            }
            w.end_nest(list);
            self.end(message);
        }
    }
}

fn put_element(w: &mut Writer, element: &Element<'_>) {
    let elem = w.nest(LIST_ELEM);
    if element.interval_end {
        w.be32(ELEM_FLAGS, ElementDump::INTERVAL_END);
    }
    put_value(w, ELEM_KEY, element.key);
    if let Some(end) = element.key_end {
        put_value(w, ELEM_KEY_END, end);
    }
    match element.value {
        Value::Bytes(value) => put_value(w, ELEM_DATA, value),
        Value::None => {}
        Value::Verdict(verdict) => put_verdict(w, ELEM_DATA, verdict),
    }
    if let Some(timeout) = element.timeout_ms {
        w.be64(ELEM_TIMEOUT, timeout);
    }
    if let Some(comment) = element.comment {
        let mut buf = udata::Buffer::default();
        buf.put_text(udata::COMMENT, comment);
        w.bytes(ELEM_USERDATA, buf.as_bytes());
    }
    w.end_nest(elem);
}

/// The value of a listed element.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ElementValue<'a> {
    /// Bytes.
    Data(Cow<'a, [u8]>),
    /// A verdict.
    Verdict(Verdict<'a>),
}

/// An element as the kernel lists it, borrowed from the receive buffer.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct ElementRef<'a> {
    /// Its key.
    pub key: &'a [u8],
    /// The last key of the interval, in sets with interval fields.
    pub key_end: Option<&'a [u8]>,
    /// Its value, in maps.
    pub value: Option<ElementValue<'a>>,
    /// [`ElementDump::INTERVAL_END`].
    pub flags: u32,
    /// Milliseconds it lives.
    pub timeout_ms: Option<u64>,
    /// Milliseconds it has left.
    pub expires_ms: Option<u64>,
    /// The caller's bytes.
    pub userdata: &'a [u8],
    /// What was counted, in sets that count.
    pub counter: Option<Counter>,
}

/// The packets that an element was found for.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub struct Counter {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl ElementRef<'_> {
    /// A copy that borrows nothing.
    pub fn to_owned(&self) -> ElementDump {
        ElementDump {
            key: self.key.to_vec(),
            key_end: self.key_end.map(<[u8]>::to_vec),
            value: self.value.clone().map(|value| match value {
                ElementValue::Data(data) => ElementValue::Data(Cow::Owned(data.into_owned())),
                ElementValue::Verdict(verdict) => ElementValue::Verdict(verdict.into_owned()),
            }),
            flags: self.flags,
            timeout_ms: self.timeout_ms,
            expires_ms: self.expires_ms,
            userdata: self.userdata.to_vec(),
            counter: self.counter,
        }
    }
}

/// An element as the kernel lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct ElementDump {
    /// Its key.
    pub key: Vec<u8>,
    /// The last key of the interval, in sets with interval fields.
    pub key_end: Option<Vec<u8>>,
    /// Its value, in maps.
    pub value: Option<ElementValue<'static>>,
    /// [`ElementDump::INTERVAL_END`].
    pub flags: u32,
    /// Milliseconds it lives.
    pub timeout_ms: Option<u64>,
    /// Milliseconds it has left.
    pub expires_ms: Option<u64>,
    /// The caller's bytes.
    pub userdata: Vec<u8>,
    /// What was counted, in sets that count.
    pub counter: Option<Counter>,
}

impl ElementDump {
    /// Flag: the end of an interval, not included.
    pub const INTERVAL_END: u32 = 1;

    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&str> {
        udata::comment(&self.userdata, udata::COMMENT)
    }
}

/// Iterator over the elements in one message.
pub(crate) fn elements(message: Message<'_>) -> impl Iterator<Item = ElementRef<'_>> {
    let attrs = message.nfnl().map(|(_, attrs)| attrs).unwrap_or_default();
    attrs.table::<4>().nested(ELEM_LIST_ELEMENTS).filter_map(|(_, elem)| element(Attrs(elem)))
}

fn element(attrs: Attrs<'_>) -> Option<ElementRef<'_>> {
    let t = attrs.table::<11>();
    let data = t.nested(ELEM_DATA);
    let value = match read::verdict(data) {
        Some(verdict) => Some(ElementValue::Verdict(verdict)),
        None => data.find(DATA_VALUE).map(|v| ElementValue::Data(Cow::Borrowed(v))),
    };
    Some(ElementRef {
        // The element that catches all keys has none.
        key: t.nested(ELEM_KEY).find(DATA_VALUE).unwrap_or_default(),
        key_end: t.nested(ELEM_KEY_END).find(DATA_VALUE),
        value,
        flags: t.be32(ELEM_FLAGS).unwrap_or_default(),
        timeout_ms: t.be64(ELEM_TIMEOUT),
        expires_ms: t.be64(ELEM_EXPIRATION),
        userdata: t.raw(ELEM_USERDATA).unwrap_or_default(),
        counter: read::counter(t.nested(ELEM_EXPR)),
    })
}

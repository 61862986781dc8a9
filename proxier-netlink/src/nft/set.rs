//! Sets and maps.

use super::attr::*;
use super::types::{Family, MessageKind};
use super::{read, udata};
use crate::batch::{NLM_F_CREATE, NLM_F_EXCL, Transaction};
use crate::dec::{Attrs, Message};
use crate::enc::Writer;

/// Bits a type has in the number of a concatenation.
const TYPE_BITS: u32 = 6;

/// The type of a key or value: how tools print it, and its length in bytes.
// The numbers are those of `enum datatypes` in nft 1.0.6; the kernel only stores them.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct DataType {
    /// The number `nft` gives it.
    pub number: u32,
    /// Bytes.
    pub len: u32,
}

impl DataType {
    /// An IPv4 address.
    pub const IPV4: Self = Self { number: 7, len: 4 };
    /// An IPv6 address.
    pub const IPV6: Self = Self { number: 8, len: 16 };
    /// A transport protocol.
    pub const L4PROTO: Self = Self { number: 12, len: 1 };
    /// A port.
    pub const PORT: Self = Self { number: 13, len: 2 };
    /// A packet or connection mark.
    pub const MARK: Self = Self { number: 19, len: 4 };
    /// The name of an interface.
    pub const IFNAME: Self = Self { number: 41, len: 16 };
    /// What happens to a packet; for values only.
    // KERNEL: NFT_DATA_VERDICT (include/uapi/linux/netfilter/nf_tables.h, v6.12).
    pub const VERDICT: Self = Self { number: 0xffff_ff00, len: 16 };

    /// A number of so many bytes.
    pub const fn integer(len: u32) -> Self {
        Self { number: 4, len }
    }

    /// Several values one behind the other, each padded to a multiple of 4 bytes; at most five.
    pub const fn concat(parts: &[Self]) -> Self {
        let mut out = Self { number: 0, len: 0 };
        let mut rest = parts;
        while let [part, tail @ ..] = rest {
            out.number = out.number << TYPE_BITS | part.number;
            out.len += part.len.next_multiple_of(4);
            rest = tail;
        }
        out
    }
}

/// The order of the bytes in a key or value, for tools that print it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum ByteOrder {
    /// The host's.
    Host = 1,
    /// The network's.
    Network = 2,
}

open_flags! {
    /// What a set can do.
    SetFlags {
        ANONYMOUS = 0x1 "Has no name of its own; belongs to one rule.";
        CONSTANT = 0x2 "Does not change once a rule uses it.";
        INTERVAL = 0x4 "Elements are intervals.";
        MAP = 0x8 "Elements have values.";
        TIMEOUT = 0x10 "Elements can expire.";
        EVAL = 0x20 "Rules can add elements.";
        CONCAT = 0x80 "Intervals of several fields.";
    }
}

/// A set or map to make.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct SetSpec<'a> {
    family: Family,
    table: &'a str,
    name: &'a str,
    key: DataType,
    data: Option<DataType>,
    flags: SetFlags,
    id: u32,
    size: Option<u32>,
    counted: bool,
    fields: &'a [u32],
    timeout_ms: Option<u64>,
    key_order: Option<ByteOrder>,
    data_order: Option<ByteOrder>,
    comment: Option<&'a str>,
    userdata: Option<&'a [u8]>,
    exclusive: bool,
}

impl<'a> SetSpec<'a> {
    /// A set of keys.
    pub const fn set(family: Family, table: &'a str, name: &'a str, key: DataType) -> Self {
        Self {
            family,
            table,
            name,
            key,
            data: None,
            flags: SetFlags::NONE,
            id: 1,
            size: None,
            counted: false,
            fields: &[],
            timeout_ms: None,
            key_order: None,
            data_order: None,
            comment: None,
            userdata: None,
            exclusive: false,
        }
    }

    /// A map from keys to values; [`DataType::VERDICT`] makes it a verdict map.
    pub const fn map(
        family: Family,
        table: &'a str,
        name: &'a str,
        key: DataType,
        data: DataType,
    ) -> Self {
        let mut spec = Self::set(family, table, name, key).flags(SetFlags::MAP);
        spec.data = Some(data);
        spec
    }

    /// Adds flags.
    pub const fn flags(mut self, flags: SetFlags) -> Self {
        self.flags = SetFlags(self.flags.0 | flags.0);
        self
    }

    /// Makes it anonymous and constant; the name is a template such as `__set%d`, the number is
    /// that by which [`SetRef::anonymous`](super::SetRef::anonymous) finds it.
    pub const fn anonymous(self, id: u32) -> Self {
        self.flags(SetFlags(SetFlags::ANONYMOUS.0 | SetFlags::CONSTANT.0)).id(id)
    }

    /// Numbers the set within the transaction.
    pub const fn id(mut self, id: u32) -> Self {
        self.id = id;
        self
    }

    /// Limits the number of elements.
    pub const fn size(mut self, elements: u32) -> Self {
        self.size = Some(elements);
        self
    }

    /// Gives every element a counter of the packets that are found in it.
    // KERNEL: since 5.7 (net/netfilter/nf_tables_api.c nft_add_set_elem, v6.12).
    pub const fn counted(mut self) -> Self {
        self.counted = true;
        self
    }

    /// Makes it a set of intervals of several fields, by the bytes of each.
    pub const fn interval_fields(mut self, bytes: &'a [u32]) -> Self {
        self.fields = bytes;
        self.flags(SetFlags(SetFlags::CONCAT.0 | SetFlags::INTERVAL.0))
    }

    /// Makes elements expire after so many milliseconds unless they say otherwise.
    pub const fn timeout_ms(mut self, timeout_ms: u64) -> Self {
        self.timeout_ms = Some(timeout_ms);
        self.flags(SetFlags::TIMEOUT)
    }

    /// Tells tools the byte order of keys.
    pub const fn key_order(mut self, order: ByteOrder) -> Self {
        self.key_order = Some(order);
        self
    }

    /// Tells tools the byte order of values.
    pub const fn data_order(mut self, order: ByteOrder) -> Self {
        self.data_order = Some(order);
        self
    }

    /// Keeps a comment with the set.
    pub const fn comment(mut self, comment: &'a str) -> Self {
        self.comment = Some(comment);
        self
    }

    /// Keeps bytes with the set, at most 256; wins over the byte orders and the comment.
    pub const fn userdata(mut self, userdata: &'a [u8]) -> Self {
        self.userdata = Some(userdata);
        self
    }

    /// Makes the commit fail with EEXIST if the set exists.
    pub const fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }
}

impl Transaction {
    /// Makes a set or map if it does not exist.
    pub fn new_set(&mut self, spec: SetSpec<'_>) {
        let exclusive = if spec.exclusive { NLM_F_EXCL } else { 0 };
        let message = self.begin(MessageKind::NEWSET, NLM_F_CREATE | exclusive, spec.family);
        let w = self.writer();
        w.str(SET_TABLE, spec.table);
        w.str(SET_NAME, spec.name);
        w.be32(SET_FLAGS, spec.flags.0);
        w.be32(SET_KEY_TYPE, spec.key.number);
        w.be32(SET_KEY_LEN, spec.key.len);
        if let Some(data) = spec.data {
            w.be32(SET_DATA_TYPE, data.number);
            w.be32(SET_DATA_LEN, data.len);
        }
        w.be32(SET_ID, spec.id);
        put_desc(w, &spec);
        if let Some(timeout) = spec.timeout_ms {
            w.be64(SET_TIMEOUT, timeout);
        }
        put_userdata(w, &spec);
        if spec.counted {
            let expr = w.nest(SET_EXPR);
            w.str(EXPR_NAME, "counter");
            let data = w.nest(EXPR_DATA);
            w.end_nest(data);
            w.end_nest(expr);
        }
        self.end(message);
    }

    /// Deletes a set; EBUSY while a rule uses it.
    pub fn del_set(&mut self, family: Family, table: &str, name: &str) {
        let message = self.begin(MessageKind::DELSET, 0, family);
        let w = self.writer();
        w.str(SET_TABLE, table);
        w.str(SET_NAME, name);
        self.end(message);
    }
}

fn put_desc(w: &mut Writer, spec: &SetSpec<'_>) {
    if spec.size.is_none() && spec.fields.is_empty() {
        return;
    }
    let desc = w.nest(SET_DESC);
    if let Some(size) = spec.size {
        w.be32(SET_DESC_SIZE, size);
    }
    if !spec.fields.is_empty() {
        let concat = w.nest(SET_DESC_CONCAT);
        for bytes in spec.fields {
            let field = w.nest(LIST_ELEM);
            // KERNEL: in bytes, whatever the header says (nft_set_desc_concat_parse, v6.12).
            w.be32(SET_FIELD_LEN, *bytes);
            w.end_nest(field);
        }
        w.end_nest(concat);
    }
    w.end_nest(desc);
}

fn put_userdata(w: &mut Writer, spec: &SetSpec<'_>) {
    if let Some(userdata) = spec.userdata {
        w.bytes(SET_USERDATA, userdata);
        return;
    }
    let mut buf = udata::Buffer::default();
    let order = |order: ByteOrder| u32::from(order as u8).to_ne_bytes();
    if let Some(key) = spec.key_order {
        buf.put(udata::SET_KEY_BYTE_ORDER, &order(key));
    }
    if let Some(data) = spec.data_order {
        buf.put(udata::SET_DATA_BYTE_ORDER, &order(data));
    }
    if let Some(comment) = spec.comment {
        buf.put_text(udata::SET_COMMENT, comment);
    }
    if !buf.as_bytes().is_empty() {
        w.bytes(SET_USERDATA, buf.as_bytes());
    }
}

/// A set or map as the kernel lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct SetDump {
    /// The family of its table.
    pub family: Family,
    /// The name of its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Its handle.
    pub handle: u64,
    /// What it can do.
    pub flags: SetFlags,
    /// The type of its keys.
    pub key: DataType,
    /// The type of its values, if it is a map.
    pub data: Option<DataType>,
    /// The most elements it takes.
    pub size: Option<u32>,
    /// Every element has a counter.
    pub counted: bool,
    /// The bytes of each field, if it is a set of intervals of several fields.
    pub fields: Vec<u32>,
    /// Milliseconds after which elements expire.
    pub timeout_ms: Option<u64>,
    /// The caller's bytes.
    pub userdata: Vec<u8>,
}

impl SetDump {
    /// The text of the comment, if the bytes hold one.
    pub fn comment(&self) -> Option<&str> {
        udata::comment(&self.userdata, udata::SET_COMMENT)
    }

    pub(crate) fn read(message: Message<'_>) -> Option<Self> {
        let (family, attrs) = message.nfnl()?;
        let t = attrs.table::<18>();
        let desc = t.nested(SET_DESC).table::<3>();
        let kind = |number, len| {
            Some(DataType { number: t.be32(number)?, len: t.be32(len).unwrap_or_default() })
        };
        Some(Self {
            family: Family::from_number(family),
            table: t.str(SET_TABLE)?.into_owned(),
            name: t.str(SET_NAME)?.into_owned(),
            handle: t.be64(SET_HANDLE).unwrap_or_default(),
            flags: SetFlags(t.be32(SET_FLAGS).unwrap_or_default()),
            key: kind(SET_KEY_TYPE, SET_KEY_LEN)?,
            data: kind(SET_DATA_TYPE, SET_DATA_LEN),
            size: desc.be32(SET_DESC_SIZE).filter(|size| *size != 0),
            counted: read::counter(t.nested(SET_EXPR)).is_some(),
            fields: desc
                .nested(SET_DESC_CONCAT)
                .filter_map(|(_, field)| Attrs(field).table::<2>().be32(SET_FIELD_LEN))
                .collect(),
            timeout_ms: t.be64(SET_TIMEOUT),
            userdata: t.raw(SET_USERDATA).unwrap_or_default().to_vec(),
        })
    }
}

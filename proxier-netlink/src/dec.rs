//! Reader of netlink messages and attributes.
//!
//! Total: no input makes it panic, read outside the slice or loop. What does not parse ends the
//! iteration; a caller that needs to tell "end" from "damaged" asks [`Messages::rest`].

use std::borrow::Cow;

use crate::enc::{ATTR_HEADER, MSG_HEADER};

/// Bits of an attribute's type that name it; the two highest are flags.
const TYPE_MASK: u16 = 0x3fff;

/// One netlink message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    pub(crate) portid: u32,
    /// Everything behind the `nlmsghdr`.
    pub(crate) payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The family of the `nfgenmsg`, and the attributes behind it.
    pub(crate) fn nfnl(&self) -> Option<(u8, Attrs<'a>)> {
        let (head, attrs) = self.payload.split_at_checked(4)?;
        Some((*head.first()?, Attrs(attrs)))
    }

    /// The command of the `genlmsghdr`, and the attributes behind it.
    pub(crate) fn generic(&self) -> Option<(u8, Attrs<'a>)> {
        // The two headers have the same size and the interesting byte in front.
        self.nfnl()
    }
}

/// Iterator over the messages of a datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    pub(crate) fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }

    /// What has not been read; not empty after the end if the datagram is damaged.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let len = usize::try_from(ne32(self.0)?).ok()?;
        if len < MSG_HEADER {
            return None;
        }
        let message = self.0.get(..len)?;
        let (head, payload) = message.split_at_checked(MSG_HEADER)?;
        let out = Message {
            kind: ne16(head.get(4..)?)?,
            flags: ne16(head.get(6..)?)?,
            seq: ne32(head.get(8..)?)?,
            portid: ne32(head.get(12..)?)?,
            payload,
        };
        self.0 = self.0.get(align(len)..).unwrap_or_default();
        Some(out)
    }
}

/// One attribute: its type without flags, and its value.
pub(crate) type Attr<'a> = (u16, &'a [u8]);

/// Iterator over attributes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Attrs<'a>(pub(crate) &'a [u8]);

impl<'a> Attrs<'a> {
    /// The value of the last attribute of each type below `N`.
    pub(crate) fn table<const N: usize>(self) -> Table<'a, N> {
        let mut out = Table { values: [None; N], present: 0 };
        for (kind, value) in self {
            out.present |= 1_u64.checked_shl(u32::from(kind)).unwrap_or(1 << 63);
            if let Some(slot) = out.values.get_mut(usize::from(kind)) {
                *slot = Some(value);
            }
        }
        out
    }

    /// The first attribute of this type.
    pub(crate) fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        Iterator::find(&mut self, |(k, _)| *k == kind).map(|(_, v)| v)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Attr<'a>;

    fn next(&mut self) -> Option<Attr<'a>> {
        let len = usize::from(ne16(self.0)?);
        let kind = ne16(self.0.get(2..)?)? & TYPE_MASK;
        let value = self.0.get(ATTR_HEADER..len)?;
        self.0 = self.0.get(align(len)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// Attributes by type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a, const N: usize> {
    values: [Option<&'a [u8]>; N],
    present: u64,
}

impl<'a, const N: usize> Table<'a, N> {
    pub(crate) fn raw(&self, kind: u16) -> Option<&'a [u8]> {
        self.values.get(usize::from(kind)).copied().flatten()
    }

    pub(crate) fn nested(&self, kind: u16) -> Attrs<'a> {
        Attrs(self.raw(kind).unwrap_or_default())
    }

    pub(crate) fn str(&self, kind: u16) -> Option<Cow<'a, str>> {
        self.raw(kind).map(text)
    }

    pub(crate) fn u8(&self, kind: u16) -> Option<u8> {
        self.raw(kind)?.first().copied()
    }

    pub(crate) fn ne16(&self, kind: u16) -> Option<u16> {
        ne16(self.raw(kind)?)
    }

    pub(crate) fn ne32(&self, kind: u16) -> Option<u32> {
        ne32(self.raw(kind)?)
    }

    pub(crate) fn be32(&self, kind: u16) -> Option<u32> {
        be32(self.raw(kind)?)
    }

    pub(crate) fn be64(&self, kind: u16) -> Option<u64> {
        be64(self.raw(kind)?)
    }

    /// Whether every attribute present has one of these types (bit n: type n).
    pub(crate) fn only(&self, known: u64) -> bool {
        self.present & !known == 0
    }
}

/// Text up to the first NUL; bytes that are not UTF-8 are replaced.
pub(crate) fn text(bytes: &[u8]) -> Cow<'_, str> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default())
}

pub(crate) fn be16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

pub(crate) fn be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

pub(crate) fn be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}

pub(crate) fn ne16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.first_chunk()?))
}

pub(crate) fn ne32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

pub(crate) fn ne64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.first_chunk()?))
}

fn align(len: usize) -> usize {
    len.wrapping_add(3) & !3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::enc::Writer;

    #[test]
    fn what_the_writer_wrote_is_read_back() {
        let mut w = Writer::default();
        let m = w.message(3, 1, 9, 10, 0);
        w.str(1, "filter");
        w.be32(2, 77);
        let n = w.nest(3);
        w.be64(1, 1 << 40);
        w.end_nest(n);
        w.end_message(m);
        let mut messages = Messages::new(w.as_bytes());
        let message = messages.next().expect("one message");
        assert_eq!((message.kind, message.flags, message.seq), (3, 1, 9));
        let (family, attrs) = message.nfnl().expect("an nfgenmsg");
        let t = attrs.table::<4>();
        assert_eq!(family, 10);
        assert_eq!(t.str(1).as_deref(), Some("filter"));
        assert_eq!(t.be32(2), Some(77));
        assert_eq!(t.nested(3).table::<2>().be64(1), Some(1 << 40));
        assert!(t.only(0b1110) && !t.only(0b0110));
        assert!(messages.next().is_none() && messages.rest().is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_or_loop(
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
        ) {
            let most = bytes.len() / MSG_HEADER;
            prop_assert!(Messages::new(&bytes).inspect(|m| assert!(m.nfnl().is_none_or(|_| true))).count() <= most);
            prop_assert!(Attrs(&bytes).count() <= bytes.len() / ATTR_HEADER + 1);
            let t = Attrs(&bytes).table::<8>();
            for kind in 0..9 {
                let _ = (t.raw(kind), t.str(kind), t.u8(kind), t.be32(kind), t.be64(kind));
                let _ = t.nested(kind).count();
            }
        }
    }
}

//! The bytes user space keeps with an object: type, length, value, in the way of libnftnl.
//!
//! `nft` and `iptables` list a comment and choose how to print a key by them. The numbers are those
//! of `libnftnl/udata.h` at 1.2.4, which is their ABI.

/// A comment, on tables, chains, rules and elements.
pub(crate) const COMMENT: u8 = 0;
/// The byte order of a set's keys.
pub(crate) const SET_KEY_BYTE_ORDER: u8 = 0;
/// The byte order of a map's values.
pub(crate) const SET_DATA_BYTE_ORDER: u8 = 1;
/// A comment on a set.
pub(crate) const SET_COMMENT: u8 = 7;

/// Most bytes kept with an object.
// KERNEL: NFT_USERDATA_MAXLEN (include/uapi/linux/netfilter/nf_tables.h, v6.12).
const MAX: usize = 256;

/// Encoded values, on the stack.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: [u8; MAX],
    len: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Self { bytes: [0; MAX], len: 0 }
    }
}

impl Buffer {
    /// Appends a value; one that does not fit is left out.
    pub(crate) fn put(&mut self, kind: u8, value: &[u8]) {
        let Ok(len) = u8::try_from(value.len()) else { return };
        let Some(free) = self.bytes.get_mut(self.len..) else { return };
        if let Some((to, _)) = free.split_at_mut_checked(value.len() + 2) {
            let (head, body) = to.split_at_mut(2);
            head.copy_from_slice(&[kind, len]);
            body.copy_from_slice(value);
            self.len += value.len() + 2;
        }
    }

    /// Appends text with its NUL; a longer one is cut at a character.
    pub(crate) fn put_text(&mut self, kind: u8, text: &str) {
        let room = (MAX - self.len).saturating_sub(3).min(usize::from(u8::MAX) - 1);
        let end = (0..=room.min(text.len())).rev().find(|i| text.is_char_boundary(*i));
        let text = text.get(..end.unwrap_or(0)).unwrap_or_default();
        let mut value = [0; MAX];
        if let Some((to, _)) = value.split_at_mut_checked(text.len()) {
            to.copy_from_slice(text.as_bytes());
        }
        self.put(kind, value.get(..=text.len()).unwrap_or_default());
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Finds a value.
pub(crate) fn find(userdata: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = userdata;
    while let [kind, len, tail @ ..] = rest {
        let (value, next) = tail.split_at_checked(usize::from(*len))?;
        if *kind == wanted {
            return Some(value);
        }
        rest = next;
    }
    None
}

/// Finds a comment; `None` also if it is not UTF-8.
pub(crate) fn comment(userdata: &[u8], wanted: u8) -> Option<&str> {
    let value = find(userdata, wanted)?;
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_comment_is_read_back_or_is_a_prefix_of_at_most_253_bytes(text in "\\PC{0,300}") {
            let mut buf = Buffer::default();
            buf.put_text(COMMENT, &text);
            let read = comment(buf.as_bytes(), COMMENT).unwrap();
            prop_assert!(text.starts_with(read));
            prop_assert!(read.len() == text.len() || (250..=253).contains(&read.len()));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = comment(&bytes, COMMENT);
        }
    }

    #[test]
    fn values_follow_each_other_as_nft_writes_them() {
        let mut buf = Buffer::default();
        buf.put(SET_KEY_BYTE_ORDER, &1_u32.to_le_bytes());
        buf.put_text(SET_COMMENT, "x");
        assert_eq!(buf.as_bytes(), [0, 4, 1, 0, 0, 0, 7, 2, b'x', 0]);
        buf.put_text(SET_COMMENT, &"y".repeat(300));
        assert_eq!(buf.as_bytes().len(), 256);
    }
}

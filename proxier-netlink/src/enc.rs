//! Append-only writer of netlink messages and attributes.
//!
//! Everything goes to the end of one growing buffer; the only bytes written twice are the length
//! fields of messages and nested attributes, which are filled in when these are closed. Nothing is
//! allocated but the buffer.

/// Bytes of `struct nlmsghdr`.
pub(crate) const MSG_HEADER: usize = 16;
/// Bytes of `struct nlmsghdr` and the `struct nfgenmsg` (or `struct genlmsghdr`) behind it.
pub(crate) const NFNL_HEADER: usize = MSG_HEADER + 4;
/// Bytes of `struct nlattr`.
pub(crate) const ATTR_HEADER: usize = 4;

/// Set in the type of an attribute that holds attributes.
pub(crate) const NESTED: u16 = 0x8000;

/// `NFNETLINK_V0`: the only version there is.
const VERSION: u8 = 0;

/// Where an open message or nested attribute begins.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Mark(usize);

/// A growing buffer of netlink messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writer {
    buf: Vec<u8>,
    overflow: bool,
}

impl Writer {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { buf: Vec::with_capacity(bytes), overflow: false }
    }

    pub(crate) fn clear(&mut self) {
        self.buf.clear();
        self.overflow = false;
    }

    /// Opens a message with its `nlmsghdr` and `nfgenmsg`.
    pub(crate) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        seq: u32,
        family: u8,
        res_id: u16,
    ) -> Mark {
        let [high, low] = res_id.to_be_bytes();
        self.open(kind, flags, seq, [family, VERSION, high, low])
    }

    /// Opens a message of generic netlink with its `nlmsghdr` and `genlmsghdr`.
    pub(crate) fn generic(
        &mut self,
        kind: u16,
        flags: u16,
        seq: u32,
        command: u8,
        version: u8,
    ) -> Mark {
        self.open(kind, flags, seq, [command, version, 0, 0])
    }

    fn open(&mut self, kind: u16, flags: u16, seq: u32, extra: [u8; 4]) -> Mark {
        let start = self.buf.len();
        let mut head = [0_u8; NFNL_HEADER];
        head[4..6].copy_from_slice(&kind.to_ne_bytes());
        head[6..8].copy_from_slice(&flags.to_ne_bytes());
        head[8..12].copy_from_slice(&seq.to_ne_bytes());
        head[16..20].copy_from_slice(&extra);
        self.buf.extend_from_slice(&head);
        Mark(start)
    }

    /// Closes a message: fills in its length.
    pub(crate) fn end_message(&mut self, mark: Mark) {
        let Ok(len) = u32::try_from(self.buf.len() - mark.0) else {
            self.overflow = true;
            return;
        };
        self.patch(mark.0, &len.to_ne_bytes());
    }

    /// Opens an attribute that holds attributes.
    pub(crate) fn nest(&mut self, kind: u16) -> Mark {
        let start = self.buf.len();
        let k = (kind | NESTED).to_ne_bytes();
        self.buf.extend_from_slice(&[0, 0, k[0], k[1]]);
        Mark(start)
    }

    /// Closes a nested attribute: fills in its length.
    pub(crate) fn end_nest(&mut self, mark: Mark) {
        // KERNEL: nla_len is 16 bits, header included (include/uapi/linux/netlink.h, v6.12).
        let Ok(len) = u16::try_from(self.buf.len() - mark.0) else {
            self.overflow = true;
            return;
        };
        self.patch(mark.0, &len.to_ne_bytes());
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        let k = kind.to_ne_bytes();
        let l = 5_u16.to_ne_bytes();
        self.buf.extend_from_slice(&[l[0], l[1], k[0], k[1], value, 0, 0, 0]);
    }

    pub(crate) fn ne16(&mut self, kind: u16, value: u16) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    pub(crate) fn ne32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_ne_bytes());
    }

    pub(crate) fn be16(&mut self, kind: u16, value: u16) {
        let (l, k, v) = (6_u16.to_ne_bytes(), kind.to_ne_bytes(), value.to_be_bytes());
        self.buf.extend_from_slice(&[l[0], l[1], k[0], k[1], v[0], v[1], 0, 0]);
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        let (l, k, v) = (8_u16.to_ne_bytes(), kind.to_ne_bytes(), value.to_be_bytes());
        self.buf.extend_from_slice(&[l[0], l[1], k[0], k[1], v[0], v[1], v[2], v[3]]);
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        let (l, k) = (12_u16.to_ne_bytes(), kind.to_ne_bytes());
        self.buf.extend_from_slice(&[l[0], l[1], k[0], k[1]]);
        self.buf.extend_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        if self.header(kind, value.len()) {
            self.buf.extend_from_slice(value);
            self.pad();
        }
    }

    /// Writes text with the terminating NUL the kernel and libnftnl expect.
    pub(crate) fn str(&mut self, kind: u16, value: &str) {
        if self.header(kind, value.len() + 1) {
            self.buf.extend_from_slice(value.as_bytes());
            self.buf.push(0);
            self.pad();
        }
    }

    /// Appends bytes that are already encoded and padded.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
        self.pad();
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.buf
    }

    pub(crate) fn len(&self) -> usize {
        self.buf.len()
    }

    /// Whether something did not fit the 16 bits of an attribute's length.
    pub(crate) fn overflowed(&self) -> bool {
        self.overflow
    }

    /// Bytes written since a message or nested attribute was opened.
    pub(crate) fn since(&self, mark: Mark) -> usize {
        self.buf.len() - mark.0
    }

    fn header(&mut self, kind: u16, len: usize) -> bool {
        let Ok(total) = u16::try_from(len + ATTR_HEADER) else {
            self.overflow = true;
            return false;
        };
        let (l, k) = (total.to_ne_bytes(), kind.to_ne_bytes());
        self.buf.extend_from_slice(&[l[0], l[1], k[0], k[1]]);
        true
    }

    fn pad(&mut self) {
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
    }

    fn patch(&mut self, at: usize, bytes: &[u8]) {
        if let Some(slot) = self.buf.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let mut w = Writer::default();
        let m = w.message(0x0a03, 0x0401, 7, 2, 0x0102);
        w.str(1, "nat");
        let n = w.nest(4);
        w.be32(1, 0x0102_0304);
        w.end_nest(n);
        w.u8(5, 9);
        w.end_message(m);
        #[rustfmt::skip]
        let expected: Vec<u8> = [
            &48_u32.to_ne_bytes()[..], &0x0a03_u16.to_ne_bytes(), &0x0401_u16.to_ne_bytes(),
            &7_u32.to_ne_bytes(), &[0; 4], &[2, 0, 1, 2],
            &8_u16.to_ne_bytes(), &1_u16.to_ne_bytes(), b"nat\0",
            &12_u16.to_ne_bytes(), &0x8004_u16.to_ne_bytes(),
            &8_u16.to_ne_bytes(), &1_u16.to_ne_bytes(), &[1, 2, 3, 4],
            &5_u16.to_ne_bytes(), &5_u16.to_ne_bytes(), &[9, 0, 0, 0],
        ].concat();
        assert_eq!(w.as_bytes(), expected);
        assert!(!w.overflowed());
    }

    #[test]
    fn an_attribute_over_64_kib_is_an_overflow_and_not_a_short_length() {
        let mut w = Writer::default();
        let n = w.nest(1);
        for _ in 0..2 {
            w.bytes(1, &[0; 40_000]);
        }
        assert!(!w.overflowed());
        w.end_nest(n);
        assert!(w.overflowed());
        w.clear();
        w.bytes(1, &[0; 70_000]);
        assert!(w.overflowed());
    }
}

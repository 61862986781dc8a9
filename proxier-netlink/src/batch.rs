//! A batch of nf_tables messages under construction: sequence numbers, operations, sizes.

use crate::dec::{Message, Messages};
use crate::enc::{Mark, NFNL_HEADER, Writer};
use crate::nft::{Family, Generation, MessageKind};

pub(crate) const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_BATCH_GENID: u16 = 1;

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_ECHO: u16 = 0x8;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;

/// A size at which cutting a long load into several transactions costs little and helps much.
///
/// One transaction is applied or refused as a whole, and blocks every other user of nf_tables in
/// the network namespace until it is done: 37 MB of rules take the kernel about 1.4 s. Commits of
/// 4 MiB take about 0.15 s each. Two costs are super-linear in the length of *one* transaction, and
/// a caller who needs them should cut earlier:
///
/// * anonymous sets: each one bound to a rule makes the kernel walk the whole pending transaction
///   (120,000 messages with 5,000 anonymous maps: 32 s in one batch, 4 s in 102 batches);
/// * sets of any kind are found by walking a list of names, so thousands of *sets* in a table cost
///   quadratic time however the load is cut; elements do not.
///
/// One cost speaks against cutting fine: a transaction that adds a rule with a jump, a NAT statement
/// or a lookup, or an element with a verdict, makes the kernel walk everything reachable from the
/// table's base chains once (60 to 80 ms with 55,000 chains).
// KERNEL: __nft_set_trans_bind, nf_tables_set_alloc_name, nft_set_lookup, nft_table_validate
// (net/netfilter/nf_tables_api.c); times measured on 6.18, two cores.
pub const RECOMMENDED_TRANSACTION_BYTES: usize = 4 << 20;

/// Changes to nf_tables that take effect together or not at all.
///
/// The messages are encoded as they are added, in the order the kernel will execute them; within a
/// transaction later messages see the effects of earlier ones. Nothing happens until
/// [`NftSocket::commit`](crate::nft::NftSocket::commit). Adding never fails: what cannot be encoded
/// (an attribute over 64 KiB) makes the commit fail.
///
/// A transaction can be committed again, for example after a lost race, and reused with
/// [`clear`](Self::clear), which keeps the memory.
#[derive(Clone, Debug)]
pub struct Transaction {
    writer: Writer,
    messages: u32,
    /// (first message, tag), ascending.
    ops: Vec<(u32, u32)>,
    overflow: Option<u32>,
    generation: Option<Generation>,
}

impl Default for Transaction {
    fn default() -> Self {
        Self::new()
    }
}

impl Transaction {
    /// An empty transaction that applies whatever others have changed meanwhile.
    pub fn new() -> Self {
        Self::with_capacity(0)
    }

    /// As [`new`](Self::new), with room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self::build(Writer::with_capacity(bytes), None)
    }

    /// An empty transaction that applies only if nobody has changed nf_tables since `generation`.
    ///
    /// *Nobody* includes other tables and other families: any commit in the network namespace makes
    /// a new generation. Use it after reading state one depends on.
    pub fn at(generation: Generation) -> Self {
        Self::build(Writer::default(), Some(generation))
    }

    fn build(writer: Writer, generation: Option<Generation>) -> Self {
        let mut tx = Self { writer, messages: 0, ops: Vec::new(), overflow: None, generation };
        tx.begin_batch();
        tx
    }

    /// Attributes the messages that follow to the caller's operation `tag`, until the next call.
    pub fn op(&mut self, tag: u32) {
        match self.ops.last_mut() {
            Some((first, last)) if *first == self.messages => *last = tag,
            Some((_, last)) if *last == tag => {}
            _ => self.ops.push((self.messages, tag)),
        }
    }

    /// Forgets all messages, operations and the generation, and keeps the memory.
    pub fn clear(&mut self) {
        self.writer.clear();
        self.ops.clear();
        (self.messages, self.overflow, self.generation) = (0, None, None);
        self.begin_batch();
    }

    /// Bytes of the batch as sent, with its frame.
    ///
    /// Compare with [`RECOMMENDED_TRANSACTION_BYTES`] and
    /// [`NftSocket::max_batch_bytes`](crate::nft::NftSocket::max_batch_bytes) to know when to cut.
    pub fn len_bytes(&self) -> usize {
        self.writer.len() + NFNL_HEADER
    }

    /// Messages added.
    pub fn len(&self) -> usize {
        usize::try_from(self.messages).unwrap_or(usize::MAX)
    }

    /// Whether no message was added; committing such a transaction does nothing.
    pub fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// The whole batch as it is sent: BEGIN, the messages, END.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.writer.as_bytes(), &self.trailer()].concat()
    }

    /// Opens a message and gives it the next number; returns (index, mark).
    pub(crate) fn begin(&mut self, kind: MessageKind, flags: u16, family: Family) -> (u32, Mark) {
        let index = self.messages;
        self.messages += 1;
        let number = NFNL_SUBSYS_NFTABLES << 8 | u16::from(kind.0);
        let mark = self.writer.message(
            number,
            NLM_F_REQUEST | flags,
            FIRST_SEQ.wrapping_add(index),
            family.number(),
            0,
        );
        (index, mark)
    }

    pub(crate) fn end(&mut self, (index, mark): (u32, Mark)) {
        self.writer.end_message(mark);
        if self.writer.overflowed() && self.overflow.is_none() {
            self.overflow = Some(index);
        }
    }

    pub(crate) fn writer(&mut self) -> &mut Writer {
        &mut self.writer
    }

    pub(crate) fn parts(&self) -> ([u8; NFNL_HEADER], &[u8]) {
        (self.trailer(), self.writer.as_bytes())
    }

    /// The first message that could not be encoded.
    pub(crate) fn overflow(&self) -> Option<u32> {
        self.overflow
    }

    pub(crate) fn tag_of(&self, index: u32) -> Option<u32> {
        let after = self.ops.partition_point(|(first, _)| *first <= index);
        self.ops.get(after.checked_sub(1)?).map(|(_, tag)| *tag)
    }

    /// The index of the message with this sequence number.
    pub(crate) fn index_of(&self, seq: u32) -> Option<u32> {
        seq.checked_sub(FIRST_SEQ).filter(|index| *index < self.messages)
    }

    /// Reads a message back out of the buffer. O(messages): for errors only.
    pub(crate) fn message(&self, index: u32) -> Option<Message<'_>> {
        Messages::new(self.writer.as_bytes()).find(|m| m.seq == FIRST_SEQ.wrapping_add(index))
    }

    fn begin_batch(&mut self) {
        let mark = self.writer.message(
            NFNL_MSG_BATCH_BEGIN,
            NLM_F_REQUEST,
            BEGIN_SEQ,
            0,
            NFNL_SUBSYS_NFTABLES,
        );
        if let Some(Generation(id)) = self.generation {
            self.writer.be32(NFNL_BATCH_GENID, id);
        }
        self.writer.end_message(mark);
    }

    fn trailer(&self) -> [u8; NFNL_HEADER] {
        let mut w = Writer::with_capacity(NFNL_HEADER);
        let seq = FIRST_SEQ.wrapping_add(self.messages);
        let mark = w.message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, seq, 0, NFNL_SUBSYS_NFTABLES);
        w.end_message(mark);
        w.as_bytes().first_chunk().copied().unwrap_or_default()
    }
}

/// The sequence number of BATCH_BEGIN, which errors about the batch as a whole carry.
pub(crate) const BEGIN_SEQ: u32 = 0x8000_0000;
/// The sequence number of the first message. Requests outside batches count from 1, so the two
/// ranges stay apart.
const FIRST_SEQ: u32 = BEGIN_SEQ + 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_found_by_message() {
        let mut tx = Transaction::new();
        tx.del_table(Family::Ipv4, "a");
        tx.op(7);
        tx.op(8);
        tx.del_table(Family::Ipv4, "b");
        tx.del_table(Family::Ipv4, "c");
        tx.op(3);
        tx.del_table(Family::Ipv4, "d");
        let tags: Vec<_> = (0..4).map(|i| tx.tag_of(i)).collect();
        assert_eq!(tags, [None, Some(8), Some(8), Some(3)]);
        assert_eq!(tx.len_bytes(), tx.to_bytes().len());
        assert_eq!(Messages::new(&tx.to_bytes()).count(), 6);
        let before = tx.to_bytes();
        tx.clear();
        assert!(tx.is_empty() && tx.tag_of(0).is_none());
        assert_ne!(tx.to_bytes(), before);
    }
}

//! nf_tables: transactions, and reading back what is there.
//!
//! Write: a [`Transaction`] takes messages, described by [`TableSpec`], [`ChainSpec`], [`SetSpec`],
//! [`Element`] and [`RuleSpec`] with an [`ExprWriter`]; [`NftSocket::commit`] sends it. Read: the
//! other methods of [`NftSocket`] give [`TableDump`], [`ChainDump`], [`SetDump`], and rules and
//! elements both as borrowed values ([`RuleRef`], [`ElementRef`]) and as owned ones. An [`Expr`] is
//! the same thing in both directions.
//!
//! Text that is not UTF-8, which only other programs write, is read with replacement characters.

#[macro_use]
mod types;
mod attr;
mod chain;
mod dump;
mod element;
mod error;
mod event;
mod expr;
#[cfg(test)]
mod fuzz;
mod read;
mod rule;
mod set;
mod table;
mod udata;
mod write;

pub use chain::{BaseChain, BaseDump, ChainDump, ChainSpec, ChainType, Hook, Policy};
pub use dump::RuleFilter;
pub use element::{Counter, Element, ElementDump, ElementRef, ElementValue};
pub use error::{NftError, Refusal};
pub use expr::{Dynset, Expr, Hash, Limit, Nat, SetRef, Xt};
pub use read::Exprs;
pub use rule::{Compat, RuleDump, RuleRef, RuleSpec};
pub use set::{ByteOrder, DataType, SetDump, SetFlags, SetSpec};
pub use table::{TableDump, TableSpec};
pub use types::{
    ByteorderOp, CmpOp, CtDirection, CtKey, CtState, CtStatus, DynsetOp, Family, FibFlags,
    FibResult, Generation, HashKind, LimitKind, MessageKind, MetaKey, NatFlags, NatKind,
    NumgenKind, PayloadBase, Reg, RejectKind, SocketKey, Verdict,
};
pub use write::ExprWriter;

pub(crate) use event::event_attrs;

pub use crate::batch::{RECOMMENDED_TRANSACTION_BYTES, Transaction};

use crate::ack::Ack;
use crate::batch::{BEGIN_SEQ, NFNL_SUBSYS_NFTABLES};
use crate::dec::Message;
use crate::netns::NetNs;
use crate::sock::{NLMSG_ERROR, OpenError, Socket};

/// A socket to nf_tables of one network namespace.
#[derive(Debug)]
pub struct NftSocket {
    sock: Socket,
}

/// What a commit told.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Committed {
    /// The handles of the rules that asked with [`RuleSpec::echo`], in the order of the messages.
    pub handles: Vec<RuleHandle>,
}

/// The handle of a rule that was made.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct RuleHandle {
    /// The caller's operation: see [`Transaction::op`].
    pub tag: Option<u32>,
    /// The number of the message: what [`Transaction::rule`] returned.
    pub index: u32,
    /// The handle.
    pub handle: u64,
}

impl NftSocket {
    /// Opens a socket in a network namespace.
    ///
    /// Needs no privilege; reading and committing do.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: the namespace cannot be entered, there is no tokio runtime, or the kernel has
    /// no netfilter sockets.
    ///
    /// # Panics
    ///
    /// If the tokio runtime was built without I/O.
    pub fn open(netns: &NetNs) -> Result<Self, OpenError> {
        Socket::open(netns, 0).map(|sock| Self { sock })
    }

    /// Commits a transaction: all of it takes effect, or nothing.
    ///
    /// The kernel does the work before this returns. A transaction over 256 KiB is copied and sent
    /// from a blocking thread, so that the runtime's worker goes on; a shorter one is sent in place,
    /// which takes microseconds, or tens of milliseconds if it makes the kernel validate a table of
    /// tens of thousands of chains. An empty transaction does nothing.
    ///
    /// # Errors
    ///
    /// Nothing is in effect after any error but [`NftError::Overrun`], [`NftError::Malformed`] and,
    /// while answers are read, [`NftError::Io`].
    ///
    /// * [`NftError::Refused`]: the first refused message; see its kind.
    /// * [`NftError::Stale`]: the race for a generation was lost; see [`transact`](Self::transact).
    /// * [`NftError::TooLarge`]: cut the transaction.
    /// * [`NftError::AttributeTooLong`]: a bug of the caller.
    /// * [`NftError::Permission`], [`NftError::Unsupported`], [`NftError::Request`]: about the
    ///   transaction as a whole.
    /// * [`NftError::Overrun`]: answers were lost and the outcome is unknown; read back.
    ///
    /// # Cancel safety
    ///
    /// The socket stays usable. A transaction whose future was dropped after the first poll may
    /// take effect; one that is being sent is completed before the socket's next use.
    pub async fn commit(&mut self, tx: &Transaction) -> Result<Committed, NftError> {
        const WHAT: &str = "committing a transaction";
        if let Some(index) = tx.overflow() {
            return Err(NftError::AttributeTooLong { tag: tx.tag_of(index), index });
        }
        if tx.is_empty() {
            return Ok(Committed::default());
        }
        let (bytes, limit) = (tx.len_bytes(), self.max_batch_bytes());
        if bytes > limit {
            return Err(NftError::TooLarge { bytes, limit });
        }
        match self.send_batch(WHAT, tx).await {
            // What fits may still be too much for the kernel's memory.
            Err(NftError::Io { errno, .. }) if errno.raw_os_error() == Some(libc::EMSGSIZE) => {
                Err(NftError::TooLarge { bytes, limit })
            }
            other => other,
        }
    }

    /// Sends a batch, empty or not, and reads the kernel's answers to it.
    async fn send_batch(
        &mut self,
        what: &'static str,
        tx: &Transaction,
    ) -> Result<Committed, NftError> {
        let mut answers = Answers { tx, failed: None, whole: None, others: 0, handles: Vec::new() };
        let (trailer, body) = tx.parts();
        let sent = self.sock.exchange([body, &trailer], &mut |m| answers.read(m)).await;
        if let Some(ack) = answers.whole {
            return Err(NftError::from_ack(what, ack));
        }
        // A refusal settles the matter even if other answers were lost.
        if let Some((index, ack)) = answers.failed {
            let refusal = Refusal::new(tx, index, ack, answers.others);
            return Err(NftError::Refused(Box::new(refusal)));
        }
        sent.map_err(|error| NftError::from_sock(what, error))?;
        Ok(Committed { handles: answers.handles })
    }

    /// Builds and commits a transaction against one generation, again when the race is lost.
    ///
    /// `build` is given the socket, to read what it depends on, and an empty transaction that
    /// applies only if nothing has changed since before `build` was called. It is called up to
    /// `attempts` times.
    ///
    /// # Errors
    ///
    /// Those of `build` and [`commit`](Self::commit). [`NftError::Stale`]: all attempts lost; try
    /// later.
    ///
    /// # Cancel safety
    ///
    /// As [`commit`](Self::commit), if `build` is cancel safe.
    pub async fn transact(
        &mut self,
        attempts: u32,
        mut build: impl AsyncFnMut(&mut Self, &mut Transaction) -> Result<(), NftError>,
    ) -> Result<Committed, NftError> {
        for _ in 0..attempts {
            let mut tx = Transaction::at(self.generation().await?);
            build(self, &mut tx).await?;
            match self.commit(&tx).await {
                Err(NftError::Stale) => {}
                other => return other,
            }
        }
        Err(NftError::Stale)
    }

    /// The longest transaction one commit takes, in bytes.
    ///
    /// About 128 MiB with CAP_NET_ADMIN in the initial user namespace; elsewhere twice
    /// `net.core.wmem_max`, which is 416 KiB on many systems.
    pub fn max_batch_bytes(&self) -> usize {
        self.sock.max_send_bytes()
    }

    /// The port id of the socket: what events and owned tables name as the writer.
    pub fn portid(&self) -> u32 {
        self.sock.portid()
    }
}

/// The answers to one commit.
struct Answers<'t> {
    tx: &'t Transaction,
    /// About the transaction as a whole.
    whole: Option<Ack>,
    /// The first refused message.
    failed: Option<(u32, Ack)>,
    others: u32,
    handles: Vec<RuleHandle>,
}

impl Answers<'_> {
    fn read(&mut self, message: Message<'_>) {
        const NEWRULE: u16 = NFNL_SUBSYS_NFTABLES << 8 | MessageKind::NEWRULE.0 as u16;
        match message.kind {
            NLMSG_ERROR => {
                let Some(ack) = Ack::read(message.payload, message.flags) else { return };
                if ack.errno == 0 {
                    return;
                }
                match self.tx.index_of(message.seq) {
                    Some(_) if self.failed.is_some() => self.others += 1,
                    Some(index) => self.failed = Some((index, ack)),
                    None if message.seq == BEGIN_SEQ => self.whole = Some(ack),
                    // An answer to something earlier.
                    None => {}
                }
            }
            NEWRULE => {
                let rule = RuleRef::read(message);
                if let Some((index, rule)) = self.tx.index_of(message.seq).zip(rule) {
                    let tag = self.tx.tag_of(index);
                    self.handles.push(RuleHandle { tag, index, handle: rule.handle });
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const IP: Family = Family::Ipv4;

    /// Rules in chain `x` of table `t`, each asking for its handle.
    fn echoing(rules: u32) -> Transaction {
        let mut tx = Transaction::new();
        tx.new_table(IP, "t");
        tx.new_chain(IP, "t", "x");
        for _ in 0..rules {
            tx.rule(RuleSpec::append(IP, "t", "x").echo(), |e| {
                e.counter();
            });
        }
        tx
    }

    #[tokio::test]
    async fn lost_answers_are_told_and_the_socket_goes_on() {
        let ns = NetNs::create().unwrap();
        let mut sock = NftSocket::open(&ns).unwrap();
        sock.sock.shrink();
        let error = sock.commit(&echoing(2_000)).await.unwrap_err();
        assert!(matches!(error, NftError::Overrun { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Retry);
        // What the error calls unknown: here it did take effect.
        let rules = sock.fold_rules(RuleFilter::table(IP, "t"), || 0, |n, _| *n += 1).await;
        assert_eq!(rules.unwrap(), 2_000);
        assert_eq!(sock.commit(&echoing(1)).await.unwrap().handles.len(), 1);
    }

    #[tokio::test]
    async fn a_refusal_is_a_refusal_even_if_other_answers_are_lost() {
        let ns = NetNs::create().unwrap();
        let mut sock = NftSocket::open(&ns).unwrap();
        sock.sock.shrink();
        let mut tx = Transaction::new();
        for n in 0..2_000 {
            tx.op(n);
            tx.del_chain(IP, "t", "x");
        }
        let error = sock.commit(&tx).await.unwrap_err();
        assert_eq!(error.tag(), Some(0));
        let NftError::Refused(refusal) = error else { panic!("not a refusal: {error:?}") };
        assert!(refusal.others < 1_999, "nothing was lost, so nothing was tested");
    }

    #[tokio::test]
    async fn sixty_thousand_handles_fit_the_buffer() {
        let ns = NetNs::create().unwrap();
        let mut sock = NftSocket::open(&ns).unwrap();
        let committed = sock.commit(&echoing(60_000)).await.unwrap();
        assert_eq!(committed.handles.len(), 60_000);
    }
}

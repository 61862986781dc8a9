//! Notifications: who changed what in nf_tables.

use std::collections::VecDeque;
use std::io;

use crate::ack::ErrorKind;
use crate::batch::NFNL_SUBSYS_NFTABLES;
use crate::dec::Message;
use crate::netns::NetNs;
use crate::nft::{Family, Generation, MessageKind, event_attrs};
use crate::sock::{OpenError, SockError, Socket};

/// `NFNLGRP_NFTABLES` as a bit of the mask of groups.
// KERNEL: enum nfnetlink_groups (include/uapi/linux/netfilter/nfnetlink.h, v6.12).
const GROUP_NFTABLES: u32 = 1 << (7 - 1);

/// Something that happened to nf_tables.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// An object was made, changed or deleted, or a commit is complete.
    Change(Change),
    /// Notifications were lost: anything may have changed. Audit.
    Lost,
}

/// One change. All changes of a commit come together, its [`MessageKind::NEWGEN`] last.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Change {
    /// What happened: one of the `NEW…` and `DEL…` kinds.
    pub kind: MessageKind,
    /// The family; [`Family::Unspec`] for NEWGEN.
    pub family: Family,
    /// The table; empty for NEWGEN.
    pub table: String,
    /// The chain, for chains and rules.
    pub chain: Option<String>,
    /// The set, object or flow table, for these and for elements.
    pub name: Option<String>,
    /// The handle, for rules.
    pub handle: Option<u64>,
    /// The port id of the socket that committed.
    pub portid: u32,
    /// The new generation, for NEWGEN.
    pub generation: Option<Generation>,
    /// The thread that committed, for NEWGEN: its id and name.
    // KERNEL: NFTA_GEN_PROC_PID is the id of the thread and _NAME its name, whatever they are called
    // (net/netfilter/nf_tables_api.c nf_tables_fill_gen_info, v6.12).
    pub thread: Option<(u32, String)>,
}

/// A subscription to the changes of nf_tables in one network namespace.
///
/// Only what is committed after [`open`](Self::open) is told, by anyone: `nft`, `iptables` over
/// nf_tables, other programs and this one. Legacy iptables is not.
#[derive(Debug)]
pub struct Events {
    sock: Socket,
    queue: VecDeque<Event>,
    ignored: Vec<u32>,
}

/// The subscription failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventsError {
    /// The socket failed. Open a new subscription, then audit.
    #[error("cannot read changes of nf_tables")]
    Io {
        /// What the system said.
        #[source]
        errno: io::Error,
    },
}

impl EventsError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { errno } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
        }
    }
}

impl Events {
    /// Subscribes.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; of kind [`ErrorKind::Permission`] if CAP_NET_ADMIN in the namespace's user
    /// namespace is missing.
    ///
    /// # Panics
    ///
    /// If the tokio runtime was built without I/O.
    pub fn open(netns: &NetNs) -> Result<Self, OpenError> {
        let sock = Socket::open(netns, GROUP_NFTABLES)?;
        Ok(Self { sock, queue: VecDeque::new(), ignored: Vec::new() })
    }

    /// Leaves out what the socket with this port id commits: one's own.
    ///
    /// See [`NftSocket::portid`](crate::nft::NftSocket::portid). Applies to what is read from then
    /// on.
    pub fn ignore(&mut self, portid: u32) {
        self.ignored.push(portid);
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// [`EventsError::Io`]: the socket failed; open a new one and audit.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Result<Event, EventsError> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Ok(event);
            }
            let Self { sock, queue, ignored } = self;
            let read = sock
                .listen(&mut |message| {
                    if !ignored.contains(&message.portid) {
                        queue.extend(change(message).map(Event::Change));
                    }
                })
                .await;
            match read {
                Ok(()) => {}
                // KERNEL: a notification that does not fit the buffer of the socket is dropped and
                // ENOBUFS told once (net/netlink/af_netlink.c, v6.12).
                Err(SockError::Overrun | SockError::Malformed) => queue.push_back(Event::Lost),
                Err(SockError::Io { errno, .. })
                    if errno.raw_os_error() == Some(libc::EMSGSIZE) =>
                {
                    queue.push_back(Event::Lost);
                }
                Err(SockError::Io { errno, .. }) => return Err(EventsError::Io { errno }),
                Err(SockError::Interrupted | SockError::Kernel(_)) => {}
            }
        }
    }
}

fn change(message: Message<'_>) -> Option<Change> {
    let [kind, subsystem] = message.kind.to_le_bytes();
    if u16::from(subsystem) != NFNL_SUBSYS_NFTABLES {
        return None;
    }
    let kind = MessageKind(kind);
    let (family, attrs) = message.nfnl()?;
    let read = event_attrs(kind, attrs);
    Some(Change {
        kind,
        family: Family::from_number(family),
        table: read.table,
        chain: read.chain,
        name: read.name,
        handle: read.handle,
        portid: message.portid,
        generation: read.generation,
        thread: read.thread,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::{NftSocket, RuleSpec, Transaction};

    #[tokio::test]
    async fn lost_notifications_are_told_and_later_ones_arrive() {
        let ns = NetNs::create().unwrap();
        let mut events = Events::open(&ns).unwrap();
        events.sock.shrink();
        let mut sock = NftSocket::open(&ns).unwrap();
        let mut tx = Transaction::new();
        tx.new_table(Family::Ipv4, "t");
        tx.new_chain(Family::Ipv4, "t", "x");
        for _ in 0..2_000 {
            tx.rule(RuleSpec::append(Family::Ipv4, "t", "x"), |_| ());
        }
        sock.commit(&tx).await.unwrap();
        while events.next().await.unwrap() != Event::Lost {}
        // Empties the buffer of what did fit.
        let wait = std::time::Duration::from_millis(50);
        while tokio::time::timeout(wait, events.next()).await.is_ok() {}
        tx.clear();
        tx.new_table(Family::Ipv4, "u");
        sock.commit(&tx).await.unwrap();
        let Event::Change(change) = events.next().await.unwrap() else { panic!("lost again") };
        assert_eq!((change.kind, change.table.as_str()), (MessageKind::NEWTABLE, "u"));
    }
}

//! Connection tracking: listing and deleting flows.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::ack::{Ack, ErrorKind};
use crate::batch::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use crate::dec::{Attrs, Message, Table, be16};
use crate::enc::Writer;
use crate::netns::NetNs;
use crate::nft::CtStatus;
use crate::sock::{NLMSG_ERROR, OpenError, SockError, Socket};

// KERNEL: enum cntl_msg_types, ctattr_type, ctattr_tuple, ctattr_ip, ctattr_l4proto
// (include/uapi/linux/netfilter/nfnetlink_conntrack.h, v6.12).
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const CT_NEW: u16 = NFNL_SUBSYS_CTNETLINK << 8;
const CT_GET: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 1;
const CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMPV6_ID: u16 = 7;

/// Deletions sent at once: their answers have to fit any receive buffer.
const DELETES_AT_ONCE: usize = 64;

/// The address family of flows.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum CtFamily {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl CtFamily {
    const fn number(self) -> u8 {
        match self {
            Self::Ipv4 => 2,
            Self::Ipv6 => 10,
        }
    }
}

/// What distinguishes the flows of one protocol between two addresses.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Layer4 {
    /// ICMP and ICMPv6.
    Icmp {
        /// The identifier.
        id: u16,
        /// The type.
        kind: u8,
        /// The code.
        code: u8,
    },
    /// Nothing.
    Other,
    /// TCP, UDP, SCTP and others with ports, in host order.
    Ports {
        /// Of the source.
        src: u16,
        /// Of the destination.
        dst: u16,
    },
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Tuple {
    /// The source.
    pub src: IpAddr,
    /// The destination.
    pub dst: IpAddr,
    /// The transport protocol: 6 TCP, 17 UDP, 132 SCTP.
    pub protocol: u8,
    /// The rest.
    pub layer4: Layer4,
    /// The zone of this direction only, if it has one.
    pub zone: Option<u16>,
}

impl Tuple {
    /// The source port in host order, if the protocol has ports.
    pub fn src_port(&self) -> Option<u16> {
        match self.layer4 {
            Layer4::Ports { src, .. } => Some(src),
            Layer4::Icmp { .. } | Layer4::Other => None,
        }
    }

    /// The destination port in host order, if the protocol has ports.
    pub fn dst_port(&self) -> Option<u16> {
        match self.layer4 {
            Layer4::Ports { dst, .. } => Some(dst),
            Layer4::Icmp { .. } | Layer4::Other => None,
        }
    }
}

/// A tracked flow.
///
/// A flow to a Service's address has that as `orig.dst`, and the endpoint as `reply.src`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct Flow {
    /// The family.
    pub family: CtFamily,
    /// As the first packet came.
    pub orig: Tuple,
    /// As replies come.
    pub reply: Tuple,
    /// The zone, if not 0.
    pub zone: Option<u16>,
    /// Tells it from a later flow with the same addresses.
    pub id: u32,
    /// Its status.
    pub status: CtStatus,
    /// Its mark.
    pub mark: u32,
    /// Seconds until it is forgotten.
    pub timeout_secs: Option<u32>,
}

/// Listing or deleting flows failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CtError {
    /// The kernel refused.
    #[error("{what}: refused by the kernel ({ack}){}", hint(ack))]
    Kernel {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        ack: Ack,
        /// The same as an error of the system.
        #[source]
        errno: io::Error,
    },
    /// A list was interrupted five times in a row.
    #[error("{what}: interrupted, several times in a row")]
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
    /// Answers were lost. Deleting again is harmless.
    #[error("{what}: answers were lost")]
    Overrun {
        /// What was asked.
        what: &'static str,
    },
}

impl CtError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Interrupted { .. } | Self::Overrun { .. } => ErrorKind::Retry,
            Self::Io { errno, .. } => ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default()),
            // KERNEL: EINVAL is the answer for a subsystem that is not there if modules cannot be
            // loaded (net/netfilter/nfnetlink.c nfnetlink_rcv_msg, v6.12).
            Self::Kernel { ack, .. } if ack.errno == libc::EINVAL => ErrorKind::Unsupported,
            Self::Kernel { ack, .. } => ErrorKind::of_errno(ack.errno),
            Self::Malformed { .. } => ErrorKind::Fatal,
        }
    }

    fn from_sock(what: &'static str, error: SockError) -> Self {
        match error {
            SockError::Interrupted => Self::Interrupted { what },
            SockError::Io { doing, errno } => Self::Io { what, doing, errno },
            SockError::Kernel(ack) => Self::Kernel { what, errno: ack.io(), ack },
            SockError::Malformed => Self::Malformed { what },
            SockError::Overrun => Self::Overrun { what },
        }
    }
}

fn hint(ack: &Ack) -> &'static str {
    match ack.errno() {
        libc::EPERM => "; needs CAP_NET_ADMIN in the namespace's user namespace",
        libc::EINVAL | libc::EOPNOTSUPP => "; the kernel may lack nf_conntrack_netlink",
        _ => "",
    }
}

/// A socket to connection tracking of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    sock: Socket,
}

impl Conntrack {
    /// Opens a socket in a network namespace.
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

    /// All flows of a family, or those of one protocol.
    ///
    /// O(all flows): the kernel walks its whole table, which is not locked, so that flows which
    /// come or go meanwhile may or may not be listed.
    ///
    /// # Errors
    ///
    /// [`CtError::Interrupted`], [`CtError::Overrun`]: try again. [`CtError::Kernel`]: see its kind.
    /// [`CtError::Io`], [`CtError::Malformed`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn list(
        &mut self,
        family: CtFamily,
        protocol: Option<u8>,
    ) -> Result<Vec<Flow>, CtError> {
        let accept = |flow: &Flow| protocol.is_none_or(|p| p == flow.orig.protocol);
        self.fold(family, Vec::new, |all: &mut Vec<Flow>, flow| {
            if accept(&flow) {
                all.push(flow);
            }
        })
        .await
    }

    /// Visits all flows of a family without keeping them.
    ///
    /// `visit` collects what it wants in a state that `start` makes; an interrupted list is begun
    /// again with a new state, up to five times.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn fold<S>(
        &mut self,
        family: CtFamily,
        mut start: impl FnMut() -> S,
        mut visit: impl FnMut(&mut S, Flow),
    ) -> Result<S, CtError> {
        let seq = self.sock.next_seq();
        let mut w = Writer::with_capacity(64);
        let mark = w.message(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, seq, family.number(), 0);
        w.end_message(mark);
        let mut visit = |state: &mut S, message: Message<'_>| {
            if let Some(flow) = flow(message) {
                visit(state, flow);
            }
        };
        let result = self.sock.dump(w.as_bytes(), seq, &mut start, &mut visit).await;
        result.map_err(|error| CtError::from_sock("listing flows", error))
    }

    /// The flow whose answers are like this; `None` when there is none, or not any more.
    ///
    /// O(1). For a flow that was translated to this machine, it says where it was sent to.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list), without [`CtError::Interrupted`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn answered(&mut self, reply: &Tuple) -> Result<Option<Flow>, CtError> {
        const WHAT: &str = "looking a flow up";
        let seq = self.sock.next_seq();
        let family = if reply.src.is_ipv4() { CtFamily::Ipv4 } else { CtFamily::Ipv6 };
        let mut w = Writer::with_capacity(128);
        let mark = w.message(CT_GET, NLM_F_REQUEST, seq, family.number(), 0);
        put_tuple(&mut w, CTA_TUPLE_REPLY, reply);
        w.end_message(mark);
        let mut found = Ok(None);
        let read = &mut |message: Message<'_>| {
            if message.seq != seq {
                return;
            }
            found = match (message.kind, Ack::read(message.payload, message.flags)) {
                (NLMSG_ERROR, Some(ack)) if ack.errno == libc::ENOENT => Ok(None),
                (NLMSG_ERROR, Some(ack)) => Err(SockError::Kernel(ack)),
                (NLMSG_ERROR, None) => Err(SockError::Malformed),
                _ => flow(message).map(Some).ok_or(SockError::Malformed),
            };
        };
        let sent = self.sock.exchange([w.as_bytes(), &[]], read).await;
        sent.and(found).map_err(|error| CtError::from_sock(WHAT, error))
    }

    /// Deletes one flow; `false` if it is gone or another one has its addresses.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list), without [`CtError::Interrupted`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the flow is deleted at the first poll.
    pub async fn delete(&mut self, flow: &Flow) -> Result<bool, CtError> {
        self.delete_all(std::slice::from_ref(flow)).await.map(|deleted| deleted == 1)
    }

    /// Deletes the flows of a family for which `filter` says so; returns how many there were.
    ///
    /// One list and one request per flow, 64 at a time. Flows that begin meanwhile may stay.
    ///
    /// # Errors
    ///
    /// As [`list`](Self::list); some flows may have been deleted. Calling again is harmless.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: some flows may have been deleted.
    pub async fn delete_matching(
        &mut self,
        family: CtFamily,
        mut filter: impl FnMut(&Flow) -> bool,
    ) -> Result<usize, CtError> {
        let visit = |all: &mut Vec<Flow>, flow: Flow| {
            if filter(&flow) {
                all.push(flow);
            }
        };
        let flows = self.fold(family, Vec::new, visit).await?;
        self.delete_all(&flows).await
    }

    async fn delete_all(&mut self, flows: &[Flow]) -> Result<usize, CtError> {
        const WHAT: &str = "deleting flows";
        let mut deleted = 0;
        let mut w = Writer::default();
        for some in flows.chunks(DELETES_AT_ONCE) {
            w.clear();
            let first = self.sock.next_seq();
            let mut last = first;
            for (n, flow) in some.iter().enumerate() {
                last = if n == 0 { first } else { self.sock.next_seq() };
                put_delete(&mut w, flow, last);
            }
            let mut failed = None;
            let sent = self
                .sock
                .exchange([w.as_bytes(), &[]], &mut |message| {
                    if message.kind != NLMSG_ERROR || !in_range(message.seq, first, last) {
                        return;
                    }
                    match Ack::read(message.payload, message.flags) {
                        Some(ack) if ack.errno == 0 => deleted += 1,
                        Some(ack) if ack.errno == libc::ENOENT => {}
                        Some(ack) => failed = Some(SockError::Kernel(ack)),
                        None => failed = Some(SockError::Malformed),
                    }
                })
                .await;
            if let Some(error) = failed.or_else(|| sent.err()) {
                return Err(CtError::from_sock(WHAT, error));
            }
        }
        Ok(deleted)
    }
}

/// Whether a number is in a range of numbers that were given one after the other.
fn in_range(seq: u32, first: u32, last: u32) -> bool {
    seq.wrapping_sub(first) <= last.wrapping_sub(first)
}

fn put_delete(w: &mut Writer, flow: &Flow, seq: u32) {
    let mark = w.message(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, seq, flow.family.number(), 0);
    put_tuple(w, CTA_TUPLE_ORIG, &flow.orig);
    if let Some(zone) = flow.zone {
        w.be16(CTA_ZONE, zone);
    }
    // KERNEL: with it, a later flow with the same addresses is not found
    // (net/netfilter/nf_conntrack_netlink.c ctnetlink_del_conntrack, v6.12).
    w.be32(CTA_ID, flow.id);
    w.end_message(mark);
}

fn put_tuple(w: &mut Writer, direction: u16, tuple: &Tuple) {
    let nest = w.nest(direction);
    let ip = w.nest(CTA_TUPLE_IP);
    for (address, v4, v6) in
        [(tuple.src, CTA_IP_V4_SRC, CTA_IP_V6_SRC), (tuple.dst, CTA_IP_V4_DST, CTA_IP_V6_DST)]
    {
        match address {
            IpAddr::V4(address) => w.bytes(v4, &address.octets()),
            IpAddr::V6(address) => w.bytes(v6, &address.octets()),
        }
    }
    w.end_nest(ip);
    let proto = w.nest(CTA_TUPLE_PROTO);
    w.u8(CTA_PROTO_NUM, tuple.protocol);
    match tuple.layer4 {
        Layer4::Icmp { id, kind, code } => {
            let v6 = tuple.src.is_ipv6();
            let base = if v6 { CTA_PROTO_ICMPV6_ID } else { CTA_PROTO_ICMP_ID };
            w.be16(base, id);
            w.u8(base + 1, kind);
            w.u8(base + 2, code);
        }
        Layer4::Other => {}
        Layer4::Ports { src, dst } => {
            w.be16(CTA_PROTO_SRC_PORT, src);
            w.be16(CTA_PROTO_DST_PORT, dst);
        }
    }
    w.end_nest(proto);
    if let Some(zone) = tuple.zone {
        w.be16(CTA_TUPLE_ZONE, zone);
    }
    w.end_nest(nest);
}

/// Reads a listed flow; `None` if it is of another family or damaged.
fn flow(message: Message<'_>) -> Option<Flow> {
    if message.kind != CT_NEW {
        return None;
    }
    let (family, attrs) = message.nfnl()?;
    let t = attrs.table::<19>();
    Some(Flow {
        family: match family {
            2 => CtFamily::Ipv4,
            10 => CtFamily::Ipv6,
            _ => return None,
        },
        orig: tuple(t.nested(CTA_TUPLE_ORIG))?,
        reply: tuple(t.nested(CTA_TUPLE_REPLY))?,
        zone: t.raw(CTA_ZONE).and_then(be16),
        id: t.be32(CTA_ID).unwrap_or_default(),
        status: CtStatus(t.be32(CTA_STATUS).unwrap_or_default()),
        mark: t.be32(CTA_MARK).unwrap_or_default(),
        timeout_secs: t.be32(CTA_TIMEOUT),
    })
}

fn tuple(attrs: Attrs<'_>) -> Option<Tuple> {
    let t = attrs.table::<4>();
    let ip = t.nested(CTA_TUPLE_IP).table::<5>();
    let proto = t.nested(CTA_TUPLE_PROTO).table::<10>();
    let be16_of = |kind| proto.raw(kind).and_then(be16);
    let icmp = |base| {
        let id = be16_of(base)?;
        Some(Layer4::Icmp { id, kind: proto.u8(base + 1)?, code: proto.u8(base + 2)? })
    };
    let ports = || {
        let src = be16_of(CTA_PROTO_SRC_PORT)?;
        Some(Layer4::Ports { src, dst: be16_of(CTA_PROTO_DST_PORT)? })
    };
    Some(Tuple {
        src: address(&ip, CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
        dst: address(&ip, CTA_IP_V4_DST, CTA_IP_V6_DST)?,
        protocol: proto.u8(CTA_PROTO_NUM)?,
        layer4: ports()
            .or_else(|| icmp(CTA_PROTO_ICMP_ID))
            .or_else(|| icmp(CTA_PROTO_ICMPV6_ID))
            .unwrap_or(Layer4::Other),
        zone: t.raw(CTA_TUPLE_ZONE).and_then(be16),
    })
}

fn address(ip: &Table<'_, 5>, v4: u16, v6: u16) -> Option<IpAddr> {
    if let Some(bytes) = ip.raw(v4) {
        return Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into());
    }
    Some(Ipv6Addr::from(*ip.raw(v6)?.first_chunk::<16>()?).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dec::Messages;

    fn ip() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (a.into(), b.into())),
            any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (a.into(), b.into())),
        ]
    }

    fn layer4() -> impl Strategy<Value = Layer4> {
        prop_oneof![
            Just(Layer4::Other),
            any::<(u16, u16)>().prop_map(|(src, dst)| Layer4::Ports { src, dst }),
            any::<(u16, u8, u8)>().prop_map(|(id, kind, code)| Layer4::Icmp { id, kind, code }),
        ]
    }

    proptest! {
        #[test]
        fn a_tuple_is_read_as_it_was_written(
            (src, dst) in ip(), layer4 in layer4(), protocol: u8, zone: Option<u16>,
        ) {
            let written = Tuple { src, dst, protocol, layer4, zone };
            let mut w = Writer::default();
            put_tuple(&mut w, CTA_TUPLE_ORIG, &written);
            let read = tuple(Attrs(Attrs(w.as_bytes()).find(CTA_TUPLE_ORIG).unwrap()));
            prop_assert_eq!(read, Some(written));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let payload = [&[2, 0, 0, 0][..], &bytes].concat();
            let message =
                Message { kind: CT_NEW, flags: 0, seq: 0, portid: 0, payload: &payload };
            let _ = flow(message);
            Messages::new(&bytes).for_each(|m| { flow(m); });
        }
    }
}

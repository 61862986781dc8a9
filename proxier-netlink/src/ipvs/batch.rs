//! Operations on virtual servers under construction.

use std::net::IpAddr;

use super::error::OpKind;
use super::types::{Dest, Service, ServiceFlags, VirtualServer};
use super::wire::{self, cmd, dest, svc, top};
use crate::batch::NLM_F_REQUEST;
use crate::enc::{Mark, Writer};

/// Operations on virtual servers and destinations, in the order the kernel will execute them.
///
/// Not a transaction: each one is carried out or refused by itself, and those behind a refused one
/// are still executed. Adding never fails: what cannot be encoded is refused by the kernel.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    writer: Writer,
    /// Where each message starts, and what it does.
    ops: Vec<(usize, OpKind)>,
    /// (first operation, tag), ascending.
    tags: Vec<(usize, u32)>,
}

impl Batch {
    /// No operations.
    pub fn new() -> Self {
        Self::default()
    }

    /// Attributes the operations that follow to the caller's `tag`, until the next call.
    pub fn op(&mut self, tag: u32) {
        let next = self.ops.len();
        match self.tags.last_mut() {
            Some((first, last)) if *first == next => *last = tag,
            Some((_, last)) if *last == tag => {}
            _ => self.tags.push((next, tag)),
        }
    }

    /// Adds a virtual server. Refused with EEXIST if it is there, ENOENT for an unknown scheduler.
    pub fn new_service(&mut self, service: &Service) {
        self.service(OpKind::NewService, cmd::NEW_SERVICE, service);
    }

    /// Changes scheduler, persistence and flags. Refused with ESRCH if it is not there.
    ///
    /// Destinations, connections and counters stay.
    pub fn set_service(&mut self, service: &Service) {
        self.service(OpKind::SetService, cmd::SET_SERVICE, service);
    }

    /// Deletes a virtual server with its destinations. Refused with ESRCH if it is not there.
    pub fn del_service(&mut self, key: VirtualServer) {
        let mark = self.begin(OpKind::DelService, cmd::DEL_SERVICE);
        put_key(&mut self.writer, key);
        self.writer.end_message(mark);
    }

    /// Adds a destination. Refused with EEXIST if it is there, ESRCH without its virtual server.
    pub fn new_dest(&mut self, key: VirtualServer, dest: &Dest) {
        self.dest(OpKind::NewDest, cmd::NEW_DEST, key, dest);
    }

    /// Changes weight, thresholds and forwarding. Refused with ENOENT if it is not there.
    pub fn set_dest(&mut self, key: VirtualServer, dest: &Dest) {
        self.dest(OpKind::SetDest, cmd::SET_DEST, key, dest);
    }

    /// Deletes a destination. Refused with ENOENT if it is not there.
    ///
    /// Its connections are not told; their next packet is dropped or, with the namespace's
    /// `net.ipv4.vs.expire_nodest_conn`, ends them.
    pub fn del_dest(&mut self, key: VirtualServer, address: IpAddr, port: u16) {
        let mark = self.begin(OpKind::DelDest, cmd::DEL_DEST);
        put_key(&mut self.writer, key);
        let nest = self.writer.nest(top::DEST);
        put_dest_key(&mut self.writer, address, port);
        self.writer.end_nest(nest);
        self.writer.end_message(mark);
    }

    /// Forgets all operations and keeps the memory.
    pub fn clear(&mut self) {
        self.writer.clear();
        self.ops.clear();
        self.tags.clear();
    }

    /// Operations added.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of all messages.
    pub fn len_bytes(&self) -> usize {
        self.writer.len()
    }

    /// Copies operations `from..from + count` into `out`, for this number of the family. The last
    /// one asks for an answer in any case: it proves that the kernel has seen all.
    pub(super) fn copy(&self, from: usize, count: usize, family: u16, out: &mut Vec<u8>) {
        out.clear();
        let start_of = |n: usize| self.ops.get(n).map_or(self.writer.len(), |(start, _)| *start);
        let start = start_of(from);
        let end = start_of(from + count);
        out.extend_from_slice(self.writer.as_bytes().get(start..end).unwrap_or_default());
        let mut put = |at: usize, value: u16| {
            if let Some(slot) = out.get_mut(at..at + 2) {
                slot.copy_from_slice(&value.to_ne_bytes());
            }
        };
        for n in from..from + count {
            put(start_of(n) - start + 4, family);
        }
        put(start_of(from + count - 1) - start + 6, NLM_F_REQUEST | crate::batch::NLM_F_ACK);
    }

    /// The operation with this sequence number.
    pub(super) fn index_of(&self, seq: u32) -> Option<usize> {
        let index = usize::try_from(seq.checked_sub(FIRST_SEQ)?).ok()?;
        (index < self.ops.len()).then_some(index)
    }

    pub(super) fn kind_of(&self, index: usize) -> Option<OpKind> {
        self.ops.get(index).map(|(_, kind)| *kind)
    }

    pub(super) fn tag_of(&self, index: usize) -> Option<u32> {
        let after = self.tags.partition_point(|(first, _)| *first <= index);
        self.tags.get(after.checked_sub(1)?).map(|(_, tag)| *tag)
    }

    /// The bytes of an operation's message.
    pub(super) fn message(&self, index: usize) -> &[u8] {
        let Some((start, _)) = self.ops.get(index) else { return &[] };
        self.writer.as_bytes().get(*start..).unwrap_or_default()
    }

    fn service(&mut self, kind: OpKind, command: u8, service: &Service) {
        let mark = self.begin(kind, command);
        put_service(&mut self.writer, service);
        self.writer.end_message(mark);
    }

    fn dest(&mut self, kind: OpKind, command: u8, key: VirtualServer, dest: &Dest) {
        let mark = self.begin(kind, command);
        put_key(&mut self.writer, key);
        put_dest(&mut self.writer, dest);
        self.writer.end_message(mark);
    }

    fn begin(&mut self, kind: OpKind, command: u8) -> Mark {
        let index = u32::try_from(self.ops.len()).unwrap_or(u32::MAX);
        self.ops.push((self.writer.len(), kind));
        let seq = FIRST_SEQ.wrapping_add(index);
        self.writer.generic(0, NLM_F_REQUEST, seq, command, wire::FAMILY_VERSION)
    }
}

/// Requests outside batches count from 1, so the two ranges stay apart.
pub(super) const FIRST_SEQ: u32 = 0x8000_0000;

/// The attribute that names a virtual server.
pub(super) fn put_key(w: &mut Writer, key: VirtualServer) {
    let nest = w.nest(top::SERVICE);
    put_key_attrs(w, key);
    w.end_nest(nest);
}

fn put_service(w: &mut Writer, service: &Service) {
    let nest = w.nest(top::SERVICE);
    put_key_attrs(w, service.key);
    w.str(svc::SCHED_NAME, &service.scheduler);
    let family = service.key.family();
    let persistent = if service.persistence.is_some() { wire::PERSISTENT } else { 0 };
    let flags = service.flags.0 & ServiceFlags::SETTABLE.0 | persistent;
    // KERNEL: struct ip_vs_flags { flags, mask }; bits outside the mask stay as they are
    // (net/netfilter/ipvs/ip_vs_ctl.c ip_vs_genl_parse_service, v6.12).
    let mask = ServiceFlags::SETTABLE.0 | wire::PERSISTENT;
    w.bytes(svc::FLAGS, &[flags.to_ne_bytes(), mask.to_ne_bytes()].concat());
    w.ne32(svc::TIMEOUT, service.persistence.map_or(0, |p| p.timeout_secs));
    let prefix_len = service.persistence.map_or_else(|| family.bits(), |p| p.prefix_len);
    put_netmask(w, service.key, prefix_len);
    w.end_nest(nest);
}

/// A service of which the kernel looks up the scheduler and then refuses it, whatever else it has.
///
/// KERNEL: ip_vs_add_service finds the scheduler first (ENOENT) and then refuses an IPv6 prefix
/// length outside 1..=128 (EINVAL) (net/netfilter/ipvs/ip_vs_ctl.c, v6.12 and back to 2.6.28).
pub(super) fn put_scheduler_probe(w: &mut Writer, key: VirtualServer, scheduler: &str) {
    let nest = w.nest(top::SERVICE);
    put_key_attrs(w, key);
    w.str(svc::SCHED_NAME, scheduler);
    w.bytes(svc::FLAGS, &[0; 8]);
    w.ne32(svc::TIMEOUT, 0);
    w.ne32(svc::NETMASK, 0);
    w.end_nest(nest);
}

fn put_key_attrs(w: &mut Writer, key: VirtualServer) {
    w.ne16(svc::AF, key.family().number());
    match key {
        VirtualServer::Address { address, port, protocol } => {
            w.ne16(svc::PROTOCOL, protocol.0.into());
            put_address(w, svc::ADDR, address);
            w.be16(svc::PORT, port);
        }
        VirtualServer::Mark { mark, .. } => w.ne32(svc::FWMARK, mark),
    }
}

// KERNEL: an IPv4 mask is in network order, an IPv6 prefix length a number in the machine's order
// (net/netfilter/ipvs/ip_vs_ctl.c ip_vs_add_service, v6.12).
fn put_netmask(w: &mut Writer, key: VirtualServer, prefix_len: u8) {
    match key.family() {
        super::AddressFamily::Ipv4 => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix_len.into()));
            w.be32(svc::NETMASK, mask.unwrap_or_default());
        }
        super::AddressFamily::Ipv6 => w.ne32(svc::NETMASK, prefix_len.into()),
    }
}

fn put_dest(w: &mut Writer, d: &Dest) {
    let nest = w.nest(top::DEST);
    put_dest_key(w, d.address, d.port);
    w.ne32(dest::FWD_METHOD, d.forward.0);
    w.ne32(dest::WEIGHT, d.weight);
    w.ne32(dest::U_THRESH, d.upper_threshold);
    w.ne32(dest::L_THRESH, d.lower_threshold);
    w.end_nest(nest);
}

fn put_dest_key(w: &mut Writer, address: IpAddr, port: u16) {
    w.ne16(dest::ADDR_FAMILY, super::AddressFamily::of(address).number());
    put_address(w, dest::ADDR, address);
    w.be16(dest::PORT, port);
}

/// KERNEL: union nf_inet_addr: always 16 bytes, IPv4 in the first four (uapi/linux/netfilter.h).
fn put_address(w: &mut Writer, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&v4.octets());
            w.bytes(kind, &bytes);
        }
        IpAddr::V6(v6) => w.bytes(kind, &v6.octets()),
    }
}

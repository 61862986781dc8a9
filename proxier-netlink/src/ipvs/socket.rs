//! Asking and telling the kernel.

use super::batch::{Batch, put_key, put_scheduler_probe};
use super::error::{IpvsError, Refusal};
use super::read;
use super::types::{DestEntry, Info, Protocol, SCHEDULERS, ServiceEntry, Timeouts, VirtualServer};
use super::wire::{self, cmd, top};
use crate::ack::Ack;
use crate::batch::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use crate::dec::{Message, Messages};
use crate::enc::Writer;
use crate::netns::NetNs;
use crate::sock::{NLMSG_ERROR, SockError, Socket};

/// Operations sent at once: the kernel is busy for about a millisecond, and even if all are refused
/// the answers fit the receive buffer an unprivileged socket has.
const OPS_AT_ONCE: usize = 100;

// KERNEL: include/uapi/linux/genetlink.h, v6.12.
const GENL_ID_CTRL: u16 = 16;
const CTRL_VERSION: u8 = 2;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// IPVS of one network namespace.
#[derive(Debug)]
pub struct Ipvs {
    sock: Socket,
    family: u16,
    buf: Vec<u8>,
}

impl Ipvs {
    /// Opens a socket in a network namespace and finds IPVS.
    ///
    /// # Errors
    ///
    /// [`IpvsError::NoIpvs`]: the kernel has none, also after trying to load the module.
    /// [`IpvsError::Open`]: see there. Otherwise as [`services`](Self::services).
    ///
    /// # Panics
    ///
    /// If the tokio runtime was built without I/O.
    pub async fn open(netns: &NetNs) -> Result<Self, IpvsError> {
        let mut sock = Socket::open_generic(netns)?;
        let family = match family_number(&mut sock).await {
            Err(SockError::Kernel(ack)) if ack.errno() == libc::ENOENT => {
                return Err(IpvsError::NoIpvs { netns: netns.clone(), ack });
            }
            other => other.map_err(|error| IpvsError::from_sock("finding IPVS", error))?,
        };
        Ok(Self { sock, family, buf: Vec::new() })
    }

    /// Executes the operations of a batch, in order; returns those that were refused.
    ///
    /// 100 operations are sent at a time, and other tasks run in between. An operation that is
    /// refused does not stop those behind it.
    ///
    /// # Errors
    ///
    /// [`IpvsError::Overrun`], [`IpvsError::Io`], [`IpvsError::Malformed`]: a part of the batch was
    /// executed, and its refusals are unknown. List, and plan again.
    ///
    /// # Cancel safety
    ///
    /// Between two hundreds: a part of the batch may have been executed.
    pub async fn commit(&mut self, batch: &Batch) -> Result<Vec<Refusal>, IpvsError> {
        const WHAT: &str = "changing virtual servers";
        let mut refused = Vec::new();
        for from in (0..batch.len()).step_by(OPS_AT_ONCE) {
            let count = OPS_AT_ONCE.min(batch.len() - from);
            batch.copy(from, count, self.family, &mut self.buf);
            let last = from + count - 1;
            let (mut complete, mut damaged) = (false, false);
            let mut visit = |message: Message<'_>| {
                let index = batch.index_of(message.seq);
                let Some(index) = index.filter(|_| message.kind == NLMSG_ERROR) else { return };
                complete |= index == last;
                match Ack::read(message.payload, message.flags) {
                    Some(ack) if ack.errno() == 0 => {}
                    Some(ack) => refused.extend(refusal(batch, index, ack)),
                    None => damaged = true,
                }
            };
            let sent = self.sock.exchange([&self.buf, &[]], &mut visit).await;
            sent.map_err(|error| IpvsError::from_sock(WHAT, error))?;
            if damaged || !complete {
                return Err(IpvsError::Malformed { what: WHAT });
            }
            if last + 1 < batch.len() {
                tokio::task::yield_now().await;
            }
        }
        Ok(refused)
    }

    /// All virtual servers of the namespace, also those of others.
    ///
    /// O(virtual servers). The kernel lists in several steps: what changes meanwhile may be missing
    /// or listed twice.
    ///
    /// # Errors
    ///
    /// [`IpvsError::Kernel`]: see its kind. [`IpvsError::Interrupted`], [`IpvsError::Overrun`]: try
    /// again. [`IpvsError::Io`], [`IpvsError::Malformed`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn services(&mut self) -> Result<Vec<ServiceEntry>, IpvsError> {
        let visit = |all: &mut Vec<_>, message: Message<'_>| all.extend(read::service(message));
        self.dump("listing virtual servers", cmd::GET_SERVICE, None, visit).await
    }

    /// One virtual server; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// As [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn service(&mut self, key: VirtualServer) -> Result<Option<ServiceEntry>, IpvsError> {
        let put = |w: &mut Writer| put_key(w, key);
        let asked =
            self.ask("reading a virtual server", cmd::GET_SERVICE, put, read::service).await;
        match asked {
            Ok(entry) => Ok(Some(entry)),
            Err(IpvsError::Kernel { ack, .. }) if ack.errno() == libc::ESRCH => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The destinations of a virtual server; none if it is not there.
    ///
    /// O(destinations), and about as long as one [`commit`](Self::commit) of one operation.
    ///
    /// # Errors
    ///
    /// As [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn dests(&mut self, key: VirtualServer) -> Result<Vec<DestEntry>, IpvsError> {
        let family = key.family();
        let visit = |all: &mut Vec<_>, m: Message<'_>| all.extend(read::dest_entry(m, family));
        self.dump("listing destinations", cmd::GET_DEST, Some(key), visit).await
    }

    /// Those of [`SCHEDULERS`] that the kernel has or can load. Changes nothing else.
    ///
    /// # Errors
    ///
    /// As [`has_scheduler`](Self::has_scheduler).
    pub async fn schedulers(&mut self) -> Result<Vec<&'static str>, IpvsError> {
        let mut all = Vec::new();
        for name in SCHEDULERS {
            if self.has_scheduler(name).await? {
                all.push(name);
            }
        }
        Ok(all)
    }

    /// Whether the kernel has this scheduler, or can load it.
    ///
    /// Asks for a virtual server that is refused in any case, so that nothing is ever there which
    /// would have to be removed.
    ///
    /// # Errors
    ///
    /// [`IpvsError::Kernel`], of kind [`Unsupported`](crate::ErrorKind::Unsupported) if IPVS was
    /// built without IPv6; otherwise as [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn has_scheduler(&mut self, name: &str) -> Result<bool, IpvsError> {
        const WHAT: &str = "looking for a scheduler";
        // An address for documentation: whoever has a virtual server there has no use for it.
        let address = std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0xfffe);
        let key = VirtualServer::address(address.into(), u16::MAX, Protocol::TCP);
        let put = |w: &mut Writer| put_scheduler_probe(w, key, name);
        match self.ask(WHAT, cmd::NEW_SERVICE, put, |_| None::<()>).await {
            // KERNEL: a name of 16 bytes and more is ERANGE or EINVAL by the policy of the family.
            Err(IpvsError::Kernel { ack, .. }) if ack.errno() == libc::EINVAL => {
                Ok(name.len() < MAX_SCHEDULER_BYTES)
            }
            Err(IpvsError::Kernel { ack, .. })
                if matches!(ack.errno(), libc::ENOENT | libc::ERANGE) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
            Ok(()) => Err(IpvsError::Malformed { what: WHAT }),
        }
    }

    /// The timeouts of the namespace.
    ///
    /// # Errors
    ///
    /// As [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn timeouts(&mut self) -> Result<Timeouts, IpvsError> {
        self.ask("reading timeouts", cmd::GET_CONFIG, |_| (), read::timeouts).await
    }

    /// Sets the timeouts of the namespace; those that are 0 stay as they are.
    ///
    /// # Errors
    ///
    /// As [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: they are set at the first poll.
    pub async fn set_timeouts(&mut self, timeouts: Timeouts) -> Result<(), IpvsError> {
        let put = |w: &mut Writer| {
            w.ne32(top::TIMEOUT_TCP, timeouts.tcp_secs);
            w.ne32(top::TIMEOUT_TCP_FIN, timeouts.tcp_fin_secs);
            w.ne32(top::TIMEOUT_UDP, timeouts.udp_secs);
        };
        self.tell("setting timeouts", cmd::SET_CONFIG, put).await
    }

    /// Version and size of the kernel's IPVS.
    ///
    /// # Errors
    ///
    /// As [`services`](Self::services).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn info(&mut self) -> Result<Info, IpvsError> {
        self.ask("reading about IPVS", cmd::GET_INFO, |_| (), read::info).await
    }

    async fn dump<T>(
        &mut self,
        what: &'static str,
        command: u8,
        key: Option<VirtualServer>,
        mut visit: impl FnMut(&mut Vec<T>, Message<'_>),
    ) -> Result<Vec<T>, IpvsError> {
        let seq = self.sock.next_seq();
        let mut w = Writer::with_capacity(128);
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mark = w.generic(self.family, flags, seq, command, wire::FAMILY_VERSION);
        if let Some(key) = key {
            put_key(&mut w, key);
        }
        w.end_message(mark);
        let result = self.sock.dump(w.as_bytes(), seq, &mut Vec::new, &mut visit).await;
        result.map_err(|error| IpvsError::from_sock(what, error))
    }

    /// Sends one request and reads its one answer.
    async fn ask<T>(
        &mut self,
        what: &'static str,
        command: u8,
        put: impl FnOnce(&mut Writer),
        read: impl Fn(Message<'_>) -> Option<T>,
    ) -> Result<T, IpvsError> {
        let answer = request(&mut self.sock, self.family, command, put, read).await;
        let answer = answer.map_err(|error| IpvsError::from_sock(what, error))?;
        answer.ok_or(IpvsError::Malformed { what })
    }

    async fn tell(
        &mut self,
        what: &'static str,
        command: u8,
        put: impl FnOnce(&mut Writer),
    ) -> Result<(), IpvsError> {
        let answer = request(&mut self.sock, self.family, command, put, |_| None::<()>).await;
        answer.map(drop).map_err(|error| IpvsError::from_sock(what, error))
    }
}

/// KERNEL: IP_VS_SCHEDNAME_MAXLEN, with the NUL (include/uapi/linux/ip_vs.h, v6.12).
const MAX_SCHEDULER_BYTES: usize = 16;

/// Sends one request; `Ok` once the kernel has acknowledged it.
async fn request<T>(
    sock: &mut Socket,
    family: u16,
    command: u8,
    put: impl FnOnce(&mut Writer),
    read: impl Fn(Message<'_>) -> Option<T>,
) -> Result<Option<T>, SockError> {
    let seq = sock.next_seq();
    let version = if family == GENL_ID_CTRL { CTRL_VERSION } else { wire::FAMILY_VERSION };
    let mut w = Writer::with_capacity(256);
    let mark = w.generic(family, NLM_F_REQUEST | NLM_F_ACK, seq, command, version);
    put(&mut w);
    w.end_message(mark);
    let (mut answer, mut ack) = (None, None);
    sock.exchange([w.as_bytes(), &[]], &mut |message| {
        if message.seq != seq {
            return;
        }
        match message.kind {
            NLMSG_ERROR => ack = Ack::read(message.payload, message.flags),
            kind if kind == family => answer = read(message),
            _ => {}
        }
    })
    .await?;
    match ack {
        Some(ack) if ack.errno() == 0 => Ok(answer),
        Some(ack) => Err(SockError::Kernel(ack)),
        None => Err(SockError::Malformed),
    }
}

/// The number the kernel gave the family of IPVS.
async fn family_number(sock: &mut Socket) -> Result<u16, SockError> {
    let put = |w: &mut Writer| w.str(CTRL_ATTR_FAMILY_NAME, wire::FAMILY_NAME);
    let read = |message: Message<'_>| {
        let (_, attrs) = message.generic()?;
        attrs.table::<3>().ne16(CTRL_ATTR_FAMILY_ID)
    };
    let number = request(sock, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, put, read).await?;
    number.ok_or(SockError::Malformed)
}

fn refusal(batch: &Batch, index: usize, ack: Ack) -> Option<Refusal> {
    let op = batch.kind_of(index)?;
    let message = Messages::new(batch.message(index)).next()?;
    let request = read::request(message);
    let (key, service, dest) = match request {
        Some(request) => (Some(request.key), request.service, request.dest),
        None => (None, None, None),
    };
    Some(Refusal { tag: batch.tag_of(index), op, key, service, dest, ack })
}

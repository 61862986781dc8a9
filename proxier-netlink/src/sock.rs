//! The asynchronous netlink socket below everything else.
//!
//! The kernel works on a request inside the `sendmsg` that carries it: when that returns, all
//! replies are in the receive buffer. So a request is "send, then read until empty", and only dumps
//! ever wait.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::netlink::{GENERIC, NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType,
    sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::ack::{Ack, ErrorKind};
use crate::dec::{Message, Messages};
use crate::netns::{NetNs, NetNsError};

/// Asked-for send buffer: the largest batch that can be one `sendmsg` is about twice this.
// KERNEL: SO_SNDBUF is doubled by the kernel (net/core/sock.c, v6.12), and af_netlink.c refuses
// what is longer than the doubled value minus 32. It is a limit: memory is used only by a send.
const SEND_BUFFER_BYTES: usize = 64 << 20;
/// Asked-for receive buffer. A limit too; the replies to one commit have to fit.
const RECV_BUFFER_BYTES: usize = 64 << 20;
/// One datagram.
// KERNEL: dumps come in datagrams of at most 32 KiB, echoes in 8 KiB or one message
// (net/netlink/af_netlink.c netlink_recvmsg; NLMSG_GOODSIZE, v6.12).
const DATAGRAM_BYTES: usize = 128 << 10;
/// What `sendmsg` needs besides the message.
const SEND_OVERHEAD_BYTES: usize = 32;
/// A send longer than this is done on a blocking thread: the kernel takes over 10 ms for it.
const INLINE_SEND_BYTES: usize = 256 << 10;
/// How often a dump is tried before it is given up as [`SockError::Interrupted`].
pub(crate) const DUMP_ATTEMPTS: u32 = 5;

pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
pub(crate) const NLMSG_OVERRUN: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// A socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The network namespace could not be entered.
    #[error("cannot open a netlink socket")]
    NetNs(#[from] NetNsError),
    /// There is no tokio runtime with I/O enabled in the calling thread.
    #[error("cannot open a netlink socket outside a tokio runtime")]
    NoRuntime,
    /// The kernel refused to make or set up the socket.
    #[error("cannot {doing} a netlink socket in {netns}{}", needs(errno))]
    Socket {
        /// The step that failed.
        doing: &'static str,
        /// Where.
        netns: NetNs,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
}

impl OpenError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NetNs(
                NetNsError::Create { errno }
                | NetNsError::Enter { errno, .. }
                | NetNsError::Open { errno, .. },
            )
            | Self::Socket { errno, .. } => {
                ErrorKind::of_errno(errno.raw_os_error().unwrap_or_default())
            }
            Self::NetNs(NetNsError::Thread { .. }) => ErrorKind::Retry,
            Self::NoRuntime => ErrorKind::Fatal,
        }
    }
}

fn needs(errno: &io::Error) -> &'static str {
    if errno.kind() == io::ErrorKind::PermissionDenied {
        "; needs CAP_NET_ADMIN in the namespace's user namespace"
    } else {
        ""
    }
}

/// Why a request got no proper answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SockError {
    #[error("the dump was interrupted by changes {DUMP_ATTEMPTS} times")]
    Interrupted,
    #[error("cannot {doing}")]
    Io { doing: &'static str, errno: io::Error },
    #[error("the kernel answered: {0}")]
    Kernel(Ack),
    #[error("an answer could not be read")]
    Malformed,
    #[error("answers were lost")]
    Overrun,
}

fn not_sent(errno: Errno) -> SockError {
    SockError::Io { doing: "send a request to the kernel", errno: errno.into() }
}

fn not_read(errno: Errno) -> SockError {
    SockError::Io { doing: "read an answer from the kernel", errno: errno.into() }
}

/// A non-blocking netlink socket with a receive buffer.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: AsyncFd<Arc<OwnedFd>>,
    buf: Box<[u8]>,
    portid: u32,
    send_buffer: usize,
    seq: u32,
    /// A send on a blocking thread whose future was dropped before it ended.
    sending: Option<JoinHandle<rustix::io::Result<usize>>>,
    /// A dump whose future was dropped before it ended.
    dumping: Option<u32>,
}

impl Socket {
    /// Opens a socket in a namespace; `groups` is the mask of multicast groups to join.
    pub(crate) fn open(netns: &NetNs, groups: u32) -> Result<Self, OpenError> {
        Self::open_protocol(netns, Some(NETFILTER), groups)
    }

    /// Opens a socket of generic netlink in a namespace.
    pub(crate) fn open_generic(netns: &NetNs) -> Result<Self, OpenError> {
        Self::open_protocol(netns, Some(GENERIC), 0)
    }

    /// Opens a socket for addresses and the like; `groups` is the mask of multicast groups to join.
    pub(crate) fn open_route(netns: &NetNs, groups: u32) -> Result<Self, OpenError> {
        // KERNEL: NETLINK_ROUTE is 0 (include/uapi/linux/netlink.h, v6.12).
        Self::open_protocol(netns, None, groups)
    }

    fn open_protocol(
        netns: &NetNs,
        protocol: Option<Protocol>,
        groups: u32,
    ) -> Result<Self, OpenError> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(OpenError::NoRuntime);
        }
        let here = |doing| {
            move |errno: Errno| OpenError::Socket {
                doing,
                netns: netns.clone(),
                errno: errno.into(),
            }
        };
        let make = || {
            rustix::net::socket_with(
                AddressFamily::NETLINK,
                SocketType::RAW,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                protocol,
            )
        };
        let fd = match netns {
            NetNs::Current => make(),
            NetNs::Fd(_) | NetNs::Path(_) => netns.run(make)?,
        }
        .map_err(here("create"))?;
        set_buffers(&fd).map_err(here("size the buffers of"))?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            set_netlink_option(&fd, option).map_err(here("set up"))?;
        }
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups)).map_err(here("bind"))?;
        let address = rustix::net::getsockname(&fd)
            .and_then(SocketAddrNetlink::try_from)
            .map_err(here("name"))?;
        let send_buffer = sockopt::socket_send_buffer_size(&fd).map_err(here("measure"))?;
        let fd = register(Arc::new(fd)).map_err(|errno| {
            let netns = netns.clone();
            OpenError::Socket { doing: "register", netns, errno }
        })?;
        Ok(Self {
            fd,
            buf: vec![0; DATAGRAM_BYTES].into_boxed_slice(),
            portid: address.pid(),
            send_buffer,
            seq: 1,
            sending: None,
            dumping: None,
        })
    }

    pub(crate) fn portid(&self) -> u32 {
        self.portid
    }

    /// Makes the receive buffer as small as it gets, so that answers are lost.
    #[cfg(test)]
    pub(crate) fn shrink(&self) {
        sockopt::set_socket_recv_buffer_size(self.fd.get_ref(), 0).unwrap();
    }

    /// The longest message or batch one send takes.
    pub(crate) fn max_send_bytes(&self) -> usize {
        self.send_buffer.saturating_sub(SEND_OVERHEAD_BYTES)
    }

    /// A sequence number for a request; never 0.
    pub(crate) fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.checked_add(1).unwrap_or(1);
        self.seq
    }

    /// Brings the socket into a known state: nothing under way, nothing to read.
    async fn settle(&mut self) -> Result<(), SockError> {
        if let Some(handle) = &mut self.sending {
            // Its result belonged to a future that is gone.
            drop(handle.await);
            self.sending = None;
        }
        if let Some(seq) = self.dumping {
            // KERNEL: a second dump on a socket is refused with EBUSY until the first has been read
            // to its end (net/netlink/af_netlink.c __netlink_dump_start, v6.12).
            match self.read_dump(seq, &mut |_| {}).await {
                Ok(_) | Err(SockError::Kernel(_) | SockError::Overrun) => self.dumping = None,
                Err(e) => return Err(e),
            }
        }
        loop {
            match self.recv() {
                Ok(_) | Err(Errno::NOBUFS) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(not_read(errno)),
            }
        }
    }

    /// Sends `parts` as one datagram and gives every message the kernel answered with to `f`.
    ///
    /// Cancel safe in the sense that the socket stays usable; a send under way is completed.
    pub(crate) async fn exchange(
        &mut self,
        parts: [&[u8]; 2],
        f: &mut impl FnMut(Message<'_>),
    ) -> Result<(), SockError> {
        self.settle().await?;
        self.send(parts).await.map_err(not_sent)?;
        let mut lost = false;
        loop {
            match self.recv() {
                Ok(len) => {
                    let datagram = self.buf.get(..len).ok_or(SockError::Malformed)?;
                    let mut messages = Messages::new(datagram);
                    messages.by_ref().for_each(&mut *f);
                    if !messages.rest().is_empty() {
                        return Err(SockError::Malformed);
                    }
                }
                Err(Errno::AGAIN) if lost => return Err(SockError::Overrun),
                Err(Errno::AGAIN) => return Ok(()),
                // KERNEL: told once, before the answers that did fit (net/core/datagram.c, v6.12).
                Err(Errno::NOBUFS) => lost = true,
                Err(errno) => return Err(not_read(errno)),
            }
        }
    }

    /// Runs a dump to its end, again while changes interrupt it. `start` is called before each
    /// attempt, `f` for each message.
    pub(crate) async fn dump<S>(
        &mut self,
        request: &[u8],
        seq: u32,
        start: &mut impl FnMut() -> S,
        f: &mut impl FnMut(&mut S, Message<'_>),
    ) -> Result<S, SockError> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut state = start();
            if self.dump_once(request, seq, &mut |m| f(&mut state, m)).await? {
                return Ok(state);
            }
        }
        Err(SockError::Interrupted)
    }

    /// Runs a dump to its end; `false` if changes interrupted it.
    pub(crate) async fn dump_once(
        &mut self,
        request: &[u8],
        seq: u32,
        f: &mut impl FnMut(Message<'_>),
    ) -> Result<bool, SockError> {
        self.settle().await?;
        self.send([request, &[]]).await.map_err(not_sent)?;
        self.dumping = Some(seq);
        let end = self.read_dump(seq, f).await;
        if matches!(end, Ok(_) | Err(SockError::Kernel(_))) {
            self.dumping = None;
        }
        match end {
            Ok(Consistent(consistent)) => Ok(consistent),
            Err(SockError::Kernel(ack)) if ack.errno == libc::EINTR => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits for the next datagram and gives its messages to `f` until it says stop.
    ///
    /// Cancel safe: nothing is read before the future is ready.
    pub(crate) async fn listen(
        &mut self,
        f: &mut impl FnMut(Message<'_>),
    ) -> Result<(), SockError> {
        let len = self.recv_wait().await?;
        let datagram = self.buf.get(..len).ok_or(SockError::Malformed)?;
        Messages::new(datagram).for_each(f);
        Ok(())
    }

    async fn read_dump(
        &mut self,
        seq: u32,
        f: &mut impl FnMut(Message<'_>),
    ) -> Result<Consistent, SockError> {
        let mut consistent = true;
        loop {
            let len = self.recv_wait().await?;
            let datagram = self.buf.get(..len).ok_or(SockError::Malformed)?;
            let mut messages = Messages::new(datagram);
            for message in messages.by_ref() {
                if message.seq != seq {
                    continue;
                }
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return done(message, consistent),
                    NLMSG_ERROR => {
                        let ack = Ack::read(message.payload, message.flags);
                        return Err(ack.map_or(SockError::Malformed, SockError::Kernel));
                    }
                    NLMSG_OVERRUN => return Err(SockError::Overrun),
                    _ => f(message),
                }
            }
            if !messages.rest().is_empty() {
                return Err(SockError::Malformed);
            }
        }
    }

    async fn send(&mut self, parts: [&[u8]; 2]) -> rustix::io::Result<()> {
        let [a, b] = parts;
        if a.len() + b.len() <= INLINE_SEND_BYTES {
            return send_all(self.fd.get_ref(), parts).map(drop);
        }
        let fd = Arc::clone(self.fd.get_ref());
        let bytes = [a, b].concat();
        let handle = tokio::task::spawn_blocking(move || send_all(&fd, [&bytes, &[]]));
        let result = self.sending.insert(handle).await;
        self.sending = None;
        // The task is never aborted and does not panic, so only a runtime going down ends here.
        result.unwrap_or(Err(Errno::CANCELED)).map(drop)
    }

    async fn recv_wait(&mut self) -> Result<usize, SockError> {
        let Self { fd, buf, .. } = self;
        fd.async_io(Interest::READABLE, |fd| recv_datagram(fd, buf).map_err(io::Error::from))
            .await
            .map_err(|errno| match errno.raw_os_error() {
                Some(libc::ENOBUFS) => SockError::Overrun,
                _ => SockError::Io { doing: "read an answer from the kernel", errno },
            })
    }

    fn recv(&mut self) -> rustix::io::Result<usize> {
        recv_datagram(self.fd.get_ref(), &mut self.buf)
    }
}

#[expect(unsafe_code, reason = "tokio has no safe form of this")]
fn register(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` that the `AsyncFd` holds keeps the descriptor open and is never exchanged,
    // so that `as_raw_fd` always gives the same open descriptor.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}

/// Whether a dump shows one state of the kernel.
struct Consistent(bool);

/// Reads `NLMSG_DONE`, whose payload may be the error that ended the dump.
fn done(message: Message<'_>, consistent: bool) -> Result<Consistent, SockError> {
    match crate::dec::ne32(message.payload).map(u32::cast_signed) {
        Some(code) if code < 0 => {
            let errno = code.checked_neg().unwrap_or(libc::EIO);
            Err(SockError::Kernel(Ack { errno, text: None, offset: None, missing: None }))
        }
        _ => Ok(Consistent(consistent)),
    }
}

/// Receives one datagram of the kernel; others are skipped, one that does not fit is an error.
fn recv_datagram(fd: &OwnedFd, buf: &mut [u8]) -> rustix::io::Result<usize> {
    loop {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        match rustix::net::recvfrom(fd, &mut *buf, flags) {
            Ok((_, len, _)) if len > buf.len() => return Err(Errno::MSGSIZE),
            Ok((_, len, from)) => {
                let from = from.map(SocketAddrNetlink::try_from);
                if matches!(from, Some(Ok(kernel)) if kernel.pid() == 0) {
                    return Ok(len);
                }
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn send_all(fd: &OwnedFd, parts: [&[u8]; 2]) -> rustix::io::Result<usize> {
    let slices = parts.map(IoSlice::new);
    loop {
        let mut control = SendAncillaryBuffer::default();
        match rustix::net::sendmsg(fd, &slices, &mut control, SendFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Raises both buffers, past the system's limit where that is allowed.
// KERNEL: SO_*BUFFORCE needs CAP_NET_ADMIN in the initial user namespace (net/core/sock.c, v6.12);
// the plain options cut at net.core.{w,r}mem_max without an error.
fn set_buffers(fd: &OwnedFd) -> rustix::io::Result<()> {
    match sockopt::set_socket_send_buffer_size_force(fd, SEND_BUFFER_BYTES) {
        Err(Errno::PERM) => sockopt::set_socket_send_buffer_size(fd, SEND_BUFFER_BYTES)?,
        other => other?,
    }
    match sockopt::set_socket_recv_buffer_size_force(fd, RECV_BUFFER_BYTES) {
        Err(Errno::PERM) => sockopt::set_socket_recv_buffer_size(fd, RECV_BUFFER_BYTES),
        other => other,
    }
}

/// Switches a boolean option of level SOL_NETLINK on.
#[expect(unsafe_code, reason = "no safe form of this socket option exists")]
fn set_netlink_option(fd: &OwnedFd, option: libc::c_int) -> rustix::io::Result<()> {
    let on: libc::c_int = 1;
    let len = libc::socklen_t::try_from(size_of_val(&on)).map_err(|_too_long| Errno::INVAL)?;
    // SAFETY: the pointer and the length describe `on`, which outlives the call; the kernel only
    // reads it. The descriptor is open: it is borrowed.
    let result = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const on).cast(), len)
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

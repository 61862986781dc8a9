//! Moving bytes between two TCP connections.
//!
//! Each direction goes on by itself until its end, which is passed on; so a half-closed connection
//! stays one. Nothing is read that cannot be passed on: a slow reader slows the writer down, and an
//! idle connection holds no buffer and no pipe. A connection that carries much is spliced.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::Shutdown,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use futures_util::FutureExt;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream};

use crate::{pipe::Pipe, service::Counted};

/// Bytes read at once when they are copied: what a slow reader can make us keep.
const COPY_BYTES: usize = 16 << 10;
/// Bytes after which a direction counts as carrying much, if they come without a pause.
const MUCH_BYTES: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Box<[u8; COPY_BYTES]>> = RefCell::new(Box::new([0; COPY_BYTES]));
}

/// How a relay is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) splice: bool,
    pub(crate) pooled_pipes: usize,
}

/// How far a relay has come, for whoever watches it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    half_closed: AtomicBool,
    bytes: AtomicU64,
}

/// How far a relay had come at some time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Reached {
    /// One side has said its last word.
    pub(crate) half_closed: bool,
    bytes: u64,
}

impl Progress {
    pub(crate) fn get(&self) -> Reached {
        Reached { half_closed: self.half_closed.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }

    fn moved(&self, bytes: usize) {
        self.bytes.fetch_add(u64::try_from(bytes).unwrap_or_default(), Relaxed);
    }
}

/// Moves bytes both ways until both ends have said all they had to say.
///
/// # Errors
/// One of the connections broke.
///
/// # Cancel safety
/// What was read and not yet written is lost.
pub(crate) async fn relay(
    client: &TcpStream,
    endpoint: &TcpStream,
    counted: &Counted,
    progress: &Progress,
    way: Way,
) -> io::Result<()> {
    let mut request = Direction::new(client, endpoint, way);
    let mut answer = Direction::new(endpoint, client, way);
    poll_fn(|cx| {
        let last = answer.state == State::Done;
        let requested = request.poll(cx, last, |bytes| {
            progress.moved(bytes);
            counted.to_endpoint(bytes);
        })?;
        let last = request.state == State::Done;
        let answered = answer.poll(cx, last, |bytes| {
            progress.moved(bytes);
            counted.to_client(bytes);
        })?;
        match (requested, answered) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            (Poll::Pending, _) | (_, Poll::Pending) => {
                progress.half_closed.store(true, Relaxed);
                Poll::Pending
            }
        }
    })
    .await
}

/// One direction.
struct Direction<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    way: Way,
    held: Held,
    /// Bytes read since the last pause.
    in_a_row: usize,
    state: State,
}

/// What was read and not yet written.
enum Held {
    Bytes { bytes: Box<[u8]>, written: usize },
    Nothing,
    Pipe(Pipe),
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum State {
    Done,
    Ended,
    Open,
}

impl<'a> Direction<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream, way: Way) -> Self {
        Self { from, to, way, held: Held::Nothing, in_a_row: 0, state: State::Open }
    }

    /// Goes on as far as possible. The `last` direction to end leaves the end to closing, which says
    /// the same.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        last: bool,
        count: impl Fn(usize),
    ) -> Poll<io::Result<()>> {
        while self.state != State::Done {
            if !self.is_empty() {
                ready!(self.to.poll_write_ready(cx))?;
                if let Some(bytes) = allowed(self.write())? {
                    count(bytes);
                }
            } else if self.state == State::Ended {
                self.give_pipe_back();
                if !last {
                    // The other side may be gone already, which the other direction finds out.
                    SockRef::from(self.to).shutdown(Shutdown::Write).or_else(not_connected)?;
                }
                self.state = State::Done;
            } else {
                if self.from.poll_read_ready(cx)?.is_pending() {
                    self.pause();
                    return Poll::Pending;
                }
                if let Some(bytes) = allowed(self.read())? {
                    count(bytes);
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn is_empty(&self) -> bool {
        match &self.held {
            Held::Bytes { .. } => false,
            Held::Nothing => true,
            Held::Pipe(pipe) => pipe.filled == 0,
        }
    }

    /// Writes what is held; says how much was written.
    fn write(&mut self) -> io::Result<usize> {
        let to = self.to;
        match &mut self.held {
            Held::Nothing => Ok(0),
            Held::Pipe(pipe) => to.try_io(Interest::WRITABLE, || pipe.empty(to)),
            Held::Bytes { bytes, written } => {
                let rest = bytes.get(*written..).unwrap_or_default();
                let sent = try_send(to, rest, SendFlags::empty())?;
                *written += sent;
                if *written == bytes.len() {
                    self.held = Held::Nothing;
                }
                Ok(sent)
            }
        }
    }

    /// Reads, and writes at once what can be written; says how much that was.
    fn read(&mut self) -> io::Result<usize> {
        if self.in_a_row >= MUCH_BYTES && self.way.splice && matches!(self.held, Held::Nothing) {
            // Without a pipe the bytes are copied.
            if let Ok(pipe) = Pipe::take() {
                self.held = Held::Pipe(pipe);
            }
        }
        let from = self.from;
        if let Held::Pipe(pipe) = &mut self.held {
            let bytes = from.try_io(Interest::READABLE, || pipe.fill(from))?;
            if bytes == 0 {
                self.state = State::Ended;
            }
            return Ok(0);
        }
        BUFFER.with_borrow_mut(|buffer| self.copy(buffer.as_mut_slice()))
    }

    fn copy(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut read = try_recv(self.from, buffer)?;
        if read == 0 {
            self.state = State::Ended;
            return Ok(0);
        }
        let (mut flags, mut broken) = (SendFlags::empty(), Ok(()));
        if read < buffer.len() && has_ended(self.from) {
            // These may be the last words: then they go out in one packet with the end.
            match allowed(try_recv(self.from, buffer.get_mut(read..).unwrap_or_default())) {
                Ok(Some(0)) => {
                    self.state = State::Ended;
                    flags = SendFlags::MORE;
                }
                Ok(more) => read += more.unwrap_or_default(),
                Err(error) => broken = Err(error),
            }
        }
        self.in_a_row = self.in_a_row.saturating_add(read);
        let bytes = buffer.get(..read).unwrap_or_default();
        let sent = allowed(try_send(self.to, bytes, flags))?.unwrap_or_default();
        if let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            self.held = Held::Bytes { bytes: rest.into(), written: 0 };
        }
        broken.map(|()| sent)
    }

    fn pause(&mut self) {
        if self.in_a_row < MUCH_BYTES {
            self.in_a_row = 0;
        }
        self.give_pipe_back();
    }

    fn give_pipe_back(&mut self) {
        if let Held::Pipe(_) = &self.held
            && let Held::Pipe(pipe) = std::mem::replace(&mut self.held, Held::Nothing)
        {
            pipe.give_back(self.way.pooled_pipes);
        }
    }
}

/// The other end has said all it had to say; not all of it may have been read.
fn has_ended(from: &TcpStream) -> bool {
    let ready = from.ready(Interest::READABLE).now_or_never();
    matches!(ready, Some(Ok(ready)) if ready.is_read_closed())
}

fn try_recv(from: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let read = from.try_io(Interest::READABLE, || {
        recv(from, &mut *buffer, RecvFlags::empty()).map(|(bytes, _)| bytes).map_err(Into::into)
    })?;
    if 0 < read && read < buffer.len() {
        // There is no more: do not ask again before the kernel says so.
        from.try_io(Interest::READABLE, would_block::<()>).ok();
    }
    Ok(read)
}

fn try_send(to: &TcpStream, bytes: &[u8], flags: SendFlags) -> io::Result<usize> {
    let sent = to.try_io(Interest::WRITABLE, || {
        send(to, bytes, flags | SendFlags::NOSIGNAL).map_err(io::Error::from)
    })?;
    if sent < bytes.len() {
        to.try_io(Interest::WRITABLE, would_block::<()>).ok();
    }
    Ok(sent)
}

fn would_block<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

/// Nothing where it would have to be waited for.
fn allowed(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

fn not_connected(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

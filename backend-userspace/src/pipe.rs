//! Pipes that bytes go through without being copied, pooled by each worker.

use std::{cell::RefCell, io, os::fd::OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::net::TcpStream;

/// Bytes that a pipe is made to hold.
// KERNEL: 16 pages unless asked for more; an unprivileged user's pipes are kept small once they
// have 16384 pages together (pipe(7), fs/pipe.c, v6.12).
const PIPE_BYTES: usize = 256 << 10;
/// Bytes that every pipe holds.
const DEFAULT_BYTES: usize = 64 << 10;

thread_local! {
    static POOL: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, and how many bytes are in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    pub(crate) filled: usize,
}

impl Pipe {
    /// A pipe from the pool of this thread, or a new one.
    pub(crate) fn take() -> io::Result<Self> {
        if let Some(pipe) = POOL.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let capacity = fcntl_setpipe_size(&write, PIPE_BYTES).unwrap_or(DEFAULT_BYTES);
        Ok(Self { read, write, capacity, filled: 0 })
    }

    /// Gives an empty pipe back; one that is not empty, or one too many, is closed.
    pub(crate) fn give_back(self, pooled: usize) {
        if self.filled == 0 {
            POOL.with_borrow_mut(|pool| {
                if pool.len() < pooled {
                    pool.push(self);
                }
            });
        }
    }

    /// Fills the pipe, which is empty, from a socket. Returns 0 at the end of the stream.
    pub(crate) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let bytes = splice(from, None, &self.write, None, self.capacity, flags)?;
        self.filled += bytes;
        Ok(bytes)
    }

    /// Empties the pipe into a socket, as far as that takes it.
    pub(crate) fn empty(&mut self, to: &TcpStream) -> io::Result<usize> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let bytes = splice(&self.read, None, to, None, self.filled, flags)?;
        self.filled = self.filled.saturating_sub(bytes);
        Ok(bytes)
    }
}

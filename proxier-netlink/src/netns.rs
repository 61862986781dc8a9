//! Network namespaces: where a socket lives.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, thread};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The network namespace something is opened in.
///
/// A namespace belongs to a thread, not to a process, and a socket stays in the namespace of the
/// thread that opened it. [`NetNs::run`] uses a short-lived thread, so the caller's own never moves.
#[derive(Clone, Debug, Default)]
pub enum NetNs {
    /// The namespace of the calling thread.
    #[default]
    Current,
    /// A namespace held by an open file.
    Fd(Arc<OwnedFd>),
    /// A namespace bound to a path, as `ip netns add` makes below `/run/netns`.
    Path(PathBuf),
}

impl NetNs {
    /// Makes a new, empty namespace; it lives as long as this value, its clones and its sockets.
    ///
    /// # Errors
    ///
    /// [`NetNsError::Create`]: needs CAP_SYS_ADMIN in the user namespace.
    /// [`NetNsError::Thread`]: no thread could be started; retry later.
    pub fn create() -> Result<Self, NetNsError> {
        spawn(|| {
            unshare_net().map_err(|errno| NetNsError::Create { errno })?;
            File::open("/proc/thread-self/ns/net")
                .map(|file| Self::Fd(Arc::new(file.into())))
                .map_err(|errno| NetNsError::Create { errno })
        })?
    }

    /// Runs a closure in a fresh thread inside this namespace, and waits for it.
    ///
    /// Programs started by the closure are in the namespace too. Blocks the calling thread. A panic
    /// of the closure is resumed in the caller.
    ///
    /// # Errors
    ///
    /// [`NetNsError::Open`]: the path does not exist or is not readable.
    /// [`NetNsError::Enter`]: not a network namespace, or CAP_SYS_ADMIN is missing.
    /// [`NetNsError::Thread`]: no thread could be started; retry later.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        let Some(target) = self.target()? else { return spawn(f) };
        spawn(move || {
            move_into_link_name_space(target.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| NetNsError::Enter { netns: self.clone(), errno: errno.into() })?;
            Ok(f())
        })?
    }

    /// The file of the namespace; `None` for the current one, which needs no entering.
    fn target(&self) -> Result<Option<Arc<OwnedFd>>, NetNsError> {
        match self {
            Self::Current => Ok(None),
            Self::Fd(fd) => Ok(Some(Arc::clone(fd))),
            Self::Path(path) => match File::open(path) {
                Ok(file) => Ok(Some(Arc::new(file.into()))),
                Err(errno) => Err(NetNsError::Open { netns: self.clone(), errno }),
            },
        }
    }
}

impl fmt::Display for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current => f.write_str("the current network namespace"),
            Self::Fd(fd) => {
                write!(f, "network namespace of descriptor {}", fd.as_raw_fd())
            }
            Self::Path(path) => write!(f, "network namespace {}", path.display()),
        }
    }
}

/// A network namespace could not be made or entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetNsError {
    /// No new namespace.
    #[error(
        "cannot create a network namespace{}",
        needs(errno, "; needs CAP_SYS_ADMIN in its user namespace")
    )]
    Create {
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
    /// The namespace exists, the thread may not or cannot move there.
    #[error(
        "cannot enter {netns}{}",
        needs(errno, "; needs CAP_SYS_ADMIN in its user namespace and in the namespace's own")
    )]
    Enter {
        /// Which namespace.
        netns: NetNs,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
    /// The file of the namespace could not be opened.
    #[error("cannot open {netns}")]
    Open {
        /// Which namespace.
        netns: NetNs,
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
    /// The thread that would have entered the namespace was not started.
    #[error("cannot start a thread to enter a network namespace")]
    Thread {
        /// What the kernel said.
        #[source]
        errno: io::Error,
    },
}

fn needs(errno: &io::Error, what: &'static str) -> &'static str {
    if errno.kind() == io::ErrorKind::PermissionDenied { what } else { "" }
}

/// Runs a closure in its own thread and waits for it.
fn spawn<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, f)
            .map_err(|errno| NetNsError::Thread { errno })?;
        handle.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}

#[expect(unsafe_code, reason = "unshare has no safe form")]
fn unshare_net() -> io::Result<()> {
    // SAFETY: only CLONE_FILES is dangerous (descriptors of one thread would be unknown to
    // others), and it is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode() -> PathBuf {
        std::fs::read_link("/proc/thread-self/ns/net").unwrap()
    }

    #[test]
    fn a_closure_runs_inside_and_the_caller_stays_outside() {
        let before = inode();
        let ns = NetNs::create().unwrap();
        let inside = ns.run(inode).unwrap();
        assert_ne!(inside, before);
        assert_eq!(ns.run(inode).unwrap(), inside);
        assert_eq!(inode(), before);
        assert_eq!(NetNs::Current.run(inode).unwrap(), before);
    }

    #[test]
    fn errors_name_the_namespace() {
        let gone = NetNs::Path("/nonexistent/netns".into()).run(|| ()).unwrap_err();
        assert_eq!(gone.to_string(), "cannot open network namespace /nonexistent/netns");
        let wrong = NetNs::Path("/proc/self/ns/uts".into()).run(|| ()).unwrap_err();
        assert_eq!(wrong.to_string(), "cannot enter network namespace /proc/self/ns/uts");
    }

    #[test]
    fn a_panic_inside_reaches_the_caller() {
        let ns = NetNs::create().unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(ns.run(|| panic!("inside")));
        }));
        assert!(caught.is_err());
    }
}

//! Network namespaces as values.
//!
//! A [`Lab`] makes namespaces, each with a thread and a single-threaded tokio runtime of its own
//! (a network namespace belongs to a thread), and wires them together. Nothing is named in the
//! file system: namespaces live as long as the lab, the [`Ns`] handles and the process do.

mod enter;
mod error;
mod link;
mod net;
mod ns;
mod settle;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use enter::{Entered, Why, available, enter, gate};
pub use error::LabError;
pub use link::Via;
pub(crate) use link::{V4_GATEWAY, V6_GATEWAY, default_of};
pub use net::ToNet;
pub use ns::Ns;
use ns::NsThread;

/// A set of network namespaces that ends when it is dropped.
///
/// Dropping joins the namespaces' threads: responders and conversations end, links and rules
/// vanish with their namespace as soon as no [`Ns`] clone is left. That also holds for a panic.
/// The kernel frees a namespace in the background, usually within 100 ms.
#[derive(Debug)]
pub struct Lab {
    name: String,
    threads: Mutex<Vec<NsThread>>,
    keep: AtomicBool,
}

impl Lab {
    /// Makes an empty lab. The name appears in thread names and error messages only.
    ///
    /// # Errors
    ///
    /// [`LabError::Namespace`] when the process may not build labs; the source is a [`Why`].
    pub fn new(name: &str) -> Result<Self, LabError> {
        available().map_err(|why| LabError::Namespace {
            netns: name.to_owned(),
            step: "build a lab",
            source: std::io::Error::other(why),
        })?;
        let threads = Mutex::new(Vec::new());
        Ok(Self { name: name.to_owned(), threads, keep: AtomicBool::new(false) })
    }

    /// Makes a network namespace with `lo` up.
    ///
    /// IPv6 duplicate address detection, reverse path filters, router advertisements, redirects,
    /// netfilter inside bridges and the rate limits of ICMP errors are off in it, so that addresses
    /// work at once and the thousandth reject looks like the first.
    ///
    /// # Errors
    ///
    /// [`LabError::Name`] when the lab has a namespace of that name; [`LabError::Namespace`],
    /// [`LabError::Kernel`] and [`LabError::Sysctl`] when the kernel refuses.
    pub fn ns(&self, name: &str) -> Result<Ns, LabError> {
        if self.find(name).is_some() {
            return Err(LabError::Name {
                name: name.to_owned(),
                why: "the lab has a namespace of that name",
            });
        }
        let thread = NsThread::start(&self.name, name)?;
        let ns = thread.ns().clone();
        self.threads().push(thread);
        Ok(ns)
    }

    /// The namespace of that name, if the lab has made it.
    pub fn find(&self, name: &str) -> Option<Ns> {
        self.namespaces().into_iter().find(|ns| ns.name() == name)
    }

    /// All namespaces, in the order of creation.
    pub fn namespaces(&self) -> Vec<Ns> {
        self.threads().iter().map(|thread| thread.ns().clone()).collect()
    }

    /// Joins two namespaces with a pair of veth links and brings both ends up.
    ///
    /// # Errors
    ///
    /// [`LabError::Name`] for a name that is no link name (1 to 15 bytes, no `/`, `:` or space);
    /// [`LabError::Kernel`] when the kernel refuses, for instance since the name is taken.
    pub fn veth(&self, a: (&Ns, &str), b: (&Ns, &str)) -> Result<(), LabError> {
        link::veth(a, (b.0, b.1, b.0.fd().as_raw_fd()))
    }

    /// Lets the namespaces outlive this value: they then last until the process ends.
    ///
    /// For a `--keep` option: print [`enter_hints`](Self::enter_hints), then wait for the user.
    /// Nothing stays on the host after the process.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    /// One line per namespace: its name and the command that opens a shell in it.
    pub fn enter_hints(&self) -> String {
        let line = |ns: &Ns| format!("{:<12} {}\n", ns.name(), ns.enter_hint());
        self.namespaces().iter().map(line).collect()
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn threads(&self) -> MutexGuard<'_, Vec<NsThread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let mut threads = std::mem::take(&mut *self.threads());
        if self.keep.load(Ordering::Relaxed) {
            threads.into_iter().for_each(NsThread::forget);
        } else {
            threads.iter_mut().for_each(NsThread::stop);
            threads.iter_mut().for_each(NsThread::join);
        }
    }
}

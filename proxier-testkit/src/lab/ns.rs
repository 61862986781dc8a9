//! One network namespace: its thread, its runtime, and the ways to run things in it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle, ThreadId};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::{LabError, enter, link};

/// Sysctls of every namespace. The optional ones are not per namespace in older kernels.
const SYSCTLS: [(&str, &str, Need); 21] = [
    ("net.ipv4.conf.all.rp_filter", "0", Need::Must),
    ("net.ipv4.conf.default.rp_filter", "0", Need::Must),
    ("net.ipv4.conf.all.send_redirects", "0", Need::Must),
    ("net.ipv4.conf.default.send_redirects", "0", Need::Must),
    ("net.ipv4.conf.all.accept_redirects", "0", Need::Must),
    ("net.ipv4.conf.default.accept_redirects", "0", Need::Must),
    // KERNEL: the mask lifts the limit per destination and the global one, which is not per
    // namespace in older kernels. icmp_ratelimit=0 instead would empty the budget that ip_error
    // (net/ipv4/route.c) shares with it: the second "no route" would be lost (seen on v6.1).
    ("net.ipv4.icmp_ratemask", "0", Need::Must),
    ("net.ipv4.icmp_msgs_per_sec", "1000000", Need::IfThere),
    ("net.ipv4.icmp_msgs_burst", "1000000", Need::IfThere),
    ("net.ipv6.icmp.ratelimit", "0", Need::IfThere),
    ("net.ipv6.icmp.ratemask", "\n", Need::IfThere),
    ("net.ipv6.conf.all.accept_redirects", "0", Need::IfThere),
    ("net.ipv6.conf.default.accept_redirects", "0", Need::IfThere),
    ("net.ipv6.conf.default.accept_dad", "0", Need::IfThere),
    ("net.ipv6.conf.default.accept_ra", "0", Need::IfThere),
    // KERNEL: br_netfilter is on by default; it would translate packets inside the bridge, which
    // then does not send one back to the port it came from (net/bridge/br_netfilter_hooks.c).
    ("net.bridge.bridge-nf-call-iptables", "0", Need::IfThere),
    ("net.bridge.bridge-nf-call-ip6tables", "0", Need::IfThere),
    ("net.bridge.bridge-nf-call-arptables", "0", Need::IfThere),
    // What whoever runs the IPVS mode sets.
    ("net.ipv4.vs.conntrack", "1", Need::IfThere),
    ("net.ipv4.vs.expire_nodest_conn", "1", Need::IfThere),
    ("net.ipv4.vs.expire_quiescent_template", "1", Need::IfThere),
];

#[derive(Clone, Copy, PartialEq)]
enum Need {
    IfThere,
    Must,
}

/// A handle to a network namespace of a [`Lab`](super::Lab); clones name the same namespace.
///
/// The handle keeps the kernel's namespace alive, its thread lives as long as the lab.
#[derive(Clone, Debug)]
pub struct Ns {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    fd: Arc<OwnedFd>,
    runtime: Handle,
    thread: ThreadId,
    netlink: rtnetlink::Handle,
}

impl Ns {
    /// Runs a blocking closure in the namespace, on a thread of its own, and returns its value.
    ///
    /// The closure may borrow. It may talk to responders in the same namespace. A panic in it
    /// goes on in the caller.
    ///
    /// # Errors
    ///
    /// [`LabError::Namespace`] when the thread cannot enter the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let enter_and_work = || {
            setns(&*self.inner.fd, CloneFlags::CLONE_NEWNET).map_err(|errno| {
                let (netns, source) = (self.inner.name.clone(), errno.into());
                LabError::Namespace { netns, step: "enter the namespace", source }
            })?;
            Ok(work())
        };
        thread::scope(|scope| scope.spawn(enter_and_work).join())
            .unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs a future in the namespace's runtime and blocks until it is done.
    ///
    /// Sockets that the future opens belong to the namespace. A panic in it goes on in the caller.
    ///
    /// # Errors
    ///
    /// [`LabError::Ended`] when the lab was dropped.
    ///
    /// # Panics
    ///
    /// When called from a task of this very namespace, which would wait for itself.
    pub fn block_on<F>(&self, future: F) -> Result<F::Output, LabError>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        assert!(
            !self.is_current(),
            "block_on was called from a task of the namespace itself; use exec"
        );
        let (tell, told) = mpsc::sync_channel(1);
        let task = self.inner.runtime.spawn(future);
        self.inner.runtime.spawn(async move { tell.send(task.await) });
        self.finished(told.recv().ok())
    }

    /// Runs a future in the namespace's runtime and waits for it; works from any executor.
    ///
    /// # Errors
    ///
    /// [`LabError::Ended`] when the lab was dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the returned future aborts the one in the namespace at its next await.
    pub async fn exec<F>(&self, future: F) -> Result<F::Output, LabError>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let mut task = AbortOnDrop(self.inner.runtime.spawn(future));
        let outcome = (&mut task.0).await;
        self.finished(Some(outcome))
    }

    /// Starts a future in the namespace's runtime. It ends with the lab at the latest.
    pub fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.inner.runtime.spawn(future)
    }

    /// Runs a program in the namespace and returns what it wrote to standard output.
    ///
    /// # Errors
    ///
    /// [`LabError::Spawn`] when it cannot be started, [`LabError::Command`] when it fails.
    pub fn command<A: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<String, LabError> {
        self.command_with_input(program, args, "")
    }

    /// As [`command`](Self::command), with text on standard input (`nft -f -`).
    ///
    /// # Errors
    ///
    /// As [`command`](Self::command).
    pub fn command_with_input<A: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Result<String, LabError> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let shown = shown(&command);
        let failed = |source| LabError::Spawn {
            netns: self.inner.name.clone(),
            command: shown.clone(),
            source,
        };
        let output = self
            .run(|| {
                let mut child = command.spawn()?;
                let stdin = child.stdin.take();
                thread::scope(|scope| {
                    // A program may answer before it has read everything, or read nothing.
                    scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
                    child.wait_with_output()
                })
            })?
            .map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            netns: self.inner.name.clone(),
            command: shown,
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Writes a sysctl of the namespace. Dots separate, as for sysctl(8); a key with slashes is
    /// taken as it is, for links with a dot in their name.
    ///
    /// # Errors
    ///
    /// [`LabError::Sysctl`].
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        let (path, value) = (sysctl_path(key), value.to_owned());
        let written = self.on_thread(move || fs::write(path, value))?;
        written.map_err(|source| self.sysctl_error(key, source))
    }

    /// Reads a sysctl of the namespace, without the line's end.
    ///
    /// # Errors
    ///
    /// [`LabError::Sysctl`].
    pub fn sysctl_value(&self, key: &str) -> Result<String, LabError> {
        let path = sysctl_path(key);
        let read = self.on_thread(move || fs::read_to_string(path))?;
        read.map(|text| text.trim_end().to_owned()).map_err(|source| self.sysctl_error(key, source))
    }

    /// The namespace's file, for setns. Holding it keeps the namespace alive.
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.inner.fd)
    }

    /// A path to the namespace that other threads and processes can open, valid while this handle
    /// (or [`fd`](Self::fd)) lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.inner.fd.as_raw_fd()))
    }

    /// The command that opens a shell in the namespace, while this process lives.
    ///
    /// Inside a user namespace it works for the user who started the process.
    pub fn enter_hint(&self) -> String {
        let (pid, path) = (std::process::id(), self.path());
        if enter::in_user_namespace() {
            format!("nsenter -t {pid} -U -m --preserve-credentials --net={}", path.display())
        } else {
            format!("nsenter --net={}", path.display())
        }
    }

    /// The name it has in its lab.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether the caller is a task of this very namespace.
    pub(crate) fn is_current(&self) -> bool {
        thread::current().id() == self.inner.thread
    }

    /// The rtnetlink handle, whose socket belongs to the namespace.
    pub(super) fn netlink(&self) -> rtnetlink::Handle {
        self.inner.netlink.clone()
    }

    /// Runs a closure that blocks for microseconds at most on the namespace's own thread.
    fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, LabError> {
        if self.is_current() {
            return Ok(work());
        }
        self.block_on(async move { work() })
    }

    fn finished<T>(
        &self,
        outcome: Option<Result<T, tokio::task::JoinError>>,
    ) -> Result<T, LabError> {
        match outcome {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) if error.is_panic() => resume_unwind(error.into_panic()),
            Some(Err(_)) | None => Err(LabError::Ended { netns: self.inner.name.clone() }),
        }
    }

    fn sysctl_error(&self, key: &str, source: io::Error) -> LabError {
        LabError::Sysctl { netns: self.inner.name.clone(), key: key.to_owned(), source }
    }
}

/// A namespace with the thread that serves it.
#[derive(Debug)]
pub(super) struct NsThread {
    ns: Ns,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl NsThread {
    /// Makes the namespace and waits until its runtime runs.
    pub(super) fn start(lab: &str, name: &str) -> Result<Self, LabError> {
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::sync_channel(1);
        let owned = name.to_owned();
        let thread = thread::Builder::new()
            .name(format!("{lab}/{name}"))
            .spawn(move || serve(owned, &tell, stopped))
            .map_err(|source| namespace_error(name, "start a thread", source))?;
        // The thread ends without an answer only by a panic.
        let ns =
            told.recv().map_err(|_ended| LabError::Ended { netns: name.to_owned() }).flatten()?;
        Ok(Self { ns, stop: Some(stop), thread: Some(thread) })
    }

    pub(super) fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub(super) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported where its tasks were awaited.
            drop(thread.join());
        }
    }

    /// Lets the thread run until the process ends.
    pub(super) fn forget(self) {
        std::mem::forget(self);
    }

    pub(super) fn ns(&self) -> &Ns {
        &self.ns
    }
}

/// The body of a namespace's thread.
fn serve(
    name: String,
    tell: &mpsc::SyncSender<Result<Ns, LabError>>,
    stopped: oneshot::Receiver<()>,
) {
    let (fd, runtime) = match prepare(&name) {
        Ok(parts) => parts,
        Err(error) => return drop(tell.send(Err(error))),
    };
    runtime.block_on(async move {
        let connected = match rtnetlink::new_connection() {
            Ok((connection, netlink, _)) => {
                tokio::spawn(connection);
                link::up_in(&netlink, "lo").await.map(|()| netlink)
            }
            Err(error) => Err(error),
        };
        let netlink = match connected {
            Ok(netlink) => netlink,
            Err(source) => {
                return drop(tell.send(Err(namespace_error(&name, "bring up lo", source))));
            }
        };
        let (thread, runtime) = (thread::current().id(), Handle::current());
        let inner = Inner { name, fd: Arc::new(fd), runtime, thread, netlink };
        if tell.send(Ok(Ns { inner: Arc::new(inner) })).is_ok() {
            // Ends with an error when the lab drops the sender: that is the signal.
            drop(stopped.await);
        }
    });
}

/// Moves the thread into a new namespace and sets its sysctls.
fn prepare(name: &str) -> Result<(OwnedFd, tokio::runtime::Runtime), LabError> {
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| namespace_error(name, "create a network namespace", errno.into()))?;
    let file = File::open("/proc/thread-self/ns/net")
        .map_err(|source| namespace_error(name, "open the namespace's file", source))?;
    for (key, value, need) in SYSCTLS {
        let written = fs::write(sysctl_path(key), value);
        if let (Err(source), Need::Must) = (written, need) {
            return Err(LabError::Sysctl { netns: name.to_owned(), key: key.to_owned(), source });
        }
    }
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| namespace_error(name, "start a runtime", source))?;
    Ok((file.into(), runtime))
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn namespace_error(netns: &str, step: &'static str, source: io::Error) -> LabError {
    LabError::Namespace { netns: netns.to_owned(), step, source }
}

fn sysctl_path(key: &str) -> PathBuf {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    PathBuf::from("/proc/sys").join(relative)
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

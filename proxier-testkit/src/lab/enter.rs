//! Getting the privileges a lab needs, or saying precisely why that is impossible.

use std::fs;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// Bits of `CapEff` in `/proc/PID/status`.
// KERNEL: include/uapi/linux/capability.h: CAP_NET_ADMIN is 12, CAP_SYS_ADMIN is 21.
const CAPS: u64 = (1 << 12) | (1 << 21);

/// How the process got what it needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Entered {
    /// It had the capabilities already; nothing was changed.
    Already,
    /// It is root in new user, network and mount namespaces.
    UserNamespace,
}

/// Why this process cannot have a lab, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// The process has neither the capabilities nor entered a user namespace.
    #[error(
        "CAP_NET_ADMIN and CAP_SYS_ADMIN are missing: run as root, or under `unshare -Urnm`, \
         or (a program of its own) call lab::enter() first thing in main"
    )]
    Capabilities,

    /// Capabilities are there, but a network namespace is refused all the same.
    #[error(
        "the kernel refuses a new network namespace although the capabilities are there; look at \
         user.max_net_namespaces and at the container's seccomp profile"
    )]
    NetworkNamespace(#[source] io::Error),

    /// User namespaces are switched off by a sysctl.
    #[error(
        "unprivileged user namespaces are off: run `sysctl -w {setting}` as root, or run as root"
    )]
    Sysctl {
        /// The setting that would allow them.
        setting: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// The process has threads; the kernel lets only a single-threaded process change its user
    /// namespace.
    #[error(
        "{threads} threads are running: call lab::enter() first thing in main, before any runtime \
         (a test harness always has threads: use root or `unshare -Urnm`)"
    )]
    Threads {
        /// Threads counted.
        threads: usize,
    },

    /// The kernel refused a step, and no known switch explains it.
    #[error(
        "could not {step}; inside a container allow user namespaces (seccomp, \
         --security-opt) or run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    )]
    UserNamespace {
        /// The step that failed.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Makes sure that this process may build labs. Call it first thing in `main`.
///
/// With `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` it does nothing. Otherwise it moves the process into
/// new user (the caller becomes root), network and mount namespaces, makes all mounts private and
/// brings `lo` of the new network namespace up. The host's interfaces, rules, mounts and sysctls
/// are not touched in either case. A second call does nothing.
///
/// After the move the process has no network but its own: what must be reachable from outside
/// (a listening socket, a connection) has to be opened before.
///
/// # Errors
///
/// [`Why`] says what the administrator has to change. After [`Why::UserNamespace`] the process may
/// be in a user namespace of its own without being root in it, and should end.
pub fn enter() -> Result<Entered, Why> {
    if privileged() {
        return Ok(Entered::Already);
    }
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(Why::Threads { threads });
    }
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(|errno| refused("create a user namespace", errno.into()))?;
    let write = |file: &str, text: String| {
        fs::write(file, text).map_err(|source| refused("map the user to root", source))
    };
    // KERNEL: gid_map may be written by an unprivileged process only after setgroups is denied
    // (user_namespaces(7)).
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .map_err(|errno| refused("create network and mount namespaces", errno.into()))?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|errno| refused("make the mounts private", errno.into()))?;
    super::link::loopback_up()
        .map_err(|source| refused("bring up lo in the new network namespace", source))?;
    Ok(Entered::UserNamespace)
}

/// Says whether this process can build labs now, by making (and dropping) a network namespace.
///
/// # Errors
///
/// [`Why`] not, and what to do.
pub fn available() -> Result<(), Why> {
    if !privileged() {
        return Err(Why::Capabilities);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join().unwrap_or(Err(nix::Error::EINTR))
    })
    .map_err(|errno| Why::NetworkNamespace(errno.into()))
}

/// Decides for a test whether it runs: `true` to run, `false` to return at once.
///
/// The environment variable `PROXIER_NETNS` governs it:
///
/// | value | lab possible | lab impossible |
/// |---|---|---|
/// | `require`, or not set | run | **panic**, saying what to do |
/// | `skip` | run | skip, with a line on standard error |
///
/// A skipped test looks like a passed one to cargo, so CI never sets `skip`.
/// [`require_lab!`](crate::require_lab) is the short form.
///
/// # Panics
///
/// When labs are required and impossible, and when the variable has another value.
pub fn gate() -> bool {
    let setting = std::env::var("PROXIER_NETNS").unwrap_or_else(|_| "require".to_owned());
    assert!(
        setting == "require" || setting == "skip",
        "PROXIER_NETNS is `{setting}`; it must be `require` or `skip`"
    );
    match available() {
        Ok(()) => true,
        Err(why) => {
            assert!(setting == "skip", "this test needs a network lab: {why}");
            say_skipped(&why);
            false
        }
    }
}

/// Returns from the test when [`lab::gate`](crate::lab::gate) says so.
#[macro_export]
macro_rules! require_lab {
    () => {
        if !$crate::lab::gate() {
            return;
        }
    };
}

#[expect(clippy::print_stderr, reason = "cargo shows nothing else of a skipped test")]
fn say_skipped(why: &Why) {
    eprintln!("SKIPPED, no network lab: {why}");
}

/// Both capabilities are effective in this thread.
fn privileged() -> bool {
    let Ok(status) = fs::read_to_string("/proc/thread-self/status") else { return false };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    effective & CAPS == CAPS
}

/// Whether the process is in a user namespace other than the initial one.
pub(crate) fn in_user_namespace() -> bool {
    // KERNEL: the initial namespace maps the whole range onto itself (user_namespaces(7)).
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| {
        map.split_ascii_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"]
    })
}

/// Finds the switch that explains a refusal.
fn refused(step: &'static str, source: io::Error) -> Why {
    let is = |file: &str, value: &str| {
        fs::read_to_string(file).is_ok_and(|content| content.trim() == value)
    };
    let setting = if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "kernel.unprivileged_userns_clone=1"
    } else if is("/proc/sys/user/max_user_namespaces", "0") {
        "user.max_user_namespaces=1024"
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        return Why::UserNamespace { step, source };
    };
    Why::Sysctl { setting, source }
}

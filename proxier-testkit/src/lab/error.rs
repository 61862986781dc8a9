//! Errors of building and using a lab.

use std::io;
use std::process::ExitStatus;

/// Something could not be done in a lab.
///
/// Every variant names the namespace and the object. None is worth a retry: the lab is private, so
/// what fails once fails again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A program ran in a namespace and reported failure.
    #[error("{netns}: `{command}` failed ({status}): {stderr}")]
    Command {
        /// Namespace it ran in.
        netns: String,
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error, trimmed.
        stderr: String,
    },

    /// The namespace's runtime is gone: its lab was dropped, or the task panicked.
    #[error("{netns}: the namespace has ended")]
    Ended {
        /// Namespace.
        netns: String,
    },

    /// The kernel refused a change to links, addresses, routes or rules.
    #[error("{netns}: {action}")]
    Kernel {
        /// Namespace.
        netns: String,
        /// What was being done, to which link, address or route.
        action: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// A name is not fit for a link, a namespace or an endpoint, or is taken.
    #[error("`{name}`: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// A network namespace could not be made or entered. [`Why`](super::Why) says what to do
    /// when privileges are missing: call [`enter`](super::enter) first.
    #[error("{netns}: could not {step}")]
    Namespace {
        /// Namespace.
        netns: String,
        /// The step that failed.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// Text that should be an address or a prefix is neither.
    #[error("`{text}` is not an address or prefix")]
    Parse {
        /// The text.
        text: String,
    },

    /// A socket could not be prepared in a namespace.
    #[error("{netns}: {action}")]
    Socket {
        /// Namespace.
        netns: String,
        /// What was being done, and to which address.
        action: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// A program could not be started.
    #[error("{netns}: could not run `{command}`")]
    Spawn {
        /// Namespace.
        netns: String,
        /// Program and arguments.
        command: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// A sysctl could not be read or written. A read-only `/proc/sys` is usual in containers that
    /// are not privileged.
    #[error("{netns}: sysctl {key}")]
    Sysctl {
        /// Namespace.
        netns: String,
        /// The key as given.
        key: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },

    /// A topology that cannot be built.
    #[error("topology: {why}: {what}")]
    Topology {
        /// The host, node or address concerned.
        what: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

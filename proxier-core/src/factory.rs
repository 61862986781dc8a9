//! Choosing and opening a backend at run time.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::Serialize;

use crate::{
    name::Family,
    proxier::{Mode, Proxier},
    spi::{CommitError, ErrorKind},
};

/// Where and how to open a proxier.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct OpenContext {
    /// The network namespace to program, as a path such as `/run/netns/blue`; the current one when
    /// `None`.
    pub netns: Option<PathBuf>,
    /// The families to program. Fragments of others are left alone.
    pub families: Vec<Family>,
    /// What names in the kernel begin with, where the mode has such names; its own default when
    /// `None`. Two instances need two prefixes.
    pub prefix: Option<String>,
    /// The bit of the packet mark that says "masquerade this", 0 to 31.
    pub masquerade_bit: u8,
    /// Take over what another proxier left behind, instead of refusing to start beside it.
    pub takeover: bool,
    /// Which of the kernel's two packet filters the iptables mode writes to.
    pub xtables: Xtables,
}

/// The bit of the packet mark that says "routed to this machine, for a process that serves it", given
/// the one that says "masquerade": 13, or 12 where 13 is taken.
///
/// While two modes overlap, what one has captured by this mark is left alone by the others.
#[must_use]
pub const fn capture_bit(masquerade_bit: u8) -> u8 {
    if masquerade_bit == 13 { 12 } else { 13 }
}

/// The kernel's two packet filters that iptables can write to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Xtables {
    /// nf_tables, or x_tables where the kernel has no nf_tables.
    #[default]
    Auto,
    /// x_tables, as `iptables-legacy` does, with its programs.
    Legacy,
    /// nf_tables, as `iptables-nft` does.
    Nft,
}

impl Default for OpenContext {
    /// The current namespace, both families, kube-proxy's mark bit, no takeover.
    fn default() -> Self {
        Self {
            netns: None,
            families: Family::ALL.to_vec(),
            prefix: None,
            masquerade_bit: 14,
            takeover: false,
            xtables: Xtables::Auto,
        }
    }
}

/// Whether a mode can work on a host, and why (not).
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Suitability {
    /// It can work.
    pub available: bool,
    /// What was found, one sentence each: first what is missing, then what is worth knowing.
    pub reasons: Vec<String>,
}

/// A proxier could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A setting cannot be used.
    #[error("{setting}: {reason}")]
    Config {
        /// Which.
        setting: &'static str,
        /// Why.
        reason: String,
    },
    /// The kernel could not be reached, or is in somebody else's hands.
    #[error("opening {mode} mode")]
    Kernel {
        /// The mode.
        mode: Mode,
        /// Why.
        #[source]
        source: CommitError,
    },
    /// This build does not have the mode.
    #[error("{0} mode is not part of this build")]
    Missing(Mode),
}

impl OpenError {
    /// What to do about it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::Fatal,
            Self::Kernel { source, .. } => source.kind(),
            Self::Missing(_) => ErrorKind::Unsupported,
        }
    }
}

/// Makes proxiers of one mode.
#[async_trait]
pub trait BackendFactory: Send + Sync {
    /// The mode.
    fn mode(&self) -> Mode;

    /// Finds out whether the mode can work. Leaves nothing behind.
    async fn probe(&self, context: &OpenContext) -> Suitability;

    /// Opens sockets; programs nothing.
    ///
    /// # Errors
    /// See [`OpenError`].
    ///
    /// # Cancel safety
    /// Safe to drop.
    async fn open(&self, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError>;
}

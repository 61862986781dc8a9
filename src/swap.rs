//! Exchanging the mode while traffic flows.

use std::{fmt, time::Duration};

use proxier_core::{Degraded, Mode, Proxier, Revision, SyncError, SyncReport, Update, in_full};
use tracing::{info, warn};

/// How a mode is exchanged for another one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Swap {
    /// How long the old mode stays beside the new one, without Services, before it is removed: zero.
    ///
    /// Connections that the kernel translates (iptables, nftables) need no time: what was decided
    /// for a connection stays. Connections that a process carries (userspace mode) go on until the old
    /// mode is removed. Those through virtual servers (IPVS mode) end as the new mode takes over.
    pub linger: Duration,
    /// Go over even if fragments that the old mode programs would be degraded in the new one.
    pub accept_degraded: bool,
}

impl Swap {
    /// Keeps the old mode for so long, for the connections that it carries.
    #[must_use]
    pub const fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Goes over even if fragments would be degraded that are not.
    #[must_use]
    pub const fn accept_degraded(mut self, accept: bool) -> Self {
        self.accept_degraded = accept;
        self
    }
}

/// A mode was exchanged for another one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Swapped {
    /// The mode that was in force.
    pub from: Mode,
    /// The mode that is in force.
    pub to: Mode,
    /// What programming the new mode took; `None` when there was nothing to program yet.
    pub report: Option<SyncReport>,
    /// How long it took until the new mode was in force.
    pub took: Duration,
}

/// A mode could not be exchanged. The old one is in force as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// The new mode cannot do what the old one does.
    #[error("{mode} mode would not program {} that are programmed now; the first: {first}", count(.degraded.len()))]
    Degraded {
        /// The new mode.
        mode: Mode,
        /// The fragments that would be lost, with reasons.
        degraded: Vec<Degraded>,
        /// The first of them, for people.
        first: String,
    },
    /// The new mode could not be programmed.
    #[error("programming {mode} mode")]
    Program {
        /// The new mode.
        mode: Mode,
        /// Why.
        #[source]
        source: SyncError,
    },
    /// Both proxiers are of one mode: they might share their objects. A driver that is made anew
    /// takes over what is there.
    #[error("{0} mode is in force already")]
    SameMode(Mode),
    /// The driver has stopped.
    #[error(transparent)]
    Stopped(#[from] crate::Stopped),
}

fn count(fragments: usize) -> String {
    if fragments == 1 { "a fragment".to_owned() } else { format!("{fragments} fragments") }
}

/// An old mode that is to be removed.
pub(crate) struct Retired {
    proxier: Box<dyn Proxier>,
    /// When, by the driver's clock.
    pub(crate) at: Duration,
}

impl fmt::Debug for Retired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retired").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Retired {
    pub(crate) const fn new(proxier: Box<dyn Proxier>, at: Duration) -> Self {
        Self { proxier, at }
    }

    /// Takes the Services from the old mode, so that it gets no new connections.
    pub(crate) async fn dismiss(&mut self, wanted: &Update) {
        let Update::Reset { revision, node, .. } = wanted else { return };
        let (revision, node) = (Revision(revision.0), std::sync::Arc::clone(node));
        let nothing = Update::Reset { revision, node, fragments: Vec::new() };
        if let Err(error) = self.proxier.sync(nothing).await {
            warn!(mode = %self.mode(), error = %in_full(&error), "the old mode lingers with its Services");
        }
    }

    /// Removes the old mode. What cannot be removed is logged, and goes when that mode is opened and
    /// cleaned up.
    pub(crate) async fn remove(mut self) {
        match self.proxier.cleanup().await {
            Ok(()) => info!(mode = %self.mode(), "removed the old mode"),
            Err(error) => {
                warn!(mode = %self.mode(), error = %in_full(&error), "cannot remove the old mode");
            }
        }
    }

    fn mode(&self) -> Mode {
        self.proxier.capabilities().mode
    }
}

/// Programs `new` beside the mode in force; removes it again when it cannot take over.
///
/// Nothing is read back afterwards: a first sync compares with what the kernel holds, and the kernel
/// acknowledges every write. The audits that follow find what others do.
pub(crate) async fn prepare(
    new: &mut dyn Proxier,
    wanted: Option<Update>,
    known: &[Degraded],
    options: Swap,
) -> Result<Option<SyncReport>, SwapError> {
    let mode = new.capabilities().mode;
    let Some(wanted) = wanted else { return Ok(None) };
    match program(new, wanted, known, options).await {
        Ok(report) => Ok(Some(report)),
        Err(error) => {
            if let Err(left) = new.cleanup().await {
                warn!(%mode, error = %in_full(&left), "cannot remove the mode that was tried");
            }
            Err(error)
        }
    }
}

async fn program(
    new: &mut dyn Proxier,
    wanted: Update,
    known: &[Degraded],
    options: Swap,
) -> Result<SyncReport, SwapError> {
    let mode = new.capabilities().mode;
    let failed = |source| SwapError::Program { mode, source };
    let report = new.sync(wanted).await.map_err(failed)?;
    let is_new = |it: &&Degraded| !known.iter().any(|known| known.id == it.id);
    let degraded: Vec<_> = report.degraded.iter().filter(is_new).cloned().collect();
    if let Some(first) = degraded.first().filter(|_| !options.accept_degraded) {
        let first = format!("{}: {}", first.id, first.reason);
        return Err(SwapError::Degraded { mode, degraded, first });
    }
    Ok(report)
}

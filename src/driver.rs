//! The task that keeps a proxier in step with its sources.

use std::{
    fmt,
    time::{Duration, Instant},
};

use proxier_core::{
    Degraded, FragmentId, Proxier, Status, SyncError, SyncReport, in_full,
    model::{Conflict, Event, NodeEnv, Pending, Store},
    pace::{Pacer, Pause},
};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::handle::{Command, Handle};
use crate::observe::{Cause, Observer, Synced};
use crate::swap::{Retired, Swap, SwapError, Swapped, prepare};

/// The least time between two looks at what others did. The first is at once.
const FOREIGN_PAUSE: Duration = Duration::from_millis(100);

/// The first repetition of what failed comes after this; each further one after twice as long.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// When the driver syncs.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Pacing {
    /// The pause after a sync. Adaptive up to one second: none after a short sync.
    pub pause: Pause,
    /// The longest time between two attempts of what failed: five minutes.
    pub max_retry: Duration,
    /// How often the kernel is read back to find what others changed: ten minutes.
    pub audit: Duration,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            pause: Pause::Adaptive { limit: Duration::from_secs(1) },
            max_retry: Duration::from_secs(300),
            audit: Duration::from_secs(600),
        }
    }
}

/// Where a driver stands.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Standing {
    /// The proxier's own status.
    pub proxier: Status,
    /// Frontends that more than one Service wants.
    pub conflicts: Vec<Conflict>,
    /// What the last sync did; `None` before the first one and after a failed one.
    pub last: Option<SyncReport>,
    /// How long the last sync took.
    pub took: Duration,
    /// Why the last sync failed.
    pub failure: Option<String>,
}

/// Feeds events to a proxier: coalesces them, syncs, retries, audits.
///
/// Made with [`Driver::new`], fed through its [`Handle`], and run as a task of any tokio runtime
/// with time enabled.
pub struct Driver {
    proxier: Box<dyn Proxier>,
    store: Store,
    pacing: Pacing,
    commands: mpsc::Receiver<Command>,
    standing: watch::Sender<Standing>,
    /// Those who wait until everything sent so far is programmed.
    waiting: Vec<oneshot::Sender<Standing>>,
    observer: Option<Box<dyn Observer>>,
    /// When the first event came in that is not yet synced.
    queued: Option<Instant>,
    node_changed: bool,
    started: Instant,
    retry_at: Option<Duration>,
    retry_after: Duration,
    /// Changes that others make are not looked at before this.
    quiet_until: Duration,
    /// The old mode, while it lingers.
    retired: Option<Retired>,
    /// When the proxier wants to be told the time.
    tick_at: Option<Duration>,
}

/// Why the driver wakes up.
enum Wake {
    Command(Command),
    Gone,
    Due,
    Foreign,
    Retire,
    Retry,
    Stop,
    Tick,
}

impl Driver {
    /// Makes a driver for a node. Nothing is programmed before complete lists of Services and
    /// EndpointSlices have come in.
    #[must_use]
    pub fn new(proxier: Box<dyn Proxier>, env: NodeEnv, pacing: Pacing) -> (Self, Handle) {
        let (standing, watcher) = watch::channel(Standing::default());
        let (handle, commands) = Handle::new(watcher);
        let driver = Self {
            proxier,
            store: Store::new(env),
            pacing,
            commands,
            standing,
            waiting: Vec::new(),
            observer: None,
            queued: None,
            node_changed: false,
            started: Instant::now(),
            retry_at: None,
            retry_after: FIRST_RETRY,
            quiet_until: Duration::ZERO,
            retired: None,
            tick_at: None,
        };
        (driver, handle)
    }

    /// Tells an observer about every sync.
    #[must_use]
    pub fn observed(mut self, observer: Box<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Runs until `stop` resolves or every [`Handle`] is gone. Returns the proxier; what it
    /// programmed stays in force unless it is told to clean up.
    ///
    /// # Cancel safety
    /// May be dropped at any time; what is programmed stays in force, and the next proxier to be
    /// opened starts from there.
    pub async fn run(mut self, stop: impl Future<Output = ()> + Send) -> Box<dyn Proxier> {
        let mut stop = std::pin::pin!(stop);
        let Pacing { pause, audit, .. } = self.pacing;
        let mut pacer = Pacer::new(pause, audit, audit, self.now());
        let mut pending = false;
        loop {
            let due = if pending { pacer.due() } else { pacer.due().max(self.now()) };
            match self.wake(stop.as_mut(), due).await {
                Wake::Stop | Wake::Gone => {
                    self.retire().await;
                    return self.proxier;
                }
                Wake::Command(command) => {
                    if self.take_command(command).await {
                        pending = true;
                        pacer.request();
                    }
                }
                Wake::Due if !pending => {
                    let took = self.sync(Cause::Audit).await;
                    pacer.end(self.now(), took, true);
                }
                Wake::Due => {
                    pending = false;
                    pacer.begin();
                    let took = self.sync(Cause::Events).await;
                    pacer.end(self.now(), took, true);
                }
                Wake::Foreign => {
                    let took = self.sync(Cause::Audit).await;
                    // Two who undo each other's work must not keep a node busy.
                    self.quiet_until = self.now() + took.saturating_mul(10).max(FOREIGN_PAUSE);
                }
                Wake::Retire => self.retire().await,
                Wake::Retry => {
                    self.sync(Cause::Retry).await;
                }
                Wake::Tick => self.tick().await,
            }
            if !pending {
                self.answer();
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    async fn wake(
        &mut self,
        stop: std::pin::Pin<&mut (impl Future<Output = ()> + Send)>,
        due: Duration,
    ) -> Wake {
        let retry = self.retry_at.map(|at| (at, Wake::Retry));
        let retire = self.retired.as_ref().map(|it| (it.at, Wake::Retire));
        let tick = self.tick_at.map(|at| (at, Wake::Tick));
        let earlier = retry.into_iter().chain(retire).chain(tick).filter(|(at, _)| *at < due);
        let (at, wake) = earlier.min_by_key(|(at, _)| *at).unwrap_or((due, Wake::Due));
        let at = tokio::time::Instant::from_std(self.started + at);
        let quiet = tokio::time::Instant::from_std(self.started + self.quiet_until);
        tokio::select! {
            biased;
            () = stop => Wake::Stop,
            command = self.commands.recv() => command.map_or(Wake::Gone, Wake::Command),
            () = async {
                tokio::time::sleep_until(quiet).await;
                self.proxier.foreign_change().await;
            } => Wake::Foreign,
            () = tokio::time::sleep_until(at) => wake,
        }
    }

    /// Says whether there is something to sync.
    async fn take_command(&mut self, command: Command) -> bool {
        match command {
            Command::Event(event) => self.take_event(event),
            Command::Inspect(look) => {
                look(&self.store, &*self.proxier);
                false
            }
            Command::Settle(sender) => {
                self.waiting.push(sender);
                false
            }
            Command::Audit(sender) => {
                self.sync(Cause::Audit).await;
                self.waiting.push(sender);
                false
            }
            Command::Swap(to, options, sender) => {
                // Whoever asked may have lost interest.
                sender.send(self.swap(to, options).await).ok();
                false
            }
        }
    }

    async fn swap(
        &mut self,
        mut to: Box<dyn Proxier>,
        options: Swap,
    ) -> Result<Swapped, SwapError> {
        self.retire().await;
        self.sync(Cause::Events).await;
        let began = Instant::now();
        let wanted = self.store.is_programmed().then(|| self.store.reset());
        let [from, to_mode] = [&self.proxier, &to].map(|it| it.capabilities().mode);
        if from == to_mode {
            return Err(SwapError::SameMode(from));
        }
        let known = self.proxier.status().degraded;
        let report = prepare(&mut *to, wanted.clone(), &known, options).await?;
        let old = std::mem::replace(&mut self.proxier, to);
        let mut retired = Retired::new(old, self.now() + options.linger);
        if options.linger.is_zero() {
            retired.remove().await;
        } else {
            if let Some(wanted) = &wanted {
                retired.dismiss(wanted).await;
            }
            self.retired = Some(retired);
        }
        let took = began.elapsed();
        info!(%from, to = %to_mode, took_us = took.as_micros(), "exchanged the mode");
        if let Some(report) = &report {
            let status = self.proxier.status();
            self.note(Cause::Events, Ok(report.clone()), status, took);
        }
        self.tick().await;
        Ok(Swapped { from, to: to_mode, report, took })
    }

    /// Removes the old mode, if one lingers.
    async fn retire(&mut self) {
        if let Some(retired) = self.retired.take() {
            retired.remove().await;
        }
    }

    fn take_event(&mut self, event: Event) -> bool {
        self.node_changed |= matches!(event, Event::Node(_));
        let pending = self.store.apply(event);
        if pending {
            self.queued.get_or_insert_with(Instant::now);
            if let Some(observer) = &mut self.observer {
                observer.queued(&self.store);
            }
        }
        pending
    }

    async fn sync(&mut self, cause: Cause) -> Duration {
        let pending = match (cause, &self.observer) {
            (Cause::Events, Some(_)) => self.store.pending(),
            _ => Pending::default(),
        };
        let began = Instant::now();
        let outcome = match cause {
            Cause::Audit => Some(self.proxier.audit().await),
            Cause::Events => match self.store.take() {
                Some(update) => Some(self.proxier.sync(update).await),
                None => None,
            },
            Cause::Retry => Some(self.proxier.retry().await),
        };
        let took = began.elapsed();
        let status = self.proxier.status();
        if let Some(observer) = &mut self.observer {
            let is_events = cause == Cause::Events;
            let queued = if is_events { self.queued.take() } else { None };
            observer.synced(&Synced {
                cause,
                pending: &pending,
                node_changed: is_events && std::mem::take(&mut self.node_changed),
                outcome: outcome.as_ref(),
                status: &status,
                store: &self.store,
                took,
                latency: queued.map(|at| at.elapsed()),
            });
        }
        let Some(outcome) = outcome else { return Duration::ZERO };
        self.note(cause, outcome, status, took);
        self.tick().await;
        took
    }

    /// Lets the proxier do what time asks for.
    async fn tick(&mut self) {
        let next = self.proxier.tick(Instant::now()).await.unwrap_or_else(|error| {
            warn!(failure = %in_full(&error), "cannot follow up on what was programmed");
            Some(FIRST_RETRY)
        });
        self.tick_at = next.map(|next| self.now() + next);
    }

    fn note(
        &mut self,
        cause: Cause,
        outcome: Result<SyncReport, SyncError>,
        status: Status,
        took: Duration,
    ) {
        let before = self.standing.borrow().clone();
        log_degraded(&before.proxier.degraded, &status.degraded);
        let troubled = outcome.is_err() || !status.degraded.is_empty();
        let failure = outcome.as_ref().err().map(|error| in_full(error));
        match (&before.failure, &failure) {
            (None, Some(failure)) => warn!(%failure, "cannot program the node; trying again"),
            (Some(_), None) => info!("the node can be programmed again"),
            (Some(_), Some(_)) | (None, None) => {}
        }
        if let Ok(report) = &outcome {
            log_report(&before, report, took);
        }
        self.schedule_retry(cause, troubled);
        let conflicts: Vec<_> = self.store.conflicts().collect();
        for conflict in conflicts.iter().filter(|it| !before.conflicts.contains(it)) {
            warn!(%conflict, "two Services want one frontend");
        }
        let standing = Standing { proxier: status, conflicts, last: outcome.ok(), took, failure };
        self.standing.send_replace(standing);
    }

    fn schedule_retry(&mut self, cause: Cause, troubled: bool) {
        if !troubled {
            self.retry_at = None;
            self.retry_after = FIRST_RETRY;
        } else if cause == Cause::Retry {
            self.retry_after = self.retry_after.saturating_mul(2).min(self.pacing.max_retry);
            self.retry_at = Some(self.now() + self.retry_after);
        } else {
            let at = self.now() + self.retry_after;
            self.retry_at.get_or_insert(at);
        }
    }

    fn answer(&mut self) {
        for sender in self.waiting.drain(..) {
            // Whoever asked may have lost interest.
            sender.send(self.standing.borrow().clone()).ok();
        }
    }
}

fn log_report(before: &Standing, report: &SyncReport, took: Duration) {
    let (revision, visited, batches) = (report.revision.0, report.visited, report.batches);
    let (ops, took_us) = (report.ops.total(), took.as_micros());
    if before.proxier.totals.syncs == 0 {
        info!(revision, visited, ops, batches, took_us, "programmed the node for the first time");
    } else {
        debug!(revision, visited, ops, batches, took_us, "programmed");
    }
    if report.drift > 0 {
        warn!(objects = report.drift, "repaired what somebody else had changed");
    }
    for warning in &report.warnings {
        warn!("{warning}");
    }
}

/// Logs fragments when they become degraded and when they recover, not at every attempt.
fn log_degraded(before: &[Degraded], after: &[Degraded]) {
    let same = |list: &[Degraded], id: &FragmentId, reason: Option<&str>| {
        list.iter().any(|it| it.id == *id && reason.is_none_or(|reason| it.reason == reason))
    };
    for it in after.iter().filter(|it| !same(before, &it.id, Some(&it.reason))) {
        warn!(fragment = %it.id, reason = %it.reason, "cannot be programmed");
    }
    for it in before.iter().filter(|it| !same(after, &it.id, None)) {
        info!(fragment = %it.id, "programmed again, or gone");
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("pacing", &self.pacing).finish_non_exhaustive()
    }
}

//! Where the watches stand.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_core::{ObjectName, health::NodeState, model::Problem};
use tokio::{
    sync::{Notify, watch},
    time::Instant as Clock,
};

use crate::{kinds::Kind, trouble::Trouble};

/// How many problems of objects are kept for display; more are counted only.
const MAX_PROBLEMS: usize = 100;

/// Where the watches stand, all kinds together.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SourceStatus {
    /// The first complete lists have been passed on.
    pub started: bool,
    /// What is known of the own Node object.
    pub node: NodeState,
    /// One for each kind, in the order of [`Kind::ALL`].
    pub kinds: [KindStatus; Kind::ALL.len()],
}

/// Where the watch of one kind stands.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct KindStatus {
    /// A complete list has come in at some time.
    pub complete: bool,
    /// The server does not have or does not give this kind, and the node does without.
    pub unavailable: bool,
    /// Objects in the last list that are of use.
    pub listed: usize,
    /// When the server was last heard: list, event or bookmark.
    pub heard: Option<Instant>,
    /// What is wrong at the moment.
    pub trouble: Option<Standing>,
    /// Objects with something wrong in them, the first ones found.
    pub problems: Vec<(ObjectName, Vec<Problem>)>,
    /// What happened so far.
    pub counts: Counts,
}

/// Trouble that goes on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Standing {
    /// The latest trouble.
    pub trouble: Trouble,
    /// Since when nothing works.
    pub since: Instant,
    /// Attempts that failed since then.
    pub attempts: u64,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Counts {
    /// Lists that were begun, streaming or in pages.
    pub lists: u64,
    /// Watches that were begun.
    pub watches: u64,
    /// Events that came in, bookmarks not counted.
    pub events: u64,
    /// Bookmarks that came in.
    pub bookmarks: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Watches that were given up because they said nothing.
    pub stalls: u64,
}

impl SourceStatus {
    /// The status of one kind.
    #[must_use]
    pub const fn of(&self, kind: Kind) -> &KindStatus {
        let [slices, node, cidrs, services] = &self.kinds;
        match kind {
            Kind::EndpointSlices => slices,
            Kind::Node => node,
            Kind::ServiceCidrs => cidrs,
            Kind::Services => services,
        }
    }

    /// What is wrong at the moment, by kind.
    pub fn troubles(&self) -> impl Iterator<Item = (Kind, &Standing)> {
        let each = Kind::ALL.into_iter().zip(&self.kinds);
        each.filter_map(|(kind, status)| Some((kind, status.trouble.as_ref()?)))
    }

    /// How long a watch that matters has not worked, at `now`: none is in trouble, zero.
    #[must_use]
    pub fn blind(&self, now: Instant) -> Duration {
        let since =
            self.troubles().map(|(_, standing)| now.saturating_duration_since(standing.since));
        since.max().unwrap_or_default()
    }
}

/// Writes the status of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Reporter {
    status: watch::Sender<SourceStatus>,
    kind: Kind,
    /// Tells all kinds when the server answers one of them again.
    answers: Arc<Notify>,
}

impl Reporter {
    pub(crate) const fn new(
        status: watch::Sender<SourceStatus>,
        kind: Kind,
        answers: Arc<Notify>,
    ) -> Self {
        Self { status, kind, answers }
    }

    /// Waits until the server, from now on, answers some kind that it did not answer before.
    pub(crate) fn answer(&self) -> impl Future<Output = ()> + Send + use<> {
        Arc::clone(&self.answers).notified_owned()
    }

    /// The server was heard and all is well.
    pub(crate) fn heard(&self, count: impl FnOnce(&mut Counts)) {
        self.edit(|status| {
            count(&mut status.counts);
            status.heard = Some(Clock::now().into_std());
            let healed = status.trouble.take();
            if let Some(standing) = &healed {
                let lasted_s = standing.since.elapsed().as_secs();
                tracing::info!(kind = %self.kind, lasted_s, "the API server answers again");
                self.answers.notify_waiters();
            }
            healed.is_some()
        });
    }

    /// Counts something that is not yet an answer.
    pub(crate) fn count(&self, count: impl FnOnce(&mut Counts)) {
        self.edit(|status| {
            count(&mut status.counts);
            false
        });
    }

    /// Something failed.
    pub(crate) fn failed(&self, trouble: Trouble) {
        self.edit(|status| {
            status.counts.failures += 1;
            if let Some(standing) = &mut status.trouble {
                if standing.trouble.kind != trouble.kind {
                    tracing::warn!(kind = %self.kind, %trouble, "still no watch");
                }
                standing.attempts += 1;
                standing.trouble = trouble;
            } else {
                tracing::warn!(kind = %self.kind, %trouble, "no watch at the moment; trying again");
                let since = Clock::now().into_std();
                status.trouble = Some(Standing { trouble, since, attempts: 1 });
            }
            true
        });
    }

    pub(crate) fn complete(&self, listed: usize) {
        self.edit(|status| {
            (status.complete, status.unavailable, status.listed) = (true, false, listed);
            true
        });
    }

    pub(crate) fn unavailable(&self) {
        self.edit(|status| !std::mem::replace(&mut status.unavailable, true));
    }

    /// A list begins: what was wrong with objects before is history.
    pub(crate) fn set_problems(&self, found: Vec<(ObjectName, Vec<Problem>)>) {
        self.edit(|status| {
            for (name, problems) in &found {
                if !status.problems.iter().any(|(known, old)| known == name && old == problems) {
                    log(problems);
                }
            }
            status.problems = found;
            status.problems.truncate(MAX_PROBLEMS);
            true
        });
    }

    /// An object has changed or gone; `problems` is what is wrong with it.
    pub(crate) fn problems(&self, name: &ObjectName, problems: Vec<Problem>) {
        self.edit(|status| {
            let known = status.problems.iter().position(|(known, _)| known == name);
            let before = known.map(|place| status.problems.swap_remove(place).1);
            if problems.is_empty() {
                return before.is_some();
            }
            let changed = before.as_ref() != Some(&problems);
            if changed {
                log(&problems);
            }
            if status.problems.len() < MAX_PROBLEMS {
                status.problems.push((name.clone(), problems));
            }
            changed
        });
    }

    fn edit(&self, edit: impl FnOnce(&mut KindStatus) -> bool) {
        self.status.send_if_modified(|status| {
            let [slices, node, cidrs, services] = &mut status.kinds;
            edit(match self.kind {
                Kind::EndpointSlices => slices,
                Kind::Node => node,
                Kind::ServiceCidrs => cidrs,
                Kind::Services => services,
            })
        });
    }
}

fn log(problems: &[Problem]) {
    for problem in problems {
        tracing::warn!(%problem, "an object is not as it should be");
    }
}

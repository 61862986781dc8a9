//! When to sync: a state machine without a clock.
//!
//! Requests coalesce; after each run there is a pause before the next one; a failed run is tried
//! again; and there is a run now and then without any request. Times are [`Duration`]s since an
//! epoch of the caller's choice.

use std::time::Duration;

/// How long to wait after a run before the next one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pause {
    /// In proportion to what the last run took: nothing after a run of up to a millisecond, twice
    /// the run's time (a third of the time is spent syncing, at most) up to a limit otherwise.
    Adaptive {
        /// The longest pause.
        limit: Duration,
    },
    /// Always the same, as kube-proxy's `minSyncPeriod`.
    Fixed(Duration),
}

impl Pause {
    fn after(self, took: Duration) -> Duration {
        match self {
            Self::Adaptive { .. } if took <= Duration::from_millis(1) => Duration::ZERO,
            Self::Adaptive { limit } => took.saturating_mul(2).min(limit),
            Self::Fixed(pause) => pause,
        }
    }
}

/// Decides when to run next.
#[derive(Clone, Debug)]
pub struct Pacer {
    pause: Pause,
    retry: Duration,
    max: Duration,
    requested: bool,
    /// No run before this.
    earliest: Duration,
    /// A run by then even without a request.
    latest: Duration,
}

impl Pacer {
    /// Starts counting at `now`. A failed run is repeated after `retry`, and a run happens at least
    /// every `max`.
    #[must_use]
    pub fn new(pause: Pause, retry: Duration, max: Duration, now: Duration) -> Self {
        Self { pause, retry, max, requested: false, earliest: now, latest: now.saturating_add(max) }
    }

    /// Asks for a run.
    pub const fn request(&mut self) {
        self.requested = true;
    }

    /// When the next run is due, given what is known now. May be in the past.
    #[must_use]
    pub fn due(&self) -> Duration {
        if self.requested { self.earliest } else { self.latest.max(self.earliest) }
    }

    /// A run begins: it answers every request so far.
    pub const fn begin(&mut self) {
        self.requested = false;
    }

    /// A run that took `took` ended at `now`.
    pub fn end(&mut self, now: Duration, took: Duration, succeeded: bool) {
        let wait = if succeeded { self.max } else { self.retry.min(self.max) };
        self.earliest = now.saturating_add(self.pause.after(took));
        self.latest = now.saturating_add(wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Runs the pacer over requests at the given times; every run takes `cost`.
    fn starts(
        pause: Pause,
        (retry, max): (u64, u64),
        requests: &[u64],
        cost: u64,
        fails: usize,
        until: u64,
    ) -> Vec<u64> {
        let mut pacer = Pacer::new(pause, ms(retry), ms(max), ms(0));
        let mut requests = requests.iter().copied().peekable();
        let mut starts = Vec::new();
        loop {
            let due = pacer.due();
            if let Some(request) = requests.next_if(|request| ms(*request) <= due) {
                pacer.request();
                // A request cannot be answered before it is made.
                pacer.earliest = pacer.earliest.max(ms(request));
                continue;
            }
            if due > ms(until) {
                return starts;
            }
            starts.push(u64::try_from(due.as_millis()).unwrap());
            pacer.begin();
            let ok = starts.len() > fails;
            pacer.end(due + ms(cost), ms(cost), ok);
        }
    }

    #[test]
    fn requests_during_a_run_and_its_pause_become_one_run() {
        let fixed = Pause::Fixed(ms(1000));
        assert_eq!(
            starts(fixed, (30_000, 3_600_000), &[10, 20, 30, 900], 200, 0, 20_000),
            [10, 1210]
        );
    }

    #[test]
    fn a_failed_run_is_repeated_after_the_retry_interval_or_the_maximum() {
        let fixed = Pause::Fixed(ms(1000));
        assert_eq!(
            starts(fixed, (30_000, 3_600_000), &[0], 0, 3, 100_000),
            [0, 30_000, 60_000, 90_000]
        );
        assert_eq!(starts(fixed, (30_000, 10_000), &[0], 0, 1, 15_000), [0, 10_000]);
    }

    #[test]
    fn there_is_a_run_now_and_then_without_requests() {
        let fixed = Pause::Fixed(ms(1000));
        assert_eq!(starts(fixed, (30_000, 60_000), &[], 0, 0, 150_000), [60_000, 120_000]);
    }

    #[test]
    fn short_runs_do_not_wait_and_long_ones_wait_in_proportion() {
        let adaptive = Pause::Adaptive { limit: ms(1000) };
        assert_eq!(starts(adaptive, (30_000, 3_600_000), &[5, 6, 7], 1, 0, 100), [5, 6, 7]);
        assert_eq!(starts(adaptive, (30_000, 3_600_000), &[5, 6, 7], 50, 0, 1000), [5, 155]);
        assert_eq!(starts(adaptive, (30_000, 3_600_000), &[0, 1], 9000, 0, 20_000), [0, 10_000]);
    }
}

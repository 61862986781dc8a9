//! How long to wait before the next attempt.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

use tokio::time::Instant;

/// Without a failure for this long, the next one is the first again.
const FORGET: Duration = Duration::from_secs(120);

/// Doubling delays with jitter, so that the nodes of a cluster do not come back all at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
    last_failure: Option<Instant>,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first, last_failure: None }
    }

    /// Something worked.
    pub(crate) const fn reset(&mut self) {
        self.next = self.first;
    }

    /// Something failed at `now`: how long to wait. Between half the delay and all of it.
    pub(crate) fn delay(&mut self, now: Instant) -> Duration {
        if self.last_failure.is_some_and(|last| now.duration_since(last) > FORGET + self.longest) {
            self.reset();
        }
        self.last_failure = Some(now);
        let delay = self.next.min(self.longest);
        self.next = delay.saturating_mul(2).min(self.longest);
        between(delay / 2, delay)
    }
}

/// A random duration of `low..=high`.
pub(crate) fn between(low: Duration, high: Duration) -> Duration {
    let span = u64::try_from(high.saturating_sub(low).as_nanos()).unwrap_or(u64::MAX);
    low + Duration::from_nanos(random() % span.saturating_add(1).max(1))
}

/// Differs from call to call; good enough to spread load.
fn random() -> u64 {
    // Every RandomState has keys of its own.
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_start_over_after_success() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(350));
        let now = Instant::now();
        for most in [100, 200, 350, 350] {
            let delay = backoff.delay(now);
            assert!(delay >= ms(most) / 2 && delay <= ms(most), "{delay:?} of {most}");
        }
        backoff.reset();
        assert!(backoff.delay(now) <= ms(100));
    }

    #[test]
    fn old_failures_are_forgotten() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let now = Instant::now();
        for _ in 0..5 {
            backoff.delay(now);
        }
        assert!(backoff.delay(now + Duration::from_secs(151)) <= Duration::from_secs(1));
    }
}

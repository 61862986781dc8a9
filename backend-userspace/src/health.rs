//! What connecting to an endpoint teaches about it.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Failures in a row after which an endpoint is left alone for a while.
const PATIENCE: u32 = 2;
/// The first while; each further failure doubles it.
const FIRST_REST: Duration = Duration::from_secs(1);
/// The longest while.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The health of an endpoint, as seen from here.
#[derive(Debug)]
pub(crate) struct Health {
    born: Instant,
    /// Failures in a row.
    failures: AtomicU32,
    /// Milliseconds after `born` until which it is left alone; 0 when it is not.
    rests_until_ms: AtomicU64,
}

/// What an attempt changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Turn {
    /// It answers again.
    Recovers,
    /// It begins to be left alone.
    Sickens,
    /// Nothing.
    Stays,
}

impl Health {
    pub(crate) fn new(now: Instant) -> Self {
        Self { born: now, failures: AtomicU32::new(0), rests_until_ms: AtomicU64::new(0) }
    }

    /// It is left alone for so long; `None` when it is not.
    pub(crate) fn rests_for(&self, now: Instant) -> Option<Duration> {
        let until_ms = self.rests_until_ms.load(Relaxed);
        if until_ms == 0 {
            return None;
        }
        let until = self.born + Duration::from_millis(until_ms);
        until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    pub(crate) fn failed(&self, now: Instant) -> Turn {
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        let Some(beyond) = failures.checked_sub(PATIENCE) else { return Turn::Stays };
        let rest = FIRST_REST.saturating_mul(1 << beyond.min(16)).min(LONGEST_REST);
        let until = now.saturating_duration_since(self.born) + rest;
        self.rests_until_ms.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Relaxed);
        if beyond == 0 { Turn::Sickens } else { Turn::Stays }
    }

    pub(crate) fn succeeded(&self) -> Turn {
        // Reading first keeps the line shared while all is well.
        if self.failures.load(Relaxed) == 0 || self.failures.swap(0, Relaxed) < PATIENCE {
            return Turn::Stays;
        }
        self.rests_until_ms.store(0, Relaxed);
        Turn::Recovers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_keeps_refusing_is_left_alone_for_longer_and_longer() {
        let now = Instant::now();
        let health = Health::new(now);
        assert_eq!((health.failed(now), health.rests_for(now)), (Turn::Stays, None));
        assert_eq!(health.failed(now), Turn::Sickens);
        assert_eq!(health.rests_for(now), Some(FIRST_REST));
        assert_eq!(health.rests_for(now + FIRST_REST), None);
        assert_eq!(health.failed(now), Turn::Stays);
        assert_eq!(health.rests_for(now), Some(FIRST_REST * 2));
        for _ in 0..40 {
            health.failed(now);
        }
        assert_eq!(health.rests_for(now), Some(LONGEST_REST));
        assert_eq!((health.succeeded(), health.rests_for(now)), (Turn::Recovers, None));
        assert_eq!(health.succeeded(), Turn::Stays);
        assert_eq!((health.failed(now), health.succeeded()), (Turn::Stays, Turn::Stays));
    }
}

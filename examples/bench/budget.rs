//! Time that is left.

use std::time::{Duration, Instant};

/// A stretch of time for everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    began: Instant,
    total: Duration,
}

impl Budget {
    pub(crate) fn new(total: Duration) -> Self {
        Self { began: Instant::now(), total }
    }

    pub(crate) fn spent(&self) -> Duration {
        self.began.elapsed()
    }

    pub(crate) fn left(&self) -> Duration {
        self.total.saturating_sub(self.spent())
    }
}

//! Waiting for a condition, with a deadline and a reason.

use std::future::Future;
use std::time::{Duration, Instant};

/// First pause between two looks at a condition; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_micros(200);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// A condition did not come true in time.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("waited {waited:?} in vain for: {what}")]
#[non_exhaustive]
pub struct Overdue {
    /// What was being waited for.
    pub what: String,
    /// How long.
    pub waited: Duration,
}

/// Looks at `condition` until it is true and returns how long that took.
///
/// The condition is looked at once at least, and once more at the deadline. Blocks the thread.
///
/// # Errors
///
/// [`Overdue`] after `deadline`; it names `what`.
pub fn eventually(
    deadline: Duration,
    what: &str,
    mut condition: impl FnMut() -> bool,
) -> Result<Duration, Overdue> {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let late = started.elapsed() >= deadline;
        if condition() {
            return Ok(started.elapsed());
        }
        if late {
            return Err(Overdue { what: what.to_owned(), waited: started.elapsed() });
        }
        std::thread::sleep(pause.min(deadline.saturating_sub(started.elapsed())));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// As [`eventually`], for a condition that has to be awaited. Needs a tokio runtime with time.
///
/// # Errors
///
/// [`Overdue`] after `deadline`. A look that is under way at the deadline is finished first.
///
/// # Cancel safety
///
/// Safe: nothing is held between two looks.
pub async fn eventually_async<F: Future<Output = bool>>(
    deadline: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) -> Result<Duration, Overdue> {
    let started = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let late = started.elapsed() >= deadline;
        if condition().await {
            return Ok(started.elapsed());
        }
        if late {
            return Err(Overdue { what: what.to_owned(), waited: started.elapsed() });
        }
        tokio::time::sleep(pause.min(deadline.saturating_sub(started.elapsed()))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_true_condition_needs_no_time_at_all() {
        assert!(eventually(Duration::ZERO, "nothing", || true).is_ok());
    }

    #[test]
    fn an_overdue_condition_says_what_it_was() {
        let overdue = eventually(Duration::ZERO, "the sun to rise", || false).unwrap_err();
        assert_eq!(overdue.what, "the sun to rise");
    }
}

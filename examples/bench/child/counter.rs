//! Instructions, where the machine counts them.

use perf_event::{Builder, Counter, events::Hardware};

/// Counts the instructions of this thread, those in the kernel included.
pub(super) struct Instructions(Option<Counter>);

impl Instructions {
    /// Virtual machines often have no such counter.
    pub(super) fn open() -> Self {
        Self(Builder::new(Hardware::INSTRUCTIONS).include_kernel().build().ok())
    }

    pub(super) fn begin(&mut self) {
        if let Some(counter) = &mut self.0
            && (counter.reset().is_err() || counter.enable().is_err())
        {
            self.0 = None;
        }
    }

    /// Instructions since [`begin`](Self::begin).
    pub(super) fn end(&mut self) -> Option<f64> {
        let counter = self.0.as_mut()?;
        counter.disable().ok()?;
        #[expect(clippy::cast_precision_loss, reason = "a statistic")]
        counter.read().ok().map(|count| count as f64)
    }
}

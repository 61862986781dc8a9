//! Many questions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::probe::{ask_once, ended};
use super::{Answer, Failure, Outcome, ProbeSpec, Rejection};
use crate::lab::Ns;

/// How long [`probe_many`] goes on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Many {
    /// Questions at most.
    pub count: usize,
    /// Questions under way at the same time, at least 1.
    pub parallel: usize,
    /// No question is begun after this; those under way are finished.
    pub deadline: Duration,
    /// Stop early when all of these endpoints have answered. Empty: do not stop early.
    pub until: BTreeSet<String>,
}

impl Many {
    /// This many questions, 16 at a time, all begun within 10 s.
    pub fn new(count: usize) -> Self {
        let deadline = Duration::from_secs(10);
        Self { count, parallel: 16, deadline, until: BTreeSet::new() }
    }

    /// Asks so many at the same time.
    pub fn parallel(self, parallel: usize) -> Self {
        Self { parallel: parallel.max(1), ..self }
    }

    /// Stops early when each of these endpoints has answered once.
    pub fn until_seen<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { until: names.into_iter().map(Into::into).collect(), ..self }
    }

    /// Begins no question after this time.
    pub fn within(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }
}

/// What became of many questions.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Tally {
    /// Answers by endpoint name.
    pub answered: BTreeMap<String, EndpointTally>,
    /// Rejections by kind and sender.
    pub rejected: BTreeMap<Rejection, u64>,
    /// Questions without any reply (dropped).
    pub silent: u64,
    /// Connections that were established and never answered.
    pub mute: u64,
    /// Questions that could not be asked, or whose answer makes no sense.
    pub failed: BTreeMap<Failure, u64>,
    /// Times to connect, of answered questions (UDP: to answer).
    pub connect: Latencies,
    /// From the first question to the last outcome.
    pub elapsed: Duration,
    /// Why it ended.
    pub stopped: Stopped,
}

/// The answers of one endpoint.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct EndpointTally {
    /// Answers.
    pub count: u64,
    /// Answers that saw the asking address and port.
    pub source_kept: u64,
    /// Answers that saw another address or port: masqueraded.
    pub source_changed: u64,
    /// Source addresses seen.
    pub seen: BTreeSet<IpAddr>,
    /// Addresses the questions arrived at.
    pub reached_at: BTreeSet<SocketAddr>,
}

/// Why [`probe_many`] ended.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Stopped {
    /// All questions were asked.
    #[default]
    Count,
    /// The time was up.
    Deadline,
    /// All expected endpoints had answered.
    Seen,
}

/// Times, sorted, shortest first.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    /// The time that `percent` of all are not longer than; `None` without any. 50 is the median,
    /// 100 the longest.
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        let last = self.0.len().checked_sub(1)?;
        let rank = (self.0.len() * usize::from(percent)).div_ceil(100).saturating_sub(1);
        self.0.get(rank.min(last)).copied()
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Tally {
    /// Names of the endpoints that answered.
    pub fn names(&self) -> BTreeSet<&str> {
        self.answered.keys().map(String::as_str).collect()
    }

    /// Answers of one endpoint; 0 when it never answered.
    pub fn count(&self, name: &str) -> u64 {
        self.answered.get(name).map_or(0, |endpoint| endpoint.count)
    }

    /// All answers.
    pub fn answers(&self) -> u64 {
        self.answered.values().map(|endpoint| endpoint.count).sum()
    }

    /// All rejections.
    pub fn rejects(&self) -> u64 {
        self.rejected.values().sum()
    }

    /// All outcomes.
    pub fn total(&self) -> u64 {
        let failed: u64 = self.failed.values().sum();
        self.answers() + self.rejects() + self.silent + self.mute + failed
    }

    /// All source addresses that endpoints saw.
    pub fn seen(&self) -> BTreeSet<IpAddr> {
        self.answered.values().flat_map(|endpoint| endpoint.seen.iter().copied()).collect()
    }

    fn add(&mut self, outcome: Outcome, connect: &mut Vec<Duration>) {
        match outcome {
            Outcome::Answered(answer) => {
                connect.push(answer.connect);
                self.answered.entry(answer.by.clone()).or_default().add(&answer);
            }
            Outcome::Failed(failure) => *self.failed.entry(failure).or_default() += 1,
            Outcome::Rejected(rejection) => *self.rejected.entry(rejection).or_default() += 1,
            Outcome::Silent { connected: true } => self.mute += 1,
            Outcome::Silent { connected: false } => self.silent += 1,
        }
    }
}

impl EndpointTally {
    fn add(&mut self, answer: &Answer) {
        self.count += 1;
        *(if answer.source_kept() { &mut self.source_kept } else { &mut self.source_changed }) += 1;
        self.seen.insert(answer.seen.ip());
        self.reached_at.insert(answer.reached_at);
    }
}

impl fmt::Display for Tally {
    /// One line: `pod_a 498, pod_b 502, silent 3 (1003 in 312ms)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, endpoint) in &self.answered {
            write!(f, "{name} {}, ", endpoint.count)?;
        }
        for (rejection, count) in &self.rejected {
            write!(f, "{rejection} {count}, ")?;
        }
        for (failure, count) in &self.failed {
            write!(f, "{failure} {count}, ")?;
        }
        for (what, count) in [("silent", self.silent), ("mute", self.mute)] {
            if count > 0 {
                write!(f, "{what} {count}, ")?;
            }
        }
        write!(f, "{} in {:?}", self.total(), self.elapsed)
    }
}

/// Asks again and again, each time from a new socket, and counts what becomes of it.
///
/// # Cancel safety
///
/// Safe: sockets are closed when the future is dropped.
pub async fn probe_many(ns: &Ns, spec: &ProbeSpec, many: &Many) -> Tally {
    let (spec, many) = (spec.clone(), many.clone());
    ns.exec(async move { ask_many(&spec, &many).await }).await.unwrap_or_else(|error| {
        let mut tally = Tally::default();
        tally.add(ended(error).into(), &mut Vec::new());
        tally
    })
}

/// Runs in the namespace, with `parallel` tasks that each ask one question after another.
async fn ask_many(spec: &ProbeSpec, many: &Many) -> Tally {
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut connect = Vec::new();
    let mut unseen = many.until.clone();
    let mut asking = JoinSet::new();
    let mut finished = VecDeque::new();
    let mut asked = 0;
    loop {
        let seen = !many.until.is_empty() && unseen.is_empty();
        let late = started.elapsed() >= many.deadline;
        while !seen && !late && asked < many.count && asking.len() < many.parallel {
            let spec = spec.clone();
            asking.spawn(async move { ask_once(&spec).await });
            asked += 1;
        }
        tally.stopped = match (seen, late && asked < many.count) {
            (true, _) => Stopped::Seen,
            (false, true) => Stopped::Deadline,
            (false, false) => Stopped::Count,
        };
        let Some(next) = asking.join_next().await else { break };
        // A question does not panic, and nothing aborts it.
        finished.extend(next.ok());
        finished.extend(std::iter::from_fn(|| asking.try_join_next()).filter_map(Result::ok));
        for outcome in finished.drain(..) {
            unseen.remove(outcome.by().unwrap_or_default());
            tally.add(outcome, &mut connect);
        }
    }
    connect.sort_unstable();
    tally.connect = Latencies(connect);
    tally.elapsed = started.elapsed();
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_occurred() {
        let times = Latencies((1..=10).map(Duration::from_millis).collect());
        assert_eq!(times.percentile(50), Some(Duration::from_millis(5)));
        assert_eq!(times.percentile(99), Some(Duration::from_millis(10)));
        assert_eq!(times.percentile(0), Some(Duration::from_millis(1)));
        assert_eq!(Latencies::default().percentile(50), None);
    }
}

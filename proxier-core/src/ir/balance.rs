//! How connections are spread over the members of a pool.

use std::{fmt, str::FromStr};

use serde::Serialize;

/// The highest weight of an endpoint.
pub const MAX_WEIGHT: u16 = 1000;

/// How new connections are spread over the members of a pool. Weights hold for all of them.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Balance {
    /// The mode's own way, which is random in most.
    #[default]
    Default,
    /// At random.
    Random,
    /// One after the other.
    RoundRobin,
    /// By source address: a client keeps its endpoint, without any memory, as long as the pool stays
    /// the same, and most clients keep theirs when it changes.
    SourceHash,
}

impl Balance {
    /// The name used in annotations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::SourceHash => "source-hash",
        }
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Balance {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = [Self::Random, Self::RoundRobin, Self::SourceHash];
        named.into_iter().find(|it| it.name() == text).ok_or(())
    }
}

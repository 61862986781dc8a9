//! Durations as Go prints and reads them.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration such as `30s`, `1h0m5s` or `250ms`.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct GoDuration(pub(crate) Duration);

impl GoDuration {
    pub(crate) const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Takes the place of a zero, which means "not set" in configuration files.
    pub(crate) const fn or_seconds(self, seconds: u64) -> Self {
        if self.0.is_zero() { Self::seconds(seconds) } else { self }
    }
}

const UNITS: [(&str, f64); 7] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("µs", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3600.0),
];

impl FromStr for GoDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a duration such as 30s or 1h30m");
        if text == "0" {
            return Ok(Self::default());
        }
        if text.starts_with('-') {
            return Err(format!("{text:?} is negative"));
        }
        let (mut rest, mut seconds) = (text, 0.0);
        while !rest.is_empty() {
            let end = rest.find(|it: char| !it.is_ascii_digit() && it != '.').ok_or_else(bad)?;
            let (number, tail) = rest.split_at(end);
            let unit_end = tail.find(|it: char| it.is_ascii_digit()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_end);
            let scale = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?.1;
            seconds += number.parse::<f64>().map_err(|_not_a_number| bad())? * scale;
            rest = tail;
        }
        if text.is_empty() {
            return Err(bad());
        }
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|_too_large| bad())
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, fraction) = (self.0.as_secs(), self.0.subsec_nanos());
        if seconds == 0 && fraction > 0 {
            return write!(f, "{}ms", self.0.as_secs_f64() * 1e3);
        }
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{}s", (seconds % 60) as f64 + f64::from(fraction) / 1e9)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_printed_as_go_does() {
        for (text, printed) in [
            ("30s", "30s"),
            ("1h", "1h0m0s"),
            ("90s", "1m30s"),
            ("1.5s", "1.5s"),
            ("0", "0s"),
            ("250ms", "250ms"),
        ] {
            assert_eq!(text.parse::<GoDuration>().unwrap().to_string(), printed);
        }
        for bad in ["", "30", "s", "1x", "-1s", "1..2s"] {
            assert!(bad.parse::<GoDuration>().is_err(), "{bad}");
        }
    }
}

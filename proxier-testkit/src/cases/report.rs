//! What became of a case.

use std::fmt;

use proxier_core::Mode;
use serde_json::{Value, json};

use super::{Case, Deviation};

/// What became of a case.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Verdict {
    /// It came out otherwise.
    Failed {
        /// What the case says.
        expected: String,
        /// What happened.
        actual: String,
        /// What may help: the kernel's rules, the plan, how to look around.
        detail: String,
    },
    /// It says nothing about this mode or this build.
    NotApplicable {
        /// Why.
        reason: String,
    },
    /// It came out as the case says, or as a deliberate deviation says.
    Passed {
        /// The deviation.
        deviation: Option<&'static Deviation>,
    },
}

impl Verdict {
    pub(super) const PASSED: Self = Self::Passed { deviation: None };

    #[expect(clippy::needless_pass_by_value, reason = "texts are made on the spot")]
    pub(super) fn failed(expected: impl ToString, actual: impl ToString) -> Self {
        let (expected, actual) = (expected.to_string(), actual.to_string());
        Self::Failed { expected, actual, detail: String::new() }
    }

    pub(super) fn not_applicable(reason: impl Into<String>) -> Self {
        Self::NotApplicable { reason: reason.into() }
    }

    /// Compares what is asserted with what is there: of mappings, the keys that are asserted.
    pub(super) fn compare(expected: &Value, actual: &Value) -> Self {
        if holds(expected, actual) { Self::PASSED } else { Self::failed(expected, actual) }
    }
}

fn holds(expected: &Value, actual: &Value) -> bool {
    match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => expected
            .iter()
            .all(|(key, value)| actual.get(key).is_some_and(|actual| holds(value, actual))),
        _ => expected == actual,
    }
}

/// A case and what became of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report<'a> {
    /// The case.
    pub case: &'a Case,
    /// The mode it was run in, for cases that depend on it.
    pub mode: Option<Mode>,
    /// What became of it.
    pub verdict: Verdict,
}

impl<'a> Report<'a> {
    /// A report.
    pub const fn new(case: &'a Case, mode: Option<Mode>, verdict: Verdict) -> Self {
        Self { case, mode, verdict }
    }

    /// The report as a JSON object.
    pub fn to_json(&self) -> Value {
        let Case { id, line, topic, kind, name, .. } = self.case;
        let mut object = json!({
            "id": id, "line": line, "topic": topic, "kind": kind, "name": name,
            "mode": self.mode.map(Mode::name),
        });
        let outcome = match &self.verdict {
            Verdict::Failed { expected, actual, detail } => json!({
                "verdict": "failed", "expected": expected, "actual": actual, "detail": detail,
            }),
            Verdict::NotApplicable { reason } => {
                json!({"verdict": "not applicable", "reason": reason})
            }
            Verdict::Passed { deviation } => json!({
                "verdict": "passed", "deviation": deviation.map(|it| it.id),
            }),
        };
        if let (Value::Object(object), Value::Object(outcome)) = (&mut object, outcome) {
            object.extend(outcome);
        }
        object
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { id, kind, name, .. } = self.case;
        let mode = self.mode.map_or_else(String::new, |mode| format!(" {mode}"));
        match &self.verdict {
            Verdict::Failed { expected, actual, detail } => {
                write!(f, "FAILED {id} {kind}{mode}: {name}: expected {expected}, got {actual}")?;
                if detail.is_empty() { Ok(()) } else { write!(f, "\n{}", detail.trim_end()) }
            }
            Verdict::NotApplicable { reason } => {
                write!(f, "not applicable {id} {kind}{mode}: {name}: {reason}")
            }
            Verdict::Passed { deviation: Some(it) } => {
                write!(f, "passed {id} {kind}{mode}: {name} (deviation {}: {})", it.id, it.title)
            }
            Verdict::Passed { deviation: None } => write!(f, "passed {id} {kind}{mode}: {name}"),
        }
    }
}

/// How many cases came out how.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// As they should.
    pub passed: usize,
    /// Otherwise.
    pub failed: usize,
    /// Not at all.
    pub not_applicable: usize,
}

impl Summary {
    /// Counts one more.
    pub const fn count(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Failed { .. } => self.failed += 1,
            Verdict::NotApplicable { .. } => self.not_applicable += 1,
            Verdict::Passed { .. } => self.passed += 1,
        }
    }

    /// The summary as a JSON object.
    pub fn to_json(&self) -> Value {
        let Self { passed, failed, not_applicable } = self;
        json!({"passed": passed, "failed": failed, "not_applicable": not_applicable})
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, not_applicable } = self;
        write!(f, "{passed} passed, {failed} failed, {not_applicable} not applicable")
    }
}

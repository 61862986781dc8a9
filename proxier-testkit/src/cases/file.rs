//! Reading a file of cases.

use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// The schema that is understood.
const SCHEMA: &str = "svcproxy-cases/1";

/// A file of cases.
#[derive(Clone, Debug)]
pub struct CaseFile {
    pub(super) nodes: Map<String, Value>,
    pub(super) sources: Map<String, Value>,
    pub(super) config_defaults: Value,
    pub(super) worlds: Map<String, Value>,
    cases: Vec<Case>,
}

/// One case.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Case {
    /// Stable number.
    pub id: u64,
    /// Line in the file.
    pub line: usize,
    /// Group.
    pub topic: String,
    /// What sort of case.
    pub kind: String,
    /// What is expected, in words.
    pub name: String,
    /// The result copies a peculiarity of kube-proxy.
    pub quirk: bool,
    /// Everything else.
    pub(super) body: Map<String, Value>,
}

/// A file of cases, or a case, cannot be understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// A case has a part that cannot be understood.
    #[error("case {id} (line {line}): {part}: {reason}")]
    Case {
        /// Its number.
        id: u64,
        /// Its line.
        line: usize,
        /// Which part.
        part: String,
        /// Why.
        reason: String,
    },
    /// The file cannot be understood.
    #[error("{0}")]
    File(String),
}

#[derive(Deserialize)]
struct Raw {
    schema: String,
    #[serde(default)]
    nodes: Map<String, Value>,
    #[serde(default)]
    sources: Map<String, Value>,
    #[serde(default)]
    config_defaults: Value,
    #[serde(default)]
    worlds: Map<String, Value>,
    cases: Vec<Value>,
}

#[derive(Deserialize)]
struct Head {
    id: u64,
    #[serde(default)]
    topic: String,
    kind: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    quirk: Value,
}

impl CaseFile {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`CaseError`] names the line or the case that cannot be understood. A case that is only wrong
    /// in itself is reported when it is run.
    pub fn parse(text: &str) -> Result<Self, CaseError> {
        let raw: Raw = yaml_serde::from_str(text).map_err(|e| CaseError::File(e.to_string()))?;
        if raw.schema != SCHEMA {
            let message = format!("schema {:?}: only {SCHEMA} is understood", raw.schema);
            return Err(CaseError::File(message));
        }
        let lines = lines_of_cases(text);
        let mut cases = Vec::with_capacity(raw.cases.len());
        for (index, value) in raw.cases.into_iter().enumerate() {
            let nth =
                |reason: String| CaseError::File(format!("case number {}: {reason}", index + 1));
            let Value::Object(body) = value else {
                return Err(nth("not a mapping".to_owned()));
            };
            let head = Head::deserialize(Value::Object(body.clone()));
            let head = head.map_err(|error| nth(error.to_string()))?;
            let line = lines.get(&head.id).copied().unwrap_or_default();
            if let Some(twin) = cases.iter().find(|case: &&Case| case.id == head.id) {
                return Err(nth(format!("id {} is taken by line {}", head.id, twin.line)));
            }
            let Head { id, topic, kind, name, quirk } = head;
            let quirk = !matches!(quirk, Value::Null | Value::Bool(false));
            cases.push(Case { id, line, topic, kind, name, quirk, body });
        }
        let Raw { nodes, sources, config_defaults, worlds, .. } = raw;
        Ok(Self { nodes, sources, config_defaults, worlds, cases })
    }

    /// The cases, in the order of the file.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }
}

impl Case {
    /// A part of the case, as it is written; `null` when it is missing.
    pub fn part(&self, part: &str) -> &Value {
        self.get(part)
    }

    pub(super) fn get(&self, part: &str) -> &Value {
        self.body.get(part).unwrap_or(&Value::Null)
    }

    /// A part of the case; an error when it is missing or has another form.
    pub(super) fn read<T: DeserializeOwned>(&self, part: &str) -> Result<T, CaseError> {
        let value = self.body.get(part);
        let value = value.ok_or_else(|| self.wrong(part, "it is missing"))?;
        T::deserialize(value).map_err(|error| self.wrong(part, error))
    }

    /// As [`read`](Self::read), with a default for what is missing or null.
    pub(super) fn read_or<T: DeserializeOwned>(
        &self,
        part: &str,
        default: T,
    ) -> Result<T, CaseError> {
        let value = self.get(part);
        if value.is_null() {
            return Ok(default);
        }
        T::deserialize(value).map_err(|error| self.wrong(part, error))
    }

    #[expect(clippy::needless_pass_by_value, reason = "errors are made on the spot")]
    pub(super) fn wrong(&self, part: &str, reason: impl ToString) -> CaseError {
        CaseError::Case {
            id: self.id,
            line: self.line,
            part: part.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// The lines on which cases begin. Every case is one physical line, which begins with its id.
fn lines_of_cases(text: &str) -> BTreeMap<u64, usize> {
    let id_of = |line: &str| {
        let item = line.trim_start().strip_prefix('-')?.trim_start();
        let inside = item.strip_prefix('{').unwrap_or(item).trim_start();
        let rest = inside.strip_prefix("id:")?.trim_start();
        let digits = rest.split(|it: char| !it.is_ascii_digit()).next()?;
        digits.parse().ok()
    };
    let mut lines = BTreeMap::new();
    for (line, number) in text.lines().zip(1..) {
        if let Some(id) = id_of(line) {
            lines.entry(id).or_insert(number);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_knows_its_line() {
        let text =
            "schema: svcproxy-cases/1\ncases:\n\n# a comment\n- {id: 7, kind: flow, name: x}\n";
        let file = CaseFile::parse(text).unwrap();
        let case = file.cases().first().unwrap();
        assert_eq!((case.id, case.line), (7, 5));
        let error = case.read::<String>("dst").unwrap_err();
        assert_eq!(error.to_string(), "case 7 (line 5): dst: it is missing");
    }

    #[test]
    fn nonsense_is_named() {
        let error = |text| CaseFile::parse(text).unwrap_err().to_string();
        assert!(error("schema: other/2\ncases: []").contains("other/2"));
        assert!(error("schema: svcproxy-cases/1\ncases: [{kind: flow}]").contains("`id`"));
        let twice = "schema: svcproxy-cases/1\ncases:\n- {id: 1, kind: a}\n- {id: 1, kind: b}";
        assert!(error(twice).contains("taken by line 3"));
        assert!(error("schema: [").contains("line"));
    }
}

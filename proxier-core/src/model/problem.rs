//! What is wrong with an input, and where.

use std::fmt;

use serde::Serialize;

/// One thing wrong with one object: which object, which field, what, and so what.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Problem {
    /// Kind and name, for instance `Service shop/cart`.
    pub object: String,
    /// Path of the field, for instance `spec.ports[1].port`; empty for the whole object.
    pub field: String,
    /// What is wrong and what was done about it.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// The outcome of reading an object: what could be used, and what could not.
///
/// Reading is lenient as kube-proxy is: a bad field costs that field, and only what makes the
/// object meaningless costs the object.
#[derive(Clone, Debug)]
pub struct Read<T> {
    /// The object. `None` when it is refused, or not meant for a proxier; whoever held an earlier
    /// version of it must then drop that one.
    pub value: Option<T>,
    /// Everything that was skipped or refused.
    pub problems: Vec<Problem>,
}

/// Collects the problems of one object.
pub(crate) struct Checker {
    object: String,
    problems: Vec<Problem>,
}

/// Longest name the API accepts for anything a proxier reads (a DNS subdomain).
// K8S: apimachinery pkg/util/validation, DNS1123SubdomainMaxLength, v1.36.
const MAX_NAME_BYTES: usize = 253;

impl Checker {
    pub(crate) fn new(kind: &str, namespace: &str, name: &str) -> Self {
        let object = match (namespace, name) {
            ("", "") => kind.to_owned(),
            ("", name) => format!("{kind} {}", shortened(name)),
            (namespace, name) => format!("{kind} {}/{}", shortened(namespace), shortened(name)),
        };
        Self { object, problems: Vec::new() }
    }

    pub(crate) fn report(&mut self, field: impl Into<String>, message: impl Into<String>) {
        let (field, message) = (field.into(), message.into());
        self.problems.push(Problem { object: self.object.clone(), field, message });
    }

    /// Says whether `name` can be used, and reports it when it cannot.
    pub(crate) fn name(&mut self, field: &str, name: &str) -> bool {
        if name.is_empty() {
            self.report(field, "missing: the object is ignored");
        } else if name.len() > MAX_NAME_BYTES {
            let length = name.len();
            self.report(
                field,
                format!("{length} characters, at most {MAX_NAME_BYTES}: the object is ignored"),
            );
        } else if !is_dns_like(name) {
            self.report(field, format!("{name:?} is not a DNS name: the object is ignored"));
        } else {
            return true;
        }
        false
    }

    pub(crate) fn done<T>(self, value: Option<T>) -> Read<T> {
        Read { value, problems: self.problems }
    }
}

/// Says whether `text` holds only what names in the API hold: nothing that could break a comment,
/// a log line or a table.
pub(crate) fn is_dns_like(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", name.get(..end).unwrap_or_default()),
        None => name.to_owned(),
    }
}

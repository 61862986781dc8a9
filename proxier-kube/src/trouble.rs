//! What can be wrong between here and the API server, in words that say what to do.

use std::{error::Error, fmt, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::kinds::Kind;

/// What rustls says of a server's certificate that it does not trust, and when a server does not
/// trust ours.
const NOT_TRUSTED: &str = "invalid peer certificate";
const NOT_ACCEPTED: &str = "received fatal alert";

/// Longest text of a server that is repeated.
const MAX_QUOTE: usize = 300;

/// What sort of trouble it is.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[non_exhaustive]
pub enum TroubleKind {
    /// The server no longer knows the version that was asked for (410). Heals by a new list.
    Expired,
    /// The server forbids the verb (403): RBAC.
    Forbidden,
    /// The server's answer cannot be read.
    Garbled,
    /// The server does not serve this kind of object (404).
    NotServed,
    /// The server does not like the request.
    Refused,
    /// The server failed (5xx).
    Server,
    /// A watch said nothing for too long: neither event nor bookmark.
    Stalled,
    /// The server asks for patience (429).
    Throttled,
    /// The server did not answer in time.
    TimedOut,
    /// The server does not accept the credentials (401), or there are none.
    Unauthorized,
    /// No connection to the server, or it broke.
    Unreachable,
}

impl TroubleKind {
    /// A short name for metrics: `forbidden`, `timed-out`, …
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Forbidden => "forbidden",
            Self::Garbled => "garbled",
            Self::NotServed => "not-served",
            Self::Refused => "refused",
            Self::Server => "server-error",
            Self::Stalled => "stalled",
            Self::Throttled => "throttled",
            Self::TimedOut => "timed-out",
            Self::Unauthorized => "unauthorized",
            Self::Unreachable => "unreachable",
        }
    }
}

impl fmt::Display for TroubleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something could not be asked of the API server, or it did not answer well.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("cannot {verb} {target}: {message}")]
#[non_exhaustive]
pub struct Trouble {
    /// What sort.
    pub kind: TroubleKind,
    /// The verb as RBAC names it: `list`, `watch`, `create`, `patch`.
    pub verb: &'static str,
    /// The resource with its group, as kubectl names it.
    pub target: String,
    /// What is wrong and what to do about it.
    pub message: String,
    /// How long the server asks to wait.
    #[serde(skip)]
    pub(crate) retry_after: Option<Duration>,
}

/// What is being asked, for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) verb: &'static str,
    pub(crate) resource: &'static str,
    pub(crate) group: &'static str,
}

impl Asked {
    pub(crate) const fn of(kind: Kind, verb: &'static str) -> Self {
        Self { verb, resource: kind.resource(), group: kind.group() }
    }

    pub(crate) fn trouble(self, kind: TroubleKind, message: impl Into<String>) -> Trouble {
        let Self { verb, resource, group } = self;
        let target =
            if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
        Trouble { kind, verb, target, message: message.into(), retry_after: None }
    }

    /// The client could not get an answer at all.
    pub(crate) fn client(self, error: &kube::Error) -> Trouble {
        // Its own text only says that it is one.
        let text = if let kube::Error::Service(cause) = error {
            in_full(&**cause)
        } else {
            in_full(error)
        };
        let (kind, message) = if matches!(error, kube::Error::Auth(_)) {
            (
                TroubleKind::Unauthorized,
                format!("no usable credentials: {text}: check the kubeconfig's user"),
            )
        } else if text.contains(NOT_TRUSTED) {
            (
                TroubleKind::Unreachable,
                format!(
                    "{text}: it was not issued by the certificate-authority of the kubeconfig's cluster, or not for \
                     this address"
                ),
            )
        } else if text.contains(NOT_ACCEPTED) {
            (
                TroubleKind::Unauthorized,
                format!("{text}: check the client certificate of the kubeconfig's user"),
            )
        } else {
            (
                TroubleKind::Unreachable,
                format!("{text}: check the server's address and the network"),
            )
        };
        self.trouble(kind, message)
    }

    /// The connection broke while the answer was coming in.
    pub(crate) fn broken(self, error: &std::io::Error) -> Trouble {
        let text = in_full(error);
        self.trouble(TroubleKind::Unreachable, format!("the connection broke: {text}"))
    }

    /// The server said no.
    pub(crate) fn status(self, code: StatusCode, body: &str, retry_after: Option<u64>) -> Trouble {
        let status: Status = serde_json::from_str(body).unwrap_or_default();
        let said = if status.message.is_empty() { quote(body) } else { quote(&status.message) };
        let seconds = status.details.retry_after_seconds.filter(|it| *it > 0).or(retry_after);
        let Self { verb, resource, group } = self;
        // K8S: the version is one the server has yet to reach, for instance because its storage was
        // restored (storage/errors.go NewTooLargeResourceVersionError). Waiting may take for ever.
        let too_large =
            status.details.causes.iter().any(|it| it.reason == "ResourceVersionTooLarge");
        let (kind, message) = match code.as_u16() {
            _ if too_large => (TroubleKind::Expired, format!("not a version of now: {said}")),
            401 => (
                TroubleKind::Unauthorized,
                format!("the server does not accept the credentials (expired token?): {said}"),
            ),
            403 => (
                TroubleKind::Forbidden,
                format!(
                    "forbidden: grant verb {verb:?} on resource {resource:?} in API group {group:?}: {said}"
                ),
            ),
            404 => (TroubleKind::NotServed, format!("the server does not have it: {said}")),
            410 => (TroubleKind::Expired, format!("expired: {said}")),
            429 => (TroubleKind::Throttled, format!("the server asks for patience: {said}")),
            500.. => (TroubleKind::Server, format!("the server failed ({code}): {said}")),
            _ => (TroubleKind::Refused, format!("the server refuses ({code}): {said}")),
        };
        // A server that asks for hours would leave the node behind for hours.
        let retry_after = seconds.map(|it| Duration::from_secs(it.min(60)));
        Trouble { retry_after, ..self.trouble(kind, message) }
    }
}

/// The parts of a `v1` Status that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    pub(crate) message: String,
    pub(crate) code: u16,
    details: Details,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Details {
    retry_after_seconds: Option<u64>,
    causes: Vec<Cause>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Cause {
    reason: String,
}

/// An error with its causes, in one line, without what the causes repeat.
pub(crate) fn in_full(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Text of a server in one line of bounded length.
fn quote(text: &str) -> String {
    let line: String = text
        .trim()
        .chars()
        .map(|it| if it.is_control() { ' ' } else { it })
        .take(MAX_QUOTE)
        .collect();
    if line.is_empty() { "no reason given".to_owned() } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: Asked = Asked::of(Kind::EndpointSlices, "list");

    #[test]
    fn a_missing_verb_is_named() {
        let body = r#"{"kind":"Status","message":"endpointslices is forbidden","code":403}"#;
        let trouble = LIST.status(StatusCode::FORBIDDEN, body, None);
        assert_eq!(
            trouble.to_string(),
            "cannot list endpointslices.discovery.k8s.io: forbidden: grant verb \"list\" on resource \
             \"endpointslices\" in API group \"discovery.k8s.io\": endpointslices is forbidden"
        );
        assert_eq!(trouble.kind, TroubleKind::Forbidden);
    }

    #[test]
    fn the_server_is_given_the_time_it_asks_for_within_reason() {
        let after = |body: &str, header| {
            LIST.status(StatusCode::TOO_MANY_REQUESTS, body, header).retry_after
        };
        assert_eq!(after("Too many requests\n", Some(7)), Some(Duration::from_secs(7)));
        let body = r#"{"message":"later","details":{"retryAfterSeconds":3}}"#;
        assert_eq!(after(body, Some(7)), Some(Duration::from_secs(3)));
        assert_eq!(after("", Some(86_400)), Some(Duration::from_secs(60)));
        assert_eq!(after("", None), None);
    }
}

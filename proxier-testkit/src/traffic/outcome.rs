//! What became of a question.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

/// A transport protocol that Services know.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[expect(
    clippy::exhaustive_enums,
    reason = "Kubernetes has these three; a fourth must not compile"
)]
pub enum Protocol {
    /// SCTP, one-to-one style.
    Sctp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sctp => "sctp",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = UnknownProtocol;

    /// Reads `tcp`, `udp` or `sctp` in any case.
    fn from_str(text: &str) -> Result<Self, UnknownProtocol> {
        [Self::Sctp, Self::Tcp, Self::Udp]
            .into_iter()
            .find(|protocol| protocol.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| UnknownProtocol { text: text.to_owned() })
    }
}

/// Text that names no [`Protocol`].
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("`{text}` is not tcp, udp or sctp")]
pub struct UnknownProtocol {
    text: String,
}

/// What became of a question.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// A responder answered.
    Answered(Answer),
    /// The question could not be asked, or the answer makes no sense.
    Failed(Failure),
    /// Somebody said no.
    Rejected(Rejection),
    /// Nobody said anything within the timeout: the packet was dropped, or its answer was.
    Silent {
        /// A connection was established, but no answer came over it.
        connected: bool,
    },
}

impl Outcome {
    /// The name of the endpoint that answered.
    pub fn by(&self) -> Option<&str> {
        self.answer().map(|answer| answer.by.as_str())
    }

    /// The answer, if there was one.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::Failed(_) | Self::Rejected(_) | Self::Silent { .. } => None,
        }
    }

    /// The rejection, if it was one.
    pub fn rejection(&self) -> Option<&Rejection> {
        match self {
            Self::Rejected(rejection) => Some(rejection),
            Self::Answered(_) | Self::Failed(_) | Self::Silent { .. } => None,
        }
    }

    /// The answer, or an error that says what came instead, for `?`.
    ///
    /// # Errors
    ///
    /// [`Unanswered`] when it is not [`Answered`](Self::Answered).
    pub fn into_answer(self) -> Result<Answer, Unanswered> {
        match self {
            Self::Answered(answer) => Ok(answer),
            Self::Failed(_) | Self::Rejected(_) | Self::Silent { .. } => Err(self.into()),
        }
    }

    /// Refused the way a proxier refuses: a TCP reset or an ICMP port unreachable.
    pub fn is_rejected(&self) -> bool {
        self.rejection().is_some_and(|rejection| !matches!(rejection.how, How::IcmpOther { .. }))
    }

    /// Dropped: no connection, no answer, no error.
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::Silent { connected: false })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered(answer) => write!(f, "answered by {answer}"),
            Self::Failed(failure) => write!(f, "failed: {failure}"),
            Self::Rejected(rejection) => write!(f, "rejected: {rejection}"),
            Self::Silent { connected: true } => f.write_str("connected, but no answer"),
            Self::Silent { connected: false } => f.write_str("no answer (dropped)"),
        }
    }
}

/// What came instead of an answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{outcome}")]
pub struct Unanswered {
    outcome: Box<Outcome>,
}

impl Unanswered {
    /// The outcome, which is not an answer.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    pub(super) fn failed(step: &'static str, error: &io::Error) -> Self {
        Outcome::Failed(Failure::new(step, error)).into()
    }
}

impl From<Outcome> for Unanswered {
    fn from(outcome: Outcome) -> Self {
        Self { outcome: Box::new(outcome) }
    }
}

impl From<Unanswered> for Outcome {
    fn from(unanswered: Unanswered) -> Self {
        *unanswered.outcome
    }
}

/// An answer of a [`Responder`](super::Responder).
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Answer {
    /// Name of the endpoint that answered.
    pub by: String,
    /// Address the question arrived at, after any translation.
    pub reached_at: SocketAddr,
    /// Address the question seemed to come from.
    pub seen: SocketAddr,
    /// Address it was sent from.
    pub local: SocketAddr,
    /// Time until the connection was there; for UDP, equal to `total`.
    pub connect: Duration,
    /// Time until the answer was there.
    pub total: Duration,
}

impl Answer {
    /// The endpoint saw the very address and port that asked: no masquerade.
    ///
    /// The port counts: masquerade towards an endpoint behind the link that owns the source
    /// address keeps the address and changes only the port.
    pub fn source_kept(&self) -> bool {
        self.seen.ip() == self.local.ip() && self.seen.port() == self.local.port()
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { by, reached_at, seen, total, .. } = self;
        write!(f, "{by} at {reached_at}, which saw {seen}, in {total:?}")
    }
}

/// How and by whom a question was refused.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub struct Rejection {
    /// The kind of refusal.
    pub how: How,
    /// Who sent the ICMP error; `None` for a reset.
    pub by: Option<IpAddr>,
}

impl Rejection {
    /// A TCP reset.
    pub fn reset() -> Self {
        Self { how: How::Rst, by: None }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.how {
            How::IcmpOther { kind, code } => write!(f, "ICMP type {kind} code {code}")?,
            How::IcmpPortUnreachable => f.write_str("ICMP port unreachable")?,
            How::Rst => f.write_str("TCP reset")?,
        }
        self.by.map_or(Ok(()), |by| write!(f, " from {by}"))
    }
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub enum How {
    /// Another ICMP or ICMPv6 error, such as no route (3/0, 1/0) or prohibited (3/13, 1/1).
    IcmpOther {
        /// ICMP type.
        kind: u8,
        /// ICMP code.
        code: u8,
    },
    /// ICMP 3/3 or ICMPv6 1/4.
    IcmpPortUnreachable,
    /// A TCP reset, or the abort of an SCTP association.
    Rst,
}

/// Why a question was not asked or its answer not understood.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[non_exhaustive]
pub struct Failure {
    /// What was being done: `socket`, `bind`, `connect`, `send`, `receive` or `understand`.
    pub step: &'static str,
    /// What the kernel said.
    pub kind: io::ErrorKind,
    /// The errno, if the kernel said anything.
    pub errno: Option<i32>,
}

impl Failure {
    pub(crate) fn new(step: &'static str, error: &io::Error) -> Self {
        Self { step, kind: error.kind(), errno: error.raw_os_error() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            Some(errno) => write!(f, "{}: {}", self.step, io::Error::from_raw_os_error(errno)),
            None => write!(f, "{}: {}", self.step, self.kind),
        }
    }
}

//! Traffic: who answers, who is seen to ask, and how a packet is refused.
//!
//! A [`Responder`] speaks a one-line text protocol over TCP, UDP and (where the kernel has it)
//! SCTP; [`probe`], [`probe_many`] and [`Conversation`] ask it. Every wait is bounded by the
//! timeout of the [`ProbeSpec`].

mod conversation;
mod line;
mod many;
mod outcome;
mod probe;
mod responder;
mod socket;
mod wire;

pub use conversation::Conversation;
pub use many::{EndpointTally, Latencies, Many, Stopped, Tally, probe_many};
pub use outcome::{
    Answer, Failure, How, Outcome, Protocol, Rejection, Unanswered, UnknownProtocol,
};
pub use probe::{ProbeSpec, probe};
pub use responder::{Endpoint, Responder};
pub use socket::sctp_supported;

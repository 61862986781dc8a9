//! Questions that share a connection or a flow.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::Mutex;

use super::probe::{Asker, ended};
use super::{Answer, Outcome, ProbeSpec, Protocol, Unanswered};
use crate::lab::Ns;

/// A TCP connection that is kept open, or a UDP flow with a fixed source port.
///
/// Shows that an established connection survives a change of the rules, or that a flow moves.
/// Closed when dropped.
pub struct Conversation {
    ns: Ns,
    asker: Arc<Mutex<Asker>>,
    local: SocketAddr,
    opening: Option<Answer>,
}

impl Conversation {
    /// Connects, and for TCP waits for the responder's greeting.
    ///
    /// Over UDP nothing is sent before the first [`ask`](Self::ask).
    ///
    /// # Errors
    ///
    /// [`Unanswered`] holds what came instead of a connection and its greeting.
    ///
    /// # Cancel safety
    ///
    /// Safe: the socket is closed when the future is dropped.
    pub async fn open(ns: &Ns, spec: &ProbeSpec) -> Result<Self, Unanswered> {
        let spec = spec.clone();
        let open = async move {
            let mut asker = Asker::open(&spec).await?;
            let greeted = spec.protocol != Protocol::Udp;
            let opening = if greeted { Some(asker.ask().await?) } else { None };
            Ok::<_, Unanswered>((asker, opening))
        };
        let (asker, opening) = ns.exec(open).await.unwrap_or_else(|error| Err(ended(error)))?;
        let local = asker.local();
        Ok(Self { ns: ns.clone(), asker: Arc::new(Mutex::new(asker)), local, opening })
    }

    /// Asks once more. The timeout is that of the spec, for each question anew.
    ///
    /// # Cancel safety
    ///
    /// A question given up may have been sent; a later one ignores its answer.
    pub async fn ask(&mut self) -> Outcome {
        let asker = Arc::clone(&self.asker);
        let ask = async move { asker.lock().await.ask().await };
        let asked = self.ns.exec(ask).await.unwrap_or_else(|error| Err(ended(error)));
        asked.map_or_else(Outcome::from, Outcome::Answered)
    }

    /// The answer that opened a connection; `None` for UDP.
    pub fn opening(&self) -> Option<&Answer> {
        self.opening.as_ref()
    }

    /// The address and port that it asks from.
    pub fn local(&self) -> SocketAddr {
        self.local
    }
}

impl fmt::Debug for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conversation")
            .field("ns", &self.ns.name())
            .field("local", &self.local)
            .finish_non_exhaustive()
    }
}

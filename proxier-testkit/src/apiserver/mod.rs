//! An API server for tests: lists, pages, watches and faults as a kube-apiserver 1.36 has them.
//!
//! It speaks HTTP on loopback, keeps objects as JSON with resource versions and a history to watch,
//! and does on request what servers do on bad days: [`Fault`].

#[expect(clippy::indexing_slicing, reason = "on a JSON object it inserts what is missing")]
mod serve;
#[expect(clippy::indexing_slicing, reason = "on a JSON object it inserts what is missing")]
mod state;
mod tls;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use state::State;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_rustls::rustls::ServerConfig;

pub use state::{Fault, Seen};
pub use tls::{Authority, Identity};

/// A running server. Stops when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The version of the latest change.
    changed: watch::Sender<u64>,
    /// Raised to cut all connections.
    epoch: watch::Sender<u64>,
    bookmarks: Duration,
    /// Without it, HTTP in the clear.
    tls: Option<Arc<ServerConfig>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ApiServer {
    /// Starts a server that sends bookmarks at this interval. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// No port on loopback can be had.
    pub async fn start(bookmarks: Duration) -> io::Result<Self> {
        Self::start_with(bookmarks, None).await
    }

    /// Starts a server that has a certificate of this authority, and serves only those who have one,
    /// too, or one of the [tokens](Self::accept_tokens).
    ///
    /// # Errors
    /// No port on loopback can be had, or there is no randomness.
    pub async fn start_secure(bookmarks: Duration, authority: &Authority) -> io::Result<Self> {
        Self::start_with(bookmarks, Some(authority.server()?)).await
    }

    async fn start_with(bookmarks: Duration, tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            changed: watch::channel(0).0,
            epoch: watch::channel(0).0,
            bookmarks,
            tls,
        });
        let task = tokio::spawn(serve::accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, task })
    }

    /// Where it listens: `http://127.0.0.1:…`, or `https://…` if it is secure.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.shared.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// A secure server accepts these bearer tokens from now on, and no others.
    pub fn accept_tokens(&self, tokens: &[&str]) {
        self.shared.state().tokens = tokens.iter().map(|it| (*it).to_owned()).collect();
    }

    /// Creates or replaces an object, named by its `kind` and `metadata`. Returns its version.
    pub fn apply(&self, object: Value) -> u64 {
        let version = self.shared.state().apply(object);
        self.shared.changed.send_replace(version);
        version
    }

    /// Creates or replaces objects, in one step.
    pub fn apply_all(&self, objects: impl IntoIterator<Item = Value>) {
        let mut state = self.shared.state();
        let last = objects.into_iter().map(|object| state.apply(object)).last();
        drop(state);
        if let Some(version) = last {
            self.shared.changed.send_replace(version);
        }
    }

    /// Deletes an object; `key` is `namespace/name`, or the name of a cluster-wide object.
    pub fn delete(&self, resource: &str, key: &str) {
        let version = self.shared.state().delete(resource, key);
        self.shared.changed.send_replace(version);
    }

    /// Forgets the history: whoever asks for anything older than now gets 410.
    pub fn compact(&self) {
        self.shared.state().compact();
    }

    /// Has a fault from now on, until [`Self::heal`].
    pub fn fail(&self, fault: Fault) {
        self.shared.state().faults.push(fault);
    }

    /// Has no faults any more.
    pub fn heal(&self) {
        self.shared.state().faults.clear();
    }

    /// Goes away: cuts all connections and refuses new ones, until [`Self::reopen`]. Objects may
    /// change meanwhile.
    pub async fn close(&mut self) {
        self.task.abort();
        // Once the task has ended nobody listens any more.
        (&mut self.task).await.ok();
        self.cut();
    }

    /// Is back, at the same address.
    ///
    /// # Errors
    /// The port is in use by somebody else.
    pub async fn reopen(&mut self) -> io::Result<()> {
        let listener = TcpListener::bind(self.address).await?;
        self.task = tokio::spawn(serve::accept(listener, Arc::clone(&self.shared)));
        Ok(())
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// The requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// How often a verb was asked of a resource. A streaming list counts as `watch`.
    #[must_use]
    pub fn count(&self, verb: &str, resource: &str) -> usize {
        let state = self.shared.state();
        state.seen.iter().filter(|it| it.verb == verb && it.resource == resource).count()
    }

    /// The Events that were created, with later patches merged in.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.shared.state().all("events")
    }

    /// The objects of a resource, as they are.
    #[must_use]
    pub fn objects(&self, resource: &str) -> Vec<Value> {
        self.shared.state().all(resource)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.cut();
        self.task.abort();
    }
}

//! All four watches as one source of events.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::join4;
use kube::Client;
use proxier_core::model::{Event, NodeEnv};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};

use crate::{
    follow::Follower,
    gather::Gather,
    kinds::{Cidrs, Kind, OwnNode, Services, Slices, Watched},
    options::Options,
    status::{Reporter, SourceStatus},
};

/// How many messages of the watches may wait for the sink.
const QUEUE: usize = 256;

/// A wait for the node that is longer than this is mentioned.
const SAY_AFTER: Duration = Duration::from_secs(1);

/// Watches Services, EndpointSlices, ServiceCIDRs and the own Node, and feeds them to a
/// [`Store`](proxier_core::model::Store) or whatever holds one.
///
/// Nothing is passed on before Services and EndpointSlices are listed completely. Then comes, in this
/// order, the node, all Services and all EndpointSlices: what a store makes one reset of. From then
/// on changes are passed on as they come. Whatever happens to the server or the connection, what was
/// passed on stays, and the difference follows once the server is back.
pub struct Watch {
    client: Client,
    options: Arc<Options>,
    settings: watch::Sender<NodeEnv>,
    status: watch::Sender<SourceStatus>,
    /// Tells all kinds when the server answers one of them again.
    answers: Arc<Notify>,
}

impl Watch {
    /// Prepares to watch with a client of the embedder's. Asks nothing yet.
    ///
    /// `settings` names the node and holds what the cluster does not say: how local traffic is
    /// detected, interface addresses and so on. Zone, addresses and pod networks come from the Node
    /// object; networks of ServiceCIDRs are added to those given here.
    #[must_use]
    pub fn new(client: Client, settings: NodeEnv, options: Options) -> Self {
        let (settings, _) = watch::channel(settings);
        let (status, _) = watch::channel(SourceStatus::default());
        let (options, answers) = (Arc::new(options), Arc::default());
        Self { client, options, settings, status, answers }
    }

    /// Where the watches stand, as it changes. When they were last heard changes without a
    /// notification.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<SourceStatus> {
        self.status.subscribe()
    }

    /// The settings, to be changed while watching: interface addresses come and go.
    ///
    /// The name of the node is fixed.
    #[must_use]
    pub fn settings(&self) -> watch::Sender<NodeEnv> {
        self.settings.clone()
    }

    /// Watches until `stop` resolves, passing events to `sink` one after the other. While it waits
    /// for the sink the server waits too; nothing is lost.
    ///
    /// # Errors
    /// What the sink says when it takes no more.
    ///
    /// # Cancel safety
    /// May be dropped at any time; a later [`Watch`] starts with complete lists.
    pub async fn run<S, F, E>(
        self,
        mut sink: S,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<(), E>
    where
        S: FnMut(Event) -> F + Send,
        F: Future<Output = Result<(), E>> + Send,
        E: Send,
    {
        let (out, messages) = mpsc::channel(QUEUE);
        let followers = join4(
            self.follow::<Services>(&out).run(),
            self.follow::<Slices>(&out).run(),
            self.follow::<OwnNode>(&out).run(),
            self.follow::<Cidrs>(&out).run(),
        );
        let pump = Pump {
            gather: Gather::new(self.settings.borrow().clone()),
            settings: self.settings.subscribe(),
            status: self.status.clone(),
            node: self.reporter(Kind::Node),
            options: Arc::clone(&self.options),
        };
        tokio::select! {
            biased;
            () = stop => Ok(()),
            outcome = pump.run(messages, &mut sink) => outcome,
            _ = followers => Ok(()),
        }
    }

    fn follow<W: Watched>(&self, out: &mpsc::Sender<crate::gather::Message>) -> Follower<W> {
        let node = self.settings.borrow().name.clone();
        let report = self.reporter(W::KIND);
        Follower::new(self.client.clone(), &node, Arc::clone(&self.options), report, out.clone())
    }

    fn reporter(&self, kind: Kind) -> Reporter {
        Reporter::new(self.status.clone(), kind, Arc::clone(&self.answers))
    }
}

/// Moves messages from the watches to the sink.
struct Pump {
    gather: Gather,
    settings: watch::Receiver<NodeEnv>,
    status: watch::Sender<SourceStatus>,
    node: Reporter,
    options: Arc<Options>,
}

impl Pump {
    async fn run<S, F, E>(
        mut self,
        mut messages: mpsc::Receiver<crate::gather::Message>,
        sink: &mut S,
    ) -> Result<(), E>
    where
        S: FnMut(Event) -> F + Send,
        F: Future<Output = Result<(), E>> + Send,
    {
        let mut events = Vec::new();
        let patience = self.options.node_patience;
        // Since when only the node is missing, and whether that was said.
        let mut waiting: Option<(Instant, bool)> = None;
        loop {
            let (since, said) = waiting.unwrap_or_else(|| (Instant::now(), false));
            let at = since + if said { patience } else { patience.min(SAY_AFTER) };
            tokio::select! {
                message = messages.recv() => {
                    let Some(message) = message else { return Ok(()) };
                    self.gather.take(message, &mut events);
                }
                changed = self.settings.changed() => {
                    if changed.is_ok() {
                        let settings = self.settings.borrow_and_update().clone();
                        self.gather.set_settings(settings, &mut events);
                    }
                }
                () = tokio::time::sleep_until(at), if waiting.is_some() => {
                    let node = &self.settings.borrow().name;
                    if said || patience <= SAY_AFTER {
                        tracing::warn!(%node, "going on without an address of the Node, or without ServiceCIDRs");
                        waiting = None;
                        self.gather.start(&mut events);
                    } else {
                        let left_s = (patience - SAY_AFTER).as_secs();
                        tracing::info!(%node, left_s, "waiting for the Node of this name to have an address, and for ServiceCIDRs");
                        waiting = Some((since, true));
                    }
                }
            }
            if !self.gather.is_started() {
                if self.gather.is_complete() {
                    waiting = None;
                    self.gather.start(&mut events);
                } else if self.gather.has_lists() {
                    waiting.get_or_insert_with(|| (Instant::now(), false));
                }
            }
            self.report();
            for event in events.drain(..) {
                sink(event).await?;
            }
        }
    }

    fn report(&self) {
        let (started, node) = (self.gather.is_started(), self.gather.node_state());
        self.status.send_if_modified(|status| {
            let changed = (status.started, status.node) != (started, node);
            (status.started, status.node) = (started, node);
            changed
        });
        let name = proxier_core::ObjectName::new("", &self.settings.borrow().name);
        let problems = self.gather.node_problems();
        if !problems.is_empty() {
            self.node.problems(&name, problems.to_vec());
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("options", &self.options).finish_non_exhaustive()
    }
}

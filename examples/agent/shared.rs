//! What the parts of the agent know in common.

use std::{
    sync::{Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use proxier::{
    Cause, Family, Handle, Mode, ObjectName, Observer, Synced,
    health::{Answer, NodeState, ProxyHealth, ServiceHealth},
    ir::NodePorts,
    model::Store,
};
use tokio::sync::watch;

use crate::{metrics::Metrics, node_ports::Wanted};

/// Where the source of Services stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct SourceView {
    /// Complete lists have come in.
    pub(crate) started: bool,
    /// What is known of the own Node.
    pub(crate) node: NodeState,
    /// What is wrong with it, and since when.
    pub(crate) trouble: Option<(String, Instant)>,
}

/// What the servers answer from.
pub(crate) struct Shared {
    mode: watch::Sender<Mode>,
    pub(crate) families: Vec<Family>,
    pub(crate) handle: Handle,
    pub(crate) source: watch::Receiver<SourceView>,
    pub(crate) metrics: Metrics,
    pub(crate) configz: watch::Receiver<serde_json::Value>,
    health: Mutex<ProxyHealth>,
}

impl Shared {
    pub(crate) fn new(
        mode: Mode,
        families: Vec<Family>,
        handle: Handle,
        source: watch::Receiver<SourceView>,
        configz: watch::Receiver<serde_json::Value>,
        health: ProxyHealth,
    ) -> Self {
        let metrics = Metrics::new(mode, &families);
        let mode = watch::Sender::new(mode);
        Self { mode, families, handle, source, metrics, configz, health: Mutex::new(health) }
    }

    /// The mode in force.
    pub(crate) fn mode(&self) -> Mode {
        *self.mode.borrow()
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        self.mode.send_replace(mode);
        self.metrics.set_mode(mode);
    }

    pub(crate) fn is_healthy(&self) -> bool {
        self.health(|health| health.is_healthy(SystemTime::now()))
    }

    /// Whether new connections should come here.
    pub(crate) fn healthz(&self) -> Answer {
        let node = self.source.borrow().node;
        let answer = self.health(|health| {
            health.observe(node);
            health.healthz(SystemTime::now())
        });
        self.metrics.answered("healthz", answer.status);
        self.visible(answer)
    }

    /// Whether this process should live.
    pub(crate) fn livez(&self) -> Answer {
        let answer = self.health(|health| health.livez(SystemTime::now()));
        self.metrics.answered("livez", answer.status);
        self.visible(answer)
    }

    /// Adds what kube-proxy does not say: a start that is not finished, and a watch that does not
    /// work. The status stays: the node forwards what it knows.
    fn visible(&self, mut answer: Answer) -> Answer {
        let source = self.source.borrow();
        let mut more = String::new();
        if !source.started {
            more.push_str(", \"starting\": true");
        }
        if let Some((trouble, since)) = &source.trouble {
            let seconds = since.elapsed().as_secs();
            let trouble = serde_json::Value::from(trouble.as_str());
            more.push_str(&format!(
                ", \"watch\": {{\"troubleForSeconds\": {seconds}, \"trouble\": {trouble}}}"
            ));
        }
        let end = answer.body.trim_end().len().saturating_sub(1);
        answer.body.insert_str(end, &more);
        answer
    }

    fn health<T>(&self, look: impl FnOnce(&mut ProxyHealth) -> T) -> T {
        look(&mut self.health.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sees every sync.
pub(crate) struct Eyes {
    pub(crate) shared: std::sync::Arc<Shared>,
    pub(crate) ports: watch::Sender<Wanted>,
}

impl Observer for Eyes {
    fn queued(&mut self, _: &Store) {
        let now = SystemTime::now();
        self.shared.health(|health| {
            for family in &self.shared.families {
                health.queued(*family, now);
            }
        });
        self.shared.metrics.queued(&self.shared.families);
    }

    fn synced(&mut self, sync: &Synced<'_>) {
        let now = SystemTime::now();
        let programmed = |family: &Family| {
            !matches!(sync.outcome, Some(Err(_)))
                || *sync.status.programmed.of(*family) == sync.status.desired
        };
        let done: Vec<_> = self.shared.families.iter().copied().filter(programmed).collect();
        self.shared.health(|health| done.iter().for_each(|family| health.updated(*family, now)));
        self.shared.metrics.synced(sync, self.shared.mode(), &self.shared.families, &done);
        if !matches!(sync.outcome, Some(Err(_))) {
            self.update_ports(sync);
        }
    }
}

impl Eyes {
    /// Brings health-check node ports up to date: O(Services that changed).
    fn update_ports(&self, sync: &Synced<'_>) {
        let changed: Vec<_> = if sync.node_changed || sync.cause == Cause::Retry {
            sync.store.services().map(|service| service.name().clone()).collect()
        } else {
            sync.pending.services.iter().chain(&sync.pending.endpoints).cloned().collect()
        };
        let health: Vec<_> = changed
            .iter()
            .flat_map(|name| self.shared.families.iter().map(move |family| (name, *family)))
            .map(|(name, family)| {
                ((name.clone(), family), ServiceHealth::of(sync.store, name, family))
            })
            .collect::<Vec<((ObjectName, Family), Option<ServiceHealth>)>>();
        self.ports.send_if_modified(|wanted| {
            let mut modified = wanted.failed;
            for (key, health) in health {
                let known = wanted.services.get(&key) == health.as_ref();
                modified |= !known;
                match health {
                    Some(health) => wanted.services.insert(key, health),
                    None => wanted.services.remove(&key),
                };
            }
            for family in &self.shared.families {
                let at = match sync.store.env().node_ports(*family) {
                    NodePorts::All => None,
                    NodePorts::Listed(addresses) => Some(addresses),
                };
                modified |= *wanted.addresses.of(*family) != at;
                *wanted.addresses.of_mut(*family) = at;
            }
            modified
        });
    }
}

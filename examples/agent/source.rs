//! Where Services come from: a cluster, or manifests.

use proxier::{
    Degraded, Handle, Manifests, ObjectName, Standing,
    health::NodeState,
    model::{Event, NodeEnv, Store},
};
use proxier_kube::{Notice, Publisher};
use proxier_netlink::{Addresses, NetNs};
use tokio::sync::watch;

use crate::{Outcome, cluster, config::Resolved, shared::SourceView};

/// Tells the owners of Services what is wrong with them: in the log, and as Events in a cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder(Option<proxier_kube::Recorder>);

impl Recorder {
    /// A health-check node port cannot be listened on.
    pub(crate) fn health_port(&self, service: &ObjectName, error: &std::io::Error) {
        tracing::warn!(%service, %error, "FailedToStartServiceHealthcheck");
        self.publish(|| Notice::health_port(service.clone(), error));
    }

    /// Passes on what cannot be programmed, once each, until the driver stops.
    pub(crate) async fn follow(self, mut standing: watch::Receiver<Standing>) {
        let mut known = Standing::default();
        while standing.changed().await.is_ok() {
            let now = standing.borrow_and_update().clone();
            for it in now.conflicts.iter().filter(|it| !known.conflicts.contains(it)) {
                self.publish(|| Notice::conflict(it));
            }
            let same =
                |it: &Degraded, other: &Degraded| it.id == other.id && it.reason == other.reason;
            let before = &known.proxier.degraded;
            for it in &now.proxier.degraded {
                if !before.iter().any(|other| same(it, other)) {
                    self.publish(|| Notice::degraded(it));
                }
            }
            known = now;
        }
        std::future::pending().await
    }

    fn publish(&self, notice: impl FnOnce() -> Notice) {
        if let Some(recorder) = &self.0 {
            recorder.publish(notice());
        }
    }
}

/// Addresses on the interfaces of this network namespace, as `proxier::follow_addresses` tells them.
pub(crate) async fn interface_addresses() -> Vec<std::net::IpAddr> {
    let Ok(mut addresses) = Addresses::open(&NetNs::Current) else { return Vec::new() };
    addresses.next().await.unwrap_or_default()
}

/// Passes on what manifests say, as they and the settings change, until the driver stops.
async fn follow_manifests(
    mut manifests: Manifests,
    handle: Handle,
    mut settings: watch::Receiver<NodeEnv>,
    view: watch::Sender<SourceView>,
) -> Outcome {
    let mut known = Vec::new();
    loop {
        let snapshot = manifests.read()?;
        let problems: Vec<_> = snapshot.problems().iter().map(ToString::to_string).collect();
        for problem in problems.iter().filter(|it| !known.contains(*it)) {
            tracing::warn!("{problem}");
        }
        known = problems;
        let env = observed(&snapshot, &settings.borrow_and_update());
        // Without an API server nobody can say that the node should go.
        let node = NodeState::of(snapshot.node(&env.name));
        let node = if node.exists { node } else { NodeState { exists: true, ..node } };
        handle.send(Event::Node(Box::new(env))).await?;
        for event in snapshot.events() {
            handle.send(event).await?;
        }
        view.send_replace(SourceView { started: true, node, trouble: None });
        tokio::select! {
            changed = manifests.changed() => changed?,
            changed = settings.changed() => changed?,
        }
    }
}

/// The settings, with what manifests say of the node.
fn observed(snapshot: &proxier::Snapshot, settings: &NodeEnv) -> NodeEnv {
    let mut env = settings.clone();
    for problem in snapshot.observe_node(&mut env) {
        tracing::warn!("{problem}");
    }
    env
}

/// What the source says at the moment, as a store.
pub(crate) async fn once(settings: &Resolved, env: NodeEnv) -> Outcome<Store> {
    if settings.is_cluster() {
        return cluster::once(settings, env).await;
    }
    let mut manifests = Manifests::open(&settings.loaded.ours.manifests)?;
    let snapshot = manifests.read()?;
    for problem in snapshot.problems() {
        tracing::warn!("{problem}");
    }
    let mut store = Store::new(observed(&snapshot, &env));
    for event in snapshot.events() {
        store.apply(event);
    }
    store.take();
    Ok(store)
}

/// Where Services come from.
pub(crate) enum Source {
    Cluster(proxier_kube::kube::Client),
    Manifests(Box<Manifests>),
}

impl Source {
    /// The source that the settings name.
    pub(crate) async fn open(settings: &Resolved) -> Outcome<Self> {
        if settings.is_cluster() {
            return cluster::client(settings).await.map(Self::Cluster);
        }
        let files = Manifests::open(&settings.loaded.ours.manifests)?;
        Ok(Self::Manifests(Box::new(files)))
    }

    /// Tells the owners of objects; the publisher has to be run.
    pub(crate) fn recorder(&self, node: &str) -> (Recorder, Option<Publisher>) {
        match self {
            Self::Cluster(client) => {
                let (recorder, publisher) =
                    proxier_kube::Recorder::new(client.clone(), "proxier", node);
                (Recorder(Some(recorder)), Some(publisher))
            }
            Self::Manifests(_) => (Recorder::default(), None),
        }
    }

    /// Passes on what it says until the driver stops.
    pub(crate) async fn follow(
        self,
        handle: Handle,
        settings: watch::Sender<NodeEnv>,
        view: watch::Sender<SourceView>,
    ) -> Outcome {
        match self {
            Self::Cluster(client) => cluster::follow(client, handle, settings, view).await,
            Self::Manifests(files) => {
                follow_manifests(*files, handle, settings.subscribe(), view).await
            }
        }
    }
}

//! Services from a cluster.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proxier::{
    Handle, Stopped,
    model::{NodeEnv, Store},
};
use proxier_kube::{Connection, Options, SourceStatus, TroubleKind, Watch, kube::Client};
use tokio::sync::watch;

use crate::{Outcome, config::Resolved, in_full, shared::SourceView, verbs::Report};

/// How long a verb waits for complete lists.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client for the API server that the settings name.
pub(crate) async fn client(settings: &Resolved) -> Outcome<Client> {
    let path = &settings.loaded.proxy.client_connection.kubeconfig;
    let mut connection = Connection::new((!path.is_empty()).then(|| PathBuf::from(path)));
    connection.server.clone_from(&settings.loaded.master);
    connection.client().await.map_err(|error| {
        format!(
            "no way to the cluster: {error}; name a working kubeconfig with --kubeconfig, or take Services \
             from files with --manifests"
        )
        .into()
    })
}

/// Passes on what the cluster says, as it and the settings change, until the driver stops.
pub(crate) async fn follow(
    client: Client,
    handle: Handle,
    settings: watch::Sender<NodeEnv>,
    view: watch::Sender<SourceView>,
) -> Outcome {
    let env = settings.borrow().clone();
    let watch = Watch::new(client, env, Options::default());
    let forward = forward_settings(settings.subscribe(), watch.settings());
    let report = report(watch.status(), view);
    let run = watch.run(
        |event| {
            let handle = handle.clone();
            async move { handle.send(event).await }
        },
        std::future::pending(),
    );
    tokio::select! {
        outcome = run => Ok::<(), Stopped>(outcome?).map_err(Into::into),
        () = forward => Ok(()),
        () = report => Ok(()),
    }
}

async fn forward_settings(mut from: watch::Receiver<NodeEnv>, to: watch::Sender<NodeEnv>) {
    while from.changed().await.is_ok() {
        to.send_replace(from.borrow_and_update().clone());
    }
    std::future::pending().await
}

/// Keeps what health checks say of the watches up to date.
async fn report(mut status: watch::Receiver<SourceStatus>, view: watch::Sender<SourceView>) {
    while status.changed().await.is_ok() {
        let now = view_of(&status.borrow_and_update());
        view.send_replace(now);
    }
    std::future::pending().await
}

fn view_of(status: &SourceStatus) -> SourceView {
    let oldest = status.troubles().min_by_key(|(_, standing)| standing.since);
    SourceView {
        started: status.started,
        node: status.node,
        trouble: oldest.map(|(_, standing)| (standing.trouble.to_string(), standing.since)),
    }
}

/// What the cluster says at the moment, as a store.
pub(crate) async fn once(settings: &Resolved, env: NodeEnv) -> Outcome<Store> {
    let (store, status) = look(settings, env).await?;
    if status.started {
        return Ok(store);
    }
    let troubles = distinct(&status);
    if troubles.is_empty() {
        return Err("the API server does not send complete lists: is it overloaded?".into());
    }
    let path = &settings.loaded.proxy.client_connection.kubeconfig;
    let by = if path.is_empty() { String::new() } else { format!(" (kubeconfig {path})") };
    Err(troubles.into_iter().map(|it| format!("{it}{by}")).collect::<Vec<_>>().join("\n").into())
}

/// What is wrong, without what has the same cause: a missing permission has a line for each kind of
/// object, a server that cannot be reached has one for all.
fn distinct(status: &SourceStatus) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let troubles = status.troubles().map(|(_, standing)| &standing.trouble);
    let distinct = troubles.filter(|it| {
        let about_one = matches!(
            it.kind,
            TroubleKind::Forbidden | TroubleKind::Garbled | TroubleKind::NotServed
        );
        about_one || seen.insert(it.kind)
    });
    distinct.map(ToString::to_string).collect()
}

/// Watches until complete lists have come in, or patience ends.
async fn look(settings: &Resolved, env: NodeEnv) -> Outcome<(Store, SourceStatus)> {
    let client = client(settings).await?;
    let store = Arc::new(Mutex::new(Store::new(env.clone())));
    let mut options = Options::default();
    options.node_patience = PATIENCE / 4;
    let watch = Watch::new(client, env, options);
    let (status, mut started) = (watch.status(), watch.status());
    let sink = Arc::clone(&store);
    let began = Instant::now();
    let run = watch.run(
        move |event| {
            sink.lock().unwrap_or_else(PoisonError::into_inner).apply(event);
            std::future::ready(Ok::<(), Stopped>(()))
        },
        async move {
            let enough = |status: &SourceStatus| {
                status.started || (status.troubles().count() > 0 && began.elapsed() > PATIENCE / 5)
            };
            tokio::time::timeout(PATIENCE, started.wait_for(enough)).await.ok();
        },
    );
    run.await?;
    let mut taken = Store::new(NodeEnv::default());
    std::mem::swap(&mut taken, &mut store.lock().unwrap_or_else(PoisonError::into_inner));
    taken.take();
    let status = status.borrow().clone();
    Ok((taken, status))
}

/// What is wrong between here and the API server.
pub(crate) async fn diagnose(settings: &Resolved, env: NodeEnv, report: &mut Report) {
    match look(settings, env).await {
        Err(error) => report.wrong("cluster", &in_full(&*error)),
        Ok((store, status)) => {
            for trouble in distinct(&status) {
                report.wrong("cluster", &trouble);
            }
            if status.started {
                let services = store.services().count();
                report.fine("cluster", &format!("{services} Services can be watched"));
            } else if status.troubles().count() == 0 {
                report.wrong(
                    "cluster",
                    "the API server does not send complete lists: is it overloaded?",
                );
            }
            if status.started && !status.node.exists {
                let name = &settings.node_name;
                report.wrong(
                    "node",
                    &format!("there is no Node {name:?}: give its name with --hostname-override"),
                );
            }
        }
    }
}

//! The daemon.

use std::{sync::Arc, time::Duration};

use proxier::{Driver, Family, FollowError, Handle, Mode, Standing, health::ProxyHealth};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

use crate::{
    Outcome,
    args::Flags,
    auto,
    config::Resolved,
    http, in_full, leftovers, node_ports,
    reload::Reload,
    shared::{Eyes, Shared, SourceView},
    source::{self, Source},
    sysctl,
};

/// The pause before addresses of interfaces are followed again, after the kernel could not be asked.
const PAUSE: Duration = Duration::from_secs(10);

/// Programs the node until it is told to stop. What is programmed stays in force.
pub(crate) async fn run(flags: &Flags, settings: Resolved) -> Outcome {
    let services = Source::open(&settings).await?;
    let mode = auto::choose(&settings).await?;
    if settings.mode.is_some() {
        tracing::info!(%mode, "mode as configured");
    }
    set_oom_score(settings.loaded.proxy.oom_score_adj);
    sysctl::apply(&settings, mode)?;
    let context = settings.context(mode);
    let proxier = proxier::open(mode, &context).await?;
    let mut env = settings.env(mode);
    env.interface_addresses = source::interface_addresses().await;
    let (driver, handle) = Driver::new(proxier, env.clone(), settings.pacing(mode));
    let (env, _) = watch::channel(env);
    let (view, source) = watch::channel(SourceView::default());
    let (configz, configured) = watch::channel(settings.configz());
    let health = ProxyHealth::new(settings.health_timeout(mode));
    let families: Vec<Family> = context.families.clone();
    let shared = Shared::new(mode, families, handle.clone(), source, configured, health);
    let shared = Arc::new(shared);
    let ports = watch::Sender::new(node_ports::Wanted::default());
    let eyes = Eyes { shared: Arc::clone(&shared), ports: ports.clone() };

    let mut tasks = JoinSet::new();
    serve(&settings, &shared, &mut tasks).await?;
    let (recorder, publisher) = services.recorder(&settings.node_name);
    if let Some(publisher) = publisher {
        tasks.spawn(plain(publisher.run()));
    }
    tasks.spawn(plain(recorder.clone().follow(handle.standing())));
    if settings.loaded.ours.takeover {
        tasks.spawn(plain(take_over(handle.standing(), settings.clone(), mode)));
    }
    tasks.spawn(plain(node_ports::serve(Arc::clone(&shared), ports, recorder)));
    tasks.spawn(plain(follow_addresses(handle.clone())));
    if let Some(path) = flags.config.clone() {
        let reload = Reload {
            flags: flags.clone(),
            settings: settings.clone(),
            env: env.clone(),
            configz,
            shared: Arc::clone(&shared),
        };
        tasks.spawn(plain(reload.follow(path)));
    }
    tasks.spawn(services.follow(handle, env, view));

    let driver = driver.observed(Box::new(eyes)).run(stopped()?);
    tokio::select! {
        _proxier = driver => {
            tracing::info!("stopped; what is programmed stays in force");
            Ok(())
        }
        Some(ended) = tasks.join_next() => match ended {
            Ok(outcome) => outcome,
            Err(error) => Err(error.into()),
        },
    }
}

/// Removes what other modes and kube-proxy left, once the node is programmed: until then it serves.
async fn take_over(mut standing: watch::Receiver<Standing>, settings: Resolved, mode: Mode) {
    if standing.wait_for(|it| it.last.is_some()).await.is_ok() {
        let mut failed = leftovers::remove(&settings, leftovers::others(mode)).await;
        if let Err(error) = leftovers::remove_kube_proxys_tables(&settings).await {
            failed.push(in_full(&*error));
        }
        for error in failed {
            tracing::warn!("cannot remove what was programmed before: {error}");
        }
    }
    std::future::pending().await
}

async fn plain(task: impl Future<Output = ()>) -> Outcome {
    task.await;
    Ok(())
}

/// Resolves when the process should end.
fn stopped() -> Outcome<impl Future<Output = ()> + Send> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}

/// Starts both servers. A port that is taken is fatal only when that is asked for.
async fn serve(settings: &Resolved, shared: &Arc<Shared>, tasks: &mut JoinSet<Outcome>) -> Outcome {
    let servers = [
        ("--healthz-bind-address", settings.health, http::health(Arc::clone(shared))),
        ("--metrics-bind-address", settings.metrics, http::insight(Arc::clone(shared))),
    ];
    for (flag, at, router) in servers {
        let Some(at) = at else { continue };
        match http::bind(flag, at).await {
            Ok(listener) => {
                tasks.spawn(async move { Ok(axum::serve(listener, router).await?) });
            }
            Err(error) if settings.loaded.proxy.bind_address_hard_fail => return Err(error),
            Err(error) => {
                tracing::error!("{error}");
                tasks.spawn(async move {
                    let listener = bind_later(flag, at).await;
                    Ok(axum::serve(listener, router).await?)
                });
            }
        }
    }
    Ok(())
}

/// Tries again until the port is free.
async fn bind_later(flag: &'static str, at: std::net::SocketAddr) -> tokio::net::TcpListener {
    // K8S: every five seconds, as pkg/proxy/healthcheck does.
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        ticks.tick().await;
        if let Ok(listener) = http::bind(flag, at).await {
            tracing::info!("{flag} {at}: listening");
            return listener;
        }
    }
}

fn set_oom_score(score: i32) {
    let path = "/proc/self/oom_score_adj";
    let now = std::fs::read_to_string(path).unwrap_or_default();
    if now.trim() == score.to_string() {
        return;
    }
    if let Err(error) = std::fs::write(path, score.to_string()) {
        tracing::warn!(%error, score, "cannot set oomScoreAdj (--oom-score-adj)");
    }
}

/// Node ports follow the addresses of the node.
async fn follow_addresses(handle: Handle) {
    loop {
        match proxier::follow_addresses(None, &handle).await {
            Ok(()) | Err(FollowError::Stopped(_)) => return std::future::pending().await,
            Err(error) => {
                tracing::warn!("{}; trying again in {PAUSE:?}", in_full(&error));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

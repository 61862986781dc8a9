//! TCP: accepting, and seeing a connection through.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use proxier_core::{
    Protocol,
    ir::{Pool, Snat, Verdict},
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::OwnedSemaphorePermit,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    config::Tcp,
    dial::reach,
    relay::{Progress, Way, relay},
    service::{Counted, Endpoint},
    shared::{Place, Shared, count},
    socket::{Stance, is_exhaustion, original_destination, set_keepalive},
    table::Live,
};

/// How long a connection lasts before it is worth asking whether its endpoint is still there.
const LASTING: Duration = Duration::from_secs(1);
/// The first pause when descriptors run out, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// Accepts connections and serves each in a task of its own, for ever.
///
/// At the limit of connections, and while descriptors are short, the kernel's queue fills up.
///
/// # Cancel safety
/// Connections that were accepted go on.
pub(crate) async fn accept(listener: TcpListener, place: Place, shared: Arc<Shared>) {
    let mut pause = None;
    loop {
        match listener.accept().await {
            Ok((client, peer)) => {
                if pause.take().is_some() {
                    info!("accepting again");
                }
                let permits = Arc::clone(&shared.permits);
                // The semaphore is never closed.
                let Ok(permit) = permits.acquire_owned().await else { return };
                tokio::spawn(serve(client, peer, place, Arc::clone(&shared), permit));
            }
            Err(error) if is_exhaustion(&error) => {
                if pause.is_none() {
                    warn!(%error, "out of descriptors or memory; accepting pauses");
                    count(&shared.totals.accept_pauses);
                }
                let (first, longest) = PAUSES;
                let length = pause.map_or(first, |last: Duration| (last * 2).min(longest));
                pause = Some(length);
                sleep(length).await;
            }
            // About the connection, not about the listener.
            Err(error) => debug!(%error, "a connection went before it was accepted"),
        }
    }
}

/// Serves one connection.
async fn serve(
    client: TcpStream,
    peer: SocketAddr,
    place: Place,
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
) {
    let Some((live, pool, snat)) = admit(&client, peer, place, &shared) else {
        count(&shared.totals.refused);
        return reset(&client);
    };
    let dialled = reach(&shared, &live, pool, snat, peer).await;
    let Some((upstream, endpoint)) = dialled else {
        count(&shared.totals.unreachable);
        return reset(&client);
    };
    let counted = Counted::new(Arc::clone(&live.service), endpoint);
    drop(live);
    let (tcp, limits) = (&shared.config.tcp, &shared.config.limits);
    let way = Way { splice: tcp.splice, pooled_pipes: limits.pooled_pipes };
    let progress = Progress::default();
    let moving = pin!(relay(&client, &upstream, &counted, &progress, way));
    let moving = lasting(moving, &progress, &upstream, tcp);
    let outcome = match tcp.drain {
        None => moving.await,
        Some(drain) => tokio::select! {
            outcome = moving => outcome,
            () = drained(&counted.endpoint, drain) => Err(io::ErrorKind::TimedOut.into()),
        },
    };
    if outcome.is_err() {
        // Whoever is left learns that the stream did not end by itself.
        reset(&client);
        reset(&upstream);
    }
}

/// Relays. Once the connection turns out to last, asks whether the endpoint is there, which takes four
/// system calls that most connections are spared; and gives it up when it is silent for too long
/// after one side has ended.
async fn lasting(
    mut moving: Pin<&mut impl Future<Output = io::Result<()>>>,
    progress: &Progress,
    upstream: &TcpStream,
    tcp: &Tcp,
) -> io::Result<()> {
    if let Ok(outcome) = timeout(LASTING, &mut moving).await {
        return outcome;
    }
    set_keepalive(&SockRef::from(upstream), tcp.keepalive)?;
    let Some(limit) = tcp.half_closed else { return moving.await };
    loop {
        let before = progress.get();
        if let Ok(outcome) = timeout(limit, &mut moving).await {
            return outcome;
        }
        if before.half_closed && before == progress.get() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// What the routing table says to a connection; `None` when it is to be refused.
fn admit(
    client: &TcpStream,
    peer: SocketAddr,
    place: Place,
    shared: &Shared,
) -> Option<(Arc<Live>, Pool, Snat)> {
    let (live, origin) = match place {
        Place::Captured(origin) => {
            let local = client.local_addr().ok()?;
            let to = match shared.stance() {
                Stance::Marked(_) => original_destination(client, local).ok()?,
                Stance::Plain | Stance::Transparent => local,
            };
            (shared.table.find(to, Protocol::Tcp)?, origin)
        }
        Place::Named(key) => (shared.table.route(&key)?, shared.table.origin(peer.ip())),
    };
    if live.route.sources.as_ref().is_some_and(|sources| !sources.admits(peer.ip())) {
        return None;
    }
    match live.route.verdicts.of(origin) {
        Verdict::Forward { pool, snat } => Some((live, pool, snat)),
        Verdict::Drop | Verdict::Reject => None,
    }
}

async fn drained(endpoint: &Endpoint, drain: Duration) {
    endpoint.gone().await;
    sleep(drain).await;
}

/// Makes a connection end with a reset when it is closed.
fn reset(stream: &TcpStream) {
    // It may be gone already.
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

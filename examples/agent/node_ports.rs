//! Health-check node ports: one listener a Service, family and address.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
};

use axum::{Router, extract::State, response::Response};
use proxier::{ByFamily, Family, ObjectName, health::ServiceHealth};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

use crate::{http::respond, shared::Shared, source::Recorder};

/// What should be listened on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) services: BTreeMap<(ObjectName, Family), ServiceHealth>,
    /// The node's addresses for node ports; `None` for all.
    pub(crate) addresses: ByFamily<Option<Vec<IpAddr>>>,
    /// Something could not be listened on: the next sync tries again.
    pub(crate) failed: bool,
}

struct Running {
    port: NonZeroU16,
    at: Option<Vec<IpAddr>>,
    /// Ends with this value.
    _tasks: JoinSet<io::Result<()>>,
}

#[derive(Clone)]
struct Service {
    shared: Arc<Shared>,
    wanted: watch::Receiver<Wanted>,
    key: (ObjectName, Family),
}

/// Keeps the listeners in step with what is wanted.
pub(crate) async fn serve(shared: Arc<Shared>, wanted: watch::Sender<Wanted>, recorder: Recorder) {
    let mut changes = wanted.subscribe();
    let mut running: BTreeMap<(ObjectName, Family), Running> = BTreeMap::new();
    let mut troubled = std::collections::BTreeSet::new();
    while changes.changed().await.is_ok() {
        let now = changes.borrow_and_update().clone();
        running.retain(|key, it| {
            let health = now.services.get(key);
            health.is_some_and(|health| health.port == it.port && *now.addresses.of(key.1) == it.at)
        });
        let mut failed = false;
        for (key, health) in &now.services {
            if running.contains_key(key) {
                continue;
            }
            let at = now.addresses.of(key.1).clone();
            let service = Service {
                shared: Arc::clone(&shared),
                wanted: wanted.subscribe(),
                key: key.clone(),
            };
            match listen(key.1, health.port, at.as_deref()) {
                Ok(sockets) => {
                    let tasks = start(sockets, &service);
                    running.insert(key.clone(), Running { port: health.port, at, _tasks: tasks });
                    troubled.remove(key);
                }
                Err(error) => {
                    failed = true;
                    if troubled.insert(key.clone()) {
                        recorder.health_port(&key.0, &error);
                    }
                }
            }
        }
        wanted.send_if_modified(|wanted| {
            wanted.failed = failed;
            false
        });
    }
}

fn start(sockets: Vec<TcpListener>, service: &Service) -> JoinSet<io::Result<()>> {
    let mut tasks = JoinSet::new();
    for socket in sockets {
        let router = Router::new().fallback(answer).with_state(service.clone());
        tasks.spawn(async move { axum::serve(socket, router).await });
    }
    tasks
}

/// Listens on every address or on none.
fn listen(family: Family, port: NonZeroU16, at: Option<&[IpAddr]>) -> io::Result<Vec<TcpListener>> {
    let any = [match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }];
    at.unwrap_or(&any).iter().map(|ip| listen_at(SocketAddr::new(*ip, port.get()))).collect()
}

/// A listener of one family only: the other family may have the same port.
pub(crate) fn listen_at(at: SocketAddr) -> io::Result<TcpListener> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {at}: {error}"));
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into()).map_err(named)?;
    socket.listen(128).map_err(named)?;
    TcpListener::from_std(socket.into())
}

async fn answer(State(service): State<Service>) -> Response {
    let healthy = service.shared.is_healthy();
    let health = service.wanted.borrow().services.get(&service.key).cloned();
    let gone = || ServiceHealth {
        service: service.key.0.clone(),
        family: service.key.1,
        port: NonZeroU16::MIN,
        local_endpoints: 0,
    };
    respond(health.unwrap_or_else(gone).answer(healthy))
}

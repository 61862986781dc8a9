//! Reaching an endpoint.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use nix::libc::EINPROGRESS;
use proxier_core::ir::{Pool, Snat};
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{sleep, timeout},
};
use tracing::debug;

use crate::{
    service::Endpoint,
    shared::Shared,
    socket::{Stance, is_exhaustion, is_taken, tcp_outgoing},
    table::Live,
};

/// Connects to an endpoint: as many attempts as there are timeouts, with another endpoint each time
/// as long as there is one. An endpoint that refused is not asked again.
///
/// # Cancel safety
/// The connection is closed.
pub(crate) async fn reach(
    shared: &Shared,
    live: &Live,
    pool: Pool,
    snat: Snat,
    client: SocketAddr,
) -> Option<(TcpStream, Arc<Endpoint>)> {
    let (mut tried, mut refused) = (Vec::new(), Vec::new());
    for limit in &shared.config.tcp.dial_timeouts {
        let choose =
            |not: &[SocketAddr]| live.service.choose(pool, client.ip(), not, Instant::now());
        let endpoint = choose(&tried).or_else(|| choose(&refused))?;
        let from = source(shared, snat, client, &endpoint);
        match timeout(*limit, dial(shared, endpoint.member.addr, from)).await {
            Ok(Ok(stream)) => {
                live.service.reached(&endpoint);
                return Some((stream, endpoint));
            }
            Ok(Err(error)) if is_exhaustion(&error) => sleep(*limit).await,
            Ok(Err(error)) => {
                debug!(endpoint = %endpoint.member.addr, %error, "an endpoint refused");
                live.service.failed(&endpoint, client.ip(), Instant::now());
                tried.push(endpoint.member.addr);
                refused.push(endpoint.member.addr);
            }
            Err(_) => {
                live.service.failed(&endpoint, client.ip(), Instant::now());
                tried.push(endpoint.member.addr);
            }
        }
    }
    None
}

/// The source address that an endpoint shall see, unless it is one of the node's.
pub(crate) fn source(
    shared: &Shared,
    snat: Snat,
    client: SocketAddr,
    endpoint: &Endpoint,
) -> Option<SocketAddr> {
    // An endpoint that meets its own address as source would answer itself.
    let foreign = client.ip() != endpoint.member.addr.ip() && !client.ip().is_loopback();
    let transparent = shared.stance() == Stance::Transparent;
    (snat == Snat::Preserve && foreign && transparent).then_some(client)
}

async fn dial(shared: &Shared, to: SocketAddr, from: Option<SocketAddr>) -> io::Result<TcpStream> {
    let connect = async |from| {
        let socket = tcp_outgoing(to, from, shared.stance())?;
        if let Err(error) = socket.connect(&to.into())
            && error.raw_os_error() != Some(EINPROGRESS)
        {
            return Err(error);
        }
        let stream = TcpStream::from_std(socket.into())?;
        // Only a connection that failed is asked why.
        if stream.ready(Interest::WRITABLE | Interest::ERROR).await?.is_error()
            && let Some(error) = stream.take_error()?
        {
            return Err(error);
        }
        Ok(stream)
    };
    match connect(from).await {
        // The client's own port is in use between the two: another one will do.
        Err(error)
            if is_taken(&error)
                && let Some(from) = from =>
        {
            connect(Some(SocketAddr::new(from.ip(), 0))).await
        }
        other => other,
    }
}

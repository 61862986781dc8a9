//! Node ports follow the addresses of the node.

use std::path::Path;

use proxier_core::model::Event;
use proxier_netlink::{Addresses, AddressesError, NetNs, OpenError};

use crate::handle::{Handle, Stopped};

/// Following the addresses of a node came to an end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// They could not be listed.
    #[error("cannot follow the addresses of the node")]
    List(#[from] AddressesError),
    /// The kernel could not be asked.
    #[error("cannot ask for the addresses of the node")]
    Open(#[from] OpenError),
    /// The driver is gone.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Tells a driver the addresses on the interfaces of a network namespace (the current one by default),
/// now and as they change: [`NodeEnv::interface_addresses`](crate::model::NodeEnv::interface_addresses)
/// need not be known. Link-local addresses of IPv6 are left out.
///
/// Run it beside the driver. Notices changes by rtnetlink events; costs nothing in between.
///
/// # Errors
/// Returns only with one: [`FollowError::Stopped`] when the driver is gone, which is the usual end.
///
/// # Cancel safety
/// Safe to drop; the driver keeps the addresses it was told last.
pub async fn follow_addresses(netns: Option<&Path>, handle: &Handle) -> Result<(), FollowError> {
    let netns = netns.map_or(NetNs::Current, |path| NetNs::Path(path.to_owned()));
    let mut addresses = Addresses::open(&netns)?;
    loop {
        let list = addresses.next().await?;
        handle.send(Event::Addresses(list)).await?;
    }
}

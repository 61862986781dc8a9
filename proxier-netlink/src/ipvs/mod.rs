//! IPVS: the kernel's virtual servers, over generic netlink.
//!
//! ```no_run
//! use std::net::Ipv4Addr;
//!
//! use proxier_netlink::NetNs;
//! use proxier_netlink::ipvs::{Batch, Dest, Ipvs, Protocol, Service, VirtualServer};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut ipvs = Ipvs::open(&NetNs::Current).await?;
//! let key = VirtualServer::address(Ipv4Addr::new(10, 96, 0, 10).into(), 53, Protocol::UDP);
//! let mut batch = Batch::new();
//! batch.op(0);
//! batch.new_service(&Service::new(key, "rr"));
//! batch.op(1);
//! batch.new_dest(key, &Dest::new(Ipv4Addr::new(10, 1, 1, 1).into(), 5353));
//! // Not a transaction: each operation is carried out or refused by itself.
//! for refusal in ipvs.commit(&batch).await? {
//!     eprintln!("{refusal} ({:?})", refusal.tag);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The family is found by name as it is opened, which makes a kernel with modules load `ip_vs`.
//! Schedulers are modules too, loaded when they are first named.
//!
//! Nothing here flushes: other programs' virtual servers are not ours to delete.

mod batch;
mod error;
mod read;
mod socket;
mod types;
mod wire;

pub use batch::Batch;
pub use error::{IpvsError, OpKind, Refusal};
pub use socket::Ipvs;
pub use types::{
    AddressFamily, Dest, DestEntry, Forward, Info, Persistence, Protocol, SCHEDULERS, Service,
    ServiceEntry, ServiceFlags, Stats, Timeouts, VirtualServer,
};

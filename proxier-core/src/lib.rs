//! The pure core of proxier: Kubernetes Services in, kernel plans out.
//!
//! It does no I/O, reads no clock, draws no random numbers, starts no thread and needs no async
//! runtime: values go in and values come out, the same ones for the same input. Time, where it
//! matters, is an argument. What talks to kernels and clusters is in other crates: the backends and
//! the facade `proxier`, which re-exports everything here.
//!
//! ```
//! use proxier_core::{Update, model::{api, Event, EndpointSlice, NodeEnv, Service, Store}};
//!
//! let mut object = api::Service::default();
//! object.metadata.namespace = "shop".into();
//! object.metadata.name = "cart".into();
//! object.spec.cluster_ip = "10.96.0.10".into();
//! object.spec.ports = vec![api::ServicePort { port: 80, ..Default::default() }];
//! let read = Service::read(&object);
//! assert!(read.problems.is_empty());
//!
//! let mut store = Store::new(NodeEnv::default());
//! store.apply(Event::Services(read.value.into_iter().collect()));
//! store.apply(Event::EndpointSlices(Vec::<EndpointSlice>::new()));
//! let Some(Update::Reset { fragments, .. }) = store.take() else { panic!("the first update") };
//! assert_eq!(fragments[0].id.to_string(), "shop/cart/TCP/IPv4");
//! ```
//!
//! | feature | what it adds |
//! |---|---|
//! | `manifest` | reading Kubernetes YAML and JSON ([`manifest`]) |
//! | `test-util` | a strict fake kernel, a toy backend and generators ([`testing`]), for authors of backends |
mod claims;
pub mod conntrack;
pub mod engine;
pub mod explain;
mod factory;
pub mod health;
pub mod ir;
pub mod lower;
pub mod maglev;
#[cfg(feature = "manifest")]
pub mod manifest;
pub mod model;
pub mod name;
pub mod pace;
mod proxier;
pub mod select;
pub mod sim;
pub mod spi;
#[cfg(feature = "test-util")]
pub mod testing;

pub use factory::{BackendFactory, OpenContext, OpenError, Suitability, Xtables, capture_bit};
pub use name::{ByFamily, Family, FragmentId, ObjectName, Protocol};
pub use proxier::{
    Capabilities, Change, Count, Counter, Degraded, Mode, OpCount, PlanSummary, PlannedOp, Proxier,
    Revision, RuleCount, Spreading, Status, SyncError, SyncReport, Totals, UnknownMode, Update,
    Verb,
};

/// An error with its causes, in one line.
#[must_use]
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

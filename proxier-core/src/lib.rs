//! The pure core of proxier: Kubernetes Services in, kernel plans out.
mod claims;
pub mod conntrack;
pub mod engine;
mod factory;
pub mod ir;
pub mod lower;
#[cfg(feature = "manifest")]
pub mod manifest;
pub mod model;
pub mod name;
pub mod pace;
mod proxier;
pub mod select;
pub mod spi;
#[cfg(feature = "test-util")]
pub mod testing;

pub use factory::{BackendFactory, OpenContext, OpenError, Suitability};
pub use name::{ByFamily, Family, FragmentId, ObjectName, Protocol};
pub use proxier::{
    Capabilities, Change, Degraded, Mode, OpCount, PlanSummary, PlannedOp, Proxier, Revision,
    Status, SyncError, SyncReport, Totals, UnknownMode, Update, Verb,
};

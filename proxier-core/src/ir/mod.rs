//! The backend-neutral representation: what a node must do, without any Kubernetes in it.
//!
//! A [`Fragment`] is one Service port in one family: ways in ([`Frontend`]) and endpoints
//! ([`Member`]). All traffic policy is in the three rows of each frontend's [`Verdicts`]; no
//! backend ever sees `externalTrafficPolicy`, topology hints or terminating endpoints. Embedders
//! may make fragments of their own.

mod balance;
mod fragment;
mod node_view;
mod verdict;

pub use balance::{Balance, MAX_WEIGHT};
pub use fragment::{Fragment, Frontend, FrontendKey, FrontendKind, Member, SourceFilter, WayIn};
pub use node_view::{Detector, FamilyView, NodePorts, NodeView};
pub use verdict::{Origin, Pool, Snat, Verdict, Verdicts};

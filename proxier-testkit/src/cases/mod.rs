//! Conformance cases: what a Service proxier must do, as data (schema `svcproxy-cases/1`).
//!
//! A [`CaseFile`] holds named worlds and numbered cases. [`run`] decides one case against the core,
//! and a packet flow against the packet model, the fake kernel of a backend, or a real kernel (see
//! [`Kernel`]). Every case is passed, failed with what was expected and what came instead, or not
//! applicable with the reason; nothing is skipped silently.
//!
//! Any file of the schema is accepted: no name or address is known here.

mod affinity;
mod change;
mod conntrack;
mod deviations;
mod file;
mod flow;
mod health;
mod real;
mod report;
mod run;
mod schema;
mod select;
mod subject;
mod timing;
mod world;

pub use deviations::{DEVIATIONS, Deviation};
pub use file::{Case, CaseError, CaseFile};
pub use flow::{FlowVerdict, SourceSpec, Sources, trace};
pub use real::{RealError, RealKernel};
pub use report::{Report, Summary, Verdict};
pub use run::{Kernel, run};
pub use schema::{
    DetectLocalSpec, EndpointSpec, IngressSpec, NodeSpec, Origin, PortSpec, ServiceSpec, Settings,
    SlicePortSpec, SliceSpec,
};
pub use subject::{FakeNode, NameInput, Subject};
pub use world::CaseWorld;

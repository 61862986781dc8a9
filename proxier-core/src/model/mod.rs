//! What Kubernetes says, checked and normalised: Services, EndpointSlices, the node.

mod address;
pub mod api;
mod endpoints;
mod names;
mod node;
mod problem;
mod service;
mod store;
mod tuning;

pub use address::{parse_ip, parse_net};
pub use endpoints::{Endpoint, EndpointSlice, Hints, SlicePort};
pub use node::{DetectLocal, NodeEnv, NodePortAddresses};
pub use problem::{Problem, Read};
pub use service::{PortView, Service, ServicePort, ServiceType, TrafficPolicy};
pub use store::{Conflict, Event, Object, ObjectKey, Pending, Store, Trigger};

//! Network namespace labs and traffic probes for testing Service proxiers on a real kernel.
//!
//! A [`Lab`](lab::Lab) is a set of network namespaces that live and die with a value;
//! a [`Topology`](topology::Topology) wires some of them up as a small cluster (a node under test,
//! its pods, another node, clients outside); a [`Responder`](traffic::Responder) answers in one
//! namespace and [`probe`](traffic::probe) asks from another, and says who answered, from which
//! address the question seemed to come, or whether the packet was rejected or dropped.
//!
//! What it deliberately does not do: it programs no Services, knows no backend, and never touches
//! the interfaces, rules or sysctls of the host.
//!
//! ```no_run
//! use proxier_testkit::{lab, topology::Topology, traffic::{self, Endpoint, ProbeSpec, Responder}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! lab::enter()?; // first thing in main: before any thread exists
//! let world = Topology::standard().build("demo")?;
//! let pod = world.ns("pod_a")?;
//! let _web = Responder::start(&pod, [Endpoint::tcp("pod_a", "10.61.3.21:8080".parse()?)])?;
//! let spec = ProbeSpec::tcp("10.61.3.21:8080".parse()?);
//! let outcome = world.client().block_on({
//!     let client = world.client().clone();
//!     async move { traffic::probe(&client, &spec).await }
//! })?;
//! assert_eq!(outcome.by(), Some("pod_a"));
//! # Ok(())
//! # }
//! ```
//!
//! # Privileges and kernel
//!
//! Either `CAP_NET_ADMIN` and `CAP_SYS_ADMIN` (root), or unprivileged user namespaces; see
//! [`lab::enter`] for programs and [`lab::gate`] for tests. The kernel needs network namespaces,
//! veth, bridge, IPv6 and policy routing (`CONFIG_IP_MULTIPLE_TABLES`,
//! `CONFIG_IPV6_MULTIPLE_TABLES`).
//!
//! # Bridges and br_netfilter
//!
//! Pods own a host prefix (/32, /128) and reach everything through their node's address, so the
//! packets of two pods on one bridge are routed, not bridged. `net.bridge.bridge-nf-call-*` is off
//! in every namespace of a lab: a packet passes netfilter once, on its way through the node, and
//! a pod can be sent back to itself without hairpin mode.
//!
//! # Cargo features
//!
//! | Feature | What it does |
//! |---|---|
//! | `apiserver` | an API server for tests of whatever watches a cluster |

#[cfg(feature = "apiserver")]
pub mod apiserver;
pub mod backend;
pub mod cases;
pub mod lab;
pub mod topology;
pub mod traffic;
mod wait;

pub use wait::{Overdue, eventually, eventually_async};

//! kube-proxy as a library: programs a node with Kubernetes Services, in the mode of your choice.
//!
//! A pure core turns Services, EndpointSlices and the node into *fragments* and decides for each
//! which endpoints every kind of client may reach; a backend turns fragments into kernel objects.
//! All modes mean the same. This crate is the face of it: [`open`] a [`Proxier`], give it to a
//! [`Driver`], feed the driver with events.
//!
//! It does not talk to an API server, does not touch sysctls, starts no process and installs no
//! signal handler, logger or allocator.
//!
//! ```no_run
//! use proxier::{Driver, Mode, OpenContext, Pacing, model::NodeEnv, open};
//!
//! # async fn embed(event: proxier::model::Event) -> Result<(), Box<dyn std::error::Error>> {
//! let proxier = open(Mode::Iptables, &OpenContext::default()).await?;
//! let env = NodeEnv { name: "worker-1".into(), ..NodeEnv::default() };
//! let (driver, handle) = Driver::new(proxier, env, Pacing::default());
//! let task = tokio::spawn(driver.run(std::future::pending()));
//! handle.send(event).await?;
//! println!("{:?}", handle.settle().await?.last);
//! # task.await?;
//! # Ok(()) }
//! ```
//!
//! # Privileges and kernel
//!
//! Programming needs `CAP_NET_ADMIN` in the user namespace that owns the network namespace, and
//! what the mode needs of the kernel: [`probe`] finds out and says what is missing.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `addresses` | yes | `follow_addresses`: node ports follow the addresses of the node |
//! | `iptables` | yes | [`Mode::Iptables`] |
//! | `ipvs` | yes | [`Mode::Ipvs`], and `ipvs` for its own settings and sysctls |
//! | `manifests` | yes | `Manifests`: Services from YAML and JSON files |
//! | `userspace` | yes | [`Mode::Userspace`] |

#[cfg(feature = "addresses")]
mod addresses;
mod driver;
mod handle;
#[cfg(feature = "manifests")]
mod manifests;
mod observe;
mod open;
mod swap;

#[cfg(feature = "addresses")]
pub use addresses::{FollowError, follow_addresses};
pub use driver::{Driver, Pacing, Standing};
pub use handle::{Handle, Stopped};
#[cfg(feature = "manifests")]
pub use manifests::{ManifestError, Manifests, Snapshot};
pub use observe::{Cause, Observer, Synced};
pub use open::{factory, modes, open, probe};
#[cfg(feature = "ipvs")]
pub use proxier_backend_ipvs as ipvs;
pub use proxier_core::*;
pub use swap::{Swap, SwapError, Swapped};

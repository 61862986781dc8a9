//! Feeds proxier from a Kubernetes API server.
//!
//! [`Watch`] lists and watches Services, EndpointSlices, ServiceCIDRs and the own Node through a
//! [`kube::Client`] of the embedder's (or [`Connection`]'s) and passes them on as
//! [`Event`](proxier_core::model::Event)s. Nothing is passed on before the first lists are complete.
//! [`SourceStatus`] tells whether the server is heard, and if not, why, in words that say what to do.
//! [`Recorder`] publishes Kubernetes Events about what cannot be programmed.
//!
//! What it deliberately does not do: it keeps no copy of the cluster once the first lists are passed
//! on, installs nothing global (neither subscriber nor TLS provider), and never writes to the cluster
//! except for Events.
//!
//! ```no_run
//! use proxier_core::model::{Event, NodeEnv, Store};
//! use proxier_kube::{Connection, Options, Watch};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Connection::default().client().await?;
//! let settings = NodeEnv { name: "node-a".into(), ..NodeEnv::default() };
//! let watch = Watch::new(client, settings.clone(), Options::default());
//! let status = watch.status();
//! let mut store = Store::new(settings);
//! let sink = |event: Event| {
//!     store.apply(event); // with proxier: `handle.send(event)`
//!     std::future::ready(Ok::<(), std::convert::Infallible>(()))
//! };
//! watch.run(sink, std::future::pending()).await?;
//! assert!(status.borrow().started);
//! # Ok(())
//! # }
//! ```
//!
//! # Privileges
//!
//! `list` and `watch` on `services`, `nodes`, `endpointslices.discovery.k8s.io` and
//! `servicecidrs.networking.k8s.io`; for Events `create` and `patch` on `events.events.k8s.io`. The
//! cluster role `system:node-proxier`, which kube-proxy has, is enough.
//!
//! # Cargo features
//!
//! | Feature | What it does |
//! |---|---|
//! | `latest` (default) | picks the newest Kubernetes version of `k8s-openapi`, which demands that one program-wide choice is made; a program that makes its own switches this off, since this crate needs none in particular |

mod ask;
mod backoff;
mod connect;
mod events;
mod follow;
mod gather;
mod kinds;
mod options;
mod status;
mod trouble;
mod watch;
mod wire;

pub use connect::{ConnectError, Connection};
pub use events::{Notice, Publisher, Recorder, Regarding};
pub use kinds::Kind;
pub use kube;
pub use options::Options;
pub use status::{Counts, KindStatus, SourceStatus, Standing};
pub use trouble::{Trouble, TroubleKind};
pub use watch::Watch;

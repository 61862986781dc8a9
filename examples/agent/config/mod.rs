//! Settings: flags, or kube-proxy's configuration file.

mod check;
mod duration;
mod load;
mod types;

pub(crate) use check::Resolved;
pub(crate) use duration::GoDuration;
pub(crate) use load::{Loaded, load};
pub(crate) use types::{Conntrack, KubeProxyConfiguration, ProxierConfiguration};

//! Choosing a mode at run time.

use proxier_core::{BackendFactory, Mode, OpenContext, OpenError, Proxier, Suitability};

/// The factory of a mode; `None` when this build does not have it.
#[must_use]
pub fn factory(mode: Mode) -> Option<Box<dyn BackendFactory>> {
    match mode {
        #[cfg(feature = "iptables")]
        Mode::Iptables => Some(Box::new(proxier_backend_iptables::Factory)),
        #[cfg(not(feature = "iptables"))]
        Mode::Iptables => None,
        #[cfg(feature = "ipvs")]
        Mode::Ipvs => Some(Box::new(proxier_backend_ipvs::Factory)),
        #[cfg(not(feature = "ipvs"))]
        Mode::Ipvs => None,
        #[cfg(feature = "nftables")]
        Mode::Nftables => Some(Box::new(proxier_backend_nftables::Factory)),
        #[cfg(not(feature = "nftables"))]
        Mode::Nftables => None,
        #[cfg(feature = "userspace")]
        Mode::Userspace => Some(Box::new(proxier_backend_userspace::Factory::default())),
        #[cfg(not(feature = "userspace"))]
        Mode::Userspace => None,
    }
}

/// The modes of this build.
pub fn modes() -> impl Iterator<Item = Mode> {
    Mode::ALL.into_iter().filter(|mode| factory(*mode).is_some())
}

/// Opens a proxier. Programs nothing yet.
///
/// # Errors
/// The mode is not part of this build, a setting cannot be used, or the kernel cannot be reached.
///
/// # Cancel safety
/// Safe to drop.
pub async fn open(mode: Mode, context: &OpenContext) -> Result<Box<dyn Proxier>, OpenError> {
    let factory = factory(mode).ok_or(OpenError::Missing(mode))?;
    factory.open(context).await
}

/// Finds out whether a mode can work here. Leaves nothing behind.
///
/// # Cancel safety
/// Safe to drop.
pub async fn probe(mode: Mode, context: &OpenContext) -> Suitability {
    match factory(mode) {
        Some(factory) => factory.probe(context).await,
        None => {
            Suitability { available: false, reasons: vec![OpenError::Missing(mode).to_string()] }
        }
    }
}

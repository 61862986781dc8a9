//! Everything with real packets, in IPVS mode. One test binary, since each boots a guest where the
//! machine's kernel has no IPVS (see `tests/runner`).
#![expect(clippy::duplicate_mod, reason = "both are test binaries of their own, too")]

#[path = "flows.rs"]
mod flows;
#[path = "swap.rs"]
mod swap;
#[path = "traffic.rs"]
mod traffic;

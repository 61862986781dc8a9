//! Which modes a test binary is about.

use proxier::Mode;

/// IPVS in the test binary that runs on a kernel that has it (`tests/runner`), all others in the rest.
pub(crate) fn modes_here() -> impl Iterator<Item = Mode> {
    let has_ipvs = env!("CARGO_CRATE_NAME") == "ipvs";
    proxier::modes().filter(move |mode| (*mode == Mode::Ipvs) == has_ipvs)
}

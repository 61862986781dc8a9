//! For tests of backends: a fake kernel that is stricter than the real one, a toy backend, and
//! generators.

mod fake;
pub mod generate;
mod toy;

pub use fake::{FakeKernel, Fault};
pub use toy::Toy;

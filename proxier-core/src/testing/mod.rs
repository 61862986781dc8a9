//! For tests of backends: a fake kernel that is stricter than the real one, theorems, a toy backend,
//! and generators.

mod fake;
pub mod generate;
pub mod laws;
mod toy;

pub use fake::{FakeKernel, Fault};
pub use toy::Toy;

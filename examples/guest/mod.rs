//! A kernel that has IPVS, for examples that need one: the machine's own, or a guest's.

use std::{env, io, os::unix::process::CommandExt, path::Path, process::Command};

/// Set where this program runs again, so that it does not do so for ever.
const AGAIN: &str = "PROXIER_EXAMPLE_IN_GUEST";

/// What to say where there is no such kernel.
pub(crate) const ADVICE: &str = "this kernel has no IPVS, and no guest kernel is built yet: \
     scripts/uml/kernel builds one, once, in about ten minutes";

/// Why the program goes on here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stays {
    /// This kernel has IPVS, or the program runs where it was looked for already.
    Found,
    /// There is no guest kernel.
    Nowhere,
}

/// Runs this program again where IPVS is, with the same arguments and more in its environment, and
/// returns only if it is here already or nowhere.
///
/// # Errors
/// The guest cannot be started.
pub(crate) fn enter(more: &[(&str, &str)]) -> io::Result<Stays> {
    if Path::new("/proc/net/ip_vs").exists() || env::var_os(AGAIN).is_some() {
        return Ok(Stays::Found);
    }
    // Of the repository, whichever of its packages this is part of.
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let Some(scripts) = above.find_map(|it| {
        let scripts = it.join("scripts/uml");
        scripts.is_dir().then_some(scripts)
    }) else {
        return Ok(Stays::Nowhere);
    };
    let is_built = Command::new(scripts.join("kernel")).arg("--if-built").output();
    if !is_built.is_ok_and(|it| it.status.success()) {
        return Ok(Stays::Nowhere);
    }
    let mut again = Command::new(scripts.join("run"));
    again
        .arg(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env(AGAIN, "1")
        .envs(more.iter().copied());
    Err(again.exec())
}

//! What `ipvsadm` takes for the same virtual servers.

use std::{
    error::Error,
    fmt::Write as _,
    io::Write,
    process::{Command, Stdio},
    time::Instant,
};

use proxier_testkit::lab::{Lab, Ns};

use crate::world::{self, PORT, TARGET_PORT, World};

/// Changes that are timed.
const CHANGES: usize = 40;

/// What it took.
pub(crate) struct Peer {
    pub(crate) load_ms: f64,
    /// A destination goes, or comes back: one process each, as no shell or daemon would do better.
    pub(crate) change_us: Vec<f64>,
}

/// Restores the world into an empty namespace, and changes it.
pub(crate) fn measure(world: World) -> Result<Peer, Box<dyn Error>> {
    let lab = Lab::new("modes")?;
    let ns = lab.ns("node")?;
    let load_ms = restore(&ns, &everything(world))? / 1e3;
    let change = |step: usize| {
        let index = (step / 2).wrapping_mul(7919) % world.services;
        let verb = if step.is_multiple_of(2) { "-d" } else { "-a" };
        restore(&ns, &destination(world, index, world.endpoints / 2, verb))
    };
    let change_us = (0..CHANGES).map(change).collect::<Result<_, _>>()?;
    Ok(Peer { load_ms, change_us })
}

fn everything(world: World) -> String {
    let mut text = String::new();
    for index in 0..world.services {
        // Writing to a string does not fail.
        writeln!(text, "-A -t {}:{PORT} -s rr", world::cluster_ip(index)).unwrap_or_default();
        for number in 0..world.endpoints {
            text.push_str(&destination(world, index, number, "-a"));
        }
    }
    text
}

fn destination(world: World, index: usize, number: usize, verb: &str) -> String {
    let (service, to) = (world::cluster_ip(index), world::endpoint(world, index, number));
    let how = if verb == "-a" { " -m -w 1" } else { "" };
    format!("{verb} -t {service}:{PORT} -r {to}:{TARGET_PORT}{how}\n")
}

/// Microseconds of one `ipvsadm --restore`.
fn restore(ns: &Ns, text: &str) -> Result<f64, Box<dyn Error>> {
    let mut command = Command::new("ipvsadm");
    command.arg("--restore").stdin(Stdio::piped()).stdout(Stdio::null());
    let began = Instant::now();
    let mut process = ns.run(|| command.spawn())??;
    if let Some(mut stdin) = process.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let status = process.wait()?;
    if !status.success() {
        return Err(format!("ipvsadm --restore ended with {status}").into());
    }
    Ok(began.elapsed().as_secs_f64() * 1e6)
}

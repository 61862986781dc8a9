//! Builds the standard world, lets everybody ask a pod, and shows what a lab is.
//!
//! `cargo run -p proxier-testkit --example lab [-- --keep]`, as root or as any user who may make
//! user namespaces.
#![expect(clippy::print_stdout, reason = "an example talks to a human")]

use std::error::Error;
use std::net::SocketAddr;

use proxier_testkit::lab;
use proxier_testkit::topology::Topology;
use proxier_testkit::traffic::{Endpoint, Many, ProbeSpec, Responder, probe, probe_many};

fn main() -> Result<(), Box<dyn Error>> {
    // Before any thread exists: that is why main is not async.
    println!("privileges: {:?}", lab::enter()?);
    let world = Topology::standard().build("example")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;

    let pod = SocketAddr::new(world.v4("pod_a")?, 80);
    let _web = Responder::start(&world.ns("pod_a")?, [Endpoint::tcp("pod_a", pod)])?;
    for name in ["client", "node", "pod_b", "remote_a"] {
        let outcome = runtime.block_on(probe(&world.ns(name)?, &ProbeSpec::tcp(pod)));
        println!("{name:<10} {outcome}");
    }
    let closed = ProbeSpec::tcp(SocketAddr::new(pod.ip(), 81));
    println!("{:<10} {}", "port 81", runtime.block_on(probe(world.client(), &closed)));
    let many = Many::new(1000);
    let tally = runtime.block_on(probe_many(world.client(), &ProbeSpec::tcp(pod), &many));
    println!("{:<10} {tally}", "1000 times");

    if std::env::args().any(|arg| arg == "--keep") {
        println!("\nlook around, then press return:\n{}", world.lab().enter_hints());
        std::io::stdin().read_line(&mut String::new())?;
    }
    Ok(())
}

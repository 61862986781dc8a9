//! The smallest useful embedding: keeps a network namespace in step with Kubernetes manifests on
//! disk. Ctrl-C ends it and leaves the rules in force.
//!
//! `embed iptables --netns /run/netns/blue [--node worker-1] services.yaml endpointslices/ …`
#![expect(clippy::print_stdout, reason = "an example talks to a human")]

use lexopt::{Arg, ValueExt};
use proxier::{Driver, Handle, Manifests, Mode, OpenContext, Pacing, model::Event, model::NodeEnv};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let (mut mode, mut paths, mut host) = (None::<Mode>, Vec::new(), false);
    let (mut context, mut node) = (OpenContext::default(), NodeEnv::default());
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("host") => host = true,
            Arg::Long("netns") => context.netns = Some(args.value()?.into()),
            Arg::Long("node") => node.name = args.value()?.string()?,
            Arg::Value(name) if mode.is_none() => mode = Some(name.parse()?),
            Arg::Value(path) => paths.push(path.into()),
            Arg::Long(_) | Arg::Short(_) => return Err(arg.unexpected().into()),
        }
    }
    let (Some(mode), false) = (mode, paths.is_empty()) else {
        return Err("usage: embed MODE --netns PATH|--host [--node NAME] MANIFEST...".into());
    };
    if host == context.netns.is_some() {
        return Err("say where: --netns PATH, or --host to program this very machine".into());
    }
    let manifests = Manifests::open(&paths)?;
    let proxier = proxier::open(mode, &context).await?;
    let (driver, handle) = Driver::new(proxier, node.clone(), Pacing::default());
    let ctrl_c = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    tokio::select! {
        _proxier = driver.run(ctrl_c) => Ok(()),
        stopped = feed(handle, manifests, node) => stopped,
    }
}

/// Passes on what the manifests say, whenever that changes.
async fn feed(handle: Handle, mut manifests: Manifests, mut node: NodeEnv) -> Outcome {
    loop {
        let snapshot = manifests.read()?;
        snapshot.problems().iter().for_each(|problem| println!("problem: {problem}"));
        snapshot.observe_node(&mut node);
        handle.send(Event::Node(Box::new(node.clone()))).await?;
        for event in snapshot.events() {
            handle.send(event).await?;
        }
        let now = handle.settle().await?;
        now.failure.iter().for_each(|why| println!("not programmed, trying again: {why}"));
        now.proxier.degraded.iter().for_each(|it| println!("left out: {} ({})", it.id, it.reason));
        now.last.iter().for_each(|it| println!("in {:?}: {} objects", now.took, it.ops.total()));
        manifests.changed().await?;
    }
}

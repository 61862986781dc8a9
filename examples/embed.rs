//! The smallest useful embedding: keeps a network namespace in step with manifests on disk, until
//! Ctrl-C. `embed nftables --netns /run/netns/blue [--node worker-1] services.yaml slices/ …`
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to a human")]

use lexopt::{Arg, ValueExt};
use proxier::{Driver, Handle, Manifests, Mode, OpenContext, Pacing, model::Event, model::NodeEnv};
type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    let Err(error) = embed().await else { return std::process::ExitCode::SUCCESS };
    let causes = std::iter::successors(Some(&*error), |error| error.source());
    eprintln!("embed: {}", causes.map(ToString::to_string).collect::<Vec<_>>().join(": "));
    std::process::ExitCode::FAILURE
}

async fn embed() -> Result<(), Failure> {
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
    let (Some(mode), true) = (mode, !paths.is_empty() && host != context.netns.is_some()) else {
        return Err("usage: embed MODE --netns PATH|--host [--node NAME] MANIFEST...".into());
    };
    let manifests = Manifests::open(&paths)?;
    let proxier = proxier::open(mode, &context).await?;
    let (driver, handle) = Driver::new(proxier, node.clone(), Pacing::default());
    tokio::select! {
        _proxier = driver.run(async { drop(tokio::signal::ctrl_c().await) }) => Ok(()),
        stopped = feed(handle, manifests, node) => stopped,
    }
}

/// Passes on what the manifests say, whenever that changes.
async fn feed(handle: Handle, mut files: Manifests, mut node: NodeEnv) -> Result<(), Failure> {
    loop {
        let snapshot = files.read()?;
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
        files.changed().await?;
    }
}

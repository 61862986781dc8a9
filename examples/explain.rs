//! Says why a packet goes where it goes, from Kubernetes manifests; nothing is programmed.
//!
//! `explain [MODE] --node NAME --from ADDRESS [--in INTERFACE] --to ADDRESS:PORT[/PROTOCOL]
//! [--cluster-cidr CIDR]... [--address ADDRESS]... [--json] MANIFEST...`
//!
//! A source that is an address of the node is the node's own; of others, `--in` says on which
//! interface the packet comes in. `--address` names further addresses of the node.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to a human")]

use std::{net::IpAddr, sync::Arc, time::Instant};

use lexopt::{Arg, ValueExt};
use proxier::{
    Change, Manifests, Mode, OpenContext, Revision, Update,
    explain::explain,
    model::{DetectLocal, NodeEnv, Store},
    sim::{Packet, Traits},
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: explain [MODE] --node NAME --from ADDRESS [--in INTERFACE] \
                     --to ADDRESS:PORT[/PROTOCOL] [--cluster-cidr CIDR]... [--address ADDRESS]... \
                     [--json] MANIFEST...";

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    let Err(error) = run().await else { return std::process::ExitCode::SUCCESS };
    let causes = std::iter::successors(Some(&*error), |error| error.source());
    eprintln!("explain: {}", causes.map(ToString::to_string).collect::<Vec<_>>().join(": "));
    std::process::ExitCode::FAILURE
}

async fn run() -> Outcome {
    let (mut mode, mut json, mut paths) = (Mode::Iptables, false, Vec::new());
    let (mut from, mut input, mut to) = (None::<IpAddr>, None::<String>, None::<String>);
    let (mut env, mut cidrs, mut addresses) = (NodeEnv::default(), Vec::new(), Vec::new());
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Long("address") => addresses.push(args.value()?.parse()?),
            Arg::Long("cluster-cidr") => cidrs.push(args.value()?.parse()?),
            Arg::Long("from") => from = Some(args.value()?.parse()?),
            Arg::Long("in") => input = Some(args.value()?.string()?),
            Arg::Long("json") => json = true,
            Arg::Long("node") => env.name = args.value()?.string()?,
            Arg::Long("to") => to = Some(args.value()?.string()?),
            Arg::Value(text) => match text.clone().string()?.parse() {
                Ok(named) => mode = named,
                Err(_) => paths.push(text.into()),
            },
            Arg::Long(_) | Arg::Short(_) => return Err(arg.unexpected().into()),
        }
    }
    let (Some(from), Some(to), false) = (from, to, paths.is_empty()) else {
        return Err(USAGE.into());
    };
    env.detect_local = DetectLocal::ClusterCidr(cidrs);
    let store = read(&paths, env, &addresses)?;
    let is_own = from.is_loopback() || store.env().interface_addresses.contains(&from);
    let (destination, protocol) = to.rsplit_once('/').unwrap_or((&to, "tcp"));
    let packet = Packet {
        source: from,
        input: (!is_own || input.is_some()).then(|| Arc::from(input.unwrap_or_default())),
        destination: destination.parse()?,
        protocol: protocol.to_ascii_uppercase().parse()?,
    };
    let began = Instant::now();
    let mut explanation = explain(&store, &Traits::of(mode), &packet, None);
    let took = began.elapsed();
    let id = explanation.matched.as_ref().map(|matched| &matched.id);
    if let Some(fragment) = id.and_then(|id| store.fragment(id)) {
        let node = Some(Arc::new(store.env().view()));
        let changes = vec![Change::Upsert(Arc::clone(fragment))];
        match proxier::open(mode, &OpenContext::default()).await {
            Ok(proxier) => {
                let delta = Update::Delta { revision: Revision(1), node, changes };
                let mut ops = proxier.plan(&delta).ops;
                ops.retain(|op| op.fragment.is_some());
                explanation.kernel = ops;
            }
            Err(error) => eprintln!("no kernel objects: {error}"),
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        print!("{explanation}");
        println!("(in {took:?})");
    }
    Ok(())
}

/// What the manifests say, for one node.
fn read(paths: &[std::path::PathBuf], mut env: NodeEnv, addresses: &[IpAddr]) -> Outcome<Store> {
    let mut manifests = Manifests::open(paths)?;
    let snapshot = manifests.read()?;
    snapshot.problems().iter().for_each(|problem| eprintln!("problem: {problem}"));
    snapshot.observe_node(&mut env);
    env.interface_addresses = env.ips.iter().chain(addresses).copied().collect();
    let mut store = Store::new(env);
    for event in snapshot.events() {
        store.apply(event);
    }
    store.take();
    Ok(store)
}

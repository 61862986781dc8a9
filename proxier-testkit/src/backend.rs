//! What the tests of every backend need: a world to program, and a look at whether the kernel holds
//! what the engine believes.
//!
//! Everything here panics where something is not as it should be: it is for tests only.
#![expect(clippy::panic, reason = "tests fail by it")]

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    io::Write,
    process::{Command, Stdio},
};

use proxier_core::{
    Family, Proxier, SyncReport, Update,
    engine::Engine,
    in_full,
    manifest::Manifest,
    model::{DetectLocal, Event, NodeEnv, Store},
    spi::{Backend, Dataplane},
};
use proxier_netlink::NetNs;

/// The node that worlds are written for: `tern`, with an address and a pod network of each family.
///
/// # Panics
/// Never: the addresses are constants.
#[must_use]
pub fn node() -> NodeEnv {
    fn all<T: std::str::FromStr<Err: Debug>>(texts: &[&str]) -> Vec<T> {
        let read = |text: &&str| text.parse().unwrap_or_else(|error| panic!("{text}: {error:?}"));
        texts.iter().map(read).collect()
    }
    NodeEnv {
        name: "tern".to_owned(),
        ips: all(&["172.20.7.11", "fd41:7::11"]),
        interface_addresses: all(&["127.0.0.1", "172.20.7.11", "::1", "fd41:7::11"]),
        detect_local: DetectLocal::ClusterCidr(all(&["10.61.0.0/16", "fd41:61::/32"])),
        ..NodeEnv::default()
    }
}

/// A store with the Services and EndpointSlices of manifests, and its first update.
///
/// # Panics
/// The manifests have problems.
#[must_use]
pub fn store(env: NodeEnv, yaml: &str) -> (Store, Update) {
    let manifest = Manifest::parse("world.yaml", yaml);
    let problems: Vec<_> = manifest.problems.iter().map(ToString::to_string).collect();
    assert!(problems.is_empty(), "{problems:?}");
    let mut store = Store::new(env);
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
    let Some(update) = store.take() else { panic!("no first update") };
    (store, update)
}

/// Syncs.
///
/// # Panics
/// Something was not programmed, or worth a warning, or the kernel does not hold what the engine
/// believes.
pub async fn sync<B: Backend, D: Dataplane<B>>(
    engine: &mut Engine<B, D>,
    update: Update,
) -> SyncReport {
    let report = engine.sync(update).await.unwrap_or_else(|error| panic!("{}", in_full(&error)));
    assert_eq!(report.degraded, [], "nothing is degraded");
    assert_eq!(report.warnings, [] as [String; 0], "no warnings");
    assert_consistent(engine).await;
    report
}

/// Reads the kernel back.
///
/// # Panics
/// It does not hold what the engine believes.
pub async fn assert_consistent<B: Backend, D: Dataplane<B>>(engine: &mut Engine<B, D>) {
    for family in Family::ALL {
        let predicted = engine.predicted(family);
        let actual = engine.dataplane_mut().dump(family).await;
        assert_same(&predicted, &actual.unwrap_or_else(|error| panic!("{}", in_full(&error))));
    }
}

/// Compares what should be with what is.
///
/// # Panics
/// They differ; the message names the first object.
pub fn assert_same<K: Ord + Display, V: Debug + Display + PartialEq>(
    predicted: &BTreeMap<K, V>,
    actual: &BTreeMap<K, V>,
) {
    for (key, value) in predicted {
        let Some(found) = actual.get(key) else { panic!("missing: {key}") };
        assert_eq!(found, value, "{key}\nis\n{found}\nand should be\n{value}");
    }
    for key in actual.keys() {
        assert!(predicted.contains_key(key), "unexpected: {key}");
    }
}

/// Runs a program in a network namespace with some input; returns its output.
///
/// # Panics
/// It could not be run, or failed.
#[must_use]
pub fn run(netns: &NetNs, program: &str, args: &[&str], input: &str) -> String {
    let run = || {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let outcome = netns.run(run).unwrap_or_else(|error| panic!("{}", in_full(&error)));
    let output = outcome.unwrap_or_else(|error: std::io::Error| panic!("{program}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

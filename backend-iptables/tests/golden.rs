//! What a first start writes, as text. `BLESS=1` writes the files again.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod common;

use std::{fmt::Write, path::Path};

use common::*;
use proxier_backend_iptables::{Config, Iptables, Layout};
use proxier_core::{Family, Proxier, Update, engine::Engine, model::NodeEnv, testing::FakeKernel};

/// Everything a first start writes, one family after the other.
fn plan(env: NodeEnv, world: &str, config: &Config) -> String {
    let (_, update) = store(env, world);
    let backend = || Iptables::new(config.clone()).unwrap();
    let engine = Engine::new(backend(), FakeKernel::new(&backend(), 1000), &Family::ALL);
    engine.plan(&update).to_string()
}

/// What a change from one world to another writes.
fn change(env: NodeEnv, before: &str, after: &str, config: &Config) -> String {
    let backend = || Iptables::new(config.clone()).unwrap();
    let mut engine = Engine::new(backend(), FakeKernel::new(&backend(), 1000), &Family::ALL);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (_, update) = store(env.clone(), before);
    runtime.block_on(engine.sync(update)).unwrap();
    let (_, update) = store(env, after);
    let Update::Reset { revision, node, fragments } = update else { panic!("a reset") };
    let update = Update::Reset { revision: revision.next(), node, fragments };
    engine.plan(&update).to_string()
}

/// The layout of kube-proxy.
fn exact() -> Config {
    Config::default().layout(Layout::KubeProxy)
}

fn check(file: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, actual).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let mut difference = String::new();
    for (at, (left, right)) in expected.lines().zip(actual.lines()).enumerate() {
        if left != right {
            writeln!(difference, "line {}:\n  is {right}\n  was {left}", at + 1).unwrap();
            break;
        }
    }
    assert!(expected == actual, "{file} differs; BLESS=1 writes it again\n{difference}");
}

#[test]
fn the_worked_example() {
    check("worked-example/plan.iptables.txt", &plan(env(), WORKED_EXAMPLE, &exact()));
    let tree = plan(env(), WORKED_EXAMPLE, &Config::default());
    check("worked-example/plan.tree.iptables.txt", &tree);
}

#[test]
fn everything() {
    check("everything/plan.iptables.txt", &plan(env(), EVERYTHING, &exact()));
    check("everything/plan.tree.iptables.txt", &plan(env(), EVERYTHING, &Config::default()));
}

#[test]
fn everything_on_another_node() {
    let config = exact().prefix("CUBE").masquerade_bit(31).drop_invalid(false).random_fully(false);
    check("everything/plan.other-node.iptables.txt", &plan(other_env(), EVERYTHING, &config));
}

#[test]
fn everything_without_a_detector() {
    check("everything/plan.blind.iptables.txt", &plan(blind_env(), EVERYTHING, &exact()));
}

#[test]
fn an_endpoint_goes() {
    let after: String = WORKED_EXAMPLE.lines().filter(|line| !line.contains("heron")).fold(
        String::new(),
        |mut text, line| {
            writeln!(text, "{line}").unwrap();
            text
        },
    );
    // The layout makes no difference to it.
    for config in [exact(), Config::default()] {
        let change = change(env(), WORKED_EXAMPLE, &after, &config);
        check("worked-example/change.iptables.txt", &change);
    }
}

//! What a first start and a change write, as text. `BLESS=1` writes the files again.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::Path;

use common::*;
use proxier_backend_nftables::{Config, Nftables};
use proxier_core::{Family, Proxier, Update, engine::Engine, model::NodeEnv, testing::FakeKernel};

const SHOP: &str = include_str!("golden/shop.yaml");

fn engine() -> Engine<Nftables, FakeKernel<Nftables>> {
    let backend = || Nftables::new(Config::default()).unwrap();
    Engine::new(backend(), FakeKernel::new(&backend(), 1000), &[Family::V4])
}

fn first(env: NodeEnv, world: &str) -> String {
    engine().plan(&store(env, world).1).to_string()
}

fn change(before: &str, after: &str) -> String {
    let mut engine = engine();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(engine.sync(store(env(), before).1)).unwrap();
    let Update::Reset { revision, node, fragments } = store(env(), after).1 else {
        panic!("a reset")
    };
    engine.plan(&Update::Reset { revision: revision.next(), node, fragments }).to_string()
}

fn check(file: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, actual).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = expected.lines().zip(actual.lines()).position(|(old, new)| old != new);
    assert!(expected == actual, "{file} differs at line {differs:?}; BLESS=1 writes it again");
}

#[test]
fn a_small_shop() {
    check("plan.shop.txt", &first(env(), SHOP));
}

#[test]
fn a_small_shop_on_another_node() {
    check("plan.shop.other-node.txt", &first(other_env(), SHOP));
}

#[test]
fn an_endpoint_goes() {
    let without: String = SHOP
        .lines()
        .filter(|line| !line.contains("10.61.3.21"))
        .fold(String::new(), |text, line| text + line + "\n");
    check("change.endpoint-goes.txt", &change(SHOP, &without));
    check("change.endpoint-comes.txt", &change(&without, SHOP));
}

//! What holds for any history, on a kernel in memory and on the real one.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use common::*;
use proptest::{collection::vec, prelude::*};
use proxier_backend_iptables::{Config, Iptables, Layout};
use proxier_core::{
    Family, Proxier, Update,
    engine::Engine,
    model::{Event, NodeEnv, Store},
    spi::{Backend, Objects},
    testing::{FakeKernel, generate},
};

fn backend() -> Iptables {
    Iptables::new(Config::default()).unwrap()
}

/// A store that has its first lists, which are empty.
fn empty_store() -> (Store, Update) {
    let mut store = Store::new(NodeEnv::default());
    store.apply(Event::Services(Vec::new()));
    store.apply(Event::EndpointSlices(Vec::new()));
    let update = store.take().unwrap();
    (store, update)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        history in vec(generate::burst(), 1..12), limit in prop_oneof![Just(3_usize), Just(1000)],
    ) {
        let (mut store, first) = empty_store();
        let kernel = FakeKernel::new(&backend(), limit);
        let mut engine = Engine::new(backend(), kernel, &Family::ALL);
        block_on(engine.sync(first)).unwrap();
        for burst in history {
            for event in burst {
                store.apply(event);
            }
            let Some(update) = store.take() else { continue };
            let plan = engine.plan(&update);
            let report = block_on(engine.sync(update)).unwrap();
            prop_assert!(report.degraded.is_empty(), "{:?}", report.degraded);
            prop_assert_eq!(plan.count(), report.ops);
        }
        prop_assert_eq!(&engine.dataplane().violations, &Vec::<String>::new());
        let kernel = FakeKernel::new(&backend(), limit);
        let mut fresh = Engine::new(backend(), kernel, &Family::ALL);
        block_on(fresh.sync(store.reset())).unwrap();
        for family in Family::ALL {
            assert_same(fresh.dataplane().objects.of(family), engine.dataplane().objects.of(family));
        }
    }

    #[test]
    fn compiling_again_gives_the_same(history in vec(generate::burst(), 1..6)) {
        let (mut store, _) = empty_store();
        for event in history.into_iter().flatten() {
            store.apply(event);
        }
        store.take();
        let node = store.env().view();
        for fragment in store.fragments() {
            let compiled = || {
                let mut out = Objects::default();
                backend().compile(&node, fragment, &(), &mut out).unwrap();
                format!("{out:?}")
            };
            prop_assert_eq!(compiled(), compiled());
        }
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn the_kernel_holds_what_any_history_says(
        history in vec(generate::burst(), 1..8),
        exact: bool,
        layout in prop_oneof![Just(Layout::Tree), Just(Layout::KubeProxy)],
    ) {
        block_on(async {
            let ns = Ns::new();
            let config = Config::default().exact(exact).layout(layout);
            let mut engine = ns.engine_with(config.clone());
            let (mut store, first) = empty_store();
            sync(&mut engine, first).await;
            for burst in history {
                for event in burst {
                    store.apply(event);
                }
                if let Some(update) = store.take() {
                    sync(&mut engine, update).await;
                }
            }
            for family in Family::ALL {
                for table in ["nat", "filter"] {
                    let listed = in_any_order(&ns.listing(family, table));
                    assert_eq!(listed, in_any_order(&rules_of(&engine.predicted(family), table)));
                }
            }
            let report = sync(&mut ns.engine_with(config), store.reset()).await;
            assert_eq!(report.ops.total(), 0, "a restart changes nothing");
            engine.cleanup().await.unwrap();
            assert_eq!(ns.run("nft", &["list", "ruleset"]), "");
        });
    }
}

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
    Family, Proxier,
    model::NodeEnv,
    spi::{Backend, Objects},
    testing::{generate, laws},
};

fn backend() -> Iptables {
    Iptables::new(Config::default()).unwrap()
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
        env in generate::node(),
        history in vec(generate::burst(), 1..12),
        faults in prop_oneof![Just(Vec::new()), generate::faults()],
        limit in prop_oneof![Just(3_usize), Just(1000)],
    ) {
        let refused = laws::any_history_ends_where_a_fresh_start_would(
            backend, env, &history, &faults, limit, laws::everything,
        );
        prop_assert_eq!(refused, []);
    }

    #[test]
    fn compiling_again_gives_the_same(history in vec(generate::burst(), 1..6)) {
        let mut store = laws::empty_store(NodeEnv::default());
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
            let mut store = laws::empty_store(NodeEnv::default());
            sync(&mut engine, store.take().unwrap()).await;
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

//! What holds for any history, on a kernel in memory and on the real one.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod common;

use common::*;
use proptest::{collection::vec, prelude::*};
use proxier_backend_nftables::{Config, Memo, Nftables};
use proxier_core::{
    Family, Proxier,
    model::NodeEnv,
    spi::{Backend, Objects as Declared},
    testing::{generate, laws},
};

fn backend() -> Nftables {
    Nftables::new(Config::default()).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, ..ProptestConfig::default() }
}

/// What objects mean: everything but which endpoint sits in which slot.
fn meaning(objects: &Objects) -> Vec<String> {
    let mut lines: Vec<_> = objects
        .iter()
        .map(|(key, value)| {
            let key = key.to_string();
            match key.rsplit_once(" . ") {
                Some((frontend, _)) if key.contains("-endpoints") => format!("{frontend} {value}"),
                _ => format!("{key} = {value}"),
            }
        })
        .collect();
    lines.sort();
    lines
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        env in generate::node(),
        history in vec(generate::tuned_burst(), 1..12),
        faults in prop_oneof![Just(Vec::new()), generate::faults()],
        limit in prop_oneof![Just(7_usize), Just(1000)],
    ) {
        let refused = laws::any_history_ends_where_a_fresh_start_would(
            backend, env, &history, &faults, limit, meaning,
        );
        prop_assert_eq!(refused, []);
    }

    #[test]
    fn compiling_again_with_the_returned_memo_changes_nothing(
        before in vec(generate::tuned_burst(), 1..6), after in generate::tuned_burst(),
    ) {
        let mut store = laws::empty_store(NodeEnv::default());
        let mut memos = std::collections::BTreeMap::<_, Memo>::new();
        for events in before.into_iter().chain([after]) {
            for event in events {
                store.apply(event);
            }
            store.take();
            let node = store.env().view();
            for fragment in store.fragments() {
                let compiled = |memo: &Memo| {
                    let mut out = Declared::default();
                    let memo = backend().compile(&node, fragment, memo, &mut out).unwrap();
                    (memo, format!("{out:?}"))
                };
                let memo = memos.get(&fragment.id).cloned().unwrap_or_default();
                let (memo, first) = compiled(&memo);
                let (again, second) = compiled(&memo);
                prop_assert_eq!(&memo, &again);
                prop_assert_eq!(first, second);
                memos.insert(fragment.id.clone(), memo);
            }
        }
    }

    #[test]
    fn foreign_changes_are_repaired(
        history in vec(generate::tuned_burst(), 1..6),
        picks in vec(any::<prop::sample::Index>(), 1..6),
    ) {
        let mut store = laws::empty_store(NodeEnv::default());
        for event in history.into_iter().flatten() {
            store.apply(event);
        }
        store.take();
        let mut engine = laws::fake(backend(), 1000);
        laws::now(engine.sync(store.reset())).unwrap();
        let objects = engine.dataplane_mut().objects.of_mut(Family::V4);
        let keys: Vec<_> = objects.keys().cloned().collect();
        for pick in picks {
            objects.remove(pick.get(&keys));
        }
        let report = laws::now(engine.audit()).unwrap();
        prop_assert!(report.drift > 0);
        laws::check(&engine);
        prop_assert_eq!(laws::now(engine.audit()).unwrap().drift, 0);
    }
}

proptest! {
    #![proptest_config(config(16))]

    #[test]
    fn the_kernel_holds_what_any_history_says(history in vec(generate::tuned_burst(), 1..10)) {
        block_on(async {
            let ns = Ns::new();
            let mut engine = ns.engine();
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
            let before = ns.ruleset();
            let report = sync(&mut ns.engine(), store.reset()).await;
            assert_eq!(report.ops.total(), 0, "a restart changes nothing");
            let copy = Ns::new();
            copy.feed("nft", &["-f", "-"], &before);
            assert_eq!(copy.ruleset(), before);
            engine.cleanup().await.unwrap();
            assert_eq!(ns.ruleset(), "");
        });
    }
}

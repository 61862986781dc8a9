//! What the core promises, as theorems over random clusters and histories.

use std::{collections::BTreeMap, sync::Arc};

use proptest::{collection::vec, prelude::*};
use proxier_core::{
    Family, Proxier, Update,
    ir::Fragment,
    model::{Event, NodeEnv, Object, Store},
    spi::Backend,
    testing::{
        Toy, generate,
        laws::{Fake, check, empty_store, fake, now},
    },
};

type Toys = Fake<Toy>;

/// A small batch limit makes splitting common.
const LIMIT: usize = 12;

fn toys(atomic: bool, limit: usize) -> Toys {
    fake(Toy::new(atomic), limit)
}

/// A store that hears only of the final objects.
fn fresh_store(events: &[Event], env: NodeEnv) -> Store {
    let mut history = empty_store(env);
    for event in events {
        history.apply(event.clone());
    }
    let mut services = BTreeMap::new();
    let mut slices = BTreeMap::new();
    for event in events {
        match event.clone() {
            Event::Apply(Object::Service(it)) => drop(services.insert(it.name().clone(), it)),
            Event::Apply(Object::EndpointSlice(it)) => drop(slices.insert(it.name().clone(), it)),
            Event::Delete(proxier_core::model::ObjectKey::Service(name)) => {
                drop(services.remove(&name))
            }
            Event::Delete(proxier_core::model::ObjectKey::EndpointSlice(name)) => {
                drop(slices.remove(&name));
            }
            Event::Addresses(_)
            | Event::Node(_)
            | Event::EndpointSlices(_)
            | Event::Services(_) => {}
        }
    }
    let mut store = Store::new(history.env().clone());
    store.apply(Event::EndpointSlices(slices.into_values().rev().collect()));
    store.apply(Event::Services(services.into_values().rev().collect()));
    store
}

fn apply_all(store: &mut Store, events: &[Event]) -> Option<Update> {
    for event in events {
        store.apply(event.clone());
    }
    store.take()
}

fn fragments(store: &Store) -> Vec<Arc<Fragment>> {
    store.fragments().cloned().collect()
}

/// The meaning of a kernel: everything but which endpoint sits in which slot.
fn meaning(engine: &Toys) -> Vec<String> {
    let mut lines = Vec::new();
    for family in Family::ALL {
        for (key, value) in engine.dataplane().objects.of(family) {
            lines.push(match key.rsplit_once(' ') {
                Some((pool, _)) if key.starts_with("1 slot") => format!("{pool} {value}"),
                _ => format!("{key} = {value}"),
            });
        }
    }
    lines.sort();
    lines
}

fn delta_ids(update: &Update) -> Option<usize> {
    match update {
        Update::Delta { node: None, changes, .. } => Some(changes.len()),
        Update::Delta { .. } | Update::Reset { .. } => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 256, ..ProptestConfig::with_cases(96) })]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..24),
        atomic: bool,
    ) {
        let mut store = empty_store(env.clone());
        let mut engine = toys(atomic, LIMIT);
        for burst in &bursts {
            if let Some(update) = apply_all(&mut store, burst) {
                now(engine.sync(update)).unwrap();
                check(&engine);
            }
        }
        let mut fresh = fresh_store(&bursts.concat(), env);
        let update = fresh.take();
        prop_assert_eq!(fragments(&store), fragments(&fresh));
        let mut restarted = toys(atomic, LIMIT);
        now(restarted.sync(update.unwrap())).unwrap();
        check(&restarted);
        prop_assert_eq!(meaning(&engine), meaning(&restarted));
    }

    #[test]
    fn a_change_visits_only_its_fragments(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..16),
    ) {
        let mut store = empty_store(env);
        let mut engine = toys(true, usize::MAX);
        for burst in &bursts {
            let Some(update) = apply_all(&mut store, burst) else { continue };
            let changes = delta_ids(&update);
            let plan = engine.plan(&update);
            let before = engine.dataplane().writes;
            let report = now(engine.sync(update)).unwrap();
            if let Some(changes) = changes {
                prop_assert_eq!(plan.visited, changes);
                prop_assert_eq!(report.visited, changes);
            }
            prop_assert_eq!(plan.ops.len(), report.ops.total());
            prop_assert_eq!(engine.dataplane().writes - before, report.ops.total());
        }
    }

    #[test]
    fn plans_are_deterministic_and_sync_does_what_plan_says(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..12),
    ) {
        let mut stores = [empty_store(env.clone()), empty_store(env)];
        let mut engines = [toys(true, usize::MAX), toys(true, usize::MAX)];
        for burst in &bursts {
            let [one, two] = [0, 1].map(|index| {
                let update = apply_all(&mut stores[index], burst)?;
                let plan = engines[index].plan(&update).to_string();
                let report = now(engines[index].sync(update)).unwrap();
                Some((plan, report))
            });
            prop_assert_eq!(one, two);
        }
    }

    #[test]
    fn disjoint_changes_commute(
        env in generate::node(),
        base in vec(generate::tuned_burst(), 1..8),
        burst in generate::tuned_burst(),
    ) {
        let mut store = empty_store(env);
        let mut engines = [toys(true, LIMIT), toys(true, LIMIT)];
        let start = apply_all(&mut store, &base.concat()).unwrap();
        for engine in &mut engines {
            now(engine.sync(start.clone())).unwrap();
        }
        let before = fragments(&store);
        let Some(Update::Delta { revision, node: None, changes }) = apply_all(&mut store, &burst)
        else {
            return Ok(());
        };
        // A frontend that moves from one fragment to another makes their changes dependent.
        let mut owners = BTreeMap::new();
        for fragment in before.iter().chain(&fragments(&store)) {
            for frontend in &fragment.frontends {
                let owner = owners.entry(frontend.key).or_insert_with(|| fragment.id.clone());
                prop_assume!(*owner == fragment.id);
            }
        }
        let single = |change| Update::Delta { revision, node: None, changes: vec![change] };
        for change in changes.iter().rev() {
            now(engines[0].sync(single(change.clone()))).unwrap();
        }
        now(engines[1].sync(Update::Delta { revision, node: None, changes })).unwrap();
        for engine in &engines {
            for family in Family::ALL {
                prop_assert_eq!(engine.dataplane().objects.of(family), &engine.predicted(family));
            }
        }
        prop_assert_eq!(meaning(&engines[0]), meaning(&engines[1]));
    }

    #[test]
    fn any_fault_is_repaired_without_a_flush(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..12),
        faults in generate::faults(),
        atomic: bool,
    ) {
        let mut store = empty_store(env);
        let mut engine = toys(atomic, LIMIT);
        engine.dataplane_mut().faults = faults.into();
        for burst in &bursts {
            if let Some(update) = apply_all(&mut store, burst) {
                now(engine.sync(update)).ok();
            }
        }
        engine.dataplane_mut().faults.clear();
        now(engine.retry()).unwrap();
        now(engine.audit()).unwrap();
        check(&engine);
        let mut clean = toys(atomic, LIMIT);
        now(clean.sync(store.reset())).unwrap();
        prop_assert_eq!(meaning(&engine), meaning(&clean));
    }

    #[test]
    fn a_restart_with_nothing_new_writes_nothing(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..12),
    ) {
        let mut store = empty_store(env);
        let mut engine = toys(true, LIMIT);
        for burst in &bursts {
            if let Some(update) = apply_all(&mut store, burst) {
                now(engine.sync(update)).unwrap();
            }
        }
        let mut restarted = toys(true, LIMIT);
        restarted.dataplane_mut().objects = engine.dataplane().objects.clone();
        let report = now(restarted.sync(store.reset())).unwrap();
        prop_assert_eq!(report.ops.total(), 0);
        prop_assert_eq!(restarted.dataplane().writes, 0);
        let again = now(restarted.audit()).unwrap();
        prop_assert_eq!((again.ops.total(), again.drift), (0, 0));
    }

    #[test]
    fn a_refused_fragment_does_not_disturb_others(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..12),
        victim in any::<prop::sample::Index>(),
        atomic: bool,
        attributes: bool,
        limit in prop_oneof![Just(LIMIT), Just(1000)],
    ) {
        let mut store = empty_store(env);
        let mut engine = toys(atomic, limit);
        let start = apply_all(&mut store, &bursts.concat()).unwrap();
        let mut rehearsal = toys(atomic, limit);
        now(rehearsal.sync(start)).unwrap();
        let objects = |engine: &Toys| -> Vec<String> {
            let keys = Family::ALL.map(|family| engine.dataplane().objects.of(family).clone());
            keys.into_iter().flatten().map(|(key, _)| key).collect()
        };
        let owned: Vec<_> = objects(&rehearsal).into_iter().filter(|key| key.starts_with("2 ")).collect();
        prop_assume!(!owned.is_empty());
        let victim = owned[victim.index(owned.len())].clone();

        engine.dataplane_mut().poison.insert(victim.clone());
        engine.dataplane_mut().attributes = attributes;
        let report = now(engine.sync(store.reset())).unwrap();
        check(&engine);
        let poisoned = report.degraded.iter().filter(|it| it.reason.contains("poisoned")).count();
        prop_assert_eq!(poisoned, 1);
        let missing = objects(&rehearsal).len() - objects(&engine).len();
        prop_assert!(missing >= 1);
        prop_assert!(!objects(&engine).contains(&victim));

        engine.dataplane_mut().poison.clear();
        let report = now(engine.retry()).unwrap();
        check(&engine);
        prop_assert!(report.degraded.iter().all(|it| !it.reason.contains("poisoned")));
        prop_assert_eq!(meaning(&engine), meaning(&rehearsal));
    }

    #[test]
    fn foreign_changes_are_repaired_and_counted(
        env in generate::node(),
        bursts in vec(generate::tuned_burst(), 1..8),
        picks in vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let mut store = empty_store(env);
        let mut engine = toys(true, LIMIT);
        now(engine.sync(apply_all(&mut store, &bursts.concat()).unwrap())).unwrap();
        let objects = engine.dataplane_mut().objects.of_mut(Family::V4);
        let keys: Vec<_> = objects.keys().cloned().collect();
        let mut touched = std::collections::BTreeSet::new();
        for pick in picks {
            let key = keys[pick.index(keys.len())].clone();
            objects.remove(&key);
            touched.insert(key);
        }
        objects.insert("1 stray".to_owned(), "not ours".to_owned());
        let report = now(engine.audit()).unwrap();
        check(&engine);
        // A lost slot may come back as another slot of the same endpoint.
        prop_assert!(report.drift > touched.len());
        prop_assert_eq!(now(engine.audit()).unwrap().drift, 0);
    }

    #[test]
    fn compiling_again_with_the_returned_memo_changes_nothing(
        env in generate::node(),
        before in generate::tuned_burst(),
        after in generate::tuned_burst(),
    ) {
        let backend = Toy::new(true);
        let mut store = empty_store(env);
        apply_all(&mut store, &before);
        let mut memos = BTreeMap::new();
        let mut compile = |store: &Store| -> Result<(), TestCaseError> {
            let node = store.env().view();
            for fragment in store.fragments() {
                let memo = memos.get(&fragment.id).cloned().unwrap_or_default();
                let mut first = proxier_core::spi::Objects::default();
                let Ok(memo) = backend.compile(&node, fragment, &memo, &mut first) else { continue };
                let mut second = proxier_core::spi::Objects::default();
                let again = backend.compile(&node, fragment, &memo, &mut second).unwrap();
                prop_assert_eq!(&again, &memo);
                prop_assert_eq!(format!("{:?}", first), format!("{:?}", second));
                memos.insert(fragment.id.clone(), memo);
            }
            Ok(())
        };
        compile(&store)?;
        apply_all(&mut store, &after);
        compile(&store)?;
    }

    #[test]
    fn cleanup_leaves_nothing(env in generate::node(), burst in generate::tuned_burst()) {
        let mut store = empty_store(env);
        let mut engine = toys(true, LIMIT);
        now(engine.sync(apply_all(&mut store, &burst).unwrap())).unwrap();
        now(engine.cleanup()).unwrap();
        for family in Family::ALL {
            prop_assert!(engine.dataplane().objects.of(family).is_empty());
        }
        now(engine.sync(store.reset())).unwrap();
        check(&engine);
    }
}

/// Addresses that somebody follows are not those of the Node object's source.
#[test]
fn addresses_once_followed_are_kept_whatever_the_node_is() {
    let ips = |texts: &[&str]| texts.iter().map(|it| it.parse().expect("an address")).collect();
    let mut store = empty_store(NodeEnv::default());
    store.take();
    store.apply(Event::Addresses(ips(&["127.0.0.1", "172.20.7.11"])));
    let update = store.take().expect("what backends see has changed");
    assert!(matches!(&update, Update::Delta { node: Some(_), changes, .. } if changes.is_empty()));
    let named = NodeEnv {
        name: "tern".to_owned(),
        interface_addresses: ips(&["172.20.7.99"]),
        ..NodeEnv::default()
    };
    store.apply(Event::Node(Box::new(named)));
    let env = store.env();
    assert_eq!((env.name.as_str(), &env.interface_addresses.len()), ("tern", &2));
    store.take();
    assert!(!store.apply(Event::Addresses(ips(&["172.20.7.11", "127.0.0.1"]))), "the same ones");
}

//! What holds of every backend on the fake kernel: theorems for the tests of backends, and what
//! they are stated with.

use std::{
    collections::BTreeMap,
    pin::pin,
    task::{Context, Poll, Waker},
};

use super::{FakeKernel, Fault};
use crate::{
    Degraded, Family, Proxier, Update,
    engine::Engine,
    model::{Event, NodeEnv, Store},
    spi::Backend,
};

/// A backend on the fake kernel.
pub type Fake<B> = Engine<B, FakeKernel<B>>;

/// A backend on a fake kernel that takes so many operations at once.
#[must_use]
pub fn fake<B: Backend>(backend: B, limit: usize) -> Fake<B> {
    let kernel = FakeKernel::new(&backend, limit);
    Engine::new(backend, kernel, &Family::ALL)
}

/// The result of a future that has nothing to wait for, as all do on the fake kernel.
///
/// # Panics
/// It waits.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    let polled = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
    let Poll::Ready(result) = polled else { unreachable!("the fake kernel never waits") };
    result
}

/// A store that has its first lists, which are empty.
#[must_use]
pub fn empty_store(env: NodeEnv) -> Store {
    let mut store = Store::new(env);
    store.apply(Event::Services(Vec::new()));
    store.apply(Event::EndpointSlices(Vec::new()));
    store
}

/// The kernel was asked for no nonsense and holds what the engine says.
///
/// # Panics
/// It does not.
pub fn check<B: Backend>(engine: &Fake<B>) {
    assert_eq!(engine.dataplane().violations, [""; 0], "nonsense");
    for family in Family::ALL {
        assert_eq!(*engine.dataplane().objects.of(family), engine.predicted(family), "{family}");
    }
}

/// Any history, with any faults, ends where a fresh start would.
///
/// Without faults, every plan is what is done, and every sync visits what has changed and no more.
/// Whoever finds its objects there writes nothing, and clean-up leaves nothing. `meaning` says what
/// has to be the same, of objects that may differ by their history. Returns what the mode refused of the
/// state in which history ended.
///
/// # Panics
/// It does not hold.
pub fn any_history_ends_where_a_fresh_start_would<B: Backend>(
    backend: impl Fn() -> B,
    env: NodeEnv,
    history: &[Vec<Event>],
    faults: &[Option<Fault>],
    limit: usize,
    meaning: impl Fn(&BTreeMap<B::Key, B::Value>) -> Vec<String>,
) -> Vec<Degraded> {
    let mut store = empty_store(env);
    let mut engine = fake(backend(), limit);
    engine.dataplane_mut().faults = faults.iter().copied().collect();
    for burst in history {
        for event in burst {
            store.apply(event.clone());
        }
        let Some(update) = store.take() else { continue };
        let changes = match &update {
            Update::Delta { node: None, changes, .. } => Some(changes.len()),
            Update::Delta { .. } | Update::Reset { .. } => None,
        };
        let plan = engine.plan(&update);
        let outcome = now(engine.sync(update));
        if faults.is_empty() {
            let report = outcome.expect("nothing goes wrong");
            assert_eq!(plan.count(), report.ops, "the plan");
            assert_eq!(changes.unwrap_or(report.visited), report.visited, "what was visited");
        }
    }
    engine.dataplane_mut().faults.clear();
    now(engine.retry()).expect("nothing goes wrong any more");
    now(engine.audit()).expect("nothing goes wrong any more");
    check(&engine);
    let mut fresh = fake(backend(), limit);
    let refused = now(fresh.sync(store.reset())).expect("nothing goes wrong").degraded;
    check(&fresh);
    for family in Family::ALL {
        let [fresh, engine] =
            [&fresh, &engine].map(|it| meaning(it.dataplane().objects.of(family)));
        assert_eq!(fresh, engine, "{family}");
    }
    let mut restarted = fake(backend(), limit);
    restarted.dataplane_mut().objects = engine.dataplane().objects.clone();
    let report = now(restarted.sync(store.reset())).expect("nothing goes wrong");
    assert_eq!(report.ops.total(), 0, "a restart writes nothing");
    now(restarted.cleanup()).expect("nothing goes wrong");
    assert!(Family::ALL.iter().all(|family| restarted.dataplane().objects.of(*family).is_empty()));
    refused
}

/// Every object with its content: the meaning of those that do not depend on history.
pub fn everything<K: ToString, V: ToString>(objects: &BTreeMap<K, V>) -> Vec<String> {
    objects.iter().map(|(key, value)| key.to_string() + " = " + &value.to_string()).collect()
}

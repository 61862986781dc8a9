//! When changes of EndpointSlices were made.

use proxier_core::{
    Family, ObjectName,
    model::{EndpointSlice, Event, NodeEnv, Object, ObjectKey, Store, api},
};

const TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

fn slice(service: &str, address: &str, time: &str) -> EndpointSlice {
    let mut object = api::EndpointSlice { address_type: "IPv4".into(), ..Default::default() };
    object.metadata.namespace = "shop".into();
    object.metadata.name = format!("{service}-1");
    object.metadata.labels.insert("kubernetes.io/service-name".into(), service.into());
    object.metadata.annotations.insert(TIME.into(), time.into());
    object.endpoints.push(api::Endpoint { addresses: vec![address.into()], ..Default::default() });
    EndpointSlice::read(&object).value.expect("a slice of a Service")
}

fn apply(store: &mut Store, slice: EndpointSlice) {
    store.apply(Event::Apply(Object::EndpointSlice(slice)));
}

#[test]
fn times_are_remembered_of_changes_that_mean_something_and_forgotten_with_a_slice() {
    let mut store = Store::new(NodeEnv::default());
    store.apply(Event::Services(Vec::new()));
    store.apply(Event::EndpointSlices(Vec::new()));
    store.take();
    apply(&mut store, slice("cart", "10.0.0.1", "2026-11-26T03:04:05.678901234Z"));
    apply(&mut store, slice("cart", "10.0.0.1", "2026-11-26T03:04:06Z"));
    apply(&mut store, slice("dns", "10.0.0.2", "2026-11-26T03:04:07+01:00"));
    apply(&mut store, slice("mail", "10.0.0.3", "yesterday"));
    let triggered = store.pending().triggered;
    let nanos: Vec<_> = triggered
        .iter()
        .map(|it| it.at.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos())
        .collect();
    // Who has no time, or only a new one, is not among them.
    assert_eq!(nanos, [1_795_662_245_678_901_234, 1_795_658_647_000_000_000]);
    assert!(triggered.iter().all(|it| it.family == Family::V4));

    store.apply(Event::Delete(ObjectKey::EndpointSlice(ObjectName::new("shop", "cart-1"))));
    let left: Vec<_> = store.pending().triggered.iter().map(|it| it.service.clone()).collect();
    assert_eq!(left, [ObjectName::new("shop", "dns")]);
    store.take();
    assert!(store.pending().triggered.is_empty());
}

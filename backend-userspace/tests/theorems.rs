//! What the pure half promises, over random clusters and histories. What its objects do to packets is
//! compared with the packet model by `tests/conformance.rs` of the root package, in every mode.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};
use proxier_backend_userspace::{Capture, Config, Key, Listen, Method, Ports, Userspace, Value};
use proxier_core::{
    Family, Protocol, Proxier,
    model::{Event, NodeEnv},
    spi::Backend,
    testing::{
        generate,
        laws::{self, empty_store, fake, now},
    },
};

type Fake = laws::Fake<Userspace>;

fn backend(method: Method) -> Userspace {
    let listen = Listen::Capture(Capture { method, ..Capture::default() });
    Userspace::new(&Config { listen, ..Config::default() }, Ports::default()).unwrap()
}

fn objects(engine: &Fake) -> BTreeMap<Key, Value> {
    let of = |family| engine.dataplane().objects.of(family).clone();
    Family::ALL.into_iter().flat_map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 256, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        env in generate::node(),
        history in vec(generate::burst(), 1..16),
        faults in prop_oneof![Just(Vec::new()), generate::faults()],
        method in prop_oneof![Just(Method::Redirect), Just(Method::Tproxy)],
    ) {
        let refused = laws::any_history_ends_where_a_fresh_start_would(
            || backend(method), env, &history, &faults, 24, laws::everything,
        );
        prop_assert!(refused.iter().all(|it| it.id.protocol == Protocol::Sctp), "{refused:?}");
    }

    #[test]
    fn traffic_is_let_in_after_what_it_leads_to_and_kept_out_before(
        env in generate::node(),
        bursts in vec(generate::burst(), 1..6),
    ) {
        let backend = backend(Method::Tproxy);
        let mut store = empty_store(env);
        let mut engine = fake(self::backend(Method::Tproxy), usize::MAX);
        for burst in &bursts {
            for event in burst {
                store.apply(event.clone());
            }
            let Some(update) = store.take() else { continue };
            for fragment in store.fragments() {
                if fragment.id.protocol == Protocol::Sctp {
                    continue;
                }
                let mut out = proxier_core::spi::Objects::default();
                backend.compile(&store.env().view(), fragment, &(), &mut out).unwrap();
            }
            now(engine.sync(update)).unwrap();
        }
        let all = objects(&engine);
        for key in all.keys() {
            if let Key::Element(set, proxier_backend_userspace::Item::Frontend(frontend)) = key {
                prop_assert!(all.contains_key(&Key::Route(*frontend)), "{set} {frontend}");
                prop_assert!(backend.stage(key) >= backend.stage(&Key::Route(*frontend)));
            }
            if let Some(Value::Route(route)) = all.get(key) {
                prop_assert!(all.contains_key(&Key::Service(route.service.clone())));
            }
        }
    }
}

#[test]
fn sctp_is_refused_by_name() {
    let text = include_str!("voip.yaml");
    let manifest = proxier_core::manifest::Manifest::parse("voip.yaml", text);
    let mut store = empty_store(NodeEnv::default());
    store.apply(Event::Services(manifest.services().cloned().collect()));
    store.apply(Event::EndpointSlices(manifest.slices().cloned().collect()));
    let mut engine = fake(backend(Method::Tproxy), usize::MAX);
    let report = now(engine.sync(store.take().unwrap())).unwrap();
    let [degraded] = &report.degraded[..] else { panic!("{report:?}") };
    assert_eq!(
        degraded.reason,
        "userspace mode cannot do this: shop/voip:sip/SCTP/IPv4 is SCTP; TCP and UDP are proxied"
    );
    assert!(objects(&engine).keys().any(|key| matches!(key, Key::Route(_))));
}

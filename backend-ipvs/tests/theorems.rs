//! What the pure half promises, over random clusters and histories.
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
use proxier_backend_ipvs::{
    Config, Ipvs, Key, Value,
    view::{Fate, Packet as ViewPacket, View},
};
use proxier_core::{
    Family, Mode, Protocol, Proxier,
    engine::Engine,
    model::{Event, NodeEnv, Store},
    sim::{Outcome, Packet, Sim, Target, Traits},
    testing::{FakeKernel, Fault, generate},
};

type Fake = Engine<Ipvs, FakeKernel<Ipvs>>;

fn fake(limit: usize) -> Fake {
    let backend = Ipvs::new(Config::default()).unwrap();
    let kernel = FakeKernel::new(&backend, limit);
    Engine::new(backend, kernel, &Family::ALL)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn empty_store(env: NodeEnv) -> Store {
    let mut store = Store::new(env);
    store.apply(Event::Services(Vec::new()));
    store.apply(Event::EndpointSlices(Vec::new()));
    store
}

fn objects(engine: &Fake) -> BTreeMap<Key, Value> {
    let of = |family| engine.dataplane().objects.of(family).clone();
    Family::ALL.into_iter().flat_map(of).collect()
}

fn check(engine: &Fake) {
    assert_eq!(engine.dataplane().violations, [""; 0]);
    for family in Family::ALL {
        assert_eq!(*engine.dataplane().objects.of(family), engine.predicted(family), "{family}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 256, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        env in generate::node(),
        bursts in vec(generate::burst(), 1..16),
        faults in vec(prop::option::weighted(0.2, 0_u8..4), 16),
    ) {
        let mut store = empty_store(env);
        let mut engine = fake(24);
        engine.dataplane_mut().faults = faults
            .into_iter()
            .map(|fault| fault.map(|kind| match kind {
                0 => Fault::LoseReply,
                1 => Fault::LoseRequest,
                2 => Fault::StopHalfWay,
                _ => Fault::Transport,
            }))
            .collect();
        for burst in &bursts {
            for event in burst {
                store.apply(event.clone());
            }
            if let Some(update) = store.take() {
                run(engine.sync(update)).ok();
            }
        }
        engine.dataplane_mut().faults.clear();
        run(engine.retry()).unwrap();
        run(engine.audit()).unwrap();
        check(&engine);
        let mut fresh = fake(usize::MAX);
        run(fresh.sync(store.reset())).unwrap();
        prop_assert_eq!(objects(&engine), objects(&fresh));
        // What is there already is left alone.
        let before = fresh.dataplane().writes;
        run(fresh.sync(store.reset())).unwrap();
        prop_assert_eq!(fresh.dataplane().writes, before);
        run(fresh.cleanup()).unwrap();
        prop_assert!(objects(&fresh).is_empty());
    }

    #[test]
    fn the_rules_say_of_any_packet_what_the_model_says(
        env in generate::node(),
        bursts in vec(generate::burst(), 1..8),
        packets in vec((0_usize..16, 0_usize..16, 0_usize..8, any::<bool>()), 24),
    ) {
        let mut store = empty_store(env);
        for event in bursts.concat() {
            store.apply(event);
        }
        let mut engine = fake(usize::MAX);
        run(engine.sync(store.take().unwrap())).unwrap();
        let node = store.env().view();
        let traits = Traits::of(Mode::Ipvs);
        let sim = Sim::new(&node, &traits, &store);
        for packet in packets {
            let packet = pick(&store, packet);
            let view = node.of(Family::of(packet.destination.ip()));
            let trace = sim.trace(&packet, &[]);
            let expected: std::collections::BTreeSet<_> = match &trace.outcome {
                Outcome::Drop => [Fate::Dropped].into(),
                Outcome::Forward { to } => {
                    let fate = |it: &Target| Fate::Forwarded {
                        to: it.addr,
                        masqueraded: it.source.is_masquerade(),
                    };
                    to.iter().map(fate).collect()
                }
                Outcome::Reject => [Fate::Rejected].into(),
                Outcome::Accept | Outcome::Untouched => [Fate::Untouched].into(),
            };
            let family = Family::of(packet.destination.ip());
            let view_packet = ViewPacket {
                source: packet.source,
                input: packet.input.as_deref(),
                destination: packet.destination,
                protocol: packet.protocol,
                local: &view.addresses,
                memory: &[],
            };
            let objects = engine.dataplane().objects.of(family);
            let judged = View::new(family, objects).judge(&view_packet);
            prop_assert_eq!(judged, expected, "{:?}\n{:?}", packet, trace);
        }
    }
}

/// A packet that has something to do with the cluster.
fn pick(store: &Store, (to, from, port, udp): (usize, usize, usize, bool)) -> Packet {
    let view = store.env().view();
    let mut addresses: Vec<std::net::IpAddr> = Family::ALL
        .into_iter()
        .flat_map(|family| view.of(family).addresses.clone())
        .chain(["127.0.0.1", "::1", "10.61.3.21", "fd41:61:0:3::21"].map(|ip| ip.parse().unwrap()))
        .chain(["192.0.2.55", "2001:db8:55::9"].map(|ip| ip.parse().unwrap()))
        .collect();
    let sources = addresses.clone();
    for frontend in store.fragments().flat_map(|fragment| fragment.frontends.clone()) {
        if let proxier_core::ir::WayIn::Address(ip) = frontend.key.way_in {
            addresses.push(ip);
        }
    }
    let destination = addresses[to % addresses.len()];
    let family = Family::of(destination);
    let sources: Vec<_> = sources.into_iter().filter(|ip| family.has(ip)).collect();
    let source = sources[from % sources.len()];
    let port = [53, 80, 443, 30_080, 30_081][port % 5];
    let local = source.is_loopback() || view.of(family).addresses.contains(&source);
    Packet {
        source,
        input: (!local).then(|| "eth0".into()),
        destination: (destination, port).into(),
        protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
    }
}

//! Random worlds and random packets: what the objects do is what the packet model says.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use proptest::{collection::vec, prelude::*, sample::select};
use proxier_backend_nftables::{
    Config, Nftables,
    view::{Fate, Packet as ViewPacket, View},
};
use proxier_core::{
    Family, Mode, Protocol, Proxier,
    engine::Engine,
    ir::WayIn,
    model::{Event, NodeEnv, Store},
    sim::{Hairpin, Outcome, Packet, Remembered, Sim, Traits},
    testing::{FakeKernel, generate},
};

/// This mode: kube-proxy's, and what it does beyond that.
fn traits() -> Traits {
    Traits {
        localhost: true,
        guards_localhost: true,
        hairpin: Hairpin::Any,
        ..Traits::of(Mode::Nftables)
    }
}

/// Sources that somebody treats specially, each with the interface its packets come in on.
const SOURCES: [(&str, Option<&str>); 13] = [
    ("172.20.7.11", None),
    ("10.61.3.254", None),
    ("127.0.0.1", None),
    ("10.61.3.1", Some("cni0")),
    ("10.61.3.2", Some("cni0")),
    ("10.61.3.3", Some("eth0")),
    ("192.0.2.50", Some("eth0")),
    ("192.0.2.9", Some("eth0")),
    ("fd41:7::11", None),
    ("::1", None),
    ("fd41:61:0:3::1", Some("cni0")),
    ("fd41:61:0:3::2", Some("eth0")),
    ("2001:db8::9", Some("eth0")),
];

const ADDRESSES: [&str; 7] = [
    "172.20.7.11",
    "127.0.0.1",
    "10.61.3.254",
    "::1",
    "fd41:7::11",
    "10.96.200.1",
    "203.0.113.200",
];

type Draw = ((&'static str, Option<&'static str>), prop::sample::Index, &'static str, u16, u8);

fn draw() -> impl Strategy<Value = Draw> {
    let ports = select(&[53_u16, 80, 443, 30_080, 30_081, 9][..]);
    (select(&SOURCES[..]), any::<prop::sample::Index>(), select(&ADDRESSES[..]), ports, 0_u8..4)
}

/// A packet: to a frontend, or to some other address or port.
fn packet(store: &Store, (source, near, address, port, other): Draw) -> Option<Packet> {
    let (ip, input) = (source.0.parse().unwrap(), source.1.map(Arc::from));
    let family = Family::of(ip);
    let keys: Vec<_> = store
        .fragments()
        .filter(|fragment| fragment.id.family == family)
        .flat_map(|fragment| fragment.frontends.iter().map(|frontend| frontend.key))
        .collect();
    let address = address.parse().unwrap();
    let (mut to, mut protocol) = (SocketAddr::new(address, port), Protocol::Tcp);
    if !keys.is_empty() {
        let key = near.get(&keys);
        protocol = key.protocol;
        let at = match key.way_in {
            WayIn::Address(ip) if other != 1 => ip,
            WayIn::Address(_) | WayIn::Node(_) => address,
        };
        to = SocketAddr::new(at, if other == 2 { port } else { key.port.get() });
        if other == 3 {
            protocol = Protocol::Udp;
        }
    }
    family.has(&to.ip()).then_some(Packet { source: ip, input, destination: to, protocol })
}

/// Earlier connections of the same client to every Service port, some too long ago.
fn memory(store: &Store, packet: &Packet) -> Vec<Remembered> {
    let family = Family::of(packet.source);
    let fragments = store.fragments().filter(|fragment| fragment.id.family == family);
    let each = fragments.flat_map(|fragment| {
        let key = fragment.frontends.first().map(|frontend| frontend.key);
        let members = fragment.reachable();
        key.into_iter().flat_map(move |key| {
            members.clone().into_iter().zip(1..).map(move |(member, number)| Remembered {
                client: packet.source,
                key,
                id: fragment.id.clone(),
                member: member.addr,
                age: Duration::from_secs(u64::from(packet.destination.port()) * 7 / number),
            })
        })
    });
    each.collect()
}

fn fates(outcome: &Outcome) -> BTreeSet<Fate> {
    match outcome {
        Outcome::Accept | Outcome::Untouched => [Fate::Untouched].into(),
        Outcome::Drop => [Fate::Dropped].into(),
        Outcome::Reject => [Fate::Rejected].into(),
        Outcome::Forward { to } => to
            .iter()
            .map(|it| Fate::Forwarded { to: it.addr, masqueraded: it.source.is_masquerade() })
            .collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn packets_meet_what_the_model_says(
        env in generate::node(),
        events in vec(generate::event(), 5..40),
        draws in vec(draw(), 60),
    ) {
        let mut store = Store::new(NodeEnv {
            service_cidrs: ["10.96.0.0/12"].map(|net| net.parse().unwrap()).into(),
            ..env
        });
        store.apply(Event::Services(Vec::new()));
        store.apply(Event::EndpointSlices(Vec::new()));
        for event in events.into_iter().filter(|it| !matches!(it, Event::Node(_))) {
            store.apply(event);
        }
        let update = store.take().unwrap();
        let node = store.env().view();
        let backend = || Nftables::new(Config::default()).unwrap();
        let mut engine = Engine::new(backend(), FakeKernel::new(&backend(), 1000), &Family::ALL);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let report = runtime.block_on(engine.sync(update)).unwrap();
        prop_assert_eq!(report.degraded, []);
        let traits = traits();
        let sim = Sim::new(&node, &traits, &store);
        for packet in draws.into_iter().filter_map(|draw| packet(&store, draw)) {
            let family = Family::of(packet.source);
            let memory = memory(&store, &packet);
            let trace = sim.trace(&packet, &memory);
            let known: Vec<_> =
                memory.iter().map(|it| (it.id.clone(), it.member, it.age)).collect();
            let seen = View::new(family, engine.dataplane().objects.of(family)).judge(&ViewPacket {
                source: packet.source,
                input: packet.input.as_deref(),
                destination: packet.destination,
                protocol: packet.protocol,
                local: &node.of(family).addresses,
                memory: &known,
            });
            prop_assert_eq!(seen, fates(&trace.outcome), "{:?}: {:?}", packet, trace);
        }
    }
}

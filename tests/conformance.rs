//! The conformance cases: on the packet model, and on the fake kernel of every backend. `flows.rs` has
//! the real one.

#[path = "../examples/conformance/subjects.rs"]
mod subjects;

use proxier_testkit::cases::{CaseFile, Kernel, Subject, Summary, Verdict, run};

/// The files of cases that come with the project.
const FILES: [(&str, &str); 2] = [
    ("cases.yaml", include_str!("../proxier-testkit/cases/cases.yaml")),
    ("extra.yaml", include_str!("../proxier-testkit/cases/extra.yaml")),
];

/// Runs every case in every mode and returns how many came out how, if none failed.
fn run_all(kernel: &mut Kernel<'_>, wanted: impl Fn(&str) -> bool) -> Summary {
    let subjects = subjects::all();
    let subjects: Vec<&dyn Subject> = subjects.iter().map(|it| &**it).collect();
    let modes: Vec<_> = proxier::modes().collect();
    let mut summary = Summary::default();
    let mut failed = String::new();
    for (name, text) in FILES {
        let file = CaseFile::parse(text).expect("the file is well-formed");
        for case in file.cases().iter().filter(|case| wanted(&case.kind)) {
            for report in run(&file, case, &modes, &subjects, kernel) {
                summary.count(&report.verdict);
                if matches!(report.verdict, Verdict::Failed { .. }) {
                    failed += &format!("{name}: {report}\n");
                }
            }
        }
    }
    assert!(failed.is_empty(), "{summary}\n{failed}");
    summary
}

fn is_flow(kind: &str) -> bool {
    matches!(kind, "affinity" | "flow")
}

#[test]
fn every_case_comes_out_on_the_packet_model() {
    let summary = run_all(&mut Kernel::Model, |_| true);
    assert!(summary.passed > 200, "{summary}");
}

#[test]
fn every_flow_comes_out_on_the_fake_kernels() {
    run_all(&mut Kernel::Fake, is_flow);
}

#[test]
fn what_cannot_be_run_says_why() {
    let file = CaseFile::parse(FILES[0].1).expect("the file is well-formed");
    for case in file.cases() {
        for report in
            run(&file, case, &proxier::modes().collect::<Vec<_>>(), &[], &mut Kernel::Model)
        {
            if let Verdict::NotApplicable { reason } = &report.verdict {
                let known = [
                    "is not part of this build",
                    "nothing to compute",
                    "says nothing about",
                    "own IPVS objects",
                ];
                assert!(known.iter().any(|known| reason.contains(known)), "{report}");
            }
        }
    }
}

mod random {
    //! Random worlds and random packets: every backend's packet view agrees with the model.

    use std::{
        net::{IpAddr, SocketAddr},
        sync::Arc,
    };

    use proptest::{collection::vec, prelude::*, sample::select, strategy::ValueTree};
    use proxier::{
        Mode, Protocol, Update,
        ir::WayIn,
        model::{Event, NodeEnv, Store},
        sim::{Index, Packet, Sim, Traits},
        testing::generate::{event, node},
    };
    use proxier_testkit::cases::FlowVerdict;

    use super::subjects;

    /// Sources that somebody treats specially, each with the interface its packets come in on.
    const SOURCES: [(&str, Option<&str>); 14] = [
        ("172.20.7.11", None),
        ("10.61.3.254", None),
        ("127.0.0.1", None),
        ("10.61.3.1", Some("cni0")),
        ("10.61.3.2", Some("cni0")),
        ("10.61.3.3", Some("eth0")),
        ("172.20.7.12", Some("eth0")),
        ("192.0.2.50", Some("eth0")),
        ("192.0.2.9", Some("eth0")),
        ("fd41:7::11", None),
        ("::1", None),
        ("fd41:61:0:3::1", Some("cni0")),
        ("fd41:61:0:3::2", Some("eth0")),
        ("2001:db8::9", Some("eth0")),
    ];

    /// Addresses of the node, and of nobody.
    const ADDRESSES: [&str; 8] = [
        "172.20.7.11",
        "127.0.0.1",
        "10.61.3.254",
        "::1",
        "fd41:7::11",
        "10.96.200.1",
        "203.0.113.200",
        "fd41:97::ffff",
    ];

    #[derive(Clone, Debug)]
    struct Draw {
        source: (&'static str, Option<&'static str>),
        /// Somewhere near one of the frontends: which, and what is different.
        near: prop::sample::Index,
        /// Which of all addresses, if not the frontend's.
        address: Option<prop::sample::Index>,
        port: Option<u16>,
        protocol: Option<Protocol>,
    }

    fn draw() -> impl Strategy<Value = Draw> {
        let index = || any::<prop::sample::Index>();
        use prop::option::weighted as other;
        let ports = other(0.2, select(&[53, 80, 443, 30_080, 30_081, 32_000, 9][..]));
        let protocols = other(0.1, select(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp][..]));
        (select(&SOURCES[..]), index(), other(0.3, index()), ports, protocols).prop_map(
            |(source, near, address, port, protocol)| Draw {
                source,
                near,
                address,
                port,
                protocol,
            },
        )
    }

    /// A store that has seen full lists and then some events.
    fn store(env: NodeEnv, events: Vec<Event>) -> Store {
        let mut store = Store::new(env);
        store.apply(Event::Services(Vec::new()));
        store.apply(Event::EndpointSlices(Vec::new()));
        for event in events.into_iter().filter(|it| !matches!(it, Event::Node(_))) {
            store.apply(event);
        }
        store
    }

    fn packet(store: &Store, draw: &Draw) -> Packet {
        let source: IpAddr = draw.source.0.parse().expect("an address");
        let same_family = |ip: &IpAddr| ip.is_ipv4() == source.is_ipv4();
        let of_nobody: Vec<IpAddr> =
            ADDRESSES.iter().map(|text| text.parse().expect("an address")).collect();
        let mut of_nobody: Vec<_> = of_nobody.into_iter().filter(same_family).collect();
        let frontends = store.fragments().flat_map(|fragment| &fragment.frontends);
        let mut near = Vec::new();
        for key in frontends.map(|frontend| frontend.key) {
            match key.way_in {
                WayIn::Address(ip) => {
                    near.push((ip, key.port.get(), key.protocol));
                    of_nobody.push(ip);
                }
                WayIn::Node(_) => {
                    let of_node = store.env().interface_addresses.iter();
                    near.extend(of_node.map(|ip| (*ip, key.port.get(), key.protocol)));
                }
            }
        }
        of_nobody.retain(same_family);
        near.retain(|(ip, ..)| same_family(ip));
        near.push((*draw.near.get(&of_nobody), 80, Protocol::Tcp));
        let (ip, port, protocol) = *draw.near.get(&near);
        let ip = draw.address.map_or(ip, |index| *index.get(&of_nobody));
        Packet {
            source,
            input: draw.source.1.map(Arc::from),
            destination: SocketAddr::new(ip, draw.port.unwrap_or(port)),
            protocol: draw.protocol.unwrap_or(protocol),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn the_packet_view_of_every_backend_agrees_with_the_model(
            env in node(),
            events in vec(event(), 5..40),
            draws in vec(draw(), 60),
        ) {
            let mut store = store(env, events);
            let update = store.take().expect("the lists are complete");
            let node = store.env().view();
            for subject in subjects::all() {
                let Some(mut fake) = subject.fake() else { continue };
                let mut update = update.clone();
                if let (Mode::Userspace, Update::Reset { fragments, .. }) =
                    (subject.mode(), &mut update)
                {
                    // What a mode refuses is not there for it.
                    fragments.retain(|it| it.id.protocol != Protocol::Sctp);
                }
                let mut index = Index::default();
                index.apply(&update);
                prop_assert_eq!(fake.program(update), Ok(()));
                let traits = Traits::of(subject.mode());
                let sim = Sim::new(&node, &traits, &index);
                for draw in &draws {
                    let packet = packet(&store, draw);
                    let trace = sim.trace(&packet, &[]);
                    let wanted = FlowVerdict::from(&trace.outcome);
                    let seen = fake.judge(&node, &packet, &[]);
                    prop_assert_eq!(&seen, &wanted, "{:?}: {:?}", packet, trace);
                }
            }
        }
    }

    #[test]
    fn random_worlds_have_something_to_say() {
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mut forwarded = 0;
        for _ in 0..50 {
            let tree = (node(), vec(event(), 5..40), draw())
                .new_tree(&mut runner)
                .expect("nothing is rejected");
            let (env, events, draw) = tree.current();
            let mut store = store(env, events);
            store.take();
            let (node, traits) = (store.env().view(), Traits::of(Mode::Iptables));
            let trace = Sim::new(&node, &traits, &store).trace(&packet(&store, &draw), &[]);
            forwarded += usize::from(trace.matched.is_some());
        }
        assert!(forwarded > 5, "{forwarded} of 50 packets met a frontend");
    }
}

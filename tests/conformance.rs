//! The conformance cases: on the packet model, on the fake kernel of every backend, and on the real
//! kernel in every mode of this build.

#[path = "../examples/conformance/subjects.rs"]
mod subjects;

use proxier_testkit::{
    cases::{CaseFile, Kernel, RealKernel, Report, Subject, Summary, Verdict, run},
    require_lab,
};

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
fn every_flow_comes_out_on_the_real_kernel() {
    require_lab!();
    for mode in proxier::modes() {
        let factory = proxier::factory(mode).expect("a mode of this build");
        let mut real = RealKernel::new(factory).expect("a runtime starts");
        let mut failed = Vec::new();
        for (name, text) in FILES {
            let file = CaseFile::parse(text).expect("the file is well-formed");
            for case in file.cases().iter().filter(|case| is_flow(&case.kind)) {
                let reports = run(&file, case, &[mode], &[], &mut Kernel::Real(&mut real));
                let is_failed = |it: &Report<'_>| matches!(it.verdict, Verdict::Failed { .. });
                failed.extend(reports.iter().filter(|it| is_failed(it)).map(|it| format!("{name}: {it}")));
            }
        }
        assert!(failed.is_empty(), "{mode}: {} failed\n{}", failed.len(), failed.join("\n"));
    }
}

#[test]
fn what_cannot_be_run_says_why() {
    let file = CaseFile::parse(FILES[0].1).expect("the file is well-formed");
    for case in file.cases() {
        for report in run(&file, case, &proxier::modes().collect::<Vec<_>>(), &[], &mut Kernel::Model) {
            if let Verdict::NotApplicable { reason } = &report.verdict {
                let known = ["is not part of this build", "nothing to compute", "says nothing about"];
                assert!(known.iter().any(|known| reason.contains(known)), "{report}");
            }
        }
    }
}

mod random {
    //! Random worlds and random packets: every backend's packet view agrees with the model.

    use std::{net::SocketAddr, sync::Arc};

    use proptest::{
        collection::vec,
        prelude::*,
        sample::select,
        strategy::ValueTree,
    };
    use proxier::{
        Protocol,
        model::{Event, NodeEnv, Store},
        sim::{Packet, Sim, Traits},
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
        /// Which of all addresses.
        address: prop::sample::Index,
        port: u16,
        protocol: Protocol,
    }

    fn draw() -> impl Strategy<Value = Draw> {
        let ports = select(&[53, 80, 443, 30_080, 30_081, 32_000, 9][..]);
        let protocols = select(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp][..]);
        (select(&SOURCES[..]), any::<prop::sample::Index>(), ports, protocols).prop_map(
            |(source, address, port, protocol)| Draw { source, address, port, protocol },
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
        let frontends = store.fragments().flat_map(|fragment| &fragment.frontends);
        let of_services = frontends.filter_map(|frontend| match frontend.key.way_in {
            proxier::ir::WayIn::Address(ip) => Some(ip),
            proxier::ir::WayIn::Node(_) => None,
        });
        let others = ADDRESSES.iter().map(|text| text.parse().unwrap());
        let source: std::net::IpAddr = draw.source.0.parse().unwrap();
        let mut addresses: Vec<_> = of_services.chain(others).collect();
        addresses.retain(|ip| ip.is_ipv4() == source.is_ipv4());
        addresses.sort_unstable();
        addresses.dedup();
        Packet {
            source,
            input: draw.source.1.map(Arc::from),
            destination: SocketAddr::new(*draw.address.get(&addresses), draw.port),
            protocol: draw.protocol,
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
                fake.program(update.clone()).expect("random worlds can be programmed");
                let traits = Traits::of(subject.mode());
                let sim = Sim::new(&node, &traits, &store);
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
            let tree = (node(), vec(event(), 5..40), draw()).new_tree(&mut runner).unwrap();
            let (env, events, draw) = tree.current();
            let mut store = store(env, events);
            store.take();
            let (node, traits) = (store.env().view(), Traits::of(proxier::Mode::Iptables));
            let trace = Sim::new(&node, &traits, &store).trace(&packet(&store, &draw), &[]);
            forwarded += usize::from(trace.matched.is_some());
        }
        assert!(forwarded > 5, "{forwarded} of 50 packets met a frontend");
    }
}

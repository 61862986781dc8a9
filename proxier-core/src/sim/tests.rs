use super::*;
use crate::{
    ir::{Balance, Frontend, SourceFilter, Verdicts},
    model::{NodeEnv, NodePortAddresses},
    name::ObjectName,
    proxier::{Mode, Revision, Update},
};

const CLUSTER: Verdict = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Preserve };
const MASQUERADED: Verdict = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Masquerade };

fn node() -> NodeView {
    let env = NodeEnv {
        interface_addresses: ["127.0.0.1", "172.20.7.11", "172.21.7.11"]
            .map(|it| it.parse().unwrap())
            .into(),
        node_port_addresses: NodePortAddresses::parse(&["172.20.7.0/24"]).unwrap(),
        service_cidrs: vec!["10.97.0.0/16".parse().unwrap()],
        detect_local: crate::model::DetectLocal::ClusterCidr(vec!["10.61.0.0/16".parse().unwrap()]),
        ..NodeEnv::default()
    };
    env.view()
}

/// One Service with a cluster IP, a fenced address and a node port.
fn index(verdicts: Verdicts) -> Index {
    let key = |way_in, port| FrontendKey {
        way_in,
        port: NonZeroU16::new(port).unwrap(),
        protocol: Protocol::Tcp,
    };
    let at = |ip: &str| WayIn::Address(ip.parse().unwrap());
    let frontend = |kind, key, sources| Frontend { kind, key, sources, verdicts };
    let fence = SourceFilter { ranges: vec!["192.0.2.48/28".parse().unwrap()], vips: Vec::new() };
    let member = |addr: &str, local| Member::new(addr.parse().unwrap(), local);
    let fragment = Fragment {
        id: FragmentId {
            service: ObjectName::new("shop", "cart"),
            port: "web".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
        },
        frontends: vec![
            frontend(FrontendKind::ClusterIp, key(at("10.97.0.21"), 80), None),
            frontend(FrontendKind::LoadBalancer, key(at("203.0.113.1"), 80), Some(fence)),
            frontend(FrontendKind::NodePort, key(WayIn::Node(Family::V4), 31000), None),
        ],
        cluster: vec![member("10.61.3.21:80", true), member("10.61.4.21:80", false)],
        local: vec![member("10.61.3.21:80", true)],
        affinity: NonZeroU32::new(600),
        balance: Balance::Default,
        scheduler: None,
        counters: false,
        health_check_node_port: NonZeroU16::new(32000),
        serving: Vec::new(),
    };
    let mut index = Index::default();
    index.apply(&Update::Reset {
        revision: Revision(1),
        node: Arc::new(node()),
        fragments: vec![Arc::new(fragment)],
    });
    index
}

fn outcome(mode: Mode, verdicts: Verdicts, from: (&str, Option<&str>), to: &str) -> Trace {
    let (node, traits) = (node(), Traits::of(mode));
    let packet = Packet {
        source: from.0.parse().unwrap(),
        input: from.1.map(Arc::from),
        destination: to.parse().unwrap(),
        protocol: Protocol::Tcp,
    };
    Sim::new(&node, &traits, &index(verdicts)).trace(&packet, &[])
}

const WIRE: (&str, Option<&str>) = ("198.18.0.1", Some("eth0"));
const HOST: (&str, Option<&str>) = ("172.20.7.11", None);
const POD: (&str, Option<&str>) = ("10.61.3.21", Some("cni0"));

#[test]
fn the_table_of_differences_between_modes_is_kept() {
    use Mode::{Iptables, Ipvs, Nftables};
    let alive = Verdicts::all(CLUSTER);
    let dead = Verdicts::all(Verdict::Reject);
    let modes = [Iptables, Nftables, Ipvs];
    let row = |verdicts, from, to| modes.map(|mode| outcome(mode, verdicts, from, to).outcome);
    use Outcome::{Accept, Drop, Reject, Untouched};
    assert_eq!(row(alive, POD, "10.97.0.21:81"), [Untouched, Reject, Reject]);
    assert_eq!(row(alive, POD, "10.97.0.99:80"), [Untouched, Drop, Untouched]);
    assert_eq!(row(dead, HOST, "203.0.113.1:80"), [Untouched, Drop, Drop]);
    assert_eq!(row(dead, WIRE, "203.0.113.1:80"), [Reject, Drop, Drop]);
    assert_eq!(row(dead, WIRE, "172.21.7.11:31000"), [Reject, Untouched, Untouched]);
    assert_eq!(row(alive, WIRE, "172.20.7.11:32000"), [Accept, Untouched, Untouched]);
    assert_eq!(row(alive, WIRE, "172.21.7.11:31000"), [Untouched, Untouched, Untouched]);
}

#[test]
fn the_source_filter_comes_first_and_hairpin_last() {
    let alive = Verdicts::all(CLUSTER);
    assert_eq!(outcome(Mode::Iptables, alive, WIRE, "203.0.113.1:80").outcome, Outcome::Drop);
    let Outcome::Forward { to } = outcome(Mode::Iptables, alive, POD, "10.97.0.21:80").outcome
    else {
        panic!("forwarded")
    };
    let rewrites: Vec<_> = to.iter().map(|target| target.source).collect();
    assert_eq!(rewrites, [Rewrite::Hairpin, Rewrite::Kept]);
    let trace = outcome(Mode::Iptables, Verdicts::all(MASQUERADED), HOST, "172.20.7.11:31000");
    assert_eq!(trace.origin, Origin::Node);
    let Outcome::Forward { to } = trace.outcome else { panic!("forwarded") };
    assert!(to.iter().all(|target| target.source == Rewrite::ByPolicy));
}

#[test]
fn a_client_returns_to_its_endpoint_until_the_timeout() {
    let (node, traits) = (node(), Traits::of(Mode::Iptables));
    let index = index(Verdicts::all(CLUSTER));
    let packet = Packet {
        source: "198.18.0.1".parse().unwrap(),
        input: None,
        destination: "10.97.0.21:80".parse().unwrap(),
        protocol: Protocol::Tcp,
    };
    let key = FrontendKey {
        way_in: WayIn::Address(packet.destination.ip()),
        port: NonZeroU16::new(80).unwrap(),
        protocol: Protocol::Tcp,
    };
    let (fragment, _) = index.frontend(&key).unwrap();
    let choices = |seconds| {
        let memory = [Remembered {
            client: packet.source,
            key,
            id: fragment.id.clone(),
            member: "10.61.4.21:80".parse().unwrap(),
            age: Duration::from_secs(seconds),
        }];
        let outcome = Sim::new(&node, &traits, &index).trace(&packet, &memory).outcome;
        if let Outcome::Forward { to } = outcome { to.len() } else { 0 }
    };
    assert_eq!([choices(10), choices(600), choices(601)], [1, 1, 2]);
}

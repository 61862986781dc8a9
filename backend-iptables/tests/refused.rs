//! Fragments of embedders that kube-proxy's chains cannot express are refused with words.
#![allow(clippy::panic, clippy::unwrap_in_result, clippy::unwrap_used, reason = "a test")]

mod common;

use common::*;
use proxier_backend_iptables::{Config, Iptables};
use proxier_core::{
    Update,
    ir::{
        Balance, Fragment, FrontendKind, NodeView, Pool, Snat, SourceFilter, Verdict, Verdicts,
        WayIn,
    },
    spi::{Backend, Objects, PlanError},
};

fn near() -> (NodeView, Fragment) {
    let (_, update) = store(env(), WORKED_EXAMPLE);
    let Update::Reset { node, fragments, .. } = update else { panic!("a reset") };
    ((*node).clone(), Fragment::clone(fragments.first().unwrap()))
}

fn compile(node: &NodeView, fragment: &Fragment) -> Result<(), PlanError> {
    let backend = Iptables::new(Config::default()).unwrap();
    backend.compile(node, fragment, &(), &mut Objects::default())
}

/// The reason for which a changed fragment is refused.
fn refusal(change: impl FnOnce(&mut NodeView, &mut Fragment)) -> String {
    let (mut node, mut fragment) = near();
    assert_eq!(compile(&node, &fragment), Ok(()));
    change(&mut node, &mut fragment);
    match compile(&node, &fragment) {
        Err(error @ PlanError::Unsupported { mode: "iptables", .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn set(fragment: &mut Fragment, kind: FrontendKind, verdicts: Verdicts) {
    for frontend in fragment.frontends.iter_mut().filter(|it| it.kind == kind) {
        frontend.verdicts = verdicts;
    }
}

const fn forward(pool: Pool, snat: Snat) -> Verdict {
    Verdict::Forward { pool, snat }
}

#[test]
fn verdicts_without_a_place_in_the_chains() {
    let any = forward(Pool::Cluster, Snat::Masquerade);
    let kept = forward(Pool::Cluster, Snat::Preserve);
    let text = refusal(|_, fragment| {
        let verdicts = Verdicts { pod: kept, node: Verdict::Drop, external: any };
        set(fragment, FrontendKind::ClusterIp, verdicts);
    });
    assert_eq!(
        text,
        "iptables mode cannot do this: ClusterIP 10.97.1.11:80/TCP with these verdicts: pods cluster, \
         source kept; node drop; others cluster, masquerade"
    );
    let text = refusal(|_, fragment| {
        let verdicts = Verdicts { pod: any, node: kept, external: any };
        set(fragment, FrontendKind::ClusterIp, verdicts);
    });
    assert!(text.contains("masquerades some of the sources only"), "{text}");
    let text = refusal(|_, fragment| {
        set(fragment, FrontendKind::NodePort, Verdicts::all(any));
    });
    assert!(text.contains("different policies"), "{text}");
    let text = refusal(|_, fragment| {
        set(fragment, FrontendKind::NodePort, Verdicts::all(kept));
    });
    assert!(text.contains("NodePort"), "{text}");
    // Pods cannot be told from others without a detector.
    let text = refusal(|node, _| node.0.v4.detector = None);
    assert!(text.contains("masquerades some"), "{text}");
}

#[test]
fn frontends_without_a_place_in_the_chains() {
    let filter = || SourceFilter { ranges: Vec::new(), vips: Vec::new() };
    let text = refusal(|_, fragment| {
        let node_port = fragment.frontends.iter_mut().find(|it| it.kind == FrontendKind::NodePort);
        node_port.unwrap().sources = Some(filter());
    });
    assert!(text.contains("source ranges on NodePort"), "{text}");
    let text = refusal(|_, fragment| {
        let frontend = fragment.frontends.first_mut().unwrap();
        frontend.key.way_in = WayIn::Node(proxier_core::Family::V4);
    });
    assert!(text.contains("as ClusterIP"), "{text}");
    let text = refusal(|_, fragment| fragment.id.protocol = proxier_core::Protocol::Udp);
    assert!(text.contains("another protocol"), "{text}");
    let text = refusal(|_, fragment| {
        let vip = fragment.frontends.iter().find(|it| it.kind == FrontendKind::LoadBalancer);
        let mut second = vip.unwrap().clone();
        second.key.way_in = WayIn::Address("203.0.113.99".parse().unwrap());
        second.sources = Some(filter());
        fragment.frontends.push(second);
    });
    assert!(text.contains("different source ranges"), "{text}");
}

#[test]
fn interfaces_that_cannot_be() {
    use proxier_core::ir::Detector;
    for name in ["", "an-interface-name-too-long"] {
        let text = refusal(|node, _| {
            node.0.v4.detector = Some(Detector::InterfacePrefix(name.to_owned()));
        });
        assert!(text.contains("interface"), "{text}");
    }
}

#[test]
fn turns_with_different_weights_are_refused() {
    let reason = refusal(|_, fragment| {
        fragment.balance = Balance::RoundRobin;
        fragment.cluster[0].weight = 3.try_into().unwrap();
    });
    assert!(reason.contains("round robin over endpoints with different weights"), "{reason}");
}

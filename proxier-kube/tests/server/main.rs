//! The source against an API server with good and bad days.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_in_result,
    clippy::unwrap_used,
    reason = "helpers of tests fail as tests do"
)]

mod fixtures;
mod garbage;
mod rig;
mod secure;
mod storms;

use std::time::Duration;

use proxier_core::ObjectName;
use proxier_kube::{Kind, Notice, Recorder, Regarding, TroubleKind};
use proxier_testkit::apiserver::Fault;
use rig::{Rig, client, node, options, server, service, slice};
use serde_json::json;

#[tokio::test]
async fn the_first_lists_come_once_and_complete() {
    for streaming in [true, false] {
        let rig = Rig::start(server().await, streaming);
        rig.until("the start", |rig| rig.status.borrow().started).await;
        rig.until_equal().await;
        rig.until("endpoints", |rig| rig.endpoints("s1") == 2).await;
        let store = rig.store.lock().unwrap();
        assert_eq!(store.env().ips, ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(store.env().service_cidrs, ["10.96.0.0/16".parse().unwrap()]);
        assert_eq!(*rig.resets.lock().unwrap(), 1, "streaming {streaming}");
        assert!(rig.status.borrow().node.is_eligible());
        let pages = if streaming { 0 } else { 4 };
        assert_eq!(rig.server.count("list", "services"), pages);
    }
}

#[tokio::test]
async fn changes_follow_and_exclusions_delete() {
    let rig = Rig::start(server().await, true);
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(slice("s1", &["10.61.0.1"]));
    rig.until("one endpoint less", |rig| rig.endpoints("s1") == 1).await;
    let mut hidden = service("s2", "10.96.0.2");
    hidden["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": ""});
    rig.server.apply(hidden);
    rig.server.delete("services", "shop/s3");
    rig.server.apply(node("192.0.2.9"));
    rig.until_equal().await;
    rig.until("the node's address", |rig| {
        rig.store.lock().unwrap().env().ips == ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()]
    })
    .await;
    rig.server.delete("nodes", "node-a");
    rig.until("the node's end", |rig| !rig.status.borrow().node.is_eligible()).await;
    assert!(!rig.store.lock().unwrap().env().ips.is_empty(), "forwarding goes on");
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_asked_for_pages() {
    let server = server().await;
    server.fail(Fault::NoStreamingLists);
    let rig = Rig::start(server, true);
    rig.until_equal().await;
    assert_eq!(rig.server.count("list", "services"), 4);
}

#[tokio::test]
async fn after_every_bad_day_the_store_equals_the_server() {
    let refuse =
        |verb, code, retry_after| Fault::Refuse { verb, resource: "services", code, retry_after };
    let faults = [
        (refuse("watch", 500, None), TroubleKind::Server),
        (refuse("watch", 429, None), TroubleKind::Throttled),
        (refuse("watch", 429, Some(1)), TroubleKind::Throttled),
        (refuse("watch", 401, None), TroubleKind::Unauthorized),
        (refuse("watch", 403, None), TroubleKind::Forbidden),
        (Fault::Broken(60), TroubleKind::Unreachable),
    ];
    for (fault, kind) in faults {
        let rig = Rig::start(server().await, true);
        rig.until("the start", |rig| rig.status.borrow().started).await;
        rig.server.fail(fault.clone());
        rig.server.cut();
        rig.server.apply(service("s1", "10.96.1.1"));
        rig.server.delete("services", "shop/s9");
        let what = format!("the status to say {kind} of {fault:?}");
        rig.until(&what, |rig| {
            let status = rig.status.borrow();
            status.troubles().any(|(_, it)| it.trouble.kind == kind)
        })
        .await;
        rig.server.heal();
        rig.until_equal().await;
        rig.until("all well", |rig| rig.status.borrow().troubles().next().is_none()).await;
        assert_eq!(
            *rig.resets.lock().unwrap(),
            1,
            "a watch is resumed, not listed anew: {fault:?}"
        );
    }
}

#[tokio::test]
async fn a_watch_that_falls_silent_is_opened_again() {
    let rig = Rig::start(server().await, true);
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(service("s1", "10.96.1.1"));
    rig.until_equal().await;
    rig.server.fail(Fault::Silent);
    rig.server.delete("services", "shop/s9");
    rig.until("a stall", |rig| rig.status.borrow().of(Kind::Services).counts.stalls == 1).await;
    rig.server.heal();
    rig.until_equal().await;
    let quiet = |rig: &Rig| rig.status.borrow().of(Kind::ServiceCidrs).counts;
    rig.until("a quiet watch to be opened again as well", |rig| quiet(rig).watches > 1).await;
    let counts = quiet(&rig);
    assert_eq!(
        (counts.stalls, counts.failures, counts.lists),
        (0, 0, 1),
        "and quiet is no trouble"
    );
}

#[tokio::test]
async fn lists_survive_bad_days_too() {
    let code = |code| Fault::Refuse { verb: "list", resource: "services", code, retry_after: None };
    let faults =
        [Fault::ExpiredPages, Fault::Broken(200), Fault::Truncated(200), code(429), code(503)];
    for fault in faults {
        let server = server().await;
        server.fail(fault.clone());
        let rig = Rig::start(server, false);
        rig.until("a failure", |rig| rig.status.borrow().of(Kind::Services).counts.failures > 0)
            .await;
        if fault != Fault::ExpiredPages {
            assert!(!rig.status.borrow().started, "nothing before complete lists: {fault:?}");
            rig.server.heal();
        }
        rig.until_equal().await;
    }
}

#[tokio::test]
async fn an_expired_version_costs_one_list() {
    let rig = Rig::start(server().await, true);
    rig.until("the start", |rig| rig.status.borrow().started).await;
    rig.server.apply(service("s11", "10.96.0.11"));
    rig.server.delete("services", "shop/s5");
    rig.server.compact();
    rig.server.cut();
    rig.until("a second list", |rig| *rig.resets.lock().unwrap() == 2).await;
    rig.until_equal().await;
    assert_eq!(rig.status.borrow().of(Kind::Services).counts.lists, 2);
}

#[tokio::test]
async fn a_garbage_object_costs_only_itself() {
    let server = server().await;
    let mut garbage = service("s4", "10.96.0.4");
    garbage["spec"]["ports"] = json!("none");
    server.apply(garbage.clone());
    let rig = Rig::start(server, true);
    rig.until_equal().await;
    let problems = rig.status.borrow().of(Kind::Services).problems.clone();
    assert!(
        problems[0].1[0].to_string().starts_with("services shop/s4: spec.ports: "),
        "{problems:?}"
    );
    garbage["metadata"]["name"] = json!("s6");
    rig.server.apply(garbage);
    rig.server.apply(service("s4", "10.96.0.4"));
    rig.until_equal().await;
}

#[tokio::test]
async fn without_service_cidrs_the_node_is_programmed_all_the_same() {
    let server = server().await;
    for verb in ["list", "watch"] {
        let resource = "servicecidrs";
        server.fail(Fault::Refuse { verb, resource, code: 403, retry_after: None });
    }
    let rig = Rig::start(server, true);
    rig.until_equal().await;
    let status = rig.status.borrow().clone();
    let (_, standing) = status.troubles().next().unwrap();
    assert!(standing.trouble.to_string().contains("grant verb"), "{}", standing.trouble);
}

#[tokio::test]
async fn equal_notices_are_one_event() {
    let server = server().await;
    let client = client(&server);
    let (recorder, publisher) = Recorder::new(client, "proxier", "node-a");
    let service = Regarding::Service(ObjectName::new("shop", "s1"));
    for _ in 0..50 {
        recorder.publish(Notice::warning(service.clone(), "Refused", "Program", "no room"));
    }
    drop(recorder);
    publisher.run().await;
    let events = server.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["reason"], "Refused");
    assert_eq!(events[0]["regarding"]["name"], "s1");
}

#[tokio::test]
async fn slow_lists_are_waited_for_within_bounds() {
    for (bytes, is_in_time) in [(500, true), (40, false)] {
        let server = server().await;
        server.fail(Fault::Slow(bytes));
        let mut options = options(false);
        if !is_in_time {
            options.request_timeout = Duration::from_millis(60);
        }
        let rig = Rig::start_with(server, "node-a", options);
        if !is_in_time {
            rig.until("a time-out", |rig| {
                let status = rig.status.borrow();
                status.troubles().any(|(_, it)| it.trouble.kind == TroubleKind::TimedOut)
            })
            .await;
            rig.server.heal();
        }
        rig.until_equal().await;
    }
}

#[tokio::test]
async fn what_is_missing_is_said_in_words_that_help() {
    let cases = [
        (403, "cannot watch services: forbidden: grant verb \"watch\" on resource \"services\""),
        (401, "cannot watch services: the server does not accept the credentials (expired token?)"),
    ];
    for (code, words) in cases {
        let rig = Rig::start(server().await, true);
        rig.until_equal().await;
        let resource = "services";
        rig.server.fail(Fault::Refuse { verb: "watch", resource, code, retry_after: None });
        rig.server.cut();
        rig.until(words, |rig| {
            let status = rig.status.borrow();
            status.troubles().any(|(_, it)| it.trouble.to_string().starts_with(words))
        })
        .await;
        assert!(!rig.services().is_empty(), "what was known stays");
    }
}

#[tokio::test]
async fn clocks_that_differ_do_no_harm() {
    let server = server().await;
    for (index, time) in
        ["1970-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "yesterday"].iter().enumerate()
    {
        let mut object = service(&format!("t{index}"), &format!("10.96.2.{index}"));
        object["metadata"]["creationTimestamp"] = json!(time);
        server.apply(object);
        let mut object = slice(&format!("t{index}"), &["10.61.2.1"]);
        object["metadata"]["creationTimestamp"] = json!(time);
        object["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": time});
        server.apply(object);
    }
    let rig = Rig::start(server, true);
    rig.until_equal().await;
    for index in 0..3 {
        rig.until("endpoints", |rig| rig.endpoints(&format!("t{index}")) == 1).await;
    }
}

//! Many sources at one server that goes away, comes back and forgets.

use std::time::{Duration, Instant};

use proxier_kube::{Kind, TroubleKind};
use proxier_testkit::{
    apiserver::{ApiServer, Fault},
    eventually_async,
};

use super::rig::{DEADLINE, Rig, Source, client, expected, options, server, service};

const SOURCES: usize = 12;

fn lists(source: &Source, kind: Kind) -> u64 {
    source.status.borrow().of(kind).counts.lists
}

async fn until(what: &str, sources: &[Source], condition: impl Fn(&Source) -> bool) {
    let met =
        eventually_async(DEADLINE, what, || std::future::ready(sources.iter().all(&condition)))
            .await;
    if let Err(overdue) = met {
        let states: Vec<_> = sources.iter().map(|it| it.status.borrow().clone()).collect();
        panic!("{overdue}: {states:#?}");
    }
}

async fn started() -> (ApiServer, Vec<Source>) {
    let server = server().await;
    let sources: Vec<_> =
        (0..SOURCES).map(|_| Source::start(client(&server), "node-a", options(true))).collect();
    until("all started", &sources, |it| it.services() == expected(&server)).await;
    (server, sources)
}

#[tokio::test]
async fn a_server_that_comes_back_is_not_asked_for_lists() {
    let (mut server, sources) = started().await;
    server.close().await;
    until("trouble", &sources, |it| {
        let status = it.status.borrow();
        Kind::ALL.iter().all(|kind| {
            status
                .of(*kind)
                .trouble
                .as_ref()
                .is_some_and(|it| it.trouble.kind == TroubleKind::Unreachable && it.attempts >= 5)
        })
    })
    .await;
    server.apply(service("s11", "10.96.0.11"));
    server.delete("services", "shop/s1");
    assert!(sources.iter().all(|it| it.services().len() == 10), "what was known stays");
    server.reopen().await.unwrap();
    until("the changes", &sources, |it| it.services() == expected(&server)).await;
    until("all well", &sources, |it| it.status.borrow().troubles().next().is_none()).await;
    for source in &sources {
        for kind in Kind::ALL {
            assert_eq!(lists(source, kind), 1, "{kind}");
        }
    }
}

#[tokio::test]
async fn a_forgetful_server_is_asked_for_one_list_each() {
    let (server, sources) = started().await;
    server.apply(service("s11", "10.96.0.11"));
    server.delete("services", "shop/s1");
    until("the changes", &sources, |it| it.services() == expected(&server)).await;
    server.delete("services", "shop/s2");
    server.compact();
    server.cut();
    until("a second list", &sources, |it| Kind::ALL.iter().all(|kind| lists(it, *kind) == 2)).await;
    until("the changes", &sources, |it| it.services() == expected(&server)).await;
    assert!(sources.iter().all(|it| lists(it, Kind::Services) == 2), "and no third");
}

/// A server that restarts forbids everything until it has read its roles, and knows none of the
/// versions that it gave out before: so does kube-apiserver 1.36.
#[tokio::test]
async fn a_server_that_restarts_is_listed_as_soon_as_it_answers() {
    let mut options = options(true);
    (options.first_retry, options.longest_retry) = (Duration::from_millis(10), DEADLINE);
    let mut rig = Rig::start_with(server().await, "node-a", options);
    rig.until_equal().await;
    rig.server.close().await;
    // By then the delays have grown to seconds.
    rig.until("trouble", |rig| {
        let status = rig.status.borrow();
        status.troubles().filter(|(_, standing)| standing.attempts >= 9).count() == 4
    })
    .await;
    rig.server.delete("services", "shop/s1");
    rig.server.compact();
    for resource in ["endpointslices", "nodes", "servicecidrs", "services"] {
        rig.server.fail(Fault::Refuse { verb: "watch", resource, code: 403, retry_after: None });
    }
    rig.server.reopen().await.unwrap();
    rig.until("an answer", |rig| {
        let status = rig.status.borrow();
        status.troubles().any(|(_, it)| it.trouble.kind == TroubleKind::Forbidden)
    })
    .await;
    rig.server.heal();
    let back = Instant::now();
    rig.until_equal().await;
    rig.until("all well", |rig| rig.status.borrow().troubles().next().is_none()).await;
    assert!(back.elapsed() < Duration::from_millis(2500), "{:?}", back.elapsed());
}

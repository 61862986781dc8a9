//! An endpoint goes while traffic flows.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use proxier::{
    OpCount, Protocol, Proxier, Update,
    ir::{Fragment, FrontendKind, Member, Origin, Verdict},
    model::{EndpointSlice, Event, Object, Store, api},
};
use proxier_testkit::traffic::{Conversation, ProbeSpec};

use crate::{
    cluster::Cluster,
    expect::Seen,
    stage::{Stage, wire},
    traffic::{Case, Cases},
};

/// How often a connection is opened until it leads to another endpoint than the one that goes.
const TRIES: usize = 40;

/// What a change of one Service did.
#[derive(Debug)]
pub(crate) struct Change {
    /// The Service port, and the protocol.
    pub(crate) service: String,
    pub(crate) protocol: Protocol,
    /// The endpoint that went.
    pub(crate) gone: String,
    pub(crate) gone_addr: SocketAddr,
    pub(crate) synced: Synced,
    /// Who answers pods afterwards.
    pub(crate) after: Seen,
    pub(crate) expected: String,
    pub(crate) as_planned: bool,
    /// Who answered over one connection, or from one source port, before and after.
    pub(crate) flow: Flow,
}

/// What it took to program a change.
#[derive(Debug)]
pub(crate) struct Synced {
    /// To know which objects change.
    pub(crate) plan: Duration,
    /// From the event until the kernel held it, planning included.
    pub(crate) total: Duration,
    pub(crate) visited: usize,
    pub(crate) ops: OpCount,
    pub(crate) batches: usize,
    pub(crate) stale_flows: usize,
    /// The operations, in words.
    pub(crate) text: String,
}

/// A connection, or a flow with one source port.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    pub(crate) before: Option<String>,
    pub(crate) after: Option<String>,
    /// It did what it should.
    pub(crate) as_planned: bool,
}

/// A Service port to change: of this protocol, reached by pods, with something left afterwards.
pub(crate) fn candidate(store: &Store, stage: &Stage, protocol: Protocol) -> Option<Fragment> {
    let usable = |fragment: &&Fragment| {
        let known = |member: &Member| stage.layout.labels.contains_key(&member.addr.ip());
        fragment.id.protocol == protocol
            && fragment.affinity.is_none()
            && stage.layout.client_addr(Origin::Pod, fragment.id.family).is_some()
            && fragment
                .cluster_ip()
                .is_some_and(|it| matches!(it.verdicts.pod, Verdict::Forward { .. }))
            && fragment.cluster.len() > 1
            && fragment.cluster.iter().all(known)
    };
    let score = |fragment: &Fragment| {
        // Something plain is easiest to follow.
        (fragment.cluster.len().min(3), fragment.frontends.len() == 1, fragment.id.port_text())
    };
    let all = store.fragments().map(|fragment| &**fragment).filter(usable);
    all.max_by_key(|fragment| score(fragment)).cloned()
}

/// Takes one endpoint away from a Service port and looks what happens. TCP: an established connection to
/// another endpoint lives on. UDP: a flow to the endpoint that goes moves to another.
pub(crate) async fn remove_endpoint(
    stage: &Stage,
    cluster: &Cluster,
    store: &mut Store,
    proxier: &mut dyn Proxier,
    fragment: &Fragment,
) -> Result<Change, Box<dyn std::error::Error>> {
    let frontend = fragment.cluster_ip().ok_or("a Service without cluster IP")?;
    let dst = stage.address(frontend.key.way_in, frontend.key.port.get()).ok_or("no address")?;
    let label = |ip: IpAddr| stage.layout.labels.get(&ip).cloned().unwrap_or_default();
    let pod = stage.world.pods().next().ok_or("no pod")?;
    let spec = ProbeSpec::new(wire(fragment.id.protocol), dst);
    let udp = fragment.id.protocol == Protocol::Udp;

    let mut talk = Conversation::open(&pod, &spec).await?;
    let last = fragment.cluster.last().ok_or("an empty pool")?;
    let first = if udp { talk.ask().await.by().map(str::to_owned) } else { None };
    let led_to = |member: &&Member| Some(label(member.addr.ip())) == first;
    let gone = *fragment.cluster.iter().find(led_to).unwrap_or(last);
    let gone_label = label(gone.addr.ip());
    let mut tries = 0;
    while !udp && talk.opening().is_none_or(|it| it.by == gone_label) && tries < TRIES {
        talk = Conversation::open(&pod, &spec).await?;
        tries += 1;
    }
    let before = first.or_else(|| talk.opening().map(|answer| answer.by.clone()));

    let holds = |slice: &&EndpointSlice| {
        *slice.service() == fragment.id.service
            && slice.endpoints().iter().any(|it| it.ip == gone.addr.ip())
    };
    let slices: Vec<_> = cluster.slices.iter().filter(holds).collect();
    let events = slices
        .into_iter()
        .map(|slice| Event::Apply(Object::EndpointSlice(without(slice, gone.addr.ip()))));
    let synced = sync(store, proxier, events.collect()).await?;
    let after = talk.ask().await.by().map(str::to_owned);
    let as_planned = match udp {
        true => after.is_some() && after != before,
        false => after.is_some() && after == before,
    };
    let flow = Flow { before, after, as_planned };

    let now = store.fragments().find(|it| it.id == fragment.id).map(|it| (**it).clone());
    let now = now.ok_or("the Service port is gone")?;
    let cases = Cases::of(stage, &[&now], &[], proxier.capabilities().mode);
    let case = cases
        .cases
        .iter()
        .find(|it| it.kind == FrontendKind::ClusterIp && it.origin == Origin::Pod);
    let case: &Case = case.ok_or("no pod may use it")?;
    let seen = case.ask(20).await;
    Ok(Change {
        service: fragment.id.port_text(),
        protocol: fragment.id.protocol,
        gone: gone_label,
        gone_addr: gone.addr,
        synced,
        expected: case.expected.to_string(),
        as_planned: case.is(&seen, stage),
        after: seen,
        flow,
    })
}

/// Programs what events change, and says what it took.
async fn sync(
    store: &mut Store,
    proxier: &mut dyn Proxier,
    events: Vec<Event>,
) -> Result<Synced, Box<dyn std::error::Error>> {
    let began = Instant::now();
    for event in events {
        store.apply(event);
    }
    let update: Update = store.take().ok_or("nothing changed")?;
    let selected = began.elapsed();
    // For people: `sync` plans by itself.
    let planning = Instant::now();
    let summary = proxier.plan(&update);
    let plan = planning.elapsed();
    let syncing = Instant::now();
    let report = proxier.sync(update).await?;
    let total = selected + syncing.elapsed();
    Ok(Synced {
        plan,
        total,
        visited: report.visited,
        ops: report.ops,
        batches: report.batches,
        stale_flows: report.stale_flows.v4 + report.stale_flows.v6,
        text: summary.to_string(),
    })
}

/// The slice as its controller would write it once the endpoint at `ip` is gone.
fn without(slice: &EndpointSlice, ip: IpAddr) -> EndpointSlice {
    let hints = |names: &[std::sync::Arc<str>]| {
        names.iter().map(|name| api::Hint { name: name.to_string() }).collect()
    };
    let mut metadata = api::Metadata {
        name: slice.name().name().to_owned(),
        namespace: slice.name().namespace().to_owned(),
        ..api::Metadata::default()
    };
    let service = slice.service().name().to_owned();
    metadata.labels.insert("kubernetes.io/service-name".to_owned(), service);
    let ports = slice.ports().iter().map(|port| api::EndpointPort {
        name: Some(port.name.to_string()),
        protocol: port.protocol.to_string(),
        port: Some(port.port.get().into()),
    });
    let endpoints = slice.endpoints().iter().filter(|it| it.ip != ip).map(|it| api::Endpoint {
        addresses: vec![it.ip.to_string()],
        node_name: it.node.as_deref().map(str::to_owned),
        conditions: api::EndpointConditions {
            ready: Some(it.ready),
            serving: Some(it.serving),
            terminating: Some(it.terminating),
        },
        hints: api::EndpointHints {
            for_zones: hints(it.zone_hints()),
            for_nodes: hints(it.node_hints()),
        },
    });
    let object = api::EndpointSlice {
        metadata,
        address_type: slice.family().to_string(),
        ports: ports.collect(),
        endpoints: endpoints.collect(),
    };
    EndpointSlice::read(&object).value.unwrap_or_else(|| slice.clone())
}

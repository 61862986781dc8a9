//! Kind `conntrack`: which tracked flows are removed, as the engine asks a kernel for it.

use std::{collections::BTreeMap, net::SocketAddr, num::NonZeroU16, sync::Arc};

use futures_util::FutureExt;
use proxier_core::{
    Change, Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    conntrack::{Flow, FlowFilter, family_of},
    engine::Engine,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, NodeView, Pool, Snat,
        Verdict as Row, Verdicts, WayIn,
    },
    testing::{FakeKernel, Fault, Toy},
};
use serde::Deserialize;
use serde_json::json;

use super::{
    Case, CaseError, CaseFile, NodeSpec, Settings, Verdict,
    deviations::conntrack_deviation,
    world::{env, ip, node_of, read},
};

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeSpec {
    pub(super) object: String,
    pub(super) proto: Protocol,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceEntry {
    pub(super) proto: Protocol,
    cluster_ip: String,
    port: NonZeroU16,
    #[serde(default)]
    pub(super) node_port: u16,
    #[serde(default)]
    vips: Vec<String>,
    #[serde(default)]
    external_ips: Vec<String>,
    #[serde(default)]
    pub(super) endpoints: BTreeMap<SocketAddr, bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) num: u64,
    proto: Protocol,
    pub(super) dst: SocketAddr,
    reply_src: SocketAddr,
}

impl ServiceEntry {
    /// Says whether a flow is for one of its frontends.
    pub(super) fn goes_to(&self, entry: &Entry) -> bool {
        let addresses = [&self.cluster_ip].into_iter().chain(&self.vips).chain(&self.external_ips);
        let at_address = self.port.get() == entry.dst.port()
            && addresses.filter_map(|text| ip(text).ok()).any(|ip| ip == entry.dst.ip());
        at_address || self.node_port == entry.dst.port()
    }
}

impl Entry {
    const fn flow(&self) -> Flow {
        Flow { protocol: self.proto, destination: self.dst, answered_by: self.reply_src }
    }
}

/// A case, read.
pub(super) struct Situation {
    pub(super) changes: Vec<ChangeSpec>,
    pub(super) services: Vec<ServiceEntry>,
    pub(super) entries: Vec<Entry>,
    failed: bool,
    pub(super) node: NodeView,
}

pub(super) fn run_conntrack(file: &CaseFile, case: &Case) -> Result<Verdict, CaseError> {
    let (name, node) = node_of(file, case, None)?;
    let node: NodeSpec = read(case, "node", node)?;
    let env = env(&name, &node, &Settings::default()).map_err(|error| case.wrong("node", error))?;
    let situation = Situation {
        changes: case.read_or("changes", Vec::new())?,
        services: case.read_or("services", Vec::new())?,
        entries: case.read_or("entries", Vec::new())?,
        failed: case.read_or("sync_failed", false)?,
        node: env.view(),
    };
    let filters = filters(&situation).map_err(|error| case.wrong("services", error))?;
    let stale = |entry: &&Entry| filters.iter().any(|filter| filter.is_stale(&entry.flow()));
    let deleted: Vec<u64> = situation.entries.iter().filter(stale).map(|it| it.num).collect();
    let actual = json!({"runs": !filters.is_empty(), "deleted": deleted});
    let verdict = Verdict::compare(case.get("expect"), &actual);
    Ok(match verdict {
        Verdict::Failed { .. } => conntrack_deviation(case, &situation, &actual).unwrap_or(verdict),
        Verdict::NotApplicable { .. } | Verdict::Passed { .. } => verdict,
    })
}

/// What the engine asks the kernel to forget when the changes are programmed.
fn filters(situation: &Situation) -> Result<Vec<FlowFilter>, String> {
    let after = situation
        .services
        .iter()
        .zip(1..)
        .map(|(entry, number)| fragment(entry, number))
        .collect::<Result<Vec<_>, String>>()?;
    let (mut old, mut changes) = (Vec::new(), Vec::new());
    for fragment in &after {
        let ours = situation.changes.iter().filter(|it| it.proto == fragment.id.protocol);
        // Endpoints before Services: the names sort so.
        match ours.map(|it| it.object.as_str()).min() {
            Some(object) if object.starts_with("service") => {
                // A frontend is new: the only thing of a Service that flows may depend on.
                let frontends = fragment.frontends.iter().take(1).cloned().collect();
                old.push(Arc::new(Fragment { frontends, ..(**fragment).clone() }));
            }
            Some(_) => old.extend(before_endpoints_changed(fragment, &situation.entries)),
            None => old.push(Arc::clone(fragment)),
        }
        changes.push(Change::Upsert(Arc::clone(fragment)));
    }
    for change in &situation.changes {
        if after.iter().all(|fragment| fragment.id.protocol != change.proto) {
            // A Service that the case does not show has changed.
            let before = stranger(change.proto, "192.0.2.1:9")?;
            old.push(Arc::new(before));
            changes.push(Change::Upsert(Arc::new(stranger(change.proto, "192.0.2.2:9")?)));
        }
    }
    let backend = Toy::new(true);
    let kernel = FakeKernel::new(&backend, usize::MAX);
    let mut engine = Engine::new(backend, kernel, &Family::ALL);
    let node = Arc::new(situation.node.clone());
    let reset = Update::Reset { revision: Revision(1), node, fragments: old };
    sync(&mut engine, reset).map_err(|error| format!("the first sync failed: {error}"))?;
    engine.dataplane_mut().forgotten.clear();
    if situation.failed {
        // Every attempt of the sync, and of the read back after it, meets the fault.
        engine.dataplane_mut().faults.extend([Some(Fault::Transport); 8]);
        changes.push(Change::Upsert(Arc::new(stranger(Protocol::Tcp, "192.0.2.3:9")?)));
    }
    let delta = Update::Delta { revision: Revision(2), node: None, changes };
    let outcome = sync(&mut engine, delta);
    match (outcome, situation.failed) {
        (Err(error), false) => Err(format!("the sync failed: {error}")),
        (Ok(()), true) => Err("the sync was to fail".to_owned()),
        (Ok(()), false) | (Err(_), true) => Ok(engine.dataplane().forgotten.clone()),
    }
}

type Rig = Engine<Toy, FakeKernel<Toy>>;

/// Nothing in a fake kernel waits.
fn sync(engine: &mut Rig, update: Update) -> Result<(), String> {
    let outcome = engine.sync(update).now_or_never().ok_or("the fake kernel waits")?;
    outcome.map(drop).map_err(|error| error.to_string())
}

/// The fragment before its endpoints changed: with the endpoints that answer the flows, or, for a
/// flow that its own destination answers, without any.
fn before_endpoints_changed(fragment: &Arc<Fragment>, entries: &[Entry]) -> Option<Arc<Fragment>> {
    let ours = |entry: &&Entry| {
        entry.proto == fragment.id.protocol
            && fragment.frontends.iter().any(|it| it.key.port.get() == entry.dst.port())
    };
    if entries.iter().filter(ours).any(|entry| entry.dst == entry.reply_src) {
        return None;
    }
    let mut before = (**fragment).clone();
    before.serving.extend(entries.iter().filter(ours).map(|entry| entry.reply_src));
    before.serving.extend("192.0.2.1:9".parse::<SocketAddr>());
    before.serving.sort_unstable();
    before.serving.dedup();
    Some(Arc::new(before))
}

fn stranger(protocol: Protocol, endpoint: &str) -> Result<Fragment, String> {
    let addr: SocketAddr = endpoint.parse().map_err(|error| format!("{endpoint}: {error}"))?;
    let entry = ServiceEntry {
        proto: protocol,
        cluster_ip: "192.0.2.254".to_owned(),
        port: NonZeroU16::MIN,
        node_port: 0,
        vips: Vec::new(),
        external_ips: Vec::new(),
        endpoints: BTreeMap::from([(addr, true)]),
    };
    fragment(&entry, 0).map(Arc::unwrap_or_clone)
}

fn fragment(entry: &ServiceEntry, number: usize) -> Result<Arc<Fragment>, String> {
    let cluster_ip = ip(&entry.cluster_ip)?;
    let family = Family::of(cluster_ip);
    let key = |way_in, port| FrontendKey { way_in, port, protocol: entry.proto };
    let serving: Vec<_> =
        entry.endpoints.iter().filter(|(_, serves)| **serves).map(|(addr, _)| *addr).collect();
    let members: Vec<_> = serving.iter().map(|addr| Member::new(*addr, false)).collect();
    let row = if members.is_empty() {
        Row::Reject
    } else {
        Row::Forward { pool: Pool::Cluster, snat: Snat::Preserve }
    };
    let frontend = |kind, key| Frontend { kind, key, sources: None, verdicts: Verdicts::all(row) };
    let mut frontends =
        vec![frontend(FrontendKind::ClusterIp, key(WayIn::Address(cluster_ip), entry.port))];
    for (kind, texts) in
        [(FrontendKind::ExternalIp, &entry.external_ips), (FrontendKind::LoadBalancer, &entry.vips)]
    {
        for text in texts {
            frontends.push(frontend(kind, key(WayIn::Address(ip(text)?), entry.port)));
        }
    }
    let node_port = NonZeroU16::new(entry.node_port);
    frontends.extend(
        node_port.map(|port| frontend(FrontendKind::NodePort, key(WayIn::Node(family), port))),
    );
    let id = FragmentId {
        service: ObjectName::new("case", &format!("service-{number}")),
        port: "p".into(),
        protocol: entry.proto,
        family,
    };
    let serving = if entry.proto == Protocol::Udp { serving } else { Vec::new() };
    Ok(Arc::new(Fragment { serving, ..Fragment::new(id, frontends, members) }))
}

impl Situation {
    /// Says whether a flow's destination is an address of the node.
    pub(super) fn is_node(&self, entry: &Entry) -> bool {
        let family = family_of(&entry.flow());
        self.node.of(family).addresses.contains(&entry.dst.ip())
    }
}

//! Real traffic through every frontend, from everybody.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use proxier::{
    Degraded, Family, Mode, Protocol,
    ir::{Fragment, Frontend, FrontendKind, Origin},
};
use proxier_testkit::{
    lab::Ns,
    traffic::{Many, ProbeSpec, probe_many},
};
use tokio::task::JoinSet;

use crate::{
    expect::{Expected, Happened, Seen},
    layout::{NODE, OUTSIDE, POD},
    screen::many,
    stage::{Stage, UNTOUCHED, wire},
};

/// Frontends that are tried. All others are programmed all the same.
const MAX_FRONTENDS: usize = 120;

/// How long silence has to last to count as such. A refusal comes within a millisecond.
const SILENCE: Duration = Duration::from_millis(400);

/// Packets that prove a drop or a refusal: chance plays no part in it.
const FEW: usize = 3;

/// More connections, if an endpoint that has to answer has not done so by chance.
const MORE: usize = 500;

/// One client and one frontend.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) service: String,
    pub(crate) kind: FrontendKind,
    pub(crate) protocol: Protocol,
    pub(crate) dst: SocketAddr,
    pub(crate) origin: Origin,
    /// What the client is called.
    pub(crate) from: String,
    pub(crate) source: IpAddr,
    pub(crate) expected: Expected,
    /// What is worth knowing of the frontend.
    pub(crate) about: String,
    /// Why the mode does not program it.
    pub(crate) unsupported: Option<String>,
    ns: Ns,
}

/// What there is to try, and what cannot be tried.
#[derive(Debug, Default)]
pub(crate) struct Cases {
    pub(crate) cases: Vec<Case>,
    /// Frontends that cannot be shown, and why.
    pub(crate) left_out: Vec<(String, String)>,
}

impl Cases {
    /// Every client that makes sense for every frontend of the fragments.
    pub(crate) fn of(
        stage: &Stage,
        fragments: &[&Fragment],
        degraded: &[Degraded],
        mode: Mode,
    ) -> Self {
        let mut all = Self::default();
        let frontends = fragments
            .iter()
            .flat_map(|it| it.frontends.iter().map(move |frontend| (*it, frontend)));
        for (number, (fragment, frontend)) in frontends.enumerate() {
            let name = format!("{} {} {}", fragment.id.port_text(), frontend.kind, frontend.key);
            let added = if number < MAX_FRONTENDS {
                let why = degraded.iter().find(|it| it.id == fragment.id);
                all.add(stage, (fragment, frontend), why.map(|it| it.reason.as_str()), mode)
            } else {
                Err(format!("only the first {MAX_FRONTENDS} are tried"))
            };
            all.left_out.extend(added.err().map(|why| (name, why)));
        }
        all
    }

    fn add(
        &mut self,
        stage: &Stage,
        (fragment, frontend): (&Fragment, &Frontend),
        unsupported: Option<&str>,
        mode: Mode,
    ) -> Result<(), String> {
        let (family, protocol) = (fragment.id.family, frontend.key.protocol);
        let dst = stage.address(frontend.key.way_in, frontend.key.port.get());
        let node = stage.layout.client_addr(Origin::Node, family);
        let (Some(dst), Some(node)) = (dst, node) else {
            return Err(format!("the node has no {family} address"));
        };
        if protocol == Protocol::Sctp && !stage.sctp {
            return Err("programmed, but this kernel has no SCTP sockets to try it with".to_owned());
        }
        // The node's packets to an address of its own carry that one as source.
        let node = if stage.is_nodes(dst.ip()) { dst.ip() } else { node };
        let pod = stage.layout.client_addr(Origin::Pod, family);
        let askers = pod.map(|ip| (POD.to_owned(), POD.to_owned(), Origin::Pod, ip)).into_iter();
        let askers = askers.chain([(NODE.to_owned(), NODE.to_owned(), Origin::Node, node)]);
        let askers = askers.chain(outside(stage, frontend, family)).chain(itself(stage, fragment));
        for (from, netns, origin, source) in askers {
            let labels = &stage.layout.labels;
            let expected = Expected::of((fragment, frontend), (origin, source), labels, mode);
            let expected =
                expected.map_err(|ip| format!("endpoint {ip} has no place in the lab"))?;
            let ns = stage.ns(&netns).map_err(|error| error.to_string())?;
            self.cases.push(Case {
                service: fragment.id.port_text(),
                kind: frontend.kind,
                protocol,
                dst,
                origin,
                from,
                source,
                expected,
                about: about(fragment, frontend),
                unsupported: unsupported.map(str::to_owned),
                ns,
            });
        }
        Ok(())
    }

    /// Tries all of them; what happened is in the order of the cases.
    pub(crate) async fn run(&self, connections: usize) -> Vec<Seen> {
        // Waiting for silence disturbs nobody.
        let mut silent = JoinSet::new();
        for (index, case) in self.cases.iter().enumerate() {
            if matches!(case.expected, Expected::Dropped { .. }) && case.unsupported.is_none() {
                let (ns, spec) = (case.ns.clone(), case.spec().within(SILENCE));
                silent.spawn(async move {
                    (index, probe_many(&ns, &spec, &Many::new(FEW).parallel(FEW)).await)
                });
            }
        }
        let mut seen = Vec::with_capacity(self.cases.len());
        for case in &self.cases {
            let aloud =
                case.unsupported.is_none() && !matches!(case.expected, Expected::Dropped { .. });
            seen.push(if aloud { case.ask(connections).await } else { Seen::default() });
        }
        for (index, tally) in silent.join_all().await {
            if let Some(seen) = seen.get_mut(index) {
                seen.add(&tally);
            }
        }
        seen
    }
}

/// One connection to each frontend, all at once: how many reach the very address they were sent to, of how
/// many.
pub(crate) async fn untouched(rows: &[(Case, Seen)]) -> (usize, usize) {
    let mut asked = BTreeSet::new();
    let mut asking = JoinSet::new();
    for (case, _) in rows {
        // KERNEL: SCTP answers from addresses of an interface only (net/sctp/protocol.c
        // sctp_v4_get_dst, v6.1), which these are not.
        if case.protocol != Protocol::Sctp && asked.insert((case.dst, case.protocol)) {
            let (ns, spec) = (case.ns.clone(), case.spec());
            asking.spawn(async move { probe_many(&ns, &spec, &Many::new(1)).await });
        }
    }
    let tallies = asking.join_all().await;
    (tallies.iter().filter(|tally| tally.count(UNTOUCHED) > 0).count(), tallies.len())
}

/// Endpoints, affinity and source ranges, in a few words.
fn about(fragment: &Fragment, frontend: &Frontend) -> String {
    let members = fragment.reachable();
    let local = members.iter().filter(|member| member.local).count();
    let mut text = match members.len() {
        0 => "no endpoint".to_owned(),
        count => format!("{}, {local} local", many(count, "endpoint")),
    };
    if let Some(seconds) = fragment.affinity {
        text.push_str(&format!("; a client stays with one for {seconds} s"));
    }
    if let Some(filter) = &frontend.sources {
        let ranges: Vec<_> = filter.ranges.iter().map(ToString::to_string).collect();
        text.push_str(&format!("; only from {}", ranges.join(", ")));
    }
    text
}

/// Who asks: what it is called, its namespace, its origin, its address.
type Asker = (String, String, Origin, IpAddr);

/// Clients from outside: for a frontend with a source filter one that may pass and one that may not.
fn outside(stage: &Stage, frontend: &Frontend, family: Family) -> Vec<Asker> {
    if frontend.kind == FrontendKind::ClusterIp {
        // Cluster IPs are not announced to the outside world.
        return Vec::new();
    }
    let clients = stage.layout.clients.iter().filter(|client| client.origin == Origin::External);
    let addrs = clients.flat_map(|client| &client.addrs).copied().filter(|ip| family.has(ip));
    let admits = |ip: &IpAddr| frontend.sources.as_ref().is_none_or(|filter| filter.admits(*ip));
    let (may, may_not): (Vec<_>, Vec<_>) = addrs.partition(admits);
    let first = |name: &str, addrs: Vec<IpAddr>| {
        Some((name.to_owned(), OUTSIDE.to_owned(), Origin::External, *addrs.first()?))
    };
    first(OUTSIDE, may).into_iter().chain(first("stranger", may_not)).collect()
}

/// A local endpoint that asks its own Service, and may get itself; of plain Services only, to keep the table
/// short.
fn itself(stage: &Stage, fragment: &Fragment) -> Option<Asker> {
    let plain = fragment.frontends.len() == 1 && fragment.affinity.is_none();
    let local = fragment.cluster.iter().find(|member| member.local)?.addr.ip();
    let name = stage.layout.labels.get(&local)?;
    // A namespace of several endpoints asks from one of their addresses.
    let alone = stage.layout.homes.get(&local) == Some(name);
    (plain && alone && fragment.cluster.len() > 1)
        .then(|| (name.clone(), name.clone(), Origin::Pod, local))
}

impl Case {
    fn spec(&self) -> ProbeSpec {
        let spec = ProbeSpec::new(wire(self.protocol), self.dst);
        if self.origin == Origin::External { spec.from_ip(self.source) } else { spec }
    }

    /// Asks one after the other, so that times mean something and affinity has no race to lose.
    pub(crate) async fn ask(&self, connections: usize) -> Seen {
        let mut seen = Seen::default();
        let first = probe_many(&self.ns, &self.spec(), &Many::new(1)).await;
        let Expected::Forwarded { to, sticky, .. } = &self.expected else {
            let rest = Many::new(FEW - 1).parallel(FEW);
            seen.add(&first);
            seen.add(&probe_many(&self.ns, &self.spec(), &rest).await);
            return seen;
        };
        if first.answers() == 0 || first.count(UNTOUCHED) > 0 {
            seen.add(&first);
            return seen;
        }
        let many =
            Many::new(connections.saturating_sub(1)).parallel(1).within(Duration::from_secs(3));
        let tally = probe_many(&self.ns, &self.spec(), &many).await;
        seen.add(&tally);
        seen.add(&first);
        let missing: Vec<_> = to.iter().filter(|it| !seen.answered.contains_key(*it)).collect();
        if !missing.is_empty() && !sticky && seen.verdict() == Happened::Forwarded {
            let many = Many::new(MORE).until_seen(missing.into_iter().cloned()).parallel(4);
            seen.add(
                &probe_many(&self.ns, &self.spec(), &many.within(Duration::from_secs(3))).await,
            );
        }
        seen
    }

    /// What happened is what was planned.
    pub(crate) fn is(&self, seen: &Seen, stage: &Stage) -> bool {
        self.expected.is(seen, (self.origin, self.source), |ip| stage.is_nodes(ip))
    }

    /// Which source the endpoints saw, in words.
    pub(crate) fn source_seen(&self, seen: &Seen) -> String {
        seen.source(&self.from, self.origin, self.source)
    }
}

//! Looking at a flow with packets.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, SocketAddrV6},
    time::Duration,
};

use super::{
    super::{Origin, flow::Flow},
    layout::{Layout, is_link_local},
    rig::transport,
};
use crate::{
    cases::FlowVerdict,
    lab::{LabError, Ns},
    traffic::{How, Many, ProbeSpec, Tally, probe_many},
};

/// Who answers where no Service does.
pub(super) const UNTOUCHED: &str = "untouched";

/// How long to wait for an answer that is expected; TCP tries twice in that time.
const PATIENCE: Duration = Duration::from_millis(2500);
/// How long to wait for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(500);

/// Opens enough connections to know what becomes of a flow, or so many.
pub(super) async fn look(
    client: &Ns,
    node: &Ns,
    flow: &Flow,
    layout: &Layout,
    count: Option<usize>,
) -> Result<FlowVerdict, LabError> {
    let guard = match flow.expected {
        FlowVerdict::Accept => Some(Guard::set(node, flow)?),
        FlowVerdict::Dnat(_)
        | FlowVerdict::Drop
        | FlowVerdict::Other(_)
        | FlowVerdict::Reject
        | FlowVerdict::Untouched => None,
    };
    let (wanted, timeout) = match &flow.expected {
        FlowVerdict::Dnat(to) => (enough(to.len()), PATIENCE),
        FlowVerdict::Drop => (3, SILENCE),
        FlowVerdict::Accept
        | FlowVerdict::Other(_)
        | FlowVerdict::Reject
        | FlowVerdict::Untouched => (4, PATIENCE),
    };
    let destination = flow.packet.destination;
    let spec = ProbeSpec::new(transport(flow.packet.protocol), scoped(node, flow, layout)?)
        .from_ip(flow.packet.source)
        .within(timeout);
    let is_remote = is_link_local(destination.ip()) && flow.source.origin != Origin::Host;
    let spec = if is_remote { spec.through("eth0") } else { spec };
    let tally =
        probe_many(client, &spec, &Many::new(count.unwrap_or(wanted)).within(PATIENCE)).await;
    let seen = verdict(&tally, destination);
    if let Some(guard) = guard {
        guard.lift(node)?;
        if seen == FlowVerdict::Untouched {
            return Ok(FlowVerdict::Accept);
        }
    }
    Ok(seen)
}

/// The destination, with the scope that the node itself needs for a link-local one.
fn scoped(node: &Ns, flow: &Flow, layout: &Layout) -> Result<SocketAddr, LabError> {
    let SocketAddr::V6(at) = flow.packet.destination else { return Ok(flow.packet.destination) };
    let link = layout.link_of(flow.packet.destination.ip());
    let Some(link) = link.filter(|_| is_link_local((*at.ip()).into())) else {
        return Ok(at.into());
    };
    let index = node.run(|| nix::net::if_::if_nametoindex(link.as_str()))?.unwrap_or_default();
    Ok(SocketAddrV6::new(*at.ip(), at.port(), 0, index).into())
}

/// So many random choices among `n` that each is made once, but for one time in some millions.
pub(super) fn enough(n: usize) -> usize {
    // n (ln n + 16), with log2 for ln: more is enough, too.
    let log2 = usize::try_from(n.max(1).ilog2()).unwrap_or_default();
    n.max(1) * (log2 + 16)
}

fn verdict(tally: &Tally, destination: SocketAddr) -> FlowVerdict {
    let other = || FlowVerdict::Other(tally.to_string());
    let answers = tally.answers();
    if tally.total() == 0 || !tally.failed.is_empty() || tally.mute > 0 {
        return other();
    }
    if tally.silent == tally.total() {
        return FlowVerdict::Drop;
    }
    if tally.rejects() == tally.total() {
        let is_ours = |how: How| matches!(how, How::IcmpPortUnreachable | How::Rst);
        let all_ours = tally.rejected.keys().all(|rejection| is_ours(rejection.how));
        return if all_ours { FlowVerdict::Reject } else { other() };
    }
    if answers != tally.total() {
        return other();
    }
    let mut to = BTreeMap::new();
    for endpoint in tally.answered.values() {
        let snat = match (endpoint.source_kept, endpoint.source_changed) {
            (_, 0) => Some(false),
            // A masquerade to the very address may hit on the very port, now and then.
            (kept, changed) if kept * 8 < changed => Some(true),
            // A source that is kept gets another port when its own is taken, now and then.
            (kept, changed) if changed * 8 < kept => Some(false),
            _ => return other(),
        };
        to.extend(endpoint.reached_at.iter().map(|at| (unscoped(*at), snat)));
    }
    if to.len() == 1 && to.get(&destination) == Some(&Some(false)) {
        return FlowVerdict::Untouched;
    }
    if to.contains_key(&destination) {
        return other();
    }
    FlowVerdict::Dnat(to)
}

fn unscoped(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip(), at.port())
}

/// A rule behind all others that drops the packet: what arrives all the same was let in.
struct Guard {
    family: &'static str,
    handle: Option<String>,
}

impl Guard {
    fn set(node: &Ns, flow: &Flow) -> Result<Self, LabError> {
        let family = if flow.packet.destination.is_ipv4() { "ip" } else { "ip6" };
        let port = flow.packet.destination.port().to_string();
        let protocol = flow.packet.protocol.lower();
        let words =
            ["-a", "-e", "add", "rule", family, "filter", "INPUT", protocol, "dport", &port];
        let said = node.command("nft", words.into_iter().chain(["drop"]))?;
        let handle = said.split_whitespace().skip_while(|word| *word != "handle").nth(1);
        Ok(Self { family, handle: handle.map(str::to_owned) })
    }

    fn lift(self, node: &Ns) -> Result<(), LabError> {
        let Some(handle) = self.handle else { return Ok(()) };
        let words = ["delete", "rule", self.family, "filter", "INPUT", "handle", &handle];
        node.command("nft", words).map(drop)
    }
}

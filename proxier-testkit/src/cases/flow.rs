//! Kind `flow`: what becomes of a packet.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use proxier_core::{
    Mode, Protocol,
    sim::{Outcome, Packet, Sim, Trace, Traits},
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Case, CaseError, CaseFile, CaseWorld, Deviation, Kernel, Origin, Subject, Verdict,
    affinity::{History, remember},
    deviations::{IPVS_VERDICTS, LOCALHOST, hairpin_deviation},
    world::ip,
};

/// A source of packets.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SourceSpec {
    /// How its packets come to the node.
    pub origin: Origin,
    /// Its address.
    pub ip: String,
    /// The interface its packets come in on.
    #[serde(default)]
    pub iface: Option<String>,
}

/// The sources that a file names.
pub type Sources = BTreeMap<String, SourceSpec>;

/// What became of a packet, or what shall.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum FlowVerdict {
    /// It was let in explicitly.
    Accept,
    /// It goes to one of these; masqueraded, not masqueraded, or nobody says.
    Dnat(BTreeMap<SocketAddr, Option<bool>>),
    /// Nothing.
    Drop,
    /// Something else, in words.
    Other(String),
    /// Somebody said no.
    Reject,
    /// It went its way.
    Untouched,
}

impl FlowVerdict {
    /// Says whether `seen` is what this verdict allows: the same, where this one says anything.
    pub fn allows(&self, seen: &Self) -> bool {
        match (self, seen) {
            (Self::Dnat(wanted), Self::Dnat(seen)) => {
                wanted.keys().eq(seen.keys())
                    && wanted.values().zip(seen.values()).all(|(a, b)| a.is_none() || a == b)
            }
            _ => self == seen,
        }
    }
}

impl From<&Outcome> for FlowVerdict {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Accept => Self::Accept,
            Outcome::Drop => Self::Drop,
            Outcome::Forward { to } => {
                Self::Dnat(to.iter().map(|it| (it.addr, Some(it.source.is_masquerade()))).collect())
            }
            Outcome::Reject => Self::Reject,
            Outcome::Untouched => Self::Untouched,
        }
    }
}

impl fmt::Display for FlowVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Dnat(to) => {
                f.write_str("dnat to")?;
                to.iter().try_for_each(|(addr, snat)| {
                    let snat = match snat {
                        Some(true) => " masqueraded",
                        Some(false) => " source kept",
                        None => "",
                    };
                    write!(f, " {addr}{snat}")
                })
            }
            Self::Drop => f.write_str("drop"),
            Self::Other(what) => f.write_str(what),
            Self::Reject => f.write_str("reject"),
            Self::Untouched => f.write_str("untouched"),
        }
    }
}

/// A packet of a case.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) source: SourceSpec,
    pub(super) packet: Packet,
    pub(super) expected: FlowVerdict,
    /// Why `expected` is not what the case says: this project does better.
    pub(super) deviation: Option<&'static Deviation>,
}

/// What a case says of a mode, or why it says nothing.
pub(super) enum Applies {
    No(String),
    Yes(Box<Flow>),
}

pub(super) fn flow_of(file: &CaseFile, case: &Case, mode: Mode) -> Result<Applies, CaseError> {
    let by = case.get("by").get(mode.name());
    let also: Vec<String> = case.read_or("also", Vec::new())?;
    let holds = match mode {
        Mode::Iptables | Mode::Nftables => true,
        Mode::Ipvs | Mode::Userspace => also.iter().any(|it| it == mode.name()),
    };
    let expected = match by {
        Some(by) => by,
        None if holds => case.get("expect"),
        None => return Ok(Applies::No(format!("says nothing about {mode}"))),
    };
    let expected = expectation(expected).map_err(|error| case.wrong("expect", error))?;
    let source = source(file, case, case.get("src"), "src")?;
    let packet =
        packet(&source, &case.read::<String>("dst")?).map_err(|error| case.wrong("dst", error))?;
    let mut flow = Flow { source, packet, expected, deviation: None };
    if mode == Mode::Nftables && is_localhost(flow.packet.destination.ip()) {
        // Node ports on localhost work as they do in iptables mode.
        let by = case.get("by").get(Mode::Iptables.name());
        let like = by.unwrap_or_else(|| case.get("expect"));
        let better = expectation(like).map_err(|error| case.wrong("expect", error))?;
        if matches!(better, FlowVerdict::Dnat(_)) && better != flow.expected {
            flow.deviation = Some(&LOCALHOST);
            flow.expected = better;
        }
    }
    if mode == Mode::Ipvs && by.is_some() {
        // Verdicts by origin, where kube-proxy has one set of destinations for all.
        let nftables = case.get("by").get(Mode::Nftables.name());
        let like = nftables.unwrap_or_else(|| case.get("expect"));
        let better = expectation(like).map_err(|error| case.wrong("expect", error))?;
        let differs = match (&flow.expected, &better) {
            (FlowVerdict::Accept | FlowVerdict::Dnat(_), _)
            | (FlowVerdict::Reject, FlowVerdict::Drop) => flow.expected != better,
            _ => is_link_local(flow.packet.destination.ip()) && flow.expected != better,
        };
        if differs {
            flow.deviation = Some(&IPVS_VERDICTS);
            flow.expected = better;
        }
    }
    Ok(Applies::Yes(Box::new(flow)))
}

const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

const fn is_localhost(ip: IpAddr) -> bool {
    ip.is_ipv4() && ip.is_loopback()
}

pub(super) fn run_flow(
    file: &CaseFile,
    case: &Case,
    mode: Mode,
    subject: Option<&dyn Subject>,
    kernel: &mut Kernel<'_>,
) -> Result<Verdict, CaseError> {
    let flow = match flow_of(file, case, mode)? {
        Applies::No(reason) => return Ok(Verdict::not_applicable(reason)),
        Applies::Yes(flow) => flow,
    };
    if let Kernel::Real(real) = kernel {
        return Ok(real.flow(file, case, &flow));
    }
    let history: Vec<History> = case.read_or("hist", Vec::new())?;
    let world = CaseWorld::of(file, case)?;
    let wrong = |error: String| case.wrong("world", error);
    let (store, update) = world.store().map_err(wrong)?;
    let node = store.env().view();
    let traits = Traits::of(mode);
    let sim = Sim::new(&node, &traits, &store);
    let memory = remember(file, case, &sim, &history)?;
    let (seen, detail) = match (kernel, subject) {
        (Kernel::Model | Kernel::Real(_), _) => {
            let trace = sim.trace(&flow.packet, &memory);
            let reasons = trace.reasons.iter().map(ToString::to_string).collect::<Vec<_>>();
            (FlowVerdict::from(&trace.outcome), reasons.join("; "))
        }
        (Kernel::Fake, None) => {
            return Ok(Verdict::not_applicable(format!("{mode} is not part of this build")));
        }
        (Kernel::Fake, Some(subject)) => {
            let Some(mut fake) = subject.fake() else {
                return Ok(Verdict::not_applicable(format!("{mode} has no fake kernel")));
            };
            match fake.program(update) {
                Ok(()) => {
                    let seen = fake.judge(&node, &flow.packet, &memory);
                    (seen, fake.listing())
                }
                Err(error) => (FlowVerdict::Other(error), String::new()),
            }
        }
    };
    Ok(judged(&flow, &seen, || detail))
}

/// What the packet model says of a flow, whatever the case expects; `None` when the case has none
/// that can be understood.
pub fn trace(file: &CaseFile, case: &Case, mode: Mode) -> Option<Trace> {
    let world = CaseWorld::of(file, case).ok()?;
    let (store, _) = world.store().ok()?;
    let source = source(file, case, case.get("src"), "src").ok()?;
    let packet = packet(&source, case.get("dst").as_str()?).ok()?;
    let (node, traits) = (store.env().view(), Traits::of(mode));
    Some(Sim::new(&node, &traits, &store).trace(&packet, &[]))
}

/// Compares what is expected of a flow with what was seen.
pub(super) fn judged(flow: &Flow, seen: &FlowVerdict, detail: impl FnOnce() -> String) -> Verdict {
    if flow.expected.allows(seen) {
        return Verdict::Passed { deviation: flow.deviation };
    }
    let deviation = hairpin_deviation(&flow.expected, seen, flow.packet.source);
    deviation.unwrap_or_else(|| Verdict::Failed {
        expected: flow.expected.to_string(),
        actual: seen.to_string(),
        detail: detail(),
    })
}

/// A source by name, or one that is described in place.
pub(super) fn source(
    file: &CaseFile,
    case: &Case,
    value: &Value,
    part: &str,
) -> Result<SourceSpec, CaseError> {
    let named = |name: &str| {
        let found = file.sources.get(name);
        found.ok_or_else(|| case.wrong(part, format!("no source {name:?}")))
    };
    let value = value.as_str().map_or(Ok(value), named)?;
    SourceSpec::deserialize(value).map_err(|error| case.wrong(part, error))
}

pub(super) fn packet(source: &SourceSpec, destination: &str) -> Result<Packet, String> {
    let (address, protocol) = destination
        .rsplit_once('/')
        .ok_or_else(|| format!("{destination:?} is not address:port/protocol"))?;
    let destination: SocketAddr =
        address.parse().map_err(|error| format!("{address:?}: {error}"))?;
    let protocol: Protocol =
        protocol.to_ascii_uppercase().parse().map_err(|error| format!("{error}"))?;
    let input = match source.origin {
        Origin::Host => None,
        Origin::Pod | Origin::Wire => Some(Arc::from(source.iface.as_deref().unwrap_or_default())),
    };
    let source: IpAddr = ip(&source.ip)?;
    Ok(Packet { source, input, destination, protocol })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expectation {
    verdict: String,
    #[serde(default)]
    to: BTreeSet<SocketAddr>,
    #[serde(default)]
    snat: Value,
}

fn expectation(value: &Value) -> Result<FlowVerdict, String> {
    let Expectation { verdict, to, snat } =
        Expectation::deserialize(value).map_err(|error| error.to_string())?;
    let snat_of = |addr: &SocketAddr| match &snat {
        Value::Bool(all) => Some(*all),
        Value::Object(each) => {
            let known = each.iter().find(|(text, _)| text.parse() == Ok(*addr));
            known.and_then(|(_, snat)| snat.as_bool())
        }
        Value::Array(_) | Value::Null | Value::Number(_) | Value::String(_) => None,
    };
    Ok(match verdict.as_str() {
        "accept" => FlowVerdict::Accept,
        "dnat" => FlowVerdict::Dnat(to.iter().map(|addr| (*addr, snat_of(addr))).collect()),
        "drop" => FlowVerdict::Drop,
        "none" => FlowVerdict::Untouched,
        "reject" => FlowVerdict::Reject,
        other => return Err(format!("unknown verdict {other:?}")),
    })
}

//! Where this project deliberately does better than kube-proxy: the list that `docs/deviations.md`
//! explains and that the runner knows.

use std::{collections::BTreeSet, net::IpAddr};

use proxier_core::Protocol;
use serde_json::Value;

use super::{
    Case, FlowVerdict, Verdict,
    conntrack::{Entry, Situation},
};

/// One deliberate deviation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Deviation {
    /// Short name, the heading in `docs/deviations.md`.
    pub id: &'static str,
    /// What is different, in a few words.
    pub title: &'static str,
    /// Kinds of cases that may show it; empty when no case can.
    pub kinds: &'static [&'static str],
}

const CONNTRACK_SERVICE: Deviation = Deviation {
    id: "conntrack-service-change",
    title: "stale UDP flows go when the Service changes, not only when its endpoints do",
    kinds: &["conntrack"],
};
const CONNTRACK_LAST: Deviation = Deviation {
    id: "conntrack-last-endpoint",
    title: "stale UDP flows go when the last endpoint goes",
    kinds: &["conntrack"],
};
const CONNTRACK_NODE: Deviation = Deviation {
    id: "conntrack-node-addresses",
    title: "flows to a node port's number count only on addresses of the node",
    kinds: &["conntrack"],
};

const HAIRPIN: Deviation = Deviation {
    id: "hairpin-anywhere",
    title: "whoever reaches itself is masqueraded, whether the endpoint names this node or not",
    kinds: &["flow"],
};

pub(super) const LOCALHOST: Deviation = Deviation {
    id: "localhost-node-ports",
    title: "node ports answer on 127.0.0.0/8 in nftables mode too",
    kinds: &["flow"],
};

pub(super) const IPVS_VERDICTS: Deviation = Deviation {
    id: "ipvs-verdicts",
    title: "traffic policies mean the same in IPVS mode as in the others",
    kinds: &["flow"],
};

/// All of them.
pub const DEVIATIONS: [Deviation; 11] = [
    HAIRPIN,
    LOCALHOST,
    IPVS_VERDICTS,
    CONNTRACK_SERVICE,
    CONNTRACK_LAST,
    CONNTRACK_NODE,
    Deviation {
        id: "duplicate-endpoints",
        title: "of two running duplicates the ready one wins, then the first slice's",
        kinds: &["merge"],
    },
    Deviation {
        id: "conflicting-frontends",
        title: "of two Services that want one frontend the older has it, and the conflict is reported",
        kinds: &["flow"],
    },
    Deviation {
        id: "slice-content",
        title: "an edit of a slice that changes nothing a proxier reads is no change",
        kinds: &["change"],
    },
    Deviation {
        id: "first-sync-failure",
        title: "a failed first sync is tried again like any other",
        kinds: &["sync"],
    },
    Deviation {
        id: "adaptive-pause",
        title: "the pause between syncs follows their duration instead of being one second",
        kinds: &["sync"],
    },
];

/// Says whether two verdicts differ only in that a source which reaches itself is masqueraded.
pub(super) fn hairpin_deviation(
    expected: &FlowVerdict,
    seen: &FlowVerdict,
    source: IpAddr,
) -> Option<Verdict> {
    let (FlowVerdict::Dnat(wanted), FlowVerdict::Dnat(got)) = (expected, seen) else { return None };
    let mut with_hairpin = wanted.clone();
    for (_, snat) in with_hairpin.iter_mut().filter(|(addr, _)| addr.ip() == source) {
        *snat = Some(true);
    }
    let explained = FlowVerdict::Dnat(with_hairpin).allows(&FlowVerdict::Dnat(got.clone()));
    explained.then_some(Verdict::Passed { deviation: Some(&HAIRPIN) })
}

/// Says whether everything that came out otherwise is one of the deviations about connection
/// tracking.
pub(super) fn conntrack_deviation(
    case: &Case,
    situation: &Situation,
    actual: &Value,
) -> Option<Verdict> {
    let expected = case.get("expect");
    let numbers = |value: &Value| -> BTreeSet<u64> {
        let list = value.get("deleted").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_u64).collect()
    };
    let (wanted, got) = (numbers(expected), numbers(actual));
    let is_udp = |it: &super::conntrack::ChangeSpec| it.proto == Protocol::Udp;
    let service_only =
        situation.changes.iter().filter(|it| is_udp(it)).all(|it| it.object.starts_with("service"));
    let runs = |value: &Value| value.get("runs").and_then(Value::as_bool);
    let mut found = None;
    if runs(expected) != runs(actual) {
        if !(service_only && situation.changes.iter().any(is_udp)) {
            return None;
        }
        found = Some(&CONNTRACK_SERVICE);
    }
    for entry in &situation.entries {
        let deviation = match (wanted.contains(&entry.num), got.contains(&entry.num)) {
            (true, true) | (false, false) => continue,
            (true, false) if !situation.is_node(entry) && is_node_port(situation, entry) => {
                &CONNTRACK_NODE
            }
            (false, true) if service_only => &CONNTRACK_SERVICE,
            (false, true) if nothing_serves(situation, entry) => &CONNTRACK_LAST,
            (true, false) | (false, true) => return None,
        };
        found = Some(deviation);
    }
    found.map(|deviation| Verdict::Passed { deviation: Some(deviation) })
}

fn is_node_port(situation: &Situation, entry: &Entry) -> bool {
    situation.services.iter().any(|it| it.node_port == entry.dst.port())
}

fn nothing_serves(situation: &Situation, entry: &Entry) -> bool {
    let udp = situation.services.iter().filter(|it| it.proto == Protocol::Udp);
    let ours = udp.filter(|it| it.goes_to(entry));
    ours.map(|it| it.endpoints.values().any(|serves| *serves)).all(|serves| !serves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_explains_exactly_these() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/deviations.md");
        let text = std::fs::read_to_string(path).unwrap();
        let headings: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        let ids: Vec<_> = DEVIATIONS.iter().map(|it| it.id).collect();
        assert_eq!(headings, ids);
        for deviation in DEVIATIONS {
            assert!(text.contains(deviation.title), "{}", deviation.title);
        }
    }
}

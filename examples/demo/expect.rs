//! What must happen to a packet, from the plan; what did happen; and whether that is the same. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    time::Duration,
};

use proxier::{
    Mode,
    ir::{Fragment, Frontend, FrontendKind, Origin, Snat, Verdict},
};
use proxier_testkit::traffic::{How, Tally};
use serde::Serialize;

use crate::{screen::DOT, stage::UNTOUCHED};

/// What the plan says about a client and a frontend.
#[derive(Clone, Debug)]
pub(crate) enum Expected {
    /// Silence, or what the mode does instead.
    Dropped { or: Option<Happened> },
    /// One of these answers, always the same one if `sticky`.
    /// What `itself` sends to itself is masqueraded in any case.
    Forwarded { to: BTreeSet<String>, snat: Snat, sticky: bool, itself: Option<String> },
    /// A refusal, or what the mode does instead.
    Rejected { or: Option<Happened> },
}

impl Expected {
    /// What the fragment's verdict table says; an endpoint without a label is an error.
    pub(crate) fn of(
        (fragment, frontend): (&Fragment, &Frontend),
        (origin, source): (Origin, IpAddr),
        labels: &BTreeMap<IpAddr, String>,
        mode: Mode,
    ) -> Result<Self, IpAddr> {
        let verdict = frontend.verdicts.of(origin);
        // kube-proxy refuses external addresses without endpoints before it looks at source ranges, and its
        // iptables mode does so only in chains that the node's own packets do not pass.
        let unguarded = mode == Mode::Iptables && origin == Origin::Node;
        let external = frontend.kind != FrontendKind::ClusterIp;
        let refusal = if unguarded && external { Happened::Untouched } else { Happened::Rejected };
        if frontend.sources.as_ref().is_some_and(|filter| !filter.admits(source)) {
            return Ok(Self::Dropped { or: (verdict == Verdict::Reject).then_some(refusal) });
        }
        match verdict {
            Verdict::Drop => Ok(Self::Dropped { or: None }),
            Verdict::Forward { pool, snat } => {
                let members = fragment.pool(pool).iter().map(|member| member.addr.ip());
                let label = |ip| labels.get(&ip).cloned().ok_or(ip);
                let to = members.map(label).collect::<Result<_, _>>()?;
                let itself = labels.get(&source).cloned();
                Ok(Self::Forwarded { to, snat, sticky: fragment.affinity.is_some(), itself })
            }
            Verdict::Reject => Ok(Self::Rejected { or: Some(refusal) }),
        }
    }

    /// Why another outcome than the plan's is right, if that is what happened.
    pub(crate) fn exception(&self, seen: &Seen) -> Option<&'static str> {
        let (Self::Dropped { or: Some(or) } | Self::Rejected { or: Some(or) }) = self else {
            return None;
        };
        let plain = matches!((self, or), (Self::Rejected { .. }, Happened::Rejected));
        let refused_first =
            "as in kube-proxy, the refusal comes before the source ranges are looked at";
        let own =
            "as in kube-proxy's iptables mode, refusals do not concern what the node itself sends";
        (!plain && seen.verdict() == *or).then_some(if *or == Happened::Untouched {
            own
        } else {
            refused_first
        })
    }

    /// Says whether it happened to a client. `node` tells the node's own addresses.
    ///
    /// Ports do not count: where two connections of a client would look the same to an endpoint, the
    /// kernel gives one of them another port, whoever keeps its address.
    pub(crate) fn is(
        &self,
        seen: &Seen,
        (origin, client): (Origin, IpAddr),
        node: impl Fn(IpAddr) -> bool,
    ) -> bool {
        match (self, seen.verdict()) {
            (Self::Forwarded { to, snat, sticky, itself }, Happened::Forwarded) => {
                let names: BTreeSet<_> = seen.answered.keys().cloned().collect();
                let right =
                    if *sticky { names.len() == 1 && names.is_subset(to) } else { names == *to };
                let source = |(name, answered): (&String, &Answered)| {
                    let snat = if itself.as_ref() == Some(name) { Snat::Masquerade } else { *snat };
                    let mut sources = answered.sources.iter().copied();
                    match (snat, origin) {
                        (Snat::Preserve, Origin::External | Origin::Pod) => {
                            sources.all(|ip| ip == client)
                        }
                        // The node asks from one of the addresses that masquerading would give it.
                        (Snat::Preserve, Origin::Node) | (Snat::Masquerade, _) => {
                            sources.all(&node)
                        }
                    }
                };
                right && seen.answered.iter().all(source)
            }
            (Self::Dropped { .. }, Happened::Dropped)
            | (Self::Rejected { .. }, Happened::Rejected) => true,
            (Self::Dropped { or } | Self::Rejected { or }, happened) => *or == Some(happened),
            _ => false,
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropped { .. } => f.write_str("dropped"),
            Self::Forwarded { to, snat, sticky, itself } => {
                let names: Vec<_> = to.iter().map(String::as_str).collect();
                let one = if *sticky { "always the same one of " } else { "" };
                let source = match snat {
                    Snat::Masquerade => "masqueraded",
                    Snat::Preserve => "source kept",
                };
                write!(f, "forwarded to {one}{}, {source}", names.join(", "))?;
                itself.as_ref().map_or(Ok(()), |_| f.write_str(" unless it is its own"))
            }
            Self::Rejected { .. } => f.write_str("rejected"),
        }
    }
}

/// What happened to the connections of one client to one frontend.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Answers by endpoint.
    pub(crate) answered: BTreeMap<String, Answered>,
    /// Time to connect, the median.
    pub(crate) p50: Option<Duration>,
    rejected: u64,
    silent: u64,
    untouched: u64,
    failed: BTreeMap<String, u64>,
}

/// The answers of one endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answered {
    pub(crate) count: u64,
    /// Those that saw another address, or another port, than the one that asked.
    pub(crate) changed: u64,
    /// Source addresses that it saw.
    pub(crate) sources: BTreeSet<IpAddr>,
}

/// What happened, in one word.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Happened {
    Dropped,
    /// Something that is no answer and no refusal.
    Failed,
    Forwarded,
    /// Several of the others.
    Mixed,
    Rejected,
    Untouched,
}

impl Seen {
    /// Adds what became of some connections.
    pub(crate) fn add(&mut self, tally: &Tally) {
        for (name, answers) in &tally.answered {
            if name == UNTOUCHED {
                self.untouched += answers.count;
                continue;
            }
            let answered = self.answered.entry(name.clone()).or_default();
            answered.count += answers.count;
            answered.changed += answers.source_changed;
            answered.sources.extend(&answers.seen);
        }
        for (rejection, count) in &tally.rejected {
            // No route and the like: the network's answer to an address that nobody redirects.
            let by_network = matches!(rejection.how, How::IcmpOther { .. });
            *(if by_network { &mut self.untouched } else { &mut self.rejected }) += count;
        }
        for (failure, count) in &tally.failed {
            *self.failed.entry(failure.to_string()).or_default() += count;
        }
        if tally.mute > 0 {
            *self.failed.entry("connected, but no answer".to_owned()).or_default() += tally.mute;
        }
        self.silent += tally.silent;
        // Of the largest sample: the first ones in a row.
        self.p50 = self.p50.or_else(|| tally.connect.percentile(50));
    }

    /// What happened, in one word.
    pub(crate) fn verdict(&self) -> Happened {
        let counts = [
            (Happened::Dropped, self.silent),
            (Happened::Failed, self.failed.values().sum()),
            (Happened::Forwarded, self.answers_total()),
            (Happened::Rejected, self.rejected),
            (Happened::Untouched, self.untouched),
        ];
        let mut happened = counts.into_iter().filter(|(_, count)| *count > 0);
        match (happened.next(), happened.next()) {
            (Some((one, _)), None) => one,
            (None, _) => Happened::Failed,
            (Some(_), Some(_)) => Happened::Mixed,
        }
    }

    /// All connections.
    pub(crate) fn count(&self) -> u64 {
        let failed: u64 = self.failed.values().sum();
        self.answers_total() + failed + self.rejected + self.silent + self.untouched
    }

    /// How often each endpoint answered.
    pub(crate) fn counts(&self) -> BTreeMap<&str, u64> {
        self.answered.iter().map(|(name, answered)| (name.as_str(), answered.count)).collect()
    }

    /// Who answered how often, or what happened how often when that is not one thing only.
    pub(crate) fn answers(&self) -> String {
        let mut parts: Vec<_> =
            self.counts().iter().map(|(name, count)| format!("{name} {count}")).collect();
        if self.verdict() == Happened::Mixed {
            let others = [
                ("rejected", self.rejected),
                ("dropped", self.silent),
                ("untouched", self.untouched),
            ];
            let others = others.into_iter().filter(|(_, count)| *count > 0);
            parts.extend(others.map(|(what, count)| format!("{what} {count}")));
        }
        parts.extend(self.failed.iter().map(|(what, count)| format!("{what} {count}")));
        parts.join(DOT)
    }

    /// Which source the endpoints saw of a client. For one that is an endpoint, what it saw itself comes
    /// last.
    pub(crate) fn source(&self, name: &str, origin: Origin, client: IpAddr) -> String {
        let (own, others): (Vec<_>, Vec<_>) =
            self.answered.iter().partition(|(answering, _)| *answering == name);
        let of = |all: Vec<(&String, &Answered)>| {
            let all: Vec<_> = all.into_iter().map(|(_, answered)| answered).collect();
            (!all.is_empty()).then(|| source_of(&all, origin, client))
        };
        let own = of(own).map(|text| format!("itself {}", text.trim_start_matches("masqueraded ")));
        of(others).into_iter().chain(own).collect::<Vec<_>>().join(DOT)
    }

    fn answers_total(&self) -> u64 {
        self.answered.values().map(|answered| answered.count).sum()
    }
}

fn source_of(all: &[&Answered], origin: Origin, client: IpAddr) -> String {
    let seen: BTreeSet<_> = all.iter().flat_map(|answered| &answered.sources).collect();
    // Masquerading may give the node the very address it had; then at least some ports differ.
    let changed = origin == Origin::Node && all.iter().any(|answered| answered.changed > 0);
    let both = seen.len() > 1 && seen.contains(&client) && origin != Origin::Node;
    let mut seen = seen.into_iter();
    match (seen.next(), seen.next()) {
        (Some(_), Some(_)) if both => "masqueraded and kept".to_owned(),
        (Some(one), None) if *one == client && !changed => "kept".to_owned(),
        (Some(one), None) => format!("masqueraded as {one}"),
        (Some(_), Some(_)) => "masqueraded as the node".to_owned(),
        (None, _) => String::new(),
    }
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Dropped => "dropped",
            Self::Failed => "failed",
            Self::Forwarded => "forwarded",
            Self::Mixed => "mixed",
            Self::Rejected => "rejected",
            Self::Untouched => "untouched",
        })
    }
}

#[cfg(test)]
mod tests {
    use proxier_testkit::traffic::EndpointTally;

    use super::*;

    const CLIENT: &str = "10.1.0.9";
    const NODE: &str = "10.1.0.1";

    /// Answers of some endpoints that saw a source.
    fn seen(answers: &[(&str, &str)]) -> Seen {
        let mut tally = Tally::default();
        for (name, source) in answers {
            let mut endpoint = EndpointTally::default();
            endpoint.count = 1;
            endpoint.seen.insert(source.parse().unwrap());
            tally.answered.insert((*name).to_owned(), endpoint);
        }
        let mut seen = Seen::default();
        seen.add(&tally);
        seen
    }

    fn forwarded(snat: Snat, sticky: bool, itself: Option<&str>) -> Expected {
        let to = ["web-a", "web-b"].map(str::to_owned).into();
        Expected::Forwarded { to, snat, sticky, itself: itself.map(str::to_owned) }
    }

    fn is(expected: &Expected, answers: &[(&str, &str)]) -> bool {
        expected
            .is(&seen(answers), (Origin::Pod, CLIENT.parse().unwrap()), |ip| ip.to_string() == NODE)
    }

    #[test]
    fn every_endpoint_answers_and_no_other() {
        let plain = forwarded(Snat::Preserve, false, None);
        assert!(is(&plain, &[("web-a", CLIENT), ("web-b", CLIENT)]));
        assert!(!is(&plain, &[("web-a", CLIENT)]));
        assert!(!is(&plain, &[("web-a", CLIENT), ("web-b", CLIENT), ("web-c", CLIENT)]));
        assert!(!is(&plain, &[]));
        let untouched = seen(&[(UNTOUCHED, CLIENT)]);
        assert_eq!(untouched.verdict(), Happened::Untouched);
    }

    #[test]
    fn a_client_with_affinity_gets_one_endpoint() {
        let sticky = forwarded(Snat::Preserve, true, None);
        assert!(is(&sticky, &[("web-b", CLIENT)]));
        assert!(!is(&sticky, &[("web-a", CLIENT), ("web-b", CLIENT)]));
        assert!(!is(&sticky, &[("web-c", CLIENT)]));
    }

    #[test]
    fn the_source_is_what_the_plan_says() {
        let kept = forwarded(Snat::Preserve, true, None);
        let masqueraded = forwarded(Snat::Masquerade, true, None);
        assert!(!is(&kept, &[("web-a", NODE)]));
        assert!(is(&masqueraded, &[("web-a", NODE)]));
        assert!(!is(&masqueraded, &[("web-a", CLIENT)]));
        assert!(!is(&masqueraded, &[("web-a", "10.1.0.77")]));
        let hairpin = forwarded(Snat::Preserve, false, Some("web-a"));
        assert!(is(&hairpin, &[("web-a", NODE), ("web-b", CLIENT)]));
        assert!(!is(&hairpin, &[("web-a", CLIENT), ("web-b", CLIENT)]));
    }
}

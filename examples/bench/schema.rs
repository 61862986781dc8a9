//! What is written to `results.json`, and the statistics in it.
//!
//! A figure that is missing was not measured; the contender's notes say why. Times are in the unit
//! that the name ends in.

use serde::{Deserialize, Serialize};

/// The version of this shape.
pub(crate) const SCHEMA: &str = "proxier-bench/1";

/// One run of the suite.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Report {
    /// Always [`SCHEMA`].
    pub(crate) schema: String,
    /// UTC.
    pub(crate) date: String,
    /// Of proxier.
    pub(crate) version: String,
    /// The arguments.
    pub(crate) command: String,
    pub(crate) took_s: f64,
    pub(crate) machine: Machine,
    /// Small ones first.
    pub(crate) worlds: Vec<WorldReport>,
    /// Per mode, one Service with very many endpoints.
    pub(crate) pools: Vec<PoolReport>,
    /// Per mode, many random changes.
    pub(crate) soaks: Vec<SoakReport>,
    pub(crate) aims: Vec<Aim>,
    /// What was left out, and other things to know.
    pub(crate) notes: Vec<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    /// `release` or `debug`.
    pub(crate) build: String,
    /// The load average of the last minute before the run: others on the machine spoil figures.
    pub(crate) load_before: f64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WorldReport {
    pub(crate) services: usize,
    /// Of each Service.
    pub(crate) endpoints: usize,
    /// How often everything but memory and packets was measured.
    pub(crate) runs: usize,
    pub(crate) contenders: Vec<Contender>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A mode of proxier.
    Mode,
    /// Somebody else's tool with kube-proxy's layout.
    Peer,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) control: Control,
    pub(crate) memory: Option<Memory>,
    pub(crate) path: Option<Path>,
    pub(crate) notes: Vec<String>,
}

/// Programming the kernel.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    /// From Services and EndpointSlices to fragments.
    pub(crate) model_ms: Option<Spread>,
    /// From an empty kernel to everything programmed.
    pub(crate) first_sync_ms: Option<Spread>,
    /// A peer was stopped after so long.
    pub(crate) first_sync_above_ms: Option<f64>,
    pub(crate) objects: Option<usize>,
    pub(crate) batches: Option<usize>,
    /// One endpoint goes, comes or is replaced by another; a sync, from call to return.
    pub(crate) change_us: Option<Spread>,
    pub(crate) change_ops_max: Option<usize>,
    /// What `plan` takes for such a change, including its text.
    pub(crate) plan_us: Option<Spread>,
    /// Of the process, kernel included; missing where the machine does not count them.
    pub(crate) change_instructions: Option<Spread>,
    pub(crate) service_added_us: Option<Spread>,
    pub(crate) service_removed_us: Option<Spread>,
    /// A new process finds everything as it should be.
    pub(crate) restart_ms: Option<Spread>,
    pub(crate) restart_ops: Option<usize>,
    /// Commits that an nf_tables listener heard meanwhile.
    pub(crate) restart_commits: Option<usize>,
    pub(crate) rolling: Option<Rolling>,
    /// From everything to an empty kernel.
    pub(crate) cleanup_ms: Option<Spread>,
}

/// Every endpoint of one Service is replaced, one sync each.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rolling {
    pub(crate) endpoints: usize,
    /// Fewer than `endpoints` when time ran out.
    pub(crate) steps: usize,
    pub(crate) step_us: Spread,
    pub(crate) ops_max: usize,
}

/// Of a process that holds the world, and nothing else.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    pub(crate) resident_kib: u64,
    pub(crate) peak_kib: u64,
}

/// Packets through the node. The ways take turns, connection by connection.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Path {
    /// TCP connect to an endpoint through a router without any rule.
    pub(crate) bare_us: Spread,
    /// TCP connect to an endpoint through the programmed node, past its rules.
    pub(crate) direct_us: Spread,
    /// TCP connect to the first Service by name.
    pub(crate) first_us: Spread,
    /// To the last one.
    pub(crate) last_us: Spread,
    /// To another one each time.
    pub(crate) random_us: Spread,
    pub(crate) rate: Vec<Rate>,
}

/// Rates through the node, direct and by a Service.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rate {
    /// `connections/s` or `MB/s`.
    pub(crate) unit: String,
    pub(crate) direct: Spread,
    pub(crate) service: Spread,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolReport {
    pub(crate) mode: String,
    pub(crate) endpoints: usize,
    /// Operations for one endpoint that goes, comes or is replaced, at most.
    pub(crate) ops_max: usize,
    pub(crate) change_us: Spread,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SoakReport {
    pub(crate) mode: String,
    pub(crate) services: usize,
    pub(crate) changes: usize,
    /// What an audit had to repair at the end: kernel and prediction are equal when it is 0.
    pub(crate) repaired: usize,
    /// Resident after a tenth of the changes.
    pub(crate) early_kib: u64,
    pub(crate) late_kib: u64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Aim {
    pub(crate) what: String,
    pub(crate) aim: String,
    pub(crate) measured: String,
    /// Missing when it was not measured in this run.
    pub(crate) met: Option<bool>,
}

/// Some measurements of one thing. Percentiles are by nearest rank.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` for nothing.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(rank).copied().unwrap_or(max)
        };
        Some(Self { count: sorted.len(), min, p50: rank(50), p99: rank(99), max })
    }
}

impl Report {
    /// What a contender showed in each world of the plain series (not the one for comparison), by
    /// the number of Services.
    pub(crate) fn series(&self, name: &str) -> impl Iterator<Item = (usize, &Contender)> {
        let endpoints = self.worlds.first().map_or(0, |world| world.endpoints);
        let worlds = self.worlds.iter().filter(move |world| world.endpoints == endpoints);
        worlds.filter_map(move |world| Some((world.services, world.contender(name)?)))
    }

    /// Everyone who took part, modes first.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for kind in [Kind::Mode, Kind::Peer] {
            let all = self.worlds.iter().flat_map(|world| &world.contenders);
            for contender in all.filter(|it| it.kind == kind) {
                if !names.contains(&contender.name.as_str()) {
                    names.push(&contender.name);
                }
            }
        }
        names
    }

    pub(crate) fn find(&self, services: usize, endpoints: usize, name: &str) -> Option<&Contender> {
        let here =
            |world: &&WorldReport| world.services == services && world.endpoints == endpoints;
        self.worlds.iter().find(here)?.contender(name)
    }
}

impl WorldReport {
    pub(crate) fn contender(&self, name: &str) -> Option<&Contender> {
        self.contenders.iter().find(|it| it.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn percentiles_are_measured_values() {
        let values: Vec<_> = (1..=200).rev().map(f64::from).collect();
        let spread = Spread::of(&values).unwrap();
        assert_eq!((spread.min, spread.p50, spread.p99, spread.max), (1.0, 100.0, 198.0, 200.0));
        assert_eq!(Spread::of(&[7.0]).unwrap().p99, 7.0);
        assert_eq!(Spread::of(&[]), None);
    }
}

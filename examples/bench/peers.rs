//! What the iptables tools take for the same rules.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt::Write,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use proxier::{Family, FragmentId, PlannedOp, Proxier, Verb, engine::Engine};
use proxier_backend_iptables::{Config, Iptables};
use proxier_core::testing::FakeKernel;
use proxier_testkit::lab::{LabError, Ns};

use crate::world::{self, Size};

/// Services in one input of `iptables-nft-restore`: more take it more than twice as long for twice as
/// many.
const SERVICES_PER_INPUT: usize = 50;

/// Changes to time; each takes a good part of a second.
const CHANGES: usize = 4;

/// A tool to compare with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Peer {
    Legacy,
    Nft,
}

impl Peer {
    /// The tools that are there.
    pub(crate) fn installed() -> Vec<Self> {
        let works = |peer: &Self| {
            let mut command = Command::new(peer.name());
            command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        [Self::Legacy, Self::Nft].into_iter().filter(works).collect()
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "iptables-legacy-restore",
            Self::Nft => "iptables-nft-restore",
        }
    }

    /// Loads everything into an empty namespace.
    pub(crate) fn load(self, ns: &Ns, texts: &Texts) -> Result<Duration, LabError> {
        let began = Instant::now();
        match self {
            Self::Legacy => self.restore(ns, &texts.whole)?,
            Self::Nft => texts.chunks.iter().try_for_each(|chunk| self.restore(ns, chunk))?,
        }
        Ok(began.elapsed())
    }

    /// Makes changes as kube-proxy does: the changed chains, and the shared ones whole.
    pub(crate) fn change(self, ns: &Ns, texts: &Texts) -> Result<Vec<Duration>, LabError> {
        let timed = |text: &String| {
            let began = Instant::now();
            self.restore(ns, text).map(|()| began.elapsed())
        };
        texts.changes.iter().map(timed).collect()
    }

    fn restore(self, ns: &Ns, text: &str) -> Result<(), LabError> {
        ns.command_with_input(self.name(), ["--noflush", "--wait", "5"], text).map(drop)
    }
}

/// Inputs for the tools, made from our own plans, so that the rules are the same.
pub(crate) struct Texts {
    whole: String,
    chunks: Vec<String>,
    changes: Vec<String>,
}

/// Rules of one input, by table.
#[derive(Default)]
struct Input(BTreeMap<String, Table>);

#[derive(Default)]
struct Table {
    declared: String,
    rules: String,
    removed: String,
}

impl Texts {
    /// The rules of a cluster, and of some changes to it.
    pub(crate) fn of(size: Size) -> Result<Self, Box<dyn Error>> {
        let backend = Iptables::new(Config::default())?;
        let kernel = FakeKernel::new(&backend, usize::MAX);
        let mut engine = Engine::new(backend, kernel, &[Family::V4]);
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let mut store = world::store();
        for event in world::lists(size) {
            store.apply(event);
        }
        let update = store.take().ok_or("an empty cluster")?;
        let plan = engine.plan(&update).ops;
        let (shared, own): (Vec<_>, Vec<_>) = plan.iter().partition(|op| is_shared(op));
        let mut per_service: BTreeMap<&FragmentId, Vec<&PlannedOp>> = BTreeMap::new();
        for op in &own {
            per_service
                .entry(op.fragment.as_ref().ok_or("a chain of nobody")?)
                .or_default()
                .push(op);
        }
        let per_service: Vec<_> = per_service.into_values().collect();
        let mut chunks: Vec<_> = per_service
            .chunks(SERVICES_PER_INPUT)
            .map(|services| Input::of(services.iter().flatten().copied()).text())
            .collect();
        // First what marks packets, since Services' chains lead there; last what leads to Services.
        let (fixed, entries): (Vec<_>, Vec<_>) =
            shared.iter().copied().partition(|op| op.object.starts_with("chain"));
        chunks.insert(0, Input::of(fixed.iter().copied()).text());
        chunks.push(Input::of(entries.iter().copied()).text());
        let whole = Input::of(plan.iter()).text();
        runtime.block_on(engine.sync(update))?;

        let mut changes = Vec::new();
        for step in 0..CHANGES {
            store.apply(world::change(size, step));
            let update = store.take().ok_or("a change that changes nothing")?;
            let ops = engine.plan(&update).ops;
            // kube-proxy declares its shared chains anew, which empties them, and writes all rules.
            let mut input = Input::of(ops.iter());
            input.rewrite(&fixed, &entries);
            changes.push(input.text());
            runtime.block_on(engine.sync(update))?;
        }
        Ok(Self { whole, chunks, changes })
    }
}

/// Not a chain of one Service.
fn is_shared(op: &PlannedOp) -> bool {
    op.fragment.is_none() || op.object.starts_with("rule")
}

impl Input {
    #[expect(single_use_lifetimes, reason = "an anonymous lifetime is not stable in impl Trait")]
    fn of<'a>(ops: impl IntoIterator<Item = &'a PlannedOp>) -> Self {
        let mut input = Self::default();
        for op in ops {
            input.add(op);
        }
        input
    }

    /// Adds what an operation says: `chain ip TABLE NAME` with rules, or `rule ip TABLE -A CHAIN …`
    /// with a target.
    fn add(&mut self, op: &PlannedOp) {
        let mut words = op.object.splitn(4, ' ');
        let (Some(kind), Some(_), Some(table), Some(rest)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return;
        };
        let table = self.0.entry(table.to_owned()).or_default();
        let is_builtin = rest.chars().all(|it| it.is_ascii_uppercase());
        match (kind, op.verb) {
            ("chain", _) if is_builtin => {}
            ("chain", verb) => {
                writeln!(table.declared, ":{rest} - [0:0]").unwrap_or_default();
                if verb == Verb::Del {
                    writeln!(table.removed, "-X {rest}").unwrap_or_default();
                }
                table.rules.push_str(&op.after);
            }
            ("rule", Verb::Add) => {
                let target = op.after.trim_end_matches(" (last)");
                writeln!(table.rules, "{rest} {target}").unwrap_or_default();
            }
            _ => {}
        }
    }

    /// Empties the shared chains and writes them whole.
    fn rewrite(&mut self, fixed: &[&PlannedOp], entries: &[&PlannedOp]) {
        let jump = |op: &&&PlannedOp| {
            let builtin = ["INPUT", "FORWARD", "OUTPUT", "PREROUTING", "POSTROUTING"];
            builtin.iter().any(|chain| op.object.contains(&format!("-A {chain} ")))
        };
        fixed.iter().for_each(|op| self.add(op));
        entries.iter().filter(|op| !jump(op)).for_each(|op| self.add(op));
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (name, table) in &self.0 {
            let Table { declared, rules, removed } = table;
            write!(text, "*{name}\n{declared}{rules}{removed}COMMIT\n").unwrap_or_default();
        }
        text
    }
}

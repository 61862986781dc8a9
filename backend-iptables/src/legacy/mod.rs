//! The I/O half for hosts whose kernel has x_tables instead of nf_tables.
//!
//! This is the one place where a program is run: the kernel's interface to x_tables replaces a whole
//! table at a time, in a binary form that only iptables knows how to make. Everything else, names,
//! chains, rules and plans, is shared with the other I/O half.

mod input;
mod parse;
mod tool;

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
};

use async_trait::async_trait;
use proxier_core::{
    ByFamily, Family,
    conntrack::{FlowFilter, Forgotten},
    spi::{CommitError, Dataplane, ErrorKind},
};
use proxier_netlink::{NetNs, ct::Conntrack, spi};
use tokio::task::JoinHandle;
use tracing::{debug, trace};

use self::input::Input;
pub use self::tool::ToolError;
pub(crate) use self::tool::{Command, Tool};
use crate::{
    EngineError,
    backend::{Iptables, Op},
    config::Config,
    dataplane::{Objects, Scope, check_admission},
    names::FixedNames,
    object::{Key, Object, Table, Value},
};

/// The I/O half of the iptables mode on x_tables: `iptables-legacy-restore` and
/// `iptables-legacy-save`, and one netlink socket to conntrack.
pub struct LegacyDataplane {
    tool: Tool,
    conntrack: Conntrack,
    config: Config,
    names: FixedNames,
    families: ByFamily<FamilyState>,
    /// A program that was not waited for, because whoever waited was dropped.
    running: Option<JoinHandle<io::Result<tool::Output>>>,
}

#[derive(Debug, Default)]
struct FamilyState {
    /// The chains were found to be ours, or free.
    admitted: bool,
    /// Rules that are not ours in chains that are, as the tool lists them.
    foreign: HashMap<Key, String>,
    /// The chain that is shared with kubelet exists.
    has_firewall: bool,
}

impl LegacyDataplane {
    /// Finds the tools and opens the socket. Reads and changes nothing. Runs `iptables-legacy -V`,
    /// which takes a few milliseconds.
    ///
    /// # Errors
    /// [`EngineError::Tool`]: iptables-legacy is not installed, or too old. [`EngineError::Open`]:
    /// the namespace cannot be entered, or the kernel has no netfilter sockets.
    pub fn open(backend: &Iptables, netns: &NetNs) -> Result<Self, EngineError> {
        Ok(Self {
            tool: Tool::find(netns)?,
            conntrack: Conntrack::open(netns)?,
            config: backend.config().clone(),
            names: backend.names().clone(),
            families: ByFamily::default(),
            running: None,
        })
    }

    /// Runs a program, after any that is still running: it might change what this one reads.
    async fn run(&mut self, command: Command) -> Result<tool::Output, CommitError> {
        if let Some(before) = self.running.take() {
            // Its outcome is unknown to whoever started it, who reads the kernel back now.
            before.await.ok();
        }
        let doing = command.to_string();
        let tool = self.tool.clone();
        let running = self.running.insert(tokio::task::spawn_blocking(move || tool.run(&command)));
        let output = running.await;
        self.running = None;
        match output {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(source)) => {
                Err(CommitError::Transport { doing, source, kind: ErrorKind::Fatal })
            }
            Err(source) => Err(CommitError::Transport {
                doing,
                source: io::Error::other(source),
                kind: ErrorKind::Retry,
            }),
        }
    }

    /// What a table holds, as the tool lists it.
    async fn save(&mut self, family: Family, table: Table) -> Result<String, CommitError> {
        let output = self.run(Command::save(family, table)).await?;
        if output.succeeded() {
            return Ok(output.stdout);
        }
        let doing = format!("listing {family} table {table}");
        let (kind, source) = (output.kind(), io::Error::other(output.errors()));
        Err(CommitError::Transport { doing, source, kind })
    }

    async fn restore(&mut self, family: Family, input: Input) -> Result<(), CommitError> {
        let Input { text, lines } = input;
        trace!(%family, bytes = text.len(), "restoring");
        let output = self.run(Command::restore(family, text)).await?;
        if output.succeeded() {
            return Ok(());
        }
        Err(input::explain(&lines, output.errors(), output.kind()))
    }

    /// Says whether the firewall chain, if `ops` remove it, is used by nobody else: every rule in it,
    /// and every jump to it, is among `ops`.
    async fn firewall_is_free(&mut self, family: Family, ops: &[Op]) -> Result<bool, CommitError> {
        let firewall = self.names.firewall;
        let goes = |op: &Op| matches!(op, Op::Del(Key(Object::Chain { name, .. }), _) if *name == firewall);
        if !ops.iter().any(goes) {
            return Ok(false);
        }
        let listing = self.save(family, Table::Filter).await?;
        let scope = Scope::new(family, &self.config.prefix, &self.names);
        let removed = ops
            .iter()
            .filter(|op| matches!(op, Op::Del(..)) && scope.is_about_firewall(op.key()))
            .count();
        let name = firewall.as_str();
        let uses = listing.lines().filter(|line| {
            let mut words = line.split(' ');
            words.next() == Some("-A") && words.any(|word| word == name)
        });
        Ok(uses.count() <= removed)
    }
}

#[async_trait]
impl Dataplane<Iptables> for LegacyDataplane {
    /// One run of the tool, and one change of the kernel's for each table: first filter, then nat.
    /// An error after the first is [`CommitError::Unknown`].
    async fn commit(&mut self, family: Family, ops: &[Op]) -> Result<(), CommitError> {
        let drop_firewall = self.firewall_is_free(family, ops).await?;
        let state = self.families.of(family);
        let context = input::Context {
            family,
            names: &self.names,
            foreign: &state.foreign,
            has_firewall: state.has_firewall,
            drop_firewall,
        };
        let input =
            Input::of(&context, ops).map_err(|input::UnknownRule| CommitError::Unknown {
                doing: "removing a rule that was not listed",
                source: io::ErrorKind::NotFound.into(),
            })?;
        if input.text.is_empty() {
            return Ok(());
        }
        self.restore(family, input).await?;
        let makes_firewall = |op: &Op| {
            matches!(op, Op::Add(Key(Object::Chain { name, .. }), _)
                if *name == self.names.firewall)
        };
        let state = self.families.of_mut(family);
        state.has_firewall =
            !drop_firewall && (state.has_firewall || ops.iter().any(makes_firewall));
        Ok(())
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<Key, Value>, CommitError> {
        let mut found = Objects::new();
        let mut foreign = HashMap::new();
        let mut has_firewall = false;
        for table in Table::ALL {
            let listing = self.save(family, table).await?;
            let scope = Scope::new(family, &self.config.prefix, &self.names);
            let read = parse::table(&scope, table, &listing);
            has_firewall |= read.has_firewall;
            found.extend(read.objects);
            foreign.extend(read.foreign);
        }
        check_admission(
            &self.config,
            &self.names,
            family,
            &found,
            &mut self.families.of_mut(family).admitted,
        )?;
        let state = self.families.of_mut(family);
        state.foreign = foreign;
        state.has_firewall = has_firewall;
        debug!(%family, objects = found.len(), "read back");
        Ok(found)
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        let mut errors = Vec::new();
        for family in Family::ALL {
            if let Err(error) = self.wipe_family(family).await {
                errors.push((family, error));
            }
            *self.families.of_mut(family) = FamilyState::default();
        }
        spi::combine(errors)
    }

    async fn forget_flows(
        &mut self,
        family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        spi::forget_flows(&mut self.conntrack, family, filters, spi::translated_to).await
    }

    /// Every run replaces whole tables, so everything goes at once.
    fn batch_limit(&self) -> usize {
        usize::MAX
    }
}

impl LegacyDataplane {
    /// Removes everything of ours in one family.
    async fn wipe_family(&mut self, family: Family) -> Result<(), CommitError> {
        for table in Table::ALL {
            let listing = self.save(family, table).await?;
            let scope = Scope::new(family, &self.config.prefix, &self.names);
            let input = input::removal(&scope, table, &listing);
            if !input.text.is_empty() {
                self.restore(family, input).await?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for LegacyDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegacyDataplane").field("tool", &self.tool).finish_non_exhaustive()
    }
}

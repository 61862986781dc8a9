//! Flows on a real kernel: the case's world in network namespaces, programmed by a proxier, and
//! looked at with packets.
//!
//! Cases of one world share one set of namespaces. Before each case its world is programmed with a
//! reset, so that the kernel is also taken through many changes of state.

mod layout;
mod look;
mod memory;
mod rig;

use std::{collections::BTreeSet, fmt};

use proxier_core::{BackendFactory, Mode, OpenError, in_full};
use tokio::runtime::{Builder, Runtime};

use self::{layout::Layout, rig::Rig};
use super::{
    Case, CaseFile, CaseWorld, Verdict,
    affinity::flows,
    flow::{Applies, Flow, flow_of},
};
use crate::lab::LabError;

/// A real kernel cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RealError {
    /// The namespaces cannot be made.
    #[error("cannot build the case's world: {}", in_full(.0))]
    Lab(#[from] LabError),
    /// The mode cannot be opened.
    #[error("cannot open the mode: {}", in_full(.0))]
    Open(#[from] OpenError),
    /// The world cannot be programmed as it is meant.
    #[error("not programmed: {0}")]
    Program(String),
    /// There is no runtime.
    #[error("cannot start a runtime")]
    Runtime(#[source] std::io::Error),
    /// The world cannot be laid out in namespaces.
    #[error("cannot lay out the case's world: {0}")]
    World(String),
}

/// A real kernel with a mode that programs it.
///
/// Needs what a [`Lab`](crate::lab::Lab) needs; nothing outside its own namespaces is touched.
pub struct RealKernel {
    factory: Box<dyn BackendFactory>,
    runtime: Runtime,
    groups: Vec<Group>,
    /// The namespaces of a group, by its index.
    rig: Option<(usize, Rig)>,
}

/// Cases that can share one set of namespaces.
struct Group {
    layout: Layout,
    ids: BTreeSet<u64>,
}

impl RealKernel {
    /// Uses the kernel that this process runs on, in one mode.
    ///
    /// # Errors
    /// [`RealError::Runtime`].
    pub fn new(factory: Box<dyn BackendFactory>) -> Result<Self, RealError> {
        let runtime =
            Builder::new_current_thread().enable_all().build().map_err(RealError::Runtime)?;
        Ok(Self { factory, runtime, groups: Vec::new(), rig: None })
    }

    /// Looks at one flow.
    pub(super) fn flow(&mut self, file: &CaseFile, case: &Case, flow: &Flow) -> Verdict {
        let world = match CaseWorld::of(file, case) {
            Ok(world) => world,
            Err(error) => return Verdict::failed("a case of the schema", error),
        };
        match self.prepare(file, case, &world, flow) {
            Ok(()) => {}
            Err(error) => return Verdict::failed(&flow.expected, error),
        }
        let Some((_, rig)) = &mut self.rig else {
            return Verdict::failed(&flow.expected, "no namespaces");
        };
        if case.kind != "affinity" {
            return rig.judge(&self.runtime, &world, flow);
        }
        match flows(file, case) {
            Ok(earlier) => rig.judge_again(&self.runtime, &world, flow, &earlier),
            Err(error) => Verdict::failed("a case of the schema", error),
        }
    }

    /// Has the right namespaces ready.
    fn prepare(
        &mut self,
        file: &CaseFile,
        case: &Case,
        world: &CaseWorld,
        flow: &Flow,
    ) -> Result<(), RealError> {
        if self.groups.is_empty() {
            self.groups = groups(file, self.factory.mode());
        }
        let mut index = self.groups.iter().position(|group| group.ids.contains(&case.id));
        if index.is_none() {
            let mut layout = Layout::new(world);
            add(&mut layout, file, case, world, flow).map_err(RealError::World)?;
            self.groups.push(Group { layout, ids: BTreeSet::from([case.id]) });
            index = self.groups.len().checked_sub(1);
        }
        let index = index.unwrap_or_default();
        if self.rig.as_ref().is_some_and(|(of, _)| *of == index) {
            return Ok(());
        }
        self.rig = None;
        let Some(group) = self.groups.get(index) else { return Ok(()) };
        let rig = Rig::build(&self.runtime, &*self.factory, &group.layout)?;
        self.rig = Some((index, rig));
        Ok(())
    }
}

/// Puts cases of one world together as long as every address has one place.
fn groups(file: &CaseFile, mode: Mode) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let has_packets = |case: &&Case| matches!(case.kind.as_str(), "affinity" | "flow");
    for case in file.cases().iter().filter(has_packets) {
        let Ok(world) = CaseWorld::of(file, case) else { continue };
        let Ok(Applies::Yes(flow)) = flow_of(file, case, mode) else { continue };
        let home = groups.iter_mut().find_map(|group| {
            let mut layout = group.layout.clone();
            let fits = layout.is_for(&world) && add(&mut layout, file, case, &world, &flow).is_ok();
            fits.then_some((group, layout))
        });
        if let Some((group, layout)) = home {
            group.layout = layout;
            group.ids.insert(case.id);
            continue;
        }
        let mut layout = Layout::new(&world);
        if add(&mut layout, file, case, &world, &flow).is_ok() {
            groups.push(Group { layout, ids: BTreeSet::from([case.id]) });
        }
    }
    groups
}

/// Makes room for the flow of a case, and for those before it.
fn add(
    layout: &mut Layout,
    file: &CaseFile,
    case: &Case,
    world: &CaseWorld,
    flow: &Flow,
) -> Result<(), String> {
    for (earlier, _) in flows(file, case).map_err(|error| error.to_string())? {
        layout.add(file, world, &earlier)?;
    }
    layout.add(file, world, flow)
}

impl fmt::Debug for RealKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RealKernel").field("mode", &self.factory.mode()).finish_non_exhaustive()
    }
}

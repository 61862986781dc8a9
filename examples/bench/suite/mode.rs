//! A mode of proxier in one world.

use std::error::Error;

use proxier::{Mode, in_full};

use super::{PARTS, Suite};
use crate::{
    args::Options,
    child::{self, Samples, Task},
    path::Course,
    schema::{Contender, Control, Kind, Memory, Path, Rolling, Spread},
    world::World,
};

pub(super) struct ModeRun {
    pub(super) mode: Mode,
    samples: Option<Samples>,
    memory: Option<Memory>,
    path: Option<Path>,
    notes: Vec<String>,
    rolling: usize,
}

impl ModeRun {
    pub(super) fn new(mode: Mode) -> Self {
        Self { mode, samples: None, memory: None, path: None, notes: Vec::new(), rolling: 0 }
    }

    pub(super) fn measure(&mut self, suite: &Suite<'_>, world: World) {
        let Options { changes, rolling, .. } = *suite.options;
        self.rolling = rolling;
        let task = Task::Control { changes, rolling };
        let Some(more) = suite.one(task, self.mode, world, &mut self.notes) else { return };
        match &mut self.samples {
            Some(samples) => samples.merge(more),
            none @ None => *none = Some(more),
        }
    }

    /// Memory and data path, of a process that does nothing else.
    pub(super) fn hold(&mut self, suite: &Suite<'_>, world: World) {
        let mut hold = || {
            let course = Course::new()?;
            let job = suite.job(Task::Hold, self.mode, course.node().path(), world, PARTS);
            let held = child::start::<Memory>(&job, suite.budget.left())?;
            let (running, memory) = held.ok_or("the time ran out")?;
            self.memory = Some(memory);
            if suite.options.path {
                self.path = Some(suite.packets(&course, world)?);
            }
            drop(running);
            Ok::<_, Box<dyn Error>>(())
        };
        if let Err(error) = hold() {
            self.notes.push(format!("failed: memory and packets: {}", in_full(&*error)));
        }
    }

    pub(super) fn report(self) -> Contender {
        let rolling = self.rolling;
        let control = self.samples.map(|samples| control(&samples, rolling)).unwrap_or_default();
        Contender {
            name: self.mode.name().to_owned(),
            kind: Kind::Mode,
            control,
            memory: self.memory,
            path: self.path,
            notes: self.notes,
        }
    }
}

fn control(samples: &Samples, rolling: usize) -> Control {
    let rolling = Spread::of(&samples.rolling_us).map(|step_us| Rolling {
        endpoints: rolling,
        steps: step_us.count.min(rolling),
        step_us,
        ops_max: samples.rolling_ops_max,
    });
    Control {
        model_ms: Spread::of(&samples.model_ms),
        first_sync_ms: Spread::of(&samples.first_sync_ms),
        first_sync_above_ms: None,
        objects: Some(samples.objects),
        batches: Some(samples.batches),
        change_us: Spread::of(&samples.change_us),
        change_ops_max: Some(samples.change_ops_max),
        plan_us: Spread::of(&samples.plan_us),
        change_instructions: Spread::of(&samples.instructions),
        service_added_us: Spread::of(&samples.added_us),
        service_removed_us: Spread::of(&samples.removed_us),
        restart_ms: Spread::of(&samples.restart_ms),
        restart_ops: Some(samples.restart_ops),
        restart_commits: Some(samples.restart_commits),
        rolling,
        cleanup_ms: Spread::of(&samples.cleanup_ms),
    }
}

//! A peer in one world.

use std::{error::Error, time::Duration};

use proxier::in_full;
use proxier_testkit::lab::{Lab, Ns};

use super::Suite;
use crate::{
    path::Course,
    peers::{Peer, Texts},
    schema::{Contender, Control, Kind, Path, Spread},
    world::World,
};

/// A peer that takes longer to load is loaded once only.
const SLOW_MS: f64 = 10_000.0;

pub(super) struct PeerRun {
    pub(super) peer: Peer,
    skipped: bool,
    loads_ms: Vec<f64>,
    changes_us: Vec<f64>,
    /// It was stopped after so many milliseconds.
    above_ms: Option<f64>,
    path: Option<Path>,
    notes: Vec<String>,
}

impl PeerRun {
    pub(super) fn new(peer: Peer, world: World) -> Self {
        Self {
            peer,
            skipped: false,
            loads_ms: Vec::new(),
            changes_us: Vec::new(),
            above_ms: None,
            path: None,
            notes: peer.note(world).into_iter().collect(),
        }
    }

    /// Leaves it out of this world.
    pub(super) fn skip(&mut self, why: String) {
        self.skipped = true;
        self.notes.push(why);
    }

    /// Seconds to load this world, or more than that.
    pub(super) fn took(&self) -> Option<f64> {
        let ms = Spread::of(&self.loads_ms).map(|it| it.p50).or(self.above_ms)?;
        Some(ms / 1e3)
    }

    pub(super) fn worth_a_run(&self) -> bool {
        !self.skipped && self.above_ms.is_none() && self.loads_ms.iter().all(|ms| *ms <= SLOW_MS)
    }

    /// Loads the world and changes it; packets go through what the first load has left.
    pub(super) fn measure(
        &mut self,
        suite: &Suite<'_>,
        world: World,
    ) -> Result<(), Box<dyn Error>> {
        let texts = self.peer.texts(world);
        if suite.options.path && self.loads_ms.is_empty() {
            let course = Course::new()?;
            if self.program(suite, course.node(), &texts)? {
                match suite.packets(&course, world) {
                    Ok(path) => self.path = Some(path),
                    Err(error) => {
                        self.notes.push(format!("failed: packets: {}", in_full(&*error)));
                    }
                }
            }
        } else {
            self.program(suite, &Lab::new("bench")?.ns("peer")?, &texts)?;
        }
        Ok(())
    }

    /// Whether everything is programmed.
    fn program(
        &mut self,
        suite: &Suite<'_>,
        ns: &Ns,
        texts: &Texts,
    ) -> Result<bool, Box<dyn Error>> {
        let bound = suite.options.peer_bound.min(suite.budget.left());
        match self.peer.load(ns, texts, bound) {
            Ok(Some(time)) => self.loads_ms.push(ms(time)),
            Ok(None) => {
                self.above_ms = Some(ms(bound));
                return Ok(false);
            }
            Err(error) => {
                self.skip(format!("failed: {error}"));
                return Ok(false);
            }
        }
        let times = self.peer.change(ns, texts, bound)?;
        self.changes_us.extend(times.iter().map(|time| ms(*time) * 1e3));
        Ok(true)
    }

    pub(super) fn report(self) -> Contender {
        let control = Control {
            first_sync_ms: Spread::of(&self.loads_ms),
            first_sync_above_ms: self.above_ms,
            change_us: Spread::of(&self.changes_us),
            ..Control::default()
        };
        let Self { peer, path, notes, .. } = self;
        let (name, kind) = (peer.name().to_owned(), Kind::Peer);
        Contender { name, kind, control, memory: None, path, notes }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

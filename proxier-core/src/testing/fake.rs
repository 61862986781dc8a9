//! A kernel in memory, stricter than the real one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use async_trait::async_trait;

use crate::{
    conntrack::{FlowFilter, Forgotten},
    name::{ByFamily, Family},
    spi::{Backend, CommitError, Dataplane, ErrorKind, Op},
};

/// Something that goes wrong with one commit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The batch takes effect, but the reply is lost.
    LoseReply,
    /// The batch never arrives, and there is no reply.
    LoseRequest,
    /// Half of the operations take effect, and there is no reply. Atomic backends never see this.
    StopHalfWay,
    /// The connection is gone before anything happens.
    Transport,
}

/// Holds kernel objects, and refuses what a real kernel might let pass: creating what exists,
/// removing what does not, replacing what holds something else.
///
/// Such a mistake is noted in [`violations`](Self::violations) as well as refused, so that a test
/// sees it even where the engine copes.
#[derive(Debug)]
pub struct FakeKernel<B: Backend> {
    /// The objects of each family.
    pub objects: ByFamily<BTreeMap<B::Key, B::Value>>,
    /// Objects whose creation or replacement is refused.
    pub poison: BTreeSet<B::Key>,
    /// Refusals name the operation.
    pub attributes: bool,
    /// Faults of the commits to come; `None` lets one pass.
    pub faults: VecDeque<Option<Fault>>,
    /// Mistakes of the caller.
    pub violations: Vec<String>,
    /// Commits that took effect.
    pub commits: usize,
    /// Operations that took effect.
    pub writes: usize,
    /// Every flow filter that was carried out.
    pub forgotten: Vec<FlowFilter>,
    atomic: bool,
    limit: usize,
}

impl<B: Backend> FakeKernel<B> {
    /// An empty kernel that behaves as `backend` expects, for batches of up to `limit`.
    #[must_use]
    pub fn new(backend: &B, limit: usize) -> Self {
        Self {
            objects: ByFamily::from_fn(|_| BTreeMap::new()),
            poison: BTreeSet::new(),
            attributes: true,
            faults: VecDeque::new(),
            violations: Vec::new(),
            commits: 0,
            writes: 0,
            forgotten: Vec::new(),
            atomic: backend.capabilities().atomic,
            limit,
        }
    }

    fn apply(
        &mut self,
        family: Family,
        ops: &[Op<B::Key, B::Value>],
    ) -> Result<(), (usize, String)> {
        let mut objects = self.objects.of(family).clone();
        let mut outcome = Ok(());
        for (index, op) in ops.iter().enumerate() {
            if self.poison.contains(op.key()) && !matches!(op, Op::Del(..)) {
                outcome = Err((index, "poisoned".to_owned()));
            } else if let Err(mistake) = carry_out::<B>(&mut objects, op) {
                self.violations.push(format!("{}: {mistake}", op.key()));
                outcome = Err((index, mistake.to_owned()));
            }
            if outcome.is_err() {
                break;
            }
            self.writes += 1;
        }
        if outcome.is_ok() || !self.atomic {
            *self.objects.of_mut(family) = objects;
        }
        outcome
    }
}

fn carry_out<B: Backend>(
    objects: &mut BTreeMap<B::Key, B::Value>,
    op: &Op<B::Key, B::Value>,
) -> Result<(), &'static str> {
    match op {
        Op::Add(key, new) => match objects.insert(key.clone(), new.clone()) {
            None => Ok(()),
            Some(_) => Err("created, but exists"),
        },
        Op::Del(key, old) => match objects.remove(key) {
            Some(held) if held == *old => Ok(()),
            Some(_) => Err("removed, but holds something else"),
            None => Err("removed, but does not exist"),
        },
        Op::Set { key, old, new } => match objects.insert(key.clone(), new.clone()) {
            Some(held) if held == *old => Ok(()),
            Some(_) => Err("replaced, but holds something else"),
            None => Err("replaced, but does not exist"),
        },
    }
}

fn lost(doing: &'static str) -> CommitError {
    CommitError::Unknown { doing, source: std::io::ErrorKind::TimedOut.into() }
}

#[async_trait]
impl<B: Backend> Dataplane<B> for FakeKernel<B> {
    async fn commit(
        &mut self,
        family: Family,
        ops: &[Op<B::Key, B::Value>],
    ) -> Result<(), CommitError> {
        match self.faults.pop_front().flatten() {
            Some(Fault::LoseRequest) => return Err(lost("a lost request")),
            Some(Fault::Transport) => {
                return Err(CommitError::Transport {
                    doing: "sending a batch".to_owned(),
                    source: std::io::ErrorKind::NotConnected.into(),
                    kind: ErrorKind::Retry,
                });
            }
            Some(Fault::StopHalfWay) if !self.atomic => {
                let (half, _) = ops.split_at(ops.len() / 2);
                // What is refused in the first half is refused; the caller learns nothing either way.
                self.apply(family, half).ok();
                return Err(lost("half a batch"));
            }
            Some(Fault::LoseReply | Fault::StopHalfWay) => {
                self.apply(family, ops).ok();
                return Err(lost("a batch without a reply"));
            }
            None => {}
        }
        if ops.len() > self.limit {
            self.violations.push(format!("{} operations at once", ops.len()));
        }
        match self.apply(family, ops) {
            Ok(()) => {
                self.commits += 1;
                Ok(())
            }
            Err((index, extack)) => Err(CommitError::Refused {
                op: self.attributes.then_some(index),
                object: ops.get(index).map(|op| op.key().to_string()).unwrap_or_default(),
                extack,
                errno: std::io::ErrorKind::InvalidInput.into(),
                kind: ErrorKind::Fatal,
            }),
        }
    }

    async fn dump(&mut self, family: Family) -> Result<BTreeMap<B::Key, B::Value>, CommitError> {
        Ok(self.objects.of(family).clone())
    }

    async fn wipe(&mut self) -> Result<(), CommitError> {
        self.objects = ByFamily::from_fn(|_| BTreeMap::new());
        Ok(())
    }

    async fn forget_flows(
        &mut self,
        _family: Family,
        filters: &[FlowFilter],
    ) -> Result<Forgotten, CommitError> {
        self.forgotten.extend_from_slice(filters);
        Ok(Forgotten::default())
    }

    fn batch_limit(&self) -> usize {
        self.limit
    }
}

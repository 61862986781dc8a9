//! How long programming takes.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use proxier::{Proxier, model::Store};
use proxier_netlink::{Event, Events, NetNs, nft::MessageKind};
use serde::{Deserialize, Serialize};

use super::{Job, counter::Instructions, sync};
use crate::world::{self, Pool, World};

/// What was measured, one value each time.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Samples {
    pub(crate) model_ms: Vec<f64>,
    pub(crate) first_sync_ms: Vec<f64>,
    pub(crate) objects: usize,
    pub(crate) batches: usize,
    pub(crate) change_us: Vec<f64>,
    pub(crate) change_ops_max: usize,
    pub(crate) plan_us: Vec<f64>,
    pub(crate) instructions: Vec<f64>,
    pub(crate) added_us: Vec<f64>,
    pub(crate) removed_us: Vec<f64>,
    pub(crate) rolling_us: Vec<f64>,
    pub(crate) rolling_ops_max: usize,
    pub(crate) restart_ms: Vec<f64>,
    pub(crate) restart_ops: usize,
    pub(crate) restart_commits: usize,
    pub(crate) cleanup_ms: Vec<f64>,
}

impl Samples {
    /// Puts the values of another run to these.
    pub(crate) fn merge(&mut self, other: Self) {
        self.model_ms.extend(other.model_ms);
        self.first_sync_ms.extend(other.first_sync_ms);
        self.change_us.extend(other.change_us);
        self.plan_us.extend(other.plan_us);
        self.instructions.extend(other.instructions);
        self.added_us.extend(other.added_us);
        self.removed_us.extend(other.removed_us);
        self.rolling_us.extend(other.rolling_us);
        self.restart_ms.extend(other.restart_ms);
        self.cleanup_ms.extend(other.cleanup_ms);
        let most = |mine: &mut usize, theirs| *mine = (*mine).max(theirs);
        most(&mut self.objects, other.objects);
        most(&mut self.batches, other.batches);
        most(&mut self.change_ops_max, other.change_ops_max);
        most(&mut self.rolling_ops_max, other.rolling_ops_max);
        most(&mut self.restart_ops, other.restart_ops);
        most(&mut self.restart_commits, other.restart_commits);
    }
}

/// A node while it is measured.
struct Node<'a> {
    job: &'a Job,
    store: Store,
    proxier: Box<dyn Proxier>,
    samples: Samples,
    /// Changes made so far.
    step: usize,
}

pub(super) async fn measure(
    job: &Job,
    changes: usize,
    rolling: usize,
) -> Result<Samples, Box<dyn Error>> {
    let proxier = job.open().await?;
    let samples = Samples::default();
    let mut node = Node { job, store: world::store(), proxier, samples, step: 0 };
    node.first_sync().await?;
    node.changes(changes).await?;
    node.plans(changes.min(100)).await?;
    node.services(changes.min(100)).await?;
    // The proxier that restarts finds the world as it was.
    let mut node = node.restart().await?;
    node.rolling(rolling).await?;
    node.cleanup().await
}

/// Whether a loop goes on: it makes a few steps in any case, then as many as there is time for.
fn goes_on(done: usize, want: usize, began: Instant, part: Duration) -> bool {
    done < want && (done < 4 || began.elapsed() < part)
}

impl Node<'_> {
    async fn first_sync(&mut self) -> Result<(), Box<dyn Error>> {
        let [slices, services] = self.job.world.lists();
        let began = Instant::now();
        self.store.apply(slices);
        self.store.apply(services);
        let update = self.store.take().ok_or("an empty cluster")?;
        self.samples.model_ms.push(began.elapsed().as_secs_f64() * 1e3);
        let synced = sync(&mut *self.proxier, update).await?;
        self.samples.first_sync_ms.push(synced.us / 1e3);
        (self.samples.objects, self.samples.batches) = (synced.ops, synced.batches);
        Ok(())
    }

    async fn changes(&mut self, want: usize) -> Result<(), Box<dyn Error>> {
        // The first ones make what a new pool size needs, once.
        for _ in 0..4 {
            self.one().await?;
        }
        let began = Instant::now();
        let mut done = 0;
        while goes_on(done, want, began, self.job.part) {
            let us = self.one().await?;
            self.samples.change_us.push(us);
            done += 1;
        }
        Ok(())
    }

    async fn one(&mut self) -> Result<f64, Box<dyn Error>> {
        let event = self.next();
        self.store.apply(event);
        let update = self.store.take().ok_or("a change that changes nothing")?;
        let synced = sync(&mut *self.proxier, update).await?;
        if synced.visited != 1 {
            return Err(format!("{} fragments visited for one change", synced.visited).into());
        }
        self.samples.change_ops_max = self.samples.change_ops_max.max(synced.ops);
        Ok(synced.us)
    }

    fn next(&mut self) -> proxier::model::Event {
        self.step += 1;
        self.job.world.change(self.step - 1)
    }

    /// Plans and instructions, apart from the times: asking for a plan warms the caches.
    async fn plans(&mut self, want: usize) -> Result<(), Box<dyn Error>> {
        let mut counter = Instructions::open();
        let (began, mut done) = (Instant::now(), 0);
        while goes_on(done, want, began, self.job.part) {
            let event = self.next();
            self.store.apply(event);
            let update = self.store.take().ok_or("a change that changes nothing")?;
            let planning = Instant::now();
            let plan = self.proxier.plan(&update);
            self.samples.plan_us.push(planning.elapsed().as_secs_f64() * 1e6);
            counter.begin();
            let synced = sync(&mut *self.proxier, update).await?;
            self.samples.instructions.extend(counter.end());
            if plan.ops.len() != synced.ops {
                let (planned, done) = (plan.ops.len(), synced.ops);
                return Err(format!("{planned} operations planned, {done} done").into());
            }
            done += 1;
        }
        // Every fourth change leaves a Service as it was in the beginning.
        while !self.step.is_multiple_of(4) {
            self.one().await?;
        }
        Ok(())
    }

    /// Services that come and go.
    async fn services(&mut self, want: usize) -> Result<(), Box<dyn Error>> {
        let world = self.job.world;
        let (began, mut done) = (Instant::now(), 0);
        while goes_on(done, want, began, self.job.part) {
            let us = self.all(world.added(done)).await?.us;
            self.samples.added_us.push(us);
            let us = self.all(World::removed(world.services + done)).await?.us;
            self.samples.removed_us.push(us);
            done += 1;
        }
        Ok(())
    }

    async fn all(
        &mut self,
        events: Vec<proxier::model::Event>,
    ) -> Result<super::Synced, Box<dyn Error>> {
        for event in events {
            self.store.apply(event);
        }
        let update = self.store.take().ok_or("a change that changes nothing")?;
        sync(&mut *self.proxier, update).await
    }

    /// Another proxier takes over; a listener says whether anything was written.
    async fn restart(self) -> Result<Self, Box<dyn Error>> {
        let Self { job, store, proxier, mut samples, step } = self;
        drop(proxier);
        let mut events = Events::open(&NetNs::Path(job.netns.clone()))?;
        let mut proxier = job.open().await?;
        let synced = sync(&mut *proxier, store.reset()).await?;
        samples.restart_ms.push(synced.us / 1e3);
        samples.restart_ops = synced.ops;
        // What was committed before is in the socket already.
        let grace = Duration::from_millis(20);
        while let Ok(event) = tokio::time::timeout(grace, events.next()).await {
            let commits = match event? {
                Event::Change(change) => change.kind == MessageKind::NEWGEN,
                Event::Lost | _ => true,
            };
            samples.restart_commits += usize::from(commits);
        }
        Ok(Self { job, store, proxier, samples, step })
    }

    async fn rolling(&mut self, endpoints: usize) -> Result<(), Box<dyn Error>> {
        let pool = Pool { index: self.job.world.services, endpoints };
        self.all(pool.added()).await?;
        let (began, mut done) = (Instant::now(), 0);
        while goes_on(done, endpoints, began, self.job.part) {
            done += 1;
            let synced = self.all(vec![pool.replaced(done)]).await?;
            self.samples.rolling_us.push(synced.us);
            self.samples.rolling_ops_max = self.samples.rolling_ops_max.max(synced.ops);
        }
        Ok(())
    }

    async fn cleanup(mut self) -> Result<Samples, Box<dyn Error>> {
        let began = Instant::now();
        self.proxier.cleanup().await?;
        self.samples.cleanup_ms.push(began.elapsed().as_secs_f64() * 1e3);
        Ok(self.samples)
    }
}

//! What takes longer: a Service with very many endpoints, and very many changes.

use std::{error::Error, time::Instant};

use proxier::{Proxier, model::Store};

use super::{Job, Synced, status_kib, sync};
use crate::{
    schema::{PoolReport, SoakReport, Spread},
    world::{self, Pool, World},
};

/// A node that holds the job's world.
async fn programmed(job: &Job) -> Result<(Store, Box<dyn Proxier>), Box<dyn Error>> {
    let mut store = world::store();
    for event in job.world.lists() {
        store.apply(event);
    }
    let mut proxier = job.open().await?;
    sync(&mut *proxier, store.take().ok_or("an empty cluster")?).await?;
    Ok((store, proxier))
}

async fn apply(
    store: &mut Store,
    proxier: &mut dyn Proxier,
    events: Vec<proxier::model::Event>,
) -> Result<Synced, Box<dyn Error>> {
    for event in events {
        store.apply(event);
    }
    sync(proxier, store.take().ok_or("a change that changes nothing")?).await
}

/// One endpoint of very many goes, comes back, is replaced.
pub(super) async fn pool(job: &Job, endpoints: usize) -> Result<PoolReport, Box<dyn Error>> {
    let (mut store, mut proxier) = programmed(job).await?;
    let pool = Pool { index: job.world.services, endpoints };
    apply(&mut store, &mut *proxier, pool.added()).await?;
    let (mut times, mut ops_max) = (Vec::new(), 0);
    // The first pair makes what the pool sizes need, once.
    for round in 0..8 {
        let number = (round * 7919) % endpoints;
        for event in [pool.without(number), pool.restored(number)] {
            let synced = apply(&mut store, &mut *proxier, vec![event]).await?;
            if round > 0 {
                times.push(synced.us);
                ops_max = ops_max.max(synced.ops);
            }
        }
    }
    let synced = apply(&mut store, &mut *proxier, vec![pool.replaced(1)]).await?;
    times.push(synced.us);
    let change_us = Spread::of(&times).ok_or("nothing measured")?;
    let ops_max = ops_max.max(synced.ops);
    Ok(PoolReport { mode: job.mode.clone(), endpoints, ops_max, change_us })
}

/// Random changes, then a comparison of the kernel with the prediction.
pub(super) async fn soak(job: &Job, changes: usize) -> Result<SoakReport, Box<dyn Error>> {
    let (mut store, mut proxier) = programmed(job).await?;
    let (world, mut random) = (job.world, Random(0x9e37_79b9_7f4a_7c15));
    let mut extra = 0;
    let (mut early_kib, mut done, began) = (status_kib("VmRSS:")?, 0, Instant::now());
    while done < changes && began.elapsed() < job.part {
        done += 1;
        let events = match random.below(8) {
            0 => {
                extra += 1;
                world.added(extra)
            }
            1 if extra > 0 => {
                extra -= 1;
                World::removed(world.services + extra + 1)
            }
            what => vec![world.one_endpoint(random.below(world.services), what % 4)],
        };
        for event in events {
            store.apply(event);
        }
        // Some changes change nothing, as in real clusters.
        if let Some(update) = store.take() {
            sync(&mut *proxier, update).await?;
        }
        if done == changes.div_ceil(10) {
            early_kib = status_kib("VmRSS:")?;
        }
    }
    let late_kib = status_kib("VmRSS:")?;
    let repaired = proxier.audit().await?.ops.total();
    let (mode, services) = (job.mode.clone(), world.services);
    Ok(SoakReport { mode, services, changes: done, repaired, early_kib, late_kib })
}

/// Marsaglia's xorshift: the same changes each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(bound).unwrap_or(1)).unwrap_or_default()
    }
}

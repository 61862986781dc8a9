//! A node that is programmed and stays so: for its memory, and for packets.

use std::error::Error;

use tokio::io::AsyncReadExt;

use super::{Job, say, status_kib, sync};
use crate::{schema::Memory, world};

/// Programs the world, makes some changes, tells the memory and waits for the end of its input.
pub(super) async fn hold(job: &Job) -> Result<(), Box<dyn Error>> {
    let mut store = world::store();
    for event in job.world.lists() {
        store.apply(event);
    }
    let mut proxier = job.open().await?;
    sync(&mut *proxier, store.take().ok_or("an empty cluster")?).await?;
    for step in 0..16 {
        store.apply(job.world.change(step));
        if let Some(update) = store.take() {
            sync(&mut *proxier, update).await?;
        }
    }
    say(&Memory { resident_kib: status_kib("VmRSS:")?, peak_kib: status_kib("VmHWM:")? })?;
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

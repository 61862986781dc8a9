//! Session affinity on a real kernel: clients that have been here before.

use std::{collections::BTreeMap, fs, time::Duration};

use proxier_core::sim::{Sim, Traits};
use tokio::runtime::Runtime;

use super::{RealError, look::enough, rig::Rig};
use crate::cases::{CaseWorld, FlowVerdict, Verdict, flow::Flow};

/// A history that comes about at random is waited for so many times as long as it takes on average.
const PATIENCE: usize = 12;

impl Rig {
    /// Looks at the flow of a client with earlier connections, again and again, each time with a
    /// memory that holds nothing else.
    ///
    /// Connections that are older than the timeout were never made, and so were those to endpoints
    /// that are gone: that much is taken on trust.
    pub(in super::super) fn judge_again(
        &mut self,
        runtime: &Runtime,
        world: &CaseWorld,
        flow: &Flow,
        earlier: &[(Flow, Duration)],
    ) -> Verdict {
        let seen = self.seen_again(runtime, world, flow, earlier);
        let seen = seen.unwrap_or_else(|error| FlowVerdict::Other(error.to_string()));
        self.verdict(flow, &seen)
    }

    fn seen_again(
        &mut self,
        runtime: &Runtime,
        world: &CaseWorld,
        flow: &Flow,
        earlier: &[(Flow, Duration)],
    ) -> Result<FlowVerdict, RealError> {
        let earlier = remembered(world, earlier)?;
        self.flush(runtime, flow)?;
        let FlowVerdict::Dnat(to) = &flow.expected else {
            return self.seen(runtime, world, flow, None);
        };
        let rounds = enough(to.len());
        let nothing = CaseWorld { services: Vec::new(), slices: Vec::new(), ..world.clone() };
        let (mut found, mut made) = (BTreeMap::new(), 0);
        for _ in 0..rounds * PATIENCE {
            if made == rounds {
                break;
            }
            self.program(runtime, &nothing)?;
            self.forget()?;
            let mut as_told = true;
            for earlier in &earlier {
                let seen = self.seen(runtime, world, earlier, Some(1))?;
                as_told &= earlier.expected.allows(&seen);
            }
            if !as_told {
                continue;
            }
            made += 1;
            let seen = self.seen(runtime, world, flow, Some(1))?;
            let FlowVerdict::Dnat(to) = seen else { return Ok(seen) };
            found.extend(to);
        }
        if made < rounds {
            let what = format!("the history came about {made} times only");
            return Ok(FlowVerdict::Other(what));
        }
        Ok(FlowVerdict::Dnat(found))
    }

    /// Empties the lists of the kernel that outlive the rules which use them.
    // KERNEL: rules are freed in the background, and xt_recent's lists with the last rule that names
    // them; a slash empties a list (net/netfilter/xt_recent.c, recent_mt_proc_write, v6.12).
    fn forget(&self) -> Result<(), RealError> {
        self.node().run(|| {
            let Ok(lists) = fs::read_dir("/proc/thread-self/net/xt_recent") else { return };
            for list in lists.flatten() {
                // One that is gone in the meantime has nothing to forget.
                fs::write(list.path(), "/").ok();
            }
        })?;
        Ok(())
    }
}

/// The earlier connections that affinity still knows.
fn remembered(world: &CaseWorld, earlier: &[(Flow, Duration)]) -> Result<Vec<Flow>, RealError> {
    let (store, _) = world.store().map_err(RealError::World)?;
    let (node, traits) = (store.env().view(), Traits::of(proxier_core::Mode::Iptables));
    let sim = Sim::new(&node, &traits, &store);
    let counts = |(flow, age): &&(Flow, Duration)| {
        let Some(matched) = sim.trace(&flow.packet, &[]).matched else { return false };
        let Some(fragment) = store.fragment(&matched.id) else { return false };
        let FlowVerdict::Dnat(to) = &flow.expected else { return false };
        let reachable = fragment.reachable();
        let timeout = fragment.affinity.map(|it| Duration::from_secs(it.get().into()));
        timeout.is_none_or(|timeout| *age <= timeout)
            && to.keys().all(|addr| reachable.iter().any(|member| member.addr == *addr))
    };
    Ok(earlier.iter().filter(counts).map(|(flow, _)| flow.clone()).collect())
}

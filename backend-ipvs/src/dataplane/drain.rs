//! Destinations that are to go: no new connections, and gone once the last one is.
//!
//! The kernel's weight 0 is all there is to remember: the next process finds them, and goes on.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use proxier_core::spi::CommitError;
use proxier_netlink::ipvs::Batch as IpvsBatch;
use tracing::debug;

use super::{
    IpvsDataplane,
    servers::{dest, failed, is_udp, refused, virtual_server},
};
use crate::object::ServerId;

/// How often connections are looked at while there are any.
const POLL: Duration = Duration::from_secs(10);

/// Destinations that are to go, and since when.
#[derive(Debug, Default)]
pub(super) struct Draining(BTreeMap<ServerId, BTreeMap<SocketAddr, Instant>>);

impl Draining {
    pub(super) fn has(&self, id: ServerId, to: SocketAddr) -> bool {
        self.0.get(&id).is_some_and(|it| it.contains_key(&to))
    }

    /// Keeps the time of one that is known.
    pub(super) fn note(&mut self, id: ServerId, to: SocketAddr, now: Instant) {
        self.0.entry(id).or_default().entry(to).or_insert(now);
    }

    pub(super) fn forget(&mut self, id: ServerId, to: SocketAddr) {
        if let Some(of_server) = self.0.get_mut(&id) {
            of_server.remove(&to);
            if of_server.is_empty() {
                self.0.remove(&id);
            }
        }
    }

    pub(super) fn forget_server(&mut self, id: ServerId) {
        self.0.remove(&id);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ServerId, SocketAddr)> {
        self.0.iter().flat_map(|(id, all)| all.keys().map(|to| (*id, *to)))
    }

    /// When to look again, if ever.
    fn next(&self, now: Instant, limit: Option<Duration>) -> Option<Duration> {
        let since = self.0.values().flat_map(BTreeMap::values).min()?;
        let left = limit.map(|limit| (*since + limit).saturating_duration_since(now));
        Some(left.map_or(POLL, |left| left.min(POLL)))
    }

    /// What is to become of a destination that is to go and has so many connections.
    fn is_over(
        &self,
        id: ServerId,
        to: SocketAddr,
        open: u32,
        now: Instant,
        limit: Option<Duration>,
    ) -> bool {
        let since = self.0.get(&id).and_then(|all| all.get(&to));
        let expired =
            limit.zip(since).is_some_and(|(limit, since)| now.duration_since(*since) >= limit);
        open == 0 || expired
    }
}

impl IpvsDataplane {
    /// Plans the end of destinations: at once if nobody is connected, else later.
    pub(super) async fn drain(
        &mut self,
        batch: &mut IpvsBatch,
        going: BTreeMap<ServerId, Vec<SocketAddr>>,
    ) -> Result<(), CommitError> {
        let now = Instant::now();
        for (id, going) in going {
            let key = virtual_server(id);
            for it in self.ipvs.dests(key).await.map_err(failed)? {
                let to = SocketAddr::new(it.dest.address, it.dest.port);
                if !going.contains(&to) {
                    continue;
                }
                let open = it.active.saturating_add(it.inactive);
                let at_once = self.config.drain == Some(Duration::ZERO);
                if open == 0
                    || at_once
                    || is_udp(id, self.config.masquerade_bit)
                    || self.cannot_drain(id).await?
                {
                    batch.del_dest(key, to.ip(), to.port());
                } else {
                    batch.set_dest(key, &dest(to, 0));
                    self.draining.note(id, to, now);
                }
            }
        }
        Ok(())
    }

    /// Whether the scheduler leads to destinations that are to go, and refuses there.
    // KERNEL: `dh` has nothing to fall back on (net/netfilter/ipvs/ip_vs_dh.c, v6.12).
    async fn cannot_drain(&mut self, id: ServerId) -> Result<bool, CommitError> {
        let entry = self.ipvs.service(virtual_server(id)).await.map_err(failed)?;
        Ok(entry.is_some_and(|it| it.service.scheduler == "dh"))
    }

    /// Removes what nobody is connected to any more, and says when to look again.
    pub(super) async fn settle(&mut self, now: Instant) -> Result<Option<Duration>, CommitError> {
        let limit = self.config.drain;
        let mut batch = IpvsBatch::new();
        let ids: Vec<_> = self.draining.0.keys().copied().collect();
        for id in ids {
            let key = virtual_server(id);
            let at_once = self.cannot_drain(id).await?;
            let there: BTreeMap<_, _> = self
                .ipvs
                .dests(key)
                .await
                .map_err(failed)?
                .into_iter()
                .map(|it| (SocketAddr::new(it.dest.address, it.dest.port), it))
                .collect();
            let known: Vec<_> =
                self.draining.0.get(&id).into_iter().flat_map(BTreeMap::keys).copied().collect();
            for to in known {
                match there.get(&to) {
                    Some(it) if it.dest.weight == 0 => {
                        let open = it.active.saturating_add(it.inactive);
                        if at_once || self.draining.is_over(id, to, open, now, limit) {
                            debug!(server = %id, %to, open, "drained");
                            batch.del_dest(key, to.ip(), to.port());
                            self.draining.forget(id, to);
                        }
                    }
                    // Somebody else removed it, or gave it work again.
                    Some(_) | None => self.draining.forget(id, to),
                }
            }
        }
        if let Some(refusal) = self.execute(&batch).await? {
            return Err(refused(&refusal, &[]));
        }
        Ok(self.draining.next(now, limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_goes_with_its_last_connection_or_at_the_limit() {
        let id = ServerId::Mark(proxier_core::Family::V4, 7);
        let to: SocketAddr = ([10, 61, 3, 21], 8080).into();
        let (start, limit) = (Instant::now(), Some(Duration::from_secs(12)));
        let mut draining = Draining::default();
        assert_eq!(draining.next(start, limit), None);
        draining.note(id, to, start);
        draining.note(id, to, start + POLL);
        assert_eq!(draining.next(start, None), Some(POLL));
        assert_eq!(draining.next(start + POLL, limit), Some(Duration::from_secs(2)));
        assert!(draining.is_over(id, to, 0, start, limit));
        assert!(!draining.is_over(id, to, 1, start + POLL, limit));
        assert!(draining.is_over(id, to, 1, start + POLL * 2, limit));
        assert!(!draining.is_over(id, to, 1, start + POLL * 200, None));
        draining.forget(id, to);
        assert!(!draining.has(id, to) && draining.iter().next().is_none());
    }
}

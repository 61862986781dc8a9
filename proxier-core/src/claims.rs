//! Two Services wanting one frontend: the oldest wins, always, and the loser is reported.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
};

use crate::{
    ir::{FrontendKey, WayIn},
    name::{FragmentId, Protocol},
};

/// One Service port that wants a frontend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Claim {
    /// When its Service was created; unknown counts as youngest.
    pub created: Option<Arc<str>>,
    /// Who wants it.
    pub id: FragmentId,
}

impl Claim {
    fn age_order(&self, other: &Self) -> Ordering {
        let rank = |claim: &Self| (claim.created.is_none(), claim.created.clone());
        rank(self).cmp(&rank(other)).then_with(|| self.id.cmp(&other.id))
    }
}

/// Who wants which frontend.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// Oldest first, never empty.
    by_key: BTreeMap<FrontendKey, Vec<Claim>>,
    contested: BTreeSet<FrontendKey>,
}

impl Claims {
    /// Adds a claim. Returns who loses the frontend by it.
    pub(crate) fn add(&mut self, key: FrontendKey, claim: Claim) -> Option<FragmentId> {
        // Hardly any frontend has two: room for one.
        let claims = self.by_key.entry(key).or_insert_with(|| Vec::with_capacity(1));
        let place = claims.partition_point(|known| known.age_order(&claim).is_lt());
        if claims.get(place) == Some(&claim) {
            return None;
        }
        let loser = claims.first().filter(|_| place == 0).map(|claim| claim.id.clone());
        claims.insert(place, claim);
        if claims.len() > 1 {
            self.contested.insert(key);
        }
        loser
    }

    /// Takes a claim back. Returns who gains the frontend by it.
    pub(crate) fn remove(&mut self, key: FrontendKey, id: &FragmentId) -> Option<FragmentId> {
        let claims = self.by_key.get_mut(&key)?;
        let place = claims.iter().position(|claim| claim.id == *id)?;
        claims.remove(place);
        let heir = claims.first().filter(|_| place == 0).map(|claim| claim.id.clone());
        if claims.len() < 2 {
            self.contested.remove(&key);
        }
        if claims.is_empty() {
            self.by_key.remove(&key);
        }
        heir
    }

    /// Says whether `id` is the one to have the frontend.
    pub(crate) fn owns(&self, key: &FrontendKey, id: &FragmentId) -> bool {
        self.by_key.get(key).and_then(|claims| claims.first()).is_some_and(|first| first.id == *id)
    }

    /// Who has the frontend.
    pub(crate) fn owner(&self, key: &FrontendKey) -> Option<&FragmentId> {
        self.by_key.get(key).and_then(|claims| claims.first()).map(|claim| &claim.id)
    }

    /// The frontends at an address, and who has them. O(log n + found).
    pub(crate) fn at(&self, ip: IpAddr) -> impl Iterator<Item = (&FrontendKey, &FragmentId)> {
        let way_in = WayIn::Address(ip);
        let first = FrontendKey { way_in, port: NonZeroU16::MIN, protocol: Protocol::Sctp };
        let last = FrontendKey { way_in, port: NonZeroU16::MAX, protocol: Protocol::Udp };
        let found = self.by_key.range(first..=last);
        found.filter_map(|(key, claims)| Some((key, &claims.first()?.id)))
    }

    /// Every frontend that more than one wants: who has it, and who has not.
    pub(crate) fn contested(
        &self,
    ) -> impl Iterator<Item = (FrontendKey, &FragmentId, impl Iterator<Item = &FragmentId>)> {
        self.contested.iter().filter_map(|key| {
            let (winner, losers) = self.by_key.get(key)?.split_first()?;
            Some((*key, &winner.id, losers.iter().map(|claim| &claim.id)))
        })
    }
}

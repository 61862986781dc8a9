//! The smallest backend that uses everything: own and shared objects, slots, every stage.

use std::{collections::BTreeMap, net::SocketAddr};

use crate::{
    ir::{Balance, Fragment, NodeView, Pool, Verdict},
    name::Family,
    proxier::{Capabilities, Mode, Spreading},
    spi::{Backend, Objects, PlanError, Stage},
};

/// A backend whose objects are lines of text: a template for authors, and the subject of the
/// engine's own tests.
///
/// Frontends, pool slots and per-fragment settings are own objects; one object per pool size is
/// shared. Endpoints keep their slots, so plans depend on history and the memo matters.
#[derive(Debug)]
pub struct Toy {
    capabilities: Capabilities,
}

impl Toy {
    /// A backend whose batches are atomic or not. It refuses fragments with affinity and those that
    /// spread by source, so that tests have something to refuse.
    #[must_use]
    pub fn new(atomic: bool) -> Self {
        let spreading = Spreading {
            balance: &[Balance::Random, Balance::RoundRobin],
            weights: true,
            counters: true,
        };
        let capabilities =
            Capabilities { mode: Mode::Userspace, atomic, spreading, limits: Vec::new() };
        Self { capabilities }
    }
}

impl Backend for Toy {
    type Key = String;
    type Value = String;
    type Memo = BTreeMap<Pool, Vec<SocketAddr>>;

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn skeleton(&self, family: Family, node: &NodeView) -> BTreeMap<String, String> {
        let view = node.of(family);
        [("0 table".to_owned(), String::new()), ("0 node".to_owned(), format!("{view:?}"))].into()
    }

    fn compile(
        &self,
        _node: &NodeView,
        fragment: &Fragment,
        memo: &Self::Memo,
        out: &mut Objects<String, String>,
    ) -> Result<Self::Memo, PlanError> {
        if fragment.affinity.is_some() {
            return Err(PlanError::Unsupported { mode: "toy", reason: "affinity".to_owned() });
        }
        let mut slots = Self::Memo::new();
        for pool in [Pool::Cluster, Pool::Local] {
            let members: Vec<_> = fragment.pool(pool).iter().map(|member| member.addr).collect();
            let placed = place(memo.get(&pool).map(Vec::as_slice).unwrap_or_default(), &members);
            for (slot, addr) in placed.iter().enumerate() {
                out.own(format!("1 slot {} {pool:?} {slot}", fragment.id), addr.to_string());
            }
            for member in fragment.pool(pool).iter().filter(|member| member.weight.get() > 1) {
                let key = format!("1 weight {} {pool:?} {}", fragment.id, member.addr);
                out.own(key, member.weight.to_string());
            }
            if !placed.is_empty() {
                out.share(format!("1 size {}", placed.len()), String::new());
            }
            slots.insert(pool, placed);
        }
        for frontend in &fragment.frontends {
            let rows = frontend.verdicts.rows().map(|verdict| match verdict {
                Verdict::Forward { pool, snat } => {
                    format!("{pool:?} of {} {snat:?}", fragment.pool(pool).len())
                }
                Verdict::Drop | Verdict::Reject => verdict.to_string(),
            });
            let Fragment { balance, counters, .. } = fragment;
            let rows = format!("{}; {balance}; counted: {counters}", rows.join("; "));
            out.own(format!("2 frontend {}", frontend.key), rows);
        }
        Ok(slots)
    }

    fn recall(&self, fragment: &Fragment, dumped: &BTreeMap<String, String>) -> Self::Memo {
        let slots = |pool: Pool| {
            let prefix = format!("1 slot {} {pool:?} ", fragment.id);
            let found =
                dumped.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
            found.filter_map(|(_, addr)| addr.parse().ok()).collect()
        };
        [Pool::Cluster, Pool::Local].map(|pool| (pool, slots(pool))).into()
    }

    fn stage(&self, key: &String) -> Stage {
        match key.as_bytes().first() {
            Some(b'0') => Stage::Base,
            Some(b'1') => Stage::Body,
            _ => Stage::Entry,
        }
    }
}

/// Keeps the slots of survivors; holes are filled from the end, newcomers go where there is room.
fn place(old: &[SocketAddr], members: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut placed: Vec<Option<SocketAddr>> =
        old.iter().map(|addr| members.contains(addr).then_some(*addr)).collect();
    let mut newcomers = members.iter().filter(|addr| !old.contains(addr));
    for hole in placed.iter_mut().filter(|slot| slot.is_none()) {
        *hole = newcomers.next().copied();
    }
    placed.extend(newcomers.map(|addr| Some(*addr)));
    let mut dense: Vec<SocketAddr> = Vec::with_capacity(members.len());
    let mut tail: Vec<_> = placed.split_off(placed.len().min(members.len()));
    for slot in placed {
        let moved = || std::iter::from_fn(|| tail.pop()).flatten().next();
        dense.extend(slot.or_else(moved));
    }
    dense
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survivors_keep_their_slots_and_the_last_one_fills_the_hole() {
        let addr = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let old = [addr(1), addr(2), addr(3), addr(4)];
        assert_eq!(place(&old, &[addr(1), addr(3), addr(4)]), [addr(1), addr(4), addr(3)]);
        assert_eq!(place(&old, &[addr(2), addr(9)]), [addr(9), addr(2)]);
        assert_eq!(place(&old, &[addr(4)]), [addr(4)]);
        assert_eq!(place(&[], &[addr(4), addr(5)]), [addr(4), addr(5)]);
        assert_eq!(place(&old, &old), old);
    }
}

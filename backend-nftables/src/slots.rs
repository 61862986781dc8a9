//! Endpoints keep their slots. Pure.

use std::net::{IpAddr, Ipv4Addr};

use proxier_core::ir::Member;

use crate::object::Endpoint;

/// Gives endpoints slots so that one change moves at most one other endpoint.
///
/// Survivors of `old` stay; newcomers fill holes, then go behind; the last ones move into holes that
/// are left. `members` is sorted; who is in it several times has several slots. O(n log n).
pub(crate) fn place(old: &[Endpoint], members: &[Endpoint]) -> Box<[Endpoint]> {
    if old.is_empty() {
        return members.into();
    }
    // How many copies of a member have a slot, at its first place among the members.
    let mut placed_of = vec![0; members.len()];
    let mut placed: Vec<Option<Endpoint>> = old
        .iter()
        .map(|endpoint| {
            let first = members.partition_point(|member| member < endpoint);
            let count = placed_of.get_mut(first)?;
            let has_more = members.get(first + *count) == Some(endpoint);
            *count += usize::from(has_more);
            has_more.then_some(*endpoint)
        })
        .collect();
    let copies = members.chunk_by(|a, b| a == b);
    let mut first = 0;
    let mut newcomers = copies.flat_map(|copies| {
        let placed = placed_of.get(first).copied().unwrap_or_default();
        first += copies.len();
        copies.iter().skip(placed).copied()
    });
    for hole in placed.iter_mut().filter(|slot| slot.is_none()) {
        *hole = newcomers.next();
    }
    placed.extend(newcomers.map(Some));
    let mut tail = placed.split_off(placed.len().min(members.len()));
    let last = || std::iter::from_fn(|| tail.pop()).flatten().next();
    let mut last = last;
    placed.into_iter().filter_map(|slot| slot.or_else(&mut last)).collect()
}

/// The members of a pool, each as often as its weight says: reduced to the smallest numbers, and
/// rounded where these are too large. Sorted.
pub(crate) fn copies(members: &[Member]) -> Vec<Endpoint> {
    let weight = |member: &Member| usize::from(member.weight.get());
    let shared = members.iter().map(weight).fold(0, gcd).max(1);
    let total: usize = members.iter().map(|member| weight(member) / shared).sum();
    let most = MOST_COPIES.max(members.len());
    let mut copies = Vec::with_capacity(total.min(most));
    for member in members {
        let endpoint = Endpoint { ip: member.addr.ip(), port: member.addr.port() };
        let exact = weight(member) / shared;
        let count = if total <= most { exact } else { (exact * most / total).max(1) };
        copies.extend(std::iter::repeat_n(endpoint, count));
    }
    copies
}

/// Slots that weights may take.
const MOST_COPIES: usize = 4096;

const fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Stands for a slot that was lost.
pub(crate) const NOBODY: Endpoint = Endpoint { ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), port: 0 };

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    fn endpoints(ports: impl IntoIterator<Item = u16>) -> Vec<Endpoint> {
        let ip = Ipv4Addr::new(10, 0, 0, 1).into();
        ports.into_iter().map(|port| Endpoint { ip, port }).collect()
    }

    #[test]
    fn survivors_keep_their_slots_and_the_last_one_fills_the_hole() {
        let old = endpoints([1, 2, 3, 4]);
        assert_eq!(*place(&old, &endpoints([1, 3, 4])), endpoints([1, 4, 3]));
        assert_eq!(*place(&old, &endpoints([2, 9])), endpoints([9, 2]));
        assert_eq!(*place(&old, &endpoints([4])), endpoints([4]));
        assert_eq!(*place(&[], &endpoints([4, 5])), endpoints([4, 5]));
        assert_eq!(*place(&old, &old), old);
        let mut holed = old.clone();
        holed[1] = NOBODY;
        assert_eq!(*place(&holed, &old), old);
        holed[1] = old[0];
        assert_eq!(*place(&holed, &endpoints([1, 3])), endpoints([1, 3]), "a duplicate is a hole");
    }

    #[test]
    fn weights_are_copies_in_the_smallest_numbers() {
        let pool = |weights: &[u16]| -> Vec<Member> {
            let member = |(port, weight): (u16, &u16)| Member {
                weight: (*weight).try_into().unwrap(),
                ..Member::new(([10, 0, 0, 1], port).into(), false)
            };
            (1..).zip(weights).map(member).collect()
        };
        assert_eq!(copies(&pool(&[1, 1])), endpoints([1, 2]));
        assert_eq!(copies(&pool(&[300, 300])), endpoints([1, 2]));
        assert_eq!(copies(&pool(&[10, 30])), endpoints([1, 2, 2, 2]));
        let many = copies(&pool(&[&[1000; 9][..], &[1]].concat()));
        assert!(many.len() <= MOST_COPIES, "{}", many.len());
        assert_eq!(many.iter().filter(|it| it.port == 10).count(), 1, "nobody is left out");
        // One more copy takes one slot.
        let before = place(&[], &endpoints([1, 2, 2, 3]));
        assert_eq!(*place(&before, &endpoints([1, 2, 2, 2, 3])), endpoints([1, 2, 2, 3, 2]));
        assert_eq!(*place(&before, &endpoints([1, 2, 3])), endpoints([1, 2, 3]));
    }

    proptest! {
        #[test]
        fn everybody_has_one_slot_and_few_move(
            before in btree_set(1_u16..40, 0..20),
            after in btree_set(1_u16..40, 0..20),
        ) {
            let gone = before.difference(&after).count();
            let (before, after) = (endpoints(before), endpoints(after));
            let old = place(&[], &before);
            let new = place(&old, &after);
            let mut sorted = new.to_vec();
            sorted.sort();
            prop_assert_eq!(sorted, after);
            let moved = old
                .iter()
                .enumerate()
                .filter(|(slot, it)| new.contains(it) && new.get(*slot) != Some(*it))
                .count();
            prop_assert!(moved <= gone);
            prop_assert_eq!(place(&new, &endpoints(new.iter().map(|it| it.port).collect::<std::collections::BTreeSet<_>>())), new);
        }
    }
}

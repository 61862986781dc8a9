//! Endpoints keep their slots. Pure.

use std::net::{IpAddr, Ipv4Addr};

use crate::object::Endpoint;

/// Gives endpoints slots so that one change moves at most one other endpoint.
///
/// Survivors of `old` stay; newcomers fill holes, then go behind; the last ones move into holes that
/// are left. `members` is sorted, without duplicates. O(n log n).
pub(crate) fn place(old: &[Endpoint], members: &[Endpoint]) -> Box<[Endpoint]> {
    if old.is_empty() {
        return members.into();
    }
    let mut left = vec![true; members.len()];
    let mut placed: Vec<Option<Endpoint>> = old
        .iter()
        .map(|endpoint| {
            let free = left.get_mut(members.binary_search(endpoint).ok()?)?;
            std::mem::take(free).then_some(*endpoint)
        })
        .collect();
    let mut newcomers = members.iter().zip(left).filter_map(|(it, new)| new.then_some(*it));
    for hole in placed.iter_mut().filter(|slot| slot.is_none()) {
        *hole = newcomers.next();
    }
    placed.extend(newcomers.map(Some));
    let mut tail = placed.split_off(placed.len().min(members.len()));
    let last = || std::iter::from_fn(|| tail.pop()).flatten().next();
    let mut last = last;
    placed.into_iter().filter_map(|slot| slot.or_else(&mut last)).collect()
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

//! Consistent hashing: tables that spread hashes over members by weight, and change little when
//! members come and go.
//!
//! The method is that of Maglev (Eisenbud et al., NSDI 2016): each member has its own order of all
//! places, and they take turns in claiming the next free one. A member's order depends on its address
//! alone, so every node and every mode that hashes alike sends a client to the same member.

use std::net::{IpAddr, SocketAddr};

use crate::ir::Member;

/// Sizes of tables. Primes, so that every stride visits every place.
const SIZES: [usize; 5] = [251, 1021, 4093, 16_381, 65_521];

/// Places for each member, at least, which bounds how uneven shares are: some 5 %.
const PLACES_EACH: usize = 20;

/// The places of a table for so many members; grows in few steps, since another size moves everybody.
#[must_use]
pub fn size(members: usize) -> usize {
    let wanted = members.saturating_mul(PLACES_EACH);
    let [.., largest] = SIZES;
    SIZES.into_iter().find(|size| *size >= wanted).unwrap_or(largest)
}

/// The member at each place, as an index; empty without members. O(places log members) on average.
///
/// Shares follow weights. The order of `members` does not matter to who is where.
#[must_use]
pub fn table(members: &[Member]) -> Vec<usize> {
    let size = size(members.len());
    let heaviest = members.iter().map(|member| member.weight.get()).max().unwrap_or(1);
    // Who claims first must not depend on the order given.
    let mut turns: Vec<_> = members.iter().enumerate().map(|it| Turn::new(it, size)).collect();
    turns.sort_unstable_by_key(|turn| turn.addr);
    let mut places = vec![None; size];
    let mut free = if members.is_empty() { 0 } else { size };
    while free > 0 {
        for turn in &mut turns {
            turn.credit += u32::from(turn.weight);
            if turn.credit < u32::from(heaviest) || free == 0 {
                continue;
            }
            turn.credit -= u32::from(heaviest);
            while let Some(place) = places.get_mut(turn.at) {
                turn.at = (turn.at + turn.stride) % size;
                if place.is_none() {
                    *place = Some(turn.index);
                    free -= 1;
                    break;
                }
            }
        }
    }
    places.into_iter().flatten().collect()
}

/// A member in the course of the game.
struct Turn {
    addr: SocketAddr,
    index: usize,
    weight: u16,
    /// What its weight has earned; a place costs the heaviest weight.
    credit: u32,
    /// The place it would like next.
    at: usize,
    stride: usize,
}

impl Turn {
    fn new((index, member): (usize, &Member), size: usize) -> Self {
        let hash = hash(member.addr);
        let below = |hash: u64, limit: usize| {
            let limit = u64::try_from(limit).unwrap_or(u64::MAX).max(1);
            usize::try_from(hash % limit).unwrap_or_default()
        };
        Self {
            addr: member.addr,
            index,
            weight: member.weight.get(),
            credit: 0,
            at: below(hash, size),
            stride: below(mix(hash), size - 1) + 1,
        }
    }
}

/// FNV-1a over the address and port, mixed: the same on every machine.
fn hash(addr: SocketAddr) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    match addr.ip() {
        IpAddr::V4(ip) => ip.octets().into_iter().for_each(&mut add),
        IpAddr::V6(ip) => ip.octets().into_iter().for_each(&mut add),
    }
    addr.port().to_be_bytes().into_iter().for_each(&mut add);
    mix(hash)
}

/// The finisher of SplitMix64: every bit of the result depends on every bit given.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: u8, weight: impl Fn(u8) -> u16) -> Vec<Member> {
        let member = |n| Member {
            weight: weight(n).try_into().unwrap(),
            ..Member::new(([10, 61, 3, n], 8080).into(), false)
        };
        (1..=count).map(member).collect()
    }

    fn owners(members: &[Member]) -> Vec<SocketAddr> {
        table(members).into_iter().map(|index| members[index].addr).collect()
    }

    #[test]
    fn everybody_has_nearly_the_same_share() {
        for count in [1_u8, 2, 3, 7, 12, 13, 50, 100] {
            let members = members(count, |_| 1);
            let owners = owners(&members);
            assert_eq!(owners.len(), size(members.len()));
            for member in &members {
                let share = owners.iter().filter(|owner| **owner == member.addr).count();
                let fair = owners.len() / usize::from(count);
                assert!((fair..=fair + 1).contains(&share), "{share} of {fair}, {count} members");
            }
        }
        assert_eq!(table(&[]), [] as [usize; 0]);
    }

    #[test]
    fn shares_follow_weights() {
        let members = members(4, |n| [1, 3, 6, 10][usize::from(n - 1)]);
        let owners = owners(&members);
        for member in &members {
            let share = owners.iter().filter(|owner| **owner == member.addr).count();
            let fair = owners.len() * usize::from(member.weight.get()) / 20;
            assert!(share.abs_diff(fair) <= 2, "{share} of {fair}");
        }
    }

    #[test]
    fn few_move_when_one_goes_or_comes() {
        for count in [4_u8, 12, 40] {
            let before = members(count, |_| 1);
            let mut after = before.clone();
            let gone = after.remove(1).addr;
            let (before, after) = (owners(&before), owners(&after));
            let moved = before.iter().zip(&after);
            let needless = moved.filter(|(a, b)| a != b && **a != gone).count();
            assert!(needless * 8 < before.len(), "{needless} of {} moved", before.len());
        }
    }

    #[test]
    fn the_order_given_does_not_matter() {
        let mut turned = members(9, u16::from);
        let straight = owners(&turned);
        turned.reverse();
        assert_eq!(owners(&turned), straight);
    }
}

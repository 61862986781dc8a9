//! Which mark leads to which virtual server. Pure, and the same after every restart.
//!
//! A mark is the base of the settings and 20 bits: the number of the node port, its protocol and the
//! pool, or a hash (but for the bit that says UDP) where a Service port has no node port. One bit is left out: the one that says
//! "masquerade this" to others, which must not be set by accident.

use proxier_core::{FragmentId, Protocol, ir::Pool};

/// Bits of a mark that say which virtual server it is; above them is the base.
pub(crate) const BITS: u32 = 21;
const HASHED: u32 = 1 << 19;
const LOCAL: u32 = 1 << 18;
const UDP: u32 = 1 << 17;

/// The mark of a pool behind a node port.
pub(crate) fn of_node_port(port: u16, protocol: Protocol, pool: Pool) -> u32 {
    let protocol = match protocol {
        Protocol::Sctp => 0,
        Protocol::Tcp => 1 << 16,
        Protocol::Udp => UDP,
    };
    u32::from(port) | protocol | pool_bit(pool)
}

/// The mark of a pool that has no node port, and what tells it from another with the same mark.
pub(crate) fn of_fragment(id: &FragmentId, pool: Pool) -> (u32, u32) {
    let [a, b, c, d, low @ ..] = hash(id.to_string().as_bytes()).to_be_bytes();
    let (high, low) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes(low));
    let udp = if id.protocol == Protocol::Udp { UDP } else { 0 };
    (HASHED | low & (UDP - 1) | udp | pool_bit(pool), high)
}

/// Puts a number into the settings' range, around the bit that is somebody else's.
pub(crate) const fn place(base: u32, avoid: u8, number: u32) -> u32 {
    if avoid as u32 >= BITS {
        return base | number;
    }
    let below = (1 << avoid) - 1;
    base | number & below | (number & !below) << 1
}

/// Says whether a mark of ours leads datagrams.
pub(crate) const fn is_udp(mark: u32, avoid: u8) -> bool {
    // The bit is one further up where the one to leave out is below it.
    let bit = if avoid <= 17 { UDP << 1 } else { UDP };
    mark & bit != 0
}

/// Says whether a mark is in the settings' range.
pub(crate) const fn is_ours(base: u32, mark: u32) -> bool {
    mark & !((1 << BITS) - 1) == base
}

const fn pool_bit(pool: Pool) -> u32 {
    match pool {
        Pool::Cluster => 0,
        Pool::Local => LOCAL,
    }
}

/// FNV-1a, 64 bits: short, and the same in every build.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn marks_are_distinct_and_leave_the_bit_alone() {
        let base = 0x5000_0000;
        for avoid in [0, 14, 20, 31] {
            let mut seen = BTreeSet::new();
            for number in (0..1_u32 << 20).step_by(7).chain([(1 << 20) - 1]) {
                let mark = place(base, avoid, number);
                assert_eq!(mark & 1 << avoid & !base, 0, "{number:#x} {avoid}");
                assert!(is_ours(base, mark) && seen.insert(mark));
                assert_eq!(is_udp(mark, avoid), number & UDP != 0);
            }
        }
        assert!(!is_ours(base, base | 1 << BITS) && !is_ours(base, 7));
        let all = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp].into_iter().flat_map(|protocol| {
            [Pool::Cluster, Pool::Local].map(|pool| of_node_port(30_080, protocol, pool))
        });
        assert_eq!(all.collect::<BTreeSet<_>>().len(), 6);
    }
}

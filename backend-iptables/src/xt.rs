//! The C structures of iptables' matches and targets, as bytes. Pure.
//!
//! Each is part of the kernel's interface: fixed size, host byte order unless said otherwise, padded
//! to a multiple of eight bytes (`XT_ALIGN`, `include/uapi/linux/netfilter/x_tables.h`, v6.12). They
//! are written and read field by field at the offsets the headers give. Reading answers `None` for
//! everything that rules of ours never say.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
};

use proxier_core::Family;

use crate::rule::{CtStates, Recent, RecentAction, Side};

/// An extension: its name, revision and structure.
pub(crate) struct Extension {
    pub(crate) name: &'static str,
    pub(crate) rev: u32,
}

/// `struct xt_comment_info { char comment[256]; }` (`xt_comment.h`)
pub(crate) const COMMENT: Extension = Extension { name: "comment", rev: 0 };
/// `struct xt_statistic_info` (`xt_statistic.h`)
pub(crate) const STATISTIC: Extension = Extension { name: "statistic", rev: 0 };
/// `struct xt_addrtype_info_v1` (`xt_addrtype.h`)
pub(crate) const ADDRTYPE: Extension = Extension { name: "addrtype", rev: 1 };
/// `struct xt_recent_mtinfo_v1` (`xt_recent.h`)
pub(crate) const RECENT: Extension = Extension { name: "recent", rev: 1 };
/// `struct xt_conntrack_mtinfo3` (`xt_conntrack.h`)
pub(crate) const CONNTRACK: Extension = Extension { name: "conntrack", rev: 3 };
/// `struct xt_tcp` (`xt_tcpudp.h`)
pub(crate) const TCP: Extension = Extension { name: "tcp", rev: 0 };
/// `struct xt_udp` (`xt_tcpudp.h`)
pub(crate) const UDP: Extension = Extension { name: "udp", rev: 0 };
/// `struct xt_sctp_info` (`xt_sctp.h`)
pub(crate) const SCTP: Extension = Extension { name: "sctp", rev: 0 };
/// `struct nf_nat_range2` (`nf_nat.h`)
pub(crate) const DNAT: Extension = Extension { name: "DNAT", rev: 2 };
/// IPv4: `struct nf_nat_ipv4_multi_range_compat`; IPv6: `struct nf_nat_range` (`nf_nat.h`)
pub(crate) const MASQUERADE: Extension = Extension { name: "MASQUERADE", rev: 0 };
/// `struct xt_mark_tginfo2` (`xt_mark.h`)
pub(crate) const MARK: Extension = Extension { name: "MARK", rev: 2 };
/// `struct ipt_reject_info` (`netfilter_ipv4/ipt_REJECT.h`), `struct ip6t_reject_info`
/// (`netfilter_ipv6/ip6t_REJECT.h`)
pub(crate) const REJECT: Extension = Extension { name: "REJECT", rev: 0 };

const COMMENT_BYTES: usize = 256;
const STATISTIC_BYTES: usize = 24;
const ADDRTYPE_BYTES: usize = 8;
const RECENT_BYTES: usize = 232;
const CONNTRACK_BYTES: usize = 168;
const TCP_BYTES: usize = 16;
const UDP_BYTES: usize = 16;
const SCTP_BYTES: usize = 296;
const DNAT_BYTES: usize = 48;
const MASQUERADE_V4_BYTES: usize = 24;
const MASQUERADE_V6_BYTES: usize = 40;
const MARK_BYTES: usize = 8;
const REJECT_BYTES: usize = 8;

/// Longest text of a comment: what fits this structure and what is kept with a rule.
// KERNEL: NFT_USERDATA_MAXLEN is 256 (include/uapi/linux/netfilter/nf_tables.h, v6.12), less type,
// length and NUL.
pub(crate) const MAX_COMMENT_BYTES: usize = COMMENT_BYTES - 3;
/// Longest name of a list of the `recent` match.
// KERNEL: XT_RECENT_NAME_LEN is 200 with the NUL (xt_recent.h, v6.12).
const RECENT_NAME_BYTES: usize = 200;

/// `XT_ADDRTYPE_LOCAL`
const ADDRTYPE_LOCAL: u16 = 1 << 2;
/// `XT_STATISTIC_MODE_NTH`
const STATISTIC_NTH: u16 = 1;
/// `XT_CONNTRACK_STATE`
const CONNTRACK_STATE: u16 = 1;
/// `XT_RECENT_CHECK`, `XT_RECENT_SET`, `XT_RECENT_REAP`
const RECENT_CHECK: u8 = 1;
const RECENT_SET: u8 = 1 << 1;
const RECENT_REAP: u8 = 1 << 5;
/// `XT_SCTP_DEST_PORTS`
const SCTP_DEST_PORTS: u32 = 2;
/// `NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED`
const NAT_ADDRESS_AND_PORT: u32 = 3;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`
const NAT_RANDOM_FULLY: u32 = 1 << 4;

/// Writes bytes into a structure; what would not fit is a wrong offset in this file, which the tests
/// against iptables find.
fn put(info: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = info.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

fn get<const N: usize>(info: &[u8], at: usize) -> Option<[u8; N]> {
    info.get(at..)?.first_chunk().copied()
}

fn ne16(info: &[u8], at: usize) -> Option<u16> {
    get(info, at).map(u16::from_ne_bytes)
}

fn ne32(info: &[u8], at: usize) -> Option<u32> {
    get(info, at).map(u32::from_ne_bytes)
}

/// Reads by writing: what `write` makes of the guess must be what is there.
fn check<const N: usize, T: Copy>(
    info: &[u8],
    guess: T,
    write: impl FnOnce(T) -> [u8; N],
) -> Option<T> {
    (write(guess) == info).then_some(guess)
}

/// A comment; one that is too long is cut at a character.
pub(crate) fn comment(text: &str) -> [u8; COMMENT_BYTES] {
    let mut info = [0; COMMENT_BYTES];
    put(&mut info, 0, cut(text).as_bytes());
    info
}

pub(crate) fn read_comment(info: &[u8]) -> Option<&str> {
    if info.len() != COMMENT_BYTES {
        return None;
    }
    let text = info.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(text).ok()
}

/// The part of a comment that fits.
pub(crate) fn cut(text: &str) -> &str {
    prefix(text, MAX_COMMENT_BYTES)
}

/// As much of a text as fits so many bytes.
fn prefix(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    end.and_then(|end| text.get(..end)).unwrap_or_default()
}

/// Holds in `chance` of 2^31 cases: `u16 mode; u16 flags; u32 probability; u32 packet, count; ptr`.
///
/// The count means nothing in this mode; iptables computes it all the same, from the bytes of the
/// probability.
pub(crate) fn statistic(chance: u32) -> [u8; STATISTIC_BYTES] {
    let mut info = [0; STATISTIC_BYTES];
    put(&mut info, 4, &chance.to_ne_bytes());
    put(&mut info, 12, &chance.to_ne_bytes());
    info
}

pub(crate) fn read_statistic(info: &[u8]) -> Option<u32> {
    check(info, ne32(info, 4)?, statistic)
}

/// Holds for every n-th packet that is asked about: mode 1, and `u32 every, packet, count`, the first
/// and the last counted from nought. iptables starts the count so that the first packet is the one.
// KERNEL: net/netfilter/xt_statistic.c statistic_mt, v6.12: the count goes round from 0 to `every`, and
// the match holds when it comes to 0.
pub(crate) fn nth(every: NonZeroU32) -> [u8; STATISTIC_BYTES] {
    let mut info = [0; STATISTIC_BYTES];
    put(&mut info, 0, &STATISTIC_NTH.to_ne_bytes());
    let last = every.get() - 1;
    put(&mut info, 4, &last.to_ne_bytes());
    put(&mut info, 12, &last.to_ne_bytes());
    info
}

pub(crate) fn read_nth(info: &[u8]) -> Option<NonZeroU32> {
    check(info, NonZeroU32::new(ne32(info, 4)?.checked_add(1)?)?, nth)
}

/// Source or destination is local: `u16 source; u16 dest; u32 flags`.
pub(crate) fn addrtype(side: Side) -> [u8; ADDRTYPE_BYTES] {
    let mut info = [0; ADDRTYPE_BYTES];
    let at = match side {
        Side::Source => 0,
        Side::Destination => 2,
    };
    put(&mut info, at, &ADDRTYPE_LOCAL.to_ne_bytes());
    info
}

pub(crate) fn read_addrtype(info: &[u8]) -> Option<Side> {
    let side = if ne16(info, 0)? == 0 { Side::Destination } else { Side::Source };
    check(info, side, addrtype)
}

/// `u32 seconds, hit_count; u8 check_set, invert; char name[200]; u8 side; nf_inet_addr mask`.
pub(crate) fn recent(recent: Recent<'_>) -> [u8; RECENT_BYTES] {
    let mut info = [0; RECENT_BYTES];
    let (flags, seconds) = match recent.action {
        RecentAction::Check(seconds) => (RECENT_CHECK | RECENT_REAP, seconds),
        RecentAction::Set => (RECENT_SET, 0),
    };
    put(&mut info, 0, &seconds.to_ne_bytes());
    put(&mut info, 8, &[flags]);
    put(&mut info, 10, prefix(recent.name, RECENT_NAME_BYTES - 1).as_bytes());
    put(&mut info, 212, &[u8::MAX; 16]);
    info
}

pub(crate) fn read_recent(info: &[u8], family: Family) -> Option<Recent<'_>> {
    let action = match info.get(8)? & RECENT_SET {
        0 => RecentAction::Check(ne32(info, 0)?),
        _ => RecentAction::Set,
    };
    let name = info.get(10..10 + RECENT_NAME_BYTES)?.split(|byte| *byte == 0).next()?;
    let guess = Recent { name: std::str::from_utf8(name).ok()?, family, action };
    check(info, guess, recent)
}

/// Eight addresses, two times, a protocol, four ports, then
/// `u16 match_flags, invert_flags, state_mask, status_mask; …`.
pub(crate) fn conntrack(states: CtStates) -> [u8; CONNTRACK_BYTES] {
    let mut info = [0; CONNTRACK_BYTES];
    put(&mut info, 146, &CONNTRACK_STATE.to_ne_bytes());
    let invert = if states.not { CONNTRACK_STATE } else { 0 };
    put(&mut info, 148, &invert.to_ne_bytes());
    put(&mut info, 150, &states.mask.to_ne_bytes());
    info
}

pub(crate) fn read_conntrack(info: &[u8]) -> Option<CtStates> {
    let guess = CtStates { not: ne16(info, 148)? != 0, mask: ne16(info, 150)? };
    check(info, guess, conntrack)
}

/// Any ports, any flags: `u16 spts[2], dpts[2]; u8 option, flg_mask, flg_cmp, invflags`.
pub(crate) fn tcp() -> [u8; TCP_BYTES] {
    let mut info = [0; TCP_BYTES];
    put(&mut info, 0, &all_ports());
    info
}

/// Any ports: `u16 spts[2], dpts[2]; u8 invflags`.
pub(crate) fn udp() -> [u8; UDP_BYTES] {
    let mut info = [0; UDP_BYTES];
    put(&mut info, 0, &all_ports());
    info
}

/// Source and destination ports from 0 to 65535.
const fn all_ports() -> [u8; 8] {
    [0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]
}

/// Says whether a `tcp` or `udp` structure asks for nothing.
pub(crate) fn asks_nothing(info: &[u8]) -> bool {
    info == tcp()
}

/// `u16 dpts[2], spts[2]; u32 chunkmap[64], chunk_match_type; u8 flag_info[4][3]; int flag_count;
/// u32 flags, invflags`. Ports that are not asked for stay 0; chunk types that are not, 255.
pub(crate) fn sctp(ports: Option<(u16, u16)>) -> [u8; SCTP_BYTES] {
    let mut info = [0; SCTP_BYTES];
    for at in [268, 271, 274, 277] {
        put(&mut info, at, &[u8::MAX]);
    }
    if let Some((first, last)) = ports {
        put(&mut info, 0, &first.to_ne_bytes());
        put(&mut info, 2, &last.to_ne_bytes());
        put(&mut info, 284, &SCTP_DEST_PORTS.to_ne_bytes());
    }
    info
}

pub(crate) fn read_sctp(info: &[u8]) -> Option<Option<(u16, u16)>> {
    let guess = match ne32(info, 284)? {
        0 => None,
        _ => Some((ne16(info, 0)?, ne16(info, 2)?)),
    };
    check(info, guess, sctp)
}

/// `u32 flags; nf_inet_addr min, max; be16 min, max, base`.
pub(crate) fn dnat(to: SocketAddr) -> [u8; DNAT_BYTES] {
    let mut info = [0; DNAT_BYTES];
    put(&mut info, 0, &NAT_ADDRESS_AND_PORT.to_ne_bytes());
    for at in [4, 20] {
        match to.ip() {
            IpAddr::V4(ip) => put(&mut info, at, &ip.octets()),
            IpAddr::V6(ip) => put(&mut info, at, &ip.octets()),
        }
    }
    for at in [36, 38] {
        put(&mut info, at, &to.port().to_be_bytes());
    }
    info
}

pub(crate) fn read_dnat(info: &[u8], family: Family) -> Option<SocketAddr> {
    let ip = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(get::<4>(info, 4)?)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(get::<16>(info, 4)?)),
    };
    let port = get(info, 36).map(u16::from_be_bytes)?;
    check(info, SocketAddr::new(ip, port), dnat)
}

/// `u32 rangesize; { u32 flags; be32 min, max; be16 min, max }`, one range.
pub(crate) fn masquerade_v4(random_fully: bool) -> [u8; MASQUERADE_V4_BYTES] {
    let mut info = [0; MASQUERADE_V4_BYTES];
    put(&mut info, 0, &1_u32.to_ne_bytes());
    put(&mut info, 4, &masquerade_flags(random_fully).to_ne_bytes());
    info
}

/// `u32 flags; nf_inet_addr min, max; be16 min, max`.
pub(crate) fn masquerade_v6(random_fully: bool) -> [u8; MASQUERADE_V6_BYTES] {
    let mut info = [0; MASQUERADE_V6_BYTES];
    put(&mut info, 0, &masquerade_flags(random_fully).to_ne_bytes());
    info
}

const fn masquerade_flags(random_fully: bool) -> u32 {
    if random_fully { NAT_RANDOM_FULLY } else { 0 }
}

pub(crate) fn read_masquerade(info: &[u8], family: Family) -> Option<bool> {
    match family {
        Family::V4 => check(info, ne32(info, 4)? != 0, masquerade_v4),
        Family::V6 => check(info, ne32(info, 0)? != 0, masquerade_v6),
    }
}

/// `u32 mark, mask`.
pub(crate) fn mark((value, mask): (u32, u32)) -> [u8; MARK_BYTES] {
    let mut info = [0; MARK_BYTES];
    put(&mut info, 0, &value.to_ne_bytes());
    put(&mut info, 4, &mask.to_ne_bytes());
    info
}

pub(crate) fn read_mark(info: &[u8]) -> Option<(u32, u32)> {
    check(info, (ne32(info, 0)?, ne32(info, 4)?), mark)
}

/// `enum with`: port unreachable.
pub(crate) fn reject(family: Family) -> [u8; REJECT_BYTES] {
    let mut info = [0; REJECT_BYTES];
    // KERNEL: IPT_ICMP_PORT_UNREACHABLE and IP6T_ICMP6_PORT_UNREACH (v6.12).
    let with: u32 = match family {
        Family::V4 => 3,
        Family::V6 => 4,
    };
    put(&mut info, 0, &with.to_ne_bytes());
    info
}

pub(crate) fn read_reject(info: &[u8], family: Family) -> Option<Family> {
    check(info, family, reject)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read_comment(&comment("a -> b")), Some("a -> b"));
        assert_eq!(read_statistic(&statistic(1 << 30)), Some(1 << 30));
        for every in [1, 2, 50].map(|n| NonZeroU32::new(n).unwrap()) {
            assert_eq!(read_nth(&nth(every)), Some(every));
            assert_eq!(read_statistic(&nth(every)), None);
        }
        for side in [Side::Source, Side::Destination] {
            assert_eq!(read_addrtype(&addrtype(side)), Some(side));
        }
        for action in [RecentAction::Check(600), RecentAction::Set] {
            let it = Recent { name: "KUBE-SEP-X", family: Family::V6, action };
            assert_eq!(read_recent(&recent(it), Family::V6), Some(it));
        }
        for not in [false, true] {
            let states = CtStates { not, mask: CtStates::NEW | CtStates::DNAT };
            assert_eq!(read_conntrack(&conntrack(states)), Some(states));
            assert_eq!(read_masquerade(&masquerade_v4(not), Family::V4), Some(not));
            assert_eq!(read_masquerade(&masquerade_v6(not), Family::V6), Some(not));
        }
        assert!(asks_nothing(&tcp()) && asks_nothing(&udp()));
        for port in [None, Some((0, 0)), Some((3868, 3868)), Some((3840, 3871))] {
            assert_eq!(read_sctp(&sctp(port)), Some(port));
        }
        for addr in ["10.1.2.3:80", "[fd00::5]:9000"] {
            let addr: SocketAddr = addr.parse().unwrap();
            assert_eq!(read_dnat(&dnat(addr), Family::of(addr.ip())), Some(addr));
        }
        assert_eq!(read_mark(&mark((0x4000, 0))), Some((0x4000, 0)));
        for family in Family::ALL {
            assert_eq!(read_reject(&reject(family), family), Some(family));
        }
    }

    #[test]
    fn what_our_rules_never_say_is_not_read() {
        let mut info = statistic(5);
        info[2] = 1;
        assert_eq!(read_statistic(&info), None);
        let mut info = dnat("10.1.2.3:80".parse().unwrap());
        info[20] = 11;
        assert_eq!(read_dnat(&info, Family::V4), None);
        assert_eq!(read_dnat(&info[..4], Family::V4), None);
        assert_eq!(read_recent(&[0; 3], Family::V4), None);
    }

    #[test]
    fn a_long_comment_is_cut_at_a_character() {
        let long = "é".repeat(200);
        assert_eq!(cut(&long).len(), 252);
        assert_eq!(read_comment(&comment(&long)), Some(cut(&long)));
        assert_eq!(cut("short"), "short");
    }
}

//! Rules as bytes: what keys and values hold.
//!
//! 5,000 Services with ten endpoints each are 150,000 rules. A dump holds them all, so a chain is one
//! allocation and a rule some 50 bytes of it. The bytes are canonical: equal bytes mean equal rules.
//! They never leave the process.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
};

use ipnet::IpNet;
use proxier_core::{Family, Protocol};

use crate::rule::{
    CtStates, Interface, MarkMatch, Matches, Net, Port, Recent, RecentAction, Side, Target,
    Transport,
};

const COMMENT: u8 = 1;
const OWNED: u8 = 2;
const SOURCE: u8 = 3;
const DESTINATION: u8 = 4;
const INTERFACE: u8 = 5;
const TRANSPORT: u8 = 6;
const CT_STATE: u8 = 7;
const LOCAL: u8 = 8;
const RECENT: u8 = 9;
const CHANCE: u8 = 10;
const MARK: u8 = 11;
const EVERY: u8 = 12;

/// Tags from here on are targets, and end a rule.
const TARGET: u8 = 64;
const ACCEPT: u8 = TARGET;
const DNAT: u8 = TARGET + 1;
const DROP: u8 = TARGET + 2;
const JUMP: u8 = TARGET + 3;
const SET_MARK: u8 = TARGET + 4;
const MASQUERADE: u8 = TARGET + 5;
const NOTHING: u8 = TARGET + 6;
const REJECT: u8 = TARGET + 7;
const RETURN: u8 = TARGET + 8;
/// A rule that is not one of ours and could not be understood.
const UNREADABLE: u8 = TARGET + 9;

/// A rule read back from its bytes; `None` for one that could not be understood.
pub(crate) type Unpacked<'a> = Option<(Matches<'a>, Target<'a>)>;

/// Appends a rule.
pub(crate) fn pack_rule(out: &mut Vec<u8>, matches: &Matches<'_>, target: &Target<'_>) {
    pack_matches(out, matches);
    pack_target(out, target);
}

/// Appends a rule that could not be understood.
pub(crate) fn pack_unreadable(out: &mut Vec<u8>) {
    out.push(UNREADABLE);
}

/// Appends what a rule matches. The comment comes first, so that keys sort by it.
pub(crate) fn pack_matches(out: &mut Vec<u8>, matches: &Matches<'_>) {
    if let Some(comment) = matches.comment {
        out.push(COMMENT);
        let text = comment.split('\0').next().unwrap_or_default();
        out.extend_from_slice(text.as_bytes());
        out.push(0);
    }
    if matches.owned {
        out.push(OWNED);
    }
    for (tag, net) in [(SOURCE, matches.source), (DESTINATION, matches.destination)] {
        if let Some(Net { not, net }) = net {
            out.extend_from_slice(&[tag, u8::from(not), net.prefix_len()]);
            pack_ip(out, net.addr());
        }
    }
    if let Some(Interface { not, name, prefix }) = matches.interface {
        out.extend_from_slice(&[INTERFACE, u8::from(not), u8::from(prefix)]);
        pack_text(out, name);
    }
    if let Some(Transport { protocol, port }) = matches.transport {
        out.extend_from_slice(&[TRANSPORT, protocol.number()]);
        match port {
            Port::Unasked => out.push(0),
            Port::Any => out.push(1),
            Port::Is(port) => {
                out.push(2);
                out.extend_from_slice(&port.to_be_bytes());
            }
            Port::Within(first, last) => {
                out.push(3);
                out.extend_from_slice(&first.to_be_bytes());
                out.extend_from_slice(&last.to_be_bytes());
            }
        }
    }
    if let Some(CtStates { not, mask }) = matches.ct_state {
        out.extend_from_slice(&[CT_STATE, u8::from(not)]);
        out.extend_from_slice(&mask.to_be_bytes());
    }
    if let Some(side) = matches.local {
        out.extend_from_slice(&[LOCAL, u8::from(side == Side::Source)]);
    }
    if let Some(Recent { name, family, action }) = matches.recent {
        let seconds = match action {
            RecentAction::Check(seconds) => Some(seconds),
            RecentAction::Set => None,
        };
        out.extend_from_slice(&[RECENT, is_v6(family), u8::from(seconds.is_some())]);
        out.extend_from_slice(&seconds.unwrap_or_default().to_be_bytes());
        pack_text(out, name);
    }
    if let Some(chance) = matches.chance {
        out.push(CHANCE);
        out.extend_from_slice(&chance.to_be_bytes());
    }
    if let Some(every) = matches.every {
        out.push(EVERY);
        out.extend_from_slice(&every.get().to_be_bytes());
    }
    if let Some(MarkMatch { not, value, mask }) = matches.mark {
        out.extend_from_slice(&[MARK, u8::from(not)]);
        out.extend_from_slice(&value.to_be_bytes());
        out.extend_from_slice(&mask.to_be_bytes());
    }
}

/// Appends what a rule does.
pub(crate) fn pack_target(out: &mut Vec<u8>, target: &Target<'_>) {
    match *target {
        Target::Accept => out.push(ACCEPT),
        Target::Dnat(to) => {
            out.push(DNAT);
            pack_ip(out, to.ip());
            out.extend_from_slice(&to.port().to_be_bytes());
        }
        Target::Drop => out.push(DROP),
        Target::Jump(chain) => {
            out.push(JUMP);
            pack_text(out, chain);
        }
        Target::Mark { value, mask } => {
            out.push(SET_MARK);
            out.extend_from_slice(&value.to_be_bytes());
            out.extend_from_slice(&mask.to_be_bytes());
        }
        Target::Masquerade { random_fully } => {
            out.extend_from_slice(&[MASQUERADE, u8::from(random_fully)]);
        }
        Target::Nothing => out.push(NOTHING),
        Target::Reject(family) => out.extend_from_slice(&[REJECT, is_v6(family)]),
        Target::Return => out.push(RETURN),
    }
}

fn pack_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(16);
            out.extend_from_slice(&ip.octets());
        }
    }
}

fn pack_text(out: &mut Vec<u8>, text: &str) {
    let len = u8::try_from(text.len()).unwrap_or(u8::MAX);
    let text = text.as_bytes().get(..usize::from(len)).unwrap_or_default();
    out.push(len);
    out.extend_from_slice(text);
}

fn is_v6(family: Family) -> u8 {
    u8::from(family == Family::V6)
}

/// Reads packed bytes. They were packed here, so what does not parse is a bug; it ends the reading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacker<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Unpacker<'a> {
    type Item = Unpacked<'a>;

    fn next(&mut self) -> Option<Unpacked<'a>> {
        if self.0.is_empty() {
            return None;
        }
        if self.0.first() == Some(&UNREADABLE) {
            self.byte()?;
            return Some(None);
        }
        let matches = self.matches()?;
        let target = self.target()?;
        Some(Some((matches, target)))
    }
}

impl<'a> Unpacker<'a> {
    /// Reads matches up to a target or the end.
    pub(crate) fn matches(&mut self) -> Option<Matches<'a>> {
        let mut it = Matches::default();
        while let Some(tag) = self.0.first().copied().filter(|tag| *tag < TARGET) {
            self.byte()?;
            match tag {
                COMMENT => it.comment = Some(self.comment()?),
                OWNED => it.owned = true,
                SOURCE => it.source = Some(self.net()?),
                DESTINATION => it.destination = Some(self.net()?),
                INTERFACE => {
                    let (not, prefix) = (self.flag()?, self.flag()?);
                    it.interface = Some(Interface { not, prefix, name: self.text()? });
                }
                TRANSPORT => it.transport = Some(self.transport()?),
                CT_STATE => {
                    it.ct_state = Some(CtStates { not: self.flag()?, mask: self.u16()? });
                }
                LOCAL => {
                    it.local = Some(if self.flag()? { Side::Source } else { Side::Destination });
                }
                RECENT => {
                    let (family, check, seconds) = (self.family()?, self.flag()?, self.u32()?);
                    let action =
                        if check { RecentAction::Check(seconds) } else { RecentAction::Set };
                    it.recent = Some(Recent { family, action, name: self.text()? });
                }
                CHANCE => it.chance = Some(self.u32()?),
                EVERY => it.every = Some(NonZeroU32::new(self.u32()?)?),
                MARK => {
                    let (not, value, mask) = (self.flag()?, self.u32()?, self.u32()?);
                    it.mark = Some(MarkMatch { not, value, mask });
                }
                _ => return None,
            }
        }
        Some(it)
    }

    /// Reads a target.
    pub(crate) fn target(&mut self) -> Option<Target<'a>> {
        Some(match self.byte()? {
            ACCEPT => Target::Accept,
            DNAT => Target::Dnat(SocketAddr::new(self.ip()?, self.u16()?)),
            DROP => Target::Drop,
            JUMP => Target::Jump(self.text()?),
            SET_MARK => Target::Mark { value: self.u32()?, mask: self.u32()? },
            MASQUERADE => Target::Masquerade { random_fully: self.flag()? },
            NOTHING => Target::Nothing,
            REJECT => Target::Reject(self.family()?),
            RETURN => Target::Return,
            _ => return None,
        })
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.first_chunk().copied()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Option<bool> {
        self.byte().map(|byte| byte != 0)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn family(&mut self) -> Option<Family> {
        self.flag().map(|v6| if v6 { Family::V6 } else { Family::V4 })
    }

    fn comment(&mut self) -> Option<&'a str> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let text = self.take(end)?;
        self.byte()?;
        std::str::from_utf8(text).ok()
    }

    fn text(&mut self) -> Option<&'a str> {
        let len = self.byte()?;
        std::str::from_utf8(self.take(len.into())?).ok()
    }

    fn ip(&mut self) -> Option<IpAddr> {
        match self.byte()? {
            4 => self.array::<4>().map(|octets| Ipv4Addr::from(octets).into()),
            16 => self.array::<16>().map(|octets| Ipv6Addr::from(octets).into()),
            _ => None,
        }
    }

    fn net(&mut self) -> Option<Net> {
        let (not, len) = (self.flag()?, self.byte()?);
        IpNet::new(self.ip()?, len).ok().map(|net| Net { not, net })
    }

    fn transport(&mut self) -> Option<Transport> {
        let protocol = protocol(self.byte()?)?;
        let port = match self.byte()? {
            0 => Port::Unasked,
            1 => Port::Any,
            2 => Port::Is(self.u16()?),
            3 => Port::Within(self.u16()?, self.u16()?),
            _ => return None,
        };
        Some(Transport { protocol, port })
    }
}

/// The protocol with this number.
pub(crate) fn protocol(number: u8) -> Option<Protocol> {
    let all = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp];
    all.into_iter().find(|protocol| protocol.number() == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_survive_packing() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let full = Matches {
            comment: Some("edge/near:api -> 10.61.3.32:9000"),
            owned: true,
            source: Some(Net::is_not(net("10.61.0.0/20"))),
            destination: Some(Net::is(net("fd00::1/128"))),
            interface: Some(Interface { not: true, name: "veth", prefix: true }),
            transport: Some(Transport { protocol: Protocol::Sctp, port: Port::Is(65_535) }),
            ct_state: Some(CtStates { not: true, mask: CtStates::DNAT | CtStates::NEW }),
            local: Some(Side::Source),
            recent: Some(Recent {
                name: "KUBE-SEP-OPWUWBMMUIEBWKRW",
                family: Family::V6,
                action: RecentAction::Check(600),
            }),
            chance: Some(1 << 30),
            every: NonZeroU32::new(3),
            mark: Some(MarkMatch { not: true, value: 0x4000, mask: 0x4000 }),
        };
        let port = Port::Within(30_720, 30_751);
        let block = Matches {
            transport: Some(Transport { protocol: Protocol::Tcp, port }),
            ..Matches::default()
        };
        let targets = [
            Target::Accept,
            Target::Dnat("[fd00::5]:9000".parse().unwrap()),
            Target::Dnat("10.1.1.1:80".parse().unwrap()),
            Target::Drop,
            Target::Jump("KUBE-MARK-MASQ"),
            Target::Mark { value: 0x4000, mask: 0 },
            Target::Masquerade { random_fully: true },
            Target::Nothing,
            Target::Reject(Family::V6),
            Target::Return,
        ];
        let mut bytes = Vec::new();
        for target in &targets {
            pack_rule(&mut bytes, &full, target);
            pack_rule(&mut bytes, &Matches::default(), target);
            pack_rule(&mut bytes, &block, target);
        }
        pack_unreadable(&mut bytes);
        let mut rules = Unpacker(&bytes);
        for target in targets {
            assert_eq!(rules.next(), Some(Some((full, target))));
            assert_eq!(rules.next(), Some(Some((Matches::default(), target))));
            assert_eq!(rules.next(), Some(Some((block, target))));
        }
        assert_eq!(rules.next(), Some(None));
        assert_eq!(rules.next(), None);
    }
}

//! From rules to the expressions that iptables-nft would write for them, and back. Pure.
//!
//! The order and form of the expressions are those of iptables 1.8.9: first what is built into every
//! rule (interface, protocol, addresses), then the matches in the order they were given, a counter,
//! and the target. Reading accepts any order.

use std::net::IpAddr;

use ipnet::IpNet;
use proxier_core::{Family, Protocol};
use proxier_netlink::nft::{
    CmpOp, Compat, Expr, ExprWriter, MetaKey, PayloadBase, Reg, RuleRef, Verdict, Xt,
};

use crate::{
    pack::protocol,
    rule::{Interface, MarkMatch, Matches, Net, Port, Target, Transport},
    xt::{self, Extension},
};

/// The bytes that mark a rule, table or chain as ours, in the type-length-value form of libnftnl.
///
/// As a comment (type 0) it is listed by `nft`, so that people see whose a table is.
pub(crate) const OBJECT_MARK: &[u8] = b"\x00\x08proxier\0";
/// The same for rules, as a type that neither `nft` nor `iptables` knows, so that it is not listed
/// as a comment of the rule.
pub(crate) const RULE_MARK: &[u8] = b"\x70\x08proxier\0";

/// Bytes before the source address in a header, and its length; the destination follows.
const fn address_field(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    }
}

/// What extensions are told of a rule's protocol.
pub(crate) fn compat(matches: &Matches<'_>) -> Option<Compat> {
    let transport = matches.transport?;
    Some(Compat { proto: transport.protocol.number().into(), flags: 0 })
}

/// Writes a rule's expressions.
pub(crate) fn write(
    w: &mut ExprWriter<'_>,
    family: Family,
    matches: &Matches<'_>,
    target: &Target<'_>,
) {
    if let Some(interface) = matches.interface {
        write_interface(w, interface);
    }
    if let Some(transport) = matches.transport {
        w.meta(MetaKey::L4PROTO, Reg::R1);
        w.cmp(Reg::R1, CmpOp::EQ, &[transport.protocol.number()]);
    }
    let (source, len) = address_field(family);
    for (offset, net) in [(source, matches.source), (source + len, matches.destination)] {
        if let Some(net) = net {
            write_net(w, offset, net);
        }
    }
    write_extensions(w, matches);
    w.counter();
    write_target(w, family, target);
}

fn write_interface(w: &mut ExprWriter<'_>, interface: Interface<'_>) {
    let Interface { not, name, prefix } = interface;
    w.meta(MetaKey::IIFNAME, Reg::R1);
    let mut bytes = [0; 16];
    let len = name.len().min(15);
    if let Some((to, from)) = bytes.get_mut(..len).zip(name.as_bytes().get(..len)) {
        to.copy_from_slice(from);
    }
    let len = if prefix { len } else { len + 1 };
    w.cmp(Reg::R1, equal(not), bytes.get(..len).unwrap_or_default());
}

fn write_net(w: &mut ExprWriter<'_>, offset: u32, Net { not, net }: Net) {
    match (net.addr(), net.netmask()) {
        (IpAddr::V4(ip), IpAddr::V4(mask)) => {
            write_bits(w, offset, not, &ip.octets(), &mask.octets(), net.prefix_len());
        }
        (IpAddr::V6(ip), IpAddr::V6(mask)) => {
            write_bits(w, offset, not, &ip.octets(), &mask.octets(), net.prefix_len());
        }
        _ => {}
    }
}

/// Compares leading bits of an address: whole bytes by loading fewer, others by masking.
fn write_bits(w: &mut ExprWriter<'_>, offset: u32, not: bool, ip: &[u8], mask: &[u8], bits: u8) {
    let network = PayloadBase::NETWORK;
    let width = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or_default();
    let whole = if bits.is_multiple_of(8) { ip.get(..usize::from(bits / 8)) } else { None };
    let value = whole.unwrap_or(ip);
    w.payload(network, offset, width(value), Reg::R1);
    if whole.is_none() {
        w.bitwise(Reg::R1, Reg::R1, mask, [0; 16].get(..mask.len()).unwrap_or_default());
    }
    w.cmp(Reg::R1, equal(not), value);
}

fn write_extensions(w: &mut ExprWriter<'_>, matches: &Matches<'_>) {
    let ct_first = matches.ct_state.filter(|states| states.comes_first());
    if let Some(states) = ct_first {
        put_match(w, &xt::CONNTRACK, &xt::conntrack(states));
    }
    if let Some(text) = matches.comment {
        put_match(w, &xt::COMMENT, &xt::comment(text));
    }
    if let Some(side) = matches.local {
        put_match(w, &xt::ADDRTYPE, &xt::addrtype(side));
    }
    if let Some(recent) = matches.recent {
        put_match(w, &xt::RECENT, &xt::recent(recent));
    }
    if let Some(chance) = matches.chance {
        put_match(w, &xt::STATISTIC, &xt::statistic(chance));
    }
    if let Some(every) = matches.every {
        put_match(w, &xt::STATISTIC, &xt::nth(every));
    }
    if let Some(MarkMatch { not, value, mask }) = matches.mark {
        w.meta(MetaKey::MARK, Reg::R1);
        if mask != u32::MAX {
            w.bitwise(Reg::R1, Reg::R1, &mask.to_ne_bytes(), &[0; 4]);
        }
        w.cmp(Reg::R1, equal(not), &value.to_ne_bytes());
    }
    if let Some(states) = matches.ct_state.filter(|_| ct_first.is_none()) {
        put_match(w, &xt::CONNTRACK, &xt::conntrack(states));
    }
    if let Some(transport) = matches.transport {
        write_port(w, transport);
    }
}

fn write_port(w: &mut ExprWriter<'_>, Transport { protocol, port }: Transport) {
    match (protocol, port) {
        (_, Port::Unasked) => {}
        (Protocol::Tcp, Port::Any) => put_match(w, &xt::TCP, &xt::tcp()),
        (Protocol::Udp, Port::Any) => put_match(w, &xt::UDP, &xt::udp()),
        (Protocol::Sctp, Port::Any) => put_match(w, &xt::SCTP, &xt::sctp(None)),
        (Protocol::Sctp, Port::Is(port)) => {
            put_match(w, &xt::SCTP, &xt::sctp(Some((port, port))));
        }
        (Protocol::Sctp, Port::Within(first, last)) => {
            put_match(w, &xt::SCTP, &xt::sctp(Some((first, last))));
        }
        (Protocol::Tcp | Protocol::Udp, Port::Within(first, last)) => {
            w.payload(PayloadBase::TRANSPORT, 2, 2, Reg::R1);
            w.range(Reg::R1, false, &first.to_be_bytes(), &last.to_be_bytes());
        }
        (Protocol::Tcp | Protocol::Udp, Port::Is(port)) => {
            w.payload(PayloadBase::TRANSPORT, 2, 2, Reg::R1);
            w.cmp(Reg::R1, CmpOp::EQ, &port.to_be_bytes());
        }
    }
}

fn write_target(w: &mut ExprWriter<'_>, family: Family, target: &Target<'_>) {
    match *target {
        Target::Accept => {
            w.immediate_verdict(Verdict::Accept);
        }
        Target::Dnat(to) => put_target(w, &xt::DNAT, &xt::dnat(to)),
        Target::Drop => {
            w.immediate_verdict(Verdict::Drop);
        }
        Target::Jump(chain) => {
            w.jump(chain);
        }
        Target::Mark { value, mask } => put_target(w, &xt::MARK, &xt::mark((value, mask))),
        Target::Masquerade { random_fully } => match family {
            Family::V4 => put_target(w, &xt::MASQUERADE, &xt::masquerade_v4(random_fully)),
            Family::V6 => put_target(w, &xt::MASQUERADE, &xt::masquerade_v6(random_fully)),
        },
        Target::Nothing => {}
        Target::Reject(family) => put_target(w, &xt::REJECT, &xt::reject(family)),
        Target::Return => {
            w.immediate_verdict(Verdict::Return);
        }
    }
}

fn put_match(w: &mut ExprWriter<'_>, it: &Extension, info: &[u8]) {
    w.xt_match(it.name, it.rev, info);
}

fn put_target(w: &mut ExprWriter<'_>, it: &Extension, info: &[u8]) {
    w.xt_target(it.name, it.rev, info);
}

const fn equal(not: bool) -> CmpOp {
    if not { CmpOp::NE } else { CmpOp::EQ }
}

/// Reads a rule and gives it to `visit`; `None` if it could not be understood.
///
/// Texts live in the rule and in `visit`'s argument only, so that nothing is allocated.
pub(crate) fn read<R>(
    rule: &RuleRef<'_>,
    family: Family,
    visit: impl FnOnce(Option<(&Matches<'_>, &Target<'_>)>) -> R,
) -> R {
    let exprs: Vec<Expr<'_>> = rule.exprs().collect();
    let mut reader = Reader::new(family);
    let understood = exprs.iter().try_for_each(|expr| reader.read(expr)).is_some();
    let Some((mut matches, target)) = reader.finish().filter(|_| understood) else {
        return visit(None);
    };
    matches.owned = rule.userdata == RULE_MARK;
    if matches.comment.is_none() {
        matches.comment = rule.comment();
    }
    visit(Some((&matches, &target)))
}

/// What a comparison to come is about.
#[derive(Clone, Copy, Debug)]
enum Loaded {
    Header { offset: u32, bits: u8, mask: bool },
    Interface,
    Mark(u32),
    Port,
    Protocol,
}

/// Puts a rule together from its expressions.
struct Reader<'e> {
    family: Family,
    matches: Matches<'e>,
    target: Option<Target<'e>>,
    loaded: Option<Loaded>,
    protocol: Option<Protocol>,
    port: Port,
}

impl<'e> Reader<'e> {
    fn new(family: Family) -> Self {
        Self {
            family,
            matches: Matches::default(),
            target: None,
            loaded: None,
            protocol: None,
            port: Port::Unasked,
        }
    }

    /// Takes one expression in; `None` if it is not understood.
    #[expect(clippy::wildcard_enum_match_arm, reason = "our rules have no other expressions")]
    fn read(&mut self, expr: &'e Expr<'_>) -> Option<()> {
        if self.target.is_some() {
            return None;
        }
        match expr {
            Expr::Counter { .. } => {}
            Expr::Meta { key, dreg: Reg::R1 } => {
                self.loaded = Some(match *key {
                    MetaKey::IIFNAME => Loaded::Interface,
                    MetaKey::L4PROTO => Loaded::Protocol,
                    MetaKey::MARK => Loaded::Mark(u32::MAX),
                    _ => return None,
                });
            }
            Expr::Payload { base: PayloadBase::NETWORK, offset, len, dreg: Reg::R1 } => {
                let bits = u8::try_from(len.checked_mul(8)?).ok()?;
                self.loaded = Some(Loaded::Header { offset: *offset, bits, mask: false });
            }
            Expr::Payload { base: PayloadBase::TRANSPORT, offset: 2, len: 2, dreg: Reg::R1 } => {
                self.loaded = Some(Loaded::Port);
            }
            Expr::Bitwise { sreg: Reg::R1, dreg: Reg::R1, mask, xor } => {
                xor.iter().all(|byte| *byte == 0).then_some(())?;
                self.mask(mask)?;
            }
            Expr::Cmp { sreg: Reg::R1, op, value } => {
                let not = match *op {
                    CmpOp::EQ => false,
                    CmpOp::NE => true,
                    _ => return None,
                };
                self.compare(not, value)?;
            }
            Expr::Range { sreg: Reg::R1, invert: false, from, to } => {
                let Loaded::Port = self.loaded.take()? else { return None };
                let port = |bytes: &[u8]| bytes.try_into().ok().map(u16::from_be_bytes);
                self.set_port(Port::Within(port(from)?, port(to)?))?;
            }
            Expr::Match(it) => self.extension(it)?,
            Expr::Target(it) => self.target = Some(self.read_target(it)?),
            Expr::Verdict(verdict) => {
                self.target = Some(match verdict {
                    Verdict::Accept => Target::Accept,
                    Verdict::Drop => Target::Drop,
                    Verdict::Jump(chain) => Target::Jump(chain),
                    Verdict::Return => Target::Return,
                    Verdict::Break | Verdict::Continue | Verdict::Goto(_) => return None,
                });
            }
            _ => return None,
        }
        Some(())
    }

    fn mask(&mut self, mask: &[u8]) -> Option<()> {
        self.loaded = Some(match self.loaded? {
            Loaded::Header { offset, bits, mask: false } if mask.len() * 8 == usize::from(bits) => {
                Loaded::Header { offset, bits: prefix_len(mask)?, mask: true }
            }
            Loaded::Mark(u32::MAX) => Loaded::Mark(u32::from_ne_bytes(mask.try_into().ok()?)),
            Loaded::Header { .. }
            | Loaded::Interface
            | Loaded::Mark(_)
            | Loaded::Port
            | Loaded::Protocol => return None,
        });
        Some(())
    }

    fn compare(&mut self, not: bool, value: &'e [u8]) -> Option<()> {
        match self.loaded.take()? {
            Loaded::Header { offset, bits, .. } => {
                let net = Net { not, net: self.net(value, bits)? };
                let (source, len) = address_field(self.family);
                let slot = match offset {
                    it if it == source => &mut self.matches.source,
                    it if it == source + len => &mut self.matches.destination,
                    _ => return None,
                };
                set(slot, net)
            }
            Loaded::Interface => {
                let (prefix, text) = match value.split_last()? {
                    (0, text) => (false, text.split(|byte| *byte == 0).next()?),
                    _ => (true, value),
                };
                let name = std::str::from_utf8(text).ok()?;
                set(&mut self.matches.interface, Interface { not, name, prefix })
            }
            Loaded::Mark(mask) => {
                let value = u32::from_ne_bytes(value.try_into().ok()?);
                set(&mut self.matches.mark, MarkMatch { not, value, mask })
            }
            Loaded::Port => {
                let port = u16::from_be_bytes(value.try_into().ok()?);
                self.set_port(Port::Is(port)).filter(|()| !not)
            }
            Loaded::Protocol => match value {
                [number] if !not => set(&mut self.protocol, protocol(*number)?),
                _ => None,
            },
        }
    }

    fn net(&self, value: &[u8], bits: u8) -> Option<IpNet> {
        let mut octets = [0; 16];
        octets.get_mut(..value.len())?.copy_from_slice(value);
        let ip: IpAddr = match self.family {
            Family::V4 => octets.first_chunk::<4>().copied()?.into(),
            Family::V6 => octets.into(),
        };
        IpNet::new(ip, bits).ok().filter(|net| net.trunc() == *net)
    }

    fn set_port(&mut self, port: Port) -> Option<()> {
        (self.port == Port::Unasked).then(|| self.port = port)
    }

    fn extension(&mut self, it: &'e Xt<'_>) -> Option<()> {
        let is = |extension: &Extension| it.name == extension.name && it.rev == extension.rev;
        let matches = &mut self.matches;
        if is(&xt::COMMENT) {
            set(&mut matches.comment, xt::read_comment(&it.info)?)
        } else if is(&xt::STATISTIC) {
            match xt::read_statistic(&it.info) {
                Some(chance) => set(&mut matches.chance, chance),
                None => set(&mut matches.every, xt::read_nth(&it.info)?),
            }
        } else if is(&xt::ADDRTYPE) {
            set(&mut matches.local, xt::read_addrtype(&it.info)?)
        } else if is(&xt::RECENT) {
            set(&mut matches.recent, xt::read_recent(&it.info, self.family)?)
        } else if is(&xt::CONNTRACK) {
            set(&mut matches.ct_state, xt::read_conntrack(&it.info)?)
        } else if is(&xt::TCP) || is(&xt::UDP) {
            self.set_port(Port::Any).filter(|()| xt::asks_nothing(&it.info))
        } else if is(&xt::SCTP) {
            self.set_port(match xt::read_sctp(&it.info)? {
                None => Port::Any,
                Some((first, last)) if first == last => Port::Is(first),
                Some((first, last)) => Port::Within(first, last),
            })
        } else {
            None
        }
    }

    fn read_target(&self, it: &'e Xt<'_>) -> Option<Target<'e>> {
        let is = |extension: &Extension| it.name == extension.name && it.rev == extension.rev;
        if is(&xt::DNAT) {
            xt::read_dnat(&it.info, self.family).map(Target::Dnat)
        } else if is(&xt::MARK) {
            xt::read_mark(&it.info).map(|(value, mask)| Target::Mark { value, mask })
        } else if is(&xt::MASQUERADE) {
            let random = xt::read_masquerade(&it.info, self.family)?;
            Some(Target::Masquerade { random_fully: random })
        } else if is(&xt::REJECT) {
            xt::read_reject(&it.info, self.family).map(Target::Reject)
        } else {
            None
        }
    }

    fn finish(self) -> Option<(Matches<'e>, Target<'e>)> {
        let Self { mut matches, target, loaded, protocol, port, .. } = self;
        matches.transport = match (protocol, port) {
            (Some(protocol), port) => Some(Transport { protocol, port }),
            (None, Port::Unasked) => None,
            (None, Port::Any | Port::Is(_) | Port::Within(..)) => return None,
        };
        loaded.is_none().then(|| (matches, target.unwrap_or(Target::Nothing)))
    }
}

/// The length of a mask, if it is ones and then zeros.
fn prefix_len(mask: &[u8]) -> Option<u8> {
    let whole = mask.iter().take_while(|byte| **byte == u8::MAX).count();
    let partial = mask.get(whole).map_or(0, |byte| byte.leading_ones());
    let len = u32::try_from(whole * 8).ok()? + partial;
    let total: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    u8::try_from(len).ok().filter(|_| total == len)
}

/// Sets what must not be set yet.
fn set<T>(slot: &mut Option<T>, value: T) -> Option<()> {
    if slot.is_some() {
        return None;
    }
    *slot = Some(value);
    Some(())
}

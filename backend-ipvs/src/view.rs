//! What the objects of this mode do to a packet: for tests on a kernel that only stores them.
//!
//! Rules, sets, maps and virtual servers are interpreted as the kernel does it. Nothing is compiled,
//! and nothing is known of Services, so that a mistake in the objects shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

pub use proxier_core::sim::Fate;
use proxier_core::{Family, Protocol, ir::FrontendKey};
use proxier_netlink::nft::{CmpOp, CtKey, Expr, FibFlags, MetaKey, PayloadBase, Reg, Verdict};

use crate::object::{Chain, ChainName, Key, Rule, Server, ServerId, Value};

/// Bytes of all registers.
const REGISTERS: usize = 64;
/// Chains deeper than this are taken for a loop.
// KERNEL: NFT_JUMP_STACK_SIZE (include/net/netfilter/nf_tables.h, v6.12).
const DEPTH: usize = 16;
// KERNEL: NF_CT_STATE_BIT(IP_CT_NEW) (include/net/netfilter/nf_conntrack_common.h, v6.12).
const NEW: u32 = 8;
// KERNEL: RTN_LOCAL, RTN_UNICAST (include/uapi/linux/rtnetlink.h, v6.12).
const LOCAL: u32 = 2;
const UNICAST: u32 = 1;

/// The first packet of a connection.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// Source address.
    pub source: IpAddr,
    /// Interface it came in on; `None` for the host's own packets.
    pub input: Option<&'a str>,
    /// Destination.
    pub destination: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// The addresses the kernel calls local, besides loopback and those of the objects.
    pub local: &'a [IpAddr],
    /// Where connections of the same source through frontends went, and how long ago.
    pub memory: &'a [(FrontendKey, SocketAddr, Duration)],
}

/// The objects of one family, ready to be walked.
#[derive(Debug)]
pub struct View<'a> {
    chains: BTreeMap<String, &'a [Rule]>,
    sets: BTreeMap<String, BTreeMap<Vec<u8>, Entry>>,
    servers: BTreeMap<ServerId, (&'a Server, Vec<SocketAddr>)>,
    addresses: BTreeSet<IpAddr>,
    family: Family,
}

/// An element: the end of its interval and its value.
type Entry = (Option<Vec<u8>>, Option<u32>);

/// A packet on its way, and what is in the registers.
struct State {
    registers: [u8; REGISTERS],
    destination: SocketAddr,
    mark: u32,
    ct_mark: u32,
}

/// What a chain comes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    Accept,
    Drop,
    Masquerade,
    Over,
    Reject,
}

impl<'a> View<'a> {
    /// Reads the objects of a family.
    #[must_use]
    pub fn new(family: Family, objects: &'a BTreeMap<Key, Value>) -> Self {
        let mut view = Self {
            chains: BTreeMap::new(),
            sets: BTreeMap::new(),
            servers: BTreeMap::new(),
            addresses: BTreeSet::new(),
            family,
        };
        for (key, value) in objects {
            match (key, value) {
                (Key::Chain(_, name), Value::Chain(Chain { rules, .. })) => {
                    view.chains.insert(name.to_string(), rules);
                }
                (Key::Element(set, item), value) => {
                    let (from, to) = set.kind().pack(item);
                    let mark = if let Value::Mark(mark) = value { Some(*mark) } else { None };
                    view.sets.entry(set.to_string()).or_default().insert(from, (to, mark));
                }
                (Key::Server(id), Value::Server(server)) => {
                    view.servers.insert(*id, (server, Vec::new()));
                }
                (Key::Address(ip), _) => drop(view.addresses.insert(*ip)),
                _ => {}
            }
        }
        for (key, value) in objects {
            if let (Key::Destination(id, to), Value::Weight(1..)) = (key, value)
                && let Some((_, destinations)) = view.servers.get_mut(id)
            {
                destinations.push(*to);
            }
        }
        view
    }

    /// Everything that may become of a packet, as schedulers and memory have it.
    #[must_use]
    pub fn judge(&self, packet: &Packet<'_>) -> BTreeSet<Fate> {
        let walk = Walk { view: self, packet };
        let mut state = State {
            registers: [0; REGISTERS],
            destination: packet.destination,
            mark: 0,
            ct_mark: 0,
        };
        let hook = if packet.input.is_some() { ChainName::Prerouting } else { ChainName::Output };
        match walk.chain(&hook.to_string(), &mut state, 0) {
            End::Drop => return [Fate::Dropped].into(),
            End::Reject => return [Fate::Rejected].into(),
            End::Accept | End::Masquerade | End::Over => {}
        }
        let Some((server, destinations)) = walk.server(&state) else {
            return [Fate::Untouched].into();
        };
        // KERNEL: a server without destinations rejects (ip_vs_leave, v6.12).
        if destinations.is_empty() {
            return [Fate::Rejected].into();
        }
        let remembered = walk.remembered(server, destinations);
        let chosen = remembered.map_or_else(|| destinations.clone(), |to| vec![to]);
        chosen
            .into_iter()
            .map(|to| {
                state.destination = to;
                let end = walk.chain(&ChainName::Masquerade.to_string(), &mut state, 0);
                Fate::Forwarded { to, masqueraded: end == End::Masquerade }
            })
            .collect()
    }
}

struct Walk<'v> {
    view: &'v View<'v>,
    packet: &'v Packet<'v>,
}

impl<'v> Walk<'v> {
    /// The virtual server that takes the packet: only what is local comes to one.
    fn server(&self, state: &State) -> Option<&'v (&'v Server, Vec<SocketAddr>)> {
        let Packet { destination, protocol, .. } = self.packet;
        if !self.is_local(destination.ip()) {
            return None;
        }
        // KERNEL: ip_vs_service_find (net/netfilter/ipvs/ip_vs_ctl.c, v6.12): by mark first.
        let by_mark = self.view.servers.get(&ServerId::Mark(self.view.family, state.mark));
        let port = NonZeroU16::new(destination.port())?;
        let id = ServerId::Frontend { ip: destination.ip(), port, protocol: *protocol };
        by_mark.filter(|_| state.mark != 0).or_else(|| self.view.servers.get(&id))
    }

    fn remembered(&self, server: &Server, destinations: &[SocketAddr]) -> Option<SocketAddr> {
        let timeout = Duration::from_secs(server.persistence?.into());
        let Packet { destination, protocol, memory, .. } = self.packet;
        let here = memory.iter().filter(|(key, to, age)| {
            key.way_in == proxier_core::ir::WayIn::Address(destination.ip())
                && key.port.get() == destination.port()
                && key.protocol == *protocol
                && *age <= timeout
                && destinations.contains(to)
        });
        here.min_by_key(|(.., age)| *age).map(|(_, to, _)| *to)
    }

    fn chain(&self, name: &str, state: &mut State, depth: usize) -> End {
        for rule in self.view.chains.get(name).copied().unwrap_or_default() {
            match self.rule(rule, state, depth) {
                None => {}
                Some(end) => return end,
            }
        }
        End::Over
    }

    /// `None` when the rule does not apply, or does not decide.
    #[expect(clippy::wildcard_enum_match_arm, reason = "we write no others")]
    fn rule(&self, rule: &Rule, state: &mut State, depth: usize) -> Option<End> {
        for expr in &rule.exprs {
            match expr {
                Expr::Cmp { sreg, op, value } => {
                    if (state.bytes(*sreg, value.len()) == **value) != (*op == CmpOp::EQ) {
                        return None;
                    }
                }
                Expr::Lookup { set, sreg, dreg, invert } => {
                    let found = self.find(&set.name, &state.bytes(*sreg, REGISTERS));
                    if found.is_some() == *invert {
                        return None;
                    }
                    if let (Some(dreg), Some(mark)) = (dreg, found.flatten()) {
                        state.put(*dreg, &mark.to_ne_bytes());
                    }
                }
                Expr::Verdict(Verdict::Accept) => return Some(End::Accept),
                Expr::Verdict(Verdict::Drop) => return Some(End::Drop),
                Expr::Verdict(Verdict::Goto(chain)) if depth < DEPTH => {
                    return Some(self.chain(chain, state, depth + 1));
                }
                Expr::Reject { .. } => return Some(End::Reject),
                Expr::Masquerade { .. } => return Some(End::Masquerade),
                Expr::MetaSet { sreg, .. } => state.mark = state.word(*sreg),
                Expr::CtSet { sreg, .. } => state.ct_mark = state.word(*sreg),
                Expr::Bitwise { sreg, dreg, mask, xor } => {
                    let bytes = state.bytes(*sreg, mask.len());
                    let parts = bytes.iter().zip(&**mask).zip(&**xor);
                    let result: Vec<_> =
                        parts.map(|((byte, mask), xor)| (byte & mask) ^ xor).collect();
                    state.put(*dreg, &result);
                }
                Expr::Immediate { dreg, value } => state.put(*dreg, value),
                other => self.load(other, state),
            }
        }
        None
    }

    /// Loads what an expression asks of the packet or its connection.
    #[expect(clippy::wildcard_enum_match_arm, reason = "what we do not write loads nothing")]
    fn load(&self, expr: &Expr<'_>, state: &mut State) {
        let packet = self.packet;
        let source_at = if self.view.family == Family::V4 { 12 } else { 8 };
        let (dreg, value) = match expr {
            Expr::Payload { base: PayloadBase::TRANSPORT, dreg, .. } => {
                (*dreg, state.destination.port().to_be_bytes().to_vec())
            }
            Expr::Payload { offset, len, dreg, .. } => {
                let is_source = *offset == source_at;
                let mut bytes =
                    octets(if is_source { packet.source } else { state.destination.ip() });
                bytes.truncate(usize::try_from(*len).unwrap_or_default());
                (*dreg, bytes)
            }
            Expr::Meta { key: MetaKey::L4PROTO, dreg } => (*dreg, vec![packet.protocol.number()]),
            Expr::Meta { key: MetaKey::MARK, dreg } => (*dreg, state.mark.to_ne_bytes().to_vec()),
            Expr::Meta { dreg, .. } => {
                let mut name = packet.input.unwrap_or_default().as_bytes().to_vec();
                name.resize(16, 0);
                (*dreg, name)
            }
            Expr::Ct { key: CtKey::MARK, dreg, .. } => {
                (*dreg, state.ct_mark.to_ne_bytes().to_vec())
            }
            Expr::Ct { dreg, .. } => (*dreg, NEW.to_ne_bytes().to_vec()),
            Expr::Fib { flags, dreg, .. } => {
                let is_source = *flags == FibFlags::SADDR;
                let ip = if is_source { packet.source } else { state.destination.ip() };
                let kind = if self.is_local(ip) { LOCAL } else { UNICAST };
                (*dreg, kind.to_ne_bytes().to_vec())
            }
            _ => return,
        };
        let mut padded = value;
        padded.resize(padded.len().next_multiple_of(4), 0);
        state.put(dreg, &padded);
    }

    /// The value of the element that the bytes in the registers begin with.
    fn find(&self, set: &str, bytes: &[u8]) -> Option<Option<u32>> {
        let elements = self.view.sets.get(set)?;
        let is_met = |from: &[u8], to: Option<&Vec<u8>>| match to {
            None => bytes.starts_with(from),
            // Only the last field, an address, differs between the ends.
            Some(to) => bytes.get(..from.len()).is_some_and(|key| from <= key && key <= &**to),
        };
        let met = elements.iter().find(|(from, (to, _))| is_met(from, to.as_ref()));
        met.map(|(_, (_, mark))| *mark)
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.packet.local.contains(&ip) || self.view.addresses.contains(&ip)
    }
}

impl State {
    fn put(&mut self, reg: Reg, value: &[u8]) {
        let slots = self.registers.iter_mut().skip(first_byte(reg));
        slots.zip(value).for_each(|(to, from)| *to = *from);
    }

    fn bytes(&self, reg: Reg, len: usize) -> Vec<u8> {
        self.registers.iter().skip(first_byte(reg)).take(len).copied().collect()
    }

    fn word(&self, reg: Reg) -> u32 {
        u32::from_ne_bytes(self.bytes(reg, 4).try_into().unwrap_or_default())
    }
}

/// Where a register begins.
fn first_byte(reg: Reg) -> usize {
    (0..16).position(|slot| Reg::slot(slot) == reg).unwrap_or(REGISTERS) * 4
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

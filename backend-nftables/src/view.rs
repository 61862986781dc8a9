//! What the objects of this mode do to a packet: for tests on a kernel that only stores them.
//!
//! Rules, sets and maps are interpreted as the kernel does it. Nothing is compiled, and nothing is
//! known of Services, so that a mistake in the elements shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

pub use proxier_core::sim::Fate;
use proxier_core::{Family, FragmentId, Protocol, ir::Pool};
use proxier_netlink::nft::{
    CmpOp, CtKey, Dynset, Expr, FibFlags, MetaKey, PayloadBase, Reg, Verdict,
};

use crate::{
    codec,
    field::{Field, Side},
    object::{ChainName, Content, Element, Hook, Key, Object, PortId, SetName, Value},
    rule::Rule,
    skeleton::pick,
};

/// Chains deeper than this are taken for a loop.
// KERNEL: NFT_JUMP_STACK_SIZE (include/net/netfilter/nf_tables.h, v6.12).
const DEPTH: usize = 16;
/// Bytes of all registers.
const REGISTERS: usize = 64;

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
    /// The addresses the kernel calls local, besides loopback.
    pub local: &'a [IpAddr],
    /// Where connections of the same source to Service ports went, and how long ago.
    pub memory: &'a [(FragmentId, SocketAddr, Duration)],
}

/// The objects of one family, ready to be walked.
#[derive(Debug)]
pub struct View<'a> {
    family: Family,
    chains: BTreeMap<String, Vec<Rule>>,
    sets: BTreeMap<SetName, BTreeMap<Vec<u8>, Entry<'a>>>,
}

/// An element: the end of its interval and its value.
type Entry<'a> = (Vec<u8>, &'a Content);

/// A packet on its way, and what is in the registers.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct State {
    registers: [u8; REGISTERS],
    destination: SocketAddr,
    mark: u32,
    translated: bool,
    masqueraded: bool,
}

/// What a rule or chain comes to.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum End {
    Accept,
    Drop,
    /// The next rule.
    Next,
    Reject,
    To {
        chain: String,
        back: bool,
    },
    Return,
}

type Ends = BTreeSet<(State, End)>;

impl<'a> View<'a> {
    /// Takes the objects of one family as a kernel holds them.
    #[must_use]
    pub fn new(family: Family, objects: &'a BTreeMap<Key, Value>) -> Self {
        let mut view = Self { family, chains: BTreeMap::new(), sets: BTreeMap::new() };
        for (key, value) in objects.iter().filter(|(key, _)| key.family == family) {
            match (&key.object, &value.0) {
                (Object::Chain(name), Content::Chain(chain)) => {
                    let rules = view.chains.entry(name.to_string()).or_default();
                    rules.extend(chain.rules.iter().cloned());
                }
                // In the order in which they are added.
                (Object::Pick(it), _) => {
                    let chain = ChainName::Picks(it.space, it.pool).to_string();
                    view.chains.entry(chain).or_default().push(pick(family, *it));
                }
                (Object::Element(element), content) => {
                    let (mut from, mut to) = (Vec::new(), Vec::new());
                    codec::put_key(&mut from, element);
                    codec::put_key_end(&mut to, element);
                    view.sets.entry(element.set()).or_default().insert(from, (to, content));
                }
                _ => {}
            }
        }
        view
    }

    /// Everything that may become of a packet, as draws and memory have it.
    #[must_use]
    pub fn judge(&self, packet: &Packet<'_>) -> BTreeSet<Fate> {
        let walk = Walk { view: self, packet };
        let start = State {
            registers: [0; REGISTERS],
            destination: packet.destination,
            mark: 0,
            translated: false,
            masqueraded: false,
        };
        let nat = if packet.input.is_some() { Hook::NatPrerouting } else { Hook::NatOutput };
        let mut fates = BTreeSet::new();
        for (state, end) in walk.hook(nat, start) {
            if end == End::Drop {
                fates.insert(Fate::Dropped);
                continue;
            }
            let mut hooks = Vec::new();
            if packet.input.is_none() {
                hooks.push(Hook::FilterOutput);
            }
            hooks.push(match (walk.is_local(state.destination.ip()), packet.input) {
                (true, _) => Hook::FilterInput,
                (false, Some(_)) => Hook::FilterForward,
                (false, None) => Hook::FilterOutput,
            });
            hooks.push(Hook::NatPostrouting);
            walk.rest(&hooks, state, &mut fates);
        }
        fates
    }
}

struct Walk<'v> {
    view: &'v View<'v>,
    packet: &'v Packet<'v>,
}

impl Walk<'_> {
    /// Goes through the hooks behind the first.
    fn rest(&self, hooks: &[Hook], state: State, fates: &mut BTreeSet<Fate>) {
        let Some((hook, hooks)) = hooks.split_first() else {
            let State { destination: to, translated, masqueraded, .. } = state;
            fates.insert(match (translated, masqueraded) {
                (true, _) => Fate::Forwarded { to, masqueraded },
                (false, true) => Fate::Masqueraded,
                (false, false) => Fate::Untouched,
            });
            return;
        };
        for (state, end) in self.hook(*hook, state) {
            match end {
                End::Drop => drop(fates.insert(Fate::Dropped)),
                End::Reject => drop(fates.insert(Fate::Rejected)),
                End::Accept | End::Next | End::Return | End::To { .. } => {
                    self.rest(hooks, state, fates);
                }
            }
        }
    }

    fn hook(&self, hook: Hook, state: State) -> Ends {
        self.chain(&ChainName::Base(hook).to_string(), state, 0)
    }

    fn chain(&self, name: &str, state: State, depth: usize) -> Ends {
        let mut ends = Ends::new();
        if depth > DEPTH {
            return ends;
        }
        let mut states = BTreeSet::from([state]);
        for rule in self.view.chains.get(name).into_iter().flatten() {
            for state in std::mem::take(&mut states) {
                for (state, end) in self.rule(rule, state) {
                    match end {
                        End::Next => drop(states.insert(state)),
                        End::Return => drop(ends.insert((state, End::Next))),
                        End::To { chain, back } => {
                            for (state, end) in self.chain(&chain, state, depth + 1) {
                                if back && end == End::Next {
                                    states.insert(state);
                                } else {
                                    ends.insert((state, end));
                                }
                            }
                        }
                        End::Accept | End::Drop | End::Reject => drop(ends.insert((state, end))),
                    }
                }
            }
        }
        ends.extend(states.into_iter().map(|state| (state, End::Next)));
        ends
    }

    fn rule(&self, rule: &Rule, state: State) -> Ends {
        let mut ends = Ends::new();
        let mut states = BTreeSet::from([state]);
        for expr in &rule.0 {
            for state in std::mem::take(&mut states) {
                self.step(expr, state, &mut states, &mut ends);
            }
        }
        ends.extend(states.into_iter().map(|state| (state, End::Next)));
        ends
    }

    /// Carries out one expression: what goes on to the next is in `on`, the rest in `ends`.
    #[expect(clippy::wildcard_enum_match_arm, reason = "we write no others")]
    fn step(&self, expr: &Expr<'_>, mut state: State, on: &mut BTreeSet<State>, ends: &mut Ends) {
        match expr {
            Expr::Numgen { dreg, modulus, offset, .. } => {
                for number in 0..*modulus {
                    let mut state = state.clone();
                    state.put(*dreg, &(number + offset).to_ne_bytes());
                    on.insert(state);
                }
                return;
            }
            Expr::Cmp { sreg, op, value } => {
                if (state.bytes(*sreg, value.len()) == **value) != (*op == CmpOp::EQ) {
                    ends.insert((state, End::Next));
                    return;
                }
            }
            Expr::Lookup { set, sreg, dreg, invert } => {
                let found = SetName::parse(&set.name).and_then(|set| self.find(set, *sreg, &state));
                match (found, dreg) {
                    (found, None) if found.is_some() != *invert => {}
                    (Some(Content::Leads(chain)), Some(Reg::VERDICT)) => {
                        let back = matches!(chain, ChainName::Sticky(..));
                        ends.insert((state, End::To { chain: chain.to_string(), back }));
                        return;
                    }
                    (Some(Content::Endpoint(endpoint)), Some(dreg)) => {
                        let mut bytes = Vec::new();
                        codec::put_endpoint(&mut bytes, endpoint);
                        // Addresses from memory have no port.
                        let len = if endpoint.port == 0 { bytes.len() - 4 } else { bytes.len() };
                        state.put(*dreg, bytes.get(..len).unwrap_or_default());
                    }
                    _ => {
                        ends.insert((state, End::Next));
                        return;
                    }
                }
            }
            Expr::Verdict(verdict) => {
                let end = match verdict {
                    Verdict::Accept => End::Accept,
                    Verdict::Break | Verdict::Continue => End::Next,
                    Verdict::Drop => End::Drop,
                    Verdict::Goto(chain) => End::To { chain: chain.to_string(), back: false },
                    Verdict::Jump(chain) => End::To { chain: chain.to_string(), back: true },
                    Verdict::Return => End::Return,
                };
                ends.insert((state, end));
                return;
            }
            Expr::Reject { .. } => {
                ends.insert((state, End::Reject));
                return;
            }
            Expr::Nat(nat) => {
                let at = |range: Option<(Reg, Reg)>, len| {
                    range.map(|(first, _)| state.bytes(first, len)).unwrap_or_default()
                };
                let len = usize::from(Field::Daddr.slots(self.view.family)) * 4;
                let bytes = [at(nat.addr, len), at(nat.ports, 2), vec![0, 0]].concat();
                if let Some(to) = codec::endpoint(self.view.family, &bytes) {
                    state.destination = (to.ip, to.port).into();
                    state.translated = true;
                }
                ends.insert((state, End::Accept));
                return;
            }
            Expr::Masquerade { .. } => {
                state.masqueraded = true;
                ends.insert((state, End::Accept));
                return;
            }
            Expr::MetaSet { sreg, .. } => {
                let bytes = state.bytes(*sreg, 4).try_into().unwrap_or_default();
                state.mark = u32::from_ne_bytes(bytes);
            }
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                let bytes = state.bytes(*sreg, mask.len());
                let parts = bytes.iter().zip(&**mask).zip(&**xor);
                let result: Vec<_> = parts.map(|((byte, mask), xor)| (byte & mask) ^ xor).collect();
                state.put(*dreg, &result);
            }
            Expr::Immediate { dreg, value } => state.put(*dreg, value),
            // Clients may come from anywhere.
            Expr::Hash(hash) if hash.modulus != u32::MAX => {
                for number in 0..hash.modulus {
                    let mut state = state.clone();
                    state.put(hash.dreg, &number.to_ne_bytes());
                    on.insert(state);
                }
                return;
            }
            Expr::Hash(hash) => {
                // Nobody else is asked for: any number that depends on the source will do.
                let seed = hash.seed.unwrap_or_default();
                state.put(hash.dreg, &seed.to_ne_bytes());
            }
            other => self.load(other, &mut state),
        }
        on.insert(state);
    }

    /// Loads what an expression asks of the packet or its connection.
    #[expect(clippy::wildcard_enum_match_arm, reason = "what we do not write loads nothing")]
    fn load(&self, expr: &Expr<'_>, state: &mut State) {
        let packet = self.packet;
        let port = |to: SocketAddr| to.port().to_be_bytes().to_vec();
        let (dreg, value) = match expr {
            Expr::Payload { base: PayloadBase::TRANSPORT, dreg, .. } => {
                (*dreg, port(state.destination))
            }
            Expr::Payload { offset, len, dreg, .. } => {
                let is_source = *offset == Side::Source.offset(self.view.family);
                let ip = if is_source { packet.source } else { state.destination.ip() };
                let mut bytes = octets(ip);
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
            Expr::Ct { key: CtKey::STATE, dreg, .. } => (*dreg, 8_u32.to_ne_bytes().to_vec()),
            Expr::Ct { key: CtKey::STATUS, dreg, .. } => {
                let status = if state.translated { 0x20_u32 } else { 0 };
                (*dreg, status.to_ne_bytes().to_vec())
            }
            Expr::Ct { key: CtKey::PROTO_DST, dreg, .. } => (*dreg, port(packet.destination)),
            Expr::Ct { dreg, .. } => (*dreg, octets(packet.destination.ip())),
            Expr::Fib { flags, dreg, .. } => {
                let is_source = *flags == FibFlags::SADDR;
                let ip = if is_source { packet.source } else { state.destination.ip() };
                let kind = if self.is_local(ip) { 2_u32 } else { 1 };
                (*dreg, kind.to_ne_bytes().to_vec())
            }
            _ => return,
        };
        let len = value.len().next_multiple_of(4);
        let mut padded = value;
        padded.resize(len, 0);
        state.put(dreg, &padded);
    }

    /// The content of the element that the key in the registers meets.
    fn find(&self, set: SetName, sreg: Reg, state: &State) -> Option<Content> {
        let slots = set.layout(self.view.family).slots(self.view.family);
        let key = state.bytes(sreg, usize::from(slots) * 4);
        if let SetName::Affinity(pool) = set {
            return self.remembered(pool, &key);
        }
        let elements = self.view.sets.get(&set)?;
        if let SetName::Sources(_) = set {
            let address = usize::from(Field::Saddr.slots(self.view.family)) * 4;
            let is_met = |from: &[u8], to: &[u8]| {
                let (source, rest) = key.split_at(address);
                let split = |bound: &[u8]| {
                    let (first, rest) = bound.split_at(address);
                    (first.to_vec(), rest.to_vec())
                };
                let ((low, frontend), (high, _)) = (split(from), split(to));
                *source >= *low && *source <= *high && *rest == *frontend
            };
            let met = elements.iter().any(|(from, (to, _))| is_met(from, to));
            return met.then_some(Content::Exists);
        }
        elements.get(&key).map(|(_, content)| (*content).clone())
    }

    /// Where the youngest connection went that rules would have remembered and that still counts.
    fn remembered(&self, pool: Pool, key: &[u8]) -> Option<Content> {
        let id_of = |id: &FragmentId, to: &SocketAddr| PortId::of(id).at(to.port());
        let mine = key.get(key.len() - 8..)?;
        let counts = |(id, to, age): &&(FragmentId, SocketAddr, Duration)| {
            let port_id = id_of(id, to);
            let words: Vec<_> = port_id.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let member = Element::Member { pool, id: port_id, ip: to.ip() };
            let mut element = Vec::new();
            codec::put_key(&mut element, &member);
            let is_member =
                self.view.sets.get(&member.set()).is_some_and(|set| set.contains_key(&element));
            words == mine && is_member && *age <= self.timeout(id)
        };
        let youngest = self.packet.memory.iter().filter(counts).min_by_key(|(.., age)| *age);
        youngest
            .map(|(_, to, _)| Content::Endpoint(crate::object::Endpoint { ip: to.ip(), port: 0 }))
    }

    /// How long rules remember the clients of a Service port.
    fn timeout(&self, id: &FragmentId) -> Duration {
        let chain = ChainName::Remember(PortId::of(id)).to_string();
        let rules = self.view.chains.get(&chain).into_iter().flatten();
        let timeouts = rules.flat_map(|rule| &rule.0).filter_map(|expr| {
            let Expr::Dynset(Dynset { timeout_ms, .. }) = expr else { return None };
            timeout_ms.map(Duration::from_millis)
        });
        timeouts.max().unwrap_or_default()
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.packet.local.contains(&ip)
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

//! What becomes of the first packet of a connection, by the kernel objects and routes alone. Pure.
//!
//! It reads expressions as the kernel does, and knows nothing of how they were made: tests and
//! conformance cases compare it with the packet model.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what the rules of this mode do not use is not understood"
)]

use std::{collections::BTreeMap, net::SocketAddr};

use proxier_core::{
    Family,
    ir::{FamilyView, FrontendKey, Origin, Pool, Snat, Verdict as Row, WayIn},
    sim::Packet,
};
use proxier_netlink::nft::{
    CmpOp, CtKey, Expr, FibFlags, MetaKey, PayloadBase, Reg, Verdict as Nft,
};

use crate::object::{Chain, ChainName, Item, Key, Route, SetName, Value};

/// What becomes of a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fate {
    /// The process gets it, and learns this origin.
    Captured(Origin),
    /// Nothing.
    Drop,
    /// It met something that this view does not understand.
    Odd(String),
    /// It is refused.
    Reject,
    /// It goes its way.
    Untouched,
}

type Objects = BTreeMap<Key, Value>;

/// What becomes of a packet; one of the node's own goes through both hooks.
#[must_use]
pub fn judge(objects: &Objects, node: &FamilyView, packet: &Packet) -> Fate {
    let machine = Machine { objects, node, packet };
    machine.judge().unwrap_or_else(Fate::Odd)
}

/// Where the process connects to for a packet that it got, and whether the endpoint sees another
/// source than the client's. Empty when it refuses.
#[must_use]
pub fn endpoints(objects: &Objects, packet: &Packet, origin: Origin) -> BTreeMap<SocketAddr, bool> {
    let Some(route) = route(objects, packet) else { return BTreeMap::new() };
    let Row::Forward { pool, snat } = route.verdicts.of(origin) else { return BTreeMap::new() };
    let Some(Value::Service(service)) = objects.get(&Key::Service(route.service.clone())) else {
        return BTreeMap::new();
    };
    let members = match pool {
        Pool::Cluster => &service.cluster,
        Pool::Local => &service.local,
    };
    let changed = |addr: SocketAddr| snat == Snat::Masquerade || addr.ip() == packet.source;
    members.iter().map(|it| (it.addr, changed(it.addr))).collect()
}

/// The route of a packet: of its address, or of the node port.
fn route<'a>(objects: &'a Objects, packet: &Packet) -> Option<&'a Route> {
    let (to, protocol) = (packet.destination, packet.protocol);
    let port = to.port().try_into().ok()?;
    let ways = [WayIn::Address(to.ip()), WayIn::Node(Family::of(to.ip()))];
    ways.into_iter().find_map(|way_in| {
        match objects.get(&Key::Route(FrontendKey { way_in, port, protocol })) {
            Some(Value::Route(route)) => Some(&**route),
            _ => None,
        }
    })
}

struct Machine<'a> {
    objects: &'a Objects,
    node: &'a FamilyView,
    packet: &'a Packet,
}

enum Step {
    Decided(Fate),
    Marked,
    Over,
}

/// What is not understood, in words.
type Judged<T> = Result<T, String>;

impl Machine<'_> {
    fn judge(&self) -> Judged<Fate> {
        if self.packet.input.is_none() {
            match self.chain(&ChainName::Output)? {
                Step::Marked => {}
                Step::Decided(fate) => return Ok(fate),
                Step::Over => return Ok(Fate::Untouched),
            }
        }
        Ok(match self.chain(&ChainName::Prerouting)? {
            Step::Decided(fate) => fate,
            Step::Marked | Step::Over => Fate::Untouched,
        })
    }

    fn family(&self) -> Family {
        Family::of(self.packet.destination.ip())
    }

    fn chain(&self, name: &ChainName) -> Judged<Step> {
        let value = self.objects.get(&Key::Chain(self.family(), name.clone()));
        let Some(Value::Chain(Chain { rules, .. })) = value else {
            return Err(format!("no chain {name}"));
        };
        for rule in rules {
            if let Some(step) = self.rule(name, &rule.exprs)? {
                return Ok(step);
            }
        }
        Ok(Step::Over)
    }

    /// `None` when the rule does not apply, or does not decide.
    fn rule(&self, chain: &ChainName, exprs: &[Expr<'_>]) -> Judged<Option<Step>> {
        let mut registers = Registers([0; 64]);
        let mut marked = false;
        for expr in exprs {
            match expr {
                Expr::Cmp { sreg, op, value } => {
                    let equal = registers.from(*sreg).starts_with(value);
                    match *op {
                        CmpOp::EQ if equal => {}
                        CmpOp::NE if !equal => {}
                        CmpOp::EQ | CmpOp::NE => return Ok(None),
                        other => return Err(format!("{other:?}")),
                    }
                }
                Expr::Lookup { set, sreg, invert, .. } => {
                    if self.is_in(&set.name, registers.from(*sreg)) == *invert {
                        return Ok(None);
                    }
                }
                // Nobody has a socket yet.
                Expr::Socket { .. } => return Ok(None),
                Expr::MetaSet { key: MetaKey::MARK, .. } => marked = true,
                Expr::CtSet { .. } => {}
                Expr::Tproxy { .. } | Expr::Redirect { .. } | Expr::Nat(_) => {
                    let ChainName::Capture(origin) = chain else {
                        return Err(format!("{expr:?} in {chain}"));
                    };
                    return Ok(Some(Step::Decided(Fate::Captured(*origin))));
                }
                Expr::Reject { .. } => return Ok(Some(Step::Decided(Fate::Reject))),
                Expr::Verdict(verdict) => return self.verdict(verdict, marked).map(Some),
                other => {
                    let (dreg, bytes) = self.load(other, &registers)?;
                    registers.set(dreg, &bytes);
                }
            }
        }
        Ok(None)
    }

    fn verdict(&self, verdict: &Nft<'_>, marked: bool) -> Judged<Step> {
        match verdict {
            Nft::Accept if marked => Ok(Step::Marked),
            Nft::Accept => Ok(Step::Over),
            Nft::Drop => Ok(Step::Decided(Fate::Drop)),
            Nft::Goto(to) => {
                let known = ChainName::all().find(|name| name.to_string() == **to);
                self.chain(&known.ok_or_else(|| format!("no chain {to}"))?)
            }
            other => Err(format!("{other:?}")),
        }
    }

    /// What an expression loads, and where to.
    fn load(&self, expr: &Expr<'_>, registers: &Registers) -> Judged<(Reg, Vec<u8>)> {
        Ok(match expr {
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                let held = registers.from(*sreg).iter().zip(&mask[..]).zip(&xor[..]);
                (*dreg, held.map(|((it, mask), xor)| (it & mask) ^ xor).collect())
            }
            Expr::Meta { key, dreg } => (*dreg, self.meta(*key)?),
            Expr::Payload { base, offset, len, dreg } => {
                (*dreg, self.payload(*base, *offset, *len)?)
            }
            // A new connection that nobody translated.
            Expr::Ct { key: CtKey::STATE, dreg, .. } => (*dreg, 8_u32.to_ne_bytes().to_vec()),
            Expr::Ct { dreg, .. } => (*dreg, vec![0; 4]),
            Expr::Fib { flags, dreg, .. } => {
                let ip = match *flags {
                    FibFlags::SADDR => self.packet.source,
                    FibFlags::DADDR => self.packet.destination.ip(),
                    other => return Err(format!("{other:?}")),
                };
                let local = ip.is_loopback() || self.node.addresses.contains(&ip);
                (*dreg, (if local { 2_u32 } else { 1 }).to_ne_bytes().to_vec())
            }
            Expr::Immediate { dreg, value } => (*dreg, value.to_vec()),
            other => return Err(format!("{other:?}")),
        })
    }

    fn meta(&self, key: MetaKey) -> Judged<Vec<u8>> {
        Ok(match key {
            MetaKey::L4PROTO => vec![self.packet.protocol.number()],
            MetaKey::IIFNAME => {
                let mut name = self.packet.input.as_deref().unwrap_or("lo").as_bytes().to_vec();
                name.resize(16, 0);
                name
            }
            MetaKey::MARK => vec![0; 4],
            other => return Err(format!("{other:?}")),
        })
    }

    fn payload(&self, base: PayloadBase, offset: u32, len: u32) -> Judged<Vec<u8>> {
        let bytes = |ip: std::net::IpAddr| match ip {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let whole = match (base, offset) {
            (PayloadBase::NETWORK, 12 | 8) => bytes(self.packet.source),
            (PayloadBase::NETWORK, 16 | 24) => bytes(self.packet.destination.ip()),
            (PayloadBase::TRANSPORT, 2) => self.packet.destination.port().to_be_bytes().to_vec(),
            other => return Err(format!("{other:?}")),
        };
        let part = usize::try_from(len).ok().and_then(|len| whole.get(..len));
        part.map(<[u8]>::to_vec).ok_or_else(|| format!("{len} bytes at {offset}"))
    }

    /// Whether a key is in a set; what the rules compare with it is read from the packet.
    fn is_in(&self, set: &str, key: &[u8]) -> bool {
        let Packet { source, destination, protocol, .. } = self.packet;
        let is = |frontend: &FrontendKey| {
            frontend.port.get() == destination.port()
                && frontend.protocol == *protocol
                && match frontend.way_in {
                    WayIn::Address(ip) => {
                        ip == destination.ip() && key.first() != Some(&protocol.number())
                    }
                    WayIn::Node(family) => {
                        family == self.family() && key.first() == Some(&protocol.number())
                    }
                }
        };
        self.objects.keys().any(|it| match it {
            Key::Element(name, item) if name.to_string() == set => match item {
                Item::Address(ip) => *ip == destination.ip() && *name == SetName::NodeAddresses,
                Item::Allowed(frontend, net) => is(frontend) && net.contains(source),
                Item::Frontend(frontend) => is(frontend),
                Item::Mark(..) => false,
            },
            _ => false,
        })
    }
}

/// What rules compute with: sixteen words.
struct Registers([u8; 64]);

impl Registers {
    /// Where a register begins.
    fn at(reg: Reg) -> usize {
        (0..16_u8).find(|slot| Reg::slot(*slot) == reg).map_or(64, |slot| usize::from(slot) * 4)
    }

    /// What a register and those after it hold.
    fn from(&self, reg: Reg) -> &[u8] {
        self.0.get(Self::at(reg)..).unwrap_or_default()
    }

    /// Sets a register, and fills its last word with zeros.
    fn set(&mut self, reg: Reg, bytes: &[u8]) {
        let padding = std::iter::repeat_n(&0, bytes.len().next_multiple_of(4) - bytes.len());
        let to = self.0.iter_mut().skip(Self::at(reg));
        to.zip(bytes.iter().chain(padding)).for_each(|(to, byte)| *to = *byte);
    }
}

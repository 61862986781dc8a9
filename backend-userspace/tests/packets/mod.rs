//! What the rules do with the first packet of a connection. It reads expressions, as the kernel does,
//! and knows nothing of how they were made.

use std::collections::BTreeMap;

use proxier_backend_userspace::{Chain, ChainName, Item, Key, SetName, Value};
use proxier_core::{
    Family,
    ir::{FamilyView, FrontendKey, Origin, WayIn},
    sim::Packet,
};
use proxier_netlink::nft::{
    CmpOp, CtKey, Expr, FibFlags, MetaKey, PayloadBase, Reg, Verdict as Nft,
};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The process gets it, and learns this origin.
    Captured(Origin),
    Drop,
    Reject,
    Untouched,
}

type Objects = BTreeMap<Key, Value>;

/// What becomes of a packet; one of the node's own goes through both hooks.
pub(crate) fn judge(objects: &Objects, node: &FamilyView, packet: &Packet) -> Verdict {
    let machine = Machine { objects, node, packet };
    if packet.input.is_none() {
        match machine.chain(&ChainName::Output) {
            Step::Marked => {}
            Step::Decided(verdict) => return verdict,
            Step::Over => return Verdict::Untouched,
        }
    }
    match machine.chain(&ChainName::Prerouting) {
        Step::Decided(verdict) => verdict,
        Step::Marked | Step::Over => Verdict::Untouched,
    }
}

struct Machine<'a> {
    objects: &'a Objects,
    node: &'a FamilyView,
    packet: &'a Packet,
}

enum Step {
    Decided(Verdict),
    Marked,
    Over,
}

impl Machine<'_> {
    fn family(&self) -> Family {
        Family::of(self.packet.destination.ip())
    }

    fn chain(&self, name: &ChainName) -> Step {
        let value = self.objects.get(&Key::Chain(self.family(), name.clone()));
        let Some(Value::Chain(Chain { rules, .. })) = value else { panic!("no chain {name}") };
        for rule in rules {
            if let Some(step) = self.rule(name, &rule.exprs) {
                return step;
            }
        }
        Step::Over
    }

    /// `None` when the rule does not apply, or does not decide.
    fn rule(&self, chain: &ChainName, exprs: &[Expr<'_>]) -> Option<Step> {
        let mut registers = [0_u8; 64];
        let mut marked = false;
        let at = |reg: Reg| (0..16).find(|slot| Reg::slot(*slot) == reg).unwrap() as usize * 4;
        for expr in exprs {
            let (dreg, bytes) = match expr {
                Expr::Cmp { sreg, op, value } => {
                    let held = &registers[at(*sreg)..at(*sreg) + value.len()];
                    let holds = match *op {
                        CmpOp::EQ => held == &value[..],
                        CmpOp::NE => held != &value[..],
                        other => panic!("{other:?}"),
                    };
                    if !holds {
                        return None;
                    }
                    continue;
                }
                Expr::Lookup { set, sreg, invert, .. } => {
                    if self.is_in(&set.name, &registers[at(*sreg)..]) == *invert {
                        return None;
                    }
                    continue;
                }
                Expr::Bitwise { sreg, dreg, mask, xor } => {
                    let held = registers[at(*sreg)..].iter().zip(&mask[..]).zip(&xor[..]);
                    (*dreg, held.map(|((it, mask), xor)| (it & mask) ^ xor).collect())
                }
                Expr::Meta { key, dreg } => (*dreg, self.meta(*key)),
                Expr::Payload { base, offset, len, dreg } => {
                    (*dreg, self.payload(*base, *offset, *len))
                }
                // A new connection that nobody translated.
                Expr::Ct { key: CtKey::STATE, dreg, .. } => (*dreg, 8_u32.to_ne_bytes().to_vec()),
                Expr::Ct { dreg, .. } => (*dreg, vec![0; 4]),
                Expr::Fib { flags, dreg, .. } => {
                    let ip = match *flags {
                        FibFlags::SADDR => self.packet.source,
                        FibFlags::DADDR => self.packet.destination.ip(),
                        other => panic!("{other:?}"),
                    };
                    let local = ip.is_loopback() || self.node.addresses.contains(&ip);
                    (*dreg, (if local { 2_u32 } else { 1 }).to_ne_bytes().to_vec())
                }
                Expr::Immediate { dreg, value } => (*dreg, value.to_vec()),
                // Nobody has a socket yet.
                Expr::Socket { .. } => return None,
                Expr::MetaSet { key: MetaKey::MARK, .. } => {
                    marked = true;
                    continue;
                }
                Expr::CtSet { .. } => continue,
                Expr::Tproxy { .. } => {
                    let ChainName::Capture(origin) = chain else { panic!("{chain}") };
                    return Some(Step::Decided(Verdict::Captured(*origin)));
                }
                Expr::Reject { .. } => return Some(Step::Decided(Verdict::Reject)),
                Expr::Verdict(Nft::Accept) if marked => return Some(Step::Marked),
                Expr::Verdict(Nft::Accept) => return Some(Step::Over),
                Expr::Verdict(Nft::Drop) => return Some(Step::Decided(Verdict::Drop)),
                Expr::Verdict(Nft::Goto(to)) => {
                    let mut names = self.objects.keys().filter_map(|key| match key {
                        Key::Chain(_, name) => Some(name),
                        _ => None,
                    });
                    let Some(next) = names.find(|name| name.to_string() == *to) else {
                        panic!("no chain {to}")
                    };
                    return Some(self.chain(next));
                }
                other => panic!("{other:?}"),
            };
            registers[at(dreg)..at(dreg) + bytes.len().next_multiple_of(4)].fill(0);
            registers[at(dreg)..at(dreg) + bytes.len()].copy_from_slice(&bytes);
        }
        None
    }

    fn meta(&self, key: MetaKey) -> Vec<u8> {
        match key {
            MetaKey::L4PROTO => vec![self.packet.protocol.number()],
            MetaKey::IIFNAME => {
                let mut name = self.packet.input.as_deref().unwrap_or("lo").as_bytes().to_vec();
                name.resize(16, 0);
                name
            }
            MetaKey::MARK => vec![0; 4],
            other => panic!("{other:?}"),
        }
    }

    fn payload(&self, base: PayloadBase, offset: u32, len: u32) -> Vec<u8> {
        let bytes = |ip: std::net::IpAddr| match ip {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let whole = match (base, offset) {
            (PayloadBase::NETWORK, 12 | 8) => bytes(self.packet.source),
            (PayloadBase::NETWORK, 16 | 24) => bytes(self.packet.destination.ip()),
            (PayloadBase::TRANSPORT, 2) => self.packet.destination.port().to_be_bytes().to_vec(),
            other => panic!("{other:?}"),
        };
        whole[..usize::try_from(len).unwrap()].to_vec()
    }

    /// Whether a key is in a set; what the rules compare with it is read from the packet.
    fn is_in(&self, set: &str, key: &[u8]) -> bool {
        let Packet { source, destination, protocol, .. } = self.packet;
        let is = |frontend: &FrontendKey| {
            frontend.port.get() == destination.port()
                && frontend.protocol == *protocol
                && match frontend.way_in {
                    WayIn::Address(ip) => ip == destination.ip() && key[0] != protocol.number(),
                    WayIn::Node(family) => family == self.family() && key[0] == protocol.number(),
                }
        };
        self.objects.keys().any(|it| match it {
            Key::Element(name, item) if name.to_string() == set => match item {
                Item::Address(ip) => *ip == destination.ip() && *name == SetName::NodeAddresses,
                Item::Allowed(frontend, net) => is(frontend) && net.contains(source),
                Item::Frontend(frontend) => is(frontend),
            },
            _ => false,
        })
    }
}

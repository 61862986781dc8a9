//! Objects in words, as `nft` would list them. Pure.

use std::{fmt, net::IpAddr};

use proxier_core::{
    Family, Protocol,
    ir::{FrontendKey, WayIn},
};
use proxier_netlink::nft::{CmpOp, CtKey, Expr, FibFlags, MetaKey, PayloadBase, Reg, Verdict};

use crate::{
    field::{Field, Side, family_name},
    object::{Content, Element, Key, Object, Pick, SetName, Stray, Value},
    rule::Rule,
};

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = family_name(self.family);
        match &self.object {
            Object::Table => write!(f, "table {ip}"),
            Object::Set(set) => write!(f, "set {ip} {set}"),
            Object::Chain(chain) => write!(f, "chain {ip} {chain}"),
            Object::Pick(pick) => {
                let Pick { space, pool, size, protocol, turn } = *pick;
                let set = SetName::Size(space, pool, size);
                write!(f, "rule {ip} {} @{set}", protocol.lower())?;
                if turn == 0 { Ok(()) } else { write!(f, " again {turn}") }
            }
            Object::Element(element) => {
                write!(f, "element {ip} {} {{ {element} }}", element.set())
            }
            Object::Stray(stray) => match &**stray {
                Stray::Rule { chain, handle } => {
                    write!(f, "unknown rule {ip} {chain} handle {handle}")
                }
                Stray::Chain(name) => write!(f, "unknown chain {ip} {name}"),
                Stray::Set(name) => write!(f, "unknown set {ip} {name}"),
            },
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint { frontend, slot, .. } => write!(f, "{} . {slot}", Of(frontend)),
            Self::Frontend { frontend, .. }
            | Self::Size { frontend, .. }
            | Self::Remember(frontend)
            | Self::Spread { frontend, .. }
            | Self::Sticky { frontend, .. } => Of(frontend).fmt(f),
            Self::Source(source) => write!(f, "{} . {}", source.1, Of(&source.0)),
            Self::Hairpin(ip) => write!(f, "{ip} . {ip}"),
            Self::Member { id, ip, .. } => write!(f, "{ip} . {id}"),
            Self::Address { ip, .. } | Self::NodeAddress(ip) => ip.fmt(f),
            Self::Odd { key, .. } => {
                f.write_str("0x")?;
                key.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// A frontend as the key of a set.
struct Of<'a>(&'a FrontendKey);

impl fmt::Display for Of<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FrontendKey { way_in, port, protocol } = self.0;
        if let WayIn::Address(ip) = way_in {
            write!(f, "{ip} . ")?;
        }
        write!(f, "{} . {port}", protocol.lower())
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Content::Chain(chain) => {
                if let Some(comment) = &chain.comment {
                    writeln!(f, "comment \"{comment}\"")?;
                }
                chain.rules.iter().try_for_each(|rule| writeln!(f, "{rule}"))
            }
            Content::Endpoint(endpoint) => write!(f, "{} . {}", endpoint.ip, endpoint.port),
            Content::Exists => Ok(()),
            Content::Odd(text) => write!(f, "({text})"),
            Content::Leads(chain) => write!(f, "to {chain}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut reader = Reader { family: self.family(), loaded: Default::default(), text: vec![] };
        for expr in &self.0 {
            reader.read(expr);
        }
        f.write_str(&reader.text.join(" "))
    }
}

impl Rule {
    /// The family it is for, as far as it shows.
    #[expect(clippy::wildcard_enum_match_arm, reason = "no other expression shows it")]
    fn family(&self) -> Family {
        let is_v6 = self.0.iter().any(|expr| match expr {
            Expr::Payload { base: PayloadBase::NETWORK, offset, len, .. } => {
                *len > 4 || matches!(offset, 8 | 24)
            }
            Expr::Ct { key, .. } => *key == CtKey::DST_IP6,
            Expr::Nat(nat) => nat.family == proxier_netlink::nft::Family::Ipv6,
            _ => false,
        });
        if is_v6 { Family::V6 } else { Family::V4 }
    }
}

/// Puts expressions into words: remembers what is in which register.
struct Reader {
    family: Family,
    loaded: [Option<Loaded>; 16],
    text: Vec<String>,
}

#[derive(Clone, Debug)]
enum Loaded {
    Field(Field),
    /// The first so many bits of a field.
    Masked(Field, u32),
    Other(String),
}

impl Loaded {
    fn text(&self, family: Family) -> String {
        match self {
            Self::Field(field) | Self::Masked(field, _) => field.text(family),
            Self::Other(text) => text.clone(),
        }
    }
}

/// What `nft` has words for.
const PHRASES: [(&str, &str); 4] = [
    ("ct state & 0x6 0x0", "ct state ! established,related"),
    ("ct state & 0x8 != 0x0", "ct state new"),
    ("ct status & 0x20 0x0", "ct status ! dnat"),
    ("ct status & 0x20 != 0x0", "ct status dnat"),
];

/// A number after `(number & mask) ^ xor`.
fn changed(number: &str, mask: &[u8], xor: &[u8]) -> String {
    if mask.iter().zip(xor).all(|(mask, xor)| *mask == !*xor) {
        return format!("{number} | {}", hex(xor));
    }
    let mut text = number.to_owned();
    if mask.iter().any(|byte| *byte != 0xff) {
        text = format!("{text} & {}", hex(mask));
    }
    if xor.iter().any(|byte| *byte != 0) {
        text = format!("{text} ^ {}", hex(xor));
    }
    text
}

impl Reader {
    #[expect(clippy::wildcard_enum_match_arm, reason = "we write no others")]
    fn read(&mut self, expr: &Expr<'_>) {
        if let Some((field, dreg)) = Field::of(expr, self.family) {
            return self.load(dreg, Loaded::Field(field));
        }
        let other = |text: &str| Loaded::Other(text.to_owned());
        match expr {
            Expr::Payload { base: PayloadBase::NETWORK, offset, dreg, .. } => {
                let side = [Side::Source, Side::Destination]
                    .into_iter()
                    .find(|side| side.offset(self.family) == *offset);
                let field = if side == Some(Side::Source) { Field::Saddr } else { Field::Daddr };
                self.load(*dreg, Loaded::Field(field));
            }
            Expr::Meta { key: MetaKey::MARK, dreg } => self.load(*dreg, other("meta mark")),
            Expr::Meta { key: MetaKey::IIFNAME, dreg } => self.load(*dreg, other("iifname")),
            Expr::Meta { dreg, .. } => self.load(*dreg, other("meta")),
            Expr::Ct { key: CtKey::STATE, dreg, .. } => self.load(*dreg, other("ct state")),
            Expr::Ct { dreg, .. } => self.load(*dreg, other("ct status")),
            Expr::Fib { flags, dreg, .. } => {
                let side = if *flags == FibFlags::SADDR { "saddr" } else { "daddr" };
                self.load(*dreg, Loaded::Other(format!("fib {side} type")));
            }
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                let loaded = match self.field_at(*sreg) {
                    Some(field) => {
                        Loaded::Masked(field, mask.iter().map(|it| it.count_ones()).sum())
                    }
                    None => Loaded::Other(changed(&self.at(*sreg), mask, xor)),
                };
                self.load(*dreg, loaded);
            }
            Expr::Cmp { sreg, op, value } => {
                let not = if *op == CmpOp::NE { "!= " } else { "" };
                let value = match self.loaded.get(slot(*sreg)) {
                    Some(Some(Loaded::Field(field))) => in_words(*field, value, None, self.family),
                    Some(Some(Loaded::Masked(field, bits))) => {
                        in_words(*field, value, Some(*bits), self.family)
                    }
                    _ => self.plain(*sreg, value),
                };
                let text = format!("{} {not}{value}", self.at(*sreg));
                let known = PHRASES.iter().find(|(long, _)| *long == text);
                self.say(known.map_or(text, |(_, short)| (*short).to_owned()));
            }
            Expr::Lookup { set, sreg, dreg, invert } => {
                let key = self.key(*sreg, &set.name);
                let not = if *invert { "!= " } else { "" };
                match dreg {
                    None => self.say(format!("{key} {not}@{}", set.name)),
                    Some(Reg::VERDICT) => self.say(format!("{key} vmap @{}", set.name)),
                    Some(dreg) => {
                        self.load(*dreg, Loaded::Other(format!("{key} map @{}", set.name)));
                    }
                }
            }
            Expr::Immediate { dreg, value } => {
                self.load(*dreg, Loaded::Other(in_words(Field::Dport, value, None, self.family)));
            }
            Expr::MetaSet { sreg, .. } => self.say(format!("meta mark set {}", self.at(*sreg))),
            Expr::Dynset(dynset) => {
                let key = self.key(dynset.key, &dynset.set.name);
                let value = dynset.data.map(|reg| self.at(reg)).unwrap_or_default();
                let seconds = dynset.timeout_ms.unwrap_or_default() / 1000;
                let name = &dynset.set.name;
                self.say(format!("update @{name} {{ {key} timeout {seconds}s : {value} }}"));
            }
            Expr::Nat(nat) => {
                let at = |range: Option<(Reg, Reg)>| range.map(|(first, _)| self.at(first));
                let address = at(nat.addr).unwrap_or_default();
                let port = match at(nat.ports) {
                    Some(port) if !port.is_empty() => format!(" : {port}"),
                    _ => String::new(),
                };
                self.say(format!("dnat to {address}{port}"));
            }
            Expr::Masquerade { .. } => self.say("masquerade fully-random".to_owned()),
            Expr::Reject { .. } => self.say("reject".to_owned()),
            Expr::Verdict(verdict) => self.say(match verdict {
                Verdict::Accept => "accept".to_owned(),
                Verdict::Drop => "drop".to_owned(),
                Verdict::Goto(chain) => format!("goto {chain}"),
                Verdict::Jump(chain) => format!("jump {chain}"),
                Verdict::Return => "return".to_owned(),
                Verdict::Break | Verdict::Continue => "continue".to_owned(),
            }),
            // Not ours, or told by `Field::of`.
            _ => self.say(format!("{expr:?}")),
        }
    }

    fn say(&mut self, text: String) {
        self.text.push(text);
    }

    fn load(&mut self, reg: Reg, what: Loaded) {
        let slots = match &what {
            Loaded::Field(field) | Loaded::Masked(field, _) => {
                usize::from(field.slots(self.family))
            }
            // An address and a port, where it is from a map.
            Loaded::Other(_) => usize::from(Field::Daddr.slots(self.family)) + 1,
        };
        let first = slot(reg);
        for slot in self.loaded.iter_mut().skip(first).take(slots) {
            *slot = None;
        }
        if let Some(slot) = self.loaded.get_mut(first) {
            *slot = Some(what);
        }
    }

    fn field_at(&self, reg: Reg) -> Option<Field> {
        match self.loaded.get(slot(reg)) {
            Some(Some(Loaded::Field(field))) => Some(*field),
            _ => None,
        }
    }

    fn at(&self, reg: Reg) -> String {
        match self.loaded.get(slot(reg)) {
            Some(Some(loaded)) => loaded.text(self.family),
            _ => String::new(),
        }
    }

    /// The fields that make up the key of a set.
    fn key(&self, reg: Reg, set: &str) -> String {
        let layout = SetName::parse(set).map(|set| set.layout(self.family));
        let len = layout.map_or(1, |layout| usize::from(layout.slots(self.family)));
        let slots = self.loaded.iter().skip(slot(reg)).take(len).flatten();
        let parts: Vec<_> = slots.map(|loaded| loaded.text(self.family)).collect();
        parts.join(" . ")
    }

    /// A value that is compared with something that is no field.
    fn plain(&self, reg: Reg, value: &[u8]) -> String {
        let what = self.at(reg);
        if what == "iifname" {
            let text: String =
                value.iter().filter(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
            let star = if value.len() < 16 { "*" } else { "" };
            return format!("\"{text}{star}\"");
        }
        if what.starts_with("fib") { "local".to_owned() } else { hex(value) }
    }
}

/// The slot that a register begins with.
fn slot(reg: Reg) -> usize {
    (0..16).position(|slot| Reg::slot(slot) == reg).unwrap_or(usize::MAX)
}

/// A value that a field, or its first bits, are compared with.
fn in_words(field: Field, value: &[u8], bits: Option<u32>, family: Family) -> String {
    match (field, value) {
        (Field::Proto, [number]) => [Protocol::Sctp, Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|protocol| protocol.number() == *number)
            .map_or_else(|| number.to_string(), |protocol| protocol.lower().to_owned()),
        (Field::Dport, [high, low]) => u16::from_be_bytes([*high, *low]).to_string(),
        (Field::Daddr | Field::Saddr, _) => network(value, bits, family),
        _ => hex(value),
    }
}

/// The network that begins with some bytes.
fn network(value: &[u8], bits: Option<u32>, family: Family) -> String {
    let mut octets = [0; 16];
    for (to, from) in octets.iter_mut().zip(value) {
        *to = *from;
    }
    let bits = bits.or_else(|| u32::try_from(value.len() * 8).ok()).unwrap_or_default();
    let ip: IpAddr = match (octets, family) {
        ([a, b, c, d, ..], Family::V4) => [a, b, c, d].into(),
        (octets, Family::V6) => octets.into(),
    };
    if bits == 32 && ip.is_ipv4() || bits == 128 { ip.to_string() } else { format!("{ip}/{bits}") }
}

/// A number of the host's order, or bytes.
fn hex(value: &[u8]) -> String {
    match value.try_into() {
        Ok(bytes) => format!("{:#x}", u32::from_ne_bytes(bytes)),
        Err(_) => {
            let digits: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("0x{digits}")
        }
    }
}

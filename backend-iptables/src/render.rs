//! Rules as `iptables -S` lists them. Pure.
//!
//! The text is that of iptables 1.8.9 to the letter: plans show it, and tests compare it with what
//! the tool prints.

use std::fmt::{self, Write};

use ipnet::IpNet;
use proxier_core::Family;

use crate::rule::{
    CtStates, Interface, MarkMatch, Matches, Net, Port, Recent, RecentAction, Side, Target,
};

impl fmt::Display for Matches<'_> {
    /// The matches, each with a blank before it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, interface, transport, ct_state, .. } = self;
        net(f, 's', *source)?;
        net(f, 'd', *destination)?;
        if let Some(Interface { not, name, prefix }) = interface {
            write!(f, "{} -i {name}{}", bang(*not), if *prefix { "+" } else { "" })?;
        }
        if let Some(transport) = transport {
            write!(f, " -p {}", transport.protocol.lower())?;
        }
        if let Some(states) = ct_state.filter(|states| states.comes_first()) {
            ct_states(f, states)?;
        }
        self.extensions(f)?;
        if let Some(states) = ct_state.filter(|states| !states.comes_first()) {
            ct_states(f, states)?;
        }
        let Some(transport) = transport else { return Ok(()) };
        match transport.port {
            Port::Unasked => Ok(()),
            Port::Any => write!(f, " -m {}", transport.protocol.lower()),
            Port::Is(port) => write!(f, " -m {} --dport {port}", transport.protocol.lower()),
            Port::Within(first, last) => {
                write!(f, " -m {} --dport {first}:{last}", transport.protocol.lower())
            }
        }
    }
}

impl Matches<'_> {
    fn extensions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(text) = self.comment {
            f.write_str(" -m comment --comment ")?;
            quoted(f, text)?;
        }
        match self.local {
            None => {}
            Some(Side::Destination) => f.write_str(" -m addrtype --dst-type LOCAL")?,
            Some(Side::Source) => f.write_str(" -m addrtype --src-type LOCAL")?,
        }
        if let Some(it) = self.recent {
            recent(f, it)?;
        }
        if let Some(chance) = self.chance {
            let probability = f64::from(chance) / f64::from(1_u32 << 31);
            write!(f, " -m statistic --mode random --probability {probability:.11}")?;
        }
        if let Some(every) = self.every {
            write!(f, " -m statistic --mode nth --every {every} --packet 0")?;
        }
        match self.mark {
            None => Ok(()),
            Some(MarkMatch { not, value, mask: u32::MAX }) => {
                write!(f, " -m mark{} --mark {value:#x}", bang(not))
            }
            Some(MarkMatch { not, value, mask }) => {
                write!(f, " -m mark{} --mark {value:#x}/{mask:#x}", bang(not))
            }
        }
    }
}

impl CtStates {
    /// Says whether the match stands before the comment. kube-proxy puts it there in the jumps from
    /// the built-in chains, and those are the rules that ask for new connections.
    pub(crate) const fn comes_first(self) -> bool {
        !self.not && self.mask == Self::NEW
    }
}

impl fmt::Display for Target<'_> {
    /// The target with `-j`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("-j ACCEPT"),
            Self::Dnat(to) => write!(f, "-j DNAT --to-destination {to}"),
            Self::Drop => f.write_str("-j DROP"),
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Mark { value, mask } => write!(f, "-j MARK --set-xmark {value:#x}/{mask:#x}"),
            Self::Masquerade { random_fully: false } => f.write_str("-j MASQUERADE"),
            Self::Masquerade { random_fully: true } => f.write_str("-j MASQUERADE --random-fully"),
            Self::Nothing => Ok(()),
            Self::Reject(Family::V4) => {
                f.write_str("-j REJECT --reject-with icmp-port-unreachable")
            }
            Self::Reject(Family::V6) => {
                f.write_str("-j REJECT --reject-with icmp6-port-unreachable")
            }
            Self::Return => f.write_str("-j RETURN"),
        }
    }
}

const fn bang(not: bool) -> &'static str {
    if not { " !" } else { "" }
}

fn net(f: &mut fmt::Formatter<'_>, side: char, net: Option<Net>) -> fmt::Result {
    let Some(Net { not, net }) = net else { return Ok(()) };
    let (addr, len) = (net.addr(), net.prefix_len());
    write!(f, "{} -{side} {addr}/{len}", bang(not))
}

fn ct_states(f: &mut fmt::Formatter<'_>, states: CtStates) -> fmt::Result {
    write!(f, " -m conntrack{} --ctstate ", bang(states.not))?;
    let mut separator = "";
    for (bit, name) in CtStates::NAMES {
        if states.mask & bit != 0 {
            write!(f, "{separator}{name}")?;
            separator = ",";
        }
    }
    Ok(())
}

fn recent(f: &mut fmt::Formatter<'_>, recent: Recent<'_>) -> fmt::Result {
    let Recent { name, family, action } = recent;
    match action {
        RecentAction::Check(seconds) => {
            write!(f, " -m recent --rcheck --seconds {seconds} --reap --name {name}")?;
        }
        RecentAction::Set => write!(f, " -m recent --set --name {name}")?,
    }
    let mask = match family {
        Family::V4 => "255.255.255.255",
        Family::V6 => "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    };
    write!(f, " --mask {mask} --rsource")
}

/// Text as iptables quotes it: not at all if that is safe.
fn quoted(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if !text.is_empty() && text.bytes().all(plain) {
        return f.write_str(text);
    }
    f.write_char('"')?;
    for part in text.chars() {
        if matches!(part, '"' | '\\' | '\'') {
            f.write_char('\\')?;
        }
        f.write_char(part)?;
    }
    f.write_char('"')
}

/// The network as iptables stores it: without bits beyond the prefix; `None` for "any".
pub(crate) fn canonical(net: IpNet) -> Option<IpNet> {
    (net.prefix_len() > 0).then(|| net.trunc())
}

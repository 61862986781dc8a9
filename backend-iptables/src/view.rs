//! What the objects of this mode do to a packet: for tests on a kernel that only stores them.
//!
//! Chains, matches and targets are interpreted as the kernel does it. Nothing is compiled, and
//! nothing is known of Services, so that a mistake in the rules shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

pub use proxier_core::sim::Fate;
use proxier_core::{Family, Protocol};

use crate::{
    Iptables,
    object::{BaseChain, Content, Key, Object, Place, Table, Value},
    pack::Unpacker,
    rule::{CtStates, Matches, Port, RecentAction, Side, Target},
    skeleton::jumps,
};

/// Chains deeper than this are taken for a loop.
// KERNEL: NFT_JUMP_STACK_SIZE (include/net/netfilter/nf_tables.h, v6.12).
const DEPTH: usize = 16;

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
    /// Lists of `xt_recent` that know the source, and for how long.
    pub recent: &'a BTreeMap<String, Duration>,
}

/// The rules of one family, ready to be walked.
#[derive(Debug)]
pub struct View<'a> {
    chains: BTreeMap<(Table, String), Vec<(Matches<'a>, Target<'a>)>>,
}

/// What a packet is on its way.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct State {
    destination: SocketAddr,
    mark: u32,
    translated: bool,
    masqueraded: bool,
    end: End,
}

/// Where the walk stands.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum End {
    Accept,
    Drop,
    /// Nothing is decided.
    Open,
    Reject,
    /// Back to the chain before.
    Return,
    /// Translated; the rest of the table is not asked.
    Translated,
}

impl<'a> View<'a> {
    /// Takes the objects of one family as a kernel holds them.
    ///
    /// Rules of shared chains have no order but first and last; jumps from built-in chains have the
    /// one in which `backend` puts them there.
    #[must_use]
    pub fn new(backend: &Iptables, family: Family, objects: &'a BTreeMap<Key, Value>) -> Self {
        let mut chains: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut tails: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let order: Vec<_> = jumps(backend.names()).iter().map(|jump| jump.key(family)).collect();
        let mut heads: Vec<_> = objects.iter().filter(|(key, _)| key.family() == family).collect();
        heads.sort_by_key(|(key, _)| {
            // Each is put at the head, so that the last one is the first.
            std::cmp::Reverse(order.iter().position(|jump| jump == *key))
        });
        for (key, value) in heads {
            match (&key.0, &value.0) {
                (Object::Chain { table, name, .. }, Content::Rules(rules)) => {
                    let chain = chains.entry((*table, name.to_string())).or_default();
                    chain.extend(rules.iter().flatten());
                }
                (Object::Entry { table, chain, matches, .. }, Content::Entry { target, place }) => {
                    let rule = Unpacker(matches).matches().zip(Unpacker(target).target());
                    let list = if *place == Place::Tail { &mut tails } else { &mut chains };
                    list.entry((*table, chain.to_string())).or_default().extend(rule);
                }
                _ => {}
            }
        }
        for (chain, rules) in tails {
            chains.entry(chain).or_default().extend(rules);
        }
        Self { chains }
    }

    /// Everything that may become of a packet: more than one thing where a rule holds at random.
    #[must_use]
    pub fn judge(&self, packet: &Packet<'_>) -> BTreeSet<Fate> {
        let start = State {
            destination: packet.destination,
            mark: 0,
            translated: false,
            masqueraded: false,
            end: End::Open,
        };
        let is_own = packet.input.is_none();
        let first = if is_own { BaseChain::NatOutput } else { BaseChain::NatPrerouting };
        let translated = self.hook(first, packet, vec![start]);
        translated.into_iter().flat_map(|state| self.route(packet, state)).collect()
    }

    /// From behind the first translation to the end.
    fn route(&self, packet: &Packet<'_>, state: State) -> BTreeSet<Fate> {
        let comes_in = is_local(packet, state.destination.ip());
        let hooks: &[BaseChain] = match (packet.input.is_none(), comes_in) {
            (true, true) => {
                &[BaseChain::FilterOutput, BaseChain::NatPostrouting, BaseChain::FilterInput]
            }
            (true, false) => &[BaseChain::FilterOutput, BaseChain::NatPostrouting],
            (false, true) => &[BaseChain::FilterInput],
            (false, false) => &[BaseChain::FilterForward, BaseChain::NatPostrouting],
        };
        let mut open = vec![state];
        let mut fates = BTreeSet::new();
        for (index, hook) in hooks.iter().enumerate() {
            let last = index + 1 == hooks.len();
            let (ended, going): (Vec<_>, Vec<_>) = self
                .hook(*hook, packet, open)
                .into_iter()
                .partition(|state| matches!(state.end, End::Drop | End::Reject));
            fates.extend(ended.iter().map(fate));
            // What one hook accepts the next one may still refuse; the last word counts.
            let is_filter = hook.table() == Table::Filter;
            let goes_on = |state: State| {
                let accepted = state.end == End::Accept && is_filter && comes_in && last;
                State { end: if accepted { End::Accept } else { End::Open }, ..state }
            };
            open = going.into_iter().map(goes_on).collect();
        }
        fates.extend(open.iter().map(fate));
        fates
    }

    fn hook(&self, chain: BaseChain, packet: &Packet<'_>, states: Vec<State>) -> Vec<State> {
        let name = chain.name();
        let walked = states.into_iter().map(|state| State { end: End::Open, ..state });
        walked.flat_map(|state| self.walk(chain, name, packet, state, DEPTH)).collect()
    }

    /// Walks a chain. A walk that ends with [`End::Open`] goes on behind the jump.
    fn walk(
        &self,
        hook: BaseChain,
        name: &str,
        packet: &Packet<'_>,
        state: State,
        depth: usize,
    ) -> Vec<State> {
        let key = (hook.table(), name.to_owned());
        let rules = self.chains.get(&key).map(Vec::as_slice).unwrap_or_default();
        let mut open = vec![state];
        let mut ended = Vec::new();
        for (matches, target) in rules {
            let mut next = Vec::new();
            for state in open {
                if !holds(matches, hook, packet, &state) {
                    next.push(state);
                    continue;
                }
                if matches.chance.is_some() || matches.every.is_some() {
                    next.push(state);
                }
                for after in self.apply(hook, target, packet, state, depth) {
                    if after.end == End::Open { next.push(after) } else { ended.push(after) }
                }
            }
            open = next;
        }
        let back = |state: State| {
            let end = if state.end == End::Return { End::Open } else { state.end };
            State { end, ..state }
        };
        ended.into_iter().chain(open).map(back).collect()
    }

    fn apply(
        &self,
        hook: BaseChain,
        target: &Target<'_>,
        packet: &Packet<'_>,
        state: State,
        depth: usize,
    ) -> Vec<State> {
        let end = |end| vec![State { end, ..state }];
        match target {
            Target::Accept => end(End::Accept),
            Target::Dnat(to) => {
                vec![State { destination: *to, translated: true, end: End::Translated, ..state }]
            }
            Target::Drop => end(End::Drop),
            Target::Jump(_) if depth == 0 => end(End::Drop),
            Target::Jump(name) => self.walk(hook, name, packet, state, depth - 1),
            Target::Mark { value, mask } => {
                vec![State { mark: (state.mark & !mask) ^ value, ..state }]
            }
            Target::Masquerade { .. } => {
                vec![State { masqueraded: true, end: End::Translated, ..state }]
            }
            Target::Nothing => vec![state],
            Target::Reject(_) => end(End::Reject),
            Target::Return => end(End::Return),
        }
    }
}

/// Says whether the kernel calls an address local.
fn is_local(packet: &Packet<'_>, ip: IpAddr) -> bool {
    ip.is_loopback() || packet.local.contains(&ip)
}

fn holds(matches: &Matches<'_>, hook: BaseChain, packet: &Packet<'_>, state: &State) -> bool {
    let Matches {
        source, destination, interface, transport, ct_state, local, recent, mark, ..
    } = matches;
    let in_net = |net: &Option<crate::rule::Net>, ip: IpAddr| {
        net.is_none_or(|it| it.net.contains(&ip) != it.not)
    };
    // Behind routing there is no input interface any more.
    let has_input = !matches!(hook, BaseChain::NatPostrouting);
    let input = packet.input.filter(|_| has_input).unwrap_or_default();
    let comes_in = interface.is_none_or(|it| {
        let found = if it.prefix { input.starts_with(it.name) } else { input == it.name };
        found != it.not
    });
    let transported = transport.is_none_or(|it| {
        it.protocol == packet.protocol
            && match it.port {
                Port::Any | Port::Unasked => true,
                Port::Is(port) => port == state.destination.port(),
                Port::Within(first, last) => (first..=last).contains(&state.destination.port()),
            }
    });
    let states = CtStates::NEW | if state.translated { CtStates::DNAT } else { 0 };
    let is_local_side = local.is_none_or(|side| match side {
        Side::Destination => is_local(packet, state.destination.ip()),
        Side::Source => is_local(packet, packet.source),
    });
    let seen = recent.is_none_or(|it| match it.action {
        RecentAction::Check(seconds) => packet
            .recent
            .get(it.name)
            .is_some_and(|age| *age <= Duration::from_secs(seconds.into())),
        RecentAction::Set => true,
    });
    in_net(source, packet.source)
        && in_net(destination, state.destination.ip())
        && comes_in
        && transported
        && ct_state.is_none_or(|it| (it.mask & states != 0) != it.not)
        && is_local_side
        && seen
        && mark.is_none_or(|it| (state.mark & it.mask == it.value) != it.not)
}

fn fate(state: &State) -> Fate {
    match state.end {
        End::Drop => Fate::Dropped,
        End::Reject => Fate::Rejected,
        End::Accept | End::Open | End::Return | End::Translated if state.translated => {
            Fate::Forwarded { to: state.destination, masqueraded: state.masqueraded }
        }
        End::Accept => Fate::Accepted,
        End::Open | End::Return | End::Translated if state.masqueraded => Fate::Masqueraded,
        End::Open | End::Return | End::Translated => Fate::Untouched,
    }
}

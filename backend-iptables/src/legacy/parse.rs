//! From what `iptables-save` lists to objects. Pure.

use std::{
    borrow::Cow,
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    slice,
};

use ipnet::IpNet;
use proxier_core::{Family, Protocol};

use super::input::{MARK, MARK_SUFFIX};
use crate::{
    dataplane::{Objects, Scope, our_chain},
    names::ChainName,
    object::{BaseChain, Content, Key, Object, RulesBuilder, Table, Value},
    rule::{
        CtStates, Interface, MarkMatch, Matches, Net, Port, Recent, RecentAction, Side, Target,
        Transport,
    },
};

/// What a table holds.
pub(super) struct Found {
    pub(super) objects: Objects,
    /// Rules that are not ours in chains that are, as the tool lists them behind `-A`.
    pub(super) foreign: HashMap<Key, String>,
    /// The chain that is shared with kubelet exists.
    pub(super) has_firewall: bool,
}

/// Reads a table.
///
/// Its built-in chains always exist, and nobody has to make them.
pub(super) fn table(scope: &Scope<'_>, table: Table, listing: &str) -> Found {
    let family = scope.family;
    let mut objects = Objects::new();
    objects.insert(Key::table_key(family, table), Value(Content::Exists));
    for base in BaseChain::ALL.into_iter().filter(|base| base.table() == table) {
        objects.insert(Key::base(family, base), Value(Content::Exists));
    }
    let mut has_firewall = false;
    for chain in listing.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next()) {
        has_firewall |= table == Table::Filter && chain == scope.names.firewall.as_str();
        let kind = our_chain(scope.prefix, scope.names, table, chain).zip(ChainName::new(chain));
        let Some((kind, name)) = kind else { continue };
        let value = if scope.is_shared(table, kind, &name) {
            Value(Content::Shared)
        } else {
            RulesBuilder::new(&name).build()
        };
        objects.insert(Key::chain(family, table, kind, name), value);
    }
    let mut foreign = HashMap::new();
    let mut chains: Vec<(&str, Vec<&str>)> = Vec::new();
    for rule in listing.lines().filter_map(|line| line.strip_prefix("-A ")) {
        let chain = rule.split(' ').next().unwrap_or_default();
        // A chain's rules stand together.
        match chains.last_mut().filter(|last| last.0 == chain) {
            Some((_, rules)) => rules.push(rule),
            None => chains.push((chain, vec![rule])),
        }
    }
    for (chain, rules) in chains {
        let mut reader = scope.chain(table, chain);
        let mut texts = HashMap::new();
        for (index, rule) in rules.into_iter().enumerate() {
            let handle = handle(rule, index);
            texts.insert(handle, rule);
            let words = words(rule);
            let parsed = parse(family, &words);
            reader.take(parsed.as_ref().map(|(matches, target)| (matches, target)), handle);
        }
        let before = objects.len();
        reader.finish(&mut objects, |_, _| {});
        if objects.len() > before {
            let unknown = objects.keys().filter_map(|key| {
                let Object::Foreign { chain: name, handle, table: of, .. } = &key.0 else {
                    return None;
                };
                let text = texts.get(handle).filter(|_| *of == table && name.as_str() == chain)?;
                Some((key.clone(), (*text).to_owned()))
            });
            foreign.extend(unknown);
        }
    }
    let in_use = objects.keys().any(|key| scope.is_about_firewall(key));
    if !in_use {
        objects.remove(&scope.firewall());
    }
    Found { objects, foreign, has_firewall }
}

/// A number for a rule, which has none here.
fn handle(rule: &str, index: usize) -> u64 {
    let mut hasher = DefaultHasher::new();
    (rule, index).hash(&mut hasher);
    hasher.finish()
}

/// The target of a rule as it is listed.
pub(super) fn target_chain(rule: &str) -> Option<&str> {
    let (_, rest) = rule.rsplit_once(" -j ").or_else(|| rule.rsplit_once(" -g "))?;
    rest.split(' ').next()
}

/// Says whether a listed rule carries our mark.
pub(super) fn is_marked(rule: &str) -> bool {
    let words = words(rule);
    let comment = words.iter().skip_while(|word| **word != "--comment").nth(1);
    comment.is_some_and(|it| it == MARK || it.ends_with(MARK_SUFFIX))
}

/// The words of a listed rule, without quotes.
fn words(rule: &str) -> Vec<Cow<'_, str>> {
    let mut words = Vec::new();
    let mut rest = rule.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
                (Cow::Borrowed(word), after)
            }
        };
        words.push(word);
        rest = after.trim_start();
    }
    words
}

/// A text up to its closing quote, and what comes behind it.
fn unquote(text: &str) -> (Cow<'_, str>, &str) {
    let mut word = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (word.into(), text.get(at + 1..).unwrap_or_default()),
            '\\' => word.extend(chars.next().map(|(_, char)| char)),
            char => word.push(char),
        }
    }
    (word.into(), "")
}

/// A rule from its words; `None` if it says something that rules of ours never say.
fn parse<'w>(family: Family, words: &'w [Cow<'w, str>]) -> Option<(Matches<'w>, Target<'w>)> {
    let (_, words) = words.split_first()?;
    let mut parser = Parser {
        family,
        words: words.iter(),
        matches: Matches::default(),
        protocol: None,
        port: Port::Unasked,
        recent: None,
    };
    let target = parser.rule()?;
    let Parser { mut matches, protocol, port, recent, .. } = parser;
    matches.transport = match (protocol, port) {
        (Some(protocol), port) => Some(Transport { protocol, port }),
        (None, Port::Unasked) => None,
        (None, Port::Any | Port::Is(_) | Port::Within(..)) => return None,
    };
    matches.recent = match recent {
        None => None,
        Some(Partial { action: Some(action), name: Some(name), seconds, reaps }) => {
            let action = match (action, seconds, reaps) {
                (RecentAction::Check(_), Some(seconds), true) => RecentAction::Check(seconds),
                (RecentAction::Set, None, false) => RecentAction::Set,
                _ => return None,
            };
            Some(Recent { name, family, action })
        }
        Some(_) => return None,
    };
    if matches.comment == Some(MARK) {
        (matches.owned, matches.comment) = (true, None);
    } else if let Some(comment) = matches.comment.and_then(|it| it.strip_suffix(MARK_SUFFIX)) {
        (matches.owned, matches.comment) = (true, Some(comment));
    }
    Some((matches, target))
}

/// What is known of a `recent` match so far.
#[derive(Default)]
struct Partial<'w> {
    action: Option<RecentAction>,
    name: Option<&'w str>,
    seconds: Option<u32>,
    reaps: bool,
}

struct Parser<'w> {
    family: Family,
    words: slice::Iter<'w, Cow<'w, str>>,
    matches: Matches<'w>,
    protocol: Option<Protocol>,
    port: Port,
    recent: Option<Partial<'w>>,
}

impl<'w> Parser<'w> {
    fn word(&mut self) -> Option<&'w str> {
        self.words.next().map(|word| &**word)
    }

    fn number(&mut self) -> Option<u32> {
        self.word()?.parse().ok()
    }

    /// Reads all options and the target.
    fn rule(&mut self) -> Option<Target<'w>> {
        let mut not = false;
        while let Some(word) = self.word() {
            match word {
                "!" => {
                    not = true;
                    continue;
                }
                "-s" => self.matches.source = Some(self.net(not)?),
                "-d" => self.matches.destination = Some(self.net(not)?),
                "-i" => {
                    let name = self.word()?;
                    let (name, prefix) = match name.strip_suffix('+') {
                        Some(name) => (name, true),
                        None => (name, false),
                    };
                    self.matches.interface = Some(Interface { not, name, prefix });
                }
                "--ctstate" => self.matches.ct_state = Some(self.ct_states(not)?),
                "--mark" => self.matches.mark = Some(self.mark(not)?),
                "-j" if !not => return self.target(),
                // The rest cannot be turned round.
                word if !not => self.option(word)?,
                _ => return None,
            }
            not = false;
        }
        (!not).then_some(Target::Nothing)
    }

    /// Reads an option of a match.
    fn option(&mut self, word: &str) -> Option<()> {
        match word {
            "-p" => self.protocol = Some(self.protocol()?),
            "-m" => match self.word()? {
                "comment" | "addrtype" | "conntrack" | "statistic" | "mark" => {}
                "recent" => self.recent = Some(Partial::default()),
                "tcp" | "udp" | "sctp" => self.port = Port::Any,
                _ => return None,
            },
            "--comment" => self.matches.comment = Some(self.word()?),
            "--dport" => self.port = self.port()?,
            "--dst-type" => self.local(Side::Destination)?,
            "--src-type" => self.local(Side::Source)?,
            "--mode" => self.statistic()?,
            "--rcheck" => self.recent.as_mut()?.action = Some(RecentAction::Check(0)),
            "--set" => self.recent.as_mut()?.action = Some(RecentAction::Set),
            "--reap" => self.recent.as_mut()?.reaps = true,
            "--seconds" => {
                let seconds = self.number()?;
                self.recent.as_mut()?.seconds = Some(seconds);
            }
            "--name" => {
                let name = self.word()?;
                self.recent.as_mut()?.name = Some(name);
            }
            "--mask" => {
                let whole = match self.family {
                    Family::V4 => IpAddr::from([u8::MAX; 4]),
                    Family::V6 => IpAddr::from([u8::MAX; 16]),
                };
                (self.word()?.parse::<IpAddr>().ok()? == whole).then_some(())?;
            }
            "--rsource" => {}
            _ => return None,
        }
        Some(())
    }

    fn net(&mut self, not: bool) -> Option<Net> {
        let word = self.word()?;
        let net = match word.parse::<IpNet>() {
            Ok(net) => net,
            Err(_) => IpNet::from(word.parse::<IpAddr>().ok()?),
        };
        (self.family.has(&net.addr()) && net.trunc() == net).then_some(Net { not, net })
    }

    fn protocol(&mut self) -> Option<Protocol> {
        let name = self.word()?;
        let all = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp];
        all.into_iter().find(|protocol| protocol.lower() == name)
    }

    fn port(&mut self) -> Option<Port> {
        let word = self.word()?;
        Some(match word.split_once(':') {
            None => Port::Is(word.parse().ok()?),
            Some((first, last)) => Port::Within(first.parse().ok()?, last.parse().ok()?),
        })
    }

    fn local(&mut self, side: Side) -> Option<()> {
        (self.word()? == "LOCAL" && self.matches.local.is_none()).then_some(())?;
        self.matches.local = Some(side);
        Some(())
    }

    fn ct_states(&mut self, not: bool) -> Option<CtStates> {
        let bit = |name: &str| CtStates::NAMES.iter().find(|it| it.1 == name).map(|it| it.0);
        let mask = self.word()?.split(',').try_fold(0, |mask, name| Some(mask | bit(name)?))?;
        Some(CtStates { not, mask })
    }

    fn mark(&mut self, not: bool) -> Option<MarkMatch> {
        let (value, mask) = pair(self.word()?)?;
        Some(MarkMatch { not, value, mask })
    }

    fn statistic(&mut self) -> Option<()> {
        match self.word()? {
            "random" => {
                (self.word()? == "--probability").then_some(())?;
                let probability: f64 = self.word()?.parse().ok()?;
                let chance = (probability * f64::from(1_u32 << 31)).round();
                let range = 0.0..=f64::from(1_u32 << 31);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "it is in range, and whole"
                )]
                let chance = range.contains(&chance).then_some(chance as u32)?;
                self.matches.chance = Some(chance);
            }
            "nth" => {
                (self.word()? == "--every").then_some(())?;
                self.matches.every = Some(self.word()?.parse().ok()?);
                (self.word()? == "--packet" && self.number()? == 0).then_some(())?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Reads the target, with which the rule ends.
    fn target(&mut self) -> Option<Target<'w>> {
        let target = match self.word()? {
            "ACCEPT" => Target::Accept,
            "DROP" => Target::Drop,
            "RETURN" => Target::Return,
            "DNAT" => {
                (self.word()? == "--to-destination").then_some(())?;
                Target::Dnat(self.word()?.parse::<SocketAddr>().ok()?)
            }
            "MARK" => {
                (self.word()? == "--set-xmark").then_some(())?;
                let (value, mask) = pair(self.word()?)?;
                Target::Mark { value, mask }
            }
            "MASQUERADE" => match self.word() {
                None => Target::Masquerade { random_fully: false },
                Some("--random-fully") => Target::Masquerade { random_fully: true },
                Some(_) => return None,
            },
            "REJECT" => {
                (self.word()? == "--reject-with").then_some(())?;
                let expected = match self.family {
                    Family::V4 => "icmp-port-unreachable",
                    Family::V6 => "icmp6-port-unreachable",
                };
                (self.word()? == expected).then_some(())?;
                Target::Reject(self.family)
            }
            chain => Target::Jump(chain),
        };
        self.word().is_none().then_some(target)
    }
}

/// "0x4000/0x4000", or "0x4000" for all bits.
fn pair(text: &str) -> Option<(u32, u32)> {
    let hex = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    match text.split_once('/') {
        None => Some((hex(text)?, u32::MAX)),
        Some((value, mask)) => Some((hex(value)?, hex(mask)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of a rule, as it would be written.
    fn read(family: Family, rule: &str) -> Option<String> {
        let words = words(rule);
        let (matches, target) = parse(family, &words)?;
        let owned = if matches.owned { " [ours]" } else { "" };
        Some(format!("{}{matches} {target}{owned}", words[0]).trim_end().to_owned())
    }

    #[test]
    fn what_the_tool_lists_is_read() {
        let rules = [
            "A ! -s 10.61.0.0/16 -d 10.97.1.11/32 -p tcp -m comment --comment \"a/b cluster IP\" \
             -m tcp --dport 80 -j KUBE-MARK-MASQ",
            "A -i veth+ -j RETURN",
            "A -p sctp -m sctp --dport 30720:30751 -j KUBE-NP-SCTP-30720-30751",
            "A -m comment --comment \"a \\\"b\\\" \\\\\" -m statistic --mode random --probability \
             0.33333333349 -j B",
            "A -m statistic --mode nth --every 3 --packet 0 -j B",
            "A -m recent --rcheck --seconds 600 --reap --name X --mask 255.255.255.255 --rsource \
             -j X",
            "A -p udp -m recent --set --name X --mask 255.255.255.255 --rsource -m udp -j DNAT \
             --to-destination 10.1.1.1:53",
            "A -m conntrack --ctstate NEW -m comment --comment x -j B",
            "A -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
            "A -m mark ! --mark 0x4000/0x4000 -j RETURN",
            "A -j MARK --set-xmark 0x4000/0x0",
            "A -j MASQUERADE --random-fully",
            "A -j REJECT --reject-with icmp-port-unreachable",
            "A -m addrtype --dst-type LOCAL -j ACCEPT",
            "A -m comment --comment note",
        ];
        for rule in rules {
            assert_eq!(read(Family::V4, rule).as_deref(), Some(rule));
        }
        let v6 = "A -d fd00::1/128 -p tcp -m tcp -j DNAT --to-destination [fd00::5]:80";
        assert_eq!(read(Family::V6, v6).as_deref(), Some(v6));
    }

    #[test]
    fn our_mark_is_a_comment() {
        let marked = read(Family::V4, "A -m comment --comment proxier -j B");
        assert_eq!(marked.as_deref(), Some("A -j B [ours]"));
        let marked = read(Family::V4, "A -m comment --comment \"x y (proxier)\" -j DROP");
        assert_eq!(marked.as_deref(), Some("A -m comment --comment \"x y\" -j DROP [ours]"));
        assert!(is_marked("A -m comment --comment proxier -j B"));
        assert!(!is_marked("A -m comment --comment proxier2 -j B"));
    }

    #[test]
    fn what_our_rules_never_say_is_not_read() {
        let rules = [
            "A -m length --length 10:20 -j RETURN",
            "A -o eth0 -j RETURN",
            "A -g B",
            "A -s 10.1.2.3/255.0.255.0 -j B",
            "A -m recent --update --name X --mask 255.255.255.255 --rsource -j B",
            "A -m recent --rcheck --name X --mask 255.255.255.0 --rsource -j B",
            "A -m statistic ! --mode random --probability 0.5 -j B",
            "A -m statistic --mode nth --every 3 --packet 1 -j B",
            "A -p icmp -j B",
            "A -j DNAT --to-destination 10.1.1.1",
            "A -j REJECT --reject-with tcp-reset",
            "A -j LOG --log-prefix x",
        ];
        for rule in rules {
            assert_eq!(read(Family::V4, rule), None, "{rule}");
        }
    }
}

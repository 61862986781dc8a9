//! Finds out whether the iptables mode works here, and says why not. Changes nothing.

use std::fs;

use proxier_core::{Family, Protocol};
use proxier_netlink::{
    ErrorKind, NetNs,
    nft::{ExprWriter, NftError, NftSocket, RuleSpec, Transaction},
};

use crate::{
    dataplane::nft_family,
    encode,
    legacy::{Command, Tool, ToolError},
    object::Table,
    rule::{
        CtStates, Interface, MarkMatch, Matches, Port, Recent, RecentAction, Side, Target,
        Transport,
    },
};

/// Whether the iptables mode works in a network namespace.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Suitability {
    /// It works, in at least one family.
    pub available: bool,
    /// The families it works in.
    pub families: Vec<Family>,
    /// Why it does not work, where it does not.
    pub reasons: Vec<String>,
    /// What works, but may surprise.
    pub warnings: Vec<String>,
    /// `net.netfilter.nf_conntrack_tcp_be_liberal` is set, so that dropping INVALID packets is not
    /// needed: see [`Config::drop_invalid`](crate::Config::drop_invalid).
    pub tcp_be_liberal: bool,
}

/// Finds out whether the iptables mode works in a network namespace.
///
/// Every match and target is tried in a transaction that is then given up, so nothing is left behind,
/// and what the kernel lacks is named. It may load kernel modules, as the first sync would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe(netns: &NetNs) -> Suitability {
    let mut found = Suitability::default();
    match netns.run(Facts::read) {
        Ok(facts) => facts.tell(&mut found),
        Err(error) => {
            found.reasons.push(error.to_string());
            return found;
        }
    }
    let mut socket = match NftSocket::open(netns) {
        Ok(socket) => socket,
        Err(error) => {
            found.reasons.push(error.to_string());
            return found;
        }
    };
    for family in Family::ALL {
        match try_family(&mut socket, family).await {
            Ok(missing) if missing.is_empty() => found.families.push(family),
            Ok(missing) => {
                let missing = missing.join(", ");
                found.reasons.push(format!("{family}: the kernel has no {missing}"));
            }
            Err(error) => found.reasons.push(format!("{family}: {error}")),
        }
        found.reasons.dedup();
    }
    found.available = !found.families.is_empty();
    found
}

/// Finds out whether the iptables mode works on x_tables in a network namespace: see
/// [`legacy_engine`](crate::legacy_engine()).
///
/// Lists the tables with iptables-legacy's programs, which may load kernel modules, as the first sync
/// would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe_legacy(netns: &NetNs) -> Suitability {
    let mut found = Suitability { tcp_be_liberal: tcp_be_liberal(netns), ..Suitability::default() };
    let inside = netns.clone();
    let listed = tokio::task::spawn_blocking(move || list_legacy(&inside)).await;
    match listed {
        Ok(Ok(families)) => {
            for (family, outcome) in families {
                match outcome {
                    Ok(()) => found.families.push(family),
                    Err(reason) => found.reasons.push(format!("{family}: {reason}")),
                }
            }
        }
        Ok(Err(error)) => found.reasons.push(error.to_string()),
        Err(error) => found.reasons.push(error.to_string()),
    }
    found.available = !found.families.is_empty();
    if let Ok(mut socket) = NftSocket::open(netns) {
        for family in Family::ALL {
            let tables = socket.tables(nft_family(family)).await.unwrap_or_default();
            let ours = |name: &str| Table::ALL.iter().any(|table| table.name() == name);
            for table in tables.iter().filter(|table| ours(&table.name) && table.uses > 0) {
                found.warnings.push(format!(
                    "nf_tables has a table {} {} (iptables-nft?): its rules apply too, and \
                     iptables-legacy does not list them",
                    table.family, table.name
                ));
            }
        }
    }
    found
}

/// A family, and why its tables could not be listed.
type Listed = (Family, Result<(), String>);

/// Lists both tables of each family; says what the tool said if it cannot.
fn list_legacy(netns: &NetNs) -> Result<Vec<Listed>, ToolError> {
    let tool = Tool::find(netns)?;
    let list = |family| {
        for table in Table::ALL {
            let output =
                tool.run(&Command::save(family, table)).map_err(|error| error.to_string())?;
            if !output.succeeded() {
                return Err(output.errors());
            }
        }
        Ok(())
    };
    Ok(Family::ALL.map(|family| (family, list(family))).into())
}

/// Says whether connection tracking lets TCP packets outside the window pass, so that few are
/// INVALID. "No" where that cannot be told.
pub(crate) fn tcp_be_liberal(netns: &NetNs) -> bool {
    netns.run(is_liberal).unwrap_or(false)
}

/// Reads the setting of the calling thread's namespace.
fn is_liberal() -> bool {
    let setting = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal");
    setting.is_ok_and(|text| text.trim() != "0")
}

/// What files say.
struct Facts {
    legacy_v4: Vec<String>,
    legacy_v6: Vec<String>,
    has_ipv6: bool,
    tcp_be_liberal: bool,
    route_localnet: bool,
}

impl Facts {
    /// Reads files of the namespace of the calling thread.
    fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let lines = |path: &str| text(path).lines().map(str::to_owned).collect();
        let is_one = |path: &str| text(path).trim() == "1";
        Self {
            legacy_v4: lines("/proc/thread-self/net/ip_tables_names"),
            legacy_v6: lines("/proc/thread-self/net/ip6_tables_names"),
            has_ipv6: fs::exists("/proc/thread-self/net/if_inet6").unwrap_or(false)
                && !is_one("/proc/sys/net/ipv6/conf/all/disable_ipv6"),
            tcp_be_liberal: is_liberal(),
            route_localnet: is_one("/proc/sys/net/ipv4/conf/all/route_localnet"),
        }
    }

    fn tell(self, found: &mut Suitability) {
        found.tcp_be_liberal = self.tcp_be_liberal;
        for (tool, tables) in
            [("iptables-legacy", self.legacy_v4), ("ip6tables-legacy", self.legacy_v6)]
        {
            if !tables.is_empty() {
                let tables = tables.join(", ");
                found.warnings.push(format!(
                    "{tool} has tables here ({tables}): their rules apply too, and {tool} does not \
                     list ours"
                ));
            }
        }
        if !self.has_ipv6 {
            found
                .warnings
                .push("IPv6 is off: its rules are written, but see no packets".to_owned());
        }
        if !self.route_localnet {
            found.warnings.push(
                "net.ipv4.conf.all.route_localnet is 0: node ports do not answer on 127.0.0.1"
                    .to_owned(),
            );
        }
    }
}

/// Tries everything in one family; returns what is missing.
async fn try_family(socket: &mut NftSocket, family: Family) -> Result<Vec<String>, NftError> {
    let mut samples = samples(family);
    let mut missing = Vec::new();
    loop {
        let end = u32::try_from(samples.len()).unwrap_or(u32::MAX);
        match socket.commit(&attempt(family, &samples)).await {
            Err(NftError::Refused(refusal)) if refusal.tag == Some(end) => return Ok(missing),
            Err(NftError::Refused(refusal)) if refusal.kind() != ErrorKind::Permission => {
                let at = refusal.tag.and_then(|tag| usize::try_from(tag).ok());
                let Some(at) = at.filter(|at| *at < samples.len()) else {
                    return Err(NftError::Refused(refusal));
                };
                missing.push(format!("{} ({})", samples.remove(at).0, refusal.ack));
            }
            Err(error) => return Err(error),
            // The last message names what does not exist.
            Ok(_) => return Err(NftError::Stale),
        }
    }
}

/// A rule with one thing to try.
type Sample = (&'static str, Table, Matches<'static>, Target<'static>);

fn samples(family: Family) -> Vec<Sample> {
    let none = Matches::default();
    let matching = |name, matches| (name, Table::Nat, matches, Target::Return);
    let target = |name, table, target| (name, table, none, target);
    let recent = Recent { name: PROBE, family, action: RecentAction::Set };
    let transport =
        |protocol| Matches { transport: Some(Transport { protocol, port: Port::Any }), ..none };
    let endpoint = match family {
        Family::V4 => ([192, 0, 2, 1], 80).into(),
        Family::V6 => ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 80).into(),
    };
    let interface = Interface { not: false, name: PROBE, prefix: false };
    let mark = MarkMatch { not: false, value: 0, mask: 0 };
    vec![
        matching("match comment", Matches { comment: Some(PROBE), ..none }),
        matching("match addrtype", Matches { local: Some(Side::Source), ..none }),
        matching("match recent", Matches { recent: Some(recent), ..none }),
        matching("match statistic", Matches { chance: Some(0), ..none }),
        matching(
            "match conntrack",
            Matches { ct_state: Some(CtStates::is(CtStates::NEW)), ..none },
        ),
        matching("match tcp", transport(Protocol::Tcp)),
        matching("match udp", transport(Protocol::Udp)),
        matching("match sctp", transport(Protocol::Sctp)),
        matching("interface names", Matches { interface: Some(interface), ..none }),
        matching("packet marks", Matches { mark: Some(mark), ..none }),
        target("target MARK", Table::Nat, Target::Mark { value: 0, mask: 0 }),
        target("target DNAT", Table::Nat, Target::Dnat(endpoint)),
        target("target MASQUERADE", Table::Nat, Target::Masquerade { random_fully: true }),
        target("target REJECT", Table::Filter, Target::Reject(family)),
    ]
}

/// A name that is nobody's.
const PROBE: &str = "proxier-probe";
const NOTHING: &str = "proxier-nothing";

/// A transaction that tries samples, and fails at the end in any case.
fn attempt(family: Family, samples: &[Sample]) -> Transaction {
    let kernel = nft_family(family);
    let mut tx = Transaction::new();
    for table in Table::ALL {
        tx.new_table(kernel, table.name());
        tx.new_chain(kernel, table.name(), PROBE);
    }
    for (index, (_, table, matches, target)) in (0..).zip(samples) {
        tx.op(index);
        let mut spec = RuleSpec::append(kernel, table.name(), PROBE);
        if let Some(compat) = encode::compat(matches) {
            spec = spec.compat(compat);
        }
        let body = |w: &mut ExprWriter<'_>| encode::write(w, family, matches, target);
        tx.rule(spec, body);
    }
    tx.op(u32::try_from(samples.len()).unwrap_or(u32::MAX));
    tx.del_chain(kernel, Table::Nat.name(), NOTHING);
    tx
}

//! From a fragment to chains and rules, as kube-proxy writes them. Pure.

mod external;

use std::{fmt::Write, net::SocketAddr};

use proxier_core::{
    Family, Protocol,
    ir::{
        Detector, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat,
        Verdict, Verdicts, WayIn,
    },
    spi::{Objects, PlanError},
};

use crate::{
    names::{ChainName, FixedNames, PortHash, ServiceChain},
    object::{ChainKind, Key, Place, RulesBuilder, Table, Value},
    render::canonical,
    rule::{Interface, Matches, Net, Port, Recent, RecentAction, Side, Target, Transport},
    xt::cut,
};

/// Longest name of an interface.
// KERNEL: IFNAMSIZ less the NUL (include/uapi/linux/if.h, v6.12).
const INTERFACE_BYTES: usize = 15;

/// What a fragment's rules have in common.
pub(crate) struct Compiler<'a> {
    prefix: &'a str,
    names: &'a FixedNames,
    node: &'a FamilyView,
    fragment: &'a Fragment,
    family: Family,
    /// `namespace/name:port`, in names and comments.
    text: String,
    hash: PortHash,
    out: &'a mut Objects<Key, Value>,
    /// The comment under construction.
    comment: String,
}

/// Which packets to a cluster IP are masqueraded.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Masquerade {
    All,
    AllButPods,
    None,
}

/// An endpoint and its chain.
type Endpoint = (SocketAddr, ChainName);

fn unsupported(reason: impl Into<String>) -> PlanError {
    PlanError::Unsupported { mode: "iptables", reason: reason.into() }
}

impl<'a> Compiler<'a> {
    pub(crate) fn new(
        prefix: &'a str,
        names: &'a FixedNames,
        node: &'a FamilyView,
        fragment: &'a Fragment,
        out: &'a mut Objects<Key, Value>,
    ) -> Self {
        let (text, protocol) = (fragment.id.port_text(), fragment.id.protocol);
        let hash = PortHash::new(&text, protocol);
        let comment = String::with_capacity(text.len() + 80);
        Self { prefix, names, node, fragment, family: fragment.id.family, text, hash, out, comment }
    }

    /// Declares all objects of the fragment.
    pub(crate) fn run(mut self) -> Result<(), PlanError> {
        let fragment = self.fragment;
        check(fragment)?;
        let endpoints: Vec<Endpoint> = fragment
            .reachable()
            .iter()
            .map(|it| (it.addr, self.hash.endpoint_chain(self.prefix, it.addr)))
            .collect();
        for endpoint in &endpoints {
            self.endpoint(*endpoint);
        }
        let mut internal = Vec::new();
        for frontend in &fragment.frontends {
            if frontend.kind == FrontendKind::ClusterIp {
                internal.extend(self.cluster_ip(frontend)?);
            }
        }
        self.pool(Pool::Cluster, &internal, &endpoints);
        self.pool(Pool::Local, &internal, &endpoints);
        self.external()
    }

    fn endpoint(&mut self, (addr, name): Endpoint) {
        let mut rules = RulesBuilder::new(&name);
        let base = Matches { comment: Some(cut(&self.text)), ..Matches::default() };
        let source = Some(Net::is(addr.ip().into()));
        let mark_masq = Target::Jump(self.names.mark_masq.as_str());
        rules.push(&Matches { source, ..base }, &mark_masq);
        let action = RecentAction::Set;
        let recent = self.fragment.affinity.map(|_| self.recent(&name, action));
        let transport = Some(Transport { protocol: self.protocol(), port: Port::Any });
        rules.push(&Matches { recent, transport, ..base }, &Target::Dnat(addr));
        self.own_chain(ChainKind::Endpoint, name, rules);
    }

    /// Writes the rules for one cluster IP; returns the rule that belongs into a pool's chain.
    fn cluster_ip(
        &mut self,
        frontend: &Frontend,
    ) -> Result<Option<(Pool, FrontendKey, Masquerade)>, PlanError> {
        match frontend.verdicts.rows() {
            [Verdict::Reject, Verdict::Reject, Verdict::Reject] => {
                self.refuse(self.names.services, frontend, Verdict::Reject);
                Ok(None)
            }
            [Verdict::Drop, Verdict::Drop, Verdict::Drop] => {
                self.refuse(self.names.services, frontend, Verdict::Drop);
                Ok(None)
            }
            [
                Verdict::Forward { pool, snat: pod },
                Verdict::Forward { pool: second, snat: node },
                Verdict::Forward { pool: third, snat: external },
            ] if pool == second && pool == third => {
                let masquerade = self.cluster_ip_masquerade([pod, node, external])?;
                let chain = self.service_chain(pool_chain(pool));
                self.say(|text| write!(text, " cluster IP"));
                let key = self.nat_entry(self.names.services, &frontend.key);
                self.out.own(key, Value::entry(&Target::Jump(chain.as_str()), Place::Head));
                Ok(Some((pool, frontend.key, masquerade)))
            }
            _ => Err(unsupported(mixed(frontend))),
        }
    }

    fn cluster_ip_masquerade(&self, rows: [Snat; 3]) -> Result<Masquerade, PlanError> {
        match rows {
            [Snat::Preserve, Snat::Preserve, Snat::Preserve] => Ok(Masquerade::None),
            [Snat::Masquerade, Snat::Masquerade, Snat::Masquerade] => Ok(Masquerade::All),
            [Snat::Preserve, Snat::Masquerade, Snat::Masquerade]
                if self.node.detector.is_some() =>
            {
                Ok(Masquerade::AllButPods)
            }
            _ => Err(unsupported("a cluster IP that masquerades some of the sources only")),
        }
    }

    /// The chain that picks an endpoint of a pool, if the pool has any.
    fn pool(
        &mut self,
        pool: Pool,
        internal: &[(Pool, FrontendKey, Masquerade)],
        endpoints: &[Endpoint],
    ) {
        let members = self.fragment.pool(pool);
        if members.is_empty() {
            return;
        }
        let kind = pool_chain(pool);
        let name = self.service_chain(kind);
        let mut rules = RulesBuilder::new(&name);
        for (_, key, masquerade) in internal.iter().filter(|it| it.0 == pool) {
            self.masquerade_cluster_ip(&mut rules, key, *masquerade);
        }
        let chain_of = |member: &Member| {
            let index = endpoints.binary_search_by_key(&member.addr, |endpoint| endpoint.0);
            index.ok().and_then(|index| endpoints.get(index)).copied()
        };
        if let Some(seconds) = self.fragment.affinity {
            for (addr, chain) in members.iter().filter_map(chain_of) {
                let recent = Some(self.recent(&chain, RecentAction::Check(seconds.get())));
                let comment = self.endpoint_comment(addr);
                let matches = Matches { comment: Some(comment), recent, ..Matches::default() };
                rules.push(&matches, &Target::Jump(chain.as_str()));
            }
        }
        let mut left = members.len();
        for (addr, chain) in members.iter().filter_map(chain_of) {
            let chance = (left > 1).then(|| one_in(left));
            let comment = self.endpoint_comment(addr);
            let matches = Matches { comment: Some(comment), chance, ..Matches::default() };
            rules.push(&matches, &Target::Jump(chain.as_str()));
            left -= 1;
        }
        self.own_chain(ChainKind::Service(kind), name, rules);
    }

    fn masquerade_cluster_ip(
        &mut self,
        rules: &mut RulesBuilder,
        key: &FrontendKey,
        masquerade: Masquerade,
    ) {
        self.say(|text| write!(text, " cluster IP"));
        let mut matches = self.address(key);
        match masquerade {
            Masquerade::None => return,
            Masquerade::All => {}
            // Every source is a pod's, so nobody is left.
            Masquerade::AllButPods if self.detects_all() => return,
            Masquerade::AllButPods => self.add_detector(&mut matches, true),
        }
        rules.push(&matches, &Target::Jump(self.names.mark_masq.as_str()));
    }

    /// Rejects or drops what comes to a frontend.
    fn refuse(&mut self, chain: ChainName, frontend: &Frontend, verdict: Verdict) {
        let (what, target) = match verdict {
            Verdict::Reject => (" has no endpoints", Target::Reject(self.family)),
            Verdict::Drop | Verdict::Forward { .. } => (" has no local endpoints", Target::Drop),
        };
        self.say(|text| text.write_str(what));
        let mut matches = self.address(&frontend.key);
        if let WayIn::Node(_) = frontend.key.way_in {
            matches.local = Some(Side::Destination);
        }
        let key = Key::entry(self.family, Table::Filter, chain, &matches);
        self.out.own(key, Value::entry(&target, Place::Head));
    }

    fn protocol(&self) -> Protocol {
        self.fragment.id.protocol
    }

    fn service_chain(&self, kind: ServiceChain) -> ChainName {
        self.hash.chain(self.prefix, kind)
    }

    fn own_chain(&mut self, kind: ChainKind, name: ChainName, rules: RulesBuilder) {
        self.out.own(Key::chain(self.family, Table::Nat, kind, name), rules.build());
    }

    /// The key of a rule in a shared nat chain that has the comment under construction.
    fn nat_entry(&self, chain: ChainName, key: &FrontendKey) -> Key {
        Key::entry(self.family, Table::Nat, chain, &self.address(key))
    }

    /// Matches a frontend; the comment is the one under construction.
    fn address(&self, key: &FrontendKey) -> Matches<'_> {
        let destination = match key.way_in {
            WayIn::Address(ip) => Some(Net::is(ip.into())),
            WayIn::Node(_) => None,
        };
        let port = Port::Is(key.port.get());
        Matches {
            comment: Some(cut(&self.comment)),
            destination,
            transport: Some(Transport { protocol: key.protocol, port }),
            ..Matches::default()
        }
    }

    fn recent<'n>(&self, name: &'n ChainName, action: RecentAction) -> Recent<'n> {
        Recent { name: name.as_str(), family: self.family, action }
    }

    /// Matches packets of local pods, or all others.
    fn add_detector<'m>(&'m self, matches: &mut Matches<'m>, not: bool) {
        let interface = |name, prefix| Some(Interface { not, name, prefix });
        match &self.node.detector {
            Some(Detector::Interface(name)) => matches.interface = interface(name, false),
            Some(Detector::InterfacePrefix(name)) => matches.interface = interface(name, true),
            Some(Detector::Source(net)) => {
                matches.source = canonical(*net).map(|net| Net { not, net });
            }
            None => {}
        }
    }

    fn detects_all(&self) -> bool {
        matches!(&self.node.detector, Some(Detector::Source(net)) if net.prefix_len() == 0)
    }

    /// Starts a comment with the Service port, and lets `more` go on.
    fn say(&mut self, more: impl FnOnce(&mut String) -> std::fmt::Result) {
        self.comment.clear();
        self.comment.push_str(&self.text);
        write_or_cut(&mut self.comment, more);
    }

    fn endpoint_comment(&mut self, addr: SocketAddr) -> &str {
        self.say(|text| write!(text, " -> {addr}"));
        cut(&self.comment)
    }

    fn comment_around(&mut self, before: &str) -> &str {
        self.comment.clear();
        for part in [before, &self.text, " external destinations"] {
            self.comment.push_str(part);
        }
        cut(&self.comment)
    }
}

/// Writes to a string, which cannot fail.
fn write_or_cut(text: &mut String, write: impl FnOnce(&mut String) -> std::fmt::Result) {
    write(text).unwrap_or_default();
}

const fn pool_chain(pool: Pool) -> ServiceChain {
    match pool {
        Pool::Cluster => ServiceChain::Cluster,
        Pool::Local => ServiceChain::Local,
    }
}

/// Refuses what the chains have no place for, wherever it is.
fn check(fragment: &Fragment) -> Result<(), PlanError> {
    for frontend in &fragment.frontends {
        let FrontendKey { way_in, protocol, .. } = frontend.key;
        if protocol != fragment.id.protocol {
            return Err(unsupported(format!("{} in a fragment of another protocol", frontend.key)));
        }
        let is_node = matches!(way_in, WayIn::Node(_));
        if is_node != (frontend.kind == FrontendKind::NodePort) {
            return Err(unsupported(format!("{} as {}", frontend.key, frontend.kind)));
        }
        if frontend.sources.is_some() && frontend.kind != FrontendKind::LoadBalancer {
            return Err(unsupported(format!(
                "source ranges on {} {}",
                frontend.kind, frontend.key
            )));
        }
    }
    Ok(())
}

fn mixed(frontend: &Frontend) -> String {
    let Verdicts { pod, node, external } = frontend.verdicts;
    format!(
        "{} {} with these verdicts: pods {pod}; node {node}; others {external}",
        frontend.kind, frontend.key
    )
}

/// Checks the node's detector: an interface name that the kernel cannot have matches nothing.
pub(crate) fn check_detector(node: &FamilyView) -> Result<(), PlanError> {
    match &node.detector {
        Some(Detector::Interface(name) | Detector::InterfacePrefix(name))
            if name.is_empty() || name.len() > INTERFACE_BYTES =>
        {
            Err(unsupported(format!("a pod detector for interface {name:?}")))
        }
        _ => Ok(()),
    }
}

/// The probability 1/n in units of 2^-31, by way of the ten decimals that kube-proxy writes.
// K8S: pkg/proxy/iptables/proxier.go computeProbability prints `%0.10f`, v1.36; iptables then rounds
// the product with 2^31. Rules that kube-proxy wrote are thereby found equal.
fn one_in(n: usize) -> u32 {
    const DECIMALS: u64 = 10_000_000_000;
    let n = u64::try_from(n).unwrap_or(u64::MAX);
    let (quotient, rest) = (DECIMALS / n, DECIMALS % n);
    let up = match (rest * 2).cmp(&n) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Equal => quotient % 2,
        std::cmp::Ordering::Greater => 1,
    };
    let scaled = ((quotient + up) * (1 << 31) + DECIMALS / 2) / DECIMALS;
    u32::try_from(scaled).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_ten_decimals() {
        assert_eq!(one_in(2), 1 << 30);
        assert_eq!(one_in(3), 715_827_883);
        for n in 2..5000 {
            #[expect(clippy::cast_precision_loss, reason = "n is small")]
            let text = format!("{:.10}", 1.0 / n as f64);
            let value: f64 = text.parse().unwrap();
            let expected = (value * f64::from(1_u32 << 31)).round();
            assert_eq!(f64::from(one_in(n)), expected, "{n}");
        }
    }
}

//! From a fragment to chains and rules, as kube-proxy writes them. Pure.

mod external;
mod pool;

use std::{fmt::Write, net::SocketAddr};

use proxier_core::{
    Family, Protocol,
    ir::{
        Balance, Detector, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Pool, Snat,
        Verdict, Verdicts, WayIn,
    },
    spi::{Objects, PlanError},
};

use crate::{
    config::{Config, Layout},
    names::{ChainName, FixedNames, PortHash, ServiceChain},
    object::{ChainKind, Content, Key, Place, RulesBuilder, Table, Value},
    render::canonical,
    rule::{Interface, Matches, Net, Port, Recent, RecentAction, Side, Target, Transport},
    tree::Tree,
    xt::cut,
};

/// Longest name of an interface.
// KERNEL: IFNAMSIZ less the NUL (include/uapi/linux/if.h, v6.12).
const INTERFACE_BYTES: usize = 15;

/// What a fragment's rules have in common.
pub(crate) struct Compiler<'a> {
    prefix: &'a str,
    layout: Layout,
    mark: u32,
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
        config: &'a Config,
        names: &'a FixedNames,
        node: &'a FamilyView,
        fragment: &'a Fragment,
        out: &'a mut Objects<Key, Value>,
    ) -> Self {
        let (text, protocol) = (fragment.id.port_text(), fragment.id.protocol);
        let hash = PortHash::new(&text, protocol);
        let comment = String::with_capacity(text.len() + 80);
        Self {
            prefix: &config.prefix,
            layout: config.layout,
            mark: config.mark(),
            names,
            node,
            fragment,
            family: fragment.id.family,
            text,
            hash,
            out,
            comment,
        }
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
        // The kernel checks every rule that can be reached at each change of the table. So the mark is
        // set here instead of one chain further, and the protocol is not asked for twice.
        let (mark_masq, port) = match self.layout {
            Layout::KubeProxy => (Target::Jump(self.names.mark_masq.as_str()), Port::Any),
            Layout::Tree => (Target::Mark { value: self.mark, mask: self.mark }, Port::Unasked),
        };
        rules.push(&Matches { source, ..base }, &mark_masq);
        let action = RecentAction::Set;
        let recent = self.fragment.affinity.map(|_| self.recent(&name, action));
        let transport = Some(Transport { protocol: self.protocol(), port });
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
                self.refuse(Tree::Refused, frontend, Verdict::Reject);
                Ok(None)
            }
            [Verdict::Drop, Verdict::Drop, Verdict::Drop] => {
                self.refuse(Tree::Refused, frontend, Verdict::Drop);
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
                self.lead(Tree::Services, frontend, &Target::Jump(chain.as_str()));
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
    fn refuse(&mut self, tree: Tree, frontend: &Frontend, verdict: Verdict) {
        let (what, target) = match verdict {
            Verdict::Reject => (" has no endpoints", Target::Reject(self.family)),
            Verdict::Drop | Verdict::Forward { .. } => (" has no local endpoints", Target::Drop),
        };
        self.say(|text| text.write_str(what));
        self.lead(tree, frontend, &target);
    }

    /// What packets to a frontend meet; the comment is the one under construction.
    fn lead(&mut self, tree: Tree, frontend: &Frontend, target: &Target<'_>) {
        let chain = self.grow(tree, tree.way(self.prefix, &frontend.key));
        let mut matches = self.address(&frontend.key);
        if tree == Tree::External && matches!(frontend.key.way_in, WayIn::Node(_)) {
            matches.local = Some(Side::Destination);
        }
        let key = Key::entry(self.family, tree.table(), chain, &matches);
        self.out.own(key, Value::entry(target, Place::Head));
    }

    /// Declares the chains on a way, and returns the last.
    fn grow(&mut self, tree: Tree, way: Vec<(Matches<'static>, ChainName)>) -> ChainName {
        let mut chain = tree.root(self.names);
        if self.layout == Layout::KubeProxy {
            return chain;
        }
        for (matches, next) in way {
            let jump = Key::entry(self.family, tree.table(), chain, &matches);
            self.out.share(jump, Value::entry(&Target::Jump(next.as_str()), Place::Head));
            let branch = Key::chain(self.family, tree.table(), ChainKind::Branch, next);
            self.out.share(branch, Value(Content::Shared));
            chain = next;
        }
        chain
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
    if fragment.balance == Balance::RoundRobin && fragment.is_weighted() {
        return Err(unsupported(
            "round robin over endpoints with different weights; random spreading can do that",
        ));
    }
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

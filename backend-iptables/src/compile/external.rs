//! The rules for traffic from outside the cluster.

use std::{fmt::Write, num::NonZeroU16};

use ipnet::IpNet;
use proxier_core::{
    Protocol,
    ir::{Frontend, FrontendKind, Pool, Snat, SourceFilter, Verdict, Verdicts},
    spi::PlanError,
};

use super::{Compiler, mixed, unsupported, write_or_cut};
use crate::{
    names::ServiceChain,
    object::{ChainKind, Key, Place, RulesBuilder, Value},
    render::canonical,
    rule::{Matches, Net, Port, Side, Target, Transport},
    tree::Tree,
    xt::cut,
};

/// How frontends for traffic from outside behave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum External {
    /// Any endpoint, masqueraded.
    Cluster,
    Drop,
    /// Endpoints of this node; the node, and perhaps its pods, may use others.
    Local {
        pods: bool,
        has_local: bool,
    },
    Reject,
}

impl Compiler<'_> {
    /// Everything for traffic from outside the cluster, and the health check.
    pub(super) fn external(&mut self) -> Result<(), PlanError> {
        let fragment = self.fragment;
        let mut forwarding: Option<External> = None;
        let mut fenced: Option<&SourceFilter> = None;
        for frontend in fragment.external() {
            let external = self.external_policy(frontend)?;
            match external {
                External::Drop | External::Local { has_local: false, .. } => {
                    self.refuse(Tree::External, frontend, Verdict::Drop);
                }
                External::Reject => {
                    self.refuse(Tree::External, frontend, Verdict::Reject);
                }
                External::Cluster | External::Local { .. } => {}
            }
            if matches!(external, External::Drop | External::Reject) {
                continue;
            }
            if forwarding.replace(external).is_some_and(|other| other != external) {
                return Err(unsupported("external addresses with different policies"));
            }
            if let Some(sources) = &frontend.sources {
                if fenced.replace(sources).is_some_and(|other| other != sources) {
                    return Err(unsupported(
                        "load balancer addresses with different source ranges",
                    ));
                }
                self.fence(frontend);
            }
            self.let_in(frontend);
        }
        if let Some(external) = forwarding {
            self.external_chain(external);
        }
        if let Some(sources) = fenced {
            self.firewall_chain(sources);
        }
        if let Some(port) = fragment.health_check_node_port {
            self.health_check(port);
        }
        Ok(())
    }

    fn external_policy(&self, frontend: &Frontend) -> Result<External, PlanError> {
        const fn to(pool: Pool, snat: Snat) -> Verdict {
            Verdict::Forward { pool, snat }
        }
        let any = to(Pool::Cluster, Snat::Masquerade);
        let Verdicts { pod, node, external } = frontend.verdicts;
        match frontend.verdicts.rows() {
            [Verdict::Reject, Verdict::Reject, Verdict::Reject] => return Ok(External::Reject),
            [Verdict::Drop, Verdict::Drop, Verdict::Drop] => return Ok(External::Drop),
            rows if rows == [any; 3] => return Ok(External::Cluster),
            _ => {}
        }
        let has_local = external == to(Pool::Local, Snat::Preserve);
        if node != any || !(has_local || external == Verdict::Drop) {
            return Err(unsupported(mixed(frontend)));
        }
        if pod == external {
            return Ok(External::Local { pods: false, has_local });
        }
        if pod == to(Pool::Cluster, Snat::Preserve) && self.node.detector.is_some() {
            return Ok(External::Local { pods: true, has_local });
        }
        Err(unsupported(mixed(frontend)))
    }

    /// The way from the node's address, or one from outside, to the fragment's chains.
    fn let_in(&mut self, frontend: &Frontend) {
        let (tree, what) = match frontend.kind {
            FrontendKind::NodePort => (Tree::NodePorts, ""),
            FrontendKind::LoadBalancer => (Tree::Services, " loadbalancer IP"),
            FrontendKind::ExternalIp | FrontendKind::ClusterIp => (Tree::Services, " external IP"),
        };
        let to = match frontend.sources {
            Some(_) => ServiceChain::Firewall,
            None => ServiceChain::External,
        };
        self.say(|text| text.write_str(what));
        let to = self.service_chain(to);
        self.lead(tree, frontend, &Target::Jump(to.as_str()));
    }

    /// Drops what the firewall chain did not let through: only that still has this destination.
    fn fence(&mut self, frontend: &Frontend) {
        let firewall = self.service_chain(ServiceChain::Firewall);
        self.say(|text| write!(text, " traffic not accepted by {firewall}"));
        self.lead(Tree::Firewall, frontend, &Target::Drop);
    }

    fn external_chain(&mut self, external: External) {
        let name = self.service_chain(ServiceChain::External);
        let (svc, svl) =
            (self.service_chain(ServiceChain::Cluster), self.service_chain(ServiceChain::Local));
        let (svc, svl) = (Target::Jump(svc.as_str()), Target::Jump(svl.as_str()));
        let mark_masq = Target::Jump(self.names.mark_masq.as_str());
        let mut rules = RulesBuilder::new(&name);
        let none = Matches::default();
        match external {
            External::Cluster => {
                let comment = self.comment_around("masquerade traffic for ");
                rules.push(&Matches { comment: Some(comment), ..none }, &mark_masq);
                rules.push(&none, &svc);
            }
            External::Local { pods, has_local } => {
                if pods {
                    let mut matches = none;
                    self.comment_around("pod traffic for ");
                    self.add_detector(&mut matches, false);
                    matches.comment = Some(cut(&self.comment));
                    rules.push(&matches, &svc);
                }
                let local = Matches { local: Some(Side::Source), ..none };
                let comment = self.comment_around("masquerade LOCAL traffic for ");
                rules.push(&Matches { comment: Some(comment), ..local }, &mark_masq);
                let comment = self.comment_around("route LOCAL traffic for ");
                rules.push(&Matches { comment: Some(comment), ..local }, &svc);
                if has_local {
                    rules.push(&none, &svl);
                }
            }
            External::Drop | External::Reject => {}
        }
        self.own_chain(ChainKind::Service(ServiceChain::External), name, rules);
    }

    fn firewall_chain(&mut self, sources: &SourceFilter) {
        let name = self.service_chain(ServiceChain::Firewall);
        let external = self.service_chain(ServiceChain::External);
        let mut rules = RulesBuilder::new(&name);
        self.say(|text| text.write_str(" loadbalancer IP"));
        let base = Matches { comment: Some(cut(&self.comment)), ..Matches::default() };
        let vips = sources.vips.iter().map(|ip| IpNet::from(*ip));
        let ours = |net: &IpNet| self.family.has(&net.addr());
        for net in sources.ranges.iter().copied().chain(vips).filter(ours) {
            let source = canonical(net).map(Net::is);
            rules.push(&Matches { source, ..base }, &Target::Jump(external.as_str()));
        }
        let fence = self.names.proxy_firewall;
        self.comment.clear();
        write_or_cut(&mut self.comment, |comment| {
            write!(comment, "other traffic to {} will be dropped by {fence}", self.text)
        });
        let note = Matches { comment: Some(cut(&self.comment)), ..Matches::default() };
        rules.push(&note, &Target::Nothing);
        self.own_chain(ChainKind::Service(ServiceChain::Firewall), name, rules);
    }

    fn health_check(&mut self, port: NonZeroU16) {
        let way = Tree::Health.to_port(self.prefix, Protocol::Tcp, port.get());
        let chain = self.grow(Tree::Health, way);
        self.say(|text| text.write_str(" health check node port"));
        let transport = Transport { protocol: Protocol::Tcp, port: Port::Is(port.get()) };
        let matches = Matches {
            comment: Some(cut(&self.comment)),
            transport: Some(transport),
            ..Matches::default()
        };
        let key = Key::entry(self.family, Tree::Health.table(), chain, &matches);
        self.out.own(key, Value::entry(&Target::Accept, Place::Head));
    }
}

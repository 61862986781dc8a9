//! From a fragment to virtual servers, destinations and elements of sets. Pure.

use std::{num::NonZeroU32, sync::Arc};

use ipnet::IpNet;
use proxier_core::{
    Mode,
    ir::{
        Balance, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Origin, Pool, Snat,
        Verdict, WayIn,
    },
    spi::{Objects, PlanError},
};

use crate::{
    config::{Config, SCHEDULERS},
    mark,
    object::{Item, Key, ORIGINS, Server, ServerId, SetName, Value, Way},
};

/// What a client stays with where marks lead to its virtual server.
const HASH: &str = "mh";

/// Declares all objects of a fragment.
pub(crate) fn compile(
    config: &Config,
    node: &FamilyView,
    fragment: &Fragment,
    out: &mut Objects<Key, Value>,
) -> Result<(), PlanError> {
    let scheduler = scheduler(config, fragment)?;
    let mut compiler = Compiler { plan: Plan { config, node, fragment }, scheduler, out };
    for frontend in &fragment.frontends {
        compiler.frontend(frontend);
    }
    for (id, pool) in servers(config, node, fragment) {
        compiler.server(id, pool);
    }
    Ok(())
}

/// The virtual servers of a fragment, and the pool behind each.
pub(crate) fn servers(
    config: &Config,
    node: &FamilyView,
    fragment: &Fragment,
) -> Vec<(ServerId, Pool)> {
    let plan = Plan { config, node, fragment };
    let mut found: Vec<_> =
        fragment.frontends.iter().flat_map(|frontend| plan.servers(frontend)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// The scheduler that a Service asks for, or the one that comes nearest to what it hints at.
fn scheduler(config: &Config, fragment: &Fragment) -> Result<Arc<str>, PlanError> {
    let wanted = match (&fragment.scheduler, fragment.balance) {
        (Some(named), _) if SCHEDULERS.contains(&&**named) => Arc::clone(named),
        (Some(unknown), _) => {
            return Err(PlanError::Unsupported {
                mode: Mode::Ipvs.name(),
                reason: format!(
                    "{} asks for scheduler {unknown:?}; there are {}",
                    fragment.id.service,
                    SCHEDULERS.join(", ")
                ),
            });
        }
        (None, Balance::RoundRobin) => "rr".into(),
        (None, Balance::SourceHash) => HASH.into(),
        (None, _) => Arc::clone(&config.scheduler),
    };
    // These two look at weights only to skip what has none.
    Ok(match &*wanted {
        "rr" if fragment.is_weighted() => "wrr".into(),
        "lc" if fragment.is_weighted() => "wlc".into(),
        _ => wanted,
    })
}

/// What a fragment's frontends come to.
#[derive(Clone, Copy)]
struct Plan<'a> {
    config: &'a Config,
    node: &'a FamilyView,
    fragment: &'a Fragment,
}

impl Plan<'_> {
    fn rows(&self, frontend: &Frontend) -> [(Origin, Verdict); 3] {
        ORIGINS.map(|origin| (origin, self.verdict(frontend, origin)))
    }

    /// What leads to an empty pool leads to nobody.
    fn verdict(&self, frontend: &Frontend, origin: Origin) -> Verdict {
        let verdict = match origin {
            Origin::Pod if self.node.detector.is_none() => frontend.verdicts.external,
            Origin::Pod | Origin::Node | Origin::External => frontend.verdicts.of(origin),
        };
        match pool(verdict) {
            Some(pool) if self.fragment.pool(pool).is_empty() => Verdict::Reject,
            _ => verdict,
        }
    }

    /// The virtual servers that a frontend leads to: one of its own, or one by mark for each pool.
    fn servers(&self, frontend: &Frontend) -> Vec<(ServerId, Pool)> {
        let mut pools: Vec<_> =
            self.rows(frontend).iter().filter_map(|(_, verdict)| pool(*verdict)).collect();
        pools.sort_unstable();
        pools.dedup();
        let FrontendKey { way_in, port, protocol } = frontend.key;
        if let (WayIn::Address(ip), [pool]) = (way_in, &*pools) {
            return vec![(ServerId::Frontend { ip, port, protocol }, *pool)];
        }
        let by_mark = |pool| {
            let mark = self.mark(pool).0;
            (ServerId::Mark(self.fragment.id.family, mark), pool)
        };
        pools.into_iter().map(by_mark).collect()
    }

    /// The mark of a pool and, where it is a hash, what tells it from others.
    fn mark(&self, pool: Pool) -> (u32, Option<u32>) {
        let node_port = self.fragment.frontends.iter().find(|it| it.kind == FrontendKind::NodePort);
        let (number, check) = match node_port {
            Some(it) => (mark::of_node_port(it.key.port.get(), it.key.protocol, pool), None),
            None => {
                let (number, check) = mark::of_fragment(&self.fragment.id, pool);
                (number, Some(check))
            }
        };
        (mark::place(self.config.mark_base, self.config.masquerade_bit, number), check)
    }
}

struct Compiler<'a> {
    plan: Plan<'a>,
    scheduler: Arc<str>,
    out: &'a mut Objects<Key, Value>,
}

impl Compiler<'_> {
    /// Declares the elements of one frontend.
    fn frontend(&mut self, frontend: &Frontend) {
        let Plan { node, .. } = self.plan;
        let (key, way) = (frontend.key, Way::of(&frontend.key));
        let item = || Item::Frontend(key);
        if let WayIn::Address(ip) = key.way_in
            && !node.addresses.contains(&ip)
        {
            self.out.share(Key::Address(ip), Value::Exists);
            self.out.share(Key::Element(SetName::Addresses, Item::Address(ip)), Value::Exists);
        }
        self.element(SetName::Frontends(way), item(), Value::Exists);
        self.fence(frontend);
        let servers = self.plan.servers(frontend);
        for (origin, verdict) in self.plan.rows(frontend) {
            match verdict {
                Verdict::Drop => self.element(SetName::Dropped(way, origin), item(), Value::Exists),
                Verdict::Reject => {
                    self.element(SetName::Rejected(way, origin), item(), Value::Exists);
                }
                Verdict::Forward { pool, snat } => {
                    if snat == Snat::Masquerade {
                        self.element(SetName::Masquerade(way, origin), item(), Value::Exists);
                    }
                    let server = servers.iter().find(|(_, of)| *of == pool);
                    if let Some((ServerId::Mark(_, mark), _)) = server {
                        self.element(SetName::Marks(way, origin), item(), Value::Mark(*mark));
                    }
                }
            }
        }
    }

    fn fence(&mut self, frontend: &Frontend) {
        let Some(sources) = &frontend.sources else { return };
        let (key, way) = (frontend.key, Way::of(&frontend.key));
        self.element(SetName::Fenced(way), Item::Frontend(key), Value::Exists);
        let vips = sources.vips.iter().map(|ip| IpNet::from(*ip));
        let nets: Vec<_> = sources.ranges.iter().copied().chain(vips).collect();
        // KERNEL: a set of intervals takes none that overlap (net/netfilter/nft_set_pipapo.c, v6.12).
        for net in IpNet::aggregate(&nets) {
            self.element(SetName::Allowed(way), Item::Allowed(key, net), Value::Exists);
        }
    }

    fn server(&mut self, id: ServerId, pool: Pool) {
        let Plan { fragment, .. } = self.plan;
        let server = match (id, fragment.affinity) {
            (ServerId::Frontend { .. }, affinity) => {
                let persistence = affinity.map(NonZeroU32::get);
                Server::new(Arc::clone(&self.scheduler), persistence)
            }
            // KERNEL: what is remembered for a mark has no port: connections would go to the port the
            // client asked for (net/netfilter/ipvs/ip_vs_core.c ip_vs_sched_persist, v6.12).
            (ServerId::Mark(..), Some(_)) => Server::new(HASH.into(), None),
            (ServerId::Mark(..), None) => Server::new(Arc::clone(&self.scheduler), None),
        };
        if let (ServerId::Mark(family, mark), (_, Some(check))) = (id, self.plan.mark(pool)) {
            // Whoever has the same hash is told so.
            let owner = Key::Element(SetName::Owners, Item::Mark(family, mark));
            self.out.share(owner, Value::Mark(check));
        }
        self.out.own(Key::Server(id), Value::Server(server));
        if let ServerId::Frontend { ip, port, protocol } = id {
            let key = FrontendKey { way_in: WayIn::Address(ip), port, protocol };
            self.element(SetName::Servers, Item::Frontend(key), Value::Exists);
        }
        for member in fragment.pool(pool) {
            let weight = Value::Weight(member.weight.get().into());
            self.out.own(Key::Destination(id, member.addr), weight);
            let hairpin = Key::Element(SetName::Hairpin, Item::Address(member.addr.ip()));
            self.out.share(hairpin, Value::Exists);
        }
    }

    fn element(&mut self, set: SetName, item: Item, value: Value) {
        self.out.own(Key::Element(set, item), value);
    }
}

const fn pool(verdict: Verdict) -> Option<Pool> {
    match verdict {
        Verdict::Forward { pool, .. } => Some(pool),
        Verdict::Drop | Verdict::Reject => None,
    }
}

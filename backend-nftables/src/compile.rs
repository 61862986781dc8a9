//! From a fragment to elements of sets. Pure.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use proxier_core::{
    Family, FragmentId, Protocol,
    ir::{
        Balance, FamilyView, Fragment, Frontend, FrontendKey, FrontendKind, Member, Origin, Pool,
        Snat, SourceFilter, Verdict, WayIn,
    },
    maglev,
    spi::{Objects, PlanError},
};

use crate::{
    field::Field,
    object::{
        AddressKind, Chain, ChainName, Content, Element, Endpoint, Key, Object, POOLS, Pick,
        PortId, Says, SetName, Size, Space, Value,
    },
    rule::{Rule, RuleBuilder},
    sets::{client, frontend},
    skeleton::detector_problem,
    slots::{copies, place},
};

/// The slots of a fragment's endpoints, by pool.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Memo {
    pub(crate) cluster: Box<[Endpoint]>,
    pub(crate) local: Box<[Endpoint]>,
}

impl Memo {
    pub(crate) const fn pool(&self, pool: Pool) -> &[Endpoint] {
        match pool {
            Pool::Cluster => &self.cluster,
            Pool::Local => &self.local,
        }
    }
}

/// Declares all objects of a fragment.
pub(crate) fn compile(
    node: &FamilyView,
    fragment: &Fragment,
    memo: &Memo,
    out: &mut Objects<Key, Value>,
) -> Result<Memo, PlanError> {
    if let Some(reason) = detector_problem(node) {
        return Err(PlanError::Unsupported { mode: "nftables", reason });
    }
    let slots = |pool| {
        if fragment.balance == Balance::SourceHash {
            // The places of a table do not depend on what was.
            fragment.pool(pool).iter().map(endpoint).collect()
        } else {
            place(memo.pool(pool), &copies(fragment.pool(pool)))
        }
    };
    let memo = Memo { cluster: slots(Pool::Cluster), local: slots(Pool::Local) };
    let mut compiler = Compiler { node, fragment, memo: &memo, out };
    let mut used = [false; 2];
    for frontend in &fragment.frontends {
        compiler.frontend(frontend, &mut used);
    }
    let used = POOLS.into_iter().zip(used).filter_map(|(pool, used)| used.then_some(pool));
    compiler.pools(&used.collect::<Vec<_>>());
    Ok(memo)
}

/// What says the slot, where that is not drawn at random.
fn spread(balance: Balance, slots: usize) -> Option<Field> {
    let slots = u32::try_from(slots).unwrap_or(u32::MAX);
    let ways = [
        (Balance::RoundRobin, Field::Next(slots)),
        (Balance::SourceHash, Field::SourceHash(slots)),
    ];
    ways.into_iter().find(|(way, _)| *way == balance).map(|(_, field)| field)
}

/// The endpoint for each hash.
fn hashed(members: &[Member]) -> Vec<Endpoint> {
    let table = maglev::table(members);
    table.into_iter().filter_map(|index| members.get(index)).map(endpoint).collect()
}

fn endpoint(member: &Member) -> Endpoint {
    Endpoint { ip: member.addr.ip(), port: member.addr.port() }
}

/// What happens to packets of one origin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Row {
    origin: Origin,
    verdict: Verdict,
}

impl Row {
    fn masquerades(self) -> bool {
        matches!(self.verdict, Verdict::Forward { snat: Snat::Masquerade, .. })
    }
}

struct Compiler<'a> {
    node: &'a FamilyView,
    fragment: &'a Fragment,
    memo: &'a Memo,
    out: &'a mut Objects<Key, Value>,
}

impl Compiler<'_> {
    /// Declares what is needed for one frontend; marks the pools it uses.
    fn frontend(&mut self, frontend: &Frontend, used: &mut [bool; 2]) {
        let key = frontend.key;
        if let WayIn::Address(ip) = key.way_in {
            let kind = match frontend.kind {
                FrontendKind::ClusterIp => AddressKind::ClusterIp,
                FrontendKind::ExternalIp | FrontendKind::LoadBalancer | FrontendKind::NodePort => {
                    AddressKind::External
                }
            };
            self.share(Object::Element(Element::Address { kind, ip }), Value::EXISTS);
        }
        let rows = self.rows(frontend);
        let counted = self.fragment.counters;
        let mut says = |says| self.own(Element::Frontend { says, frontend: key }, Value::EXISTS);
        let dead = rows.iter().all(|row| row.verdict == Verdict::Reject);
        if dead {
            says(Says::NoEndpoints);
        }
        if counted {
            says(Says::Counted);
        }
        let plain = |row: &Row| matches!(row.verdict, Verdict::Forward { pool: Pool::Cluster, .. });
        let uniform = uniform_masquerade(&rows);
        if !dead && (uniform.is_none() || !rows.iter().all(plain)) || frontend.sources.is_some() {
            says(Says::ByOrigin);
        }
        match uniform {
            Some(uniform) => uniform.into_iter().for_each(&mut says),
            None => {
                let masqueraded = rows.iter().filter(|row| row.masquerades());
                masqueraded.for_each(|row| says(Says::Masquerade(row.origin)));
            }
        }
        for Row { origin, verdict } in rows.iter().filter(|_| !dead) {
            match verdict {
                Verdict::Drop => says(Says::Drop(*origin)),
                Verdict::Reject => says(Says::Reject(*origin)),
                Verdict::Forward { pool: Pool::Local, .. } => says(Says::Local(*origin)),
                Verdict::Forward { pool: Pool::Cluster, .. } => {}
            }
        }
        if let Some(sources) = &frontend.sources {
            says(Says::Fenced);
            for net in networks(sources) {
                self.own(Element::Source(Box::new((key, net))), Value::EXISTS);
            }
        }
        for (pool, used) in POOLS.into_iter().zip(used) {
            let leads = |row: &Row| matches!(row.verdict, Verdict::Forward { pool: other, .. } if other == pool);
            if rows.iter().any(leads) {
                *used = true;
                self.pool_of(frontend, pool);
            }
        }
    }

    /// The rows that can be told apart. What leads to an empty pool leads to nobody.
    fn rows(&self, frontend: &Frontend) -> Vec<Row> {
        let verdicts = &frontend.verdicts;
        let mut rows = Vec::with_capacity(3);
        if self.node.detector.is_some() {
            rows.push(Row { origin: Origin::Pod, verdict: verdicts.pod });
        }
        rows.push(Row { origin: Origin::Node, verdict: verdicts.node });
        rows.push(Row { origin: Origin::External, verdict: verdicts.external });
        for row in &mut rows {
            if matches!(row.verdict, Verdict::Forward { pool, .. } if self.memo.pool(pool).is_empty())
            {
                row.verdict = Verdict::Reject;
            }
        }
        rows
    }

    /// Declares the endpoints of a pool behind a frontend.
    fn pool_of(&mut self, frontend: &Frontend, pool: Pool) {
        let (key, memo) = (frontend.key, self.memo);
        let endpoints = if self.fragment.balance == Balance::SourceHash {
            Cow::Owned(hashed(self.fragment.pool(pool)))
        } else {
            Cow::Borrowed(memo.pool(pool))
        };
        for (slot, endpoint) in (0..).zip(&*endpoints) {
            let element = Element::Endpoint { pool, frontend: key, slot };
            self.own(element, Value(Content::Endpoint(*endpoint)));
        }
        match spread(self.fragment.balance, endpoints.len()) {
            Some(field) => self.spread(key, pool, field),
            None => self.size(key, pool, Size::of(endpoints.len())),
        }
        if self.fragment.affinity.is_some() {
            let id = PortId::of(&self.fragment.id);
            let to = |chain| Value(Content::Leads(chain));
            let sticky = to(ChainName::Sticky(id, pool));
            self.own(Element::Sticky { pool, frontend: key }, sticky);
            self.own(Element::Remember(key), to(ChainName::Remember(id)));
        }
    }

    /// Lets connections be spread at random, as all frontends with as many slots.
    fn size(&mut self, key: FrontendKey, pool: Pool, size: Size) {
        let space = Space::of(&key);
        self.own(Element::Size { pool, size, frontend: key }, Value::EXISTS);
        if !size.is_usual(space, pool) {
            self.share(Object::Set(SetName::Size(space, pool, size)), Value::EXISTS);
        }
        let picks = Pick::turns(space, pool, size, key.protocol).filter(|pick| !pick.is_usual());
        picks.for_each(|pick| self.share(Object::Pick(pick), Value::EXISTS));
    }

    /// Lets a chain of the Service port's own spread connections: others must not take turns in it.
    fn spread(&mut self, key: FrontendKey, pool: Pool, field: Field) {
        let FragmentId { family, protocol, .. } = self.fragment.id;
        let space = Space::of(&key);
        let slot = [frontend(space), &[field]].concat();
        let rule = RuleBuilder::new(family).protocol(protocol);
        let rule = rule.translate(&slot, SetName::Endpoints(space, pool));
        let chain = ChainName::Spread(PortId::of(&self.fragment.id), space, pool);
        self.chain(chain, vec![rule]);
        let leads = Value(Content::Leads(chain));
        self.own(Element::Spread { pool, frontend: key }, leads);
    }

    /// Declares what belongs to pools whatever the frontends are.
    fn pools(&mut self, used: &[Pool]) {
        let memo = self.memo;
        for endpoint in used.iter().flat_map(|pool| memo.pool(*pool)) {
            self.share(Object::Element(Element::Hairpin(endpoint.ip)), Value::EXISTS);
        }
        if let Some(seconds) = self.fragment.affinity
            && !used.is_empty()
        {
            self.affinity(used, seconds.get());
        }
    }

    /// Declares the chains that remember and recall where clients were sent.
    fn affinity(&mut self, used: &[Pool], seconds: u32) {
        let (family, protocol) = (self.fragment.id.family, self.fragment.id.protocol);
        let id = PortId::of(&self.fragment.id);
        let mut remember = Vec::new();
        for pool in used.iter().copied() {
            let map = SetName::Affinity(pool);
            self.share(Object::Set(map), Value::EXISTS);
            let mut ports: Vec<_> = self.memo.pool(pool).iter().map(|it| it.port).collect();
            ports.sort_unstable();
            ports.dedup();
            let mut recall = Vec::with_capacity(ports.len());
            for port in ports {
                let at = id.at(port);
                recall.push(recall_rule(family, protocol, pool, at, port));
                remember.push(remember_rule(family, protocol, pool, at, port, seconds));
            }
            self.chain(ChainName::Sticky(id, pool), recall);
            for endpoint in self.memo.pool(pool) {
                let id = id.at(endpoint.port);
                self.own(Element::Member { pool, id, ip: endpoint.ip }, Value::EXISTS);
            }
        }
        self.chain(ChainName::Remember(id), remember);
    }

    fn chain(&mut self, name: ChainName, rules: Vec<Rule>) {
        let comment = Some(self.fragment.id.to_string().into());
        let chain = Value(Content::Chain(Arc::new(Chain { comment, rules })));
        self.out.own(Key::new(self.fragment.id.family, Object::Chain(name)), chain);
    }

    fn own(&mut self, element: Element, value: Value) {
        self.out.own(Key::new(self.fragment.id.family, Object::Element(element)), value);
    }

    fn share(&mut self, object: Object, value: Value) {
        self.out.share(Key::new(self.fragment.id.family, object), value);
    }
}

/// Sends a client to the endpoint it was sent to before, among those with this port.
pub(crate) fn recall_rule(
    family: Family,
    protocol: Protocol,
    pool: Pool,
    id: PortId,
    port: u16,
) -> Rule {
    let known = [client(family), &id.0.map(Field::Fixed)].concat();
    let rule = RuleBuilder::new(family).protocol(protocol);
    rule.translate_to_port(&known, SetName::Affinity(pool), port)
}

/// Remembers where a client was sent, if that is a member of the pool with this port.
pub(crate) fn remember_rule(
    family: Family,
    protocol: Protocol,
    pool: Pool,
    id: PortId,
    port: u16,
    seconds: u32,
) -> Rule {
    let id = id.0.map(Field::Fixed);
    let (known, member) = ([client(family), &id].concat(), [&[Field::Daddr][..], &id].concat());
    let rule = RuleBuilder::new(family).protocol(protocol).port(port, true);
    let rule = rule.within(&member, SetName::Members(pool));
    rule.remember(&known, SetName::Affinity(pool), seconds).build()
}

/// The one set that says whose packets are masqueraded, or none if nobody's; `None` if it takes more.
fn uniform_masquerade(rows: &[Row]) -> Option<Option<Says>> {
    let masqueraded = rows.iter().filter(|row| row.masquerades()).count();
    let unless_pod = rows.iter().all(|row| row.masquerades() != (row.origin == Origin::Pod));
    if masqueraded == 0 {
        Some(None)
    } else if masqueraded == rows.len() {
        Some(Some(Says::MasqueradeAll))
    } else if unless_pod {
        Some(Some(Says::MasqueradeUnlessPod))
    } else {
        None
    }
}

/// The networks of a filter, none inside another.
// KERNEL: intervals that overlap are refused (net/netfilter/nft_set_pipapo.c nft_pipapo_insert, v6.12).
fn networks(filter: &SourceFilter) -> Vec<IpNet> {
    let hosts = filter.vips.iter().map(|ip: &IpAddr| IpNet::from(*ip));
    IpNet::aggregate(&filter.ranges.iter().copied().chain(hosts).collect())
}

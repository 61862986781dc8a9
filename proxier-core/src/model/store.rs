//! The current Services and EndpointSlices, and which fragments a change of them touches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    time::SystemTime,
};

use serde::Serialize;

use super::{EndpointSlice, NodeEnv, PortView, Service, names::Names};
use crate::{
    claims::{Claim, Claims},
    ir::{Fragment, Frontend, FrontendKey, FrontendKind, NodeView},
    lower::{fragment_id, frontends, lower},
    name::{Family, FragmentId, ObjectName, Protocol},
    proxier::{Change, Revision, Update},
    select::Candidate,
};

/// An object a proxier watches.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub enum Object {
    /// An EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// A Service.
    Service(Service),
}

/// Names an object a proxier watches.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum ObjectKey {
    /// An EndpointSlice.
    EndpointSlice(ObjectName),
    /// A Service.
    Service(ObjectName),
}

/// Something happened in the cluster or on the node.
#[derive(Clone, Debug)]
pub enum Event {
    /// The addresses on the node's interfaces, loopback included, are these. From then on
    /// [`NodeEnv::interface_addresses`] of [`Event::Node`] is not looked at.
    Addresses(Vec<IpAddr>),
    /// An object is new or changed.
    Apply(Object),
    /// An object is gone, or no longer any business of a proxier. Unknown objects are fine.
    Delete(ObjectKey),
    /// The node or the settings changed.
    Node(Box<NodeEnv>),
    /// These are all EndpointSlices there are.
    EndpointSlices(Vec<EndpointSlice>),
    /// These are all Services there are.
    Services(Vec<Service>),
}

/// A frontend that two Services want. The older one has it.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Conflict {
    /// The frontend.
    pub key: FrontendKey,
    /// Who has it.
    pub winner: FragmentId,
    /// Who wants it too and goes without.
    pub loser: FragmentId,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, winner, loser } = self;
        write!(f, "{loser}: {key} already belongs to {winner}, which is older")
    }
}

/// What has changed since the last [`Store::take`].
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Pending {
    /// Services that are not what they were, by name. One that was changed and changed back is not
    /// among them.
    pub services: Vec<ObjectName>,
    /// Services of which a slice was changed, by name.
    pub endpoints: Vec<ObjectName>,
    /// Changes of slices.
    pub slice_changes: usize,
    /// When changes of slices were made that still count, in the order in which they came in.
    pub triggered: Vec<Trigger>,
}

/// A change of an EndpointSlice that says when it was made.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Trigger {
    /// The Service.
    pub service: ObjectName,
    /// The family of the slice.
    pub family: Family,
    /// When the pod, or whatever else the slice shows, changed.
    pub at: SystemTime,
}

/// Holds what the sources said and turns it into updates for a [`Proxier`](crate::Proxier).
///
/// Events only edit; [`Store::take`] computes. Any number of events between two calls becomes one
/// update, in which every touched fragment appears once and an untouched one never does.
#[derive(Debug)]
pub struct Store {
    env: NodeEnv,
    view: Arc<NodeView>,
    services: BTreeMap<ObjectName, Box<Service>>,
    slices: BTreeMap<ObjectName, Arc<EndpointSlice>>,
    /// The slices of each Service, by name.
    slices_of: HashMap<ObjectName, Vec<Arc<EndpointSlice>>>,
    claims: Claims,
    names: Names,
    /// What the last update made of each Service, sorted by id.
    fragments: BTreeMap<ObjectName, Vec<Arc<Fragment>>>,
    dirty: BTreeSet<ObjectName>,
    /// What the Services that were edited since the last update were before.
    edited: BTreeMap<ObjectName, Option<Box<Service>>>,
    /// The Services of the slices that were edited since the last update.
    edited_slices: BTreeSet<ObjectName>,
    slice_changes: usize,
    triggered: Vec<Trigger>,
    /// How many fragments have their health checked on a port.
    health_ports: BTreeMap<(Family, NonZeroU16), usize>,
    view_changed: bool,
    /// Somebody tells of the addresses on interfaces.
    has_addresses: bool,
    has_services: bool,
    has_slices: bool,
    revision: Revision,
}

impl Store {
    /// A store that waits for its first full lists.
    #[must_use]
    pub fn new(env: NodeEnv) -> Self {
        Self {
            view: Arc::new(env.view()),
            env,
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of: HashMap::new(),
            claims: Claims::default(),
            names: Names::default(),
            fragments: BTreeMap::new(),
            dirty: BTreeSet::new(),
            edited: BTreeMap::new(),
            edited_slices: BTreeSet::new(),
            slice_changes: 0,
            triggered: Vec::new(),
            health_ports: BTreeMap::new(),
            view_changed: false,
            has_addresses: false,
            has_services: false,
            has_slices: false,
            revision: Revision::default(),
        }
    }

    /// Takes note of an event. O(object), or O(list) for a full list.
    ///
    /// Returns whether there is something to [`take`](Self::take).
    pub fn apply(&mut self, event: Event) -> bool {
        match event {
            Event::Addresses(addresses) => self.set_addresses(addresses),
            Event::Apply(Object::EndpointSlice(slice)) => self.set_slice(slice),
            Event::Apply(Object::Service(service)) => self.set_service(service),
            Event::Delete(ObjectKey::EndpointSlice(name)) => self.delete_slice(&name),
            Event::Delete(ObjectKey::Service(name)) => self.delete_service(&name),
            Event::Node(env) => self.set_env(*env),
            Event::EndpointSlices(slices) => self.set_slices(slices),
            Event::Services(services) => self.set_services(services),
        }
        self.has_changes()
    }

    /// Computes what the events so far amount to; `None` when that is nothing, or when no full
    /// list of both Services and EndpointSlices has come in yet.
    ///
    /// The first update is a [`Update::Reset`], every later one a [`Update::Delta`]. O(touched
    /// Services and their endpoints).
    pub fn take(&mut self) -> Option<Update> {
        if !self.has_changes() {
            return None;
        }
        let first = self.revision == Revision::default();
        self.edited.clear();
        self.edited_slices.clear();
        self.slice_changes = 0;
        self.triggered.clear();
        let mut changes = Vec::new();
        for name in std::mem::take(&mut self.dirty) {
            self.refresh(name, &mut changes);
        }
        let node = std::mem::take(&mut self.view_changed).then(|| Arc::clone(&self.view));
        if first {
            self.revision = self.revision.next();
            return Some(self.reset());
        }
        if changes.is_empty() && node.is_none() {
            return None;
        }
        self.revision = self.revision.next();
        Some(Update::Delta { revision: self.revision, node, changes })
    }

    /// The whole desired state as of the last [`take`](Self::take).
    #[must_use]
    pub fn reset(&self) -> Update {
        let fragments = self.fragments.values().flatten().map(Arc::clone).collect();
        Update::Reset { revision: self.revision, node: Arc::clone(&self.view), fragments }
    }

    /// Says whether there was an update yet.
    #[must_use]
    pub fn is_programmed(&self) -> bool {
        self.revision != Revision::default()
    }

    /// The node and settings in force.
    #[must_use]
    pub const fn env(&self) -> &NodeEnv {
        &self.env
    }

    /// The Services that are proxied, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(|service| &**service)
    }

    /// The fragments of the last update, by id.
    pub fn fragments(&self) -> impl Iterator<Item = &Arc<Fragment>> {
        self.fragments.values().flatten()
    }

    /// Frontends that more than one Service wants, sorted.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        self.claims.contested().flat_map(|(key, winner, losers)| {
            let winner = winner.clone();
            losers.map(move |loser| Conflict { key, winner: winner.clone(), loser: loser.clone() })
        })
    }

    /// The endpoints of a Service port, merged from its slices: sorted by address, each once.
    #[must_use]
    pub fn candidates(&self, view: &PortView<'_>) -> Vec<Candidate<'_>> {
        let slices = self.slices_of.get(view.service.name()).map(Vec::as_slice).unwrap_or_default();
        let weights = Some(view.service);
        merge(slices, weights, view.family, (&view.port.name, view.port.protocol), &self.env.name)
    }

    /// The endpoints of a Service in one family by port name and protocol, whether a Service port of
    /// that name exists or not: merged from its slices, sorted by address, each once.
    #[must_use]
    pub fn endpoints(
        &self,
        service: &ObjectName,
        family: Family,
    ) -> BTreeMap<(Arc<str>, Protocol), Vec<Candidate<'_>>> {
        let slices = self.slices_of.get(service).map(Vec::as_slice).unwrap_or_default();
        let weights = self.service(service);
        let of_family = slices.iter().filter(|slice| slice.family() == family);
        let ports = of_family.flat_map(|slice| slice.ports());
        let names: BTreeSet<_> =
            ports.map(|port| (Arc::clone(&port.name), port.protocol)).collect();
        let merged = |(name, protocol): (Arc<str>, Protocol)| {
            let candidates = merge(slices, weights, family, (&name, protocol), &self.env.name);
            ((name, protocol), candidates)
        };
        names.into_iter().map(merged).collect()
    }

    /// The fragment of the last update with this id.
    #[must_use]
    pub fn fragment(&self, id: &FragmentId) -> Option<&Arc<Fragment>> {
        let of_service = self.fragments.get(&id.service)?;
        let place = of_service.binary_search_by(|fragment| fragment.id.cmp(id)).ok()?;
        of_service.get(place)
    }

    /// The frontend of the last update that packets of this key come to. O(log n).
    #[must_use]
    pub fn frontend(&self, key: &FrontendKey) -> Option<(&Arc<Fragment>, &Frontend)> {
        let fragment = self.fragment(self.claims.owner(key)?)?;
        let frontend = fragment.frontends.iter().find(|frontend| frontend.key == *key)?;
        Some((fragment, frontend))
    }

    /// What sort of frontends an address has, if any: cluster IPs before others. O(log n).
    #[must_use]
    pub fn kind_of(&self, address: IpAddr) -> Option<FrontendKind> {
        let at = self.claims.at(address);
        at.filter_map(|(key, _)| self.frontend(key)).map(|(_, frontend)| frontend.kind).min()
    }

    /// Says whether some Service has its health checked on this port. O(log n).
    #[must_use]
    pub fn has_health_check(&self, family: Family, port: NonZeroU16) -> bool {
        self.health_ports.contains_key(&(family, port))
    }

    /// The Service of that name, if it is proxied.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(|service| &**service)
    }

    /// What has changed since the last [`take`](Self::take). O(changed).
    #[must_use]
    pub fn pending(&self) -> Pending {
        Pending {
            services: self.edited.keys().cloned().collect(),
            endpoints: self.edited_slices.iter().cloned().collect(),
            slice_changes: self.slice_changes,
            triggered: self.triggered.clone(),
        }
    }

    const fn is_complete(&self) -> bool {
        self.has_services && self.has_slices
    }

    fn has_changes(&self) -> bool {
        let first = self.revision == Revision::default();
        self.is_complete() && (first || self.view_changed || !self.dirty.is_empty())
    }

    fn set_env(&mut self, mut env: NodeEnv) {
        if self.has_addresses {
            env.interface_addresses.clone_from(&self.env.interface_addresses);
        }
        if env == self.env {
            return;
        }
        self.env = env;
        self.dirty.extend(self.services.keys().cloned());
        self.look();
    }

    /// No fragment depends on the addresses, only what backends see of the node.
    fn set_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.has_addresses = true;
        self.env.interface_addresses = addresses;
        self.look();
    }

    /// Looks at the node as backends do.
    fn look(&mut self) {
        let view = self.env.view();
        if view != *self.view {
            self.view = Arc::new(view);
            self.view_changed = true;
        }
    }

    fn set_services(&mut self, services: Vec<Service>) {
        self.has_services = true;
        let mut gone: BTreeSet<_> = self.services.keys().cloned().collect();
        for service in services {
            gone.remove(service.name());
            self.set_service(service);
        }
        for name in gone {
            self.delete_service(&name);
        }
    }

    fn set_service(&mut self, mut service: Service) {
        if self.service(service.name()) == Some(&service) {
            return;
        }
        self.names.share(service.names_mut());
        self.note_edit(service.name(), Some(&service));
        self.drop_service(service.name());
        self.dirty.insert(service.name().clone());
        for (key, id) in claims_of(&service) {
            let claim = Claim { created: service.created().map(Arc::clone), id };
            if let Some(loser) = self.claims.add(key, claim) {
                self.dirty.insert(loser.service);
            }
        }
        self.services.insert(service.name().clone(), Box::new(service));
    }

    fn delete_service(&mut self, name: &ObjectName) {
        self.note_edit(name, None);
        self.drop_service(name);
    }

    /// Remembers what a Service was before the first edit, and forgets it when it is that again.
    fn note_edit(&mut self, name: &ObjectName, after: Option<&Service>) {
        let before = match self.edited.get(name) {
            Some(before) => before.as_ref(),
            None => self.services.get(name),
        };
        if before.map(|before| &**before) == after {
            self.edited.remove(name);
        } else if !self.edited.contains_key(name) {
            self.edited.insert(name.clone(), before.cloned());
        }
    }

    fn drop_service(&mut self, name: &ObjectName) {
        let Some(service) = self.services.remove(name) else { return };
        for (key, id) in claims_of(&service) {
            if let Some(heir) = self.claims.remove(key, &id) {
                self.dirty.insert(heir.service);
            }
        }
        self.dirty.insert(name.clone());
    }

    fn set_slices(&mut self, slices: Vec<EndpointSlice>) {
        self.has_slices = true;
        let mut gone: BTreeSet<_> = self.slices.keys().cloned().collect();
        for slice in slices {
            gone.remove(slice.name());
            self.set_slice(slice);
        }
        for name in gone {
            self.delete_slice(&name);
        }
    }

    fn set_slice(&mut self, mut slice: EndpointSlice) {
        if self.slices.get(slice.name()).is_some_and(|known| known.means_the_same(&slice)) {
            return;
        }
        if let Some(at) = slice.triggered() {
            let (service, family) = (slice.service().clone(), slice.family());
            self.triggered.push(Trigger { service, family, at });
        }
        self.drop_slice(&slice.name().clone());
        self.names.share(slice.names_mut());
        let slice = Arc::new(slice);
        let siblings = self.slices_of.entry(slice.service().clone()).or_default();
        let place = siblings.partition_point(|known| known.name() < slice.name());
        siblings.insert(place, Arc::clone(&slice));
        self.dirty.insert(slice.service().clone());
        self.edited_slices.insert(slice.service().clone());
        self.slice_changes += 1;
        self.slices.insert(slice.name().clone(), slice);
    }

    fn delete_slice(&mut self, name: &ObjectName) {
        // K8S: nothing is measured of a Service that lost a slice
        // (pkg/proxy/endpointschangetracker.go, v1.36).
        if let Some(slice) = self.slices.get(name) {
            let service = slice.service();
            self.triggered.retain(|it| it.service != *service);
        }
        if self.drop_slice(name) {
            self.slice_changes += 1;
        }
    }

    fn drop_slice(&mut self, name: &ObjectName) -> bool {
        let Some(slice) = self.slices.remove(name) else { return false };
        if let Some(siblings) = self.slices_of.get_mut(slice.service()) {
            siblings.retain(|known| known.name() != name);
            if siblings.is_empty() {
                self.slices_of.remove(slice.service());
            }
        }
        self.dirty.insert(slice.service().clone());
        self.edited_slices.insert(slice.service().clone());
        true
    }

    /// Brings the fragments of one Service up to date and adds what changed to `changes`.
    fn refresh(&mut self, name: ObjectName, changes: &mut Vec<Change>) {
        let mut before = self.fragments.remove(&name).unwrap_or_default();
        for port in before.iter().filter_map(|fragment| health_port(fragment)) {
            let holders = self.health_ports.entry(port).or_default();
            *holders -= 1;
            if *holders == 0 {
                self.health_ports.remove(&port);
            }
        }
        let mut after = Vec::new();
        if let Some(service) = self.services.get(&name) {
            for view in Family::ALL.into_iter().flat_map(|family| service.views(family)) {
                let id = fragment_id(&view);
                let owns = |key: &FrontendKey| self.claims.owns(key, &id);
                after.push(Arc::new(lower(&view, &self.candidates(&view), &self.env, owns)));
            }
            after.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        }
        for port in after.iter().filter_map(|fragment| health_port(fragment)) {
            *self.health_ports.entry(port).or_default() += 1;
        }
        for fragment in &mut after {
            let known = before.iter().position(|known| known.id == fragment.id);
            match known.map(|place| before.swap_remove(place)) {
                Some(known) if known == *fragment => *fragment = known,
                _ => changes.push(Change::Upsert(Arc::clone(fragment))),
            }
        }
        before.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        changes.extend(before.into_iter().map(|fragment| Change::Remove(fragment.id.clone())));
        if !after.is_empty() {
            after.shrink_to_fit();
            self.fragments.insert(name, after);
        }
    }
}

fn health_port(fragment: &Fragment) -> Option<(Family, NonZeroU16)> {
    fragment.health_check_node_port.map(|port| (fragment.id.family, port))
}

/// Every frontend a Service wants.
fn claims_of(service: &Service) -> Vec<(FrontendKey, FragmentId)> {
    let views = Family::ALL.into_iter().flat_map(|family| service.views(family));
    views
        .flat_map(|view| {
            let id = fragment_id(&view);
            frontends(&view).into_iter().map(move |(_, key)| (key, id.clone()))
        })
        .collect()
}

/// The union of the slices' endpoints. Of duplicates (a pod moves between slices, or its address is
/// reused) the one that is not terminating wins, then the ready one, then the first slice's. Of two
/// weights the Service's own holds.
fn merge<'a>(
    slices: &'a [Arc<EndpointSlice>],
    service: Option<&Service>,
    family: Family,
    (name, protocol): (&str, Protocol),
    node: &str,
) -> Vec<Candidate<'a>> {
    let mut merged: Vec<_> = slices
        .iter()
        .filter(|slice| slice.family() == family)
        .flat_map(|slice| {
            let ports = slice
                .ports()
                .iter()
                .filter(|port| *port.name == *name && port.protocol == protocol);
            ports
                .flat_map(|port| slice.endpoints().iter().map(|it| (port.port, slice.weight(), it)))
        })
        .map(|(port, weight, endpoint)| Candidate {
            addr: SocketAddr::new(endpoint.ip, port.get()),
            local: !node.is_empty() && endpoint.node.as_deref() == Some(node),
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
            weight: service
                .and_then(|service| service.endpoint_weight(endpoint.ip))
                .or(weight)
                .unwrap_or(1),
            zone_hints: endpoint.zone_hints(),
            node_hints: endpoint.node_hints(),
        })
        .collect();
    merged.sort_by_key(|it| (it.addr, it.terminating, !it.ready));
    merged.dedup_by_key(|it| it.addr);
    merged
}

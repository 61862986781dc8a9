//! From what the four watches say to events of the core. Pure.

use std::collections::BTreeMap;

use proxier_core::{
    ObjectName,
    health::NodeState,
    model::{EndpointSlice, Event, NodeEnv, Object, ObjectKey, Problem, Service, api},
};

use crate::kinds::Ranges;

/// What a watch says.
#[derive(Debug)]
pub(crate) enum Feed<T> {
    /// An object is new or changed.
    Apply(ObjectName, T),
    /// An object is gone or no business of ours.
    Delete(ObjectName),
    /// These are all objects there are.
    List(BTreeMap<ObjectName, T>),
    /// The objects cannot be had from this server: do without.
    Unavailable,
}

/// A [`Feed`] of one of the kinds.
#[derive(Debug)]
pub(crate) enum Message {
    Cidrs(Feed<Ranges>),
    Node(Feed<api::Node>),
    Services(Feed<Service>),
    Slices(Feed<EndpointSlice>),
}

/// Holds everything back until the first lists are complete, and passes events on from then on.
///
/// Keeps Services and EndpointSlices only until then; the Node and the ServiceCIDRs for good, since
/// they end up in one value.
pub(crate) struct Gather {
    settings: NodeEnv,
    node: Option<api::Node>,
    knows_node: bool,
    cidrs: Option<BTreeMap<ObjectName, Ranges>>,
    services: Option<BTreeMap<ObjectName, Service>>,
    slices: Option<BTreeMap<ObjectName, EndpointSlice>>,
    started: bool,
    /// What was passed on last.
    env: Option<NodeEnv>,
    node_problems: Vec<Problem>,
}

impl Gather {
    pub(crate) fn new(settings: NodeEnv) -> Self {
        Self {
            settings,
            node: None,
            knows_node: false,
            cidrs: None,
            services: None,
            slices: None,
            started: false,
            env: None,
            node_problems: Vec::new(),
        }
    }

    /// Takes a message in; `events` gets what there is to pass on.
    pub(crate) fn take(&mut self, message: Message, events: &mut Vec<Event>) {
        match message {
            Message::Services(feed) if self.started => events.extend(pass(feed)),
            Message::Slices(feed) if self.started => events.extend(pass(feed)),
            Message::Services(feed) => hold(&mut self.services, feed),
            Message::Slices(feed) => hold(&mut self.slices, feed),
            Message::Cidrs(feed) => {
                hold(&mut self.cidrs, feed);
                self.refresh(events);
            }
            Message::Node(feed) => {
                self.take_node(feed);
                self.refresh(events);
            }
        }
    }

    /// The embedder's settings have changed.
    pub(crate) fn set_settings(&mut self, settings: NodeEnv, events: &mut Vec<Event>) {
        self.settings = settings;
        self.refresh(events);
    }

    /// Both lists without which nothing can be programmed are there.
    pub(crate) const fn has_lists(&self) -> bool {
        self.services.is_some() && self.slices.is_some()
    }

    /// All there is to wait for is there: the Node with an address, and the ServiceCIDRs.
    pub(crate) fn is_complete(&self) -> bool {
        let has_address = || self.node.as_ref().is_some_and(|it| !it.status.addresses.is_empty());
        self.has_lists() && self.knows_node && has_address() && self.cidrs.is_some()
    }

    pub(crate) const fn is_started(&self) -> bool {
        self.started
    }

    /// Passes everything on that was held back, as one reset, once both lists are there.
    pub(crate) fn start(&mut self, events: &mut Vec<Event>) {
        if self.started || !self.has_lists() {
            return;
        }
        self.started = true;
        self.refresh(events);
        let services = self.services.take().unwrap_or_default();
        let slices = self.slices.take().unwrap_or_default();
        events.push(Event::Services(services.into_values().collect()));
        events.push(Event::EndpointSlices(slices.into_values().collect()));
    }

    /// What load balancers care about.
    pub(crate) fn node_state(&self) -> NodeState {
        NodeState::of(self.node.as_ref())
    }

    pub(crate) fn node_problems(&self) -> &[Problem] {
        &self.node_problems
    }

    fn take_node(&mut self, feed: Feed<api::Node>) {
        self.knows_node = true;
        self.node = match feed {
            Feed::Apply(_, node) => Some(node),
            Feed::List(nodes) => nodes.into_values().next_back(),
            Feed::Delete(_) | Feed::Unavailable => None,
        };
    }

    /// Passes the node on if anything that counts has changed.
    fn refresh(&mut self, events: &mut Vec<Event>) {
        if !self.started {
            return;
        }
        let env = self.env();
        if self.env.as_ref() != Some(&env) {
            self.env = Some(env.clone());
            events.push(Event::Node(Box::new(env)));
        }
    }

    fn env(&mut self) -> NodeEnv {
        let mut env = self.settings.clone();
        if let Some(node) = &self.node {
            self.node_problems = env.observe(node);
        } else if let Some(last) = &self.env {
            // Without a Node object the node goes on as what it was.
            env.zone.clone_from(&last.zone);
            env.ips.clone_from(&last.ips);
            env.pod_cidrs.clone_from(&last.pod_cidrs);
        }
        let known = self.cidrs.iter().flat_map(BTreeMap::values).flat_map(|it| &it.nets);
        env.service_cidrs.extend(known);
        env.service_cidrs.sort_unstable();
        env.service_cidrs.dedup();
        env
    }
}

fn hold<T>(held: &mut Option<BTreeMap<ObjectName, T>>, feed: Feed<T>) {
    match feed {
        Feed::List(items) => *held = Some(items),
        Feed::Apply(name, item) => {
            held.get_or_insert_default().insert(name, item);
        }
        Feed::Delete(name) => {
            held.get_or_insert_default().remove(&name);
        }
        Feed::Unavailable => {
            held.get_or_insert_default();
        }
    }
}

/// A kind that is passed on as it comes.
trait Passed: Sized {
    fn object(self) -> Object;
    fn key(name: ObjectName) -> ObjectKey;
    fn all(items: Vec<Self>) -> Event;
}

impl Passed for Service {
    fn object(self) -> Object {
        Object::Service(self)
    }

    fn key(name: ObjectName) -> ObjectKey {
        ObjectKey::Service(name)
    }

    fn all(items: Vec<Self>) -> Event {
        Event::Services(items)
    }
}

impl Passed for EndpointSlice {
    fn object(self) -> Object {
        Object::EndpointSlice(self)
    }

    fn key(name: ObjectName) -> ObjectKey {
        ObjectKey::EndpointSlice(name)
    }

    fn all(items: Vec<Self>) -> Event {
        Event::EndpointSlices(items)
    }
}

fn pass<T: Passed>(feed: Feed<T>) -> Option<Event> {
    match feed {
        Feed::Apply(_, item) => Some(Event::Apply(item.object())),
        Feed::Delete(name) => Some(Event::Delete(T::key(name))),
        Feed::List(items) => Some(T::all(items.into_values().collect())),
        Feed::Unavailable => None,
    }
}

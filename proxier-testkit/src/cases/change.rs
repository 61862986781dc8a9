//! Kind `change`: what the store calls a change, and when a change is none.

use std::collections::BTreeSet;

use proxier_core::{
    model::{Event, NodeEnv, Object, ObjectKey, Pending, Service, Store},
    name::ObjectName,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Case, CaseError, EndpointSpec, PortSpec, ServiceSpec, SlicePortSpec, SliceSpec, Verdict,
    world::{api_service, read_slices, split},
};

/// Gives every text of a case a small number: contents are opaque, only equality counts.
#[derive(Default)]
struct Numbers(Vec<String>);

impl Numbers {
    fn of(&mut self, text: &Value) -> u8 {
        let text = text.to_string();
        let known = self.0.iter().position(|it| *it == text);
        let index = known.unwrap_or_else(|| {
            self.0.push(text);
            self.0.len() - 1
        });
        u8::try_from(index).unwrap_or(u8::MAX)
    }
}

struct Tracker {
    store: Store,
    keys: Numbers,
    contents: Numbers,
}

impl Tracker {
    /// A store that has seen full lists, of the Services that exist before the first step.
    fn new(steps: &[Vec<Value>]) -> Self {
        let store = Store::new(NodeEnv::default());
        let mut tracker = Self { store, keys: Numbers::default(), contents: Numbers::default() };
        let mut seen = BTreeSet::new();
        let mut before = Vec::new();
        for step in steps {
            if let [verb, Value::String(key), content, ..] = step.as_slice()
                && verb == "svc"
                && seen.insert(key.clone())
                && !content.is_null()
            {
                before.extend(tracker.service(key, content));
            }
        }
        tracker.store.apply(Event::Services(before));
        tracker.store.apply(Event::EndpointSlices(Vec::new()));
        tracker.store.take();
        tracker
    }

    fn service(&mut self, key: &str, content: &Value) -> Option<Service> {
        let host = self.keys.of(&json!(key));
        let port = 1 + i64::from(self.contents.of(content));
        let spec = ServiceSpec {
            key: key.to_owned(),
            cluster_ips: vec![format!("10.0.0.{host}")],
            ports: vec![PortSpec { name: "p".to_owned(), port, ..PortSpec::default() }],
            ..ServiceSpec::default()
        };
        Service::read(&api_service(&spec)).value
    }

    fn set_service(&mut self, key: &str, content: &Value) -> Pending {
        let (namespace, name) = split(key);
        let gone = Event::Delete(ObjectKey::Service(ObjectName::new(namespace, name)));
        let service = if content.is_null() { None } else { self.service(key, content) };
        self.store.apply(service.map_or(gone, |it| Event::Apply(Object::Service(it))));
        self.store.pending()
    }

    /// Says whether this event was a change.
    fn set_slice(&mut self, service: &str, name: &str, content: &Value) -> bool {
        let before = self.store.pending().slice_changes;
        let (namespace, _) = split(service);
        if content.is_null() {
            let name = ObjectName::new(namespace, name);
            self.store.apply(Event::Delete(ObjectKey::EndpointSlice(name)));
        } else {
            let host = self.contents.of(content);
            let endpoint =
                EndpointSpec { addr: Some(format!("10.0.1.{host}")), ..EndpointSpec::default() };
            let port = SlicePortSpec {
                name: Some("p".to_owned()),
                port: Some(80),
                ..SlicePortSpec::default()
            };
            let slice = SliceSpec {
                name: name.to_owned(),
                service: Some(service.to_owned()),
                ports: vec![port],
                endpoints: vec![endpoint],
                ..SliceSpec::default()
            };
            for slice in read_slices(&[slice]) {
                self.store.apply(Event::Apply(Object::EndpointSlice(slice)));
            }
        }
        self.store.pending().slice_changes != before
    }

    fn apply(&mut self) -> Value {
        let Pending { services, endpoints, .. } = self.store.pending();
        self.store.take();
        let texts = |names: Vec<ObjectName>| -> Vec<String> {
            names.iter().map(ToString::to_string).collect()
        };
        json!({"services": texts(services), "endpoints": texts(endpoints)})
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Applied {
    services: BTreeSet<String>,
    endpoints: BTreeSet<String>,
}

pub(super) fn run_change(case: &Case) -> Result<Verdict, CaseError> {
    let steps: Vec<Vec<Value>> = case.read("steps")?;
    let mut tracker = Tracker::new(&steps);
    for (number, step) in steps.iter().enumerate() {
        let part = format!("steps[{number}]");
        let (expected, actual) = match step.as_slice() {
            [verb, Value::String(key), _, content, expected @ ..] if verb == "svc" => {
                let pending = tracker.set_service(key, content).services.len();
                let actual = [json!(pending > 0), json!(pending)];
                (json!(expected), actual.into_iter().take(expected.len()).collect())
            }
            [verb, Value::String(service), Value::String(slice), content, expected @ ..]
                if verb == "slice" =>
            {
                let changed = tracker.set_slice(service, slice, content);
                (json!(expected), std::iter::once(json!(changed)).take(expected.len()).collect())
            }
            [verb, lists, ..] if verb == "apply" => {
                let wanted =
                    Applied::deserialize(lists).map_err(|error| case.wrong(&part, error))?;
                let expected = json!({"services": wanted.services, "endpoints": wanted.endpoints});
                (expected, tracker.apply())
            }
            _ => return Err(case.wrong(&part, "svc, slice or apply with arguments is expected")),
        };
        if expected != actual {
            return Ok(Verdict::failed(
                format!("step {} {}: {expected}", number + 1, json!(step)),
                actual,
            ));
        }
    }
    Ok(Verdict::PASSED)
}

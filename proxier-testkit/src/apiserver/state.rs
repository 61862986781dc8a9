//! Objects, versions and history. No I/O.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde_json::{Value, json};

/// What servers do on bad days.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Fault {
    /// Answers a verb on a resource with this status; `retry_after` seconds in a header.
    Refuse {
        /// `list`, `watch`, `create` or `patch`.
        verb: &'static str,
        /// The plural, without group.
        resource: &'static str,
        /// The HTTP status.
        code: u16,
        /// Seconds.
        retry_after: Option<u32>,
    },
    /// Has no streaming lists: says so in the stream, as a server whose storage is too old.
    NoStreamingLists,
    /// Watches say nothing, not even bookmarks.
    Silent,
    /// Pages after the first one are expired.
    ExpiredPages,
    /// The connection breaks after so many bytes of a body.
    Broken(usize),
    /// Lists end in the middle, as if that was all.
    Truncated(usize),
    /// Lists come so many bytes at a time, every ten milliseconds.
    Slow(usize),
    /// Answers word for word, for instance what a real server was recorded to say.
    Verbatim {
        /// `list`, `watch`, or `stream` for a streaming list. Watches stay open afterwards.
        verb: &'static str,
        /// The plural, without group.
        resource: &'static str,
        /// The body, or its beginning if it is a watch.
        body: &'static str,
    },
}

/// A request that came in.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Seen {
    /// `list`, `watch`, `create` or `patch`.
    pub verb: &'static str,
    /// The plural, without group.
    pub resource: String,
    /// The query, decoded.
    pub query: BTreeMap<String, String>,
}

pub(super) type Object = Arc<Value>;

/// What happened to an object.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) version: u64,
    pub(super) resource: String,
    pub(super) before: Option<Object>,
    /// With the version of the deletion, if that is what it is.
    pub(super) after: Object,
    pub(super) deleted: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) version: u64,
    /// Versions below are forgotten.
    pub(super) oldest: u64,
    objects: BTreeMap<(String, String), Object>,
    pub(super) history: Vec<Entry>,
    /// The bearer tokens that a secure server accepts.
    pub(super) tokens: Vec<String>,
    /// What the later pages of lists are taken from, by version and selection.
    pub(super) snapshots: HashMap<String, Vec<Object>>,
    pub(super) faults: Vec<Fault>,
    pub(super) seen: Vec<Seen>,
}

impl State {
    pub(super) fn apply(&mut self, mut object: Value) -> u64 {
        self.version += 1;
        let version = self.version;
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
        let resource = format!("{}s", kind.to_ascii_lowercase());
        let key = key(&object);
        if !object.get("metadata").is_some_and(Value::is_object) {
            object["metadata"] = json!({});
        }
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let after = Arc::new(object);
        let before = self.objects.insert((resource.clone(), key), Arc::clone(&after));
        self.history.push(Entry { version, resource, before, after, deleted: false });
        version
    }

    pub(super) fn delete(&mut self, resource: &str, key: &str) -> u64 {
        if let Some(before) = self.objects.remove(&(resource.to_owned(), key.to_owned())) {
            self.version += 1;
            let mut last = (*before).clone();
            last["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.history.push(Entry {
                version: self.version,
                resource: resource.to_owned(),
                before: Some(before),
                after: Arc::new(last),
                deleted: true,
            });
        }
        self.version
    }

    pub(super) fn compact(&mut self) {
        self.version += 1;
        self.oldest = self.version;
        self.history.clear();
        self.snapshots.clear();
    }

    pub(super) fn all(&self, resource: &str) -> Vec<Value> {
        self.select(resource, &Selector::default()).iter().map(|it| (**it).clone()).collect()
    }

    pub(super) fn select(&self, resource: &str, selector: &Selector) -> Vec<Object> {
        let of_resource = self.objects.iter().filter(|((it, _), _)| it == resource);
        of_resource.map(|(_, it)| it).filter(|it| selector.takes(it)).cloned().collect()
    }

    pub(super) fn get(&self, resource: &str, key: &str) -> Option<Object> {
        self.objects.get(&(resource.to_owned(), key.to_owned())).cloned()
    }
}

/// `namespace/name`, or the name.
pub(super) fn key(object: &Value) -> String {
    let part = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    match part("/metadata/namespace") {
        "" => part("/metadata/name").to_owned(),
        namespace => format!("{namespace}/{}", part("/metadata/name")),
    }
}

/// Label and field selectors, as far as they are used here.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    pub(super) labels: String,
    pub(super) fields: String,
}

impl Selector {
    pub(super) fn takes(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let label = |key: &str| labels.and_then(|it| it.get(key)).and_then(Value::as_str);
        let field = |path: &str| {
            object.pointer(&format!("/{}", path.replace('.', "/"))).and_then(Value::as_str)
        };
        let terms = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let compare = |term: &str, look: &dyn Fn(&str) -> Option<String>| {
            if let Some(key) = term.strip_prefix('!') {
                return look(key).is_none();
            }
            if let Some((key, value)) = term.split_once("!=") {
                return look(key).as_deref() != Some(value);
            }
            match term.split_once('=') {
                Some((key, value)) => look(key).as_deref() == Some(value.trim_start_matches('=')),
                None => term.is_empty() || look(term).is_some(),
            }
        };
        let owned = |text: Option<&str>| text.map(str::to_owned);
        terms(&self.labels).iter().all(|term| compare(term, &|key| owned(label(key))))
            && terms(&self.fields).iter().all(|term| compare(term, &|path| owned(field(path))))
    }
}

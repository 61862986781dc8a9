//! From the server's JSON to objects, one by one, so that a broken object costs only itself. Pure.

use std::borrow::Cow;

use proxier_core::{
    ObjectName,
    model::{Problem, Read},
};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::kinds::Watched;

/// Ends the initial events of a streaming list.
// K8S: KEP-3157, metav1.InitialEventsAnnotationKey.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// One page of a list, its items unread.
#[derive(Deserialize)]
pub(crate) struct Page<'a> {
    #[serde(default)]
    pub(crate) metadata: PageMeta,
    #[serde(borrow, default, deserialize_with = "nullable")]
    pub(crate) items: Vec<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct PageMeta {
    pub(crate) resource_version: String,
    #[serde(rename = "continue")]
    pub(crate) token: String,
}

/// One line of a watch, its object unread.
#[derive(Deserialize)]
pub(crate) struct Line<'a> {
    #[serde(borrow, rename = "type")]
    pub(crate) event: Cow<'a, str>,
    #[serde(borrow)]
    pub(crate) object: &'a RawValue,
}

/// What a watch needs to know of any object.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Head {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) ends_initial_events: bool,
}

impl Head {
    /// Reads what can be read; the rest is empty.
    pub(crate) fn read(object: &RawValue) -> Self {
        #[derive(Deserialize)]
        struct Whole {
            metadata: serde_json::Map<String, serde_json::Value>,
        }
        let Ok(Whole { metadata }) = serde_json::from_str(object.get()) else {
            return Self::default();
        };
        let text =
            |key: &str| metadata.get(key).and_then(|it| it.as_str()).unwrap_or_default().to_owned();
        let mark = metadata.get("annotations").and_then(|it| it.get(INITIAL_EVENTS_END));
        Self {
            namespace: text("namespace"),
            name: text("name"),
            version: text("resourceVersion"),
            ends_initial_events: mark.is_some_and(|it| it.as_str() == Some("true")),
        }
    }

    pub(crate) fn object_name(&self) -> ObjectName {
        ObjectName::new(&self.namespace, &self.name)
    }
}

/// Reads one object. What does not even have the right types is no object, and a problem.
pub(crate) fn read<W: Watched>(object: &RawValue) -> Read<W::Item> {
    match serde_json::from_str::<W::Api>(object.get()) {
        Ok(object) => W::read(object),
        Err(_) => Read { value: None, problems: vec![unreadable::<W>(object)] },
    }
}

/// Reads the object again to find out which field it was.
fn unreadable<W: Watched>(object: &RawValue) -> Problem {
    let mut deserializer = serde_json::Deserializer::from_str(object.get());
    let error = serde_path_to_error::deserialize::<_, W::Api>(&mut deserializer).err();
    let (field, message) = error.map_or_else(Default::default, |error| {
        let field = error.path().to_string();
        // Lines and columns of the server's JSON help nobody.
        let text = error.into_inner().to_string();
        let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
        (field, format!("{what}: the object is ignored"))
    });
    let head = Head::read(object);
    let object = match (head.namespace.as_str(), head.name.as_str()) {
        (_, "") => format!("{} without a name", W::KIND),
        ("", name) => format!("{} {name}", W::KIND),
        (namespace, name) => format!("{} {namespace}/{name}", W::KIND),
    };
    Problem { object, field, message }
}

// K8S: Go prints an empty list as `null`.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

//! Kubernetes Events: what a cluster's owner should see without reading logs.

use std::{collections::HashMap, time::Duration};

use kube::{
    Client,
    api::{Patch, PatchParams, PostParams},
    core::Request,
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use crate::{
    ask,
    backoff::between,
    trouble::{Asked, Trouble, TroubleKind},
};

/// How many notices may wait; more are dropped.
const QUEUE: usize = 256;

/// A notice that comes again within this time is counted, not published as a new one.
// K8S: client-go tools/events/event_broadcaster.go finishTime, v1.36.
const SERIES: Duration = Duration::from_secs(360);

/// The count of a series is published at most this often.
const REFRESH: Duration = Duration::from_secs(60);

/// How many Events may be published at once, and how long one takes to be allowed again.
const BURST: u32 = 25;
const REFILL: Duration = Duration::from_secs(10);

/// How many series are remembered.
const MAX_SERIES: usize = 1000;

/// The longest note the API takes.
// K8S: pkg/apis/core/validation/events.go NoteLengthLimit, v1.36.
const MAX_NOTE: usize = 1024;

/// The longest `reportingInstance` the API takes.
// K8S: pkg/apis/core/validation/events.go ReportingInstanceLengthLimit, v1.36.
const MAX_INSTANCE: usize = 128;

/// The longest name of an object.
// K8S: apimachinery validation.DNS1123SubdomainMaxLength, v1.36.
const MAX_NAME: usize = 253;

/// How long publishing one may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an Event is about.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Regarding {
    /// A Service, by namespace and name.
    Service(proxier_core::ObjectName),
    /// The node itself.
    Node(String),
}

/// Something to tell the owner of an object. Equal notices are one Event with a count.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub struct Notice {
    /// What it is about.
    pub regarding: Regarding,
    /// A reason in CamelCase, for instance `FailedToStartServiceHealthcheck`.
    pub reason: &'static str,
    /// What was being done, in CamelCase, for instance `Listen`.
    pub action: &'static str,
    /// What happened, in words.
    pub note: String,
    /// Whether it needs attention.
    pub is_warning: bool,
}

impl Notice {
    /// A warning.
    #[must_use]
    pub fn warning(
        regarding: Regarding,
        reason: &'static str,
        action: &'static str,
        note: impl Into<String>,
    ) -> Self {
        Self { regarding, reason, action, note: note.into(), is_warning: true }
    }

    /// Some news.
    #[must_use]
    pub fn news(
        regarding: Regarding,
        reason: &'static str,
        action: &'static str,
        note: impl Into<String>,
    ) -> Self {
        Self { is_warning: false, ..Self::warning(regarding, reason, action, note) }
    }

    /// A frontend that an older Service has already.
    #[must_use]
    pub fn conflict(conflict: &proxier_core::model::Conflict) -> Self {
        let service = Regarding::Service(conflict.loser.service.clone());
        Self::warning(service, "FrontendConflict", "Program", conflict.to_string())
    }

    /// A fragment that cannot be programmed.
    #[must_use]
    pub fn degraded(degraded: &proxier_core::Degraded) -> Self {
        let service = Regarding::Service(degraded.id.service.clone());
        let note = format!("{}: {}", degraded.id, degraded.reason);
        Self::warning(service, "FailedToProgram", "Program", note)
    }

    /// A health-check node port that cannot be listened on.
    // K8S: reason and action as in pkg/proxy/healthcheck/service_health.go, v1.36.
    #[must_use]
    pub fn health_port(service: proxier_core::ObjectName, error: &dyn std::fmt::Display) -> Self {
        let note = format!("cannot listen for health checks: {error}");
        let service = Regarding::Service(service);
        Self::warning(service, "FailedToStartServiceHealthcheck", "Listen", note)
    }
}

/// Takes notices. Cheap to clone; never waits.
#[derive(Clone, Debug)]
pub struct Recorder {
    notices: mpsc::Sender<Notice>,
}

impl Recorder {
    /// A recorder and the publisher that has to be run for it. `component` is who reports, for
    /// instance `proxier`, on the node `node`.
    #[must_use]
    pub fn new(client: Client, component: &str, node: &str) -> (Self, Publisher) {
        let (sender, notices) = mpsc::channel(QUEUE);
        let publisher = Publisher {
            client,
            component: component.to_owned(),
            node: node.to_owned(),
            notices,
            series: HashMap::new(),
            allowance: BURST,
            refilled: None,
            is_failing: false,
        };
        (Self { notices: sender }, publisher)
    }

    /// Publishes a notice, some time. Dropped when too many wait: Events are best effort.
    pub fn publish(&self, notice: Notice) {
        if self.notices.try_send(notice).is_err() {
            tracing::debug!("too many Events: one is dropped");
        }
    }
}

/// Publishes what [`Recorder`]s are told as `events.k8s.io/v1` Events.
pub struct Publisher {
    client: Client,
    component: String,
    node: String,
    notices: mpsc::Receiver<Notice>,
    series: HashMap<Notice, Series>,
    allowance: u32,
    refilled: Option<Instant>,
    is_failing: bool,
}

struct Series {
    /// Name of the Event object.
    name: String,
    count: u32,
    seen: Instant,
    published: Instant,
}

impl Publisher {
    /// Publishes until the last [`Recorder`] is gone.
    ///
    /// # Cancel safety
    /// May be dropped at any time.
    pub async fn run(mut self) {
        while let Some(notice) = self.notices.recv().await {
            let outcome = self.publish(notice, Instant::now()).await;
            match &outcome {
                Err(trouble) if !self.is_failing => {
                    tracing::warn!(%trouble, "cannot publish Events");
                }
                Ok(()) | Err(_) => {}
            }
            self.is_failing = outcome.is_err();
        }
    }

    async fn publish(&mut self, mut notice: Notice, now: Instant) -> Result<(), Trouble> {
        notice.note = shortened(notice.note);
        self.series.retain(|_, series| now.duration_since(series.seen) < SERIES);
        if let Some(series) = self.series.get_mut(&notice) {
            series.count = series.count.saturating_add(1);
            series.seen = now;
            if now.duration_since(series.published) < REFRESH {
                return Ok(());
            }
            series.published = now;
            let (name, count) = (series.name.clone(), series.count);
            if !self.may_publish(now) {
                return Ok(());
            }
            return self.patch(&notice, &name, count).await;
        }
        if self.series.len() >= MAX_SERIES || !self.may_publish(now) {
            tracing::debug!(?notice, "too many Events: one is dropped");
            return Ok(());
        }
        let name = self.create(&notice).await?;
        self.series.insert(notice, Series { name, count: 1, seen: now, published: now });
        Ok(())
    }

    /// A bucket of tokens: an unhappy cluster must not be made unhappier.
    fn may_publish(&mut self, now: Instant) -> bool {
        let refilled = *self.refilled.get_or_insert(now);
        let earned = now.duration_since(refilled).as_secs() / REFILL.as_secs();
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        if earned > 0 {
            self.allowance = (self.allowance + earned).min(BURST);
            self.refilled = Some(now);
        }
        self.allowance = match self.allowance.checked_sub(1) {
            Some(left) => left,
            None => return false,
        };
        true
    }

    async fn create(&self, notice: &Notice) -> Result<String, Trouble> {
        let (kind, namespace, object, uid) = match &notice.regarding {
            Regarding::Node(name) => ("Node", "default", name.as_str(), Some(name.clone())),
            Regarding::Service(name) => {
                ("Service", name.namespace(), name.name(), self.uid(name).await)
            }
        };
        let unique = between(Duration::ZERO, Duration::from_secs(1 << 30)).as_nanos();
        // K8S: names of Events are the object's with a suffix (client-go tools/events).
        let suffix = format!(".{unique:x}");
        let name = name_of(object, &suffix);
        let mut event = json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": timestamp(),
            "reportingController": self.component,
            "reportingInstance": instance(&self.component, &self.node),
            "action": notice.action,
            "reason": notice.reason,
            "type": if notice.is_warning { "Warning" } else { "Normal" },
            "note": notice.note,
            "regarding": {"apiVersion": "v1", "kind": kind, "name": object},
        });
        if let Some(regarding) = event.get_mut("regarding") {
            if kind == "Service" {
                regarding["namespace"] = json!(namespace);
            }
            if let Some(uid) = uid {
                regarding["uid"] = json!(uid);
            }
        }
        let request = events_of(namespace).create(&PostParams::default(), bytes(&event));
        self.ask("create", request).await?;
        Ok(name)
    }

    async fn patch(&self, notice: &Notice, name: &str, count: u32) -> Result<(), Trouble> {
        let namespace = match &notice.regarding {
            Regarding::Node(_) => "default",
            Regarding::Service(service) => service.namespace(),
        };
        let patch =
            Patch::Merge(json!({"series": {"count": count, "lastObservedTime": timestamp()}}));
        let request = events_of(namespace).patch(name, &PatchParams::default(), &patch);
        self.ask("patch", request).await.map(|_| ())
    }

    /// `kubectl describe` finds Events by the uid of the object; the model does not keep it. Asked for
    /// with the verb that the watch needs anyway, once per new Event.
    async fn uid(&self, service: &proxier_core::ObjectName) -> Option<String> {
        let path = format!("/api/v1/namespaces/{}/services", service.namespace());
        let params = kube::api::ListParams::default()
            .fields(&format!("metadata.name={}", service.name()))
            .limit(1);
        let asked = Asked { verb: "list", resource: "services", group: "" };
        let answer = ask::send(&self.client, asked, Request::new(path).list(&params));
        let text = timeout(PATIENCE, async { answer.await?.text().await }).await.ok()?.ok()?;
        let list: serde_json::Value = serde_json::from_str(&text).ok()?;
        list.pointer("/items/0/metadata/uid")?.as_str().map(str::to_owned)
    }

    async fn ask(
        &self,
        verb: &'static str,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, Trouble> {
        let asked = Asked { verb, resource: "events", group: "events.k8s.io" };
        let answer = async { ask::send(&self.client, asked, request).await?.text().await };
        timeout(PATIENCE, answer).await.unwrap_or_else(|_| {
            Err(asked.trouble(TroubleKind::TimedOut, format!("no answer within {PATIENCE:?}")))
        })
    }
}

fn events_of(namespace: &str) -> Request {
    Request::new(format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"))
}

fn bytes(event: &serde_json::Value) -> Vec<u8> {
    event.to_string().into_bytes()
}

/// As `metav1.MicroTime` prints.
fn timestamp() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}

/// A name of bounded length that ends with `suffix`.
fn name_of(object: &str, suffix: &str) -> String {
    let kept: String = object.chars().take(MAX_NAME - suffix.len()).collect();
    // What comes before a dot must be a label, which ends with a letter or digit.
    format!("{}{suffix}", kept.trim_end_matches(['-', '.']))
}

/// Who reports; names of nodes may be longer than the API lets this be.
fn instance(component: &str, node: &str) -> String {
    format!("{component}-{node}").chars().take(MAX_INSTANCE).collect()
}

fn shortened(mut note: String) -> String {
    if note.len() > MAX_NOTE {
        let end =
            (0..=MAX_NOTE - 3).rev().find(|at| note.is_char_boundary(*at)).unwrap_or_default();
        note.truncate(end);
        note.push('…');
    }
    note
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("component", &self.component).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits are the API's (pkg/apis/core/validation/events.go).
    #[test]
    fn what_is_long_is_cut_to_what_the_api_takes() {
        let node = format!("{}.example", "n".repeat(245));
        assert_eq!(instance("proxier", &node).len(), 128);
        assert_eq!(instance("proxier", "tern"), "proxier-tern");
        assert_eq!(name_of("tern", ".2a"), "tern.2a");
        let name = name_of(&node, ".123456789abcdef");
        assert_eq!((name.len(), name.ends_with("n.123456789abcdef")), (253, true));
        assert_eq!(
            name_of(&format!("{}-b", "a".repeat(249)), ".2a"),
            format!("{}.2a", "a".repeat(249))
        );
        let note = shortened("ä".repeat(600));
        assert!(note.len() <= 1024 && note.ends_with("ä…"), "{}", note.len());
    }
}

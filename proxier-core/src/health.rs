//! What health checks answer: the proxier's own, and those of Services with a health-check node port.
//!
//! Pure: no sockets, and the time is an argument. Whoever serves HTTP asks here for status, headers
//! and body. Names, codes and JSON are kube-proxy's (`pkg/proxy/healthcheck`, v1.36), so that load
//! balancers and probes keep working.

use std::{
    collections::BTreeSet,
    fmt::Write,
    num::NonZeroU16,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::{
    ir::{Fragment, FrontendKind, Verdict},
    model::{Store, api},
    name::{ByFamily, Family, ObjectName},
};

/// The cluster autoscaler marks nodes that it is about to remove with this taint.
// K8S: pkg/proxy/healthcheck/proxy_health.go ToBeDeletedTaint, v1.36.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What to answer to a health check.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Answer {
    /// HTTP status: 200 or 503.
    pub status: u16,
    /// Headers, without `Content-Length` and `Date`.
    pub headers: Vec<(&'static str, String)>,
    /// JSON.
    pub body: String,
}

impl Answer {
    fn new(healthy: bool, body: String) -> Self {
        let headers = vec![
            ("Content-Type", "application/json".to_owned()),
            ("X-Content-Type-Options", "nosniff".to_owned()),
        ];
        Self { status: if healthy { 200 } else { 503 }, headers, body }
    }
}

/// The health check of a Service in one family: where to listen, and what there is to say.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ServiceHealth {
    /// The Service.
    pub service: ObjectName,
    /// The family to listen in.
    pub family: Family,
    /// The port to listen on.
    pub port: NonZeroU16,
    /// Addresses of ready endpoints on this node, over all ports of the Service. Terminating ones
    /// that still get traffic do not count, so that load balancers go elsewhere in time.
    pub local_endpoints: usize,
}

impl ServiceHealth {
    /// The health check of one Service; `None` when it has none in this family.
    ///
    /// O(endpoints of the Service).
    #[must_use]
    pub fn of(store: &Store, name: &ObjectName, family: Family) -> Option<Self> {
        let service = store.service(name)?;
        let port = service.views(family).find_map(|view| view.health_check_node_port())?;
        let endpoints = store.endpoints(name, family);
        let ready = endpoints.values().flatten().filter(|it| it.local && it.ready);
        let local: BTreeSet<_> = ready.map(|it| it.addr.ip()).collect();
        Some(Self { service: name.clone(), family, port, local_endpoints: local.len() })
    }

    /// What to answer to any request. `healthy` is [`ProxyHealth::is_healthy`].
    #[must_use]
    pub fn answer(&self, healthy: bool) -> Answer {
        let Self { service, local_endpoints, .. } = self;
        // Names hold nothing that JSON would escape.
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\
             \"localEndpoints\": {local_endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
            service.namespace(),
            service.name()
        );
        let mut answer = Answer::new(healthy && *local_endpoints > 0, body);
        let weight = local_endpoints.to_string();
        answer.headers.push(("X-Load-Balancing-Endpoint-Weight", weight));
        answer
    }
}

/// What is known of the own Node object, as far as load balancers care.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct NodeState {
    /// It exists.
    pub exists: bool,
    /// It is being deleted.
    pub deleting: bool,
    /// The cluster autoscaler is about to remove it.
    pub tainted: bool,
}

impl NodeState {
    /// Reads the Node object; `None` when there is none.
    #[must_use]
    pub fn of(node: Option<&api::Node>) -> Self {
        node.map_or_else(Self::default, |node| Self {
            exists: true,
            deleting: node.metadata.deletion_timestamp.is_some(),
            tainted: node.spec.taints.iter().any(|taint| taint.key == TO_BE_DELETED),
        })
    }

    /// New connections may be sent to this node.
    #[must_use]
    pub const fn is_eligible(self) -> bool {
        self.exists && !self.deleting && !self.tainted
    }
}

/// The proxier's own health.
///
/// A family is healthy until a change has been waiting for longer than the timeout. Without changes
/// it is healthy for ever, and so it is before its first sync.
#[derive(Clone, Debug)]
pub struct ProxyHealth {
    timeout: Duration,
    node: NodeState,
    families: ByFamily<Times>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Times {
    /// When the oldest change that is not yet programmed came in.
    queued: Option<SystemTime>,
    /// When the last sync succeeded.
    updated: Option<SystemTime>,
}

impl ProxyHealth {
    /// Everything is healthy; the node is unknown. kube-proxy's timeout is twice its sync period,
    /// one minute.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, node: NodeState::default(), families: ByFamily::default() }
    }

    /// A change came in. Later ones change nothing until there was a sync.
    pub fn queued(&mut self, family: Family, now: SystemTime) {
        self.families.of_mut(family).queued.get_or_insert(now);
    }

    /// A sync succeeded; also to be called when syncing starts.
    pub const fn updated(&mut self, family: Family, now: SystemTime) {
        *self.families.of_mut(family) = Times { queued: None, updated: Some(now) };
    }

    /// The Node object changed.
    pub const fn observe(&mut self, node: NodeState) {
        self.node = node;
    }

    /// Says whether all families are healthy.
    #[must_use]
    pub fn is_healthy(&self, now: SystemTime) -> bool {
        Family::ALL.into_iter().all(|family| self.is_family_healthy(family, now))
    }

    fn is_family_healthy(&self, family: Family, now: SystemTime) -> bool {
        let Times { queued, updated } = self.families.of(family);
        let waiting = |queued: &SystemTime| now.duration_since(*queued).unwrap_or_default();
        updated.is_none() || queued.as_ref().is_none_or(|queued| waiting(queued) < self.timeout)
    }

    /// What `/healthz` answers: whether this node should get traffic from load balancers.
    #[must_use]
    pub fn healthz(&self, now: SystemTime) -> Answer {
        let eligible = self.node.is_eligible();
        Answer::new(self.is_healthy(now) && eligible, self.body(now, Some(eligible)))
    }

    /// What `/livez` answers: whether this process should be restarted.
    #[must_use]
    pub fn livez(&self, now: SystemTime) -> Answer {
        Answer::new(self.is_healthy(now), self.body(now, None))
    }

    fn body(&self, now: SystemTime, eligible: Option<bool>) -> String {
        let healthy = self.is_healthy(now);
        let newest = Family::ALL.iter().filter_map(|it| self.families.of(*it).updated).max();
        let last = if healthy { Some(now) } else { newest };
        let mut body = format!(
            "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\", ",
            last.map(rfc3339).unwrap_or_default(),
            rfc3339(now)
        );
        if let Some(eligible) = eligible {
            write!(body, "\"nodeEligible\": {eligible}, ").unwrap_or_default();
        }
        write!(body, "\"healthy\": {healthy}, \"status\": {{").unwrap_or_default();
        let mut separator = "";
        for family in Family::ALL {
            let Some(updated) = self.families.of(family).updated else { continue };
            let healthy = self.is_family_healthy(family, now);
            let last = rfc3339(if healthy { now } else { updated });
            write!(
                body,
                "{separator}\"{family}\": {{\"lastUpdated\": \"{last}\", \"healthy\": {healthy}}}"
            )
            .unwrap_or_default();
            separator = ", ";
        }
        body.push_str("}}");
        body
    }
}

/// How many Service ports have endpoints somewhere, but none that their Local policy allows here.
///
/// kube-proxy's gauge `sync_proxy_rules_no_local_endpoints_total`, by traffic policy.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct NoLocalEndpoints {
    /// `internalTrafficPolicy`.
    pub internal: usize,
    /// `externalTrafficPolicy`.
    pub external: usize,
}

impl NoLocalEndpoints {
    /// Adds a fragment to the count.
    pub fn count(&mut self, fragment: &Fragment) {
        let dropped = |internal: bool| {
            fragment.frontends.iter().any(|frontend| {
                (frontend.kind == FrontendKind::ClusterIp) == internal
                    && frontend.verdicts.external == Verdict::Drop
            })
        };
        self.internal += usize::from(dropped(true));
        self.external += usize::from(dropped(false));
    }
}

/// A time as the API prints it: RFC 3339 in UTC, with nanoseconds if there are any.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if since.subsec_nanos() > 0 {
        write!(text, ".{:09}", since.subsec_nanos()).unwrap_or_default();
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('Z');
    text
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
// Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days: years begin in
// March, so that the leap day is the last one.
const fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era;
    (if month <= 2 { year + 1 } else { year }, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_printed_as_the_api_prints_them() {
        assert_eq!(rfc3339(at(0)), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(at(951_782_399)), "2000-02-28T23:59:59Z");
        assert_eq!(rfc3339(at(951_782_400)), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(at(4_107_542_400)), "2100-03-01T00:00:00Z");
        let half = at(1_767_225_600) + Duration::from_millis(500);
        assert_eq!(rfc3339(half), "2026-01-01T00:00:00.5Z");
    }

    #[test]
    fn a_waiting_change_makes_one_family_unhealthy_and_the_body_says_which() {
        let mut health = ProxyHealth::new(Duration::from_secs(60));
        health.observe(NodeState { exists: true, ..NodeState::default() });
        health.updated(Family::V4, at(100));
        health.updated(Family::V6, at(100));
        health.queued(Family::V6, at(200));
        assert_eq!(health.healthz(at(259)).status, 200);
        let answer = health.livez(at(260));
        assert_eq!(answer.status, 503);
        assert_eq!(
            answer.body,
            "{\"lastUpdated\": \"1970-01-01T00:01:40Z\",\"currentTime\": \"1970-01-01T00:04:20Z\", \
             \"healthy\": false, \"status\": {\"IPv4\": {\"lastUpdated\": \
             \"1970-01-01T00:04:20Z\", \"healthy\": true}, \"IPv6\": {\"lastUpdated\": \
             \"1970-01-01T00:01:40Z\", \"healthy\": false}}}"
        );
        health.updated(Family::V6, at(261));
        assert_eq!(health.healthz(at(100_000)).status, 200);
    }

    #[test]
    fn a_service_answers_with_its_weight() {
        let health = ServiceHealth {
            service: ObjectName::new("edge", "near"),
            family: Family::V4,
            port: NonZeroU16::new(32011).unwrap(),
            local_endpoints: 1,
        };
        let answer = health.answer(true);
        assert_eq!(answer.status, 200);
        assert_eq!(
            answer.body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"edge\",\n\t\t\"name\": \"near\"\n\t},\n\t\
             \"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"
        );
        assert!(answer.headers.contains(&("X-Load-Balancing-Endpoint-Weight", "1".to_owned())));
        assert_eq!(health.answer(false).status, 503);
    }
}

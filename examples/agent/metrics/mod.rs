//! Metrics: kube-proxy's names where the meaning is the same, and ours.

mod scrape;

use std::{
    collections::BTreeMap,
    sync::atomic::AtomicU64,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family as By, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use proxier::{Cause, Family, Mode, RuleCount, SyncError, Synced};

pub(crate) use scrape::scrape;

type Label = [(&'static str, String); 1];
type Labels = [(&'static str, String); 2];
type Seconds = Gauge<f64, AtomicU64>;

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Registry,
    sync: By<Label, Histogram>,
    full: By<Label, Histogram>,
    partial: By<Label, Histogram>,
    programming: By<Label, Histogram>,
    last: By<Label, Seconds>,
    last_queued: By<Label, Seconds>,
    endpoint_changes: Counter,
    endpoints_pending: Gauge,
    service_changes: Counter,
    services_pending: Gauge,
    no_local: By<Labels, Gauge>,
    iptables_failures: By<Label, Counter>,
    nftables_failures: By<Label, Counter>,
    partial_failures: By<Label, Counter>,
    healthz: By<Label, Counter>,
    livez: By<Label, Counter>,
    stale_flows: By<Label, Counter>,
    forgetting: By<Label, Histogram>,
    rules: By<Labels, Gauge>,
    rules_written: By<Labels, Gauge>,
    cleanup_failures: By<Label, Counter>,
    latency: Histogram,
    commit: Histogram,
    ops: By<Label, Counter>,
    visited: Counter,
    drift: Counter,
    suppressed: Counter,
    degraded: By<Label, Gauge>,
    conflicts: Gauge,
    fragments: Gauge,
    started: Gauge,
    trouble: Seconds,
    info: By<Labels, Gauge>,
    /// Changes made before do not count: they may have waited for a start.
    born: SystemTime,
}

/// `0.001 × 2^n`, n = 0..14.
// K8S: pkg/proxy/metrics/metrics.go, v1.36.
fn sync_buckets() -> Histogram {
    Histogram::new((0..15).map(|n| 0.001 * f64::from(1 << n)))
}

/// A quarter and half of a second, each second of a minute, then ever longer steps up to five minutes.
// K8S: pkg/proxy/metrics/metrics.go, v1.36.
fn programming_buckets() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

/// From ten microseconds to ten seconds.
fn fine_buckets() -> Histogram {
    let decade = |exponent: i32| [1.0, 2.5, 5.0].map(|step| step * 10f64.powi(exponent));
    Histogram::new((-5..=0).flat_map(decade).chain([10.0]))
}

fn family(family: Family) -> Label {
    [("ip_family", family.to_string())]
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Metrics {
    pub(crate) fn new(mode: Mode, families: &[Family]) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            sync: By::new_with_constructor(sync_buckets),
            full: By::new_with_constructor(sync_buckets),
            partial: By::new_with_constructor(sync_buckets),
            programming: By::new_with_constructor(programming_buckets),
            last: By::default(),
            last_queued: By::default(),
            endpoint_changes: Counter::default(),
            endpoints_pending: Gauge::default(),
            service_changes: Counter::default(),
            services_pending: Gauge::default(),
            no_local: By::default(),
            iptables_failures: By::default(),
            nftables_failures: By::default(),
            partial_failures: By::default(),
            healthz: By::default(),
            livez: By::default(),
            stale_flows: By::default(),
            forgetting: By::new_with_constructor(sync_buckets),
            rules: By::default(),
            rules_written: By::default(),
            cleanup_failures: By::default(),
            latency: fine_buckets(),
            commit: fine_buckets(),
            ops: By::default(),
            visited: Counter::default(),
            drift: Counter::default(),
            suppressed: Counter::default(),
            degraded: By::default(),
            conflicts: Gauge::default(),
            fragments: Gauge::default(),
            started: Gauge::default(),
            trouble: Seconds::default(),
            info: By::default(),
            born: SystemTime::now(),
        };
        metrics.register_kube_proxys();
        metrics.register_ours();
        metrics.set_mode(mode);
        metrics.begin(families);
        metrics
    }

    /// Lets what is labelled begin at zero: what is missing cannot be alerted on.
    fn begin(&self, families: &[Family]) {
        for label in families.iter().map(|it| family(*it)) {
            for histogram in [&self.sync, &self.full, &self.partial, &self.forgetting] {
                drop(histogram.get_or_create(&label));
            }
            drop(self.programming.get_or_create(&label));
            for gauge in [&self.last, &self.last_queued] {
                drop(gauge.get_or_create(&label));
            }
            for counter in [
                &self.iptables_failures,
                &self.nftables_failures,
                &self.partial_failures,
                &self.cleanup_failures,
                &self.stale_flows,
            ] {
                drop(counter.get_or_create(&label));
            }
            let [(_, family)] = label;
            for policy in ["internal", "external"] {
                let labels = [("traffic_policy", policy.to_owned()), ("ip_family", family.clone())];
                drop(self.no_local.get_or_create(&labels));
            }
        }
        for code in ["200", "503"] {
            drop(self.healthz.get_or_create(&[("code", code.to_owned())]));
            drop(self.livez.get_or_create(&[("code", code.to_owned())]));
        }
        for op in ["add", "set", "del"] {
            drop(self.ops.get_or_create(&[("op", op.to_owned())]));
        }
        for (_, reason) in scrape::KINDS {
            drop(self.degraded.get_or_create(&[("reason", reason.to_owned())]));
        }
    }

    /// Says in which mode the node is programmed.
    pub(crate) fn set_mode(&self, mode: Mode) {
        for gauges in [&self.info, &self.rules, &self.rules_written] {
            gauges.clear();
        }
        let labels =
            [("version", env!("CARGO_PKG_VERSION").to_owned()), ("mode", mode.to_string())];
        self.info.get_or_create(&labels).set(1);
    }

    /// The registry adds `_total` to the names of counters.
    fn register_kube_proxys(&mut self) {
        let r = self.registry.sub_registry_with_prefix("kubeproxy");
        r.register(
            "sync_proxy_rules_duration_seconds",
            "Time of a sync; both families are synced at once",
            self.sync.clone(),
        );
        r.register(
            "sync_full_proxy_rules_duration_seconds",
            "Time of a sync of everything",
            self.full.clone(),
        );
        r.register(
            "sync_partial_proxy_rules_duration_seconds",
            "Time of a sync of what changed",
            self.partial.clone(),
        );
        r.register(
            "network_programming_duration_seconds",
            "From a pod's change, as its EndpointSlice dates it, to the kernel holding it",
            self.programming.clone(),
        );
        r.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When the last sync succeeded",
            self.last.clone(),
        );
        r.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When the last change came in; long after the last sync: the node is not programmed",
            self.last_queued.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices",
            self.endpoint_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes_pending",
            "Services with endpoint changes that wait for a sync",
            self.endpoints_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes",
            "Changes of Services",
            self.service_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes_pending",
            "Services with changes that wait for a sync",
            self.services_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with endpoints, none of which their Local policy allows here",
            self.no_local.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_restore_failures",
            "Failed syncs in iptables and ipvs mode; see the log",
            self.iptables_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_partial_restore_failures",
            "Failed syncs of what changed in iptables mode; see the log",
            self.partial_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_nftables_sync_failures",
            "Failed syncs in nftables mode; see the log",
            self.nftables_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_nftables_cleanup_failures",
            "Always 0: what goes, goes in the transaction of the sync",
            self.cleanup_failures.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_total",
            "Rules there are, by table, in iptables mode",
            self.rules.clone(),
        );
        r.register(
            "sync_proxy_rules_iptables_last",
            "Rules that the last sync wrote, by table, in iptables mode",
            self.rules_written.clone(),
        );
        r.register("proxy_healthz", "Answers of /healthz by status", self.healthz.clone());
        r.register("proxy_livez", "Answers of /livez by status", self.livez.clone());
        r.register(
            "conntrack_reconciler_deleted_entries",
            "Stale UDP flows removed",
            self.stale_flows.clone(),
        );
        r.register(
            "conntrack_reconciler_sync_duration_seconds",
            "Time a sync spent on stale UDP flows, where it had to look for any",
            self.forgetting.clone(),
        );
    }

    fn register_ours(&mut self) {
        self.registry.register("proxier_build_info", "Version and mode", self.info.clone());
        let r = self.registry.sub_registry_with_prefix("proxier");
        r.register(
            "change_latency_seconds",
            "From a change coming in to the kernel holding it (unstable)",
            self.latency.clone(),
        );
        r.register(
            "commit_duration_seconds",
            "Time of planning and programming (unstable)",
            self.commit.clone(),
        );
        r.register(
            "kernel_ops",
            "Kernel objects by what was done to them (unstable)",
            self.ops.clone(),
        );
        r.register("plan_visited_fragments", "Fragments compared (unstable)", self.visited.clone());
        r.register(
            "drift_repaired",
            "Objects repaired that others changed; growing: something else manages them (unstable)",
            self.drift.clone(),
        );
        r.register(
            "ir_suppressed_updates",
            "Changes of objects that meant nothing to the node (unstable)",
            self.suppressed.clone(),
        );
        r.register(
            "degraded_fragments",
            "Service ports that are not programmed, by reason; see `agent get services` (unstable)",
            self.degraded.clone(),
        );
        r.register(
            "conflicts",
            "Frontends that two Services want; see `agent get conflicts` (unstable)",
            self.conflicts.clone(),
        );
        r.register("fragments", "Service ports, both families (unstable)", self.fragments.clone());
        r.register(
            "source_started",
            "1 when complete lists have come in (unstable)",
            self.started.clone(),
        );
        r.register(
            "source_trouble_seconds",
            "How long the API server cannot be watched; 0 when it can (unstable)",
            self.trouble.clone(),
        );
    }

    pub(crate) fn queued(&self, families: &[Family]) {
        for it in families {
            self.last_queued.get_or_create(&family(*it)).set(now());
        }
    }

    /// Takes note of a sync; `done` are the families that succeeded.
    pub(crate) fn synced(
        &self,
        sync: &Synced<'_>,
        mode: Mode,
        families: &[Family],
        done: &[Family],
    ) {
        self.endpoint_changes.inc_by(sync.pending.slice_changes as u64);
        self.service_changes.inc_by(sync.pending.services.len() as u64);
        self.programmed(sync, done);
        let Some(outcome) = sync.outcome else {
            if sync.latency.is_some() {
                self.suppressed.inc();
            }
            return;
        };
        let took = sync.took.as_secs_f64();
        let is_first = matches!(outcome, Ok(report) if report.revision.0 == 1);
        let is_full = sync.node_changed || sync.cause == Cause::Audit || is_first;
        let kind = if is_full { &self.full } else { &self.partial };
        for it in families {
            self.sync.get_or_create(&family(*it)).observe(took);
            kind.get_or_create(&family(*it)).observe(took);
        }
        for it in done {
            self.last.get_or_create(&family(*it)).set(now());
        }
        self.commit.observe(took);
        match outcome {
            Ok(report) => {
                for (verb, count) in
                    [("add", report.ops.add), ("set", report.ops.set), ("del", report.ops.del)]
                {
                    self.ops.get_or_create(&[("op", verb.to_owned())]).inc_by(count as u64);
                }
                self.visited.inc_by(report.visited as u64);
                self.drift.inc_by(report.drift as u64);
                for it in families {
                    let count = *report.stale_flows.of(*it);
                    self.stale_flows.get_or_create(&family(*it)).inc_by(count as u64);
                    if let Some(took) = report.forgetting.of(*it) {
                        self.forgetting.get_or_create(&family(*it)).observe(took.as_secs_f64());
                    }
                    self.count_rules(*it, report.rules.of(*it));
                }
                if let Some(latency) = sync.latency {
                    self.latency.observe(latency.as_secs_f64());
                }
            }
            Err(error) => {
                if let SyncError::Commit { family: it, .. }
                | SyncError::Dump { family: it, .. }
                | SyncError::Plan { family: it, .. } = error
                {
                    self.failed(mode, *it, is_full);
                }
            }
        }
    }

    fn count_rules(&self, family: Family, rules: &BTreeMap<&'static str, RuleCount>) {
        for (table, count) in rules {
            let labels = [("table", (*table).to_owned()), ("ip_family", family.to_string())];
            self.rules.get_or_create(&labels).set(as_gauge(count.there));
            self.rules_written.get_or_create(&labels).set(as_gauge(count.written));
        }
    }

    fn failed(&self, mode: Mode, it: Family, is_full: bool) {
        let counter = match mode {
            Mode::Iptables | Mode::Ipvs => &self.iptables_failures,
            Mode::Nftables => &self.nftables_failures,
            Mode::Userspace => return,
        };
        counter.get_or_create(&family(it)).inc();
        if mode == Mode::Iptables && !is_full {
            self.partial_failures.get_or_create(&family(it)).inc();
        }
    }

    /// Takes note of how long changes of pods took to arrive in the kernel.
    fn programmed(&self, sync: &Synced<'_>, done: &[Family]) {
        let now = SystemTime::now();
        let counts = sync.pending.triggered.iter().filter(|it| it.at > self.born);
        for it in counts.filter(|it| done.contains(&it.family)) {
            let took = now.duration_since(it.at).unwrap_or_default();
            self.programming.get_or_create(&family(it.family)).observe(took.as_secs_f64());
        }
    }

    pub(crate) fn answered(&self, path: &str, status: u16) {
        let counter = if path == "healthz" { &self.healthz } else { &self.livez };
        counter.get_or_create(&[("code", status.to_string())]).inc();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prometheus_client::encoding::text::encode;

    use super::*;

    /// Names in a text that begin as our metrics do.
    fn names(text: &str) -> BTreeSet<&str> {
        let words = text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_');
        words.filter(|it| it.starts_with("kubeproxy_") || it.starts_with("proxier_")).collect()
    }

    /// What dashboards for kube-proxy may ask for. What it has besides these is in
    /// docs/replace-kube-proxy.md.
    const KEPT: [&str; 24] = [
        "conntrack_reconciler_deleted_entries_total",
        "conntrack_reconciler_sync_duration_seconds_bucket",
        "network_programming_duration_seconds_bucket",
        "proxy_healthz_total",
        "proxy_livez_total",
        "sync_full_proxy_rules_duration_seconds_bucket",
        "sync_partial_proxy_rules_duration_seconds_bucket",
        "sync_proxy_rules_duration_seconds_bucket",
        "sync_proxy_rules_duration_seconds_count",
        "sync_proxy_rules_duration_seconds_sum",
        "sync_proxy_rules_endpoint_changes_pending",
        "sync_proxy_rules_endpoint_changes_total",
        "sync_proxy_rules_iptables_last",
        "sync_proxy_rules_iptables_partial_restore_failures_total",
        "sync_proxy_rules_iptables_restore_failures_total",
        "sync_proxy_rules_iptables_total",
        "sync_proxy_rules_last_queued_timestamp_seconds",
        "sync_proxy_rules_last_timestamp_seconds",
        "sync_proxy_rules_nftables_cleanup_failures_total",
        "sync_proxy_rules_nftables_sync_failures_total",
        "sync_proxy_rules_no_local_endpoints_total",
        "sync_proxy_rules_service_changes_pending",
        "sync_proxy_rules_service_changes_total",
        "network_programming_duration_seconds_count",
    ];

    #[test]
    fn dashboard_and_alerts_use_only_what_is_exported() {
        let mut exported = BTreeSet::new();
        let metrics = Metrics::new(Mode::Iptables, &Family::ALL);
        metrics.count_rules(Family::V4, &BTreeMap::from([("nat", RuleCount::default())]));
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        for line in text.lines() {
            let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|it| it.split_once(' '))
            else {
                continue;
            };
            let suffixes: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_count", "_sum"],
                _ => &[""],
            };
            exported.extend(suffixes.iter().map(|suffix| format!("{name}{suffix}")));
        }
        for kept in KEPT {
            let kept = format!("kubeproxy_{kept}");
            assert!(exported.contains(&kept), "{kept} is not in {exported:#?}");
        }
        for file in ["dashboard.json", "alerts.yaml"] {
            let path = format!("{}/../../deploy/{file}", env!("CARGO_MANIFEST_DIR"));
            let text = std::fs::read_to_string(path).unwrap();
            let used = names(&text);
            assert!(used.len() > 4, "{used:?}");
            let unknown: Vec<_> = used.into_iter().filter(|it| !exported.contains(*it)).collect();
            assert!(unknown.is_empty(), "{file}: {unknown:?}");
        }
    }

    #[test]
    fn buckets_of_syncs_are_kube_proxys() {
        let metrics = Metrics::new(Mode::Nftables, &Family::ALL);
        metrics.sync.get_or_create(&family(Family::V4)).observe(0.003);
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        for (bucket, count) in [("0.001", 0), ("0.002", 0), ("0.004", 1), ("16.384", 1)] {
            let line = format!(
                "kubeproxy_sync_proxy_rules_duration_seconds_bucket{{le=\"{bucket}\",ip_family=\"IPv4\"}} {count}"
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        metrics.programming.get_or_create(&family(Family::V6)).observe(62.0);
        let mut text = String::new();
        encode(&mut text, &metrics.registry).unwrap();
        let buckets = text.lines().filter(|line| {
            line.contains("programming_duration_seconds_bucket") && line.contains("IPv6")
        });
        assert_eq!(buckets.count(), 2 + 59 + 12 + 7 + 1);
        for (bucket, count) in [("0.25", 0), ("59.0", 0), ("60.0", 0), ("65.0", 1), ("300.0", 1)] {
            let line = format!(
                "kubeproxy_network_programming_duration_seconds_bucket{{le=\"{bucket}\",ip_family=\"IPv6\"}} {count}"
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
}

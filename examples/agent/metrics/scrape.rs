//! Answering `/metrics`.

use std::time::Duration;

use prometheus_client::encoding::text::encode;
use proxier::{Family, health::NoLocalEndpoints, spi::ErrorKind};

use super::as_gauge;
use crate::shared::Shared;

/// What is counted when it is asked for: O(fragments).
struct Counted {
    no_local: Vec<(Family, NoLocalEndpoints)>,
    degraded: Vec<(&'static str, usize)>,
    conflicts: usize,
    fragments: usize,
    services_pending: usize,
    endpoints_pending: usize,
}

pub(super) const KINDS: [(ErrorKind, &str); 5] = [
    (ErrorKind::Conflict, "conflict"),
    (ErrorKind::Fatal, "fatal"),
    (ErrorKind::Permission, "permission"),
    (ErrorKind::Retry, "retry"),
    (ErrorKind::Unsupported, "unsupported"),
];

/// All metrics as text.
pub(crate) async fn scrape(shared: &Shared) -> Result<String, std::fmt::Error> {
    let families = shared.families.clone();
    let counted = shared.handle.inspect(move |store, proxier| {
        let no_local = families.into_iter().map(|family| {
            let mut count = NoLocalEndpoints::default();
            store.fragments().filter(|it| it.id.family == family).for_each(|it| count.count(it));
            (family, count)
        });
        let degraded = proxier.status().degraded;
        let of_kind = |kind: ErrorKind| degraded.iter().filter(|it| it.kind == kind).count();
        let pending = store.pending();
        Counted {
            no_local: no_local.collect(),
            degraded: KINDS.iter().map(|(kind, name)| (*name, of_kind(*kind))).collect(),
            conflicts: store.conflicts().count(),
            fragments: store.fragments().count(),
            services_pending: pending.services.len(),
            endpoints_pending: pending.endpoints.len(),
        }
    });
    let metrics = &shared.metrics;
    // While a sync takes long the numbers of before have to do.
    if let Ok(Ok(counted)) = tokio::time::timeout(Duration::from_secs(2), counted).await {
        for (it, count) in counted.no_local {
            let labels = |policy: &str| {
                [("traffic_policy", policy.to_owned()), ("ip_family", it.to_string())]
            };
            metrics.no_local.get_or_create(&labels("internal")).set(as_gauge(count.internal));
            metrics.no_local.get_or_create(&labels("external")).set(as_gauge(count.external));
        }
        for (reason, count) in counted.degraded {
            metrics.degraded.get_or_create(&[("reason", reason.to_owned())]).set(as_gauge(count));
        }
        metrics.conflicts.set(as_gauge(counted.conflicts));
        metrics.fragments.set(as_gauge(counted.fragments));
        metrics.services_pending.set(as_gauge(counted.services_pending));
        metrics.endpoints_pending.set(as_gauge(counted.endpoints_pending));
    }
    let source = shared.source.borrow().clone();
    metrics.started.set(i64::from(source.started));
    let trouble = source.trouble.map(|(_, since)| since.elapsed()).unwrap_or_default();
    metrics.trouble.set(trouble.as_secs_f64());
    let mut text = String::new();
    encode(&mut text, &metrics.registry)?;
    Ok(text)
}

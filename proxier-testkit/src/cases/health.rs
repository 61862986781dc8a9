//! Kinds `health`, `proxyhealth` and `metric`.

use std::time::{Duration, SystemTime};

use proxier_core::{
    Family,
    health::{Answer, NoLocalEndpoints, NodeState, ProxyHealth, ServiceHealth},
    name::ObjectName,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Case, CaseError, CaseFile, CaseWorld, Verdict, select::family, world::split};

/// Any time will do.
const EPOCH: Duration = Duration::from_secs(1_000_000_000);

pub(super) fn run_health(file: &CaseFile, case: &Case) -> Result<Verdict, CaseError> {
    let world = CaseWorld::of(file, case)?;
    let (store, _) = world.store().map_err(|error| case.wrong("world", error))?;
    let key: String = case.read("service")?;
    let (namespace, name) = split(&key);
    let name = ObjectName::new(namespace, name);
    let Some(health) = ServiceHealth::of(&store, &name, family(case)?) else {
        return Ok(Verdict::compare(case.get("expect"), &json!({"listen": null})));
    };
    let answer = health.answer(case.read_or("proxy_healthy", true)?);
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let actual = json!({
        "listen": health.port,
        "code": answer.status,
        "weight": weight(&answer),
        "local": body.get("localEndpoints"),
    });
    Ok(Verdict::compare(case.get("expect"), &actual))
}

/// What the header that load balancers read says.
fn weight(answer: &Answer) -> Option<u64> {
    let header = |name: &str| name.eq_ignore_ascii_case("X-Load-Balancing-Endpoint-Weight");
    let (_, value) = answer.headers.iter().find(|(name, _)| header(name))?;
    value.parse().ok()
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct NodeChange {
    exists: Option<bool>,
    deleting: Option<bool>,
    tainted: Option<bool>,
}

pub(super) fn run_proxyhealth(case: &Case) -> Result<Verdict, CaseError> {
    let timeout: f64 = case.read("timeout")?;
    let steps: Vec<Vec<Value>> = case.read("steps")?;
    let mut health = ProxyHealth::new(Duration::from_secs_f64(timeout));
    let mut node = NodeState { exists: true, ..NodeState::default() };
    health.observe(node);
    let mut now = SystemTime::UNIX_EPOCH + EPOCH;
    for (number, step) in steps.iter().enumerate() {
        let part = format!("steps[{number}]");
        let wrong = |error: serde_json::Error| case.wrong(&part, error);
        let (verb, arguments) =
            step.split_first().ok_or_else(|| case.wrong(&part, "it is empty"))?;
        let first = arguments.first().unwrap_or(&Value::Null);
        match verb.as_str().unwrap_or_default() {
            "updated" => health.updated(Family::deserialize(first).map_err(wrong)?, now),
            "queued" => health.queued(Family::deserialize(first).map_err(wrong)?, now),
            "wait" => now += Duration::from_secs_f64(f64::deserialize(first).map_err(wrong)?),
            "node" => {
                let change = NodeChange::deserialize(first).map_err(wrong)?;
                node.exists = change.exists.unwrap_or(node.exists);
                node.deleting = change.deleting.unwrap_or(node.deleting);
                node.tainted = change.tainted.unwrap_or(node.tainted);
                health.observe(node);
            }
            "get" => {
                let answer = match first.as_str() {
                    Some("/healthz") => health.healthz(now),
                    Some("/livez") => health.livez(now),
                    _ => return Err(case.wrong(&part, "/healthz or /livez is expected")),
                };
                if arguments.get(1) != Some(&json!(answer.status)) {
                    let expected = Value::Array(step.clone());
                    return Ok(Verdict::failed(
                        expected,
                        format!("{} {}", answer.status, answer.body),
                    ));
                }
            }
            other => return Err(case.wrong(&part, format!("unknown verb {other:?}"))),
        }
    }
    Ok(Verdict::PASSED)
}

pub(super) fn run_metric(file: &CaseFile, case: &Case) -> Result<Verdict, CaseError> {
    let world = CaseWorld::of(file, case)?;
    let (store, _) = world.store().map_err(|error| case.wrong("world", error))?;
    let family = family(case)?;
    let mut count = NoLocalEndpoints::default();
    for fragment in store.fragments().filter(|fragment| fragment.id.family == family) {
        count.count(fragment);
    }
    let actual = json!({"internal": count.internal, "external": count.external});
    Ok(Verdict::compare(case.get("expect"), &actual))
}

//! Kind `runner`: when syncs start.

use std::time::Duration;

use proxier_core::pace::{Pacer, Pause};
use serde_json::json;

use super::{Case, CaseError, Verdict};

pub(super) fn run_runner(case: &Case) -> Result<Verdict, CaseError> {
    let ms = |part: &str, default: u64| -> Result<Duration, CaseError> {
        case.read_or(part, default).map(Duration::from_millis)
    };
    let (min, retry, max) = (ms("min", 0)?, ms("retry", 0)?, ms("max", 0)?);
    let (cost, until) = (ms("cost", 0)?, ms("until", 0)?);
    let fail: Vec<bool> = case.read_or("fail", Vec::new())?;
    let mut requests: Vec<u64> = case.read_or("run_at", Vec::new())?;
    requests.sort_unstable();
    let mut requests = requests.into_iter().map(Duration::from_millis).peekable();
    let mut pacer = Pacer::new(Pause::Fixed(min), retry, max, Duration::ZERO);
    let mut now = Duration::ZERO;
    let mut starts = Vec::new();
    loop {
        let due = pacer.due().max(now);
        if let Some(request) = requests.next_if(|request| *request <= due) {
            now = now.max(request);
            pacer.request();
            continue;
        }
        if due > until {
            break;
        }
        pacer.begin();
        starts.push(u64::try_from(due.as_millis()).unwrap_or(u64::MAX));
        now = due + cost;
        let failed = fail.get(starts.len() - 1).copied().unwrap_or(false);
        while requests.next_if(|request| *request <= now).is_some() {
            pacer.request();
        }
        pacer.end(now, cost, !failed);
    }
    Ok(Verdict::compare(case.get("expect"), &json!({"starts": starts})))
}

//! Running one case.

use proxier_core::Mode;

use super::{
    Case, CaseError, CaseFile, RealKernel, Report, Subject, Verdict,
    change::run_change,
    conntrack::run_conntrack,
    flow::run_flow,
    health::{run_health, run_metric, run_proxyhealth},
    select::{run_merge, run_model, run_nodeaddr, run_select},
    subject::{run_name, run_objects},
    timing::run_runner,
};

/// What decides about packets.
#[derive(Debug)]
#[non_exhaustive]
pub enum Kernel<'a> {
    /// The packet view of a backend's fake kernel.
    Fake,
    /// The packet model.
    Model,
    /// A real kernel.
    Real(&'a mut RealKernel),
}

/// Runs a case in each of the modes, or once if it does not depend on the mode.
///
/// `subjects` are the backends of this build. Real kernels of several modes are one call each.
pub fn run<'c>(
    file: &CaseFile,
    case: &'c Case,
    modes: &[Mode],
    subjects: &[&dyn Subject],
    kernel: &mut Kernel<'_>,
) -> Vec<Report<'c>> {
    let reported = |verdict: Result<Verdict, CaseError>| {
        verdict.unwrap_or_else(|error| Verdict::failed("a case of the schema", error))
    };
    if let Some(verdict) = independent(file, case, subjects) {
        return vec![Report::new(case, None, reported(verdict))];
    }
    let in_mode = |mode: &Mode| {
        let subject = subjects.iter().find(|it| it.mode() == *mode).copied();
        let verdict = match case.kind.as_str() {
            "objects" => run_objects(file, case, *mode, subject),
            _ => run_flow(file, case, *mode, subject, kernel),
        };
        Report::new(case, Some(*mode), reported(verdict))
    };
    modes.iter().map(in_mode).collect()
}

/// Runs a case that does not depend on the mode; `None` for one that does.
fn independent(
    file: &CaseFile,
    case: &Case,
    subjects: &[&dyn Subject],
) -> Option<Result<Verdict, CaseError>> {
    Some(match case.kind.as_str() {
        "affinity" | "flow" | "objects" => return None,
        "change" => run_change(case),
        "conntrack" => run_conntrack(file, case),
        "health" => run_health(file, case),
        "ipvs" => Ok(ipvs(case, subjects)),
        "merge" => run_merge(file, case),
        "metric" => run_metric(file, case),
        "model" => run_model(case),
        "name" => run_name(case, subjects),
        "nodeaddr" => run_nodeaddr(file, case),
        "proxyhealth" => run_proxyhealth(case),
        "runner" => run_runner(case),
        "select" => run_select(case),
        "sync" => Ok(Verdict::not_applicable("stated in prose, nothing to compute")),
        "userspace" => Ok(only_in(Mode::Userspace, case, subjects)),
        other => Err(case.wrong("kind", format!("unknown kind {other:?}"))),
    })
}

/// The verdict about a case that lists kube-proxy's virtual servers and ipsets: ours are led to by
/// marks, and stand behind nf_tables sets (the deviation `ipvs-verdicts`). Its flows are compared.
fn ipvs(case: &Case, subjects: &[&dyn Subject]) -> Verdict {
    let verdict = only_in(Mode::Ipvs, case, subjects);
    if matches!(verdict, Verdict::Failed { .. }) {
        return Verdict::not_applicable("lists kube-proxy's own IPVS objects");
    }
    verdict
}

/// The verdict about a case that is about one mode, and that no runner computes.
fn only_in(mode: Mode, case: &Case, subjects: &[&dyn Subject]) -> Verdict {
    if subjects.iter().all(|subject| subject.mode() != mode) {
        return Verdict::not_applicable(format!("{mode} is not part of this build"));
    }
    if case.get("expect").is_string() {
        return Verdict::not_applicable("stated in prose, nothing to compute");
    }
    Verdict::failed(case.get("expect"), "no runner for this kind")
}

//! Verbs that look, and the one that cleans up.

use std::process::ExitCode;

use proxier::{Mode, model::NodeEnv, modes};

use crate::{
    Outcome,
    args::{Output, What},
    auto, cluster,
    config::Resolved,
    in_full, leftovers, print, show, source,
};

async fn mode_to_show(settings: &Resolved) -> Mode {
    match settings.mode {
        Some(mode) => mode,
        None => auto::choose(settings).await.unwrap_or(Mode::Nftables),
    }
}

async fn env(settings: &Resolved, mode: Mode) -> NodeEnv {
    let mut env = settings.env(mode);
    env.interface_addresses = source::interface_addresses().await;
    env
}

/// What would be programmed on a node that has nothing.
pub(crate) async fn plan(settings: &Resolved, output: Output) -> Outcome<ExitCode> {
    let mode = mode_to_show(settings).await;
    let store = source::once(settings, env(settings, mode).await).await?;
    let proxier = proxier::open(mode, &settings.context(mode)).await?;
    let plan = proxier.plan(&store.reset());
    print(&match output {
        Output::Text | Output::Wide => {
            let count = plan.count();
            format!(
                "{plan}{} objects for {} Service ports in {mode} mode\n",
                count.total(),
                plan.visited
            )
        }
        Output::Json | Output::Yaml => show::structured(&plan, output)?,
        Output::Name => plan.ops.iter().fold(String::new(), |text, op| text + &op.object + "\n"),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What differs between the kernel and what is wanted.
pub(crate) async fn diff(settings: &Resolved, output: Output) -> Outcome<ExitCode> {
    let mode = mode_to_show(settings).await;
    let store = source::once(settings, env(settings, mode).await).await?;
    let mut proxier = proxier::open(mode, &settings.context(mode)).await?;
    let plan = proxier.compare(&store.reset()).await?;
    print(&match output {
        Output::Text | Output::Wide if plan.ops.is_empty() => {
            format!("the kernel holds what is wanted, in {mode} mode\n")
        }
        Output::Text | Output::Wide => {
            format!("{plan}{} objects differ, in {mode} mode\n", plan.count().total())
        }
        Output::Json | Output::Yaml => show::structured(&plan, output)?,
        Output::Name => plan.ops.iter().fold(String::new(), |text, op| text + &op.object + "\n"),
    })?;
    Ok(if plan.ops.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Lists things.
pub(crate) async fn get(
    settings: &Resolved,
    what: What,
    namespace: Option<&str>,
    output: Output,
) -> Outcome<ExitCode> {
    let mode = settings.mode.unwrap_or(Mode::Nftables);
    let store = source::once(settings, env(settings, mode).await).await?;
    print(&show::list(&store, what, namespace, output)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Says why a packet goes where it goes.
pub(crate) async fn explain(
    settings: &Resolved,
    question: &show::Question,
    output: Output,
) -> Outcome<ExitCode> {
    let mode = mode_to_show(settings).await;
    let store = source::once(settings, env(settings, mode).await).await?;
    let packet = question.packet(&store)?;
    let explanation =
        proxier::explain::explain(&store, &proxier::sim::Traits::of(mode), &packet, None);
    print(&match output {
        Output::Text | Output::Wide | Output::Name => explanation.to_string(),
        Output::Json | Output::Yaml => show::structured(&explanation, output)?,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Removes what these modes have programmed; without any, what all modes and kube-proxy have.
pub(crate) async fn cleanup(settings: &Resolved, which: &[Mode]) -> Outcome<ExitCode> {
    let mut failed = if which.is_empty() {
        leftovers::remove(settings, modes()).await
    } else {
        leftovers::remove(settings, which.iter().copied()).await
    };
    if which.is_empty()
        && let Err(error) = leftovers::remove_kube_proxys_tables(settings).await
    {
        failed.push(in_full(&*error));
    }
    if !failed.is_empty() {
        return Err(failed.join("\n").into());
    }
    tracing::info!("nothing is left");
    Ok(ExitCode::SUCCESS)
}

/// What this node and cluster lack.
pub(crate) async fn doctor(settings: &Resolved) -> Outcome<ExitCode> {
    let mut report = Report::default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.fine("agent", concat!("proxier ", env!("CARGO_PKG_VERSION")));
    report.fine("kernel", kernel.trim());
    privileges(&mut report);
    let found = auto::survey(settings).await;
    for (mode, suited) in &found {
        let reasons = suited.reasons.join("; ");
        if suited.available {
            let text = if reasons.is_empty() {
                "works here".to_owned()
            } else {
                format!("works here; {reasons}")
            };
            report.fine(mode.name(), &text);
        } else {
            report.note(mode.name(), &format!("cannot work here: {reasons}"));
        }
    }
    match found.iter().find(|(_, suited)| suited.available) {
        Some((mode, _)) => report.fine("auto", &format!("would choose {mode}")),
        None => report.wrong(
            "auto",
            "no mode can work here: run as root, or with CAP_NET_ADMIN, on a kernel with nf_tables",
        ),
    }
    foreign(settings, &mut report).await;
    if settings.is_cluster() {
        let mode = settings.mode.unwrap_or(Mode::Nftables);
        cluster::diagnose(settings, env(settings, mode).await, &mut report).await;
    } else {
        let paths = &settings.loaded.ours.manifests;
        match proxier::Manifests::open(paths).and_then(|mut it| it.read()) {
            Ok(snapshot) => report.fine("manifests", &format!("{} Services", snapshot.services())),
            Err(error) => report.wrong("manifests", &in_full(&error)),
        }
    }
    print(&report.text)?;
    Ok(if report.wrong { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn privileges(report: &mut Report) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits =
        effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or_default();
    // KERNEL: CAP_NET_ADMIN is bit 12 (include/uapi/linux/capability.h).
    if bits & (1 << 12) == 0 {
        report.wrong("privileges", "CAP_NET_ADMIN is missing: run as root, or grant it (securityContext.capabilities.add: [NET_ADMIN])");
    } else {
        report.fine("privileges", "CAP_NET_ADMIN");
    }
}

/// Rules of a kube-proxy, or of another mode.
async fn foreign(settings: &Resolved, report: &mut Report) {
    for mode in modes() {
        let context = settings.context(mode);
        if let Err(error) = proxier::open(mode, &context).await {
            report.note("foreign rules", &format!("{mode} mode: {}", in_full(&error)));
        }
    }
}

/// Lines for people, and whether something is wrong.
#[derive(Debug, Default)]
pub(crate) struct Report {
    text: String,
    wrong: bool,
}

impl Report {
    pub(crate) fn fine(&mut self, what: &str, text: &str) {
        self.line("ok", what, text);
    }

    pub(crate) fn note(&mut self, what: &str, text: &str) {
        self.line("note", what, text);
    }

    pub(crate) fn wrong(&mut self, what: &str, text: &str) {
        self.wrong = true;
        self.line("WRONG", what, text);
    }

    fn line(&mut self, verdict: &str, what: &str, text: &str) {
        self.text.push_str(&format!("{verdict:5}  {what:13}  {text}\n"));
    }
}

//! Choosing the mode.

use proxier::{Mode, Suitability, modes, probe};

use crate::{Outcome, config::Resolved};

/// Modes from best to worst: what a change costs, then what a packet costs.
const PREFERENCE: [Mode; 4] = [Mode::Nftables, Mode::Iptables, Mode::Ipvs, Mode::Userspace];

/// What every mode of this build needs here, from best to worst.
pub(crate) async fn survey(settings: &Resolved) -> Vec<(Mode, Suitability)> {
    let built: Vec<_> = modes().collect();
    let mut found = Vec::new();
    for mode in PREFERENCE.into_iter().filter(|mode| built.contains(mode)) {
        found.push((mode, probe(mode, &settings.context(mode)).await));
    }
    found
}

/// The mode that is asked for; or, for `auto`, the best one that works here.
pub(crate) async fn choose(settings: &Resolved) -> Outcome<Mode> {
    if let Some(mode) = settings.mode {
        let Suitability { available, reasons } = probe(mode, &settings.context(mode)).await;
        if !available {
            return Err(format!(
                "--proxy-mode {mode} cannot work here: {}; `agent doctor` says which mode can",
                reasons.join("; ")
            )
            .into());
        }
        return Ok(mode);
    }
    let found = survey(settings).await;
    let passed_over = |found: &[(Mode, Suitability)]| {
        let failed = found.iter().filter(|(_, it)| !it.available);
        let lines = failed.map(|(mode, it)| format!("{mode}: {}", it.reasons.join("; ")));
        lines.collect::<Vec<_>>()
    };
    let Some((mode, _)) = found.iter().find(|(_, it)| it.available) else {
        return Err(format!("no mode can work here: {}", passed_over(&found).join(" | ")).into());
    };
    let better = passed_over(&found);
    let why = if better.is_empty() { "the fastest of all".to_owned() } else { better.join(" | ") };
    tracing::info!(%mode, %why, "chose the mode");
    Ok(*mode)
}

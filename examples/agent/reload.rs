//! Applying a changed configuration file while the agent runs.

use std::{path::PathBuf, sync::Arc, time::Duration};

use proxier::{Manifests, Mode, Swap, model::NodeEnv};
use tokio::sync::watch;

use crate::{
    Outcome,
    args::Flags,
    auto,
    config::{Resolved, load},
    in_full,
    shared::Shared,
    sysctl,
};

/// How long connections that a mode carries itself may go on after another mode took over.
const LINGER: Duration = Duration::from_secs(60);

/// Settings that apply without a restart, here and in the sections of the modes.
const LIVE: [&str; 6] =
    ["clusterCIDR", "detectLocal", "detectLocalMode", "logging", "mode", "nodePortAddresses"];
const LIVE_PARTS: [&str; 2] = ["localhostNodePorts", "masqueradeAll"];

/// What a changed configuration acts on.
pub(crate) struct Reload {
    pub(crate) flags: Flags,
    pub(crate) settings: Resolved,
    pub(crate) env: watch::Sender<NodeEnv>,
    pub(crate) configz: watch::Sender<serde_json::Value>,
    pub(crate) shared: Arc<Shared>,
}

impl Reload {
    /// Applies what can be applied whenever the file changes, and says what cannot.
    pub(crate) async fn follow(mut self, path: PathBuf) {
        let mut file = match Manifests::open(std::slice::from_ref(&path)) {
            Ok(file) => file,
            Err(error) => return tracing::warn!("cannot follow --config: {}", in_full(&error)),
        };
        while file.changed().await.is_ok() {
            let read = load(&self.flags).map_err(|error| in_full(&*error)).and_then(Resolved::new);
            match read {
                Ok(new) if new.loaded == self.settings.loaded => {}
                Ok(new) => self.apply(new).await,
                Err(error) => tracing::error!(
                    "the changed configuration cannot be used, the one of before stays: {error}"
                ),
            }
        }
    }

    async fn apply(&mut self, new: Resolved) {
        let restart = needs_restart(&self.settings, &new);
        if !restart.is_empty() {
            let fields = restart.join(", ");
            tracing::warn!(fields, "restart the agent for these to take effect");
        }
        let asks_for_another = match new.mode {
            Some(mode) => mode != self.shared.mode(),
            None => self.settings.mode.is_some(),
        };
        if asks_for_another && let Err(error) = self.change_mode(&new).await {
            tracing::error!("the mode stays {}: {}", self.shared.mode(), in_full(&*error));
        }
        let wanted = new.env(self.shared.mode());
        self.env.send_if_modified(|env| {
            let mut next = env.clone();
            next.detect_local = wanted.detect_local;
            next.masquerade_all = wanted.masquerade_all;
            next.node_port_addresses = wanted.node_port_addresses;
            next.localhost_node_ports = wanted.localhost_node_ports;
            let changed = next != *env;
            *env = next;
            changed
        });
        self.configz.send_replace(new.configz());
        tracing::info!("applied the changed configuration");
        self.settings = new;
    }

    async fn change_mode(&self, new: &Resolved) -> Outcome {
        let before = self.shared.mode();
        let mode = auto::choose(new).await?;
        if mode == before {
            return Ok(());
        }
        sysctl::apply(new, mode)?;
        let proxier = proxier::open(mode, &new.context(mode)).await?;
        let linger = match before {
            Mode::Ipvs | Mode::Userspace => LINGER,
            Mode::Iptables | Mode::Nftables => Duration::ZERO,
        };
        self.shared.handle.swap(proxier, Swap::default().linger(linger)).await?;
        self.shared.set_mode(mode);
        Ok(())
    }
}

/// Changed fields that are read at the start only.
fn needs_restart(before: &Resolved, after: &Resolved) -> Vec<String> {
    let (before, after) = (before.configz(), after.configz());
    let mut changed = Vec::new();
    for (document, fields) in after.as_object().into_iter().flatten() {
        for (field, value) in fields.as_object().into_iter().flatten() {
            let known = before.get(document).and_then(|it| it.get(field));
            if known == Some(value) || LIVE.contains(&&**field) {
                continue;
            }
            let Some(parts) = value.as_object() else {
                changed.push(field.clone());
                continue;
            };
            let parts = parts.iter().filter(|(key, it)| {
                known.and_then(|known| known.get(key)) != Some(it) && !LIVE_PARTS.contains(&&***key)
            });
            changed.extend(parts.map(|(key, _)| format!("{field}.{key}")));
        }
    }
    changed
}

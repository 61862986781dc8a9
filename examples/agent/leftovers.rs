//! What other modes, earlier runs and kube-proxy left in the kernel.

use proxier::{Mode, factory, modes};
use proxier_netlink::{
    nft::{Family, NftSocket, Transaction},
    spi::netns,
};

use crate::{Outcome, config::Resolved, in_full};

/// The table that kube-proxy keeps in nftables mode, one of each family.
// K8S: pkg/proxy/nftables/proxier.go kubeProxyTable, v1.36. Other modes' names are our own.
const KUBE_PROXYS_TABLE: &str = "kube-proxy";

/// The modes whose leftovers a mode removes when it starts.
// K8S: cleanupAndExit and platformCleanup in cmd/kube-proxy/app/server_linux.go, v1.36: iptables and
// ipvs mode share chains.
pub(crate) fn others(mode: Mode) -> impl Iterator<Item = Mode> {
    let shares = move |other: Mode| {
        let chains = [Mode::Iptables, Mode::Ipvs];
        other == mode || (chains.contains(&other) && chains.contains(&mode))
    };
    modes().filter(move |other| !shares(*other))
}

/// Removes what these modes have programmed. Says what could not be removed, a line each.
pub(crate) async fn remove(
    settings: &Resolved,
    which: impl IntoIterator<Item = Mode>,
) -> Vec<String> {
    let mut failed = Vec::new();
    for mode in which {
        let mut context = settings.context(mode);
        context.takeover = true;
        let Some(factory) = factory(mode) else {
            failed.push(format!("{mode}: this build does not have the mode"));
            continue;
        };
        let suited = factory.probe(&context).await;
        let outcome = match factory.open(&context).await {
            Ok(mut proxier) => proxier.cleanup().await.map_err(|error| in_full(&error)),
            Err(error) => Err(in_full(&error)),
        };
        match outcome {
            Ok(()) => tracing::debug!(%mode, "nothing of this mode is left"),
            // What cannot work here has not left anything either; a missing privilege is different.
            Err(error) if !suited.available && rustix::process::geteuid().is_root() => {
                tracing::info!(%mode, %error, "nothing to clean up: this mode cannot work here");
            }
            Err(error) => failed.push(format!("{mode}: {error}")),
        }
    }
    failed
}

/// Removes the tables of a kube-proxy in nftables mode.
pub(crate) async fn remove_kube_proxys_tables(settings: &Resolved) -> Outcome {
    let Ok(mut socket) = NftSocket::open(&netns(&settings.context(Mode::Nftables))) else {
        // Without nf_tables there are no tables.
        return Ok(());
    };
    for family in [Family::Ipv4, Family::Ipv6] {
        let tables = socket.tables(family).await?;
        if tables.iter().any(|it| it.name == KUBE_PROXYS_TABLE) {
            let mut tx = Transaction::new();
            tx.del_table(family, KUBE_PROXYS_TABLE);
            socket.commit(&tx).await?;
            tracing::info!(?family, "removed kube-proxy's nftables rules");
        }
    }
    Ok(())
}

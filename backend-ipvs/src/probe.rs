//! Finds out whether the mode works here, and says why not. Changes nothing.

use proxier_core::{Family, Suitability, ir::FamilyView};
use proxier_netlink::{NetNs, gate, ipvs::Ipvs as IpvsSocket};

use crate::{config::Config, object::part, prepare::tracks, skeleton::skeleton};

/// Finds out whether the mode works in a network namespace, in these families.
///
/// Rules are tried in a transaction that is then given up, and schedulers with requests that are
/// refused in any case, so nothing is left behind. It may load kernel modules, as the first sync
/// would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe(netns: &NetNs, families: &[Family]) -> Suitability {
    let mut found = Suitability { available: !families.is_empty(), reasons: Vec::new() };
    match schedulers(netns).await {
        Ok(list) if list.is_empty() => {
            found.available = false;
            found.reasons.push("the kernel's IPVS has no schedulers".to_owned());
        }
        Ok(list) => found.reasons.push(format!("schedulers: {}", list.join(", "))),
        Err(reason) => {
            found.available = false;
            found.reasons.push(reason);
        }
    }
    for family in families {
        if let Err(reason) = try_rules(netns, *family).await {
            found.available = false;
            found.reasons.insert(0, format!("{family}: {reason}"));
        }
    }
    if found.available && tracks(netns) == Some(false) {
        let advice = "net.ipv4.vs.conntrack is 0, so that nothing is masqueraded: set it to 1, or \
                      call `prepare`";
        found.reasons.push(advice.to_owned());
    }
    found
}

async fn schedulers(netns: &NetNs) -> Result<Vec<&'static str>, String> {
    let mut ipvs = IpvsSocket::open(netns).await.map_err(|error| error.to_string())?;
    ipvs.schedulers().await.map_err(|error| error.to_string())
}

async fn try_rules(netns: &NetNs, family: Family) -> Result<(), String> {
    let objects = skeleton(&Config::default(), family, &FamilyView::default());
    gate::try_out(netns, family, objects, part).await
}

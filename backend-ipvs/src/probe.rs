//! Finds out whether the mode works here, and says why not. Changes nothing.

use proxier_core::{Family, Suitability, ir::FamilyView};
use proxier_netlink::{
    NetNs,
    ipvs::Ipvs as IpvsSocket,
    nft::{NftError, NftSocket, Transaction},
};

use crate::{
    backend::Op,
    config::Config,
    dataplane::{Batch, nft_family},
    object::Key,
    prepare::tracks,
    skeleton::skeleton,
};

/// A name that is nobody's.
const PROBE: &str = "proxier-probe";

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
    let mut socket = NftSocket::open(netns).map_err(|error| error.to_string())?;
    let objects = skeleton(&Config::default(), family, &FamilyView::default());
    let ours = objects.into_iter().filter(|(key, _)| !matches!(key, Key::Link(_)));
    let ops: Vec<_> = ours.map(|(key, value)| Op::Add(key, value)).collect();
    let mut tx = match Batch::encode(family, PROBE, &ops) {
        Ok(tx) => tx,
        Err(_) => Transaction::new(),
    };
    let end = u32::try_from(ops.len()).unwrap_or(u32::MAX);
    tx.op(end);
    tx.del_chain(nft_family(family), PROBE, PROBE);
    match socket.commit(&tx).await {
        // Everything but the deletion of what does not exist was taken.
        Err(NftError::Refused(refusal)) if refusal.tag == Some(end) => Ok(()),
        Err(NftError::Refused(refusal)) => {
            let object = refusal.tag.and_then(|tag| ops.get(usize::try_from(tag).ok()?));
            let object = object.map(|op| op.key().to_string()).unwrap_or_default();
            Err(match &refusal.unsupported {
                Some(missing) => format!("the kernel has no {missing} ({object})"),
                None => format!("{object}: {}", refusal.ack),
            })
        }
        Err(error) => Err(error.to_string()),
        Ok(_) => Err("the kernel took what cannot be".to_owned()),
    }
}

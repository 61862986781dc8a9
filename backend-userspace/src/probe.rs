//! Finds out whether the mode works here, and says why not. Changes nothing.

use proxier_core::{Family, Suitability, ir::FamilyView};
use proxier_netlink::{
    NetNs,
    nft::{NftError, NftSocket, Transaction},
};

use crate::{
    backend::{Op, Ports},
    config::Capture,
    dataplane::{Batch, RouteSocket, nft_family},
    skeleton::skeleton,
};

/// A name that is nobody's.
const PROBE: &str = "proxier-probe";

/// What to do where capturing does not work.
const INSTEAD: &str = "without kernel rules, at addresses you name (`Listen::Addresses`), the mode \
                       works anywhere";

/// Finds out whether capturing works in a network namespace, in these families.
///
/// Every rule is tried in a transaction that is then given up, so nothing is left behind, and what
/// the kernel lacks is named. It may load kernel modules, as the first sync would.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn probe(netns: &NetNs, families: &[Family]) -> Suitability {
    let mut found = Suitability::default();
    let mut works = 0;
    for family in families {
        match try_family(netns, *family).await {
            Ok(()) => works += 1,
            Err(reason) => found.reasons.push(format!("{family}: {reason}")),
        }
    }
    found.available = works > 0 && works == families.len();
    if !found.available {
        found.reasons.push(INSTEAD.to_owned());
    }
    found
}

async fn try_family(netns: &NetNs, family: Family) -> Result<(), String> {
    let mut socket = NftSocket::open(netns).map_err(|error| error.to_string())?;
    let node = FamilyView::default();
    let objects = skeleton(&Capture::default(), &Ports::default(), family, &node);
    let ops: Vec<_> = objects.into_iter().map(|(key, value)| Op::Add(key, value)).collect();
    let mut tx = match Batch::encode(family, PROBE, &ops) {
        Ok(tx) => tx,
        Err(_) => Transaction::new(),
    };
    let end = u32::try_from(ops.len()).unwrap_or(u32::MAX);
    tx.op(end);
    tx.del_chain(nft_family(family), PROBE, PROBE);
    match socket.commit(&tx).await {
        // Everything but the deletion of what does not exist was taken.
        Err(NftError::Refused(refusal)) if refusal.tag == Some(end) => {}
        Err(NftError::Refused(refusal)) => {
            let object = refusal.tag.and_then(|tag| ops.get(usize::try_from(tag).ok()?));
            let object = object.map(|op| op.key().to_string()).unwrap_or_default();
            return Err(match &refusal.unsupported {
                Some(missing) => format!("the kernel has no {missing} ({object})"),
                None => format!("{object}: {}", refusal.ack),
            });
        }
        Err(error) => return Err(error.to_string()),
        Ok(_) => return Err("the kernel took what cannot be".to_owned()),
    }
    let routes = RouteSocket::open(netns).map_err(|error| error.to_string())?;
    let table = Capture::default().routing_table;
    let read = routes.read(family, table).await;
    read.map(drop).map_err(|error| format!("no policy routing: {error}"))
}

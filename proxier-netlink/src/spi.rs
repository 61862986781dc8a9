//! What backends that speak netlink share towards the engine: errors in its terms, namespaces, and
//! the removal of stale flows.

use std::{collections::HashMap, io, net::SocketAddr, time::Instant};

use proxier_core::{
    Family, OpenContext, Protocol,
    conntrack::{Flow, FlowFilter, Forgotten},
    in_full,
    spi::{CommitError, ErrorKind, Op},
};

use crate::{
    NetNs,
    ct::{self, Conntrack, CtError, CtFamily},
    nft::{self, CtStatus, NftError, Refusal},
};

/// The family as nf_tables has it.
#[must_use]
pub const fn nft_family(family: Family) -> nft::Family {
    match family {
        Family::V4 => nft::Family::Ipv4,
        Family::V6 => nft::Family::Ipv6,
    }
}

/// The family as nft writes it.
#[must_use]
pub const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The namespace that a context names.
#[must_use]
pub fn netns(context: &OpenContext) -> NetNs {
    context.netns.clone().map_or(NetNs::Current, NetNs::Path)
}

/// What to do about an error, in the engine's words.
#[must_use]
pub const fn kind(kind: crate::ErrorKind) -> ErrorKind {
    use crate::ErrorKind as Ours;
    match kind {
        Ours::Conflict => ErrorKind::Conflict,
        Ours::Fatal => ErrorKind::Fatal,
        Ours::Permission => ErrorKind::Permission,
        Ours::Retry => ErrorKind::Retry,
        Ours::Unsupported => ErrorKind::Unsupported,
    }
}

/// The error of sockets that could not be opened.
#[must_use]
pub fn open_error(error: crate::OpenError) -> CommitError {
    let kind = kind(error.kind());
    let doing = "opening netlink sockets".to_owned();
    CommitError::Transport { doing, source: io::Error::other(error), kind }
}

/// The error of a refused message, by the operation whose index is the message's tag.
#[must_use]
pub fn refused<K: std::fmt::Display, V>(refusal: &Refusal, ops: &[Op<K, V>]) -> CommitError {
    let (op, object) = locate(ops, refusal.tag);
    CommitError::Refused {
        op,
        object: object.unwrap_or_else(|| refusal.object.clone()),
        extack: hint(refusal),
        errno: io::Error::from_raw_os_error(refusal.errno()),
        kind: kind(refusal.kind()),
    }
}

/// The operation that a tag is the index of, and its object.
#[must_use]
pub fn locate<K: std::fmt::Display, V>(
    ops: &[Op<K, V>],
    tag: Option<u32>,
) -> (Option<usize>, Option<String>) {
    let index = tag.and_then(|tag| usize::try_from(tag).ok());
    let op = index.and_then(|index| ops.get(index));
    (op.and(index), op.map(|op| op.key().to_string()))
}

/// What the kernel said beyond the errno.
fn hint(refusal: &Refusal) -> String {
    if let Some(missing) = &refusal.unsupported {
        return format!("the kernel has no {missing}");
    }
    let text = refusal.ack.text().unwrap_or_default();
    match &refusal.attribute {
        Some(attribute) if text.is_empty() => format!("at {attribute}"),
        Some(attribute) => format!("{text}, at {attribute}"),
        None => text.to_owned(),
    }
}

/// The error of something that changes nothing.
#[must_use]
pub fn read_error(error: NftError) -> CommitError {
    let kind = kind(error.kind());
    CommitError::Transport { doing: error.to_string(), source: error.into_io_error(), kind }
}

/// One error for those of several families.
///
/// # Errors
/// There are any.
pub fn combine(mut errors: Vec<(Family, CommitError)>) -> Result<(), CommitError> {
    match errors.pop() {
        None => Ok(()),
        Some((_, only)) if errors.is_empty() => Err(only),
        Some(last) => {
            errors.push(last);
            let describe =
                |(family, error): &(Family, CommitError)| format!("{family}: {}", in_full(error));
            let doing = errors.iter().map(describe).collect::<Vec<_>>().join("; ");
            let kind = errors.first().map_or(ErrorKind::Fatal, |(_, error)| error.kind());
            Err(CommitError::Transport { doing, source: io::ErrorKind::Other.into(), kind })
        }
    }
}

/// Removes the flows that any of the filters calls stale.
///
/// `answered_by` says who answers a flow as the mode sees it, such as [`answered_by`] or
/// [`translated_to`]. A flow it has nothing to say about stays.
///
/// # Errors
/// The flows could not be listed or removed.
///
/// # Cancel safety
/// Safe to drop and to call again.
pub async fn forget_flows(
    conntrack: &mut Conntrack,
    family: Family,
    filters: &[FlowFilter],
    answered_by: impl Fn(&ct::Flow) -> Option<SocketAddr>,
) -> Result<Forgotten, CommitError> {
    let began = Instant::now();
    let mut by_port: HashMap<u16, Vec<&FlowFilter>> = HashMap::new();
    for filter in filters {
        by_port.entry(filter.port.get()).or_default().push(filter);
    }
    let seen = |flow: &ct::Flow| {
        let protocol = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|protocol| protocol.number() == flow.orig.protocol)?;
        let (destination, answered_by) = (sent_to(flow)?, answered_by(flow)?);
        Some(Flow { protocol, destination, answered_by })
    };
    let is_stale = |flow: &ct::Flow| {
        let Some(seen) = seen(flow) else { return false };
        let filters = by_port.get(&seen.destination.port());
        filters.is_some_and(|filters| filters.iter().any(|filter| filter.is_stale(&seen)))
    };
    let kernel = match family {
        Family::V4 => CtFamily::Ipv4,
        Family::V6 => CtFamily::Ipv6,
    };
    let flows = conntrack.delete_matching(kernel, is_stale).await.map_err(flow_error)?;
    Ok(Forgotten { flows, took: began.elapsed() })
}

/// Where the client of a flow sends to, if the flow has ports.
#[must_use]
pub fn sent_to(flow: &ct::Flow) -> Option<SocketAddr> {
    Some((flow.orig.dst, flow.orig.dst_port()?).into())
}

/// Who answers a flow, whatever leads it there.
#[must_use]
pub fn answered_by(flow: &ct::Flow) -> Option<SocketAddr> {
    Some((flow.reply.src, flow.reply.src_port()?).into())
}

/// Where connection tracking itself leads a flow.
// KERNEL: IPVS writes its destination into the answer's addresses and leaves the flow untranslated
// (net/netfilter/ipvs/ip_vs_nfct.c ip_vs_update_conntrack, v6.12). Without IPVS such a flow goes
// nowhere, and no NAT chain sees it again.
#[must_use]
pub fn translated_to(flow: &ct::Flow) -> Option<SocketAddr> {
    let translated = flow.status.contains(CtStatus::DST_NAT);
    if translated { answered_by(flow) } else { sent_to(flow) }
}

/// The error of listing or removing flows.
fn flow_error(error: CtError) -> CommitError {
    let (doing, kind) = (error.to_string(), kind(error.kind()));
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others are about unreadable answers")]
    let source = match error {
        CtError::Kernel { errno, .. } | CtError::Io { errno, .. } => errno,
        CtError::Interrupted { .. } => io::ErrorKind::Interrupted.into(),
        _ => io::ErrorKind::InvalidData.into(),
    };
    CommitError::Transport { doing, source, kind }
}

//! What went wrong, in the engine's terms.

use std::io;

use proxier_core::spi::{CommitError, ErrorKind};
use proxier_netlink::{
    ct::CtError,
    nft::{NftError, Refusal},
};

use crate::backend::Op;

/// The error of a transaction. What surprises (`fresh` is false: others may have written since the
/// kernel was read) has to be looked at again.
#[expect(clippy::wildcard_enum_match_arm, reason = "the others are known to change nothing")]
pub(super) fn commit_error(error: NftError, ops: &[Op], fresh: bool) -> CommitError {
    match error {
        NftError::Refused(refusal) if !fresh && kind(refusal.kind()) == ErrorKind::Conflict => {
            CommitError::Unknown {
                doing: "a transaction on objects that somebody else changed",
                source: io::Error::from_raw_os_error(refusal.errno()),
            }
        }
        NftError::Refused(refusal) => refused(&refusal, ops),
        NftError::Overrun { .. } | NftError::Malformed { .. } | NftError::Io { .. } => {
            CommitError::Unknown { doing: "a transaction", source: error.into_io_error() }
        }
        other => read_error(other),
    }
}

fn refused(refusal: &Refusal, ops: &[Op]) -> CommitError {
    let index = refusal.tag.and_then(|tag| usize::try_from(tag).ok());
    let op = index.and_then(|index| ops.get(index));
    let extack = match &refusal.unsupported {
        Some(missing) => format!("the kernel has no {missing}"),
        None => refusal.ack.text().unwrap_or_default().to_owned(),
    };
    CommitError::Refused {
        op: op.and(index),
        object: op.map_or_else(|| refusal.object.clone(), |op| op.key().to_string()),
        extack,
        errno: io::Error::from_raw_os_error(refusal.errno()),
        kind: kind(refusal.kind()),
    }
}

/// The error of something that changes nothing.
pub(super) fn read_error(error: NftError) -> CommitError {
    let kind = kind(error.kind());
    CommitError::Transport { doing: error.to_string(), source: error.into_io_error(), kind }
}

/// The error of listing or removing flows.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the others are about answers that cannot be read"
)]
pub(super) fn flow_error(error: CtError) -> CommitError {
    let (doing, kind) = (error.to_string(), kind(error.kind()));
    let source = match error {
        CtError::Kernel { errno, .. } | CtError::Io { errno, .. } => errno,
        CtError::Interrupted { .. } => io::ErrorKind::Interrupted.into(),
        _ => io::ErrorKind::InvalidData.into(),
    };
    CommitError::Transport { doing, source, kind }
}

/// The error of a step outside nf_tables.
#[expect(clippy::wildcard_enum_match_arm, reason = "most errors pass")]
pub(crate) fn transport(doing: impl Into<String>, source: io::Error) -> CommitError {
    let kind = match source.kind() {
        io::ErrorKind::PermissionDenied => ErrorKind::Permission,
        io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => ErrorKind::Conflict,
        io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Retry,
    };
    CommitError::Transport { doing: doing.into(), source, kind }
}

/// What to do, in the engine's words.
#[expect(clippy::wildcard_enum_match_arm, reason = "a kind that is not known is not known to help")]
const fn kind(kind: proxier_netlink::ErrorKind) -> ErrorKind {
    use proxier_netlink::ErrorKind as Theirs;
    match kind {
        Theirs::Conflict => ErrorKind::Conflict,
        Theirs::Permission => ErrorKind::Permission,
        Theirs::Retry => ErrorKind::Retry,
        Theirs::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Fatal,
    }
}

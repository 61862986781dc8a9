//! What went wrong, in the engine's terms.

use std::io;

use proxier_core::spi::{CommitError, ErrorKind};
use proxier_netlink::{
    ct::CtError,
    nft::{NftError, Refusal},
};

use crate::backend::Op;

/// The error of a transaction, for the engine, which knows operations by their index.
#[expect(clippy::wildcard_enum_match_arm, reason = "the others are not about a transaction sent")]
pub(super) fn commit_error(error: NftError, ops: &[Op]) -> CommitError {
    match error {
        NftError::Refused(refusal) => {
            let (op, object) = locate(ops, refusal.tag);
            CommitError::Refused {
                op,
                object: object.unwrap_or_else(|| refusal.object.clone()),
                extack: hint(&refusal),
                errno: io::Error::from_raw_os_error(refusal.errno()),
                kind: kind(refusal.kind()),
            }
        }
        NftError::Overrun { .. } | NftError::Malformed { .. } | NftError::Io { .. } => {
            CommitError::Unknown { doing: "a transaction", source: error.into_io_error() }
        }
        other => read_error(other),
    }
}

/// The error of a transaction after another one took effect.
pub(super) fn half_way(error: NftError) -> CommitError {
    CommitError::Unknown { doing: "the rest of a long transaction", source: error.into_io_error() }
}

fn locate(ops: &[Op], tag: Option<u32>) -> (Option<usize>, Option<String>) {
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

/// What to do, in the engine's words.
#[expect(clippy::wildcard_enum_match_arm, reason = "a kind that is not known is not known to help")]
pub(crate) const fn kind(kind: proxier_netlink::ErrorKind) -> ErrorKind {
    use proxier_netlink::ErrorKind as Theirs;
    match kind {
        Theirs::Conflict => ErrorKind::Conflict,
        Theirs::Permission => ErrorKind::Permission,
        Theirs::Retry => ErrorKind::Retry,
        Theirs::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Fatal,
    }
}

/// One error for those of several families.
pub(super) fn combine(mut errors: Vec<CommitError>) -> Result<(), CommitError> {
    match errors.pop() {
        None => Ok(()),
        Some(only) if errors.is_empty() => Err(only),
        Some(last) => {
            let kind = last.kind();
            errors.push(last);
            let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
            let (doing, source) = (all.join("; "), io::ErrorKind::Other.into());
            Err(CommitError::Transport { doing, source, kind })
        }
    }
}

//! What went wrong, in the engine's terms.

use std::io;

use proxier_core::spi::{CommitError, ErrorKind};
use proxier_netlink::{
    nft::NftError,
    spi::{kind, read_error, refused},
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

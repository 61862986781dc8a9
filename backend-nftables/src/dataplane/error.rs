//! What went wrong, in the engine's terms.

use proxier_core::spi::CommitError;
use proxier_netlink::{
    nft::NftError,
    spi::{read_error, refused},
};

use crate::backend::Op;

/// The error of a transaction, for the engine, which knows operations by their index.
#[expect(clippy::wildcard_enum_match_arm, reason = "the others are not about a transaction sent")]
pub(super) fn commit_error(error: NftError, ops: &[Op]) -> CommitError {
    match error {
        NftError::Refused(refusal) => refused(&refusal, ops),
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

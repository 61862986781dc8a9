//! What went wrong, in the engine's terms.

use std::io;

use proxier_core::spi::{CommitError, ErrorKind};
use proxier_netlink::{
    nft::{NftError, Refusal},
    spi::{kind, locate, read_error, refused},
};

use crate::backend::Op;

/// What became of a commit, before the object is looked up.
pub(super) enum Failure {
    Done(CommitError),
    Refused(Box<Refusal>),
    TooLong(Option<u32>),
}

impl Failure {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others leave nothing in doubt")]
    pub(super) fn of(error: NftError) -> Self {
        match error {
            NftError::Refused(refusal) => Self::Refused(refusal),
            NftError::AttributeTooLong { tag, .. } => Self::TooLong(tag),
            NftError::Overrun { .. } | NftError::Malformed { .. } | NftError::Io { .. } => {
                Self::Done(CommitError::Unknown {
                    doing: "a transaction",
                    source: error.into_io_error(),
                })
            }
            other => Self::Done(read_error(other)),
        }
    }

    /// The error for the engine, which knows operations by their index.
    pub(super) fn explain(self, ops: &[Op]) -> CommitError {
        match self {
            Self::Done(error) => error,
            Self::TooLong(tag) => {
                let (op, object) = locate(ops, tag);
                CommitError::Refused {
                    op,
                    object: object.unwrap_or_else(|| "a transaction".to_owned()),
                    extack: "a message would exceed 64 KiB".to_owned(),
                    errno: io::ErrorKind::InvalidInput.into(),
                    kind: ErrorKind::Fatal,
                }
            }
            Self::Refused(refusal) => refused(&refusal, ops),
        }
    }

    /// Says whether the kernel holds something else than was thought.
    pub(super) fn is_surprise(&self) -> bool {
        match self {
            Self::Refused(refusal) => kind(refusal.kind()) == ErrorKind::Conflict,
            Self::Done(_) | Self::TooLong(_) => false,
        }
    }

    pub(super) fn into_errno(self) -> io::Error {
        match self {
            Self::Refused(refusal) => io::Error::from_raw_os_error(refusal.errno()),
            Self::Done(_) | Self::TooLong(_) => io::ErrorKind::Other.into(),
        }
    }
}

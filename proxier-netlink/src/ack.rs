//! What the kernel says when it refuses: errno, extended acknowledgement, and their meaning.

use std::{fmt, io};

use crate::dec::{Attrs, ne32, text};
use crate::enc::MSG_HEADER;

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Someone else changed the kernel's state: read it again, plan again.
    Conflict,
    /// Trying again gives the same result: a bug, or an impossible request.
    Fatal,
    /// A privilege is missing.
    Permission,
    /// Transient: try the same again, with backoff.
    Retry,
    /// The kernel lacks a feature.
    Unsupported,
}

impl ErrorKind {
    /// The kind an errno of netfilter normally has.
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            libc::EACCES | libc::EPERM => Self::Permission,
            libc::EBUSY | libc::EEXIST | libc::ENOENT | libc::ERESTART | libc::ESTALE => {
                Self::Conflict
            }
            libc::EAGAIN | libc::EINTR | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM => Self::Retry,
            libc::EAFNOSUPPORT
            | libc::ENOPROTOOPT
            | libc::ENOSYS
            | libc::EOPNOTSUPP
            | libc::EPROTONOSUPPORT => Self::Unsupported,
            _ => Self::Fatal,
        }
    }
}

// KERNEL: ERESTART is not meant for user space, yet it is what nfnetlink answers to a batch with an
// old generation (net/netfilter/nfnetlink.c, v6.12).
const NAMES: [(i32, &str); 28] = [
    (libc::E2BIG, "E2BIG"),
    (libc::EACCES, "EACCES"),
    (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
    (libc::EAGAIN, "EAGAIN"),
    (libc::EBADF, "EBADF"),
    (libc::EBUSY, "EBUSY"),
    (libc::EEXIST, "EEXIST"),
    (libc::EINTR, "EINTR"),
    (libc::EINVAL, "EINVAL"),
    (libc::ELOOP, "ELOOP"),
    (libc::EMFILE, "EMFILE"),
    (libc::EMLINK, "EMLINK"),
    (libc::EMSGSIZE, "EMSGSIZE"),
    (libc::ENFILE, "ENFILE"),
    (libc::ENOBUFS, "ENOBUFS"),
    (libc::ENODATA, "ENODATA"),
    (libc::ENOENT, "ENOENT"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::ENOPROTOOPT, "ENOPROTOOPT"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::ENOSYS, "ENOSYS"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::EOVERFLOW, "EOVERFLOW"),
    (libc::EPERM, "EPERM"),
    (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
    (libc::ERANGE, "ERANGE"),
    (libc::ERESTART, "ERESTART"),
    (libc::ESTALE, "ESTALE"),
];

/// The symbolic name of an errno, as a metric label; `"other"` for what netfilter does not use.
pub fn errno_name(errno: i32) -> &'static str {
    NAMES.iter().find(|(n, _)| *n == errno).map_or("other", |(_, name)| name)
}

/// The kernel's answer to one request: an errno, often with a text and the place in the request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ack {
    pub(crate) errno: i32,
    pub(crate) text: Option<String>,
    pub(crate) offset: Option<u32>,
    pub(crate) missing: Option<u32>,
}

impl Ack {
    /// Reads the payload of an `NLMSG_ERROR`; `None` if it is too short to be one.
    pub(crate) fn read(payload: &[u8], flags: u16) -> Option<Self> {
        let code = ne32(payload)?.cast_signed();
        let request = payload.get(4..)?;
        let request_len = usize::try_from(ne32(request)?).ok()?;
        let mut ack = Self {
            errno: code.checked_neg().unwrap_or(libc::EIO),
            text: None,
            offset: None,
            missing: None,
        };
        if flags & NLM_F_ACK_TLVS == 0 {
            return Some(ack);
        }
        let skip = if flags & NLM_F_CAPPED == 0 { request_len } else { MSG_HEADER };
        let tlvs = Attrs(request.get(skip.checked_next_multiple_of(4)?..).unwrap_or_default());
        for (kind, value) in tlvs {
            match kind {
                NLMSGERR_ATTR_MSG => ack.text = Some(text(value).into_owned()),
                NLMSGERR_ATTR_OFFS => ack.offset = ne32(value),
                NLMSGERR_ATTR_MISS_TYPE => ack.missing = ne32(value),
                _ => {}
            }
        }
        Some(ack)
    }

    /// The errno, positive; 0 is success.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// What the kernel wrote about it, if anything.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Where the offending attribute starts, in bytes from the start of the message.
    pub fn offset(&self) -> Option<u32> {
        self.offset
    }

    /// The type of the attribute that was required and not given.
    pub fn missing(&self) -> Option<u32> {
        self.missing
    }

    pub(crate) fn io(&self) -> io::Error {
        io::Error::from_raw_os_error(self.errno)
    }
}

impl fmt::Display for Ack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(errno_name(self.errno))?;
        if let Some(text) = &self.text {
            write!(f, ": {text}")?;
        }
        if let Some(missing) = self.missing {
            write!(f, ", attribute {missing} is missing")?;
        }
        Ok(())
    }
}

const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NLMSGERR_ATTR_MISS_TYPE: u16 = 5;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::enc::Writer;

    #[test]
    fn a_capped_answer_with_text_and_offset_is_read() {
        let mut w = Writer::default();
        w.raw(&(-libc::ENOENT).to_ne_bytes());
        w.raw(&400_u32.to_ne_bytes());
        w.raw(&[0; 12]);
        w.str(NLMSGERR_ATTR_MSG, "no such chain");
        w.bytes(NLMSGERR_ATTR_OFFS, &28_u32.to_ne_bytes());
        let ack = Ack::read(w.as_bytes(), NLM_F_CAPPED | NLM_F_ACK_TLVS).unwrap();
        assert_eq!((ack.errno(), ack.offset()), (libc::ENOENT, Some(28)));
        assert_eq!(ack.to_string(), "ENOENT: no such chain");
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..128), flags in any::<u16>(),
        ) {
            let _ = Ack::read(&bytes, flags);
        }
    }
}

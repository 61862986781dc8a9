//! The text protocol of probes and responders.
//!
//! Question: one line (TCP) or datagram (UDP) with a token. Answer: one line
//! `NAME REACHED_AT SEEN TOKEN`. Over a connection the responder also says such a line, with the
//! token `-`, as soon as it accepts, so that a probe costs one round trip only.

use std::net::SocketAddr;

/// Token of the line that greets a connection.
pub(super) const GREETING: &str = "-";

/// Most bytes of a question or an answer, the line's end included.
pub(super) const LONGEST_BYTES: usize = 512;

/// One answer on the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) reached_at: SocketAddr,
    pub(super) seen: SocketAddr,
    pub(super) token: String,
}

impl Line {
    pub(super) fn encode(
        name: &str,
        reached_at: SocketAddr,
        seen: SocketAddr,
        token: &str,
    ) -> String {
        format!("{name} {reached_at} {seen} {token}\n")
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.split_ascii_whitespace();
        let line = Self {
            name: words.next()?.to_owned(),
            reached_at: words.next()?.parse().ok()?,
            seen: words.next()?.parse().ok()?,
            token: words.next()?.to_owned(),
        };
        words.next().is_none().then_some(line)
    }
}

/// Fit to stand in a line: not empty, no space, at most 200 bytes.
pub(super) fn is_word(name: &str) -> bool {
    !name.is_empty() && name.len() <= 200 && !name.contains(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_back_as_it_was_written() {
        for text in ["10.0.0.1:80", "[fd41::1]:80", "[fe80::1%2]:80"] {
            let addr: SocketAddr = text.parse().unwrap();
            let line = Line::encode("pod/a", addr, addr, "t1");
            let read = Line::decode(line.as_bytes()).unwrap();
            assert_eq!((read.name.as_str(), read.reached_at), ("pod/a", addr));
        }
        assert_eq!(Line::decode(b"HTTP/1.1 200 OK"), None);
    }
}

//! Settings of the userspace mode.

use std::{fmt, net::SocketAddr, num::NonZeroUsize, sync::Arc, time::Duration};

use proxier_core::{FragmentId, ir::FrontendKey};

/// Longest name of the table.
// KERNEL: NFT_NAME_MAXLEN is 256; 28 keeps names readable everywhere.
const MAX_NAME_BYTES: usize = 28;
/// Routing tables of the system: unspec, default, main, local.
// KERNEL: RT_TABLE_* (include/uapi/linux/rtnetlink.h, v6.12).
const SYSTEM_TABLES: [u32; 4] = [0, 253, 254, 255];

/// Settings of the userspace mode; built by struct update from [`Config::default`].
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// How traffic comes to the process.
    pub listen: Listen,
    /// Bounds of what the process uses.
    pub limits: Limits,
    /// TCP.
    pub tcp: Tcp,
    /// UDP.
    pub udp: Udp,
}

/// How traffic comes to the process.
#[derive(Clone, Debug)]
pub enum Listen {
    /// At addresses that the embedder names: no kernel rules, no privileges.
    Addresses(Addresses),
    /// Wherever Services are: nf_tables rules hand the traffic over.
    Capture(Capture),
}

impl Default for Listen {
    fn default() -> Self {
        Self::Capture(Capture::default())
    }
}

/// How captured packets come to the listeners of the process.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// [`Tproxy`](Self::Tproxy) where the kernel and the system let us, [`Redirect`](Self::Redirect)
    /// elsewhere: decided once, by [`engine`](crate::engine()).
    #[default]
    Auto,
    /// They are translated to a listener, and connection tracking knows where they were sent to.
    /// Needs neither TPROXY nor policy routing, and loses the client's address: every endpoint sees
    /// one of the node's.
    Redirect,
    /// They are handed over as they are.
    Tproxy,
}

/// How traffic is captured, and what the kernel objects for it are called.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Capture {
    /// How captured packets come to the listeners.
    pub method: Method,
    /// The nf_tables table, one per family: 1 to 28 ASCII letters, digits, `-` and `_`.
    pub table: String,
    /// The bit of the packet mark and the connection mark that says "for this proxier": 0 to 31. With
    /// [`Method::Redirect`], of packets that this proxier sends.
    pub mark_bit: u8,
    /// The routing table that delivers marked packets to this machine; [`Method::Redirect`] has none.
    pub routing_table: u32,
    /// The priority of the routing rule that leads there.
    pub rule_priority: u32,
}

impl Default for Capture {
    fn default() -> Self {
        Self {
            method: Method::Auto,
            table: "proxier-userspace".to_owned(),
            mark_bit: 13,
            routing_table: 29_520,
            rule_priority: 90,
        }
    }
}

impl Capture {
    /// The method is to redirect.
    pub(crate) const fn redirects(&self) -> bool {
        matches!(self.method, Method::Redirect)
    }

    /// The mark that says "for this proxier".
    #[must_use]
    pub const fn mark(&self) -> u32 {
        1_u32.wrapping_shl(self.mark_bit as u32)
    }
}

/// Says where to listen for a frontend of a Service port; `None` for nowhere.
type Namer = dyn Fn(&FragmentId, &FrontendKey) -> Option<SocketAddr> + Send + Sync;

/// The addresses of a proxier without kernel rules.
#[derive(Clone)]
pub struct Addresses(Arc<Namer>);

impl Addresses {
    /// Asks `name` for the address of every frontend. It is called again when a frontend changes and
    /// must then answer the same. Port 0 lets the kernel choose; see
    /// [`Monitor::listeners`](crate::Monitor::listeners).
    pub fn new(
        name: impl Fn(&FragmentId, &FrontendKey) -> Option<SocketAddr> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(name))
    }

    /// Where to listen for a frontend.
    pub(crate) fn of(&self, id: &FragmentId, key: &FrontendKey) -> Option<SocketAddr> {
        (self.0)(id, key)
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Addresses(..)")
    }
}

/// Bounds of what the process uses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Limits {
    /// TCP connections held at once. At the limit no more are accepted: clients wait in the kernel's
    /// queue.
    pub connections: usize,
    /// UDP sessions held at once; at the limit the one that was idle longest goes.
    pub sessions: usize,
    /// Clients remembered for session affinity, for each Service port; at the limit the one that
    /// connected longest ago is forgotten.
    pub affinity_clients: usize,
    /// Pipes kept for zero copy, for each worker.
    pub pooled_pipes: usize,
    /// Threads; one for each processor, eight at most, when `None`.
    pub workers: Option<NonZeroUsize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 65_536,
            sessions: 65_536,
            affinity_clients: 65_536,
            pooled_pipes: 64,
            workers: None,
        }
    }
}

/// Settings for TCP.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tcp {
    /// How long each attempt to reach an endpoint may take; as many attempts, each with the next
    /// endpoint.
    // K8S: EndpointDialTimeouts of pkg/proxy/userspace/proxysocket.go, v1.25.
    pub dial_timeouts: Vec<Duration>,
    /// Time without traffic after which both ends of a connection are asked whether they are there;
    /// a dead one is given up after nine questions at a tenth of this interval.
    pub keepalive: Duration,
    /// How long connections to an endpoint that is gone may go on; `None` for as long as they like.
    pub drain: Option<Duration>,
    /// How long a connection of which one side has said its last word may be silent; `None` for as
    /// long as it likes. An endpoint that never answers would keep it for ever: a client that is gone
    /// looks like one that waits.
    // KERNEL: the kernel modes do the same, by nf_conntrack_tcp_timeout_fin_wait (120 s).
    pub half_closed: Option<Duration>,
    /// Move bytes without copying them, once a connection turns out to carry many.
    pub splice: bool,
}

impl Default for Tcp {
    fn default() -> Self {
        Self {
            dial_timeouts: [250, 500, 1000, 2000].map(Duration::from_millis).into(),
            keepalive: Duration::from_secs(60),
            drain: None,
            half_closed: Some(Duration::from_secs(120)),
            splice: true,
        }
    }
}

/// Settings for UDP.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Udp {
    /// A session ends when nothing was sent either way for so long.
    pub idle: Duration,
    /// On a port of [`answer_ports`](Self::answer_ports) a session whose questions are all answered
    /// ends after so long.
    pub answered: Duration,
    /// Service ports whose protocol is one answer for one question.
    pub answer_ports: Vec<u16>,
}

impl Default for Udp {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            answered: Duration::from_secs(2),
            answer_ports: vec![53],
        }
    }
}

impl Config {
    /// Checks the settings.
    ///
    /// # Errors
    /// [`ConfigError`] names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Listen::Capture(capture) = &self.listen {
            let Capture { table, mark_bit, routing_table, .. } = capture;
            let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            if !(1..=MAX_NAME_BYTES).contains(&table.len()) || !table.bytes().all(legal) {
                return Err(ConfigError::Table { table: table.clone() });
            }
            if *mark_bit > 31 {
                return Err(ConfigError::MarkBit { bit: *mark_bit });
            }
            if SYSTEM_TABLES.contains(routing_table) {
                return Err(ConfigError::RoutingTable { table: *routing_table });
            }
        }
        let Limits { connections, sessions, affinity_clients, .. } = self.limits;
        if connections == 0 || sessions == 0 || affinity_clients == 0 {
            return Err(ConfigError::Limit);
        }
        if self.tcp.dial_timeouts.is_empty() {
            return Err(ConfigError::DialTimeouts);
        }
        Ok(())
    }
}

/// A setting is out of range.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No attempt would be made.
    #[error("no dial timeouts: an endpoint needs at least one attempt")]
    DialTimeouts,
    /// Nothing would ever be accepted.
    #[error("a limit on connections, sessions or affinity clients is zero")]
    Limit,
    /// There is no such bit.
    #[error("mark bit {bit}: a packet mark has bits 0 to 31")]
    MarkBit {
        /// The setting.
        bit: u8,
    },
    /// It belongs to the system.
    #[error("routing table {table} belongs to the system")]
    RoutingTable {
        /// The setting.
        table: u32,
    },
    /// Tables cannot be called so.
    #[error(
        "table name {table:?}: expected 1 to {MAX_NAME_BYTES} ASCII letters, digits, '-' and '_'"
    )]
    Table {
        /// The setting.
        table: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named() {
        assert_eq!(Config::default().validate(), Ok(()));
        let with = |capture| Config { listen: Listen::Capture(capture), ..Config::default() };
        let capture = Capture::default;
        for table in ["", "a b", "a-name-of-more-than-28-characters"] {
            let error = with(Capture { table: table.to_owned(), ..capture() }).validate();
            assert!(error.unwrap_err().to_string().contains(table));
        }
        let error = with(Capture { mark_bit: 32, ..capture() }).validate().unwrap_err();
        assert_eq!(error.to_string(), "mark bit 32: a packet mark has bits 0 to 31");
        let error = with(Capture { routing_table: 254, ..capture() }).validate().unwrap_err();
        assert_eq!(error.to_string(), "routing table 254 belongs to the system");
        assert_eq!(capture().mark(), 0x2000);
    }
}

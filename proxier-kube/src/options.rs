//! How to watch.

use std::time::Duration;

/// How to watch. The defaults are for real clusters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Ask for streaming lists (Kubernetes 1.32 and later have them). Servers that do not have
    /// them are asked for pages.
    pub streaming_lists: bool,
    /// Objects per page of a list: 500.
    pub page_size: u32,
    /// The longest time an answer to a list, or the head of an answer to a watch, may take: one
    /// minute.
    pub request_timeout: Duration,
    /// The longest pause within a streaming list: ten seconds. After that, pages are asked for.
    pub stream_patience: Duration,
    /// How long a watch may live, at most, before it is renewed: 290 seconds.
    pub watch_lifetime: Duration,
    /// A watch without event and bookmark for so long is given up and opened again: 100 seconds.
    // K8S: the server sends a bookmark about every minute, up to 75 s (cacher.go
    // bookmarkFrequency with jitter, v1.36).
    pub stall: Duration,
    /// The first delay after a failure, doubled each time: 800 milliseconds.
    pub first_retry: Duration,
    /// The longest delay after a failure: 30 seconds.
    pub longest_retry: Duration,
    /// How long to wait at the start for the Node's addresses and the ServiceCIDRs once Services
    /// and EndpointSlices are there: 30 seconds, as kube-proxy. Then the node is programmed
    /// without them, until they come.
    pub node_patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            streaming_lists: true,
            page_size: 500,
            request_timeout: Duration::from_secs(60),
            stream_patience: Duration::from_secs(10),
            watch_lifetime: Duration::from_secs(290),
            stall: Duration::from_secs(100),
            first_retry: Duration::from_millis(800),
            longest_retry: Duration::from_secs(30),
            node_patience: Duration::from_secs(30),
        }
    }
}

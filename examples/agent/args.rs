//! The command line: kube-proxy's flags, and verbs of our own.

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::config::GoDuration;

/// Programs a node with Kubernetes Services: a drop-in for kube-proxy.
#[derive(Debug, Parser)]
#[command(
    name = "agent",
    version,
    max_term_width = 100,
    after_help = "Start with `agent doctor`: it says what this node and cluster lack, and what to do."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) flags: Flags,
    /// What to do; `run` when nothing is said.
    #[command(subcommand)]
    pub(crate) verb: Option<Verb>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Programs the node and keeps it in step with the cluster (default)
    Run,
    /// Shows what would be programmed on a node that has nothing yet
    Plan {
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Compares the kernel with what is wanted: exit code 0 when equal, 1 when not, 2 on errors
    Diff {
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Lists services, endpoints or conflicts, as this node sees them
    Get {
        /// What to list
        #[arg(value_enum)]
        what: What,
        /// Only those of this namespace
        #[arg(short, long)]
        namespace: Option<String>,
        /// How to print them
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Says why a packet goes where it goes; sends nothing
    Explain {
        /// Source address
        #[arg(long)]
        from: std::net::IpAddr,
        /// The interface it comes in on
        #[arg(long = "in", value_name = "INTERFACE")]
        input: Option<String>,
        /// Destination: ADDRESS:PORT[/PROTOCOL]
        #[arg(long)]
        to: String,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Removes what any mode, or kube-proxy, has programmed on this node
    Cleanup {
        /// Only what these modes have programmed
        #[arg(value_name = "MODE")]
        modes: Vec<proxier::Mode>,
    },
    /// Finds out what this node and cluster lack, and says what to do
    Doctor,
    /// Prints a completion script for a shell
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// What can be listed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum What {
    /// Service ports with their frontends
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Endpoints by Service port
    #[value(alias = "endpoint", alias = "ep")]
    Endpoints,
    /// Frontends that two Services want
    #[value(alias = "conflict")]
    Conflicts,
}

/// How to print.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Text,
    /// For people, with more columns
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// Names only
    Name,
}

/// How to log.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    Text,
}

macro_rules! flags {
    ($($(#[$meta:meta])* $name:ident: $kind:ty = $value:literal),* $(,)?) => {
        /// kube-proxy's flags that set what a configuration file sets, too.
        #[derive(Args, Clone, Debug, Default)]
        pub(crate) struct Settings {
            $($(#[$meta])* #[arg(long, value_name = $value, help_heading = "Settings (ignored with --config)")]
            pub(crate) $name: Option<$kind>,)*
        }

        impl Settings {
            /// The flags that were given.
            pub(crate) fn given(&self) -> Vec<String> {
                let given = [$(self.$name.is_some().then(|| stringify!($name).replace('_', "-")),)*];
                given.into_iter().flatten().collect()
            }
        }
    };
}

flags! {
    /// auto, nftables, iptables, ipvs or userspace; auto probes and takes the best [default: auto]
    proxy_mode: String = "MODE",
    /// Overrides the node's address, where the Node object has none
    bind_address: String = "ADDRESS",
    /// Where /healthz and /livez are served; empty for nowhere [default: 0.0.0.0:10256]
    healthz_bind_address: String = "ADDRESS",
    /// Where /metrics and /debug are served; empty for nowhere [default: 127.0.0.1:10249]
    metrics_bind_address: String = "ADDRESS",
    /// Give up when one of the two cannot be served
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    bind_address_hard_fail: bool = "BOOL",
    /// Pod networks of the cluster: one CIDR, or one of each family
    cluster_cidr: String = "CIDR[,CIDR]",
    /// ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix
    detect_local_mode: String = "MODE",
    /// The bridge that pods are behind, for BridgeInterface
    pod_bridge_interface: String = "NAME",
    /// How the names of pods' interfaces begin, for InterfaceNamePrefix
    pod_interface_name_prefix: String = "PREFIX",
    /// Masquerade all traffic to cluster IPs
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: bool = "BOOL",
    /// The packet mark bit that says "masquerade this", 0 to 31 [default: 14]
    iptables_masquerade_bit: i32 = "BIT",
    /// Node ports answer on 127.0.0.0/8, in iptables mode [default: true]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    iptables_localhost_nodeports: bool = "BOOL",
    /// How long a change may fail before the node counts as unhealthy, halved [default: 30s]
    iptables_sync_period: GoDuration = "DURATION",
    /// The longest pause between two syncs [default: 1s]
    iptables_min_sync_period: GoDuration = "DURATION",
    /// As --iptables-sync-period, in ipvs mode
    ipvs_sync_period: GoDuration = "DURATION",
    /// As --iptables-min-sync-period, in ipvs mode
    ipvs_min_sync_period: GoDuration = "DURATION",
    /// The scheduler of virtual servers [default: rr]
    ipvs_scheduler: String = "NAME",
    /// Networks whose virtual servers are somebody else's
    #[arg(value_delimiter = ',', num_args = 1)]
    ipvs_exclude_cidrs: Vec<String> = "CIDR,...",
    /// arp_ignore=1 and arp_announce=2
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ipvs_strict_arp: bool = "BOOL",
    /// Idle TCP connections; 0 leaves the kernel's
    ipvs_tcp_timeout: GoDuration = "DURATION",
    /// TCP connections after a FIN; 0 leaves the kernel's
    ipvs_tcpfin_timeout: GoDuration = "DURATION",
    /// Idle UDP flows; 0 leaves the kernel's
    ipvs_udp_timeout: GoDuration = "DURATION",
    /// Networks whose addresses answer on node ports, or "primary"
    #[arg(value_delimiter = ',', num_args = 1)]
    nodeport_addresses: Vec<String> = "CIDR,...",
    /// nf_conntrack_max per CPU; 0 leaves the kernel's [default: 32768]
    conntrack_max_per_core: i32 = "N",
    /// The least nf_conntrack_max [default: 131072]
    conntrack_min: i32 = "N",
    /// Idle TCP connections [default: 24h]
    conntrack_tcp_timeout_established: GoDuration = "DURATION",
    /// TCP connections in CLOSE_WAIT [default: 1h]
    conntrack_tcp_timeout_close_wait: GoDuration = "DURATION",
    /// Track packets outside the window as valid
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    conntrack_tcp_be_liberal: bool = "BOOL",
    /// Unanswered UDP flows; 0 leaves the kernel's
    conntrack_udp_timeout: GoDuration = "DURATION",
    /// Answered UDP flows; 0 leaves the kernel's
    conntrack_udp_timeout_stream: GoDuration = "DURATION",
    /// kube-proxy's informer resync: accepted, without effect
    config_sync_period: GoDuration = "DURATION",
    /// /proc/self/oom_score_adj, -1000 to 1000 [default: -999]
    #[arg(allow_hyphen_values = true)]
    oom_score_adj: i32 = "N",
    /// pprof: accepted, without effect
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    profiling: bool = "BOOL",
    /// Requests a second to the API server [default: 5]
    kube_api_qps: f32 = "N",
    /// Requests at once to the API server [default: 10]
    kube_api_burst: i32 = "N",
    /// Accepted; kinds that no longer exist are warned about
    feature_gates: String = "NAME=BOOL,...",
}

/// Everything that is not a verb.
#[derive(Args, Clone, Debug)]
pub(crate) struct Flags {
    /// A KubeProxyConfiguration, and optionally a ProxierConfiguration beside it in the same file
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Writes the settings in force to a file (`-`: standard output) and ends
    #[arg(long, value_name = "FILE")]
    pub(crate) write_config_to: Option<PathBuf>,
    /// Reads Services from manifests in files, directories or standard input (`-`) instead of a cluster
    #[arg(long, value_name = "PATH", value_delimiter = ',')]
    pub(crate) manifests: Vec<PathBuf>,
    /// How to reach the API server; the pod's service account when neither this nor --master is given
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The API server's URL, overriding the kubeconfig's
    #[arg(long, value_name = "URL")]
    pub(crate) master: Option<String>,
    /// The name of the Node object [default: the host's name, in lower case]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname_override: Option<String>,
    /// Removes what any mode, or kube-proxy, has programmed on this node, and ends
    #[arg(long)]
    pub(crate) cleanup: bool,
    /// Writes the sysctls that need full privileges, and ends
    #[arg(long)]
    pub(crate) init_only: bool,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub(crate) log_level: Option<Level>,
    /// kube-proxy's verbosity: debug from 4 on, trace from 6 on
    #[arg(short = 'v', value_name = "N", default_value_t = 0)]
    pub(crate) verbosity: u8,
    /// How to log
    #[arg(long, alias = "logging-format", value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// How much to log.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Level {
    Debug,
    Error,
    Info,
    Trace,
    Warn,
}

/// The command line as clap sees it: flags may come before and after the verb.
pub(crate) fn command() -> clap::Command {
    Cli::command().mut_args(|arg| {
        if matches!(arg.get_id().as_str(), "help" | "version") { arg } else { arg.global(true) }
    })
}

/// Reads the command line.
pub(crate) fn parse<I: IntoIterator<Item = std::ffi::OsString>>(
    args: I,
) -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&command().try_get_matches_from(args)?)
}

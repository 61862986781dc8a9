//! The contenders, each in processes of its own.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use proxier_backend_userspace::{Addresses, Config, Listen, engine};
use proxier_core::{
    Family, FragmentId, ObjectName, Protocol, Proxier, Revision, Update,
    ir::{
        Fragment, Frontend, FrontendKey, FrontendKind, Member, Pool, Snat, Verdict, Verdicts, WayIn,
    },
};
use proxier_netlink::NetNs;
use proxier_testkit::lab::Ns;

use crate::{ENDPOINT, PROXY, client::Goal, endpoint};

/// Who takes part.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Contender {
    Direct,
    Ours,
    Nginx,
    Haproxy,
}

impl Contender {
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::Ours, Self::Nginx, Self::Haproxy];

    pub(crate) fn can(self, goal: Goal) -> bool {
        self != Self::Haproxy || goal != Goal::Datagrams
    }

    pub(crate) fn address(self) -> [u8; 4] {
        if self == Self::Direct { ENDPOINT } else { PROXY }
    }

    /// Where a Service port is, by the first port of its endpoints.
    pub(crate) fn port(self, service: u16) -> u16 {
        match self {
            Self::Direct => service,
            Self::Ours => service + 1000,
            Self::Nginx => service + 2000,
            Self::Haproxy => service + 3000,
        }
    }
}

/// A contender's processes; they end when it is dropped.
pub(crate) struct Peer {
    child: Option<Child>,
    files: Option<PathBuf>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // A master that lives would start new workers.
            let workers = children(child.id());
            child.kill().ok();
            child.wait().ok();
            for pid in workers {
                let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                if let Some(pid) = pid {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
                }
            }
        }
        if let Some(files) = &self.files {
            std::fs::remove_dir_all(files).ok();
        }
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    text.unwrap_or_default().split_whitespace().filter_map(|it| it.parse().ok()).collect()
}

fn spawn(ns: &Ns, program: &str, args: &[&str]) -> Child {
    let start = || {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap_or_else(|error| unreachable!("{program}: {error}"))
    };
    NetNs::Path(ns.path()).run(start).unwrap()
}

/// Waits until somebody listens.
fn wait(ns: &Ns, at: SocketAddr) {
    let listens = || {
        let deadline = Instant::now() + Duration::from_secs(5);
        while TcpStream::connect(at).is_err() {
            assert!(Instant::now() < deadline, "nobody listens at {at}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    NetNs::Path(ns.path()).run(listens).unwrap();
}

fn this_program() -> String {
    std::env::current_exe().unwrap().to_string_lossy().into_owned()
}

pub(crate) fn start_endpoints(ns: &Ns) -> Peer {
    let child = spawn(ns, &this_program(), &["--as-endpoint"]);
    let peer = Peer { child: Some(child), files: None };
    wait(ns, (Ipv4Addr::from(ENDPOINT), endpoint::ANSWER).into());
    peer
}

impl Peer {
    pub(crate) fn start(contender: Contender, ns: &Ns) -> Self {
        let files = std::env::temp_dir().join(format!("versus-{}", std::process::id()));
        std::fs::create_dir_all(&files).unwrap();
        let path = |name: &str| files.join(name).to_string_lossy().into_owned();
        let write = |name: &str, text: String| {
            std::fs::write(files.join(name), text).unwrap();
            path(name)
        };
        let child = match contender {
            Contender::Direct => return Self { child: None, files: Some(files) },
            Contender::Ours => spawn(ns, &this_program(), &["--as-proxy"]),
            Contender::Nginx => {
                let file = write("nginx.conf", nginx(&path("nginx.pid")));
                spawn(ns, "nginx", &["-e", "/dev/null", "-c", &file])
            }
            Contender::Haproxy => {
                spawn(ns, "haproxy", &["-db", "-f", &write("haproxy.cfg", haproxy())])
            }
        };
        let peer = Self { child: Some(child), files: Some(files) };
        wait(ns, (Ipv4Addr::from(PROXY), contender.port(endpoint::ANSWER)).into());
        peer
    }

    fn pids(&self) -> Vec<u32> {
        let Some(child) = &self.child else { return Vec::new() };
        let mut all = children(child.id());
        all.push(child.id());
        all
    }

    /// Seconds of processor time so far.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let ticks = self.pids().into_iter().filter_map(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let rest = text.rsplit_once(") ")?.1;
            let of = |index: usize| rest.split(' ').nth(index)?.parse::<f64>().ok();
            // utime and stime: fields 14 and 15 of proc(5), of which two and the name are cut off.
            Some(of(11)? + of(12)?)
        });
        ticks.sum::<f64>() / 100.0
    }

    /// Memory held, in KiB.
    pub(crate) fn resident_kib(&self) -> f64 {
        let kib = self.pids().into_iter().filter_map(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        });
        kib.sum()
    }
}

fn servers(service: u16) -> impl Iterator<Item = SocketAddr> {
    (0..endpoint::COUNT).map(move |number| (Ipv4Addr::from(ENDPOINT), service + number).into())
}

fn nginx(pid: &str) -> String {
    let half_close = std::env::args().any(|it| it == "--half-close");
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nuser root;\npid {pid};\n\
         worker_processes auto;\nworker_rlimit_nofile 60000;\nerror_log /dev/null;\n\
         events {{ worker_connections 30000; }}\nstream {{\n"
    );
    for (service, udp) in
        [(endpoint::ANSWER, ""), (endpoint::FLOOD, ""), (endpoint::DATAGRAM, " udp")]
    {
        write!(text, "upstream s{service} {{").unwrap();
        servers(service).for_each(|it| write!(text, " server {it};").unwrap());
        let port = Contender::Nginx.port(service);
        let half = if half_close { " proxy_half_close on;" } else { "" };
        let half = if udp.is_empty() { half } else { "" };
        let timeout = if udp.is_empty() { "proxy_timeout 10m" } else { "proxy_timeout 1s" };
        writeln!(
            text,
            " }}\nserver {{ listen {port}{udp} reuseport backlog=4096; {timeout};{half} proxy_pass s{service}; }}"
        )
        .unwrap();
    }
    text.replace(" udp reuseport backlog=4096", " udp reuseport") + "}\n"
}

fn haproxy() -> String {
    let mut text =
        "global\n nbthread 2\n maxconn 9300\n maxpipes 400\ndefaults\n mode tcp\n option splice-auto\n \
                    timeout connect 4s\n timeout client 10m\n timeout server 10m\n maxconn 9300\n \
                    backlog 4096\n"
            .to_owned();
    for service in [endpoint::ANSWER, endpoint::FLOOD] {
        let port = Contender::Haproxy.port(service);
        writeln!(text, "listen s{service}\n bind :{port}").unwrap();
        for (number, it) in servers(service).enumerate() {
            writeln!(text, " server e{number} {it}").unwrap();
        }
    }
    text
}

/// Ours, until it is killed.
pub(crate) fn proxy() -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let at = |_: &FragmentId, key: &FrontendKey| {
            Some((Ipv4Addr::from(PROXY), Contender::Ours.port(key.port.get())).into())
        };
        let listen = Listen::Addresses(Addresses::new(at));
        let config = Config { listen, ..Config::default() };
        let mut engine = engine(&config, &NetNs::Current, &[Family::V4]).unwrap();
        let services = [
            (endpoint::ANSWER, Protocol::Tcp),
            (endpoint::FLOOD, Protocol::Tcp),
            (endpoint::DATAGRAM, Protocol::Udp),
        ];
        let fragments = services.map(|(service, protocol)| Arc::new(fragment(service, protocol)));
        let (revision, node) = (Revision(1), Arc::default());
        let update = Update::Reset { revision, node, fragments: fragments.into() };
        assert_eq!(engine.sync(update).await.unwrap().degraded, []);
        std::future::pending().await
    })
}

fn fragment(service: u16, protocol: Protocol) -> Fragment {
    let way_in = WayIn::Address([10, 97, 0, 1].into());
    let forward = Verdict::Forward { pool: Pool::Cluster, snat: Snat::Masquerade };
    let serving: Vec<_> = servers(service).collect();
    let names: BTreeMap<_, _> = [(endpoint::ANSWER, "answer"), (endpoint::FLOOD, "flood")].into();
    let id = FragmentId {
        service: ObjectName::new("versus", names.get(&service).copied().unwrap_or("datagram")),
        port: "".into(),
        protocol,
        family: Family::V4,
    };
    let frontend = Frontend {
        kind: FrontendKind::ClusterIp,
        key: FrontendKey { way_in, port: service.try_into().unwrap(), protocol },
        sources: None,
        verdicts: Verdicts::all(forward),
    };
    let cluster = serving.iter().map(|addr| Member::new(*addr, false)).collect();
    Fragment {
        serving: if protocol == Protocol::Udp { serving } else { Vec::new() },
        ..Fragment::new(id, vec![frontend], cluster)
    }
}

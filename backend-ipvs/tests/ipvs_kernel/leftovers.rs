//! A process that is killed while it programs leaves nothing that the next one does not mend, and
//! nothing that cleanup does not find.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use proxier_backend_ipvs::Config;
use proxier_core::{ObjectName, Proxier, Revision, SyncReport, Update, ir::Fragment};
use proxier_netlink::{
    NetNs,
    dummy::Links,
    ipvs::Ipvs as IpvsSocket,
    nft::{self, NftSocket},
};
use proxier_testkit::{backend::assert_consistent, eventually_async, lab::Lab};

use crate::lab::{Ns, PATIENCE, TestEngine, fragment, frontend};

/// Services, each with an address of its own and a port of an address that the node has anyway.
const SERVICES: usize = 120;
/// Foreign virtual servers.
const FOREIGN: usize = 3;
const SERVERS: usize = FOREIGN + 2 * SERVICES;

/// What somebody else has.
const THEIRS: &str = "ipvsadm -A -t 192.0.2.1:80 -s wlc; ipvsadm -a -t 192.0.2.1:80 -r 192.0.2.7:80 -m; \
     ipvsadm -A -f 7 -s rr; ipvsadm -A -u 172.20.7.11:53; \
     nft add table ip theirs; nft add chain ip theirs c; nft add rule ip theirs c counter drop; \
     ip link add theirs0 type dummy; ip addr add 172.20.7.11/32 dev theirs0; ip link set theirs0 up";

const NETNS: &str = "PROXIER_TEST_NETNS";
const ROLE: &str = "PROXIER_TEST_ROLE";

/// What a process was about to do when it was killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Program,
    Remove,
    CleanUp,
}

/// What there is of ours and of others.
#[derive(Debug)]
struct Seen {
    servers: usize,
    tables: usize,
    addresses: usize,
}

/// In words, what the process does, and how the kernel is seen then.
type Moment = (&'static str, Role, fn(&Seen) -> bool);

/// The moments at which a process is killed.
const MOMENTS: [Moment; 10] = [
    ("the table of a family", Role::Program, |it| it.tables > 1),
    ("the first virtual servers", Role::Program, |it| it.servers > FOREIGN),
    ("most virtual servers", Role::Program, |it| it.servers > FOREIGN + SERVICES),
    ("the first addresses", Role::Program, |it| it.addresses > 0),
    ("most addresses", Role::Program, |it| it.addresses > SERVICES / 2),
    ("some addresses gone", Role::Remove, |it| it.addresses < SERVICES),
    ("all addresses gone", Role::Remove, |it| it.addresses == 0),
    ("some virtual servers gone", Role::Remove, |it| it.servers < SERVERS),
    ("some virtual servers cleaned up", Role::CleanUp, |it| it.servers < SERVERS),
    ("a table cleaned up", Role::CleanUp, |it| it.tables < 3),
];

/// Reads what there is.
struct Observer {
    ipvs: IpvsSocket,
    nft: NftSocket,
    links: Links,
}

impl Observer {
    async fn new(ns: &NetNs) -> Self {
        let (ipvs, nft) = (IpvsSocket::open(ns).await.unwrap(), NftSocket::open(ns).unwrap());
        Self { ipvs, nft, links: Links::open(ns).unwrap() }
    }

    async fn look(&mut self) -> Seen {
        // A list that changes while it is read is read again.
        let servers = self.ipvs.services().await.map_or(FOREIGN, |it| it.len());
        let tables = self.nft.tables(nft::Family::Unspec).await.unwrap().len();
        let link = self.links.find_dummy(&Config::default().link).await.unwrap();
        let all = self.links.addresses().await.unwrap_or_default();
        let on_link = all.iter().filter(|it| Some(it.index) == link && it.prefix_len == 32);
        Seen { servers, tables, addresses: on_link.count() }
    }
}

fn services() -> Vec<Arc<Fragment>> {
    let one = |number: usize| {
        let byte = u8::try_from(number).unwrap();
        let endpoint = |it: u8| (SocketAddr::from(([10, 61, it, byte], 8080)), 1);
        let own = SocketAddr::from(([10, 97, 0, byte], 80));
        let port = 1000 + u16::from(byte);
        let anyway = SocketAddr::from(([172, 20, 7, 11], port));
        let mut fragment = fragment(&[endpoint(1), endpoint(2), endpoint(3)], "wrr");
        fragment.id.service = ObjectName::new("shop", &format!("cart-{number}"));
        fragment.frontends = vec![frontend(own), frontend(anyway)];
        Arc::new(fragment)
    };
    (0..SERVICES).map(one).collect()
}

/// Makes the kernel so, and nothing else of ours.
async fn sync(engine: &mut TestEngine, fragments: Vec<Arc<Fragment>>) -> SyncReport {
    let mut node = proxier_core::ir::NodeView::default();
    node.0.v4.addresses = ["172.20.7.11".parse().unwrap()].into_iter().collect();
    let update = Update::Reset { revision: Revision(1), node: Arc::new(node), fragments };
    let report = engine.sync(update).await.unwrap();
    assert_eq!(report.degraded, []);
    report
}

#[tokio::test]
async fn whoever_is_killed_leaves_nothing_that_is_not_mended_and_cleaned_up() {
    let mut unfinished = Vec::new();
    for (what, role, is_so) in MOMENTS {
        let lab = Lab::new("ipvs-left").unwrap();
        let path = lab.ns("node").unwrap().path();
        let ns = Ns(NetNs::Path(path.clone()));
        ns.run(THEIRS);
        let before = ns.state();
        let mut observer = Observer::new(&ns.0).await;
        if role != Role::Program {
            sync(&mut ns.engine(Config::default()).await, services()).await;
            assert_eq!(observer.look().await.servers, SERVERS);
        }

        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "leftovers::killed_process", "--nocapture"])
            .env(NETNS, &path)
            .env(ROLE, format!("{role:?}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let observer = tokio::sync::Mutex::new(&mut observer);
        let seen = || async { is_so(&observer.lock().await.look().await) };
        let waited = eventually_async(PATIENCE, what, seen).await;
        child.kill().unwrap();
        child.wait().unwrap();
        waited.unwrap();

        let mut next = ns.engine(Config::default()).await;
        if role == Role::CleanUp {
            if ns.state() != before {
                unfinished.push(what);
            }
        } else {
            let wanted = if role == Role::Program { services() } else { Vec::new() };
            if sync(&mut next, wanted).await.ops.total() > 0 {
                unfinished.push(what);
            }
            assert_consistent(&mut next).await;
        }
        next.cleanup().await.unwrap();
        assert_eq!(ns.state(), before, "killed at: {what}");
    }
    // Some are faster than the one who watches them, most of them on a busy machine.
    assert!(!unfinished.is_empty(), "none was cut short");
}

#[tokio::test]
async fn virtual_servers_on_addresses_of_others_are_known_without_the_table() {
    let lab = Lab::new("ipvs-flush").unwrap();
    let ns = Ns(NetNs::Path(lab.ns("node").unwrap().path()));
    ns.run(THEIRS);
    let before = ns.state();
    let mut engine = ns.engine(Config::default()).await;
    sync(&mut engine, services()).await;
    ns.run("nft delete table ip proxier-ipvs");
    assert!(engine.audit().await.unwrap().drift > 0);
    assert_eq!(engine.status().degraded, []);
    assert_consistent(&mut engine).await;
    engine.cleanup().await.unwrap();
    assert_eq!(ns.state(), before);
}

/// Not a test of its own: the process that is killed above.
#[test]
fn killed_process() {
    let (Ok(role), Ok(netns)) = (std::env::var(ROLE), std::env::var(NETNS)) else { return };
    let ns = Ns(NetNs::Path(PathBuf::from(netns)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut engine = ns.engine(Config::default()).await;
        match &*role {
            "Program" => drop(sync(&mut engine, services()).await),
            "Remove" => drop(sync(&mut engine, Vec::new()).await),
            "CleanUp" => engine.cleanup().await.unwrap(),
            other => panic!("{other}"),
        }
        // Stays until it is killed, so that a fast one is not taken for a dead one.
        std::future::pending::<()>().await;
    });
}

//! The userspace mode as a library and nothing else: at ports of the loopback addresses, without
//! namespaces, kernel rules or privileges.

use std::{
    collections::BTreeMap,
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use proxier::{
    Change, Family, FragmentId, Protocol, Proxier, Revision, Update,
    ir::{Fragment, Frontend, FrontendKey, Member, Verdict},
};
use proxier_backend_userspace::{
    Addresses, Config, Listen, Monitor, Userspace, UserspaceDataplane, engine,
};
use proxier_netlink::NetNs;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
    time::timeout,
};

use crate::{
    args::Options,
    cluster::Cluster,
    screen::{DOT, Item, Screen, many},
};

/// Longest wait for an answer, and for what is not to come.
const PATIENCE: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(200);

type Engine = proxier::engine::Engine<Userspace, UserspaceDataplane>;

/// Where the endpoints of the manifests are in truth: on ports of the loopback addresses.
struct Endpoints {
    moved: BTreeMap<(SocketAddr, Protocol), SocketAddr>,
    /// They answer until this is dropped.
    _answering: JoinSet<()>,
}

/// Shows it. Returns whether everything was as planned.
///
/// # Errors
/// Ports of the loopback addresses cannot be had.
pub(crate) async fn show(
    options: &Options,
    cluster: &Cluster,
    screen: &mut Screen,
) -> Result<bool, Box<dyn Error>> {
    let mut store = cluster.store(cluster.env.clone());
    drop(store.take());
    let families = families();
    let usable = |it: &&Arc<Fragment>| families.contains(&it.id.family);
    let wanted: Vec<_> = store.fragments().filter(usable).map(Arc::clone).collect();
    let endpoints = Endpoints::open(&wanted).await?;
    let fragments: Vec<_> = wanted.iter().map(|it| Arc::new(endpoints.moved(it))).collect();

    let at = |id: &FragmentId, _: &FrontendKey| Some(SocketAddr::new(loopback(id.family), 0));
    let config = Config { listen: Listen::Addresses(Addresses::new(at)), ..Config::default() };
    let mut engine = engine(&config, &NetNs::Current, &families)?;
    let monitor = engine.dataplane().monitor();
    let revision = Revision(1);
    let update = Update::Reset { revision, node: Arc::default(), fragments: fragments.clone() };
    let report = engine.sync(update).await?;
    screen.title("userspace mode, as a library: no namespaces, no kernel rules, no privileges");
    screen.labelled(
        "listening",
        &format!(
            "for {} of {}; endpoints are played by ports of this machine",
            many(monitor.listeners().len(), "frontend"),
            many(fragments.len(), "fragment")
        ),
    );
    let left_out: Vec<_> =
        report.degraded.iter().map(|it| format!("{} ({})", it.id, it.reason)).collect();
    if !left_out.is_empty() {
        screen.labelled("left out", &left_out.join(DOT));
    }
    screen.line("");

    let mut fine = true;
    let programmed = |it: &&Arc<Fragment>| !report.degraded.iter().any(|left| left.id == it.id);
    for fragment in wanted.iter().filter(programmed) {
        fine &= ask_all(fragment, &monitor, options.connections, screen).await?;
    }
    if let Some(fragment) = fragments.iter().find(|it| can_lose_one(it)) {
        fine &= lose_one(&mut engine, fragment, &monitor, screen).await?;
    }
    counted(&monitor, options, screen);
    engine.cleanup().await?;
    fine &= monitor.listeners().is_empty();
    screen.line("");
    let words = if fine { "everything was as planned" } else { "not everything was as planned" };
    screen.line(format!("{} {words}", screen.mark(fine)));
    Ok(fine)
}

/// The families that this machine has.
fn families() -> Vec<Family> {
    let works = |family: &Family| std::net::UdpSocket::bind((loopback(*family), 0)).is_ok();
    Family::ALL.into_iter().filter(works).collect()
}

const fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

impl Endpoints {
    /// Lets somebody answer for each endpoint, with its address in the manifests.
    async fn open(fragments: &[Arc<Fragment>]) -> io::Result<Self> {
        let (mut moved, mut answering) = (BTreeMap::new(), JoinSet::new());
        for fragment in fragments {
            let FragmentId { protocol, family, .. } = fragment.id;
            for Member { addr, .. } in fragment.reachable() {
                if protocol == Protocol::Sctp || moved.contains_key(&(addr, protocol)) {
                    continue;
                }
                let at = SocketAddr::new(loopback(family), 0);
                let name = addr.to_string();
                let local = if protocol == Protocol::Udp {
                    let socket = UdpSocket::bind(at).await?;
                    let local = socket.local_addr()?;
                    answering.spawn(answer_datagrams(socket, name));
                    local
                } else {
                    let listener = TcpListener::bind(at).await?;
                    let local = listener.local_addr()?;
                    answering.spawn(answer_connections(listener, name));
                    local
                };
                moved.insert((addr, protocol), local);
            }
        }
        Ok(Self { moved, _answering: answering })
    }

    /// The same Service port, with its endpoints where they are in truth.
    fn moved(&self, fragment: &Fragment) -> Fragment {
        let mut fragment = fragment.clone();
        let protocol = fragment.id.protocol;
        let place = |addr: &mut SocketAddr| {
            *addr = self.moved.get(&(*addr, protocol)).copied().unwrap_or(*addr);
        };
        fragment.serving.iter_mut().for_each(place);
        fragment.serving.sort_unstable();
        for pool in [&mut fragment.cluster, &mut fragment.local] {
            pool.iter_mut().for_each(|member| place(&mut member.addr));
            pool.sort_unstable();
        }
        fragment
    }
}

async fn answer_connections(listener: TcpListener, name: String) {
    let mut open = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        let name = name.clone();
        open.spawn(async move {
            let mut question = [0; 64];
            while let Ok(1..) = stream.read(&mut question).await {
                if stream.write_all(name.as_bytes()).await.is_err() {
                    break;
                }
            }
        });
        while open.try_join_next().is_some() {}
    }
}

async fn answer_datagrams(socket: UdpSocket, name: String) {
    let mut question = [0; 64];
    loop {
        if let Ok((_, from)) = socket.recv_from(&mut question).await {
            // Whoever asked may be gone.
            socket.send_to(name.as_bytes(), from).await.ok();
        }
    }
}

/// Who answers over an open connection; nobody when it is refused.
async fn ask_over(stream: &mut TcpStream) -> Option<String> {
    let mut answer = [0; 64];
    stream.write_all(b"?").await.ok()?;
    let read = timeout(PATIENCE, stream.read(&mut answer)).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(answer.get(..read)?).into_owned();
    (!text.is_empty()).then_some(text)
}

/// Who answers; nobody when it is refused, or lost.
async fn ask(at: SocketAddr, protocol: Protocol, patience: Duration) -> Option<String> {
    if protocol != Protocol::Udp {
        return ask_over(&mut TcpStream::connect(at).await.ok()?).await;
    }
    let socket = UdpSocket::bind((loopback(Family::of(at.ip())), 0)).await.ok()?;
    socket.send_to(b"?", at).await.ok()?;
    let mut answer = [0; 64];
    let read = timeout(patience, socket.recv(&mut answer)).await.ok()?.ok()?;
    Some(String::from_utf8_lossy(answer.get(..read)?).into_owned())
}

/// Who may answer whoever asks from a loopback address; nobody where that is refused.
fn planned<'a>(fragment: &'a Fragment, frontend: &Frontend) -> &'a [Member] {
    let client = loopback(fragment.id.family);
    match frontend.verdicts.node {
        Verdict::Forward { pool, .. }
            if frontend.sources.as_ref().is_none_or(|it| it.admits(client)) =>
        {
            fragment.pool(pool)
        }
        Verdict::Drop | Verdict::Forward { .. } | Verdict::Reject => &[],
    }
}

/// Asks at every frontend of a Service port, as the manifests have it. Returns whether those answered
/// who may, and nobody else.
async fn ask_all(
    fragment: &Fragment,
    monitor: &Monitor,
    connections: usize,
    screen: &mut Screen,
) -> io::Result<bool> {
    let protocol = fragment.id.protocol;
    let (mut items, mut fine) = (Vec::new(), true);
    for frontend in &fragment.frontends {
        let may = planned(fragment, frontend);
        let at = monitor.listeners().get(&frontend.key).copied();
        let (times, patience) =
            if may.is_empty() { (1, SILENCE) } else { (connections.max(1), PATIENCE) };
        let mut answers: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..times {
            let Some(at) = at else { break };
            let who = ask(at, protocol, patience).await;
            *answers.entry(who.unwrap_or_else(|| "nobody".to_owned())).or_default() += 1;
        }
        let nobody = answers.get("nobody").copied().unwrap_or_default();
        let may_answer = |who: &String| may.iter().any(|it| it.addr.to_string() == *who);
        let good = if may.is_empty() {
            nobody == answers.values().sum::<usize>()
        } else {
            !answers.is_empty() && answers.keys().all(may_answer)
        };
        fine &= good;
        let told: Vec<_> = answers.iter().map(|(who, count)| format!("{who} {count}")).collect();
        // The kernel refuses where nobody listens.
        let told = if at.is_some() { told.join(DOT) } else { "refused".to_owned() };
        let place = at.map_or_else(|| "nowhere".to_owned(), |at| at.to_string());
        items.push(Item::Row(vec![frontend.key.to_string(), place, told], Some(good)));
    }
    let about = format!("{}, {}", protocol, many(fragment.reachable().len(), "endpoint"));
    items.insert(0, Item::Heading(fragment.id.to_string(), about));
    screen.table(&items);
    Ok(fine)
}

fn can_lose_one(fragment: &Fragment) -> bool {
    let reachable = fragment.frontends.first().map(|it| planned(fragment, it));
    fragment.id.protocol == Protocol::Tcp
        && fragment.affinity.is_none()
        && reachable.is_some_and(|it| it.len() > 1)
}

/// An endpoint goes while a connection to it is open. Returns whether that lived on, and nobody else
/// was led to it.
async fn lose_one(
    engine: &mut Engine,
    fragment: &Fragment,
    monitor: &Monitor,
    screen: &mut Screen,
) -> Result<bool, Box<dyn Error>> {
    let key = fragment.frontends.first().map(|it| it.key).ok_or("no frontend")?;
    let at = monitor.listeners().get(&key).copied().ok_or("nobody listens")?;
    let mut open = TcpStream::connect(at).await?;
    let before = ask_over(&mut open).await.ok_or("nobody answers")?;
    let active = |addr: SocketAddr| {
        let services = monitor.snapshot().services.into_iter();
        let endpoints = services.filter(|it| it.id == fragment.id).flat_map(|it| it.endpoints);
        endpoints.filter(|it| it.addr == addr).map(|it| it.total.active).sum::<u64>()
    };
    let reachable = fragment.reachable().into_iter();
    let gone = reachable.map(|it| it.addr).find(|addr| active(*addr) > 0);
    let gone = gone.ok_or("no endpoint has a connection")?;
    let mut rest = fragment.clone();
    for pool in [&mut rest.cluster, &mut rest.local] {
        pool.retain(|member| member.addr != gone);
    }
    let changes = vec![Change::Upsert(Arc::new(rest))];
    engine.sync(Update::Delta { revision: Revision(2), node: None, changes }).await?;
    let mut others = 0;
    for _ in 0..10 {
        let who = ask(at, Protocol::Tcp, PATIENCE).await;
        others += usize::from(who.is_some_and(|who| who != before));
    }
    let lives = ask_over(&mut open).await.as_ref() == Some(&before);
    let fine = others == 10 && lives;
    screen.title(&format!("{}: endpoint {before} goes", fragment.id));
    screen.labelled("answers", &format!("10 new connections, {others} elsewhere"));
    let flow = if lives { "goes on" } else { "is broken" };
    screen.labelled("flow", &format!("the connection that was open to it {flow}"));
    Ok(fine)
}

/// What the proxier has counted.
fn counted(monitor: &Monitor, options: &Options, screen: &mut Screen) {
    let snapshot = monitor.snapshot();
    if options.json {
        let document = serde_json::json!({ "mode": "userspace", "counted": snapshot });
        Screen::new(false).line(format!("{document:#}"));
        return;
    }
    let rows = snapshot.services.iter().map(|service| {
        let total = service.total;
        let bytes = format!("{} bytes in, {} out", total.bytes_to_endpoint, total.bytes_to_client);
        let cells = [service.id.to_string(), many_connections(total.opened), bytes];
        Item::Row(cells.into(), None)
    });
    screen.title("counted by Service port (and by endpoint, for whoever asks)");
    screen.table(&rows.collect::<Vec<_>>());
}

fn many_connections(count: u64) -> String {
    many(usize::try_from(count).unwrap_or(usize::MAX), "connection")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};

    #[test]
    fn the_shop_is_proxied_without_any_privilege() {
        let args = ["--library-only", "--connections", "6"];
        let Ok(Command::Run(options)) = parse(args.iter().map(Into::into)) else { panic!() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let fine = runtime.block_on(async {
            let cluster = Cluster::read(&options).unwrap();
            show(&options, &cluster, &mut Screen::new(true)).await.unwrap()
        });
        assert!(fine);
    }
}

//! What packets take: connections from a client through the node to endpoints.
//!
//! ```text
//!             ┌ node: programmed ─┐
//!   client ───┤                   ├─── pods: every endpoint's address
//!             └ bare: no rules  ──┘
//! ```

use std::{
    cell::Cell,
    error::Error,
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use proxier_testkit::lab::{Lab, LabError, Ns, Via};
use rustix::net::sockopt::set_socket_linger;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::LocalSet,
};

use crate::{
    child::{self, Job, Running, Task},
    schema::{Path, Rate, Spread},
    world::{self, PORT, TARGET_PORT, World},
};

/// Connections that are under way at a time when they are counted.
const COPIES: usize = 16;
/// Connects before the first that counts: neighbours, routes and caches.
const WARM_UP: usize = 20;
/// How often each rate is taken.
const RATES: usize = 3;

/// Reached through the router without rules.
const BARE: Ipv4Addr = Ipv4Addr::new(10, 192, 0, 1);

/// Four namespaces, and the endpoints.
pub(crate) struct Course {
    client: Ns,
    node: Ns,
    _responder: Running,
    _lab: Lab,
}

impl Course {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let lab = Lab::new("bench")?;
        let (client, node, bare, pods) =
            (lab.ns("client")?, lab.ns("node")?, lab.ns("bare")?, lab.ns("pods")?);
        wire(&lab, &client, &node, &pods, 254)?;
        wire(&lab, &client, &bare, &pods, 253)?;
        for (prefix, router, number) in [
            ("10.64.0.0/10", None, 254),
            ("10.128.0.0/10", Some(&node), 254),
            ("10.192.0.0/11", Some(&bare), 253),
        ] {
            client.route(prefix, Via::Gateway([10, number, 0, 1].into()))?;
            if let Some(router) = router {
                router.route(prefix, Via::Gateway([10, number, 1, 2].into()))?;
                pods.own(prefix)?;
            }
        }
        client.sysctl("net.ipv4.ip_local_port_range", "12000 65000")?;
        // Absent until something tracks connections. Entries of finished ones would pile up.
        node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1").ok();
        let responder = respond(&pods)?;
        Ok(Self { client, node, _responder: responder, _lab: lab })
    }

    /// The namespace to program.
    pub(crate) fn node(&self) -> &Ns {
        &self.node
    }

    /// Measures through a programmed node.
    pub(crate) fn measure(
        &self,
        world: World,
        connects: usize,
        seconds: f64,
    ) -> Result<Path, Box<dyn Error>> {
        let latency = self.client.run(|| latency(world, connects))??;
        let [bare_us, direct_us, first_us, last_us, random_us] = latency;
        let time = Duration::from_secs_f64(seconds);
        let rate = self.client.run(|| rates(world, time))??;
        Ok(Path { bare_us, direct_us, first_us, last_us, random_us, rate })
    }
}

/// Joins the client with a router, and the router with the endpoints.
fn wire(lab: &Lab, client: &Ns, router: &Ns, pods: &Ns, number: u8) -> Result<(), LabError> {
    let (to_router, to_client, to_pods) = (format!("{}0", router.name()), "up", "down");
    lab.veth((client, &to_router), (router, to_client))?;
    lab.veth((router, to_pods), (pods, &to_router))?;
    client.addr(&to_router, format!("10.{number}.0.2/24"))?;
    router.addr(to_client, format!("10.{number}.0.1/24"))?;
    router.addr(to_pods, format!("10.{number}.1.1/24"))?;
    pods.addr(&to_router, format!("10.{number}.1.2/24"))?;
    router.sysctl("net.ipv4.ip_forward", "1")?;
    let back = format!("10.{number}.0.0/24");
    pods.route(back.as_str(), Via::Gateway([10, number, 1, 1].into()))
}

fn respond(pods: &Ns) -> Result<Running, Box<dyn Error>> {
    let job = Job {
        task: Task::Respond,
        mode: String::new(),
        netns: PathBuf::new(),
        world: World { services: 0, endpoints: 0 },
        part: Duration::ZERO,
    };
    let started = pods.run(|| {
        child::start::<()>(&job, Duration::from_secs(10)).map_err(|error| error.to_string())
    })??;
    Ok(started.ok_or("the endpoints did not come up within 10 s")?.0)
}

/// Services in no order, each about as often.
fn scattered(world: World, round: usize) -> usize {
    round.wrapping_mul(7919).wrapping_add(round / world.services) % world.services
}

fn service(index: usize) -> SocketAddr {
    (world::cluster_ip(index), PORT).into()
}

fn direct(world: World, round: usize) -> SocketAddr {
    (world::endpoint(world, scattered(world, round), 0), TARGET_PORT).into()
}

/// Microseconds of a connect, the five ways in turn.
fn latency(world: World, connects: usize) -> Result<[Spread; 5], io::Error> {
    let mut times: [Vec<f64>; 5] = Default::default();
    for round in 0..connects + WARM_UP {
        let ways: [SocketAddr; 5] = [
            (BARE, TARGET_PORT).into(),
            direct(world, round),
            service(0),
            service(world.services - 1),
            service(scattered(world, round)),
        ];
        for (to, times) in ways.into_iter().zip(&mut times) {
            let began = Instant::now();
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5));
            let us = began.elapsed().as_secs_f64() * 1e6;
            hang_up(&stream.map_err(|error| to_address(to, &error))?)?;
            if round >= WARM_UP {
                times.push(us);
            }
        }
    }
    let spreads = times.map(|times| Spread::of(&times).ok_or(io::ErrorKind::InvalidInput));
    let [bare, direct, first, last, random] = spreads;
    Ok([bare?, direct?, first?, last?, random?])
}

fn to_address(to: SocketAddr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("connecting to {to}: {error}"))
}

/// Closes with a reset, so that neither side keeps anything.
fn hang_up(stream: &impl std::os::fd::AsFd) -> Result<(), io::Error> {
    Ok(set_socket_linger(stream, Some(Duration::ZERO))?)
}

/// Connections in parallel, then one stream; direct and by Services in turn.
fn rates(world: World, time: Duration) -> Result<Vec<Rate>, io::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut samples: [[Vec<f64>; 2]; 2] = Default::default();
    for _ in 0..RATES {
        for (by_service, by_way) in samples.iter_mut().enumerate() {
            let to: Rc<dyn Fn(usize) -> SocketAddr> = match by_service {
                0 => Rc::new(move |round| direct(world, round)),
                _ => Rc::new(move |round| service(scattered(world, round))),
            };
            let stream = to(1);
            let connections = LocalSet::new().block_on(&runtime, connections(to, time))?;
            let bytes = runtime.block_on(one_stream(stream, time))?;
            let per_second = |count: f64| count / time.as_secs_f64();
            for (values, value) in
                by_way.iter_mut().zip([per_second(connections), per_second(bytes) / 1e6])
            {
                values.push(value);
            }
        }
    }
    let [by_direct, by_service] = samples;
    let units = ["connections/s", "MB/s"];
    let rate = |((direct, service), unit): ((Vec<f64>, Vec<f64>), &str)| {
        let (direct, service) = (Spread::of(&direct)?, Spread::of(&service)?);
        Some(Rate { unit: unit.to_owned(), direct, service })
    };
    Ok(by_direct.into_iter().zip(by_service).zip(units).filter_map(rate).collect())
}

#[expect(clippy::cast_precision_loss, reason = "a statistic")]
async fn connections(
    to: Rc<dyn Fn(usize) -> SocketAddr>,
    time: Duration,
) -> Result<f64, io::Error> {
    let (count, began) = (Rc::new(Cell::new(0_usize)), Instant::now());
    let running: Vec<_> = (0..COPIES)
        .map(|copy| {
            let (count, to) = (Rc::clone(&count), Rc::clone(&to));
            tokio::task::spawn_local(async move {
                while began.elapsed() < time {
                    let to = to(count.get() * COPIES + copy);
                    let stream = tokio::net::TcpStream::connect(to).await;
                    hang_up(&stream.map_err(|error| to_address(to, &error))?)?;
                    count.set(count.get() + 1);
                }
                Ok::<_, io::Error>(())
            })
        })
        .collect();
    for task in running {
        task.await.map_err(io::Error::other)??;
    }
    Ok(count.get() as f64)
}

#[expect(clippy::cast_precision_loss, reason = "a statistic")]
async fn one_stream(to: SocketAddr, time: Duration) -> Result<f64, io::Error> {
    let connected = tokio::net::TcpStream::connect(to).await;
    let mut stream = connected.map_err(|error| to_address(to, &error))?;
    stream.write_all(b"?").await?;
    let (mut buffer, mut bytes, began) = (vec![0; 256 << 10], 0, Instant::now());
    while began.elapsed() < time {
        bytes += stream.read(&mut buffer).await?;
    }
    hang_up(&stream)?;
    Ok(bytes as f64)
}

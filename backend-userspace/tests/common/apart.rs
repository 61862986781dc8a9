//! Processes of their own, so that their descriptors and memory can be looked at, and limited.
//!
//! A test binary that starts some has a test that calls [`be_one`]: the process that is started is the
//! same binary with that test alone, and ends with its standard input.
#![allow(clippy::panic, clippy::print_stdout, reason = "any failure fails the test")]

use std::{
    io::{BufRead, BufReader, Lines, Write},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use proxier_core::Protocol;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Proxy, Server, descriptors, resident_kib};

/// Says what a process is to be: how many descriptors it may have, and the endpoints it proxies for.
const ROLE: &str = "PROXIER_TEST_APART";

/// A process.
pub struct Apart {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    /// Where it listens.
    pub at: Vec<SocketAddr>,
}

/// What a proxier has.
#[derive(Clone, Copy, Debug)]
pub struct Has {
    pub active: u64,
    pub descriptors: usize,
    pub resident_kib: usize,
    pub accept_pauses: u64,
}

/// Lets this process have so many descriptors, or as many as it may: says how many.
pub fn allow(descriptors: u64) -> u64 {
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let set = |to| {
        let limit = Rlimit { current: Some(to), maximum: Some(to) };
        setrlimit(Resource::Nofile, limit).is_ok().then_some(to)
    };
    // More than it may have is a privilege that not even every root has.
    set(descriptors).or_else(|| set(descriptors.min(hard))).unwrap()
}

impl Apart {
    /// A proxier for these endpoints.
    pub fn proxier(test: &str, descriptors: u64, endpoints: &[SocketAddr]) -> Self {
        let endpoints: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
        Self::start(test, &format!("{descriptors} {}", endpoints.join(" ")))
    }

    /// Four endpoints that send back what they receive.
    pub fn endpoints(test: &str, descriptors: u64) -> Self {
        Self::start(test, &descriptors.to_string())
    }

    fn start(test: &str, role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let at = line(&mut lines, "at ").split(' ').map(|it| it.parse().unwrap()).collect();
        Self { child, input, lines, at }
    }

    /// What it has.
    pub fn has(&mut self) -> Has {
        writeln!(self.input.as_mut().unwrap()).unwrap();
        let line = line(&mut self.lines, "has ");
        let figures: Vec<u64> = line.split(' ').map(|it| it.parse().unwrap()).collect();
        let [active, descriptors, resident_kib, accept_pauses] = figures[..] else {
            panic!("{line}")
        };
        let [descriptors, resident_kib] =
            [descriptors, resident_kib].map(|it| usize::try_from(it).unwrap());
        Has { active, descriptors, resident_kib, accept_pauses }
    }

    /// Ends it; it must not have failed.
    pub fn end(mut self) {
        drop(self.input.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // It may have ended before.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn line(lines: &mut Lines<BufReader<ChildStdout>>, prefix: &str) -> String {
    let found = lines.find_map(|line| Some(line.ok()?.strip_prefix(prefix)?.to_owned()));
    found.unwrap_or_else(|| panic!("the process ended before it said {prefix:?}"))
}

/// Is what the environment says, until standard input ends. Nothing when it says nothing: then this is
/// the test that nobody asked for.
pub fn be_one() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut words = role.split(' ');
    allow(words.next().unwrap().parse().unwrap());
    let endpoints: Vec<SocketAddr> = words.map(|it| it.parse().unwrap()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if endpoints.is_empty() {
        let servers = runtime.block_on(async {
            [small_echo().await, small_echo().await, small_echo().await, small_echo().await]
        });
        println!("\nat {}", servers.each_ref().map(|it| it.addr.to_string()).join(" "));
        std::io::stdin().lines().for_each(drop);
        return;
    }
    let (proxy, at) = runtime.block_on(Proxy::serving(Protocol::Tcp, &endpoints, |_| {}));
    println!("\nat {at}");
    for line in std::io::stdin().lines() {
        line.unwrap();
        let pauses = proxy.monitor.snapshot().accept_pauses;
        println!("has {} {} {} {pauses}", proxy.active(), descriptors(), resident_kib());
    }
}

/// Sends back what it receives, without a large buffer for each connection.
async fn small_echo() -> Server {
    Server::new(async |mut stream: TcpStream| {
        let mut buffer = [0; 64];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            if stream.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
    })
    .await
}

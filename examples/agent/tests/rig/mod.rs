//! The agent as a process, in a namespace of a lab.
#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test harness: any failure fails the test"
)]
#![allow(dead_code, reason = "not every test file needs everything")]

mod site;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::Duration,
};

use proxier_testkit::{eventually, lab::Ns};

#[allow(unused_imports, reason = "not every test file needs everything")]
pub(crate) use site::{A, B, Site, config};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The agent's binary, built when it is not there or not new.
pub(crate) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let output = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--example", "agent", "--message-format=json"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo can be run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let messages = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        let path = messages
            .filter(|message: &serde_json::Value| message["target"]["name"] == "agent")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from));
        path.expect("cargo names the executable")
    })
}

/// Runs the agent to its end, in this namespace.
pub(crate) fn ask(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Runs the agent to its end, in a namespace of a lab.
pub(crate) fn ask_in(ns: &Ns, args: &[&str]) -> Output {
    ns.run(|| ask(args)).unwrap()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    // Whoever runs the tests may have a cluster.
    command.args(args).env_remove("KUBECONFIG").env_remove("KUBERNETES_SERVICE_HOST");
    command.env("HOME", "/nonexistent");
    command
}

/// A running agent. Killed when the value goes.
pub(crate) struct Agent {
    child: Child,
    ns: Ns,
    log: PathBuf,
}

impl Agent {
    /// Starts it in a namespace, without what the namespace does not allow (host-wide sysctls).
    pub(crate) fn start(ns: &Ns, folder: &Folder, args: &[&str]) -> Self {
        let log = folder.0.join("log");
        let file = fs::File::options().create(true).append(true).open(&log).unwrap();
        let child = ns.run(|| {
            Command::new(binary())
                .args(["--log-level=debug", "--hostname-override=tern"])
                .args(args)
                .stdin(Stdio::null())
                .stderr(Stdio::from(file))
                .spawn()
        });
        Self { child: child.unwrap().unwrap(), ns: ns.clone(), log }
    }

    /// Status and body.
    pub(crate) fn get(&self, at: &str) -> Option<(u16, String)> {
        get(&self.ns, at)
    }

    pub(crate) fn metric(&self, line: &str) -> Option<f64> {
        let (_, text) = self.get("127.0.0.1:10249/metrics")?;
        text.lines().find_map(|it| it.strip_prefix(line)?.trim().parse().ok())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the agent has programmed what it read first.
    pub(crate) fn wait_started(&self) {
        self.wait("the agent to start", || {
            self.metric("proxier_source_started") == Some(1.0)
                && self.get("127.0.0.1:10256/healthz").is_some_and(|(status, _)| status == 200)
                && self.metric("proxier_commit_duration_seconds_count").is_some_and(|it| it > 0.0)
        });
    }

    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> bool) {
        if let Err(error) = eventually(PATIENCE, what, condition) {
            panic!("{error}\n{}", self.log());
        }
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end(mut self, signal: rustix::process::Signal) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
        let mut status = None;
        let ended = eventually(PATIENCE, "the agent to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(ended.is_ok(), "{ended:?}\n{}", self.log());
        status.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Asks an HTTP server in a namespace: `ADDRESS:PORT/PATH`.
pub(crate) fn get(ns: &Ns, at: &str) -> Option<(u16, String)> {
    let (server, path) = at.split_once('/').unwrap_or((at, ""));
    let server: SocketAddr = server.parse().unwrap();
    let text = ns.run(|| -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    let text = text.unwrap().ok()?;
    let status = text.split(' ').nth(1)?.parse().ok()?;
    Some((status, text))
}

/// A directory that goes when the test ends.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("proxier-agent-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

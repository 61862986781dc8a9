//! A network namespace for each test, and the tools that list what is in it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::process::Command;

use proxier_netlink::NetNs;
use proxier_netlink::nft::{NftSocket, Transaction};

pub(crate) struct Lab {
    pub(crate) ns: NetNs,
    pub(crate) sock: NftSocket,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let ns = NetNs::create().expect("a network namespace: run the tests as root");
        let sock = NftSocket::open(&ns).unwrap();
        Self { ns, sock }
    }

    /// Commits what `build` adds, and panics with the whole error if that fails.
    pub(crate) async fn apply(&mut self, build: impl FnOnce(&mut Transaction)) -> Vec<u64> {
        let mut tx = Transaction::new();
        build(&mut tx);
        match self.sock.commit(&tx).await {
            Ok(committed) => committed.handles.iter().map(|h| h.handle).collect(),
            Err(error) => panic!("{error}\n{error:?}\n{}", self.run("nft list ruleset")),
        }
    }

    /// Runs a command in the namespace and gives its output.
    pub(crate) fn run(&self, line: &str) -> String {
        let out = self.ns.run(|| Command::new("sh").args(["-c", line]).output()).unwrap().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "`{line}`: {}\n{text}{errors}", out.status);
        text
    }
}

//! Without any privilege: listening at named addresses works, capturing says why it does not.
//!
//! Root becomes nobody first, in a process of its own without capabilities.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "any failure fails the test"
)]

mod common;

use std::{os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use common::*;
use proxier_backend_userspace::{Config, Method, engine, probe};
use proxier_core::{Family, Protocol};
use proxier_netlink::NetNs;
use tokio::net::UdpSocket;

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn whoever_has_no_privilege_can_proxy_at_named_addresses() {
    if !rustix::process::geteuid().is_root() {
        return work();
    }
    // Nobody may not be allowed to go where this program is.
    let here = Scratch(std::env::temp_dir().join(format!("unprivileged-{}", std::process::id())));
    std::fs::create_dir(&here.0).unwrap();
    std::fs::set_permissions(&here.0, PermissionsExt::from_mode(0o755)).unwrap();
    let program = here.0.join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"])
        .args(["--bounding-set=-all", "--inh-caps=-all", "--"])
        .arg(&program)
        .args(["--exact", "whoever_has_no_privilege_can_proxy_at_named_addresses", "--nocapture"])
        .current_dir(&here.0)
        .output()
        .expect("setpriv, of util-linux");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("served without any privilege"), "{said}");
}

/// What the process without privileges does.
fn work() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let found = probe(&NetNs::Current, Method::Auto, &Family::ALL).await;
        let reasons = found.reasons.join("\n");
        assert!(!found.available && reasons.contains("Listen::Addresses"), "{reasons}");
        assert!(reasons.contains("CAP_NET_ADMIN"), "{reasons}");
        let error = engine(&Config::default(), &NetNs::Current, &Family::ALL).unwrap_err();
        assert!(error.to_string().contains("userspace mode"), "{error}");

        let echo = Server::echo().await;
        let (proxy, at) = Proxy::serving(Protocol::Tcp, &[echo.addr], |_| {}).await;
        assert!(ask(at).await);
        drop(proxy);
        let server = datagram_server().await;
        let (_proxy, at) = Proxy::serving(Protocol::Udp, &[server.addr], |_| {}).await;
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"?", at).await.unwrap();
        let mut buffer = [0; 64];
        let answer = tokio::time::timeout(PATIENCE, client.recv_from(&mut buffer)).await;
        let (bytes, from) = answer.unwrap().unwrap();
        assert_eq!((&buffer[..bytes], from), (server.addr.port().to_string().as_bytes(), at));
    });
    println!("served without any privilege");
}

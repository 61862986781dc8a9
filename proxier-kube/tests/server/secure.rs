//! TLS, and the ways to say who asks.

use std::{fs, path::PathBuf};

use proxier_kube::{Connection, TroubleKind};
use proxier_testkit::apiserver::{ApiServer, Authority};
use serde_json::{Value, json};

use crate::rig::{BOOKMARKS, Rig, filled, options};

/// Files of a test; gone with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("proxier-kube-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

async fn secure(authority: &Authority) -> ApiServer {
    filled(ApiServer::start_secure(BOOKMARKS, authority).await.unwrap())
}

/// A kubeconfig that trusts an authority and says who asks.
fn connection(
    folder: &Folder,
    server: &ApiServer,
    trusted: &Authority,
    user: &Value,
) -> Connection {
    let authority = folder.write("ca.crt", &trusted.certificate());
    let cluster = json!({"server": server.url(), "certificate-authority": authority});
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    Connection::new(Some(folder.write("kubeconfig", &config.to_string())))
}

/// An exec plugin that prints a credential.
fn plugin(folder: &Folder, name: &str, status: &Value) -> Value {
    const VERSION: &str = "client.authentication.k8s.io/v1";
    let credential = json!({"kind": "ExecCredential", "apiVersion": VERSION, "status": status});
    let path = folder.write(name, &credential.to_string());
    json!({"exec": {"apiVersion": VERSION, "command": "cat", "args": [path],
        "interactiveMode": "Never"}})
}

#[tokio::test]
async fn every_credential_opens_the_door() {
    let authority = Authority::new().unwrap();
    let folder = Folder::new("door");
    let own = authority.issue("system:node-proxier", &[]).unwrap();
    let (certificate, key) =
        (folder.write("tls.crt", &own.certificate), folder.write("tls.key", &own.key));
    let pair = json!({"clientCertificateData": own.certificate, "clientKeyData": own.key});
    let users = [
        json!({"client-certificate": certificate, "client-key": key}),
        json!({"token": "letmein"}),
        json!({"tokenFile": folder.write("token", "letmein")}),
        plugin(&folder, "token.json", &json!({"token": "letmein"})),
        plugin(&folder, "pair.json", &pair),
    ];
    for user in users {
        let server = secure(&authority).await;
        server.accept_tokens(&["letmein"]);
        let client = connection(&folder, &server, &authority, &user).client().await.unwrap();
        let rig = Rig::start_as(client, server, "node-a", options(true));
        rig.until_equal().await;
    }
}

#[tokio::test]
async fn a_token_that_expires_is_replaced() {
    let authority = Authority::new().unwrap();
    let folder = Folder::new("expiry");
    let server = secure(&authority).await;
    server.accept_tokens(&["first"]);
    // About to expire, always: so it is asked for again each time.
    let status = |token| json!({"token": token, "expirationTimestamp": "2026-01-01T00:00:00Z"});
    let user = plugin(&folder, "token.json", &status("first"));
    let client = connection(&folder, &server, &authority, &user).client().await.unwrap();
    let rig = Rig::start_as(client, server, "node-a", options(true));
    rig.until_equal().await;
    rig.server.accept_tokens(&["second"]);
    rig.server.cut();
    let unauthorized = |rig: &Rig| {
        let status = rig.status.borrow();
        status.troubles().any(|(_, it)| it.trouble.kind == TroubleKind::Unauthorized)
    };
    rig.until("the old token to be refused", unauthorized).await;
    assert!(!rig.services().is_empty(), "what was known stays");
    plugin(&folder, "token.json", &status("second"));
    rig.until("all well", |rig| rig.status.borrow().troubles().next().is_none()).await;
    rig.until_equal().await;
}

#[tokio::test]
async fn who_is_not_who_he_says_is_told_why() {
    let (authority, other) = (Authority::new().unwrap(), Authority::new().unwrap());
    let folder = Folder::new("refused");
    let forged = other.issue("system:node-proxier", &[]).unwrap();
    let certificate = folder.write("forged.crt", &forged.certificate);
    let forged = json!({"client-certificate": certificate,
        "client-key": folder.write("forged.key", &forged.key)});
    let cases = [
        (&other, json!({"token": "letmein"}), TroubleKind::Unreachable, "certificate-authority"),
        (&authority, json!({"token": "guess"}), TroubleKind::Unauthorized, "credentials"),
        (&authority, json!({}), TroubleKind::Unauthorized, "credentials"),
        (&authority, forged, TroubleKind::Unauthorized, "client certificate"),
    ];
    for (trusted, user, kind, words) in cases {
        let server = secure(&authority).await;
        server.accept_tokens(&["letmein"]);
        let client = connection(&folder, &server, trusted, &user).client().await.unwrap();
        let rig = Rig::start_as(client, server, "node-a", options(true));
        rig.until(words, |rig| {
            let status = rig.status.borrow();
            let mut troubles = status.troubles().map(|(_, it)| &it.trouble);
            troubles.any(|it| it.kind == kind && it.to_string().contains(words))
        })
        .await;
        assert!(!rig.status.borrow().started);
    }
}

//! Our rules are, byte for byte, what iptables-nft makes of the same text.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test"
)]

mod common;

use std::collections::BTreeMap;

use common::*;
use proxier_backend_iptables::{Config, Layout};
use proxier_core::Family;
use proxier_netlink::nft::{self, Expr, NftSocket, RuleFilter};

/// Every rule's expressions, in words, with the bytes of extensions.
type Rules = BTreeMap<(String, String), Vec<Vec<String>>>;

/// The rules as the kernel has them, by table and chain, in order.
async fn expressions(ns: &Ns, family: Family) -> Rules {
    let family = match family {
        Family::V4 => nft::Family::Ipv4,
        Family::V6 => nft::Family::Ipv6,
    };
    let mut socket = NftSocket::open(&ns.0).unwrap();
    socket
        .fold_rules(RuleFilter::family(family), BTreeMap::new, |all, rule| {
            let at = (rule.table.to_string(), rule.chain.to_string());
            let exprs = rule.exprs().map(|expr| in_words(&expr)).collect();
            Rules::entry(all, at).or_default().push(exprs);
        })
        .await
        .unwrap()
}

/// An expression with the bytes of an extension as ranges that are not zero.
fn in_words(expr: &Expr<'_>) -> String {
    let (Expr::Match(it) | Expr::Target(it)) = expr else { return format!("{expr:?}") };
    let set = it.info.iter().enumerate().filter(|(_, byte)| **byte != 0);
    let bytes: Vec<_> = set.map(|(at, byte)| format!("{at}:{byte:02x}")).collect();
    format!("{} rev {} of {} bytes: {}", it.name, it.rev, it.info.len(), bytes.join(" "))
}

fn assert_equal(ours: &Rules, theirs: &Rules) {
    for (chain, theirs) in theirs {
        let ours = ours.get(chain).unwrap_or_else(|| panic!("no chain {chain:?}"));
        for (ours, theirs) in ours.iter().zip(theirs) {
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert_eq!(ours, theirs, "{chain:?}");
            }
            assert_eq!(ours.len(), theirs.len(), "{chain:?}: {ours:#?} {theirs:#?}");
        }
        assert_eq!(ours.len(), theirs.len(), "{chain:?}");
    }
}

/// What `iptables-nft-restore` has to be fed to make the same rules.
fn restore_input(ns: &Ns, family: Family) -> String {
    let mut input = String::new();
    for table in ["filter", "nat"] {
        input.push_str(&format!("*{table}\n"));
        let listing = ns.run(tool(family), &["-t", table, "-S"]);
        for line in listing.lines() {
            if let Some(chain) = line.strip_prefix("-N ") {
                input.push_str(&format!(":{chain} - [0:0]\n"));
            }
        }
        for line in listing.lines().filter(|line| line.starts_with("-A")) {
            // Given the mask that it lists by default, iptables stores only the family's part of it.
            let line = line.replace(" --mask 255.255.255.255", "");
            input.push_str(&format!("{line}\n"));
        }
        input.push_str("COMMIT\n");
    }
    input
}

#[tokio::test]
async fn iptables_makes_the_same_bytes_of_the_same_text() {
    let worlds = [
        (env(), Layout::Tree),
        (env(), Layout::KubeProxy),
        (other_env(), Layout::Tree),
        (blind_env(), Layout::Tree),
    ];
    for (env, layout) in worlds {
        let (ours, theirs) = (Ns::new(), Ns::new());
        let mut engine = ours.engine_with(Config::default().exact(true).layout(layout));
        let (_, update) = store(env, EVERYTHING);
        sync(&mut engine, update).await;
        for family in Family::ALL {
            let input = restore_input(&ours, family);
            let restore = format!("{}-restore", tool(family));
            theirs.feed(&restore, &["--noflush"], &input);
            for table in ["filter", "nat"] {
                assert_eq!(ours.listing(family, table), theirs.listing(family, table));
            }
            let (ours, theirs) =
                (expressions(&ours, family).await, expressions(&theirs, family).await);
            assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
            assert_equal(&ours, &theirs);
        }
    }
}

/// What kube-proxy restores for the worked example, without its packet counters.
const KUBE_PROXY: &str = r#"*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A KUBE-NODEPORTS -m comment --comment "edge/near:api health check node port" -m tcp -p tcp --dport 32011 -j ACCEPT
-A KUBE-PROXY-FIREWALL -m comment --comment "edge/near:api traffic not accepted by KUBE-FW-QDFYEKLMT6VVGSSH" -m tcp -p tcp -d 203.0.113.41 --dport 80 -j DROP
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-QDFYEKLMT6VVGSSH - [0:0]
:KUBE-SVL-QDFYEKLMT6VVGSSH - [0:0]
:KUBE-EXT-QDFYEKLMT6VVGSSH - [0:0]
:KUBE-FW-QDFYEKLMT6VVGSSH - [0:0]
:KUBE-SEP-OPWUWBMMUIEBWKRW - [0:0]
:KUBE-SEP-4MTSZDFYLCDGS7HV - [0:0]
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
-A KUBE-SERVICES -m comment --comment "edge/near:api cluster IP" -m tcp -p tcp -d 10.97.1.11 --dport 80 -j KUBE-SVC-QDFYEKLMT6VVGSSH
-A KUBE-SERVICES -m comment --comment "edge/near:api external IP" -m tcp -p tcp -d 198.51.100.71 --dport 80 -j KUBE-EXT-QDFYEKLMT6VVGSSH
-A KUBE-SERVICES -m comment --comment "edge/near:api loadbalancer IP" -m tcp -p tcp -d 203.0.113.41 --dport 80 -j KUBE-FW-QDFYEKLMT6VVGSSH
-A KUBE-NODEPORTS -m comment --comment edge/near:api -m tcp -p tcp --dport 31011 -j KUBE-EXT-QDFYEKLMT6VVGSSH
-A KUBE-SVC-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api cluster IP" -m tcp -p tcp -d 10.97.1.11 --dport 80 ! -s 10.61.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-EXT-QDFYEKLMT6VVGSSH -m comment --comment "pod traffic for edge/near:api external destinations" -s 10.61.0.0/16 -j KUBE-SVC-QDFYEKLMT6VVGSSH
-A KUBE-EXT-QDFYEKLMT6VVGSSH -m comment --comment "masquerade LOCAL traffic for edge/near:api external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A KUBE-EXT-QDFYEKLMT6VVGSSH -m comment --comment "route LOCAL traffic for edge/near:api external destinations" -m addrtype --src-type LOCAL -j KUBE-SVC-QDFYEKLMT6VVGSSH
-A KUBE-EXT-QDFYEKLMT6VVGSSH -j KUBE-SVL-QDFYEKLMT6VVGSSH
-A KUBE-FW-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api loadbalancer IP" -s 192.0.2.48/28 -j KUBE-EXT-QDFYEKLMT6VVGSSH
-A KUBE-FW-QDFYEKLMT6VVGSSH -m comment --comment "other traffic to edge/near:api will be dropped by KUBE-PROXY-FIREWALL"
-A KUBE-SVC-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.3.32:9000" -m recent --name KUBE-SEP-OPWUWBMMUIEBWKRW --rcheck --seconds 600 --reap -j KUBE-SEP-OPWUWBMMUIEBWKRW
-A KUBE-SVC-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.4.32:9000" -m recent --name KUBE-SEP-4MTSZDFYLCDGS7HV --rcheck --seconds 600 --reap -j KUBE-SEP-4MTSZDFYLCDGS7HV
-A KUBE-SVC-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.3.32:9000" -m statistic --mode random --probability 0.5000000000 -j KUBE-SEP-OPWUWBMMUIEBWKRW
-A KUBE-SVC-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.4.32:9000" -j KUBE-SEP-4MTSZDFYLCDGS7HV
-A KUBE-SVL-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.3.32:9000" -m recent --name KUBE-SEP-OPWUWBMMUIEBWKRW --rcheck --seconds 600 --reap -j KUBE-SEP-OPWUWBMMUIEBWKRW
-A KUBE-SVL-QDFYEKLMT6VVGSSH -m comment --comment "edge/near:api -> 10.61.3.32:9000" -j KUBE-SEP-OPWUWBMMUIEBWKRW
-A KUBE-SEP-OPWUWBMMUIEBWKRW -m comment --comment edge/near:api -s 10.61.3.32 -j KUBE-MARK-MASQ
-A KUBE-SEP-OPWUWBMMUIEBWKRW -m comment --comment edge/near:api -m recent --name KUBE-SEP-OPWUWBMMUIEBWKRW --set -m tcp -p tcp -j DNAT --to-destination 10.61.3.32:9000
-A KUBE-SEP-4MTSZDFYLCDGS7HV -m comment --comment edge/near:api -s 10.61.4.32 -j KUBE-MARK-MASQ
-A KUBE-SEP-4MTSZDFYLCDGS7HV -m comment --comment edge/near:api -m recent --name KUBE-SEP-4MTSZDFYLCDGS7HV --set -m tcp -p tcp -j DNAT --to-destination 10.61.4.32:9000
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"#;

#[tokio::test]
async fn the_worked_example_is_what_kube_proxy_restores() {
    let (ours, theirs_ns) = (Ns::new(), Ns::new());
    let exact = Config::default().exact(true).layout(Layout::KubeProxy);
    let mut engine = ours.engine_with(exact.clone());
    let (_, update) = store(env(), WORKED_EXAMPLE);
    sync(&mut engine, update).await;
    theirs_ns.feed("iptables-nft-restore", &["--noflush", "--counters"], KUBE_PROXY);
    let (ours, theirs) =
        (expressions(&ours, Family::V4).await, expressions(&theirs_ns, Family::V4).await);
    assert_equal(&ours, &theirs);
    // Taking it over writes the marks, and what the excerpt leaves out.
    let (mut engine, update) =
        (theirs_ns.engine_with(exact.takeover(true)), store(env(), WORKED_EXAMPLE).1);
    let report = sync(&mut engine, update).await;
    assert_eq!((report.ops.set, report.ops.del), (1, 0), "{report:?}");
    let service_chains = |all: &Rules| -> Vec<_> {
        all.keys().filter(|(_, chain)| chain.len() > 23).cloned().collect()
    };
    assert_eq!(service_chains(&ours), service_chains(&theirs));
}

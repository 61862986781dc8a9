//! The benchmark suite works: a quick run of tiny worlds writes a whole report.
#![expect(clippy::unwrap_used, reason = "any failure fails the test")]

use std::{path::PathBuf, process::Command};

use proxier_testkit::require_lab;
use serde_json::Value;

/// The example, which `cargo test` builds beside the tests; built here when only this test is.
fn bench() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples/bench");
    if !binary.exists() {
        let build = ["build", "--quiet", "--package", "proxier-bench", "--example", "bench"];
        assert!(Command::new(env!("CARGO")).args(build).status().unwrap().success());
    }
    binary
}

#[test]
fn a_quick_run_writes_a_whole_report() {
    require_lab!();
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench-report");
    let arguments = ["--quick", "--sizes", "4,12", "--rolling", "8", "--soak", "40"];
    let output =
        Command::new(bench()).args(arguments).arg("--report").arg(&directory).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");

    let json = std::fs::read_to_string(directory.join("results.json")).unwrap();
    let report: Value = serde_json::from_str(&json).unwrap();
    let at = |pointer: &str| report.pointer(pointer).unwrap_or_else(|| panic!("{pointer}: {json}"));
    assert_eq!(at("/schema"), "proxier-bench/1");
    assert!(!json.contains("failed:"), "{json}");
    assert_eq!(at("/worlds/0/services"), 4);
    assert_eq!(at("/worlds/1/services"), 12);
    let mut modes = 0;
    for contender in at("/worlds/1/contenders").as_array().unwrap() {
        let number = |pointer: &str| {
            let value = contender.pointer(pointer).and_then(Value::as_f64);
            value.unwrap_or_else(|| panic!("{pointer}: {contender:#}"))
        };
        let times = ["/control/first_sync_ms/p50", "/control/change_us/p99", "/path/last_us/p50"];
        for pointer in times {
            assert!(number(pointer) > 0.0, "{pointer}: {contender:#}");
        }
        if contender["kind"] == "mode" {
            modes += 1;
            assert!(number("/control/objects") >= 12.0);
            assert_eq!(number("/control/rolling/steps"), 8.0);
            if contender["name"] != "userspace" {
                assert_eq!(number("/control/restart_ops"), 0.0);
                assert_eq!(number("/control/restart_commits"), 0.0);
            }
        }
    }
    assert!(modes >= 2, "{errors}");
    for soak in at("/soaks").as_array().unwrap() {
        assert_eq!(soak["repaired"], 0, "{soak}");
    }

    // An earlier report can be shown again, and pictures are whole documents.
    let again = directory.join("again");
    let from = directory.join("results.json");
    let output = Command::new(bench()).arg("--from").arg(from).arg("--report").arg(&again).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let summary = std::fs::read_to_string(again.join("summary.md")).unwrap();
    assert!(summary.contains("| `nftables` |"), "{summary}");
    let picture = std::fs::read_to_string(again.join("first-sync.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    let page = std::fs::read_to_string(again.join("index.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("prefers-color-scheme"));
    assert!(!page.contains("http-equiv") && !page.contains("<script"), "the page is alone");
}

//! Nothing is left behind: no link, no namespace, no thread, no file. One test, since it counts
//! what the whole process has.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use proxier_testkit::lab::{Lab, LabError, Ns};
use proxier_testkit::topology::Topology;
use proxier_testkit::traffic::{Endpoint, Responder};
use proxier_testkit::{eventually, require_lab};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Traces {
    links: BTreeSet<String>,
    named_namespaces: usize,
    sysctls: Vec<String>,
    threads: usize,
    files: usize,
}

impl Traces {
    /// The same state outside the process, and no more threads and files. Fewer are possible: a
    /// thread that was joined just before is counted for a moment longer.
    fn no_more_than(&self, before: &Self) -> bool {
        let Self { links, named_namespaces, sysctls, threads, files } = self;
        (links, named_namespaces, sysctls)
            == (&before.links, &before.named_namespaces, &before.sysctls)
            && *threads <= before.threads
            && *files <= before.files
    }
}

/// What this process and the namespace it runs in have.
fn traces() -> Traces {
    let count = |dir| fs::read_dir(dir).map_or(0, Iterator::count);
    let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let names = links.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    let sysctls = ["net/ipv4/ip_forward", "net/ipv4/icmp_ratelimit", "net/ipv4/conf/all/rp_filter"];
    Traces {
        links: names.collect(),
        named_namespaces: count("/run/netns"),
        sysctls: sysctls
            .map(|key| fs::read_to_string(format!("/proc/sys/{key}")).unwrap_or_default())
            .to_vec(),
        threads: count("/proc/self/task"),
        files: count("/proc/self/fd"),
    }
}

/// Builds a world with a responder, and a link into `witness` that lasts as long as the world.
fn build_and_leave(witness: &Ns, end: impl FnOnce()) -> Result<(), LabError> {
    let world = Topology::standard().build("brief")?;
    world.lab().veth((world.node(), "w0"), (witness, "w0"))?;
    let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
    let endpoints = (8000..8100).map(|port| Endpoint::tcp("pod_a", any(port)));
    let _responder = Responder::start(&world.ns("pod_a")?, endpoints)?;
    assert!(witness.links()?.contains(&"w0".to_owned()));
    end();
    Ok(())
}

#[test]
fn a_lab_leaves_nothing_behind_even_after_a_panic() {
    require_lab!();
    // The first runtime of a process may open files that last, for signals.
    drop(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let before = traces();
    let witness_lab = Lab::new("witness").unwrap();
    let witness = witness_lab.ns("witness").unwrap();
    let with_witness = traces();
    for panics in [false, true] {
        let build = || {
            let end = || assert!(!panics, "this panic belongs to the test");
            build_and_leave(&witness, end).unwrap();
        };
        let outcome = std::thread::scope(|scope| scope.spawn(build).join());
        assert_eq!(outcome.is_err(), panics);
        // A link of the world's in the witness goes when the world's namespace is really gone.
        let gone = || !witness.links().unwrap().contains(&"w0".to_owned());
        eventually(PATIENCE, "the kernel frees the namespaces", gone).unwrap();
        eventually(PATIENCE, "threads and files are gone", || traces().no_more_than(&with_witness))
            .unwrap_or_else(|overdue| panic!("{overdue}: {:?} != {with_witness:?}", traces()));
    }
    drop(witness_lab);
    let late = witness.block_on(async {}).unwrap_err();
    assert!(matches!(late, LabError::Ended { .. }), "{late}");
    // The handle still holds the namespace, and can enter it.
    assert!(witness.run(|| ()).is_ok());
    drop(witness);
    eventually(PATIENCE, "everything is as before", || traces().no_more_than(&before))
        .unwrap_or_else(|overdue| panic!("{overdue}: {:?} != {before:?}", traces()));

    let lab = Lab::new("kept").unwrap();
    let ns = lab.ns("one").unwrap();
    lab.keep();
    drop(lab);
    assert!(ns.block_on(async {}).is_ok(), "a kept lab lasts as long as the process");
    assert!(ns.path().exists());
}

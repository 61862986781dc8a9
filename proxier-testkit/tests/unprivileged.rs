//! An ordinary user gets a lab through `lab::enter()`.
//!
//! Without the usual harness, since the harness has threads and `enter` must come before any. As
//! root, the test starts itself again as a user without privileges; otherwise it takes the user
//! that runs it.

use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use proxier_testkit::lab::{self, Entered, Why};
use proxier_testkit::topology::Topology;
use proxier_testkit::traffic::{Endpoint, How, ProbeSpec, Responder, probe};

type Outcome = Result<(), Box<dyn Error>>;

/// Which part this process plays.
const PART: &str = "PROXIER_TESTKIT_PART";
const NOBODY: u32 = 65534;

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the test's own harness")]
fn main() -> Outcome {
    match std::env::var(PART).as_deref() {
        Ok("user") => return user(),
        Ok("threads") => return with_threads(),
        Ok("gate") => {
            println!("runs: {}", lab::gate());
            return Ok(());
        }
        _ => {}
    }
    let skip = std::env::var("PROXIER_NETNS").as_deref() == Ok("skip");
    match parent() {
        Ok(()) => println!("test an_ordinary_user_gets_a_lab ... ok"),
        Err(error) if skip => eprintln!("SKIPPED, no user namespaces: {error}"),
        Err(error) => return Err(error),
    }
    Ok(())
}

fn parent() -> Outcome {
    let is_root = std::fs::metadata("/proc/self").map(|own| own.uid() == 0)?;
    // The build folder may be closed to others.
    let copy = std::env::temp_dir().join(format!("proxier-testkit-{}", std::process::id()));
    std::fs::copy(std::env::current_exe()?, &copy)?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
    let outcome = both_parts(&copy, is_root);
    std::fs::remove_file(&copy)?;
    outcome
}

fn both_parts(program: &Path, is_root: bool) -> Outcome {
    let start = |program: &Path, part: &str| {
        let mut command = Command::new(program);
        command.env(PART, part).current_dir("/");
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    let threads = start(program, "threads").status()?;
    assert!(threads.success(), "enter() with threads: {threads}");

    for (setting, passes, says) in [
        ("require", false, "run as root, or under `unshare -Urnm`"),
        ("skip", true, "SKIPPED"),
        ("perhaps", false, "must be `require` or `skip`"),
    ] {
        let gate = start(program, "gate").env("PROXIER_NETNS", setting).output()?;
        let said = String::from_utf8_lossy(&gate.stderr).into_owned();
        assert_eq!(gate.status.success(), passes, "{setting}: {said}");
        assert!(said.contains(says), "{setting}: {said}");
        assert!(!passes || gate.stdout.starts_with(b"runs: false"), "{setting}");
    }

    let mut user = start(program, "user");
    let mut child = user.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().ok_or("a pipe")?;
    let hint = BufReader::new(stdout).lines().next().ok_or("the user's part failed")??;
    // The same user can look into the namespace from outside.
    let words: Vec<_> = hint.split_whitespace().chain(["cat", "/proc/net/dev"]).collect();
    let (nsenter, args) = words.split_first().ok_or("a hint")?;
    let seen = start(Path::new(nsenter), "").args(args).output()?;
    let seen_text = String::from_utf8_lossy(&seen.stdout).into_owned();
    drop(child.stdin.take());
    let ended = child.wait()?;
    assert!(ended.success(), "the user's part: {ended}");
    assert!(seen_text.contains("cni0"), "`{hint}`: {seen:?}");
    Ok(())
}

/// `enter` must not be called when there are threads, and says so.
fn with_threads() -> Outcome {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || ended.recv().is_err());
    let error = lab::enter();
    assert!(matches!(error, Err(Why::Threads { threads: 2 })), "{error:?}");
    drop(end);
    assert!(thread.join().is_ok());
    Ok(())
}

#[expect(clippy::print_stdout, reason = "tells the parent how to look into the namespace")]
fn user() -> Outcome {
    assert!(lab::available().is_err());
    assert_eq!(lab::enter()?, Entered::UserNamespace);
    assert_eq!(lab::enter()?, Entered::Already);
    lab::available()?;
    let world = Topology::standard().build("unprivileged")?;
    let at = SocketAddr::new(world.v6("pod_a")?, 80);
    let _responder = Responder::start(&world.ns("pod_a")?, [Endpoint::tcp("pod_a", at)])?;
    let rules =
        "table inet t { chain f { type filter hook forward priority 0; th dport 81 reject; }
        }";
    world.node().command_with_input("nft", ["-f", "-"], rules)?;
    let ask = |at: SocketAddr| {
        let client = world.client().clone();
        world.client().block_on(async move { probe(&client, &ProbeSpec::tcp(at)).await })
    };
    assert_eq!(ask(at)?.by(), Some("pod_a"));
    let refused = ask(SocketAddr::new(at.ip(), 81))?;
    let how = refused.rejection().map(|rejection| rejection.how);
    assert_eq!(how, Some(How::IcmpPortUnreachable), "{refused}");

    println!("{}", world.node().enter_hint());
    // Until the parent has looked.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

//! The command line.

use std::{ffi::OsString, path::PathBuf};

use lexopt::{Arg, Parser, ValueExt};
use proxier::Mode;

/// What `--help` says.
pub(crate) const HELP: &str = "\
Proxies the Services of some Kubernetes manifests in network namespaces of their own, sends real
traffic through every way in, and compares what happens with what was planned. Nothing on this
machine is touched; everything is gone at the end.

usage: demo [options]        (make demo ARGS=\"options\")

  --mode MODE|all     how to program the node: iptables (default), ipvs, nftables, userspace, or
                      every mode that works here, side by side; where the kernel has no IPVS,
                      ipvs and all run in a guest that has, if scripts/uml/kernel built one
  --library-only      the userspace mode at ports of the loopback addresses: no namespaces, no kernel
                      rules, no privileges; what --mode userspace does where there are no namespaces
  --manifests PATH    file or directory with Services, EndpointSlices and Nodes, as
                      `kubectl get service,endpointslice,node -A -o yaml` prints them; `-` is
                      standard input; may be given several times (default: examples/manifests)
  --node NAME         the Node to be (default: the first one with endpoints)
  --connections N     connections through each way in from each client, 1 to 1000 (default 20)
  --keep              stay when all is programmed, to look around; Enter or Ctrl-C ends it
  --json              print one JSON document instead of text
  --help              this

exit code: 0 everything answered as planned · 1 something did not, or failed · 2 wrong arguments or
manifests · 3 this machine does not allow network namespaces";

/// Most connections through one frontend from one client.
const MAX_CONNECTIONS: usize = 1000;

/// What to do.
pub(crate) enum Command {
    Help,
    Run(Options),
}

/// How to do it.
#[derive(Debug)]
pub(crate) struct Options {
    /// The modes to show.
    pub(crate) modes: Vec<Mode>,
    /// Every mode was asked for: one that is not available is no failure then.
    pub(crate) all: bool,
    /// No namespaces, no kernel rules.
    pub(crate) library_only: bool,
    pub(crate) manifests: Vec<PathBuf>,
    /// Empty: choose one.
    pub(crate) node: String,
    pub(crate) connections: usize,
    pub(crate) keep: bool,
    pub(crate) json: bool,
}

/// Reads the arguments, program name excluded.
///
/// # Errors
/// One line that says what is wrong.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut options = Options {
        modes: vec![Mode::Iptables],
        all: false,
        library_only: false,
        manifests: Vec::new(),
        node: String::new(),
        connections: 20,
        keep: false,
        json: false,
    };
    read(&mut options, Parser::from_args(args))
        .map(|help| if help { Command::Help } else { Command::Run(options) })
        .map_err(|error| format!("{error} (see --help)"))
}

/// Returns whether help is wanted.
fn read(options: &mut Options, mut parser: Parser) -> Result<bool, lexopt::Error> {
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("connections") => {
                let value = parser.value()?;
                let count = value.parse::<usize>().ok();
                let count = count.filter(|count| (1..=MAX_CONNECTIONS).contains(count));
                options.connections = count.ok_or_else(|| {
                    format!(
                        "--connections {value:?}: expected a number from 1 to {MAX_CONNECTIONS}"
                    )
                })?;
            }
            Arg::Long("help") | Arg::Short('h') => return Ok(true),
            Arg::Long("json") => options.json = true,
            Arg::Long("keep") => options.keep = true,
            Arg::Long("library-only") => options.library_only = true,
            Arg::Long("manifests") => options.manifests.push(parser.value()?.into()),
            Arg::Long("mode") => {
                let value = parser.value()?.string()?;
                options.all = value == "all";
                options.modes = match value.as_str() {
                    "all" => Mode::ALL.to_vec(),
                    name => vec![name.parse().map_err(|error| format!("--mode: {error}, or all"))?],
                };
            }
            Arg::Long("node") => options.node = parser.value()?.string()?,
            Arg::Long(_) | Arg::Short(_) | Arg::Value(_) => return Err(arg.unexpected()),
        }
    }
    if options.manifests.is_empty() {
        options.manifests.push(shop());
    }
    Ok(false)
}

/// The manifests that come with the demo.
fn shop() -> PathBuf {
    let here = PathBuf::from("examples/manifests");
    if here.is_dir() {
        return here;
    }
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/manifests"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(args: &[&str]) -> String {
        parse(args.iter().map(Into::into)).err().unwrap()
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (args, says) in [
            (&["--modes"][..], "invalid option '--modes'"),
            (&["--mode", "ebpf"], "unknown mode \"ebpf\""),
            (&["--mode"], "missing argument"),
            (&["--connections", "0"], "from 1 to 1000"),
            (&["--connections=many"], "from 1 to 1000"),
            (&["shop.yaml"], "unexpected argument \"shop.yaml\""),
        ] {
            let refusal = refusal(args);
            assert!(refusal.contains(says) && !refusal.contains('\n'), "{refusal}");
        }
    }
}

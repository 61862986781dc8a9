//! Running iptables-legacy's programs.

use std::{
    fmt,
    io::{self, Write},
    process::{self, Stdio},
};

use proxier_core::{Family, spi::ErrorKind};
use proxier_netlink::NetNs;

use crate::object::Table;

/// Names the program may have: the second where nothing else is installed.
const NAMES: [&str; 2] = ["iptables-legacy", "iptables"];
/// The first version whose `-restore` waits for the lock.
const OLDEST: [u32; 3] = [1, 6, 2];
/// Seconds that are waited for the lock, as kube-proxy does.
const WAIT: &str = "5";
/// What the programs exit with when they cannot have the lock, or memory.
const RESOURCE_PROBLEM: i32 = 4;

/// The programs of iptables that use x_tables.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    /// `iptables-legacy`, say.
    name: &'static str,
    netns: NetNs,
}

/// The programs of iptables that use x_tables cannot be used.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// None of them is installed.
    #[error("no iptables-legacy is installed, and iptables is none either: {reason}")]
    Missing {
        /// What was found instead.
        reason: String,
    },
    /// It is too old.
    #[error("{found} is too old: 1.6.2 is the first version that waits for others")]
    TooOld {
        /// What it says it is.
        found: String,
    },
}

impl Tool {
    /// Finds the programs.
    pub(crate) fn find(netns: &NetNs) -> Result<Self, ToolError> {
        let mut reasons = Vec::new();
        for name in NAMES {
            let output = process::Command::new(name).arg("-V").stdin(Stdio::null()).output();
            let version = match output {
                Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
                Err(error) => {
                    reasons.push(format!("{name}: {error}"));
                    continue;
                }
            };
            if version.contains("nf_tables") {
                reasons.push(format!("{name} is {version}"));
                continue;
            }
            if number(&version).is_none_or(|number| number < OLDEST) {
                return Err(ToolError::TooOld { found: version });
            }
            return Ok(Self { name, netns: netns.clone() });
        }
        Err(ToolError::Missing { reason: reasons.join("; ") })
    }

    /// Runs a program in the namespace, and waits for it.
    pub(crate) fn run(&self, command: &Command) -> io::Result<Output> {
        let run = || {
            let mut child = process::Command::new(command.program(self.name))
                .args(&command.args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // The program reads all of it before it writes; one that stopped reading says why.
                stdin.write_all(command.input.as_bytes()).ok();
            }
            child.wait_with_output()
        };
        let output = self.netns.run(run).map_err(io::Error::other)??;
        Ok(Output {
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status,
        })
    }
}

/// The numbers in "iptables v1.8.9 (legacy)".
fn number(version: &str) -> Option<[u32; 3]> {
    let text = version.split(' ').find_map(|word| word.strip_prefix('v'))?;
    let mut parts = text.split('.').map(|part| part.parse().ok());
    let mut next = || parts.next().unwrap_or(Some(0));
    Some([next()?, next()?, next()?])
}

/// A program to run.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    family: Family,
    suffix: &'static str,
    args: Vec<&'static str>,
    input: String,
}

impl Command {
    pub(crate) fn save(family: Family, table: Table) -> Self {
        Self { family, suffix: "-save", args: vec!["-t", table.name()], input: String::new() }
    }

    pub(super) fn restore(family: Family, input: String) -> Self {
        Self { family, suffix: "-restore", args: vec!["--noflush", "-w", WAIT], input }
    }

    fn program(&self, name: &str) -> String {
        let name = match self.family {
            Family::V4 => name.to_owned(),
            Family::V6 => name.replacen("ip", "ip6", 1),
        };
        name + self.suffix
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "running {} {}", self.program("iptables-legacy"), self.args.join(" "))
    }
}

/// What a program said.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(super) stdout: String,
    stderr: String,
    status: process::ExitStatus,
}

impl Output {
    pub(crate) fn succeeded(&self) -> bool {
        self.status.success()
    }

    /// What it complained about, in one line.
    pub(crate) fn errors(&self) -> String {
        let lines = self.stderr.lines().map(str::trim).filter(|line| !line.is_empty());
        let text = lines.collect::<Vec<_>>().join("; ");
        if text.is_empty() { self.status.to_string() } else { text }
    }

    /// What to do about it.
    pub(super) fn kind(&self) -> ErrorKind {
        let says = |text: &str| self.stderr.contains(text);
        if self.status.code() == Some(RESOURCE_PROBLEM) {
            ErrorKind::Retry
        } else if says("Permission denied") || says("Operation not permitted") {
            ErrorKind::Permission
        } else if says("Couldn't load") || says("do you need to insmod") {
            ErrorKind::Unsupported
        } else {
            ErrorKind::Fatal
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_understood() {
        assert_eq!(number("iptables v1.8.9 (legacy)"), Some([1, 8, 9]));
        assert_eq!(number("iptables v1.6"), Some([1, 6, 0]));
        assert_eq!(number("busybox"), None);
        assert!([1, 6, 1] < OLDEST && [1, 10, 0] > OLDEST);
    }

    #[test]
    fn programs_have_the_familys_name() {
        let save = |family| Command::save(family, Table::Nat).program("iptables-legacy");
        assert_eq!(save(Family::V4), "iptables-legacy-save");
        assert_eq!(save(Family::V6), "ip6tables-legacy-save");
    }
}

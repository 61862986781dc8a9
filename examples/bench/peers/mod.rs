//! The tools that kube-proxy runs, with its layouts.

mod iptables;
mod nft;

use std::{
    error::Error,
    io::{Read, Write},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use proxier_testkit::lab::Ns;

use crate::world::World;

/// Changes to time; each takes a good part of a second.
const CHANGES: usize = 4;

/// A tool to compare with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Peer {
    IptablesLegacy,
    IptablesNft,
    Nft,
}

/// Inputs for a tool.
pub(crate) struct Texts {
    /// One after the other, into an empty namespace.
    load: Vec<String>,
    /// One-endpoint changes, as kube-proxy makes them.
    changes: Vec<String>,
}

impl Peer {
    pub(crate) const ALL: [Self; 3] = [Self::Nft, Self::IptablesLegacy, Self::IptablesNft];

    /// Whether the tool is there.
    pub(crate) fn installed(&self) -> bool {
        let mut command = Command::new(self.program());
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::IptablesLegacy => "iptables-legacy-restore",
            Self::IptablesNft => "iptables-nft-restore",
            Self::Nft => "nft",
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft -f",
            Self::IptablesLegacy | Self::IptablesNft => self.program(),
        }
    }

    /// What a reader has to know about it.
    pub(crate) fn note(self, world: World) -> Option<String> {
        let pieces = iptables::SERVICES_PER_INPUT;
        (self == Self::IptablesNft && world.services > pieces).then(|| {
            format!(
                "fed {pieces} Services at a time: with everything in one input, as kube-proxy has it, \
                 it takes minutes for 2,000 Services"
            )
        })
    }

    pub(crate) fn texts(self, world: World) -> Texts {
        let (load, change): (_, fn(World, usize) -> String) = match self {
            Self::IptablesLegacy => (vec![iptables::everything(world)], iptables::change),
            Self::IptablesNft => (iptables::chunks(world), iptables::change),
            Self::Nft => (vec![nft::everything(world)], nft::change),
        };
        Texts { load, changes: (0..CHANGES).map(|step| change(world, step)).collect() }
    }

    /// Loads everything into an empty namespace. `None` when it takes longer.
    pub(crate) fn load(
        self,
        ns: &Ns,
        texts: &Texts,
        bound: Duration,
    ) -> Result<Option<Duration>, Box<dyn Error>> {
        let began = Instant::now();
        for text in &texts.load {
            let left = bound.saturating_sub(began.elapsed());
            if left.is_zero() || self.feed(ns, text, left)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(began.elapsed()))
    }

    /// Makes changes, as far as they come within the bound.
    pub(crate) fn change(
        self,
        ns: &Ns,
        texts: &Texts,
        bound: Duration,
    ) -> Result<Vec<Duration>, Box<dyn Error>> {
        let began = Instant::now();
        let mut times = Vec::new();
        for text in &texts.changes {
            let left = bound.saturating_sub(began.elapsed());
            match self.feed(ns, text, left)? {
                Some(time) => times.push(time),
                None => break,
            }
        }
        Ok(times)
    }

    /// Runs the tool once. A tool that takes too long is killed; the kernel may need some more time
    /// to let it go.
    fn feed(
        self,
        ns: &Ns,
        text: &str,
        bound: Duration,
    ) -> Result<Option<Duration>, Box<dyn Error>> {
        let arguments: &[&str] = match self {
            Self::Nft => &["-f", "-"],
            Self::IptablesLegacy | Self::IptablesNft => &["--noflush", "--wait", "5"],
        };
        let mut command = Command::new(self.program());
        command.args(arguments).stdin(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut process = ns.run(|| command.stdout(Stdio::null()).spawn())??;
        let (stdin, stderr) = (process.stdin.take(), process.stderr.take());
        let (tell, told) = mpsc::channel();
        let ended = std::thread::scope(|scope| {
            scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(text.as_bytes())));
            scope.spawn(move || {
                let mut said = String::new();
                stderr.map(|mut pipe| pipe.read_to_string(&mut said));
                tell.send(said).ok();
            });
            let said = told.recv_timeout(bound);
            if said.is_err() {
                process.kill().ok();
            }
            (said, process.wait())
        });
        let (Ok(said), status) = ended else { return Ok(None) };
        if !status?.success() {
            return Err(format!("{}: {}", self.program(), said.trim()).into());
        }
        Ok(Some(began.elapsed()))
    }
}

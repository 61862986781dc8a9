//! Sysctls of IPVS: set when asked to, and only then.

use std::{fs, io, path::PathBuf};

use proxier_netlink::NetNs;

/// Which sysctls to set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sysctls {
    /// `net.ipv4.conf.all.arp_ignore=1` and `arp_announce=2`: the node does not answer ARP for
    /// addresses of Services on other links. Load balancers that announce addresses need it.
    pub strict_arp: bool,
}

/// What every node needs.
const ALWAYS: [(&str, &str); 3] = [
    // Without it packets of virtual servers are unknown to connection tracking, and not masqueraded.
    ("net/ipv4/vs/conntrack", "1"),
    // Connections to a destination that is gone end instead of hanging.
    ("net/ipv4/vs/expire_nodest_conn", "1"),
    // Clients do not stay with a destination of weight 0.
    ("net/ipv4/vs/expire_quiescent_template", "1"),
];
const STRICT_ARP: [(&str, &str); 2] =
    [("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")];

/// One sysctl that was changed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Changed {
    /// Its name, with dots.
    pub name: String,
    /// What it was.
    pub before: String,
    /// What it is.
    pub after: String,
}

/// What [`prepare`] changed.
#[derive(Clone, Debug)]
#[must_use]
pub struct Prepared {
    netns: NetNs,
    changed: Vec<Changed>,
}

impl Prepared {
    /// What was changed; what had the value already is not there.
    #[must_use]
    pub fn changed(&self) -> &[Changed] {
        &self.changed
    }

    /// Gives every sysctl that still has our value the value that it had.
    ///
    /// # Errors
    /// The first that could not be written; the others are tried all the same.
    pub fn undo(self) -> io::Result<()> {
        let Self { netns, changed } = self;
        let undo = || {
            let each = changed.iter().rev().map(|it| {
                let path = path(&it.name.replace('.', "/"));
                if read(&path)? == it.after { fs::write(&path, &it.before) } else { Ok(()) }
            });
            each.fold(Ok(()), io::Result::and)
        };
        netns.run(undo).map_err(io::Error::other)?
    }
}

/// Sets the sysctls that the mode needs in a network namespace. Writes only what differs.
///
/// # Errors
/// One could not be read or written; those before it are given their values back.
pub fn prepare(netns: &NetNs, sysctls: Sysctls) -> io::Result<Prepared> {
    let mut prepared = Prepared { netns: netns.clone(), changed: Vec::new() };
    let strict = STRICT_ARP.into_iter().filter(|_| sysctls.strict_arp);
    for (name, wanted) in ALWAYS.into_iter().chain(strict) {
        let set = || {
            let path = path(name);
            let before = read(&path)?;
            if before != wanted {
                fs::write(&path, wanted)?;
            }
            Ok(before)
        };
        match netns.run(set).map_err(io::Error::other).flatten() {
            Ok(before) if before == wanted => {}
            Ok(before) => {
                let (name, after) = (name.replace('/', "."), wanted.to_owned());
                prepared.changed.push(Changed { name, before, after });
            }
            Err(error) => {
                prepared.undo()?;
                let name = name.replace('/', ".");
                return Err(io::Error::new(error.kind(), format!("{name}: {error}")));
            }
        }
    }
    Ok(prepared)
}

/// Whether packets of virtual servers are tracked, if the kernel says.
pub(crate) fn tracks(netns: &NetNs) -> Option<bool> {
    let [(name, wanted), ..] = ALWAYS;
    netns.run(|| read(&path(name)).ok().map(|it| it == wanted)).ok().flatten()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name)
}

fn read(path: &PathBuf) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

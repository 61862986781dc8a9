//! Sysctls as kube-proxy sets them: a daemon's business, never the library's.

use std::{fs, path::Path};

use proxier::Mode;

use crate::{
    Outcome,
    config::{Conntrack, Resolved},
};

/// kube-proxy never asks for more.
// K8S: cmd/kube-proxy/app/conntrack.go, v1.36.
const CONNTRACK_CEILING: u64 = 1_048_576;

const HASHSIZE: &str = "/sys/module/nf_conntrack/parameters/hashsize";

/// A sysctl that has to have a value.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Wanted {
    name: &'static str,
    value: u64,
}

/// Writes what differs and logs what it wrote.
pub(crate) fn apply(settings: &Resolved, mode: Mode) -> Outcome {
    let ours = &settings.loaded.ours;
    if !ours.sysctls || settings.context(mode).netns.is_some() {
        tracing::info!("sysctls are left alone");
        return Ok(());
    }
    for Wanted { name, value } in wanted(settings, mode, cpus()) {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let Ok(now) = fs::read_to_string(&path) else {
            tracing::warn!(name, "this kernel does not have the sysctl: left out");
            continue;
        };
        if now.trim() == value.to_string() {
            continue;
        }
        fs::write(&path, value.to_string()).map_err(|error| {
            format!(
                "sysctl {name}: cannot set it to {value} (it is {}): {error}; run privileged, set it \
                 beforehand (`agent --init-only`), or switch it off in the configuration",
                now.trim()
            )
        })?;
        tracing::info!(name, before = now.trim(), value, "set a sysctl");
        if name == "net.netfilter.nf_conntrack_max" {
            raise_hashsize(value / 4);
        }
    }
    Ok(())
}

fn raise_hashsize(least: u64) {
    let now = fs::read_to_string(HASHSIZE).ok().and_then(|text| text.trim().parse::<u64>().ok());
    if now.is_some_and(|now| now < least) {
        match fs::write(HASHSIZE, least.to_string()) {
            Ok(()) => tracing::info!(value = least, "raised the size of the conntrack table"),
            Err(error) => tracing::warn!(%error, "cannot raise the size of the conntrack table"),
        }
    }
}

/// CPUs of the machine, not of this process' share of it.
fn cpus() -> u64 {
    let listed = fs::read_dir(Path::new("/sys/bus/cpu/devices"));
    listed.map_or(1, |list| list.count().max(1) as u64)
}

fn wanted(settings: &Resolved, mode: Mode, cpus: u64) -> Vec<Wanted> {
    let config = &settings.loaded.proxy;
    let mut wanted = conntrack(&config.conntrack, cpus);
    let mut want = |name, value| wanted.push(Wanted { name, value });
    match mode {
        Mode::Iptables if config.iptables.localhost_node_ports => {
            want("net.ipv4.conf.all.route_localnet", 1);
        }
        Mode::Ipvs => {
            want("net.ipv4.vs.conntrack", 1);
            want("net.ipv4.vs.expire_nodest_conn", 1);
            want("net.ipv4.vs.expire_quiescent_template", 1);
            want("net.ipv4.ip_forward", 1);
            if config.ipvs.strict_arp {
                want("net.ipv4.conf.all.arp_ignore", 1);
                want("net.ipv4.conf.all.arp_announce", 2);
            }
        }
        Mode::Iptables | Mode::Nftables | Mode::Userspace => {}
    }
    wanted
}

fn conntrack(config: &Conntrack, cpus: u64) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    let per_core = u64::try_from(config.max_per_core).unwrap_or_default();
    if per_core > 0 {
        let least = u64::try_from(config.min).unwrap_or_default();
        let value = (per_core * cpus).min(CONNTRACK_CEILING).max(least);
        wanted.push(Wanted { name: "net.netfilter.nf_conntrack_max", value });
    }
    for (name, timeout) in [
        ("net.netfilter.nf_conntrack_tcp_timeout_established", config.tcp_established_timeout),
        ("net.netfilter.nf_conntrack_tcp_timeout_close_wait", config.tcp_close_wait_timeout),
        ("net.netfilter.nf_conntrack_udp_timeout", config.udp_timeout),
        ("net.netfilter.nf_conntrack_udp_timeout_stream", config.udp_stream_timeout),
    ] {
        if timeout.0.as_secs() > 0 {
            wanted.push(Wanted { name, value: timeout.0.as_secs() });
        }
    }
    if config.tcp_be_liberal {
        wanted.push(Wanted { name: "net.netfilter.nf_conntrack_tcp_be_liberal", value: 1 });
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GoDuration;

    #[test]
    fn conntrack_limits_are_kube_proxys() {
        let max = |config: &Conntrack, cpus| {
            conntrack(config, cpus).first().filter(|it| it.name.ends_with("max")).map(|it| it.value)
        };
        let default = Conntrack::default();
        assert_eq!(max(&default, 2), Some(131_072));
        assert_eq!(max(&default, 8), Some(262_144));
        assert_eq!(max(&default, 64), Some(CONNTRACK_CEILING));
        assert_eq!(max(&Conntrack { max_per_core: 0, ..Conntrack::default() }, 8), None);
        let names: Vec<_> = conntrack(&default, 1).into_iter().map(|it| it.name).collect();
        assert_eq!(names.len(), 3, "UDP timeouts are the kernel's unless they are set: {names:?}");
        let liberal =
            Conntrack { tcp_be_liberal: true, udp_timeout: GoDuration::seconds(10), ..default };
        assert_eq!(conntrack(&liberal, 1).len(), 5);
    }
}

//! kube-proxy's nftables layout, as text for `nft -f -`.

use std::fmt::Write;

use crate::world::{self, PORT, TARGET_PORT, World};

// K8S: kube-proxy 1.36, pkg/proxy/nftables: base chains, jumps, sets and maps.
const SKELETON: &str = r#"add table ip kube-proxy { comment "rules for kube-proxy" ; }
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy services
add chain ip kube-proxy firewall-check
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy masquerading
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.128.0.0/9 meta mark set meta mark or 0x4000
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy nodeport-endpoints-check ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy masquerading meta mark & 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random
add rule ip kube-proxy masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
"#;

/// The first sync: one transaction.
pub(super) fn everything(world: World) -> String {
    let mut text = SKELETON.to_owned();
    for index in 0..world.services {
        let (chain, ip) = (chain(index), world::cluster_ip(index));
        add(&mut text, format_args!("add element ip kube-proxy cluster-ips {{ {ip} }}"));
        add(&mut text, format_args!("add chain ip kube-proxy {chain}"));
        rule(&mut text, world, index, None);
        add(
            &mut text,
            format_args!(
                "add element ip kube-proxy service-ips {{ {ip} . tcp . {PORT} : goto {chain} }}"
            ),
        );
        // Every third endpoint is on this node.
        for ip in (0..world.endpoints).step_by(3).map(|it| world::endpoint(world, index, it)) {
            let element = format_args!(
                "add element ip kube-proxy hairpin-connections {{ {ip} . {ip} . tcp . {TARGET_PORT} }}"
            );
            add(&mut text, element);
        }
    }
    text
}

/// An endpoint of a Service goes, or comes back: its chain is written anew.
pub(super) fn change(world: World, step: usize) -> String {
    let index = (step / 2).wrapping_mul(7919) % world.services;
    let chain = chain(index);
    let mut text = format!("add chain ip kube-proxy {chain}\nflush chain ip kube-proxy {chain}\n");
    rule(&mut text, world, index, step.is_multiple_of(2).then_some(world.endpoints / 2));
    text
}

fn rule(text: &mut String, world: World, index: usize, gone: Option<usize>) {
    let stays = (0..world.endpoints).filter(|number| Some(*number) != gone);
    let members: Vec<_> = stays
        .enumerate()
        .map(|(slot, it)| format!("{slot} : {} . {TARGET_PORT}", world::endpoint(world, index, it)))
        .collect();
    if members.is_empty() {
        return;
    }
    let (chain, count, members) = (chain(index), members.len(), members.join(", "));
    let rule = format_args!(
        "add rule ip kube-proxy {chain} meta l4proto tcp dnat ip to numgen random mod {count} \
         map {{ {members} }}"
    );
    add(text, rule);
}

/// `service-HASH-NAMESPACE/NAME/PROTOCOL/PORT`; the hash only spreads the names here.
fn chain(index: usize) -> String {
    let hash = super::iptables::hash(index) >> 32;
    format!("service-{hash:08X}-bench/service-{index:06}/tcp/http")
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    writeln!(text, "{line}").unwrap_or_default();
}

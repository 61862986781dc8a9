//! kube-proxy's iptables layout, as text for `iptables-restore --noflush`.

use std::fmt::Write;

use crate::world::{self, PORT, TARGET_PORT, World};

/// Services in one input of `iptables-nft-restore`: more take it more than twice as long for twice as
/// many.
pub(super) const SERVICES_PER_INPUT: usize = 50;

// K8S: kube-proxy 1.36, pkg/proxy/iptables: chains written every time, in both tables.
const FILTER: &str = "\
*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x00004000/0x00004000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";
const NAT_CHAINS: &str = "\
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
";
const NAT_RULES: &str = "\
-A KUBE-POSTROUTING -m mark ! --mark 0x00004000/0x00004000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x00004000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
";
/// What kube-proxy ensures with `iptables -I` before its first sync.
const JUMPS: &str = "\
*filter
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
COMMIT
*nat
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
COMMIT
";

/// Everything in one input.
pub(super) fn everything(world: World) -> String {
    let mut nat = Nat::default();
    (0..world.services).for_each(|index| nat.service(world, index, None));
    format!("{FILTER}{}{JUMPS}", nat.text(Some(world)))
}

/// Everything in pieces: what Services lead to first, what leads to Services last.
pub(super) fn chunks(world: World) -> Vec<String> {
    let mut chunks = vec![format!("{FILTER}*nat\n{NAT_CHAINS}{NAT_RULES}COMMIT\n")];
    for start in (0..world.services).step_by(SERVICES_PER_INPUT) {
        let mut nat = Nat::default();
        let end = (start + SERVICES_PER_INPUT).min(world.services);
        (start..end).for_each(|index| nat.service(world, index, None));
        chunks.push(nat.text(None));
    }
    chunks.push(Nat::default().text(Some(world)));
    chunks.push(JUMPS.to_owned());
    chunks
}

/// An endpoint of a Service goes, or comes back: the Service's chains, and the shared ones whole.
pub(super) fn change(world: World, step: usize) -> String {
    let index = (step / 2).wrapping_mul(7919) % world.services;
    let mut nat = Nat::default();
    nat.service(world, index, step.is_multiple_of(2).then_some(world.endpoints / 2));
    format!("{FILTER}{}", nat.text(Some(world)))
}

/// Spreads numbers as a hash would.
pub(super) fn hash(number: usize) -> u64 {
    u64::try_from(number).unwrap_or_default().wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[derive(Default)]
struct Nat {
    chains: String,
    rules: String,
    removed: String,
}

impl Nat {
    fn service(&mut self, world: World, index: usize, gone: Option<usize>) {
        // K8S: above 1,000 endpoints kube-proxy leaves out the comments of endpoint rules.
        let comments = world.services * world.endpoints <= 1000;
        let comment = |text: String| {
            if comments { format!(" -m comment --comment \"{text}\"") } else { String::new() }
        };
        let (name, ip) = (format!("bench/service-{index:06}:http"), world::cluster_ip(index));
        let chain = service_chain(index);
        line(&mut self.chains, format_args!(":{chain} - [0:0]"));
        line(
            &mut self.rules,
            format_args!(
                "-A {chain} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {ip} \
                 --dport {PORT} ! -s 10.128.0.0/9 -j KUBE-MARK-MASQ"
            ),
        );
        let count = world.endpoints - usize::from(gone.is_some());
        let mut rest = count;
        for number in 0..world.endpoints {
            let endpoint = world::endpoint(world, index, number);
            let target = format!("KUBE-SEP-{:016X}", hash(index * world.endpoints + number));
            line(&mut self.chains, format_args!(":{target} - [0:0]"));
            if Some(number) == gone {
                line(&mut self.removed, format_args!("-X {target}"));
                continue;
            }
            let to = comment(format!("{name} -> {endpoint}:{TARGET_PORT}"));
            let chance = match rest {
                1 => String::new(),
                _ => {
                    let chance = 1.0 / f64::from(u32::try_from(rest).unwrap_or(u32::MAX));
                    format!(" -m statistic --mode random --probability {chance:.10}")
                }
            };
            rest -= 1;
            let of = comment(name.clone());
            line(&mut self.rules, format_args!("-A {chain}{to}{chance} -j {target}"));
            line(&mut self.rules, format_args!("-A {target}{of} -s {endpoint} -j KUBE-MARK-MASQ"));
            line(
                &mut self.rules,
                format_args!(
                    "-A {target}{of} -m tcp -p tcp -j DNAT --to-destination {endpoint}:{TARGET_PORT}"
                ),
            );
        }
    }

    /// The input, with all rules of the shared chains when a world is given.
    fn text(&self, shared: Option<World>) -> String {
        let (mut chains, mut rules) = (String::new(), String::new());
        if let Some(world) = shared {
            chains.push_str(NAT_CHAINS);
            rules.push_str(NAT_RULES);
            for index in 0..world.services {
                let (ip, chain) = (world::cluster_ip(index), service_chain(index));
                line(
                    &mut rules,
                    format_args!(
                        "-A KUBE-SERVICES -m comment --comment \"bench/service-{index:06}:http \
                         cluster IP\" -m tcp -p tcp -d {ip} --dport {PORT} -j {chain}"
                    ),
                );
            }
            rules.push_str(
                "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must \
                 be the last rule in this chain\" -m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -j \
                 KUBE-NODEPORTS\n",
            );
        }
        let Self { chains: own, rules: own_rules, removed } = self;
        format!("*nat\n{chains}{own}{own_rules}{rules}{removed}COMMIT\n")
    }
}

fn service_chain(index: usize) -> String {
    format!("KUBE-SVC-{:016X}", !hash(index))
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    writeln!(text, "{line}").unwrap_or_default();
}

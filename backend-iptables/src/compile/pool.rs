//! The chains that pick an endpoint of a pool.

use std::{net::SocketAddr, num::NonZeroU32};

use proxier_core::ir::{Balance, FrontendKey, Member, Pool};

use super::{Compiler, Endpoint, Masquerade, pool_chain};
use crate::{
    config::Layout,
    names::ChainName,
    object::{ChainKind, RulesBuilder},
    rule::{Matches, RecentAction, Target},
};

/// Pools with more endpoints are split.
const WHOLE: usize = 64;

impl Compiler<'_> {
    /// The chain that picks an endpoint of a pool, if the pool has any.
    pub(super) fn pool(
        &mut self,
        pool: Pool,
        internal: &[(Pool, FrontendKey, Masquerade)],
        endpoints: &[Endpoint],
    ) {
        let choice_of = |member: &Member| {
            let index = endpoints.binary_search_by_key(&member.addr, |endpoint| endpoint.0).ok()?;
            let (addr, chain) = *endpoints.get(index)?;
            Some(Choice { addr, chain, weight: member.weight.get().into() })
        };
        let members: Vec<_> = self.fragment.pool(pool).iter().filter_map(choice_of).collect();
        if members.is_empty() {
            return;
        }
        let kind = pool_chain(pool);
        let name = self.service_chain(kind);
        let mut rules = RulesBuilder::new(&name);
        for (_, key, masquerade) in internal.iter().filter(|it| it.0 == pool) {
            self.masquerade_cluster_ip(&mut rules, key, *masquerade);
        }
        if let Some(seconds) = self.fragment.affinity {
            for Choice { addr, chain, .. } in &members {
                let recent = Some(self.recent(chain, RecentAction::Check(seconds.get())));
                let comment = self.endpoint_comment(*addr);
                let matches = Matches { comment: Some(comment), recent, ..Matches::default() };
                rules.push(&matches, &Target::Jump(chain.as_str()));
            }
        }
        match parts(self.layout, members.len()) {
            _ if self.fragment.balance == Balance::RoundRobin => {
                self.take_turns(&members, &mut rules)
            }
            // With affinity every endpoint has a rule in this chain anyway.
            Some(count) if self.fragment.affinity.is_none() => {
                self.parts(pool, count, &members, &mut rules);
            }
            _ => self.balance(&members, &mut rules),
        }
        self.own_chain(ChainKind::Service(kind), name, rules);
    }

    /// One rule for each endpoint: each takes its share of what those before it leave.
    fn balance(&mut self, members: &[Choice], rules: &mut RulesBuilder) {
        let mut left = total(members);
        for Choice { addr, chain, weight } in members {
            let chance = share(*weight, left);
            let comment = self.endpoint_comment(*addr);
            let matches = Matches { comment: Some(comment), chance, ..Matches::default() };
            rules.push(&matches, &Target::Jump(chain.as_str()));
            left -= weight;
        }
    }

    /// One rule for each endpoint: the first takes every n-th connection, the second every (n-1)-th
    /// of the others, and so on, so that each is chosen once in n. The kernel counts for each rule,
    /// and begins again when the chain is written anew.
    fn take_turns(&mut self, members: &[Choice], rules: &mut RulesBuilder) {
        for (Choice { addr, chain, .. }, left) in members.iter().zip((1..=members.len()).rev()) {
            let every = u32::try_from(left).ok().filter(|left| *left > 1).and_then(NonZeroU32::new);
            let comment = self.endpoint_comment(*addr);
            let matches = Matches { comment: Some(comment), every, ..Matches::default() };
            rules.push(&matches, &Target::Jump(chain.as_str()));
        }
    }

    /// One rule for each part of the endpoints, and a chain for each part.
    ///
    /// An endpoint's part follows from its name, so that others do not move when it comes or goes.
    fn parts(&mut self, pool: Pool, count: usize, members: &[Choice], rules: &mut RulesBuilder) {
        let mut parts = vec![Vec::new(); count];
        for member in members {
            if let Some(part) = parts.get_mut(member.chain.spread() % count) {
                part.push(*member);
            }
        }
        let mut left = total(members);
        for (index, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            let name = self.hash.part_chain(self.prefix, pool_chain(pool), index);
            let weight = total(part);
            let chance = share(weight, left);
            left -= weight;
            let mut inner = RulesBuilder::new(&name);
            self.balance(part, &mut inner);
            self.own_chain(ChainKind::Part, name, inner);
            rules.push(&Matches { chance, ..Matches::default() }, &Target::Jump(name.as_str()));
        }
    }
}

/// An endpoint that may be chosen.
#[derive(Clone, Copy, Debug)]
struct Choice {
    addr: SocketAddr,
    chain: ChainName,
    weight: u64,
}

fn total(choices: &[Choice]) -> u64 {
    choices.iter().map(|choice| choice.weight).sum()
}

/// How many parts a pool has: about the square root of its size; `None` if it is not split.
fn parts(layout: Layout, members: usize) -> Option<usize> {
    let split = layout == Layout::Tree && members > WHOLE;
    split.then(|| members.isqrt().next_power_of_two())
}

/// The probability `weight / left` in units of 2^-31, by way of the ten decimals that kube-proxy
/// writes; `None` for what is certain.
// K8S: pkg/proxy/iptables/proxier.go computeProbability prints `%0.10f`, v1.36; iptables then rounds
// the product with 2^31. Rules that kube-proxy wrote are thereby found equal.
fn share(weight: u64, left: u64) -> Option<u32> {
    const DECIMALS: u128 = 10_000_000_000;
    if weight >= left {
        return None;
    }
    let (weight, left) = (u128::from(weight), u128::from(left));
    let (quotient, rest) = (DECIMALS * weight / left, DECIMALS * weight % left);
    let up = match (rest * 2).cmp(&left) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Equal => quotient % 2,
        std::cmp::Ordering::Greater => 1,
    };
    let scaled = ((quotient + up) * (1 << 31) + DECIMALS / 2) / DECIMALS;
    u32::try_from(scaled).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_ten_decimals() {
        assert_eq!(share(1, 2), Some(1 << 30));
        assert_eq!(share(1, 3), Some(715_827_883));
        assert_eq!(share(3, 3), None);
        assert_eq!(share(1000, 4000), Some(1 << 29));
        for n in 2..5000_u64 {
            #[expect(clippy::cast_precision_loss, reason = "n is small")]
            let text = format!("{:.10}", 1.0 / n as f64);
            let value: f64 = text.parse().unwrap();
            let expected = (value * f64::from(1_u32 << 31)).round();
            assert_eq!(share(1, n).map(f64::from), Some(expected), "{n}");
        }
    }

    #[test]
    fn large_pools_have_about_as_many_parts_as_a_part_has_endpoints() {
        assert_eq!(parts(Layout::Tree, 64), None);
        assert_eq!(parts(Layout::KubeProxy, 1000), None);
        assert_eq!(parts(Layout::Tree, 65), Some(8));
        assert_eq!(parts(Layout::Tree, 1000), Some(32));
        assert_eq!(parts(Layout::Tree, 10_000), Some(128));
    }
}

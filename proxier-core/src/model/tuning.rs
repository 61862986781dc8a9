//! How the connections of a Service are spread, as annotations say.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::Serialize;

use super::{
    address::{parse_ip, parse_net},
    problem::Checker,
};
use crate::ir::{Balance, MAX_WEIGHT};

/// `random`, `round-robin` or `source-hash`. On Services.
pub(super) const BALANCE: &str = "proxier.dev/balance";
/// An IPVS scheduler by name; other modes do not look at it. On Services.
pub(super) const SCHEDULER: &str = "proxier.dev/ipvs-scheduler";
/// `ADDRESS-or-CIDR=WEIGHT`, separated by commas; the longest prefix decides. On Services.
pub(super) const WEIGHTS: &str = "proxier.dev/endpoint-weights";
/// `true` or `false`. On Services.
pub(super) const COUNTERS: &str = "proxier.dev/counters";
/// The weight of every endpoint of the slice. On EndpointSlices.
pub(super) const WEIGHT: &str = "proxier.dev/weight";

/// Longest name of an IPVS scheduler.
// KERNEL: IP_VS_SCHEDNAME_MAXLEN less the NUL (include/uapi/linux/ip_vs.h, v6.12).
const MAX_SCHEDULER_BYTES: usize = 15;

/// How the connections of a Service are spread. The default is what Services without annotations have.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub(super) struct Tuning {
    pub(super) balance: Balance,
    pub(super) scheduler: Option<Arc<str>>,
    pub(super) counters: bool,
    /// Longest prefix first.
    weights: Vec<(IpNet, u16)>,
}

impl Tuning {
    pub(super) fn read(annotations: &BTreeMap<String, String>, check: &mut Checker) -> Self {
        let get = |name: &str| annotations.get(name).map(|text| text.trim());
        Self {
            balance: get(BALANCE).map(|text| balance(text, check)).unwrap_or_default(),
            scheduler: get(SCHEDULER).and_then(|text| scheduler(text, check)),
            counters: get(COUNTERS).is_some_and(|text| counters(text, check)),
            weights: get(WEIGHTS).map(|text| weights(text, check)).unwrap_or_default(),
        }
    }

    /// The weight of an endpoint, if one is given. O(entries).
    pub(super) fn weight(&self, ip: IpAddr) -> Option<u16> {
        self.weights.iter().find(|(net, _)| net.contains(&ip)).map(|(_, weight)| *weight)
    }
}

/// The weight of the endpoints of a slice, if one is given.
pub(super) fn slice_weight(
    annotations: &BTreeMap<String, String>,
    check: &mut Checker,
) -> Option<u16> {
    let text = annotations.get(WEIGHT)?;
    let weight = weight(text.trim());
    if weight.is_none() {
        report(check, WEIGHT, format!("{text:?} is not a weight (0-{MAX_WEIGHT}): ignored"));
    }
    weight
}

fn report(check: &mut Checker, annotation: &str, message: String) {
    check.report(format!("metadata.annotations[{annotation}]"), message);
}

fn balance(text: &str, check: &mut Checker) -> Balance {
    text.parse().unwrap_or_else(|()| {
        let message = format!(
            "{text:?} is none of random, round-robin and source-hash: the mode's own way is used"
        );
        report(check, BALANCE, message);
        Balance::Default
    })
}

fn scheduler(text: &str, check: &mut Checker) -> Option<Arc<str>> {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if text.is_empty() || text.len() > MAX_SCHEDULER_BYTES || !text.bytes().all(is_plain) {
        report(check, SCHEDULER, format!("{text:?} is not the name of a scheduler: ignored"));
        return None;
    }
    Some(text.into())
}

fn counters(text: &str, check: &mut Checker) -> bool {
    match text {
        "true" => true,
        "false" => false,
        _ => {
            report(check, COUNTERS, format!("{text:?} is neither true nor false: read as false"));
            false
        }
    }
}

fn weights(text: &str, check: &mut Checker) -> Vec<(IpNet, u16)> {
    let mut found: Vec<(IpNet, u16)> = Vec::new();
    for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        let mut skip = |why: String| report(check, WEIGHTS, format!("{entry:?}: {why}: skipped"));
        let Some((whom, number)) = entry.split_once('=') else {
            skip("not ADDRESS=WEIGHT or CIDR=WEIGHT".to_owned());
            continue;
        };
        let net = parse_ip(whom.trim()).map(IpNet::from);
        let Some(net) = net.or_else(|| parse_net(whom).map(|(net, _)| net)) else {
            skip(format!("{:?} is neither an address nor a CIDR", whom.trim()));
            continue;
        };
        let Some(weight) = weight(number.trim()) else {
            skip(format!("{:?} is not a weight (0-{MAX_WEIGHT})", number.trim()));
            continue;
        };
        if found.iter().any(|(known, _)| *known == net) {
            skip(format!("{net} has a weight already"));
            continue;
        }
        found.push((net, weight));
    }
    found.sort_by_key(|(net, _)| (std::cmp::Reverse(net.prefix_len()), *net));
    found
}

fn weight(text: &str) -> Option<u16> {
    let all_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    all_digits.then(|| text.parse().ok()).flatten().filter(|weight| *weight <= MAX_WEIGHT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(annotations: &[(&str, &str)]) -> (Tuning, Vec<String>) {
        let annotations = annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let mut check = Checker::new("Service", "shop", "cart");
        let tuning = Tuning::read(&annotations, &mut check);
        let read = check.done(Some(tuning));
        (read.value.unwrap(), read.problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_longest_prefix_gives_the_weight() {
        let (tuning, problems) =
            read(&[(WEIGHTS, "10.0.0.0/8=2, 10.61.3.21=0,10.61.0.0/16=7 , fd41::/16=1000")]);
        assert_eq!(problems, Vec::<String>::new());
        let weight = |ip: &str| tuning.weight(ip.parse().unwrap());
        assert_eq!(weight("10.61.3.21"), Some(0));
        assert_eq!(weight("10.61.3.22"), Some(7));
        assert_eq!(weight("10.62.3.22"), Some(2));
        assert_eq!(weight("fd41::1"), Some(1000));
        assert_eq!(weight("192.0.2.1"), None);
    }

    #[test]
    fn bad_values_are_named_and_the_rest_is_used() {
        let (tuning, problems) = read(&[
            (BALANCE, "fair"),
            (SCHEDULER, "w rr"),
            (COUNTERS, "yes"),
            (WEIGHTS, "10.0.0.1,10.0.0.2=x,cart=1,10.0.0.3=1001,10.0.0.4=5,10.0.0.4=6"),
        ]);
        assert_eq!((tuning.balance, tuning.counters), (Balance::Default, false));
        assert_eq!(tuning.scheduler, None);
        assert_eq!(tuning.weight("10.0.0.4".parse().unwrap()), Some(5));
        assert_eq!(
            problems,
            [
                "Service shop/cart: metadata.annotations[proxier.dev/balance]: \"fair\" is none of \
                 random, round-robin and source-hash: the mode's own way is used",
                "Service shop/cart: metadata.annotations[proxier.dev/ipvs-scheduler]: \"w rr\" is \
                 not the name of a scheduler: ignored",
                "Service shop/cart: metadata.annotations[proxier.dev/counters]: \"yes\" is neither \
                 true nor false: read as false",
                "Service shop/cart: metadata.annotations[proxier.dev/endpoint-weights]: \
                 \"10.0.0.1\": not ADDRESS=WEIGHT or CIDR=WEIGHT: skipped",
                "Service shop/cart: metadata.annotations[proxier.dev/endpoint-weights]: \
                 \"10.0.0.2=x\": \"x\" is not a weight (0-1000): skipped",
                "Service shop/cart: metadata.annotations[proxier.dev/endpoint-weights]: \"cart=1\": \
                 \"cart\" is neither an address nor a CIDR: skipped",
                "Service shop/cart: metadata.annotations[proxier.dev/endpoint-weights]: \
                 \"10.0.0.3=1001\": \"1001\" is not a weight (0-1000): skipped",
                "Service shop/cart: metadata.annotations[proxier.dev/endpoint-weights]: \
                 \"10.0.0.4=6\": 10.0.0.4/32 has a weight already: skipped",
            ]
        );
    }
}

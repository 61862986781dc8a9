//! What must hold, and whether it does.

use crate::schema::{Aim, Contender, Report, Spread};

const NFTABLES: &str = "nftables";

/// Compares a report with every aim. An aim at a size that was not measured stays open.
pub(crate) fn check(report: &Report) -> Vec<Aim> {
    vec![
        first_sync(report),
        change(report),
        pool(report),
        added(report, NFTABLES, 45_000, 2.0, worst_added),
        added(report, "iptables", 30_000, 15.0, last_added),
        restart(report),
        memory(report),
        versus(report, "first sync", 20.0, |it| it.control.first_sync_ms.map(|it| it.p50)),
        versus(report, "one change", 100.0, |it| it.control.change_us.map(|it| it.p50)),
        soak(report),
    ]
}

fn aim(what: impl Into<String>, aim: &str, found: Option<(String, bool)>) -> Aim {
    let (measured, met) = match found {
        Some((measured, met)) => (measured, Some(met)),
        None => ("not measured in this run".to_owned(), None),
    };
    Aim { what: what.into(), aim: aim.to_owned(), measured, met }
}

fn first_sync(report: &Report) -> Aim {
    let found = report.find(45_000, 3, NFTABLES).and_then(|it| it.control.first_sync_ms);
    let found = found.map(|it| (format!("{:.2} s", it.p50 / 1e3), it.p50 <= 1000.0));
    aim("nftables, 45,000 x 3, empty table to every VIP programmed", "at most 1 s", found)
}

/// Medians may differ by half between the ends: caches are no growth.
fn change(report: &Report) -> Aim {
    let spread = |(size, it): (usize, &Contender)| Some((size, it.control.change_us?));
    let all: Vec<(usize, Spread)> = report.series(NFTABLES).filter_map(spread).collect();
    let ends = all
        .first()
        .zip(all.last())
        .filter(|((small, _), (big, _))| *small <= 100 && *big >= 45_000);
    let found = ends.map(|((_, small), (_, big))| {
        let p99 = all.iter().map(|(_, it)| it.p99).fold(0.0, f64::max);
        let text =
            format!("p99 {p99:.0} µs; p50 {:.0} µs at 100, {:.0} µs at 45,000", small.p50, big.p50);
        (text, p99 <= 250.0 && big.p50 <= small.p50 * 1.5)
    });
    let what = "nftables, one-endpoint change";
    aim(what, "p99 at most 250 µs, no growth from 100 to 45,000 Services", found)
}

fn pool(report: &Report) -> Aim {
    let pools = || report.pools.iter().filter(|it| it.endpoints == 10_000);
    let text = pools().map(|it| format!("{} {}", it.mode, it.ops_max)).collect::<Vec<_>>();
    let found = (!text.is_empty()).then(|| (text.join(", "), pools().all(|it| it.ops_max <= 6)));
    aim("operations for one endpoint of a 10,000-endpoint Service", "at most 6", found)
}

/// Of the three ways through Services.
pub(crate) fn worst_added(it: &Contender) -> Option<f64> {
    let path = it.path.as_ref()?;
    let services = [path.first_us, path.random_us, path.last_us];
    Some(services.map(|way| way.p50 - path.direct_us.p50).into_iter().fold(f64::MIN, f64::max))
}

pub(crate) fn last_added(it: &Contender) -> Option<f64> {
    it.path.as_ref().map(|path| path.last_us.p50 - path.direct_us.p50)
}

fn added(
    report: &Report,
    mode: &str,
    services: usize,
    most: f64,
    of: impl Fn(&Contender) -> Option<f64>,
) -> Aim {
    let found = report.find(services, 3, mode).and_then(of);
    let found = found.map(|added| (format!("{added:.1} µs"), added <= most));
    let which = if mode == NFTABLES { "worst of first, random and last" } else { "last one" };
    let what =
        format!("{mode}, added connect latency at {},000 Services, {which}", services / 1000);
    aim(what, &format!("at most {most:.0} µs p50 over the direct path"), found)
}

/// The userspace mode's listeners end with its process.
fn restart(report: &Report) -> Aim {
    let mut text = Vec::new();
    let mut met = true;
    for mode in report.names().into_iter().filter(|name| *name != "userspace") {
        let control = report.series(mode).last().map(|(size, it)| (size, &it.control));
        let found =
            control.and_then(|(size, it)| Some((size, it.restart_ops?, it.restart_commits?)));
        if let Some((size, ops, commits)) = found {
            text.push(format!("{mode} {ops} operations, {commits} commits at {size}"));
            met &= ops == 0 && commits == 0;
        }
    }
    let found = (!text.is_empty()).then(|| (text.join("; "), met));
    aim("restart with unchanged state", "0 kernel writes, heard by a netlink listener", found)
}

fn memory(report: &Report) -> Aim {
    let found = report.find(45_000, 3, NFTABLES).and_then(|it| it.memory).map(|it| {
        let mib = |kib: u64| kib.div_ceil(1024);
        let text = format!("{} MiB (at its peak {} MiB)", mib(it.resident_kib), mib(it.peak_kib));
        (text, mib(it.resident_kib) <= 64)
    });
    aim("nftables, resident memory at 45,000 x 3, model included", "at most 64 MiB", found)
}

fn versus(report: &Report, what: &str, least: f64, of: impl Fn(&Contender) -> Option<f64>) -> Aim {
    let theirs = report.find(5000, 10, "nft -f").and_then(&of);
    let ours = report.find(5000, 10, NFTABLES).and_then(&of);
    let found = theirs.zip(ours).map(|(theirs, ours)| {
        let ratio = theirs / ours;
        (format!("{ratio:.0} x"), ratio >= least)
    });
    let what = format!("{what} against `nft -f` with kube-proxy's layout, 5,000 x 10");
    aim(what, &format!("at least {least:.0} x faster"), found)
}

/// Memory may grow by a tenth: allocators keep some.
fn soak(report: &Report) -> Aim {
    let fits = |it: &&crate::schema::SoakReport| it.mode == NFTABLES && it.services == 10_000;
    let found = report.soaks.iter().find(fits).map(|it| {
        let text = format!(
            "{} changes, {} repaired, {} to {} KiB",
            it.changes, it.repaired, it.early_kib, it.late_kib
        );
        let flat = it.late_kib <= it.early_kib + it.early_kib / 10;
        (text, it.changes >= 100_000 && it.repaired == 0 && flat)
    });
    let aims = "kernel and prediction equal, memory flat";
    aim("nftables, 100,000 random changes at 10,000 Services", aims, found)
}

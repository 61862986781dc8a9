//! What a report says, as tables.

use std::fmt::Write;

use super::{
    grid::Grid,
    units::{ms, us},
};
use crate::schema::{Contender, Report, Spread, WorldReport};

/// For the terminal.
pub(crate) fn terminal(report: &Report) -> String {
    let mut text = String::new();
    for grid in all(report).iter().chain([&aims(report)]) {
        writeln!(text, "{}", grid.text()).unwrap_or_default();
    }
    for note in notes(report) {
        writeln!(text, "note: {note}").unwrap_or_default();
    }
    text
}

/// For the README: the biggest world of the series, the one for comparison, and the aims.
pub(crate) fn markdown(report: &Report) -> String {
    let endpoints = report.worlds.first().map_or(0, |world| world.endpoints);
    let biggest = report.worlds.iter().rfind(|world| world.endpoints == endpoints);
    let compare = report.worlds.iter().find(|world| world.endpoints != endpoints);
    let worlds = biggest.into_iter().chain(compare);
    let grids = worlds.map(|world| summary(world).compact()).chain([aims(report)]);
    grids.map(|grid| grid.markdown()).collect::<Vec<_>>().join("\n")
}

/// All figures, small worlds first.
pub(super) fn all(report: &Report) -> Vec<Grid> {
    let mut grids = Vec::new();
    for world in &report.worlds {
        grids.push(programming(world).compact());
        grids.push(changes(world).compact());
        grids.push(packets(world).compact());
    }
    grids.extend([pools(report), soaks(report)]);
    grids.retain(|grid| !grid.rows.is_empty());
    grids
}

/// What was left out, and what to know about who took part; each once.
pub(super) fn notes(report: &Report) -> Vec<String> {
    let mut notes = report.notes.clone();
    for world in &report.worlds {
        for contender in &world.contenders {
            for note in &contender.notes {
                let about = contender.name.as_str();
                let note = if note.starts_with("fed ") {
                    format!("{about}: {note}")
                } else {
                    format!("{about}, {} x {}: {note}", world.services, world.endpoints)
                };
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
    }
    notes
}

fn size(world: &WorldReport) -> String {
    let runs = if world.runs == 1 { "run" } else { "runs" };
    format!("{} Services x {} endpoints, {} {runs}", world.services, world.endpoints, world.runs)
}

fn programming(world: &WorldReport) -> Grid {
    let head = [
        "programming",
        "to fragments",
        "first sync",
        "objects",
        "batches",
        "restart",
        "restart ops",
        "commits heard",
        "cleanup",
        "resident",
        "peak",
    ];
    let mut grid = Grid::new(size(world), &head);
    for it in &world.contenders {
        let control = &it.control;
        grid.row([
            it.name.clone(),
            median(control.model_ms, ms),
            first_sync(it),
            count(control.objects),
            count(control.batches),
            median(control.restart_ms, ms),
            count(control.restart_ops),
            count(control.restart_commits),
            median(control.cleanup_ms, ms),
            or_dash(it.memory.map(|it| mib(it.resident_kib))),
            or_dash(it.memory.map(|it| mib(it.peak_kib))),
        ]);
    }
    grid
}

fn changes(world: &WorldReport) -> Grid {
    let head = [
        "a change, p50 / p99",
        "one endpoint",
        "max",
        "ops at most",
        "plan",
        "instructions",
        "Service added",
        "removed",
        "rolling, each",
        "steps",
    ];
    let mut grid = Grid::new("", &head);
    for it in &world.contenders {
        let control = &it.control;
        let instructions = control.change_instructions.map(|it| format!("{:.0}", it.p50));
        let unknown = || if it.memory.is_some() { "not available" } else { "-" }.to_owned();
        let rolling = control.rolling.as_ref();
        grid.row([
            it.name.clone(),
            both(control.change_us),
            or_dash(control.change_us.map(|it| us(it.max))),
            count(control.change_ops_max),
            both(control.plan_us),
            instructions.unwrap_or_else(unknown),
            both(control.service_added_us),
            both(control.service_removed_us),
            both(rolling.map(|it| it.step_us)),
            or_dash(rolling.map(|it| format!("{} of {}", it.steps, it.endpoints))),
        ]);
    }
    grid
}

fn packets(world: &WorldReport) -> Grid {
    let head = [
        "connect, p50 / p99",
        "no rules",
        "direct",
        "first",
        "random",
        "last",
        "last - direct",
        "conn/s",
        "direct",
        "MB/s",
        "direct",
    ];
    let mut grid = Grid::new("", &head);
    for it in &world.contenders {
        let Some(path) = &it.path else { continue };
        let ways = [path.bare_us, path.direct_us, path.first_us, path.random_us, path.last_us];
        let ways = ways.map(|way| both(Some(way)));
        let added = signed(path.last_us.p50 - path.direct_us.p50);
        let rates = path.rate.iter().flat_map(|rate| [rate.service.p50, rate.direct.p50]);
        let rates = rates.map(|rate| format!("{rate:.0}"));
        grid.row(std::iter::once(it.name.clone()).chain(ways).chain([added]).chain(rates));
    }
    grid
}

fn summary(world: &WorldReport) -> Grid {
    let head = [
        "",
        "first sync",
        "one endpoint changes, p50 / p99",
        "operations",
        "restart, operations",
        "resident",
        "connect, last Service over direct",
    ];
    let mut grid = Grid::new(size(world), &head);
    for it in &world.contenders {
        let control = &it.control;
        let added = it.path.as_ref().map(|path| signed(path.last_us.p50 - path.direct_us.p50));
        let restart = control.restart_ms.zip(control.restart_ops);
        grid.row([
            format!("`{}`", it.name),
            first_sync(it),
            both(control.change_us),
            count(control.change_ops_max),
            or_dash(restart.map(|(time, ops)| format!("{}, {ops}", ms(time.p50)))),
            or_dash(it.memory.map(|it| mib(it.resident_kib))),
            or_dash(added),
        ]);
    }
    grid
}

fn pools(report: &Report) -> Grid {
    let head = ["one endpoint of very many", "endpoints", "ops at most", "p50 / p99"];
    let mut grid = Grid::new("", &head);
    for it in &report.pools {
        let (endpoints, ops) = (it.endpoints.to_string(), it.ops_max.to_string());
        grid.row([it.mode.clone(), endpoints, ops, both(Some(it.change_us))]);
    }
    grid
}

fn soaks(report: &Report) -> Grid {
    let head = ["random changes", "Services", "changes", "repaired", "resident early", "late"];
    let mut grid = Grid::new("", &head);
    for it in &report.soaks {
        let numbers = [it.services, it.changes, it.repaired].map(|it| it.to_string());
        let memory = [it.early_kib, it.late_kib].map(|kib| format!("{kib} KiB"));
        grid.row(std::iter::once(it.mode.clone()).chain(numbers).chain(memory));
    }
    grid
}

pub(super) fn aims(report: &Report) -> Grid {
    let mut grid = Grid::new("", &["aim", "wanted", "measured", ""]);
    for it in &report.aims {
        let met = match it.met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "open",
        };
        grid.row([it.what.clone(), it.aim.clone(), it.measured.clone(), met.to_owned()]);
    }
    grid
}

fn first_sync(it: &Contender) -> String {
    let above = it.control.first_sync_above_ms.map(|it| format!("> {}", ms(it)));
    above.unwrap_or_else(|| median(it.control.first_sync_ms, ms))
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn count(count: Option<usize>) -> String {
    or_dash(count.map(|it| it.to_string()))
}

fn median(spread: Option<Spread>, show: fn(f64) -> String) -> String {
    or_dash(spread.map(|it| show(it.p50)))
}

/// Median and tail of microseconds.
fn both(spread: Option<Spread>) -> String {
    or_dash(spread.map(|it| format!("{} / {}", us(it.p50), us(it.p99))))
}

fn signed(us: f64) -> String {
    format!("{us:+.1} µs")
}

fn mib(kib: u64) -> String {
    format!("{} MiB", kib.div_ceil(1024))
}

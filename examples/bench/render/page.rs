//! One page that needs nothing else.

use super::{
    grid::escaped,
    plot,
    table::{self, notes},
};
use crate::schema::Report;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#24292f;--paper:#fff;--line:#d9dee4;--quiet:#656d76}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#2f353d;--quiet:#9198a1}}
body{margin:0 auto;padding:1rem;max-width:72rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);\
background:var(--paper)}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}h3:empty{display:none}
p,li,figcaption{color:var(--quiet);max-width:70ch}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}
figure{margin:0}svg{width:100%;height:auto}figcaption{font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}code{overflow-wrap:anywhere}";

pub(super) fn html(report: &Report) -> String {
    let machine = &report.machine;
    let figures: String = plot::pictures(report)
        .iter()
        .map(|picture| {
            let caption = escaped(picture.caption);
            format!("<figure>{}<figcaption>{caption}</figcaption></figure>\n", picture.svg)
        })
        .collect();
    let tables: String = table::all(report).iter().map(super::grid::Grid::html).collect();
    let aims = table::aims(report).html();
    let notes: String =
        notes(report).iter().map(|note| format!("<li>{}</li>\n", escaped(note))).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>proxier {version}: benchmarks</title>\n<style>{STYLE}</style></head>\n<body>\n\
         <h1>proxier {version}: benchmarks</h1>\n\
         <p>{date} · {cpu}, {cores} cores, {memory} MiB · Linux {kernel} · {build} build · \
         {took:.0} s<br><code>bench {command}</code></p>\n\
         <div class=\"plots\">\n{figures}</div>\n<h2>What was aimed at</h2>\n{aims}\
         <h2>Figures</h2>\n{tables}\
         <h2>Notes</h2>\n<ul>\n{notes}</ul>\n</body></html>\n",
        version = escaped(&report.version),
        date = escaped(&report.date),
        cpu = escaped(&machine.cpu),
        cores = machine.cores,
        memory = machine.memory_mib,
        kernel = escaped(&machine.kernel),
        build = escaped(&machine.build),
        took = report.took_s,
        command = escaped(&report.command),
    )
}

//! Curves against the size of the world, as SVG.

use std::sync::Arc;

use kuva::{
    TickFormat,
    backend::svg::SvgBackend,
    plot::{LegendPosition, LinePlot, ScatterPlot},
    render::{layout::Layout, plots::Plot, render::render_multiple, theme::Theme},
};

use crate::{
    aims,
    schema::{Contender, Report},
};

/// Colours on light pages, and what stands for them on dark ones.
const TEXT: [&str; 2] = ["#24292f", "#e6edf3"];
const AXIS: [&str; 2] = ["#656d76", "#9198a1"];
const GRID: [&str; 2] = ["#d9dee4", "#2f353d"];
const OTHER: [&str; 2] = ["#6e7781", "#848d97"];

/// Everyone's colour; peers are drawn with dashes.
const COLOURS: [(&str, [&str; 2]); 7] = [
    ("nftables", ["#0a5fd9", "#58a6ff"]),
    ("iptables", ["#c4480c", "#f0883e"]),
    ("ipvs", ["#7c4ad6", "#bc8cff"]),
    ("userspace", ["#1b7d38", "#3fb950"]),
    ("nft -f", ["#0b6e8f", "#39c5cf"]),
    ("iptables-legacy-restore", ["#8f6400", "#d29922"]),
    ("iptables-nft-restore", ["#b5316e", "#f778ba"]),
];

/// Small enough to be read on a phone.
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 400.0;
/// Of the legend.
const ROW: f64 = 20.0;

/// A plot in a file.
pub(super) struct Picture {
    pub(super) name: &'static str,
    /// One sentence below the plot.
    pub(super) caption: &'static str,
    pub(super) svg: String,
}

/// A point of a line, and the ends of its band.
type Value = (f64, Option<[f64; 2]>);

/// What is drawn: a value, and how far it spreads.
struct Curves {
    name: &'static str,
    title: &'static str,
    caption: &'static str,
    unit: &'static str,
    log: bool,
    value: fn(&Contender) -> Option<Value>,
}

const ALL: [Curves; 5] = [
    Curves {
        name: "first-sync",
        title: "First sync",
        caption: "From an empty kernel to everything programmed; the band is from the fastest to the \
                  slowest run.",
        unit: "seconds",
        log: true,
        value: |it| {
            let spread = it.control.first_sync_ms?;
            Some((spread.p50 / 1e3, Some([spread.min / 1e3, spread.max / 1e3])))
        },
    },
    Curves {
        name: "change",
        title: "One endpoint changes",
        caption: "A sync from call to return (peers: one run of the tool); the line is the median, the \
                  band ends at the 99th percentile.",
        unit: "microseconds",
        log: true,
        value: |it| it.control.change_us.map(|it| (it.p50, Some([it.p50, it.p99]))),
    },
    Curves {
        name: "latency",
        title: "Added TCP connect latency, last Service",
        caption: "Medians, over the direct path through the same node, connection by connection in \
                  turn.",
        unit: "microseconds",
        log: false,
        value: |it| aims::last_added(it).map(|added| (added, None)),
    },
    Curves {
        name: "restart",
        title: "Restart with nothing to do",
        caption: "A new process reads what the kernel holds and finds that it is right.",
        unit: "seconds",
        log: true,
        value: |it| it.control.restart_ms.map(|it| (it.p50 / 1e3, None)),
    },
    Curves {
        name: "memory",
        title: "Resident memory",
        caption: "Of a process that holds the world, model included; the band ends at the peak.",
        unit: "MiB",
        log: false,
        value: |it| {
            let memory = it.memory?;
            let mib = |kib: u64| f64::from(u32::try_from(kib).unwrap_or(u32::MAX)) / 1024.0;
            let resident = mib(memory.resident_kib);
            Some((resident, Some([resident, mib(memory.peak_kib)])))
        },
    },
];

/// Those for which there is something to draw.
pub(super) fn pictures(report: &Report) -> Vec<Picture> {
    ALL.iter().filter_map(|curves| curves.picture(report)).collect()
}

impl Curves {
    fn picture(&self, report: &Report) -> Option<Picture> {
        let lines: Vec<_> = report
            .names()
            .into_iter()
            .enumerate()
            .flat_map(|(place, name)| self.line(report, name, place))
            .collect();
        if lines.is_empty() {
            return None;
        }
        let mut layout = Layout::auto_from_plots(&lines)
            .with_width(WIDTH)
            .with_height(HEIGHT)
            .with_title(self.title)
            .with_x_label("Services")
            .with_y_label(self.unit)
            .with_log_x()
            .with_x_axis_max(Self::right(report))
            .with_title_size(16)
            .with_label_size(14)
            .with_tick_size(13)
            .with_body_size(13)
            .with_legend_position(LegendPosition::OutsideBottomColumns)
            .with_legend_col_limit(2)
            .with_legend_box(false)
            .with_font_family("system-ui, sans-serif")
            .with_tick_format(TickFormat::Custom(Arc::new(plain)))
            .with_theme(theme());
        if self.log {
            layout = layout.with_log_y();
        }
        // The legend has two columns, and the library keeps room for two rows of them.
        let rows = (lines.len() / 2).div_ceil(2);
        let below = f64::from(u32::try_from(rows.saturating_sub(2)).unwrap_or_default()) * ROW;
        let svg = SvgBackend::new().render_scene(&render_multiple(lines, layout));
        Some(Picture { name: self.name, caption: self.caption, svg: dressed(&svg, below) })
    }

    /// Where the axis ends: a little beyond the biggest world.
    fn right(report: &Report) -> f64 {
        let biggest = report.worlds.iter().map(|world| world.services).max().unwrap_or(1);
        f64::from(u32::try_from(biggest).unwrap_or(u32::MAX)) * 1.12
    }

    /// A line with its band, and points where it was measured.
    fn line(&self, report: &Report, name: &str, place: usize) -> Vec<Plot> {
        let measured = |(size, it): (usize, &Contender)| {
            let (value, band) = (self.value)(it)?;
            let size = f64::from(u32::try_from(size).unwrap_or(u32::MAX));
            (!self.log || value > 0.0).then_some((size, value, band.unwrap_or([value; 2])))
        };
        let points: Vec<_> = report.series(name).filter_map(measured).collect();
        if points.is_empty() {
            return Vec::new();
        }
        let colour = colour(name)[0];
        let line = || points.iter().map(|(size, value, _)| (*size, *value));
        let mut curve = LinePlot::new()
            .with_data(line())
            .with_color(colour)
            .with_stroke_width(2.0)
            .with_legend(name.trim_end_matches("-restore"))
            .with_band(
                points.iter().map(|(_, _, [low, _])| *low),
                points.iter().map(|(_, _, [_, high])| *high),
            );
        if place > 0 && report.names().len() > 1 && !is_mode(name) {
            curve = curve.with_dashed();
        }
        let dots = ScatterPlot::new().with_data(line()).with_color(colour).with_size(3.5);
        vec![Plot::Line(curve), Plot::Scatter(dots)]
    }
}

fn is_mode(name: &str) -> bool {
    name.parse::<proxier::Mode>().is_ok()
}

fn colour(name: &str) -> [&'static str; 2] {
    COLOURS.iter().find(|(known, _)| *known == name).map_or(OTHER, |(_, colour)| *colour)
}

fn theme() -> Theme {
    Theme {
        background: "none".to_owned(),
        axis_color: AXIS[0].to_owned(),
        grid_color: GRID[0].to_owned(),
        tick_color: AXIS[0].to_owned(),
        text_color: TEXT[0].to_owned(),
        legend_bg: "none".to_owned(),
        legend_border: "none".to_owned(),
        ..Theme::light()
    }
}

/// A number as people write it, short.
fn plain(value: f64) -> String {
    match value.abs() {
        ..1.0 => format!("{value}"),
        1.0..1e3 => format!("{value:.0}"),
        1e3..1e6 => format!("{}k", value / 1e3),
        _ => format!("{}M", value / 1e6),
    }
}

/// Makes the picture fit its page: it scales, dark pages get other colours, and nothing is cut off
/// below.
fn dressed(svg: &str, below: f64) -> String {
    let Some((tag, rest)) = svg.split_once('>') else { return svg.to_owned() };
    let attribute = |name: &str| {
        let from = tag.split_once(&format!(" {name}=\"")).map_or("", |(_, rest)| rest);
        from.split('"').next().unwrap_or_default()
    };
    let (width, height) = (attribute("width"), attribute("height"));
    let taller = height.parse().map_or(HEIGHT, |height: f64| height + below);
    let tag = tag.replace(&format!(" height=\"{height}\""), &format!(" height=\"{taller}\""));
    let colours = COLOURS.iter().map(|(_, colour)| colour).chain([&TEXT, &AXIS, &GRID, &OTHER]);
    let rules: String = colours
        .map(|[light, dark]| {
            format!("[fill=\"{light}\"]{{fill:{dark}}}[stroke=\"{light}\"]{{stroke:{dark}}}")
        })
        .collect();
    format!(
        "{tag} viewBox=\"0 0 {width} {taller}\" role=\"img\"><style>@media (prefers-color-scheme: \
         dark){{{rules}}}</style>{rest}\n"
    )
}

//! Text for people: colours where they are wanted, columns that fit, a reader that may go away.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::Duration,
};

/// Columns when nobody says how many there are.
const DEFAULT_WIDTH: usize = 100;

/// Nothing is made to fit into less, and nothing is spread over more.
const WIDTHS: std::ops::RangeInclusive<usize> = 72..=120;

/// Separates answers.
pub(crate) const DOT: &str = " · ";

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    /// Somebody reads it.
    open: bool,
    colour: bool,
    width: usize,
}

/// How text looks on a terminal.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    Bold,
    Dim,
    Green,
    Red,
}

impl Screen {
    /// The screen; a muted one shows nothing.
    pub(crate) fn new(muted: bool) -> Self {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let colour =
            terminal && !set("NO_COLOR") && env::var_os("TERM").is_none_or(|it| it != "dumb");
        let columns = rustix::termios::tcgetwinsize(&stdout).ok().map(|size| size.ws_col.into());
        let told = || env::var("COLUMNS").ok()?.parse().ok();
        let width = columns.filter(|columns| *columns > 0).or_else(told).unwrap_or(DEFAULT_WIDTH);
        Self { open: !muted, colour, width: width.clamp(*WIDTHS.start(), *WIDTHS.end()) }
    }

    /// Somebody reads it.
    pub(crate) const fn shows(&self) -> bool {
        self.open
    }

    /// Columns.
    pub(crate) const fn width(&self) -> usize {
        self.width
    }

    /// Prints a line. Once the reader is gone, nothing happens any more.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) {
        if self.open && writeln!(io::stdout(), "{}", text.as_ref()).is_err() {
            self.open = false;
        }
    }

    /// Prints text, broken at spaces, after a label in a column of its own.
    pub(crate) fn labelled(&mut self, label: &str, text: &str) {
        const LABEL: usize = 12;
        for (index, piece) in wrap(text, self.width - LABEL, " ").iter().enumerate() {
            let label = if index == 0 { label } else { "" };
            let label = self.paint(Style::Dim, &format!("{label:<LABEL$}"));
            self.line(format!("{label}{piece}"));
        }
    }

    /// Prints a title with some room above.
    pub(crate) fn title(&mut self, text: &str) {
        self.line("");
        self.line(self.paint(Style::Bold, text));
    }

    /// The text in a style, if there are styles.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Green => 32,
            Style::Red => 31,
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// ✓ or ✗.
    pub(crate) fn mark(&self, good: bool) -> String {
        if good { self.paint(Style::Green, "✓") } else { self.paint(Style::Red, "✗") }
    }

    /// Prints rows in aligned columns, broken where they do not fit.
    pub(crate) fn table(&mut self, items: &[Item]) {
        let widths = self.fit(items);
        for item in items {
            match item {
                Item::Heading(text, about) => {
                    let fits = columns(text) + 2 + columns(about) <= self.width;
                    let between = if fits { "  " } else { "\n    " };
                    let about = self.paint(Style::Dim, &cut(about, self.width - 4));
                    self.line(format!("{}{between}{about}", self.paint(Style::Bold, text)));
                }
                Item::Note(text) => {
                    for piece in wrap(text, self.width - 4, " ") {
                        self.line(format!("    {piece}"));
                    }
                }
                Item::Row(cells, good) => self.row(cells, *good, &widths),
            }
        }
    }

    fn row(&mut self, cells: &[String], good: Option<bool>, widths: &[usize]) {
        let wrapped: Vec<Vec<String>> =
            cells.iter().zip(widths).map(|(cell, width)| wrap(cell, *width, DOT)).collect();
        let height = wrapped.iter().map(Vec::len).max().unwrap_or_default();
        for line in 0..height {
            let mut text = String::from(" ");
            for (pieces, width) in wrapped.iter().zip(widths) {
                text.push(' ');
                let piece = pieces.get(line).map_or("", String::as_str);
                text.push_str(piece);
                text.extend(std::iter::repeat_n(' ', width + 1 - columns(piece).min(*width)));
            }
            match good.filter(|_| line == 0) {
                Some(good) => self.line(format!("{text}{}", self.mark(good))),
                None => self.line(text.trim_end()),
            }
        }
    }

    /// The width of each column: what it needs, less what there is not in the widest ones.
    fn fit(&self, items: &[Item]) -> Vec<usize> {
        let mut widths: Vec<usize> = Vec::new();
        for item in items {
            let Item::Row(cells, _) = item else { continue };
            widths.resize(widths.len().max(cells.len()), 0);
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(columns(cell));
            }
        }
        let gaps = 2 + 2 * widths.len() + 1;
        while widths.iter().sum::<usize>() + gaps > self.width {
            let Some(widest) = widths.iter_mut().max().filter(|width| **width > 12) else { break };
            *widest -= 1;
        }
        widths
    }
}

/// A part of a table.
#[derive(Debug)]
pub(crate) enum Item {
    /// A line of its own: a name, and something about it.
    Heading(String, String),
    /// A remark to the row above.
    Note(String),
    /// Cells, and whether all is well.
    Row(Vec<String>, Option<bool>),
}

/// A time in the unit that suits it.
pub(crate) fn time(duration: Duration) -> String {
    let us = duration.as_micros();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{:.1} ms", duration.as_secs_f64() * 1e3),
        10_000..1_000_000 => format!("{} ms", duration.as_millis()),
        _ => format!("{:.1} s", duration.as_secs_f64()),
    }
}

/// `one thing`, `2 things`.
pub(crate) fn many(count: usize, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}

/// Text that is cut off where the line ends.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

fn columns(text: &str) -> usize {
    text.chars().count()
}

/// Breaks text into lines of at most `width`: at separators, and at spaces where that is not enough.
pub(crate) fn wrap(text: &str, width: usize, separator: &str) -> Vec<String> {
    let separator = if text.contains(separator) { separator } else { " " };
    let mut lines: Vec<String> = Vec::new();
    for piece in text.split(separator) {
        match lines.last_mut() {
            Some(line) if columns(line) + columns(separator) + columns(piece) <= width => {
                line.push_str(separator);
                line.push_str(piece);
            }
            _ if separator != " " && columns(piece) > width => {
                lines.extend(wrap(piece, width, " "))
            }
            _ => lines.push(piece.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_answers_and_not_inside_them() {
        assert_eq!(
            wrap("web-a 11 · web-b 9 · web-c 7", 20, DOT),
            ["web-a 11 · web-b 9", "web-c 7"]
        );
        assert_eq!(wrap("masqueraded as 172.20.7.11", 15, DOT), ["masqueraded as", "172.20.7.11"]);
        assert_eq!(wrap("kept · itself as 10.1.1.1", 10, DOT), ["kept", "itself as", "10.1.1.1"]);
        assert_eq!(wrap("", 15, DOT), [""]);
    }

    #[test]
    fn columns_shrink_until_they_fit() {
        let screen = Screen { open: false, colour: false, width: 72 };
        let row = Item::Row(vec!["x".repeat(8), "y".repeat(60), "z".repeat(30)], Some(true));
        let widths = screen.fit(&[row]);
        assert_eq!(widths.first(), Some(&8));
        assert!(widths.iter().sum::<usize>() + 9 <= 72, "{widths:?}");
    }
}

//! From a report to files.

mod grid;
mod page;
mod plot;
pub(crate) mod table;
mod units;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use crate::schema::Report;

/// Writes the page, the figures, what a README shows of them, and the plots, each a file that works on
/// light and dark pages. Returns the page.
pub(crate) fn write_report(report: &Report, directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    fs::create_dir_all(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    for picture in plot::pictures(report) {
        write(&directory.join(format!("{}.svg", picture.name)), &picture.svg)?;
    }
    let json = serde_json::to_string_pretty(report)?;
    write(&directory.join("results.json"), &(json + "\n"))?;
    write(&directory.join("summary.md"), &table::markdown(report))?;
    let page = directory.join("index.html");
    write(&page, &page::html(report))?;
    Ok(page)
}

fn write(file: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()).into())
}

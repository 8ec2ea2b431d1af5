//! What people and programs read: lines, tables, JSON and progress bars.
//!
//! Results go to standard output; warnings and progress to standard error.

use std::{
    fmt,
    io::{self, Write as _},
    time::Duration,
};

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Prints one line of results.
///
/// A reader that has gone away (`luna lora ls | head -1`) wants no more; that is no error.
pub(crate) fn print_line(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Prints something the user should know.
pub(crate) fn print_warning(warning: &str) {
    let _ = writeln!(io::stderr(), "warning: {warning}");
}

/// Prints a value as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    print_line(format_args!("{text}"));
    Ok(())
}

/// Prints rows under a header, without lines around them.
pub(crate) fn print_table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for line in table.lines() {
        print_line(format_args!("{}", line.trim_end()));
    }
}

/// A progress bar that counts bytes; hidden where standard error is no terminal.
pub(crate) fn bytes_bar(what: &str) -> ProgressBar {
    let style = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// A sign of life for work of unknown length; hidden where standard error is no terminal.
pub(crate) fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A size for people, in powers of 1024.
pub(crate) fn human_bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

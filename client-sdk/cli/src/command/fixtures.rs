//! `luna fixtures`: seeded models, LoRAs and embeddings, for tests and to try things out.

use std::process::ExitCode;

use fixtures::{Selection, Size};

use crate::{
    args::{FixtureSize, FixturesArgs},
    output::{bytes_bar, human_bytes, print_line},
};

/// Writes the files; complete ones are kept.
pub(crate) fn run(args: &FixturesArgs) -> anyhow::Result<ExitCode> {
    let sizes = match args.size {
        FixtureSize::Tiny => vec![Size::Tiny],
        FixtureSize::Full => vec![Size::Full],
        FixtureSize::All => vec![Size::Tiny, Size::Full],
    };
    let selection = Selection { sizes, full_dtype: args.weights_dtype, ..Selection::default() };
    let bar = bytes_bar(&format!("writing {}", args.directory.display()));
    let summary = fixtures::write_all(&args.directory, &selection, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes_done);
    });
    bar.finish_and_clear();
    let summary = summary?;
    let bytes = human_bytes(summary.bytes_written);
    print_line(format_args!(
        "{}: {} files written ({bytes}), {} kept",
        args.directory.display(),
        summary.files_written,
        summary.files_kept
    ));
    Ok(ExitCode::SUCCESS)
}

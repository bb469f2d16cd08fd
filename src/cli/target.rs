//! Where a command writes to: refusals before the work, not after it.

use super::source::is_stdio;
use anyhow::{Result, bail};
use std::io::{self, IsTerminal};
use std::path::Path;

/// Endings of other formats than `WAV`.
pub(super) const NOT_WAV: &[&str] =
    &["mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "mp4", "aiff", "npy", "npz", "pt", "pth", "safetensors", "h5"];
/// Endings of other formats than `PNG`.
pub(super) const NOT_PNG: &[&str] =
    &["jpg", "jpeg", "gif", "webp", "bmp", "svg", "pdf", "wav", "npy", "npz", "pt", "jsonl"];

/// Refuses an output whose name promises another `format` than is written there, and one that is an input.
pub(super) fn check<'a>(
    output: &Path,
    (format, others): (&str, &[&str]),
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<()> {
    if is_stdio(output) {
        return Ok(());
    }
    let same = |input: &Path| match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output && output.is_file(),
        _ => false,
    };
    if inputs.into_iter().any(same) {
        bail!("{}: is what is read; give the {format} another name", output.display());
    }
    let ending = output.extension().unwrap_or_default();
    if others.iter().any(|other| ending.eq_ignore_ascii_case(other)) {
        bail!("{}: what is written is {format}; give the file a name that ends so", output.display());
    }
    Ok(())
}

/// Refuses to write bytes that nobody can read to a terminal.
pub(super) fn check_stdout() -> Result<()> {
    if io::stdout().is_terminal() {
        bail!("standard output is a terminal: pipe it into a program, or name a file");
    }
    Ok(())
}

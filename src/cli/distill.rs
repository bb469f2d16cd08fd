//! `melglow distill`: a voice from another voice.

use super::train::{RunArgs, say_end, stop_on_interrupt};
use crate::heap;
use crate::train::{Recipe, distill};
use clap::Args;
use std::path::PathBuf;

/// Train a voice on another voice's density: a fast student learns from a slow teacher
///
/// The student speaks real mels, and the teacher says how likely that sound is; what falls is the
/// divergence of the student from the teacher, in bits per sample. It is an average over the
/// student's own sounds: it says nothing about sounds that the student never makes, which is why the
/// held-out likelihood is told beside it. Clips give the mels, and the held-out likelihood. The
/// student takes over the teacher's whitening.
#[derive(Args, Clone, Debug)]
pub struct DistillArgs {
    /// The teacher: folder of a voice or checkpoint, or the name of the built-in voice
    #[arg(long, value_name = "DIR|NAME")]
    teacher: String,
    /// The student's recipe, without autoregressive or residual steps: a built-in one, as for train, or the path
    /// of one's own
    #[arg(long, value_name = "NAME|PATH", required_unless_present = "resume")]
    recipe: Option<String>,
    /// Folder with metadata.csv and wavs/ (the LJSpeech layout), or audio files in any folders below
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
///
/// # Errors
/// As [`distill()`].
pub fn run(args: &DistillArgs) -> anyhow::Result<()> {
    super::use_threads(args.run.threads)?;
    heap::keep();
    let teacher = super::voice(Some(&args.teacher))?;
    let recipe = args.recipe.as_deref().map(Recipe::open).transpose()?;
    let options = args.run.options(&args.data, recipe, None)?;
    let summary = distill(&teacher, &options, &*stop_on_interrupt()?)?;
    say_end(&summary)?;
    Ok(())
}

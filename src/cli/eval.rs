//! `melglow eval`: how likely a voice finds recordings.

use super::train::DeviceName;
use super::{say, use_threads, voice};
use crate::flow::Flow;
use crate::train::Recipe;
use crate::train::config::in_range;
use crate::train::dataset::Dataset;
use crate::train::evaluate::{self, Bits};
use anyhow::{Context, Result};
use candle_core::DType;
use candle_nn::VarBuilder;
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Measure a voice's likelihood on recordings, in bits per sample of the 16-bit sound
///
/// The same figure as `melglow train` reports for the clips that it holds out: with dequantisation
/// noise (uniform, but where the voice's design has learned its own), every log-determinant counted,
/// each clip whole. Where the design gives a bound or an estimate, the last line says so.
#[derive(Args, Clone, Debug)]
pub struct EvalArgs {
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    /// Folder with metadata.csv and wavs/ (the LJSpeech layout), or a plain folder of audio files
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Names of clips, or ranges A..B with both ends [default: the held-out clips of a checkpoint's
    /// recipe, else all]
    #[arg(long, value_name = "NAME|A..B", value_delimiter = ',')]
    clips: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    threads: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// If the voice or the data can't be used, or standard output can't be written.
pub fn run(args: &EvalArgs) -> Result<()> {
    use_threads(args.threads)?;
    let voice = voice(args.voice.as_deref())?;
    let device = args.device.open()?;
    voice.build_flow_on(&device)?; // for its checks
    let config = voice.config();
    // plain tensors, not variables: no graph is kept
    let builder = VarBuilder::from_tensors(voice.tensors()?, DType::F32, &device);
    let flow = Flow::new(&config.flow, &config.mel, builder)?;

    let recipe = args.voice.as_deref().map(|dir| Path::new(dir).join("train/recipe.json")).filter(|p| p.is_file());
    let dataset = match (args.clips.as_slice(), recipe) {
        ([], Some(path)) => {
            let recipe = Recipe::open(&path.display().to_string())?;
            let held = recipe.validation.held_out(&Dataset::names(&args.data)?);
            Dataset::read(&args.data, &config.mel, |name| held.contains(name))
        }
        ([], None) => Dataset::read(&args.data, &config.mel, |_| true),
        (ranges, _) => Dataset::read(&args.data, &config.mel, |name| ranges.iter().any(|r| in_range(name, r))),
    }?;
    for line in &dataset.skipped {
        say(&format!("skipped {line}"));
    }
    let bits = evaluate::bits(&flow, &config.mel, &dataset.clips, &device, &AtomicBool::new(false))?;
    let text = if args.json { serde_json::to_string_pretty(&bits)? + "\n" } else { table(&bits) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

fn table(bits: &Bits) -> String {
    let width = bits.clips.iter().map(|c| c.clip.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:width$}  {:>9}  bits per sample\n", "clip", "samples");
    for clip in &bits.clips {
        text += &format!("{:width$}  {:>9}  {:.4}\n", clip.clip, clip.samples, clip.bits);
    }
    let (n, samples) = (bits.clips.len(), bits.clips.iter().map(|c| c.samples).sum::<usize>());
    text += &format!("{:width$}  {samples:>9}  {:.4}\n", "all", bits.per_sample);
    text + &format!("mean of {n} clips {:.4} ± {:.4} (95 %){}\n", bits.mean, bits.ci95, bits.likelihood.remark())
}

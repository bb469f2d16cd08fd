//! `melglow train`: a voice from recordings.

use super::conventions::ConventionArgs;
use crate::heap;
use crate::kernels::choice::Kernel;
use crate::kernels::multiply::Products;
use crate::kernels::quantise::Numbers;
use crate::net::Passes;
use crate::train::{self, GivenMels, Options, Recipe, Summary};
use crate::vocoder::Precision;
use crate::voice::Voice;
use crate::{Error, Result};
use candle_core::Device;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Train a voice on a folder of clips.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// Folder with metadata.csv and wavs/ (the LJSpeech layout), or audio files in any folders below
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Recipe, by name or the path of one's own
    #[arg(long, value_name = "NAME|PATH", help = recipes(), required_unless_present_any = ["resume", "from"])]
    pub recipe: Option<String>,
    /// Start from the weights of a voice (folder, or name of the built-in one). Without --recipe: its
    /// own design, at a learning rate of 1e-4 for 10000 steps, every 20th clip held out
    #[arg(long, value_name = "DIR|NAME", conflicts_with = "resume")]
    pub from: Option<String>,
    /// The run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Mels that aren't made of the clips' sounds.
#[derive(Args, Clone, Debug)]
pub struct GivenMelArgs {
    /// Mels of the clips in place of those of their sounds, an acoustic model's with teacher forcing: a folder of
    /// NAME.npy (.pt, .h5, …), mel-NAME or NAME-feats, or an .ark, .scp or .h5 of many
    #[arg(long, value_name = "DIR|FILE")]
    mels: Option<PathBuf>,
    #[command(flatten)]
    convention: ConventionArgs,
    /// A mel of --mels with as many frames as bands is [frames, bands]; others show by their shape
    #[arg(long, requires = "mels")]
    transpose: bool,
}

impl GivenMelArgs {
    /// The mels, if any are given.
    ///
    /// # Errors
    /// If their convention is named without them.
    pub fn given(&self) -> Result<Option<GivenMels>> {
        let ConventionArgs { mel_convention: convention, mel_stats: stats } = self.convention.clone();
        match &self.mels {
            None if convention.is_some() || stats.is_some() => {
                Err(Error::invalid("--mel-convention and --mel-stats are for --mels"))
            }
            mels => Ok(mels.clone().map(|path| GivenMels { path, convention, stats, transpose: self.transpose })),
        }
    }
}

/// What every run can be told.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    mels: GivenMelArgs,
    /// Folder of the run: checkpoints (which are voice folders) and log
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// Steps of the whole run, in place of the recipe's
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Seed of weights and segments [default: 0]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Continue from the last checkpoint in RUN
    #[arg(long)]
    pub resume: bool,
    /// Segments of a batch, in place of the recipe's
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Save and leave after this step; --resume goes on
    #[arg(long, value_name = "N")]
    pub stop_after: Option<usize>,
    /// Keep no activations of WaveNets for the backward pass, which computes them again (on the CPU): a fraction of
    /// the memory, about a third more time, the same weights bit for bit
    #[arg(long)]
    pub recompute: bool,
    /// Numbers that the products of WaveNets' layers are worked out in: 32-bit floats; or bf16, with sums and weights
    /// in f32, on processors with AVX512_BF16 or AMX alone
    #[arg(long, value_name = "NUMBERS", default_value = "f32", value_parser = super::precisions([Precision::F32, Precision::Bf16]))]
    pub precision: Precision,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    pub threads: Option<usize>,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The processor.
    Cpu,
    /// The first CUDA GPU.
    Cuda,
}

impl DeviceName {
    /// The device.
    ///
    /// # Errors
    /// If there is no GPU, or this build can't use one.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda if !cfg!(feature = "cuda") => {
                Err(Error::invalid("this build has no CUDA; build with --features cuda, or use --device cpu"))
            }
            Self::Cuda => Ok(Device::new_cuda(0)?),
        }
    }
}

fn recipes() -> String {
    format!("Recipe: {}, or the path of one's own", Recipe::names().collect::<Vec<_>>().join(", "))
}

impl RunArgs {
    /// The options of a run on `data`.
    ///
    /// # Errors
    /// If the device can't be used.
    pub fn options(&self, data: &Path, recipe: Option<Recipe>, from: Option<Voice>) -> Result<Options> {
        Ok(Options {
            data: data.to_path_buf(),
            mels: self.mels.given()?,
            out: self.out.clone(),
            recipe,
            from,
            steps: self.steps,
            batch: self.batch,
            seed: self.seed,
            resume: self.resume,
            stop_after: self.stop_after,
            device: self.device.open()?,
            passes: passes(self.precision, self.recompute, self.device)?,
        })
    }
}

/// How nets are computed where this precision is asked for; says so where it is another.
///
/// # Errors
/// If no training is in such numbers.
pub(super) fn passes(precision: Precision, recompute: bool, device: DeviceName) -> Result<Passes> {
    let products = match precision {
        Precision::F32 => Products::Floats(Kernel::chosen()?),
        Precision::Int16 | Precision::Int8 => {
            return Err(Error::invalid("training is in f32 or bf16, not in integers"));
        }
        Precision::Bf16 if device == DeviceName::Cuda => {
            return Err(Error::invalid("--precision bf16 is for the processor's own kernels; leave it out with a GPU"));
        }
        Precision::Bf16 => match Kernel::chosen()? {
            kernel if kernel.takes(Numbers::Bfloats) => Products::Bfloats(kernel),
            kernel => {
                super::say(&format!("no bf16 {}: training runs in f32", super::WITHOUT_BFLOATS));
                Products::Floats(kernel)
            }
        },
    };
    Ok(Passes { recompute, products })
}

/// Runs the command.
///
/// # Errors
/// As [`train::train`].
pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    super::use_threads(args.run.threads)?;
    heap::keep();
    let recipe = args.recipe.as_deref().map(Recipe::open).transpose()?;
    let from = args.from.as_deref().map(|choice| super::voice(Some(choice))).transpose()?;
    let options = args.run.options(&args.data, recipe, from)?;
    let summary = train::train(&options, &*stop_on_interrupt()?)?;
    say_end(&summary)?;
    Ok(())
}

/// A flag that Ctrl-C sets; a second one leaves at once.
pub(super) fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        // a second Ctrl-C doesn't wait for the checkpoint
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping; press Ctrl-C again to leave at once");
    })
    .map_err(|e| Error::invalid(format!("cannot watch for Ctrl-C: {e}")))?;
    Ok(stop)
}

/// Says how a run ended.
///
/// # Errors
/// [`Error::Interrupted`] if it was stopped.
pub(super) fn say_end(summary: &Summary) -> Result<()> {
    let Summary { step, checkpoint, .. } = summary;
    let held_out = summary.held_out.map_or_else(String::new, |held| {
        let at = if held.step == *step { String::new() } else { format!(" at step {}", held.step) };
        format!(", held out {:.4} bits per sample{at}", held.bits)
    });
    eprintln!("step {step}{held_out}: {}", checkpoint.display());
    if summary.complete { Ok(()) } else { Err(Error::Interrupted) }
}

//! The command line: one file per command.

pub mod bench;
pub mod conventions;
pub mod denoise;
pub mod distill;
pub mod eval;
pub mod import;
pub mod inspect;
mod live_input;
pub mod mel;
pub mod play;
#[cfg(feature = "play")]
mod player;
pub mod plot;
#[cfg(feature = "play")]
mod screen;
mod source;
pub mod synth;
mod synth_stream;
mod target;
pub mod train;
pub mod zoo;

use crate::kernels::choice::Kernel;
use crate::kernels::quantise::Numbers;
use crate::train::checkpoint;
use crate::vocoder::{Precision, SynthOptions, Vocoder};
use crate::voice::{CONFIG_FILE, Lookahead, Voice};
use anyhow::{Result, bail};
use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

/// A WaveGlow-style vocoder: mel spectrograms to speech.
#[derive(Parser)]
#[command(name = "melglow", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mel(mel::Args),
    Synth(synth::SynthArgs),
    Play(play::PlayArgs),
    Train(train::TrainArgs),
    Zoo(zoo::ZooArgs),
    Distill(distill::DistillArgs),
    Eval(eval::EvalArgs),
    Denoise(denoise::DenoiseArgs),
    Plot(plot::PlotArgs),
    Import(import::ImportArgs),
    Inspect(inspect::InspectArgs),
    Bench(bench::BenchArgs),
}

/// Runs the command that the process's arguments ask for.
///
/// Exit code 1 for an error (one line on standard error), 2 for wrong usage, 130 after Ctrl-C, and 0 when
/// whoever reads our output has had enough.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Mel(args) => mel::run(args),
        Command::Synth(args) => synth::run(args),
        Command::Play(args) => play::run(args),
        Command::Train(args) => train::run(&args),
        Command::Zoo(args) => zoo::run(&args),
        Command::Distill(args) => distill::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Denoise(args) => denoise::run(&args),
        Command::Plot(args) => plot::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if matches!(error.downcast_ref(), Some(crate::Error::Interrupted)) => ExitCode::from(130),
        Err(error) => {
            say(&one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Writes `melglow: message` to standard error; that nobody listens is no reason to stop.
pub(crate) fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "melglow: {message}");
}

/// An error and its causes on one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split(['\n', '\r']).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The voice that `--voice` names: a folder, or a built-in voice by its name, or the default one.
pub(crate) fn voice(choice: Option<&str>) -> Result<Voice> {
    let Some(choice) = choice else {
        return Ok(Voice::embedded()?);
    };
    let path = Path::new(choice);
    if !path.exists() {
        return Voice::embedded_as(choice).or_else(|_| {
            let names = Voice::embedded_names().collect::<Vec<_>>().join(", ");
            let known = if names.is_empty() { "there are none" } else { &names };
            bail!("there is no voice {choice}: neither a folder, nor a built-in voice ({known})")
        });
    }
    if !path.join(CONFIG_FILE).exists()
        && let Some(step) = checkpoint::steps(path).ok().and_then(|steps| steps.last().copied())
    {
        let last = checkpoint::folder(path, step);
        bail!("{choice}: is a training run; name one of its checkpoints, {} for one", last.display());
    }
    Ok(Voice::open(choice)?)
}

/// `--precision`, for commands that speak.
#[derive(Args, Clone, Copy, Debug)]
pub struct PrecisionArgs {
    /// Numbers that the flow is worked out in: 32-bit floats, or 16-bit integers where that pays: faster
    /// for wide nets, about 60 dB or more from f32 ("melglow bench --precision int16" tells what it does here); or
    /// 8-bit integers, 30 dB or more from f32, on processors with VNNI alone; or bf16, likewise, with AMX or
    /// AVX512_BF16 [default: int16 for WaveGlow's nets of 64 channels and more with AVX2 or AVX-512, else f32; of
    /// bench: f32]
    #[arg(long, value_name = "NUMBERS", value_parser = precisions(Precision::ALL))]
    precision: Option<Precision>,
}

impl PrecisionArgs {
    /// A vocoder in this precision, or else in the fastest that isn't heard.
    pub fn vocoder(self, voice: &Voice) -> Result<Vocoder> {
        self.precision.map_or_else(|| Ok(Vocoder::fastest(voice)?), |precision| vocoder(voice, precision))
    }

    /// The precision, f32 where none is given: what is measured.
    fn measured(self) -> Precision {
        self.precision.unwrap_or_default()
    }
}

/// Why there is no bf16 on a processor or system.
const WITHOUT_BFLOATS: &str = "here, without AVX512_BF16, AMX or leave to use that";
/// Why there is no int8 on a processor.
const WITHOUT_BYTES: &str = "here, without VNNI";

/// A vocoder in this precision; says so where the voice runs in another.
fn vocoder(voice: &Voice, precision: Precision) -> Result<Vocoder> {
    let vocoder = Vocoder::with_precision(voice, precision)?;
    let (asked, given) = (precision.name(), vocoder.precision().name());
    if asked != given {
        let kernel = Kernel::chosen()?;
        let why = match precision {
            Precision::Bf16 if !kernel.takes(Numbers::Bfloats) => WITHOUT_BFLOATS,
            Precision::Int8 if !kernel.takes(Numbers::Bytes) => WITHOUT_BYTES,
            _ => "here for a flow of this design",
        };
        say(&format!("{}: no {asked} {why}: it runs in {given}", voice.config().name));
    }
    Ok(vocoder)
}

/// The options of speaking.
#[derive(Args, Clone, Debug)]
pub struct SpeakArgs {
    /// Standard deviation of the noise, 0 to 10 [default: the voice's]
    #[arg(long)]
    sigma: Option<f32>,
    /// How strongly the voice's last recursion is driven as far up as the mel goes, 0 to 2, 1 being what it was
    /// trained with: less is less hoarse [default: the voice's]
    #[arg(long)]
    drive: Option<f32>,
    /// Which noise: the same seed gives the same samples, whatever the number of threads
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Passes of refinement towards the mel, 0 (the bare flow, soonest) to 1000 [default: the voice's]
    #[arg(long, value_name = "PASSES")]
    refine: Option<usize>,
    /// Frames after a hop that refinement listens to before the hop is finished: few to hear the sound
    /// soon, "all" for the best sound [default: the voice's]
    #[arg(long, value_name = "FRAMES|all")]
    refine_lookahead: Option<Lookahead>,
    /// Take mels that are smoother than speech, as acoustic models' often are, as any other; without it what
    /// lacks detail is sharpened and not refined, which sounds better
    #[arg(long)]
    refine_smooth: bool,
    /// How much to sharpen mels that are smoother than speech, 0 to 2, 1 being what measured best; others stay as they
    /// are
    #[arg(long, value_name = "STRENGTH", default_value_t = 1.0, conflicts_with = "refine_smooth")]
    sharpen: f32,
}

impl SpeakArgs {
    /// What the vocoder is asked for.
    pub fn options(&self) -> Result<SynthOptions> {
        let &Self { sigma, drive, seed, refine, refine_lookahead, refine_smooth, sharpen } = self;
        let sharpen = Some(sharpen);
        let options = SynthOptions { sigma, drive, seed, refine, refine_lookahead, refine_smooth, sharpen };
        options.validate()?;
        Ok(options)
    }
}

fn precisions<const N: usize>(known: [Precision; N]) -> impl TypedValueParser<Value = Precision> {
    let named = move |name: &str| known.into_iter().find(|precision| precision.name() == name);
    PossibleValuesParser::new(known.map(Precision::name))
        .try_map(move |name| named(&name).ok_or_else(|| crate::Error::invalid(name)))
}

/// The numbers of threads that a command takes.
pub(crate) fn thread_range() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1024)
}

/// Sets the number of threads of everything that follows; `None`: one per core.
///
/// Called first in a command, before anything has started a thread.
pub(crate) fn use_threads(threads: Option<usize>) -> crate::Result<()> {
    // candle's own pool spins while it waits, at the cost of whoever shares the machine; and its
    // products ask this variable for their threads
    let set = |name: &str, value: String| {
        if std::env::var_os(name).is_none() {
            // SAFETY: no other thread runs yet that could read the environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
    };
    set("CANDLE_NUM_THREADS", "1".to_string());
    if let Some(threads) = threads {
        set("RAYON_NUM_THREADS", threads.to_string());
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| crate::Error::invalid(format!("cannot limit threads: {e}")))?;
    }
    Ok(())
}

/// Whether someone watches standard error.
pub(crate) fn watched() -> bool {
    std::io::stderr().is_terminal()
}

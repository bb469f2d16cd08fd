//! `melglow bench`: how fast it is here.

mod arch;
pub(super) mod machine;
mod stream;
mod synth;
mod train;

use super::source::is_stdio;
use super::train::{DeviceName, passes};
use super::{PrecisionArgs, say, thread_range, use_threads, vocoder, voice};
use crate::atomic;
use crate::heap;
use crate::mel::{MelSpectrogram, file};
use crate::vocoder::Vocoder;
use crate::voice::Lookahead;
use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use machine::{Machine, Spread, cores};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{self, Stdio};

/// Sound that is spoken where no mel is given, seconds.
const SECONDS: f64 = 4.0;

/// Measure the speed of a voice or an architecture on this machine
///
/// Synthesis: the time over that of the sound (below 1 is faster than it plays; median, fastest and
/// slowest of the rounds), of the flow alone and with the voice's refinement; the flow's
/// multiply-adds in a second, counted as plain convolutions, and their share of what a plain f32
/// matrix product reaches between the rounds, and of the processor's peak in the kernels' vectors; the
/// peak of memory, loading included. An architecture's weights are random, and loaded from memory.
///
/// With --precision int16 or bf16, but for streams, rounds of f32 come in turn, and its effect is told: the
/// ratio of their processor times, and how far the bare flow's sound is from that in f32: the
/// signal-to-noise ratio, and the mean difference of the log-mels from the mel that was spoken, in
/// nats, for both.
/// Judge a voice by a real mel (--mel): the made-up one it cannot speak.
///
/// With --train: steps on random data, already whitened: forward, backward, optimiser.
///
/// With --stream: how a stream compares with the whole utterance, on one thread. COST is its time
/// over that of the whole; FIRST AUDIO is the time from the first frame to the first sample when
/// frames arrive at the pace of the sound; SLOWEST is the longest time that a piece took, over the
/// sound it lasts. With --precision int16 or bf16 both are in it, and f32 isn't measured.
#[derive(Args)]
#[command(after_help = "\
Examples:
  melglow bench                                         the built-in voice, one thread and all cores
  melglow bench --arch waveglow-256 --threads 1,2 --json speed.json
  melglow bench --precision int16 --threads 1 --refine 0 --seconds 30
  melglow bench --arch waveglow-64 --train --threads 1
  melglow bench --stream --refine 0")]
pub struct BenchArgs {
    /// Measure streams
    #[arg(long, conflicts_with = "threads")]
    stream: bool,
    /// Measure training steps of --arch
    #[arg(long, requires = "arch", conflicts_with_all = ["stream", "voice", "mel", "seconds", "refine"])]
    train: bool,
    /// Keep no activations for the backward pass, as melglow train --recompute
    #[arg(long, requires = "train")]
    recompute: bool,
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    /// An architecture with random weights: waveglow-256, squeezewave-a128-c256, squeezewave-a128-c128,
    /// squeezewave-a256-c128, or a recipe (waveglow-64, lj, lj-live, …, or a path)
    #[arg(long, value_name = "NAME|PATH", conflicts_with = "voice")]
    arch: Option<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Numbers of threads, each measured in a process of its own [default: 1 and one per core]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = thread_range())]
    threads: Vec<usize>,
    /// A mel to speak [default: one made up]
    #[arg(long, value_name = "MEL")]
    mel: Option<PathBuf>,
    /// Sound of the made-up mel, seconds, 0.1 to 600 [default: 4]
    #[arg(long, conflicts_with = "mel", value_parser = seconds)]
    seconds: Option<f64>,
    /// Passes of refinement towards the mel, 0 to 1000 [default: the voice's]
    #[arg(long, value_name = "PASSES")]
    refine: Option<usize>,
    /// Frames after a hop that refinement listens to before the hop is finished, or all [default: the voice's]
    #[arg(long, value_name = "FRAMES|all")]
    refine_lookahead: Option<Lookahead>,
    /// Rounds, or training steps; of streams the fastest of each measurement counts
    #[arg(long, default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    rounds: usize,
    /// Write the figures as JSON, or `-`: to standard output in place of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Seconds within the range of `--seconds`.
fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| (0.1..=600.0).contains(s)).ok_or_else(|| "expected 0.1 to 600".to_string())
}

/// What was measured with several numbers of threads.
#[derive(Serialize, Deserialize)]
struct Report<R> {
    /// The voice or architecture.
    name: String,
    machine: Machine,
    rounds: usize,
    runs: Vec<R>,
}

/// The figures of one number of threads.
trait Run: Serialize + DeserializeOwned {
    /// The table of several.
    fn print(report: &Report<Self>, out: &mut dyn Write) -> io::Result<()>
    where
        Self: Sized;
}

/// Runs the command.
///
/// # Errors
/// If the voice, the architecture or the mel is bad, or a voice cannot stream.
pub fn run(args: &BenchArgs) -> Result<()> {
    // anything wrong is found before anything long begins
    if let Some(path) = args.json.as_deref().filter(|path| !is_stdio(path)) {
        atomic::check(path)?;
    }
    let recipe = args.arch.as_deref().map(arch::recipe).transpose()?;
    let open = || match &recipe {
        Some(recipe) => arch::untrained(recipe),
        None => voice(args.voice.as_deref()),
    };
    if args.stream {
        use_threads(Some(1))?;
        return stream::run(args, &vocoder(&open()?, args.precision.measured())?);
    }
    if let (Some(recipe), true) = (&recipe, args.train) {
        let passes = passes(args.precision.measured(), args.recompute, DeviceName::Cpu)?;
        return report(args, |threads| train::measure(recipe, passes, args.rounds, threads));
    }
    let mel = |vocoder: &Vocoder| spoken(args, vocoder);
    let plan = synth::Plan {
        precision: args.precision.measured(),
        refine: args.refine,
        refine_lookahead: args.refine_lookahead,
        rounds: args.rounds,
        mel: &mel,
    };
    report(args, |threads| synth::measure(&open, args.arch.is_some(), &plan, threads))
}

/// The numbers of threads to measure: as asked, but none above the machine's cores.
fn counts(asked: &[usize]) -> Vec<usize> {
    let cores = cores();
    if let Some(more) = asked.iter().find(|count| **count > cores) {
        let (verb, s) = if cores == 1 { ("is", "") } else { ("are", "s") };
        say(&format!("{more} threads are more than this machine's cores: {cores} thread{s} {verb} measured"));
    }
    let mut counts: Vec<_> = if asked.is_empty() { vec![1, cores] } else { asked.to_vec() };
    counts.iter_mut().for_each(|count| *count = cores.min(*count));
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// Measures with each number of threads and reports.
///
/// Threads are set once in the life of a process, and its peak of memory never falls: of several
/// counts, each has a process of its own.
fn report<R: Run>(args: &BenchArgs, measure: impl Fn(usize) -> Result<(String, R)>) -> Result<()> {
    let figures = match counts(&args.threads).as_slice() {
        &[threads] => {
            use_threads(Some(threads))?;
            heap::keep();
            vec![measure(threads)?]
        }
        counts => counts.iter().map(|threads| in_child(args, *threads)).collect::<Result<_>>()?,
    };
    let (mut names, runs): (Vec<_>, _) = figures.into_iter().unzip();
    let report = Report { name: names.swap_remove(0), machine: Machine::here(), rounds: args.rounds, runs };
    publish(args, &report, |out| {
        let rounds = if report.rounds == 1 { "one round" } else { "medians (and range) of the rounds" };
        writeln!(out, "{}: {}; {rounds}", report.name, report.machine)?;
        R::print(&report, out)
    })
}

/// The name and the figures of this same command with one number of threads.
fn in_child<R: Run>(args: &BenchArgs, threads: usize) -> Result<(String, R)> {
    let program = std::env::current_exe().context("cannot find this program to start it again")?;
    let mut child = process::Command::new(program);
    child.args([
        "bench",
        "--precision",
        args.precision.measured().name(),
        "--json",
        "-",
        "--threads",
        &threads.to_string(),
        "--rounds",
        &args.rounds.to_string(),
    ]);
    for (flag, given) in [("--train", args.train), ("--recompute", args.recompute)] {
        given.then(|| child.arg(flag));
    }
    let numbers =
        [("--seconds", args.seconds.map(|s| s.to_string())), ("--refine", args.refine.map(|r| r.to_string()))];
    let lookahead = ("--refine-lookahead", args.refine_lookahead.map(|frames| frames.to_string()));
    let words = [("--voice", args.voice.clone()), ("--arch", args.arch.clone())];
    for (option, value) in numbers.into_iter().chain([lookahead]).chain(words) {
        value.into_iter().for_each(|value| _ = child.arg(format!("{option}={value}")));
    }
    if let Some(mel) = &args.mel {
        child.arg("--mel").arg(mel);
    }
    let output = child.stdin(Stdio::null()).output().context("cannot start this program again")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().find_map(|line| line.strip_prefix("melglow: "));
        bail!(reason.map_or_else(
            || format!("the measurement with {threads} threads ended early: {}", output.status),
            String::from
        ));
    }
    let report: Report<R> = serde_json::from_slice(&output.stdout).context("the figures of a measurement")?;
    let run = report.runs.into_iter().next().context("a measurement without figures")?;
    Ok((report.name, run))
}

/// Shows figures, as a table or where `--json` says.
fn publish(args: &BenchArgs, figures: &impl Serialize, table: impl Fn(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let json = serde_json::to_string_pretty(figures)?;
    let mut out = io::stdout().lock();
    match &args.json {
        Some(path) if is_stdio(path) => writeln!(out, "{json}")?,
        Some(path) => {
            table(&mut out)?;
            atomic::write(path, |out| writeln!(out, "{json}"))?;
        }
        None => table(&mut out)?,
    }
    Ok(())
}

/// The mel that is spoken: one given, or one with the range of speech; the time it takes doesn't
/// depend on what it says.
fn spoken(args: &BenchArgs, vocoder: &Vocoder) -> Result<MelSpectrogram> {
    let config = &vocoder.config().mel;
    if let Some(path) = &args.mel {
        return Ok(file::read(path, config.n_mels)?);
    }
    let samples = args.seconds.unwrap_or(SECONDS) * f64::from(config.sample_rate);
    let frames = (samples / config.hop_length as f64).round().max(1.0) as usize;
    let value = |i: usize| -6.0 + (i as f32 * 0.37).sin() - (i / frames) as f32 / 40.0;
    Ok(MelSpectrogram::new((0..config.n_mels * frames).map(value).collect(), config.n_mels)?)
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} ({:.3}–{:.3})", self.median, self.min, self.max)
    }
}

/// Thousand millions, with three digits.
fn giga(value: f64) -> String {
    let giga = value / 1e9;
    let digits = if giga >= 100.0 {
        0
    } else if giga >= 10.0 {
        1
    } else {
        2
    };
    format!("{giga:.digits$}")
}

/// A share of a rate of multiply-adds.
fn megabytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_string(), |bytes| format!("{:.0} MB", bytes as f64 / 1e6))
}

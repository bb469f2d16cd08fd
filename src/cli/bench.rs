//! `melglow bench`: how fast it is here.

use super::{use_threads, voice};
use crate::mel::{MelSpectrogram, file};
use crate::vocoder::{SynthOptions, Vocoder};
use crate::voice::Lookahead;
use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Frames that a stream is given at a time, one row of the table each; beside them, all at once.
const CHUNKS: [usize; 4] = [1, 4, 16, 64];

/// Measure the speed of a voice on this machine
///
/// With --stream: how a stream compares with the whole utterance, on one thread. COST is its time
/// over that of the whole; FIRST AUDIO is the time from the first frame to the first sample when
/// frames arrive at the pace of the sound; SLOWEST is the longest time that a piece took, over the
/// sound it lasts.
#[derive(Args)]
pub struct BenchArgs {
    /// Measure streams
    #[arg(long, required = true)]
    stream: bool,
    /// A mel to speak [default: four seconds made up]
    #[arg(long, value_name = "MEL")]
    mel: Option<PathBuf>,
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    /// Passes of refinement towards the mel, 0 to 1000 [default: the voice's]
    #[arg(long, value_name = "PASSES")]
    refine: Option<usize>,

    /// Frames after a hop that refinement listens to before the hop is finished: few to hear the sound
    /// soon, "all" for the best sound [default: the voice's]
    #[arg(long, value_name = "FRAMES|all")]
    refine_lookahead: Option<Lookahead>,
    /// Rounds; the fastest of each measurement counts
    #[arg(long, default_value_t = 3, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100))]
    rounds: usize,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    voice: String,
    machine: String,
    threads: usize,
    refine: usize,
    audio_seconds: f64,
    whole_seconds: f64,
    look_ahead_frames: usize,
    look_ahead_ms: f64,
    streams: Vec<Streamed>,
}

/// A stream with one size of pieces.
#[derive(Clone, Serialize)]
struct Streamed {
    chunk_frames: usize,
    seconds: f64,
    cost_ratio: f64,
    first_audio_ms: f64,
    slowest_chunk_ms: f64,
    chunk_ms: f64,
}

/// Runs the command.
///
/// # Errors
/// If the voice or the mel is bad, or the voice cannot stream.
pub fn run(args: &BenchArgs) -> Result<()> {
    use_threads(Some(1))?;
    let voice = voice(args.voice.as_deref())?;
    let vocoder = Vocoder::new(&voice)?;
    let config = vocoder.config();
    let mel = match &args.mel {
        Some(path) => file::read(path, config.mel.n_mels)?,
        None => made_up(config.mel.n_mels, (4 * config.mel.sample_rate) as usize / config.mel.hop_length)?,
    };
    let options = SynthOptions { refine: args.refine, refine_lookahead: args.refine_lookahead, ..Default::default() };
    let look_ahead = vocoder.stream(&options)?.latency_frames();
    if !args.stream || mel.frames() <= look_ahead {
        bail!("the mel has {} frames, no more than the look-ahead of {look_ahead}: give a longer one", mel.frames());
    }
    let frame_ms = 1000.0 * config.mel.hop_length as f64 / f64::from(config.mel.sample_rate);
    let chunks: Vec<usize> = CHUNKS.into_iter().filter(|chunk| *chunk < mel.frames()).chain([mel.frames()]).collect();
    let mut whole = f64::INFINITY;
    let mut streams: Vec<Option<Streamed>> = vec![None; chunks.len()];
    // turn by turn, so that a busy moment of the machine strikes all alike
    for _ in 0..args.rounds {
        let start = Instant::now();
        vocoder.vocode(&mel, &options, None)?;
        whole = whole.min(start.elapsed().as_secs_f64());
        for (chunk, best) in chunks.iter().zip(&mut streams) {
            let now = streamed(&vocoder, &mel, &options, *chunk, frame_ms)?;
            *best = Some(match best.take() {
                Some(best) => Streamed {
                    seconds: best.seconds.min(now.seconds),
                    first_audio_ms: best.first_audio_ms.min(now.first_audio_ms),
                    slowest_chunk_ms: best.slowest_chunk_ms.min(now.slowest_chunk_ms),
                    ..now
                },
                None => now,
            });
        }
    }
    let streams = streams.into_iter().flatten().map(|s| Streamed { cost_ratio: s.seconds / whole, ..s }).collect();
    print(
        &Report {
            voice: config.name.clone(),
            machine: machine(),
            threads: 1,
            refine: options.refine.unwrap_or(config.synthesis.refine),
            audio_seconds: mel.frames() as f64 * frame_ms / 1000.0,
            whole_seconds: whole,
            look_ahead_frames: look_ahead,
            look_ahead_ms: look_ahead as f64 * frame_ms,
            streams,
        },
        args.json,
    )
}

/// One stream, its pieces timed.
fn streamed(
    vocoder: &Vocoder,
    mel: &MelSpectrogram,
    options: &SynthOptions,
    chunk: usize,
    frame_ms: f64,
) -> Result<Streamed> {
    let rows = mel.transposed();
    let begin = Instant::now();
    let mut stream = vocoder.stream(options)?;
    let (mut out, mut clock, mut first, mut slowest, mut given) = (Vec::new(), 0.0_f64, None, 0.0_f64, 0);
    for frames in rows.values().chunks(chunk * mel.n_mels()) {
        let start = Instant::now();
        stream.push(frames, &mut out)?;
        let ms = 1000.0 * start.elapsed().as_secs_f64();
        given += frames.len() / mel.n_mels();
        // a piece is there with its last frame, the first frame at time 0
        clock = clock.max((given - 1) as f64 * frame_ms) + ms;
        slowest = slowest.max(ms);
        if !out.is_empty() {
            first.get_or_insert(clock);
        }
        out.clear();
    }
    stream.finish(&mut out);
    Ok(Streamed {
        chunk_frames: chunk,
        seconds: begin.elapsed().as_secs_f64(),
        cost_ratio: 0.0,
        first_audio_ms: first.unwrap_or(clock),
        slowest_chunk_ms: slowest,
        chunk_ms: chunk as f64 * frame_ms,
    })
}

fn print(report: &Report, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "voice {}, refine {}, {} on {} thread\nwhole: {:.2} s of sound in {:.3} s, real-time factor {:.3}\n\
         look-ahead: {} frames, {:.0} ms",
        report.voice,
        report.refine,
        report.machine,
        report.threads,
        report.audio_seconds,
        report.whole_seconds,
        report.whole_seconds / report.audio_seconds,
        report.look_ahead_frames,
        report.look_ahead_ms
    )?;
    writeln!(out, "frames a piece     cost   first audio   slowest piece / its sound")?;
    for s in &report.streams {
        writeln!(
            out,
            "{:>14}   {:>5.2}×   {:>8.1} ms   {:>10.2} ms / {:.1} ms",
            s.chunk_frames, s.cost_ratio, s.first_audio_ms, s.slowest_chunk_ms, s.chunk_ms
        )?;
    }
    Ok(())
}

/// The processor's own name, where the system tells.
pub(super) fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

/// A mel with the range of speech: the time it takes doesn't depend on what it says.
fn made_up(n_mels: usize, frames: usize) -> crate::Result<MelSpectrogram> {
    let value = |i: usize| -6.0 + (i as f32 * 0.37).sin() - (i / frames) as f32 / 40.0;
    MelSpectrogram::new((0..n_mels * frames).map(value).collect(), n_mels)
}

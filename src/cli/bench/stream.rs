//! What streaming costs, and how soon it is heard.

use super::machine::Machine;
use super::{BenchArgs, publish, spoken};
use crate::mel::MelSpectrogram;
use crate::vocoder::{SynthOptions, Vocoder};
use anyhow::{Result, bail};
use serde::Serialize;
use std::io::{self, Write};
use std::time::Instant;

/// Frames that a stream is given at a time, one row of the table each; beside them, all at once.
const CHUNKS: [usize; 4] = [1, 4, 16, 64];

/// What was measured.
#[derive(Serialize)]
struct Report {
    voice: String,
    machine: Machine,
    threads: usize,
    refine: usize,
    /// `f32`, `int16` or `bf16`.
    precision: String,
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

/// Measures and reports.
///
/// # Errors
/// If the voice or the mel is bad, or the voice cannot stream.
pub fn run(args: &BenchArgs, vocoder: &Vocoder) -> Result<()> {
    let config = vocoder.config();
    let mel = spoken(args, vocoder)?;
    let options = SynthOptions {
        refine: args.refine,
        refine_lookahead: args.refine_lookahead,
        refine_smooth: true,
        ..Default::default()
    };
    let look_ahead = vocoder.stream(&options)?.latency_frames();
    if mel.frames() <= look_ahead {
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
            let now = streamed(vocoder, &mel, &options, *chunk, frame_ms)?;
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
    let report = Report {
        voice: config.name.clone(),
        machine: Machine::here(),
        threads: 1,
        refine: options.refine.unwrap_or(config.synthesis.refine),
        precision: vocoder.precision().name().to_string(),
        audio_seconds: mel.frames() as f64 * frame_ms / 1000.0,
        whole_seconds: whole,
        look_ahead_frames: look_ahead,
        look_ahead_ms: look_ahead as f64 * frame_ms,
        streams,
    };
    publish(args, &report, |out| print(&report, out))
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

fn print(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "voice {}, refine {}, in {}, {} on {} thread\nwhole: {:.2} s of sound in {:.3} s, real-time factor {:.3}\n\
         look-ahead: {} frames, {:.0} ms",
        report.voice,
        report.refine,
        report.precision,
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

//! How fast a voice speaks.

use super::machine::{Spread, cpu_time, forget_peak_memory, gemm_peak, peak_memory};
use super::{Report, Run, giga, megabytes, share};
use crate::mel::MelSpectrogram;
use crate::vocoder::{SynthOptions, Vocoder};
use crate::voice::Lookahead;
use crate::voice::Voice;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::time::Instant;

/// One number of threads.
#[derive(Serialize, Deserialize)]
pub struct Synthesis {
    threads: usize,
    audio_seconds: f64,
    /// From the voice (read before, if it is made up) to a vocoder that can speak.
    load_seconds: f64,
    /// Multiply-adds of the flow for a second of sound.
    macs_per_audio_second: f64,
    /// Time over that of the sound, of the flow without refinement.
    bare: Spread,
    /// Processor time of all threads over that of the sound, of the same.
    bare_cpu: Option<Spread>,
    refined: Option<Refined>,
    /// Multiply-adds of the f32 matrix product in a second.
    gemm_macs_per_second: Spread,
    /// The bare flow's multiply-adds in a second, over the matrix product's.
    gemm_share: f64,
    /// At most, loading included.
    peak_memory_bytes: Option<u64>,
}

/// With refinement.
#[derive(Serialize, Deserialize)]
struct Refined {
    passes: usize,
    real_time_factor: Spread,
}

/// What to speak, and how often.
pub struct Plan<'a> {
    /// Passes of refinement, or the voice's.
    pub refine: Option<usize>,
    /// Its look-ahead, or the voice's.
    pub refine_lookahead: Option<Lookahead>,
    /// How often.
    pub rounds: usize,
    /// The mel for a voice; asked for once.
    pub mel: &'a dyn Fn(&Vocoder) -> Result<MelSpectrogram>,
}

/// Measures a voice with the threads that were set, and gives its name too.
///
/// # Errors
/// If the voice or the mel is bad.
pub fn measure(
    open: &dyn Fn() -> Result<Voice>,
    made_up: bool,
    plan: &Plan,
    threads: usize,
) -> Result<(String, Synthesis)> {
    // weights that nobody has trained aren't read from anywhere: making them is no part of loading
    let ready = made_up.then(open).transpose()?;
    forget_peak_memory();
    let begun = Instant::now();
    let voice = ready.map_or_else(open, Ok)?;
    let vocoder = Vocoder::new(&voice)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    drop(voice);
    let config = vocoder.config();
    let mel = (plan.mel)(&vocoder)?;
    let audio_seconds = (mel.frames() * config.mel.hop_length) as f64 / f64::from(config.mel.sample_rate);
    let passes = plan.refine.unwrap_or(config.synthesis.refine);
    let factor = |refine| -> Result<f64> {
        let options =
            SynthOptions { refine: Some(refine), refine_lookahead: plan.refine_lookahead, ..Default::default() };
        let begun = Instant::now();
        vocoder.vocode(&mel, &options, None)?;
        Ok(begun.elapsed().as_secs_f64() / audio_seconds)
    };
    factor(0)?;
    let (mut bare, mut cpu, mut refined, mut gemm) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // turn by turn, so that a busy moment of the machine strikes all alike
    for _ in 0..plan.rounds {
        let before = cpu_time();
        bare.push(factor(0)?);
        cpu.extend(cpu_time().zip(before).map(|(after, before)| (after - before) / audio_seconds));
        if passes > 0 {
            refined.push(factor(passes)?);
        }
        gemm.push(gemm_peak(threads));
    }
    let (bare, gemm) = (Spread::of(bare), Spread::of(gemm));
    let macs = vocoder.macs_per_sample() * f64::from(config.mel.sample_rate);
    let run = Synthesis {
        threads,
        audio_seconds,
        load_seconds,
        macs_per_audio_second: macs,
        bare,
        bare_cpu: (cpu.len() == plan.rounds).then(|| Spread::of(cpu)),
        refined: (passes > 0).then(|| Refined { passes, real_time_factor: Spread::of(refined) }),
        gemm_macs_per_second: gemm,
        gemm_share: macs / bare.median / gemm.median,
        peak_memory_bytes: peak_memory(),
    };
    Ok((config.name.clone(), run))
}

impl Run for Synthesis {
    fn print(report: &Report<Self>, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(first) = report.runs.first() else { return Ok(()) };
        let macs = giga(first.macs_per_audio_second);
        writeln!(out, "{:.2} s of sound; the flow takes {macs} GMAC a second of sound", first.audio_seconds)?;
        // a column that is there where anything is refined
        let column = |text: String| if first.refined.is_some() { format!("  {text:>22}") } else { String::new() };
        let passes = first.refined.as_ref().map_or(0, |refined| refined.passes);
        let title = column(format!("{passes} passes, × real time"));
        writeln!(out, "threads      load  bare flow, × real time{title}   GMAC/s        of GEMM's  peak memory")?;
        for run in &report.runs {
            writeln!(
                out,
                "{:>7}  {:>6.2} s  {:>22}{}  {:>7}  {:>15}  {:>11}",
                run.threads,
                run.load_seconds,
                run.bare.to_string(),
                column(run.refined.as_ref().map_or_else(String::new, |r| r.real_time_factor.to_string())),
                giga(run.macs_per_audio_second / run.bare.median),
                share(run.gemm_share, run.gemm_macs_per_second.median),
                megabytes(run.peak_memory_bytes),
            )?;
        }
        Ok(())
    }
}

//! How fast a voice speaks.

use super::machine::{Peaks, Shares, Spread, forget_peak_memory, peak_memory};
use super::{Report, Run, giga, megabytes};
use crate::eval::spectral::mel_l1;
use crate::kernels::choice::Kernel;
use crate::mel::MelSpectrogram;
use crate::mel::extract::extract;
use crate::train::clock::cpu_seconds;
use crate::vocoder::{Precision, SynthOptions, Vocoder};
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
    bare_cpu: Spread,
    refined: Option<Refined>,
    /// The bare flow's multiply-adds beside the machine's.
    #[serde(flatten)]
    shares: Shares,
    /// At most, loading included.
    peak_memory_bytes: Option<u64>,
    /// `f32`, `int16` or `bf16`.
    precision: String,
    /// The effect of another precision.
    effect: Option<Effect>,
}

/// With refinement.
#[derive(Serialize, Deserialize)]
struct Refined {
    passes: usize,
    real_time_factor: Spread,
}

/// What a precision does to the bare flow.
#[derive(Serialize, Deserialize)]
struct Effect {
    /// Processor time in f32 over that in this precision.
    speed: f64,
    /// Of the sound in f32 over the difference, dB; none without a difference.
    snr_db: Option<f64>,
    /// Mean difference of the log-mel from the mel that was spoken, nats.
    mel_l1: Option<f64>,
    /// The same in f32.
    mel_l1_f32: Option<f64>,
}

/// What to speak, and how often.
pub struct Plan<'a> {
    /// The numbers that the flow is worked out in.
    pub precision: Precision,
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
    let vocoder = Vocoder::with_precision(&voice, plan.precision)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    drop(voice);
    let config = vocoder.config();
    let mel = (plan.mel)(&vocoder)?;
    let audio_seconds = (mel.frames() * config.mel.hop_length) as f64 / f64::from(config.mel.sample_rate);
    let passes = plan.refine.unwrap_or(config.synthesis.refine);
    let speak = |vocoder: &Vocoder, refine| {
        let options = SynthOptions {
            refine: Some(refine),
            refine_lookahead: plan.refine_lookahead,
            refine_smooth: true,
            ..Default::default()
        };
        vocoder.vocode(&mel, &options, None)
    };
    let factor = |refine| -> Result<f64> {
        let begun = Instant::now();
        speak(&vocoder, refine)?;
        Ok(begun.elapsed().as_secs_f64() / audio_seconds)
    };
    let sound = speak(&vocoder, 0)?.samples;
    if passes > 0 {
        factor(passes)?;
    }
    let peak_memory_bytes = peak_memory();
    let float = (vocoder.precision() != Precision::F32).then(|| Vocoder::new(&open()?).map_err(anyhow::Error::from));
    let float = float.transpose()?;
    let sound_f32 = float.as_ref().map(|float| speak(float, 0)).transpose()?;
    let (mut bare, mut cpu, mut refined, mut peaks) = (Vec::new(), Vec::new(), Vec::new(), Peaks::default());
    let kernel = Kernel::chosen()?;
    let mut cpu_f32 = 0.0;
    // turn by turn, so that a busy moment of the machine strikes all alike
    for _ in 0..plan.rounds {
        let (seconds, busy) = timed(|| speak(&vocoder, 0))?;
        bare.push(seconds / audio_seconds);
        cpu.push(busy / audio_seconds);
        if let Some(float) = &float {
            cpu_f32 += timed(|| speak(float, 0))?.1 / audio_seconds;
        }
        if passes > 0 {
            refined.push(factor(passes)?);
        }
        peaks.measure(threads, kernel);
    }
    let effect = sound_f32.map(|sound_f32| -> Result<Effect> {
        // without the last sample there are as many frames as the mel has
        let heard = |samples: &[f32]| {
            Ok::<_, crate::Error>(mel_l1(&extract(&samples[..samples.len() - 1], &config.mel)?, &mel))
        };
        Ok(Effect {
            speed: cpu_f32 / cpu.iter().sum::<f64>(),
            snr_db: snr_db(&sound_f32.samples, &sound),
            mel_l1: heard(&sound)?,
            mel_l1_f32: heard(&sound_f32.samples)?,
        })
    });
    let effect = effect.transpose()?;
    let bare = Spread::of(bare);
    let macs = vocoder.macs_per_sample() * f64::from(config.mel.sample_rate);
    let run = Synthesis {
        threads,
        audio_seconds,
        load_seconds,
        macs_per_audio_second: macs,
        bare,
        bare_cpu: Spread::of(cpu),
        refined: (passes > 0).then(|| Refined { passes, real_time_factor: Spread::of(refined) }),
        shares: peaks.beside(macs / bare.median),
        peak_memory_bytes,
        precision: vocoder.precision().name().to_string(),
        effect,
    };
    Ok((config.name.clone(), run))
}

/// How long something takes, and how much processor time, seconds.
fn timed<T>(work: impl FnOnce() -> crate::Result<T>) -> Result<(f64, f64)> {
    let (begun, before) = (Instant::now(), cpu_seconds());
    work()?;
    Ok((begun.elapsed().as_secs_f64(), cpu_seconds() - before))
}

/// The power of a sound over that of its difference from another, dB, if there is one.
fn snr_db(sound: &[f32], other: &[f32]) -> Option<f64> {
    let power = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = power(&mut sound.iter().zip(other).map(|(a, b)| f64::from(a - b)));
    let ratio = power(&mut sound.iter().map(|&x| f64::from(x))) / difference;
    Some(10.0 * ratio.log10()).filter(|snr| snr.is_finite())
}

impl Run for Synthesis {
    fn print(report: &Report<Self>, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(first) = report.runs.first() else { return Ok(()) };
        let macs = giga(first.macs_per_audio_second);
        writeln!(
            out,
            "{:.2} s of sound; the flow takes {macs} GMAC a second of sound, in {}",
            first.audio_seconds, first.precision
        )?;
        // a column that is there where anything is refined
        let column = |text: String| if first.refined.is_some() { format!("  {text:>22}") } else { String::new() };
        let passes = first.refined.as_ref().map_or(0, |refined| refined.passes);
        let title = column(format!("{passes} passes, × real time"));
        writeln!(out, "threads      load  bare flow, × real time{title}   GMAC/s{}  peak memory", Shares::TITLES)?;
        for run in &report.runs {
            writeln!(
                out,
                "{:>7}  {:>6.2} s  {:>22}{}  {:>7}{}  {:>11}",
                run.threads,
                run.load_seconds,
                run.bare.to_string(),
                column(run.refined.as_ref().map_or_else(String::new, |r| r.real_time_factor.to_string())),
                giga(run.macs_per_audio_second / run.bare.median),
                run.shares.columns(),
                megabytes(run.peak_memory_bytes),
            )?;
        }
        for (effect, threads) in report.runs.iter().filter_map(|run| Some((run.effect.as_ref()?, run.threads))) {
            let figure =
                |value: Option<f64>, digits| value.map_or("–".to_string(), |value| format!("{value:.digits$}"));
            writeln!(
                out,
                "{threads:>7}  {:.2} × as fast as f32; {} dB over the difference; mel L1 {}, in f32 {}",
                effect.speed,
                figure(effect.snr_db, 1),
                figure(effect.mel_l1, 4),
                figure(effect.mel_l1_f32, 4),
            )?;
        }
        Ok(())
    }
}

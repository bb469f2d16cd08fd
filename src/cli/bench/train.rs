//! How fast an architecture learns.

use super::machine::{Peaks, Shares, Spread, forget_peak_memory, peak_memory};
use super::{Report, Run, giga, megabytes};
use crate::flow::{Flow, nll};
use crate::kernels::choice::Kernel;
use crate::kernels::multiply::Products;
use crate::net::{Params, Passes};
use crate::train::Recipe;
use crate::train::optimiser::Optimiser;
use crate::vocoder::Precision;
use anyhow::Result;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::time::Instant;

/// Steps before the first that counts.
const WARM_UP: usize = 2;
/// Products of a step over those of its forward pass: two more, for the gradients of data and weights.
const PASSES: f64 = 3.0;

/// One number of threads.
#[derive(Serialize, Deserialize)]
pub struct Training {
    threads: usize,
    precision: String,
    recompute: bool,
    parameters: usize,
    batch: usize,
    segment_samples: usize,
    step_seconds: Spread,
    /// Samples of sound in a second.
    samples_per_second: Spread,
    /// Multiply-adds of the flow for a sample: forward, and twice as many backward.
    macs_per_sample: f64,
    /// The step's multiply-adds beside the machine's.
    #[serde(flatten)]
    shares: Shares,
    peak_memory_bytes: Option<u64>,
    loss_before: f64,
    loss_after: f64,
}

/// Measures steps on random data with the threads that were set: forward, backward, clipping and
/// optimiser, on sound that is whitened already.
///
/// # Errors
/// If the design can't be built.
pub fn measure(recipe: &Recipe, passes: Passes, rounds: usize, threads: usize) -> Result<(String, Training)> {
    forget_peak_memory();
    let t = &recipe.training;
    let params = Params::seeded(0, &Device::Cpu);
    let mut flow = Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
    flow.set_passes(passes);
    let frames = t.segment_samples / recipe.mel.hop_length;
    let window = flow.context().left + frames + flow.context().right;
    // whitened audio has unit variance, bare audio is quieter
    let level = if flow.has_whitening() { 1.0 } else { 0.1 };
    let x = Tensor::randn(0f32, level, (t.batch, 1, t.segment_samples), &Device::Cpu)?;
    let mel = Tensor::randn(-5f32, 1.0, (t.batch, recipe.mel.n_mels, window), &Device::Cpu)?;
    flow.initialise(&x, &mel, &|_| true)?;
    let mut optimiser = Optimiser::new(&params, t)?;
    let samples = (t.batch * t.segment_samples) as f64;
    let (mut seconds, mut losses, mut peaks) = (Vec::new(), Vec::new(), Peaks::default());
    let kernel = Kernel::chosen()?;
    for step in 0..WARM_UP + rounds {
        let begun = Instant::now();
        // among rayon's threads, as in a run
        losses.push(rayon::scope(|_| -> Result<f64> {
            let graphs = t.graphs(&Device::Cpu);
            let loss = optimiser.learn(t.batch, graphs, |part| {
                let of = |batch: &Tensor| batch.narrow(0, part.start, part.len());
                let (z, log_det) = flow.forward(&of(&x)?, &of(&mel)?)?;
                Ok((nll(&z, &log_det)?.sum_all()? / samples)?)
            })?;
            let norm = optimiser.grad_norm()?;
            optimiser.step(t.learning_rate_at(step, 0.0), norm)?;
            Ok(loss)
        })?);
        if step >= WARM_UP {
            seconds.push(begun.elapsed().as_secs_f64());
            peaks.measure(threads, kernel);
        }
    }
    let rates = seconds.iter().map(|seconds| samples / seconds).collect();
    let (step_seconds, samples_per_second) = (Spread::of(seconds), Spread::of(rates));
    let macs_per_sample = PASSES * flow.macs_per_sample();
    let precision = if matches!(passes.products, Products::Floats(_)) { Precision::F32 } else { Precision::Bf16 };
    let run = Training {
        threads,
        precision: precision.name().to_string(),
        recompute: passes.recompute,
        parameters: optimiser.values(),
        batch: t.batch,
        segment_samples: t.segment_samples,
        step_seconds,
        samples_per_second,
        macs_per_sample,
        shares: peaks.beside(macs_per_sample * samples_per_second.median),
        peak_memory_bytes: peak_memory(),
        loss_before: losses[0],
        loss_after: losses[losses.len() - 1],
    };
    Ok((recipe.name.clone(), run))
}

impl Run for Training {
    fn print(report: &Report<Self>, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(first) = report.runs.first() else { return Ok(()) };
        writeln!(
            out,
            "training {}{}, {:.2} M parameters, steps of {} × {} samples; {:.3} MMAC a sample, forward and backward",
            first.precision,
            if first.recompute { ", activations computed again" } else { "" },
            first.parameters as f64 / 1e6,
            first.batch,
            first.segment_samples,
            first.macs_per_sample / 1e6
        )?;
        writeln!(out, "threads            samples/s      step   GMAC/s{}  peak memory", Shares::TITLES)?;
        for run in &report.runs {
            let rate = run.samples_per_second;
            writeln!(
                out,
                "{:>7}  {:>19}  {:>6.2} s  {:>7}{}  {:>11}",
                run.threads,
                format!("{:.0} ({:.0}–{:.0})", rate.median, rate.min, rate.max),
                run.step_seconds.median,
                giga(run.macs_per_sample * rate.median),
                run.shares.columns(),
                megabytes(run.peak_memory_bytes),
            )?;
        }
        Ok(())
    }
}

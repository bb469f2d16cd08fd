//! Times one training step of a recipe on random data: `cargo bench --bench train_step -- lj 1 20`
//! (recipe, threads, steps). Its peer is `benches/peers/train_step.py`; `train_ratio.py` runs both.

use anyhow::Context;
use candle_core::{Device, Tensor};
use melglow::flow::{Flow, nll};
use melglow::net::Params;
use melglow::train::Recipe;
use melglow::train::optimiser::Optimiser;
use std::time::Instant;

const WARM_UP: usize = 3;

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds --bench
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let recipe = Recipe::open(args.first().map_or("lj", String::as_str))?;
    let threads: usize = args.get(1).map_or(Ok(1), |n| n.parse()).context("threads")?;
    let count: usize = args.get(2).map_or(Ok(20), |n| n.parse()).context("steps")?;
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    // SAFETY: nothing else runs yet that could read the environment; candle's own pool only spins
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };

    let t = &recipe.training;
    let params = Params::seeded(0, &Device::Cpu);
    let flow = Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
    let frames = t.segment_samples / recipe.mel.hop_length;
    let window = flow.context().left + frames + flow.context().right;
    // whitened audio has unit variance, bare audio is quieter
    let level = if flow.has_whitening() { 1.0 } else { 0.1 };
    let x = Tensor::randn(0f32, level, (t.batch, 1, t.segment_samples), &Device::Cpu)?;
    let mel = Tensor::randn(-5f32, 1.0, (t.batch, recipe.mel.n_mels, window), &Device::Cpu)?;
    flow.initialise(&x, &mel, &|_| true)?;
    let mut optimiser = Optimiser::new(&params, t)?;
    let samples = t.batch * t.segment_samples;
    let mut seconds = Vec::new();
    let mut losses = Vec::new();
    for step in 0..WARM_UP + count {
        let begun = Instant::now();
        let (z, log_det) = flow.forward(&x, &mel)?;
        let loss = (nll(&z, &log_det)?.sum_all()? / samples as f64)?;
        losses.push(loss.to_scalar::<f32>()?);
        optimiser.accumulate(&mut loss.backward()?)?;
        let norm = optimiser.grad_norm();
        optimiser.step(t.learning_rate_at(step, 0.0), norm)?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    let mut timed = seconds.split_off(WARM_UP);
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    println!(
        "{} f32, melglow {}, {threads} threads, {:.2} M parameters, batch {} x {}",
        recipe.name,
        env!("CARGO_PKG_VERSION"),
        optimiser.values() as f64 / 1e6,
        t.batch,
        t.segment_samples
    );
    println!(
        "  {:.0} samples/s, step {:.1} ms (fastest {:.1}, slowest {:.1}, {count} steps)",
        samples as f64 / median,
        1e3 * median,
        1e3 * timed[0],
        1e3 * timed[timed.len() - 1]
    );
    println!("  peak memory {}; loss {:.4} -> {:.4}", peak_rss(), losses[0], losses[losses.len() - 1]);
    Ok(())
}

/// The high-water mark of this process, where the system tells it.
fn peak_rss() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.map_or_else(|| "unknown".to_string(), |kib| format!("{:.0} MiB", kib / 1024.0))
}

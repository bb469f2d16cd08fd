//! A flow of one's own: the design as JSON, one step that melglow doesn't have, a training loop.
//!
//! ```sh
//! cargo run --release --example custom_flow
//! ```
//!
//! A design that goes well with the steps melglow has needs none of this: put it into a recipe, and
//! `melglow train --recipe own.json` does the rest.

use candle_core::{Device, Tensor};
use candle_nn::{Init, VarBuilder};
use melglow::flow::{self, Bijector, Cond, Flow};
use melglow::net::Params;
use melglow::net::params::named_rng;
use melglow::train::Recipe;
use melglow::train::dataset::{Clip, Sampler};
use melglow::train::optimiser::Optimiser;
use melglow::vocoder::noise::Noise;

/// The steps after our own; `melglow train --help` names recipes with more of them.
const DESIGN: &str = r#"{
    "whitening": null,
    "conditioning": { "kind": "frame", "channels": 16, "residual_layers": 0 },
    "group": 8,
    "blocks": [{ "repeat": 2, "steps": [
        { "step": "actnorm" },
        { "step": "mix" },
        { "step": "coupling", "bound": 2.0, "net":
            { "channels": 16, "kernel": 3, "dilations": [1, 2], "weight_norm": false, "skip": false } }
    ] }]
}"#;

/// Stretches what is above zero and shrinks what is below, or the other way round: `z = x · e^±tilt`.
///
/// Voices are skewed like that. log_det = Σ ± tilt.
struct Tilt {
    /// `[channels]`.
    tilt: Tensor,
}

impl Tilt {
    fn new(channels: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Self { tilt: vb.get_with_hints(channels, "tilt", Init::Const(0.0))? })
    }

    fn log_scale(&self, values: &Tensor) -> candle_core::Result<Tensor> {
        values.sign()?.detach().broadcast_mul(&self.tilt)
    }
}

impl Bijector for Tilt {
    fn forward(&self, x: &Tensor, _: &Cond) -> candle_core::Result<(Tensor, Tensor)> {
        let log_scale = self.log_scale(x)?;
        Ok(((x * log_scale.exp()?)?, log_scale.sum((1, 2))?))
    }

    // signs stay, so the latent tells which way it went
    fn inverse(&self, z: &Tensor, _: &Cond) -> candle_core::Result<Tensor> {
        z * self.log_scale(z)?.neg()?.exp()?
    }
}

/// Two seconds of skewed pulses and a little noise.
fn sound() -> Vec<f32> {
    let mut noise = vec![0.0; 44_100];
    Noise::new(0).fill(0, &mut noise);
    noise.iter().enumerate().map(|(t, n)| 0.4 * (-((t % 200) as f32) / 30.0).exp() - 0.06 + 0.01 * n).collect()
}

fn main() -> anyhow::Result<()> {
    let mut recipe = Recipe::open("tiny")?;
    recipe.flow = serde_json::from_str(DESIGN)?;
    let training = &recipe.training;
    let clips = [Clip::new("pulses", &sound(), &recipe.mel)?];
    let sampler = Sampler::new(&clips, &recipe)?;

    // every tensor is asked for by name; what has a name is trained
    let params = Params::seeded(0, &Device::Cpu);
    let own = Tilt::new(recipe.flow.group, params.builder().pp("tilt"))?;
    let flow = Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
    // our step doesn't look at the mel
    let cond = Cond::new(Tensor::zeros((1, 1, 1), candle_core::DType::F32, &Device::Cpu)?, 1);
    // a flow takes [batch, 1, samples], a step [batch, steps, channels]
    let steps = |x: &Tensor| x.reshape((x.dim(0)?, (), recipe.flow.group));
    let samples = |x: &Tensor| x.reshape((x.dim(0)?, 1, ()));

    let mut rng = named_rng(0, "segments");
    let first = sampler.draw(&flow, training.init_batch, &mut rng, &Device::Cpu)?;
    flow.initialise(&first.x, &first.mel, &|_| true)?;
    let mut optimiser = Optimiser::new(&params, training)?;
    for step in 0..training.steps {
        let batch = sampler.draw(&flow, training.batch, &mut rng, &Device::Cpu)?;
        let (x, own_log_det) = own.forward(&steps(&batch.x)?, &cond)?;
        let (z, log_det) = flow.forward(&samples(&x)?, &batch.mel)?;
        let loss = (flow::nll(&z, &(log_det + own_log_det)?)?.mean_all()? / training.segment_samples as f64)?;
        optimiser.accumulate(&mut loss.backward()?)?;
        let norm = optimiser.grad_norm()?;
        optimiser.step(training.learning_rate_at(step, 0.0), norm)?;
        if step % 20 == 0 || step + 1 == training.steps {
            let bits = flow::bits_per_sample(f64::from(loss.to_scalar::<f32>()?));
            println!("step {step}: {bits:.3} bits per sample");
        }
    }

    // and back: noise becomes sound with the mel of the clip, one second of it
    let (group, frames) = (recipe.flow.group, recipe.mel.sample_rate as usize / recipe.mel.hop_length);
    let count = frames * recipe.mel.hop_length / group;
    let z = Tensor::from_vec(Noise::new(1).latents(0, count, group, 1.0), (1, group, count), &Device::Cpu)?;
    let x = flow.inverse(&z, &flow.mel_window(&clips[0].mel, 0, frames)?)?;
    let sound: Vec<f32> = own.inverse(&steps(&x)?, &cond)?.flatten_all()?.to_vec1()?;
    println!("tilts {:?}", own.tilt.to_vec1::<f32>()?);
    println!("{} samples, peak {:.2}", sound.len(), sound.iter().fold(0.0_f32, |peak, s| peak.max(s.abs())));
    Ok(())
}

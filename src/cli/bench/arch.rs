//! Architectures by name, with random weights: speed needs no training.

use crate::Error;
use crate::flow::Flow;
use crate::flow::config::{Block, ConditioningConfig, FlowConfig, SeparableConfig, StepConfig};
use crate::mel::MelConfig;
use crate::net::Params;
use crate::net::params::{named_rng, uniform};
use crate::train::Recipe;
use crate::voice::{SynthesisConfig, Voice, VoiceConfig};
use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

/// SqueezeWave's published sizes: name, samples per step, channels of the conditioners (Zhai et al. 2020).
const SQUEEZEWAVES: [(&str, usize, usize); 3] =
    [("squeezewave-a128-c256", 128, 256), ("squeezewave-a128-c128", 128, 128), ("squeezewave-a256-c128", 256, 128)];
/// The published WaveGlow, whose recipe has a shorter name.
const WAVEGLOW: &str = "waveglow-256";

/// The design of a name, and how it is trained: a published model, or else a recipe.
///
/// # Errors
/// If there is no such name and no such file, or the file is no recipe.
pub fn recipe(name: &str) -> Result<Recipe> {
    if let Some(&(_, group, channels)) = SQUEEZEWAVES.iter().find(|(known, ..)| *known == name) {
        let (mel, flow) = (MelConfig::nvidia(), squeezewave(group, channels));
        let synthesis = SynthesisConfig::new(0.6, 0);
        return Ok(Recipe {
            name: name.to_string(),
            ..Recipe::fine_tuning(&VoiceConfig::new(name, mel, flow, synthesis))
        });
    }
    let known: Vec<_> = SQUEEZEWAVES.iter().map(|(name, ..)| *name).chain([WAVEGLOW]).collect();
    let recipe = Recipe::open(if name == WAVEGLOW { "waveglow" } else { name })
        .with_context(|| format!("--arch {name} is neither of {} nor a recipe", known.join(", ")))?;
    Ok(Recipe { name: if name == WAVEGLOW { name.to_string() } else { recipe.name }, ..recipe })
}

/// A voice of a recipe's design that has learnt nothing.
///
/// # Errors
/// If the weights can't be made.
pub fn untrained(recipe: &Recipe) -> Result<Voice> {
    let params = Params::seeded(0, &Device::Cpu);
    Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
    let tensors = params.named().into_iter().map(|(name, var)| {
        let mut tensor = var.as_detached_tensor();
        // couplings begin as the identity: a little of everything makes their work real
        if name.contains(".end.") {
            let mut rng = named_rng(1, &name);
            let values: Vec<f32> = (0..tensor.elem_count()).map(|_| 0.02 * uniform(&mut rng) - 0.01).collect();
            tensor = Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?;
        }
        Ok((name, tensor))
    });
    let tensors = tensors.collect::<Result<Vec<_>, Error>>()?;
    let config = VoiceConfig::new(&recipe.name, recipe.mel.clone(), recipe.flow.clone(), recipe.synthesis());
    Ok(Voice::from_parts(config, &tensors)?)
}

/// Twelve flows of eight layers; 16 channels are done before every other flow.
fn squeezewave(group: usize, channels: usize) -> FlowConfig {
    let net = SeparableConfig { channels, kernel: 3, layers: 8, weight_norm: true, norm: true };
    let flow = [StepConfig::mix(), StepConfig::SeparableCoupling { net, bound: None }];
    let two = [flow.clone(), flow].concat();
    let next = [vec![StepConfig::early(16)], two.clone()].concat();
    let blocks = vec![Block { repeat: 1, steps: two }, Block { repeat: 5, steps: next }];
    FlowConfig {
        whitening: None,
        conditioning: ConditioningConfig::Mel {},
        group,
        blocks,
        dequantisation: None,
        latent: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiply-adds of a second of sound, as the papers' designs have them.
    #[test]
    fn published_designs_cost_what_they_should() {
        for (name, giga) in [
            ("waveglow-64", 30.8),
            ("squeezewave-a128-c256", 3.69),
            ("squeezewave-a128-c128", 1.04),
            ("squeezewave-a256-c128", 0.67),
        ] {
            let recipe = recipe(name).unwrap();
            let flow = Flow::new(&recipe.flow, &recipe.mel, Params::seeded(0, &Device::Cpu).builder()).unwrap();
            let found = flow.macs_per_sample() * f64::from(recipe.mel.sample_rate) / 1e9;
            assert!((found / giga - 1.0).abs() < 0.03, "{name}: {found}, expected {giga}");
        }
    }
}

//! A whitening front by itself: a voice without steps after it, which flows of other designs take over.

use super::dataset::Clip;
use super::run::fit_whitening;
use crate::flow::config::{ConditioningConfig, FlowConfig, WhiteningConfig};
use crate::flow::{Flow, WHITENING_PREFIX};
use crate::mel::MelConfig;
use crate::net::Params;
use crate::voice::{SynthesisConfig, Voice, VoiceConfig};
use crate::{Error, Result};
use candle_core::Device;
use std::sync::atomic::AtomicBool;

/// The whitening front of a voice, if it has one.
///
/// # Errors
/// If the voice is damaged.
pub fn of(voice: &Voice) -> Result<Option<Voice>> {
    let config = voice.config();
    let Some(whitening) = &config.flow.whitening else { return Ok(None) };
    let mut tensors: Vec<_> = voice.tensors()?.into_iter().collect();
    tensors.retain(|(name, _)| name.starts_with(WHITENING_PREFIX));
    let name = format!("whitening of {}", config.name);
    Voice::from_parts(design(&name, &config.mel, whitening, config.flow.group), &tensors).map(Some)
}

/// A front fitted to clips.
///
/// # Errors
/// If it can't be fitted; [`Error::Interrupted`] soon after `stop` is set.
pub fn fit(
    mel: &MelConfig,
    whitening: &WhiteningConfig,
    clips: &[Clip],
    seed: u64,
    stop: &AtomicBool,
) -> Result<Voice> {
    // the smallest group: there is nothing that would look at it
    let group = (2..=mel.hop_length).find(|group| mel.hop_length.is_multiple_of(*group));
    let group = group.ok_or_else(|| Error::invalid("a hop of one sample has no steps"))?;
    let config = design("whitening alone", mel, whitening, group);
    let params = Params::seeded(seed, &Device::Cpu);
    let flow = Flow::new(&config.flow, mel, params.builder())?;
    fit_whitening(&flow, clips, seed, stop)?;
    let tensors: Vec<_> = params.named().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    Voice::from_parts(config, &tensors)
}

fn design(name: &str, mel: &MelConfig, whitening: &WhiteningConfig, group: usize) -> VoiceConfig {
    let (whitening, conditioning) = (Some(whitening.clone()), ConditioningConfig::Mel {});
    let flow = FlowConfig { whitening, conditioning, group, blocks: Vec::new(), dequantisation: None, latent: None };
    VoiceConfig::new(name, mel.clone(), flow, SynthesisConfig::new(1.0, SynthesisConfig::DEFAULT_REFINE))
}

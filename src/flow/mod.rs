//! The normalizing flow: audio to latent noise and back, given a mel.

pub mod config;

use crate::mel::{MelConfig, MelSpectrogram};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;
pub use config::FlowConfig;

/// Frames of mel that a frame's sound depends on, beside its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Frames before.
    pub left: usize,
    /// Frames after.
    pub right: usize,
}

/// A whole flow: an optional whitening front on slices, then trainable steps on tensors.
///
/// Latents have the shape `[batch, group, steps]`, `group · steps` = samples.
pub struct Flow {}

impl Flow {
    /// Builds the flow and asks `vb` for every tensor it has.
    pub fn new(_config: &FlowConfig, _mel: &MelConfig, _vb: VarBuilder) -> Result<Self> {
        unimplemented!()
    }
    /// Samples per step: the number of latent channels.
    pub fn group(&self) -> usize { unimplemented!() }
    /// Mel frames of conditioning context that [`Flow::forward`] and [`Flow::inverse`] want around a segment.
    pub fn context(&self) -> Context { unimplemented!() }
    /// Steps on each side whose latents influence a step's data: the halo for working in blocks.
    pub fn halo_steps(&self) -> usize { unimplemented!() }
    /// The mel frames `[start − left, start + frames + right)` for a segment of `frames` frames,
    /// padded as this flow's conditioning wants beyond the ends: `[1, n_mels, left + frames + right]`.
    pub fn mel_window(&self, _mel: &MelSpectrogram, _start: usize, _frames: usize) -> Result<Tensor> { unimplemented!() }
    /// Whitens a whole clip: samples (length at most frames · hop) → residual and log|∂e/∂x| per
    /// sample, nats. Without a whitening front: the samples and zeros.
    pub fn whiten(&self, _samples: &[f32], _mel: &MelSpectrogram) -> Result<(Vec<f32>, Vec<f32>)> { unimplemented!() }
    /// The inverse of [`Flow::whiten`]: residual (length at most frames · hop) → samples.
    pub fn unwhiten(&self, _residual: &[f32], _mel: &MelSpectrogram) -> Result<Vec<f32>> { unimplemented!() }
    /// Residual segments `[batch, 1, samples]` (a multiple of hop, frame-aligned) with mel windows
    /// `[batch, n_mels, left + frames + right]` → latent `[batch, group, steps]`, log_det `[batch]`.
    pub fn forward(&self, _x: &Tensor, _mel: &Tensor) -> Result<(Tensor, Tensor)> { unimplemented!() }
    /// Data-dependent initialisation of the steps that want it, from one large batch.
    pub fn initialise(&self, _x: &Tensor, _mel: &Tensor) -> Result<()> { unimplemented!() }
    /// Latent `[batch, group, steps]` → residual `[batch, 1, samples]`.
    pub fn inverse(&self, _z: &Tensor, _mel: &Tensor) -> Result<Tensor> { unimplemented!() }
    /// Fits the whitening front (if there is one) to clips: pairs of samples and their mel.
    /// `progress(step, steps, loss)` returns `false` to stop early (then `Error::Interrupted`).
    pub fn fit_whitening(
        &self,
        _clips: &[(&[f32], &MelSpectrogram)],
        _seed: u64,
        _progress: &mut dyn FnMut(usize, usize, f64) -> bool,
    ) -> Result<()> { unimplemented!() }
    /// Whether there is a whitening front (its tensors are all named `whiten.…` and are not
    /// trained by the flow's optimiser).
    pub fn has_whitening(&self) -> bool { unimplemented!() }
    /// Multiply-adds per sample of audio of the inverse.
    pub fn macs_per_sample(&self) -> f64 { unimplemented!() }
}

/// Standard-normal negative log-likelihood of latents, per batch item: `[batch]`, nats.
///
/// `½ Σ z² + ½ n ln 2π − log_det`.
pub fn nll(z: &Tensor, log_det: &Tensor) -> Result<Tensor> {
    let n = (z.elem_count() / z.dim(0)?) as f64;
    let half_square = (z.sqr()?.flatten_from(1)?.sum(1)? * 0.5)?;
    Ok((half_square - log_det)?.affine(1.0, 0.5 * n * (2.0 * std::f64::consts::PI).ln())?)
}

/// Nats per sample of ±1 audio with dequantisation noise of one 16-bit step → bits per sample.
///
/// A density per unit of amplitude is `2¹⁵` times that per quantisation step.
pub fn bits_per_sample(nats_per_sample: f64) -> f64 {
    nats_per_sample / std::f64::consts::LN_2 + 15.0
}

#[allow(unused)]
fn unused() -> Error { Error::invalid("") }

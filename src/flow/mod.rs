//! The normalizing flow: audio to latent noise and back, given a mel.
//!
//! Inside, tensors are time-major, `[batch, steps, channels]`: the squeeze is then a reshape, and
//! conditioners read rows. Only latents cross the border as `[batch, group, steps]`.

mod conditioning;
pub mod config;
mod coupling;
mod filtering;
pub(crate) mod filters;
mod mix;
mod pointwise;
pub(crate) mod stream;
mod whiten;

use crate::mel::{MelConfig, MelSpectrogram};
use crate::net::{CondNet, SeparableNet, WaveNet};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use conditioning::Conditioning;
pub use config::FlowConfig;
use config::StepConfig;
use coupling::Coupling;
pub use filtering::Segment;
use mix::Mix;
use pointwise::{Actnorm, Asinh, Gain, Swap};
use stream::Stage;
use whiten::Whiten;

/// Frames of mel that a frame's sound depends on, beside its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Frames before.
    pub left: usize,
    /// Frames after.
    pub right: usize,
}

/// What a step knows of the mel: `rows` `[batch, rows, features]`, one for every `up` steps (and, from
/// frame conditioning, one more to interpolate towards when `up > 1`).
pub struct Cond {
    /// The features.
    pub rows: Tensor,
    /// Steps per row.
    pub up: usize,
}

/// An invertible step. `x`: data, `z`: latent, both `[batch, steps, channels]`; log_det =
/// log|det ∂z/∂x|, `[batch]`, nats.
pub trait Bijector {
    /// Data → latent.
    fn forward(&self, x: &Tensor, cond: &Cond) -> candle_core::Result<(Tensor, Tensor)>;
    /// [`Bijector::forward`] with the log-determinant of each step, `[batch, steps]`.
    ///
    /// As it stands here right where all steps have the same; others say it themselves.
    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> candle_core::Result<(Tensor, Tensor)> {
        let (batch, steps, _) = x.dims3()?;
        let (z, log_det) = self.forward(x, cond)?;
        Ok((z, (log_det / steps as f64)?.unsqueeze(1)?.broadcast_as((batch, steps))?))
    }
    /// Latent → data.
    fn inverse(&self, z: &Tensor, cond: &Cond) -> candle_core::Result<Tensor>;
    /// Sets what depends on data from `x`, then [`Bijector::forward`].
    fn initialise(&self, x: &Tensor, cond: &Cond) -> candle_core::Result<(Tensor, Tensor)> {
        self.forward(x, cond)
    }
    /// The inverse as a stage of a stream, or `None` if it has none.
    fn pack(&self) -> candle_core::Result<Option<Stage>> {
        Ok(None)
    }
}

/// What a step makes of its input, with the log-determinant.
type Mapped = candle_core::Result<(Tensor, Tensor)>;

enum Step {
    Map(Box<dyn Bijector + Send + Sync>),
    /// The first channels are done.
    Early(usize),
}

/// A whole flow: an optional whitening front on slices, then trainable steps on tensors.
///
/// Latents have the shape `[batch, group, steps]`, `group · steps` = samples.
pub struct Flow {
    whitening: Option<Whiten>,
    conditioning: Conditioning,
    context: Context,
    steps: Vec<Step>,
    group: usize,
    hop: usize,
    n_mels: usize,
    reach: usize,
    macs_per_sample: f64,
    device: Device,
}

impl Flow {
    /// Builds the flow and asks `vb` for every tensor it has.
    ///
    /// # Errors
    /// If the design doesn't fit the mel, or `vb` hasn't a tensor in the right shape.
    pub fn new(config: &FlowConfig, mel: &MelConfig, vb: VarBuilder) -> Result<Self> {
        config.validate(mel)?;
        let (group, hop) = (config.group, mel.hop_length);
        let device = vb.device().clone();
        let whitening = config.whitening.as_ref().map(|w| Whiten::new(w, mel, vb.pp("whiten"))).transpose()?;
        let conditioning = Conditioning::new(&config.conditioning, mel.n_mels, hop, group, vb.pp("conditioning"))?;
        let context = conditioning.context()?;
        let (features, up) = (conditioning.features(), conditioning.up());
        let (mut channels, mut reach) = (group, 0);
        let (mut per_step, mut per_row) = (0, 0);
        let mut steps = Vec::new();
        let all = config.blocks.iter().flat_map(|block| std::iter::repeat_n(&block.steps, block.repeat).flatten());
        for (i, step) in all.enumerate() {
            let vb = vb.pp(format!("steps.{i}"));
            let map: Box<dyn Bijector + Send + Sync> = match step {
                StepConfig::Asinh { scale } => Box::new(Asinh { scale: *scale }),
                StepConfig::Gain => Box::new(Gain::new(features, channels, vb)?),
                StepConfig::Actnorm => Box::new(Actnorm::new(channels, vb)?),
                StepConfig::Mix => {
                    per_step += channels * channels;
                    Box::new(Mix::new(channels, vb)?)
                }
                StepConfig::Coupling { .. } | StepConfig::SeparableCoupling { .. } => {
                    let coupling = Self::coupling(step, channels, features, up, vb)?;
                    reach += coupling.reach();
                    per_step += coupling.macs().0;
                    per_row += coupling.macs().1;
                    Box::new(coupling)
                }
                StepConfig::Swap => Box::new(Swap),
                StepConfig::Early { channels: done } => {
                    channels -= done;
                    steps.push(Step::Early(*done));
                    continue;
                }
            };
            steps.push(Step::Map(map));
        }
        let macs_per_sample = per_step as f64 / group as f64
            + per_row as f64 / (group * up) as f64
            + conditioning.macs_per_frame() as f64 / hop as f64
            + whitening.as_ref().map_or(0.0, Whiten::macs_per_sample);
        Ok(Self {
            whitening,
            conditioning,
            context,
            steps,
            group,
            hop,
            n_mels: mel.n_mels,
            reach,
            macs_per_sample,
            device,
        })
    }

    /// The coupling of a step that is one.
    fn coupling(
        step: &StepConfig,
        channels: usize,
        features: usize,
        up: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<Coupling> {
        let known = channels / 2;
        let outputs = 2 * (channels - known);
        let (net, weight_norm, bound): (Box<dyn CondNet + Send + Sync>, _, _) = match step {
            StepConfig::Coupling { net, bound } => {
                (Box::new(WaveNet::new(net, known, outputs, up, vb.clone())?), net.weight_norm, *bound)
            }
            StepConfig::SeparableCoupling { net, bound } => {
                (Box::new(SeparableNet::new(net, known, outputs, up, vb.clone())?), net.weight_norm, *bound)
            }
            other => candle_core::bail!("{other:?} is not a coupling"),
        };
        Coupling::new(net, known, features, weight_norm, bound, vb)
    }

    /// Samples per step: the number of latent channels.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Mel frames that [`Flow::forward`] and [`Flow::inverse`] want around a segment.
    pub fn context(&self) -> Context {
        self.context
    }

    /// Steps on each side whose latents influence a step's data: the halo for working in blocks.
    pub fn halo_steps(&self) -> usize {
        self.reach
    }

    /// Whether there is a whitening front. Its tensors are all named `whiten.…` and are fitted by
    /// [`Flow::fit_whitening`]; the loss reaches them through [`Flow::whiten_segments`] only.
    pub fn has_whitening(&self) -> bool {
        self.whitening.is_some()
    }

    /// Multiply-adds per sample of audio.
    pub fn macs_per_sample(&self) -> f64 {
        self.macs_per_sample
    }

    /// The mel frames `start − left .. start + frames + right`, `[1, n_mels, left + frames + right]`;
    /// beyond the ends the edge is repeated, or zeros stand (WaveGlow's upsampler).
    ///
    /// # Errors
    /// If the mel has the wrong number of bands.
    pub fn mel_window(&self, mel: &MelSpectrogram, start: usize, frames: usize) -> Result<Tensor> {
        if mel.n_mels() != self.n_mels {
            return Err(Error::invalid(format!("expected a mel of {} bands, got {}", self.n_mels, mel.n_mels())));
        }
        let context = self.context;
        let width = context.left + frames + context.right;
        let last = mel.frames() as isize - 1;
        let repeat = self.conditioning.repeats_edge();
        let mut values = Vec::with_capacity(self.n_mels * width);
        for band in 0..self.n_mels {
            let row = mel.band(band);
            values.extend((0..width).map(|i| {
                let f = (start + i) as isize - context.left as isize;
                if repeat || (0..=last).contains(&f) { row[f.clamp(0, last) as usize] } else { 0.0 }
            }));
        }
        Ok(Tensor::from_vec(values, (1, self.n_mels, width), &self.device)?)
    }

    /// Whitens a whole clip: samples (at most frames · hop) → residual and log|∂e/∂x| per sample,
    /// nats. Without a whitening front: the samples and zeros.
    ///
    /// # Errors
    /// If the mel doesn't fit.
    pub fn whiten(&self, samples: &[f32], mel: &MelSpectrogram) -> Result<(Vec<f32>, Vec<f32>)> {
        match &self.whitening {
            Some(whitening) => whitening.forward(samples, mel),
            None => Ok((samples.to_vec(), vec![0.0; samples.len()])),
        }
    }

    /// Samples before a segment that [`Flow::whiten_segments`] wants, as far as its clip has them.
    pub fn whitening_memory(&self) -> usize {
        self.whitening.as_ref().map_or(0, Whiten::order)
    }

    /// Whitens segments of `frames` frames as [`Flow::whiten`] does their whole clips, but within the
    /// graph, so that the loss reaches the front's parameters: residuals `[batch, 1, samples]` and
    /// log|∂e/∂x| of each segment, `[batch]`, nats.
    ///
    /// # Errors
    /// If a segment doesn't fit.
    pub fn whiten_segments(&self, segments: &[Segment], frames: usize) -> Result<(Tensor, Tensor)> {
        if let Some(whitening) = &self.whitening {
            return whitening.segments(segments, frames);
        }
        let samples: Vec<f32> = segments.iter().flat_map(|segment| segment.samples.iter().copied()).collect();
        let x = Tensor::from_vec(samples, (segments.len(), 1, frames * self.hop), &self.device)?;
        Ok((x, Tensor::zeros(segments.len(), candle_core::DType::F32, &self.device)?))
    }

    /// The inverse of [`Flow::whiten`]: residual (at most frames · hop) → samples.
    ///
    /// # Errors
    /// If the mel doesn't fit.
    pub fn unwhiten(&self, residual: &[f32], mel: &MelSpectrogram) -> Result<Vec<f32>> {
        match &self.whitening {
            Some(whitening) => whitening.inverse(residual, mel),
            None => Ok(residual.to_vec()),
        }
    }

    /// Fits the whitening front, if there is one, to clips: pairs of samples and their mel.
    /// `progress(step, steps, loss)` returns `false` to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `progress` says so.
    pub fn fit_whitening(
        &self,
        clips: &[(&[f32], &MelSpectrogram)],
        seed: u64,
        progress: &mut dyn FnMut(usize, usize, f64) -> bool,
    ) -> Result<()> {
        self.whitening.as_ref().map_or(Ok(()), |whitening| whitening.fit(clips, seed, progress))
    }

    /// Residual segments `[batch, 1, samples]` (frame-aligned, a multiple of hop) with mel windows
    /// `[batch, n_mels, left + frames + right]` → latent `[batch, group, steps]`, log_det `[batch]`.
    ///
    /// # Errors
    /// If the shapes don't fit each other.
    pub fn forward(&self, x: &Tensor, mel: &Tensor) -> Result<(Tensor, Tensor)> {
        let zero = Tensor::zeros(x.dim(0)?, x.dtype(), x.device())?;
        self.run_forward((x, zero), mel, |_, map, x, cond| map.forward(x, cond))
    }

    /// [`Flow::forward`] with the log-determinant of each step, `[batch, steps]`: when a sound is
    /// likely, and when not.
    ///
    /// # Errors
    /// As [`Flow::forward`].
    pub fn forward_by_step(&self, x: &Tensor, mel: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, _) = self.check_data(x.dims(), mel)?;
        let zero = Tensor::zeros((batch, x.dim(2)? / self.group), x.dtype(), x.device())?;
        self.run_forward((x, zero), mel, |_, map, x, cond| map.forward_by_step(x, cond))
    }

    /// Data-dependent initialisation from one large batch: of the steps that want it and that
    /// `wanted`, by their place in the design, says yes to.
    ///
    /// # Errors
    /// As [`Flow::forward`].
    pub fn initialise(&self, x: &Tensor, mel: &Tensor, wanted: &dyn Fn(usize) -> bool) -> Result<()> {
        let zero = Tensor::zeros(x.dim(0)?, x.dtype(), x.device())?;
        let apply = |i: usize, map: &dyn Bijector, x: &Tensor, cond: &Cond| {
            if wanted(i) { map.initialise(x, cond) } else { map.forward(x, cond) }
        };
        self.run_forward((x, zero), mel, apply).map(|_| ())
    }

    /// Data → latent, each step by `apply`, which is told its place in the design; log-determinants
    /// are added to `log_det`.
    fn run_forward(
        &self,
        (x, mut log_det): (&Tensor, Tensor),
        mel: &Tensor,
        apply: impl Fn(usize, &dyn Bijector, &Tensor, &Cond) -> Mapped,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, samples) = self.check_data(x.dims(), mel)?;
        let cond = self.conditioning.forward(mel)?;
        let mut x = x.reshape((batch, samples / self.group, self.group))?;
        let mut parts = Vec::new();
        for (i, step) in self.steps.iter().enumerate() {
            match step {
                Step::Map(map) => {
                    let (z, d) = apply(i, map.as_ref(), &x, &cond)?;
                    x = z;
                    log_det = (log_det + d)?;
                }
                Step::Early(done) => {
                    parts.push(x.narrow(2, 0, *done)?);
                    x = x.narrow(2, *done, x.dim(2)? - done)?;
                }
            }
        }
        parts.push(x);
        Ok((Tensor::cat(&parts, 2)?.transpose(1, 2)?, log_det))
    }

    /// Latent `[batch, group, steps]` → residual `[batch, 1, samples]`.
    ///
    /// # Errors
    /// If the shapes don't fit each other.
    pub fn inverse(&self, z: &Tensor, mel: &Tensor) -> Result<Tensor> {
        let (batch, group, steps) = z.dims3()?;
        if group != self.group {
            return Err(Error::invalid(format!("expected latents of {} channels, got {group}", self.group)));
        }
        self.check_data(&[batch, 1, group * steps], mel)?;
        let cond = self.conditioning.forward(mel)?;
        let z = z.transpose(1, 2)?;
        let mut early: usize = self.steps.iter().map(|s| if let Step::Early(n) = s { *n } else { 0 }).sum();
        let mut x = z.narrow(2, early, group - early)?.contiguous()?;
        for step in self.steps.iter().rev() {
            x = match step {
                Step::Map(map) => map.inverse(&x, &cond)?,
                Step::Early(done) => {
                    early -= done;
                    Tensor::cat(&[&z.narrow(2, early, *done)?.contiguous()?, &x], 2)?
                }
            };
        }
        Ok(x.contiguous()?.reshape((batch, 1, group * steps))?)
    }

    /// The inverse packed for streaming, and the whitening's filters; `None` if a step of this design
    /// cannot stream.
    ///
    /// # Errors
    /// If a matrix has no inverse.
    pub(crate) fn pack(&self) -> Result<Option<(stream::Packed, Option<filters::Filters>)>> {
        let mut stages = Vec::new();
        for step in self.steps.iter().rev() {
            stages.push(match step {
                Step::Early(done) => Stage::Early(*done),
                Step::Map(map) => match map.pack()? {
                    Some(stage) => stage,
                    None => return Ok(None),
                },
            });
        }
        let Some(conditioning) = self.conditioning.pack()? else { return Ok(None) };
        let filters = self.whitening.as_ref().map(Whiten::filters).transpose()?;
        Ok(Some((stream::Packed { conditioning, stages, group: self.group, hop: self.hop }, filters)))
    }

    fn check_data(&self, data: &[usize], mel: &Tensor) -> Result<(usize, usize)> {
        let &[batch, 1, samples] = data else {
            return Err(Error::invalid(format!("expected data of shape [batch, 1, samples], got {data:?}")));
        };
        let context = self.context;
        let expected = [batch, self.n_mels, context.left + samples / self.hop + context.right];
        if samples == 0 || !samples.is_multiple_of(self.hop) || mel.dims() != expected {
            return Err(Error::invalid(format!(
                "{samples} samples (a multiple of {}) want a mel window of shape {expected:?}, got {:?}",
                self.hop,
                mel.dims()
            )));
        }
        Ok((batch, samples))
    }
}

/// Standard-normal negative log-likelihood of latents, per batch item: `[batch]`, nats.
///
/// `½ Σ z² + ½ n ln 2π − log_det`.
///
/// # Errors
/// If the batch sizes differ.
pub fn nll(z: &Tensor, log_det: &Tensor) -> Result<Tensor> {
    let n = (z.elem_count() / z.dim(0)?) as f64;
    let half_square = (z.sqr()?.sum((1, 2))? * 0.5)?;
    Ok((half_square - log_det)?.affine(1.0, 0.5 * n * (2.0 * std::f64::consts::PI).ln())?)
}

/// Nats per sample of ±1 audio with dequantisation noise of one 16-bit step → bits per sample.
///
/// A density per unit of amplitude is `2¹⁵` times that per quantisation step.
pub fn bits_per_sample(nats_per_sample: f64) -> f64 {
    nats_per_sample / std::f64::consts::LN_2 + 15.0
}

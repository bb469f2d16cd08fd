//! The normalizing flow: audio to latent noise and back, given a mel.
//!
//! Inside, tensors are time-major, `[batch, steps, channels]`: the squeeze is then a reshape, and
//! conditioners read rows. Only latents cross the border as `[batch, group, steps]`.

mod autoregressive;
mod conditioning;
pub mod config;
mod coupling;
mod filtering;
pub(crate) mod filters;
mod likelihood;
mod logistic;
mod mix;
mod pointwise;
mod residual;
mod rowwise;
mod scalar;
mod split;
pub(crate) mod stream;
mod whiten;

use crate::mel::{MelConfig, MelSpectrogram};
use crate::net::{CondNet, LipschitzNet, SeparableNet, Transformer, WaveNet};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use autoregressive::Autoregressive;
use conditioning::Conditioning;
pub use config::FlowConfig;
use config::{MapConfig, Place, SequenceConfig, Split, StepConfig, WaveNetConfig};
use coupling::Coupling;
pub use filtering::Segment;
pub use likelihood::Likelihood;
use mix::Mix;
use pointwise::{Actnorm, Asinh, Gain, Scale, Swap};
use residual::Residual;
use rowwise::{Reverse, Rowwise};
use split::Parts;
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
    /// What the log_det makes of the flow's likelihood.
    fn likelihood(&self) -> Likelihood {
        Likelihood::Exact
    }
}

/// A step of the design; what errors call it stands beside it.
enum Step {
    Map(Box<dyn Bijector + Send + Sync>),
    /// So many steps become one.
    Squeeze(usize),
    /// The first channels are done, after their prior's mean and scale have been taken out.
    Early {
        done: usize,
        prior: Option<Coupling>,
    },
}

/// What steps cost and how far they reach, in samples.
struct Cost {
    /// `None` once a step's inverse reaches as far as the sound does.
    reach: Option<usize>,
    macs_per_sample: f64,
    /// Samples that a row of conditioning stands for.
    row: usize,
}

impl Cost {
    /// Adds multiply-adds per step (of `step` samples) and per row of conditioning, and the steps that the
    /// inverse reaches on either side.
    fn add(&mut self, (per_step, per_row): (usize, usize), reach: Option<usize>, step: usize) {
        self.reach = self.reach.zip(reach).map(|(sum, reach)| sum + reach * step);
        self.macs_per_sample += per_step as f64 / step as f64 + per_row as f64 / self.row as f64;
    }
}

/// A whole flow: an optional whitening front on slices, then trainable steps on tensors.
///
/// Latents have the shape `[batch, group, steps]`, `group · steps` = samples.
pub struct Flow {
    whitening: Option<Whiten>,
    conditioning: Conditioning,
    context: Context,
    /// Steps and their names.
    steps: Vec<(Step, &'static str)>,
    /// Groups of samples that a step holds in the end.
    squeezed: usize,
    group: usize,
    hop: usize,
    n_mels: usize,
    /// Samples; `None` if a step's inverse reaches as far as the sound does.
    reach: Option<usize>,
    macs_per_sample: f64,
    device: Device,
}

/// Bound of the log-scales of a learned prior.
const PRIOR_BOUND: f64 = 3.0;

/// What conditioners find at a level of squeezing.
struct Level {
    features: usize,
    up: usize,
}

impl Level {
    /// A coupling with a WaveNet.
    fn coupling(
        &self,
        parts: Parts,
        net: &WaveNetConfig,
        map: (&MapConfig, Option<f64>),
        vb: VarBuilder,
    ) -> candle_core::Result<Coupling> {
        let of = |inputs, outputs| -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
            Ok(Box::new(WaveNet::new(net, inputs, outputs, self.up, vb.clone())?))
        };
        Coupling::new(parts, map, of, (self.features, net.weight_norm), vb.clone())
    }

    /// A causal net over `rows` rows a step.
    fn sequence(
        &self,
        config: &SequenceConfig,
        (inputs, outputs): (usize, usize),
        rows: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
        let up = self.up * rows;
        Ok(match config {
            SequenceConfig::Wavenet(net) => Box::new(WaveNet::new(net, inputs, outputs, up, vb)?),
            SequenceConfig::Transformer(net) => Box::new(Transformer::new(net, inputs, outputs, up, vb)?),
        })
    }
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
        let mut place = Place { channels: group, squeezed: 1 };
        let mut cost = Cost { reach: Some(0), macs_per_sample: 0.0, row: group * up };
        let mut steps = Vec::new();
        for (i, step) in config.steps().enumerate() {
            let vb = vb.pp(format!("steps.{i}"));
            let Place { channels, squeezed } = place;
            let level = Level { features, up: up / squeezed };
            let samples = squeezed * group;
            let map = |map: Box<dyn Bijector + Send + Sync>| Step::Map(map);
            let built = match step {
                StepConfig::Asinh { scale } => map(Box::new(Asinh { scale: *scale })),
                StepConfig::Gain => map(Box::new(Gain::new(features, channels, vb)?)),
                StepConfig::Actnorm => map(Box::new(Actnorm::new(channels, vb)?)),
                StepConfig::Mix { form } => {
                    cost.add((channels * channels, 0), Some(0), samples);
                    map(Box::new(Mix::new(channels, *form, vb)?))
                }
                StepConfig::Scale => map(Box::new(Scale::new(channels, vb)?)),
                StepConfig::Coupling { net, bound, map: scalar, split } => {
                    let coupling = level.coupling(split.of(channels), net, (scalar, *bound), vb)?;
                    cost.add(coupling.macs(), Some(coupling.reach()), samples);
                    map(Box::new(coupling))
                }
                StepConfig::SeparableCoupling { net, bound } => {
                    let of = |inputs, outputs| -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
                        Ok(Box::new(SeparableNet::new(net, inputs, outputs, level.up, vb.clone())?))
                    };
                    let (parts, sizes) = (Split::Halves.of(channels), (features, net.weight_norm));
                    let coupling = Coupling::new(parts, (&MapConfig::Affine, *bound), of, sizes, vb.clone())?;
                    cost.add(coupling.macs(), Some(coupling.reach()), samples);
                    map(Box::new(coupling))
                }
                StepConfig::Swap => map(Box::new(Swap)),
                StepConfig::Squeeze { by } => Step::Squeeze(*by),
                StepConfig::Early { channels: done, prior } => {
                    let parts = Parts::Blocks { known: channels - done, moved: *done, known_first: false };
                    let of = |net| level.coupling(parts, net, (&MapConfig::Affine, Some(PRIOR_BOUND)), vb.pp("prior"));
                    let prior = prior.as_ref().map(of).transpose()?;
                    prior.iter().for_each(|prior| cost.add(prior.macs(), Some(prior.reach()), samples));
                    Step::Early { done: *done, prior }
                }
                StepConfig::Autoregressive { by, reversed, net, bound, map: scalar } => {
                    let rows = channels / by;
                    let net = |inputs, outputs| level.sequence(net, (inputs, outputs), rows, vb.clone());
                    let order = (*by, *reversed);
                    let step = Autoregressive::new(order, (scalar, *bound), net, features, vb.clone())?;
                    let (per_row, conditioning) = step.macs();
                    cost.add((rows * per_row, conditioning), None, samples);
                    map(Box::new(step))
                }
                StepConfig::Rowwise { net, bound, map: scalar } => {
                    let step = Rowwise::new(net, (scalar, *bound), (features, level.up), vb)?;
                    let (per_value, conditioning) = step.macs();
                    cost.add((channels * per_value, conditioning), Some(step.reach()), samples);
                    map(Box::new(step))
                }
                StepConfig::Reverse { parts } => map(Box::new(Reverse { parts: *parts })),
                StepConfig::Residual { net, terms, probes } => {
                    let step = Residual::new(LipschitzNet::new(net, channels, features, vb)?, *terms, *probes);
                    cost.add(step.macs(), None, samples);
                    map(Box::new(step))
                }
            };
            steps.push((built, step.name()));
            place = step.after(place);
        }
        let macs_per_sample = cost.macs_per_sample
            + conditioning.macs_per_frame() as f64 / hop as f64
            + whitening.as_ref().map_or(0.0, Whiten::macs_per_sample);
        Ok(Self {
            whitening,
            conditioning,
            context,
            steps,
            squeezed: place.squeezed,
            group,
            hop,
            n_mels: mel.n_mels,
            reach: cost.reach,
            macs_per_sample,
            device,
        })
    }

    /// Samples per step: the number of latent channels.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Mel frames that [`Flow::forward`] and [`Flow::inverse`] want around a segment.
    pub fn context(&self) -> Context {
        self.context
    }

    /// Steps on each side whose latents influence a step's data: the halo for working in blocks. `None` if
    /// there is no such limit, so that a sound must be made as a whole.
    pub fn halo_steps(&self) -> Option<usize> {
        self.reach.map(|reach| reach.div_ceil(self.group))
    }

    /// What [`Flow::forward`]'s likelihood is worth.
    pub fn likelihood_kind(&self) -> Likelihood {
        let of = |(step, _): &(Step, _)| if let Step::Map(map) = step { map.likelihood() } else { Likelihood::Exact };
        self.steps.iter().map(of).max().unwrap_or(Likelihood::Exact)
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
        self.run_forward(x, mel, &|_| false)
    }

    /// Data-dependent initialisation from one large batch: of the steps that want it and that
    /// `wanted`, by their place in the design, says yes to.
    ///
    /// # Errors
    /// As [`Flow::forward`].
    pub fn initialise(&self, x: &Tensor, mel: &Tensor, wanted: &dyn Fn(usize) -> bool) -> Result<()> {
        self.run_forward(x, mel, wanted).map(|_| ())
    }

    fn run_forward(&self, x: &Tensor, mel: &Tensor, initialise: &dyn Fn(usize) -> bool) -> Result<(Tensor, Tensor)> {
        let (batch, samples) = self.check_data(x.dims(), mel)?;
        let mut cond = self.conditioning.forward(mel)?;
        let mut x = x.reshape((batch, samples / self.group, self.group))?;
        let mut log_det = Tensor::zeros(batch, x.dtype(), x.device())?;
        let mut parts = Vec::new();
        // latents of squeezed steps stand at the groups that they hold
        let latents = |x: &Tensor| x.contiguous()?.reshape((batch, samples / self.group, ()));
        for (i, (step, name)) in self.steps.iter().enumerate() {
            let taken = |map: &dyn Bijector, x: &Tensor, cond: &Cond| {
                let taken = if initialise(i) { map.initialise(x, cond) } else { map.forward(x, cond) };
                taken.map_err(|error| at_step(error, i, name))
            };
            match step {
                Step::Map(map) => {
                    let (z, d) = taken(map.as_ref(), &x, &cond)?;
                    x = z;
                    log_det = (log_det + d)?;
                }
                Step::Squeeze(by) => {
                    let (_, steps, channels) = x.dims3()?;
                    x = x.contiguous()?.reshape((batch, steps / by, channels * by))?;
                    cond.up /= by;
                }
                Step::Early { done, prior } => {
                    if let Some(prior) = prior {
                        let (z, d) = taken(prior, &x, &cond)?;
                        x = z;
                        log_det = (log_det + d)?;
                    }
                    parts.push(latents(&x.narrow(2, 0, *done)?)?);
                    x = x.narrow(2, *done, x.dim(2)? - done)?;
                }
            }
        }
        parts.push(latents(&x)?);
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
        let mut cond = self.conditioning.forward(mel)?;
        cond.up /= self.squeezed;
        let z = z.transpose(1, 2)?;
        let mut squeezed = self.squeezed;
        // the first columns of the latents, as steps that hold so many groups
        let latents = |from: usize, columns: usize, squeezed: usize| {
            z.narrow(2, from, columns)?.contiguous()?.reshape((batch, steps / squeezed, columns * squeezed))
        };
        let mut early = self.early_columns();
        let mut x = latents(early, group - early, squeezed)?;
        for (i, (step, name)) in self.steps.iter().enumerate().rev() {
            let taken = |map: &dyn Bijector, x: &Tensor, cond: &Cond| {
                map.inverse(x, cond).map_err(|error| at_step(error, i, name))
            };
            x = match step {
                Step::Map(map) => taken(map.as_ref(), &x, &cond)?,
                Step::Squeeze(by) => {
                    squeezed /= by;
                    cond.up *= by;
                    x.contiguous()?.reshape((batch, steps / squeezed, ()))?
                }
                Step::Early { done, prior } => {
                    early -= done / squeezed;
                    let x = Tensor::cat(&[&latents(early, done / squeezed, squeezed)?, &x], 2)?;
                    match prior {
                        Some(prior) => taken(prior, &x, &cond)?,
                        None => x,
                    }
                }
            };
        }
        Ok(x.contiguous()?.reshape((batch, 1, group * steps))?)
    }

    /// Columns of the latents that are done early.
    fn early_columns(&self) -> usize {
        let (mut squeezed, mut columns) = (1, 0);
        for (step, _) in &self.steps {
            match step {
                Step::Squeeze(by) => squeezed *= by,
                Step::Early { done, .. } => columns += done / squeezed,
                Step::Map(_) => {}
            }
        }
        columns
    }

    /// The inverse packed for streaming, and the whitening's filters; `None` if a step of this design
    /// cannot stream.
    ///
    /// # Errors
    /// If a matrix has no inverse.
    pub(crate) fn pack(&self) -> Result<Option<(stream::Packed, Option<filters::Filters>)>> {
        let mut stages = Vec::new();
        for (step, _) in self.steps.iter().rev() {
            let map: Option<&dyn Bijector> = match step {
                Step::Map(map) => Some(map.as_ref()),
                Step::Squeeze(by) => {
                    stages.push(Stage::Squeeze(*by));
                    None
                }
                Step::Early { done, prior } => {
                    stages.push(Stage::Early(*done));
                    prior.as_ref().map(|prior| prior as &dyn Bijector)
                }
            };
            let Some(map) = map else { continue };
            let Some(stage) = map.pack()? else { return Ok(None) };
            stages.push(stage);
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

/// An error that names the step, counted from 1.
fn at_step(error: candle_core::Error, index: usize, name: &str) -> Error {
    // candle adds a backtrace to its own messages where one is asked for: the first line says what
    let problem = error.to_string();
    let problem = problem.lines().next().unwrap_or_default();
    Error::invalid(format!("step {} ({name}): {problem}", index + 1))
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

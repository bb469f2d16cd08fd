//! The normalizing flow: audio to latent noise and back, given a mel.
//!
//! Inside, tensors are time-major, `[batch, steps, channels]`: the squeeze is then a reshape, and
//! conditioners read rows. Only latents cross the border as `[batch, group, steps]`.

mod affine;
mod autoregressive;
mod build;
mod conditioning;
pub mod config;
mod coupling;
mod dequantise;
pub(crate) mod drive;
mod filtering;
pub(crate) mod filters;
mod latent;
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

use crate::kernels::choice::Kernel;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::net::{self, Passes, Projection};
use crate::{Error, Result};
use build::{Builder, Level};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use conditioning::Conditioning;
pub use config::FlowConfig;
use coupling::Coupling;
use dequantise::Dequantise;
pub use filtering::Segment;
use latent::Latent;
pub use likelihood::Likelihood;
use stream::Stage;
use whiten::Whiten;

/// What the names of the whitening front's tensors begin with.
pub const WHITENING_PREFIX: &str = "whiten.";

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
    /// How nets are computed.
    pub passes: Passes,
}

impl Cond {
    /// Features for every `up` steps, for nets that are computed as usual.
    pub fn new(rows: Tensor, up: usize) -> Self {
        Self { rows, up, passes: Passes::default() }
    }

    /// What a net with this projection finds.
    pub(super) fn of<'a>(&'a self, projection: &'a Projection) -> net::Conditioning<'a> {
        net::Conditioning { features: &self.rows, projection, passes: self.passes }
    }
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
    fn pack(&self, _kernel: Kernel) -> candle_core::Result<Option<Stage>> {
        Ok(None)
    }
    /// What the log_det makes of the flow's likelihood.
    fn likelihood(&self) -> Likelihood {
        Likelihood::Exact
    }
}

/// What a step makes of its input, with the log-determinant.
type Mapped = candle_core::Result<(Tensor, Tensor)>;

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

/// A whole flow: an optional whitening front on slices, then trainable steps on tensors.
///
/// Latents have the shape `[batch, group, steps]`, `group · steps` = samples.
pub struct Flow {
    whitening: Option<Whiten>,
    conditioning: Conditioning,
    latent: Option<Latent>,
    dequantise: Option<Dequantise>,
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
    passes: Passes,
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
        let up = conditioning.up();
        let level = Level { features: conditioning.features(), up };
        let dequantise = config.dequantisation.as_ref();
        let dequantise = dequantise.map(|d| Dequantise::new(d, group, &level, vb.pp("dequantise"))).transpose()?;
        let latent = config.latent.as_ref();
        let latent = latent.map(|l| Latent::new(l, level.features, hop, vb.pp("latent"))).transpose()?;
        let features = level.features + latent.as_ref().map_or(0, Latent::width);
        let mut builder = Builder::new(features, up, group);
        if let Some(latent) = &latent {
            // the last half of a frame leans towards the next one's latent
            builder.cost.add((latent.macs_per_frame(), 0), Some(1), hop);
        }
        let mut steps = Vec::new();
        for (i, step) in config.steps().enumerate() {
            let vb = vb.pp(format!("steps.{i}"));
            steps.push((builder.step(step, vb)?, step.name()));
        }
        let Builder { place, cost, .. } = builder;
        let macs_per_sample = cost.macs_per_sample
            + conditioning.macs_per_frame() as f64 / hop as f64
            + whitening.as_ref().map_or(0.0, Whiten::macs_per_sample);
        Ok(Self {
            whitening,
            conditioning,
            latent,
            dequantise,
            context,
            steps,
            squeezed: place.squeezed,
            group,
            hop,
            n_mels: mel.n_mels,
            reach: cost.reach,
            macs_per_sample,
            passes: Passes::default(),
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
        let front = match (&self.latent, &self.dequantise) {
            (None, None) => Likelihood::Exact,
            _ => Likelihood::LowerBound,
        };
        self.steps.iter().map(of).max().unwrap_or(front).max(front)
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
    /// A flow with learned dequantisation first draws the samples' noise below one 16-bit step anew; the
    /// logarithms hold its share of the bound too.
    ///
    /// # Errors
    /// If the mel doesn't fit.
    pub fn whiten(&self, samples: &[f32], mel: &MelSpectrogram) -> Result<(Vec<f32>, Vec<f32>)> {
        let drawn = self.dequantise.as_ref().map(|d| self.dequantised(d, samples, mel)).transpose()?;
        let (samples, share) = match &drawn {
            Some((samples, share)) => (samples.as_slice(), Some(share)),
            None => (samples, None),
        };
        let (residual, mut log_det) = match &self.whitening {
            Some(whitening) => whitening.forward(samples, mel)?,
            None => (samples.to_vec(), vec![0.0; samples.len()]),
        };
        share.into_iter().for_each(|share| log_det.iter_mut().zip(share).for_each(|(l, s)| *l += s));
        Ok((residual, log_det))
    }

    /// A clip with the noise of its samples drawn anew, and log|∂u/∂v| of each.
    fn dequantised(&self, d: &Dequantise, samples: &[f32], mel: &MelSpectrogram) -> Result<(Vec<f32>, Vec<f32>)> {
        let whole = mel.frames() * self.hop;
        if samples.len() > whole {
            return Err(Error::invalid(format!("{} samples are more than the mel's frames cover", samples.len())));
        }
        let mut x = samples.to_vec();
        x.resize(whole, 0.0);
        let cond = self.conditioning.forward(&self.mel_window(mel, 0, mel.frames())?)?;
        let (x, log_det) = d.forward(&Tensor::from_vec(x, (1, whole), &self.device)?, &cond)?;
        let part = |t: Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.narrow(0, 0, samples.len())?.to_vec1()?) };
        Ok((part(x)?, part(log_det)?))
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
        let (batch, samples) = (segments.len(), frames * self.hop);
        let longest = segments.iter().map(|segment| segment.samples.len()).max().unwrap_or(0);
        if segments.iter().any(|segment| segment.samples.len() < samples) {
            return Err(Error::invalid(format!("a segment of {frames} frames has less than {samples} samples")));
        }
        // silence before a clip, as the filters have it
        let mut sounds = vec![0.0; batch * longest];
        for (row, segment) in sounds.chunks_exact_mut(longest).zip(segments) {
            row[longest - segment.samples.len()..].copy_from_slice(&segment.samples);
        }
        let mut sounds = Tensor::from_vec(sounds, (batch, longest), &self.device)?;
        let mut log_det = Tensor::zeros(batch, candle_core::DType::F32, &self.device)?;
        if let Some(dequantise) = &self.dequantise {
            let window = |segment: &Segment| self.mel_window(segment.mel, segment.start, frames);
            let windows = segments.iter().map(window).collect::<Result<Vec<_>>>()?;
            let cond = self.conditioning.forward(&Tensor::cat(&windows, 0)?)?;
            let memory = longest - samples;
            let (own, share) = dequantise.forward(&sounds.narrow(1, memory, samples)?, &cond)?;
            sounds = Tensor::cat(&[&sounds.narrow(1, 0, memory)?, &own], 1)?;
            log_det = (log_det + share.sum(1)?)?;
        }
        let Some(whitening) = &self.whitening else {
            return Ok((sounds.narrow(1, longest - samples, samples)?.contiguous()?.unsqueeze(1)?, log_det));
        };
        let (residual, whitened) = whitening.segments(segments, (&sounds, self.dequantise.is_some()), frames)?;
        Ok((residual, (log_det + whitened)?))
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

    /// Has nets computed otherwise from now on. It changes gradients and likelihoods by rounding at most.
    pub fn set_passes(&mut self, passes: Passes) {
        self.passes = passes;
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
        (x, log_det): (&Tensor, Tensor),
        mel: &Tensor,
        apply: impl Fn(usize, &dyn Bijector, &Tensor, &Cond) -> Mapped,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, samples) = self.check_data(x.dims(), mel)?;
        let cond = Cond { passes: self.passes, ..self.conditioning.forward(mel)? };
        let x = x.reshape((batch, samples / self.group, self.group))?;
        let Some(latent) = &self.latent else { return self.steps_forward((&x, log_det), cond, apply) };
        let (cond, bound) = latent.encode(&x, &cond)?;
        let (z, log_det) = self.steps_forward((&x, log_det), cond, apply)?;
        let bound = if log_det.rank() == 1 { bound } else { (bound / log_det.dim(1)? as f64)?.unsqueeze(1)? };
        Ok((z, log_det.broadcast_add(&bound)?))
    }

    /// The steps, from data `[batch, steps, group]`.
    fn steps_forward(
        &self,
        (x, mut log_det): (&Tensor, Tensor),
        mut cond: Cond,
        apply: impl Fn(usize, &dyn Bijector, &Tensor, &Cond) -> Mapped,
    ) -> Result<(Tensor, Tensor)> {
        let (batch, groups, _) = x.dims3()?;
        let mut x = x.clone();
        let mut parts = Vec::new();
        let log_det_by_step = log_det.rank() == 2;
        // latents of squeezed steps stand at the groups that they hold
        let latents = |x: &Tensor| x.contiguous()?.reshape((batch, groups, ()));
        for (i, (step, name)) in self.steps.iter().enumerate() {
            let taken = |map: &dyn Bijector, x: &Tensor, cond: &Cond| {
                let (z, d) = apply(i, map, x, cond).map_err(|error| at_step(error, i, name))?;
                // of a step that holds several groups, each has a share
                let held = if log_det_by_step { groups / d.dim(1)? } else { 1 };
                let d = if held == 1 {
                    d
                } else {
                    (d.unsqueeze(2)?.repeat((1, 1, held))? / held as f64)?.flatten_from(1)?
                };
                Ok::<_, Error>((z, d))
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
        let mut cond = Cond { passes: self.passes, ..self.conditioning.forward(mel)? };
        let z = z.transpose(1, 2)?.contiguous()?;
        if let Some(latent) = &self.latent {
            cond = latent.draw(&z, &cond)?;
        }
        Ok(self.steps_inverse(&z, cond)?.reshape((batch, 1, group * steps))?)
    }

    /// The steps' inverse, from latents `[batch, steps, group]` to data of the same shape.
    fn steps_inverse(&self, z: &Tensor, mut cond: Cond) -> Result<Tensor> {
        let (batch, steps, group) = z.dims3()?;
        cond.up /= self.squeezed;
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
        Ok(x.contiguous()?)
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

    /// What makes the whitening's filters, if there is a whitening front.
    ///
    /// # Errors
    /// If a parameter can't be read.
    pub(crate) fn filters(&self, kernel: Kernel) -> Result<Option<filters::Filters>> {
        self.whitening.as_ref().map(|whitening| whitening.filters(kernel)).transpose()
    }

    /// The inverse packed for streaming; `None` if a step of this design cannot stream.
    ///
    /// # Errors
    /// If a matrix has no inverse.
    pub(crate) fn pack(&self, kernel: Kernel) -> Result<Option<stream::Packed>> {
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
            let Some(stage) = map.pack(kernel)? else { return Ok(None) };
            stages.push(stage);
        }
        if self.latent.is_some() {
            return Ok(None);
        }
        let conditioning = self.conditioning.pack(kernel)?;
        Ok(Some(stream::Packed { conditioning, stages, group: self.group, hop: self.hop }))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Params;
    use crate::net::params::{named_rng, normal};
    use config::{Block, ConditioningConfig, LatentConfig, StepConfig, WaveNetConfig};

    fn noise(seed: u64, dims: &[usize]) -> Tensor {
        let mut rng = named_rng(seed, "test");
        let values: Vec<f32> = (0..dims.iter().product()).map(|_| normal(&mut rng)).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    #[test]
    fn given_its_latent_variable_the_flow_returns_the_data() {
        let mel = MelConfig { n_fft: 64, win_length: 64, hop_length: 16, n_mels: 5, ..MelConfig::nvidia() };
        let dilations = vec![1, 2];
        let net = WaveNetConfig { channels: 6, kernel: 3, dilations, weight_norm: false, skip: false, causal: false };
        let steps = vec![StepConfig::Gain {}, StepConfig::coupling(net, None)];
        let conditioning = ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: true };
        let config = FlowConfig {
            latent: Some(LatentConfig { width: 3, hidden: 7 }),
            ..FlowConfig::new(conditioning, 4, vec![Block { repeat: 1, steps }])
        };
        let params = Params::seeded(7, &Device::Cpu);
        let flow = Flow::new(&config, &mel, params.builder()).unwrap();
        for (i, (_, var)) in params.named().into_iter().enumerate() {
            var.set(&(var.as_tensor() + (noise(i as u64, var.dims()) * 0.2).unwrap()).unwrap()).unwrap();
        }
        let (x, frames) = (noise(1, &[2, 20, 4]), 5);
        let window = noise(2, &[2, 5, flow.context.left + frames + flow.context.right]);
        let cond = || flow.conditioning.forward(&window).unwrap();
        let latent = flow.latent.as_ref().unwrap();
        let zero = Tensor::zeros(x.dim(0).unwrap(), x.dtype(), x.device()).unwrap();
        let forward = |_: usize, map: &dyn Bijector, x: &Tensor, cond: &Cond| map.forward(x, cond);
        let (z, _) = flow.steps_forward((&x, zero), latent.encode(&x, &cond()).unwrap().0, forward).unwrap();
        let z = z.transpose(1, 2).unwrap().contiguous().unwrap();
        let off = |a: &Tensor| {
            (a - &x).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        let back = flow.steps_inverse(&z, latent.encode(&x, &cond()).unwrap().0).unwrap();
        assert!(off(&back) < 1e-4, "{}", off(&back));
        // and with another one it doesn't: the latent matters
        let other = flow.steps_inverse(&z, latent.draw(&z, &cond()).unwrap()).unwrap();
        assert!(off(&other) > 1e-2, "{}", off(&other));
    }
}

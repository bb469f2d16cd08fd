//! The whitening front: an exactly invertible autoregressive filter that the mel drives.
//!
//! The mel gives a power spectrum (smooth interpolation, a regression above the last band, and a
//! small net that corrects both), the spectrum its best linear predictor, twice a hop; filtering by
//! it leaves a residual near white noise of unit variance. Relatives: LPCNet (Valin & Skoglund
//! 2019), ExcitGlow, SpecGrad.

use super::config::WhiteningConfig;
use super::filtering::{Filtering, Segment, Solver};
use super::filters::{Bands, Filters, QUANTISATION_POWER, net_row};
use crate::kernels::choice::Kernel;
use crate::kernels::predict::residual;
use crate::kernels::product::{Matrix, Panels};
use crate::mel::stft::{Scratch, Stft};
use crate::mel::{MelConfig, MelSpectrogram};
use crate::net::params::{named_rng, uniform};
use crate::net::wavenet::linear;
use crate::{Error, Result};
use candle_core::{Device, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;

/// The net's log-ratio is clamped here in the fit: one wild bin must not rule it.
const LOG_RATIO_LIMIT: f64 = 12.0;
/// Frames per step of the fit.
const FIT_FRAMES: usize = 512;
/// Ridge of the regression, relative to the number of frames.
const RIDGE: f64 = 1e-3;

/// The whitening front.
pub struct Whiten {
    config: WhiteningConfig,
    mel: MelConfig,
    /// `[n_mels + 1, high bands]`.
    high: Tensor,
    layers: Vec<(Tensor, Tensor)>,
    bands: Bands,
    stft: Stft,
    solver: Solver,
}

impl Whiten {
    /// Asks `vb` for `high` and `layers.N.{weight,bias}`.
    pub fn new(config: &WhiteningConfig, mel: &MelConfig, vb: VarBuilder) -> Result<Self> {
        let stft = Stft::of(mel)?;
        let bands = Bands::new(mel, stft.window());
        let sizes = [config.window() * mel.n_mels, config.hidden, config.hidden, bands.bins()];
        let layer = |i: usize| -> Result<_> {
            let bound = if i == 2 { 0.0 } else { 1.0 / (sizes[i] as f64).sqrt() };
            let uniform = Init::Uniform { lo: -bound, up: bound };
            let vb = vb.pp(format!("layers.{i}"));
            Ok((
                vb.get_with_hints((sizes[i], sizes[i + 1]), "weight", uniform)?,
                vb.get_with_hints(sizes[i + 1], "bias", uniform)?,
            ))
        };
        Ok(Self {
            config: config.clone(),
            mel: mel.clone(),
            high: vb.get_with_hints((mel.n_mels + 1, bands.high_edges.len() - 1), "high", Init::Const(0.0))?,
            layers: (0..3).map(layer).collect::<Result<_>>()?,
            bands,
            stft,
            solver: Solver::new(mel.n_fft, config.order, config.filters_per_hop),
        })
    }

    /// What makes the filters, as fitted so far.
    pub fn filters(&self, kernel: Kernel) -> Result<Filters> {
        let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.to_vec1()?) };
        let pack = |(weight, bias): &(Tensor, Tensor)| -> Result<Panels> {
            let (weight, bias) = (flat(weight)?, flat(bias)?);
            Ok(Panels::new(kernel, bias.len(), &bias, &[Matrix::new(&weight, bias.len())]))
        };
        let layers = self.layers.iter().map(pack).collect::<Result<_>>()?;
        Ok(Filters::new(&self.config, &self.mel, self.bands.clone(), flat(&self.high)?, layers, self.solver.clone()))
    }

    /// `|X|²` of one frame as a power per sample.
    fn periodogram(&self, samples: &[f32], frame: usize, scratch: &mut Scratch) -> Vec<f32> {
        let scale = (1.0 / self.bands.window_power) as f32;
        let mut spectrum = vec![Default::default(); self.bands.bins()];
        self.stft.analyse(samples, frame, scratch, &mut spectrum);
        spectrum.iter().map(|x: &realfft::num_complex::Complex32| x.norm_sqr() * scale).collect()
    }

    fn correction(&self, input: &Tensor) -> candle_core::Result<Tensor> {
        let mut h = input.unsqueeze(0)?;
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            if i > 0 {
                h = candle_nn::ops::silu(&h)?;
            }
            h = linear(&h, weight, bias)?;
        }
        h.squeeze(0)
    }

    fn check_length(&self, samples: usize, mel: &MelSpectrogram) -> Result<()> {
        if mel.n_mels() != self.mel.n_mels {
            return Err(Error::invalid(format!(
                "the mel has {} bands, the whitening expects {}",
                mel.n_mels(),
                self.mel.n_mels
            )));
        }
        let most = mel.frames() * self.mel.hop_length;
        if samples > most {
            return Err(Error::invalid(format!(
                "{samples} samples are more than the mel's {} frames cover ({most})",
                mel.frames()
            )));
        }
        Ok(())
    }

    /// Samples before a segment that its filters reach.
    pub fn order(&self) -> usize {
        self.config.order
    }

    /// Segments of `frames` frames, their sounds as `[batch, memory + samples]` → residuals
    /// `[batch, 1, samples]` and log-determinants `[batch]` that the net's parameters can be trained through,
    /// and what the sounds are made of if they are `moving`.
    ///
    /// # Errors
    /// If a mel has the wrong number of bands, or a segment the wrong number of samples.
    pub fn segments(
        &self,
        segments: &[Segment],
        (sounds, moving): (&Tensor, bool),
        frames: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (samples, device) = (frames * self.mel.hop_length, self.high.device());
        let spectra = self.log_spectra(segments, frames)?;
        let share = self.mel.hop_length / self.config.filters_per_hop;
        let node = Filtering::new(self.solver.clone(), moving, share);
        let both = spectra.apply_op2(&sounds.to_device(&Device::Cpu)?.contiguous()?, node)?.to_device(device)?;
        let log_gain = both.narrow(1, samples, frames * self.config.filters_per_hop)?;
        let residual = both.narrow(1, 0, samples)?.contiguous()?.unsqueeze(1)?;
        Ok((residual, (log_gain.sum(1)? * -(share as f64))?))
    }

    /// The log spectra of segments' frames, each with the frame after its last, which the last filters
    /// lean towards: `[batch, frames + 1, bins]`.
    fn log_spectra(&self, segments: &[Segment], frames: usize) -> Result<Tensor> {
        let (batch, samples, device) = (segments.len(), frames * self.mel.hop_length, self.high.device());
        for segment in segments {
            if segment.mel.n_mels() != self.mel.n_mels || segment.samples.len() < samples {
                return Err(Error::invalid("a segment doesn't fit the whitening"));
            }
        }
        let high: Vec<f32> = self.high.flatten_all()?.to_vec1()?;
        let rows: Vec<[Vec<f32>; 2]> = segments
            .par_iter()
            .map(|segment| {
                let (columns, n) = (segment.mel.transposed(), self.mel.n_mels);
                let frames = (segment.start..=segment.start + frames).map(|f| f.min(segment.mel.frames() - 1));
                let column = |f: usize| &columns.values()[f * n..][..n];
                let row = |f| net_row(&self.config, f, segment.mel.frames(), &column);
                let base = |f| self.bands.spectrum(column(f), &high);
                [frames.clone().flat_map(base).collect(), frames.flat_map(row).collect()]
            })
            .collect();
        let stack = |part: usize, width: usize| {
            let values: Vec<f32> = rows.iter().flat_map(|rows| rows[part].iter().copied()).collect();
            Tensor::from_vec(values, (batch * (frames + 1), width), device)
        };
        let (bins, width) = (self.bands.bins(), self.config.window() * self.mel.n_mels);
        let spectra = (stack(0, bins)? + self.correction(&stack(1, width)?)?)?;
        Ok(spectra.reshape((batch, frames + 1, bins))?.to_device(&Device::Cpu)?)
    }

    /// Samples → residual, and log|∂e/∂x| per sample: `−ln gain`.
    ///
    /// # Errors
    /// If there are more samples than `frames · hop`, or the mel has the wrong number of bands.
    pub fn forward(&self, samples: &[f32], mel: &MelSpectrogram) -> Result<(Vec<f32>, Vec<f32>)> {
        self.check_length(samples.len(), mel)?;
        let filters = self.filters(Kernel::chosen()?)?;
        let (predictors, share) = (filters.of(mel, 0..mel.frames()), filters.share());
        let mut e = vec![0.0; samples.len()];
        let mut log_det = vec![0.0; samples.len()];
        e.par_chunks_mut(share).zip(log_det.par_chunks_mut(share)).zip(&predictors).enumerate().for_each(
            |(i, ((e, log_det), predictor))| {
                residual(predictor, samples, i * share..i * share + e.len(), e);
                log_det.fill(-predictor.gain.ln());
            },
        );
        Ok((e, log_det))
    }

    /// Residual → samples, the inverse of [`Whiten::forward`].
    ///
    /// # Errors
    /// As [`Whiten::forward`].
    pub fn inverse(&self, e: &[f32], mel: &MelSpectrogram) -> Result<Vec<f32>> {
        self.check_length(e.len(), mel)?;
        Ok(self.filters(Kernel::chosen()?)?.inverse(e, mel, 0..mel.frames(), &mut Vec::new()))
    }

    /// Multiply-adds per sample of filtering (the predictors' own cost is per frame and small).
    pub fn macs_per_sample(&self) -> f64 {
        let net: usize = self.layers.iter().map(|(w, _)| w.elem_count()).sum();
        let recursion = self.config.order * self.config.order * self.config.filters_per_hop;
        self.config.order as f64 + (net + recursion) as f64 / self.mel.hop_length as f64
    }

    /// Fits the regression and the net to clips, by Whittle's likelihood of their periodograms.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when `progress` says so.
    pub fn fit(
        &self,
        clips: &[(&[f32], &MelSpectrogram)],
        seed: u64,
        progress: &mut dyn FnMut(usize, usize, f64) -> bool,
    ) -> Result<()> {
        self.fit_high(clips)?;
        let bins = self.bands.bins();
        let high: Vec<f32> = self.high.flatten_all()?.to_vec1()?;
        let columns: Vec<MelSpectrogram> = clips.iter().map(|(_, mel)| mel.transposed()).collect();
        let frames = clips.iter().map(|(samples, mel)| mel.frames().min(self.stft.frames(samples.len())));
        let index: Vec<(usize, usize)> = frames.enumerate().flat_map(|(c, n)| (0..n).map(move |f| (c, f))).collect();
        if index.is_empty() {
            return Err(Error::invalid("there are no clips to fit the whitening to"));
        }
        let (width, n_mels) = (self.config.window() * self.mel.n_mels, self.mel.n_mels);
        let vars: Vec<Var> =
            self.layers.iter().flat_map(|(w, b)| [w, b]).map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        let mut moments: Vec<(Tensor, Tensor)> =
            vars.iter().map(|v| Ok((v.zeros_like()?, v.zeros_like()?))).collect::<candle_core::Result<_>>()?;
        let mut rng = named_rng(seed, "whitening fit");
        let device = self.high.device().clone();
        for step in 0..self.config.fit_steps {
            let picks: Vec<(usize, usize)> = (0..FIT_FRAMES)
                .map(|_| index[((uniform(&mut rng) * index.len() as f32) as usize).min(index.len() - 1)])
                .collect();
            let rows: Vec<[Vec<f32>; 3]> = picks
                .par_iter()
                .map_init(
                    || self.stft.scratch(),
                    |scratch, &(c, f)| {
                        // transposed: its rows are frames
                        let column = |f: usize| &columns[c].values()[f * n_mels..][..n_mels];
                        let power = self.periodogram(clips[c].0, f, scratch);
                        let row = net_row(&self.config, f, columns[c].n_mels(), &column).collect();
                        [self.bands.spectrum(column(f), &high), row, power]
                    },
                )
                .collect();
            let stack = |part: usize, width: usize| {
                let values: Vec<f32> = rows.iter().flat_map(|row| row[part].iter().copied()).collect();
                Tensor::from_vec(values, (FIT_FRAMES, width), &device)
            };
            let log_s = (stack(0, bins)? + self.correction(&stack(1, width)?)?)?;
            let log_p = (stack(2, bins)? + QUANTISATION_POWER)?.log()?;
            let ratio = (log_p - &log_s)?.minimum(LOG_RATIO_LIMIT)?.exp()?;
            let loss = ((log_s + ratio)?.mean_all()? * 0.5)?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            adam_step(&vars, &mut moments, &loss, step, self.config.fit_steps)?;
            if !progress(step + 1, self.config.fit_steps, value) {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }

    /// Ridge regression from the mel to the log-power of the bands above its range.
    fn fit_high(&self, clips: &[(&[f32], &MelSpectrogram)]) -> Result<()> {
        let edges = &self.bands.high_edges;
        let (n, n_high, bins) = (self.mel.n_mels + 1, edges.len() - 1, self.bands.bins());
        let mut gram = vec![0.0_f64; n * n];
        let mut target = vec![0.0_f64; n * n_high];
        let mut count = 0;
        let mut scratch = self.stft.scratch();
        for (samples, mel) in clips {
            let columns = mel.transposed();
            let frames = mel.frames().min(self.stft.frames(samples.len()));
            for (f, column) in columns.values().chunks_exact(mel.n_mels()).take(frames).enumerate() {
                let power = self.periodogram(samples, f, &mut scratch);
                let row: Vec<f64> = column.iter().map(|&v| f64::from(v)).chain([1.0]).collect();
                let high: Vec<f64> = edges
                    .windows(2)
                    .map(|edge| {
                        let band = &power[edge[0]..edge[1].min(bins)];
                        (band.iter().map(|&p| f64::from(p)).sum::<f64>() / band.len().max(1) as f64
                            + QUANTISATION_POWER)
                            .ln()
                    })
                    .collect();
                for i in 0..n {
                    for j in 0..n {
                        gram[i * n + j] += row[i] * row[j];
                    }
                    for j in 0..n_high {
                        target[i * n_high + j] += row[i] * high[j];
                    }
                }
                count += 1;
            }
        }
        for i in 0..n {
            gram[i * n + i] += RIDGE * f64::from(count);
        }
        let Some((inverse, _)) = super::mix::invert(&gram, n) else {
            return Err(Error::invalid("whitening: the regression for the band above the mel has no solution"));
        };
        let solution: Vec<f32> = (0..n * n_high)
            .map(|at| {
                (0..n).map(|k| inverse[at / n_high * n + k] * target[k * n_high + at % n_high]).sum::<f64>() as f32
            })
            .collect();
        Var::from_tensor(&self.high)?
            .set(&Tensor::from_vec(solution, (n, n_high), &Device::Cpu)?.to_device(self.high.device())?)?;
        Ok(())
    }
}

/// One step of Adam (β .9, .999) with a cosine from 2e-3 and gradients clipped to norm 1.
fn adam_step(
    vars: &[Var],
    moments: &mut [(Tensor, Tensor)],
    loss: &Tensor,
    step: usize,
    steps: usize,
) -> candle_core::Result<()> {
    let grads = loss.backward()?;
    let mut square = 0.0;
    for var in vars {
        if let Some(g) = grads.get(var) {
            square += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let clip = 1.0 / square.sqrt().max(1.0);
    let rate = 1e-3 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
    let t = step as i32 + 1;
    for (var, (m, v)) in vars.iter().zip(moments) {
        let Some(g) = grads.get(var) else { continue };
        // detached: a gradient remembers the graph it came from, and the moments outlive it
        let g = (g.detach() * clip)?;
        *m = ((&*m * 0.9)? + (&g * 0.1)?)?;
        *v = ((&*v * 0.999)? + (g.sqr()? * 0.001)?)?;
        let scale = ((&*v / (1.0 - 0.999_f64.powi(t)))?.sqrt()? + 1e-8)?;
        let delta = (((&*m / (1.0 - 0.9_f64.powi(t)))? / scale)? * rate)?;
        var.set(&(var.as_tensor() - delta)?)?;
    }
    Ok(())
}

//! From log spectra to predictors, and whitening with them as one node of candle's graph.

use crate::kernels::predict::{
    Predictor, levinson, levinson_backward, residual, residual_backward, residual_backward_sound,
};
use crate::mel::MelSpectrogram;
use crate::net::wavenet::values;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use realfft::num_complex::Complex64;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::{Arc, Mutex};

/// Log spectra are clamped to ± this: f64 holds their exponentials and what is made of them.
const LOG_LIMIT: f32 = 60.0;

/// A stretch of a clip.
pub struct Segment<'a> {
    /// The clip's mel.
    pub mel: &'a MelSpectrogram,
    /// The first frame.
    pub start: usize,
    /// The samples of its frames, and before them those of the clip that the filters reach.
    pub samples: Vec<f32>,
}

/// Makes filters of the log spectra of two neighbouring frames.
#[derive(Clone)]
pub struct Solver {
    n_fft: usize,
    order: usize,
    per_hop: usize,
    inverse: Arc<dyn ComplexToReal<f64>>,
    forward: Arc<dyn RealToComplex<f64>>,
}

/// Buffers of the Fourier transforms.
pub struct Scratch {
    spectrum: Vec<Complex64>,
    lags: Vec<f64>,
}

/// A filter, and what its gradient needs.
pub struct Filter {
    autocorrelation: Vec<f64>,
    a: Vec<f64>,
    error: f64,
}

impl Filter {
    /// For filtering, in f32.
    pub fn predictor(&self) -> Predictor {
        Predictor::new(&self.a, self.error)
    }
}

impl Solver {
    /// Solver of `order` from spectra of `n_fft / 2 + 1` bins, `per_hop` a frame.
    pub fn new(n_fft: usize, order: usize, per_hop: usize) -> Self {
        let mut planner = RealFftPlanner::new();
        let (inverse, forward) = (planner.plan_fft_inverse(n_fft), planner.plan_fft_forward(n_fft));
        Self { n_fft, order, per_hop, inverse, forward }
    }

    /// Buffers.
    pub fn scratch(&self) -> Scratch {
        Scratch { spectrum: self.inverse.make_input_vec(), lags: self.inverse.make_output_vec() }
    }

    /// Where the `index`-th filter of a hop stands between this frame and the next.
    fn share(&self, index: usize) -> f32 {
        (index as f32 + 0.5) / self.per_hop as f32
    }

    /// The `index`-th filter of the hop between the frames with log spectra `now` and `next`.
    pub fn solve(&self, now: &[f32], next: &[f32], index: usize, scratch: &mut Scratch) -> Filter {
        let share = self.share(index);
        for ((s, a), b) in scratch.spectrum.iter_mut().zip(now).zip(next) {
            *s = f64::from((a + share * (b - a)).clamp(-LOG_LIMIT, LOG_LIMIT)).exp().into();
        }
        self.inverse.process(&mut scratch.spectrum, &mut scratch.lags).expect("buffers have the plan's lengths");
        let scale = 1.0 / self.n_fft as f64;
        let autocorrelation: Vec<f64> = scratch.lags[..=self.order].iter().map(|v| v * scale).collect();
        let (a, error) = levinson(&autocorrelation);
        Filter { autocorrelation, a, error }
    }

    /// The gradient of [`Solver::solve`] in the log spectrum between the two, from those of the
    /// coefficients and of the error's power.
    fn solve_backward(
        &self,
        (now, next, index): (&[f32], &[f32], usize),
        filter: &Filter,
        (d_a, d_error): (&[f64], f64),
        scratch: &mut Scratch,
    ) -> Vec<f64> {
        let share = self.share(index);
        let d_lags = levinson_backward(&filter.autocorrelation, &filter.a, d_a, d_error);
        scratch.lags.fill(0.0);
        scratch.lags[..=self.order].copy_from_slice(&d_lags);
        self.forward.process(&mut scratch.lags, &mut scratch.spectrum).expect("buffers have the plan's lengths");
        let last = self.n_fft / 2;
        let bins = now.iter().zip(next).zip(&scratch.spectrum).enumerate();
        bins.map(|(k, ((a, b), g))| {
            let log = a + share * (b - a);
            if log.abs() > LOG_LIMIT {
                return 0.0;
            }
            // a bin between the ends stands for two of the whole spectrum
            let twice = if k == 0 || k == last { 1.0 } else { 2.0 };
            f64::from(log).exp() * twice * g.re / self.n_fft as f64
        })
        .collect()
    }
}

/// Log spectra `[batch, frames + 1, bins]` and sounds `[batch, memory + samples]`, of which the memory is
/// only reached by the filters → `[batch, samples + filters]`: the residuals, then the logarithm of each
/// filter's gain. In f64 but for the filtering itself.
pub struct Filtering {
    solver: Solver,
    /// Whether the sounds want a gradient too.
    moving: bool,
    /// Samples per filter.
    share: usize,
    saved: Mutex<Vec<Filter>>,
}

impl Filtering {
    /// With a gradient of the sounds, or without; `share` samples per filter.
    pub fn new(solver: Solver, moving: bool, share: usize) -> Self {
        Self { solver, moving, share, saved: Mutex::new(Vec::new()) }
    }

    /// The log spectra that filter `i` of all stands between, and its number within the hop.
    fn place<'a>(&self, spectra: &'a [f32], i: usize, frames: usize) -> (&'a [f32], &'a [f32], usize) {
        let (bins, per_hop) = (self.solver.n_fft / 2 + 1, self.solver.per_hop);
        let row = i / (frames * per_hop) * (frames + 1) + i % (frames * per_hop) / per_hop;
        let (now, next) = spectra[row * bins..][..2 * bins].split_at(bins);
        (now, next, i % per_hop)
    }

    /// Where the samples of filter `i` are in its sound of `length` samples.
    fn stretch(&self, i: usize, per_item: usize, length: usize) -> std::ops::Range<usize> {
        let from = length - (per_item - i % per_item) * self.share;
        from..from + self.share
    }
}

impl CustomOp2 for Filtering {
    fn name(&self) -> &'static str {
        "whitening"
    }

    fn cpu_fwd(
        &self,
        spectra: &CpuStorage,
        layout: &Layout,
        sounds: &CpuStorage,
        sounds_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, rows, _) = layout.shape().dims3()?;
        let (spectra, frames) = (values(spectra, layout)?, rows - 1);
        let (sounds, length) = (values(sounds, sounds_layout)?, sounds_layout.dims()[1]);
        let per_item = frames * self.solver.per_hop;
        let solved: Vec<(Filter, Vec<f32>, f32)> = (0..batch * per_item)
            .into_par_iter()
            .map_init(
                || self.solver.scratch(),
                |scratch, i| {
                    let (now, next, index) = self.place(spectra, i, frames);
                    let filter = self.solver.solve(now, next, index, scratch);
                    let predictor = filter.predictor();
                    let (sound, range) =
                        (&sounds[i / per_item * length..][..length], self.stretch(i, per_item, length));
                    let mut e = vec![0.0; self.share];
                    residual(&predictor, sound, range, &mut e);
                    Ok((filter, e, predictor.gain.ln()))
                },
            )
            .collect::<Result<_>>()?;
        let mut out = Vec::with_capacity(batch * per_item * (self.share + 1));
        for item in solved.chunks(per_item) {
            item.iter().for_each(|(_, e, _)| out.extend_from_slice(e));
            out.extend(item.iter().map(|(_, _, log_gain)| log_gain));
        }
        if let Ok(mut saved) = self.saved.lock() {
            *saved = solved.into_iter().map(|(filter, _, _)| filter).collect();
        }
        Ok((CpuStorage::F32(out), (batch, per_item * (self.share + 1)).into()))
    }

    fn bwd(
        &self,
        spectra: &Tensor,
        sounds: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (batch, rows, bins) = spectra.dims3()?;
        let length = sounds.dim(1)?;
        let frames = rows - 1;
        let (per_hop, per_item) = (self.solver.per_hop, frames * self.solver.per_hop);
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let (spectra_values, sound_values, out, d_out) = (flat(spectra)?, flat(sounds)?, flat(out)?, flat(d_out)?);
        let Ok(saved) = self.saved.lock() else { candle_core::bail!("whitening: the forward pass failed") };
        let gradients: Vec<Vec<f64>> = saved
            .par_iter()
            .enumerate()
            .map_init(
                || self.solver.scratch(),
                |scratch, (i, filter)| {
                    let item = i / per_item * per_item * (self.share + 1);
                    let at = item + i % per_item * self.share;
                    let (e, d_e) = (&out[at..][..self.share], &d_out[at..][..self.share]);
                    let d_log_gain = f64::from(d_out[item + per_item * self.share + i % per_item]);
                    let sound = &sound_values[i / per_item * length..][..length];
                    let range = self.stretch(i, per_item, length);
                    let d_a = residual_backward(&filter.predictor(), sound, range, d_e);
                    // e ∝ 1/gain and gain² = error
                    let met: f64 = e.iter().zip(d_e).map(|(&e, &d)| f64::from(e) * f64::from(d)).sum();
                    let d_error = (d_log_gain - met) / (2.0 * filter.error);
                    let place = self.place(&spectra_values, i, frames);
                    self.solver.solve_backward(place, filter, (&d_a, d_error), scratch)
                },
            )
            .collect();
        let mut sums = vec![0.0; spectra_values.len()];
        for (i, gradient) in gradients.iter().enumerate() {
            let row = i / per_item * rows + i % per_item / per_hop;
            let share = f64::from(self.solver.share(i % per_hop));
            let (now, next) = sums[row * bins..][..2 * bins].split_at_mut(bins);
            for ((now, next), g) in now.iter_mut().zip(next).zip(gradient) {
                *now += (1.0 - share) * g;
                *next += share * g;
            }
        }
        let sums: Vec<f32> = sums.into_iter().map(|g: f64| g as f32).collect();
        let d_spectra = Tensor::from_vec(sums, (batch, rows, bins), spectra.device())?;
        if !self.moving {
            return Ok((Some(d_spectra), None));
        }
        let mut d_sounds = vec![0.0; batch * length];
        for (i, filter) in saved.iter().enumerate() {
            let item = i / per_item * per_item * (self.share + 1);
            let d_e = &d_out[item + i % per_item * self.share..][..self.share];
            let d_sound = &mut d_sounds[i / per_item * length..][..length];
            residual_backward_sound(&filter.predictor(), d_sound, self.stretch(i, per_item, length), d_e);
        }
        Ok((Some(d_spectra), Some(Tensor::from_vec(d_sounds, (batch, length), sounds.device())?)))
    }
}

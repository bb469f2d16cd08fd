//! From log spectra to predictors, and whitening with them as one node of candle's graph.

use crate::kernels::predict::{
    ABREAST, Lanes, Predictor, levinson, levinson_backward, residual, residual_backward, residual_backward_sound,
};
use crate::mel::MelSpectrogram;
use crate::net::node::values;
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

/// The log spectra that a filter stands between, and its number within the hop.
pub type Place<'a> = (&'a [f32], &'a [f32], usize);

/// Up to [`ABREAST`] filters, and what their gradients need.
pub struct Solved {
    autocorrelation: Vec<Lanes>,
    a: Vec<Lanes>,
    error: Lanes,
}

impl Solved {
    /// The filter of one lane, in f32.
    pub fn predictor(&self, lane: usize) -> Predictor {
        Predictor::new(self.a.iter().map(|a| a[lane]), self.error[lane])
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

    /// The filters of some places, [`ABREAST`] at most; the lanes that are left over filter nothing.
    pub fn solve(&self, places: &[Place], scratch: &mut Scratch) -> Solved {
        let mut autocorrelation = vec![Lanes::default(); self.order + 1];
        autocorrelation[0] = [1.0; ABREAST];
        let scale = 1.0 / self.n_fft as f64;
        for (lane, &(now, next, index)) in places.iter().enumerate() {
            let share = self.share(index);
            for ((s, a), b) in scratch.spectrum.iter_mut().zip(now).zip(next) {
                *s = f64::from((a + share * (b - a)).clamp(-LOG_LIMIT, LOG_LIMIT)).exp().into();
            }
            self.inverse.process(&mut scratch.spectrum, &mut scratch.lags).expect("buffers have the plan's lengths");
            autocorrelation.iter_mut().zip(&scratch.lags).for_each(|(r, lag)| r[lane] = lag * scale);
        }
        let (a, error) = levinson(&autocorrelation);
        Solved { autocorrelation, a, error }
    }

    /// The gradients of [`Solver::solve`] in the log spectra that the filters stand between, from those of the
    /// coefficients and of the errors' powers.
    fn solve_backward(
        &self,
        places: &[Place],
        solved: &Solved,
        (d_a, d_error): (&[Lanes], Lanes),
        scratch: &mut Scratch,
    ) -> Vec<Vec<f64>> {
        let d_lags = levinson_backward(&solved.autocorrelation, &solved.a, d_a, d_error);
        let last = self.n_fft / 2;
        let gradient = |(lane, &(now, next, index)): (usize, &Place)| -> Vec<f64> {
            let share = self.share(index);
            scratch.lags.fill(0.0);
            scratch.lags.iter_mut().zip(&d_lags).for_each(|(lag, d)| *lag = d[lane]);
            self.forward.process(&mut scratch.lags, &mut scratch.spectrum).expect("buffers have the plan's lengths");
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
        };
        places.iter().enumerate().map(gradient).collect()
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
    saved: Mutex<Vec<Solved>>,
}

impl Filtering {
    /// With a gradient of the sounds, or without; `share` samples per filter.
    pub fn new(solver: Solver, moving: bool, share: usize) -> Self {
        Self { solver, moving, share, saved: Mutex::new(Vec::new()) }
    }

    /// Where filter `i` of all stands.
    fn place<'a>(&self, spectra: &'a [f32], i: usize, frames: usize) -> Place<'a> {
        let (bins, per_hop) = (self.solver.n_fft / 2 + 1, self.solver.per_hop);
        let row = i / (frames * per_hop) * (frames + 1) + i % (frames * per_hop) / per_hop;
        let (now, next) = spectra[row * bins..][..2 * bins].split_at(bins);
        (now, next, i % per_hop)
    }

    /// The filters, those that are solved together together.
    fn together(&self, count: usize) -> impl IndexedParallelIterator<Item = std::ops::Range<usize>> {
        (0..count.div_ceil(ABREAST)).into_par_iter().map(move |i| i * ABREAST..count.min((i + 1) * ABREAST))
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
        let (solved, residuals): (Vec<_>, Vec<_>) = self
            .together(batch * per_item)
            .map_init(
                || self.solver.scratch(),
                |scratch, filters| {
                    let places: Vec<_> = filters.clone().map(|i| self.place(spectra, i, frames)).collect();
                    let solved = self.solver.solve(&places, scratch);
                    let residuals = filters.enumerate().map(|(lane, i)| {
                        let predictor = solved.predictor(lane);
                        let (sound, range) =
                            (&sounds[i / per_item * length..][..length], self.stretch(i, per_item, length));
                        let mut e = vec![0.0; self.share];
                        residual(&predictor, sound, range, &mut e);
                        (e, predictor.gain.ln())
                    });
                    let residuals: Vec<_> = residuals.collect();
                    (solved, residuals)
                },
            )
            .unzip();
        let residuals = residuals.concat();
        let mut out = Vec::with_capacity(batch * per_item * (self.share + 1));
        for item in residuals.chunks(per_item) {
            item.iter().for_each(|(e, _)| out.extend_from_slice(e));
            out.extend(item.iter().map(|(_, log_gain)| log_gain));
        }
        if let Ok(mut saved) = self.saved.lock() {
            *saved = solved;
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
        let gradients: Vec<Vec<Vec<f64>>> = self
            .together(batch * per_item)
            .zip(saved.par_iter())
            .map_init(
                || self.solver.scratch(),
                |scratch, (filters, solved)| {
                    let places: Vec<_> = filters.clone().map(|i| self.place(&spectra_values, i, frames)).collect();
                    let (mut d_a, mut d_error) = (vec![Lanes::default(); solved.a.len()], Lanes::default());
                    for (lane, i) in filters.enumerate() {
                        let item = i / per_item * per_item * (self.share + 1);
                        let at = item + i % per_item * self.share;
                        let (e, d_e) = (&out[at..][..self.share], &d_out[at..][..self.share]);
                        let d_log_gain = f64::from(d_out[item + per_item * self.share + i % per_item]);
                        let sound = &sound_values[i / per_item * length..][..length];
                        let range = self.stretch(i, per_item, length);
                        let of_lane = residual_backward(&solved.predictor(lane), sound, range, d_e);
                        d_a.iter_mut().zip(of_lane).for_each(|(d_a, d)| d_a[lane] = d);
                        // e ∝ 1/gain and gain² = error
                        let met: f64 = e.iter().zip(d_e).map(|(&e, &d)| f64::from(e) * f64::from(d)).sum();
                        d_error[lane] = (d_log_gain - met) / (2.0 * solved.error[lane]);
                    }
                    self.solver.solve_backward(&places, solved, (&d_a, d_error), scratch)
                },
            )
            .collect();
        let mut sums = vec![0.0; spectra_values.len()];
        for (i, gradient) in gradients.iter().flatten().enumerate() {
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
        for i in 0..batch * per_item {
            let predictor = saved[i / ABREAST].predictor(i % ABREAST);
            let item = i / per_item * per_item * (self.share + 1);
            let d_e = &d_out[item + i % per_item * self.share..][..self.share];
            let d_sound = &mut d_sounds[i / per_item * length..][..length];
            residual_backward_sound(&predictor, d_sound, self.stretch(i, per_item, length), d_e);
        }
        Ok((Some(d_spectra), Some(Tensor::from_vec(d_sounds, (batch, length), sounds.device())?)))
    }
}

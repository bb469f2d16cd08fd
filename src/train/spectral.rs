//! The distance between two sounds' short-time spectra, at several resolutions.

use crate::Result;
use crate::net::wavenet::values;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use rayon::prelude::*;
use realfft::num_complex::Complex32;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::{Arc, Mutex};

/// Samples of each transform; hops are a quarter of that.
const SIZES: [usize; 3] = [512, 1024, 2048];
/// Added to powers: a magnitude of 1e-4, well under one 16-bit step over the shortest window.
const FLOOR: f32 = 1e-8;

/// One resolution.
struct Resolution {
    window: Vec<f32>,
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
}

/// Multi-resolution STFT distance to recordings: the mean over resolutions and segments of the
/// spectral convergence and the mean absolute difference of log magnitudes.
///
/// Yamamoto et al. 2020, "Parallel WaveGAN", §3.2; there with transforms of 512, 1024 and 2048 and
/// hops of 50, 120 and 240, here with hops of a quarter. Windows that don't fit in a segment are left
/// out.
pub struct Spectral {
    resolutions: Vec<Resolution>,
}

impl Spectral {
    /// For segments of `samples` samples.
    pub fn new(samples: usize) -> Self {
        let mut planner = RealFftPlanner::new();
        let resolutions = SIZES
            .into_iter()
            .filter(|&size| size <= samples)
            .map(|size| {
                let turn = 2.0 * std::f32::consts::PI / size as f32;
                Resolution {
                    window: (0..size).map(|i| 0.5 - 0.5 * (turn * i as f32).cos()).collect(),
                    forward: planner.plan_fft_forward(size),
                    inverse: planner.plan_fft_inverse(size),
                }
            })
            .collect();
        Self { resolutions }
    }

    /// The distance of `sounds` `[batch, 1, samples]` to `targets`, the same number of samples each; a
    /// scalar through which gradients reach the sounds.
    ///
    /// # Errors
    /// If the tensor isn't on the CPU or not in f32.
    pub fn distance(self: &Arc<Self>, sounds: &Tensor, targets: Vec<Vec<f32>>) -> Result<Tensor> {
        let node = Distance { spectral: self.clone(), targets, gradient: Mutex::new(Vec::new()) };
        Ok(sounds.contiguous()?.apply_op1(node)?)
    }

    /// The distance of one sound, and its gradient.
    fn compare(&self, sound: &[f32], target: &[f32]) -> (f64, Vec<f32>) {
        let mut gradient = vec![0.0; sound.len()];
        let share = 1.0 / self.resolutions.len() as f64;
        let sum: f64 = self.resolutions.iter().map(|r| r.compare(sound, target, share as f32, &mut gradient)).sum();
        (sum * share, gradient)
    }
}

impl Resolution {
    /// The spectra of all frames that fit.
    fn analyse(&self, sound: &[f32]) -> Vec<Vec<Complex32>> {
        let size = self.window.len();
        let mut frame = self.forward.make_input_vec();
        let windows = sound.windows(size).step_by(size / 4);
        windows
            .map(|samples| {
                frame.iter_mut().zip(samples).zip(&self.window).for_each(|((f, s), w)| *f = s * w);
                let mut bins = self.forward.make_output_vec();
                self.forward.process(&mut frame, &mut bins).expect("buffers have the plan's lengths");
                bins
            })
            .collect()
    }

    /// The distance at this resolution; adds `share` times its gradient.
    fn compare(&self, sound: &[f32], target: &[f32], share: f32, gradient: &mut [f32]) -> f64 {
        let magnitude = |x: &Complex32| (x.norm_sqr() + FLOOR).sqrt();
        let (mut ours, theirs) = (self.analyse(sound), self.analyse(target));
        let (mut error, mut power, mut log) = (0.0_f64, 0.0_f64, 0.0_f64);
        for (x, y) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            let (m, t) = (magnitude(x), magnitude(y));
            error += f64::from((m - t) * (m - t));
            power += f64::from(t * t);
            log += f64::from((m / t).ln().abs());
        }
        let count = (ours.len() * self.window.len().div_ceil(2)) as f64;
        let (error, power) = (error.sqrt().max(1e-9), power.sqrt());
        let (convergence, per_log) = (share / (error * power) as f32, share / count as f32);
        let size = self.window.len();
        let mut time = self.inverse.make_output_vec();
        for (i, (x, y)) in ours.iter_mut().zip(&theirs).enumerate() {
            let last = x.len() - 1;
            for (k, (x, y)) in x.iter_mut().zip(y).enumerate() {
                let (m, t) = (magnitude(x), magnitude(y));
                let d = (m - t) * convergence + per_log * (m / t).ln().signum() / m;
                // the inverse transform counts a bin between the ends twice
                *x *= d / m * if k == 0 || k == last { 1.0 } else { 0.5 };
            }
            (x[0].im, x[last].im) = (0.0, 0.0);
            self.inverse.process(x, &mut time).expect("buffers have the plan's lengths");
            let out = gradient[i * (size / 4)..].iter_mut();
            out.zip(&time).zip(&self.window).for_each(|((g, t), w)| *g += t * w);
        }
        error / power + log / count
    }
}

/// The distance as a node of the graph.
struct Distance {
    spectral: Arc<Spectral>,
    targets: Vec<Vec<f32>>,
    gradient: Mutex<Vec<f32>>,
}

impl CustomOp1 for Distance {
    fn name(&self) -> &'static str {
        "spectral-distance"
    }

    fn cpu_fwd(&self, sounds: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let samples = layout.dims()[layout.dims().len() - 1];
        let compared: Vec<(f64, Vec<f32>)> = values(sounds, layout)?
            .par_chunks(samples)
            .zip(&self.targets)
            .map(|(sound, target)| self.spectral.compare(sound, target))
            .collect();
        let mean = compared.iter().map(|(distance, _)| distance).sum::<f64>() / compared.len() as f64;
        if let Ok(mut gradient) = self.gradient.lock() {
            let share = 1.0 / compared.len() as f32;
            *gradient = compared.into_iter().flat_map(|(_, gradient)| gradient).map(|g| g * share).collect();
        }
        Ok((CpuStorage::F32(vec![mean as f32]), ().into()))
    }

    fn bwd(&self, sounds: &Tensor, _: &Tensor, d: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Ok(gradient) = self.gradient.lock() else {
            candle_core::bail!("spectral distance: the forward pass failed")
        };
        let gradient = Tensor::from_vec(gradient.clone(), sounds.shape(), sounds.device())?;
        Ok(Some(gradient.affine(f64::from(d.to_scalar::<f32>()?), 0.0)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::{named_rng, normal};

    fn noise(name: &str, samples: usize) -> Vec<f32> {
        let mut rng = named_rng(1, name);
        (0..samples).map(|_| 0.1 * normal(&mut rng)).collect()
    }

    #[test]
    fn a_sound_is_at_no_distance_from_itself_and_half_of_it_is() {
        let spectral = Spectral::new(4096);
        let x = noise("a", 4096);
        assert!(spectral.compare(&x, &x).0 < 1e-6);
        let half: Vec<f32> = x.iter().map(|v| v * 0.5).collect();
        // magnitudes halved: convergence ½, logarithms ln 2 away
        let expected = 0.5 + std::f64::consts::LN_2;
        assert!((spectral.compare(&half, &x).0 - expected).abs() < 1e-2);
    }

    #[test]
    fn its_gradient_is_that_of_finite_differences() {
        for samples in [600, 2048, 3000] {
            let spectral = Spectral::new(samples);
            let (x, y, direction) = (noise("a", samples), noise("b", samples), noise("c", samples));
            let stated: f64 = spectral.compare(&x, &y).1.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let at = |h: f32| {
                let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + h * d).collect();
                spectral.compare(&moved, &y).0
            };
            let numerical = (at(1e-3) - at(-1e-3)) / 2e-3;
            assert!((numerical - stated).abs() < 0.02 * numerical.abs() + 1e-3, "{samples}: {stated}, {numerical}");
        }
    }
}

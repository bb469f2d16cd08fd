//! Invertible residual step.

use super::{Bijector, Cond, Likelihood};
use crate::net::lipschitz::{LipschitzNet, Tangent};
use crate::net::params::named_rng;
use candle_core::{Result, Tensor};
use rand_chacha::rand_core::Rng;

/// Rounds of the inverse's fixed point at most: with a coefficient of 0.98 a distance shrinks to 2 %.
const ROUNDS: usize = 200;
/// Where the fixed point may stop: the last change, relative to the largest value above 1.
const TOLERANCE: f32 = 3e-6;

/// Residual step: `z = x + g(x, mel)` with a net `g` that shrinks every distance.
///
/// log_det = Σₖ (−1)ᵏ⁺¹ tr(Jᵏ) / k, `terms` of the series, each trace by `probes` random signs
/// (Hutchinson): an estimate. The signs are a function of the data, so the same sound has the same
/// figure. Where `probes` are as many as values the unit vectors take their place, and the traces are
/// exact. The gradient is that of the same series, through one product (Chen et al. 2019, §3.2).
/// The inverse is the fixed point of `x ← z − g(x)`. Behrmann et al. 2019.
pub struct Residual {
    net: LipschitzNet,
    terms: usize,
    probes: usize,
}

impl Residual {
    /// A step around `net`.
    pub fn new(net: LipschitzNet, terms: usize, probes: usize) -> Self {
        Self { net, terms, probes }
    }

    /// Multiply-adds per step in the inverse's usual thirty rounds, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        let (per_step, per_row) = self.net.macs();
        (30 * per_step, per_row)
    }

    /// Probes `[probes · batch, steps, channels]`, how many there are, and the weight of each.
    fn probes(&self, x: &Tensor) -> Result<(Tensor, usize, f64)> {
        let (batch, steps, channels) = x.dims3()?;
        let n = steps * channels;
        let exact = self.probes >= n;
        let count = if exact { n } else { self.probes };
        let values = if exact {
            (0..n).flat_map(|i| (0..batch * n).map(move |j| f32::from(u8::from(j % n == i)))).collect()
        } else {
            let bits: Vec<u8> =
                x.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
            let hash =
                bits.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
            let mut rng = named_rng(hash, "probes");
            let mut word = 0;
            let sign = |i: usize| {
                if i.is_multiple_of(32) {
                    word = rng.next_u32();
                }
                if word >> (i % 32) & 1 == 1 { 1.0 } else { -1.0 }
            };
            (0..count * batch * n).map(sign).collect::<Vec<f32>>()
        };
        let probes = Tensor::from_vec(values, (count * batch, steps, channels), x.device())?;
        Ok((probes, count, if exact { 1.0 } else { 1.0 / count as f64 }))
    }

    /// By step, `[batch, steps]`: each has its own part of the trace.
    fn log_det(&self, x: &Tensor, tangent: &Tangent) -> Result<Tensor> {
        let (v, count, weight) = self.probes(x)?;
        let (batch, steps, _) = x.dims3()?;
        let trace = |w: &Tensor| (&v * w)?.sum(2)?.reshape((count, batch, steps))?.sum(0)? * weight;
        let fixed = tangent.detached();
        // the power Jᵏ v, and Σ (−J)ᵏ v: the inverse of 1 + J in the gradient tr((1 + J)⁻¹ dJ)
        let (mut power, mut inverse) = (v.clone(), v.zeros_like()?);
        let mut value = Tensor::zeros((batch, steps), x.dtype(), x.device())?;
        for k in 1..=self.terms {
            let sign = if k.is_multiple_of(2) { -1.0 } else { 1.0 };
            inverse = (inverse + (&power * sign)?)?;
            power = fixed.product(&power)?;
            value = (value + (trace(&power)? * (sign / k as f64))?)?;
        }
        let carrier = trace(&tangent.product(&inverse.detach())?)?;
        (&carrier - carrier.detach())? + value
    }
}

impl Bijector for Residual {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_det) = self.forward_by_step(x, cond)?;
        Ok((z, log_det.sum(1)?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let x = x.contiguous()?;
        let (g, tangent) = self.net.prepare(&cond.rows, cond.up, x.dim(1)?)?.with_tangent(&x)?;
        Ok(((&x + g)?, self.log_det(&x, &tangent)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let z = z.contiguous()?;
        let net = self.net.prepare(&cond.rows, cond.up, z.dim(1)?)?;
        // NaN if one is
        let larger = |m: f32, x: f32| if x > m || x.is_nan() { x } else { m };
        let largest = |x: &Tensor| -> Result<f32> {
            Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::abs).fold(0.0, larger))
        };
        let tolerance = TOLERANCE * largest(&z)?.max(1.0);
        let (mut x, mut change) = (z.clone(), f32::INFINITY);
        for _ in 0..ROUNDS {
            let next = (&z - net.value(&x)?)?.detach();
            change = largest(&(&next - &x)?)?;
            x = next;
            // a NaN is no convergence either
            if change <= tolerance {
                return Ok(x);
            }
        }
        candle_core::bail!("the fixed point is not reached in {ROUNDS} rounds: the last one still moved by {change:e}")
    }

    fn likelihood(&self) -> Likelihood {
        Likelihood::Estimate
    }
}

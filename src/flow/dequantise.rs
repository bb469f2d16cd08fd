//! Variational dequantisation: a small flow for the noise below one 16-bit step.

use super::config::{DequantisationConfig, MapConfig};
use super::coupling::Coupling;
use super::logistic::log_sigmoid;
use super::split::Parts;
use super::{Cond, Level};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// 16-bit steps in a unit of amplitude.
const SCALE: f64 = 32_768.0;
/// Uniform noise is kept so far from 0 and 1, for its logit's sake.
const MARGIN: f64 = 1e-6;
/// Bound of the couplings' log-scales.
const BOUND: f64 = 2.0;

/// Where each sample lies within its 16-bit step, drawn given the sound and the mel: uniform noise `v`
/// through affine couplings of its logit, `u = σ(f(logit v; x, mel))`.
///
/// With log|∂u/∂v| = −log q(u|x) added to the flow's log-likelihood of the noisy sound, the mean over `v`
/// is a lower bound of that of the 16-bit samples. The couplings start as the identity: uniform noise.
/// Ho et al. 2019, §3.1.
pub struct Dequantise {
    /// They move the second and the first half of a group's noise in turn.
    couplings: Vec<Coupling>,
    group: usize,
}

impl Dequantise {
    /// Asks `vb` for the tensors of each coupling, `N`.
    pub fn new(config: &DequantisationConfig, group: usize, level: &Level, vb: VarBuilder) -> Result<Self> {
        let coupling = |i: usize| {
            let moved = if i.is_multiple_of(2) { group - group / 2 } else { group / 2 };
            let parts = Parts::Blocks { known: 2 * group - moved, moved, known_first: true };
            level.coupling(parts, &config.net, (&MapConfig::Affine, Some(BOUND)), vb.pp(i))
        };
        Ok(Self { couplings: (0..config.couplings).map(coupling).collect::<Result<_>>()?, group })
    }

    /// Samples with uniform noise of one 16-bit step, `[batch, samples]` → the same with noise drawn anew,
    /// and log|∂u/∂v| of each sample, nats.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, samples) = x.dims2()?;
        let x = ((x.detach() * SCALE)? + 0.5)?.reshape((batch, samples / self.group, self.group))?;
        let whole = x.floor()?;
        let v = (x - &whole)?.clamp(MARGIN, 1.0 - MARGIN)?;
        let start = (v.log()? - v.affine(-1.0, 1.0)?.log()?)?;
        // nearly the logarithm of what is loud, so that the net sees how much a step matters
        let loud = (whole.abs()? + (whole.sqr()? + 1.0)?.sqrt()?)?.log()?;
        let sound = ((whole.sign()? * loud)? * 0.2)?;
        let first = self.group / 2;
        let (mut a, mut b) = (start.narrow(2, 0, first)?, start.narrow(2, first, self.group - first)?);
        let (mut log_a, mut log_b) = (a.zeros_like()?, b.zeros_like()?);
        for (i, coupling) in self.couplings.iter().enumerate() {
            let (still, moves, log) =
                if i.is_multiple_of(2) { (&a, &mut b, &mut log_b) } else { (&b, &mut a, &mut log_a) };
            let (moved, log_slope) = coupling.transform(&Tensor::cat(&[&sound, still], 2)?, moves, cond)?;
            *moves = moved;
            *log = (&*log + log_slope)?;
        }
        let end = Tensor::cat(&[a, b], 2)?;
        let log_slope = |t: &Tensor| log_sigmoid(t)? + log_sigmoid(&t.neg()?)?;
        let log_det = ((Tensor::cat(&[log_a, log_b], 2)? + log_slope(&end)?)? - log_slope(&start)?)?;
        let noisy = ((whole + candle_nn::ops::sigmoid(&end)?)? - 0.5)?;
        Ok(((noisy / SCALE)?.reshape((batch, samples))?, log_det.reshape((batch, samples))?))
    }
}

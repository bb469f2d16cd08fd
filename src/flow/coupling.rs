//! Affine coupling.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::net::CondNet;
use crate::net::wavenet::Projection;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Affine coupling: `z₀ = x₀`, `z₁ = x₁ · e^log_s(x₀, mel) + b(x₀, mel)`.
///
/// The first half of the channels is known, the rest moves. log_det = Σ log_s. The conditioner's
/// last layer starts at zero, so the step starts as the identity. Prenger et al. 2018;
/// NVIDIA/waveglow `glow.py`: the first outputs are `b`, the rest `log_s`.
pub struct Coupling {
    known: usize,
    net: Box<dyn CondNet + Send + Sync>,
    cond: Projection,
    bound: Option<f64>,
}

impl Coupling {
    /// A coupling that knows the first `known` channels; asks `vb` for the conditioner's projection
    /// `cond` of `features` inputs.
    pub fn new(
        net: Box<dyn CondNet + Send + Sync>,
        known: usize,
        features: usize,
        weight_norm: bool,
        bound: Option<f64>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let cond = Projection::new(features, net.cond_width(), weight_norm, vb.pp("cond"))?;
        Ok(Self { known, net, cond, bound })
    }

    /// Steps on each side that the conditioner sees.
    pub fn reach(&self) -> usize {
        self.net.reach()
    }

    /// Multiply-adds per step, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        (self.net.macs_per_step(), self.cond.macs())
    }

    /// `(b, log_s)`, each `[batch, steps, channels − known]`.
    fn params(&self, known: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let out = self.net.forward(known, &self.cond.product(&cond.rows)?, self.cond.bias())?;
        let moved = out.dim(2)? / 2;
        let log_s = out.narrow(2, moved, moved)?;
        let log_s = match self.bound {
            Some(bound) => ((log_s / bound)?.tanh()? * bound)?,
            None => log_s,
        };
        Ok((out.narrow(2, 0, moved)?, log_s))
    }
}

impl Bijector for Coupling {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_det) = self.forward_by_step(x, cond)?;
        Ok((z, log_det.sum(1)?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let known = x.narrow(2, 0, self.known)?;
        let (b, log_s) = self.params(&known, cond)?;
        let moved = ((x.narrow(2, self.known, log_s.dim(2)?)? * log_s.exp()?)? + b)?;
        Ok((Tensor::cat(&[known, moved], 2)?, log_s.sum(2)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let known = z.narrow(2, 0, self.known)?;
        let (b, log_s) = self.params(&known, cond)?;
        let moved = ((z.narrow(2, self.known, log_s.dim(2)?)? - b)? * log_s.neg()?.exp()?)?;
        Tensor::cat(&[known, moved], 2)
    }

    fn pack(&self) -> Result<Option<Stage>> {
        let stage =
            |net| Stage::Coupling { known: self.known, bound: self.bound.map(|b| b as f32), net: Box::new(net) };
        Ok(self.net.pack(&self.cond)?.map(stage))
    }
}

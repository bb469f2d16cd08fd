//! Affine coupling.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::net::wavenet::{Projection, WaveNet, WaveNetConfig};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Affine coupling: `z₀ = x₀`, `z₁ = x₁ · e^log_s(x₀, mel) + b(x₀, mel)`.
///
/// The first half of the channels is known, the rest moves. log_det = Σ log_s. The conditioner's
/// last layer starts at zero, so the step starts as the identity. Prenger et al. 2018;
/// NVIDIA/waveglow `glow.py`: the first outputs are `b`, the rest `log_s`.
pub struct Coupling {
    known: usize,
    net: WaveNet,
    cond: Projection,
    bound: Option<f64>,
}

impl Coupling {
    /// Asks `vb` for the conditioner's tensors and its projection `cond` of `features` inputs.
    pub fn new(
        config: &WaveNetConfig,
        bound: Option<f64>,
        channels: usize,
        features: usize,
        up: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let known = channels / 2;
        let net = WaveNet::new(config, known, 2 * (channels - known), up, vb.clone())?;
        let cond = Projection::new(features, net.cond_width(), config.weight_norm, vb.pp("cond"))?;
        Ok(Self { known, net, cond, bound })
    }

    /// Steps on each side that the conditioner sees.
    pub fn reach(&self) -> usize {
        self.net.shape().reach()
    }

    /// Multiply-adds per step, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        (self.net.shape().macs_per_step(), self.cond.macs())
    }

    /// `(b, log_s)`, each `[batch, steps, channels − known]`.
    fn params(&self, known: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let out = self.net.forward(known, &self.cond.forward(&cond.rows)?)?;
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
        let known = x.narrow(2, 0, self.known)?;
        let (b, log_s) = self.params(&known, cond)?;
        let moved = ((x.narrow(2, self.known, log_s.dim(2)?)? * log_s.exp()?)? + b)?;
        Ok((Tensor::cat(&[known, moved], 2)?, log_s.sum((1, 2))?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let known = z.narrow(2, 0, self.known)?;
        let (b, log_s) = self.params(&known, cond)?;
        let moved = ((z.narrow(2, self.known, log_s.dim(2)?)? - b)? * log_s.neg()?.exp()?)?;
        Tensor::cat(&[known, moved], 2)
    }

    fn pack(&self) -> Result<Option<Stage>> {
        let net = Box::new(self.net.pack(&self.cond)?);
        Ok(Some(Stage::Coupling { known: self.known, bound: self.bound.map(|b| b as f32), net }))
    }
}

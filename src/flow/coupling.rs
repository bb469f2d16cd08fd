//! Coupling.

use super::scalar::{MapConfig, ScalarMap};
use super::split::Parts;
use super::stream::Stage;
use super::{Bijector, Cond};
use crate::kernels::choice::Kernel;
use crate::net::CondNet;
use crate::net::wavenet::Projection;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Coupling: `z₀ = x₀`, `z₁ = f(x₁; θ(x₀, mel))` with an invertible map `f` of single values.
///
/// log_det = Σ ln f′. The conditioner's last layer starts at zero, so the step starts nearly as the
/// identity. Dinh et al. 2014 and 2016; Prenger et al. 2018: with the affine map, NVIDIA/waveglow
/// `glow.py`'s order of the outputs, first `b`, then `log_s`.
pub struct Coupling {
    parts: Parts,
    net: Box<dyn CondNet + Send + Sync>,
    cond: Projection,
    map: ScalarMap,
}

impl Coupling {
    /// A coupling of `parts` by `map`. `net(inputs, outputs)` makes the conditioner; asks `vb` for its
    /// projection `cond` of `features` inputs.
    pub fn new(
        parts: Parts,
        (map, bound): (&MapConfig, Option<f64>),
        net: impl FnOnce(usize, usize) -> Result<Box<dyn CondNet + Send + Sync>>,
        (features, weight_norm): (usize, bool),
        vb: VarBuilder,
    ) -> Result<Self> {
        let map = ScalarMap::new(map, bound, parts.moved(), vb.pp("map"))?;
        let net = net(parts.known(), map.params_per_value() * parts.moved())?;
        let cond = Projection::new(features, net.cond_width(), weight_norm, vb.pp("cond"))?;
        Ok(Self { parts, net, cond, map })
    }

    /// Steps on each side that the conditioner sees.
    pub fn reach(&self) -> usize {
        self.net.reach()
    }

    /// Multiply-adds per step, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        (self.net.macs_per_step(), self.cond.macs())
    }

    fn params(&self, known: &Tensor, cond: &Cond) -> Result<Tensor> {
        self.net.forward(known, cond.of(&self.cond))
    }

    /// The moved part given the known, and ln f′ of each of its values.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn transform(&self, known: &Tensor, moved: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        self.map.forward(moved, &self.params(known, cond)?)
    }
}

impl Bijector for Coupling {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_det) = self.forward_by_step(x, cond)?;
        Ok((z, log_det.sum(1)?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (known, moved) = self.parts.take(x)?;
        let (moved, log_det) = self.transform(&known, &moved, cond)?;
        Ok((self.parts.join(&known, &moved)?, log_det.sum(2)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let (known, moved) = self.parts.take(z)?;
        let moved = self.map.inverse(&moved, &self.params(&known, cond)?)?;
        self.parts.join(&known, &moved)
    }

    fn pack(&self, kernel: Kernel) -> Result<Option<Stage>> {
        let (Some(map), Some(net)) = (self.map.pack()?, self.net.pack(&self.cond, kernel)?) else { return Ok(None) };
        Ok(Some(Stage::Coupling { parts: self.parts, map, net: Box::new(net) }))
    }
}

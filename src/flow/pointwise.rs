//! Steps that treat each value by itself, or only move it: actnorm, scale, gain, asinh, swap.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::kernels::choice::Kernel;
use crate::kernels::product::{Matrix, Panels};
use crate::net::wavenet::{linear, upsample};
use candle_core::{Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

/// Per-channel shift and scale: `z = (x + shift) · e^log_scale`.
///
/// log_det = steps · Σ log_scale. Kingma & Dhariwal 2018, §3.1.
pub struct Actnorm {
    log_scale: Tensor,
    shift: Tensor,
}

impl Actnorm {
    /// Asks `vb` for `log_scale` and `shift`, `[channels]`.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            log_scale: vb.get_with_hints(channels, "log_scale", Init::Const(0.0))?,
            shift: vb.get_with_hints(channels, "shift", Init::Const(0.0))?,
        })
    }
}

impl Bijector for Actnorm {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, steps, _) = x.dims3()?;
        let z = x.broadcast_add(&self.shift)?.broadcast_mul(&self.log_scale.exp()?)?;
        let log_det = self.log_scale.sum_all()?.affine(steps as f64, 0.0)?;
        Ok((z, log_det.broadcast_as(batch)?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        z.broadcast_mul(&self.log_scale.neg()?.exp()?)?.broadcast_sub(&self.shift)
    }

    fn pack(&self, _: Kernel) -> Result<Option<Stage>> {
        let scale = self.log_scale.neg()?.exp()?.to_vec1()?;
        Ok(Some(Stage::Affine { scale, shift: self.shift.neg()?.to_vec1()? }))
    }

    fn initialise(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let rows = x.flatten_to(1)?;
        let mean = rows.mean(0)?;
        let variance = rows.broadcast_sub(&mean)?.sqr()?.mean(0)?;
        Var::from_tensor(&self.shift)?.set(&mean.neg()?)?;
        Var::from_tensor(&self.log_scale)?.set(&((variance + 1e-12)?.log()? * -0.5)?)?;
        self.forward(x, cond)
    }
}

/// A gain per channel: `z = x · e^log_scale`.
///
/// log_det = steps · Σ log_scale. Dinh et al. 2014, §3.3: additive couplings keep the volume, so that one
/// scaling at the end has to say how much each channel matters.
pub struct Scale {
    log_scale: Tensor,
}

impl Scale {
    /// Asks `vb` for `log_scale`, `[channels]`, zero at first.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { log_scale: vb.get_with_hints(channels, "log_scale", Init::Const(0.0))? })
    }
}

impl Bijector for Scale {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, steps, _) = x.dims3()?;
        let log_det = self.log_scale.sum_all()?.affine(steps as f64, 0.0)?;
        Ok((x.broadcast_mul(&self.log_scale.exp()?)?, log_det.broadcast_as(batch)?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        z.broadcast_mul(&self.log_scale.neg()?.exp()?)
    }

    fn pack(&self, _: Kernel) -> Result<Option<Stage>> {
        let scale: Vec<f32> = self.log_scale.neg()?.exp()?.to_vec1()?;
        Ok(Some(Stage::Affine { shift: vec![0.0; scale.len()], scale }))
    }
}

/// A gain per channel and step from the mel's features: `z = x · e^g(mel)`.
///
/// log_det = Σ g. `g` is linear in the features at the frame rate, interpolated to steps.
pub struct Gain {
    weight: Tensor,
    bias: Tensor,
}

impl Gain {
    /// Asks `vb` for `weight` `[features, channels]` and `bias`, zero at first.
    pub fn new(features: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints((features, channels), "weight", Init::Const(0.0))?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
        })
    }

    fn log_gain(&self, cond: &Cond, steps: usize) -> Result<Tensor> {
        upsample(&linear(&cond.rows, &self.weight, &self.bias)?, cond.up, steps)
    }
}

impl Bijector for Gain {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_det) = self.forward_by_step(x, cond)?;
        Ok((z, log_det.sum(1)?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let log_gain = self.log_gain(cond, x.dim(1)?)?;
        Ok(((x * log_gain.exp()?)?, log_gain.sum(2)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        z * self.log_gain(cond, z.dim(1)?)?.neg()?.exp()?
    }

    fn pack(&self, kernel: Kernel) -> Result<Option<Stage>> {
        let (weight, bias) = (self.weight.flatten_all()?.to_vec1()?, self.bias.to_vec1()?);
        let matrix = Matrix::new(&weight, bias.len());
        Ok(Some(Stage::Gain { weights: Panels::new(kernel, bias.len(), &bias, &[matrix]) }))
    }
}

/// `z = asinh(scale · x) / scale`: nearly the identity for small values, a logarithm for large ones.
///
/// log_det = −½ Σ ln(1 + (scale · x)²).
pub struct Asinh {
    /// Where the bend begins: around `1 / scale`.
    pub scale: f64,
}

impl Bijector for Asinh {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_det) = self.forward_by_step(x, cond)?;
        Ok((z, log_det.sum(1)?))
    }

    fn forward_by_step(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        let u = (x * self.scale)?;
        let square = (u.sqr()? + 1.0)?;
        // on |u|: u + √(u² + 1) cancels for negative u
        let z = (u.sign()?.detach() * (u.abs()? + square.sqrt()?)?.log()?)?;
        Ok(((z / self.scale)?, (square.log()?.sum(2)? * -0.5)?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        let u = (z * self.scale)?;
        (u.exp()? - u.neg()?.exp()?)? * (0.5 / self.scale)
    }

    fn pack(&self, _: Kernel) -> Result<Option<Stage>> {
        Ok(Some(Stage::Sinh { scale: self.scale as f32 }))
    }
}

/// Exchanges the halves of the channels, an even number.
///
/// log_det = 0. Around a coupling it makes the second half the known one, as the first versions of
/// WaveGlow had it in every other flow.
pub struct Swap;

impl Swap {
    fn exchange(x: &Tensor) -> Result<Tensor> {
        let half = x.dim(2)? / 2;
        Tensor::cat(&[x.narrow(2, half, half)?, x.narrow(2, 0, half)?], 2)
    }
}

impl Bijector for Swap {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        Ok((Self::exchange(x)?, Tensor::zeros(x.dim(0)?, x.dtype(), x.device())?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        Self::exchange(z)
    }

    fn pack(&self, _: Kernel) -> Result<Option<Stage>> {
        Ok(Some(Stage::Swap))
    }
}

//! WaveFlow's step: autoregressive from channel to channel, all steps at once.

use super::scalar::{MapConfig, ScalarMap};
use super::{Bijector, Cond};
use crate::net::rowwise::{RowwiseConfig, RowwiseNet};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Rowwise step: a group's samples are the rows of a plane, and each row moves by a map whose
/// parameters a net tells from the rows before it, at all steps around, and the mel.
///
/// log_det = Σ ln f′, exact: the Jacobian is triangular. Forward is parallel; the inverse goes through
/// the channels one by one, the net remembering the rows that it needs. Ping et al. 2019.
pub struct Rowwise {
    net: RowwiseNet,
    map: ScalarMap,
}

impl Rowwise {
    /// A step whose net takes `features` of the mel, each row for `up` steps.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(
        config: &RowwiseConfig,
        (map, bound): (&MapConfig, Option<f64>),
        (features, up): (usize, usize),
        vb: VarBuilder,
    ) -> Result<Self> {
        let map = ScalarMap::new(map, bound, 1, vb.pp("map"))?;
        let net = RowwiseNet::new(config, map.params_per_value(), features, up, vb)?;
        Ok(Self { net, map })
    }

    /// Steps on each side of the rows before that a row depends on: each row reaches so much further.
    pub fn reach(&self) -> usize {
        self.net.reach()
    }

    /// Multiply-adds per value, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        self.net.macs()
    }

    /// Forward, with ln f′ of each value, `[batch, channels, steps]`.
    fn transform(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, steps, channels) = x.dims3()?;
        let rows = x.transpose(1, 2)?.contiguous()?;
        let before = rows.pad_with_zeros(1, 1, 0)?.narrow(1, 0, channels)?.unsqueeze(3)?;
        let params = self.net.push(&before, &mut self.net.memory(&cond.rows, steps)?)?;
        let flat = |t: &Tensor| t.reshape((batch, channels * steps, ()));
        let (z, log_slope) = self.map.forward(&flat(&rows)?, &flat(&params)?)?;
        let shape = (batch, channels, steps);
        Ok((z.reshape(shape)?.transpose(1, 2)?.contiguous()?, log_slope.reshape(shape)?))
    }
}

impl Bijector for Rowwise {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_slope) = self.transform(x, cond)?;
        Ok((z, log_slope.sum((1, 2))?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_slope) = self.transform(x, cond)?;
        Ok((z, log_slope.sum(1)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let (batch, steps, channels) = z.dims3()?;
        let mut memory = self.net.memory(&cond.rows, steps)?;
        let mut row = Tensor::zeros((batch, steps, 1), z.dtype(), z.device())?;
        let mut rows = Vec::with_capacity(channels);
        for channel in 0..channels {
            let params = self.net.push(&row.unsqueeze(1)?, &mut memory)?.squeeze(1)?;
            row = self.map.inverse(&z.narrow(2, channel, 1)?.contiguous()?, &params)?;
            rows.push(row.clone());
        }
        Tensor::cat(&rows, 2)
    }
}

/// Turns the channels around within `parts` equal parts: WaveFlow's permutation of rows between steps.
///
/// log_det = 0. Its own inverse.
pub struct Reverse {
    /// 1: all channels; 2: either half by itself; and so on.
    pub parts: usize,
}

impl Reverse {
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, steps, channels) = x.dims3()?;
        let split = x.contiguous()?.reshape((batch, steps, self.parts, channels / self.parts))?;
        split.flip(&[3])?.reshape((batch, steps, channels))
    }
}

impl Bijector for Reverse {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        Ok((self.turn(x)?, Tensor::zeros(x.dim(0)?, x.dtype(), x.device())?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        self.turn(z)
    }
}

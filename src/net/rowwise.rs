//! WaveFlow's conditioner: dilated convolutions over a plane, causal from row to row.

use super::plane::convolve;
use super::separable::gated;
use super::wavenet::{Projection, upsample};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// A conditioner over rows and steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowwiseConfig {
    /// Residual channels.
    pub channels: usize,
    /// Width of the convolutions over rows (that row and those before) and, odd, over steps.
    pub kernel: [usize; 2],
    /// Dilation of each layer over rows and over steps.
    pub dilations: Vec<[usize; 2]>,
}

impl RowwiseConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let [high, wide] = self.kernel;
        let problem = if !(1..=4096).contains(&self.channels) {
            format!("channels is {}, expected 1 to 4096", self.channels)
        } else if !(1..=15).contains(&high) || wide.is_multiple_of(2) || wide > 63 {
            format!("kernel is [{high}, {wide}], expected 1 to 15 rows and an odd number of steps up to 63")
        } else if self.dilations.is_empty()
            || self.dilations.len() > 64
            || self.dilations.iter().any(|[rows, steps]| !(1..=256).contains(rows) || !(1..=65_536).contains(steps))
        {
            "dilations must be 1 to 64 pairs of 1 to 256 rows and 1 to 65536 steps".to_string()
        } else {
            return Ok(());
        };
        Err(crate::Error::invalid(format!("rowwise net: {problem}")))
    }
}

/// `h = start(x)`; per layer `h += out(tanh · σ (conv(h) + cond))`; then `end`, at first zero.
///
/// Ping et al. 2019, §3.1, with the last residual in place of the skip connections' sum.
pub struct RowwiseNet {
    config: RowwiseConfig,
    /// Steps per row of conditioning.
    up: usize,
    start: Projection,
    layers: Vec<Layer>,
    end: Projection,
    cond: Projection,
}

struct Layer {
    /// Rows back and steps ahead of each tap.
    taps: Vec<(usize, isize)>,
    /// `[taps, channels, 2 · channels]`.
    weight: Tensor,
    out: Projection,
}

/// What the net has seen of the rows so far.
pub struct Memory {
    /// The last inputs of each layer, `[batch, rows, steps, channels]`.
    hidden: Vec<Option<Tensor>>,
    /// The mel's part of every layer, `[batch, 1, steps, 2 · channels · layers]`.
    cond: Tensor,
}

impl RowwiseNet {
    /// Of single values; asks `vb` for `start`, `layers.N`, `end` and `cond`.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(config: &RowwiseConfig, outputs: usize, features: usize, up: usize, vb: VarBuilder) -> Result<Self> {
        let c = config.channels;
        let [high, wide] = config.kernel;
        let layer = |l: usize, &[rows, steps]: &[usize; 2]| -> Result<_> {
            let vb = vb.pp(format!("layers.{l}"));
            let taps: Vec<(usize, isize)> = (0..high)
                .flat_map(|i| (0..wide).map(move |j| (i * rows, (j as isize - (wide / 2) as isize) * steps as isize)))
                .collect();
            let bound = 1.0 / ((taps.len() * c) as f64).sqrt();
            let uniform = Init::Uniform { lo: -bound, up: bound };
            Ok(Layer {
                weight: vb.get_with_hints((taps.len(), c, 2 * c), "weight", uniform)?,
                out: Projection::new(c, c, false, vb.pp("out"))?,
                taps,
            })
        };
        Ok(Self {
            config: config.clone(),
            up,
            start: Projection::new(1, c, false, vb.pp("start"))?,
            layers: config.dilations.iter().enumerate().map(|(l, d)| layer(l, d)).collect::<Result<_>>()?,
            end: Projection::zeros(c, outputs, vb.pp("end"))?,
            cond: Projection::new(features, 2 * c * config.dilations.len(), false, vb.pp("cond"))?,
        })
    }

    /// Before the first row of `steps` steps, with the mel's features.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn memory(&self, rows: &Tensor, steps: usize) -> Result<Memory> {
        let cond = upsample(&self.cond.forward(rows)?, self.up, steps)?.unsqueeze(1)?;
        Ok(Memory { hidden: vec![None; self.layers.len()], cond })
    }

    /// Takes the next rows `[batch, rows, steps, 1]`; gives `[batch, rows, steps, outputs]`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn push(&self, x: &Tensor, memory: &mut Memory) -> Result<Tensor> {
        let (batch, rows, steps, _) = x.dims4()?;
        let c = self.config.channels;
        let each = |x: &Tensor, f: &Projection| -> Result<Tensor> {
            f.forward(&x.reshape((batch, rows * steps, ()))?)?.reshape((batch, rows, steps, ()))
        };
        let mut h = each(x, &self.start)?;
        for (l, (layer, seen)) in self.layers.iter().zip(&mut memory.hidden).enumerate() {
            let known = match seen.take() {
                Some(past) => Tensor::cat(&[&past, &h], 1)?,
                None => h.clone(),
            };
            let all = known.dim(1)?;
            let pre = convolve(&known, &layer.weight, &layer.taps, all - rows)?;
            let kept = layer.taps.iter().map(|tap| tap.0).max().unwrap_or(0).min(all);
            *seen = if kept == 0 { None } else { Some(known.narrow(1, all - kept, kept)?) };
            let pre = pre.broadcast_add(&memory.cond.narrow(3, 2 * c * l, 2 * c)?)?;
            let act = gated(&pre.reshape((batch, rows * steps, 2 * c))?)?;
            h = (h + each(&act, &layer.out)?)?;
        }
        each(&h, &self.end)
    }

    /// Steps on each side that an output depends on.
    pub fn reach(&self) -> usize {
        self.config.dilations.iter().map(|[_, steps]| self.config.kernel[1] / 2 * steps).sum()
    }

    /// Multiply-adds per value, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        let layers: usize = self.layers.iter().map(|l| l.weight.elem_count() + l.out.macs()).sum();
        (self.start.macs() + layers + self.end.macs(), self.cond.macs())
    }
}

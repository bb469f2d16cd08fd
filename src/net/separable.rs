//! SqueezeWave's conditioner: depthwise-separable convolutions, conditioned at the frame rate.

use super::node::{values, with_values};
use super::wavenet::Projection;
use super::{CondNet, Conditioning};
use crate::kernels::choice::Kernel;
use crate::kernels::conditioner::Weights;
use crate::kernels::gate;
use crate::kernels::separable::{self, Affine, LayerParams, Params, Shape};
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// A depthwise-separable conditioner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeparableConfig {
    /// Residual channels.
    pub channels: usize,
    /// Width of the depthwise convolutions, odd.
    pub kernel: usize,
    /// Layers; none is dilated.
    pub layers: usize,
    /// Weight norm on the 1×1 convolutions but the pointwise ones and the last, as in SqueezeWave.
    pub weight_norm: bool,
    /// A scale and shift per channel before the padding: a batch norm whose statistics are folded in.
    pub norm: bool,
}

impl SeparableConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let problem = if !(1..=4096).contains(&self.channels) {
            format!("channels is {}, expected 1 to 4096", self.channels)
        } else if self.kernel.is_multiple_of(2) || self.kernel > 63 {
            format!("kernel is {}, expected an odd number up to 63", self.kernel)
        } else if !(1..=64).contains(&self.layers) {
            format!("layers is {}, expected 1 to 64", self.layers)
        } else {
            return Ok(());
        };
        Err(crate::Error::invalid(format!("separable net: {problem}")))
    }
}

/// A conditioner: known channels and rows of conditioning in, coupling parameters out.
///
/// `h = start(x)`; per layer `h += out(tanh · σ (point(depth(norm(h))) + cond))`; then `end`. A row of
/// conditioning is held for its steps, not interpolated. Zhai et al. 2020; tianrengao/SqueezeWave
/// `glow.py`, class WN.
pub struct SeparableNet {
    config: SeparableConfig,
    inputs: usize,
    outputs: usize,
    /// Steps per row of conditioning.
    up: usize,
    start: Projection,
    layers: Vec<Layer>,
    end: Projection,
}

struct Layer {
    /// Scale and shift, `[channels]`.
    norm: Option<(Tensor, Tensor)>,
    /// `[kernel, channels]`.
    depth: Tensor,
    depth_bias: Tensor,
    point: Projection,
    out: Projection,
}

impl SeparableNet {
    /// Asks `vb` for `start`, `layers.N.norm`, `.depth`, `.point`, `.out` and `end`.
    pub fn new(config: &SeparableConfig, inputs: usize, outputs: usize, up: usize, vb: VarBuilder) -> Result<Self> {
        let (c, kernel, norm) = (config.channels, config.kernel, config.weight_norm);
        let bound = 1.0 / (kernel as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let layer = |l: usize| -> Result<_> {
            let vb = vb.pp(format!("layers.{l}"));
            let scale_and_shift = |vb: VarBuilder| -> Result<_> {
                let scale = vb.get_with_hints(c, "scale", Init::Const(1.0))?;
                Ok((scale, vb.get_with_hints(c, "shift", Init::Const(0.0))?))
            };
            Ok(Layer {
                norm: config.norm.then(|| scale_and_shift(vb.pp("norm"))).transpose()?,
                depth: vb.pp("depth").get_with_hints((kernel, c), "weight", uniform)?,
                depth_bias: vb.pp("depth").get_with_hints(c, "bias", uniform)?,
                point: Projection::new(c, 2 * c, false, vb.pp("point"))?,
                out: Projection::new(c, c, norm, vb.pp("out"))?,
            })
        };
        Ok(Self {
            inputs,
            outputs,
            up,
            start: Projection::new(inputs, c, norm, vb.pp("start"))?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            end: Projection::zeros(c, outputs, vb.pp("end"))?,
            config: config.clone(),
        })
    }
}

impl CondNet for SeparableNet {
    fn forward(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor> {
        let cond = cond.rows()?;
        let (c, (batch, steps, _)) = (self.config.channels, x.dims3()?);
        let (_, rows, width) = cond.dims3()?;
        if rows * self.up != steps || width != self.cond_width() {
            candle_core::bail!(
                "separable net: {steps} steps want {} rows of {} values, got {rows} of {width}",
                steps / self.up,
                self.cond_width()
            )
        }
        let half = self.config.kernel / 2;
        let mut h = self.start.forward(&x.contiguous()?)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let normed = match &layer.norm {
                Some((scale, shift)) => h.broadcast_mul(scale)?.broadcast_add(shift)?,
                None => h.clone(),
            };
            let padded = normed.pad_with_zeros(1, half, half)?;
            let mut depth = padded.narrow(1, 0, steps)?.broadcast_mul(&layer.depth.get(0)?)?;
            for tap in 1..self.config.kernel {
                depth = (depth + padded.narrow(1, tap, steps)?.broadcast_mul(&layer.depth.get(tap)?)?)?;
            }
            let pre = layer.point.forward(&depth.broadcast_add(&layer.depth_bias)?)?;
            let held = cond.narrow(2, l * 2 * c, 2 * c)?.unsqueeze(2)?;
            let pre = pre.reshape((batch, rows, self.up, 2 * c))?.broadcast_add(&held)?;
            let act = gated(&pre.reshape((batch, steps, 2 * c))?)?;
            h = (h + layer.out.forward(&act)?)?;
        }
        self.end.forward(&h)
    }

    fn pack(&self, projection: &Projection, kernel: Kernel) -> Result<Option<Weights>> {
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let affine =
            |p: &Projection| -> Result<_> { Ok(Affine { weight: flat(&p.weight()?)?, bias: flat(p.bias())? }) };
        let layer = |layer: &Layer| -> Result<_> {
            Ok(LayerParams {
                norm: layer
                    .norm
                    .as_ref()
                    .map(|(scale, shift)| Ok::<_, Error>((flat(scale)?, flat(shift)?)))
                    .transpose()?,
                depth: flat(&layer.depth)?,
                depth_bias: flat(&layer.depth_bias)?,
                point: affine(&layer.point)?,
                out: affine(&layer.out)?,
            })
        };
        let params = Params {
            start: affine(&self.start)?,
            layers: self.layers.iter().map(layer).collect::<Result<_>>()?,
            end: affine(&self.end)?,
            cond: affine(projection)?,
        };
        let shape = Shape {
            inputs: self.inputs,
            channels: self.config.channels,
            outputs: self.outputs,
            kernel: self.config.kernel,
            layers: self.config.layers,
            up: self.up,
        };
        Ok(Some(Weights::Separable(separable::Weights::new(kernel, &shape, &params))))
    }

    fn cond_width(&self) -> usize {
        2 * self.config.channels * self.config.layers
    }

    fn reach(&self) -> usize {
        self.config.layers * (self.config.kernel / 2)
    }

    fn macs_per_step(&self) -> usize {
        let (c, layers) = (self.config.channels, self.config.layers);
        (self.inputs + self.outputs) * c + layers * (self.config.kernel * c + 3 * c * c)
    }
}

/// `tanh(a) · σ(b)` of `[batch, steps, a | b]`: fused on the CPU, tensor operations elsewhere.
pub fn gated(pre: &Tensor) -> Result<Tensor> {
    if pre.device().is_cpu() { pre.contiguous()?.apply_op1(Gate) } else { gated_graph(pre) }
}

/// The definition of [`gated`] in tensor operations of any device.
pub fn gated_graph(pre: &Tensor) -> Result<Tensor> {
    let c = pre.dim(2)? / 2;
    let gate = candle_nn::ops::sigmoid(&pre.narrow(2, c, c)?.contiguous()?)?;
    pre.narrow(2, 0, c)?.tanh()? * gate
}

struct Gate;

/// `[tanh | σ]` and their product.
fn run_gate(pre: &[f32], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut gated, mut act) = (pre.to_vec(), vec![0.0; pre.len() / 2]);
    gate::forward(&mut gated, &mut act, channels);
    (gated, act)
}

impl CustomOp1 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(&self, pre: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, candle_core::Shape)> {
        let (batch, steps, both) = layout.shape().dims3()?;
        let (_, act) = run_gate(values(pre, layout)?, both / 2);
        Ok((CpuStorage::F32(act), (batch, steps, both / 2).into()))
    }

    fn bwd(&self, pre: &Tensor, _: &Tensor, d_act: &Tensor) -> Result<Option<Tensor>> {
        let mut d_pre = vec![0.0; pre.elem_count()];
        let c = pre.dim(2)? / 2;
        with_values([pre, &d_act.contiguous()?], |[pre, d_act]| {
            gate::backward(&run_gate(pre, c).0, d_act, &mut d_pre, c);
        })?;
        Ok(Some(Tensor::from_vec(d_pre, pre.shape(), pre.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn fused_gate_equals_its_graph_in_values_and_gradients() {
        let values: Vec<f32> = (0..3 * 5 * 14).map(|i| ((i * 7919) % 1000) as f32 / 90.0 - 5.0).collect();
        let pre = Var::from_vec(values, (3, 5, 14), &Device::Cpu).unwrap();
        let weight = Tensor::arange(0f32, 105.0, &Device::Cpu).unwrap().reshape((3, 5, 7)).unwrap();
        let (fused, graph) = (gated(&pre).unwrap(), gated_graph(&pre).unwrap());
        let gradient = |y: &Tensor| {
            let grads = (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
            grads.get(&pre).unwrap().clone()
        };
        let off = |a: &Tensor, b: &Tensor| {
            (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(off(&fused, &graph) < 1e-6);
        assert!(off(&gradient(&fused), &gradient(&graph)) < 1e-4, "{}", off(&gradient(&fused), &gradient(&graph)));
        assert!(off(&gradient(&fused), &pre.zeros_like().unwrap()) > 1.0);
    }
}

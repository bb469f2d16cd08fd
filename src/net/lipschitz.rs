//! A convolutional net that never stretches: the inside of an invertible residual step.

use super::plane::convolve;
use super::wavenet::{Projection, upsample};
use crate::kernels::plane::Plane;
use crate::kernels::spectral::conv_norm;
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// LipSwish: `x · σ(β x) / 1.1` has slopes of at most 1 for every β. Chen et al. 2019, §3.3.
const SWISH_SLOPE: f64 = 1.1;
/// Where β's softplus starts (β ≈ 0.97), as in the authors' program.
const BETA: f64 = 0.5;

/// A contracting conditioner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LipschitzConfig {
    /// Hidden channels.
    pub channels: usize,
    /// Width of each convolution, odd.
    pub kernel: usize,
    /// Convolutions, at least 2.
    pub layers: usize,
    /// What the whole net may multiply a distance by, below 1.
    pub coefficient: f64,
}

impl LipschitzConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let problem = if !(1..=4096).contains(&self.channels) {
            format!("channels is {}, expected 1 to 4096", self.channels)
        } else if self.kernel.is_multiple_of(2) || self.kernel > 15 {
            format!("kernel is {}, expected an odd number up to 15", self.kernel)
        } else if !(2..=16).contains(&self.layers) {
            format!("layers is {}, expected 2 to 16", self.layers)
        } else if !(0.01..=0.98).contains(&self.coefficient) {
            format!("coefficient is {}, expected 0.01 to 0.98", self.coefficient)
        } else {
            return Ok(());
        };
        Err(crate::Error::invalid(format!("lipschitz net: {problem}")))
    }
}

/// Convolutions of bounded spectral norm with LipSwish between them; the mel's features shift what
/// the activations see.
pub struct LipschitzNet {
    config: LipschitzConfig,
    layers: Vec<Layer>,
    cond: Projection,
}

struct Layer {
    /// `[kernel, in, out]`.
    weight: Tensor,
    bias: Tensor,
    /// β of the activation after it, before its softplus, `[1]`; none after the last.
    beta: Option<Tensor>,
}

/// The net at one point, ready to be asked how it moves there.
pub struct Tangent<'a> {
    net: &'a LipschitzNet,
    weights: Vec<Tensor>,
    /// The activations' slopes, `[batch, steps, channels]`.
    slopes: Vec<Tensor>,
}

impl LipschitzNet {
    /// From `[batch, steps, inputs]` to the same; asks `vb` for `layers.N` and `cond`.
    ///
    /// The last convolution starts small, so that the step starts nearly as the identity.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(config: &LipschitzConfig, inputs: usize, features: usize, vb: VarBuilder) -> Result<Self> {
        let (c, last) = (config.channels, config.layers - 1);
        let layer = |l: usize| -> Result<_> {
            let (from, to) = (if l == 0 { inputs } else { c }, if l == last { inputs } else { c });
            let vb = vb.pp(format!("layers.{l}"));
            let bound = if l == last { 0.01 } else { 1.0 / ((config.kernel * from) as f64).sqrt() };
            let uniform = Init::Uniform { lo: -bound, up: bound };
            Ok(Layer {
                weight: vb.get_with_hints((config.kernel, from, to), "weight", uniform)?,
                bias: vb.get_with_hints(to, "bias", Init::Const(0.0))?,
                beta: if l == last { None } else { Some(vb.get_with_hints(1, "beta", Init::Const(BETA))?) },
            })
        };
        Ok(Self {
            layers: (0..=last).map(layer).collect::<Result<_>>()?,
            cond: Projection::new(features, c * last, false, vb.pp("cond"))?,
            config: config.clone(),
        })
    }

    /// The weights that are used: each scaled down where its norm is beyond its share of the coefficient.
    fn weights(&self) -> Result<Vec<Tensor>> {
        let share = self.config.coefficient.powf(1.0 / self.layers.len() as f64);
        let bounded = |layer: &Layer| {
            let values: Vec<f32> = layer.weight.flatten_all()?.to_vec1()?;
            let (norm, gradient) = conv_norm(&values, layer.weight.dims3()?);
            if f64::from(norm) <= share {
                return Ok(layer.weight.clone());
            }
            // the norm, with its gradient
            let gradient = Tensor::from_vec(gradient, layer.weight.shape(), layer.weight.device())?;
            let carrier = ((&layer.weight - layer.weight.detach())? * gradient)?.sum_all()?;
            layer.weight.broadcast_div(&((carrier + f64::from(norm))? / share)?)
        };
        self.layers.iter().map(bounded).collect()
    }

    /// What the mel adds before each activation, `[batch, steps, channels · (layers − 1)]`, and the weights.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn prepare(&self, rows: &Tensor, up: usize, steps: usize) -> Result<Prepared<'_>> {
        Ok(Prepared { net: self, weights: self.weights()?, cond: upsample(&self.cond.forward(rows)?, up, steps)? })
    }

    /// Multiply-adds per step, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        (self.layers.iter().map(|layer| layer.weight.elem_count()).sum(), self.cond.macs())
    }
}

/// A net whose weights and conditioning are worked out.
pub struct Prepared<'a> {
    net: &'a LipschitzNet,
    weights: Vec<Tensor>,
    cond: Tensor,
}

impl<'a> Prepared<'a> {
    /// `[batch, steps, inputs]` → the same.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn value(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.run(x, false)?.0)
    }

    /// [`Prepared::value`], and how it moves with `x`.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn with_tangent(self, x: &Tensor) -> Result<(Tensor, Tangent<'a>)> {
        let (y, slopes) = self.run(x, true)?;
        Ok((y, Tangent { net: self.net, weights: self.weights, slopes }))
    }

    fn run(&self, x: &Tensor, with_slopes: bool) -> Result<(Tensor, Vec<Tensor>)> {
        let c = self.net.config.channels;
        let (mut h, mut slopes) = (x.clone(), Vec::new());
        for (l, (layer, weight)) in self.net.layers.iter().zip(&self.weights).enumerate() {
            h = conv(&h, weight)?.broadcast_add(&layer.bias)?;
            let Some(beta) = &layer.beta else { continue };
            h = (h + self.cond.narrow(2, l * c, c)?)?;
            let beta = (beta.exp()? + 1.0)?.log()?;
            let gate = candle_nn::ops::sigmoid(&h.broadcast_mul(&beta)?)?;
            if with_slopes {
                // (x σ(βx))′ = σ + βx σ (1 − σ)
                let bend = (h.broadcast_mul(&beta)? * (&gate * (1.0 - &gate)?)?)?;
                slopes.push(((&gate + bend)? / SWISH_SLOPE)?);
            }
            h = ((h * gate)? / SWISH_SLOPE)?;
        }
        Ok((h, slopes))
    }
}

impl Tangent<'_> {
    /// `J v` for `v` `[probes · batch, steps, inputs]`, each probe's batch after the other.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn product(&self, v: &Tensor) -> Result<Tensor> {
        let mut v = v.clone();
        for (l, weight) in self.weights.iter().enumerate() {
            v = conv(&v, weight)?;
            if let Some(slope) = self.slopes.get(l) {
                let (batch, steps, c) = slope.dims3()?;
                let probes = v.dim(0)? / batch;
                let scaled = v.reshape((probes, batch, steps, c))?.broadcast_mul(&slope.unsqueeze(0)?)?;
                v = scaled.reshape((probes * batch, steps, c))?;
            }
        }
        Ok(v)
    }

    /// The same, of which no gradient is kept.
    pub fn detached(&self) -> Self {
        let detach = |tensors: &[Tensor]| tensors.iter().map(Tensor::detach).collect();
        Self { net: self.net, weights: detach(&self.weights), slopes: detach(&self.slopes) }
    }
}

/// A convolution with zeros around `[batch, steps, in]`.
fn conv(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let taps = Plane::line(weight.dim(0)?);
    convolve(&x.unsqueeze(1)?, weight, &taps, 0)?.squeeze(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Params;
    use crate::net::params::scattered;
    use candle_core::Device;

    fn net(coefficient: f64) -> LipschitzNet {
        let config = LipschitzConfig { channels: 7, kernel: 3, layers: 3, coefficient };
        let params = Params::seeded(1, &Device::Cpu);
        let net = LipschitzNet::new(&config, 4, 5, params.builder()).unwrap();
        // far beyond what the coefficient allows
        for (i, (_, var)) in params.named().iter().enumerate() {
            var.set(&(var.as_tensor() + scattered(i as u64, 2.0, var.shape())).unwrap()).unwrap();
        }
        net
    }

    fn norm(x: &Tensor) -> f32 {
        x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn distances_shrink_by_the_coefficient_at_least() {
        let rows = scattered(0, 1.0, (1, 6, 5));
        for coefficient in [0.3, 0.9] {
            let net = net(coefficient);
            let net = net.prepare(&rows, 4, 20).unwrap();
            let mut worst = 0.0_f32;
            for size in [0.01, 0.3, 3.0] {
                let a = scattered(1, 2.0, (1, 20, 4));
                let mut b = (&a + scattered(2, size as f32, a.shape())).unwrap();
                // towards the direction that grows most
                for _ in 0..20 {
                    let apart = (net.value(&b).unwrap() - net.value(&a).unwrap()).unwrap();
                    worst = worst.max(norm(&apart) / norm(&(&b - &a).unwrap()));
                    b = (&a + (&apart * (size / f64::from(norm(&apart)))).unwrap()).unwrap();
                }
            }
            let coefficient = coefficient as f32;
            assert!(worst < coefficient && worst > 0.05 * coefficient, "{worst} of {coefficient}");
        }
    }

    #[test]
    fn the_tangent_is_the_difference_of_values() {
        let net = net(0.9);
        let rows = scattered(0, 1.0, (2, 6, 5));
        let x = scattered(1, 1.0, (2, 20, 4));
        let v = scattered(2, 1.0, (2, 20, 4));
        let at = |h: f64| net.prepare(&rows, 4, 20).unwrap().value(&(&x + (&v * h).unwrap()).unwrap()).unwrap();
        let numerical = ((at(0.01) - at(-0.01)).unwrap() / 0.02).unwrap();
        let (value, tangent) = net.prepare(&rows, 4, 20).unwrap().with_tangent(&x).unwrap();
        assert!(norm(&(value - at(0.0)).unwrap()) == 0.0);
        let stated = tangent.product(&v).unwrap();
        assert!(norm(&(&numerical - &stated).unwrap()) < 1e-2 * norm(&stated), "{stated} {numerical}");
        // two probes, one after the other
        let both = tangent.product(&Tensor::cat(&[&v, &(&v * 2.0).unwrap()], 0).unwrap()).unwrap();
        assert!(norm(&(both.narrow(0, 2, 2).unwrap() - (&stated * 2.0).unwrap()).unwrap()) < 1e-4);
    }
}

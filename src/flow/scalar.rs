//! Invertible maps of single values, whose parameters a net gives: what couplings and
//! autoregressive steps share.

use super::affine::affine;
use super::logistic;
use crate::kernels::pointwise;
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// Which map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MapConfig {
    /// `z = x + b`: volume is kept. Dinh et al. 2014.
    Additive,
    /// `z = x · e^log_s + b`.
    #[default]
    Affine,
    /// Affine with `log_s = scale · tanh(o) + shift`, `scale` and `shift` learned per channel. Dinh et al.
    /// 2016, §4.1.
    Tanh,
    /// `z = logit(F(x)) · e^log_s + b`, `F` the distribution function of a mixture of logistics. Ho et al.
    /// 2019, §3.2.
    MixLogistic {
        /// Logistics in the mixture.
        components: usize,
    },
}

/// A map at work. Parameters are `[batch, steps, params_per_value · values]` for values
/// `[batch, steps, values]`: first `b` of all values, then `log_s` of all, then the mixture's.
pub enum ScalarMap {
    /// [`MapConfig::Additive`].
    Additive,
    /// [`MapConfig::Affine`].
    Affine {
        /// Bound of `log_s` by `bound · tanh(o / bound)`.
        bound: Option<f64>,
    },
    /// [`MapConfig::Tanh`].
    Tanh {
        /// `[values]`.
        scale: Tensor,
        /// `[values]`.
        shift: Tensor,
    },
    /// [`MapConfig::MixLogistic`].
    MixLogistic {
        /// Logistics in the mixture.
        components: usize,
        /// Bound of `log_s`, as in `Affine`.
        bound: Option<f64>,
    },
}

impl MapConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Says what is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        match self {
            Self::MixLogistic { components } if !(1..=64).contains(components) => {
                Err(crate::Error::invalid(format!("components is {components}, expected 1 to 64")))
            }
            _ => Ok(()),
        }
    }
}

impl ScalarMap {
    /// A map of `values` values a step; only [`MapConfig::Tanh`] asks `vb`, for `scale` and `shift`.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(config: &MapConfig, bound: Option<f64>, values: usize, vb: VarBuilder) -> Result<Self> {
        Ok(match config {
            MapConfig::Additive => Self::Additive,
            MapConfig::Affine => Self::Affine { bound },
            MapConfig::Tanh => Self::Tanh {
                scale: vb.get_with_hints(values, "scale", Init::Const(1.0))?,
                shift: vb.get_with_hints(values, "shift", Init::Const(0.0))?,
            },
            &MapConfig::MixLogistic { components } => Self::MixLogistic { components, bound },
        })
    }

    /// Parameters that a value wants.
    pub fn params_per_value(&self) -> usize {
        match self {
            Self::Additive => 1,
            Self::Affine { .. } | Self::Tanh { .. } => 2,
            Self::MixLogistic { components, .. } => 2 + 3 * components,
        }
    }

    /// `(b, log_s)`; none of `log_s` where it is zero.
    fn affine(&self, params: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let values = params.dim(2)? / self.params_per_value();
        let b = params.narrow(2, 0, values)?;
        let log_s = || params.narrow(2, values, values);
        let log_s = match self {
            Self::Additive => None,
            Self::Tanh { scale, shift } => Some(log_s()?.tanh()?.broadcast_mul(scale)?.broadcast_add(shift)?),
            Self::Affine { bound: Some(bound) } | Self::MixLogistic { bound: Some(bound), .. } => {
                Some(((log_s()? / *bound)?.tanh()? * *bound)?)
            }
            Self::Affine { bound: None } | Self::MixLogistic { bound: None, .. } => Some(log_s()?),
        };
        Ok((b, log_s))
    }

    /// The mixture's part of the parameters.
    fn mixture(params: &Tensor, components: usize) -> Result<logistic::Mixture> {
        let values = params.dim(2)? / (2 + 3 * components);
        logistic::Mixture::new(&params.narrow(2, 2 * values, 3 * components * values)?, components)
    }

    /// Data → latent, and the logarithm of the derivative of each value.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(&self, x: &Tensor, params: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Affine { bound } if x.device().is_cpu() => affine(x, params, *bound),
            _ => self.forward_graph(x, params),
        }
    }

    /// The definition of [`ScalarMap::forward`], in tensor operations of any device.
    fn forward_graph(&self, x: &Tensor, params: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, log_s) = self.affine(params)?;
        let Some(log_s) = log_s else { return Ok(((x + b)?, x.zeros_like()?)) };
        match self {
            Self::MixLogistic { components, .. } => {
                let (y, log_slope) = Self::mixture(params, *components)?.forward(x)?;
                Ok((((y * log_s.exp()?)? + b)?, (log_slope + log_s)?))
            }
            _ => Ok((((x * log_s.exp()?)? + b)?, log_s)),
        }
    }

    /// Latent → data.
    ///
    /// # Errors
    /// If the shapes don't fit, or a mixture's root isn't found.
    pub fn inverse(&self, z: &Tensor, params: &Tensor) -> Result<Tensor> {
        let (b, log_s) = self.affine(params)?;
        let Some(log_s) = log_s else { return z - b };
        let y = ((z - b)? * log_s.neg()?.exp()?)?;
        match self {
            Self::MixLogistic { components, .. } => Self::mixture(params, *components)?.inverse(&y),
            _ => Ok(y),
        }
    }

    /// The inverse for a stream, or `None` if it may fail.
    ///
    /// # Errors
    /// If a tensor can't be read.
    pub fn pack(&self) -> Result<Option<Packed>> {
        Ok(if let Self::MixLogistic { .. } = self { None } else { Some(self.on_slices()?) })
    }

    /// The inverse on slices.
    ///
    /// # Errors
    /// If a tensor can't be read.
    pub fn on_slices(&self) -> Result<Packed> {
        let narrow = |bound: &Option<f64>| bound.map(|bound| bound as f32);
        Ok(match self {
            Self::Additive => Packed::Additive,
            Self::Affine { bound } => Packed::Affine { bound: narrow(bound) },
            Self::Tanh { scale, shift } => Packed::Tanh { scale: scale.to_vec1()?, shift: shift.to_vec1()? },
            Self::MixLogistic { components, bound } => {
                Packed::MixLogistic { components: *components, bound: narrow(bound) }
            }
        })
    }
}

/// A map's inverse on slices.
pub enum Packed {
    /// [`ScalarMap::Additive`].
    Additive,
    /// [`ScalarMap::Affine`].
    Affine {
        /// Bound of `log_s`.
        bound: Option<f32>,
    },
    /// [`ScalarMap::Tanh`].
    Tanh {
        /// Per value.
        scale: Vec<f32>,
        /// Per value.
        shift: Vec<f32>,
    },
    /// [`ScalarMap::MixLogistic`].
    MixLogistic {
        /// Logistics in the mixture.
        components: usize,
        /// Bound of `log_s`.
        bound: Option<f32>,
    },
}

impl Packed {
    /// [`inverse`](Self::inverse) of all values of a row, in place; an affine map's to within rounding.
    pub fn inverse_row(&self, row: &mut [f32], params: &[f32]) {
        let values = row.len();
        match self {
            Self::Affine { bound } => pointwise::uncouple(row, 0, params, values, *bound),
            _ => row.iter_mut().enumerate().for_each(|(i, z)| *z = self.inverse(*z, i, values, params)),
        }
    }

    /// Value number `i` of a step's `values`, from the parameters of that step; NaN where a mixture's root
    /// isn't found.
    pub fn inverse(&self, z: f32, i: usize, values: usize, params: &[f32]) -> f32 {
        let log_s = match self {
            Self::Additive => return z - params[i],
            Self::Affine { bound: Some(bound) } | Self::MixLogistic { bound: Some(bound), .. } => {
                (params[values + i] / bound).tanh() * bound
            }
            Self::Affine { bound: None } | Self::MixLogistic { bound: None, .. } => params[values + i],
            Self::Tanh { scale, shift } => params[values + i].tanh() * scale[i] + shift[i],
        };
        let y = (z - params[i]) * (-log_s).exp();
        match self {
            Self::MixLogistic { components, .. } => {
                logistic::inverse_value(y, *components, |part, k| params[(2 + part * components + k) * values + i])
            }
            _ => y,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::scattered;
    use candle_core::Var;

    /// Values and gradients, with parameters and values that lie apart in memory.
    #[test]
    fn the_fused_map_is_the_one_of_tensor_operations() {
        for (bound, values) in [(None, 1), (Some(2.0), 5), (Some(0.7), 8)] {
            let map = ScalarMap::Affine { bound };
            let x = Var::from_tensor(&scattered(1, 2.0, (3, 7, values + 2))).unwrap();
            let params = Var::from_tensor(&scattered(2, 3.0, (3, 7, 2 * values))).unwrap();
            let weights = [scattered(3, 1.0, (3, 7, values)), scattered(4, 1.0, (3, 7, values))];
            let off = |a: &Tensor, b: &Tensor| {
                assert_eq!(a.dims(), b.dims());
                (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
            };
            let moved = x.narrow(2, 1, values).unwrap();
            let (fused, graph) = (map.forward(&moved, &params).unwrap(), map.forward_graph(&moved, &params).unwrap());
            assert!(off(&fused.0, &graph.0) < 1e-5 && off(&fused.1, &graph.1) < 1e-6);
            let grads = |(z, log_s): &(Tensor, Tensor)| {
                let loss = (z * &weights[0]).unwrap().sum_all().unwrap() + (log_s * &weights[1]).unwrap().sum_all();
                loss.unwrap().backward().unwrap()
            };
            let (a, b) = (grads(&fused), grads(&graph));
            for var in [&x, &params] {
                let (a, b) = (a.get(var).unwrap(), b.get(var).unwrap());
                assert!(off(a, b) < 2e-5, "bound {bound:?}: {}", off(a, b));
                assert!(off(a, &a.zeros_like().unwrap()) > 0.5);
            }
        }
    }

    #[test]
    fn a_row_at_once_is_its_values() {
        let params: Vec<f32> = (0..40).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let maps = [
            Packed::Additive,
            Packed::Affine { bound: None },
            Packed::Affine { bound: Some(2.0) },
            Packed::Tanh { scale: vec![0.7; 10], shift: vec![0.1; 10] },
        ];
        for map in maps {
            let z: Vec<f32> = (0..10).map(|i| i as f32 - 4.5).collect();
            let mut row = z.clone();
            map.inverse_row(&mut row, &params[..if matches!(map, Packed::Additive) { 10 } else { 20 }]);
            for (i, (x, z)) in row.iter().zip(z).enumerate() {
                let expected = map.inverse(z, i, 10, &params);
                assert!((x - expected).abs() < 1e-5 * expected.abs().max(1.0), "{x}, {expected}");
            }
        }
    }
}

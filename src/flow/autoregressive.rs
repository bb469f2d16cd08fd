//! Autoregressive step in time.

use super::scalar::{MapConfig, ScalarMap};
use super::stream::Stage;
use super::{Bijector, Cond};
use crate::kernels::choice::Kernel;
use crate::net::CondNet;
use crate::net::node::{values, with_values};
use crate::net::wavenet::Projection;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;

/// Autoregressive step: each row of `by` values moves by a map whose parameters a causal net tells
/// from the rows before it and the mel: `zₜ = f(xₜ; θ(x₀ … xₜ₋₁, mel))`.
///
/// A row is a part of a step, so that `by` 1 goes from sample to sample. log_det = Σ ln f′, exact: the
/// Jacobian is triangular. Forward is parallel; the inverse goes row by row, the net remembering what
/// it needs; in a stream, values are cut off at ±64 and NaN becomes 0, where [`Bijector::inverse`] fails.
/// `reversed` begins at the end. The net's last layer starts at zero. Kingma et al. 2016;
/// Papamakarios et al. 2017; with a transformer Zhai et al. 2024.
pub struct Autoregressive {
    by: usize,
    reversed: bool,
    /// How far from 0 the net hears.
    hears: Option<f64>,
    net: Box<dyn CondNet + Send + Sync>,
    cond: Projection,
    map: ScalarMap,
}

impl Autoregressive {
    /// A step whose `net(inputs, outputs)` is causal and hears values up to `hears` from 0, larger ones as if
    /// they were there; asks `vb` for the projection `cond` of `features` inputs, and what the map wants.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(
        (by, reversed): (usize, bool),
        (map, bound): (&MapConfig, Option<f64>),
        (net, hears): (impl FnOnce(usize, usize) -> Result<Box<dyn CondNet + Send + Sync>>, Option<f64>),
        features: usize,
        vb: VarBuilder,
    ) -> Result<Self> {
        let map = ScalarMap::new(map, bound, by, vb.pp("map"))?;
        let net = net(by, map.params_per_value() * by)?;
        let cond = Projection::new(features, net.cond_width(), false, vb.pp("cond"))?;
        Ok(Self { by, reversed, hears, net, cond, map })
    }

    /// Multiply-adds per row of values, and per row of conditioning.
    pub fn macs(&self) -> (usize, usize) {
        (self.net.macs_per_step(), self.cond.macs())
    }

    /// `[batch, steps, channels]` as `[batch, rows, by]` in the order of the step.
    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, steps, channels) = x.dims3()?;
        let rows = x.contiguous()?.reshape((batch, steps * channels / self.by, self.by))?;
        // the values of a row keep their order
        if self.reversed { rows.flip(&[1]) } else { Ok(rows) }
    }

    /// [`Autoregressive::rows`] undone.
    fn steps(&self, rows: &Tensor, shape: (usize, usize, usize)) -> Result<Tensor> {
        let rows = if self.reversed { rows.flip(&[1])? } else { rows.clone() };
        rows.reshape(shape)
    }

    /// What is known of the mel, in the order of the step. Between rows it is interpolated evenly, so that turned
    /// around it stands where the step's rows do.
    fn cond(&self, cond: &Cond) -> Result<Cond> {
        let rows = if self.reversed { cond.rows.flip(&[1])? } else { cond.rows.clone() };
        Ok(Cond { rows, ..*cond })
    }

    /// How far from 0 the net hears, in the inverse.
    fn hears(&self) -> f32 {
        self.hears.map_or(f32::MAX, |most| most as f32)
    }

    /// Forward, with ln f′ of each value; both as `x`.
    fn transform(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let rows = self.rows(x)?;
        let params = self.net.forward(&heard(&rows, self.hears)?, self.cond(cond)?.of(&self.cond))?;
        let (z, log_slope) = self.map.forward(&rows, &params)?;
        Ok((self.steps(&z, x.dims3()?)?, self.steps(&log_slope, x.dims3()?)?))
    }
}

/// The row before each, `[batch, rows, values]`, zeros before the first; values up to `most` from 0.
fn heard(rows: &Tensor, most: Option<f64>) -> Result<Tensor> {
    if !rows.device().is_cpu() {
        return heard_graph(rows, most);
    }
    rows.contiguous()?.apply_op1(Heard { most: most.map_or(f32::INFINITY, |most| most as f32) })
}

/// The definition of [`heard`] in tensor operations of any device.
fn heard_graph(rows: &Tensor, most: Option<f64>) -> Result<Tensor> {
    let before = rows.pad_with_zeros(1, 1, 0)?.narrow(1, 0, rows.dim(1)?)?;
    most.map_or(Ok(before.clone()), |most| before.clamp(-most, most))
}

/// [`heard`] as one node of candle's graph.
struct Heard {
    most: f32,
}

impl CustomOp1 for Heard {
    fn name(&self) -> &'static str {
        "heard"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, count, width) = layout.shape().dims3()?;
        let rows = values(rows, layout)?;
        let mut heard = Vec::with_capacity(rows.len());
        for rows in rows.chunks_exact(count * width) {
            heard.resize(heard.len() + width, 0.0);
            heard.extend(rows[..(count - 1) * width].iter().map(|x| x.clamp(-self.most, self.most)));
        }
        Ok((CpuStorage::F32(heard), layout.shape().clone()))
    }

    fn bwd(&self, rows: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        let (_, count, width) = rows.dims3()?;
        let gradient = with_values([rows, &d.contiguous()?], |[rows, d]| {
            let mut gradient = Vec::with_capacity(rows.len());
            for (rows, d) in rows.chunks_exact(count * width).zip(d.chunks_exact(count * width)) {
                let passes = rows.iter().map(|x| f32::from(u8::from(x.abs() <= self.most)));
                gradient.extend(d[width..].iter().zip(passes).map(|(d, passes)| d * passes));
                gradient.resize(gradient.len() + width, 0.0);
            }
            gradient
        })?;
        Ok(Some(Tensor::from_vec(gradient, rows.shape(), rows.device())?))
    }
}

impl Bijector for Autoregressive {
    fn forward(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_slope) = self.transform(x, cond)?;
        Ok((z, log_slope.sum((1, 2))?))
    }

    fn forward_by_step(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let (z, log_slope) = self.transform(x, cond)?;
        Ok((z, log_slope.sum(2)?))
    }

    fn inverse(&self, z: &Tensor, cond: &Cond) -> Result<Tensor> {
        let rows = self.rows(z)?;
        let (cond, map) = (self.cond(cond)?, self.map.on_slices()?);
        let (by, hears) = (self.by, self.hears());
        let mut params = vec![0.0; self.map.params_per_value() * by];
        let mut all = Vec::with_capacity(rows.elem_count());
        for item in 0..rows.dim(0)? {
            let z: Vec<f32> = rows.get(item)?.flatten_all()?.to_vec1()?;
            let here = Cond { rows: cond.rows.narrow(0, item, 1)?, ..cond };
            let mut net = self.net.recall(here.of(&self.cond))?;
            let (mut x, mut heard) = (vec![0.0; by], vec![0.0; by]);
            for z in z.chunks_exact(by) {
                net.push(&heard, &mut params);
                for (i, (x, z)) in x.iter_mut().zip(z).enumerate() {
                    *x = map.inverse(*z, i, by, &params);
                }
                all.extend_from_slice(&x);
                heard.iter_mut().zip(&x).for_each(|(heard, x)| *heard = x.clamp(-hears, hears));
            }
        }
        // a root that isn't found is no number
        if let Some(at) = all.iter().position(|x| !x.is_finite()) {
            candle_core::bail!("the inverse has no finite value at row {}", at / by)
        }
        self.steps(&Tensor::from_vec(all, rows.shape(), z.device())?, z.dims3()?)
    }

    fn pack(&self, kernel: Kernel) -> Result<Option<Stage>> {
        if self.reversed {
            return Ok(None);
        }
        let (Some(map), Some(net)) = (self.map.pack()?, self.net.pack_recursion(&self.cond, kernel)?) else {
            return Ok(None);
        };
        Ok(Some(Stage::Autoregressive { by: self.by, map, hears: self.hears(), net: Box::new(net) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::scattered;
    use candle_core::Var;

    #[test]
    fn what_is_heard_is_what_tensor_operations_say() {
        for (count, most) in [(1, Some(1.0)), (2, None), (9, Some(1.0))] {
            let x = Var::from_tensor(&scattered(1, 2.0, (3, count, 4))).unwrap();
            let weight = scattered(2, 1.0, (3, count, 4));
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (fused, graph) = (heard(&x, most).unwrap(), heard_graph(&x, most).unwrap());
            assert_eq!(flat(&fused), flat(&graph));
            let gradient = |y: &Tensor| {
                let grads = (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
                flat(grads.get(&x).unwrap())
            };
            assert_eq!(gradient(&fused), gradient(&graph));
            assert!(count == 1 || gradient(&fused).iter().any(|d| *d != 0.0));
        }
    }
}

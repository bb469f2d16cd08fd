//! The affine map of single values as nodes of candle's graph, on the CPU.
//!
//! Tensor operations take a dozen passes over the values for it, and as many backward, with exponentials one by one.

use crate::kernels::pointwise::{couple, couple_backward, log_scales, log_scales_backward};
use crate::net::node::{values, with_values};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

/// `x` `[batch, steps, values]` by its parameters `[batch, steps, 2 · values]`, first `b` of all values, then `o` of
/// all: `x · e^log_s + b`, and `log_s`, which is `bound · tanh(o / bound)`, or `o` itself.
///
/// # Errors
/// If the shapes don't fit, or the tensors aren't f32 on the CPU.
pub fn affine(x: &Tensor, params: &Tensor, bound: Option<f64>) -> Result<(Tensor, Tensor)> {
    let ((batch, steps, count), bound) = (x.dims3()?, bound.map(|bound| bound as f32));
    if params.dims() != [batch, steps, 2 * count] {
        candle_core::bail!("affine map: parameters {:?} do not fit {:?}", params.dims(), x.dims())
    }
    let params = params.contiguous()?;
    Ok((x.contiguous()?.apply_op2(&params, Couple { bound })?, params.apply_op1(LogScale { bound })?))
}

/// One half of each row, `count` values: the first or, from `count` on, the second.
fn half(params: &[f32], count: usize, from: usize) -> Vec<f32> {
    let mut half = Vec::with_capacity(params.len() / 2);
    params.chunks_exact(2 * count).for_each(|row| half.extend_from_slice(&row[from..from + count]));
    half
}

/// Rows of both halves, of which the first may be zeros.
fn rows(b: Option<&[f32]>, o: &[f32], count: usize) -> Vec<f32> {
    let mut rows = Vec::with_capacity(2 * o.len());
    for (i, o) in o.chunks_exact(count).enumerate() {
        match b {
            Some(b) => rows.extend_from_slice(&b[i * count..][..count]),
            None => rows.resize(rows.len() + count, 0.0),
        }
        rows.extend_from_slice(o);
    }
    rows
}

struct Couple {
    bound: Option<f32>,
}

impl CustomOp2 for Couple {
    fn name(&self) -> &'static str {
        "affine map"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, params: &CpuStorage, pl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (mut z, params, count) = (values(x, xl)?.to_vec(), values(params, pl)?, xl.dims()[2]);
        couple(&mut z, &half(params, count, 0), &half(params, count, count), self.bound);
        Ok((CpuStorage::F32(z), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, params: &Tensor, _: &Tensor, dz: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let count = x.dim(2)?;
        let (dx, d_params) = with_values([x, params, &dz.contiguous()?], |[x, params, dz]| {
            let (mut o, mut dx) = (half(params, count, count), dz.to_vec());
            couple_backward(x, &mut o, &mut dx, self.bound);
            (dx, rows(Some(dz), &o, count))
        })?;
        let device = x.device();
        Ok((Some(Tensor::from_vec(dx, x.shape(), device)?), Some(Tensor::from_vec(d_params, params.shape(), device)?)))
    }
}

struct LogScale {
    bound: Option<f32>,
}

impl CustomOp1 for LogScale {
    fn name(&self) -> &'static str {
        "log scale"
    }

    fn cpu_fwd(&self, params: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, steps, both) = layout.shape().dims3()?;
        let mut log_s = half(values(params, layout)?, both / 2, both / 2);
        log_scales(&mut log_s, self.bound);
        Ok((CpuStorage::F32(log_s), (batch, steps, both / 2).into()))
    }

    fn bwd(&self, params: &Tensor, log_s: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        let count = log_s.dim(2)?;
        let d_params = with_values([log_s, &d.contiguous()?], |[log_s, d]| {
            let mut d = d.to_vec();
            if let Some(bound) = self.bound {
                log_scales_backward(log_s, &mut d, bound);
            }
            rows(None, &d, count)
        })?;
        Ok(Some(Tensor::from_vec(d_params, params.shape(), params.device())?))
    }
}

//! Invertible 1×1 convolution.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::net::wavenet::matmul;
use candle_core::{Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

/// Mixes channels by an invertible matrix: `z[t] = W x[t]`.
///
/// log_det = steps · log|det W|, `[batch]`, nats. Kingma & Dhariwal 2018, §3.2; the matrix is
/// free (as in WaveGlow) and starts as a random rotation.
pub struct Mix {
    weight: Tensor,
}

impl Mix {
    /// Asks `vb` for `weight`, `[channels, channels]`.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints((channels, channels), "weight", Init::Randn { mean: 0.0, stdev: 1.0 })? })
    }

    /// The inverse matrix and log|det W|.
    fn solve(&self) -> Result<(Tensor, f64)> {
        let n = self.weight.dim(0)?;
        let values: Vec<f32> = self.weight.flatten_all()?.to_vec1()?;
        let Some((inverse, log_det)) = invert(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), n) else {
            candle_core::bail!("mix: the {n}×{n} matrix is singular or not finite")
        };
        let inverse: Vec<f32> = inverse.into_iter().map(|v| v as f32).collect();
        Ok((Tensor::from_vec(inverse, (n, n), self.weight.device())?, log_det))
    }
}

impl Bijector for Mix {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, steps, _) = x.dims3()?;
        let (inverse, log_det) = self.solve()?;
        // d log|det W| / dW = W⁻ᵀ: a term of value zero carries that gradient
        let carrier = ((&self.weight - self.weight.detach())? * inverse.t()?)?.sum_all()?;
        let log_det = (carrier + log_det)?.affine(steps as f64, 0.0)?;
        Ok((matmul(&x.contiguous()?, &self.weight.t()?)?, log_det.broadcast_as(batch)?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        matmul(&z.contiguous()?, &self.solve()?.0.t()?)
    }

    fn pack(&self) -> Result<Option<Stage>> {
        Ok(Some(Stage::Mix { matrix: self.solve()?.0.t()?.flatten_all()?.to_vec1()? }))
    }

    /// Replaces the drawn matrix by a rotation: Gram–Schmidt on its rows, determinant made positive.
    fn initialise(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let n = self.weight.dim(0)?;
        let drawn: Vec<f32> = self.weight.flatten_all()?.to_vec1()?;
        let mut rows: Vec<Vec<f64>> =
            drawn.chunks_exact(n).map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect();
        for i in 0..n {
            let (done, rest) = rows.split_at_mut(i);
            let row = &mut rest[0];
            for other in done.iter() {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v /= norm);
        }
        let flat: Vec<f64> = rows.concat();
        let sign = determinant_sign(&flat, n);
        let values: Vec<f32> =
            flat.iter().enumerate().map(|(i, &v)| (if i < n { v * sign } else { v }) as f32).collect();
        Var::from_tensor(&self.weight)?.set(&Tensor::from_vec(values, (n, n), x.device())?)?;
        self.forward(x, cond)
    }
}

/// LU with partial pivoting: the row order, the packed factors, and the permutation's sign.
fn lu(matrix: &[f64], n: usize) -> Option<(Vec<usize>, Vec<f64>, f64)> {
    let mut a = matrix.to_vec();
    let mut order: Vec<usize> = (0..n).collect();
    let mut sign = 1.0;
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i * n + k].abs().total_cmp(&a[j * n + k].abs()))?;
        if !a[pivot * n + k].is_finite() || a[pivot * n + k] == 0.0 {
            return None;
        }
        if pivot != k {
            (0..n).for_each(|j| a.swap(k * n + j, pivot * n + j));
            order.swap(k, pivot);
            sign = -sign;
        }
        for i in k + 1..n {
            let factor = a[i * n + k] / a[k * n + k];
            a[i * n + k] = factor;
            for j in k + 1..n {
                a[i * n + j] -= factor * a[k * n + j];
            }
        }
    }
    Some((order, a, sign))
}

fn determinant_sign(matrix: &[f64], n: usize) -> f64 {
    lu(matrix, n).map_or(1.0, |(_, a, sign)| (0..n).fold(sign, |s, i| s * a[i * n + i].signum()))
}

/// The inverse and log|det| of a row-major matrix, in f64; `None` if it has no inverse.
///
/// The absolute value makes a negative determinant harmless (the reference takes its logarithm).
pub fn invert(matrix: &[f64], n: usize) -> Option<(Vec<f64>, f64)> {
    let (order, a, _) = lu(matrix, n)?;
    let log_det = (0..n).map(|i| a[i * n + i].abs().ln()).sum();
    let mut inverse = vec![0.0; n * n];
    for column in 0..n {
        let mut y = vec![0.0; n];
        for i in 0..n {
            let unit = f64::from(u8::from(order[i] == column));
            y[i] = unit - (0..i).map(|j| a[i * n + j] * y[j]).sum::<f64>();
        }
        for i in (0..n).rev() {
            y[i] = (y[i] - (i + 1..n).map(|j| a[i * n + j] * y[j]).sum::<f64>()) / a[i * n + i];
            inverse[i * n + column] = y[i];
        }
    }
    Some((inverse, log_det))
}

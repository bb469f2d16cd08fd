//! Invertible 1×1 convolution.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::kernels::choice::Kernel;
use crate::kernels::product::{Matrix, Panels};
use crate::net::wavenet::matmul;
use candle_core::{Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use std::sync::Mutex;

/// Mixes channels by an invertible matrix: `z[t] = W x[t]`.
///
/// log_det = steps · log|det W|, `[batch]`, nats. Kingma & Dhariwal 2018, §3.2; the matrix is
/// free (as in WaveGlow) and starts as a random rotation.
pub struct Mix {
    weight: Tensor,
    /// The last inverse, for the weight that it belongs to: with 256 channels, finding it costs more
    /// than a block of sound.
    solved: Mutex<Option<Solved>>,
}

struct Solved {
    weight: Vec<f32>,
    inverse: Tensor,
    log_det: f64,
}

impl Mix {
    /// Asks `vb` for `weight`, `[channels, channels]`.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((channels, channels), "weight", Init::Randn { mean: 0.0, stdev: 1.0 })?;
        Ok(Self { weight, solved: Mutex::new(None) })
    }

    /// The inverse matrix and log|det W|.
    fn solve(&self) -> Result<(Tensor, f64)> {
        let n = self.weight.dim(0)?;
        let values: Vec<f32> = self.weight.flatten_all()?.to_vec1()?;
        let mut slot = self.solved.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(solved) = slot.as_ref().filter(|solved| solved.weight == values) {
            return Ok((solved.inverse.clone(), solved.log_det));
        }
        let Some((inverse, log_det)) = invert(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), n) else {
            candle_core::bail!("mix: the {n}×{n} matrix is singular or not finite")
        };
        let inverse: Vec<f32> = inverse.into_iter().map(|v| v as f32).collect();
        let inverse = Tensor::from_vec(inverse, (n, n), self.weight.device())?;
        *slot = Some(Solved { weight: values, inverse: inverse.clone(), log_det });
        Ok((inverse, log_det))
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

    fn pack(&self, kernel: Kernel) -> Result<Option<Stage>> {
        let matrix: Vec<f32> = self.solve()?.0.t()?.flatten_all()?.to_vec1()?;
        let channels = self.weight.dim(0)?;
        let matrix = Panels::new(kernel, channels, &vec![0.0; channels], &[Matrix::new(&matrix, channels)]);
        Ok(Some(Stage::Mix { matrix }))
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
    // all columns at once, in row order: L Y = P, then U X = Y
    let mut x = vec![0.0; n * n];
    for (i, &row) in order.iter().enumerate() {
        x[i * n + row] = 1.0;
        for j in 0..i {
            let (done, rest) = x.split_at_mut(i * n);
            subtract(&mut rest[..n], a[i * n + j], &done[j * n..][..n]);
        }
    }
    for i in (0..n).rev() {
        for j in i + 1..n {
            let (rest, done) = x.split_at_mut(j * n);
            subtract(&mut rest[i * n..][..n], a[i * n + j], &done[..n]);
        }
        x[i * n..][..n].iter_mut().for_each(|v| *v /= a[i * n + i]);
    }
    Some((x, log_det))
}

/// `row -= factor · other`.
fn subtract(row: &mut [f64], factor: f64, other: &[f64]) {
    row.iter_mut().zip(other).for_each(|(row, other)| *row -= factor * other);
}

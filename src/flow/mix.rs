//! Invertible 1×1 convolution.

use super::stream::Stage;
use super::{Bijector, Cond};
use crate::kernels::choice::Kernel;
use crate::kernels::product::{Matrix, Panels};
use crate::net::wavenet::matmul;
use candle_core::{Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// How a mix holds its matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixForm {
    /// As it is, free to become anything but singular (WaveGlow).
    #[default]
    Direct,
    /// `W = P L (U + diag(sign · e^s))`: a permutation and signs that stay, unit triangular `L`, strictly
    /// upper `U` (Glow). log|det W| = Σ s costs nothing and the matrix can't become singular.
    Plu,
}

/// Mixes channels by an invertible matrix: `z[t] = W x[t]`.
///
/// log_det = steps · log|det W|, `[batch]`, nats. Kingma & Dhariwal 2018, §3.2; starts as a random
/// rotation.
pub struct Mix {
    /// The matrix; or its factors, `L` below the diagonal, `s` on it, `U` above.
    weight: Tensor,
    plu: Option<Plu>,
    /// The last inverse, for the matrix that it belongs to: with 256 channels, finding it costs more
    /// than a block of sound.
    solved: Mutex<Option<Solved>>,
}

/// What training leaves alone in a factored matrix, `[channels]` each.
struct Plu {
    /// Row `i` of `L (U + …)` is row `i + moves[i]` of the matrix.
    moves: Tensor,
    /// ±1, less one: 0 or −2, so that zeros are a valid beginning.
    flips: Tensor,
}

struct Solved {
    matrix: Vec<f32>,
    inverse: Tensor,
    log_det: f64,
}

impl Mix {
    /// Asks `vb` for `weight`, `[channels, channels]`, and in factored form for `moves` and `flips`.
    pub fn new(channels: usize, form: MixForm, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((channels, channels), "weight", Init::Randn { mean: 0.0, stdev: 1.0 })?;
        let fixed = |name: &str| vb.get_with_hints(channels, name, Init::Const(0.0));
        let plu = match form {
            MixForm::Direct => None,
            MixForm::Plu => Some(Plu { moves: fixed("moves")?, flips: fixed("flips")? }),
        };
        Ok(Self { weight, plu, solved: Mutex::new(None) })
    }

    /// `W`.
    fn matrix(&self) -> Result<Tensor> {
        let Some(plu) = &self.plu else { return Ok(self.weight.clone()) };
        let n = self.weight.dim(0)?;
        let mask = |keep: &dyn Fn(usize, usize) -> bool| {
            let values: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(keep(i / n, i % n)))).collect();
            Tensor::from_vec(values, (n, n), self.weight.device())
        };
        let unit = mask(&|i, j| i == j)?;
        let lower = ((&self.weight * mask(&|i, j| j < i)?)? + &unit)?;
        let diagonal = (self.log_diagonal()?.exp()? * (&plu.flips.detach() + 1.0)?.round()?)?;
        let upper = ((&self.weight * mask(&|i, j| j > i)?)? + unit.broadcast_mul(&diagonal)?)?;
        let mut targets = vec![n; n];
        for (i, moves) in plu.moves.to_vec1::<f32>()?.into_iter().enumerate() {
            let row = (i as f32 + moves).round();
            // what is no row is found out below; a float's cast saturates
            if row >= 0.0
                && let Some(target) = targets.get_mut(row as usize)
            {
                *target = i;
            }
        }
        if targets.contains(&n) {
            candle_core::bail!("mix: its moves are no permutation of {n} rows")
        }
        mask(&|i, j| targets[i] == j)?.matmul(&lower.matmul(&upper)?)
    }

    fn log_diagonal(&self) -> Result<Tensor> {
        let n = self.weight.dim(0)?;
        let places = Tensor::from_vec((0..n as u32).map(|i| i * (n as u32 + 1)).collect(), n, self.weight.device())?;
        self.weight.flatten_all()?.index_select(&places, 0)
    }

    /// The inverse matrix and log|det W|.
    fn solve(&self, matrix: &Tensor) -> Result<(Tensor, f64)> {
        let n = matrix.dim(0)?;
        let values: Vec<f32> = matrix.flatten_all()?.to_vec1()?;
        let mut slot = self.solved.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(solved) = slot.as_ref().filter(|solved| solved.matrix == values) {
            return Ok((solved.inverse.clone(), solved.log_det));
        }
        let Some((inverse, log_det)) = invert(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), n) else {
            candle_core::bail!("mix: the {n}×{n} matrix is singular or not finite")
        };
        let inverse: Vec<f32> = inverse.into_iter().map(|v| v as f32).collect();
        let inverse = Tensor::from_vec(inverse, (n, n), matrix.device())?;
        *slot = Some(Solved { matrix: values, inverse: inverse.clone(), log_det });
        Ok((inverse, log_det))
    }

    fn inverse_matrix(&self) -> Result<Tensor> {
        Ok(self.solve(&self.matrix()?)?.0)
    }
}

impl Bijector for Mix {
    fn forward(&self, x: &Tensor, _: &Cond) -> Result<(Tensor, Tensor)> {
        let (batch, steps, _) = x.dims3()?;
        let matrix = self.matrix()?;
        let log_det = if self.plu.is_some() {
            self.log_diagonal()?.sum_all()?
        } else {
            let (inverse, log_det) = self.solve(&matrix)?;
            // d log|det W| / dW = W⁻ᵀ: a term of value zero carries that gradient
            (((&matrix - matrix.detach())? * inverse.t()?)?.sum_all()? + log_det)?
        };
        let log_det = log_det.affine(steps as f64, 0.0)?;
        Ok((matmul(&x.contiguous()?, &matrix.t()?)?, log_det.broadcast_as(batch)?))
    }

    fn inverse(&self, z: &Tensor, _: &Cond) -> Result<Tensor> {
        let matrix = self.matrix()?;
        let inverse = self.solve(&matrix)?.0;
        // dW⁻¹ = −W⁻¹ dW W⁻¹: Newton's correction of the inverse has its value and that gradient
        let correction = inverse.matmul(&matrix.matmul(&inverse)?)?;
        matmul(&z.contiguous()?, &((inverse * 2.0)? - correction)?.t()?)
    }

    fn pack(&self, kernel: Kernel) -> Result<Option<Stage>> {
        let matrix = self.inverse_matrix()?.t()?;
        let (channels, values) = (matrix.dim(0)?, matrix.flatten_all()?.to_vec1::<f32>()?);
        let matrix = Panels::new(kernel, channels, &vec![0.0; channels], &[Matrix::new(&values, channels)]);
        Ok(Some(Stage::Mix { matrix }))
    }

    /// Replaces the drawn matrix by a rotation: Gram–Schmidt on its rows, determinant made positive.
    fn initialise(&self, x: &Tensor, cond: &Cond) -> Result<(Tensor, Tensor)> {
        let n = self.weight.dim(0)?;
        let drawn: Vec<f32> = self.weight.flatten_all()?.to_vec1()?;
        let set = |tensor: &Tensor, values: Vec<f32>| {
            Var::from_tensor(tensor)?.set(&Tensor::from_vec(values, tensor.shape(), x.device())?)
        };
        let rotation = rotation(&drawn, n);
        match &self.plu {
            None => set(&self.weight, rotation.iter().map(|&v| v as f32).collect())?,
            Some(plu) => {
                let Some((order, factors, _)) = lu(&rotation, n) else {
                    candle_core::bail!("mix: the {n}×{n} matrix is singular or not finite")
                };
                let is_diagonal = |i: usize| i % n == i / n;
                // U's rows are not scaled to a unit diagonal: they stand beside it as they are
                let packed = factors.iter().enumerate();
                let packed = packed.map(|(i, &v)| if is_diagonal(i) { v.abs().ln() as f32 } else { v as f32 });
                set(&self.weight, packed.collect())?;
                set(&plu.moves, order.iter().enumerate().map(|(i, &row)| row as f32 - i as f32).collect())?;
                set(&plu.flips, (0..n).map(|i| factors[i * n + i].signum() as f32 - 1.0).collect())?;
            }
        }
        self.forward(x, cond)
    }
}

/// The rotation that Gram and Schmidt make of the rows of a matrix, row-major.
fn rotation(drawn: &[f32], n: usize) -> Vec<f64> {
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
    flat.iter().enumerate().map(|(i, &v)| if i < n { v * sign } else { v }).collect()
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

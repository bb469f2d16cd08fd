//! Products of training passes: `out += a · b`, in f32, or of factors rounded to bf16 and added up in f32.
//!
//! Here both factors change from step to step, so both are packed for each product: `b` into the panels of
//! `bfloat.rs`, `a` into rows of bf16, transposed on the way where a view is.

use super::bfloat::BfloatPanels;
use super::choice::Kernel;
use super::product::Start;
use super::quantise::{Input, Numbers, bfloat, to_bfloats};
use super::{Strides, matmul_add};

/// How products are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In f32, on the `gemm` crate.
    #[default]
    Floats,
    /// Both factors rounded to bf16, on these kernels: in tiles where they have them (Intel AMX).
    Bfloats(Kernel),
}

impl Products {
    /// `out[m, n] += a[m, k] · b[k, n]`, one thread; the rows of `out` have their values side by side.
    ///
    /// # Panics
    /// If a view doesn't lie within its slice.
    pub(super) fn add(
        self,
        (m, k, n): (usize, usize, usize),
        a: (&[f32], Strides),
        b: (&[f32], Strides),
        out: (&mut [f32], Strides),
    ) {
        let kernel = match self {
            Self::Floats => return matmul_add((m, k, n), a, b, out),
            Self::Bfloats(kernel) => kernel,
        };
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        assert!(out.1.column == 1 && a.0.len() >= a.1.end(m, k) && b.0.len() >= b.1.end(k, n));
        let (rows, scales) = (rows((m, k), a), vec![1.0; m]);
        let input = [Input::rows(Numbers::Bfloats, &rows, &scales, k)];
        BfloatPanels::of_view(kernel, (k, n), b).product(m, &input, Start::Answer, (out.0, out.1.row));
    }
}

/// A view's rows in bf16, [`Numbers::stride`] apart.
fn rows((m, k): (usize, usize), (values, strides): (&[f32], Strides)) -> Vec<i16> {
    /// Rows of a transposed view that are written together: a line of the cache holds as many of its values.
    const TOGETHER: usize = 16;
    let stride = Numbers::Bfloats.stride(k);
    let mut rows = vec![0; m * stride];
    if strides.column == 1 {
        for (i, row) in rows.chunks_exact_mut(stride).enumerate() {
            to_bfloats(&values[i * strides.row..][..k], k, row);
        }
    } else {
        for (block, rows) in rows.chunks_mut(TOGETHER * stride).enumerate() {
            for j in 0..k {
                for (i, row) in rows.chunks_exact_mut(stride).enumerate() {
                    row[j] = bfloat(values[(block * TOGETHER + i) * strides.row + j * strides.column]);
                }
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn products_are_those_of_rounded_factors() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 31, 33), (34, 66, 65), (2, 100, 16)] {
            // each factor as it lies and transposed, in rows that are longer than they need be
            for (a_turned, b_turned) in [(false, false), (true, false), (false, true), (true, true)] {
                let view = |rows: usize, columns: usize, turned: bool| {
                    if turned { Strides::rows(rows + 2).t() } else { Strides::rows(columns + 3) }
                };
                let (a, b) = (view(m, k, a_turned), view(k, n, b_turned));
                let (a_values, b_values) = (some(a.end(m, k), 1), some(b.end(k, n), 2));
                let before = some((m - 1) * (n + 1) + n, 3);
                let rounded = |x: f32| half::bf16::from_f32(x).to_f64();
                let at = |values: &[f32], s: Strides, i: usize, j: usize| rounded(values[i * s.row + j * s.column]);
                for kernel in Kernel::tested(m * k * n) {
                    let mut out = before.clone();
                    let products = Products::Bfloats(kernel);
                    products.add((m, k, n), (&a_values, a), (&b_values, b), (&mut out, Strides::rows(n + 1)));
                    for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                        let (row, column) = (i / (n + 1), i % (n + 1));
                        if column == n {
                            assert!(out == before, "a value between the rows is changed");
                            continue;
                        }
                        let terms = (0..k).map(|j| at(&a_values, a, row, j) * at(&b_values, b, j, column));
                        let sum = f64::from(*before) + terms.sum::<f64>();
                        let error = (f64::from(*out) - sum).abs();
                        assert!(error < 1e-6 * (k as f64 + 2.0), "{}, {m}×{k}×{n}: {error}", kernel.name());
                    }
                }
            }
        }
    }
}

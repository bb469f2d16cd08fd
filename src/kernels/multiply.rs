//! Products of training passes, in f32, or of factors rounded to bf16 and added up in f32.
//!
//! Here both factors change from step to step, so the right one is packed for each product, into the panels of
//! `product.rs` or `bfloat.rs`; the rows on the left are read as they lie, a convolution's taps some rows further on:
//!
//! ```text
//!  layer:      before gate  =  bias + features · P + h(t) · W₀ + h(t + d) · W₁ + …     one sum in registers
//!  gradients:  of h         =  d(t) · Wₙᵀ + d(t + d) · Wₙ₋₁ᵀ + …                        the same, turned round
//!              of W₀, W₁    =  Σₜ h(t)ᵀ · d(t), …                                       d packed once for all of them
//!              of P         =  Σₜ features(t)ᵀ · d(t)                                   of all layers at once
//! ```
//!
//! Rows before the first step and after the last are zeros that stand there.

use super::bfloat::BfloatPanels;
use super::choice::Kernel;
use super::product::{self, Panels, Start};
use super::quantise::{self, CHUNK, Numbers, to_bfloats};
use super::{Strides, View};

/// Values of the rows of a product that lie in the cache together.
const AT_ONCE: usize = 1 << 15;
/// Rows that a product takes at least, and a multiple of what it takes.
const ROWS: usize = 48;
/// Steps of a sum that are packed together: few enough for a panel of them to lie in the first cache.
const STEPS: usize = 256;

/// How products are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// In f32.
    Floats(Kernel),
    /// Both factors rounded to bf16, by the kernels' instructions for it where they have them (AVX512_BF16, Intel AMX).
    Bfloats(Kernel),
}

/// In f32, on the fastest kernels that run here.
impl Default for Products {
    fn default() -> Self {
        Self::Floats(Kernel::fastest())
    }
}

/// Rows that products meet: as they lie, and rounded if that is how products are done.
pub(super) struct Rows<'a> {
    values: &'a [f32],
    width: usize,
    short: Option<Rounded>,
}

/// Rows in bf16.
pub(super) struct Rounded {
    /// `stride` apart, and a chunk behind the last.
    values: Vec<i16>,
    stride: usize,
    /// A one for each.
    scales: Vec<f32>,
}

impl Rounded {
    /// Rows of `width` values one after the other.
    fn new(rows: &[f32], width: usize) -> Self {
        let (count, stride) = (rows.len() / width, Numbers::Bfloats.stride(width));
        let mut values = vec![0; count * stride + CHUNK];
        to_bfloats(rows, width, &mut values[..count * stride]);
        Self { values, stride, scales: vec![1.0; count] }
    }

    /// Rows from `first` on, of each `width` values from `column` on.
    fn input(&self, first: usize, column: usize, width: usize) -> quantise::Input<'_> {
        let values = &self.values[first * self.stride + column..];
        let stride = self.stride;
        quantise::Input { stride, ..quantise::Input::rows(Numbers::Bfloats, values, &self.scales, width) }
    }
}

/// Columns of rows, as products meet them.
pub(super) enum Columns<'a> {
    /// Where they lie, in rows of so many values.
    Floats(&'a [f32], usize),
    /// One after the other.
    Bfloats(Rounded),
}

/// Rows from `first` on, and for each of their taps the matrix that it meets, `[width, n]`.
pub(super) struct Term<'a> {
    pub rows: &'a Rows<'a>,
    pub first: usize,
    /// Rows from one tap to the next.
    pub dilation: usize,
    pub matrices: Vec<View<'a>>,
}

impl<'a> Term<'a> {
    /// Rows that meet one matrix.
    pub fn new(rows: &'a Rows<'a>, matrix: View<'a>) -> Self {
        Self { rows, first: 0, dilation: 0, matrices: vec![matrix] }
    }

    /// The input of a product of its rows from `from` on.
    fn of_f32(&self, from: usize) -> product::Input<'a> {
        let (width, taps, dilation) = (self.rows.width, self.matrices.len(), self.dilation);
        let rows = product::Input::rows(&self.rows.values[(self.first + from) * width..], width);
        product::Input { taps, dilation, ..rows }
    }

    /// The same, rounded.
    fn of_bf16(&self, from: usize) -> quantise::Input<'a> {
        let (width, taps, dilation) = (self.rows.width, self.matrices.len(), self.dilation);
        let rounded = self.rows.short.as_ref().expect("rows made for these products");
        quantise::Input { taps, dilation, ..rounded.input(self.first + from, 0, width) }
    }
}

impl Products {
    /// Rows of `width` values one after the other, as these products want them.
    pub(super) fn rows(self, values: &[f32], width: usize) -> Rows<'_> {
        let short = matches!(self, Self::Bfloats(_)).then(|| Rounded::new(values, width));
        Rows { values, width, short }
    }

    /// The columns of rows of `width` values one after the other.
    pub(super) fn columns(self, values: &[f32], width: usize) -> Columns<'_> {
        match self {
            Self::Floats(_) => Columns::Floats(values, width),
            Self::Bfloats(_) => Columns::Bfloats(Rounded::new(&transposed(values, width), values.len() / width)),
        }
    }

    /// `out[count, n]` = the bias, or without one what stands there, plus all terms; one thread. The rows of `out` have
    /// their values side by side, `out.1` apart.
    ///
    /// # Panics
    /// If a view doesn't lie within its slice.
    pub(super) fn sum(
        self,
        (count, n): (usize, usize),
        bias: Option<&[f32]>,
        terms: &[Term],
        (out, stride): (&mut [f32], usize),
    ) {
        let matrices: Vec<_> = terms.iter().flat_map(|t| t.matrices.iter().map(|&view| (t.rows.width, view))).collect();
        let start = if bias.is_some() { Start::Bias } else { Start::Answer };
        let (bias, width) = (bias.unwrap_or(&[]), terms.iter().map(|term| term.rows.width).sum());
        match self {
            Self::Floats(kernel) => {
                let panels = Panels::of_views(kernel, n, bias, &matrices);
                in_pieces(width, count, |from, some| {
                    let inputs: Vec<_> = terms.iter().map(|term| term.of_f32(from)).collect();
                    panels.product(some, &inputs, start, (&mut out[from * stride..], stride));
                });
            }
            Self::Bfloats(kernel) => {
                let panels = BfloatPanels::of_views(kernel, n, bias, &matrices);
                in_pieces(width, count, |from, some| {
                    let inputs: Vec<_> = terms.iter().map(|term| term.of_bf16(from)).collect();
                    panels.product(some, &inputs, start, (&mut out[from * stride..], stride));
                });
            }
        }
    }

    /// Rows `[steps, n]`, to be summed up with others'.
    pub(super) fn sums(self, (steps, n): (usize, usize), rows: &[f32]) -> Sums {
        let parts = (0..steps).step_by(STEPS).map(|first| {
            let rows = (&rows[first * n..], Strides::rows(n));
            (STEPS.min(steps - first), rows)
        });
        match self {
            Self::Floats(kernel) => Sums::Floats(parts.map(|part| Panels::of_views(kernel, n, &[], &[part])).collect()),
            Self::Bfloats(kernel) => {
                Sums::Bfloats(parts.map(|part| BfloatPanels::of_views(kernel, n, &[], &[part])).collect())
            }
        }
    }
}

/// What [`Products::sums`] has packed, [`STEPS`] after the other.
pub(super) enum Sums {
    Floats(Vec<Panels>),
    Bfloats(Vec<BfloatPanels>),
}

impl Sums {
    /// `out[m, n] += Σₜ columns[m, from + t] · rows[t, n]`, one thread; `columns` made for the same products, `out` with
    /// what lies between two of its rows.
    ///
    /// # Panics
    /// If `columns` are others' or too short, or `out` has too few values.
    pub(super) fn add(&self, m: usize, columns: &Columns, mut from: usize, (out, stride): (&mut [f32], usize)) {
        match (self, columns) {
            (Self::Floats(parts), &Columns::Floats(values, width)) => {
                for panels in parts {
                    let depth = panels.depth();
                    in_pieces(depth, m, |first, some| {
                        let rows = product::Input::rows(&values[from * width + first..], depth);
                        let rows = product::Input { stride: 1, step: width, ..rows };
                        panels.product(some, &[rows], Start::Answer, (&mut out[first * stride..], stride));
                    });
                    from += depth;
                }
            }
            (Self::Bfloats(parts), Columns::Bfloats(columns)) => {
                for panels in parts {
                    let depth = panels.depth();
                    in_pieces(depth, m, |first, some| {
                        let rows = columns.input(first, from, depth);
                        panels.product(some, &[rows], Start::Answer, (&mut out[first * stride..], stride));
                    });
                    from += depth;
                }
            }
            _ => unreachable!("columns are made for the products that meet them"),
        }
    }
}

/// A product of so many rows, as many of them at once as the cache holds: the first, and how many.
fn in_pieces(width: usize, count: usize, mut product: impl FnMut(usize, usize)) {
    let at_once = (AT_ONCE / width.max(1)).next_multiple_of(ROWS);
    for first in (0..count).step_by(at_once) {
        product(first, at_once.min(count - first));
    }
}

/// Columns of a matrix of rows of `width`, one after the other.
fn transposed(rows: &[f32], width: usize) -> Vec<f32> {
    /// Rows and columns of a square that is turned at once: a line of the cache holds as many values.
    const SQUARE: usize = 16;
    let count = rows.len() / width;
    let mut out = vec![0.0; rows.len()];
    for first in (0..count).step_by(SQUARE) {
        let rows = &rows[first * width..][..SQUARE.min(count - first) * width];
        for column in (0..width).step_by(SQUARE) {
            for c in column..(column + SQUARE).min(width) {
                let out = &mut out[c * count + first..];
                rows.chunks_exact(width).zip(out).for_each(|(row, out)| *out = row[c]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::values as some;
    use super::*;

    /// All ways to do products, with what they make of a factor.
    fn ways(multiply_adds: usize) -> impl Iterator<Item = (Products, fn(f32) -> f64)> {
        let exact: fn(f32) -> f64 = f64::from;
        let rounded: fn(f32) -> f64 = |x| half::bf16::from_f32(x).to_f64();
        let both = move |kernel| [(Products::Floats(kernel), exact), (Products::Bfloats(kernel), rounded)];
        Kernel::tested(multiply_adds).flat_map(both)
    }

    #[test]
    fn a_sum_is_that_of_all_terms_and_their_taps() {
        // (count, n, widths, taps, dilation, how matrices lie)
        for (count, n, widths, taps, dilation, turned) in [
            (1, 1, [1, 1], 1, 1, false),
            (7, 5, [3, 4], 3, 2, true),
            (33, 17, [31, 2], 2, 5, false),
            (100, 65, [20, 1], 3, 1, true),
            (2 * ROWS + 1, 3, [AT_ONCE / ROWS, 2], 1, 0, false),
        ] {
            let reads = count + (taps - 1) * dilation;
            let values = widths.map(|width| some((reads + 1) * width, width));
            let matrix = |rows: usize| if turned { Strides::rows(rows + 2).t() } else { Strides::rows(n + 3) };
            let of_taps = |width: usize| -> Vec<_> {
                (0..taps).map(|tap| some(matrix(width).end(width, n), tap + width)).collect()
            };
            let weights = widths.map(of_taps);
            let before = some((count - 1) * (n + 1) + n, 3);
            let bias = some(n, 4);
            for (products, as_read) in ways(count * n * taps * (widths[0] + widths[1])) {
                let rows = [0, 1].map(|i| products.rows(&values[i], widths[i]));
                let terms = [0, 1].map(|i| {
                    let matrices = weights[i].iter().map(|w| (w.as_slice(), matrix(widths[i]))).collect();
                    Term { rows: &rows[i], first: 1, dilation, matrices }
                });
                for bias in [None, Some(bias.as_slice())] {
                    let mut out = before.clone();
                    products.sum((count, n), bias, &terms, (&mut out, n + 1));
                    for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                        let (row, column) = (i / (n + 1), i % (n + 1));
                        if column == n {
                            assert!(out == before, "a value between the rows is changed");
                            continue;
                        }
                        let mut expected = f64::from(bias.map_or(*before, |bias| bias[column]));
                        for Term { rows, matrices, .. } in &terms {
                            for (tap, (weights, strides)) in matrices.iter().enumerate() {
                                let row = &rows.values[(1 + row + tap * dilation) * rows.width..][..rows.width];
                                let column = |k: usize| weights[k * strides.row + column * strides.column];
                                let products = row.iter().enumerate().map(|(k, x)| as_read(*x) * as_read(column(k)));
                                expected += products.sum::<f64>();
                            }
                        }
                        let error = (f64::from(*out) - expected).abs();
                        let most = 1e-6 * (taps * (widths[0] + widths[1]) + 2) as f64;
                        assert!(error < most, "{products:?}, {count}×{n}, {widths:?}: {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn sums_over_steps_are_of_columns_and_rows() {
        for (m, steps, n) in [(1, 1, 1), (3, 5, 7), (17, STEPS + 31, 33), (2, 3 * STEPS, 16)] {
            // columns that are longer than the sum, which begins with the fourth step
            let (values, rows) = (some((steps + 5) * m, 1), some(steps * n, 2));
            let turned = transposed(&values, m);
            assert!((0..values.len()).all(|i| values[i] == turned[i % m * (steps + 5) + i / m]));
            let before = some((m - 1) * (n + 1) + n, 3);
            for (products, as_read) in ways(m * steps * n) {
                let mut out = before.clone();
                let columns = products.columns(&values, m);
                products.sums((steps, n), &rows).add(m, &columns, 3, (&mut out, n + 1));
                for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                    let (row, column) = (i / (n + 1), i % (n + 1));
                    if column == n {
                        assert!(out == before, "a value between the rows is changed");
                        continue;
                    }
                    let terms = (0..steps).map(|t| as_read(values[(t + 3) * m + row]) * as_read(rows[t * n + column]));
                    let expected = f64::from(*before) + terms.sum::<f64>();
                    let error = (f64::from(*out) - expected).abs();
                    assert!(error < 1e-6 * (steps as f64 + 2.0), "{products:?}, {m}×{steps}×{n}: {error}");
                }
            }
        }
    }
}

//! Products of training passes, in f32, or of factors rounded to bf16 and added up in f32.
//!
//! Here both factors change from step to step, so the right one is packed for each product, into the panels of
//! `product.rs` or `bfloat.rs`; the rows on the left are read as they lie, a convolution's taps some rows further on:
//!
//! ```text
//!  layer:      before gate  =  bias + features · P + h(t) · W₀ + h(t + d) · W₁ + …     one sum in registers
//!  gradients:  of h         =  d(t) · Wₙᵀ + d(t + d) · Wₙ₋₁ᵀ + …                        the same, turned round
//!              of W₀, W₁, P =  Σₜ h(t)ᵀ · d(t), …                                       d packed once for all of them
//! ```
//!
//! Rows before the first step and after the last are zeros that stand there.

use super::bfloat::BfloatPanels;
use super::choice::Kernel;
use super::product::{self, Panels, Start, reach};
use super::quantise::{Input, Numbers, to_bfloats};
use super::{Strides, View, fill_rows};

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
    /// Both factors rounded to bf16: in tiles where the kernels have them (Intel AMX).
    Bfloats(Kernel),
}

/// In f32, on the fastest kernels that run here.
impl Default for Products {
    fn default() -> Self {
        Self::Floats(Kernel::fastest())
    }
}

/// Rows, and for each of their taps the matrix that it meets, `[width, n]`.
pub(super) struct Term<'a> {
    pub rows: product::Input<'a>,
    pub matrices: Vec<View<'a>>,
}

impl<'a> Term<'a> {
    /// Rows one after the other that meet one matrix.
    pub fn new(rows: &'a [f32], width: usize, matrix: View<'a>) -> Self {
        Self { rows: product::Input::rows(rows, width), matrices: vec![matrix] }
    }
}

impl Products {
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
        let kernel = match self {
            Self::Floats(kernel) => kernel,
            Self::Bfloats(kernel) => return sum_of_bfloats(kernel, (count, n), bias, terms, (out, stride)),
        };
        let matrices: Vec<_> = terms.iter().flat_map(|t| t.matrices.iter().map(|&view| (t.rows.width, view))).collect();
        let panels = Panels::of_views(kernel, n, bias.unwrap_or(&[]), &matrices);
        let start = if bias.is_some() { Start::Bias } else { Start::Answer };
        let inputs: Vec<_> = terms.iter().map(|term| term.rows).collect();
        in_pieces(&panels, count, &inputs, start, (out, stride));
    }

    /// Rows `[steps, n]`, to be summed up with others'.
    pub(super) fn sums(self, (steps, n): (usize, usize), rows: &[f32]) -> Sums {
        let view = |first: usize| (&rows[first * n..], Strides::rows(n));
        match self {
            Self::Floats(kernel) => {
                let panels = |first| Panels::of_views(kernel, n, &[], &[(STEPS.min(steps - first), view(first))]);
                Sums::Floats((0..steps).step_by(STEPS).map(panels).collect())
            }
            Self::Bfloats(kernel) => Sums::Bfloats(steps, BfloatPanels::of_view(kernel, (steps, n), view(0))),
        }
    }
}

/// What [`Products::sums`] has packed.
pub(super) enum Sums {
    /// [`STEPS`] after the other.
    Floats(Vec<Panels>),
    /// So many steps.
    Bfloats(usize, BfloatPanels),
}

impl Sums {
    /// `out[m, n] += Σₜ columns[m, t] · rows[t, n]`, one thread; `columns` and `out` with what lies between two of
    /// their rows.
    ///
    /// # Panics
    /// If `columns` or `out` have too few values.
    pub(super) fn add(&self, m: usize, columns: (&[f32], usize), (out, stride): (&mut [f32], usize)) {
        match self {
            Self::Floats(parts) => {
                let mut rows = product::Input { stride: columns.1, ..product::Input::rows(columns.0, 0) };
                for panels in parts {
                    rows.width = panels.depth();
                    in_pieces(panels, m, &[rows], Start::Answer, (&mut *out, stride));
                    rows.rows = rows.rows.get(rows.width..).unwrap_or_default();
                }
            }
            Self::Bfloats(steps, panels) => {
                let (rows, scales) = (rows_of((m, *steps), columns), vec![1.0; m]);
                let input = [Input::rows(Numbers::Bfloats, &rows, &scales, *steps)];
                panels.product(m, &input, Start::Answer, (out, stride));
            }
        }
    }
}

/// A product of so many rows, as many of them at once as the cache holds.
fn in_pieces<'a>(
    panels: &Panels,
    count: usize,
    inputs: &[product::Input<'a>],
    start: Start,
    (out, stride): (&mut [f32], usize),
) {
    let width: usize = inputs.iter().map(|input| input.width).sum();
    let at_once = (AT_ONCE / width.max(1)).next_multiple_of(ROWS);
    for first in (0..count).step_by(at_once) {
        let further =
            |input: &product::Input<'a>| product::Input { rows: &input.rows[first * input.stride..], ..*input };
        let inputs: Vec<_> = inputs.iter().map(further).collect();
        panels.product(at_once.min(count - first), &inputs, start, (&mut out[first * stride..], stride));
    }
}

/// [`Products::sum`], tap after tap.
fn sum_of_bfloats(
    kernel: Kernel,
    (count, n): (usize, usize),
    bias: Option<&[f32]>,
    terms: &[Term],
    (out, stride): (&mut [f32], usize),
) {
    if let Some(bias) = bias {
        fill_rows(out, stride, bias);
    }
    for Term { rows, matrices } in terms {
        assert!(
            count == 0 || rows.rows.len() >= reach(count + (rows.taps - 1) * rows.dilation, rows.stride, rows.width)
        );
        let scales = vec![1.0; count];
        for (tap, &matrix) in matrices.iter().enumerate() {
            let values = &rows.rows[tap * rows.dilation * rows.stride..];
            let short = rows_of((count, rows.width), (values, rows.stride));
            let input = [Input::rows(Numbers::Bfloats, &short, &scales, rows.width)];
            let panels = BfloatPanels::of_view(kernel, (rows.width, n), matrix);
            panels.product(count, &input, Start::Answer, (&mut *out, stride));
        }
    }
}

/// Rows in bf16, [`Numbers::stride`] apart; `f32` ones so many values apart.
fn rows_of((m, k): (usize, usize), (values, apart): (&[f32], usize)) -> Vec<i16> {
    let stride = Numbers::Bfloats.stride(k);
    let mut rows = vec![0; m * stride];
    for (i, row) in rows.chunks_exact_mut(stride).enumerate() {
        to_bfloats(&values[i * apart..][..k], k, row);
    }
    rows
}

/// Columns of a matrix of rows of `width`, one after the other.
pub(super) fn transposed(rows: &[f32], width: usize) -> Vec<f32> {
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
    use super::*;

    fn some(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

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
            let values = widths.map(|width| some((reads - 1) * (width + 1) + width, width));
            let matrix = |rows: usize| if turned { Strides::rows(rows + 2).t() } else { Strides::rows(n + 3) };
            let of_taps = |width: usize| -> Vec<_> {
                (0..taps).map(|tap| some(matrix(width).end(width, n), tap + width)).collect()
            };
            let weights = widths.map(of_taps);
            let terms = [0, 1].map(|i| Term {
                rows: product::Input { rows: &values[i], stride: widths[i] + 1, width: widths[i], taps, dilation },
                matrices: weights[i].iter().map(|w| (w.as_slice(), matrix(widths[i]))).collect(),
            });
            let before = some((count - 1) * (n + 1) + n, 3);
            let bias = some(n, 4);
            for (products, as_read) in ways(count * n * taps * (widths[0] + widths[1])) {
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
                        for Term { rows, matrices } in &terms {
                            for (tap, (weights, strides)) in matrices.iter().enumerate() {
                                let row = &rows.rows[(row + tap * dilation) * rows.stride..][..rows.width];
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
            let (values, rows) = (some(steps * m, 1), some(steps * n, 2));
            let columns = transposed(&values, m);
            assert!((0..steps * m).all(|i| values[i] == columns[i % m * steps + i / m]));
            let before = some((m - 1) * (n + 1) + n, 3);
            for (products, as_read) in ways(m * steps * n) {
                let mut out = before.clone();
                products.sums((steps, n), &rows).add(m, (&columns, steps), (&mut out, n + 1));
                for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                    let (row, column) = (i / (n + 1), i % (n + 1));
                    if column == n {
                        assert!(out == before, "a value between the rows is changed");
                        continue;
                    }
                    let terms = (0..steps).map(|t| as_read(values[t * m + row]) * as_read(rows[t * n + column]));
                    let expected = f64::from(*before) + terms.sum::<f64>();
                    let error = (f64::from(*out) - expected).abs();
                    assert!(error < 1e-6 * (steps as f64 + 2.0), "{products:?}, {m}×{steps}×{n}: {error}");
                }
            }
        }
    }
}

//! [`super::product`] in bf16: f32's range and eight bits of its precision, products added up in f32.
//!
//! ```text
//!             2 L columns
//!           ┌─────────────────┐
//!  bias     │ b    b   …   b  │    f32
//!           ├─────────────────┤
//!  row 0    │ w w  w w … w w  │    a pair of weights of each column, for values 0 and 1 of the row
//!           │ w w  w w … w w  │    2 and 3
//!           │        ⋮        │    … 32 to a chunk, zeros behind the row's own
//!           ├─────────────────┤
//!  row 1    │        ⋮        │    the next tap, or the next input
//! ```
//!
//! Where the processor has tiles ([`super::amx`]), 16 lines of a chunk and 16 columns are one of them. With AVX512_BF16 a
//! pair is multiplied and added up by one instruction, in twice f32's speed. Elsewhere each pair is widened to two
//! vectors of f32: right, in half the memory, and no faster than f32.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::product::{Layout, Panels, Start, from_a_line};
use super::quantise::{Input, Numbers, bfloat};
use super::tile::{Lines, multiply_add, tiles};
use super::vector::{BfloatsInTwo, MultiplyAdd, Portable, Short};
use super::{Strides, View, choice::Kernel};
#[cfg(target_arch = "x86_64")]
use super::{
    tile::compiled,
    vector::{Avx2, Avx512, BfloatsInOne},
};
use multiversion::multiversion;
use std::marker::PhantomData;

/// How products are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the others are x86's"))]
pub(super) enum Way {
    /// Widened to f32.
    Widened,
    /// A pair by one instruction.
    Pairs,
    /// In tiles.
    Tiles,
}

impl Way {
    /// The fastest.
    fn of(kernel: Kernel) -> Self {
        match kernel {
            _ if kernel.has_tiles() => Self::Tiles,
            _ if kernel.has_bfloats() => Self::Pairs,
            _ => Self::Widened,
        }
    }
}

/// A matrix and a bias in panels of bf16.
#[derive(Debug)]
pub(crate) struct BfloatPanels {
    layout: Layout,
    /// Of each panel the bias.
    bias: Vec<f32>,
    /// Of each panel the pairs of weights, from a line of the cache on.
    pairs: Vec<i16>,
    begin: usize,
    /// Values of the rows that meet the matrix, one after the other.
    widths: Vec<usize>,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "there is but one elsewhere"))]
    way: Way,
}

impl BfloatPanels {
    /// Panels rounded; `widths`: of the rows that meet the matrix, one after the other, every tap's.
    pub fn new(panels: &Panels, widths: &[usize]) -> Self {
        let layout = panels.layout();
        let width = layout.width();
        let depth: usize = widths.iter().map(|&rows| Numbers::Bfloats.stride(rows)).sum();
        let mut bias = Vec::with_capacity(layout.panels * width);
        let (mut pairs, begin) = from_a_line::<i16>(layout.panels * depth * width);
        for lines in panels.lines() {
            let (own, mut lines) = lines.split_at(width);
            bias.extend_from_slice(own);
            for &rows in widths {
                let tap;
                (tap, lines) = lines.split_at(rows * width);
                let from = pairs.len();
                pairs.resize(from + Numbers::Bfloats.stride(rows) * width, 0);
                put_rows(&mut pairs[from..], width, rows, width, (tap, width));
            }
        }
        Self { layout, bias, pairs, begin, widths: widths.to_vec(), way: Way::of(layout.kernel) }
    }

    /// Views of so many rows, one above the other, and a bias, or without one zeros.
    ///
    /// # Panics
    /// If a view doesn't lie within its slice, or the kernel doesn't run here.
    pub fn of_views(kernel: Kernel, columns: usize, bias: &[f32], views: &[(usize, View)]) -> Self {
        assert!(views.iter().all(|(rows, view)| view.0.len() >= view.1.end(*rows, columns)));
        let layout = Layout::plain(kernel, columns);
        let (width, widths) = (layout.width(), views.iter().map(|(rows, _)| *rows).collect::<Vec<_>>());
        let depth: usize = widths.iter().map(|&rows| Numbers::Bfloats.stride(rows)).sum();
        let (mut pairs, begin) = from_a_line::<i16>(layout.panels * depth * width);
        pairs.resize(begin + layout.panels * depth * width, 0);
        for (panel, mut pairs) in pairs[begin..].chunks_exact_mut(depth * width).enumerate() {
            let columns = panel * width..columns.min((panel + 1) * width);
            for &(rows, (values, strides)) in views {
                let of_view;
                (of_view, pairs) = pairs.split_at_mut(Numbers::Bfloats.stride(rows) * width);
                let from = &values[columns.start * strides.column..];
                if strides.column == 1 {
                    put_rows(of_view, width, rows, columns.len(), (from, strides.row));
                } else {
                    put_columns(of_view, width, rows, columns.len(), (from, strides));
                }
            }
        }
        let mut own = vec![0.0; layout.panels * width];
        own.iter_mut().zip(bias).for_each(|(own, bias)| *own = *bias);
        Self { layout, bias: own, pairs, begin, widths, way: Way::of(kernel) }
    }

    /// Rows of the matrix.
    pub fn depth(&self) -> usize {
        self.widths.iter().sum()
    }

    /// As [`Panels::product`].
    ///
    /// # Panics
    /// If inputs, start or answer have too few values.
    pub fn product(&self, count: usize, inputs: &[Input], start: Start, out: (&mut [f32], usize)) {
        if count == 0 {
            return;
        }
        Input::assert_fit(inputs, Numbers::Bfloats, count, &self.widths);
        // SAFETY: the assertions, here and of the job, keep every address within its slice; panels exist only for kernels
        // that run here, and ways only where there are instructions for them.
        unsafe {
            match self.layout.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => match self.way {
                    Way::Tiles => {
                        amx::product(&self.layout.job(count, amx::Tiled::new(self.lines(inputs)), start, out));
                    }
                    Way::Pairs => avx512_bf16(&self.layout.job(count, self.lines(inputs), start, out)),
                    Way::Widened => avx512(&self.layout.job(count, self.lines(inputs), start, out)),
                },
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => avx2(&self.layout.job(count, self.lines(inputs), start, out)),
                _ => {
                    tiles::<Portable, Bfloats<BfloatsInTwo>>(&self.layout.job(count, self.lines(inputs), start, out), 0)
                }
            }
        }
    }

    /// The panels' lines, and what meets them.
    fn lines<'a, M>(&self, inputs: &'a [Input<'a>]) -> Bfloats<'a, M> {
        let pairs = &self.pairs[self.begin..];
        let size = pairs.len() / self.layout.panels;
        Bfloats { bias: self.bias.as_ptr(), pairs: pairs.as_ptr(), size, inputs, way: PhantomData }
    }
}

/// Rounds rows of `columns` values side by side, so far apart, into lines of pairs.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn put_rows(pairs: &mut [i16], width: usize, rows: usize, columns: usize, (values, apart): (&[f32], usize)) {
    let lines = pairs.chunks_exact_mut(2 * width);
    for (line, row) in lines.zip((0..rows).step_by(2)) {
        let first = &values[row * apart..][..columns];
        let line = line.as_chunks_mut::<2>().0;
        if row + 1 < rows {
            let second = &values[(row + 1) * apart..][..columns];
            for (pair, (a, b)) in line.iter_mut().zip(first.iter().zip(second)) {
                *pair = [bfloat(*a), bfloat(*b)];
            }
        } else {
            line.iter_mut().zip(first).for_each(|(pair, a)| pair[0] = bfloat(*a));
        }
    }
}

/// The same of rows whose values are apart, column by column.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn put_columns(pairs: &mut [i16], width: usize, rows: usize, columns: usize, (values, strides): (&[f32], Strides)) {
    for column in 0..columns {
        let from = &values[column * strides.column..];
        let lines = pairs.chunks_exact_mut(2 * width).zip((0..rows).step_by(2));
        for (line, row) in lines {
            let pair = &mut line[2 * column..][..2];
            pair[0] = bfloat(from[row * strides.row]);
            if row + 1 < rows {
                pair[1] = bfloat(from[(row + 1) * strides.row]);
            }
        }
    }
}

/// Panels of bf16, and the rows that meet them.
pub(super) struct Bfloats<'a, M> {
    bias: *const f32,
    pub pairs: *const i16,
    /// Values of a panel's pairs.
    pub size: usize,
    pub inputs: &'a [Input<'a>],
    way: PhantomData<M>,
}

impl<M> Bfloats<'_, M> {
    /// A panel's bias, of so many columns.
    ///
    /// # Safety
    /// The panel must be there.
    #[inline(always)]
    pub unsafe fn bias(&self, panel: usize, width: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.bias.add(panel * width) }
    }
}

impl<V: Short, M: MultiplyAdd<V, Sums = V>> Lines<V> for Bfloats<'_, M> {
    #[inline(always)]
    unsafe fn bias(&self, panel: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.bias(panel, 2 * V::LANES) }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize, const N: usize>(
        &self,
        panel: usize,
        row: usize,
        mut sums: [[V; N]; R],
    ) -> [[V; N]; R] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut weights = self.pairs.add(panel * self.size);
            for input in self.inputs {
                for tap in 0..input.taps {
                    let rows = input.values.as_ptr().add((row + tap * input.dilation) * input.stride);
                    sums = multiply_add::<V, M, R, N>(sums, rows, input.stride, input.width.div_ceil(2), weights);
                    weights = weights.add(Numbers::Bfloats.stride(input.width) * 2 * V::LANES);
                }
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
compiled!(avx2, "avx2,fma", Avx2, Bfloats<BfloatsInTwo>);
#[cfg(target_arch = "x86_64")]
compiled!(avx512, "avx512f,avx512bw", Avx512, Bfloats<BfloatsInTwo>);
#[cfg(target_arch = "x86_64")]
compiled!(avx512_bf16, "avx512f,avx512bw,avx512bf16", Avx512, Bfloats<BfloatsInOne>);

#[cfg(test)]
mod tests {
    use super::super::product::Matrix;
    use super::super::quantise::quantise;
    use super::super::short::ShortPanels;
    use super::super::testing::values;
    use super::*;

    fn rounded(x: f32) -> f64 {
        half::bf16::from_f32(x).to_f64()
    }

    fn bfloats(rows: &[f32], width: usize) -> (Vec<i16>, Vec<f32>) {
        let (count, stride) = (rows.len() / width, Numbers::Bfloats.stride(width));
        let (mut values, mut scales) = (vec![0; count * stride], vec![0.0; count]);
        quantise(Numbers::Bfloats, rows, width, &mut values, &mut scales);
        (values, scales)
    }

    /// Panels of every kernel that can be tried, in every way, and what they are.
    fn all(
        columns: usize,
        bias: &[f32],
        weights: &[f32],
        widths: &[usize],
        gated: bool,
    ) -> Vec<(String, BfloatPanels)> {
        let matrix = [Matrix::new(weights, weights.len() / widths.iter().sum::<usize>())];
        let mut all = Vec::new();
        for kernel in Kernel::tested(0).filter(|kernel| ShortPanels::exist_for(*kernel)) {
            let pack = if gated { Panels::gated } else { Panels::new };
            let panels = pack(kernel, columns, bias, &matrix);
            let ways =
                [(Way::Widened, true), (Way::Pairs, kernel.can_run_bfloats()), (Way::Tiles, kernel.can_run_tiles())];
            for (way, _) in ways.into_iter().filter(|(_, can)| *can) {
                let name = format!("{}, {way:?}", kernel.name());
                all.push((name, BfloatPanels { way, ..BfloatPanels::new(&panels, widths) }));
            }
        }
        all
    }

    /// A convolution and a second input: (rows, taps, dilation, width, second, columns).
    const SHAPES: [[usize; 6]; 9] = [
        [1, 1, 0, 1, 1, 1],
        [2, 3, 5, 3, 2, 7],
        [5, 3, 1, 8, 1, 16],
        [13, 5, 2, 10, 9, 33],
        [16, 3, 2, 32, 32, 32],
        [17, 1, 0, 31, 33, 31],
        [29, 3, 4, 17, 64, 64],
        [70, 2, 1, 65, 40, 70],
        [33, 3, 8, 100, 31, 12],
    ];

    #[test]
    fn panels_compute_what_they_stand_for() {
        for [rows, taps, dilation, width, second, columns] in SHAPES {
            let (x, y) = (values((rows + (taps - 1) * dilation) * width, 1), values(rows * second, 2));
            let widths = [vec![width; taps], vec![second]].concat();
            let (weights, bias) = (values((taps * width + second) * columns, 3), values(columns, 5));
            let (short_x, short_y) = (bfloats(&x, width), bfloats(&y, second));
            let inputs = [
                Input { taps, dilation, ..Input::rows(Numbers::Bfloats, &short_x.0, &short_x.1, width) },
                Input::rows(Numbers::Bfloats, &short_y.0, &short_y.1, second),
            ];
            let stride = columns + 3;
            let before = values(rows * stride, 6);
            for (name, panels) in all(columns, &bias, &weights, &widths, false) {
                for start in [Start::Bias, Start::Answer, Start::Rows(&before, stride)] {
                    let mut out = before.clone();
                    panels.product(rows, &inputs, start, (&mut out, stride));
                    for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                        let (t, j) = (i / stride, i % stride);
                        if j >= columns {
                            assert!(out == before, "{name}: a value behind the columns is changed");
                            continue;
                        }
                        let conv = (0..taps).flat_map(|tap| &x[(t + tap * dilation) * width..][..width]);
                        let met = conv.chain(&y[t * second..][..second]);
                        let terms = met.enumerate().map(|(k, x)| rounded(*x) * rounded(weights[k * columns + j]));
                        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                        let begun = match start {
                            Start::Bias => f64::from(bias[j]),
                            Start::Answer => f64::from(*before),
                            _ => f64::from(bias[j] + before),
                        };
                        let error = (f64::from(*out) - begun - sum).abs();
                        // f32's rounding of sums alone
                        assert!(error < 1e-6 * (size + 2.0), "{name}: row {t}, column {j} of {columns}: {error}");
                    }
                    // the bits don't depend on the company
                    for (from, to) in [(rows / 3, rows - rows / 5), (rows / 2, rows / 2 + 1)] {
                        let mut part = before[from * stride..].to_vec();
                        let some = inputs.map(|i| Input { values: &i.values[from * i.stride..], ..i });
                        let start = match start {
                            Start::Rows(rows, stride) => Start::Rows(&rows[from * stride..], stride),
                            start => start,
                        };
                        panels.product(to - from, &some, start, (&mut part, stride));
                        let wanted = &out[from * stride..to * stride];
                        assert!(part[..wanted.len()] == *wanted, "{name}: rows {from}..{to}");
                    }
                }
            }
        }
    }

    #[test]
    fn gated_panels_leave_tanh_times_sigma() {
        for (rows, channels, depth) in [(1, 1, 3), (16, 16, 32), (40, 37, 50)] {
            let width = 2 * channels;
            let (x, weights, bias) = (values(rows * depth, 1), values(depth * width, 2), values(width, 3));
            let (short, scales) = bfloats(&x, depth);
            let input = [Input::rows(Numbers::Bfloats, &short, &scales, depth)];
            for (name, panels) in all(channels, &bias, &weights, &[depth], true) {
                let mut out = vec![0.0; rows * channels];
                panels.product(rows, &input, Start::Bias, (&mut out, channels));
                for (i, out) in out.iter().enumerate() {
                    let (t, j) = (i / channels, i % channels);
                    let pre = |j: usize| {
                        let met = x[t * depth..][..depth].iter().enumerate();
                        f64::from(bias[j])
                            + met.map(|(k, x)| rounded(*x) * rounded(weights[k * width + j])).sum::<f64>()
                    };
                    let error = (f64::from(*out) - pre(j).tanh() / (1.0 + (-pre(channels + j)).exp())).abs();
                    assert!(error < 1e-5, "{name}: step {t}, channel {j} of {channels}: {error}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_in_its_rows_and_columns() {
        let (columns, depth) = (20, 6);
        let mut weights = values(depth * columns, 1);
        weights[7] = f32::NAN;
        let mut x = values(40 * depth, 2);
        (x[depth], x[38 * depth + 3]) = (f32::NAN, f32::NEG_INFINITY);
        let (short, scales) = bfloats(&x, depth);
        for (name, panels) in all(columns, &vec![0.0; columns], &weights, &[depth], false) {
            let mut out = vec![0.0; 40 * columns];
            let input = [Input::rows(Numbers::Bfloats, &short, &scales, depth)];
            panels.product(40, &input, Start::Bias, (&mut out, columns));
            for (i, out) in out.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sound = row != 1 && row != 38 && column != 7;
                assert_eq!(out.is_finite(), sound, "{name}: row {row}, column {column}: {out}");
            }
        }
    }
}

//! [`super::product`] in sixteen bits: twice the multiply-adds in an instruction, half the memory.
//!
//! Weights are quantised by column when they are packed, rows by themselves when they are made
//! ([`super::quantise`]); integers are multiplied and added exactly. A panel's lines are pairs:
//!
//! ```text
//!              2 L columns
//!            ┌─────────────────┐
//!  bias      │ b    b   …   b  │    f32
//!            ├─────────────────┤
//!  segment 0 │ w w  w w … w w  │    a pair of weights of each column: times a pair of inputs of a row
//!            │ w w  w w … w w  │    in all lanes, added up in i32
//!            │        ⋮        │
//!    scales  │ s    s   …   s  │    f32: the sums, times these and the row's scale, go to sums of f32
//!            ├─────────────────┤
//!  segment 1 │        ⋮        │
//! ```
//!
//! A segment is a row of the input, or [`SEGMENT`] of its values. Its weights' steps are chosen by
//! column so that no sum leaves i32, whatever the inputs are. As every row has one scale of its own,
//! the bits of an answer depend on its inputs alone.

use super::product::{Layout, Panels, Start, from_a_line};
use super::quantise::{Input, MOST, Numbers};
use super::tile::{Lines, pair, tiles};
use super::vector::{InTwo, MultiplyAdd, Portable, Short};
#[cfg(target_arch = "x86_64")]
use super::{
    choice::Kernel,
    tile::Job,
    vector::{Avx2, Avx512, InOne},
};
use std::marker::PhantomData;

/// Rows of a matrix whose products are added in i32: more would leave fewer bits for each weight, and
/// fewer take longer.
pub(super) const SEGMENT: usize = 256;

/// What the magnitudes of a segment's weights in a column add up to at most.
const BUDGET: u32 = i32::MAX as u32 / MOST as u32;

/// A matrix and a bias in panels of integers.
#[derive(Debug)]
pub(crate) struct IntegerPanels {
    layout: Layout,
    /// Of each panel the bias and the scales of its segments.
    scales: Vec<f32>,
    /// Of each panel the pairs of weights, from a line of the cache on.
    pairs: Vec<i16>,
    begin: usize,
    /// Values of the rows that meet the matrix, one after the other.
    widths: Vec<usize>,
    /// Whether a pair is multiplied and added up by one instruction.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the instruction is x86's"))]
    in_one: bool,
}

impl IntegerPanels {
    /// Panels quantised; `widths`: of the rows that meet the matrix, one after the other, every tap's.
    pub fn new(panels: &Panels, widths: &[usize]) -> Self {
        let layout = panels.layout();
        let width = layout.width();
        let depth: usize = segments(widths).map(|rows| rows.next_multiple_of(2)).sum();
        let (mut pairs, begin) = from_a_line::<i16>(layout.panels * depth * width);
        let mut scales = Vec::with_capacity(layout.panels * (segments(widths).count() + 1) * width);
        for lines in panels.lines() {
            let (bias, mut lines) = lines.split_at(width);
            scales.extend_from_slice(bias);
            for rows in segments(widths) {
                let segment;
                (segment, lines) = lines.split_at(rows * width);
                let steps = steps(segment, width);
                let from = pairs.len();
                pairs.resize(from + rows.next_multiple_of(2) * width, 0);
                let mut sums = vec![0; width];
                for (row, weights) in segment.chunks_exact(width).enumerate() {
                    let line = &mut pairs[from + row / 2 * 2 * width..][..2 * width];
                    for (column, (weight, step)) in weights.iter().zip(&steps).enumerate() {
                        // steps aren't positive where nothing counts, or something isn't a number
                        let integer = if *step > 0.0 { (weight / step).round() as i16 } else { 0 };
                        sums[column] += u32::from(integer.unsigned_abs());
                        line[2 * column + row % 2] = integer;
                    }
                }
                assert!(sums.into_iter().all(|sum| sum <= BUDGET), "a sum could leave i32");
                scales.extend(steps);
            }
        }
        Self { layout, scales, pairs, begin, widths: widths.to_vec(), in_one: layout.kernel.has_vnni() }
    }

    /// As [`Panels::product`].
    ///
    /// # Panics
    /// If inputs, start or answer have too few values.
    pub fn product(&self, count: usize, inputs: &[Input], start: Start, out: (&mut [f32], usize)) {
        if count == 0 {
            return;
        }
        Input::assert_fit(inputs, Numbers::Integers, count, &self.widths);
        let panels = self.layout.panels;
        let size = (self.scales.len() / panels, (self.pairs.len() - self.begin) / panels);
        let (scales, pairs) = (self.scales.as_ptr(), self.pairs[self.begin..].as_ptr());
        #[cfg(target_arch = "x86_64")]
        if self.in_one {
            let lines = Whole::<InOne> { scales, pairs, size, inputs, way: PhantomData };
            let job = self.layout.job(count, lines, start, out);
            // SAFETY: as below, and the kernels have the instruction.
            return unsafe {
                match self.layout.kernel {
                    Kernel::Avx512 => avx512_vnni(&job),
                    _ => avx2_vnni(&job),
                }
            };
        }
        let lines = Whole::<InTwo> { scales, pairs, size, inputs, way: PhantomData };
        let job = self.layout.job(count, lines, start, out);
        // SAFETY: the assertions, here and of the job, keep every address within its slice, and panels
        // exist only for kernels that run here.
        unsafe {
            match self.layout.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => avx2(&job),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => avx512(&job),
                _ => tiles::<Portable, _>(&job, 0),
            }
        }
    }
}

/// Rows of each segment.
fn segments(widths: &[usize]) -> impl Iterator<Item = usize> {
    widths.iter().flat_map(|&width| (0..width).step_by(SEGMENT).map(move |from| SEGMENT.min(width - from)))
}

/// What a step of each column's integers is worth: as little as i16 and the budget allow; NaN if a
/// weight isn't finite.
fn steps(segment: &[f32], width: usize) -> Vec<f32> {
    let (mut sums, mut most) = (vec![0.0_f64; width], vec![0.0_f32; width]);
    for weights in segment.chunks_exact(width) {
        for ((sum, most), weight) in sums.iter_mut().zip(&mut most).zip(weights) {
            *sum += f64::from(weight.abs());
            *most = most.max(weight.abs());
        }
    }
    // rounding adds half a step for each weight at most, and so less than one with the step's own
    let room = f64::from(BUDGET) - (segment.len() / width) as f64;
    let step = |(sum, most): (f64, f32)| {
        let step = (f64::from(most) / f64::from(i16::MAX)).max(sum / room) as f32;
        if !sum.is_finite() {
            f32::NAN
        } else if step.is_normal() {
            step
        } else {
            0.0
        }
    };
    sums.into_iter().zip(most).map(step).collect()
}

/// Of whole numbers.
struct Whole<'a, M> {
    scales: *const f32,
    pairs: *const i16,
    /// Values of a panel of both.
    size: (usize, usize),
    inputs: &'a [Input<'a>],
    way: PhantomData<M>,
}

impl<V: Short, M: MultiplyAdd<V>> Lines<V> for Whole<'_, M> {
    #[inline(always)]
    unsafe fn bias(&self, panel: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.scales.add(panel * self.size.0) }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize>(&self, panel: usize, row: usize, mut sums: [[V; 2]; R]) -> [[V; 2]; R] {
        let width = 2 * V::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let mut scales = <Self as Lines<V>>::bias(self, panel).add(width);
            let mut weights = self.pairs.add(panel * self.size.1);
            for input in self.inputs {
                for tap in 0..input.taps {
                    let first = row + tap * input.dilation;
                    let row_scales = input.scales.as_ptr().add(first);
                    for from in (0..input.stride).step_by(SEGMENT) {
                        let rows = input.values.as_ptr().add(first * input.stride + from);
                        let pairs = SEGMENT.min(input.stride - from) / 2;
                        let whole = multiply_add::<V, M, R>(rows, input.stride, pairs, weights);
                        let steps: [V; 2] = pair(scales);
                        for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                            let scale = V::splat(*row_scales.add(r));
                            // not fused: the same bits on every processor
                            *sums =
                                std::array::from_fn(|i| sums[i].add(V::to_floats(whole[i]).mul(steps[i].mul(scale))));
                        }
                        weights = weights.add(pairs * 2 * width);
                        scales = scales.add(width);
                    }
                }
            }
        }
        sums
    }
}

/// `Σ_k rows[r][k] · weights[k]`.
///
/// # Safety
/// The processor must have the vector's feature and the way's; `R` rows of so many pairs, `stride` apart, and for
/// each two vectors of pairs of weights must be there.
#[inline(always)]
unsafe fn multiply_add<V: Short, M: MultiplyAdd<V>, const R: usize>(
    rows: *const i16,
    stride: usize,
    pairs: usize,
    weights: *const i16,
) -> [[V::Sums; 2]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::zeros(); 2]; R];
        for k in 0..pairs {
            let weights = weights.add(k * 4 * V::LANES);
            let (a, b) = (V::load_pairs(weights), V::load_pairs(weights.add(2 * V::LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = V::splat_pair(rows.add(r * stride + 2 * k));
                *sums = [M::multiply_add(x, a, sums[0]), M::multiply_add(x, b, sums[1])];
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(job: &Job<Whole<InTwo>>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<Avx2, _>(job, 0) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avxvnni")]
unsafe fn avx2_vnni(job: &Job<Whole<InOne>>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<Avx2, _>(job, 0) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(job: &Job<Whole<InTwo>>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<Avx512, _>(job, 0) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn avx512_vnni(job: &Job<Whole<InOne>>) {
    // SAFETY: the caller's promise.
    unsafe { tiles::<Avx512, _>(job, 0) }
}

#[cfg(test)]
mod tests {
    use super::super::choice::Kernel;
    use super::super::product::{self, Matrix};
    use super::super::quantise::quantise;
    use super::super::short::ShortPanels;
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    /// Rows quantised: values and scales.
    fn integers(rows: &[f32], width: usize) -> (Vec<i16>, Vec<f32>) {
        let count = rows.len() / width;
        let (mut values, mut scales) = (vec![0; count * Numbers::Integers.stride(width)], vec![0.0; count]);
        quantise(Numbers::Integers, rows, width, &mut values, &mut scales);
        (values, scales)
    }

    fn input<'a>((values, scales): &'a (Vec<i16>, Vec<f32>), width: usize) -> Input<'a> {
        Input::rows(Numbers::Integers, values, scales, width)
    }

    /// Kernels that have a form in integers, and whether it multiplies and adds by one instruction.
    fn kernels() -> impl DoubleEndedIterator<Item = (Kernel, bool)> {
        Kernel::tested(0).filter(|kernel| ShortPanels::exist_for(*kernel)).flat_map(|kernel| {
            [false, true]
                .into_iter()
                .filter(move |in_one| !in_one || kernel.can_run_vnni())
                .map(move |way| (kernel, way))
        })
    }

    fn pack(panels: &Panels, widths: &[usize], in_one: bool) -> IntegerPanels {
        IntegerPanels { in_one, ..IntegerPanels::new(panels, widths) }
    }

    /// A convolution and a second input: (rows, taps, dilation, width, second, columns).
    const SHAPES: [[usize; 6]; 8] = [
        [1, 1, 0, 1, 1, 1],
        [2, 3, 5, 3, 2, 7],
        [5, 3, 1, 8, 1, 16],
        [13, 5, 2, 10, 9, 33],
        [29, 3, 4, 17, 64, 64],
        [70, 1, 0, 257, 640, 130],
        [7, 3, 8, 100, 31, 12],
        [4, 2, 1, 512, 5, 50],
    ];

    /// The weights of a shape, its rows, and the widths of the rows that meet the weights.
    struct Case {
        shape: [usize; 6],
        x: Vec<f32>,
        y: Vec<f32>,
        weights: Vec<f32>,
        bias: Vec<f32>,
        widths: Vec<usize>,
    }

    impl Case {
        fn all() -> impl Iterator<Item = Self> {
            SHAPES.into_iter().map(|shape| {
                let [rows, taps, dilation, width, second, columns] = shape;
                // rows of very different magnitudes
                let mut x = values((rows + (taps - 1) * dilation) * width, 1);
                x.chunks_exact_mut(width).enumerate().for_each(|(i, row)| {
                    row.iter_mut().for_each(|x| *x *= [1.0, 1e-3, 40.0][i % 3]);
                });
                let widths = [vec![width; taps], vec![second]].concat();
                let depth = taps * width + second;
                let (y, weights, bias) = (values(rows * second, 2), values(depth * columns, 3), values(columns, 5));
                Self { shape, x, y, weights, bias, widths }
            })
        }

        fn panels(&self, kernel: Kernel) -> Panels {
            let columns = self.shape[5];
            Panels::new(kernel, columns, &self.bias, &[Matrix::new(&self.weights, columns)])
        }

        fn product(&self, (kernel, in_one): (Kernel, bool), start: Start, out: &mut [f32]) {
            let [rows, taps, dilation, width, second, columns] = self.shape;
            let (x, y) = (integers(&self.x, width), integers(&self.y, second));
            let inputs = [Input { taps, dilation, ..input(&x, width) }, input(&y, second)];
            pack(&self.panels(kernel), &self.widths, in_one).product(rows, &inputs, start, (out, columns));
        }
    }

    /// The same product, number by number.
    fn reference(case: &Case, start: Start) -> Vec<f32> {
        let [rows, taps, dilation, width, second, columns] = case.shape;
        let (x, y) = (integers(&case.x, width), integers(&case.y, second));
        let mut out = Vec::new();
        for (t, column) in (0..rows).flat_map(|t| (0..columns).map(move |column| (t, column))) {
            let mut sum = case.bias[column];
            if let Start::Rows(rows, stride) = start {
                sum += rows[t * stride + column];
            }
            let met = (0..taps).map(|tap| (&x, width, t + tap * dilation)).chain([(&y, second, t)]);
            let mut first = 0;
            for (input, width, row) in met {
                for from in (0..width).step_by(SEGMENT) {
                    let count = SEGMENT.min(width - from);
                    let weights = &case.weights[(first + from) * columns..(first + from + count) * columns];
                    let step = steps(weights, columns)[column];
                    let integers = weights.iter().skip(column).step_by(columns).map(|w| (w / step).round() as i32);
                    let met = input.0[row * Numbers::Integers.stride(width) + from..].iter();
                    let whole: i32 = integers.zip(met).map(|(w, x)| w * i32::from(*x)).sum();
                    sum += whole as f32 * (step * input.1[row]);
                }
                first += width;
            }
            out.push(sum);
        }
        out
    }

    #[test]
    fn every_kernel_has_the_bits_of_the_reference() {
        for case in Case::all() {
            let [rows, .., columns] = case.shape;
            let before = values(rows * columns, 6);
            for start in [Start::Bias, Start::Rows(&before, columns)] {
                let expected = reference(&case, start);
                for kernel in kernels() {
                    let mut out = vec![0.0; rows * columns];
                    case.product(kernel, start, &mut out);
                    assert!(out == expected, "{kernel:?}: {:?}", case.shape);
                }
            }
        }
    }

    /// Error against f32: half a step of each input times the weights, and half a step of each weight
    /// times the integer inputs.
    #[test]
    fn close_to_f32_by_the_steps() {
        for case in Case::all() {
            let [rows, taps, dilation, width, second, columns] = case.shape;
            let kernel = Kernel::available().next_back().unwrap();
            let mut float = vec![0.0; rows * columns];
            let inputs = [
                product::Input { taps, dilation, ..product::Input::rows(&case.x, width) },
                product::Input::rows(&case.y, second),
            ];
            case.panels(kernel).product(rows, &inputs, Start::Bias, (&mut float, columns));
            let mut out = vec![0.0; rows * columns];
            case.product(kernels().next_back().unwrap(), Start::Bias, &mut out);
            for (i, (out, float)) in out.iter().zip(&float).enumerate() {
                let (t, column) = (i / columns, i % columns);
                let met = (0..taps).map(|tap| (&case.x, width, t + tap * dilation)).chain([(&case.y, second, t)]);
                let (mut bound, mut size, mut first) = (0.0, 0.0, 0);
                for (rows, width, row) in met {
                    let row = &rows[row * width..][..width];
                    let most = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                    for from in (0..width).step_by(SEGMENT) {
                        let row = &row[from..width.min(from + SEGMENT)];
                        let weights = &case.weights[(first + from) * columns..][..row.len() * columns];
                        let step = f64::from(steps(weights, columns)[column]);
                        for (x, w) in row.iter().zip(weights.iter().skip(column).step_by(columns)) {
                            let half = 0.5 * f64::from(most) / f64::from(MOST);
                            bound += half * f64::from(w.abs()) + 0.5 * step * (f64::from(x.abs()) + half);
                            size += f64::from((x * w).abs());
                        }
                    }
                    first += width;
                }
                let error = f64::from((out - float).abs());
                // f32's own rounding besides
                assert!(error <= 1.001 * bound + 1e-6 * size + 1e-6, "{:?}: {error}, bound {bound}", case.shape);
            }
        }
    }

    /// At the worst: whole segments of the largest weights and inputs, of one sign.
    #[test]
    fn no_sum_leaves_i32() {
        for (depth, magnitude) in [(1, 1.0), (2, 1e30), (SEGMENT, 1.0), (SEGMENT - 1, 1e-30), (3 * SEGMENT, 7.0)] {
            let weights = vec![magnitude; depth];
            for sign in [1.0, -1.0] {
                let x = vec![sign * 3.0; depth];
                let rows = integers(&x, depth);
                for (kernel, in_one) in kernels() {
                    let panels = Panels::new(kernel, 1, &[0.0], &[Matrix::new(&weights, 1)]);
                    let mut out = [0.0];
                    let panels = pack(&panels, &[depth], in_one);
                    panels.product(1, &[input(&rows, depth)], Start::Bias, (&mut out, 1));
                    let expected = sign * 3.0 * magnitude * depth as f32;
                    assert!((out[0] / expected - 1.0).abs() < 2e-3, "{}: {} of {expected}", kernel.name(), out[0]);
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_in_its_rows_and_columns() {
        let (columns, depth) = (20, 6);
        let mut weights = values(depth * columns, 1);
        weights[7] = f32::NAN;
        weights[columns + 8] = f32::INFINITY;
        let mut x = values(4 * depth, 2);
        (x[depth], x[2 * depth + 3], x[3 * depth]) = (f32::NAN, f32::NEG_INFINITY, f32::MAX);
        let rows = integers(&x, depth);
        for (kernel, in_one) in kernels() {
            let panels = Panels::new(kernel, columns, &vec![0.0; columns], &[Matrix::new(&weights, columns)]);
            let mut out = vec![0.0; 4 * columns];
            let panels = pack(&panels, &[depth], in_one);
            panels.product(4, &[input(&rows, depth)], Start::Bias, (&mut out, columns));
            for (i, out) in out.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sound = (row == 0 || row == 3) && column != 7 && column != 8;
                assert_eq!(out.is_nan(), !sound, "{}: row {row}, column {column}: {out}", kernel.name());
            }
        }
    }
}

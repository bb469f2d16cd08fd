//! [`super::product`] in integers of sixteen bits or eight: twice or four times the multiply-adds in an instruction, half
//! or a quarter of the memory.
//!
//! Weights are quantised by column when they are packed, rows by themselves when they are made
//! ([`super::quantise`]); integers are multiplied and added exactly. A panel's lines are pairs:
//!
//! ```text
//!              2 L columns
//!            ┌─────────────────┐
//!  bias      │ b    b   …   b  │    f32
//!            ├─────────────────┤
//!    begin   │ i    i   …   i  │    i32: where the sums begin
//!  segment 0 │ w w  w w … w w  │    a pair of weights of each column: times a pair of inputs of a row
//!            │ w w  w w … w w  │    in all lanes, added up in i32
//!            │        ⋮        │
//!    scales  │ s    s   …   s  │    f32: the sums, times these and the row's scale, go to sums of f32
//!            ├─────────────────┤
//!  segment 1 │        ⋮        │
//! ```
//!
//! or, in eight bits, four weights in the place of a pair. Inputs of eight bits are [`ZERO`] too large, and so their
//! sums begin with that much of the weights less; those of sixteen bits begin with nothing.
//!
//! A segment is a row of the input, or, in sixteen bits, [`SEGMENT`] of its values. Its weights' steps are then chosen by
//! column so that no sum leaves i32, whatever the inputs are; in eight bits none can. As every row has one scale of its
//! own, the bits of an answer depend on its inputs alone.

use super::product::{Layout, Panels, Start, from_a_line};
use super::quantise::{Input, MOST, MOST_OF_BYTES, Numbers, ZERO};
use super::tile::{Job, Lines, line, multiply_add, tiles};
use super::vector::{BytesOneByOne, IntegersInTwo, MultiplyAdd, Portable, Short};
#[cfg(target_arch = "x86_64")]
use super::{
    choice::Kernel,
    tile::compiled,
    vector::{Avx2, Avx512, BytesInOne, IntegersInOne, Lanes},
};
use std::marker::PhantomData;

/// Rows of a matrix whose products of sixteen bits are added in i32: more would leave fewer bits for each weight, and
/// fewer take longer.
pub(super) const SEGMENT: usize = 256;

/// What the magnitudes of a segment's weights in a column add up to at most, in sixteen bits.
const BUDGET: u32 = i32::MAX as u32 / MOST as u32;

/// Rows of a matrix whose products of eight bits never leave i32.
const MOST_ROWS: usize = i32::MAX as usize / (u8::MAX as usize * MOST_OF_BYTES as usize);

/// A matrix and a bias in panels of integers.
#[derive(Debug)]
pub(crate) struct IntegerPanels {
    layout: Layout,
    numbers: Numbers,
    /// Of each panel the bias and the scales of its segments.
    scales: Vec<f32>,
    /// Of each panel where the sums of its segments begin.
    begins: Vec<i32>,
    /// Of each panel the lanes of weights, from a line of the cache on.
    pairs: Vec<i16>,
    begin: usize,
    /// Values of the rows that meet the matrix, one after the other.
    widths: Vec<usize>,
    /// Whether a lane is multiplied and added up by one instruction.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the instruction is x86's"))]
    in_one: bool,
}

impl IntegerPanels {
    /// Panels quantised to integers or bytes; `widths`: of the rows that meet the matrix, one after the other, every
    /// tap's.
    ///
    /// # Panics
    /// If bytes' rows are longer than 66 311 values.
    pub fn new(numbers: Numbers, panels: &Panels, widths: &[usize]) -> Self {
        let layout = panels.layout();
        let width = layout.width();
        let segments = || segments(numbers, widths);
        let depth: usize = segments().map(|rows| numbers.stride(rows)).sum();
        let (mut pairs, begin) = from_a_line::<i16>(layout.panels * depth * width);
        let mut scales = Vec::with_capacity(layout.panels * (segments().count() + 1) * width);
        let mut begins = Vec::with_capacity(layout.panels * segments().count() * width);
        for lines in panels.lines() {
            let (bias, mut lines) = lines.split_at(width);
            scales.extend_from_slice(bias);
            for rows in segments() {
                let segment;
                (segment, lines) = lines.split_at(rows * width);
                let steps = steps(numbers, segment, width);
                let from = pairs.len();
                pairs.resize(from + numbers.stride(rows) * width, 0);
                let mut put = |row, column, integer| match numbers {
                    Numbers::Bytes => {
                        bytemuck::cast_slice_mut(&mut pairs[from + row / 4 * 2 * width..])[4 * column + row % 4] =
                            integer as i8;
                    }
                    _ => pairs[from + row / 2 * 2 * width..][2 * column + row % 2] = integer,
                };
                let (mut sums, mut sizes) = (vec![0; width], vec![0; width]);
                for (row, weights) in segment.chunks_exact(width).enumerate() {
                    for (column, (weight, step)) in weights.iter().zip(&steps).enumerate() {
                        // steps aren't positive where nothing counts, or something isn't a number
                        let integer = if *step > 0.0 { (weight / step).round() as i16 } else { 0 };
                        sums[column] += i32::from(integer);
                        sizes[column] += u32::from(integer.unsigned_abs());
                        put(row, column, integer);
                    }
                }
                match numbers {
                    Numbers::Bytes => {
                        assert!(rows <= MOST_ROWS, "a sum could leave i32");
                        begins.extend(sums.iter().map(|sum| -i32::from(ZERO) * sum));
                    }
                    _ => {
                        assert!(sizes.into_iter().all(|size| size <= BUDGET), "a sum could leave i32");
                        begins.resize(begins.len() + width, 0);
                    }
                }
                scales.extend(steps);
            }
        }
        let in_one = layout.kernel.has_vnni();
        Self { layout, numbers, scales, begins, pairs, begin, widths: widths.to_vec(), in_one }
    }

    /// As [`Panels::product`].
    ///
    /// # Panics
    /// If inputs, start or answer have too few values.
    pub fn product(&self, count: usize, inputs: &[Input], start: Start, out: (&mut [f32], usize)) {
        if count == 0 {
            return;
        }
        Input::assert_fit(inputs, self.numbers, count, &self.widths);
        let bytes = self.numbers == Numbers::Bytes;
        // SAFETY: the assertions, here and of the job, keep every address within its slice; panels exist only for kernels
        // that run here, and only those with the instruction do it in one.
        unsafe {
            match self.layout.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => match (bytes, self.in_one) {
                    (false, true) => avx512_vnni(&self.job(count, inputs, start, out)),
                    (true, true) => avx512_vnni_bytes(&self.job(count, inputs, start, out)),
                    (false, false) => avx512(&self.job(count, inputs, start, out)),
                    (true, false) => tiles::<Lanes<16>, _>(&self.job::<BytesOneByOne>(count, inputs, start, out), 0),
                },
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => match (bytes, self.in_one) {
                    (false, true) => avx2_vnni(&self.job(count, inputs, start, out)),
                    (true, true) => avx2_vnni_bytes(&self.job(count, inputs, start, out)),
                    (false, false) => avx2(&self.job(count, inputs, start, out)),
                    (true, false) => tiles::<Lanes<8>, _>(&self.job::<BytesOneByOne>(count, inputs, start, out), 0),
                },
                _ if bytes => tiles::<Portable, _>(&self.job::<BytesOneByOne>(count, inputs, start, out), 0),
                _ => tiles::<Portable, _>(&self.job::<IntegersInTwo>(count, inputs, start, out), 0),
            }
        }
    }

    /// A product's job, its numbers multiplied in this way.
    fn job<'a, M>(
        &'a self,
        count: usize,
        inputs: &'a [Input<'a>],
        start: Start<'a>,
        out: (&mut [f32], usize),
    ) -> Job<'a, Whole<'a, M>> {
        let panels = self.layout.panels;
        let lines = Whole {
            scales: self.scales.as_ptr(),
            begins: self.begins.as_ptr(),
            pairs: self.pairs[self.begin..].as_ptr(),
            size: (self.scales.len() / panels, self.begins.len() / panels, (self.pairs.len() - self.begin) / panels),
            segment: segment(self.numbers),
            inputs,
            way: PhantomData,
        };
        self.layout.job(count, lines, start, out)
    }
}

/// Values of a row that a segment takes at most.
fn segment(numbers: Numbers) -> usize {
    if numbers == Numbers::Bytes { usize::MAX } else { SEGMENT }
}

/// Rows of each segment.
fn segments(numbers: Numbers, widths: &[usize]) -> impl Iterator<Item = usize> {
    let most = segment(numbers);
    widths.iter().flat_map(move |&width| (0..width).step_by(most).map(move |from| most.min(width - from)))
}

/// What a step of each column's integers is worth: as little as their bits and, in sixteen bits, the budget allow; NaN
/// if a weight isn't finite.
fn steps(numbers: Numbers, segment: &[f32], width: usize) -> Vec<f32> {
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
        let step = match numbers {
            Numbers::Bytes => most / f32::from(MOST_OF_BYTES),
            _ => (f64::from(most) / f64::from(i16::MAX)).max(sum / room) as f32,
        };
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
    begins: *const i32,
    pairs: *const i16,
    /// Values of a panel of each.
    size: (usize, usize, usize),
    /// Values of sixteen bits of a row that a segment takes at most.
    segment: usize,
    inputs: &'a [Input<'a>],
    way: PhantomData<M>,
}

impl<V: Short, M: MultiplyAdd<V, Sums = V::Sums>> Lines<V> for Whole<'_, M> {
    #[inline(always)]
    unsafe fn bias(&self, panel: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.scales.add(panel * self.size.0) }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize, const N: usize>(
        &self,
        panel: usize,
        row: usize,
        mut sums: [[V; N]; R],
    ) -> [[V; N]; R] {
        let width = 2 * V::LANES;
        // SAFETY: the caller's promise.
        unsafe {
            let mut scales = <Self as Lines<V>>::bias(self, panel).add(width);
            let mut begins = self.begins.add(panel * self.size.1);
            let mut weights = self.pairs.add(panel * self.size.2);
            for input in self.inputs {
                for tap in 0..input.taps {
                    let first = row + tap * input.dilation;
                    let row_scales = input.scales.as_ptr().add(first);
                    for from in (0..input.stride).step_by(self.segment) {
                        let rows = input.values.as_ptr().add(first * input.stride + from);
                        let pairs = self.segment.min(input.stride - from) / 2;
                        let begin = [std::array::from_fn(|i| V::load_sums(begins.add(i * V::LANES))); R];
                        let whole = multiply_add::<V, M, R, N>(begin, rows, input.stride, pairs, weights);
                        let steps: [V; N] = line(scales);
                        for (r, (sums, whole)) in sums.iter_mut().zip(whole).enumerate() {
                            let scale = V::splat(*row_scales.add(r));
                            // not fused: the same bits on every processor
                            *sums =
                                std::array::from_fn(|i| sums[i].add(V::to_floats(whole[i]).mul(steps[i].mul(scale))));
                        }
                        weights = weights.add(pairs * 2 * width);
                        scales = scales.add(width);
                        begins = begins.add(width);
                    }
                }
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
compiled!(avx2, "avx2,fma", Avx2, Whole<IntegersInTwo>);
#[cfg(target_arch = "x86_64")]
compiled!(avx2_vnni, "avx2,fma,avxvnni", Avx2, Whole<IntegersInOne>);
#[cfg(target_arch = "x86_64")]
compiled!(avx2_vnni_bytes, "avx2,fma,avxvnni", Avx2, Whole<BytesInOne>);
#[cfg(target_arch = "x86_64")]
compiled!(avx512, "avx512f,avx512bw", Avx512, Whole<IntegersInTwo>);
#[cfg(target_arch = "x86_64")]
compiled!(avx512_vnni, "avx512f,avx512bw,avx512vnni", Avx512, Whole<IntegersInOne>);
#[cfg(target_arch = "x86_64")]
compiled!(avx512_vnni_bytes, "avx512f,avx512bw,avx512vnni", Avx512, Whole<BytesInOne>);

#[cfg(test)]
mod tests {
    use super::super::choice::Kernel;
    use super::super::product::{self, Matrix};
    use super::super::quantise::quantise;
    use super::super::short::ShortPanels;
    use super::super::testing::values;
    use super::*;

    const BOTH: [Numbers; 2] = [Numbers::Integers, Numbers::Bytes];

    /// Rows quantised: values and scales.
    fn integers(numbers: Numbers, rows: &[f32], width: usize) -> (Vec<i16>, Vec<f32>) {
        let count = rows.len() / width;
        let (mut values, mut scales) = (vec![0; count * numbers.stride(width)], vec![0.0; count]);
        quantise(numbers, rows, width, &mut values, &mut scales);
        (values, scales)
    }

    fn input<'a>(numbers: Numbers, (values, scales): &'a (Vec<i16>, Vec<f32>), width: usize) -> Input<'a> {
        Input::rows(numbers, values, scales, width)
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

    fn pack(numbers: Numbers, panels: &Panels, widths: &[usize], in_one: bool) -> IntegerPanels {
        IntegerPanels { in_one, ..IntegerPanels::new(numbers, panels, widths) }
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
    #[derive(Clone)]
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

        fn product(&self, numbers: Numbers, (kernel, in_one): (Kernel, bool), start: Start, out: &mut [f32]) {
            let [rows, taps, dilation, width, second, columns] = self.shape;
            let (x, y) = (integers(numbers, &self.x, width), integers(numbers, &self.y, second));
            let inputs = [Input { taps, dilation, ..input(numbers, &x, width) }, input(numbers, &y, second)];
            pack(numbers, &self.panels(kernel), &self.widths, in_one).product(rows, &inputs, start, (out, columns));
        }
    }

    /// The same product, number by number.
    fn reference(numbers: Numbers, case: &Case, start: Start) -> Vec<f32> {
        let [rows, taps, dilation, width, second, columns] = case.shape;
        let (x, y) = (integers(numbers, &case.x, width), integers(numbers, &case.y, second));
        // what a row's values stand for, without its scale
        let row = |(values, _): &(Vec<i16>, Vec<f32>), row: usize, width: usize| -> Vec<i32> {
            let values = &values[row * numbers.stride(width)..][..numbers.stride(width)];
            match numbers {
                Numbers::Bytes => values.iter().flat_map(|v| v.to_le_bytes()).map(|b| i32::from(b) - 128).collect(),
                _ => values.iter().map(|v| i32::from(*v)).collect(),
            }
        };
        let most = if numbers == Numbers::Bytes { usize::MAX } else { SEGMENT };
        let mut out = Vec::new();
        for (t, column) in (0..rows).flat_map(|t| (0..columns).map(move |column| (t, column))) {
            let mut sum = case.bias[column];
            if let Start::Rows(rows, stride) = start {
                sum += rows[t * stride + column];
            }
            let met = (0..taps).map(|tap| (&x, width, t + tap * dilation)).chain([(&y, second, t)]);
            let mut first = 0;
            for (input, width, at) in met {
                let met = row(input, at, width);
                for from in (0..width).step_by(most) {
                    let count = most.min(width - from);
                    let weights = &case.weights[(first + from) * columns..(first + from + count) * columns];
                    let step = steps(numbers, weights, columns)[column];
                    let integers = weights.iter().skip(column).step_by(columns).map(|w| (w / step).round() as i32);
                    let whole: i32 = integers.zip(&met[from..]).map(|(w, x)| w * x).sum();
                    sum += whole as f32 * (step * input.1[at]);
                }
                first += width;
            }
            out.push(sum);
        }
        out
    }

    #[test]
    fn every_kernel_has_the_bits_of_the_reference() {
        for (case, numbers) in Case::all().flat_map(|case| BOTH.map(|numbers| (case.clone(), numbers))) {
            let [rows, .., columns] = case.shape;
            let before = values(rows * columns, 6);
            for start in [Start::Bias, Start::Rows(&before, columns)] {
                let expected = reference(numbers, &case, start);
                for kernel in kernels() {
                    let mut out = vec![0.0; rows * columns];
                    case.product(numbers, kernel, start, &mut out);
                    assert!(out == expected, "{numbers:?}, {kernel:?}: {:?}", case.shape);
                }
            }
        }
    }

    /// Error against f32: half a step of each input times the weights, and half a step of each weight
    /// times the integer inputs.
    #[test]
    fn close_to_f32_by_the_steps() {
        for (case, numbers) in Case::all().flat_map(|case| BOTH.map(|numbers| (case.clone(), numbers))) {
            let [rows, taps, dilation, width, second, columns] = case.shape;
            let kernel = Kernel::available().next_back().unwrap();
            let mut float = vec![0.0; rows * columns];
            let inputs = [
                product::Input { taps, dilation, ..product::Input::rows(&case.x, width) },
                product::Input::rows(&case.y, second),
            ];
            case.panels(kernel).product(rows, &inputs, Start::Bias, (&mut float, columns));
            let mut out = vec![0.0; rows * columns];
            case.product(numbers, kernels().next_back().unwrap(), Start::Bias, &mut out);
            let of_rows = if numbers == Numbers::Bytes { f64::from(MOST_OF_BYTES) } else { f64::from(MOST) };
            let at_once = segment(numbers).min(1 << 20);
            for (i, (out, float)) in out.iter().zip(&float).enumerate() {
                let (t, column) = (i / columns, i % columns);
                let met = (0..taps).map(|tap| (&case.x, width, t + tap * dilation)).chain([(&case.y, second, t)]);
                let (mut bound, mut size, mut first) = (0.0, 0.0, 0);
                for (rows, width, row) in met {
                    let row = &rows[row * width..][..width];
                    let most = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                    for from in (0..width).step_by(at_once) {
                        let row = &row[from..width.min(from + at_once)];
                        let weights = &case.weights[(first + from) * columns..][..row.len() * columns];
                        let step = f64::from(steps(numbers, weights, columns)[column]);
                        for (x, w) in row.iter().zip(weights.iter().skip(column).step_by(columns)) {
                            let half = 0.5 * f64::from(most) / of_rows;
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
        for (depth, magnitude) in
            [(1, 1.0), (2, 1e30), (SEGMENT, 1.0), (SEGMENT - 1, 1e-30), (3 * SEGMENT, 7.0), (MOST_ROWS, 1.0)]
        {
            let weights = vec![magnitude; depth];
            for sign in [1.0, -1.0] {
                let x = vec![sign * 3.0; depth];
                for ((kernel, in_one), numbers) in kernels().flat_map(|kernel| BOTH.map(|numbers| (kernel, numbers))) {
                    let rows = integers(numbers, &x, depth);
                    let panels = Panels::new(kernel, 1, &[0.0], &[Matrix::new(&weights, 1)]);
                    let mut out = [0.0];
                    let panels = pack(numbers, &panels, &[depth], in_one);
                    panels.product(1, &[input(numbers, &rows, depth)], Start::Bias, (&mut out, 1));
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
        for ((kernel, in_one), numbers) in kernels().flat_map(|kernel| BOTH.map(|numbers| (kernel, numbers))) {
            let rows = integers(numbers, &x, depth);
            let panels = Panels::new(kernel, columns, &vec![0.0; columns], &[Matrix::new(&weights, columns)]);
            let mut out = vec![0.0; 4 * columns];
            let panels = pack(numbers, &panels, &[depth], in_one);
            panels.product(4, &[input(numbers, &rows, depth)], Start::Bias, (&mut out, columns));
            for (i, out) in out.iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let sound = (row == 0 || row == 3) && column != 7 && column != 8;
                assert_eq!(out.is_nan(), !sound, "{}: row {row}, column {column}: {out}", kernel.name());
            }
        }
    }
}

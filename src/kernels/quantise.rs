//! Rows in sixteen bits or eight: what the products of [`super::integer`] and [`super::bfloat`] read.

use super::product::reach;
use super::rows::Rows;
use super::vector::ROUND;
use multiversion::multiversion;
use std::ops::Range;

/// Numbers shorter than f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// Integers of sixteen bits, a scale to each row.
    Integers,
    /// Integers of eight bits, likewise: [`ZERO`] more than what they stand for, two to each value of sixteen bits.
    Bytes,
    /// bf16: f32 without its last 16 bits, rounded to the nearest, ties to even. Scales are 1.
    Bfloats,
}

impl Numbers {
    /// Values of sixteen bits that a row takes up, zeros behind its own: pairs of integers are multiplied, or four
    /// bytes, and tiles take 32 bf16.
    pub fn stride(self, width: usize) -> usize {
        match self {
            Self::Integers => width.next_multiple_of(2),
            Self::Bytes => 2 * width.div_ceil(4),
            Self::Bfloats => width.next_multiple_of(CHUNK),
        }
    }
}

/// What stands for zero among bytes: the processor multiplies bytes without a sign by bytes with one.
pub(super) const ZERO: u8 = 128;

/// Values of bf16 in a row of a processor's tile.
pub(super) const CHUNK: usize = 32;

/// The largest magnitude of a quantised input: beside it there is room in i32 for sums over
/// [`super::integer::SEGMENT`] weights of about as many bits (14 of 31).
pub(super) const MOST: i16 = 8191;

/// The largest magnitude of an integer of eight bits.
pub(super) const MOST_OF_BYTES: i8 = 127;

/// Rows with a smaller largest magnitude count as zeros: a row is divided by it.
const LEAST: f32 = 1e-30;

/// Short rows where they lie: row `i` stands for its values times `scales[i]`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    /// Integers, two bytes each, or the bits of bf16.
    pub values: &'a [i16],
    /// One for each row.
    pub scales: &'a [f32],
    /// Values of a row.
    pub width: usize,
    /// Values from one row to the next, behind a row's own zeros, or of bf16 whatever is finite.
    pub stride: usize,
    /// How often rows are read, `dilation` rows further each time.
    pub taps: usize,
    pub dilation: usize,
}

impl<'a> Input<'a> {
    /// Rows one after the other, read once.
    pub fn rows(numbers: Numbers, values: &'a [i16], scales: &'a [f32], width: usize) -> Self {
        Self { values, scales, width, stride: numbers.stride(width), taps: 1, dilation: 0 }
    }

    /// That `count` rows of such numbers are there for a matrix whose rows meet rows of `widths`.
    ///
    /// # Panics
    /// If not.
    pub(super) fn assert_fit(inputs: &[Self], numbers: Numbers, count: usize, widths: &[usize]) {
        assert!(inputs.iter().flat_map(|i| std::iter::repeat_n(i.width, i.taps)).eq(widths.iter().copied()));
        for i in inputs {
            let rows = count + (i.taps - 1) * i.dilation;
            let width = numbers.stride(i.width);
            // integers' scales have the stride's segments; what follows a row of bf16 meets zeros
            assert!(i.stride == width || numbers == Numbers::Bfloats && i.stride >= width);
            assert!(i.values.len() >= reach(rows, i.stride, width));
            assert!(i.scales.len() >= rows);
        }
    }
}

/// Brings rows of `width` values to such numbers, [`Numbers::stride`] apart in `values`.
pub(crate) fn quantise(numbers: Numbers, rows: &[f32], width: usize, values: &mut [i16], scales: &mut [f32]) {
    debug_assert!(rows.len() == scales.len() * width && values.len() == scales.len() * numbers.stride(width));
    match numbers {
        Numbers::Integers => to_integers(rows, width, values, scales),
        Numbers::Bytes => to_bytes(rows, width, values, scales),
        Numbers::Bfloats => {
            to_bfloats(rows, width, values);
            scales.fill(1.0);
        }
    }
}

/// The bits of the nearest bf16.
#[inline(always)]
pub(super) fn bfloat(x: f32) -> i16 {
    half::bf16::from_f32(x).to_bits().cast_signed()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub(super) fn to_bfloats(rows: &[f32], width: usize, values: &mut [i16]) {
    let stride = Numbers::Bfloats.stride(width);
    for (row, values) in rows.chunks_exact(width).zip(values.chunks_exact_mut(stride)) {
        let (values, rest) = values.split_at_mut(width);
        values.iter_mut().zip(row).for_each(|(value, x)| *value = bfloat(*x));
        rest.fill(0);
    }
}

/// Quantises rows of `width` values to integers of up to ±[`MOST`], each row by its own largest
/// magnitude; with a value that isn't finite, a row stands for NaN.
///
/// Error: half a step, `largest / 16382`. Same bits on every processor.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn to_integers(rows: &[f32], width: usize, values: &mut [i16], scales: &mut [f32]) {
    let stride = Numbers::Integers.stride(width);
    to_whole(rows, width, (values, stride), scales, (f32::from(MOST), 0), |bits| bits as i16);
}

/// As [`to_integers`], of up to ±[`MOST_OF_BYTES`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn to_bytes(rows: &[f32], width: usize, values: &mut [i16], scales: &mut [f32]) {
    let (bytes, stride) = (bytemuck::cast_slice_mut(values), 2 * Numbers::Bytes.stride(width));
    to_whole(rows, width, (bytes, stride), scales, (f32::from(MOST_OF_BYTES), ZERO), |bits| bits as u8 ^ ZERO);
}

/// Rows in whole numbers of up to ±`most`, `stride` apart: `integer` makes one of the bits of a sum with [`ROUND`].
#[inline(always)]
fn to_whole<T: Copy>(
    rows: &[f32],
    width: usize,
    (values, stride): (&mut [T], usize),
    scales: &mut [f32],
    (most, zero): (f32, T),
    integer: impl Fn(u32) -> T,
) {
    for ((row, values), scale) in rows.chunks_exact(width).zip(values.chunks_exact_mut(stride)).zip(scales) {
        let (factor, step) = factor_and_step(row, most);
        *scale = step;
        if factor == 0.0 {
            values.fill(zero);
            continue;
        }
        let (values, rest) = values.split_at_mut(width);
        rest.fill(zero);
        for (value, x) in values.iter_mut().zip(row) {
            *value = integer((x * factor + ROUND).to_bits());
        }
    }
}

/// What brings a row to integers of up to ±`most`, 0 where there is nothing to bring, and what one of them stands for.
#[inline(always)]
fn factor_and_step(row: &[f32], most: f32) -> (f32, f32) {
    // magnitudes are ordered as their bits are, and all below infinity's and NaN's
    let largest = row.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).cast_signed().max(largest));
    let largest = f32::from_bits(largest.cast_unsigned());
    match largest.is_finite() {
        true => (if largest >= LEAST { most / largest } else { 0.0 }, largest / most),
        false => (0.0, f32::NAN),
    }
}

/// The rows of a sequence, in such numbers, that are still needed.
pub(crate) struct QuantisedRows {
    values: Rows<i16>,
    scales: Rows,
    width: usize,
    numbers: Numbers,
}

impl QuantisedRows {
    /// No rows yet, of `width` values each.
    pub fn new(numbers: Numbers, width: usize) -> Self {
        Self { values: Rows::new(numbers.stride(width)), scales: Rows::new(1), width, numbers }
    }

    /// Makes `count` rows of zeros at the end and gives their values and scales.
    pub fn grow(&mut self, count: usize) -> (&mut [i16], &mut [f32]) {
        (self.values.grow(count), self.scales.grow(count))
    }

    /// Makes room for `count` rows at the end and gives it, to be written over.
    pub fn room(&mut self, count: usize) -> (&mut [i16], &mut [f32]) {
        (self.values.room(count), self.scales.room(count))
    }

    /// Puts whole rows at the end.
    pub fn extend(&mut self, rows: &[f32]) {
        let (width, numbers) = (self.width, self.numbers);
        let (values, scales) = self.room(rows.len() / width);
        quantise(numbers, rows, width, values, scales);
    }

    /// Rows by their places, read once.
    ///
    /// # Panics
    /// If one isn't there.
    pub fn get(&self, places: Range<usize>) -> Input<'_> {
        let (values, scales) = (self.values.get(places.clone()), self.scales.get(places));
        Input::rows(self.numbers, values, scales, self.width)
    }

    /// Forgets the rows before a place.
    pub fn forget(&mut self, before: usize) {
        self.values.forget(before);
        self.scales.forget(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stride(width: usize) -> usize {
        Numbers::Integers.stride(width)
    }

    #[test]
    fn rows_are_kept_to_half_a_step() {
        for (width, most) in [(1, 3.0_f32), (2, 1e-20), (7, 1e20), (64, f32::MAX), (129, 1.0)] {
            let rows: Vec<f32> = (0..5 * width)
                .map(|i| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * most)
                .chain(vec![most; width])
                .collect();
            let (mut values, mut scales) = (vec![1; 6 * stride(width)], vec![0.0; 6]);
            quantise(Numbers::Integers, &rows, width, &mut values, &mut scales);
            for (row, (values, scale)) in rows.chunks(width).zip(values.chunks(stride(width)).zip(&scales)) {
                for (x, q) in row.iter().zip(values) {
                    let error = (f64::from(*x) - f64::from(*q) * f64::from(*scale)).abs();
                    assert!(q.abs() <= MOST && error <= 0.501 * f64::from(*scale), "{x}: {q} × {scale}");
                }
                assert!(values[width..].iter().all(|&q| q == 0));
            }
            assert!(values[5 * stride(width)..][..width].iter().all(|&q| q == MOST), "{width} of {most}");
        }
    }

    #[test]
    fn rows_of_anything_are_bounded() {
        for (row, scale) in [
            ([0.0, -0.0, 0.0], Some(0.0)),
            ([1e-40, -1e-40, 0.0], Some(0.0)),
            ([f32::NAN, 1.0, 2.0], None),
            ([1.0, f32::NEG_INFINITY, 2.0], None),
            ([1.0, 2.0, -f32::NAN], None),
        ] {
            let (mut values, mut scales) = ([1; 4], [1.0]);
            quantise(Numbers::Integers, &row, 3, &mut values, &mut scales);
            assert_eq!(values, [0; 4], "{row:?}");
            match scale {
                Some(scale) => assert!((scales[0] - scale).abs() < 1e-30),
                None => assert!(scales[0].is_nan()),
            }
        }
    }

    /// Against `half`'s rounding, over bits of all kinds.
    #[test]
    fn bfloats_are_the_nearest() {
        let bits = (0..1_000_000_u32).map(|i| i.wrapping_mul(2_654_435_761) ^ i << 7);
        let ties = (0..256_u32).flat_map(|i| [i << 16 | 0x8000, i << 23 | 0x18000, i << 20 | 0x7fff]);
        let rows: Vec<f32> = bits.chain(ties).map(f32::from_bits).collect();
        let width = 50;
        let rows = &rows[..rows.len() / width * width];
        let count = rows.len() / width;
        let stride = Numbers::Bfloats.stride(width);
        assert_eq!(stride, 64);
        let (mut values, mut scales) = (vec![1; count * stride], vec![0.0; count]);
        quantise(Numbers::Bfloats, rows, width, &mut values, &mut scales);
        assert!(scales.iter().all(|&scale| scale == 1.0));
        for (row, values) in rows.chunks(width).zip(values.chunks(stride)) {
            for (x, bits) in row.iter().zip(values) {
                let (wanted, bits) = (half::bf16::from_f32(*x), bits.cast_unsigned());
                assert!(
                    bits == wanted.to_bits() || x.is_nan() && half::bf16::from_bits(bits).is_nan(),
                    "{x}: {bits:x}"
                );
            }
            assert!(values[width..].iter().all(|&bits| bits == 0));
        }
    }
}

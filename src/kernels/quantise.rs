//! Rows in sixteen bits: what the products of [`super::integer`] read.

use super::rows::Rows;
use multiversion::multiversion;
use std::ops::Range;

/// The largest magnitude of a quantised input: beside it there is room in i32 for sums over
/// [`super::integer::SEGMENT`] weights of about as many bits (14 of 31).
pub(super) const MOST: i16 = 8191;

/// Rows with a smaller largest magnitude count as zeros: a row is divided by it.
const LEAST: f32 = 1e-30;

/// Quantised rows where they lie: row `i` stands for its values times `scales[i]`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub values: &'a [i16],
    /// One for each row.
    pub scales: &'a [f32],
    /// Values of a row; one more, a zero, lies behind an odd number.
    pub width: usize,
    /// How often rows are read, `dilation` rows further each time.
    pub taps: usize,
    pub dilation: usize,
}

impl Input<'_> {
    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        stride(self.width)
    }
}

/// Values that a quantised row takes up: pairs are multiplied.
pub(crate) fn stride(width: usize) -> usize {
    width.next_multiple_of(2)
}

/// Quantises rows of `width` values to integers of up to ±[`MOST`], each row by its own largest
/// magnitude; with a value that isn't finite, a row stands for NaN. `values` are [`stride`] apart.
///
/// Error: half a step, `largest / 16382`. Same bits on every processor.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn quantise(rows: &[f32], width: usize, values: &mut [i16], scales: &mut [f32]) {
    /// 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    debug_assert!(rows.len() == scales.len() * width && values.len() == scales.len() * stride(width));
    for ((row, values), scale) in rows.chunks_exact(width).zip(values.chunks_exact_mut(stride(width))).zip(scales) {
        // magnitudes are ordered as their bits are, and all below infinity's and NaN's
        let most = row.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).cast_signed().max(most));
        let most = f32::from_bits(most.cast_unsigned());
        let factor = if most >= LEAST && most.is_finite() { f32::from(MOST) / most } else { 0.0 };
        *scale = if most.is_finite() { most / f32::from(MOST) } else { f32::NAN };
        let (values, rest) = values.split_at_mut(width);
        rest.fill(0);
        if factor == 0.0 {
            values.fill(0);
            continue;
        }
        for (value, x) in values.iter_mut().zip(row) {
            *value = (x * factor + ROUND).to_bits() as i16;
        }
    }
}

/// The quantised rows of a sequence that are still needed.
pub(crate) struct QuantisedRows {
    values: Rows<i16>,
    scales: Rows,
    width: usize,
}

impl QuantisedRows {
    /// No rows yet, of `width` values each.
    pub fn new(width: usize) -> Self {
        Self { values: Rows::new(stride(width)), scales: Rows::new(1), width }
    }

    /// One past the place of the last row.
    pub fn end(&self) -> usize {
        self.scales.end()
    }

    /// Makes `count` rows of zeros at the end and gives their values and scales.
    pub fn grow(&mut self, count: usize) -> (&mut [i16], &mut [f32]) {
        (self.values.grow(count), self.scales.grow(count))
    }

    /// Puts whole rows at the end.
    pub fn extend(&mut self, rows: &[f32]) {
        let width = self.width;
        let (values, scales) = self.grow(rows.len() / width);
        quantise(rows, width, values, scales);
    }

    /// Rows by their places, read once.
    ///
    /// # Panics
    /// If one isn't there.
    pub fn get(&self, places: Range<usize>) -> Input<'_> {
        let (values, scales) = (self.values.get(places.clone()), self.scales.get(places));
        Input { values, scales, width: self.width, taps: 1, dilation: 0 }
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

    #[test]
    fn rows_are_kept_to_half_a_step() {
        for (width, most) in [(1, 3.0_f32), (2, 1e-20), (7, 1e20), (64, f32::MAX), (129, 1.0)] {
            let rows: Vec<f32> = (0..5 * width)
                .map(|i| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * most)
                .chain(vec![most; width])
                .collect();
            let (mut values, mut scales) = (vec![1; 6 * stride(width)], vec![0.0; 6]);
            quantise(&rows, width, &mut values, &mut scales);
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
            quantise(&row, 3, &mut values, &mut scales);
            assert_eq!(values, [0; 4], "{row:?}");
            match scale {
                Some(scale) => assert!((scales[0] - scale).abs() < 1e-30),
                None => assert!(scales[0].is_nan()),
            }
        }
    }
}

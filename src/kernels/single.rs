//! One row times weights, again and again: a recursion's products, of which each waits for the one before.
//!
//! What a product of many rows hides, its call and its preparations, is as long here as the work, and the weights come
//! from beyond the first cache: so there is one place to start from, rows have room for whole vectors, and panels are as
//! wide as registers allow: all of a small product's weights are read from the first to the last. Of a gated product's
//! columns that are left for half a pair of vectors, half a vector is tanh's and half σ's:
//!
//! ```text
//!   40 channels, 16 lanes:   tanh 0–15, σ 0–15    tanh 16–31, σ 16–31   tanh 32–39 σ 32–39
//! ```

use super::choice::Kernel;
use super::product::{Matrix, gated_order, lanes, packed, plain_order};
use super::tile::{line, plus};
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector, gate};

/// Vectors of a panel, and of the last one at most, so that the sums stay in registers.
const USUAL: usize = 8;
const MOST: usize = 11;
/// Lanes of the widest vector.
const WIDEST: usize = 16;

/// A matrix for rows that come one by one.
pub(super) struct RowPanels {
    kernel: Kernel,
    /// Panels one after the other, from a line of the cache on, a line of bias in front of each.
    values: Vec<f32>,
    begin: usize,
    depth: usize,
    /// Columns in the panels' order, whole vectors.
    width: usize,
    gated: bool,
}

impl RowPanels {
    /// The columns of a bias and of a matrix.
    pub fn new(kernel: Kernel, bias: &[f32], matrix: Matrix) -> Self {
        Self::pack(kernel, false, &plain_order(bias.len(), lanes(kernel)), bias, matrix)
    }

    /// Of `2 · channels` columns without a bias, whose answer is `tanh(first half) · σ(second half)`.
    pub fn gated(kernel: Kernel, channels: usize, matrix: Matrix) -> Self {
        Self::pack(kernel, true, &gated_order(kernel, channels, true), &vec![0.0; 2 * channels], matrix)
    }

    fn pack(kernel: Kernel, gated: bool, order: &[Option<usize>], bias: &[f32], matrix: Matrix) -> Self {
        let widths = abreast(order.len() / lanes(kernel)).map(|vectors| vectors * lanes(kernel));
        let (values, begin) = packed(kernel, order, widths, bias, &[matrix]);
        Self { kernel, values, begin, depth: matrix.rows, width: order.len(), gated }
    }

    /// Rows of the matrix.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The room that an answer takes.
    pub fn room(&self) -> usize {
        if self.gated { self.width.div_ceil(2 * lanes(self.kernel)) * lanes(self.kernel) } else { self.width }
    }

    /// The answer to one row, of `inputs` side by side, and behind its columns, as far as there is to be room, whatever.
    /// `plus` is added to the bias, in the panels' order, whole vectors.
    ///
    /// # Panics
    /// If inputs, `plus` or answer have too few values.
    pub fn row(&self, inputs: &[&[f32]], plus: Option<&[f32]>, out: &mut [f32]) {
        assert!(inputs.iter().map(|input| input.len()).sum::<usize>() == self.depth);
        assert!(plus.is_none_or(|plus| plus.len() >= self.width) && out.len() >= self.room());
        let job = Single { panels: self, inputs, plus, out: out.as_mut_ptr() };
        // SAFETY: the assertions keep every address within its slice, and panels exist only for kernels that run here.
        unsafe {
            match self.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => avx2(&job),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => avx512(&job),
                #[cfg(target_arch = "aarch64")]
                Kernel::Neon => neon(&job),
                _ => run::<Portable>(&job),
            }
        }
    }
}

/// A checked product of one row.
struct Single<'a> {
    panels: &'a RowPanels,
    inputs: &'a [&'a [f32]],
    plus: Option<&'a [f32]>,
    out: *mut f32,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx2>(single) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx512>(single) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Neon>(single) }
}

/// # Safety
/// The processor must have the vector's feature, and the product be checked.
#[inline(always)]
unsafe fn run<V: Vector>(single: &Single) {
    let mut first = 0;
    for vectors in abreast(single.panels.width / V::LANES) {
        // SAFETY: the caller's promise.
        unsafe {
            match vectors {
                1 => panel::<V, 1>(single, first),
                2 => panel::<V, 2>(single, first),
                3 => panel::<V, 3>(single, first),
                4 => panel::<V, 4>(single, first),
                5 => panel::<V, 5>(single, first),
                6 => panel::<V, 6>(single, first),
                7 => panel::<V, 7>(single, first),
                8 => panel::<V, 8>(single, first),
                9 => panel::<V, 9>(single, first),
                10 => panel::<V, 10>(single, first),
                _ => panel::<V, MOST>(single, first),
            }
        }
        first += vectors;
    }
}

/// The vectors from `first` on of a panel of `N`.
///
/// # Safety
/// As [`run`]; the panel must be there.
#[inline(always)]
unsafe fn panel<V: Vector, const N: usize>(single: &Single, first: usize) {
    let &Single { panels: &RowPanels { depth, gated, .. }, plus: more, .. } = single;
    // SAFETY: `RowPanels::row` has checked that all these lie within their slices.
    unsafe {
        let mut at = single.panels.values.as_ptr().add(single.panels.begin + first * (depth + 1) * V::LANES);
        let mut sums: [V; N] = line(at);
        if let Some(more) = more {
            sums = plus(sums, line(more.as_ptr().add(first * V::LANES)));
        }
        for input in single.inputs {
            for &x in *input {
                at = at.add(N * V::LANES);
                let (x, weights) = (V::splat(x), line::<V, N>(at));
                sums = std::array::from_fn(|i| x.fma(weights[i], sums[i]));
            }
        }
        if !gated {
            let out = single.out.add(first * V::LANES);
            sums.into_iter().enumerate().for_each(|(i, sum)| sum.store(out.add(i * V::LANES)));
            return;
        }
        let out = single.out.add(first / 2 * V::LANES);
        for (i, pair) in sums.chunks(2).enumerate() {
            let sigma = pair.get(1).copied().unwrap_or_else(|| upper_half(pair[0]));
            gate(pair[0], sigma).store(out.add(i * V::LANES));
        }
    }
}

/// Vectors of each panel, of so many in all.
fn abreast(vectors: usize) -> impl Iterator<Item = usize> {
    let usual = vectors.saturating_sub(MOST).div_ceil(USUAL);
    std::iter::repeat_n(USUAL, usual).chain([vectors - usual * USUAL])
}

/// The upper half of the lanes, and behind them whatever.
///
/// # Safety
/// The processor must have the vector's feature.
#[inline(always)]
unsafe fn upper_half<V: Vector>(vector: V) -> V {
    let mut lanes = [0.0; WIDEST + WIDEST / 2];
    // SAFETY: the vector, and half of one more, have room.
    unsafe {
        vector.store(lanes.as_mut_ptr());
        V::load(lanes.as_ptr().add(V::LANES / 2))
    }
}

#[cfg(test)]
mod tests {
    use super::super::product::{Input, Panels, Start};
    use super::super::testing::values;
    use super::*;

    /// Values of columns in the order of panels.
    fn ordered(values: &[f32], order: &[Option<usize>]) -> Vec<f32> {
        order.iter().map(|from| from.map_or(0.0, |from| values[from])).collect()
    }

    #[test]
    fn a_row_is_a_product_of_one_row() {
        for kernel in Kernel::tested(0) {
            for (first, second, columns) in
                [(1, 1, 1), (5, 2, 7), (40, 5, 48), (40, 0, 56), (3, 1, 12), (9, 3, 129), (4, 4, 400)]
            {
                let (x, y) = (values(first, 1), values(second, 2));
                let inputs = [Input::rows(&x, first), Input::rows(&y, second)];
                let (weight, bias) = (values((first + second) * columns, 3), values(columns, 4));
                let matrix = Matrix::new(&weight, columns);
                let panels = Panels::new(kernel, columns, &bias, &[matrix]);
                let single = RowPanels::new(kernel, &bias, matrix);
                let more = values(columns + 16, 5);
                for (start, plus) in [(Start::Bias, None), (Start::Rows(&more, columns), Some(&more[..]))] {
                    let (mut row, mut expected) = (vec![0.0; single.room()], vec![0.0; columns]);
                    single.row(&[&x, &y], plus, &mut row);
                    panels.product(1, &inputs, start, (&mut expected, columns));
                    assert!(row[..columns] == expected, "{}: {columns} columns", kernel.name());
                }

                // as many gated channels
                let (weight, more) = (values((first + second) * 2 * columns, 6), values(2 * columns, 7));
                let matrix = Matrix::new(&weight, 2 * columns);
                let single = RowPanels::gated(kernel, columns, matrix);
                for more in [None, Some(more)] {
                    let bias = more.clone().unwrap_or_else(|| vec![0.0; 2 * columns]);
                    let plus = more.map(|more| ordered(&more, &gated_order(kernel, columns, true)));
                    let (mut row, mut expected) = (vec![0.0; single.room()], vec![0.0; columns]);
                    single.row(&[&x, &y], plus.as_deref(), &mut row);
                    Panels::gated(kernel, columns, &bias, &[matrix]).product(
                        1,
                        &inputs,
                        Start::Bias,
                        (&mut expected, columns),
                    );
                    assert!(row[..columns] == expected, "{}: {columns} channels", kernel.name());
                }
            }
        }
    }
}

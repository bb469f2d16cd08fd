//! One row times weights, again and again: a recursion's products, of which each waits for the one before.
//!
//! What a product of many rows hides, its call and its preparations, is as long here as the work, and the weights come
//! from beyond the first cache: so there is one place to start from, rows have room for whole vectors, and where the
//! last columns fill one vector or less, the last panel is half as wide as the others. Of a gated product's that are
//! left for it, half a vector is tanh's and half σ's:
//!
//! ```text
//!   40 channels, 16 lanes:   panel 0              panel 1               half a panel
//!                            tanh 0–15, σ 0–15    tanh 16–31, σ 16–31   tanh 32–39 σ 32–39
//! ```

use super::choice::Kernel;
use super::product::{Matrix, gated_order, lanes, packed, plain_order};
use super::tile::{along, finish, line, plus};
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector, gate};

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
        let (values, begin) = packed(kernel, order, bias, &[matrix]);
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
    let vectors = single.panels.width / V::LANES;
    let (mut first, full, half) = (0, vectors / 2, vectors % 2 == 1);
    // SAFETY: the caller's promise.
    unsafe {
        while full - first > 5 {
            abreast::<V, 4, 0>(single, first);
            first += 4;
        }
        match (full - first, half) {
            (0, _) => abreast::<V, 0, 1>(single, first),
            (1, false) => abreast::<V, 1, 0>(single, first),
            (1, true) => abreast::<V, 1, 1>(single, first),
            (2, false) => abreast::<V, 2, 0>(single, first),
            (2, true) => abreast::<V, 2, 1>(single, first),
            (3, false) => abreast::<V, 3, 0>(single, first),
            (3, true) => abreast::<V, 3, 1>(single, first),
            (4, false) => abreast::<V, 4, 0>(single, first),
            (4, true) => abreast::<V, 4, 1>(single, first),
            (_, false) => abreast::<V, 5, 0>(single, first),
            (_, true) => abreast::<V, 5, 1>(single, first),
        }
    }
}

/// `P` panels from `first` on, and `H` halves of one behind them, at the same time: in one alone, its sums would wait
/// for each other.
///
/// # Safety
/// As [`run`]; the panels must be there.
#[inline(always)]
unsafe fn abreast<V: Vector, const P: usize, const H: usize>(single: &Single, first: usize) {
    let &Single { panels: &RowPanels { depth, gated, .. }, plus: more, .. } = single;
    let width = 2 * V::LANES;
    let size = (depth + 1) * width;
    // SAFETY: `RowPanels::row` has checked that all these lie within their slices.
    unsafe {
        let mut at = single.panels.values.as_ptr().add(single.panels.begin + first * size);
        let mut half_at = at.add(P * size);
        let mut sums: [[V; 2]; P] = std::array::from_fn(|p| line(at.add(p * size)));
        let mut half: [[V; 1]; H] = [line(half_at); H];
        if let Some(more) = more {
            let more = more.as_ptr().add(first * width);
            sums = std::array::from_fn(|p| plus(sums[p], line(more.add(p * width))));
            half = half.map(|half| plus(half, line(more.add(P * width))));
        }
        (at, half_at) = (at.add(width), half_at.add(V::LANES));
        for input in single.inputs {
            (sums, half) = along((sums, half), input, (at, half_at), size);
            (at, half_at) = (at.add(input.len() * width), half_at.add(input.len() * V::LANES));
        }
        let columns = if gated { V::LANES } else { width };
        let out = single.out.add(first * columns);
        for (p, sums) in sums.into_iter().enumerate() {
            finish(gated, sums, out.add(p * columns));
        }
        for [sum] in half {
            let sum = if gated { gate(sum, upper_half(sum)) } else { sum };
            sum.store(out.add(P * columns));
        }
    }
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
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

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

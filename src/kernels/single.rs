//! One row times weights, again and again: a recursion's products, of which each waits for the one before.
//!
//! What a product of many rows hides, its call and its preparations, is as long here as the work: so all panels
//! are taken to be full, and rows to have room for that, and there is one place to start from.

use super::tile::{along, finish, line, plus};
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
use super::vector::Vector;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};

/// A checked product of one row.
pub(super) struct Single<'a> {
    pub panels: *const f32,
    /// Panels, and lines of each without the bias.
    pub count: usize,
    pub depth: usize,
    pub gated: bool,
    /// Side by side the values that meet the lines.
    pub inputs: &'a [&'a [f32]],
    /// What is added to the bias, in the panels' order.
    pub plus: Option<&'a [f32]>,
    /// Room for the columns of all panels.
    pub out: *mut f32,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx2>(single) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx512>(single) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
pub(super) unsafe fn neon(single: &Single) {
    // SAFETY: the caller's promise.
    unsafe { run::<Neon>(single) }
}

/// # Safety
/// The processor must have the vector's feature, and the product be checked.
#[inline(always)]
pub(super) unsafe fn run<V: Vector>(single: &Single) {
    let mut first = 0;
    while first < single.count {
        // SAFETY: the caller's promise.
        first += unsafe {
            match single.count - first {
                1 => abreast::<V, 1>(single, first),
                2 => abreast::<V, 2>(single, first),
                3 => abreast::<V, 3>(single, first),
                4 | 7 | 8 => abreast::<V, 4>(single, first),
                5 => abreast::<V, 5>(single, first),
                _ => abreast::<V, 6>(single, first),
            }
        };
    }
}

/// `P` panels from `first` on at the same time: in one alone, its two sums would wait for each other. Gives `P`.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn abreast<V: Vector, const P: usize>(single: &Single, first: usize) -> usize {
    let width = 2 * V::LANES;
    let size = (single.depth + 1) * width;
    // SAFETY: `Panels::row` has checked that all these lie within their slices.
    unsafe {
        let mut weights = single.panels.add(first * size);
        let mut sums: [[V; 2]; P] = std::array::from_fn(|p| line(weights.add(p * size)));
        if let Some(more) = single.plus {
            let more = more.as_ptr().add(first * width);
            for (p, sums) in sums.iter_mut().enumerate() {
                *sums = plus(*sums, line(more.add(p * width)));
            }
        }
        weights = weights.add(width);
        for input in single.inputs {
            (sums, weights) = along(sums, input, (weights, size));
        }
        let columns = if single.gated { V::LANES } else { width };
        for (p, sums) in sums.into_iter().enumerate() {
            finish(single.gated, sums, single.out.add((first + p) * columns));
        }
    }
    P
}

//! The inner loops, on slices: no tensors, no allocation policy, the only home of `unsafe`.
//!
//! Activations are time-major, `[steps, channels]`, so that a dilation is a row offset and every
//! convolution is a matrix product without copies. Synthesis runs on panels of weights packed once
//! ([`product`]), WaveNets in training on the same, packed for each product ([`multiply`]), other nets' training on
//! the `gemm` crate.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod bfloat;
pub(crate) mod blocks;
pub mod choice;
pub mod conditioner;
pub mod features;
pub mod gate;
pub(crate) mod integer;
mod merged;
pub mod multiply;
pub mod normal;
pub mod peak;
pub mod plane;
pub mod pointwise;
pub mod predict;
pub mod product;
pub(crate) mod quantise;
pub mod real;
pub mod recall;
pub mod recursion;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod refused;
pub mod rows;
pub mod separable;
pub(crate) mod short;
mod single;
pub mod spectral;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod tile;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tile_unit;
mod vector;
pub mod wavenet;
pub mod weight_norm;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod wide_unit;

use gemm::Parallelism;

/// A strided matrix view: `data[offset + row · row_stride + column · column_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    pub row: usize,
    pub column: usize,
}

impl Strides {
    /// Rows one after the other, `width` apart.
    pub fn rows(width: usize) -> Self {
        Self { row: width, column: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { row: self.column, column: self.row }
    }

    fn end(self, rows: usize, columns: usize) -> usize {
        if rows == 0 || columns == 0 { 0 } else { (rows - 1) * self.row + (columns - 1) * self.column + 1 }
    }
}

/// A matrix as it lies.
type View<'a> = (&'a [f32], Strides);

/// Writes the row over and over, each time `stride` further on.
fn fill_rows(out: &mut [f32], stride: usize, row: &[f32]) {
    out.chunks_mut(stride).for_each(|out| out[..row.len()].copy_from_slice(row));
}

pub(crate) fn add(out: &mut [f32], x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += x);
}

/// `out[m, n] += a[m, k] · b[k, n]`, one thread.
pub(crate) fn matmul_add(
    (m, k, n): (usize, usize, usize),
    a: (&[f32], Strides),
    b: (&[f32], Strides),
    out: (&mut [f32], Strides),
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(a.0.len() >= a.1.end(m, k) && b.0.len() >= b.1.end(k, n) && out.0.len() >= out.1.end(m, n));
    // SAFETY: the assertion above keeps every address that the three views reach inside their
    // slices, and `out` is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.0.as_mut_ptr(),
            out.1.column as isize,
            out.1.row as isize,
            true,
            a.0.as_ptr(),
            a.1.column as isize,
            a.1.row as isize,
            b.0.as_ptr(),
            b.1.column as isize,
            b.1.row as isize,
            1.0_f32,
            1.0_f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

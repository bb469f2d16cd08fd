//! The inner loops, on slices: no tensors, no allocation policy, the only home of `unsafe`.
//!
//! Activations are time-major, `[steps, channels]`, so that a dilation is a row offset and every
//! convolution is a matrix product without copies.

pub mod attention;
pub mod gate;
pub mod plane;
pub mod predict;
pub mod recall;
pub mod spectral;
pub mod stream;
pub mod wavenet;

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

/// The longest sum that the GEMM works out in one piece whatever the shape.
const DEPTH: usize = 512;

/// `out[m, n] += a[m, k] · b[k, n]`, one thread, all with rows one after the other (`b`'s `stride`
/// apart): the bits of a row of `out` depend on that row of `a` alone, not on how many rows go along.
///
/// The GEMM picks another order of summation for single rows or columns and splits long sums by
/// shape; those cases are kept from it here.
pub(crate) fn matmul_rows((m, k, n): (usize, usize, usize), a: &[f32], (b, stride): (&[f32], usize), out: &mut [f32]) {
    if m == 1 && n > 1 && k > 2 {
        let (twice, mut both) = ([&a[..k], &a[..k]].concat(), [&out[..n], &out[..n]].concat());
        matmul_rows((2, k, n), &twice, (b, stride), &mut both);
        out[..n].copy_from_slice(&both[..n]);
        return;
    }
    if n == 1 || k <= 2 {
        for (a, out) in a.chunks_exact(k).zip(out.chunks_exact_mut(n)).take(m) {
            for (a, b) in a.iter().zip(b.chunks(stride)) {
                out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
            }
        }
        return;
    }
    for from in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - from);
        matmul_add(
            (m, depth, n),
            (&a[from..], Strides::rows(k)),
            (&b[from * stride..], Strides::rows(stride)),
            (out, Strides::rows(n)),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        let values = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
        };
        for (k, n) in [(1, 5), (2, 64), (3, 1), (8, 16), (16, 17), (64, 128), (80, 96), (640, 48), (1000, 130), (7, 33)]
        {
            let rows = 70;
            let (a, b, out) = (values(rows * k, 1), values(k * n, 2), values(rows * n, 3));
            let mut whole = out.clone();
            matmul_rows((rows, k, n), &a, (&b, n), &mut whole);
            for (from, to) in [(0, 1), (3, 5), (7, 10), (1, 18), (16, 32), (5, 69), (0, 33), (69, 70)] {
                let mut part = out[from * n..to * n].to_vec();
                matmul_rows((to - from, k, n), &a[from * k..], (&b, n), &mut part);
                assert!(part == whole[from * n..to * n], "{k}×{n}, rows {from}..{to}");
            }
        }
    }
}

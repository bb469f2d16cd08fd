//! The processor's peak: multiply-adds that wait for nothing.

use super::choice::Kernel;
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector};
use std::hint::black_box;

/// Sums that are worked on at once: more than what one takes times how many begin together.
const SUMS: usize = 12;
/// Multiply-adds of each sum between two looks at the clock.
const TIMES: usize = 20_000;

/// Multiply-adds of f32 done by one call, from registers alone.
///
/// # Panics
/// If the kernels don't run here.
pub fn multiply_adds(kernel: Kernel) -> usize {
    assert!(kernel.runs_here());
    // SAFETY: the kernels run here.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512(),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => run::<Neon>(),
            _ => run::<Portable>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2() -> usize {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512() -> usize {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx512>() }
}

/// # Safety
/// The processor must have the vector's feature.
#[inline(always)]
unsafe fn run<V: Vector>() -> usize {
    // SAFETY: the caller's promise.
    let (x, weight) = unsafe { (V::splat(black_box(0.5)), V::splat(black_box(0.25))) };
    let mut sums = [x; SUMS];
    for _ in 0..TIMES {
        for sum in &mut sums {
            *sum = x.fma(weight, *sum);
        }
    }
    black_box(sums);
    SUMS * TIMES * V::LANES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_takes_time() {
        for kernel in Kernel::available() {
            let begun = std::time::Instant::now();
            let count: usize = (0..20).map(|_| multiply_adds(kernel)).sum();
            // no processor does 10¹² a second on one core
            let rate = count as f64 / begun.elapsed().as_secs_f64();
            assert!((1e6..1e12).contains(&rate), "{}: {rate:e}", kernel.name());
        }
    }
}

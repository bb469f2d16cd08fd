//! A vector of f32 values, in the widths that processors have.
//!
//! Kernels are written once over [`Vector`] and compiled once for each type below, inside a function
//! with its processor's features. A vector can be made by `unsafe` functions alone; having one proves
//! that the processor has the feature, so that everything else is safe.

/// `LANES` values of f32.
pub(super) trait Vector: Copy {
    /// Values in a vector.
    const LANES: usize;
    /// Rows of a product's tile: with two vectors a row, two of weights and one of input, as many as
    /// the registers hold.
    const ROWS: usize;

    /// `x` in every lane.
    ///
    /// # Safety
    /// The processor must have the type's feature.
    unsafe fn splat(x: f32) -> Self;
    /// Values in a row.
    ///
    /// # Safety
    /// The processor must have the type's feature, and `LANES` values must stand at `at`.
    unsafe fn load(at: *const f32) -> Self;
    /// Writes the values in a row.
    ///
    /// # Safety
    /// `LANES` values must fit at `at`.
    unsafe fn store(self, at: *mut f32);
    /// `self · b + c`, rounded once where the processor can.
    fn fma(self, b: Self, c: Self) -> Self;
    /// Sum.
    fn add(self, b: Self) -> Self;
    /// Difference.
    fn sub(self, b: Self) -> Self;
    /// Product.
    fn mul(self, b: Self) -> Self;
    /// Quotient.
    fn div(self, b: Self) -> Self;
    /// Clamped to `±bound`.
    fn clamp(self, bound: Self) -> Self;
    /// `self · 2ⁿ` of integers `n` that were added to [`ROUND`]; the product must be a normal number.
    fn times_pow2(self, n: Self) -> Self;
}

/// A vector with pairs of 16-bit numbers of its size: integers, multiplied and added up in i32, or bf16; or with four
/// bytes in each lane.
///
/// Sums of integers are exact, and so the same for every type, as long as they stay within i32.
pub(super) trait Short: Vector {
    /// `LANES` pairs of i16, or of bf16.
    type Pairs: Copy;
    /// `LANES` values of i32.
    type Sums: Copy;

    /// Sums in a row.
    ///
    /// # Safety
    /// The processor must have the type's feature, and `LANES` values must stand at `at`.
    unsafe fn load_sums(at: *const i32) -> Self::Sums;
    /// One pair in every lane.
    ///
    /// # Safety
    /// The processor must have the type's feature, and two values must stand at `at`.
    unsafe fn splat_pair(at: *const i16) -> Self::Pairs;
    /// Pairs in a row.
    ///
    /// # Safety
    /// The processor must have the type's feature, and `2 · LANES` values must stand at `at`.
    unsafe fn load_pairs(at: *const i16) -> Self::Pairs;
    /// `sums + a₀ b₀ + a₁ b₁` in each lane.
    fn multiply_add(a: Self::Pairs, b: Self::Pairs, sums: Self::Sums) -> Self::Sums;
    /// The sums, each rounded to f32.
    fn to_floats(sums: Self::Sums) -> Self;
    /// Of pairs of bf16 the first ones, and the second ones.
    fn widen(pairs: Self::Pairs) -> [Self; 2];
}

/// How the numbers that share lanes of 32 bits are multiplied and added up.
pub(super) trait MultiplyAdd<V: Short> {
    /// A sum in each lane.
    type Sums: Copy;

    /// `sums + Σ a b` over the numbers of each lane.
    ///
    /// # Safety
    /// The processor must have the way's feature.
    unsafe fn multiply_add(a: V::Pairs, b: V::Pairs, sums: Self::Sums) -> Self::Sums;
}

/// Pairs of integers, by what every processor with the vector has.
pub(super) struct IntegersInTwo;

impl<V: Short> MultiplyAdd<V> for IntegersInTwo {
    type Sums = V::Sums;

    #[inline(always)]
    unsafe fn multiply_add(a: V::Pairs, b: V::Pairs, sums: V::Sums) -> V::Sums {
        V::multiply_add(a, b, sums)
    }
}

/// The same sums by one instruction: VNNI, in the form for the vector (AVX-VNNI, or AVX-512's).
#[cfg(target_arch = "x86_64")]
pub(super) struct IntegersInOne;

/// Four bytes of `a` without a sign and four of `b` with one, one after the other.
pub(super) struct BytesOneByOne;

impl<const N: usize> MultiplyAdd<Lanes<N>> for BytesOneByOne {
    type Sums = [i32; N];

    #[inline(always)]
    unsafe fn multiply_add(a: [[i16; 2]; N], b: [[i16; 2]; N], sums: [i32; N]) -> [i32; N] {
        let product = |i: usize, j: usize| {
            let ([a, more], [b, most]) = (a[i][j].to_le_bytes(), b[i][j].to_le_bytes());
            i32::from(a) * i32::from(b.cast_signed()) + i32::from(more) * i32::from(most.cast_signed())
        };
        std::array::from_fn(|i| sums[i] + (product(i, 0) + product(i, 1)))
    }
}

/// The same sums by one instruction of VNNI.
#[cfg(target_arch = "x86_64")]
pub(super) struct BytesInOne;

/// Pairs of bf16, widened to f32.
pub(super) struct BfloatsInTwo;

impl<V: Short> MultiplyAdd<V> for BfloatsInTwo {
    type Sums = V;

    #[inline(always)]
    unsafe fn multiply_add(a: V::Pairs, b: V::Pairs, sums: V) -> V {
        let (a, b) = (V::widen(a), V::widen(b));
        a[1].fma(b[1], a[0].fma(b[0], sums))
    }
}

/// Pairs of bf16 by one instruction (AVX512_BF16), whose sums are rounded to the nearest as f32's are, and in which
/// numbers that aren't normal count as zeros.
#[cfg(target_arch = "x86_64")]
pub(super) struct BfloatsInOne;

/// 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `2^x`, for `|x| > 60` of ±60: the polynomial's error is 7.5e-8 of the value (minimax, by Remez'
/// exchange on ±½).
#[inline(always)]
fn exp2<V: Vector>(x: V) -> V {
    // SAFETY: `x` proves the feature.
    let c = |value: f32| unsafe { V::splat(value) };
    let x = x.clamp(c(60.0));
    let rounded = x.add(c(ROUND));
    let r = x.sub(rounded.sub(c(ROUND)));
    let p = c(1.327_647_2e-3).fma(r, c(9.675_541e-3));
    let p = p.fma(r, c(5.550_713e-2));
    let p = p.fma(r, c(2.402_212e-1));
    let p = p.fma(r, c(6.931_469_4e-1));
    p.fma(r, c(1.000_000_1)).times_pow2(rounded)
}

/// `tanh(a) · σ(b)`; error against f64 below 3e-7 (tested).
#[inline(always)]
pub(super) fn gate<V: Vector>(a: V, b: V) -> V {
    use std::f32::consts::LOG2_E;
    // SAFETY: `a` proves the feature.
    let c = |value: f32| unsafe { V::splat(value) };
    // tanh(a) = (1 − e^−2a) / (1 + e^−2a), σ(b) = 1 / (1 + e^−b): one division for both. Beyond 2^±60
    // both are constant, and the product of the denominators is still finite.
    let (one, ea, eb) = (c(1.0), exp2(a.mul(c(-2.0 * LOG2_E))), exp2(b.mul(c(-LOG2_E))));
    one.sub(ea).div(one.add(ea).mul(one.add(eb)))
}

/// `N` values, by whatever the compiler makes of that.
#[derive(Clone, Copy)]
pub(super) struct Lanes<const N: usize>([f32; N]);

/// For any processor: four values, which most have some vector for.
pub(super) type Portable = Lanes<4>;

impl<const N: usize> Lanes<N> {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl<const N: usize> Vector for Lanes<N> {
    const LANES: usize = N;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; N])
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { at.cast::<[f32; N]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<[f32; N]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // two roundings: without the instruction, one would cost a call
        self.mul(b).add(c)
    }
    #[inline(always)]
    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    fn clamp(self, bound: Self) -> Self {
        self.zip(bound, |a, bound| a.max(-bound).min(bound))
    }
    #[inline(always)]
    fn times_pow2(self, n: Self) -> Self {
        self.zip(n, |x, n| f32::from_bits(x.to_bits().wrapping_add(n.to_bits() << 23)))
    }
}

impl<const N: usize> Short for Lanes<N> {
    type Pairs = [[i16; 2]; N];
    type Sums = [i32; N];

    #[inline(always)]
    unsafe fn load_sums(at: *const i32) -> Self::Sums {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::Sums>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_pair(at: *const i16) -> Self::Pairs {
        // SAFETY: the caller's promise.
        [unsafe { at.cast::<[i16; 2]>().read_unaligned() }; N]
    }
    #[inline(always)]
    unsafe fn load_pairs(at: *const i16) -> Self::Pairs {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::Pairs>().read_unaligned() }
    }
    #[inline(always)]
    fn multiply_add(a: Self::Pairs, b: Self::Pairs, sums: Self::Sums) -> Self::Sums {
        let product = |i: usize, j: usize| i32::from(a[i][j]) * i32::from(b[i][j]);
        std::array::from_fn(|i| sums[i] + (product(i, 0) + product(i, 1)))
    }
    #[inline(always)]
    fn to_floats(sums: Self::Sums) -> Self {
        Self(sums.map(|sum| sum as f32))
    }
    #[inline(always)]
    fn widen(pairs: Self::Pairs) -> [Self; 2] {
        let half = |which: usize| Self(pairs.map(|pair| f32::from_bits(u32::from(pair[which].cast_unsigned()) << 16)));
        [half(0), half(1)]
    }
}

/// The methods of an x86 vector from the names of its intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! x86 {
    ($name:ident, $inner:ident, $lanes:literal, $rows:literal, $splat:ident, $load:ident, $store:ident, $fma:ident,
     $add:ident, $sub:ident, $mul:ident, $div:ident, $max:ident, $min:ident,
     $to_bits:ident, $from_bits:ident, $add_int:ident, $shift:ident,
     $ints:ident, $splat_int:ident, $load_ints:ident, $multiply:ident, $to_floats:ident, $and:ident) => {
        #[derive(Clone, Copy)]
        pub(in crate::kernels) struct $name($inner);

        #[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all: see the module's first lines")]
        impl Vector for $name {
            const LANES: usize = $lanes;
            const ROWS: usize = $rows;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                Self(unsafe { $splat(x) })
            }
            #[inline(always)]
            unsafe fn load(at: *const f32) -> Self {
                Self(unsafe { $load(at) })
            }
            #[inline(always)]
            unsafe fn store(self, at: *mut f32) {
                unsafe { $store(at, self.0) }
            }
            #[inline(always)]
            fn fma(self, b: Self, c: Self) -> Self {
                Self(unsafe { $fma(self.0, b.0, c.0) })
            }
            #[inline(always)]
            fn add(self, b: Self) -> Self {
                Self(unsafe { $add(self.0, b.0) })
            }
            #[inline(always)]
            fn sub(self, b: Self) -> Self {
                Self(unsafe { $sub(self.0, b.0) })
            }
            #[inline(always)]
            fn mul(self, b: Self) -> Self {
                Self(unsafe { $mul(self.0, b.0) })
            }
            #[inline(always)]
            fn div(self, b: Self) -> Self {
                Self(unsafe { $div(self.0, b.0) })
            }
            #[inline(always)]
            fn clamp(self, bound: Self) -> Self {
                unsafe { Self($min($max(self.0, $sub($splat(0.0), bound.0)), bound.0)) }
            }
            #[inline(always)]
            fn times_pow2(self, n: Self) -> Self {
                unsafe { Self($from_bits($add_int($to_bits(self.0), $shift::<23>($to_bits(n.0))))) }
            }
        }

        #[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all: see the module's first lines")]
        impl Short for $name {
            type Pairs = $ints;
            type Sums = $ints;

            #[inline(always)]
            unsafe fn load_sums(at: *const i32) -> $ints {
                unsafe { $load_ints(at.cast()) }
            }
            #[inline(always)]
            unsafe fn splat_pair(at: *const i16) -> $ints {
                unsafe { $splat_int(at.cast::<i32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn load_pairs(at: *const i16) -> $ints {
                unsafe { $load_ints(at.cast()) }
            }
            #[inline(always)]
            fn multiply_add(a: $ints, b: $ints, sums: $ints) -> $ints {
                unsafe { $add_int(sums, $multiply(a, b)) }
            }
            #[inline(always)]
            fn to_floats(sums: $ints) -> Self {
                Self(unsafe { $to_floats(sums) })
            }
            #[inline(always)]
            fn widen(pairs: $ints) -> [Self; 2] {
                unsafe {
                    let second = $and(pairs, $splat_int(0xffff_0000_u32.cast_signed()));
                    [Self($from_bits($shift::<16>(pairs))), Self($from_bits(second))]
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BfloatsInOne, BytesInOne, IntegersInOne, MultiplyAdd, Short, Vector};
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// By VNNI's instructions; that for pairs in assembly, as LLVM takes its intrinsic apart into
    /// [`Short::multiply_add`]'s two.
    macro_rules! in_one {
        ($vector:ident, $ints:ident, $class:ident, $prefix:literal, $features:literal, $bytes:ident) => {
            impl MultiplyAdd<$vector> for IntegersInOne {
                type Sums = $ints;

                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn multiply_add(a: $ints, b: $ints, mut sums: $ints) -> $ints {
                    // SAFETY: the processor has the instruction, as the caller promises; it touches nothing else.
                    unsafe {
                        asm!(concat!($prefix, "vpdpwssd {}, {}, {}"), inlateout($class) sums, in($class) a, in($class) b,
                             options(pure, nomem, nostack, preserves_flags));
                    }
                    sums
                }
            }

            impl MultiplyAdd<$vector> for BytesInOne {
                type Sums = $ints;

                #[inline(always)]
                unsafe fn multiply_add(a: $ints, b: $ints, sums: $ints) -> $ints {
                    // SAFETY: the caller's promise.
                    unsafe { $bytes(sums, a, b) }
                }
            }
        };
    }
    in_one!(Avx2, __m256i, ymm_reg, "{{vex}} ", "avx2,avxvnni", _mm256_dpbusd_avx_epi32);
    in_one!(Avx512, __m512i, zmm_reg, "", "avx512f,avx512vnni", _mm512_dpbusd_epi32);

    impl MultiplyAdd<Avx512> for BfloatsInOne {
        type Sums = Avx512;

        #[inline(always)]
        unsafe fn multiply_add(a: __m512i, b: __m512i, sums: Avx512) -> Avx512 {
            // SAFETY: the caller's promise; any bits are pairs of bf16.
            unsafe {
                let [a, b] = [a, b].map(|pairs| std::mem::transmute::<__m512i, __m512bh>(pairs));
                Avx512(_mm512_dpbf16_ps(sums.0, a, b))
            }
        }
    }

    // sixteen registers: twelve of sums
    x86!(
        Avx2,
        __m256,
        8,
        6,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_div_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        _mm256_castps_si256,
        _mm256_castsi256_ps,
        _mm256_add_epi32,
        _mm256_slli_epi32,
        __m256i,
        _mm256_set1_epi32,
        _mm256_loadu_si256,
        _mm256_madd_epi16,
        _mm256_cvtepi32_ps,
        _mm256_and_si256
    );

    // thirty-two registers: twenty-four of sums
    x86!(
        Avx512,
        __m512,
        16,
        12,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_div_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        _mm512_castps_si512,
        _mm512_castsi512_ps,
        _mm512_add_epi32,
        _mm512_slli_epi32,
        __m512i,
        _mm512_set1_epi32,
        _mm512_loadu_si512,
        _mm512_madd_epi16,
        _mm512_cvtepi32_ps,
        _mm512_and_si512
    );
}
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::Vector;
    use std::arch::aarch64::*;

    /// Thirty-two registers: twenty-four of sums.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Neon(float32x4_t);

    #[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all: see the module's first lines")]
    impl Vector for Neon {
        const LANES: usize = 4;
        const ROWS: usize = 12;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            Self(unsafe { vdupq_n_f32(x) })
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            Self(unsafe { vld1q_f32(at) })
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            unsafe { vst1q_f32(at, self.0) }
        }
        #[inline(always)]
        fn fma(self, b: Self, c: Self) -> Self {
            Self(unsafe { vfmaq_f32(c.0, self.0, b.0) })
        }
        #[inline(always)]
        fn add(self, b: Self) -> Self {
            Self(unsafe { vaddq_f32(self.0, b.0) })
        }
        #[inline(always)]
        fn sub(self, b: Self) -> Self {
            Self(unsafe { vsubq_f32(self.0, b.0) })
        }
        #[inline(always)]
        fn mul(self, b: Self) -> Self {
            Self(unsafe { vmulq_f32(self.0, b.0) })
        }
        #[inline(always)]
        fn div(self, b: Self) -> Self {
            Self(unsafe { vdivq_f32(self.0, b.0) })
        }
        #[inline(always)]
        fn clamp(self, bound: Self) -> Self {
            Self(unsafe { vminq_f32(vmaxq_f32(self.0, vnegq_f32(bound.0)), bound.0) })
        }
        #[inline(always)]
        fn times_pow2(self, n: Self) -> Self {
            unsafe {
                let exponent = vshlq_n_s32::<23>(vreinterpretq_s32_f32(n.0));
                Self(vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(self.0), exponent)))
            }
        }
    }
}
#[cfg(target_arch = "aarch64")]
pub(super) use neon::Neon;

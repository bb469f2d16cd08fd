//! A product's rows times one panel's lines, a tile of sums in registers at a time.

use super::product::{Input, Layout, Start};
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{MultiplyAdd, Short, Vector, gate};
use std::ops::Range;

/// A checked product of whatever numbers.
pub(super) struct Job<'a, L> {
    pub layout: Layout,
    /// Rows.
    pub count: usize,
    pub lines: L,
    pub start: Start<'a>,
    pub out: *mut f32,
    /// Values from one row of the answer to the next.
    pub stride: usize,
}

/// The lines of a product's panels, and the rows that meet them.
pub(super) trait Lines<V: Vector> {
    /// Where a panel's bias stands.
    ///
    /// # Safety
    /// The panel must be there.
    unsafe fn bias(&self, panel: usize) -> *const f32;

    /// Adds the products of `R` rows from `row` on with the first `N` vectors of a panel's lines; by value, so that the
    /// sums stay in registers.
    ///
    /// # Safety
    /// The panel and the rows must be there.
    unsafe fn accumulate<const R: usize, const N: usize>(
        &self,
        panel: usize,
        row: usize,
        sums: [[V; N]; R],
    ) -> [[V; N]; R];
}

/// Of f32.
pub(super) struct Floats<'a> {
    pub panels: *const f32,
    /// Lines of a panel, without the bias.
    pub depth: usize,
    pub inputs: &'a [Input<'a>],
}

impl<V: Vector> Lines<V> for Floats<'_> {
    #[inline(always)]
    unsafe fn bias(&self, panel: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.panels.add(panel * (self.depth + 1) * 2 * V::LANES) }
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
            let mut weights = <Self as Lines<V>>::bias(self, panel).add(width);
            for input in self.inputs {
                let mut rows = input.rows.as_ptr().add(row * input.stride);
                for tap in 0..input.taps {
                    if tap > 0 {
                        rows = rows.add(input.dilation * input.stride);
                    }
                    sums = match input.step {
                        1 => accumulate(sums, (rows, input.stride, 1), input.width, weights),
                        step => accumulate(sums, (rows, input.stride, step), input.width, weights),
                    };
                    weights = weights.add(input.width * width);
                }
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2(job: &Job<Floats>) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx2>(job) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512(job: &Job<Floats>) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx512>(job) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
pub(super) unsafe fn neon(job: &Job<Floats>) {
    // SAFETY: the caller's promise.
    unsafe { run::<Neon>(job) }
}

/// # Safety
/// The processor must have the vector's feature, and the job be checked.
#[inline(always)]
pub(super) unsafe fn run<V: Vector>(job: &Job<Floats>) {
    let columns = if job.layout.gated { V::LANES } else { 2 * V::LANES };
    let full = job.layout.columns / columns;
    let mut first = 0;
    while job.count == 1 && first + 1 < full && job.lines.inputs.iter().all(|input| input.step == 1) {
        // SAFETY: the caller's promise; the panels are full.
        first += unsafe {
            match full - first {
                2 => abreast::<V, 2>(job, first),
                3 => abreast::<V, 3>(job, first),
                4 | 7 | 8 => abreast::<V, 4>(job, first),
                5 => abreast::<V, 5>(job, first),
                _ => abreast::<V, 6>(job, first),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe { tiles::<V, Floats>(job, first) }
}

/// The panels from `first` on.
///
/// # Safety
/// The processor must have the vector's feature, and the job be checked.
#[inline(always)]
pub(super) unsafe fn tiles<V: Vector, L: Lines<V>>(job: &Job<L>, first: usize) {
    for panel in first..job.layout.panels {
        // SAFETY: the caller's promise.
        unsafe { panel_rows(job, panel, 0..job.count) }
    }
}

/// A function of all rows and panels of a product, for a processor's features, its vectors and the lines.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled {
    ($name:ident, $features:literal, $vector:ty, $lines:ty) => {
        #[target_feature(enable = $features)]
        unsafe fn $name(job: &$crate::kernels::tile::Job<$lines>) {
            // SAFETY: the caller's promise.
            unsafe { $crate::kernels::tile::tiles::<$vector, _>(job, 0) }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use compiled;

/// Some rows of one panel's columns.
///
/// # Safety
/// As [`tiles`]; the rows must be the job's.
#[inline(always)]
pub(super) unsafe fn panel_rows<V: Vector, L: Lines<V>>(job: &Job<L>, panel: usize, rows: Range<usize>) {
    let mut row = rows.start;
    while row < rows.end {
        // tiles of much the same height: a low one is slow
        let left = rows.end - row;
        let rows = left.div_ceil(left.div_ceil(V::ROWS));
        // SAFETY: the caller's promise; the rows are the job's.
        unsafe {
            match rows {
                1 => tile::<V, L, 1>(job, panel, row),
                2 => tile::<V, L, 2>(job, panel, row),
                3 => tile::<V, L, 3>(job, panel, row),
                4 => tile::<V, L, 4>(job, panel, row),
                5 => tile::<V, L, 5>(job, panel, row),
                6 => tile::<V, L, 6>(job, panel, row),
                7 => tile::<V, L, 7>(job, panel, row),
                8 => tile::<V, L, 8>(job, panel, row),
                9 => tile::<V, L, 9>(job, panel, row),
                10 => tile::<V, L, 10>(job, panel, row),
                11 => tile::<V, L, 11>(job, panel, row),
                _ => tile::<V, L, 12>(job, panel, row),
            }
        }
        row += rows;
    }
}

/// The only row of a product, for `P` full panels from `first` on: in one alone, its two sums would wait for
/// each other. The bits are [`tile`]'s. Gives `P`.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn abreast<V: Vector, const P: usize>(job: &Job<Floats>, first: usize) -> usize {
    let (lines, width) = (&job.lines, 2 * V::LANES);
    let columns = if job.layout.gated { V::LANES } else { width };
    let size = (lines.depth + 1) * width;
    // SAFETY: `product` has checked that all these lie within their slices.
    unsafe {
        let mut weights = lines.panels.add(first * size);
        let out = job.out.add(first * columns);
        let mut sums = [[V::splat(0.0); 2]; P];
        for (p, sums) in sums.iter_mut().enumerate() {
            *sums = line(weights.add(p * size));
            match job.start {
                Start::Bias => {}
                Start::Answer => *sums = line(out.add(p * columns)),
                Start::Rows(rows, _) => *sums = plus(*sums, line(rows.as_ptr().add((first + p) * columns))),
                Start::Between(rows, stride, up, from) => {
                    let now = rows.as_ptr().add(from / up * stride + (first + p) * width);
                    *sums = between(*sums, now, stride, part_of(from % up, up));
                }
                Start::Held(rows, stride, up, from) => {
                    *sums = plus(*sums, line(rows.as_ptr().add(from / up * stride + (first + p) * width)));
                }
            }
        }
        weights = weights.add(width);
        for input in lines.inputs {
            for tap in 0..input.taps {
                let row = &input.rows[tap * input.dilation * input.stride..][..input.width];
                sums = along(sums, row, weights, size);
                weights = weights.add(row.len() * width);
            }
        }
        for (p, sums) in sums.into_iter().enumerate() {
            finish(job.layout.gated, sums, out.add(p * columns));
        }
    }
    P
}

/// One row's products with the next lines of panels, `size` apart, added to their sums.
///
/// # Safety
/// The processor must have the vector's feature; as many lines as the row is long must be there in each panel.
#[inline(always)]
unsafe fn along<V: Vector, const P: usize>(
    mut sums: [[V; 2]; P],
    row: &[f32],
    mut weights: *const f32,
    size: usize,
) -> [[V; 2]; P] {
    for &x in row {
        // SAFETY: the caller's promise.
        unsafe {
            let x = V::splat(x);
            for (p, sums) in sums.iter_mut().enumerate() {
                let [a, b] = line(weights.add(p * size));
                *sums = [x.fma(a, sums[0]), x.fma(b, sums[1])];
            }
            weights = weights.add(2 * V::LANES);
        }
    }
    sums
}

/// Columns of the widest panel.
const WIDEST: usize = 32;

/// `R` rows of one panel's columns.
///
/// # Safety
/// As [`tiles`]; the rows must be the job's.
#[inline(always)]
unsafe fn tile<V: Vector, L: Lines<V>, const R: usize>(job: &Job<L>, panel: usize, row: usize) {
    if R > V::ROWS {
        return;
    }
    let columns = if job.layout.gated { V::LANES } else { 2 * V::LANES };
    let filled = columns.min(job.layout.columns - panel * columns);
    // SAFETY: the caller's promise.
    unsafe {
        // nobody asks for the second half of the last panel if the first has all that is left
        if job.layout.gated || filled > V::LANES {
            vectors::<V, L, R, 2>(job, (panel, row), (columns, filled));
        } else {
            vectors::<V, L, R, 1>(job, (panel, row), (V::LANES, filled));
        }
    }
}

/// [`tile`] of a panel's first `N` vectors, which make so many columns of the answer, and those that are there.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn vectors<V: Vector, L: Lines<V>, const R: usize, const N: usize>(
    job: &Job<L>,
    (panel, row): (usize, usize),
    (columns, filled): (usize, usize),
) {
    let first = panel * if job.layout.gated { V::LANES } else { 2 * V::LANES };
    // SAFETY: `product` has checked that all these lie within their slices.
    unsafe {
        let out = job.out.add(row * job.stride + first);
        let rows = match job.start {
            Start::Bias | Start::Between(..) | Start::Held(..) => None,
            Start::Answer => Some((out.cast_const(), job.stride)),
            Start::Rows(rows, stride) => Some((rows.as_ptr().add(row * stride + first), stride)),
        };
        if filled == columns {
            full::<V, L, R, N>(job, (panel, row), rows, (out, job.stride));
            return;
        }
        // vectors that aren't full work on a copy that is
        let mut copy = [[0.0; WIDEST]; R];
        if let Some((rows, stride)) = rows {
            for (r, copy) in copy.iter_mut().enumerate() {
                std::ptr::copy_nonoverlapping(rows.add(r * stride), copy.as_mut_ptr(), filled);
            }
        }
        let at = copy.as_mut_ptr().cast::<f32>();
        full::<V, L, R, N>(job, (panel, row), rows.map(|_| (at.cast_const(), WIDEST)), (at, WIDEST));
        for (r, copy) in copy.iter().enumerate() {
            std::ptr::copy_nonoverlapping(copy.as_ptr(), out.add(r * job.stride), filled);
        }
    }
}

/// [`vectors`] with as many columns as they hold: `rows` to start from and `out`, with their strides. In every branch the
/// loops over the tile's rows are plain, so that the sums stay in registers.
///
/// # Safety
/// As [`tile`]; `R` rows of the vectors' width must be at both.
#[inline(always)]
unsafe fn full<V: Vector, L: Lines<V>, const R: usize, const N: usize>(
    job: &Job<L>,
    (panel, row): (usize, usize),
    rows: Option<(*const f32, usize)>,
    (out, out_stride): (*mut f32, usize),
) {
    let width = 2 * V::LANES;
    // SAFETY: the caller's promise, and what `product` has checked.
    unsafe {
        let mut sums = [line(job.lines.bias(panel)); R];
        if matches!(job.start, Start::Answer) {
            sums = [[V::splat(0.0); N]; R];
        }
        if let Some((rows, stride)) = rows {
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = plus(*sum, line(rows.add(r * stride)));
            }
        }
        match job.start {
            Start::Between(rows, stride, up, from) => {
                along_rows(&mut sums, (rows, stride, up), from + row, |sum, now, step| {
                    between(sum, now.add(panel * width), stride, part_of(step, up))
                });
            }
            Start::Held(rows, stride, up, from) => {
                along_rows(&mut sums, (rows, stride, up), from + row, |sum, now, _| {
                    plus(sum, line(now.add(panel * width)))
                });
            }
            _ => {}
        }
        let sums = job.lines.accumulate(panel, row, sums);
        for (r, sums) in sums.into_iter().enumerate() {
            finish(job.layout.gated, sums, out.add(r * out_stride));
        }
    }
}

/// Gives each row's sums to `change` with the row of values, `up` steps long, that it falls upon, from step `first` on,
/// and how many steps it stands behind that row's first.
#[inline(always)]
fn along_rows<V: Vector, const R: usize, const N: usize>(
    sums: &mut [[V; N]; R],
    (rows, stride, up): (&[f32], usize, usize),
    first: usize,
    change: impl Fn([V; N], *const f32, usize) -> [V; N],
) {
    let mut step = first % up;
    let mut now = rows.as_ptr().wrapping_add(first / up * stride);
    for sum in sums {
        *sum = change(*sum, now, step);
        step += 1;
        if step == up {
            (now, step) = (now.wrapping_add(stride), 0);
        }
    }
}

/// A line of a panel, or the first vector of it.
///
/// # Safety
/// `N` vectors must stand at `at`, and the processor must have the vector's feature.
#[inline(always)]
pub(super) unsafe fn line<V: Vector, const N: usize>(at: *const f32) -> [V; N] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { V::load(at.add(i * V::LANES)) })
}

#[inline(always)]
pub(super) fn plus<V: Vector, const N: usize>(a: [V; N], b: [V; N]) -> [V; N] {
    std::array::from_fn(|i| a[i].add(b[i]))
}

/// How far a step stands from its row towards the next: half a step behind the first of `up`.
#[inline(always)]
fn part_of(step: usize, up: usize) -> f32 {
    (step as f32 + 0.5) / up as f32
}

/// `sums` and what stands `part` of the way between a line and that `stride` further on.
///
/// # Safety
/// As [`line`], for both lines.
#[inline(always)]
unsafe fn between<V: Vector, const N: usize>(sums: [V; N], now: *const f32, stride: usize, part: f32) -> [V; N] {
    // SAFETY: the caller's promise; the sums prove the feature.
    unsafe {
        let (now, next, part) = (line::<V, N>(now), line::<V, N>(now.add(stride)), V::splat(part));
        std::array::from_fn(|i| next[i].sub(now[i]).fma(part, sums[i].add(now[i])))
    }
}

/// Stores the sums, or what the gate makes of them.
///
/// # Safety
/// They must fit at `out`, or if `gated`, be two, and one fit.
#[inline(always)]
pub(super) unsafe fn finish<V: Vector, const N: usize>(gated: bool, sums: [V; N], out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        if gated {
            gate(sums[0], sums[N - 1]).store(out);
        } else {
            sums.into_iter().enumerate().for_each(|(i, sum)| sum.store(out.add(i * V::LANES)));
        }
    }
}

/// `sums[r] + Σ_k rows[r][k] · weights[k]`; by value, so that the sums stay in registers.
///
/// # Safety
/// The processor must have the vector's feature; `R` rows of `depth` values, `stride` and `step` apart, and as
/// many lines of weights must be there.
#[inline(always)]
unsafe fn accumulate<V: Vector, const R: usize, const N: usize>(
    mut sums: [[V; N]; R],
    (rows, stride, step): (*const f32, usize, usize),
    depth: usize,
    weights: *const f32,
) -> [[V; N]; R] {
    for k in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let weights: [V; N] = line(weights.add(k * 2 * V::LANES));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = V::splat(*rows.add(r * stride + k * step));
                *sums = std::array::from_fn(|i| x.fma(weights[i], sums[i]));
            }
        }
    }
    sums
}

/// `sums[r] + Σ_k rows[r][k] · weights[k]` of so many lanes' numbers, as [`accumulate`].
///
/// # Safety
/// The processor must have the vector's feature and the way's; `R` rows of so many pairs of 16 bits, `stride` apart, and
/// for each a line of them of weights must be there.
#[inline(always)]
pub(super) unsafe fn multiply_add<V: Short, M: MultiplyAdd<V>, const R: usize, const N: usize>(
    mut sums: [[M::Sums; N]; R],
    rows: *const i16,
    stride: usize,
    pairs: usize,
    weights: *const i16,
) -> [[M::Sums; N]; R] {
    for k in 0..pairs {
        // SAFETY: the caller's promise.
        unsafe {
            let weights = weights.add(k * 4 * V::LANES);
            let weights: [_; N] = std::array::from_fn(|i| V::load_pairs(weights.add(i * 2 * V::LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = V::splat_pair(rows.add(r * stride + 2 * k));
                *sums = std::array::from_fn(|i| M::multiply_add(x, weights[i], sums[i]));
            }
        }
    }
    sums
}

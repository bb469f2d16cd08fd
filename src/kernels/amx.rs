//! Tiles of bf16 (Intel AMX): 16 rows × 32 values times 16 pairs of weights × 16 columns in one instruction.
//!
//! A panel of [`super::bfloat`] meets 32 rows at a time, in eight tiles of registers:
//!
//! ```text
//!                  weights 6 │ weights 7      16 pairs × 16 columns each
//!                  ──────────┼──────────
//!  rows  0..16, 4 │  sums 0  │  sums 1        16 rows × 16 columns
//!  rows 16..32, 5 │  sums 2  │  sums 3
//! ```
//!
//! The sums go to a block of f32 in the first cache; start, gate and answer are [`super::product`]'s, in AVX-512.
//! Rust has no stable names for these instructions, so they stand here in assembly. Intel SDM, volume 1, chapter 18.

use super::bfloat::Bfloats;
use super::quantise::CHUNK;
use super::tile::{Job, Lines, panel_rows};
use super::vector::{Avx512, Vector};
use std::arch::asm;
use std::cell::{Cell, UnsafeCell};

/// Rows of a tile.
const ROWS: usize = 16;
/// Columns of a panel: two tiles, and two of AVX-512's vectors.
const WIDTH: usize = 32;

/// Whether the processor has tiles of bf16, and the system lets this process use them.
#[cfg(target_os = "linux")]
pub(super) fn granted() -> bool {
    static GRANTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *GRANTED.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        /// `arch_prctl`, its request for a state of the processor, and that of tiles.
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const TILE_DATA: usize = 18;
        /// Leaf 7: tiles, and bf16 in them.
        const TILES: u32 = 1 << 24 | 1 << 22;
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILES != TILES {
            return false;
        }
        let answer: isize;
        // SAFETY: a system call without addresses; one that the kernel doesn't know answers with an error.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => answer, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
                 lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        answer == 0
    })
}

/// Whether there are tiles of bf16: what other systems ask for isn't known here.
#[cfg(not(target_os = "linux"))]
pub(super) fn granted() -> bool {
    false
}

/// A block of a panel's sums, `2 · ROWS` rows of `WIDTH`, from a line of the cache on.
#[repr(align(64))]
struct Block(UnsafeCell<[f32; 2 * ROWS * WIDTH]>);

/// The way of tiles with bf16.
pub(super) struct InTiles;

/// Lines whose sums stand in a block that tiles have made.
pub(super) struct Tiled<'a> {
    lines: Bfloats<'a, InTiles>,
    block: Block,
    /// The block's first row.
    from: Cell<usize>,
}

impl<'a> Tiled<'a> {
    /// Nothing yet of these lines.
    pub fn new(lines: Bfloats<'a, InTiles>) -> Self {
        Self { lines, block: Block(UnsafeCell::new([0.0; 2 * ROWS * WIDTH])), from: Cell::new(0) }
    }

    /// The sums of the block's rows, `count` of them from `from` on, by tiles set up for so many.
    ///
    /// # Safety
    /// The panel and the rows must be there, `count` be 1 to 32, and the tiles be [`set_up`] for it.
    unsafe fn fill(&self, panel: usize, from: usize, count: usize) {
        self.from.set(from);
        // SAFETY: the caller's promise; tiles 2, 3 and 5 are touched where they have rows alone; nobody else
        // sees the block.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
            if count > ROWS {
                asm!("tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
            }
            let mut weights = self.lines.pairs.add(panel * self.lines.size);
            for input in self.lines.inputs {
                // in bytes
                let stride = 2 * input.stride;
                for tap in 0..input.taps {
                    let rows = input.values.as_ptr().add((from + tap * input.dilation) * input.stride);
                    for chunk in (0..input.width).step_by(CHUNK) {
                        multiply_add(rows.add(chunk), stride, weights, count > ROWS);
                        weights = weights.add(CHUNK * WIDTH);
                    }
                }
            }
            let block = self.block.0.get().cast::<f32>();
            asm!("tilestored [{at} + {stride}], tmm0", "tilestored [{at} + {stride} + 64], tmm1",
                 at = in(reg) block, stride = in(reg) WIDTH * size_of::<f32>(), options(nostack));
            if count > ROWS {
                asm!("tilestored [{at} + {stride}], tmm2", "tilestored [{at} + {stride} + 64], tmm3",
                     at = in(reg) block.add(ROWS * WIDTH), stride = in(reg) WIDTH * size_of::<f32>(), options(nostack));
            }
        }
    }
}

/// A chunk of rows, `stride` bytes apart, times one of weights, added to the sums; `both`: more than 16 rows.
///
/// # Safety
/// The tiles must be [`set_up`], and the rows and weights be there.
#[inline(always)]
unsafe fn multiply_add(rows: *const i16, stride: usize, weights: *const i16, both: bool) {
    // SAFETY: the caller's promise; the compiler keeps nothing in tiles.
    unsafe {
        if both {
            asm!("tileloadd tmm6, [{w} + {line}]",
                 "tileloadd tmm4, [{a} + {stride}]",
                 "tileloadd tmm7, [{w} + {line} + 64]",
                 "tileloadd tmm5, [{b} + {stride}]",
                 "tdpbf16ps tmm0, tmm4, tmm6",
                 "tdpbf16ps tmm1, tmm4, tmm7",
                 "tdpbf16ps tmm2, tmm5, tmm6",
                 "tdpbf16ps tmm3, tmm5, tmm7",
                 w = in(reg) weights, line = in(reg) 4 * WIDTH, a = in(reg) rows,
                 b = in(reg) rows.byte_add(ROWS * stride), stride = in(reg) stride, options(nostack, readonly));
        } else {
            asm!("tileloadd tmm6, [{w} + {line}]",
                 "tileloadd tmm4, [{a} + {stride}]",
                 "tileloadd tmm7, [{w} + {line} + 64]",
                 "tdpbf16ps tmm0, tmm4, tmm6",
                 "tdpbf16ps tmm1, tmm4, tmm7",
                 w = in(reg) weights, line = in(reg) 4 * WIDTH, a = in(reg) rows, stride = in(reg) stride,
                 options(nostack, readonly));
        }
    }
}

/// Sets the tiles up for 1 to 32 rows, 16 in the first at most.
///
/// # Safety
/// Tiles must be [`granted`].
unsafe fn set_up(count: usize) {
    /// What `ldtilecfg` reads: a palette, bytes in a tile's row, and its rows.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let (first, second) = (count.min(ROWS) as u8, count.saturating_sub(ROWS) as u8);
    for (tile, rows) in [first, first, second, second, first, second, ROWS as u8, ROWS as u8].into_iter().enumerate() {
        config.rows[tile] = rows;
        config.row_bytes[tile] = if rows > 0 { 64 } else { 0 };
    }
    // SAFETY: the caller's promise.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
    }
}

impl<V: Vector> Lines<V> for Tiled<'_> {
    #[inline(always)]
    unsafe fn bias(&self, panel: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.lines.bias(panel, WIDTH) }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize, const N: usize>(
        &self,
        _: usize,
        row: usize,
        mut sums: [[V; N]; R],
    ) -> [[V; N]; R] {
        // SAFETY: the rows stand in the block; nobody writes there meanwhile.
        unsafe {
            let mut block = self.block.0.get().cast::<f32>().add((row - self.from.get()) * WIDTH);
            for sums in &mut sums {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(block.add(i * V::LANES)));
                }
                block = block.add(WIDTH);
            }
        }
        sums
    }
}

/// All rows and panels of a product.
///
/// # Safety
/// Tiles must be [`granted`], the processor have AVX-512F and BW, and the job be checked.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn product(job: &Job<Tiled>) {
    const { assert!(2 * Avx512::LANES == WIDTH) }
    let mut rows_set_up = 0;
    for panel in 0..job.layout.panels {
        for from in (0..job.count).step_by(2 * ROWS) {
            let count = (job.count - from).min(2 * ROWS);
            // SAFETY: the caller's promise; the rows are the job's.
            unsafe {
                if count != rows_set_up {
                    set_up(count);
                    rows_set_up = count;
                }
                job.lines.fill(panel, from, count);
                panel_rows::<Avx512, Tiled>(job, panel, from..from + count);
            }
        }
    }
    // SAFETY: no tile is used after this one. A thread without tiles in use is quicker to switch to.
    unsafe {
        asm!("tilerelease", options(nostack, nomem));
    }
}

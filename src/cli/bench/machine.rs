//! What the machine is, and what it can do.

use super::giga;
use crate::kernels::choice::Kernel;
use crate::kernels::peak::multiply_adds;
use crate::kernels::{Strides, matmul_add};
use serde::{Deserialize, Serialize};
use std::fs;
use std::time::{Duration, Instant};

/// What makes a difference to kernels, as Linux writes it on x86 and Arm.
const FLAGS: [&str; 17] = [
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
];
/// Rows, depth and columns of the matrices that the peak is measured on.
const SHAPE: (usize, usize, usize) = (512, 512, 512);
/// How long a measurement of a peak takes.
const PEAK_TIME: Duration = Duration::from_millis(60);

/// The machine, and the program on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's own name, where the system tells.
    pub processor: String,
    /// Of the processor's instructions, those that kernels may use.
    pub flags: Vec<String>,
    /// Threads that run at once.
    pub cores: usize,
    /// Version of melglow.
    pub melglow: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.split_once(": "));
        let flags = field("flags").or_else(|| field("Features")).map_or("", |(_, flags)| flags);
        let flags: Vec<_> = flags.split_whitespace().filter(|flag| FLAGS.contains(flag)).map(String::from).collect();
        Self {
            processor: field("model name").map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string(),
            flags,
            cores: cores(),
            melglow: env!("CARGO_PKG_VERSION").to_string(),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { processor, cores, flags, .. } = self;
        write!(f, "{processor}, {cores} core{}", if *cores == 1 { "" } else { "s" })?;
        if flags.is_empty() { Ok(()) } else { write!(f, " ({})", flags.join(" ")) }
    }
}

/// Threads that run at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Multiply-adds of f32 a second that so many threads could do, each by itself.
#[derive(Default)]
pub struct Peaks {
    gemm: Vec<f64>,
    fma: Vec<f64>,
}

impl Peaks {
    /// Measures again, on so many threads.
    pub fn measure(&mut self, threads: usize, kernel: Kernel) {
        self.gemm.push(gemm_peak(threads));
        self.fma.push(rate(threads, || move || multiply_adds(kernel)));
    }

    /// What was measured, beside a work's multiply-adds a second.
    ///
    /// # Panics
    /// If nothing was measured.
    pub fn beside(self, macs_per_second: f64) -> Shares {
        let (gemm, fma) = (Spread::of(self.gemm), Spread::of(self.fma));
        Shares {
            gemm_macs_per_second: gemm,
            gemm_share: macs_per_second / gemm.median,
            fma_macs_per_second: fma,
            fma_share: macs_per_second / fma.median,
        }
    }
}

/// What part a work has of what there could be.
#[derive(Serialize, Deserialize)]
pub struct Shares {
    /// Multiply-adds of the f32 matrix product in a second.
    gemm_macs_per_second: Spread,
    /// The work's over the matrix product's.
    gemm_share: f64,
    /// Multiply-adds in a second that wait for nothing: the processor's peak in these kernels' vectors.
    fma_macs_per_second: Spread,
    /// The work's over the peak.
    fma_share: f64,
}

impl Shares {
    /// The titles of two columns.
    pub const TITLES: &str = "       of GEMM's         of peak";

    /// Both columns.
    pub fn columns(&self) -> String {
        let column = |share: f64, of: Spread| format!("{:.0} % of {}", 100.0 * share, giga(of.median));
        let gemm = column(self.gemm_share, self.gemm_macs_per_second);
        format!("{gemm:>16}{:>16}", column(self.fma_share, self.fma_macs_per_second))
    }
}

/// Multiply-adds a second of the f32 matrix product that candle and our training share.
fn gemm_peak(threads: usize) -> f64 {
    let (m, k, n) = SHAPE;
    rate(threads, || {
        let (a, b, mut out) = (vec![0.5_f32; m * k], vec![0.25_f32; k * n], vec![0.0_f32; m * n]);
        move || {
            matmul_add(SHAPE, (&a, Strides::rows(k)), (&b, Strides::rows(n)), (&mut out, Strides::rows(n)));
            std::hint::black_box(&out);
            m * k * n
        }
    })
}

/// How much all threads do in a second, all at once, by what each call says it has done; `prepare` gives a
/// thread its work before the clock runs.
fn rate<W: FnMut() -> usize>(threads: usize, prepare: impl Fn() -> W + Sync) -> f64 {
    let rate = || {
        let mut once = prepare();
        once();
        let (begun, mut done) = (Instant::now(), 0);
        while begun.elapsed() < PEAK_TIME {
            done += once();
        }
        done as f64 / begun.elapsed().as_secs_f64()
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(rate)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).sum()
    })
}

/// The most memory that this process has held since it began or since [`forget_peak_memory`], bytes,
/// where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

/// Begins anew with the peak of memory, where the system allows it.
pub fn forget_peak_memory() {
    // proc(5): 5 resets the high-water mark
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Several measurements of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Half are below.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one measurement.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[half] } else { 0.5 * (values[half - 1] + values[half]) };
        Self { median, min: values[0], max: values[values.len() - 1] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_odd_and_even_counts() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 9.0]), Spread { median: 3.0, min: 1.0, max: 9.0 });
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 9.0]), Spread { median: 3.0, min: 1.0, max: 9.0 });
    }

    #[test]
    fn two_threads_have_a_peak() {
        assert!(gemm_peak(2) > 1e8);
    }
}

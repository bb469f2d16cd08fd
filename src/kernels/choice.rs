//! Which kernels run here.

use super::quantise::Numbers;
use crate::{Error, Result};

/// A set of kernels, by the vector instructions they are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Four values a vector, by whatever the compiler makes of that: any processor.
    Scalar,
    /// x86-64 with AVX2 and FMA, eight values.
    Avx2,
    /// x86-64 with AVX-512F and BW, sixteen values.
    Avx512,
    /// 64-bit Arm, four values.
    Neon,
}

impl Kernel {
    /// Every set, fastest last on the processors that have it.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];

    /// The name that `MELGLOW_KERNEL` knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this processor has its instructions.
    pub fn runs_here(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns, reason = "which sets are left depends on the target")]
            _ => false,
        }
    }

    /// Lets tests do in software, slowly, what this processor refuses of x86's vectors; whether they can.
    fn in_software(self) -> bool {
        #[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
        if matches!(self, Self::Avx2 | Self::Avx512) && Self::Avx2.runs_here() {
            super::refused::install();
            return true;
        }
        false
    }

    /// Whether its products can be done: in tests AVX-512's also where it isn't.
    pub(super) fn can_run(self) -> bool {
        self.runs_here() || self == Self::Avx512 && self.in_software()
    }

    /// What tests try that take so many multiply-adds, a line for each set that can't be; in software, where each
    /// instruction takes microseconds, nothing large.
    #[cfg(test)]
    pub(crate) fn tested(multiply_adds: usize) -> impl DoubleEndedIterator<Item = Self> {
        const IN_SOFTWARE: usize = 50_000;
        Self::ALL.into_iter().filter(move |kernel| {
            if !kernel.runs_here() && multiply_adds > IN_SOFTWARE {
                return false;
            }
            let can = kernel.can_run();
            if !can {
                eprintln!("SKIPPED: no {} on this processor", kernel.name());
            }
            can
        })
    }

    /// Whether products of 16-bit integers are faster than those of floats.
    pub(crate) fn has_fast_integers(self) -> bool {
        matches!(self, Self::Avx2 | Self::Avx512)
    }

    /// Whether one instruction multiplies pairs of integers and adds them up (VNNI).
    pub fn has_vnni(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512vnni"),
            _ => false,
        }
    }

    /// Whether tests can try that, in software where AVX-512's registers are, too.
    #[cfg(test)]
    pub(super) fn can_run_vnni(self) -> bool {
        self.has_vnni() || !Self::Avx512.runs_here() && self.in_software()
    }

    /// Whether one instruction multiplies pairs of bf16 and adds them up (AVX512_BF16).
    pub fn has_bfloats(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether tests can try that, in software where AVX-512's registers are, too.
    #[cfg(test)]
    pub(super) fn can_run_bfloats(self) -> bool {
        self.has_bfloats() || self == Self::Avx512 && !self.runs_here() && self.in_software()
    }

    /// Whether products of bf16 are done in tiles (Intel AMX): with the widest vectors, where the processor has
    /// them and the system lets them be used.
    pub fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Avx512 && super::amx::granted();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether tiles can be tried, in software if need be.
    #[cfg(test)]
    pub(super) fn can_run_tiles(self) -> bool {
        self.has_tiles() || self == Self::Avx512 && self.in_software()
    }

    /// The sets that run here, the fastest last.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Self::ALL.into_iter().filter(|kernel| kernel.runs_here())
    }

    /// The fastest set that runs here.
    pub fn fastest() -> Self {
        Self::available().next_back().unwrap_or(Self::Scalar)
    }

    /// The set that the environment variable `MELGLOW_KERNEL` names, or else the fastest.
    ///
    /// # Errors
    /// If the name is unknown or the set doesn't run here.
    pub fn chosen() -> Result<Self> {
        match std::env::var("MELGLOW_KERNEL") {
            Ok(name) => Self::named(&name),
            Err(std::env::VarError::NotPresent) => Ok(Self::fastest()),
            Err(error) => Err(Error::invalid(format!("MELGLOW_KERNEL: {error}"))),
        }
    }

    /// Whether products in such numbers are worth while with these kernels, or asked for by forcing them.
    pub(crate) fn takes(self, numbers: Numbers) -> bool {
        let fast = match numbers {
            Numbers::Integers => true,
            Numbers::Bytes => self.has_vnni(),
            Numbers::Bfloats => self.has_tiles() || self.has_bfloats(),
        };
        fast || std::env::var_os("MELGLOW_KERNEL").is_some()
    }

    fn named(name: &str) -> Result<Self> {
        if let Some(kernel) = Self::available().find(|kernel| kernel.name() == name) {
            return Ok(kernel);
        }
        let here: Vec<_> = Self::available().map(Self::name).collect();
        let known = Self::ALL.iter().any(|kernel| kernel.name() == name);
        let problem = if known { "this processor hasn't" } else { "nobody knows" };
        Err(Error::invalid(format!("MELGLOW_KERNEL is {name:?}, which {problem}; here there are {}", here.join(", "))))
    }
}

/// The numbers that a flow's inverse is worked out in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// Integers of 16 bits and exact sums, where products are large: the layers of couplings' WaveNets behind their
    /// first, the first's conditioning by step, and SqueezeWave's layers. What is added up, and all the rest, stays in
    /// f32.
    Int16,
    /// Integers of 8 bits and exact sums, in the same layers. For processors with VNNI; elsewhere for kernels that are
    /// forced alone, slowly, to hear what it does.
    Int8,
    /// bf16, in the same layers; products are added up in f32. For processors with tiles for it (Intel AMX) or
    /// AVX512_BF16; elsewhere for kernels that are forced alone, at half the speed of f32, to hear what it does.
    Bf16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Int16, Self::Int8, Self::Bf16];

    /// The name that the command line knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
        }
    }

    /// The shorter numbers, if it is of those.
    pub(crate) fn short(self) -> Option<Numbers> {
        match self {
            Self::F32 => None,
            Self::Int16 => Some(Numbers::Integers),
            Self::Int8 => Some(Numbers::Bytes),
            Self::Bf16 => Some(Numbers::Bfloats),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Kernel::named("scalar").unwrap(), Kernel::Scalar);
        let error = Kernel::named("sse9").unwrap_err().to_string();
        assert!(error.starts_with("MELGLOW_KERNEL is \"sse9\", which nobody knows; here there are scalar"), "{error}");
        for kernel in Kernel::ALL {
            match Kernel::named(kernel.name()) {
                Ok(named) => assert!(named == kernel && kernel.runs_here()),
                Err(error) => assert!(!kernel.runs_here() && error.to_string().contains("this processor hasn't")),
            }
        }
    }
}

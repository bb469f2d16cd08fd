//! AVX-512's registers, and the instructions that the kernels have of it, in software, for tests on processors
//! without them: of [`super::refused`]. Intel SDM, volume 2.

use super::refused::{address, numbered, value};
use iced_x86::{Instruction, Mnemonic, OpKind, Register, RoundingControl};
use nix::libc;

/// A register's 32-bit lanes.
type Wide = [u32; 16];

/// The lower halves of the first sixteen registers: of each the first four lanes, and the next four.
pub(super) struct Low<'a> {
    pub xmm: &'a mut [[u32; 4]; 16],
    pub ymm: &'a mut [[u32; 4]; 16],
}

/// Of one thread, what the processor doesn't keep.
pub(super) struct WideUnit {
    /// The upper halves of the first sixteen registers.
    upper: [[u32; 8]; 16],
    /// The other sixteen.
    more: [Wide; 16],
}

/// The unit, and the stopped thread's registers.
struct Machine<'a, 'b> {
    unit: &'a mut WideUnit,
    low: &'a mut Low<'b>,
    registers: &'a [libc::greg_t],
    instruction: &'a Instruction,
}

impl WideUnit {
    /// All zero.
    pub const NEW: Self = Self { upper: [[0; 8]; 16], more: [[0; 16]; 16] };

    /// Does what an instruction does.
    ///
    /// # Errors
    /// If it isn't known here, or a processor would refuse it.
    pub fn execute(
        &mut self,
        instruction: &Instruction,
        low: &mut Low,
        registers: &[libc::greg_t],
    ) -> Result<(), String> {
        if instruction.op_mask() != Register::None || instruction.rounding_control() != RoundingControl::None {
            return Err("masks and roundings aren't known here".into());
        }
        Machine { unit: self, low, registers, instruction }.execute()
    }

    /// What one of AVX's instructions does to the registers' upper halves: it clears those of what it writes.
    pub fn clear_behind(&mut self, instruction: &Instruction) {
        use Mnemonic::{Vcomisd, Vcomiss, Vptest, Vtestpd, Vtestps, Vucomisd, Vucomiss, Vzeroall, Vzeroupper};
        match instruction.mnemonic() {
            Vzeroupper | Vzeroall => self.upper = [[0; 8]; 16],
            // they write flags
            Vcomiss | Vcomisd | Vucomiss | Vucomisd | Vptest | Vtestps | Vtestpd => {}
            _ if instruction.op0_kind() == OpKind::Register => {
                if let Some((number, _)) = vector(instruction.op0_register()) {
                    self.upper[number] = [0; 8];
                }
            }
            _ => {}
        }
    }
}

/// A vector register's number and lanes.
fn vector(register: Register) -> Option<(usize, usize)> {
    [(Register::XMM0, 4), (Register::YMM0, 8), (Register::ZMM0, 16)]
        .into_iter()
        .find_map(|(first, lanes)| Some((numbered(register, first, 32)?, lanes)))
}

/// Of two pairs of 16-bit integers.
fn product_of_pairs(a: u32, b: u32) -> u32 {
    let half = |x: u32, up: u32| i32::from((x >> up) as i16);
    (half(a, 0) * half(b, 0)).wrapping_add(half(a, 16) * half(b, 16)).cast_unsigned()
}

/// Of four bytes without a sign and four with one.
fn product_of_fours(a: u32, b: u32) -> u32 {
    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    products.map(|(a, b)| i32::from(a) * i32::from(b.cast_signed())).sum::<i32>().cast_unsigned()
}

/// `to` and the products of two pairs of bf16: the second first, each rounded to f32; what isn't normal is zero.
fn add_bfloats(to: u32, a: u32, b: u32) -> u32 {
    let normal = |x: f32| if x.is_subnormal() { 0.0_f32.copysign(x) } else { x };
    let half = |x: u32, up: u32| normal(f32::from_bits(x >> up << 16));
    let fused = |to: f32, up: u32| normal(half(a, up).mul_add(half(b, up), to));
    fused(fused(normal(f32::from_bits(to)), 16), 0).to_bits()
}

impl Machine<'_, '_> {
    fn execute(&mut self) -> Result<(), String> {
        use Mnemonic::{
            Vaddps, Vaddss, Vbroadcastss, Vcvtdq2ps, Vcvtusi2ss, Vdivps, Vdivss, Vdpbf16ps, Vfmadd132ps, Vfmadd213ps,
            Vfmadd231ps, Vmaxps, Vminps, Vmovaps, Vmovdqa64, Vmovdqu64, Vmovss, Vmovups, Vmulps, Vpaddd, Vpandd,
            Vpandq, Vpbroadcastd, Vpdpbusd, Vpdpwssd, Vpmaddwd, Vpslld, Vpxord, Vpxorq, Vsubps,
        };
        match self.instruction.mnemonic() {
            Vmovaps | Vmovdqa64 => self.copy(64),
            Vmovups | Vmovdqu64 => self.copy(1),
            Vbroadcastss | Vpbroadcastd => {
                let first = self.scalar(1)?;
                self.write([first; 16])
            }
            Vaddps => self.floats(|a, b| a + b),
            Vsubps => self.floats(|a, b| a - b),
            Vmulps => self.floats(|a, b| a * b),
            Vdivps => self.floats(|a, b| a / b),
            // of two zeros, and beside what is no number, the second
            Vmaxps => self.floats(|a, b| if a > b { a } else { b }),
            Vminps => self.floats(|a, b| if a < b { a } else { b }),
            Vfmadd132ps => self.fused(|to, a, b| to.mul_add(b, a)),
            Vfmadd213ps => self.fused(|to, a, b| a.mul_add(to, b)),
            Vfmadd231ps => self.fused(|to, a, b| a.mul_add(b, to)),
            Vpaddd => self.lanes(u32::wrapping_add),
            Vpandd | Vpandq => self.lanes(|a, b| a & b),
            Vpxord | Vpxorq => self.lanes(|a, b| a ^ b),
            Vpmaddwd => self.lanes(product_of_pairs),
            Vpdpwssd => self.added(|to, a, b| to.wrapping_add(product_of_pairs(a, b))),
            Vpdpbusd => self.added(|to, a, b| to.wrapping_add(product_of_fours(a, b))),
            Vdpbf16ps => self.added(add_bfloats),
            Vpslld if self.instruction.op2_kind() == OpKind::Immediate8 => {
                let (from, by) = (self.source(1)?, u32::from(self.instruction.immediate8()));
                self.write(from.map(|lane| lane.checked_shl(by).unwrap_or(0)))
            }
            Vcvtdq2ps => {
                let from = self.source(1)?;
                self.write(from.map(|lane| (lane.cast_signed() as f32).to_bits()))
            }
            // one lane, the next three of the first source
            Vaddss => self.first_lane(|a, b| a + b),
            Vdivss => self.first_lane(|a, b| a / b),
            Vcvtusi2ss => {
                let integer = match self.instruction.op2_kind() {
                    OpKind::Register => value(self.instruction.op2_register(), self.registers),
                    // SAFETY: the instruction reads there, as here.
                    _ if self.wide_integer() => unsafe { (self.place() as *const usize).read_unaligned() },
                    // SAFETY: as above.
                    _ => unsafe { (self.place() as *const u32).read_unaligned() as usize },
                };
                self.with_first(self.register(1)?, (integer as f32).to_bits())
            }
            Vmovss if self.instruction.op_count() == 2 && self.instruction.op0_kind() == OpKind::Register => {
                let first = self.scalar(1)?;
                self.with_first([0; 16], first)
            }
            _ => Err("not known here".into()),
        }
    }

    /// Whether an instruction's integer has 64 bits.
    fn wide_integer(&self) -> bool {
        self.instruction.code() == iced_x86::Code::EVEX_Vcvtusi2ss_xmm_xmm_rm64_er
    }

    /// Where the instruction's memory is.
    fn place(&self) -> usize {
        let (first, index) = address(self.instruction, self.registers);
        first.wrapping_add(index)
    }

    fn register(&self, operand: u32) -> Result<Wide, String> {
        let (number, _) = vector(self.instruction.op_register(operand)).ok_or("no vector")?;
        if number >= 16 {
            return Ok(self.unit.more[number - 16]);
        }
        let mut lanes = [0; 16];
        lanes[..4].copy_from_slice(&self.low.xmm[number]);
        lanes[4..8].copy_from_slice(&self.low.ymm[number]);
        lanes[8..].copy_from_slice(&self.unit.upper[number]);
        Ok(lanes)
    }

    /// A whole operand, the same value in every lane where memory is broadcast.
    fn source(&self, operand: u32) -> Result<Wide, String> {
        if self.instruction.op_kind(operand) == OpKind::Register {
            return self.register(operand);
        }
        if self.instruction.is_broadcast() {
            return Ok([self.scalar(operand)?; 16]);
        }
        let (_, count) = vector(self.instruction.op0_register()).ok_or("no vector")?;
        let mut lanes = [0; 16];
        for (i, lane) in lanes[..count].iter_mut().enumerate() {
            // SAFETY: the instruction reads there, as here.
            *lane = unsafe { (self.place() as *const u32).add(i).read_unaligned() };
        }
        Ok(lanes)
    }

    /// The first lane of an operand.
    fn scalar(&self, operand: u32) -> Result<u32, String> {
        match self.instruction.op_kind(operand) {
            OpKind::Register if vector(self.instruction.op_register(operand)).is_none() => {
                Ok(value(self.instruction.op_register(operand), self.registers) as u32)
            }
            OpKind::Register => Ok(self.register(operand)?[0]),
            // SAFETY: the instruction reads there, as here.
            _ => Ok(unsafe { (self.place() as *const u32).read_unaligned() }),
        }
    }

    /// Writes the first operand, a register, and zeros behind its lanes.
    fn write(&mut self, mut lanes: Wide) -> Result<(), String> {
        let (number, count) = vector(self.instruction.op0_register()).ok_or("no vector")?;
        lanes[count..].fill(0);
        if number >= 16 {
            self.unit.more[number - 16] = lanes;
        } else {
            self.low.xmm[number].copy_from_slice(&lanes[..4]);
            self.low.ymm[number].copy_from_slice(&lanes[4..8]);
            self.unit.upper[number].copy_from_slice(&lanes[8..]);
        }
        Ok(())
    }

    /// Writes the first operand's first lane, and the next three from others.
    fn with_first(&mut self, mut others: Wide, first: u32) -> Result<(), String> {
        others[0] = first;
        self.write(others)
    }

    /// A whole register's move, to memory or not, where memory is aligned so.
    fn copy(&mut self, alignment: usize) -> Result<(), String> {
        let widest = |operand| vector(self.instruction.op_register(operand)).is_none_or(|(_, lanes)| lanes == 16);
        if !widest(0) || !widest(1) {
            return Err("moves of parts aren't known here".into());
        }
        let in_memory = (0..2).any(|operand| self.instruction.op_kind(operand) == OpKind::Memory);
        if in_memory && !self.place().is_multiple_of(alignment) {
            return Err(format!("memory that isn't aligned by {alignment}"));
        }
        let from = self.source(1)?;
        if self.instruction.op0_kind() == OpKind::Register {
            return self.write(from);
        }
        // SAFETY: the instruction writes there, as here.
        unsafe { (self.place() as *mut Wide).write_unaligned(from) };
        Ok(())
    }

    fn lanes(&mut self, f: impl Fn(u32, u32) -> u32) -> Result<(), String> {
        let (a, b) = (self.source(1)?, self.source(2)?);
        self.write(std::array::from_fn(|i| f(a[i], b[i])))
    }

    fn floats(&mut self, f: impl Fn(f32, f32) -> f32) -> Result<(), String> {
        self.lanes(|a, b| f(f32::from_bits(a), f32::from_bits(b)).to_bits())
    }

    fn fused(&mut self, f: impl Fn(f32, f32, f32) -> f32) -> Result<(), String> {
        let float = |lane: u32| f32::from_bits(lane);
        self.added(|to, a, b| f(float(to), float(a), float(b)).to_bits())
    }

    fn added(&mut self, f: impl Fn(u32, u32, u32) -> u32) -> Result<(), String> {
        let (to, a, b) = (self.source(0)?, self.source(1)?, self.source(2)?);
        self.write(std::array::from_fn(|i| f(to[i], a[i], b[i])))
    }

    fn first_lane(&mut self, f: impl Fn(f32, f32) -> f32) -> Result<(), String> {
        let (a, b) = (self.register(1)?, self.scalar(2)?);
        self.with_first(a, f(f32::from_bits(a[0]), f32::from_bits(b)).to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::super::choice::Kernel;
    use super::*;
    use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_dpbusd_epi32};
    use std::mem::transmute;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bfloats(to: Wide, a: Wide, b: Wide) -> Wide {
        // SAFETY: any bits are any of these types.
        unsafe {
            let [a, b] = [a, b].map(|lanes| transmute::<Wide, __m512bh>(lanes));
            transmute::<__m512, Wide>(_mm512_dpbf16_ps(transmute::<Wide, __m512>(to), a, b))
        }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn fours(to: Wide, a: Wide, b: Wide) -> Wide {
        // SAFETY: as above.
        unsafe {
            let [to, a, b] = [to, a, b].map(|lanes| transmute::<Wide, __m512i>(lanes));
            transmute::<__m512i, Wide>(_mm512_dpbusd_epi32(to, a, b))
        }
    }

    /// Where the processor has these instructions, it says the same.
    #[test]
    fn software_does_what_the_processor_does() {
        let (vnni, bf16) = (Kernel::Avx512.has_vnni(), Kernel::Avx512.has_bfloats());
        if !vnni || !bf16 {
            eprintln!("SKIPPED: VNNI {vnni}, bf16 {bf16} on this processor");
        }
        let mut bits = 1_u32;
        let mut next = || {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bits ^ bits >> 13
        };
        // of about 2⁻⁷ to 2⁷, and a few that aren't normal
        let float =
            |bits: u32| if bits.is_multiple_of(17) { bits & 0x807f_ffff } else { bits & 0x83ff_ffff | 0x3c00_0000 };
        let two = |bits: u32| float(bits) >> 16 | float(bits.rotate_left(16)) & 0xffff_0000;
        for _ in 0..2000 {
            let [to, a, b]: [Wide; 3] = std::array::from_fn(|_| std::array::from_fn(|_| next()));
            if vnni {
                let wanted = std::array::from_fn(|i| to[i].wrapping_add(product_of_fours(a[i], b[i])));
                // SAFETY: the processor has it.
                assert_eq!(unsafe { fours(to, a, b) }, wanted);
            }
            if bf16 {
                let (to, a, b) = (to.map(float), a.map(two), b.map(two));
                let wanted: Wide = std::array::from_fn(|i| add_bfloats(to[i], a[i], b[i]));
                // SAFETY: the processor has it.
                let given = unsafe { bfloats(to, a, b) };
                assert_eq!(given.map(f32::from_bits), wanted.map(f32::from_bits));
            }
        }
    }
}

//! Instructions that a test's processor doesn't have, done in software: AMX by [`TileUnit`], AVX-512 by [`WideUnit`].
//!
//! The processor refuses such an instruction; the signal's handler reads it, does what the manual says it does, and
//! goes on behind it. So a test runs the very code of the kernels, with its operands and addresses, and finds
//! whatever a processor would have refused. Once AVX-512's registers are in use the processor stops after every
//! instruction: those that it knows clear the upper halves of the registers they write, unseen otherwise.

use super::choice::Kernel;
use super::tile_unit::TileUnit;
use super::wide_unit::{Low, WideUnit};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, Register};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::cell::RefCell;
use std::sync::Once;

/// The flag that stops the processor after an instruction.
const TRAP: libc::greg_t = 1 << 8;
/// The first byte of AVX-512's instructions, and those of AVX's.
const EVEX: u8 = 0x62;
const VEX: [u8; 2] = [0xc4, 0xc5];

thread_local! {
    static TILES: RefCell<TileUnit> = const { RefCell::new(TileUnit::NEW) };
    static WIDE: RefCell<WideUnit> = const { RefCell::new(WideUnit::NEW) };
}

/// Answers for instructions that the processor refuses, in every thread from now on.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // makes the decoder's tables
        let _ = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        let action = SigAction::new(SigHandler::SigAction(stopped), SaFlags::SA_SIGINFO, SigSet::empty());
        for signal in [Signal::SIGILL, Signal::SIGTRAP] {
            // SAFETY: the handler does its work in the thread that stands at the instruction, as a call there would.
            unsafe { sigaction(signal, &action) }.expect("the signal can be handled");
        }
    });
}

/// Does instructions as long as they are none of the processor's, and leaves the next one to it.
extern "C" fn stopped(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system gives the context of the instruction; nobody else has it.
    let context = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
    let mut refused = signal == libc::SIGILL;
    loop {
        let at = context.gregs[libc::REG_RIP as usize];
        // SAFETY: code is readable, and no instruction is longer.
        let code = unsafe { std::slice::from_raw_parts(at as *const u8, 15) };
        let instruction = Decoder::with_ip(64, code, at.cast_unsigned(), DecoderOptions::NONE).decode();
        let wide = code[0] == EVEX && !Kernel::Avx512.runs_here();
        let in_one = [Code::VEX_Vpdpwssd_ymm_ymm_ymmm256, Code::VEX_Vpdpbusd_ymm_ymm_ymmm256];
        let done = if wide || refused && in_one.contains(&instruction.code()) {
            if wide {
                context.gregs[libc::REG_EFL as usize] |= TRAP;
            }
            let registers = context.gregs;
            WIDE.with_borrow_mut(|unit| unit.execute(&instruction, &mut low(context), &registers))
        } else if is_of_tiles(&instruction) {
            TILES.with_borrow_mut(|unit| unit.execute(&instruction, &|| address(&instruction, &context.gregs)))
        } else if refused {
            Err("neither of AVX-512 nor of tiles".into())
        } else {
            if VEX.contains(&code[0]) {
                WIDE.with_borrow_mut(|unit| unit.clear_behind(&instruction));
            }
            // the compiler's last word in a function that has used vectors
            if instruction.mnemonic() == Mnemonic::Vzeroupper {
                context.gregs[libc::REG_EFL as usize] &= !TRAP;
            }
            return;
        };
        if let Err(problem) = done {
            eprintln!("refused: {problem} ({:?}, {code:02x?})", instruction.code());
            std::process::abort();
        }
        context.gregs[libc::REG_RIP as usize] += instruction.len() as i64;
        refused = false;
    }
}

fn is_of_tiles(instruction: &Instruction) -> bool {
    use Mnemonic::{Ldtilecfg, Tdpbf16ps, Tileloadd, Tilerelease, Tilestored, Tilezero};
    [Ldtilecfg, Tilerelease, Tilezero, Tileloadd, Tilestored, Tdpbf16ps].contains(&instruction.mnemonic())
}

/// The lower halves of the first sixteen registers, which the processor has.
fn low(context: &mut libc::mcontext_t) -> Low<'_> {
    /// What the system writes before the extended state, the bit of that state's upper halves, and where they are.
    const MAGIC: u32 = 0x4650_5853;
    const STATES: u64 = 0b110;
    const IN_USE: usize = 512;
    const UPPER: usize = 576;
    let state = context.fpregs.cast::<u8>();
    // SAFETY: the state is XSAVE's, as the magic number says; its parts don't overlap.
    unsafe {
        assert_eq!(state.add(464).cast::<u32>().read(), MAGIC);
        let in_use = &mut *state.add(IN_USE).cast::<u64>();
        let (xmm, ymm) = (&mut *state.add(160).cast(), &mut *state.add(UPPER).cast());
        if *in_use & 0b010 == 0 {
            *xmm = [[0; 4]; 16];
        }
        if *in_use & 0b100 == 0 {
            *ymm = [[0; 4]; 16];
        }
        *in_use |= STATES;
        Low { xmm, ymm }
    }
}

/// Where an instruction's memory is: base and displacement, and the scaled index.
pub(super) fn address(instruction: &Instruction, registers: &[libc::greg_t]) -> (usize, usize) {
    (
        // a displacement from the instruction itself is decoded as the address
        value(instruction.memory_base(), registers).wrapping_add(instruction.memory_displacement64() as usize),
        value(instruction.memory_index(), registers).wrapping_mul(instruction.memory_index_scale() as usize),
    )
}

/// A register of the stopped thread, or its lower half.
pub(super) fn value(register: Register, registers: &[libc::greg_t]) -> usize {
    /// In the order of the processor's numbers.
    const PLACES: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    if matches!(register, Register::None | Register::RIP) {
        return 0;
    }
    if let Some(number) = numbered(register, Register::RAX, 16) {
        return registers[PLACES[number] as usize] as usize;
    }
    let number = numbered(register, Register::EAX, 16).unwrap_or_else(|| unreachable!("{register:?} in an address"));
    registers[PLACES[number] as usize] as u32 as usize
}

/// Which of `count` registers from `first` on it is.
pub(super) fn numbered(register: Register, first: Register, count: usize) -> Option<usize> {
    (register as usize).checked_sub(first as usize).filter(|&number| number < count)
}

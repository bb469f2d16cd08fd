//! How the process's allocator treats large pieces of memory: a choice of programs, not of libraries. With glibc
//! alone; elsewhere nothing is done.

use std::sync::atomic::{AtomicBool, Ordering};

/// Pieces larger than this come from the system and go back to it, bytes.
const KEPT: i32 = 1 << 25;
/// The same for what stays as long as the process does.
const APART: i32 = 1 << 15;

static KEEPS: AtomicBool = AtomicBool::new(false);

/// Has memory that was freed kept for what comes next: a training step or an utterance wants as much as the one before
/// it, and new pages from the system cost up to a sixth of its time.
pub fn keep() {
    KEEPS.store(true, Ordering::Relaxed);
    set_threshold(KEPT);
}

/// While this lives, in a program that [keeps](keep) its memory, every large piece has pages of its own.
///
/// For the clips of a run: of sizes of their own, and between them what they were made with, they leave a heap of
/// holes that every allocation of every step searches, a sixth to a third of its time.
pub struct Apart(());

impl Apart {
    /// From here on.
    pub fn begin() -> Self {
        if KEEPS.load(Ordering::Relaxed) {
            set_threshold(APART);
        }
        Self(())
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        if KEEPS.load(Ordering::Relaxed) {
            set_threshold(KEPT);
        }
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_threshold(bytes: i32) {
    // SAFETY: both settings may be changed at any time, by any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set_threshold(_: i32) {}

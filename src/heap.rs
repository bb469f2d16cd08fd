//! How the process's allocator treats large pieces of memory: a choice of programs, not of libraries. With glibc
//! alone; elsewhere nothing is done.

use std::sync::{Mutex, PoisonError};

/// Pieces larger than this come from the system and go back to it, bytes.
const KEPT: i32 = 1 << 25;
/// The same while there are clips to read.
const APART: i32 = 1 << 15;

static WISHES: Mutex<Wishes> = Mutex::new(Wishes { keeps: false, apart: 0 });

struct Wishes {
    keeps: bool,
    /// [`Apart`]s that live.
    apart: usize,
}

/// Has memory that was freed kept for what comes next: a training step or an utterance wants as much as the one before
/// it, and new pages from the system cost up to a sixth of its time.
pub fn keep() {
    wish(|wishes| wishes.keeps = true);
}

/// While this lives, in a program that [keeps](keep) its memory, every large piece that finds no hole gets pages of
/// its own.
///
/// For the clips of a run: of sizes of their own, and between them what they were made with, they leave a heap of
/// holes that every allocation of every step searches, an eighth to a fifth of its time.
pub struct Apart(());

impl Apart {
    /// From here on.
    pub fn begin() -> Self {
        wish(|wishes| wishes.apart += 1);
        Self(())
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        wish(|wishes| wishes.apart -= 1);
    }
}

fn wish(change: impl FnOnce(&mut Wishes)) {
    let mut wishes = WISHES.lock().unwrap_or_else(PoisonError::into_inner);
    change(&mut wishes);
    if wishes.keeps {
        set_threshold(if wishes.apart > 0 { APART } else { KEPT });
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

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn pieces_apart_fill_their_pages() {
        const PAGE: usize = 4096;
        let size = 24 * PAGE + 500;
        // of the last made of so many that no hole holds them all
        let room = || {
            let mut pieces = vec![vec![0u8; size]; 400];
            // SAFETY: the allocator's own pointer, still allocated.
            unsafe { libc::malloc_usable_size(pieces[398].as_mut_ptr().cast()) }
        };
        keep();
        {
            let _outer = Apart::begin();
            drop(Apart::begin());
            // all of the last page but the piece's head
            assert!(room() > 25 * PAGE - 64, "{}", room());
        }
        // tests beside this one may be reading clips
        let shared = || {
            std::thread::sleep(std::time::Duration::from_millis(10));
            room() < size + 64
        };
        assert!((0..1000).any(|_| shared()));
    }
}

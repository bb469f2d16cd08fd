//! A layer's steps in blocks, for one thread or several.

use std::cell::Cell;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Steps of a block, about: its activations stay in the cache next to the weights.
const BLOCK: usize = 192;
/// Blocks end at multiples of the tallest tile's rows.
const TILE: usize = 12;

/// Turns without anything to do after which a thread lets others go first.
const SPINS: u32 = 1 << 10;

/// Multiply-adds of a layer below which another thread costs more than it saves, though it be [`awake`].
pub(crate) const MIN_SHARED: usize = 1 << 20;

/// Multiply-adds of a layer above which what threads cost doesn't show.
pub(crate) const WELL_SHARED: usize = 64 << 20;

/// Threads for the `steps` of a layer of so many multiply-adds, and the steps of a block: as many blocks for
/// each thread, of about the same size.
pub(super) fn division(steps: usize, macs: usize, threads: usize) -> (usize, usize) {
    let threads = if macs >= MIN_SHARED { threads } else { 1 };
    let count = steps.div_ceil(BLOCK).max(1).next_multiple_of(threads);
    (threads, steps.div_ceil(count).next_multiple_of(TILE).max(TILE))
}

/// Runs every job, on threads if there is more than one.
pub(super) fn share<J: Send>(threads: usize, jobs: impl Iterator<Item = J> + Send, run: impl Fn(J) + Sync) {
    if threads == 1 {
        jobs.for_each(run);
        return;
    }
    let (run, left) = (&run, &AtomicUsize::new(0));
    rayon::scope(|scope| {
        jobs.for_each(|job| {
            let one = One::of(left);
            scope.spawn(move |_| {
                let _one = one;
                run(job);
            });
        });
        wait_awake(left);
    });
}

/// One of the jobs that are left, until it is dropped.
struct One<'a>(&'a AtomicUsize);

impl<'a> One<'a> {
    fn of(left: &'a AtomicUsize) -> Self {
        left.fetch_add(1, Relaxed);
        Self(left)
    }
}

impl Drop for One<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Release);
    }
}

/// Does what the pool has to do until no job is left, without falling asleep in between: to be woken takes longer
/// than a small layer.
fn wait_awake(left: &AtomicUsize) {
    let mut idle = 0_u32;
    while left.load(Acquire) > 0 {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

thread_local! {
    /// Whether this thread is at some [`awake`] work, or waits for it.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

/// What [`AT_WORK`] was before, and is again when this is dropped.
struct AtWork(bool);

impl AtWork {
    fn enter() -> Self {
        Self(AT_WORK.replace(true))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.set(self.0);
    }
}

/// Runs `work`, in which [`share`] comes again and again, on one of rayon's threads, and keeps all others awake that
/// long.
///
/// A thread that is at other such work already isn't made to wait for this one: two that waited for each other would
/// never end.
pub fn awake<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    if threads == 1 {
        return work();
    }
    let left = &AtomicUsize::new(0);
    rayon::scope(|scope| {
        let _one = One::of(left);
        for _ in 1..threads {
            scope.spawn(move |_| {
                let before = AtWork::enter();
                if !before.0 {
                    wait_awake(left);
                }
            });
        }
        let _before = AtWork::enter();
        work()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_alike_and_small_layers_stay_whole() {
        assert_eq!(division(1000, 1 << 30, 1), (1, 168));
        assert_eq!(division(1000, 1 << 30, 4), (4, 132));
        assert_eq!(division(1000, MIN_SHARED - 1, 4), (1, 168));
        assert_eq!(division(1, MIN_SHARED, 3), (3, 12));
        assert_eq!(division(0, 0, 3), (1, 12));
    }

    #[test]
    fn all_jobs_are_done_wherever_they_are_shared() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let sums = |threads| {
            let mut sums = vec![0_usize; 100];
            awake(threads, || {
                for round in 0..50 {
                    share(threads, sums.chunks_mut(7), |part| part.iter_mut().for_each(|sum| *sum += round));
                }
            });
            sums
        };
        let expected = vec![49 * 50 / 2; 100];
        assert_eq!(sums(1), expected);
        // from outside, from several at a time, and within each other
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..20).for_each(|_| assert_eq!(pool.install(|| sums(3)), expected)));
            }
        });
        assert_eq!(pool.install(|| awake(3, || sums(3))), expected);
        pool.install(|| share(3, 0..5, |_| assert_eq!(sums(3), expected)));
    }

    #[test]
    fn a_job_that_panics_ends_all() {
        let panics = || awake(2, || share(2, 0..4, |job| assert!(job != 2)));
        assert!(std::panic::catch_unwind(panics).is_err());
        // and leaves the threads as they were
        let mut sum = [0; 8];
        awake(2, || share(2, sum.chunks_mut(1), |x| x[0] += 1));
        assert_eq!(sum, [1; 8]);
    }
}

//! A layer's steps in blocks, for one thread or several.

/// Steps of a block, about: its activations stay in the cache next to the weights.
const BLOCK: usize = 192;
/// Blocks end at multiples of the tallest tile's rows.
const TILE: usize = 12;

/// Multiply-adds of a layer above which what threads cost doesn't show.
pub(super) const WELL_SHARED: usize = 64 << 20;

/// Threads for the `steps` of a layer of so many multiply-adds, and the steps of a block: as many blocks for
/// each thread, of about the same size. Below `min_shared` another thread costs more than it saves.
pub(super) fn division(steps: usize, macs: usize, min_shared: usize, threads: usize) -> (usize, usize) {
    let threads = if macs >= min_shared { threads } else { 1 };
    let count = steps.div_ceil(BLOCK).max(1).next_multiple_of(threads);
    (threads, steps.div_ceil(count).next_multiple_of(TILE).max(TILE))
}

/// Runs every job, on threads if there is more than one.
pub(super) fn share<J: Send>(threads: usize, jobs: impl Iterator<Item = J> + Send, run: impl Fn(J) + Sync) {
    if threads == 1 {
        jobs.for_each(run);
    } else {
        let run = &run;
        rayon::scope(|scope| jobs.for_each(|job| scope.spawn(move |_| run(job))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_alike_and_small_layers_stay_whole() {
        assert_eq!(division(1000, 1 << 30, 1, 1), (1, 168));
        assert_eq!(division(1000, 1 << 30, 1, 4), (4, 132));
        assert_eq!(division(1000, 10, 11, 4), (1, 168));
        assert_eq!(division(1, 1 << 30, 1, 3), (3, 12));
        assert_eq!(division(0, 0, 1, 3), (1, 12));
    }
}

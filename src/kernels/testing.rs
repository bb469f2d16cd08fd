//! Values for tests.

/// So many from -1 to 1, others for each seed.
pub(crate) fn values(count: usize, seed: usize) -> Vec<f32> {
    values_to(count, seed, 1.0)
}

/// So many from `-most` to `most`, others for each seed.
pub(crate) fn values_to(count: usize, seed: usize, most: f32) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 * most - most).collect()
}

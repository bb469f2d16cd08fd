//! Latent noise as a function of (seed, position), whatever the order it is asked for.

use crate::kernels::normal::normals;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// An endless sequence of standard normal values; a value depends on the seed and its index only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    seed: u64,
}

impl Noise {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Values `start`, `start + 1`, … into `out`.
    ///
    /// Counter-based: value `i` is made (Box–Muller) of words `2i` and `2i + 1` of a ChaCha8 stream.
    pub fn fill(&self, start: usize, out: &mut [f32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_word_pos(2 * start as u128);
        let mut words = [[0; 2]; 64];
        for out in out.chunks_mut(words.len()) {
            let words = &mut words[..out.len()];
            words.fill_with(|| [rng.next_u32(), rng.next_u32()]);
            normals(words, out);
        }
    }

    /// [`fill`](Self::fill), times `scale`.
    pub fn fill_scaled(&self, start: usize, scale: f32, out: &mut [f32]) {
        self.fill(start, out);
        out.iter_mut().for_each(|value| *value *= scale);
    }

    /// Latents of steps `first_step .. first_step + steps`, row-major `[group, steps]`, scaled by
    /// `sigma`: channel `c` of step `t` is value `t · group + c`.
    pub fn latents(&self, first_step: usize, steps: usize, group: usize, sigma: f32) -> Vec<f32> {
        let mut flat = vec![0.0; steps * group];
        self.fill_scaled(first_step * group, sigma, &mut flat);
        let mut z = vec![0.0; flat.len()];
        for (t, values) in flat.chunks_exact(group).enumerate() {
            for (c, value) in values.iter().enumerate() {
                z[c * steps + t] = *value;
            }
        }
        z
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_piece_equals_the_whole() {
        let noise = Noise::new(7);
        let mut whole = vec![0.0; 1000];
        noise.fill(0, &mut whole);
        for (start, len) in [(0, 1), (1, 5), (7, 64), (31, 33), (999, 1), (500, 500)] {
            let mut piece = vec![0.0; len];
            noise.fill(start, &mut piece);
            assert_eq!(piece, whole[start..start + len], "{start} {len}");
        }
        let z = noise.latents(3, 10, 4, 1.0);
        assert_eq!(z[2 * 10 + 5], whole[(3 + 5) * 4 + 2]);
    }

    #[test]
    fn seeds_differ_and_values_are_standard_normal() {
        let (mut a, mut b) = (vec![0.0; 100_000], vec![0.0; 100_000]);
        Noise::new(1).fill(0, &mut a);
        Noise::new(2).fill(0, &mut b);
        assert_ne!(a, b);
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let var = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.03, "mean {mean}, variance {var}");
    }
}

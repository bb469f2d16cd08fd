//! Hops that a flow cannot have meant.
//!
//! A flow has learnt one speaker's mels. On others, or on silence cut into speech, what a frame net without
//! `norm` makes of the mel may drive its steps up, by 10²⁰ and more, and a recursion may lose its way. The
//! whitening filter before it doesn't: it follows any mel, and the level that it takes in is known
//! ([`crate::voice::TrainedOn::residual_level`]). So a hop of residual far above that level, or far below, is
//! replaced by noise at it: what is heard there is the filter's spectrum, and what the refinement makes of it.

use super::noise::Noise;

/// Levels that no hop of speech reaches: one in a thousand of recorded speech has 4.9, one in ten thousand 6.3, the
/// loudest 8.7 (66 clips of LJSpeech under the front of the built-in voices of 802 000 steps).
const LIMIT: f32 = 10.0;

/// The part of the level that no hop of `lj`'s or `lj-live`'s speech falls short of (the 30 validation clips).
const LEAST: f32 = 0.125;

/// Replaces hops of residual that are far above or below `level`, or no numbers; hop 0 of `residual` is hop
/// `first` of the sound. Every hop is judged by itself, and a recursive flow goes on from its own values, not
/// from what replaced them.
///
/// A flow that was asked for louder noise (`sigma` above 1: times the drive of its recursion) may be louder.
pub(super) fn repair(residual: &mut [f32], hop: usize, first: usize, level: f32, (noise, sigma): (&Noise, f32)) {
    let (limit, least) = ((LIMIT * level * sigma.max(1.0)).powi(2), (LEAST * level * sigma.min(1.0)).powi(2));
    for (index, residual) in residual.chunks_mut(hop).enumerate() {
        let power = residual.iter().map(|e| e * e).sum::<f32>() / residual.len() as f32;
        // NaN is not above
        if power.is_nan() || power > limit || power < least {
            noise.fill_scaled((first + index) * hop, level * sigma.min(1.0), residual);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_beyond_speech_become_noise_and_others_stay() {
        let (hop, first) = (64, 5);
        let mut residual = vec![0.5; 6 * hop];
        residual[hop] = f32::NAN;
        residual[2 * hop] = f32::INFINITY;
        residual[3 * hop..4 * hop].fill(6.1);
        residual[4 * hop..5 * hop].fill(5.9);
        residual[5 * hop..].fill(0.07);
        let before = residual.clone();
        let noise = Noise::new(3);
        repair(&mut residual, hop, first, 0.6, (&noise, 0.5));
        // an eighth of the level times sigma is 0.0375: below it is silence
        let mut quiet = vec![0.03; hop];
        repair(&mut quiet, hop, first + 1, 0.6, (&noise, 0.5));
        assert_eq!(quiet, residual[hop..2 * hop]);
        let mut drawn = vec![0.0; 3 * hop];
        noise.fill((first + 1) * hop, &mut drawn);
        drawn.iter_mut().for_each(|e| *e *= 0.6 * 0.5);
        assert_eq!(residual[hop..4 * hop], drawn);
        assert_eq!(residual[..hop], before[..hop]);
        assert_eq!(residual[4 * hop..], before[4 * hop..]);
        // louder noise, louder residual
        let mut loud = vec![6.1; hop];
        repair(&mut loud, hop, 0, 0.6, (&noise, 2.0));
        assert_eq!(loud, vec![6.1; hop]);
    }

    #[test]
    fn pieces_are_judged_as_the_whole() {
        let (hop, noise) = (16, Noise::new(1));
        let mut whole: Vec<f32> =
            (0..8 * hop).map(|i| if i / hop % 3 == 1 { 1e30 } else { (i as f32).sin() }).collect();
        let mut pieces = whole.clone();
        repair(&mut whole, hop, 0, 0.6, (&noise, 1.0));
        for (i, piece) in pieces.chunks_mut(3 * hop).enumerate() {
            repair(piece, hop, 3 * i, 0.6, (&noise, 1.0));
        }
        assert_eq!(whole, pieces);
        assert!(whole.iter().all(|e| e.abs() < 6.0));
    }
}

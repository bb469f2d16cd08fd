//! Detail given back to mels that are smoother than speech.
//!
//! What an acoustic model leaves out of a mel ([`crate::mel::detail`]) the flow takes for the sound: where harmonics
//! are flat in the mel, they drown in noise. So where a mel isn't trusted ([`super::trust`]), each frame is moved away
//! from its own mean over neighbouring bands, the more the more detail it lacks.

use super::trust::Trust;
use crate::mel::MelConfig;
use crate::mel::smooth::Average;

/// Standard deviation of the mean over bands.
const BANDS: f32 = 2.0;
/// How much of the difference from that mean is added where as much detail is missing as is there.
const STRENGTH: f32 = 0.35;
/// Part of the detail of speech that is taken to be there at least.
const LEAST: f32 = 0.25;

/// Sharpens frame after frame, each by those before it alone.
pub(super) struct Sharpener {
    trust: Trust,
    strength: f32,
    floor: f32,
    average: Average,
    mean: Vec<f32>,
    smooth: usize,
}

impl Sharpener {
    /// Before the first frame; a strength of 1 is what measured best.
    pub fn new(trust: Trust, strength: f32, mel: &MelConfig) -> Self {
        let (average, mean) = (Average::new(BANDS), vec![0.0; mel.n_mels]);
        Self { trust, strength: STRENGTH * strength, floor: mel.silence(), average, mean, smooth: 0 }
    }

    /// Frames that weren't trusted so far.
    pub fn smooth_frames(&self) -> usize {
        self.smooth
    }

    /// Sharpens the next frames, one after the other, where they aren't trusted; says of each whether it is.
    pub fn run(&mut self, frames: &mut [f32]) -> Vec<bool> {
        let bands = self.mean.len();
        frames.chunks_exact_mut(bands).map(|frame| self.next(frame)).collect()
    }

    fn next(&mut self, frame: &mut [f32]) -> bool {
        if self.trust.next(frame) {
            return true;
        }
        self.smooth += 1;
        let part = self.trust.part().max(LEAST);
        let strength = self.strength * (1.0 / part - 1.0);
        self.average.of(frame, &mut self.mean);
        for (value, mean) in frame.iter_mut().zip(&self.mean) {
            *value = (*value + strength * (*value - mean)).max(self.floor);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mel::MelSpectrogram;
    use crate::mel::detail::Detail;
    use crate::net::params::{named_rng, uniform};

    const FRAMES: usize = 300;

    /// Frames that are rough by `depth` in both directions, on a hill.
    fn frames(depth: f32) -> Vec<f32> {
        let mut rng = named_rng(1, "rough");
        let hill = |band: usize| -4.0 - (band as f32 - 40.0).abs() / 20.0;
        (0..80 * FRAMES).map(|i| hill(i % 80) + depth * (2.0 * uniform(&mut rng) - 1.0)).collect()
    }

    fn detail(frames: &[f32]) -> f32 {
        let mel = MelSpectrogram::new(frames.to_vec(), FRAMES).unwrap().transposed();
        Detail::of(&mel, &MelConfig::nvidia()).mean().unwrap()
    }

    /// Given back to frames by a voice whose mels are rough by 1.
    fn sharpened(frames: &[f32], strength: f32) -> Vec<f32> {
        let mel = MelConfig::nvidia();
        let natural = detail(&self::frames(1.0));
        let mut sharpened = frames.to_vec();
        Sharpener::new(Trust::new(&mel, Some(natural)), strength, &mel).run(&mut sharpened);
        sharpened
    }

    #[test]
    fn what_lacks_detail_gets_some_and_what_has_it_stays() {
        let rough = frames(1.0);
        assert_eq!(sharpened(&rough, 1.0), rough);
        let (smooth, smoother) = (frames(0.5), frames(0.35));
        assert_eq!(sharpened(&smooth, 0.0), smooth);
        let gain = |frames: &[f32], strength| detail(&sharpened(frames, strength)) / detail(frames);
        let gains = [gain(&smooth, 1.0), gain(&smooth, 2.0), gain(&smoother, 1.0)];
        // (1 / part - 1) times the strength, but for the mean and the first frames
        for (gain, expected) in gains.into_iter().zip([1.0, 2.0, 1.0 / 0.35 - 1.0]) {
            assert!((gain - 1.0 - STRENGTH * expected).abs() < 0.15 * STRENGTH * expected, "{gains:?}");
        }
    }

    #[test]
    fn a_slope_stays_and_nothing_falls_below_the_floor() {
        let slope: Vec<f32> = (0..80 * FRAMES).map(|i| -4.0 - (i % 80) as f32 / 20.0).collect();
        let inner = |frames: &[f32]| frames.chunks(80).flat_map(|f| f[6..74].to_vec()).collect::<Vec<_>>();
        let apart = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart(inner(&sharpened(&slope, 1.0)), inner(&slope)) < 1e-4);
        let cliff: Vec<f32> = (0..80 * FRAMES).map(|i| if i % 80 < 40 { -2.0 } else { -11.5 }).collect();
        let sharp = sharpened(&cliff, 2.0);
        let (low, high) = sharp.iter().fold((0.0_f32, -99.0_f32), |(low, high), v| (low.min(*v), high.max(*v)));
        assert!(low == MelConfig::nvidia().silence() && high > -1.0, "{low} {high}");
    }
}

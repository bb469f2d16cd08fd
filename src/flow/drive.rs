//! How strongly a flow's last recursion is driven.
//!
//! A recursion hears what it has said. Driven by noise of the deviation that it was trained with it is as hoarse
//! as the likelihood allows; by less, it goes on with its own waves more, and breathes less. Less noise in the
//! latents does that too, but each recursion on the way takes the quiet for its own, and what no mel tells grows
//! quiet for good ("What sigma 0.8 cost above 8 kHz" in docs/experiments.md). So it is done in front of the last
//! recursion alone, whose rows are samples in their order, and only as far up as the mel goes.

use std::f64::consts::PI;

/// The highest corner, as a part of the sample rate: above it, it is as good as half the rate.
const HIGHEST: f64 = 0.49;

/// Where values are cut off for the filter's memory, which would hold an infinite one for good.
const MOST: f32 = 64.0;

/// A shelf of the first order on samples in their order: `drive` at 0 Hz, 1 at half the sample rate, and
/// `√((1 + drive²) / 2)` at the corner.
#[derive(Clone, Debug)]
pub struct Drive {
    /// What is taken away of the sound below the corner.
    less: f32,
    /// Of the low-pass: of this sample and the one before, and of its own last answer.
    ahead: f32,
    back: f32,
    last: (f32, f32),
}

impl Drive {
    /// From `drive` and the corner, a part of the sample rate.
    pub fn new(drive: f32, corner: f64) -> Self {
        let warped = (PI * corner.min(HIGHEST)).tan();
        let (ahead, back) = (warped / (1.0 + warped), (1.0 - warped) / (1.0 + warped));
        Self { less: 1.0 - drive, ahead: ahead as f32, back: back as f32, last: (0.0, 0.0) }
    }

    /// Filters the next samples, in place.
    pub fn run(&mut self, samples: &mut [f32]) {
        if self.less == 0.0 {
            return;
        }
        for x in samples {
            *x = if x.is_nan() { 0.0 } else { x.clamp(-MOST, MOST) };
            let low = self.ahead * (*x + self.last.0) + self.back * self.last.1;
            self.last = (*x, low);
            *x -= self.less * low;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much louder a tone, a part of the sample rate, leaves the shelf.
    fn gain(drive: f32, corner: f64, tone: f64) -> f64 {
        let samples: Vec<f32> = (0..8000).map(|i| (2.0 * PI * tone * f64::from(i)).cos() as f32).collect();
        let mut driven = samples.clone();
        Drive::new(drive, corner).run(&mut driven);
        // without its beginning
        let power = |x: &[f32]| x[4000..].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        (power(&driven) / power(&samples)).sqrt()
    }

    #[test]
    fn the_shelf_goes_from_drive_to_one() {
        for drive in [0.0, 0.3, 0.65, 1.5] {
            let middle = ((1.0 + f64::from(drive).powi(2)) / 2.0).sqrt();
            for corner in [0.1, 8000.0 / 22_050.0] {
                for (tone, expected) in [(0.0, f64::from(drive)), (corner, middle), (0.5, 1.0)] {
                    let gain = gain(drive, corner, tone);
                    assert!((gain - expected).abs() < 1e-3, "{drive}, {corner}, {tone}: {gain}");
                }
            }
            // a mel up to half the sample rate
            assert!((gain(drive, 0.5, 0.3) - f64::from(drive)).abs() < 0.05);
        }
    }

    #[test]
    fn pieces_are_the_whole_and_one_changes_nothing() {
        let samples: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |drive, piece| {
            let (mut shelf, mut samples) = (Drive::new(drive, 0.3), samples.clone());
            samples.chunks_mut(piece).for_each(|piece| shelf.run(piece));
            samples
        };
        assert_eq!(run(1.0, 100), samples);
        assert!(run(0.6, 100) != samples && run(0.6, 100) == run(0.6, 7));
    }

    #[test]
    fn what_is_no_sample_is_forgotten() {
        for bad in [f32::NAN, f32::INFINITY, -1e38] {
            let (mut whole, mut clean) = (vec![0.5; 400], vec![0.5; 400]);
            whole[3] = bad;
            Drive::new(0.6, 0.3).run(&mut whole);
            Drive::new(0.6, 0.3).run(&mut clean);
            assert!(whole.iter().all(|x| x.is_finite()) && whole[300..] == clean[300..]);
        }
    }
}

//! Mels smoothed as acoustic models smooth them.

use super::MelSpectrogram;

/// A mel, a part of which is its mean over neighbouring bands and frames.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Smoothing {
    /// Standard deviation of the Gaussian over bands.
    pub bands: f32,
    /// Standard deviation of the Gaussian over frames.
    pub frames: f32,
    /// Part of the result that is the mean, from 0 to 1; the rest is the mel.
    pub part: f32,
}

impl Smoothing {
    /// The mel with part of its detail; beyond its edges the first and last values go on.
    pub fn of(&self, mel: &MelSpectrogram) -> MelSpectrogram {
        self.towards(mel, mel)
    }

    /// A part of the mel, the rest being the means of another one, of the same size.
    pub fn towards(&self, mel: &MelSpectrogram, other: &MelSpectrogram) -> MelSpectrogram {
        let over_bands = Average::new(self.bands).of_bands(&other.transposed()).transposed();
        let mut means = Average::new(self.frames).of_bands(&over_bands);
        for (mean, own) in means.values.iter_mut().zip(&mel.values) {
            *mean = own + self.part * (*mean - own);
        }
        means
    }
}

/// A mean over neighbours, weighted by a Gaussian.
pub struct Average {
    /// Weights from the middle on, which in all add to 1.
    half: Vec<f32>,
}

impl Average {
    /// Of a standard deviation, in values.
    pub fn new(deviation: f32) -> Self {
        let reach = (3.0 * deviation).ceil() as usize;
        let weight = |far: usize| if far == 0 { 1.0 } else { (-0.5 * (far as f32 / deviation).powi(2)).exp() };
        let half: Vec<f32> = (0..=reach).map(weight).collect();
        let sum = 2.0 * half.iter().sum::<f32>() - half[0];
        Self { half: half.into_iter().map(|weight| weight / sum).collect() }
    }

    /// The means of all values of a row, as many.
    pub fn of(&self, row: &[f32], means: &mut [f32]) {
        let last = row.len() - 1;
        for (i, mean) in means.iter_mut().enumerate() {
            let sides = self.half.iter().enumerate().skip(1);
            let sides = sides.map(|(far, weight)| weight * (row[i.saturating_sub(far)] + row[(i + far).min(last)]));
            *mean = self.half[0] * row[i] + sides.sum::<f32>();
        }
    }

    /// A mel whose bands are averaged over frames.
    fn of_bands(&self, mel: &MelSpectrogram) -> MelSpectrogram {
        let mut means = mel.clone();
        let rows = mel.values.chunks_exact(mel.frames).zip(means.values.chunks_exact_mut(mel.frames));
        rows.for_each(|(row, means)| self.of(row, means));
        means
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> MelSpectrogram {
        let value = |i: usize| if i % 20 < 10 { -8.0 } else { -2.0 } + (i / 20 % 2) as f32;
        MelSpectrogram::new((0..12 * 20).map(value).collect(), 12).unwrap()
    }

    #[test]
    fn no_smoothing_is_the_mel() {
        let mel = step();
        for (bands, frames, part) in [(0.0, 0.0, 1.0), (2.0, 3.0, 0.0)] {
            assert_eq!(Smoothing { bands, frames, part }.of(&mel), mel);
        }
    }

    #[test]
    fn bands_and_frames_are_averaged_apart() {
        let mel = step();
        let over_frames = Smoothing { bands: 0.0, frames: 2.0, part: 1.0 }.of(&mel);
        // between neighbouring bands there is still a whole nat, the step over frames is a slope
        for f in 0..20 {
            assert!((over_frames.band(1)[f] - over_frames.band(0)[f] - 1.0).abs() < 1e-5);
        }
        let rises: Vec<f32> = over_frames.band(0).windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(rises.iter().all(|rise| (-1e-5..1.3).contains(rise)), "{rises:?}");
        assert!((over_frames.band(0)[9] + over_frames.band(0)[10] + 10.0).abs() < 1e-4);
        let over_bands = Smoothing { bands: 2.0, frames: 0.0, part: 1.0 }.of(&mel);
        assert!((over_bands.band(6)[0] - over_bands.band(5)[0]).abs() < 0.1);
        assert!((over_bands.band(6)[10] - over_bands.band(6)[9] - 6.0).abs() < 1e-4);
        // half of it lies half way
        let half = Smoothing { bands: 2.0, frames: 0.0, part: 0.5 }.of(&mel);
        for ((own, all), half) in mel.values().iter().zip(over_bands.values()).zip(half.values()) {
            assert!((half - 0.5 * (own + all)).abs() < 1e-5);
        }
    }

    #[test]
    fn short_mels_are_averaged_too() {
        let mel = MelSpectrogram::new(vec![-3.0, -5.0], 2).unwrap();
        let smooth = Smoothing { bands: 100.0, frames: 100.0, part: 1.0 }.of(&mel);
        assert!(smooth.values().iter().all(|mean| (mean + 4.0).abs() < 0.1), "{smooth:?}");
    }
}

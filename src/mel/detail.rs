//! How much a mel changes from band to band and from frame to frame: what acoustic models leave out of it.
//!
//! Trained on the squared or absolute error, a model gives the mean of all mels that it thinks possible, which is
//! smoother than any of them. A sound of such a mel there is none.

use super::{MelConfig, MelSpectrogram};

/// Nats above the floor from which on a value counts: below, a mel is flat however much detail it has.
const ABOVE_FLOOR: f64 = 2.0;

/// The mean magnitude of the change from frame to frame of the second difference over bands, nats:
/// `|Δm[b−1] − 2 Δm[b] + Δm[b+1]|`, of the values that stand out from the floor before and after. Speech of LJSpeech
/// has 0.54.
///
/// What changes so fast in both directions is the chance of a spectrum's analysis more than what is said: a running
/// mean over 200 frames stays above .81 of the common mean in 370 clips and above .76 in twelve of other speakers, while
/// without the change from frame to frame it falls to .66 and .69.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Detail {
    sum: f64,
    count: f64,
}

impl Detail {
    /// Of all frames of a mel.
    pub fn of(mel: &MelSpectrogram, config: &MelConfig) -> Self {
        let (bands, columns) = (mel.n_mels(), mel.columns(0..mel.frames()));
        let pairs = columns.chunks_exact(bands).zip(columns.chunks_exact(bands).skip(1));
        pairs.map(|(before, frame)| Self::of_frame(before, frame, config)).sum()
    }

    /// Of one frame and the one before it, all bands of each; nothing where a value isn't a number.
    pub fn of_frame(before: &[f32], frame: &[f32], config: &MelConfig) -> Self {
        let quiet = (config.floor.ln() + ABOVE_FLOOR) as f32;
        let bends = before.windows(3).zip(frame.windows(3)).filter(|(a, b)| a[1] > quiet && b[1] > quiet);
        let bend = |bands: &[f32]| bands[0] - 2.0 * bands[1] + bands[2];
        let bends = bends.map(|(a, b)| f64::from((bend(b) - bend(a)).abs()));
        bends.filter(|bend| bend.is_finite()).map(|bend| Self { sum: bend, count: 1.0 }).sum()
    }

    /// As if so many values had been `mean`.
    pub fn assumed(mean: f32, count: usize) -> Self {
        Self { sum: f64::from(mean) * count as f64, count: count as f64 }
    }

    /// This with less weight.
    pub fn faded(self, by: f64) -> Self {
        Self { sum: self.sum * by, count: self.count * by }
    }

    /// How many values there were.
    pub fn count(&self) -> f64 {
        self.count
    }

    /// The mean; `None` of nothing.
    pub fn mean(&self) -> Option<f32> {
        (self.count > 0.0).then(|| (self.sum / self.count) as f32)
    }
}

impl std::ops::Add for Detail {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { sum: self.sum + other.sum, count: self.count + other.count }
    }
}

impl std::iter::Sum for Detail {
    fn sum<I: Iterator<Item = Self>>(details: I) -> Self {
        details.fold(Self::default(), |sum, detail| sum + detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detail_is_how_much_bends_change() {
        let config = MelConfig::nvidia();
        let mean = |before: &[f32], frame: &[f32]| Detail::of_frame(before, frame, &config).mean();
        let (slope, bent) = ([-3.0, -2.0, -1.0, 0.0], [-3.0, -1.0, -3.0, -3.0]);
        assert_eq!((mean(&slope, &slope), mean(&bent, &bent)), (Some(0.0), Some(0.0)));
        // louder all over is no change
        assert_eq!(mean(&slope, &slope.map(|v| v + 0.5)), Some(0.0));
        assert_eq!((mean(&slope, &bent), mean(&bent, &slope)), (Some(3.0), Some(3.0)));
        // the floor has none, and what isn't a number isn't counted
        assert_eq!((mean(&[-11.5; 4], &bent), mean(&bent, &[-11.5; 4])), (None, None));
        assert_eq!(mean(&[0.0; 5], &[-3.0, -1.0, -3.0, -3.0, f32::NAN]), Some(3.0));
        let columns = [[-3.0, -1.0, -3.0], [0.0, -11.0, 0.0], [-3.0, -1.0, -3.0], [-1.0, -1.0, -1.0]].concat();
        let mel = MelSpectrogram::new(columns, 4).unwrap().transposed();
        assert!(mel.n_mels() == 3 && Detail::of(&mel, &config).count() == 1.0);
        let both = Detail::assumed(1.0, 3) + Detail::of(&mel, &config).faded(0.5);
        assert!((both.mean().unwrap() - (3.0 + 0.5 * 4.0) / 3.5).abs() < 1e-6);
    }
}

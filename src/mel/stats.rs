//! Statistics for mean-variance normalised mels: `(value − mean) / scale`, per band.

use super::MelSpectrogram;
use super::file::{self, TensorData};
use crate::{Error, Result};
use std::path::Path;

/// Mean and standard deviation of each band.
#[derive(Clone, Debug, PartialEq)]
pub struct MelStats {
    mean: Vec<f32>,
    scale: Vec<f32>,
}

impl MelStats {
    /// Statistics from one mean and one positive deviation per band.
    ///
    /// # Errors
    /// If the lengths differ, a value isn't finite, or a deviation isn't positive.
    pub fn new(mean: Vec<f32>, scale: Vec<f32>) -> Result<Self> {
        if mean.len() != scale.len() {
            return Err(Error::invalid(format!("{} means but {} deviations", mean.len(), scale.len())));
        }
        if let Some(band) = mean.iter().position(|v| !v.is_finite()) {
            return Err(Error::invalid(format!("the mean of band {band} is {}", mean[band])));
        }
        if let Some(band) = scale.iter().position(|v| !(v.is_finite() && *v > 0.0)) {
            return Err(Error::invalid(format!(
                "the deviation of band {band} is {}, expected more than 0",
                scale[band]
            )));
        }
        Ok(Self { mean, scale })
    }

    /// Reads statistics of `n_mels` bands from what ParallelWaveGAN and ESPnet write: arrays `mean`
    /// and `scale` (`stats.h5`), an array `[2, n_mels]` of both (`stats.npy`), `count`, `sum` and
    /// `sum_square` (`feats_stats.npz`), or Kaldi's `[2, n_mels + 1]` of sums (`cmvn.ark`).
    ///
    /// # Errors
    /// One line naming the file: it can't be read, holds something else, or is of other bands.
    pub fn read(path: &Path, n_mels: usize) -> Result<Self> {
        let arrays = file::read_arrays(path)?;
        let stats = Self::of_arrays(&arrays, n_mels).and_then(|stats| stats.check(n_mels).map(|()| stats));
        stats.map_err(|problem| Error::file(path, problem.to_string()))
    }

    fn of_arrays(arrays: &[(String, TensorData)], n_mels: usize) -> Result<Self> {
        let named = |wanted: &str| {
            let found = arrays.iter().find(|(name, _)| name.rsplit(['/', '.']).next() == Some(wanted));
            found.map(|(_, array)| array.values.clone())
        };
        if let (Some(mean), Some(scale)) = (named("mean"), named("scale").or_else(|| named("std"))) {
            return Self::new(mean, scale);
        }
        if let (Some(count), Some(sum), Some(squares)) = (named("count"), named("sum"), named("sum_square")) {
            return Self::of_sums(&sum, &squares, count.first().copied().unwrap_or(0.0));
        }
        match arrays {
            [(_, TensorData { shape, values, .. })] if shape[..] == [2, n_mels + 1] && n_mels > 0 => {
                let (sums, squares) = values.split_at(n_mels + 1);
                Self::of_sums(&sums[..n_mels], &squares[..n_mels], sums[n_mels])
            }
            [(_, TensorData { shape, values, .. })] if shape.len() == 2 && shape[0] == 2 => {
                let (mean, scale) = values.split_at(shape[1]);
                Self::new(mean.to_vec(), scale.to_vec())
            }
            _ => Err(Error::invalid(format!(
                "holds no statistics we know; expected mean and scale, or [2, {n_mels}] of both"
            ))),
        }
    }

    /// From sums and sums of squares over `count` frames.
    fn of_sums(sum: &[f32], squares: &[f32], count: f32) -> Result<Self> {
        let count = f64::from(count);
        if count.is_nan() || count < 1.0 {
            return Err(Error::invalid(format!("statistics of {count} frames, expected at least 1")));
        }
        let mean = sum.iter().map(|&s| f64::from(s) / count);
        let scale = mean.clone().zip(squares).map(|(m, &q)| (f64::from(q) / count - m * m).max(1e-20).sqrt() as f32);
        Self::new(mean.clone().map(|m| m as f32).collect(), scale.collect())
    }

    /// Checks the number of bands.
    ///
    /// # Errors
    /// If there aren't `n_mels`.
    pub fn check(&self, n_mels: usize) -> Result<()> {
        if self.mean.len() != n_mels {
            return Err(Error::invalid(format!("holds statistics of {} bands, expected {n_mels}", self.mean.len())));
        }
        Ok(())
    }

    /// Mean and deviation of a band.
    ///
    /// # Panics
    /// If there is no such band.
    pub fn of(&self, band: usize) -> (f32, f32) {
        (self.mean[band], self.scale[band])
    }

    /// Normalises a mel.
    ///
    /// # Errors
    /// If it has another number of bands, or a result isn't finite.
    pub fn normalise(&self, mel: &MelSpectrogram) -> Result<MelSpectrogram> {
        self.check(mel.n_mels())?;
        let bands = (0..mel.n_mels()).flat_map(|band| {
            let (mean, scale) = self.of(band);
            mel.band(band).iter().map(move |v| (v - mean) / scale)
        });
        MelSpectrogram::new(bands.collect(), mel.n_mels())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(shape: &[usize], values: &[f32]) -> TensorData {
        TensorData { shape: shape.to_vec(), values: values.to_vec(), dtype: "float32" }
    }

    fn named(arrays: &[(&str, TensorData)]) -> Result<MelStats> {
        let arrays: Vec<_> = arrays.iter().map(|(name, array)| (name.to_string(), array.clone())).collect();
        MelStats::of_arrays(&arrays, 2)
    }

    #[test]
    fn all_layouts_mean_the_same() {
        let (mean, scale) = (array(&[2], &[1.0, -2.0]), array(&[2], &[2.0, 0.5]));
        let expected = MelStats::new(mean.values.clone(), scale.values.clone()).unwrap();
        assert_eq!(named(&[("mean", mean), ("scale", scale)]).unwrap(), expected);
        assert_eq!(named(&[("", array(&[2, 2], &[1.0, -2.0, 2.0, 0.5]))]).unwrap(), expected);
        // Sums over 4 frames: Σx² = 4 (σ² + μ²).
        let (sum, squares) = ([4.0, -8.0], [20.0, 17.0]);
        let parts = [("count", array(&[], &[4.0])), ("sum", array(&[2], &sum)), ("sum_square", array(&[2], &squares))];
        assert_eq!(named(&parts).unwrap(), expected);
        assert_eq!(named(&[("", array(&[2, 3], &[4.0, -8.0, 4.0, 20.0, 17.0, 0.0]))]).unwrap(), expected);
    }

    #[test]
    fn what_is_no_statistics_says_why() {
        let problem = |arrays: &[(&str, TensorData)]| named(arrays).unwrap_err().to_string();
        assert!(problem(&[("", array(&[4], &[0.0; 4]))]).contains("holds no statistics we know"));
        assert!(problem(&[("", array(&[2, 2], &[0.0; 4]))]).contains("the deviation of band 0 is 0"));
        assert!(problem(&[("", array(&[2, 2], &[f32::NAN, 0.0, 1.0, 1.0]))]).contains("the mean of band 0 is NaN"));
        assert!(problem(&[("mean", array(&[2], &[0.0; 2])), ("scale", array(&[1], &[1.0]))]).contains("2 means but 1"));
        let three = named(&[("", array(&[2, 5], &[1.0; 10]))]).unwrap();
        assert_eq!(three.check(2).unwrap_err().to_string(), "holds statistics of 5 bands, expected 2");
    }
}

//! Mel spectrograms from sound.

use super::filterbank::MelBands;
use super::stft::Stft;
use super::{MelConfig, MelSpectrogram};
use crate::{Error, Result};
use rayon::prelude::*;
use rustfft::num_complex::Complex32;

/// A convention's transform and bands, planned once for many sounds.
#[derive(Clone)]
pub struct Extractor {
    stft: Stft,
    bands: MelBands,
    floor: f32,
}

impl Extractor {
    /// Plans for a convention.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn new(config: &MelConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { stft: Stft::of(config)?, bands: MelBands::new(config), floor: config.floor as f32 })
    }

    /// The mel spectrogram of samples in ±1 at the convention's rate: `ln max(basis · |STFT|, floor)`.
    ///
    /// Sounds of any length from one sample; `1 + ⌊samples / hop_length⌋` frames.
    ///
    /// # Errors
    /// If there are no samples or one isn't finite.
    pub fn extract(&self, samples: &[f32]) -> Result<MelSpectrogram> {
        if samples.is_empty() {
            return Err(Error::invalid("the sound is empty"));
        }
        if let Some(at) = samples.iter().position(|s| !s.is_finite()) {
            return Err(Error::invalid(format!("sample {at} is {}, expected a finite number", samples[at])));
        }
        let (frames, n_mels) = (self.stft.frames(samples.len()), self.bands.n_mels());
        let mut by_frame = vec![0.0f32; frames * n_mels];
        by_frame.par_chunks_mut(n_mels).enumerate().for_each_init(
            || (self.stft.scratch(), vec![Complex32::default(); self.stft.bins()], vec![0.0; self.stft.bins()]),
            |(scratch, spectrum, magnitudes), (frame, out)| {
                self.stft.analyse(samples, frame, scratch, spectrum);
                for (m, s) in magnitudes.iter_mut().zip(spectrum.iter()) {
                    *m = s.norm_sqr().sqrt();
                }
                self.bands.apply(magnitudes, out);
                for value in out {
                    *value = value.max(self.floor).ln();
                }
            },
        );
        Ok(MelSpectrogram::new(by_frame, frames)?.transposed())
    }
}

/// The mel spectrogram of one sound; for many, keep an [`Extractor`].
///
/// # Errors
/// As [`Extractor::new`] and [`Extractor::extract`].
pub fn extract(samples: &[f32], config: &MelConfig) -> Result<MelSpectrogram> {
    Extractor::new(config)?.extract(samples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::decode;
    use crate::mel::file::{self, tests::parity};

    /// NVIDIA's STFT is a float32 matrix product, up to 1.5e-4 from a float64 FFT in quiet bins.
    #[test]
    fn equals_tacotron_stft() {
        let (Some(wav), Some(npy)) = (parity("LJ001-0002.wav"), parity("lj_mel.npy")) else {
            return;
        };
        let sound = decode::read(&wav).unwrap();
        let mel = extract(&sound.samples, &MelConfig::nvidia()).unwrap();
        let golden = file::read(&npy, 80).unwrap();
        assert_eq!((mel.n_mels(), mel.frames()), (80, 164));
        let differences = mel.values().iter().zip(golden.values()).map(|(a, b)| (a - b).abs());
        let (worst, sum) = differences.fold((0.0f32, 0.0), |(worst, sum), d| (worst.max(d), sum + d));
        assert!(worst < 1e-3 && sum / (80.0 * 164.0) < 1e-5, "{worst} {sum}");
    }

    #[test]
    fn silence_is_the_floor() {
        let config = MelConfig::nvidia();
        let mel = extract(&[0.0; 1000], &config).unwrap();
        assert_eq!(mel.frames(), config.frames(1000));
        assert!(mel.values().iter().all(|&v| v == config.silence()));
    }

    #[test]
    fn short_sounds_do_not_panic() {
        for len in [1, 2, 3, 255, 256, 511, 512, 513] {
            let mel = extract(&vec![0.1; len], &MelConfig::nvidia()).unwrap();
            assert_eq!(mel.frames(), 1 + len / 256);
        }
    }

    #[test]
    fn empty_and_nan_are_errors() {
        let config = MelConfig::nvidia();
        assert!(extract(&[], &config).is_err());
        let error = extract(&[0.0, f32::NAN], &config).unwrap_err();
        assert_eq!(error.to_string(), "sample 1 is NaN, expected a finite number");
    }
}

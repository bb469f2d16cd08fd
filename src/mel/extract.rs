//! Mel spectrograms from sound.

use super::convention::{Convention, Padding, Spectrum};
use super::filterbank::MelBands;
use super::stft::Stft;
use super::{MelConfig, MelSpectrogram};
use crate::{Error, Result};
use rayon::prelude::*;
use rustfft::num_complex::Complex32;
use std::borrow::Cow;

/// A convention's transform and bands, planned once for many sounds.
#[derive(Clone)]
pub struct Extractor {
    convention: Convention,
    stft: Stft,
    bands: MelBands,
}

impl Extractor {
    /// Plans for a voice's convention.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn new(config: &MelConfig) -> Result<Self> {
        Self::of(&Convention::of_voice(config))
    }

    /// Plans for any program's convention.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn of(convention: &Convention) -> Result<Self> {
        let config = &convention.mel;
        config.validate()?;
        Ok(Self { convention: convention.clone(), stft: Stft::of(config)?, bands: MelBands::new(config) })
    }

    /// The mel spectrogram of samples in ±1 at the convention's rate: for a voice's convention,
    /// `ln max(basis · |STFT|, floor)`.
    ///
    /// Sounds of any length from one sample; `1 + ⌊samples / hop_length⌋` frames if centred.
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
        let Convention { spectrum, encoding, ref mel, .. } = self.convention;
        let (n_mels, hop) = (mel.n_mels, mel.hop_length as isize);
        let (mut start, frames) = self.convention.frames(samples.len());
        let mut samples = self.prepared(samples);
        if self.convention.padding == Padding::Zero {
            // beyond the ends of what is given the transform would mirror
            let len = (frames - 1) * mel.hop_length + mel.n_fft;
            let inside = |i: isize| usize::try_from(i).ok().and_then(|i| samples.get(i)).copied().unwrap_or(0.0);
            samples = Cow::Owned((start..start + len as isize).map(inside).collect());
            start = 0;
        }
        let mut by_frame = vec![0.0f32; frames * n_mels];
        by_frame.par_chunks_mut(n_mels).enumerate().for_each_init(
            || (self.stft.scratch(), vec![Complex32::default(); self.stft.bins()], vec![0.0; self.stft.bins()]),
            |(scratch, bins, sums), (frame, out)| {
                self.stft.analyse_from(&samples, start + frame as isize * hop, scratch, bins);
                for (s, bin) in sums.iter_mut().zip(bins.iter()) {
                    *s = match spectrum {
                        Spectrum::Magnitude { epsilon } => (bin.norm_sqr() + epsilon as f32).sqrt(),
                        Spectrum::Power => bin.norm_sqr(),
                    };
                }
                self.bands.apply(sums, out);
                for value in out {
                    *value = encoding.encode(*value, mel.floor);
                }
            },
        );
        Ok(MelSpectrogram::new(by_frame, frames)?.transposed())
    }

    /// The samples after pre-emphasis and scaling.
    fn prepared<'a>(&self, samples: &'a [f32]) -> Cow<'a, [f32]> {
        let mut samples = Cow::Borrowed(samples);
        if let Some(k) = self.convention.preemphasis {
            let before = std::iter::once(&0.0).chain(samples.iter());
            samples = Cow::Owned(samples.iter().zip(before).map(|(x, before)| x - k * before).collect());
        }
        let gain = self.convention.gain(&samples);
        if gain != 1.0 {
            samples.to_mut().iter_mut().for_each(|x| *x *= gain);
        }
        samples
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

//! Mel spectrograms: configuration, extraction from audio, files.

pub(crate) mod classes;
pub mod convention;
pub mod detail;
pub mod diagnosis;
pub mod extract;
pub mod file;
pub mod filterbank;
pub(crate) mod smooth;
pub mod stats;
pub mod stft;

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How a mel spectrogram is made from sound: the convention both sides must share.
///
/// Magnitude STFT (periodic Hann, centred, reflect padding), mel bands, natural log of
/// `max(mel, floor)`. Frame `f` is centred on sample `f · hop_length`; a sound of `N` samples has
/// `1 + ⌊N / hop_length⌋` frames. What other programs write differs in more than these fields:
/// see [`convention`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MelConfig {
    /// Samples per second.
    pub sample_rate: u32,
    /// FFT size, samples.
    pub n_fft: usize,
    /// Window length, samples, at most `n_fft`.
    pub win_length: usize,
    /// Samples from one frame to the next.
    pub hop_length: usize,
    /// Number of mel bands.
    pub n_mels: usize,
    /// Lowest frequency, Hz.
    pub f_min: f64,
    /// Highest frequency, Hz.
    pub f_max: f64,
    /// Where the bands lie and how they are weighted; left out of files where it is Slaney's.
    #[serde(default, skip_serializing_if = "MelScale::is_slaney")]
    pub scale: MelScale,
    /// Smallest band magnitude before the logarithm.
    pub floor: f64,
}

/// A mel scale, with the weighting that comes with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MelScale {
    /// Linear to 1 kHz, logarithmic above; each band's area is 1 (librosa's default).
    #[default]
    Slaney,
    /// `2595 log10(1 + f / 700)`; each band's peak is 1 (torchaudio's default).
    Htk,
}

impl MelScale {
    fn is_slaney(&self) -> bool {
        *self == Self::Slaney
    }
}

/// Factor and summand that bring log-mels, which lie between -11.5 and 2, near unit scale: what nets read
/// that were trained here.
pub(crate) const NEAR_UNIT: (f32, f32) = (0.25, 1.25);

impl MelConfig {
    /// NVIDIA's convention (Tacotron 2, WaveGlow, FastPitch): 22 050 Hz, 1024/256, 80 bands to 8 kHz.
    ///
    /// NVIDIA/tacotron2 `layers.py`, `hparams.py`.
    pub const fn nvidia() -> Self {
        Self {
            sample_rate: 22_050,
            n_fft: 1024,
            win_length: 1024,
            hop_length: 256,
            n_mels: 80,
            f_min: 0.0,
            f_max: 8000.0,
            scale: MelScale::Slaney,
            floor: 1e-5,
        }
    }

    /// Frames of a sound of `samples` samples.
    pub fn frames(&self, samples: usize) -> usize {
        1 + samples / self.hop_length
    }

    /// The log-mel value of silence: `ln floor`.
    pub fn silence(&self) -> f32 {
        self.floor.ln() as f32
    }

    /// Checks ranges and relations once, on reading.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let problem = if !(1000..=384_000).contains(&self.sample_rate) {
            format!("sample_rate is {}, expected 1000 to 384000", self.sample_rate)
        } else if !(16..=65_536).contains(&self.n_fft) || !self.n_fft.is_multiple_of(2) {
            format!("n_fft is {}, expected an even number from 16 to 65536", self.n_fft)
        } else if self.win_length == 0 || self.win_length > self.n_fft {
            format!("win_length is {}, expected 1 to n_fft {}", self.win_length, self.n_fft)
        } else if self.hop_length == 0 || self.hop_length > self.win_length {
            format!("hop_length is {}, expected 1 to win_length {}", self.hop_length, self.win_length)
        } else if !(1..=1024).contains(&self.n_mels) {
            format!("n_mels is {}, expected 1 to 1024", self.n_mels)
        } else if !(self.f_min >= 0.0 && self.f_min < self.f_max && self.f_max <= f64::from(self.sample_rate) / 2.0) {
            format!("f_min {} and f_max {} must be in order and at most half the sample rate", self.f_min, self.f_max)
        } else if !(self.floor > 0.0 && self.floor < 1.0) {
            format!("floor is {}, expected between 0 and 1", self.floor)
        } else {
            return Ok(());
        };
        Err(Error::invalid(format!("mel config: {problem}")))
    }
}

/// Log-mel magnitudes (natural log), row-major `[n_mels, frames]`.
#[derive(Clone, Debug, PartialEq)]
pub struct MelSpectrogram {
    values: Vec<f32>,
    n_mels: usize,
    frames: usize,
}

impl MelSpectrogram {
    /// Wraps row-major `[n_mels, frames]` values.
    ///
    /// # Errors
    /// If the number of values isn't a multiple of `n_mels`, there are none, or one isn't finite
    /// (the message says which).
    pub fn new(values: Vec<f32>, n_mels: usize) -> Result<Self> {
        if n_mels == 0 || values.is_empty() {
            return Err(Error::invalid("the mel is empty"));
        }
        if !values.len().is_multiple_of(n_mels) {
            return Err(Error::invalid(format!("{} values do not make rows of {n_mels} bands", values.len())));
        }
        let frames = values.len() / n_mels;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::invalid(format!(
                "value {} at band {}, frame {} is not finite",
                values[at],
                at / frames,
                at % frames
            )));
        }
        Ok(Self { values, n_mels, frames })
    }

    /// All values, row-major `[n_mels, frames]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// One band over all frames.
    pub fn band(&self, band: usize) -> &[f32] {
        &self.values[band * self.frames..][..self.frames]
    }

    /// Number of bands (rows).
    pub fn n_mels(&self) -> usize {
        self.n_mels
    }

    /// Number of frames (columns).
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Values below `floor` raised to it.
    pub fn raised(mut self, floor: f32) -> Self {
        self.values.iter_mut().for_each(|value| *value = value.max(floor));
        self
    }

    /// The frames of a range one after the other, all bands of each: `[frames, n_mels]`.
    pub fn columns(&self, frames: Range<usize>) -> Vec<f32> {
        frames.flat_map(|f| (0..self.n_mels).map(move |b| self.values[b * self.frames + f])).collect()
    }

    /// The frames of a range, at least one, as a mel.
    pub fn section(&self, frames: Range<usize>) -> Self {
        let values = (0..self.n_mels).flat_map(|b| self.band(b)[frames.clone()].iter().copied()).collect();
        Self { values, n_mels: self.n_mels, frames: frames.len() }
    }

    /// Rows and columns exchanged: for mels stored as `[frames, n_mels]`.
    pub fn transposed(&self) -> Self {
        Self { values: self.columns(0..self.frames), n_mels: self.frames, frames: self.n_mels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Voices written before there were scales have none in their config; Slaney's is left out still.
    #[test]
    fn configs_without_a_scale_are_slaneys() {
        let config = MelConfig::nvidia();
        let text = serde_json::to_string(&config).unwrap();
        assert!(!text.contains("scale"), "{text}");
        assert_eq!(serde_json::from_str::<MelConfig>(&text).unwrap(), config);
        let htk = MelConfig { scale: MelScale::Htk, ..config };
        let text = serde_json::to_string(&htk).unwrap();
        assert!(text.contains(r#""scale":"htk""#), "{text}");
        assert_eq!(serde_json::from_str::<MelConfig>(&text).unwrap(), htk);
    }
}

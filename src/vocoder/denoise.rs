//! Removing a voice's constant hum: its spectrum without noise is subtracted from the sound's.

use super::{SynthOptions, Vocoder};
use crate::mel::MelSpectrogram;
use crate::mel::stft::Stft;
use crate::{Error, Result};
use rustfft::num_complex::Complex32;
use std::ops::RangeInclusive;

/// The reference's transform, whatever the voice's: 1024 samples, four frames to a window.
const N_FFT: usize = 1024;
/// Samples from one frame to the next.
const HOP: usize = 256;
/// Frames of the mel that the hum is heard at.
const BIAS_FRAMES: usize = 88;

/// Subtracts the spectrum of a voice's hum.
///
/// What a voice says to a mel of zeros with noise of deviation 0 is taken for its hum. For each frame
/// `|X| ← max(|X| − strength · |bias|, 0)`; phases stay. NVIDIA/waveglow `denoiser.py`, mode `zeros`.
///
/// A voice with a whitening front makes its sound as loud as the mel says, and zeros are louder than
/// speech: its hum is what it says to silence.
pub struct Denoiser {
    stft: Stft,
    /// Magnitudes of the hum, one for each bin.
    bias: Vec<f32>,
}

impl Denoiser {
    /// Strengths that are accepted; 1 takes away as much as the hum measures.
    pub const STRENGTHS: RangeInclusive<f32> = 0.0..=10.0;
    /// What the reference takes if nothing is said.
    pub const DEFAULT_STRENGTH: f32 = 0.1;

    /// Listens to a voice's hum.
    ///
    /// # Errors
    /// If the voice's answer isn't finite.
    pub fn new(vocoder: &Vocoder) -> Result<Self> {
        let config = vocoder.config();
        let level = if config.flow.whitening.is_some() { config.mel.silence() } else { 0.0 };
        let mel = MelSpectrogram::new(vec![level; config.mel.n_mels * BIAS_FRAMES], config.mel.n_mels)?;
        let options = SynthOptions { sigma: Some(0.0), refine: Some(0), ..SynthOptions::default() };
        Self::of_hum(&vocoder.vocode(&mel, &options, None)?.samples)
    }

    /// Takes a sound for the hum: the spectrum of its frame 0, as in the reference.
    ///
    /// # Errors
    /// If there are no samples or they aren't finite.
    pub fn of_hum(samples: &[f32]) -> Result<Self> {
        if samples.is_empty() || samples.iter().any(|s| !s.is_finite()) {
            return Err(Error::invalid("the voice's hum is empty or not finite"));
        }
        let stft = Stft::new(N_FFT, N_FFT, HOP)?;
        let mut spectrum = vec![Complex32::default(); stft.bins()];
        stft.analyse(samples, 0, &mut stft.scratch(), &mut spectrum);
        Ok(Self { bias: spectrum.iter().map(|bin| bin.norm()).collect(), stft })
    }

    /// Magnitudes of the hum, `n_fft / 2 + 1` values.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Checks a strength.
    ///
    /// # Errors
    /// If it is out of range.
    pub fn check(strength: f32) -> Result<()> {
        if Self::STRENGTHS.contains(&strength) {
            return Ok(());
        }
        let (low, high) = (Self::STRENGTHS.start(), Self::STRENGTHS.end());
        Err(Error::invalid(format!("denoising strength is {strength}, expected {low} to {high}")))
    }

    /// The sound with the hum subtracted, as many samples; strength 0 leaves it as it is.
    ///
    /// # Errors
    /// If the strength is out of range or there are no samples.
    pub fn denoise(&self, samples: &[f32], strength: f32) -> Result<Vec<f32>> {
        Self::check(strength)?;
        if strength == 0.0 {
            return Ok(samples.to_vec());
        }
        let mut spectra = self.stft.forward(samples)?;
        for frame in spectra.values.chunks_exact_mut(self.bias.len()) {
            for (bin, bias) in frame.iter_mut().zip(&self.bias) {
                let magnitude = bin.norm();
                let left = (magnitude - strength * bias).max(0.0);
                *bin = if magnitude > 0.0 { *bin * (left / magnitude) } else { *bin };
            }
        }
        self.stft.inverse(&spectra, samples.len())
    }

    /// Bytes that [`denoise`](Self::denoise) holds for a sound of `samples` samples, with the sound.
    pub fn memory(&self, samples: usize) -> usize {
        let spectra = self.stft.frames(samples).saturating_mul(self.bias.len() * size_of::<Complex32>());
        spectra.saturating_add(samples.saturating_mul(2 * size_of::<f32>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mel::file::{self, tests::parity};

    fn array(name: &str) -> Option<Vec<f32>> {
        parity(name).map(|path| file::read_array(&path).unwrap().values)
    }

    fn tone(hz: f32, level: f32, len: usize) -> Vec<f32> {
        (0..len).map(|i| level * (std::f32::consts::TAU * hz * i as f32 / 22_050.0).cos()).collect()
    }

    fn worst(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn strength_0_is_the_identity_and_a_tiny_one_nearly() {
        let denoiser = Denoiser::of_hum(&tone(2756.25, 0.1, 4096)).unwrap();
        for len in [1, 255, 256, 5000] {
            let sound = tone(440.0, 0.5, len);
            assert_eq!(denoiser.denoise(&sound, 0.0).unwrap(), sound);
            assert!(worst(&denoiser.denoise(&sound, 1e-9).unwrap(), &sound) < 1e-6);
        }
    }

    /// A hum alone goes away at strength 1, a louder tone elsewhere stays.
    #[test]
    fn the_hum_goes_and_the_rest_stays() {
        let (hum, voice) = (tone(2756.25, 0.1, 8192), tone(440.0, 0.5, 8192));
        let denoiser = Denoiser::of_hum(&hum).unwrap();
        let inner = 1024..7168;
        let power = |s: &[f32]| s[inner.clone()].iter().map(|v| v * v).sum::<f32>();
        assert!(power(&denoiser.denoise(&hum, 1.0).unwrap()) < 1e-3 * power(&hum));
        let both: Vec<f32> = hum.iter().zip(&voice).map(|(a, b)| a + b).collect();
        let left = denoiser.denoise(&both, 1.0).unwrap();
        let error: Vec<f32> = left.iter().zip(&voice).map(|(a, b)| a - b).collect();
        assert!(power(&error) < 0.05 * power(&hum), "{} of {}", power(&error), power(&hum));
    }

    /// The reference's transform is a float32 matrix product with a pseudo-inverse.
    #[test]
    fn equals_nvidias_denoiser() {
        let Some(hum) = array("d_bias_audio.npy") else {
            return;
        };
        let denoiser = Denoiser::of_hum(&hum).unwrap();
        assert!(worst(denoiser.bias(), &array("d_bias_spec.npy").unwrap()) < 1e-4);
        let sound = array("b_audio_sigma0.6.npy").unwrap();
        for strength in ["0.1", "1.0"] {
            let out = denoiser.denoise(&sound, strength.parse().unwrap()).unwrap();
            let error = worst(&out, &array(&format!("d_out_strength{strength}.npy")).unwrap());
            assert!(error < 1e-4, "strength {strength}: {error}");
        }
    }

    #[test]
    fn bad_strengths_and_empty_sounds_are_errors() {
        let denoiser = Denoiser::of_hum(&[0.1; 10]).unwrap();
        for strength in [-0.1, 10.1, f32::NAN] {
            assert!(denoiser.denoise(&[0.1], strength).unwrap_err().to_string().starts_with("denoising strength is"));
        }
        assert!(denoiser.denoise(&[], 1.0).is_err());
        assert!(Denoiser::of_hum(&[]).is_err());
    }
}

//! Griffin-Lim: the yardstick that needs no training.

use crate::Result;
use crate::mel::filterbank::MelBands;
use crate::mel::stft::{Spectra, Stft};
use crate::mel::{MelConfig, MelSpectrogram};
use crate::vocoder::noise::Noise;
use rayon::prelude::*;
use rustfft::num_complex::Complex32;

/// Rounds of the search for a spectrum.
const SPECTRUM_ROUNDS: usize = 100;
/// Keeps quotients finite where a spectrum is empty.
const TINY: f32 = 1e-12;

/// Sound from mels by Griffin & Lim 1984, "Signal estimation from modified short-time Fourier
/// transform": a magnitude spectrum whose mel is the one given, and phases that agree with it.
pub struct GriffinLim {
    stft: Stft,
    bands: MelBands,
}

impl GriffinLim {
    /// Passes of the figures that people quote.
    pub const PASSES: usize = 60;

    /// Plans for a convention.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn new(config: &MelConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { stft: Stft::of(config)?, bands: MelBands::new(config) })
    }

    /// The sound of a mel, `frames · hop_length` samples, after `passes` passes from random phases.
    ///
    /// # Errors
    /// If the mel has another number of bands.
    pub fn speak(&self, mel: &MelSpectrogram, passes: usize) -> Result<Vec<f32>> {
        if mel.n_mels() != self.bands.n_mels() {
            let problem = format!("the mel has {} bands, expected {}", mel.n_mels(), self.bands.n_mels());
            return Err(crate::Error::invalid(problem));
        }
        let bins = self.stft.bins();
        let (columns, samples) = (mel.transposed(), mel.frames() * self.stft.hop_length());
        let frames = self.stft.frames(samples);
        let mut magnitudes = vec![0.0; frames * bins];
        // the last frame is centred on the end of the sound
        magnitudes.par_chunks_mut(bins).enumerate().for_each(|(frame, out)| {
            let frame = frame.min(mel.frames() - 1);
            self.spectrum(&columns.values()[frame * mel.n_mels()..][..mel.n_mels()], out);
        });
        let mut phases = vec![0.0; frames * bins];
        Noise::new(0).fill(0, &mut phases);
        let wanted = |(magnitude, phase): (&f32, Complex32)| phase * (magnitude / phase.norm().max(TINY));
        // a normal deviate of many turns is a uniform angle
        let start = phases.iter().map(|&phase| Complex32::from_polar(1.0, 1000.0 * phase));
        let mut spectra = Spectra { values: magnitudes.iter().zip(start).map(wanted).collect(), bins };
        let mut sound = self.stft.inverse(&spectra, samples)?;
        for _ in 0..passes {
            spectra = self.stft.forward(&sound)?;
            spectra.values.par_iter_mut().zip(&magnitudes).for_each(|(bin, m)| *bin = wanted((m, *bin)));
            sound = self.stft.inverse(&spectra, samples)?;
        }
        Ok(sound)
    }

    /// Magnitudes without negative values whose mel comes near `column`: multiplicative updates of the
    /// least squares (Lee & Seung 2001).
    fn spectrum(&self, column: &[f32], out: &mut [f32]) {
        let wanted: Vec<f32> = column.iter().map(|v| v.exp()).collect();
        let mut found = vec![0.0; wanted.len()];
        let (mut up, mut down) = (vec![0.0; out.len()], vec![0.0; out.len()]);
        self.spread(&wanted, &mut up);
        out.copy_from_slice(&up);
        for _ in 0..SPECTRUM_ROUNDS {
            self.bands.apply(out, &mut found);
            self.spread(&found, &mut down);
            for ((out, up), down) in out.iter_mut().zip(&up).zip(&down) {
                *out *= up / down.max(TINY);
            }
        }
    }

    /// Each band's value over its bins, by their weights: the filterbank's transpose.
    fn spread(&self, bands: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for (band, value) in bands.iter().enumerate() {
            let (start, weights) = self.bands.band(band);
            out[start..].iter_mut().zip(weights).for_each(|(out, weight)| *out += weight * value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::spectral::mel_l1;
    use crate::mel::extract::extract;

    #[test]
    fn passes_bring_the_mel_nearer() {
        let config = MelConfig::nvidia();
        let sound: Vec<f32> = (0..12_000)
            .map(|i| (1..12).map(|k| 0.05 * (f64::from(k) * 0.05 * f64::from(i)).sin() as f32).sum())
            .collect();
        let mel = extract(&sound, &config).unwrap();
        let griffin_lim = GriffinLim::new(&config).unwrap();
        let distance = |passes| {
            let sound = griffin_lim.speak(&mel, passes).unwrap();
            assert_eq!(sound.len(), mel.frames() * config.hop_length);
            mel_l1(&extract(&sound[..12_000], &config).unwrap(), &mel).unwrap()
        };
        let distances = [0, 5, 60].map(distance);
        assert!(distances[0] > distances[1] && distances[1] > distances[2], "{distances:?}");
        assert!(distances[2] < 0.3, "{distances:?}");
    }

    #[test]
    fn the_spectrum_has_the_mel() {
        let config = MelConfig::nvidia();
        let griffin_lim = GriffinLim::new(&config).unwrap();
        let column: Vec<f32> = (0..80).map(|band| -4.0 + 2.0 * (band as f32 * 0.4).sin()).collect();
        let (mut spectrum, mut found) = (vec![0.0; 513], vec![0.0; 80]);
        griffin_lim.spectrum(&column, &mut spectrum);
        griffin_lim.bands.apply(&spectrum, &mut found);
        let worst = found.iter().zip(&column).map(|(f, c)| (f.ln() - c).abs()).fold(0.0, f32::max);
        assert!(spectrum.iter().all(|&s| s >= 0.0) && worst < 0.1, "{worst}");
        let silence = MelSpectrogram::new(vec![config.silence(); 80 * 3], 80).unwrap();
        let sound = griffin_lim.speak(&silence, 2).unwrap();
        assert!(sound.iter().all(|s| s.is_finite() && s.abs() < 1e-2));
    }
}

//! Lines of a spectrum at multiples of the step rate: the hum that grouping samples may leave.

use crate::Result;
use crate::mel::stft::Stft;
use rayon::prelude::*;
use rustfft::num_complex::Complex32;

/// Samples of a frame: bins of 5.4 Hz at 22 050 Hz.
const N_FFT: usize = 4096;
/// Samples from one frame to the next.
const HOP: usize = 2048;
/// Bins on each side that a line spills into.
const LINE: usize = 1;
/// Bins on each side that are left out of the neighbourhood, and where it ends: 110 Hz at 22 050 Hz.
const NEIGHBOURS: std::ops::RangeInclusive<usize> = 4..=20;
/// Added to powers: the noise of rounding to 16 bits has as much in a bin.
const LEAST_POWER: f64 = 1e-7;

/// A line of the spectrum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Where, Hz.
    pub hertz: f64,
    /// How far above its neighbourhood, dB.
    pub level: f64,
}

/// How far the spectrum stands above its neighbourhood at each multiple of `sample_rate / group` below
/// half the sample rate that has neighbours, dB; empty for sounds shorter than 4096 samples.
///
/// The spectrum is the mean over frames of the level in dB, so that a tone counts most where it is
/// heard: in pauses. The neighbourhood is the mean of the bins 4 to 20 away on both sides.
///
/// # Errors
/// Never, for the sizes above.
pub fn lines(samples: &[f32], sample_rate: u32, group: usize) -> Result<Vec<Line>> {
    if samples.len() < N_FFT {
        return Ok(Vec::new());
    }
    let stft = Stft::new(N_FFT, N_FFT, HOP)?;
    // frames that lie inside of the sound
    let frames = 1..=(samples.len() - N_FFT / 2) / HOP;
    let levels: Vec<Vec<f64>> = frames
        .into_par_iter()
        .map_init(
            || (stft.scratch(), vec![Complex32::default(); stft.bins()]),
            |(scratch, bins), frame| {
                stft.analyse(samples, frame, scratch, bins);
                bins.iter().map(|bin| 10.0 * (f64::from(bin.norm_sqr()) + LEAST_POWER).log10()).collect()
            },
        )
        .collect();
    let spectrum: Vec<f64> =
        (0..stft.bins()).map(|bin| levels.iter().map(|frame| frame[bin]).sum::<f64>() / levels.len() as f64).collect();
    let (reach, step) = (*NEIGHBOURS.end(), N_FFT as f64 / group as f64);
    let multiples = (1..).map(|k| f64::from(k) * step).take_while(|&bin| bin.round() as usize + reach < spectrum.len());
    let line = |bin: f64| {
        let at = bin.round() as usize;
        let top = spectrum[at - LINE..=at + LINE].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let around = NEIGHBOURS.flat_map(|d| [spectrum[at - d], spectrum[at + d]]);
        let mean = around.sum::<f64>() / (2 * NEIGHBOURS.count()) as f64;
        Line { hertz: bin * f64::from(sample_rate) / N_FFT as f64, level: top - mean }
    };
    Ok(multiples.filter(|&bin| bin.round() as usize >= reach).map(line).collect())
}

/// The line that stands out most in `ours` against the same line in `reference`, as the difference.
pub fn worst(reference: &[Line], ours: &[Line]) -> Option<Line> {
    let differences = ours.iter().zip(reference).map(|(a, b)| Line { level: a.level - b.level, ..*a });
    differences.max_by(|a, b| a.level.total_cmp(&b.level))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocoder::noise::Noise;

    /// White noise, and on it a tone.
    fn noise_and_tone(hertz: f64, level: f32) -> Vec<f32> {
        let mut sound = vec![0.0; 60_000];
        Noise::new(1).fill(0, &mut sound);
        let tone = |i: usize| (std::f64::consts::TAU * hertz * i as f64 / 22_050.0).sin() as f32;
        sound.iter().enumerate().map(|(i, x)| 0.01 * x + level * tone(i)).collect()
    }

    #[test]
    fn a_planted_tone_is_found_with_its_level() {
        let plain = lines(&noise_and_tone(0.0, 0.0), 22_050, 8).unwrap();
        assert_eq!(plain.iter().map(|line| line.hertz).collect::<Vec<_>>(), [2756.25, 5512.5, 8268.75]);
        assert!(plain.iter().all(|line| line.level.abs() < 3.0), "{plain:?}");
        // a sine has A² N² / 16, noise of deviation A on average A² 3/8 N, of which the mean of the dB
        // lies 2.5 dB below
        let expected = 10.0 * (4096.0f64 / 6.0).log10() + 2.5;
        let hum = lines(&noise_and_tone(5512.5, 0.01), 22_050, 8).unwrap();
        assert!((hum[1].level - expected).abs() < 1.5, "{} of {expected}", hum[1].level);
        let found = worst(&plain, &hum).unwrap();
        assert_eq!((found.hertz, found.level), (5512.5, hum[1].level - plain[1].level));
        let elsewhere = lines(&noise_and_tone(5000.0, 0.01), 22_050, 8).unwrap();
        assert!(worst(&plain, &elsewhere).unwrap().level < 1.5);
    }

    #[test]
    fn short_and_silent_sounds_have_no_or_flat_lines() {
        assert_eq!(lines(&[0.1; 4095], 22_050, 16).unwrap(), []);
        assert_eq!(worst(&[], &[]), None);
        let silence = lines(&[0.0; 8192], 22_050, 16).unwrap();
        assert!(silence.len() == 7 && silence.iter().all(|line| line.level == 0.0));
        assert_eq!(lines(&[0.0; 8192], 22_050, 256).unwrap().len(), 125, "the first is too near to 0");
    }
}

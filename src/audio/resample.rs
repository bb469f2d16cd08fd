//! Changing the sample rate.

use crate::{Error, Result};
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler, WindowFunction};

/// Sample rates between which we convert, Hz.
const RATES: std::ops::RangeInclusive<u32> = 1000..=768_000;
/// Input samples a block takes: the longer, the steeper the filter below the Nyquist frequency.
const CHUNK: usize = 1024;

/// Resamples mono sound by a windowed sinc, without delay: `round(n · to / from)` samples.
///
/// # Errors
/// If a rate isn't within 1 kHz to 768 kHz.
pub fn resample(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>> {
    for rate in [from, to] {
        if !RATES.contains(&rate) {
            return Err(Error::invalid(format!("sample rate is {rate} Hz, expected 1000 to 768000")));
        }
    }
    let wanted = (samples.len() as u64 * u64::from(to) + u64::from(from) / 2) / u64::from(from);
    let wanted = usize::try_from(wanted).map_err(|_| Error::invalid("the resampled sound is too long"))?;
    if from == to || samples.is_empty() {
        return Ok(samples.to_vec());
    }
    let failed = |cause: &dyn std::fmt::Display| Error::invalid(format!("cannot resample {from} to {to} Hz: {cause}"));
    // The delay is half a block of output: an even number of the smallest blocks makes it whole.
    let (mut common, mut rest) = (from as usize, to as usize);
    while rest != 0 {
        (common, rest) = (rest, common % rest);
    }
    let block = 2 * (from as usize / common);
    // The synchronous resampler: both rates are fixed, and its delay is a whole number of samples
    // (the asynchronous one's is not, and places the sound up to a sample off).
    let mut resampler = Fft::<f32>::new_custom(
        from as usize,
        to as usize,
        CHUNK.next_multiple_of(block),
        1,
        1,
        WindowFunction::BlackmanHarris2,
        FixedSync::Input,
    )
    .map_err(|e| failed(&e))?;
    let input = InterleavedSlice::new(samples, 1, samples.len()).map_err(|e| failed(&e))?;
    let mut out = resampler.process_all(&input, samples.len(), None).map_err(|e| failed(&e))?.take_data();
    out.resize(wanted, 0.0);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(hz: f64, rate: u32, len: usize) -> Vec<f32> {
        (0..len).map(|i| (0.5 * (std::f64::consts::TAU * hz * i as f64 / f64::from(rate)).sin()) as f32).collect()
    }

    #[test]
    fn a_sine_keeps_its_frequency_amplitude_and_place() {
        for (from, to) in [(44_100, 22_050), (48_000, 22_050), (16_000, 22_050), (22_050, 48_000), (22_051, 22_050)] {
            let out = resample(&sine(997.0, from, from as usize / 2), from, to).unwrap();
            let expected = sine(997.0, to, out.len());
            assert!((out.len() as f64 - f64::from(to) / 2.0).abs() <= 1.0);
            let edge = 600;
            let worst = (edge..out.len() - edge).map(|i| (out[i] - expected[i]).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-4, "{from} → {to}: {worst}");
        }
    }

    #[test]
    fn what_the_new_rate_cannot_hold_is_removed() {
        let out = resample(&sine(15_000.0, 44_100, 44_100), 44_100, 22_050).unwrap();
        let worst = out[1000..out.len() - 1000].iter().fold(0.0f32, |w, s| w.max(s.abs()));
        assert!(worst < 1e-4, "{worst}");
    }

    #[test]
    fn lengths_are_rounded() {
        for len in [0, 1, 2, 3, 100, 4095, 4096, 4097, 10_001] {
            for (from, to) in [(44_100, 22_050), (16_000, 22_050), (22_050, 22_050), (384_000, 22_050)] {
                let wanted = (len as f64 * f64::from(to) / f64::from(from)).round() as usize;
                assert_eq!(resample(&vec![0.1; len], from, to).unwrap().len(), wanted, "{len} {from} {to}");
            }
        }
    }

    #[test]
    fn absurd_rates_are_errors() {
        assert!(resample(&[0.0], 0, 22_050).is_err());
        assert!(resample(&[0.0], 22_050, u32::MAX).is_err());
    }
}

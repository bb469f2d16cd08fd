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
    let mut stream = ResampleStream::new(from, to)?;
    let mut out = Vec::new();
    stream.push(samples, &mut out)?;
    stream.finish(&mut out)?;
    Ok(out)
}

/// [`resample`] of a sound that comes in pieces: the same samples, whatever the pieces.
pub struct ResampleStream {
    from: u32,
    to: u32,
    /// None where both rates are equal.
    resampler: Option<Fft<f32>>,
    /// Input short of a block.
    pending: Vec<f32>,
    /// Output samples of the resampler's delay that are still to be dropped.
    delay: usize,
    taken: u64,
    given: u64,
}

impl ResampleStream {
    /// Plans for two rates.
    ///
    /// # Errors
    /// If a rate isn't within 1 kHz to 768 kHz.
    pub fn new(from: u32, to: u32) -> Result<Self> {
        for rate in [from, to] {
            if !RATES.contains(&rate) {
                return Err(Error::invalid(format!("sample rate is {rate} Hz, expected 1000 to 768000")));
            }
        }
        let resampler = if from == to { None } else { Some(plan(from, to).map_err(|e| failed(from, to, &e))?) };
        let delay = resampler.as_ref().map_or(0, Resampler::output_delay);
        Ok(Self { from, to, resampler, pending: Vec::new(), delay, taken: 0, given: 0 })
    }

    /// Takes the next samples and appends what is ready to `out`.
    ///
    /// # Errors
    /// If the resampler fails.
    pub fn push(&mut self, samples: &[f32], out: &mut Vec<f32>) -> Result<()> {
        self.taken += samples.len() as u64;
        let Some(resampler) = &self.resampler else {
            self.given += samples.len() as u64;
            out.extend_from_slice(samples);
            return Ok(());
        };
        let block = resampler.input_frames_next();
        self.pending.extend_from_slice(samples);
        let whole = self.pending.len() / block * block;
        let ready: Vec<f32> = self.pending.drain(..whole).collect();
        ready.chunks_exact(block).try_for_each(|block| self.block(block, out))
    }

    /// Ends the sound: appends what is left. The next sound may begin after it.
    ///
    /// # Errors
    /// If the resampler fails.
    pub fn finish(&mut self, out: &mut Vec<f32>) -> Result<()> {
        let wanted = (self.taken * u64::from(self.to) + u64::from(self.from) / 2) / u64::from(self.from);
        let block = self.resampler.as_ref().map_or(0, Resampler::input_frames_next);
        while self.given < wanted {
            let mut last = std::mem::take(&mut self.pending);
            last.resize(block, 0.0);
            self.block(&last, out)?;
        }
        out.truncate(out.len() - (self.given - wanted) as usize);
        if let Some(resampler) = &mut self.resampler {
            resampler.reset();
            self.delay = resampler.output_delay();
        }
        (self.taken, self.given) = (0, 0);
        Ok(())
    }

    fn block(&mut self, block: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let Some(resampler) = &mut self.resampler else { return Ok(()) };
        let failed = |e: &dyn std::fmt::Display| failed(self.from, self.to, e);
        let input = InterleavedSlice::new(block, 1, block.len()).map_err(|e| failed(&e))?;
        let sound = resampler.process(&input, None).map_err(|e| failed(&e))?.take_data();
        let dropped = self.delay.min(sound.len());
        self.delay -= dropped;
        self.given += (sound.len() - dropped) as u64;
        out.extend_from_slice(&sound[dropped..]);
        Ok(())
    }
}

fn failed(from: u32, to: u32, cause: &dyn std::fmt::Display) -> Error {
    Error::invalid(format!("cannot resample {from} to {to} Hz: {cause}"))
}

/// The synchronous resampler: both rates are fixed, and its delay is a whole number of samples (the
/// asynchronous one's is not, and places the sound up to a sample off).
fn plan(from: u32, to: u32) -> Result<Fft<f32>, rubato::ResamplerConstructionError> {
    // The delay is half a block of output: an even number of the smallest blocks makes it whole.
    let (mut common, mut rest) = (from as usize, to as usize);
    while rest != 0 {
        (common, rest) = (rest, common % rest);
    }
    let block = 2 * (from as usize / common);
    let chunk = CHUNK.next_multiple_of(block);
    Fft::<f32>::new_custom(from as usize, to as usize, chunk, 1, 1, WindowFunction::BlackmanHarris2, FixedSync::Input)
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
    fn pieces_give_the_same_samples() {
        for (from, to) in [(22_050, 48_000), (22_050, 44_100), (22_050, 22_050), (48_000, 16_000)] {
            let sound = sine(500.0, from, 9000);
            let whole = resample(&sound, from, to).unwrap();
            let mut stream = ResampleStream::new(from, to).unwrap();
            for piece in [1, 256, 1000, 9000] {
                let mut out = Vec::new();
                sound.chunks(piece).for_each(|piece| stream.push(piece, &mut out).unwrap());
                stream.finish(&mut out).unwrap();
                assert!(out == whole, "{from} → {to}, {piece} at a time");
            }
        }
    }

    #[test]
    fn absurd_rates_are_errors() {
        assert!(resample(&[0.0], 0, 22_050).is_err());
        assert!(resample(&[0.0], 22_050, u32::MAX).is_err());
    }
}

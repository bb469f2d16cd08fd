//! The short-time Fourier transform and its inverse, centred with reflected edges.

use super::MelConfig;
use crate::{Error, Result};
use rayon::prelude::*;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use rustfft::num_complex::Complex32;
use std::sync::Arc;

/// Output frames that one task of [`Stft::inverse`] adds up.
const HOPS_PER_TASK: usize = 64;

/// A plan: window and transforms of one size. Cheap to share, holds no state.
///
/// Frame `f` is centred on sample `f · hop_length`; the sound is reflected at both ends (as often as
/// a short sound needs, like `numpy.pad`). The window is a periodic Hann of `win_length`, in the
/// middle of `n_fft` samples.
#[derive(Clone)]
pub struct Stft {
    n_fft: usize,
    hop_length: usize,
    window: Vec<f32>,
    fft: Arc<dyn RealToComplex<f32>>,
    ifft: Arc<dyn ComplexToReal<f32>>,
}

/// Complex spectra, frame-major `[frames, bins]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectra {
    /// All values, frame after frame.
    pub values: Vec<Complex32>,
    /// Bins per frame, `n_fft / 2 + 1`.
    pub bins: usize,
}

impl Spectra {
    /// Number of frames.
    pub fn frames(&self) -> usize {
        self.values.len() / self.bins
    }

    /// The bins of one frame.
    pub fn frame(&self, frame: usize) -> &[Complex32] {
        &self.values[frame * self.bins..][..self.bins]
    }
}

/// Buffers for one frame, one set a thread.
pub struct Scratch {
    time: Vec<f32>,
    bins: Vec<Complex32>,
    fft: Vec<Complex32>,
}

impl Stft {
    /// Plans for a size.
    ///
    /// # Errors
    /// If `n_fft` is odd or zero, or not `0 < hop_length ≤ win_length ≤ n_fft`.
    pub fn new(n_fft: usize, win_length: usize, hop_length: usize) -> Result<Self> {
        if n_fft == 0 || n_fft % 2 == 1 || hop_length == 0 || hop_length > win_length || win_length > n_fft {
            return Err(Error::invalid(format!(
                "stft: n_fft {n_fft}, win_length {win_length}, hop_length {hop_length}; \
                 expected an even n_fft and 0 < hop ≤ win ≤ n_fft"
            )));
        }
        let before = (n_fft - win_length) / 2;
        let window = (0..n_fft)
            .map(|i| match i.checked_sub(before) {
                Some(j) if j < win_length => {
                    let phase = std::f64::consts::TAU * j as f64 / win_length as f64;
                    (0.5 - 0.5 * phase.cos()) as f32
                }
                _ => 0.0,
            })
            .collect();
        let mut planner = RealFftPlanner::new();
        let (fft, ifft) = (planner.plan_fft_forward(n_fft), planner.plan_fft_inverse(n_fft));
        Ok(Self { n_fft, hop_length, window, fft, ifft })
    }

    /// The plan of a mel convention.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(config: &MelConfig) -> Result<Self> {
        Self::new(config.n_fft, config.win_length, config.hop_length)
    }

    /// FFT size, samples.
    pub fn n_fft(&self) -> usize {
        self.n_fft
    }

    /// Samples from one frame to the next.
    pub fn hop_length(&self) -> usize {
        self.hop_length
    }

    /// Bins per frame, `n_fft / 2 + 1`.
    pub fn bins(&self) -> usize {
        self.n_fft / 2 + 1
    }

    /// The window over `n_fft` samples.
    pub fn window(&self) -> &[f32] {
        &self.window
    }

    /// Frames of a sound: `1 + ⌊samples / hop_length⌋`.
    pub fn frames(&self, samples: usize) -> usize {
        1 + samples / self.hop_length
    }

    /// Buffers for [`analyse`](Self::analyse) and [`synthesise`](Self::synthesise).
    pub fn scratch(&self) -> Scratch {
        let fft = self.fft.get_scratch_len().max(self.ifft.get_scratch_len());
        Scratch {
            time: vec![0.0; self.n_fft],
            bins: vec![Complex32::default(); self.bins()],
            fft: vec![Complex32::default(); fft],
        }
    }

    /// The spectrum of one frame of a sound that is not empty; `out` holds `bins` values.
    ///
    /// # Panics
    /// If `samples` is empty or `out` has another length.
    pub fn analyse(&self, samples: &[f32], frame: usize, scratch: &mut Scratch, out: &mut [Complex32]) {
        self.analyse_from(samples, self.start(frame), scratch, out);
    }

    /// The spectrum of the `n_fft` samples from `start` on, which may lie outside of the sound.
    ///
    /// # Panics
    /// As [`analyse`](Self::analyse).
    pub fn analyse_from(&self, samples: &[f32], start: isize, scratch: &mut Scratch, out: &mut [Complex32]) {
        self.analyse_at((samples, 0), samples.len(), start, scratch, out);
    }

    /// The `n_fft` samples of one frame times the window, of a piece of the sound, which begins with
    /// sample `piece.1` and holds all that the frame sees; the whole sound has `len` samples.
    ///
    /// # Panics
    /// If `len` is 0 or `out` has another length.
    pub fn windowed(&self, piece: (&[f32], usize), len: usize, frame: usize, out: &mut [f32]) {
        self.windowed_at(piece, len, self.start(frame), out);
    }

    /// Where a frame's samples begin.
    fn start(&self, frame: usize) -> isize {
        (frame * self.hop_length) as isize - (self.n_fft / 2) as isize
    }

    fn windowed_at(&self, (samples, first): (&[f32], usize), len: usize, start: isize, out: &mut [f32]) {
        assert_eq!(out.len(), self.n_fft);
        // where the window meets samples of the piece as they stand
        let place = |at: usize| (at as isize - start).clamp(0, self.n_fft as isize) as usize;
        let inside = place(first)..place((first + samples.len()).min(len)).max(place(first));
        for i in (0..inside.start).chain(inside.end..self.n_fft) {
            // a piece may lack the one sample that the window's leading zero would meet
            let sample = reflect(start + i as isize, len).checked_sub(first).and_then(|at| samples.get(at));
            out[i] = sample.copied().unwrap_or_default() * self.window[i];
        }
        if !inside.is_empty() {
            let samples = &samples[(start + inside.start as isize) as usize - first..];
            for ((out, s), w) in out[inside.clone()].iter_mut().zip(samples).zip(&self.window[inside]) {
                *out = s * w;
            }
        }
    }

    fn analyse_at(
        &self,
        piece: (&[f32], usize),
        len: usize,
        start: isize,
        scratch: &mut Scratch,
        out: &mut [Complex32],
    ) {
        self.windowed_at(piece, len, start, &mut scratch.time);
        self.fft
            .process_with_scratch(&mut scratch.time, out, &mut scratch.fft)
            .expect("buffers have the plan's lengths");
    }

    /// The windowed samples of one frame, `n_fft` values starting `n_fft / 2` before its centre.
    ///
    /// The imaginary parts of the first and last bin are ignored.
    ///
    /// # Panics
    /// If `bins` has another length than the plan.
    pub fn synthesise<'a>(&self, bins: &[Complex32], scratch: &'a mut Scratch) -> &'a [f32] {
        scratch.bins.copy_from_slice(bins);
        scratch.bins[0].im = 0.0;
        scratch.bins[self.n_fft / 2].im = 0.0;
        self.ifft
            .process_with_scratch(&mut scratch.bins, &mut scratch.time, &mut scratch.fft)
            .expect("buffers have the plan's lengths");
        let scale = 1.0 / self.n_fft as f32;
        for (t, w) in scratch.time.iter_mut().zip(&self.window) {
            *t *= w * scale;
        }
        &scratch.time
    }

    /// The spectra of a sound, [`frames`](Self::frames) of them, on all threads.
    ///
    /// # Errors
    /// If there are no samples.
    pub fn forward(&self, samples: &[f32]) -> Result<Spectra> {
        if samples.is_empty() {
            return Err(Error::invalid("the sound is empty"));
        }
        let bins = self.bins();
        let mut values = vec![Complex32::default(); self.frames(samples.len()) * bins];
        values
            .par_chunks_mut(bins)
            .enumerate()
            .for_each_init(|| self.scratch(), |scratch, (frame, out)| self.analyse(samples, frame, scratch, out));
        Ok(Spectra { values, bins })
    }

    /// The sound of `samples` samples whose spectra are nearest to the given ones: overlapped frames
    /// divided by the sum of squared windows (Griffin & Lim 1984); zero where no frame reaches.
    ///
    /// The result doesn't depend on the number of threads.
    ///
    /// # Errors
    /// If the spectra have another number of bins than the plan.
    pub fn inverse(&self, spectra: &Spectra, samples: usize) -> Result<Vec<f32>> {
        if spectra.bins != self.bins() {
            return Err(Error::invalid(format!("spectra have {} bins, expected {}", spectra.bins, self.bins())));
        }
        let mut out = vec![0.0; samples];
        let task = HOPS_PER_TASK * self.hop_length;
        out.par_chunks_mut(task).enumerate().for_each_init(
            || (self.scratch(), vec![0.0; task]),
            |(scratch, weight), (i, out)| self.overlap_add(spectra, i * task, out, weight, scratch),
        );
        Ok(out)
    }

    /// Adds up all frames that touch `out`, which starts at sample `start`.
    fn overlap_add(&self, spectra: &Spectra, start: usize, out: &mut [f32], weight: &mut [f32], scratch: &mut Scratch) {
        let half = self.n_fft / 2;
        weight.fill(0.0);
        let first = start.saturating_sub(half) / self.hop_length;
        let end = ((start + out.len() + half) / self.hop_length + 1).min(spectra.frames());
        for frame in first..end {
            // Sample `start + i` of the sound is sample `start + i + half - frame · hop` of the frame.
            let offset = (start + half) as isize - (frame * self.hop_length) as isize;
            let from = (-offset).max(0) as usize;
            let until = (self.n_fft as isize - offset).clamp(0, out.len() as isize) as usize;
            if from >= until {
                continue;
            }
            let at = (from as isize + offset) as usize;
            let windowed = &self.synthesise(spectra.frame(frame), scratch)[at..];
            let parts = out[from..until].iter_mut().zip(&mut weight[from..until]);
            for ((o, weight), (s, w)) in parts.zip(windowed.iter().zip(&self.window[at..])) {
                *o += s;
                *weight += w * w;
            }
        }
        for (o, &weight) in out.iter_mut().zip(weight.iter()) {
            if weight > f32::MIN_POSITIVE {
                *o /= weight;
            }
        }
    }
}

/// The index within `0..len` that a mirror at the first and last sample shows at `index`.
fn reflect(index: isize, len: usize) -> usize {
    if len == 1 {
        return 0;
    }
    let period = 2 * (len - 1);
    let within = index.rem_euclid(period as isize) as usize;
    within.min(period - within)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        let mut state = 1u32;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn reflects_like_numpy() {
        let got: Vec<usize> = (-5..8).map(|i| reflect(i, 3)).collect();
        // -5 … 7 of the sound 0 1 2
        assert_eq!(got, [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]);
        assert_eq!(reflect(-7, 1), 0);
    }

    #[test]
    fn inverse_undoes_forward() {
        for (n_fft, win, hop, len) in
            [(1024, 1024, 256, 41_885), (64, 48, 16, 1000), (64, 64, 16, 5), (16, 16, 4, 1), (1024, 800, 200, 30_000)]
        {
            let stft = Stft::new(n_fft, win, hop).unwrap();
            let sound = noise(len);
            let back = stft.inverse(&stft.forward(&sound).unwrap(), len).unwrap();
            let worst = sound.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{n_fft} {win} {hop} {len}: {worst}");
        }
    }

    #[test]
    fn a_cosine_peaks_in_its_bin() {
        let stft = Stft::new(64, 64, 16).unwrap();
        let sound: Vec<f32> = (0..640).map(|i| (std::f32::consts::TAU * 5.0 * i as f32 / 64.0).cos()).collect();
        let spectra = stft.forward(&sound).unwrap();
        assert_eq!(spectra.frames(), 41);
        let frame = spectra.frame(20);
        // A periodic Hann window sums to n_fft / 2, of which a cosine keeps half.
        assert!((frame[5].norm() - 16.0).abs() < 1e-4);
        assert!(frame[8].norm() < 1e-4);
    }

    #[test]
    fn bad_sizes_are_errors() {
        for (n_fft, win, hop) in [(0, 0, 0), (15, 15, 4), (16, 17, 4), (16, 16, 0), (16, 8, 9)] {
            assert!(Stft::new(n_fft, win, hop).is_err());
        }
        assert!(Stft::new(16, 16, 4).unwrap().forward(&[]).is_err());
    }
}

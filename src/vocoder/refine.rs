//! Mel-consistency refinement: bends a sound until its mel is the one that was asked for.

use crate::kernels::real::{Lines, Spectrum, Twiddles, log_ratios, sharpen};
use crate::kernels::rows::Rows;
use crate::mel::filterbank::{MelBands, band_centres};
use crate::mel::stft::Stft;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::{Error, Result};
use rayon::prelude::*;
use rustfft::num_complex::Complex32;
use rustfft::{Fft, FftPlanner};
use std::ops::Range;
use std::sync::Arc;

/// The part of the last change that is added on top of each pass's result.
///
/// .97 was no better, and stronger corrections nearly diverge (measured on eight LJSpeech clips).
pub(super) const MOMENTUM: f32 = 0.9;
/// Bound of a pass's correction in a band, nats.
const MAX_CORRECTION: f32 = 4.0;
/// How far above the top of the highest band the correction has faded to nothing, Hz.
///
/// From that band's centre on: held at full strength to 200 Hz above the top instead, it made 7.9 to 8.1 kHz
/// 1.2 dB too loud beside what lies above (six LJSpeech clips); faded, 0.2 dB.
const ABOVE_TOP: f64 = 100.0;
/// Sharpening: in the first passes each bin above `SHARP_FROM` Hz, as far as there are bands, takes the power
/// `SHARPNESS` of its ratio to the mean of those up to `SHARP_RADIUS` Hz away, and the bands are then brought to
/// the mel. What the passes converge to is flatter within a band than speech, and the more so the higher it is.
const SHARPNESS: f32 = 0.025;
const SHARP_FROM: f64 = 1500.0;
const SHARP_RADIUS: f64 = 172.0;
/// The last hop's far end sees little of the last window: no more than this may be divided away.
pub(super) const MIN_WEIGHT: f32 = 1e-2;
/// A sound's length where its end isn't known, or doesn't matter.
pub(super) const ENDLESS: usize = isize::MAX as usize / 4;
/// Output frames of one parallel task; the frames that reach over its edges are worked out twice.
const FRAMES_PER_TASK: usize = 64;

/// Makes sounds agree with mels of one convention.
///
/// A pass takes the sound's short-time spectra, multiplies each bin by the ratio of the wanted to
/// the present mel there, and returns to samples by overlap-add; the first passes sharpen a little what
/// stands out within a band. With momentum, 30 passes bring the mean log-mel distance below .05 nats.
/// Deterministic, whatever the number of threads. No part of the flow or its likelihood.
pub struct Refiner {
    pub(super) stft: Stft,
    /// Of frames as half as many complex values.
    fft: Arc<dyn Fft<f32>>,
    ifft: Arc<dyn Fft<f32>>,
    twiddles: Twiddles,
    /// The window, divided by what the transforms multiply.
    synthesis_window: Vec<f32>,
    /// The sum of squared windows over the samples of a hop that all its frames reach, and how many these are.
    inside: (Vec<f32>, usize),
    bands: MelBands,
    lines: Lines,
    /// The bins that are sharpened, and how many on either side they are compared with.
    sharp: (Range<usize>, usize),
    floor: f32,
}

/// Buffers of one thread.
pub(super) struct Buffers {
    time: Vec<f32>,
    transform: Vec<Complex32>,
    scratch: Vec<Complex32>,
    spectrum: Spectrum,
    correction: Vec<f32>,
    /// Of all bins; 1 where nothing is corrected.
    gains: Vec<f32>,
    /// Of the bins that are sharpened.
    factors: Vec<f32>,
    sums: Vec<f64>,
}

/// Whether a pass sharpens: the first ones, at most half of all, so that the mel has the last word.
pub(super) fn sharpens(pass: usize, passes: usize) -> bool {
    pass < (passes / 2).min(4)
}

/// Puts frames, one after the other, to the rows of `target`, and behind each 1 or, if it isn't to be refined, 0.
pub(super) fn aim((frames, trusted): (&[f32], &[bool]), target: &mut Rows) {
    if trusted.is_empty() {
        return;
    }
    for (frame, trusted) in frames.chunks_exact(frames.len() / trusted.len()).zip(trusted) {
        let (row, flag) = target.grow(1).split_at_mut(frame.len());
        row.copy_from_slice(frame);
        flag[0] = f32::from(*trusted);
    }
}

/// The mel of a row from [`aim`], if it is to be refined.
pub(super) fn trusted(row: &[f32]) -> Option<&[f32]> {
    let (mel, trusted) = row.split_at(row.len() - 1);
    (trusted[0] != 0.0).then_some(mel)
}

impl Refiner {
    /// Plans for a convention.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn new(config: &MelConfig) -> Result<Self> {
        config.validate()?;
        let stft = Stft::of(config)?;
        let hz_per_bin = f64::from(config.sample_rate) / config.n_fft as f64;
        let centres = band_centres(config);
        let between: Vec<_> = (0..stft.bins())
            .map(|bin| bin as f64 * hz_per_bin)
            .take_while(|&hz| hz <= config.f_max + ABOVE_TOP)
            .map(|hz| {
                let above = centres.partition_point(|&centre| centre <= hz);
                // held below the first centre; above the last is nothing to correct by
                let Some(band) = above.checked_sub(1) else { return (0, 0.0) };
                let next = centres.get(above).copied().unwrap_or(config.f_max + ABOVE_TOP);
                (band, ((hz - centres[band]) / (next - centres[band])) as f32)
            })
            .collect();
        let mut planner = FftPlanner::new();
        let (n_fft, hop) = (stft.n_fft(), stft.hop_length());
        let mut refiner = Self {
            fft: planner.plan_fft_forward(n_fft / 2),
            ifft: planner.plan_fft_inverse(n_fft / 2),
            twiddles: Twiddles::new(n_fft),
            synthesis_window: stft.window().iter().map(|w| w / n_fft as f32).collect(),
            inside: (vec![0.0; hop], 0),
            bands: MelBands::new(config),
            lines: Lines::new(&between, config.n_mels),
            sharp: (
                ((SHARP_FROM / hz_per_bin).ceil() as usize).min(between.len())..between.len(),
                (SHARP_RADIUS / hz_per_bin).round() as usize,
            ),
            floor: (config.floor as f32).max(f32::MIN_POSITIVE),
            stft,
        };
        // far enough from the beginning
        let start = n_fft.div_ceil(hop) * hop;
        let frames = refiner.frames_over(start..start + hop);
        refiner.inside = (refiner.weights(start..start + hop, frames.clone()), frames.len());
        Ok(refiner)
    }

    /// The frames that reach samples of a range, however many frames there are.
    pub(super) fn frames_over(&self, samples: Range<usize>) -> Range<usize> {
        let (hop, half) = (self.stft.hop_length(), self.stft.n_fft() / 2);
        (samples.start + 1).saturating_sub(half).div_ceil(hop)..(samples.end + half - 1) / hop + 1
    }

    /// The sum of the squared windows of these frames over a range of samples.
    pub(super) fn weights(&self, samples: Range<usize>, frames: Range<usize>) -> Vec<f32> {
        let mut weights = vec![0.0; samples.len()];
        frames.for_each(|frame| {
            self.overlap(samples.start, frame, self.stft.window(), &mut weights, |weight, w| *weight += w * w)
        });
        weights
    }

    /// Does something with the values of a frame, `n_fft` of them, and those of `out`, of samples from
    /// `start` on, that lie where they do.
    pub(super) fn overlap(
        &self,
        start: usize,
        frame: usize,
        values: &[f32],
        out: &mut [f32],
        f: impl Fn(&mut f32, f32),
    ) {
        // sample `start + i` of the sound is sample `start + i + half − frame · hop` of the frame
        let (ours, theirs) = (start + self.stft.n_fft() / 2, frame * self.stft.hop_length());
        let (to, from) = (theirs.saturating_sub(ours), ours.saturating_sub(theirs));
        out.iter_mut().skip(to).zip(values.iter().skip(from)).for_each(|(out, value)| f(out, *value));
    }

    /// Frames on either side of a sample that so many passes of refinement carry into it.
    pub fn reach(&self, passes: usize) -> usize {
        // a frame hears half a window on either side of its centre, and sounds as far
        passes * self.stft.n_fft().div_ceil(self.stft.hop_length())
    }

    /// Refines `samples` (`frames · hop_length` of them) towards `mel` in `passes` passes.
    ///
    /// What comes back is the last pass's own result, without momentum on top: nearer to the mel
    /// after few passes (mean log-mel distance .105 against .109 after 10 from white noise, six
    /// LJSpeech clips), equal from 30 on (.047).
    ///
    /// `progress` is called after each pass with the part of the work done.
    ///
    /// # Errors
    /// If the number of samples or bands doesn't fit.
    pub fn refine(
        &self,
        samples: Vec<f32>,
        mel: &MelSpectrogram,
        passes: usize,
        progress: &dyn Fn(f32),
    ) -> Result<Vec<f32>> {
        self.refine_trusted(samples, mel, &vec![true; mel.frames()], passes, progress)
    }

    /// [`refine`](Self::refine) of the frames that are trusted; the others stay as they are.
    pub(super) fn refine_trusted(
        &self,
        mut samples: Vec<f32>,
        mel: &MelSpectrogram,
        trusted: &[bool],
        passes: usize,
        progress: &dyn Fn(f32),
    ) -> Result<Vec<f32>> {
        assert_eq!(trusted.len(), mel.frames());
        let hop = self.stft.hop_length();
        if mel.n_mels() != self.bands.n_mels() || samples.len() != mel.frames() * hop {
            return Err(Error::invalid(format!(
                "{} samples and {} bands, expected {} and {}",
                samples.len(),
                mel.n_mels(),
                mel.frames() * hop,
                self.bands.n_mels()
            )));
        }
        if passes == 0 {
            return Ok(samples);
        }
        let target = mel.transposed();
        let mut before = Vec::new();
        let mut result = vec![0.0; samples.len()];
        for pass in 0..passes {
            self.pass(&samples, (target.values(), trusted), sharpens(pass, passes), &mut result);
            if pass + 1 == passes {
                break;
            }
            if pass == 0 {
                samples.copy_from_slice(&result);
                before = result.clone();
            } else {
                let old = samples.par_iter_mut().zip(&result).zip(&mut before);
                old.for_each(|((y, q), before)| {
                    *y = q + MOMENTUM * (q - *before);
                    *before = *q;
                });
            }
            progress((pass + 1) as f32 / passes as f32);
        }
        progress(1.0);
        Ok(result)
    }

    /// One pass from `samples` to `out`; the target is frame-major, with whether each frame is trusted.
    fn pass(&self, samples: &[f32], target: (&[f32], &[bool]), sharp: bool, out: &mut [f32]) {
        let task = FRAMES_PER_TASK * self.stft.hop_length();
        out.par_chunks_mut(task).enumerate().for_each_init(
            || self.buffers(),
            |buffers, (i, out)| self.task(samples, (target, sharp), i * task, out, buffers),
        );
    }

    pub(super) fn buffers(&self) -> Buffers {
        let (n_fft, none) = (self.stft.n_fft(), Complex32::default());
        let scratch = self.fft.get_inplace_scratch_len().max(self.ifft.get_inplace_scratch_len());
        Buffers {
            time: vec![0.0; n_fft],
            transform: vec![none; n_fft / 2],
            scratch: vec![none; scratch],
            spectrum: self.twiddles.spectrum(),
            correction: vec![0.0; self.bands.n_mels()],
            gains: vec![1.0; self.stft.bins()],
            factors: vec![1.0; self.sharp.0.len()],
            sums: Vec::new(),
        }
    }

    /// The samples from `start` for as long as `out` is: all corrected frames that touch them.
    fn task(
        &self,
        samples: &[f32],
        ((target, trusted), sharp): ((&[f32], &[bool]), bool),
        start: usize,
        out: &mut [f32],
        buffers: &mut Buffers,
    ) {
        let (hop, n_mels) = (self.stft.hop_length(), self.bands.n_mels());
        let all = target.len() / n_mels;
        let over = |samples: Range<usize>| {
            let frames = self.frames_over(samples);
            frames.start..frames.end.min(all)
        };
        out.fill(0.0);
        for frame in over(start..start + out.len()) {
            let target = trusted[frame].then(|| &target[frame * n_mels..][..n_mels]);
            let corrected = self.correct((samples, 0), samples.len(), frame, (target, sharp), buffers);
            self.overlap(start, frame, corrected, out, |out, s| *out += s);
        }
        for (start, out) in (start..).step_by(hop).zip(out.chunks_mut(hop)) {
            let (samples, frames) = (start..start + hop, over(start..start + hop));
            let (inside, most) = &self.inside;
            let edge = (frames.len() < *most).then(|| self.weights(samples, frames));
            let weights = edge.as_ref().unwrap_or(inside);
            out.iter_mut().zip(weights).for_each(|(out, weight)| *out /= weight.max(MIN_WEIGHT));
        }
    }

    /// One frame's samples times the window, corrected and times the window once more, `n_fft` of them; the
    /// sound as for [`Stft::windowed`], its mel to be `target`, sharpened on the way or not; without a target as it is.
    pub(super) fn correct<'a>(
        &self,
        piece: (&[f32], usize),
        len: usize,
        frame: usize,
        (target, sharp): (Option<&[f32]>, bool),
        buffers: &'a mut Buffers,
    ) -> &'a [f32] {
        let Buffers { time, transform, scratch, spectrum, correction, gains, factors, sums } = buffers;
        self.stft.windowed(piece, len, frame, time);
        let Some(target) = target else {
            time.iter_mut().zip(self.stft.window()).for_each(|(t, w)| *t *= w);
            return time;
        };
        for (z, t) in transform.iter_mut().zip(time.chunks_exact(2)) {
            *z = Complex32::new(t[0], t[1]);
        }
        self.fft.process_with_scratch(transform, scratch);
        self.twiddles.split(transform, spectrum);
        let (bins, radius) = &self.sharp;
        if sharp {
            sharpen(&mut spectrum.magnitudes[bins.clone()], factors, sums, *radius, SHARPNESS);
        }
        self.bands.apply(&spectrum.magnitudes, correction);
        log_ratios(target, correction, self.floor, MAX_CORRECTION);
        self.lines.exp(correction, gains);
        if sharp {
            gains[bins.clone()].iter_mut().zip(factors).for_each(|(gain, factor)| *gain *= *factor);
        }
        self.twiddles.join(spectrum, gains, transform);
        self.ifft.process_with_scratch(transform, scratch);
        let windowed = transform.iter().zip(self.synthesis_window.chunks_exact(2));
        for (t, (z, w)) in time.chunks_exact_mut(2).zip(windowed) {
            (t[0], t[1]) = (z.re * w[0], z.im * w[1]);
        }
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocoder::noise::Noise;
    use crate::vocoder::refine_live::LiveRefinement;

    /// The log-mel of `frames` frames of a sound, frame-major, worked out plainly.
    fn log_mel(refiner: &Refiner, samples: &[f32], frames: usize) -> Vec<f32> {
        let (stft, bands) = (&refiner.stft, &refiner.bands);
        let mut scratch = stft.scratch();
        let mut bins = vec![Complex32::default(); stft.bins()];
        let mut out = vec![0.0; frames * bands.n_mels()];
        for (f, row) in out.chunks_mut(bands.n_mels()).enumerate() {
            stft.analyse(samples, f, &mut scratch, &mut bins);
            let magnitudes: Vec<f32> = bins.iter().map(|b| b.norm()).collect();
            bands.apply(&magnitudes, row);
            row.iter_mut().for_each(|v| *v = v.max(refiner.floor).ln());
        }
        out
    }

    /// A buzz whose pitch glides, and its mel.
    fn buzz(refiner: &Refiner, frames: usize) -> (Vec<f32>, MelSpectrogram) {
        let mut phase = 0.0f32;
        let samples: Vec<f32> = (0..frames * refiner.stft.hop_length())
            .map(|i| {
                phase = (phase + (110.0 + 20.0 * (i as f32 * 2e-4).sin()) / 22_050.0).fract();
                0.3 * (phase - 0.5) * (1.0 + (i as f32 * 7e-4).sin())
            })
            .collect();
        let rows = log_mel(refiner, &samples, frames);
        let n_mels = refiner.bands.n_mels();
        let mel = MelSpectrogram::new(rows, frames).unwrap().transposed();
        assert_eq!((mel.n_mels(), mel.frames()), (n_mels, frames));
        (samples, mel)
    }

    fn distance(refiner: &Refiner, samples: &[f32], mel: &MelSpectrogram) -> f32 {
        let found = log_mel(refiner, samples, mel.frames());
        let wanted = mel.transposed();
        let sum: f32 = found.iter().zip(wanted.values()).map(|(a, b)| (a - b).abs()).sum();
        sum / found.len() as f32
    }

    #[test]
    fn a_sound_that_agrees_with_its_mel_stays() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        let (samples, mel) = buzz(&refiner, 100);
        let refined = refiner.refine(samples.clone(), &mel, 1, &|_| ()).unwrap();
        let inside = ..samples.len() - 256;
        for (a, b) in samples[inside].iter().zip(&refined[inside]) {
            assert!((a - b).abs() < 1e-4, "{a} became {b}");
        }
    }

    #[test]
    fn at_most_half_the_passes_sharpen_and_never_the_last() {
        let count = |passes| (0..passes).filter(|&pass| sharpens(pass, passes)).count();
        assert_eq!([0, 1, 2, 3, 5, 8, 30, 1000].map(count), [0, 0, 1, 1, 2, 4, 4, 4]);
        for passes in 1..40 {
            assert!(!sharpens(passes - 1, passes));
        }
    }

    #[test]
    fn sharpened_bins_stand_out_and_the_mel_stays() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        let mut noise = vec![0.0; 40 * 256];
        Noise::new(3).fill(0, &mut noise);
        let frame = 20;
        let mel = log_mel(&refiner, &noise, 40);
        let target = &mel[frame * 80..][..80];
        let mut buffers = refiner.buffers();
        let mut spread = |sharp| {
            refiner.correct((&noise, 0), noise.len(), frame, (Some(target), sharp), &mut buffers);
            // the bins as they are after the pass, before the window
            let mut bins: Vec<f32> = buffers.gains.clone();
            refiner.correct((&noise, 0), noise.len(), frame, (Some(target), false), &mut buffers);
            bins.iter_mut().zip(&buffers.spectrum.magnitudes).for_each(|(gain, magnitude)| *gain *= magnitude);
            let mut bands = vec![0.0; 80];
            refiner.bands.apply(&bins, &mut bands);
            let off = bands.iter().zip(target).map(|(band, wanted)| (band.ln() - wanted).abs()).fold(0.0, f32::max);
            let logs: Vec<f32> = bins[refiner.sharp.0.clone()].iter().map(|m| m.ln()).collect();
            let mean = logs.iter().sum::<f32>() / logs.len() as f32;
            (logs.iter().map(|l| (l - mean).powi(2)).sum::<f32>() / logs.len() as f32, off)
        };
        let ((plain, _), (sharp, off)) = (spread(false), spread(true));
        let grown = (1.0 + SHARPNESS).powi(2);
        assert!((sharp / plain - grown).abs() < 0.3 * (grown - 1.0), "{} {grown}", sharp / plain);
        assert!(off < 0.01, "{off}");
    }

    #[test]
    fn passes_bring_noise_to_the_mel() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        let (_, mel) = buzz(&refiner, 150);
        let mut noise = vec![0.0; 150 * 256];
        Noise::new(1).fill(0, &mut noise);
        noise.iter_mut().for_each(|v| *v *= 0.1);
        let mut last = distance(&refiner, &noise, &mel);
        for passes in [1, 3, 10, 30] {
            let refined = refiner.refine(noise.clone(), &mel, passes, &|_| ()).unwrap();
            let now = distance(&refiner, &refined, &mel);
            assert!(now < last, "{passes} passes: {now}, before {last}");
            last = now;
        }
        assert!(last < 0.1, "{last}");
    }

    #[test]
    fn hop_after_hop_brings_noise_to_the_mel_too() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        let (_, mel) = buzz(&refiner, 150);
        let mut noise = vec![0.0; 150 * 256];
        Noise::new(1).fill(0, &mut noise);
        noise.iter_mut().for_each(|v| *v *= 0.1);
        // more passes and more look-ahead come nearer
        let mut last = distance(&refiner, &noise, &mel);
        for (passes, ahead) in [(1, 0), (1, 1), (4, 1), (8, 2), (16, 2)] {
            let mut live = LiveRefinement::new(&refiner, mel.n_mels(), passes, ahead);
            let mut refined = Vec::new();
            live.aim(mel.transposed().values(), &vec![true; mel.frames()]);
            live.push(&refiner, &noise, true, &mut refined);
            assert_eq!(refined.len(), noise.len());
            let now = distance(&refiner, &refined, &mel);
            assert!(now < last, "{passes} passes, {ahead} frames ahead: {now}, before {last}");
            last = now;
        }
        assert!(last < 0.2, "{last}");
    }

    /// Where one hop was fixed and the next begins, the sound is as smooth as elsewhere.
    #[test]
    fn hops_made_one_after_the_other_join() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        let (sound, mel) = buzz(&refiner, 200);
        let mut noise = vec![0.0; sound.len()];
        Noise::new(3).fill(0, &mut noise);
        noise.iter_mut().for_each(|v| *v *= 0.05);
        let mut live = LiveRefinement::new(&refiner, mel.n_mels(), 8, 2);
        let mut refined = Vec::new();
        live.aim(mel.transposed().values(), &vec![true; mel.frames()]);
        live.push(&refiner, &noise, true, &mut refined);
        let bend = |n: usize| (refined[n + 1] - 2.0 * refined[n] + refined[n - 1]).powi(2);
        let mean = |places: &[usize]| places.iter().map(|&n| bend(n)).sum::<f32>() / places.len() as f32;
        // the last three samples of each hop, and the first of the next
        let (joints, rest): (Vec<usize>, Vec<usize>) = (1..refined.len() - 1).partition(|n| (n + 3) % 256 < 4);
        let ratio = mean(&joints) / mean(&rest);
        assert!(ratio < 1.2, "{ratio}");
    }

    #[test]
    fn threads_and_short_sounds() {
        let refiner = Refiner::new(&MelConfig::nvidia()).unwrap();
        for frames in [1, 2, 3, 65, 130] {
            let (_, mel) = buzz(&refiner, frames);
            let mut noise = vec![0.0; frames * 256];
            Noise::new(2).fill(0, &mut noise);
            let results: Vec<_> = [1, 3]
                .map(|threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| refiner.refine(noise.clone(), &mel, 3, &|_| ()).unwrap())
                })
                .into();
            assert_eq!(results[0], results[1]);
            assert!(results[0].iter().all(|v| v.is_finite() && v.abs() < 10.0), "{frames} frames");
        }
    }
}

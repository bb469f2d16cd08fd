//! Refinement of a sound as it is made: each pass follows the one before as closely as its frames
//! allow, so that what comes out is what [`Refiner::refine`] makes of the whole sound, bit for bit.

use super::refine::{self, Buffers, ENDLESS, MIN_WEIGHT, MOMENTUM, Refiner, sharpens, trusted};
use crate::kernels::rows::Rows;

/// All passes at work on one stream.
pub struct RefineStream {
    /// Mel frames that a pass still wants, and behind the bands of each whether it is trusted.
    target: Rows,
    passes: Vec<Pass>,
    buffers: Buffers,
}

/// One pass: what it hears, and what it has not finished.
struct Pass {
    /// The next frame to correct.
    frame: usize,
    input: Rows,
    /// The result of the pass before, as far as this pass's own has not caught up with it.
    before: Rows,
    /// Overlapped frames, and the sum of their squared windows.
    sum: Rows,
    weight: Rows,
}

impl Refiner {
    /// Frames after a frame that its refined sound depends on.
    pub fn lookahead(&self, passes: usize) -> usize {
        let (hop, half) = (self.stft.hop_length(), self.stft.n_fft() / 2);
        // followed from far out: what is known becomes what is finished, pass by pass
        let frames = 8 * (passes + 1) * half.div_ceil(hop);
        let known = (0..passes).fold(frames * hop, |known, _| finished(known, hop, half));
        frames - known / hop
    }
}

/// Samples that are finished when `known` are known and more may come.
fn finished(known: usize, hop: usize, half: usize) -> usize {
    match known.checked_sub(half) {
        Some(room) => ((room / hop + 1) * hop).saturating_sub(half),
        None => 0,
    }
}

impl RefineStream {
    /// Before the first sample.
    pub fn new(refiner: &Refiner, n_mels: usize, passes: usize) -> Self {
        let new =
            || Pass { frame: 0, input: Rows::new(1), before: Rows::new(1), sum: Rows::new(1), weight: Rows::new(1) };
        Self {
            target: Rows::new(n_mels + 1),
            passes: std::iter::repeat_with(new).take(passes).collect(),
            buffers: refiner.buffers(),
        }
    }

    /// Takes the next mel frames, one after the other, and whether each is to be refined.
    pub fn aim(&mut self, frames: &[f32], trusted: &[bool]) {
        if !self.passes.is_empty() {
            refine::aim((frames, trusted), &mut self.target);
        }
    }

    /// Takes the next samples, of frames that were given before, and appends to `out` what is
    /// finished; after `last`, all is.
    pub fn push(&mut self, refiner: &Refiner, samples: &[f32], last: bool, out: &mut Vec<f32>) {
        let (mut extrapolated, mut result) = (samples.to_vec(), samples.to_vec());
        for i in 0..self.passes.len() {
            let sharp = sharpens(i, self.passes.len());
            let pass = &mut self.passes[i];
            pass.input.extend(&extrapolated);
            if i > 0 {
                pass.before.extend(&result);
            }
            let first = pass.sum.start();
            let end = pass.run(refiner, (&self.target, sharp), last, &mut self.buffers);
            let sums = pass.sum.get(first..end).iter().zip(pass.weight.get(first..end));
            result = sums.map(|(sum, weight)| sum / weight.max(MIN_WEIGHT)).collect();
            extrapolated = if i == 0 {
                result.clone()
            } else {
                let before = pass.before.get(first..end);
                result.iter().zip(before).map(|(q, before)| q + MOMENTUM * (q - before)).collect()
            };
            for rows in [&mut pass.sum, &mut pass.weight, &mut pass.before] {
                rows.forget(end);
            }
        }
        if let Some(pass) = self.passes.last() {
            self.target.forget(pass.frame);
        }
        out.extend_from_slice(&result);
    }
}

impl Pass {
    /// Corrects the frames that are complete; gives the end of the samples that are finished.
    fn run(&mut self, refiner: &Refiner, (target, sharp): (&Rows, bool), last: bool, buffers: &mut Buffers) -> usize {
        let stft = &refiner.stft;
        let (hop, half) = (stft.hop_length(), stft.n_fft() / 2);
        let known = self.input.end();
        let len = if last { known } else { ENDLESS };
        let frames = if last { known / hop } else { (known + hop).saturating_sub(half) / hop };
        while self.frame < frames {
            let centre = self.frame * hop;
            let first = self.input.start();
            let piece = (self.input.get(first..known), first);
            let wanted = trusted(target.get(self.frame..self.frame + 1));
            let corrected = refiner.correct(piece, len, self.frame, (wanted, sharp), buffers);
            let (from, to) = (centre.saturating_sub(half), (centre + half).min(len));
            self.reach(to);
            refiner.overlap(from, self.frame, corrected, self.sum.get_mut(from..to), |sum, s| *sum += s);
            let weights = self.weight.get_mut(from..to);
            refiner.overlap(from, self.frame, refiner.stft.window(), weights, |weight, w| *weight += w * w);
            self.frame += 1;
            self.input.forget((self.frame * hop).saturating_sub(half));
        }
        let end = if last { known } else { (self.frame * hop).saturating_sub(half) };
        self.reach(end);
        end
    }

    /// Sees to it that there are sums up to a sample.
    fn reach(&mut self, end: usize) {
        let missing = end.saturating_sub(self.sum.end());
        self.sum.grow(missing);
        self.weight.grow(missing);
    }
}

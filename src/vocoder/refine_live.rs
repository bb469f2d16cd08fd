//! Refinement that speaks soon: one hop of sound after the other is made to agree with the mel and
//! then stays as it is, so that only a few frames must be known beyond it.
//!
//! Spectrogram inversion in real time with look-ahead (Zhu, Beauregard & Wyse 2007, RTISI-LA), from
//! the flow's sound instead of silence and towards the mel instead of a spectrogram:
//!
//! ```text
//!             fixed │ hop b │ look-ahead │ not made yet
//!    ───────────────┼───────┼────────────┤
//!        ╰──── frame b−1 ───╯            │        every pass corrects all frames that touch what
//!            ╰──── frame b ─────╯        │        is not fixed; of the last ones a part is missing,
//!                ╰── frame b+1 ─────╯    │        under the window's thin end
//!                    ╰── frame b+2 ──────┼╌╌╌╯
//! ```
//!
//! At both ends the sound would be left with a step, and every hop with the mark of three: what is fixed can't
//! follow what comes after it, nor what isn't corrected yet what comes before. So what the passes change grows
//! from nothing at one end and shrinks to nothing at the other.

use super::refine::{self, Buffers, ENDLESS, MIN_WEIGHT, Refiner, sharpens, trusted};
use crate::kernels::rows::Rows;
use std::f32::consts::FRAC_PI_2;

/// As that of passes over all ([`super::refine`]), for few passes that begin anew with every hop: .5 was better
/// than .7, .9 and 1.1, and as good as 0 (measured on twelve LJSpeech clips).
const MOMENTUM: f32 = 0.5;
/// Parts of a hop over which the change grows behind what is fixed, and shrinks before what isn't made yet: of 0,
/// ½ and 0, ⅛, ¼, ½, 1 the best (measured on the same clips).
const GROWS: f32 = 0.5;
const SHRINKS: f32 = 0.25;

/// One stream's refinement with a fixed look-ahead.
pub struct LiveRefinement {
    passes: usize,
    lookahead: usize,
    /// Mel frames that are still needed, and behind the bands of each whether it is trusted.
    target: Rows,
    /// The sound: fixed before `hop`, begun after it, and beyond that as the flow made it.
    sound: Rows,
    /// The next hop to fix.
    hop: usize,
    buffers: Buffers,
    sum: Vec<f32>,
    before: Vec<f32>,
    /// The samples under way as the passes found them, and the part of its change that each is left.
    begun: Vec<f32>,
    parts: Vec<f32>,
}

impl LiveRefinement {
    /// Before the first sample. `passes` for each hop, which wait for `lookahead` frames after their own.
    pub fn new(refiner: &Refiner, n_mels: usize, passes: usize, lookahead: usize) -> Self {
        Self {
            passes,
            lookahead,
            target: Rows::new(n_mels + 1),
            sound: Rows::new(1),
            hop: 0,
            buffers: refiner.buffers(),
            sum: Vec::new(),
            before: Vec::new(),
            begun: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Takes the next mel frames, one after the other, and whether each is to be refined.
    pub fn aim(&mut self, frames: &[f32], trusted: &[bool]) {
        refine::aim((frames, trusted), &mut self.target);
    }

    /// Takes the next samples, of frames that were given before, and appends to `out` what is
    /// finished; after `last`, all is.
    pub fn push(&mut self, refiner: &Refiner, samples: &[f32], last: bool, out: &mut Vec<f32>) {
        self.sound.extend(samples);
        let hop = refiner.stft.hop_length();
        loop {
            let wanted = (self.hop + self.lookahead + 1) * hop;
            let (from, to) = (self.hop * hop, wanted.min(self.sound.end()));
            if from >= to || (to < wanted && !last) {
                break;
            }
            self.fix(refiner, from, to, to < wanted);
            out.extend_from_slice(self.sound.get(from..to.min(from + hop)));
            self.hop += 1;
            let first = refiner.frames_over(self.hop * hop..self.hop * hop + 1).start;
            self.target.forget(first);
            self.sound.forget((first * hop).saturating_sub(refiner.stft.n_fft() / 2));
        }
    }

    /// All passes over the samples `from..to`, of which the first hop is fixed afterwards; `last` ones have
    /// nothing behind them. Without look-ahead a hop has one turn only: it is changed as a whole, steps or not.
    fn fix(&mut self, refiner: &Refiner, from: usize, to: usize, last: bool) {
        let hop = refiner.stft.hop_length();
        let frames = refiner.frames_over(from..to).start..to.div_ceil(hop).min(self.target.end());
        let weights = refiner.weights(from..to, frames.clone());
        self.begun.clear();
        self.begun.extend_from_slice(self.sound.get(from..to));
        self.parts.clear();
        self.parts.resize(to - from, 1.0);
        let turns = self.lookahead > 0;
        if turns && from > 0 {
            grow(self.parts.iter_mut(), GROWS * hop as f32);
        }
        if turns && !last {
            grow(self.parts.iter_mut().rev(), SHRINKS * hop as f32);
        }
        for pass in 0..self.passes {
            self.sum.clear();
            self.sum.resize(to - from, 0.0);
            let sharp = sharpens(pass, self.passes);
            for frame in frames.clone() {
                let first = self.sound.start();
                let piece = (self.sound.get(first..to), first);
                let target = trusted(self.target.get(frame..frame + 1));
                let corrected = refiner.correct(piece, ENDLESS, frame, (target, sharp), &mut self.buffers);
                refiner.overlap(from, frame, corrected, &mut self.sum, |sum, s| *sum += s);
            }
            self.sum.iter_mut().zip(&weights).for_each(|(sum, weight)| *sum /= weight.max(MIN_WEIGHT));
            let sound = self.sound.get_mut(from..to);
            if pass == 0 || pass + 1 == self.passes {
                sound.copy_from_slice(&self.sum);
            } else {
                for ((y, q), before) in sound.iter_mut().zip(&self.sum).zip(&self.before) {
                    *y = q + MOMENTUM * (q - before);
                }
            }
            for ((y, begun), part) in sound.iter_mut().zip(&self.begun).zip(&self.parts) {
                *y = begun + part * (*y - begun);
            }
            std::mem::swap(&mut self.before, &mut self.sum);
        }
    }
}

/// Lets parts grow from nothing, over so many.
fn grow<'a>(parts: impl Iterator<Item = &'a mut f32>, over: f32) {
    parts
        .take(over as usize)
        .enumerate()
        .for_each(|(i, part)| *part *= (FRAC_PI_2 * (i as f32 + 0.5) / over).sin().powi(2));
}

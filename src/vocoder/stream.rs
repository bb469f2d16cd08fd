//! Sound as its mel arrives.

use super::noise::Noise;
use super::refine::Refiner;
use super::refine_live::LiveRefinement;
use super::refine_stream::RefineStream;
use super::sharpen::Sharpener;
use super::{Packed, SynthOptions, Vocoder, guard};
use crate::flow::filters::Synthesis;
use crate::flow::stream::State;
use crate::voice::{Lookahead, SynthesisConfig};
use crate::{Error, Result};
use std::collections::VecDeque;

/// Part of a hop over which a muted frame's sound fades.
const FADE: f32 = 0.25;

/// One stream of sound: mel frames in, samples out.
///
/// The samples are those of [`Vocoder::vocode`], bit for bit, whatever the pieces that go in. Each
/// convolution, filter and pass of refinement remembers its past, so that nothing is computed twice
/// and memory doesn't grow. Any number of streams run on one vocoder, in any threads.
///
/// A frame with a value that isn't finite is muted: it sounds as silence, and the stream goes on.
pub struct Streamer<'a> {
    vocoder: &'a Vocoder,
    packed: &'a Packed,
    noise: Noise,
    sigma: f32,
    /// Sigma as a driven recursion leaves it.
    driven: f32,
    sharpener: Sharpener,
    flow: State,
    synthesis: Option<Synthesis>,
    refine: Refinement,
    /// What the flow has made and the synthesis filter has not taken.
    residual: Vec<f32>,
    /// Hops that the synthesis filter has taken.
    hops: usize,
    lookahead: usize,
    frames: usize,
    samples: usize,
    muted: usize,
    /// Muted frames whose sound, or the fade after it, is still to come.
    mute: VecDeque<usize>,
}

/// How a stream's sound is refined.
enum Refinement {
    /// Pass after pass, each as close behind the one before as it can be.
    Passes(RefineStream),
    /// Hop after hop.
    Live(LiveRefinement),
}

impl Refinement {
    fn aim(&mut self, frames: &[f32], trusted: &[bool]) {
        match self {
            Self::Passes(refinement) => refinement.aim(frames, trusted),
            Self::Live(refinement) => refinement.aim(frames, trusted),
        }
    }

    fn push(&mut self, refiner: &Refiner, samples: &[f32], last: bool, out: &mut Vec<f32>) {
        match self {
            Self::Passes(refinement) => refinement.push(refiner, samples, last, out),
            Self::Live(refinement) => refinement.push(refiner, samples, last, out),
        }
    }
}

impl Vocoder {
    /// Opens a stream.
    ///
    /// # Errors
    /// If an option is out of range, or the voice's design cannot stream.
    pub fn stream(&self, options: &SynthOptions) -> Result<Streamer<'_>> {
        let packed = self.packed().ok_or_else(|| {
            Error::invalid(format!(
                "voice {} cannot stream: a step of its flow has no streaming form",
                self.config.name
            ))
        })?;
        let SynthesisConfig { sigma, drive, refine: passes, refine_lookahead } = self.asked(options)?;
        let filters = packed.filters.as_ref();
        let lookahead = packed.flow.lookahead_frames().max(filters.map_or(0, |f| f.config.lookahead() + 1));
        let n_mels = self.config.mel.n_mels;
        let (refine, after) = match refine_lookahead {
            Lookahead::Frames(ahead) if passes > 0 => {
                (Refinement::Live(LiveRefinement::new(&self.refiner, n_mels, passes, ahead)), ahead)
            }
            _ => (Refinement::Passes(RefineStream::new(&self.refiner, n_mels, passes)), self.refiner.lookahead(passes)),
        };
        Ok(Streamer {
            vocoder: self,
            packed,
            noise: Noise::new(options.seed),
            sigma,
            driven: sigma * drive,
            sharpener: self.sharpener(options),
            flow: self.driven(State::new(&packed.flow, rayon::current_num_threads()), drive),
            synthesis: filters.map(Synthesis::new),
            refine,
            residual: Vec::new(),
            hops: 0,
            lookahead: lookahead + after,
            frames: 0,
            samples: 0,
            muted: 0,
            mute: VecDeque::new(),
        })
    }
}

impl Streamer<'_> {
    /// Frames that must follow a frame before all its samples are out.
    pub fn latency_frames(&self) -> usize {
        self.lookahead
    }

    /// Frames that were muted so far because a value wasn't finite.
    pub fn muted_frames(&self) -> usize {
        self.muted
    }

    /// Frames that were sharpened and not refined so far, since the mel is smoother than speech: see
    /// [`SynthOptions::refine_smooth`].
    pub fn smooth_frames(&self) -> usize {
        self.sharpener.smooth_frames()
    }

    /// Frames taken so far.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Takes mel frames, one after the other with all bands of each, and appends the samples that
    /// are ready to `out`.
    ///
    /// # Errors
    /// If `frames` isn't a whole number of frames; then nothing is taken.
    pub fn push(&mut self, frames: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let n_mels = self.vocoder.config.mel.n_mels;
        if !frames.len().is_multiple_of(n_mels) {
            return Err(Error::invalid(format!("{} values are no whole frames of {n_mels} bands", frames.len())));
        }
        for frames in frames.chunks(self.packed.flow.piece_frames(1) * n_mels) {
            if frames.iter().all(|v| v.is_finite()) {
                self.advance(frames, false, out);
            } else {
                let clean = self.silence_bad(frames);
                self.advance(&clean, false, out);
            }
        }
        Ok(())
    }

    /// Ends the stream: appends the samples that are left, so that all of them are
    /// frames · `hop_length`.
    pub fn finish(mut self, out: &mut Vec<f32>) {
        if self.frames > 0 {
            self.advance(&[], true, out);
        }
    }

    /// The frames with silence for those that aren't finite.
    fn silence_bad(&mut self, frames: &[f32]) -> Vec<f32> {
        let mel = &self.vocoder.config.mel;
        let mut clean = frames.to_vec();
        for (i, frame) in clean.chunks_exact_mut(mel.n_mels).enumerate() {
            if frame.iter().any(|v| !v.is_finite()) {
                frame.fill(mel.silence());
                self.mute.push_back(self.frames + i);
                self.muted += 1;
            }
        }
        clean
    }

    fn advance(&mut self, frames: &[f32], last: bool, out: &mut Vec<f32>) {
        let Packed { flow, filters } = self.packed;
        let (noise, sigma) = (self.noise, self.sigma);
        let draw = |step: usize, rows: &mut [f32]| noise.fill_scaled(step * flow.group, sigma, rows);
        self.frames += frames.len() / self.vocoder.config.mel.n_mels;
        let mut known = frames.to_vec();
        let trusted = self.sharpener.run(&mut known);
        self.refine.aim(frames, &trusted);
        if let Some(trained_on) = &self.vocoder.config.trained_on {
            trained_on.bound(&mut known);
        }
        let frames = &*known;
        self.flow.push(flow, frames, last, draw, &mut self.residual);
        let mut sound = Vec::new();
        let taken = match (&mut self.synthesis, filters) {
            (Some(synthesis), Some(filters)) => {
                synthesis.hear(filters, frames, last);
                let whole = synthesis.ready(filters).min(self.residual.len() / flow.hop) * flow.hop;
                let residual = &mut self.residual[..whole];
                if let Some(level) = self.vocoder.residual_level() {
                    guard::repair(residual, flow.hop, self.hops, level, (&noise, self.driven));
                }
                self.hops += whole / flow.hop;
                super::bound(residual);
                synthesis.speak(filters, &self.residual[..whole], &mut sound);
                whole
            }
            _ => {
                super::bound(&mut self.residual);
                sound.extend_from_slice(&self.residual);
                self.residual.len()
            }
        };
        self.residual.drain(..taken);
        let from = out.len();
        self.refine.push(&self.vocoder.refiner, &sound, last, out);
        self.fade(&mut out[from..]);
    }

    /// Silences the muted frames among the next samples, with a short fade on either side.
    fn fade(&mut self, out: &mut [f32]) {
        let hop = self.packed.flow.hop;
        let first = self.samples;
        self.samples += out.len();
        if self.mute.is_empty() {
            return;
        }
        let steps = (FADE * hop as f32).max(1.0);
        for (i, sample) in out.iter_mut().enumerate() {
            let (frame, at) = ((first + i) / hop, (first + i) % hop);
            while self.mute.front().is_some_and(|&muted| muted + 1 < frame) {
                self.mute.pop_front();
            }
            let gain = |frame: usize| if self.mute.contains(&frame) { 0.0 } else { 1.0 };
            let (before, now) = (frame.checked_sub(1).map_or(1.0, gain), gain(frame));
            *sample *= before + (now - before) * ((at + 1) as f32 / steps).min(1.0);
        }
    }
}

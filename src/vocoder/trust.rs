//! How far a mel can be trusted to be one of speech.
//!
//! Refinement bends a sound until its mel is the one that was asked for. Where that one is smoother than any
//! sound's ([`crate::mel::detail`]), as acoustic models' mels are, no sound has it, and the passes take away what the
//! flow knows of speech: so where a mel lacks detail it is left out of them, and sharpened before it is spoken
//! ([`super::sharpen`]).

use crate::mel::MelConfig;
use crate::mel::detail::Detail;

/// Detail, as a part of that of the voice's own mels, below which a mel is trusted no more, and above which it is
/// again.
///
/// Where it is .75 refined and bare sound are as good as each other, where it is .56 bare sound is far better; speech
/// stays above .75 (docs/experiments.md, "Mels that no sound has").
pub(crate) const LEAST: f32 = 0.69;
const ENOUGH: f32 = 0.73;
/// Frames over which the mean goes, and those that are assumed to have stood before the first.
const FRAMES: f64 = 200.0;
const ASSUMED: usize = 2;
/// Part of a frame's bands that must stand out from the floor for the frame to count.
const BANDS: f64 = 0.25;

/// What was heard of a mel so far.
#[derive(Clone)]
pub(super) struct Trust {
    mel: MelConfig,
    /// Of the voice's own mels; `None`: every mel is trusted.
    natural: Option<f32>,
    before: Vec<f32>,
    heard: Detail,
    trusted: bool,
}

impl Trust {
    /// Before the first frame.
    pub fn new(mel: &MelConfig, natural: Option<f32>) -> Self {
        let heard = Detail::assumed(natural.unwrap_or(0.0), ASSUMED * mel.n_mels);
        Self { mel: mel.clone(), natural, before: Vec::new(), heard, trusted: true }
    }

    /// Whether the next frame is to be refined.
    pub fn next(&mut self, frame: &[f32]) -> bool {
        let Some(natural) = self.natural else { return true };
        let own = Detail::of_frame(&self.before, frame, &self.mel);
        self.before.clear();
        self.before.extend_from_slice(frame);
        if own.count() >= BANDS * frame.len() as f64 {
            self.heard = self.heard.faded(1.0 - 1.0 / FRAMES) + own;
        }
        if let Some(mean) = self.heard.mean() {
            self.trusted = mean > if self.trusted { LEAST } else { ENOUGH } * natural;
        }
        self.trusted
    }

    /// What was heard of late has so much of the detail of the voice's own mels, as a part of 1; 1 where that isn't known.
    pub fn part(&self) -> f32 {
        self.natural.zip(self.heard.mean()).map_or(1.0, |(natural, heard)| heard / natural)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames whose bands go up and down by turns, four times `depth` of detail.
    fn frames(depth: f32, count: usize) -> Vec<f32> {
        (0..80 * count).map(|i| if (i / 80 + i) % 2 == 0 { -4.0 } else { -4.0 + depth }).collect()
    }

    fn trusted(natural: Option<f32>, frames: &[f32]) -> Vec<bool> {
        let mut trust = Trust::new(&MelConfig::nvidia(), natural);
        frames.chunks_exact(80).map(|frame| trust.next(frame)).collect()
    }

    #[test]
    fn what_lacks_detail_loses_trust_and_regains_it() {
        let spoken = [frames(0.4, 300), frames(0.2, 1000), frames(0.4, 1000)].concat();
        let trusted = trusted(Some(1.6), &spoken);
        let turns: Vec<usize> = (1..trusted.len()).filter(|&i| trusted[i] != trusted[i - 1]).collect();
        assert!(trusted[0] && turns.len() == 2, "{turns:?}");
        assert!((310..500).contains(&turns[0]) && (1310..1700).contains(&turns[1]), "{turns:?}");
    }

    #[test]
    fn what_never_had_detail_loses_trust_soon_and_a_pause_tells_nothing() {
        let trusted = trusted(Some(1.6), &[vec![-11.5; 80 * 50], frames(0.2, 20), vec![-11.5; 80 * 50]].concat());
        assert!(trusted[..50].iter().all(|t| *t) && trusted[69..].iter().all(|t| !*t));
    }

    #[test]
    fn voices_that_know_no_detail_trust_all() {
        assert!(trusted(None, &frames(0.0, 500)).iter().all(|t| *t));
    }
}

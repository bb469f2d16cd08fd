//! What is measured of a trained flow beside its likelihood.

use crate::audio::wav::{self, WavFormat};
use crate::train::clock::cpu_seconds;
use crate::train::dataset::Clip;
use crate::vocoder::{SynthOptions, Vocoder};
use crate::voice::Voice;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// How a voice speaks.
pub(super) struct Speech {
    pub real_time_factor: f64,
    pub lookahead_frames: Option<usize>,
    pub score: Option<f64>,
}

/// A program that judges a sound beside its recording.
pub(super) struct Scorer {
    command: String,
}

impl Scorer {
    /// A command, its words parted by spaces.
    pub fn new(command: &str) -> Self {
        Self { command: command.to_string() }
    }

    /// The figure that the command prints last, given a recording and a sound.
    pub fn score(&self, recording: &Path, sound: &Path) -> Result<f64> {
        let wrong = |problem: String| Error::invalid(format!("scorer {}: {problem}", self.command));
        let mut words = self.command.split_whitespace();
        let program = words.next().ok_or_else(|| wrong("is empty".to_string()))?;
        let output = Command::new(program).args(words).arg(recording).arg(sound).output();
        let output = output.map_err(|e| wrong(format!("cannot be started: {e}")))?;
        let said = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing").trim().to_string()
        };
        if !output.status.success() {
            return Err(wrong(format!("{}: {}", output.status, said(&output.stderr))));
        }
        let line = said(&output.stdout);
        let figure = line.split_whitespace().next_back().and_then(|word| word.parse::<f64>().ok());
        figure.filter(|figure| figure.is_finite()).ok_or_else(|| wrong(format!("expected a number, got {line:?}")))
    }
}

/// The file of a clip in a folder of sounds.
pub(super) fn sound_file(folder: &Path, clip: &Clip) -> PathBuf {
    folder.join(format!("{}.wav", wav::plain_name(&clip.name)))
}

/// Speaks the mels of `clips` (at least one) into `folder` on one thread, without refinement; scores
/// the sounds beside the recordings: all of them, or there is no score.
pub(super) fn speak(
    voice: &Voice,
    clips: &[Clip],
    folder: &Path,
    recordings: &Path,
    scorer: Option<&Scorer>,
) -> Result<Speech> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let vocoder = Vocoder::new(voice)?;
    let options = SynthOptions { sigma: Some(1.0), drive: Some(1.0), refine: Some(0), ..Default::default() };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|e| Error::invalid(format!("cannot start a thread: {e}")))?;
    let (mut spent, mut lasts, mut scores) = (0.0, 0.0, Vec::new());
    for clip in clips {
        let begun = cpu_seconds();
        let sound = pool.install(|| vocoder.vocode(&clip.mel, &options, None))?;
        spent += cpu_seconds() - begun;
        lasts += sound.samples.len() as f64 / f64::from(sound.sample_rate);
        let path = sound_file(folder, clip);
        wav::write(&path, &sound.samples, sound.sample_rate, WavFormat::Int16)?;
        match scorer.map(|scorer| scorer.score(&sound_file(recordings, clip), &path)) {
            Some(Ok(score)) => scores.push(score),
            // what a flow says may be beyond judgement; that the scorer works was tried before
            Some(Err(error)) => eprintln!("no score: {error}"),
            None => {}
        }
    }
    Ok(Speech {
        real_time_factor: spent / lasts,
        lookahead_frames: vocoder.stream(&options).ok().map(|stream| stream.latency_frames()),
        score: (scores.len() == clips.len() && scorer.is_some())
            .then(|| scores.iter().sum::<f64>() / scores.len() as f64),
    })
}

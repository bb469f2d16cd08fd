//! `melglow synth --stream`: sound leaves while its mel arrives, in constant memory.

use super::conventions::{Arrivals, MelReader};
use super::live_input::LiveInput;
use super::say;
use super::source::{Source, is_stdio};
use super::synth::{Job, SMOOTH, is_smooth};
use crate::atomic;
use crate::audio::wav::{self, WavFormat};
#[cfg(feature = "play")]
use crate::mel::MelSpectrogram;
use crate::mel::file::live::FrameReader;
use crate::vocoder::{Streamer, SynthOptions, Vocoder};
use anyhow::{Context, Result};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Frames that are spoken between two writes where all of them are there: a quarter of a second.
const FRAMES: usize = 22;

/// Mel frames of one utterance, from a file or as they arrive on standard input.
pub(super) enum Frames {
    /// All of them, frame after frame.
    Whole {
        values: Vec<f32>,
        /// How many values are taken.
        at: usize,
        /// The part of their sound that is meant.
        samples: Range<usize>,
    },
    /// As they come.
    Live { name: PathBuf, reader: Box<FrameReader<Box<dyn Read + Send>>>, judge: Arrivals },
}

impl Frames {
    /// Opens a mel file, or `input` for `-`; warns of a file whose mel doesn't suit the voice.
    pub fn open(mel: &Source, reader: &MelReader, input: impl FnOnce() -> Box<dyn Read + Send>) -> Result<Self> {
        if matches!(mel, Source::Stdin) {
            reader.must_be_the_voices_own()?;
            let name = mel.name();
            let frames = FrameReader::open(input(), &name, reader.layout)?;
            return Ok(Self::Live { name, reader: Box::new(frames), judge: reader.arrivals() });
        }
        let (decoded, warning) = reader.decode(mel.read(reader.layout)?, &mel.name())?;
        if let Some(warning) = warning {
            say(&warning);
        }
        let values = decoded.mel.columns(0..decoded.mel.frames());
        Ok(Self::Whole { values, at: 0, samples: decoded.samples })
    }

    /// Samples in all, where that is known, at `hop` samples a frame.
    pub fn samples(&self, hop: usize) -> Option<usize> {
        match self {
            Self::Whole { samples, .. } => Some(samples.len()),
            Self::Live { reader, .. } => reader.frames().map(|frames| frames * hop),
        }
    }

    /// The part of the sound that is meant.
    fn wanted(&self) -> Range<usize> {
        match self {
            Self::Whole { samples, .. } => samples.clone(),
            Self::Live { .. } => 0..usize::MAX,
        }
    }

    /// The next frames; `None` at the end.
    pub fn next(&mut self, n_mels: usize) -> crate::Result<Option<Vec<f32>>> {
        match self {
            Self::Live { name, reader, judge } => {
                let frames = reader.read()?;
                match judge.take(frames.as_deref()) {
                    Ok(warning) => warning.iter().for_each(|w| say(&format!("{}: {w}", name.display()))),
                    Err(problem) => return Err(crate::Error::file(&*name, problem.to_string())),
                }
                Ok(frames)
            }
            Self::Whole { values, at, .. } => {
                let piece = values[*at..].chunks(FRAMES * n_mels).next().map(<[f32]>::to_vec);
                *at += piece.as_ref().map_or(0, Vec::len);
                Ok(piece)
            }
        }
    }
}

/// What became of one utterance.
#[derive(Default)]
pub(super) struct Spoken {
    pub samples: u64,
    frames: usize,
    muted: usize,
    smooth: usize,
    /// What cut the frames short; what came before is spoken all the same.
    pub cut: Option<crate::Error>,
}

impl Spoken {
    /// What was spoken as a whole, of which nothing is to be said.
    #[cfg(feature = "play")]
    pub fn made(samples: u64) -> Self {
        Self { samples, ..Self::default() }
    }

    /// Takes over what a stream counted.
    fn count(&mut self, stream: &Streamer) {
        (self.frames, self.muted, self.smooth) = (stream.frames(), stream.muted_frames(), stream.smooth_frames());
    }

    /// What there is to say of the frames of a mel of this name.
    pub fn remarks(&self, name: &Path) -> impl Iterator<Item = String> {
        let (frames, were) = if self.muted == 1 { ("frame", "was") } else { ("frames", "were") };
        let muted = (self.muted > 0).then(|| {
            format!("{}: {} {frames} with values that are not finite {were} muted", name.display(), self.muted)
        });
        let smooth = is_smooth(self.smooth, self.frames).then(|| format!("{}: the mel is {SMOOTH}", name.display()));
        muted.into_iter().chain(smooth)
    }
}

/// Streams all frames through the vocoder; `sink` gets samples as they are made, and says whether
/// to go on.
pub(super) fn speak<E: From<crate::Error>>(
    vocoder: &Vocoder,
    options: &SynthOptions,
    frames: &mut Frames,
    mut sink: impl FnMut(&[f32]) -> Result<bool, E>,
) -> Result<Spoken, E> {
    let n_mels = vocoder.config().mel.n_mels;
    let mut stream = vocoder.stream(options)?;
    let wanted = frames.wanted();
    let (mut out, mut spoken, mut made) = (Vec::new(), Spoken::default(), 0);
    // what is meant of the samples that were just made
    let mut take = |out: &mut Vec<f32>| {
        let place = made..made + out.len();
        made = place.end;
        out.truncate(wanted.end.clamp(place.start, place.end) - place.start);
        out.drain(..wanted.start.saturating_sub(place.start).min(out.len()));
    };
    loop {
        match frames.next(n_mels) {
            Ok(Some(piece)) => stream.push(&piece, &mut out)?,
            Ok(None) => break,
            Err(error) => {
                spoken.cut = Some(error);
                break;
            }
        }
        take(&mut out);
        spoken.samples += out.len() as u64;
        if !out.is_empty() && !sink(&out)? {
            spoken.count(&stream);
            return Ok(spoken);
        }
        out.clear();
    }
    spoken.count(&stream);
    stream.finish(&mut out);
    take(&mut out);
    spoken.samples += out.len() as u64;
    sink(&out)?;
    Ok(spoken)
}

/// Speaks all frames together, as a voice does that cannot stream.
#[cfg(feature = "play")]
pub(super) fn speak_whole(vocoder: &Vocoder, options: &SynthOptions, frames: &mut Frames) -> crate::Result<Vec<f32>> {
    let n_mels = vocoder.config().mel.n_mels;
    let mut rows = Vec::new();
    while let Some(piece) = frames.next(n_mels)? {
        rows.extend(piece);
    }
    let count = rows.len() / n_mels;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mel = MelSpectrogram::new(rows, count)?.transposed();
    let mut samples = vocoder.vocode(&mel, options, None)?.samples;
    let wanted = frames.wanted();
    samples.truncate(wanted.end);
    samples.drain(..wanted.start.min(samples.len()));
    Ok(samples)
}

/// How the samples leave.
pub(super) struct Output {
    /// Sample format.
    pub format: WavFormat,
    /// Samples alone, without a header.
    pub raw: bool,
}

/// Speaks one mel as a stream; gives the number of samples.
pub(super) fn run(
    vocoder: &Vocoder,
    options: &SynthOptions,
    job: &Job,
    reader: &MelReader,
    to: &Output,
    stop: &Arc<AtomicBool>,
) -> Result<u64> {
    let name = &job.mel.name();
    let mut frames = Frames::open(&job.mel, reader, || Box::new(LiveInput::new(io::stdin(), stop.clone())))?;
    let mel = &vocoder.config().mel;
    let promised = frames.samples(mel.hop_length).map(|samples| samples as u64);
    let header = |samples| if to.raw { Ok(Vec::new()) } else { wav::header(samples, mel.sample_rate, to.format) };
    let mut saturated = 0;
    let mut fill = |out: &mut dyn Write| -> io::Result<Spoken> {
        out.write_all(&header(promised)?)?;
        // whoever reads gets each piece at once
        let spoken = speak(vocoder, options, &mut frames, |samples| -> Result<bool, SinkError> {
            saturated += wav::write_samples(&mut *out, samples, to.format)?;
            out.flush()?;
            Ok(!stop.load(Ordering::Relaxed))
        })
        .map_err(SinkError::into_io)?;
        if !to.raw {
            wav::write_padding(&mut *out, spoken.samples, to.format)?;
        }
        out.flush()?;
        Ok(spoken)
    };
    let spoken = if is_stdio(&job.wav) {
        fill(&mut io::stdout().lock()).context("cannot write to standard output")?
    } else {
        atomic::write_with_head(&job.wav, fill, |spoken| header(Some(spoken.samples)))?
    };
    let written = if is_stdio(&job.wav) { name } else { &job.wav };
    if saturated > 0 {
        say(&format!("{}: {saturated} samples saturated", written.display()));
    }
    spoken.remarks(name).for_each(|remark| say(&remark));
    match spoken.cut {
        Some(error) => Err(error.into()),
        None => Ok(spoken.samples),
    }
}

/// An error of the vocoder or of the sink.
pub(super) enum SinkError {
    Io(io::Error),
    Ours(crate::Error),
}

impl From<io::Error> for SinkError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<crate::Error> for SinkError {
    fn from(error: crate::Error) -> Self {
        Self::Ours(error)
    }
}

impl SinkError {
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Io(error) => error,
            Self::Ours(error) => io::Error::other(error),
        }
    }
}

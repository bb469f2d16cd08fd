//! The options on mel conventions that commands share, and mels read by them.

use crate::mel::convention::{self, Convention, Decoded, Decoder};
use crate::mel::diagnosis::{Finding, diagnose};
use crate::mel::file::Layout;
use crate::mel::stats::MelStats;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::voice::VoiceConfig;
use crate::{Error, Result};
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};
use std::path::{Path, PathBuf};

/// Which convention.
#[derive(Args, Clone, Debug, Default)]
pub struct ConventionArgs {
    /// How the mels are made, by the name of a program [default: as the voice expects]
    #[arg(long, value_name = "NAME", value_parser = known_conventions(), hide_possible_values = false)]
    pub mel_convention: Option<String>,
    /// Statistics of mels that are normalised by mean and variance: .npy, .npz, .h5 or Kaldi's .ark, as
    /// ParallelWaveGAN and ESPnet write them
    #[arg(long, value_name = "FILE")]
    pub mel_stats: Option<PathBuf>,
}

/// How the mels to read are made, and what to do about those that aren't.
#[derive(Args, Clone, Debug, Default)]
pub struct MelArgs {
    #[command(flatten)]
    convention: ConventionArgs,
    /// A mel with as many frames as bands is [frames, bands]; others show by their shape
    #[arg(long)]
    transpose: bool,
    /// Stop at a mel that plainly isn't as the voice expects, instead of warning
    #[arg(long)]
    strict: bool,
}

fn known_conventions() -> PossibleValuesParser {
    let value = |(name, aliases, about): (&'static str, &'static [&'static str], &'static str)| {
        PossibleValue::new(name).aliases(aliases).help(about)
    };
    PossibleValuesParser::new(convention::names().map(value).collect::<Vec<_>>())
}

impl ConventionArgs {
    /// The convention, relative to a voice's.
    pub(crate) fn convention(&self, voice: &MelConfig) -> Result<Convention> {
        Convention::chosen(self.mel_convention.as_deref(), voice)
    }

    /// The statistics, if any are given.
    pub(crate) fn stats(&self, n_mels: usize) -> Result<Option<MelStats>> {
        self.mel_stats.as_deref().map(|path| MelStats::read(path, n_mels)).transpose()
    }
}

/// Turns what files hold into what a voice expects, with a warning where it doesn't look like that.
pub(crate) struct MelReader {
    /// How to read the file.
    pub(crate) layout: Layout,
    /// Whether a convention or statistics were given.
    foreign: bool,
    decoder: Decoder,
    mel: MelConfig,
    voice: String,
    strict: bool,
}

impl MelReader {
    pub(crate) fn new(args: &MelArgs, voice: &VoiceConfig) -> Result<Self> {
        let convention = args.convention.convention(&voice.mel)?;
        let decoder = convention.decoder(&voice.mel, args.convention.stats(voice.mel.n_mels)?)?;
        let layout = convention.layout(args.transpose);
        let foreign = args.convention.mel_convention.is_some() || args.convention.mel_stats.is_some();
        let (mel, name) = (voice.mel.clone(), voice.name.clone());
        Ok(Self { layout, foreign, decoder, mel, voice: name, strict: args.strict })
    }

    /// Refuses the options of conversion where frames are spoken as they arrive.
    pub(crate) fn must_be_the_voices_own(&self) -> Result<()> {
        if self.foreign {
            return Err(Error::invalid(
                "frames that arrive on standard input are spoken as the voice expects them; --mel-convention and \
                 --mel-stats are for files",
            ));
        }
        Ok(())
    }

    /// A judge of frames that arrive.
    pub(crate) fn arrivals(&self) -> Arrivals {
        let (mel, voice) = (self.mel.clone(), self.voice.clone());
        Arrivals { mel, voice, strict: self.strict, seen: Some(Vec::new()) }
    }

    /// The voice's mel, and a warning if it doesn't look like one. `name` is for messages.
    pub(crate) fn decode(&self, mel: MelSpectrogram, name: &Path) -> Result<(Decoded, Option<String>)> {
        let decoded = self.decoder.decode(mel).map_err(|e| Error::file(name, e.to_string()))?;
        match decoded.strange.as_ref().map(|finding| unlike(finding, &self.voice)) {
            Some(warning) if self.strict => Err(Error::file(name, warning)),
            warning => Ok((decoded, warning.map(|warning| format!("{}: {warning}", name.display())))),
        }
    }
}

/// Judges the mel of frames that arrive, by the first of them.
pub(crate) struct Arrivals {
    mel: MelConfig,
    voice: String,
    strict: bool,
    /// Frames so far, those with values that aren't finite left out; none once they are judged.
    seen: Option<Vec<f32>>,
}

impl Arrivals {
    /// Frames that are judged: two seconds and a half.
    const FRAMES: usize = 215;

    /// Takes the next frames, `None` at the end; once there are enough gives a warning if they don't look
    /// like what the voice expects, or fails if it is to be strict.
    pub(crate) fn take(&mut self, frames: Option<&[f32]>) -> Result<Option<String>> {
        let Some(seen) = &mut self.seen else { return Ok(None) };
        let n_mels = self.mel.n_mels;
        let finite = |frame: &&[f32]| frame.iter().all(|value| value.is_finite());
        seen.extend(frames.unwrap_or_default().chunks(n_mels).filter(finite).flatten());
        let count = seen.len() / n_mels;
        if count == 0 || frames.is_some() && count < Self::FRAMES {
            return Ok(None);
        }
        let mel = MelSpectrogram::new(std::mem::take(seen), count)?.transposed();
        self.seen = None;
        let serious = diagnose(&mel, &self.mel)?.into_iter().find(|finding| finding.serious);
        match serious.map(|finding| unlike(&finding, &self.voice)) {
            Some(warning) if self.strict => Err(Error::invalid(warning)),
            warning => Ok(warning),
        }
    }
}

/// What a serious finding means for a voice, on one line.
fn unlike(finding: &Finding, voice: &str) -> String {
    let Finding { what, evidence, remedy, .. } = finding;
    let remedy = remedy.map_or_else(String::new, |remedy| format!("; {remedy}"));
    format!("looks like {what} ({evidence}), voice {voice} expects natural logarithms of magnitudes{remedy}")
}

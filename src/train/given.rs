//! Mels that another program made of the clips, in place of those of their sounds: an acoustic model's, with
//! teacher forcing, so that a voice learns what it will be given to speak.
//!
//! A mel must be of its clip from the first sample on, and nearly as long; where its frames lie otherwise than a
//! voice's, the sound is cut to where they are. Nothing is interpolated.

use crate::below::files_below;
use crate::mel::convention::{Convention, Decoder};
use crate::mel::file::{self, Layout, Source, is_mel_file};
use crate::mel::stats::MelStats;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::{Error, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::path::PathBuf;

/// Frames that a mel may have more or less than its sound: acoustic models make several at a time, and end a
/// little early or late.
const OFF: usize = 10;

/// What stands before and after a clip's name in names of mel files, besides nothing: Rayhane Mama's Tacotron-2
/// and ParallelWaveGAN write so.
const AROUND: [(&str, &str); 2] = [("mel-", ""), ("", "-feats")];

/// Where the mels of clips are, and how they are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenMels {
    /// A folder of mel files, or a file of many mels, by the names of their clips.
    pub path: PathBuf,
    /// Name of their convention ([`Convention::named`]); `None`: the voice's own.
    pub convention: Option<String>,
    /// Statistics that they are normalised with.
    pub stats: Option<PathBuf>,
    /// A mel with as many frames as bands is `[frames, bands]`.
    pub transpose: bool,
}

/// Mels by the names of their clips.
pub struct MelFiles {
    path: PathBuf,
    files: HashMap<String, Source>,
    layout: Layout,
    convention: Convention,
    decoder: Decoder,
}

/// A mel, and what of its clip's sound it is of.
#[derive(Clone, Debug, PartialEq)]
pub struct Paired {
    /// As a voice wants it: frames centred on multiples of the hop, the first on the first sample.
    pub mel: MelSpectrogram,
    /// The samples.
    pub samples: Range<usize>,
    /// What the sound is multiplied by.
    pub gain: f32,
}

impl GivenMels {
    /// Finds the mels for voices of this convention, without reading them.
    ///
    /// # Errors
    /// If the path can't be read or holds no mels, two have one name, there is no such convention, or no exact way
    /// from it.
    pub fn open(&self, config: &MelConfig) -> Result<MelFiles> {
        let convention = Convention::chosen(self.convention.as_deref(), config)?;
        let stats = self.stats.as_deref().map(|path| MelStats::read(path, config.n_mels)).transpose()?;
        let mut files = HashMap::new();
        for (name, source) in self.sources()? {
            match files.entry(name) {
                Entry::Vacant(place) => _ = place.insert(source),
                Entry::Occupied(other) => {
                    let problem = format!("and {} are mels of one clip", source.name().display());
                    return Err(Error::file(other.get().name(), problem));
                }
            }
        }
        Ok(MelFiles {
            path: self.path.clone(),
            files,
            layout: convention.layout(self.transpose),
            decoder: convention.decoder(config, stats)?,
            convention,
        })
    }

    /// The mels and their names.
    fn sources(&self) -> Result<Vec<(String, Source)>> {
        let files = match self.path.is_dir() {
            true => files_below(&self.path, is_mel_file)?,
            false => vec![(self.path.file_stem().unwrap_or_default().to_string_lossy().into(), self.path.clone())],
        };
        let mut found = Vec::new();
        for (name, path) in files {
            for source in file::in_file(&path)? {
                let key = source.utterance.as_ref().map(|utterance| &utterance.key);
                found.push((key.unwrap_or(&name).clone(), source));
            }
        }
        if found.is_empty() {
            return Err(file::no_mels(&self.path));
        }
        Ok(found)
    }
}

impl MelFiles {
    /// The mel of the clip with these samples.
    ///
    /// # Errors
    /// If there is none, it can't be read, or it isn't as long as the clip.
    pub fn of(&self, name: &str, samples: &[f32]) -> Result<Paired> {
        let (folders, own) = name.rsplit_once('/').map_or(("", name), |(folders, _)| name.split_at(folders.len() + 1));
        let around = std::iter::once(&("", "")).chain(&AROUND);
        let source = around
            .filter_map(|(before, after)| self.files.get(&format!("{folders}{before}{own}{after}")))
            .next()
            .ok_or_else(|| Error::file(&self.path, format!("has no mel of the name {name}")))?;
        let mel = source.read(self.layout)?;
        let (given, hop) = (mel.frames(), self.convention.mel.hop_length);
        let (first, expected) = self.convention.frames(samples.len());
        if given.abs_diff(expected) > OFF {
            let problem = format!("has {given} frames, and its clip's {} samples are {expected}", samples.len());
            return Err(Error::file(source.name(), problem));
        }
        let mel = self.decoder.decode(mel).map_err(|e| Error::file(source.name(), e.to_string()))?.mel;
        // a frame that was put in front for synthesis isn't of this sound
        let added = mel.frames() - given;
        let centre = first + (self.convention.mel.n_fft / 2) as isize;
        let before = centre.min(0).unsigned_abs().div_ceil(hop);
        let start = (centre + (before * hop) as isize).unsigned_abs();
        let frames = given.saturating_sub(before);
        let samples_left = samples.len().saturating_sub(start).min(frames * hop);
        if samples_left < hop {
            return Err(Error::file(source.name(), "is of less than a frame of its clip"));
        }
        // a voice's mel has a frame more than whole hops, centred on the end
        let frames = frames.min(samples_left / hop + 1);
        Ok(Paired {
            mel: mel.section(added + before..added + before + frames),
            samples: start..start + samples_left,
            gain: self.convention.gain(samples),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mel::extract::{Extractor, extract};

    /// The files of a folder with one mel, `clip.npy`, of these samples in a convention.
    fn files(convention: &str, samples: &[f32], config: &MelConfig) -> MelFiles {
        let folder = tempfile::tempdir().unwrap();
        let named = Convention::named(convention, config).unwrap();
        let mel = Extractor::of(&named).unwrap().extract(samples).unwrap();
        crate::mel::file::write_npy(&folder.path().join("clip.npy"), &mel).unwrap();
        let path = folder.keep();
        GivenMels { path, convention: Some(convention.into()), stats: None, transpose: false }.open(config).unwrap()
    }

    #[test]
    fn a_sound_is_cut_to_where_its_frames_are() {
        let config = MelConfig::nvidia();
        // a chirp, so that each frame has its place
        for length in [9_000_usize, 30_000, 30_208] {
            let sound: Vec<f32> = (0..length).map(|i| 0.4 * (1e-5 * (i * i) as f32).sin()).collect();
            for convention in ["voice", "log10", "hifigan", "matcha", "parakeet", "squeezewave"] {
                let files = files(convention, &sound, &config);
                let paired = files.of("clip", &sound).unwrap();
                let own: Vec<f32> = sound[paired.samples.clone()].iter().map(|x| x * paired.gain).collect();
                let lost = length - own.len();
                assert!(lost <= 2 * config.hop_length, "{convention}, {length}: {lost} samples lost");
                let mel = extract(&own, &config).unwrap();
                let frames = own.len() / config.hop_length;
                assert!((frames..=frames + 1).contains(&paired.mel.frames()), "{convention}, {length}");
                // inside: what lies beyond the ends of a sound differs
                let mut worst = 0.0f32;
                for band in 0..80 {
                    let pairs = mel.band(band).iter().zip(paired.mel.band(band));
                    for (a, b) in pairs.take(frames - 4).skip(4) {
                        worst = worst.max((a.max(-6.0) - b.max(-6.0)).abs());
                    }
                }
                assert!(worst < 0.02, "{convention}, {length}: {worst}");
                std::fs::remove_dir_all(&files.path).unwrap();
            }
        }
    }

    #[test]
    fn a_mel_may_end_a_little_early_or_late() {
        let config = MelConfig::nvidia();
        let sound: Vec<f32> = (0..30_000).map(|i| 0.4 * (0.05 * i as f32).sin()).collect();
        let files = files("voice", &sound, &config);
        let frames = |samples: usize| {
            let mut sound = sound.clone();
            sound.resize(samples, 0.0);
            files.of("clip", &sound).map(|paired| (paired.mel.frames(), paired.samples.len()))
        };
        // 118 frames are given
        assert_eq!(frames(30_000).unwrap(), (118, 30_000));
        assert_eq!(frames(28_000).unwrap(), (110, 28_000));
        assert_eq!(frames(31_000).unwrap(), (118, 118 * 256));
        let problem = frames(33_000).unwrap_err().to_string();
        assert!(problem.ends_with("clip.npy: has 118 frames, and its clip's 33000 samples are 129"), "{problem}");
        std::fs::remove_dir_all(&files.path).unwrap();
    }
}

//! Clips on disk → whitened residuals in memory → random segments.

use super::config::{Recipe, SmoothMels, Variety, unknown};
use super::given::{MelFiles, Paired};
use super::log::Progress;
use crate::below::files_below;
use crate::flow::{Flow, Segment};
use crate::mel::classes::Classes;
use crate::mel::detail::Detail;
use crate::mel::smooth::Smoothing;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::net::params::{named_rng, uniform};
use crate::{Error, Result, audio, mel};
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use rayon::prelude::*;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

/// Clips by which the level of the residual is measured.
const LEVEL_CLIPS: usize = 16;

/// Distance of given mels from the sounds' own that an acoustic model's don't have, nats: with teacher forcing they
/// are .2 to .6 away.
const FAR: f32 = 1.0;

/// Speeds per unit that varied clips may have.
const SPEEDS: u32 = 50;

/// A clip: its 16-bit samples and its mel; whitened when first asked for, or for each segment anew
/// where the whitening learns.
pub struct Clip {
    /// The file's name without its extension, behind the folders that it lies in below the data's.
    pub name: String,
    /// Mel of the samples without noise, or the one that was given for them.
    pub mel: MelSpectrogram,
    /// Mean absolute difference of a given mel from the samples' own, nats; `None` where it is their own.
    pub mel_distance: Option<f32>,
    /// Detail of the samples' own mel, whatever mel was given.
    pub detail: Detail,
    samples: Arc<[i16]>,
    whitened: OnceLock<Whitened>,
}

/// What the flow's steps see of a clip, and what the whitening front contributes.
pub struct Whitened {
    /// Residual of the whitening front (or the noisy samples themselves), whole frames only.
    pub residual: Vec<f32>,
    /// log|∂residual/∂samples|, nats, summed over each hop.
    pub log_det: Vec<f32>,
}

/// Clips that could be read, in name order, and those that couldn't.
pub struct Dataset {
    /// Usable clips.
    pub clips: Vec<Clip>,
    /// One line for each clip that was left out: name and reason.
    pub skipped: Vec<String>,
    /// Clips that were resampled.
    pub resampled: usize,
}

/// Segments for one forward pass.
pub struct Batch {
    /// Residuals, `[batch, 1, samples]`.
    pub x: Tensor,
    /// Mel windows, `[batch, n_mels, left + frames + right]`.
    pub mel: Tensor,
    /// The whitening front's log-determinant of each segment, `[batch]`, nats.
    pub whitening_log_det: Tensor,
}

/// The files of a data folder: name, path, in name order.
///
/// A folder with a `metadata.csv` is in the LJSpeech layout (first column: name of
/// `wavs/NAME.wav`); any other is a folder of audio files and of folders of them, whose names go before the files':
/// `p225/p225_001`.
///
/// # Errors
/// If the folder can't be read or names no clip.
pub fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let metadata = folder.join("metadata.csv");
    let mut files = Vec::new();
    if metadata.exists() {
        let bytes = std::fs::read(&metadata).map_err(Error::io("read", &metadata))?;
        for line in String::from_utf8_lossy(&bytes).trim_start_matches('\u{feff}').lines() {
            let name = line.split('|').next().unwrap_or_default().trim();
            if !name.is_empty() {
                files.push((name.to_string(), folder.join("wavs").join(format!("{name}.wav"))));
            }
        }
    } else {
        files = files_below(folder, audio::decode::is_audio_file)?;
    }
    files.sort();
    files.dedup();
    if files.is_empty() {
        return Err(Error::file(folder, "no clips: expected metadata.csv with wavs/, or audio files"));
    }
    Ok(files)
}

/// Makes sure that each of the names and ranges is that of a clip.
///
/// # Errors
/// If the folder of clips `names` has none of such a name: names them.
pub fn check_names(folder: &Path, ranges: &[String], names: &[String]) -> Result<()> {
    let unknown = unknown(ranges, names);
    if unknown.is_empty() {
        return Ok(());
    }
    let problem = format!("has no clip {}; a clip's name is its file's without the extension", unknown.join(", "));
    Err(Error::file(folder, problem))
}

impl Dataset {
    /// Names of the clips of a folder, in order, readable or not.
    ///
    /// # Errors
    /// As [`list`].
    pub fn names(folder: &Path) -> Result<Vec<String>> {
        Ok(list(folder)?.into_iter().map(|(name, _)| name).collect())
    }

    /// Reads every clip of a folder whose name `wanted` accepts, in parallel, with its mel from `mels` if
    /// there are any. Clips that can't be used are listed, not fatal.
    ///
    /// # Errors
    /// If no clip is wanted, or none is usable.
    pub fn read(
        folder: &Path,
        config: &MelConfig,
        mels: Option<&MelFiles>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut files = list(folder)?;
        files.retain(|(name, _)| wanted(name));
        if files.is_empty() {
            return Err(Error::file(folder, "none of its clips has such a name"));
        }
        let progress = Mutex::new((0, Progress::new("reading", 0, files.len())));
        let read = |(name, path): &(String, PathBuf)| {
            let clip = Clip::read(name, path, config, mels);
            if let Ok(mut progress) = progress.lock() {
                progress.0 += 1;
                let (done, bar) = &mut *progress;
                bar.at(*done, String::new);
            }
            clip
        };
        let read: Vec<_> = files.par_iter().map(read).collect();
        drop(progress);
        let mut dataset = Self { clips: Vec::new(), skipped: Vec::new(), resampled: 0 };
        for ((name, _), result) in files.into_iter().zip(read) {
            match result {
                Ok((clip, resampled)) => {
                    dataset.clips.push(clip);
                    dataset.resampled += usize::from(resampled);
                }
                Err(error) => dataset.skipped.push(format!("{name}: {}", chain(&error))),
            }
        }
        if dataset.clips.is_empty() {
            let first = dataset.skipped.first().map_or_else(String::new, |line| format!("; {line}"));
            return Err(Error::file(folder, format!("none of its clips can be used{first}")));
        }
        Ok(dataset)
    }

    /// How far given mels are from those of the sounds, if any are given.
    pub fn remark_on_mels(&self) -> Option<String> {
        let distances: Vec<(f32, &str)> =
            self.clips.iter().filter_map(|clip| Some((clip.mel_distance?, clip.name.as_str()))).collect();
        let (most, worst) = distances.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0))?;
        let mean = distances.iter().map(|(distance, _)| distance).sum::<f32>() / distances.len() as f32;
        let doubt =
            if mean > FAR { "; are they of these clips, and as the voice expects (--mel-convention)?" } else { "" };
        Some(format!(
            "the given mels are {mean:.2} nats from those of the sounds on average, {most:.2} at most ({worst}){doubt}"
        ))
    }

    /// The clips that `held_out` doesn't accept, and those that it does.
    pub fn split(self, held_out: impl Fn(&str) -> bool) -> (Vec<Clip>, Vec<Clip>) {
        self.clips.into_iter().partition(|clip| !held_out(&clip.name))
    }
}

/// An error and its causes on one line.
fn chain(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

impl Clip {
    /// Reads a clip; true if it was resampled.
    fn read(name: &str, path: &Path, config: &MelConfig, mels: Option<&MelFiles>) -> Result<(Self, bool)> {
        let sound = audio::decode::read(path)?;
        let resampled = sound.sample_rate != config.sample_rate;
        let samples = if resampled {
            audio::resample::resample(&sound.samples, sound.sample_rate, config.sample_rate)?
        } else {
            sound.samples
        };
        let clip = match mels {
            None => Self::new(name, &samples, config)?,
            Some(mels) => {
                let paired = mels.of(name, &samples)?;
                Self::paired(name, &samples, paired, config)?
            }
        };
        Ok((clip, resampled))
    }

    /// A clip with a given mel: that part of its samples that the mel is of.
    fn paired(name: &str, samples: &[f32], paired: Paired, config: &MelConfig) -> Result<Self> {
        let samples: Vec<f32> = samples[paired.samples].iter().map(|x| x * paired.gain).collect();
        let own = Self::new(name, &samples, config)?;
        let frames = own.mel.frames().min(paired.mel.frames());
        let pairs = (0..config.n_mels).flat_map(|b| own.mel.band(b)[..frames].iter().zip(paired.mel.band(b)));
        let distance = pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() / (frames * config.n_mels) as f32;
        Ok(Self { mel: paired.mel, mel_distance: Some(distance), ..own })
    }

    /// A clip from samples in ±1, rounded to 16 bits.
    ///
    /// # Errors
    /// If it is shorter than a hop or the mel can't be made.
    pub fn new(name: &str, samples: &[f32], config: &MelConfig) -> Result<Self> {
        if samples.len() < config.hop_length {
            return Err(Error::invalid(format!("only {} samples", samples.len())));
        }
        // `as` saturates: full scale 1.0 becomes 32767
        let samples: Arc<[i16]> = samples.iter().map(|x| (x * 32_768.0).round() as i16).collect();
        let clean: Vec<f32> = samples.iter().map(|&x| f32::from(x) / 32_768.0).collect();
        let mel = mel::extract::extract(&clean, config)?;
        let detail = Detail::of(&mel, config);
        Ok(Self { name: name.to_string(), mel, mel_distance: None, detail, samples, whitened: OnceLock::new() })
    }

    /// The clip without its first `shift` samples.
    ///
    /// # Errors
    /// If less than a hop would be left.
    pub fn shifted(&self, shift: usize, config: &MelConfig) -> Result<Self> {
        Self::new(&self.name, self.samples().get(shift..).unwrap_or_default(), config)
    }

    /// The clip as it would be at another speed and level and of another colour: copy `copy` of it, the
    /// same one each time, whatever the run's seed.
    ///
    /// # Errors
    /// If less than a hop would be left.
    pub fn varied(&self, copy: usize, variety: &Variety, config: &MelConfig) -> Result<Self> {
        let mut rng = named_rng(copy as u64, &self.name);
        let mut within = |bound: f64| bound * (2.0 * f64::from(uniform(&mut rng)) - 1.0);
        let speed = within(variety.speed.ln()).exp();
        let (colour, level) = (within(variety.colour) as f32, 10_f64.powf(within(variety.level_db) / 20.0) as f32);
        // of the rates that have a common divisor with the clip's: cheap to convert
        let step = f64::from((config.sample_rate / SPEEDS).max(1));
        let rate = ((f64::from(config.sample_rate) * speed / step).round() * step) as u32;
        let own = self.samples();
        let mut samples = audio::resample::resample(&own, rate, config.sample_rate)?;
        let mut before = 0.0;
        for x in &mut samples {
            let now = *x;
            *x = now + colour * before;
            before = now;
        }
        let peak = |x: &[f32]| x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
        // coloured, as loud as before
        let loudest = peak(&samples).max(1e-9);
        let gain = (level * peak(&own) / loudest).min(0.99 / loudest);
        samples.iter_mut().for_each(|x| *x *= gain);
        Self::new(&self.name, &samples, config)
    }

    /// The clip with a mel smoothed as an acoustic model's, towards means over bands or of `classes`: copy `copy` of it,
    /// the same one each time, whatever the run's seed.
    pub fn smoothed(&self, copy: usize, smooth: &SmoothMels, classes: Option<&Classes>) -> Self {
        let mut rng = named_rng(copy as u64, &self.name);
        let mut up_to = |bound: f64| bound as f32 * uniform(&mut rng);
        let smoothing = Smoothing { bands: up_to(smooth.bands), frames: up_to(smooth.frames), part: up_to(1.0) };
        let mel = match classes {
            Some(classes) => Smoothing { bands: 0.0, ..smoothing }.towards(&self.mel, &classes.mean(&self.mel)),
            None => smoothing.of(&self.mel),
        };
        Self {
            name: self.name.clone(),
            mel,
            mel_distance: None,
            detail: self.detail,
            samples: self.samples.clone(),
            whitened: OnceLock::new(),
        }
    }

    /// Whole frames of sound: the mel's frames without the one that is centred on or after the end.
    pub fn frames(&self, hop: usize) -> usize {
        self.samples.len() / hop
    }

    /// The samples without noise, in ±1.
    pub fn samples(&self) -> Vec<f32> {
        self.samples.iter().map(|&x| f32::from(x) / 32_768.0).collect()
    }

    /// Samples with uniform noise of one quantisation step, a function of the clip's name alone:
    /// the likelihood is then that of the 16-bit sound (Theis et al. 2016, §3.1).
    pub fn dequantised(&self) -> Vec<f32> {
        self.dequantised_at(0..self.samples.len())
    }

    /// A part of [`Clip::dequantised`].
    fn dequantised_at(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        let mut rng = named_rng(0, &self.name);
        // a word for each sample
        rng.set_word_pos(range.start as u128);
        self.samples[range].iter().map(|&x| (f32::from(x) + uniform(&mut rng) - 0.5) / 32_768.0).collect()
    }

    /// The clip whitened by the flow's front; computed once.
    ///
    /// # Errors
    /// If the front fails or the residual isn't finite.
    pub fn whitened(&self, flow: &Flow, hop: usize) -> Result<&Whitened> {
        if let Some(whitened) = self.whitened.get() {
            return Ok(whitened);
        }
        let whitened = self.whiten(flow, hop)?;
        Ok(self.whitened.get_or_init(|| whitened))
    }

    /// The clip whitened by the flow's front as it is now.
    ///
    /// # Errors
    /// As [`Clip::whitened`].
    pub fn whiten(&self, flow: &Flow, hop: usize) -> Result<Whitened> {
        let (mut residual, log_det) = flow.whiten(&self.dequantised(), &self.mel)?;
        residual.truncate(self.frames(hop) * hop);
        if !residual.iter().all(|e| e.is_finite()) {
            return Err(Error::invalid(format!("clip {}: its whitened residual is not finite", self.name)));
        }
        let log_det = log_det[..residual.len()].chunks(hop).map(|hop| hop.iter().sum()).collect();
        Ok(Whitened { residual, log_det })
    }

    /// `frames` frames from `start`, with what the whitening's filters reach before them.
    fn segment(&self, flow: &Flow, hop: usize, start: usize, frames: usize) -> Segment<'_> {
        let from = (start * hop).saturating_sub(flow.whitening_memory());
        Segment { mel: &self.mel, start, samples: self.dequantised_at(from..(start + frames) * hop) }
    }
}

/// A number of clips in words.
pub fn count(clips: usize) -> String {
    format!("{clips} clip{}", if clips == 1 { "" } else { "s" })
}

/// Names of the clips of segments.
pub fn names(places: &[(&Clip, usize)]) -> Vec<String> {
    places.iter().map(|(clip, _)| clip.name.clone()).collect()
}

/// Random frame-aligned segments, each position of each clip equally likely.
pub struct Sampler<'a> {
    clips: Vec<&'a Clip>,
    /// Positions in all clips up to and with each.
    ends: Vec<u64>,
    frames: usize,
    hop: usize,
    /// Whether segments are whitened when drawn.
    anew: bool,
}

impl<'a> Sampler<'a> {
    /// A sampler of the recipe's segments; clips that are shorter are left out.
    ///
    /// # Errors
    /// If all are shorter.
    pub fn new(clips: &'a [Clip], recipe: &Recipe) -> Result<Self> {
        let (hop, anew) = (recipe.mel.hop_length, recipe.whitens_anew());
        let frames = recipe.training.segment_samples / hop;
        let clips: Vec<_> = clips.iter().filter(|clip| clip.frames(hop) >= frames).collect();
        let mut total = 0;
        let ends: Vec<u64> = clips
            .iter()
            .map(|clip| {
                total += (clip.frames(hop) - frames + 1) as u64;
                total
            })
            .collect();
        if total == 0 {
            return Err(Error::invalid(format!("no training clip has {} samples, one segment", frames * hop)));
        }
        Ok(Self { clips, ends, frames, hop, anew })
    }

    /// Clips that are long enough.
    pub fn clips(&self) -> usize {
        self.clips.len()
    }

    /// Positions that segments are drawn from.
    pub fn positions(&self) -> u64 {
        self.ends[self.ends.len() - 1]
    }

    /// Samples of a segment.
    pub fn samples(&self) -> usize {
        self.frames * self.hop
    }

    /// Where `batch` segments begin: clip and frame; takes two words of `rng` for each.
    pub fn places(&self, batch: usize, rng: &mut ChaCha8Rng) -> Vec<(&'a Clip, usize)> {
        let total = self.positions();
        (0..batch)
            .map(|_| {
                let position = rng.next_u64() % total;
                let clip = self.ends.partition_point(|&end| end <= position);
                let before = if clip == 0 { 0 } else { self.ends[clip - 1] };
                (self.clips[clip], (position - before) as usize)
            })
            .collect()
    }

    /// The mel windows of segments for a flow, `[batch, n_mels, left + frames + right]`.
    ///
    /// # Errors
    /// If the flow expects another number of bands.
    pub fn mels(&self, flow: &Flow, places: &[(&Clip, usize)], device: &Device) -> Result<Tensor> {
        let windows: Vec<Tensor> = places
            .iter()
            .map(|(clip, start)| flow.mel_window(&clip.mel, *start, self.frames))
            .collect::<Result<_>>()?;
        Ok(Tensor::cat(&windows, 0)?.to_device(device)?)
    }

    /// `batch` segments at [`Sampler::places`].
    ///
    /// # Errors
    /// As [`Sampler::segments`].
    pub fn draw(&self, flow: &Flow, batch: usize, rng: &mut ChaCha8Rng, device: &Device) -> Result<Batch> {
        self.segments(flow, &self.places(batch, rng), device)
    }

    /// The segments at [`Sampler::places`].
    ///
    /// # Errors
    /// If a clip can't be whitened.
    pub fn segments(&self, flow: &Flow, places: &[(&Clip, usize)], device: &Device) -> Result<Batch> {
        let (x, whitening_log_det) = if self.anew {
            let segments: Vec<Segment> =
                places.par_iter().map(|(clip, start)| clip.segment(flow, self.hop, *start, self.frames)).collect();
            flow.whiten_segments(&segments, self.frames)?
        } else {
            self.whitened(flow, places, device)?
        };
        Ok(Batch { x, mel: self.mels(flow, places, device)?, whitening_log_det })
    }

    /// Level of the whitened residual by some recordings, evenly spread, none of their copies: root mean square, the median
    /// of hops.
    ///
    /// # Errors
    /// As [`Clip::whitened`].
    pub fn residual_level(&self, flow: &Flow) -> Result<f32> {
        // of each name the first is the recording itself
        let mut names = HashSet::new();
        let recordings: Vec<&Clip> = self.clips.iter().copied().filter(|clip| names.insert(&clip.name)).collect();
        let stride = recordings.len().div_ceil(LEVEL_CLIPS);
        let powers = |clip: &Clip| -> Result<Vec<f32>> {
            let residual = clip.whiten(flow, self.hop)?.residual;
            Ok(residual.chunks(self.hop).map(|hop| hop.iter().map(|e| e * e).sum()).collect())
        };
        let powers: Vec<Vec<f32>> = recordings.into_par_iter().step_by(stride).map(powers).collect::<Result<_>>()?;
        let mut powers = powers.concat();
        powers.sort_by(f32::total_cmp);
        let median = (powers[powers.len() / 2] / self.hop as f32).sqrt();
        // to thousandths, and above 0: short in a file
        Ok((1000.0 * median).ceil() / 1000.0)
    }

    /// Segments out of the whitened clips, `[batch, 1, samples]`, and their log-determinants, `[batch]`.
    fn whitened(&self, flow: &Flow, places: &[(&Clip, usize)], device: &Device) -> Result<(Tensor, Tensor)> {
        let whitened: Vec<&Whitened> =
            places.par_iter().map(|(clip, _)| clip.whitened(flow, self.hop)).collect::<Result<_>>()?;
        let (batch, samples) = (places.len(), self.frames * self.hop);
        let mut x = Vec::with_capacity(batch * samples);
        let mut log_det = Vec::with_capacity(batch);
        for ((_, start), whitened) in places.iter().zip(whitened) {
            x.extend_from_slice(&whitened.residual[start * self.hop..][..samples]);
            let hops = &whitened.log_det[*start..][..self.frames];
            log_det.push(hops.iter().map(|&v| f64::from(v)).sum::<f64>() as f32);
        }
        Ok((Tensor::from_vec(x, (batch, 1, samples), device)?, Tensor::from_vec(log_det, batch, device)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frequency of a tone by its upward crossings of zero, Hz, and its peak.
    fn tone(samples: &[f32], rate: u32) -> (f64, f32) {
        let crossings: Vec<usize> = (1..samples.len()).filter(|&i| samples[i - 1] < 0.0 && samples[i] >= 0.0).collect();
        let span = (crossings[crossings.len() - 1] - crossings[0]) as f64;
        let peak = samples.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
        ((crossings.len() - 1) as f64 * f64::from(rate) / span, peak)
    }

    #[test]
    fn varied_clips_stray_within_their_bounds() {
        let mel = Recipe::open("tiny").unwrap().mel;
        let rate = mel.sample_rate;
        let sound: Vec<f32> = (0..rate).map(|i| 0.3 * (i as f32 * 0.1).sin()).collect();
        let clip = Clip::new("tone", &sound, &mel).unwrap();
        let (pitch, peak) = tone(&clip.samples(), rate);
        let variety = Variety { copies: 12, speed: 1.3, level_db: 12.0, colour: 0.5 };
        let (mut speeds, mut levels) = (Vec::new(), Vec::new());
        for copy in 0..variety.copies {
            let varied = clip.varied(copy, &variety, &mel).unwrap();
            let again = clip.varied(copy, &variety, &mel).unwrap();
            assert_eq!((&varied.samples, &varied.mel), (&again.samples, &again.mel));
            let (now, level) = tone(&varied.samples(), rate);
            let speed = now / pitch;
            // as much shorter as faster
            let length = clip.samples.len() as f64 / varied.samples.len() as f64;
            assert!((speed / length - 1.0).abs() < 0.01, "{speed} {length}");
            speeds.push(speed);
            levels.push(20.0 * f64::from(level / peak).log10());
        }
        let ends = |values: &[f64]| {
            (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(f64::MIN, f64::max))
        };
        let ((slow, fast), (soft, loud)) = (ends(&speeds), ends(&levels));
        assert!((0.75..0.95).contains(&slow) && (1.05..1.32).contains(&fast), "{speeds:?}");
        assert!((-12.2..-2.0).contains(&soft) && (2.0..10.6).contains(&loud), "{levels:?}");
    }

    /// Decibels of what changes from sample to sample against what doesn't.
    fn tilt(samples: &[f32]) -> f64 {
        let power = |sign: f32| samples.windows(2).map(|x| f64::from(x[1] + sign * x[0]).powi(2)).sum::<f64>();
        10.0 * (power(-1.0) / power(1.0)).log10()
    }

    #[test]
    fn varied_clips_are_coloured() {
        let mel = Recipe::open("tiny").unwrap().mel;
        let mut rng = named_rng(1, "noise");
        let sound: Vec<f32> = (0..mel.sample_rate).map(|_| 0.5 * uniform(&mut rng) - 0.25).collect();
        let clip = Clip::new("noise", &sound, &mel).unwrap();
        let tilts = |colour| -> Vec<f64> {
            let variety = Variety { copies: 12, speed: 1.0, level_db: 0.0, colour };
            (0..12).map(|copy| tilt(&clip.varied(copy, &variety, &mel).unwrap().samples())).collect()
        };
        assert!(tilts(0.0).iter().all(|tilt| tilt.abs() < 0.3));
        // of white noise through 1 + a/z: 10 log10 ((1 - a + a²) / (1 + a + a²))
        let most = 10.0 * (0.75_f64 / 1.75).log10().abs() + 0.3;
        let tilts = tilts(0.5);
        assert!(tilts.iter().all(|tilt| tilt.abs() < most), "{tilts:?}");
        assert!(tilts.iter().any(|&tilt| tilt > 1.0) && tilts.iter().any(|&tilt| tilt < -1.0), "{tilts:?}");
    }

    #[test]
    fn a_variety_of_nothing_is_the_clip() {
        let mel = Recipe::open("tiny").unwrap().mel;
        let sound: Vec<f32> = (0..9999).map(|i| 0.3 * (i as f32 * 0.1).sin()).collect();
        let clip = Clip::new("tone", &sound, &mel).unwrap();
        let varied = clip.varied(1, &Variety { copies: 1, speed: 1.0, level_db: 0.0, colour: 0.0 }, &mel).unwrap();
        assert_eq!(varied.samples, clip.samples);
    }

    #[test]
    fn smoothed_clips_lack_detail_and_keep_their_sound() {
        let mel = Recipe::open("tiny").unwrap().mel;
        let mut rng = named_rng(1, "noise");
        let sound: Vec<f32> = (0..mel.sample_rate).map(|_| 0.5 * uniform(&mut rng) - 0.25).collect();
        let clip = Clip::new("noise", &sound, &mel).unwrap();
        let detail = |mel_of: &MelSpectrogram| f64::from(Detail::of(mel_of, &mel).mean().unwrap());
        let smooth = SmoothMels { copies: 24, bands: 2.0, frames: 3.0, classes: 0 };
        let copies: Vec<Clip> = (0..smooth.copies).map(|copy| clip.smoothed(copy, &smooth, None)).collect();
        let left: Vec<f64> = copies.iter().map(|copy| detail(&copy.mel) / detail(&clip.mel)).collect();
        // from next to all of it to little
        assert!(left.iter().all(|left| *left < 1.0), "{left:?}");
        assert!(left.iter().any(|left| *left > 0.8) && left.iter().any(|left| *left < 0.3), "{left:?}");
        for (turn, copy) in copies.iter().enumerate() {
            assert_eq!(copy.mel, clip.smoothed(turn, &smooth, None).mel);
            assert_eq!((&copy.samples, copy.detail), (&clip.samples, clip.detail));
            assert_eq!(copy.dequantised(), clip.dequantised());
        }
        let none = clip.smoothed(0, &SmoothMels { copies: 1, bands: 0.0, frames: 0.0, classes: 0 }, None);
        assert_eq!(none.mel, clip.mel);
    }
}

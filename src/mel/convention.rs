//! Mel conventions of other programs: how each makes a mel, and the exact way to what a voice expects.
//!
//! Where the bands are the same, what remains between two conventions is a function of one value
//! (another logarithm, a normalised range, mean and variance), half a frame of time, or the order of
//! the axes: all of it can be undone. Other bands, another window or hop, or squares summed inside a
//! band can't; such mels must be made from the sound again.

use super::diagnosis::{Finding, diagnose};
use super::file::Layout;
use super::filterbank::mel_filterbank;
use super::stats::MelStats;
use super::{MelConfig, MelScale, MelSpectrogram};
use crate::{Error, Result};
use std::f64::consts::LN_10;
use std::ops::Range;

/// How a program makes mels from sound.
#[derive(Clone, Debug, PartialEq)]
pub struct Convention {
    /// Name on the command line.
    pub name: &'static str,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// Who writes such mels.
    pub about: &'static str,
    /// Where the program does it.
    pub source: &'static str,
    /// Transform, bands and floor. The floor is of the sum in a band, a power where `spectrum` is.
    pub mel: MelConfig,
    /// Where the first frame lies, and how many there are.
    pub framing: Framing,
    /// What lies beyond the ends of the sound.
    pub padding: Padding,
    /// What of the spectrum is summed in the bands.
    pub spectrum: Spectrum,
    /// From the sum in a band to the stored value.
    pub encoding: Encoding,
    /// The sound is scaled to this peak first.
    pub peak: Option<f32>,
    /// `y[n] = x[n] − k·x[n−1]` comes before all else.
    pub preemphasis: Option<f32>,
    /// Stored as `[frames, n_mels]`.
    pub frames_first: bool,
}

/// Where the frames of a sound of `N` samples lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Frame `f` is centred on sample `f · hop`; `1 + ⌊N / hop⌋` frames.
    Centred,
    /// Frame `f` is centred between `f · hop` and the next: `(n_fft − hop) / 2` samples are put in
    /// front; `⌊N / hop⌋` frames.
    Between,
    /// As [`Between`](Self::Between) after the sound, in the middle, was filled up to whole hops;
    /// `⌈N / hop⌉` frames.
    WholeHops,
    /// Centred, but a sound shorter than 64 frames lies in the middle of that many.
    Least64,
}

/// What lies beyond the ends of the sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// The sound, mirrored at its first and last sample.
    Reflect,
    /// Silence.
    Zero,
}

/// What of a spectrum `X` is summed in the bands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spectrum {
    /// `√(|X|² + epsilon)`.
    Magnitude {
        /// Added under the root.
        epsilon: f64,
    },
    /// `|X|²`.
    Power,
}

/// From a band's sum to the stored value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Encoding {
    /// `gain · ln(max(sum, floor)) + offset`, held within `low` and `high`.
    Log {
        /// 1 for natural logarithms.
        gain: f64,
        /// Added after the gain.
        offset: f64,
        /// Lowest value.
        low: f64,
        /// Highest value.
        high: f64,
    },
    /// The sum as it is.
    Linear,
}

impl Encoding {
    /// Natural logarithms.
    pub const LN: Self = Self::log(1.0, 0.0);
    /// Base-10 logarithms.
    pub const LOG10: Self = Self::log(1.0 / LN_10, 0.0);
    /// Decibels, `20 log10`.
    pub const DB: Self = Self::log(20.0 / LN_10, 0.0);

    const fn log(gain: f64, offset: f64) -> Self {
        Self::Log { gain, offset, low: f64::NEG_INFINITY, high: f64::INFINITY }
    }

    /// Decibels below 20 dB, of which 100 fill `low` to `high`.
    pub const fn range(low: f64, high: f64) -> Self {
        let per_db = (high - low) / 100.0;
        Self::Log { gain: per_db * 20.0 / LN_10, offset: low + per_db * (100.0 - 20.0), low, high }
    }

    /// The stored value of a band's sum.
    pub fn encode(self, sum: f32, floor: f64) -> f32 {
        match self {
            Self::Log { gain, offset, low, high } => {
                let ln = sum.max(floor as f32).ln();
                (gain * f64::from(ln) + offset).clamp(low, high) as f32
            }
            Self::Linear => sum,
        }
    }

    /// The natural logarithm of the sum that a stored value stands for.
    pub fn decode(self, value: f32) -> f32 {
        match self {
            Self::Log { gain, offset, .. } => ((f64::from(value) - offset) / gain) as f32,
            Self::Linear => value.max(f32::MIN_POSITIVE).ln(),
        }
    }
}

/// 22 050 Hz, 1024/256, 80 bands to 8 kHz, floor 1e-5: what most of them share.
const NVIDIA_MEL: MelConfig = MelConfig::nvidia();
const MAGNITUDE: Spectrum = Spectrum::Magnitude { epsilon: 0.0 };
const NVIDIA: Convention = Convention {
    name: "nvidia",
    aliases: &["tacotron2", "waveglow", "fastpitch"],
    about: "NVIDIA's Tacotron 2, WaveGlow, FastPitch",
    source: "NVIDIA/tacotron2 layers.py, stft.py (Slaney's scale, though the paper says HTK's)",
    mel: NVIDIA_MEL,
    framing: Framing::Centred,
    padding: Padding::Reflect,
    spectrum: MAGNITUDE,
    encoding: Encoding::LN,
    peak: None,
    preemphasis: None,
    frames_first: false,
};
const HIFIGAN: Convention = Convention {
    name: "hifigan",
    aliases: &["bigvgan-22k"],
    about: "HiFi-GAN, BigVGAN at 22 kHz (their training also scales each clip to a peak of 0.95)",
    source: "jik876/hifi-gan meldataset.py",
    framing: Framing::Between,
    spectrum: Spectrum::Magnitude { epsilon: 1e-9 },
    ..NVIDIA
};
const ESPNET: Convention = Convention {
    name: "espnet",
    aliases: &["pwg", "parallelwavegan"],
    about: "ESPnet and ParallelWaveGAN at 22 kHz, before mean-variance normalisation",
    source: "kan-bayashi/ParallelWaveGAN bin/preprocess.py",
    mel: MelConfig { f_min: 80.0, f_max: 7600.0, floor: 1e-10, ..NVIDIA_MEL },
    encoding: Encoding::LOG10,
    frames_first: true,
    ..NVIDIA
};

/// All conventions of other programs.
pub const CONVENTIONS: [Convention; 17] = [
    NVIDIA,
    Convention {
        name: "squeezewave",
        aliases: &[],
        about: "SqueezeWave: as nvidia from 0.78 s on; a shorter sound is mirrored to 64 frames",
        source: "tianrengao/SqueezeWave stft.py",
        framing: Framing::Least64,
        ..NVIDIA
    },
    HIFIGAN,
    Convention {
        name: "bigvgan-24k",
        aliases: &[],
        about: "BigVGAN at 24 kHz, 100 bands",
        source: "NVIDIA/BigVGAN configs/bigvgan_24khz_100band.json",
        mel: MelConfig { sample_rate: 24_000, n_mels: 100, f_max: 12_000.0, ..NVIDIA_MEL },
        ..HIFIGAN
    },
    Convention {
        name: "bigvgan-44k",
        aliases: &[],
        about: "BigVGAN v2 at 44 kHz, 128 bands",
        source: "NVIDIA/BigVGAN configs/bigvgan_v2_44khz_128band_512x.json",
        mel: MelConfig {
            sample_rate: 44_100,
            n_fft: 2048,
            win_length: 2048,
            hop_length: 512,
            n_mels: 128,
            f_max: 22_050.0,
            ..NVIDIA_MEL
        },
        ..HIFIGAN
    },
    Convention {
        name: "matcha",
        aliases: &[],
        about: "Matcha-TTS inside: hifigan, less LJSpeech's mean, by its deviation",
        source: "shivammehta25/Matcha-TTS configs/data/ljspeech.yaml",
        encoding: Encoding::log(1.0 / 2.116101, 5.536622 / 2.116101),
        ..HIFIGAN
    },
    Convention {
        name: "vits",
        aliases: &["piper"],
        about: "VITS, Piper: as hifigan with a higher floor, about ln 4.6e-5",
        source: "jaywalnut310/vits mel_processing.py",
        spectrum: Spectrum::Magnitude { epsilon: 1e-6 },
        ..HIFIGAN
    },
    Convention {
        name: "parakeet",
        aliases: &["parakeet-waveflow"],
        about: "Parakeet's WaveFlow",
        source: "PaddlePaddle/Parakeet examples/waveflow/preprocess.py",
        framing: Framing::WholeHops,
        peak: Some(0.999),
        ..NVIDIA
    },
    ESPNET,
    Convention {
        name: "espnet-24k",
        aliases: &["pwg-24k"],
        about: "ESPnet and ParallelWaveGAN at 24 kHz, before mean-variance normalisation",
        mel: MelConfig { sample_rate: 24_000, n_fft: 2048, win_length: 1200, hop_length: 300, ..ESPNET.mel },
        ..ESPNET
    },
    Convention {
        name: "r9y9",
        aliases: &["wavenet_vocoder"],
        about: "r9y9's wavenet_vocoder",
        source: "r9y9/wavenet_vocoder audio.py",
        mel: MelConfig { f_min: 125.0, ..ESPNET.mel },
        ..ESPNET
    },
    Convention {
        name: "rayhane",
        aliases: &[],
        about: "Rayhane Mama's Tacotron-2: powers of pre-emphasised sound in decibels, -4 to 4",
        source: "Rayhane-mamah/Tacotron-2 datasets/audio.py, hparams.py",
        mel: MelConfig { n_fft: 2048, win_length: 1100, hop_length: 275, f_min: 55.0, f_max: 7600.0, ..NVIDIA_MEL },
        padding: Padding::Zero,
        spectrum: Spectrum::Power,
        encoding: Encoding::range(-4.0, 4.0),
        peak: Some(0.999),
        preemphasis: Some(0.97),
        frames_first: true,
        ..NVIDIA
    },
    Convention {
        name: "flowavenet",
        aliases: &[],
        about: "FloWaveNet: powers in decibels, 0 to 1",
        source: "ksw0306/FloWaveNet preprocessing.py",
        mel: MelConfig { f_min: 125.0, f_max: 7600.0, floor: 1e-4, ..NVIDIA_MEL },
        spectrum: Spectrum::Power,
        encoding: Encoding::range(0.0, 1.0),
        peak: Some(0.999),
        frames_first: true,
        ..NVIDIA
    },
    Convention {
        name: "coqui",
        aliases: &[],
        about: "Coqui TTS by default: decibels, -4 to 4",
        source: "coqui-ai/TTS config/shared_configs.py BaseAudioConfig, utils/audio/processor.py",
        mel: MelConfig { f_max: 11_025.0, floor: 1e-8, ..NVIDIA_MEL },
        encoding: Encoding::range(-4.0, 4.0),
        ..NVIDIA
    },
    Convention {
        name: "vocos-24k",
        aliases: &["vocos"],
        about: "Vocos at 24 kHz, 100 bands on HTK's scale",
        source: "gemelo-ai/vocos feature_extractors.py",
        mel: MelConfig {
            sample_rate: 24_000,
            n_mels: 100,
            f_max: 12_000.0,
            scale: MelScale::Htk,
            floor: 1e-7,
            ..NVIDIA_MEL
        },
        ..NVIDIA
    },
    Convention {
        name: "torchaudio",
        aliases: &[],
        about: "torchaudio's MelSpectrogram by default: powers, no logarithm",
        source: "torchaudio.transforms.MelSpectrogram",
        mel: MelConfig {
            sample_rate: 16_000,
            n_fft: 400,
            win_length: 400,
            hop_length: 200,
            n_mels: 128,
            scale: MelScale::Htk,
            ..NVIDIA_MEL
        },
        spectrum: Spectrum::Power,
        encoding: Encoding::Linear,
        ..NVIDIA
    },
    Convention {
        name: "librosa",
        aliases: &[],
        about: "librosa's melspectrogram by default: powers, no logarithm",
        source: "librosa.feature.melspectrogram",
        mel: MelConfig { n_fft: 2048, win_length: 2048, hop_length: 512, n_mels: 128, f_max: 11_025.0, ..NVIDIA_MEL },
        padding: Padding::Zero,
        spectrum: Spectrum::Power,
        encoding: Encoding::Linear,
        ..NVIDIA
    },
];

/// Names of the conventions that follow a voice: its own, and the same magnitudes written otherwise.
const OF_VOICE: [(&str, &str, Encoding); 4] = [
    ("voice", "what the voice expects: natural logarithms", Encoding::LN),
    ("log10", "what the voice expects, as base-10 logarithms", Encoding::LOG10),
    ("db", "what the voice expects, as decibels (20 log10)", Encoding::DB),
    ("linear", "what the voice expects, without the logarithm", Encoding::Linear),
];

/// All names, each with its other names and what it is.
pub fn names() -> impl Iterator<Item = (&'static str, &'static [&'static str], &'static str)> {
    let of_voice = OF_VOICE.iter().map(|&(name, about, _)| (name, &[][..], about));
    of_voice.chain(CONVENTIONS.iter().map(|c| (c.name, c.aliases, c.about)))
}

impl Convention {
    /// A voice's own convention.
    pub fn of_voice(mel: &MelConfig) -> Self {
        let (name, about, _) = OF_VOICE[0];
        Self { name, aliases: &[], about, source: "the voice's config.json", mel: mel.clone(), ..NVIDIA }
    }

    /// The name by which values of a voice's magnitudes in another encoding are read.
    pub fn name_of(encoding: Encoding) -> Option<&'static str> {
        OF_VOICE.iter().find(|(.., known)| *known == encoding).map(|&(name, ..)| name)
    }

    /// The convention of a name; `voice` is what names like `log10` refer to.
    ///
    /// # Errors
    /// If there is no such name.
    pub fn named(name: &str, voice: &MelConfig) -> Result<Self> {
        if let Some(&(name, about, encoding)) = OF_VOICE.iter().find(|(known, ..)| *known == name) {
            return Ok(Self { name, about, encoding, ..Self::of_voice(voice) });
        }
        let found = CONVENTIONS.iter().find(|c| c.name == name || c.aliases.contains(&name));
        found.cloned().ok_or_else(|| {
            let known: Vec<_> = names().map(|(name, ..)| name).collect();
            Error::invalid(format!("no mel convention {name}, expected one of {}", known.join(", ")))
        })
    }

    /// The convention of a name, or without one the voice's own.
    ///
    /// # Errors
    /// As [`Convention::named`].
    pub fn chosen(name: Option<&str>, voice: &MelConfig) -> Result<Self> {
        name.map_or_else(|| Ok(Self::of_voice(voice)), |name| Self::named(name, voice))
    }

    /// How its mels lie in files; `transpose` where it is said that frames come first.
    pub fn layout(&self, transpose: bool) -> Layout {
        Layout { n_mels: self.mel.n_mels, transpose: transpose || self.frames_first }
    }

    /// The sample that frame 0 starts at (minus the window's lead), and the number of frames, of a
    /// sound of `samples` samples.
    pub(crate) fn frames(&self, samples: usize) -> (isize, usize) {
        let MelConfig { n_fft, hop_length: hop, .. } = self.mel;
        let centred = (n_fft / 2, 1 + samples / hop);
        let (lead, frames) = match self.framing {
            Framing::Centred => centred,
            Framing::Between => ((n_fft - hop) / 2, (samples / hop).max(1)),
            Framing::WholeHops => {
                let frames = samples.div_ceil(hop);
                ((frames * hop + n_fft - hop - samples) / 2, frames)
            }
            Framing::Least64 => match (63 * hop + n_fft).checked_sub(samples) {
                Some(missing) => (missing / 2, 1 + (samples + missing / 2 * 2 - n_fft) / hop),
                None => centred,
            },
        };
        (-(lead as isize), frames)
    }

    /// What samples are multiplied by first.
    pub(crate) fn gain(&self, samples: &[f32]) -> f32 {
        let loudest = samples.iter().fold(0.0f32, |loudest, x| loudest.max(x.abs()));
        match self.peak {
            Some(peak) if loudest > 0.0 => peak / loudest,
            _ => 1.0,
        }
    }

    /// The stored value of silence, the least over all bands.
    pub fn silence(&self) -> f32 {
        let root = match self.spectrum {
            Spectrum::Magnitude { epsilon } => epsilon.sqrt(),
            Spectrum::Power => 0.0,
        };
        let bins = self.mel.n_fft / 2 + 1;
        let area = |row: &[f32]| row.iter().sum::<f32>();
        let least = mel_filterbank(&self.mel).chunks_exact(bins).map(area).fold(f32::INFINITY, f32::min);
        self.encoding.encode((root * f64::from(least)) as f32, self.mel.floor)
    }

    /// What keeps mels of this convention from being turned into a voice's, each as `field is …`.
    fn obstacles(&self, voice: &MelConfig) -> Vec<String> {
        let (mine, mut obstacles) = (&self.mel, Vec::new());
        let mut compare = |field: &str, mine: f64, voice: f64| {
            if mine != voice {
                obstacles.push(format!("{field} is {mine} (voice: {voice})"));
            }
        };
        compare("sample_rate", mine.sample_rate.into(), voice.sample_rate.into());
        compare("n_fft", mine.n_fft as f64, voice.n_fft as f64);
        compare("win_length", mine.win_length as f64, voice.win_length as f64);
        compare("hop_length", mine.hop_length as f64, voice.hop_length as f64);
        compare("n_mels", mine.n_mels as f64, voice.n_mels as f64);
        compare("f_min", mine.f_min, voice.f_min);
        compare("f_max", mine.f_max, voice.f_max);
        if mine.scale != voice.scale {
            obstacles.push(format!("scale is {:?}'s (voice: {:?}'s)", mine.scale, voice.scale));
        }
        if self.spectrum == Spectrum::Power {
            obstacles.push("powers, not magnitudes, are summed in the bands".into());
        }
        if let Some(k) = self.preemphasis {
            obstacles.push(format!("the sound is pre-emphasised by {k}"));
        }
        obstacles
    }

    /// The way from this convention's values to a voice's; `stats` are those the values were
    /// normalised with.
    ///
    /// # Errors
    /// If there is no exact way: says why, and what to do.
    pub fn decoder(&self, voice: &MelConfig, stats: Option<MelStats>) -> Result<Decoder> {
        let obstacles = self.obstacles(voice);
        if !obstacles.is_empty() {
            return Err(Error::invalid(format!(
                "mels of convention {} can't be turned into the voice's exactly: {}; \
                 make them from the sound again with \"melglow mel\"",
                self.name,
                obstacles.join(", ")
            )));
        }
        if let Some(stats) = &stats {
            stats.check(voice.n_mels)?;
        }
        let early = match self.framing {
            Framing::Centred | Framing::Least64 => 0,
            Framing::Between | Framing::WholeHops => voice.hop_length / 2,
        };
        Ok(Decoder { encoding: self.encoding, stats, voice: voice.clone(), early })
    }

    /// A mel of this convention as natural logarithms of its own sums, frame for frame; `stats` are those
    /// it was normalised with.
    ///
    /// # Errors
    /// If the statistics don't fit or a result isn't finite.
    pub fn logs(&self, mel: &MelSpectrogram, stats: Option<MelStats>) -> Result<MelSpectrogram> {
        Decoder { encoding: self.encoding, stats, voice: self.mel.clone(), early: 0 }.map(mel)
    }
}

/// The way from one convention's values to what a voice expects.
#[derive(Clone, Debug)]
pub struct Decoder {
    encoding: Encoding,
    stats: Option<MelStats>,
    voice: MelConfig,
    /// How many samples the voice's sound would come too early.
    early: usize,
}

/// A mel as the voice expects it, and which part of its sound is meant.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// Natural logarithms, frames centred on multiples of the hop.
    pub mel: MelSpectrogram,
    /// The samples of the mel's sound that belong to the given frames: whole hops, as many as there
    /// were frames.
    pub samples: Range<usize>,
    /// What the mel looks like, if it plainly isn't what the voice was trained on.
    pub strange: Option<Finding>,
}

impl Decoder {
    /// Turns a mel `[n_mels, frames]` into the voice's; values under the voice's floor are raised to it.
    ///
    /// Frames that are centred half a hop later than the voice's get one more in front, a copy of the
    /// first, and the sound is cut to where it belongs: nothing is interpolated.
    ///
    /// # Errors
    /// If the statistics don't fit or a result isn't finite.
    pub fn decode(&self, mel: MelSpectrogram) -> Result<Decoded> {
        let samples = self.early..self.early + mel.frames() * self.voice.hop_length;
        let as_it_is = self.encoding == Encoding::LN && self.stats.is_none() && self.early == 0;
        let mel = if as_it_is { mel } else { self.map(&mel)? };
        let strange = diagnose(&mel, &self.voice)?.into_iter().find(|finding| finding.serious);
        Ok(Decoded { mel: mel.raised(self.voice.silence()), samples, strange })
    }

    fn map(&self, mel: &MelSpectrogram) -> Result<MelSpectrogram> {
        let n_mels = mel.n_mels();
        if let Some(stats) = &self.stats {
            stats.check(n_mels)?;
        }
        let mut values = Vec::with_capacity(n_mels * (mel.frames() + 1));
        for band in 0..n_mels {
            let row = mel.band(band);
            let (mean, scale) = self.stats.as_ref().map_or((0.0, 1.0), |stats| stats.of(band));
            let decode = |&value: &f32| self.encoding.decode(value * scale + mean);
            if self.early > 0 {
                values.extend(row.first().map(decode));
            }
            values.extend(row.iter().map(decode));
        }
        MelSpectrogram::new(values, n_mels)
    }
}

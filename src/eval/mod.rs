//! How a voice sounds, in figures: its speech from recordings' mels beside the recordings.
//!
//! Every figure says what it can't: `None` where it isn't defined, such as the pitch of silence.

pub mod griffin_lim;
pub mod pitch;
pub mod report;
pub mod spectral;
pub mod tone;

use crate::flow::bits_per_sample;
use crate::mel::extract::Extractor;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::statistics::Mean;
use crate::train::evaluate::unless_overflowed;
use crate::{Error, Result};
use pitch::{Kind, Track};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tone::Line;

/// A pitch is grossly wrong from this ratio on.
const GROSS: f32 = 0.2;

/// A figure: what it is called and how it is written.
pub struct Metric {
    /// Its key in JSON.
    pub key: &'static str,
    /// Its heading, with the unit.
    pub title: &'static str,
    /// Digits after the point.
    pub digits: usize,
    /// What it is, in a sentence.
    pub meaning: &'static str,
}

/// The figures of a sound beside its recording, in the order of [`Scores`]; of all lower is better.
pub const METRICS: [Metric; 10] = [
    Metric { key: "mel_l1", title: "mel L1", digits: 3, meaning: "mean absolute difference of the log-mels, nats" },
    Metric {
        key: "mcd_db",
        title: "MCD dB",
        digits: 2,
        meaning: "mel-cepstral distortion, coefficients 1 to 13, where the recording isn't silent (Kubichek 1993)",
    },
    Metric {
        key: "stft_convergence",
        title: "STFT SC",
        digits: 3,
        meaning: "spectral convergence, mean of three resolutions (Parallel WaveGAN)",
    },
    Metric {
        key: "stft_log",
        title: "STFT log",
        digits: 3,
        meaning: "mean absolute difference of log magnitudes, nats, mean of the same resolutions",
    },
    Metric {
        key: "high_db",
        title: "high dB",
        digits: 1,
        meaning: "how far the level of all above the mel's range is from the recording's, dB",
    },
    Metric {
        key: "pitch_cents",
        title: "pitch ct",
        digits: 1,
        meaning: "root mean square pitch error in cents, of hops voiced in both and without gross errors",
    },
    Metric {
        key: "gross_pitch_percent",
        title: "GPE %",
        digits: 1,
        meaning: "gross pitch errors, more than 20 % off, of hops voiced in both",
    },
    Metric { key: "voicing_percent", title: "VDE %", digits: 1, meaning: "voicing decision differs, of all hops" },
    Metric {
        key: "periodicity",
        title: "period.",
        digits: 3,
        meaning: "root mean square error of the periodicity (0 to 1), where the recording isn't silent",
    },
    Metric {
        key: "tone_db",
        title: "tone dB",
        digits: 1,
        meaning: "hum, the worst line at a multiple of the voice's step rate: dB above its neighbourhood, more than in \
                  the recording; 1 to 2 by chance",
    },
];

/// Values of [`METRICS`], `None` where one isn't defined.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores(pub [Option<f64>; METRICS.len()]);

impl Scores {
    /// As a JSON object, undefined values null.
    pub fn to_json(self) -> Value {
        METRICS
            .iter()
            .zip(self.0)
            .map(|(metric, value)| (metric.key.to_string(), json!(value)))
            .collect::<Map<_, _>>()
            .into()
    }
}

/// What there is to know of a sound before it is compared.
pub struct Heard {
    /// The samples, as a file of 16 bits has them.
    pub samples: Vec<f32>,
    /// Log-mel.
    pub mel: MelSpectrogram,
    /// Pitch and voicing of each hop.
    pub track: Track,
    /// Above the mel's range.
    power_above: f64,
    lines: Vec<Line>,
}

/// Listens to sounds of one voice and compares them.
pub struct Judge {
    extractor: Extractor,
    mel: MelConfig,
    group: usize,
}

impl Judge {
    /// For a convention and a flow whose widest step holds `group` samples.
    ///
    /// # Errors
    /// If the convention is out of range.
    pub fn new(mel: &MelConfig, group: usize) -> Result<Self> {
        Ok(Self { extractor: Extractor::new(mel)?, mel: mel.clone(), group })
    }

    /// Listens to samples in ±1.
    ///
    /// # Errors
    /// If there are none or one isn't finite.
    pub fn hear(&self, samples: &[f32]) -> Result<Heard> {
        if let Some(at) = samples.iter().position(|s| !s.is_finite()) {
            return Err(Error::invalid(format!("sample {at} is {}, expected a finite number", samples[at])));
        }
        // `as` saturates, as a file does
        let samples: Vec<f32> = samples.iter().map(|x| f32::from((x * 32_768.0).round() as i16) / 32_768.0).collect();
        Ok(Heard {
            mel: self.extractor.extract(&samples)?,
            power_above: spectral::power_above(&samples, &self.mel)?,
            track: pitch::track(&samples, self.mel.sample_rate, self.mel.hop_length),
            lines: tone::lines(&samples, self.mel.sample_rate, self.group)?,
            samples,
        })
    }

    /// Compares a sound with its recording, of equal length.
    ///
    /// # Errors
    /// If the lengths differ.
    pub fn compare(&self, recording: &Heard, sound: &Heard) -> Result<Scores> {
        let (expected, got) = (recording.samples.len(), sound.samples.len());
        if expected != got {
            return Err(Error::invalid(format!("expected {expected} samples beside the recording, got {got}")));
        }
        let (a, b) = (&recording.track, &sound.track);
        let stft = spectral::stft_distance(&recording.samples, &sound.samples)?;
        let (pitch_cents, gross) = pitch_errors(a, b);
        Ok(Scores([
            spectral::mel_l1(&recording.mel, &sound.mel),
            spectral::mel_cepstral_distortion(&recording.mel, &sound.mel, &a.kind),
            stft.map(|distance| distance.0),
            stft.map(|distance| distance.1),
            spectral::level(recording.power_above, sound.power_above).map(f64::abs),
            pitch_cents,
            gross,
            voicing_error(a, b),
            periodicity_error(a, b),
            tone::worst(&recording.lines, &sound.lines).map(|line| line.level),
        ]))
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    Mean::of(values).map(|mean| mean.mean)
}

/// Root mean square error in cents without gross errors, and gross errors in percent, of hops voiced in
/// both.
fn pitch_errors(a: &Track, b: &Track) -> (Option<f64>, Option<f64>) {
    let both = || a.hertz.iter().zip(&b.hertz).filter(|(a, b)| **a > 0.0 && **b > 0.0).map(|(a, b)| b / a);
    let is_gross = |ratio: f32| (ratio - 1.0).abs() > GROSS;
    let fine = mean(both().filter(|&ratio| !is_gross(ratio)).map(|ratio| (1200.0 * f64::from(ratio).log2()).powi(2)));
    (fine.map(f64::sqrt), mean(both().map(|ratio| if is_gross(ratio) { 100.0 } else { 0.0 })))
}

fn voicing_error(a: &Track, b: &Track) -> Option<f64> {
    mean(a.hertz.iter().zip(&b.hertz).map(|(a, b)| if (*a > 0.0) == (*b > 0.0) { 0.0 } else { 100.0 }))
}

fn periodicity_error(a: &Track, b: &Track) -> Option<f64> {
    let pairs = a.periodicity.iter().zip(&b.periodicity).zip(&a.kind).filter(|(_, kind)| **kind != Kind::Silence);
    mean(pairs.map(|((a, b), _)| f64::from(a - b).powi(2))).map(f64::sqrt)
}

/// Bits per sample of a clip, over all of it and by what its hops are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Likelihood {
    /// Samples that were judged: whole hops.
    pub samples: usize,
    /// Over all hops.
    pub all: Option<f64>,
    /// Over silent hops.
    pub silence: Option<f64>,
    /// Over unvoiced hops.
    pub unvoiced: Option<f64>,
    /// Over voiced hops.
    pub voiced: Option<f64>,
}

impl Likelihood {
    /// From negative log-likelihoods of hops of `hop` samples, nats, and what each hop is; without any
    /// figure where they overflow.
    pub fn of(hop_nats: &[f64], kinds: &[Kind], hop: usize) -> Self {
        let bits = |wanted: &dyn Fn(Kind) -> bool| {
            let hops = hop_nats.iter().zip(kinds).filter(|(_, kind)| wanted(**kind));
            mean(hops.map(|(nats, _)| bits_per_sample(nats / hop as f64)))
        };
        let samples = hop_nats.len() * hop;
        let all = bits_per_sample(hop_nats.iter().sum::<f64>() / samples as f64);
        let Some(all) = unless_overflowed(all) else { return Self { samples, ..Self::default() } };
        Self {
            samples,
            all: Some(all),
            silence: bits(&|kind| kind == Kind::Silence),
            unvoiced: bits(&|kind| kind == Kind::Unvoiced),
            voiced: bits(&|kind| kind == Kind::Voiced),
        }
    }

    /// Names and values, in order.
    pub fn parts(&self) -> [(&'static str, Option<f64>); 4] {
        [("all", self.all), ("silence", self.silence), ("unvoiced", self.unvoiced), ("voiced", self.voiced)]
    }
}

/// All figures of one clip.
pub struct ClipScores {
    /// Name of the clip.
    pub clip: String,
    /// Its length.
    pub seconds: f64,
    /// How likely the voice finds the recording.
    pub likelihood: Likelihood,
    /// The voice's speech.
    pub ours: Scores,
    /// Griffin-Lim's, from the same mel.
    pub griffin_lim: Scores,
    /// Time that the voice took, over the sound's length.
    pub real_time_factor: f64,
}

impl ClipScores {
    /// Mel-cepstral distortion of the voice's speech, dB.
    pub fn distortion(&self) -> Option<f64> {
        self.ours.0[METRICS.iter().position(|metric| metric.key == "mcd_db")?]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocoder::noise::Noise;

    fn sine(hz: f64, len: usize) -> Vec<f32> {
        (0..len).map(|i| 0.3 * (std::f64::consts::TAU * hz * i as f64 / 22_050.0).sin() as f32).collect()
    }

    fn judge() -> Judge {
        Judge::new(&MelConfig::nvidia(), 8).unwrap()
    }

    fn score(scores: &Scores, key: &str) -> Option<f64> {
        scores.0[METRICS.iter().position(|metric| metric.key == key).unwrap()]
    }

    #[test]
    fn a_sound_beside_itself_has_no_errors() {
        let judge = judge();
        let heard = judge.hear(&sine(200.0, 20_000)).unwrap();
        let scores = judge.compare(&heard, &heard).unwrap();
        assert_eq!(scores, Scores([Some(0.0); METRICS.len()]));
    }

    #[test]
    fn known_pitches_have_known_errors() {
        let judge = judge();
        let heard = |hz| judge.hear(&sine(hz, 20_000)).unwrap();
        let recording = heard(200.0);
        let scores = judge.compare(&recording, &heard(200.0 * 2f64.powf(50.0 / 1200.0))).unwrap();
        assert!((score(&scores, "pitch_cents").unwrap() - 50.0).abs() < 5.0, "{scores:?}");
        assert_eq!(score(&scores, "gross_pitch_percent"), Some(0.0));
        let scores = judge.compare(&recording, &heard(300.0)).unwrap();
        assert!(score(&scores, "gross_pitch_percent").unwrap() > 95.0, "{scores:?}");
        let mut noise = vec![0.0; 20_000];
        Noise::new(2).fill(0, &mut noise);
        noise.iter_mut().for_each(|x| *x *= 0.2);
        let scores = judge.compare(&recording, &judge.hear(&noise).unwrap()).unwrap();
        assert!(score(&scores, "voicing_percent").unwrap() > 95.0, "{scores:?}");
        assert!(score(&scores, "periodicity").unwrap() > 0.5, "{scores:?}");
        assert_eq!(score(&scores, "pitch_cents"), None);
    }

    #[test]
    fn silence_has_no_pitch_and_null_in_json() {
        let judge = judge();
        let silence = judge.hear(&[0.0; 8192]).unwrap();
        let scores = judge.compare(&silence, &silence).unwrap();
        for key in ["mcd_db", "stft_convergence", "stft_log", "pitch_cents", "gross_pitch_percent", "periodicity"] {
            assert_eq!(score(&scores, key), None, "{key}");
            assert!(scores.to_json()[key].is_null());
        }
        assert_eq!((score(&scores, "mel_l1"), score(&scores, "voicing_percent")), (Some(0.0), Some(0.0)));
        let short = judge.hear(&[0.1, -0.1]).unwrap();
        assert!(judge.compare(&short, &short).is_ok());
        assert!(judge.compare(&short, &silence).is_err());
        assert!(judge.hear(&[f32::NAN]).is_err());
    }

    #[test]
    fn likelihood_is_split_by_kind() {
        let nats = |bits: f64| (bits - 15.0) * std::f64::consts::LN_2 * 256.0;
        let hops = [nats(5.0), nats(9.0), nats(8.0), nats(10.0)];
        let kinds = [Kind::Silence, Kind::Voiced, Kind::Unvoiced, Kind::Voiced];
        let found = Likelihood::of(&hops, &kinds, 256);
        let near = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-9;
        assert!(near(found.all, 8.0) && near(found.silence, 5.0) && near(found.voiced, 9.5), "{found:?}");
        assert_eq!(Likelihood::of(&hops[..1], &kinds[..1], 256).voiced, None);
        // a hop that overflows isn't one less
        for nats in [f64::NAN, f64::INFINITY, 1e30] {
            let found = Likelihood::of(&[hops[0], nats], &kinds[..2], 256);
            assert_eq!(found, Likelihood { samples: 512, ..Likelihood::default() });
        }
    }
}

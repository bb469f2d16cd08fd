//! What the values of a mel tell of how it was made, and whether it suits a voice.
//!
//! The thresholds come from 60 LJSpeech clips, whole and in pieces of 10 and 40 frames, at 0 to -60 dB:
//! natural-log mels of speech have means of -8.7 to -3.3 at their usual loudness, deviations of 0.8 to 2.7,
//! maxima up to 1.5, and 98 % of their values within 11.

use super::convention::Encoding;
use super::filterbank::mel_filterbank;
use super::stft::Stft;
use super::{MelConfig, MelSpectrogram};
use crate::Result;
use std::fmt;

/// A percentile is taken of at most about this many values.
const SAMPLE: usize = 1 << 20;
/// Values this near to a bound lie on it.
const ON: f32 = 1e-4;
/// 98 % of a speech mel's values lie within less than this, nats.
const MOST_SPREAD: f32 = 14.0;
/// No sound in ±1 gets this far above white noise of power 1, nats.
const LOUDEST: f32 = 4.5;
/// Speech has a mean at least this far below white noise of power 1, nats.
const LEAST_BELOW: f32 = 3.1;

/// Figures of a mel's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Smallest value.
    pub min: f32,
    /// Largest value.
    pub max: f32,
    /// Mean of all values.
    pub mean: f32,
    /// Standard deviation of all values.
    pub deviation: f32,
    /// Median.
    pub median: f32,
    /// From the 1st to the 99th percentile.
    pub spread: f32,
    /// Part of the values that equal the smallest, 0 to 1.
    pub at_min: f32,
}

impl Summary {
    /// The figures of a mel.
    pub fn of(mel: &MelSpectrogram) -> Self {
        let values = mel.values();
        let (mut min, mut max, mut sum, mut squares) = (f32::INFINITY, f32::NEG_INFINITY, 0.0f64, 0.0f64);
        for &value in values {
            (min, max) = (min.min(value), max.max(value));
            sum += f64::from(value);
            squares += f64::from(value) * f64::from(value);
        }
        let count = values.len() as f64;
        let mean = sum / count;
        let mut sample: Vec<f32> = values.iter().copied().step_by(values.len() / SAMPLE + 1).collect();
        let mut percentile = |part: f64| {
            let at = (part * (sample.len() - 1) as f64).round() as usize;
            *sample.select_nth_unstable_by(at, f32::total_cmp).1
        };
        Self {
            min,
            max,
            mean: mean as f32,
            deviation: (squares / count - mean * mean).max(0.0).sqrt() as f32,
            median: percentile(0.5),
            spread: percentile(0.99) - percentile(0.01),
            at_min: values.iter().filter(|&&v| v <= min + ON).count() as f32 / count as f32,
        }
    }
}

/// Something about a mel that a voice's user should know.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// The mel plainly isn't what the voice was trained on.
    pub serious: bool,
    /// What the mel looks like.
    pub what: String,
    /// Which figures say so.
    pub evidence: String,
    /// What to do, if anything.
    pub remedy: Option<&'static str>,
    /// How the values seem to be written, where that is a function of each value.
    pub encoding: Option<Encoding>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.what, self.evidence)?;
        self.remedy.map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

/// What the mel of white noise of power 1 is in a voice's convention, mean over the bands, nats: the
/// scale that speech levels are relative to.
fn noise_level(voice: &MelConfig) -> Result<f32> {
    let window: f64 = Stft::of(voice)?.window().iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    let bands = mel_filterbank(voice);
    let rows = bands.chunks_exact(voice.n_fft / 2 + 1);
    let areas: Vec<f64> = rows.map(|row| row.iter().map(|&w| f64::from(w)).sum()).filter(|&a| a > 0.0).collect();
    let mean = areas.iter().map(|area| area.ln()).sum::<f64>() / areas.len().max(1) as f64;
    Ok((mean + 0.5 * window.ln()) as f32)
}

/// Compares a mel with what a voice expects. Nothing is found in a mel that suits it.
///
/// At most one finding is serious: what the values look like instead of the voice's natural
/// logarithms. Values tell nothing of band edges, hop or framing.
///
/// # Errors
/// If the voice's convention is out of range.
pub fn diagnose(mel: &MelSpectrogram, voice: &MelConfig) -> Result<Vec<Finding>> {
    let (s, level, silence) = (Summary::of(mel), noise_level(voice)?, voice.silence());
    let mut findings = Vec::new();
    if let Some(finding) = foreign(&s, level) {
        findings.push(finding);
        return Ok(findings);
    }
    let mut note = |serious, what: &str, evidence: String, remedy| {
        findings.push(Finding { serious, what: what.into(), evidence, remedy, encoding: Some(Encoding::LN) });
    };
    let under = mel.values().iter().filter(|&&v| v < silence - 0.5).count() as f32 / mel.values().len() as f32;
    let how_far = || format!("{:.0} % of the values are under {silence:.2}, down to {:.2}", 100.0 * under, s.min);
    if under >= 0.5 {
        note(true, "values of another kind or scale", how_far(), None);
    } else if under >= 0.01 {
        let what = "natural logarithms with a lower floor than the voice's";
        note(false, what, how_far(), Some("they are raised to it"));
    }
    if s.max <= silence + 0.01 {
        note(false, "silence", format!("no value is above {:.2}", s.max), None);
    } else if s.deviation < 1e-3 {
        note(true, "no mel of speech", format!("all values are about {:.3}", s.mean), None);
    } else if s.max < level - 6.0 {
        note(
            false,
            "very quiet sound",
            format!("the largest value is {:.2}, usual is about {:.1}", s.max, level + 0.9),
            None,
        );
    }
    let bands_at = |low: f32, high: f32| {
        let least = (0..mel.n_mels()).map(|b| mel.band(b).iter().copied().fold(f32::INFINITY, f32::min));
        least.filter(|v| (low..high).contains(v)).count()
    };
    // √1e-6 times the area of Slaney's bands: VITS in silence.
    if 2 * bands_at(-10.03, -9.9) > mel.n_mels() && silence < -11.0 {
        note(
            false,
            "as VITS and Piper write them",
            format!("the bands go down to {:.2}, not to {silence:.2}", s.min),
            Some("--mel-convention vits sets the time right by half a frame"),
        );
    }
    Ok(findings)
}

/// Values that are no natural logarithms of magnitudes.
fn foreign(s: &Summary, level: f32) -> Option<Finding> {
    let found = |what: &str, encoding, evidence: String, remedy| {
        Some(Finding { serious: true, what: what.into(), evidence, remedy: Some(remedy), encoding })
    };
    let range = format!("values from {:.3} to {:.3}", s.min, s.max);
    let ln10 = std::f32::consts::LN_10;
    if s.min >= 0.0 {
        if s.max <= 1.0 + ON && s.median > 0.05 {
            let remedy = "if it is flowavenet's, make it from the sound again with \"melglow mel\"";
            return found("values normalised to 0 to 1", Some(Encoding::range(0.0, 1.0)), range, remedy);
        }
        return found(
            "magnitudes or powers without the logarithm",
            Some(Encoding::Linear),
            range,
            "for magnitudes, --mel-convention linear",
        );
    }
    if s.spread > 2.0 * MOST_SPREAD {
        return found(
            "decibels",
            Some(Encoding::DB),
            format!("{range}, mean {:.1}", s.mean),
            "for 20 log10 of magnitudes, --mel-convention db",
        );
    }
    if s.max > level + LOUDEST {
        let remedy = "divide the sound by 32768 before its mel is made";
        return found(
            "the mel of samples that aren't in ±1",
            None,
            format!("{range}, louder than any sound in ±1"),
            remedy,
        );
    }
    if s.spread > MOST_SPREAD && s.mean < level - 9.0 {
        let remedy = "make it from magnitudes again with \"melglow mel\"";
        return found("natural logarithms of powers", None, format!("{range}, mean {:.1}", s.mean), remedy);
    }
    if s.min >= -4.0 - ON && s.max <= 4.0 + ON && (s.min + 4.0).abs() <= ON && s.at_min >= 0.002 {
        let remedy = "if it is rayhane's or coqui's, make it from the sound again with \"melglow mel\"";
        return found(
            "decibels normalised to -4 to 4",
            Some(Encoding::range(-4.0, 4.0)),
            format!("{range}, {:.1} % of them at -4", 100.0 * s.at_min),
            remedy,
        );
    }
    if s.mean.abs() < 1.0 && (0.4..1.8).contains(&s.deviation) && s.min > -10.0 {
        let remedy = "give the statistics with --mel-stats, or --mel-convention matcha";
        return found(
            "a mel normalised to mean 0 and deviation 1",
            None,
            format!("mean {:.2}, deviation {:.2}", s.mean, s.deviation),
            remedy,
        );
    }
    // The floor itself, 1e-5 or 1e-10, in more than one value by chance.
    let floored = [-5.0f32, -10.0].iter().any(|floor| (s.min - floor).abs() <= ON) && s.at_min >= 2e-3;
    let loud = s.mean > level - LEAST_BELOW && s.deviation < 1.35 && s.min >= -10.0 - ON;
    if s.max < level / ln10 + 2.0 && (loud || floored) {
        return found(
            "base-10 logarithms",
            Some(Encoding::LOG10),
            if floored {
                format!("{range}, {:.1} % of them at that floor", 100.0 * s.at_min)
            } else {
                let most = level - LEAST_BELOW;
                format!("{range}, mean {:.2}; natural logarithms of speech have a mean below {most:.1}", s.mean)
            },
            "--mel-convention log10, if the bands are the voice's",
        );
    }
    None
}

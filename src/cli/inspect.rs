//! `melglow inspect`: what a file is, what it suits, and what to type next.

use super::{one_line, say, voice};
use crate::audio::decode;
use crate::import::{self, Description};
use crate::mel::convention::{CONVENTIONS, Convention, Encoding};
use crate::mel::detail::Detail;
use crate::mel::diagnosis::{Finding, Summary, diagnose};
use crate::mel::file::{self, Layout, TensorData};
use crate::mel::{MelConfig, MelSpectrogram};
use crate::vocoder::trust::LEAST;
use crate::voice::{CONFIG_FILE, SynthesisConfig, Voice, VoiceConfig};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Mels of a file of several that are looked at.
const MOST_UTTERANCES: usize = 3;

/// Tell what mels, checkpoints, voices and sound files are, and what to type next
///
/// For a mel: shape, values, floor and silence, the conventions it may be of and the evidence, and
/// what the voice expects. For a checkpoint: its kind and tensors. For a voice: its convention and size.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// Mels, checkpoints (.pt, .safetensors), folders of voices, or sound files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare mels with this voice: a folder, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// If a file can't be read or told; with several, after the others are done.
pub fn run(args: &InspectArgs) -> Result<()> {
    let voice = voice(args.voice.as_deref())?;
    let chosen = args.voice.as_deref().map_or_else(String::new, |choice| format!(" --voice {choice}"));
    let mut failed = 0;
    for path in &args.files {
        match report(path, voice.config(), &chosen) {
            Ok(text) => std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")?,
            Err(error) if args.files.len() == 1 => return Err(error),
            Err(error) => {
                failed += 1;
                say(&one_line(&error));
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} files failed", args.files.len());
    }
    Ok(())
}

/// `chosen` is what chose the voice on the command line.
fn report(path: &Path, voice: &VoiceConfig, chosen: &str) -> Result<String> {
    if path.is_dir() {
        if !path.join(CONFIG_FILE).is_file() {
            bail!("{}: is a folder without {CONFIG_FILE}, so no voice; name the files in it", path.display());
        }
        return of_voice(path);
    }
    let mut start = Vec::new();
    let opened = std::fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    opened.take(16).read_to_end(&mut start).with_context(|| format!("cannot read {}", path.display()))?;
    if file::sound(&start).is_some() || decode::is_audio_file(path) {
        return of_sound(path, voice);
    }
    if let Some(utterances) = file::utterances(path)? {
        let mut text = format!("{}: {} mels by key\n", path.display(), utterances.len());
        let mut option = None;
        let layout = Layout { n_mels: voice.mel.n_mels, transpose: true };
        for utterance in utterances.iter().take(MOST_UTTERANCES) {
            let mel = utterance.read(layout)?;
            let _ = writeln!(text, "key {}: {}", utterance.key, dimensions(&mel, voice));
            option = of_values(&mut text, &mel, voice)?;
        }
        if utterances.len() > MOST_UTTERANCES {
            let _ = writeln!(text, "… and {} more", utterances.len() - MOST_UTTERANCES);
        }
        let _ = writeln!(text, "  type      {}", next(path, &format!("FOLDER{chosen}"), option));
        return Ok(text);
    }
    let described = || import::describe(path).map(|found| of_checkpoint(path, &found));
    // a pickled module is no array, and yet a checkpoint
    let mut arrays = match file::read_arrays(path) {
        Ok(arrays) => arrays,
        Err(error) => return described().map_err(|_| error.into()),
    };
    match file::the_mel(&arrays) {
        Some(at) => of_mel(path, arrays.swap_remove(at).1, voice, chosen),
        None => described().or_else(|_| of_arrays(path, &arrays)),
    }
}

/// What a convention is, in one line.
fn convention_line(mel: &MelConfig) -> String {
    let MelConfig { sample_rate, n_fft, win_length, hop_length, n_mels, f_min, f_max, scale, floor } = mel;
    format!(
        "{sample_rate} Hz, FFT {n_fft}, window {win_length}, hop {hop_length}, {n_mels} bands {f_min} to {f_max} Hz \
         ({scale:?}), ln, floor {floor:e}"
    )
}

fn dimensions(mel: &MelSpectrogram, voice: &VoiceConfig) -> String {
    let MelConfig { hop_length, sample_rate, .. } = voice.mel;
    let seconds = mel.frames() as f64 * hop_length as f64 / f64::from(sample_rate);
    format!("{} bands, {} frames, {seconds:.2} s at the voice's hop", mel.n_mels(), mel.frames())
}

fn of_mel(path: &Path, array: TensorData, voice: &VoiceConfig, chosen: &str) -> Result<String> {
    let mut text = format!("{}: {} {:?}", path.display(), array.dtype, array.shape);
    let (&[rows, columns] | &[1, rows, columns]) = &array.shape[..] else {
        let kind = if array.shape.len() == 1 { "a list of numbers" } else { "an array of that many dimensions" };
        bail!("{}: shape is {:?}: {kind} is no mel", path.display(), array.shape);
    };
    // Which way round it lies: by the voice, by a convention we know, or the shorter side is the bands.
    let known = |len: usize| CONVENTIONS.iter().any(|c| c.mel.n_mels == len);
    let wanted = voice.mel.n_mels;
    let frames_first = match (rows == wanted, columns == wanted) {
        (true, _) => false,
        (_, true) => true,
        _ if known(rows) != known(columns) => known(columns),
        _ => columns < rows,
    };
    let n_mels = if frames_first { columns } else { rows };
    let mel = file::into_mel(array, Layout { n_mels, transpose: frames_first })
        .map_err(|problem| crate::Error::file(path, problem))?;
    let order = if frames_first { "[frames, bands]" } else { "[bands, frames]" };
    let _ = writeln!(text, ", a mel {order}: {}", dimensions(&mel, voice));
    let option = of_values(&mut text, &mel, voice)?;
    let _ = writeln!(
        text,
        "  type      {}",
        next(path, &format!("{}.wav{chosen}", path.with_extension("").display()), option)
    );
    Ok(text)
}

/// What to type, given the convention to name.
fn next(path: &Path, output: &str, convention: Option<&str>) -> String {
    let again = format!("melglow mel SOUND -o {}.npy", path.with_extension("").display());
    let synth = format!("melglow synth {} -o {output}", path.display());
    match convention {
        Some("voice") => synth,
        Some(name) => format!("{synth} --mel-convention {name}, if the bands are the voice's; else {again}"),
        None => format!("{again}, if it can't be read as said above"),
    }
}

/// The lines on a mel's values, and the convention that reads them, if one does.
fn of_values(text: &mut String, mel: &MelSpectrogram, voice: &VoiceConfig) -> Result<Option<&'static str>> {
    let s = Summary::of(mel);
    let _ = writeln!(
        text,
        "  values    {:.3} to {:.3}, mean {:.3}, deviation {:.3}, 98 % within {:.2}",
        s.min, s.max, s.mean, s.deviation, s.spread
    );
    let least: Vec<bool> =
        (0..mel.frames()).map(|frame| (0..mel.n_mels()).all(|band| mel.band(band)[frame] <= s.min + 0.01)).collect();
    let silent = least.iter().filter(|&&silent| silent).count();
    let _ = writeln!(
        text,
        "  floor     {:.3}, held by {:.2} % of the values; {silent} of {} frames are silent",
        s.min,
        100.0 * s.at_min,
        mel.frames()
    );
    let findings = diagnose(mel, &voice.mel)?;
    for finding in &findings {
        let _ = writeln!(text, "  looks     {}{finding}", if finding.serious { "like " } else { "" });
    }
    let serious = findings.iter().find(|finding| finding.serious);
    if serious.is_none() {
        let below = format!("98 % within {:.1}, mean {:.1}", s.spread, s.mean);
        let _ = writeln!(text, "  looks     like natural logarithms of magnitudes ({below})");
    }
    let own = Detail::of(mel, &voice.mel).mean();
    if let (None, Some(own), Some(natural)) = (serious, own, voice.trained_on.as_ref().and_then(|known| known.detail))
        && mel.n_mels() == voice.mel.n_mels
    {
        let part = own / natural;
        let smooth =
            if part < LEAST { ": smoother than speech, it is sharpened and not refined unless asked for" } else { "" };
        let _ = writeln!(
            text,
            "  detail    {own:.2} nats from band to band and frame to frame, {part:.2} of the voice's own mels{smooth}"
        );
    }
    let likely = likely(mel, &s, serious);
    if !likely.is_empty() {
        let apart = if likely.len() > 1 { " (values don't tell these apart)" } else { "" };
        let _ = writeln!(text, "  may be    {}{apart}", likely.join(", "));
    }
    let _ = writeln!(text, "  expected  voice {}: {}", voice.name, convention_line(&voice.mel));
    if mel.n_mels() != voice.mel.n_mels {
        let _ = writeln!(text, "  bands     {} don't suit the voice's {}", mel.n_mels(), voice.mel.n_mels);
        return Ok(None);
    }
    Ok(serious.map_or(Some(Encoding::LN), |finding| finding.encoding).and_then(Convention::name_of))
}

/// Names of the conventions that write such values.
fn likely(mel: &MelSpectrogram, s: &Summary, serious: Option<&Finding>) -> Vec<&'static str> {
    let Some(encoding) = serious.map_or(Some(Encoding::LN), |finding| finding.encoding) else {
        return Vec::new();
    };
    let of = |c: &&Convention| c.mel.n_mels == mel.n_mels() && c.encoding == encoding;
    // Values that lie on a floor say which.
    let on_floor = |c: &Convention| (s.min - c.silence()).abs() < 1e-3;
    let all: Vec<&Convention> = CONVENTIONS.iter().filter(of).collect();
    let floored = encoding != Encoding::Linear && s.at_min * mel.values().len() as f32 >= 1.5;
    let some = all.iter().filter(|c| floored && on_floor(c)).map(|c| c.name).collect::<Vec<_>>();
    if some.is_empty() { all.iter().map(|c| c.name).collect() } else { some }
}

fn of_sound(path: &Path, voice: &VoiceConfig) -> Result<String> {
    let sound = decode::read(path)?;
    let (count, rate) = (sound.samples.len(), sound.sample_rate);
    let decibels = |value: f64| 20.0 * value.max(1e-10).log10();
    let peak = sound.samples.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    let power = sound.samples.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / count as f64;
    let full = sound.samples.iter().filter(|x| x.abs() >= 32_767.0 / 32_768.0).count();
    let silent = sound.samples.iter().filter(|&&x| x == 0.0).count();
    let mut text =
        format!("{}: sound, {count} samples at {rate} Hz, {:.2} s\n", path.display(), count as f64 / f64::from(rate));
    let _ = writeln!(
        text,
        "  level     peak {:.1} dB, RMS {:.1} dB; {full} samples at full scale, {:.1} % exactly 0",
        decibels(peak.into()),
        decibels(power.sqrt()),
        100.0 * silent as f64 / count as f64
    );
    if rate != voice.mel.sample_rate {
        let _ =
            writeln!(text, "  rate      voice {} speaks at {} Hz: it is resampled", voice.name, voice.mel.sample_rate);
    }
    let stem = path.with_extension("");
    let _ = writeln!(text, "  type      melglow mel {} -o {}.npy", path.display(), stem.display());
    Ok(text)
}

fn of_voice(path: &Path) -> Result<String> {
    let voice = Voice::open(path)?;
    let config = voice.config();
    let tensors = voice.tensors()?;
    let parameters: usize = tensors.values().map(|tensor| tensor.elem_count()).sum();
    let mut text =
        format!("{}: voice {}, {} tensors, {parameters} parameters\n", path.display(), config.name, tensors.len());
    let _ = writeln!(text, "  mels      {}", convention_line(&config.mel));
    let SynthesisConfig { sigma, drive, refine, refine_lookahead } = &config.synthesis;
    let drive = if *drive == 1.0 { String::new() } else { format!(", drive {drive}") };
    let _ = writeln!(
        text,
        "  synthesis sigma {sigma}{drive}, {refine} passes of refinement, look-ahead {refine_lookahead}"
    );
    let _ = writeln!(text, "  bits      its likelihood is {}", voice.build_frozen_flow()?.likelihood_kind());
    let _ = writeln!(text, "  type      melglow synth MEL -o OUT.wav --voice {}", path.display());
    Ok(text)
}

fn of_arrays(path: &Path, arrays: &[(String, TensorData)]) -> Result<String> {
    if arrays.is_empty() {
        bail!("{}: holds no arrays", path.display());
    }
    let mut text = format!("{}: {} arrays, none called mel\n", path.display(), arrays.len());
    for (name, array) in arrays {
        let _ = writeln!(text, "  {name}  {} {:?}", array.dtype, array.shape);
    }
    Ok(text)
}

fn of_checkpoint(path: &Path, found: &Description) -> String {
    let Description { kind, container, prefix, class, design, tensors } = found;
    let parameters: usize = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    let what = kind.refusal().unwrap_or_else(|| kind.to_string());
    let mut text =
        format!("{}: {container}, {} tensors, {parameters} numbers: {what}\n", path.display(), tensors.len());
    if let Some(class) = class {
        let _ = writeln!(text, "  module    {class}, at {prefix:?}");
    }
    if let Some(design) = design {
        let _ = writeln!(
            text,
            "  design    {} flows, groups of {}, {} layers of {} channels, {} mel bands",
            design.flows.len(),
            design.flows.first().copied().unwrap_or_default(),
            design.layers,
            design.channels,
            design.n_mels
        );
        let _ = writeln!(text, "  type      melglow import {} -o voices/NAME", path.display());
    }
    for tensor in tensors {
        let _ = writeln!(text, "  {}  {} {:?}", tensor.name, tensor.dtype, tensor.shape);
    }
    text
}

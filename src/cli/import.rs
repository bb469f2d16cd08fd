//! `melglow import`: a foreign checkpoint to a voice's folder.

use super::{say, use_threads};
use crate::audio::{self, Waveform};
use crate::flow::Flow;
use crate::import::{self, Halves, Options, TrainingMel};
use crate::train::dataset::Clip;
use crate::train::evaluate::clip_bits;
use crate::voice::Voice;
use anyhow::{Result, bail};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

/// Sound that `--check` listens to at most, seconds: the largest models take some seconds for each.
const CHECK_SECONDS: usize = 3;
/// A better choice of halves must be better by this much, bits per sample.
const CLEARLY: f64 = 0.1;
/// Bits per sample of a model that doesn't know what it hears: white Gaussian noise as loud as speech.
const CLUELESS: f64 = 14.0;

/// Make a voice of a published WaveGlow or SqueezeWave checkpoint
///
/// Takes what torch.save wrote (a state dict, bare or under a key, or a whole pickled module; zip or
/// legacy) and .safetensors; weight norm and batch norm attached or folded; f16 and f32. Code in the
/// file is never run. The architecture is read from the tensors; what they don't tell (sampling rate,
/// FFT) comes from --config, or is assumed and said.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  melglow import waveglow_256channels.pt -o voices/nvidia
  melglow import squeezewave.pt -o voices/sw --config configs/config_a128_c128.json
  melglow import waveglow_old.pt -o voices/old --halves alternating --check LJ001-0001.wav
  melglow synth mel.npy -o speech.wav --voice voices/nvidia
  melglow train --from voices/nvidia --data my-clips --out runs/mine")]
pub struct ImportArgs {
    /// The checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// Folder of the voice; its last part becomes the voice's name
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Which half of the channels a flow moves: the second in all, or the first in odd flows, as in
    /// files of before the fused layers (the weights don't show it; see --check)
    #[arg(long, value_enum, default_value_t = HalvesName::Same)]
    halves: HalvesName,
    /// The config.json that the model was trained with: its data_config gives the mel convention
    #[arg(long, value_name = "JSON")]
    config: Option<PathBuf>,
    /// Samples from one mel frame to the next [default: config, file, or a quarter of the upsampler's
    /// kernel]
    #[arg(long, value_name = "SAMPLES")]
    hop: Option<usize>,
    /// Sampling rate, Hz [default: config, or 22050]
    #[arg(long, value_name = "HZ")]
    sample_rate: Option<u32>,
    /// A recording of the model's speaker: says how likely the voice finds it (first 3 s), with these
    /// halves and with the others
    #[arg(long, value_name = "CLIP")]
    check: Option<PathBuf>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HalvesName {
    Same,
    Alternating,
}

impl From<HalvesName> for Halves {
    fn from(name: HalvesName) -> Self {
        match name {
            HalvesName::Same => Self::Same,
            HalvesName::Alternating => Self::Alternating,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// If the checkpoint can't be imported, the clip can't be read, or the folder can't be written.
pub fn run(args: &ImportArgs) -> Result<()> {
    use_threads(args.threads)?;
    let Some(name) = args.output.file_name().and_then(|name| name.to_str()) else {
        bail!("{}: is not a name for a voice's folder", args.output.display());
    };
    let mut mel = args.config.as_deref().map(TrainingMel::read).transpose()?.unwrap_or_default();
    mel.hop_length = args.hop.or(mel.hop_length);
    mel.sampling_rate = args.sample_rate.or(mel.sampling_rate);
    let options = Options { halves: args.halves.into(), mel };
    // read first: a clip that can't be used must not leave a voice behind
    let clip = args.check.as_deref().map(first_seconds).transpose()?;
    let imported = import::import(&args.checkpoint, name, &options)?;
    imported.voice.save_with(&args.output, |folder| {
        let card = folder.join("VOICE.md");
        std::fs::write(&card, &imported.card).map_err(crate::Error::io("write", card))
    })?;
    say(&imported.summary);
    for line in &imported.assumed {
        say(&format!("assumed {line}"));
    }
    say(&format!("written to {}; its VOICE.md says what is known", args.output.display()));
    if let (Some(path), Some(clip)) = (&args.check, clip) {
        let chosen = bits(&imported.voice, &clip)?;
        drop(imported);
        let other = import::import(
            &args.checkpoint,
            name,
            &Options { halves: options.halves.other(), mel: options.mel.clone() },
        )?;
        let other = bits(&other.voice, &clip)?;
        let halves = options.halves;
        say(&format!(
            "{}: {chosen:.2} bits per sample with --halves {halves}, {other:.2} with {}",
            path.display(),
            halves.other()
        ));
        if let Some(hint) = hint(chosen, other, halves) {
            say(&hint);
        }
    }
    Ok(())
}

/// What the two likelihoods say about the choice.
fn hint(chosen: f64, other: f64, halves: Halves) -> Option<String> {
    let or_worst = |bits: f64| if bits.is_nan() { f64::INFINITY } else { bits };
    let (chosen, other) = (or_worst(chosen), or_worst(other));
    if chosen.min(other) > CLUELESS {
        Some("neither fits this clip: is the mel convention (--config, --hop, --sample-rate) that of the model?".into())
    } else if chosen > other + CLEARLY {
        Some(format!("the other choice fits better: import again with --halves {}", halves.other()))
    } else {
        None
    }
}

/// As much of a clip as is judged.
fn first_seconds(path: &Path) -> Result<Waveform> {
    let mut sound = audio::decode::read(path)?;
    let (samples, rate) = (sound.samples.len(), sound.sample_rate as usize);
    if samples < rate / 2 {
        bail!("{}: is {samples} samples long, expected half a second at least", path.display());
    }
    sound.samples.truncate(CHECK_SECONDS * rate);
    Ok(sound)
}

/// Bits per sample of a clip.
fn bits(voice: &Voice, clip: &Waveform) -> Result<f64> {
    let config = voice.config();
    let samples = audio::resample::resample(&clip.samples, clip.sample_rate, config.mel.sample_rate)?;
    let clip = Clip::new("clip", &samples, &config.mel)?;
    // plain tensors, not variables: no graph is kept
    let builder = VarBuilder::from_tensors(voice.tensors()?, DType::F32, &Device::Cpu);
    let flow = Flow::new(&config.flow, &config.mel, builder)?;
    Ok(clip_bits(&flow, &config.mel, &clip, &Device::Cpu)?.bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_better_choice_is_hinted_at() {
        assert_eq!(hint(7.0, 15.0, Halves::Same), None);
        assert_eq!(hint(7.0, 6.95, Halves::Same), None);
        let other = |hint: Option<String>| hint.unwrap();
        assert!(other(hint(15.0, 7.0, Halves::Same)).ends_with("--halves alternating"));
        assert!(other(hint(f64::INFINITY, 7.0, Halves::Alternating)).ends_with("--halves same"));
        assert!(other(hint(f64::NAN, 16.0, Halves::Same)).starts_with("neither fits"));
        assert!(other(hint(16.0, 17.0, Halves::Same)).starts_with("neither fits"));
    }
}

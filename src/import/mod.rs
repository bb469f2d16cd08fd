//! Foreign checkpoints: what is in them, and voices made of them.
//!
//! Everything about a model is read from its tensors' names and shapes ([`Design`]); nothing in a file
//! is ever run. What the tensors can't say (sampling rate, FFT, the hop of a bare state dict) comes
//! from [`Options`] or is assumed, and the voice's card says which.

mod card;
pub mod checkpoint;
pub mod design;
pub mod kind;
mod outline;
pub mod table;

pub use checkpoint::{Checkpoint, Container, TensorInfo};
pub use design::{Design, Family, Shapes};
pub use kind::Kind;

use outline::Outline;

use crate::mel::MelConfig;
use crate::voice::{SynthesisConfig, Voice, VoiceConfig};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::path::Path;

/// The standard deviation that both families' own programs are used with: `-s 0.6` in their manuals.
const SIGMA: f32 = 0.6;
/// WaveGlow's upsampler reaches over this many hops: kernel 1024, stride 256.
const HOPS_PER_KERNEL: usize = 4;

/// Which half of the channels a coupling moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Halves {
    /// The second, in every flow: all files since the fused layers.
    #[default]
    Same,
    /// The first in odd flows, as the earliest files had it; the weights don't show it.
    Alternating,
}

impl Halves {
    /// Whether flow `k` moves the first half.
    pub fn swapped(self, k: usize) -> bool {
        self == Self::Alternating && k % 2 == 1
    }

    /// The other choice.
    pub fn other(self) -> Self {
        match self {
            Self::Same => Self::Alternating,
            Self::Alternating => Self::Same,
        }
    }
}

impl std::fmt::Display for Halves {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Same => "same",
            Self::Alternating => "alternating",
        })
    }
}

/// What the weights can't say.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which half a coupling moves.
    pub halves: Halves,
    /// The mel convention that the model was trained on, as far as it is known.
    pub mel: TrainingMel,
}

/// The mel of a model's training, each field only if it is known; named as in the `data_config` of
/// NVIDIA's `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct TrainingMel {
    /// Samples per second.
    pub sampling_rate: Option<u32>,
    /// FFT size, samples.
    pub filter_length: Option<usize>,
    /// Samples from one frame to the next.
    pub hop_length: Option<usize>,
    /// Window, samples.
    pub win_length: Option<usize>,
    /// Lowest frequency, Hz.
    pub mel_fmin: Option<f64>,
    /// Highest frequency, Hz.
    pub mel_fmax: Option<f64>,
}

impl TrainingMel {
    /// Reads the `data_config` of a `config.json` of NVIDIA's or SqueezeWave's programs; fields that we
    /// have no use for are passed over.
    ///
    /// # Errors
    /// If the file can't be read, isn't JSON, or has no `data_config`.
    pub fn read(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Config {
            data_config: TrainingMel,
        }
        let json = std::fs::read(path).map_err(Error::io("read", path))?;
        let config: Config = serde_json::from_slice(&json).map_err(|e| {
            Error::file(path, format!("{e}; expected the config.json of the model's training, with a data_config"))
        })?;
        Ok(config.data_config)
    }
}

/// What a checkpoint holds, without converting it.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// What the tensors are the weights of.
    pub kind: Kind,
    /// How the file stores them.
    pub container: Container,
    /// What stands before the names of the model's tensors, without the last dot: `state_dict.module`.
    pub prefix: String,
    /// The class of the pickled module that they come from, if it is one.
    pub class: Option<String>,
    /// The design, if it is one that we can import.
    pub design: Option<Design>,
    /// All tensors, in the file's order, with their whole names.
    pub tensors: Vec<TensorInfo>,
}

/// Says what a checkpoint holds.
///
/// # Errors
/// If the file can't be read or isn't a checkpoint.
pub fn describe(path: &Path) -> Result<Description> {
    let checkpoint = Checkpoint::open(path)?;
    let (kind, prefix) = Kind::of(checkpoint.tensors().iter().map(|t| t.name.as_str()));
    let design = match kind {
        Kind::WaveGlow | Kind::SqueezeWave => Design::of(&shapes(&checkpoint, prefix), kind == Kind::SqueezeWave).ok(),
        _ => None,
    };
    let prefix = prefix.trim_end_matches('.').to_string();
    Ok(Description {
        kind,
        container: checkpoint.container(),
        class: checkpoint.module_class(&prefix).map(str::to_string),
        prefix,
        design,
        tensors: checkpoint.tensors().to_vec(),
    })
}

/// Shapes of the tensors under a prefix, which is taken off.
fn shapes(checkpoint: &Checkpoint, prefix: &str) -> Shapes {
    let under = |t: &TensorInfo| Some((t.name.strip_prefix(prefix)?.to_string(), t.shape.clone()));
    checkpoint.tensors().iter().filter_map(under).collect()
}

/// A foreign model as a voice.
pub struct Imported {
    /// The voice, ready to be saved.
    pub voice: Voice,
    /// The text of its `VOICE.md`.
    pub card: String,
    /// One line: what it is.
    pub summary: String,
    /// What was assumed because the file doesn't say it, a line each.
    pub assumed: Vec<String>,
}

/// Makes a voice called `name` of a checkpoint.
///
/// Weights stay as precise as they are stored (f16 stays f16). At no time is more in memory than the
/// model twice.
///
/// # Errors
/// One line naming the file and what is wrong: no checkpoint, another kind of model, tensors missing
/// (all are named), of strange shapes, surplus, not finite; or a mel that doesn't fit the design.
pub fn import(path: &Path, name: &str, options: &Options) -> Result<Imported> {
    let mut checkpoint = Checkpoint::open(path)?;
    let wrong = |problem: String| Error::file(path, problem);
    if checkpoint.is_empty() {
        return Err(wrong(format!("holds {}, expected a checkpoint", checkpoint.instead())));
    }
    let (kind, prefix) = Kind::of(checkpoint.tensors().iter().map(|t| t.name.as_str()));
    if let Some(refusal) = kind.refusal() {
        let first = checkpoint.tensors().first().map_or_else(String::new, |t| crate::torch::clip(&t.name));
        let example =
            if kind == Kind::Unknown && !first.is_empty() { format!(" (the first is {first})") } else { String::new() };
        return Err(wrong(refusal + &example));
    }
    let prefix = prefix.to_string();
    let shapes = shapes(&checkpoint, &prefix);
    let design = Design::of(&shapes, kind == Kind::SqueezeWave).map_err(|p| wrong(format!("{kind}: {p}")))?;
    check(&design, &shapes, kind).map_err(wrong)?;

    let mut assumed = Vec::new();
    let mel = mel(&checkpoint, &prefix, &design, &options.mel, &mut assumed).map_err(wrong)?;
    if matches!(design.family, Family::WaveGlow { separate_layers: true, .. }) && options.halves == Halves::Same {
        let line = "halves same: some files of before the fused layers alternate them (--check CLIP tells)";
        assumed.push(line.to_string());
    }
    let module = |layer: usize| format!("{prefix}WN.0.in_layers.{layer}");
    let dilation = |layer| match checkpoint.attribute(&module(layer), "dilation").as_deref() {
        Some(&[dilation]) => dilation,
        // 2 to the layer, as in every version of the reference
        _ => 1 << layer.min(16),
    };
    let flow = design.flow_config(options.halves, dilation);
    let synthesis = SynthesisConfig::new(SIGMA, 0);
    let config = VoiceConfig::new(name, mel, flow, synthesis);
    config.validate().map_err(|e| wrong(e.to_string()))?;

    let tensors = convert(&mut checkpoint, &prefix, &shapes, &design, options.halves, config.mel.hop_length)?;
    let outline = Outline::of(&tensors);
    let flow = outline.build(&config)?;
    let size = (outline.values(), flow.macs_per_sample());
    let voice = Voice::from_parts(config, &tensors)?;
    drop(tensors);
    let facts =
        card::Facts::of(&checkpoint, &prefix, (kind, &design, options.halves), voice.config(), size, digest(path)?);
    Ok(Imported { card: facts.card(&assumed), summary: facts.summary(), voice, assumed })
}

/// Names everything that doesn't fit, not the first alone.
fn check(design: &Design, shapes: &Shapes, kind: Kind) -> Result<(), String> {
    let (missing, strange, surplus) = design.misfits(shapes);
    let number = |n: usize| if n == 1 { "tensor".to_string() } else { format!("{n} tensors") };
    if !missing.is_empty() {
        let missing: Vec<_> = missing.iter().map(|name| crate::torch::clip(name)).collect();
        return Err(format!("{} missing for {kind}: {}", number(missing.len()), missing.join(", ")));
    }
    if !strange.is_empty() {
        return Err(format!("{} of strange shape for {kind}: {}", number(strange.len()), strange.join("; ")));
    }
    if !surplus.is_empty() {
        let surplus: Vec<_> = surplus.iter().map(|name| crate::torch::clip(name)).collect();
        return Err(format!(
            "{} that {kind} doesn't have, so it is a model of another design: {}",
            number(surplus.len()),
            surplus.join(", ")
        ));
    }
    Ok(())
}

/// The mel convention: what is known, and NVIDIA's for the rest.
fn mel(
    checkpoint: &Checkpoint,
    prefix: &str,
    design: &Design,
    known: &TrainingMel,
    assumed: &mut Vec<String>,
) -> Result<MelConfig, String> {
    let stride = checkpoint.attribute(&format!("{prefix}upsample"), "stride").and_then(|s| s.first().copied());
    let mut default = MelConfig { n_mels: design.n_mels, ..MelConfig::nvidia() };
    let hop_length = match (stride, known.hop_length, &design.family) {
        (Some(stride), Some(hop), _) if stride != hop => {
            return Err(format!("its upsampler has a stride of {stride}, so the hop isn't {hop}"));
        }
        (_, Some(hop), _) => hop,
        (Some(stride), ..) => stride,
        (None, None, Family::WaveGlow { upsample, .. }) => {
            let hop = upsample / HOPS_PER_KERNEL;
            assumed
                .push(format!("hop {hop}: a quarter of the upsampler's kernel of {upsample} (--hop says otherwise)"));
            hop
        }
        (None, None, Family::SqueezeWave { .. }) => {
            assumed.push(format!("hop {}: as in the published models (--hop says otherwise)", default.hop_length));
            default.hop_length
        }
    };
    // every family so far takes windows of four hops
    let window = (HOPS_PER_KERNEL * hop_length.clamp(4, 1 << 14)).next_power_of_two();
    if hop_length != default.hop_length {
        (default.n_fft, default.win_length) = (window, window);
    }
    default.sample_rate = known.sampling_rate.unwrap_or(default.sample_rate);
    let top = default.f_max.min(f64::from(default.sample_rate) / 2.0);
    let mel = MelConfig {
        hop_length,
        n_fft: known.filter_length.unwrap_or(default.n_fft),
        win_length: known.win_length.or(known.filter_length).unwrap_or(default.win_length),
        f_min: known.mel_fmin.unwrap_or(default.f_min),
        f_max: known.mel_fmax.unwrap_or(top),
        ..default
    };
    let unknown: Vec<String> = [
        (known.sampling_rate.is_none(), format!("{} Hz", mel.sample_rate)),
        (known.filter_length.is_none(), format!("FFT {}", mel.n_fft)),
        (known.win_length.is_none(), format!("window {}", mel.win_length)),
        (known.mel_fmin.is_none() || known.mel_fmax.is_none(), format!("bands from {} to {} Hz", mel.f_min, mel.f_max)),
    ]
    .into_iter()
    .filter_map(|(unknown, text)| unknown.then_some(text))
    .collect();
    if !unknown.is_empty() {
        assumed.push(format!("{}: NVIDIA's convention (--config or --sample-rate says otherwise)", unknown.join(", ")));
    }
    mel.validate().map_err(|e| e.to_string())?;
    Ok(mel)
}

/// Our tensors, each made when its turn comes; all that aren't finite are named.
fn convert(
    checkpoint: &mut Checkpoint,
    prefix: &str,
    shapes: &Shapes,
    design: &Design,
    halves: Halves,
    hop: usize,
) -> Result<Vec<(String, Tensor)>> {
    let mut not_finite = Vec::new();
    let mut ours = Vec::new();
    for part in design.table(halves, hop) {
        let mut get = |name: &str| -> Result<Option<Tensor>> {
            if !shapes.contains_key(name) {
                return Ok(None);
            }
            let tensor = checkpoint.read(&format!("{prefix}{name}"))?;
            if !is_finite(&tensor)? {
                not_finite.push(name.to_string());
            }
            Ok(Some(tensor))
        };
        let converted = part.convert(design.weight_norm, &mut get)?;
        for (_, tensor) in &converted {
            if not_finite.is_empty() && !is_finite(tensor)? {
                not_finite.extend(part.sources.iter().map(|(conv, _)| format!("{conv} (its norm)")));
            }
        }
        ours.extend(converted);
    }
    if !not_finite.is_empty() {
        let problem = format!("weights that are not finite (NaN or infinite): {}", not_finite.join(", "));
        return Err(Error::file(checkpoint.path(), problem));
    }
    Ok(ours)
}

/// Whether all values are.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    let values = tensor.flatten_all()?;
    Ok(match values.dtype() {
        DType::F16 => values.to_vec1::<half::f16>()?.iter().all(|v| v.is_finite()),
        DType::BF16 => values.to_vec1::<half::bf16>()?.iter().all(|v| v.is_finite()),
        _ => values.to_vec1::<f32>()?.iter().all(|v| v.is_finite()),
    })
}

/// SHA-256 of a file, lower-case hexadecimal.
fn digest(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).map_err(Error::io("read", path))?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(Error::io("read", path))?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

//! A voice: what it takes to speak, as a folder on disk and in memory.
//!
//! The folder holds `config.json` ([`VoiceConfig`]) and `model.safetensors`; a training checkpoint
//! is such a folder with more in it.

use crate::flow::config::StepConfig;
use crate::flow::{Flow, FlowConfig};
use crate::mel::MelConfig;
use crate::net::Params;
use crate::{Error, Result, atomic};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The version of the folder's layout that this crate reads and writes.
pub const FORMAT: u32 = 1;
/// Name of the configuration in a voice's folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights in a voice's folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// The largest `config.json` we read, bytes: ours have a few thousand.
const MAX_CONFIG: u64 = 1 << 20;
/// The largest weights we read, bytes: the published WaveGlow has 351 million.
const MAX_WEIGHTS: u64 = 2 << 30;

/// What `config.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VoiceConfig {
    /// Version of the folder's layout: [`FORMAT`].
    pub format: u32,
    /// Name of the voice, for messages.
    pub name: String,
    /// The mel convention that the voice was trained on.
    pub mel: MelConfig,
    /// The design of the flow.
    pub flow: FlowConfig,
    /// Defaults at synthesis.
    pub synthesis: SynthesisConfig,
    /// What it was trained on, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_on: Option<TrainedOn>,
    /// SHA-256 of `model.safetensors`, lower-case hexadecimal.
    pub weights_sha256: String,
}

/// What a voice was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainedOn {
    /// Names of its clips; `A..B` are the names from A to B in alphabetical order.
    pub clips: Vec<String>,
    /// The lowest value of each band in their mels.
    pub low: Vec<f32>,
    /// The highest value of each band.
    pub high: Vec<f32>,
    /// Level of the whitened residual: root mean square, the median of hops. `None` without a whitening
    /// front. A hop of synthesis that is far above it is the flow's failure, and noise stands in for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual_level: Option<f32>,
    /// Mean [`Detail`](crate::mel::detail::Detail) of the sounds' mels, nats. Where a mel has much less of it, it is
    /// sharpened and not refined. `None`: all are taken alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<f32>,
}

impl TrainedOn {
    /// What a voice knows that started from `voice`: both together.
    pub fn after(mut self, voice: &Voice) -> Self {
        let Some(before) = &voice.config.trained_on else { return self };
        let clips = std::mem::take(&mut self.clips);
        self.clips = before.clips.clone();
        self.clips.extend(clips.into_iter().filter(|clip| !before.clips.contains(clip)));
        // a voice of another convention knows other bands
        if before.low.len() == self.low.len() {
            self.low.iter_mut().zip(&before.low).for_each(|(a, b)| *a = a.min(*b));
            self.high.iter_mut().zip(&before.high).for_each(|(a, b)| *a = a.max(*b));
        }
        self
    }

    /// Brings values of mel frames, one after the other with all bands of each, into the range of
    /// their bands.
    ///
    /// A flow has no sensible answer to what lies far outside of all that it has seen: digital silence
    /// under a voice whose recordings always had the noise of a room gave 10²⁷.
    pub fn bound(&self, frames: &mut [f32]) {
        for frame in frames.chunks_exact_mut(self.low.len()) {
            for ((value, low), high) in frame.iter_mut().zip(&self.low).zip(&self.high) {
                *value = value.clamp(*low, *high);
            }
        }
    }

    fn validate(&self, mel: &MelConfig, flow: &FlowConfig) -> Result<()> {
        let bands = mel.n_mels;
        if self.residual_level.is_some() && flow.whitening.is_none() {
            return Err(Error::invalid("trained_on: residual_level wants a flow with whitening"));
        }
        if self.low.len() != bands || self.high.len() != bands {
            let (low, high) = (self.low.len(), self.high.len());
            return Err(Error::invalid(format!("trained_on has {low} low and {high} high values, expected {bands}")));
        }
        if let Some(level) = self.residual_level
            && !(level > 0.0 && level.is_finite())
        {
            return Err(Error::invalid(format!(
                "trained_on: residual_level {level} is out of range, expected above 0"
            )));
        }
        if let Some(detail) = self.detail
            && !(detail > 0.0 && detail.is_finite())
        {
            return Err(Error::invalid(format!("trained_on: detail {detail} is out of range, expected above 0")));
        }
        // NaN is in no order
        match self.low.iter().zip(&self.high).position(|(low, high)| !(low <= high && (high - low).is_finite())) {
            Some(band) => Err(Error::invalid(format!("trained_on: low and high of band {band} are not in order"))),
            None => Ok(()),
        }
    }
}

/// Defaults at synthesis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SynthesisConfig {
    /// Standard deviation of the latent noise.
    pub sigma: f32,
    /// How strongly the flow's last recursion is driven below the top of the mel, as a part of what it was trained
    /// with; 1 for flows without one.
    #[serde(default = "SynthesisConfig::whole", skip_serializing_if = "SynthesisConfig::is_whole")]
    pub drive: f32,
    /// Passes of mel-consistency refinement; 0 is the bare flow.
    pub refine: usize,
    /// How far beyond a hop refinement listens.
    #[serde(default, skip_serializing_if = "Lookahead::is_all")]
    pub refine_lookahead: Lookahead,
}

/// How far beyond a hop of sound refinement listens before the hop is finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lookahead {
    /// Each pass goes over the whole utterance: the best sound, three frames of look-ahead a pass.
    #[default]
    All,
    /// All passes go over one hop after the other, with so many frames after it.
    Frames(usize),
}

impl Lookahead {
    /// The most frames accepted.
    pub const MAX_FRAMES: usize = 64;

    fn is_all(&self) -> bool {
        *self == Self::All
    }
}

impl std::str::FromStr for Lookahead {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            number => match number.parse() {
                Ok(frames) if frames <= Self::MAX_FRAMES => Ok(Self::Frames(frames)),
                _ => Err(format!("expected 0 to {} frames, or all", Self::MAX_FRAMES)),
            },
        }
    }
}

impl std::fmt::Display for Lookahead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Frames(frames) => frames.fmt(f),
        }
    }
}

impl VoiceConfig {
    /// A configuration of the current format; [`Voice::from_parts`] fills in the digest.
    pub fn new(name: &str, mel: MelConfig, flow: FlowConfig, synthesis: SynthesisConfig) -> Self {
        let (name, weights_sha256) = (name.to_string(), String::new());
        Self { format: FORMAT, name, mel, flow, synthesis, trained_on: None, weights_sha256 }
    }

    /// Checks ranges and relations once, on reading.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        if self.format != FORMAT {
            return Err(Error::invalid(format!(
                "format is {}, expected {FORMAT}: another version of melglow wrote this voice",
                self.format
            )));
        }
        self.mel.validate()?;
        self.flow.validate(&self.mel)?;
        self.trained_on.iter().try_for_each(|known| known.validate(&self.mel, &self.flow))?;
        self.synthesis.validate_for(&self.flow)
    }
}

impl SynthesisConfig {
    /// The largest standard deviation accepted.
    pub const MAX_SIGMA: f32 = 10.0;
    /// The strongest drive of a recursion accepted.
    pub const MAX_DRIVE: f32 = 2.0;
    /// Passes of refinement that new voices ask for: on six held-out clips PESQ 3.83 / 3.95 / 4.03 and
    /// DistillMOS 4.07 / 4.13 / 4.15 at 30 / 60 / 120 passes.
    pub const DEFAULT_REFINE: usize = 60;
    /// The most refinement passes accepted.
    pub const MAX_REFINE: usize = 1000;

    /// These, with refinement over the whole utterance.
    pub fn new(sigma: f32, refine: usize) -> Self {
        Self { sigma, drive: 1.0, refine, refine_lookahead: Lookahead::All }
    }

    fn whole() -> f32 {
        1.0
    }

    fn is_whole(drive: &f32) -> bool {
        *drive == 1.0
    }

    /// Checks ranges, and whether a flow has what is driven.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate_for(&self, flow: &FlowConfig) -> Result<()> {
        if self.drive != 1.0 && !flow.steps().any(|step| matches!(step, StepConfig::Autoregressive { .. })) {
            return Err(Error::invalid(format!("drive is {}, but the flow has no autoregressive step", self.drive)));
        }
        self.validate()
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let Self { sigma, drive, refine, .. } = *self;
        if !(0.0..=Self::MAX_SIGMA).contains(&sigma) {
            return Err(Error::invalid(format!("sigma is {sigma}, expected 0 to {}", Self::MAX_SIGMA)));
        }
        if !(0.0..=Self::MAX_DRIVE).contains(&drive) {
            return Err(Error::invalid(format!("drive is {drive}, expected 0 to {}", Self::MAX_DRIVE)));
        }
        if refine > Self::MAX_REFINE {
            return Err(Error::invalid(format!("refine is {refine}, expected 0 to {}", Self::MAX_REFINE)));
        }
        if let Lookahead::Frames(frames) = self.refine_lookahead
            && frames > Lookahead::MAX_FRAMES
        {
            let most = Lookahead::MAX_FRAMES;
            return Err(Error::invalid(format!("refine_lookahead is {frames} frames, expected 0 to {most}")));
        }
        Ok(())
    }
}

/// The voices that are built in: name, configuration, weights.
#[cfg(embedded_voice)]
static EMBEDDED: &[(&str, &[u8], &[u8])] = &[
    ("lj", include_bytes!("../voices/lj/config.json"), include_bytes!("../voices/lj/model.safetensors")),
    ("lj-live", include_bytes!("../voices/lj-live/config.json"), include_bytes!("../voices/lj-live/model.safetensors")),
];
#[cfg(not(embedded_voice))]
static EMBEDDED: &[(&str, &[u8], &[u8])] = &[];

/// A voice in memory: its configuration and its weights as `model.safetensors` has them.
#[derive(Clone)]
pub struct Voice {
    config: VoiceConfig,
    weights: Cow<'static, [u8]>,
}

impl std::fmt::Debug for Voice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Voice").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Voice {
    /// Reads a voice from its folder and checks that its weights fit its flow.
    ///
    /// # Errors
    /// If a file is missing, too large or damaged, a field is unknown or out of range, or a tensor
    /// is missing, surplus or of the wrong shape; the message names it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let problem = if dir.exists() { "is not a folder" } else { "no such folder" };
            return Err(Error::file(
                dir,
                format!("{problem}; a voice is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"),
            ));
        }
        let path = dir.join(CONFIG_FILE);
        let config = parse_config(&read_bounded(&path, MAX_CONFIG)?).map_err(|e| at(&path, e))?;
        let path = dir.join(WEIGHTS_FILE);
        let weights = Cow::Owned(read_bounded(&path, MAX_WEIGHTS)?);
        let voice = Self { config, weights };
        voice.check().map_err(|e| at(&path, e))?;
        Ok(voice)
    }

    /// A voice from tensors, as after training. The digest in `config` is filled in here.
    ///
    /// Tensors are stored as f32 (those of type f16 or bf16 as they are), in the order of their
    /// names. That they fit the flow is checked by [`Voice::build_flow`] only.
    ///
    /// # Errors
    /// If `config` is out of range or two tensors have one name.
    pub fn from_parts(mut config: VoiceConfig, tensors: &[(String, Tensor)]) -> Result<Self> {
        config.validate()?;
        let weights = to_safetensors(tensors)?;
        config.weights_sha256 = digest(&weights);
        Ok(Self { config, weights: Cow::Owned(weights) })
    }

    /// The voice that is built into the program and speaks by default, `lj`.
    ///
    /// # Errors
    /// If this build has none.
    pub fn embedded() -> Result<Self> {
        Self::embedded_as("lj")
    }

    /// Names of the voices that are built into the program.
    pub fn embedded_names() -> impl Iterator<Item = &'static str> {
        EMBEDDED.iter().map(|(name, ..)| *name)
    }

    /// One of the voices that are built into the program, by its name.
    ///
    /// # Errors
    /// If this build has no such voice.
    pub fn embedded_as(name: &str) -> Result<Self> {
        let Some((_, config, weights)) = EMBEDDED.iter().find(|(own, ..)| *own == name) else {
            return Err(Error::invalid(match EMBEDDED {
                [] => "no voice is built in; use --voice".to_string(),
                _ => format!("no voice {name} is built in"),
            }));
        };
        Ok(Self { config: parse_config(config)?, weights: Cow::Borrowed(weights) })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &VoiceConfig {
        &self.config
    }

    /// The weights by name, on the CPU, as they are stored.
    ///
    /// # Errors
    /// If the bytes aren't those that the digest was made of, or aren't a safetensors file.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let expected = &self.config.weights_sha256;
        let found = digest(&self.weights);
        if found != *expected {
            return Err(Error::invalid(format!(
                "SHA-256 is {found}, {CONFIG_FILE} says {expected}: the file is damaged or belongs to another voice"
            )));
        }
        let file = SafeTensors::deserialize(&self.weights)
            .map_err(|e| Error::invalid(format!("not a safetensors file: {}", one_line(&e))))?;
        file.iter().map(|(name, view)| Ok((name.to_string(), to_tensor(name, &view)?))).collect()
    }

    /// Builds the flow on the CPU, and gives the parameters that it is made of.
    ///
    /// # Errors
    /// If a tensor is missing, surplus or of the wrong shape; the message names it.
    pub fn build_flow(&self) -> Result<(Flow, Params)> {
        self.build_flow_on(&Device::Cpu)
    }

    /// [`Voice::build_flow`] on a device of choice.
    ///
    /// # Errors
    /// As [`Voice::build_flow`].
    pub fn build_flow_on(&self, device: &Device) -> Result<(Flow, Params)> {
        self.build(Params::loaded(self.tensors()?, device))
    }

    /// Builds the flow for inference on the CPU: nothing is kept for gradients.
    ///
    /// # Errors
    /// As [`Voice::build_flow`].
    pub fn build_frozen_flow(&self) -> Result<Flow> {
        self.build_frozen_flow_on(&Device::Cpu)
    }

    /// [`Voice::build_frozen_flow`] on a device of choice.
    ///
    /// # Errors
    /// As [`Voice::build_flow`].
    pub fn build_frozen_flow_on(&self, device: &Device) -> Result<Flow> {
        Ok(self.build(Params::frozen(self.tensors()?, device))?.0)
    }

    fn build(&self, params: Params) -> Result<(Flow, Params)> {
        let flow = Flow::new(&self.config.flow, &self.config.mel, params.builder()).map_err(|e| match e {
            Error::Tensor(e) => Error::invalid(one_line(&e)),
            other => other,
        })?;
        match params.surplus().as_slice() {
            [] => Ok((flow, params)),
            [name] => Err(Error::invalid(format!("tensor {name} is not part of the flow"))),
            [name, rest @ ..] => {
                Err(Error::invalid(format!("tensor {name} and {} more are not part of the flow", rest.len())))
            }
        }
    }

    /// Writes the voice as the folder `dir`, whose parent must exist; see [`Voice::save_with`].
    ///
    /// # Errors
    /// If the folder can't be written, or is there and isn't a voice.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.save_with(dir, |_| Ok(()))
    }

    /// Writes the voice as the folder `dir`, with whatever `extra` puts beside its files.
    ///
    /// All is written into a temporary folder next to `dir`, which is then renamed: `dir` is never
    /// half-written. A voice that stands there is replaced with all that its folder holds.
    ///
    /// # Errors
    /// If the folder can't be written, is there and isn't a voice, or `extra` fails.
    pub fn save_with(&self, dir: impl AsRef<Path>, extra: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let dir = dir.as_ref();
        if dir.exists() && !dir.join(CONFIG_FILE).is_file() {
            return Err(Error::file(dir, "is there already and is not a voice's folder"));
        }
        let parent = match dir.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => return Err(Error::file(dir, "is not a name for a folder")),
        };
        let staged = staging(parent)?;
        let mut config = serde_json::to_vec_pretty(&self.config)
            .map_err(|e| Error::invalid(format!("config cannot be written: {e}")))?;
        config.push(b'\n');
        write_synced(&staged.path().join(CONFIG_FILE), &config)?;
        write_synced(&staged.path().join(WEIGHTS_FILE), &self.weights)?;
        extra(staged.path())?;
        // A folder cannot be renamed over another: the old one is moved away first, and deleted last.
        let old = if dir.exists() { Some(staging(parent)?) } else { None };
        if let Some(old) = &old {
            fs::rename(dir, old.path()).map_err(Error::io("replace", dir))?;
        }
        if let Err(error) = fs::rename(staged.path(), dir) {
            if let Some(old) = &old {
                fs::rename(old.path(), dir).map_err(Error::io("put back", dir))?;
            }
            return Err(Error::io("create", dir)(error));
        }
        // its name is gone: nothing to delete
        let _ = staged.keep();
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.build_flow().map(|_| ())
    }
}

fn parse_config(bytes: &[u8]) -> Result<VoiceConfig> {
    let config: VoiceConfig = serde_json::from_slice(bytes).map_err(|e| Error::invalid(one_line(&e)))?;
    config.validate()?;
    Ok(config)
}

/// Puts the file's name in front of what is wrong with it.
fn at(path: &Path, error: Error) -> Error {
    match error {
        Error::Invalid(problem) => Error::file(path, problem),
        other => other,
    }
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("is larger than {limit} bytes")));
    }
    Ok(bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut file = fs::File::create(path).map_err(Error::io("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", path))
}

/// A temporary folder in `parent` with the permissions of an ordinary one.
fn staging(parent: &Path) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".melglow-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent).map_err(atomic::nameless).map_err(Error::io("create a folder in", PathBuf::from(parent)))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tensor that is turned into bytes only when its turn comes.
struct Stored<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
}

impl Stored<'_> {
    fn bytes(&self) -> Result<Vec<u8>, candle_core::Error> {
        let flat = self.tensor.to_device(&Device::Cpu)?.flatten_all()?;
        Ok(match self.dtype {
            Dtype::F16 => flat.to_vec1::<half::f16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::BF16 => flat.to_vec1::<half::bf16>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
    }
}

impl safetensors::View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.tensor.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // the interface has no way to fail: an empty answer is noticed by its length
        Cow::Owned(self.bytes().unwrap_or_default())
    }

    fn data_len(&self) -> usize {
        let size = if self.dtype == Dtype::F32 { 4 } else { 2 };
        self.tensor.elem_count() * size
    }
}

fn to_safetensors(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut stored: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| {
            let dtype = match tensor.dtype() {
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            (name.as_str(), Stored { tensor, dtype })
        })
        .collect();
    stored.sort_by_key(|(name, _)| *name);
    if let Some(pair) = stored.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::invalid(format!("two tensors are named {}", pair[0].0)));
    }
    let data: usize = stored.iter().map(|(_, stored)| safetensors::View::data_len(stored)).sum();
    let bytes = safetensors::serialize(stored, None)
        .map_err(|e| Error::invalid(format!("tensors cannot be stored: {}", one_line(&e))))?;
    let header = bytes.first_chunk().map_or(0, |len| u64::from_le_bytes(*len) as usize);
    if bytes.len() != 8 + header + data {
        return Err(Error::invalid("tensors cannot be stored: one could not be read"));
    }
    Ok(bytes)
}

fn to_tensor(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let (data, shape) = (view.data(), view.shape());
    let tensor = match view.dtype() {
        Dtype::F32 => Tensor::from_raw_buffer(data, DType::F32, shape, &Device::Cpu)?,
        Dtype::F16 => Tensor::from_raw_buffer(data, DType::F16, shape, &Device::Cpu)?,
        Dtype::BF16 => Tensor::from_raw_buffer(data, DType::BF16, shape, &Device::Cpu)?,
        other => {
            return Err(Error::invalid(format!("tensor {name} is of type {other:?}, expected F32, F16 or BF16")));
        }
    };
    Ok(tensor)
}

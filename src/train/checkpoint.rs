//! Checkpoints: `RUN/step-N/` is a voice folder (averaged weights) with `train/` beside it (raw
//! weights, moments, step, position of the random numbers), written whole or not at all.

use super::config::Recipe;
use super::optimiser::Optimiser;
use crate::flow::config::is_default;
use crate::net::Params;
use crate::voice::{TrainedOn, Voice, VoiceConfig};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Checkpoints that are kept beside the best one.
const KEEP: usize = 3;
const OPTIMISER_FILE: &str = "train/optimiser.safetensors";
const STATE_FILE: &str = "train/state.json";
const RECIPE_FILE: &str = "train/recipe.json";
/// Key of the recent gradient norms in the optimiser's file.
const NORMS: &str = "norms";

/// What a run remembers beside its weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps done, skipped ones among them.
    pub step: usize,
    /// Steps that changed the weights.
    pub updates: u64,
    /// The run's seed.
    pub seed: u64,
    /// Words taken from the stream that picks segments.
    pub rng_words: u64,
    /// Factor on the learning rate: halved at each rollback.
    pub lr_scale: f64,
    /// Steps skipped in a row.
    pub skipped_in_row: usize,
    /// Rollbacks so far.
    pub rollbacks: usize,
    /// Positions that segments are drawn from: tells whether the data is the same.
    pub positions: u64,
    /// Time of one core that the steps took, where the recipe limits it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_seconds: Option<f64>,
    /// Digest of the teacher's weights, where the run has a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Whether the clips' mels were given, and not made of their sounds.
    #[serde(default, skip_serializing_if = "is_default")]
    pub given_mels: bool,
    /// The best held-out likelihood so far, and where.
    pub best: Option<HeldOut>,
    /// Recent gradient norms, oldest first (stored as a tensor, exactly).
    #[serde(skip)]
    pub norms: Vec<f32>,
}

/// A held-out likelihood and its step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// The step.
    pub step: usize,
    /// Bits per sample.
    pub bits: f64,
    /// Clips that the figure leaves out, since their likelihood overflows.
    #[serde(default, skip_serializing_if = "is_default")]
    pub left_out: usize,
}

impl HeldOut {
    /// Whether it is better than another: of more clips, or else likelier.
    pub fn beats(&self, other: &Self) -> bool {
        (self.left_out, self.bits) < (other.left_out, other.bits)
    }
}

/// The folder of a step's checkpoint.
pub fn folder(run: &Path, step: usize) -> PathBuf {
    run.join(format!("step-{step}"))
}

/// Steps of the complete checkpoints in a run's folder, in order.
///
/// # Errors
/// If the folder can't be read; one that isn't there has none.
pub fn steps(run: &Path) -> Result<Vec<usize>> {
    if !run.exists() {
        return Ok(Vec::new());
    }
    let mut steps = Vec::new();
    for entry in fs::read_dir(run).map_err(Error::io("read", run))? {
        let entry = entry.map_err(Error::io("read", run))?;
        if let Some(step) = entry.file_name().to_str().and_then(|n| n.strip_prefix("step-")?.parse().ok())
            && entry.path().join(STATE_FILE).is_file()
        {
            steps.push(step);
        }
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Writes the checkpoint of `state.step` and removes old ones.
///
/// # Errors
/// If it can't be written.
pub fn save(
    run: &Path,
    (recipe, trained_on): (&Recipe, &TrainedOn),
    params: &Params,
    optimiser: &Optimiser,
    state: &State,
) -> Result<()> {
    let tensors = averaged(params, optimiser, &Device::Cpu)?;
    let config = VoiceConfig {
        trained_on: Some(trained_on.clone()),
        ..VoiceConfig::new(&recipe.name, recipe.mel.clone(), recipe.flow.clone(), recipe.synthesis())
    };
    let tensors: Vec<_> = tensors.into_iter().collect();
    Voice::from_parts(config, &tensors)?.save_with(folder(run, state.step), |dir| {
        fs::create_dir(dir.join("train")).map_err(Error::io("create", dir.join("train")))?;
        let mut moments = optimiser.state()?;
        if !state.norms.is_empty() {
            moments.insert(NORMS.to_string(), Tensor::new(state.norms.as_slice(), &Device::Cpu)?);
        }
        candle_core::safetensors::save(&moments, dir.join(OPTIMISER_FILE))?;
        write_json(&dir.join(STATE_FILE), state)?;
        write_json(&dir.join(RECIPE_FILE), recipe)
    })?;
    prune(run, state)
}

/// The voice's weights: averages of what is trained, the rest as it is.
///
/// # Errors
/// If a tensor can't be made.
pub fn averaged(params: &Params, optimiser: &Optimiser, device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut tensors: HashMap<_, _> =
        params.named().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    tensors.extend(optimiser.averages(device)?);
    Ok(tensors)
}

/// The recipe of a checkpoint.
///
/// # Errors
/// If it can't be read.
pub fn recipe(run: &Path, step: usize) -> Result<Recipe> {
    let path = folder(run, step).join(RECIPE_FILE);
    let json = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    Recipe::parse(&json, &path.display().to_string())
}

/// Puts a checkpoint's weights and moments into `optimiser` (and so into its parameters) and gives
/// the rest.
///
/// # Errors
/// If the checkpoint can't be read or belongs to another flow.
pub fn restore(run: &Path, step: usize, optimiser: &mut Optimiser) -> Result<State> {
    let dir = folder(run, step);
    let path = dir.join(STATE_FILE);
    let json = fs::read(&path).map_err(Error::io("read", &path))?;
    let mut state: State = serde_json::from_slice(&json).map_err(|e| Error::file(&path, e.to_string()))?;
    let path = dir.join(OPTIMISER_FILE);
    let moments = candle_core::safetensors::load(&path, &Device::Cpu).map_err(|e| Error::file(&path, e.to_string()))?;
    optimiser.restore(&moments, state.updates).map_err(|e| Error::file(&path, e.to_string()))?;
    if let Some(norms) = moments.get(NORMS) {
        state.norms = norms.to_vec1()?;
    }
    Ok(state)
}

/// Removes all but the newest [`KEEP`] checkpoints and the best one that is there.
fn prune(run: &Path, state: &State) -> Result<()> {
    let steps = steps(run)?;
    for &step in &steps[..steps.len().saturating_sub(KEEP)] {
        if state.best.is_none_or(|best| best.step != step) {
            let dir = folder(run, step);
            fs::remove_dir_all(&dir).map_err(Error::io("remove", &dir))?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    fs::write(path, json + "\n").map_err(Error::io("write", path))
}

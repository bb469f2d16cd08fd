//! Recipes: everything that decides what a training run computes, in one JSON file.

use crate::flow::FlowConfig;
use crate::flow::config::is_default;
use crate::mel::MelConfig;
use crate::voice::{Lookahead, SynthesisConfig, VoiceConfig};
use crate::{Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::Path;

/// The recipes that the binary carries: name and JSON.
const RECIPES: [(&str, &str); 16] = [
    ("tiny", include_str!("../../assets/recipes/tiny.json")),
    ("lj", include_str!("../../assets/recipes/lj.json")),
    ("lj-live", include_str!("../../assets/recipes/lj-live.json")),
    ("parallel", include_str!("../../assets/recipes/parallel.json")),
    ("waveglow", include_str!("../../assets/recipes/waveglow.json")),
    ("waveglow-64", include_str!("../../assets/recipes/waveglow-64.json")),
    ("nice", include_str!("../../assets/recipes/nice.json")),
    ("realnvp", include_str!("../../assets/recipes/realnvp.json")),
    ("glow", include_str!("../../assets/recipes/glow.json")),
    ("flowavenet", include_str!("../../assets/recipes/flowavenet.json")),
    ("flowpp", include_str!("../../assets/recipes/flowpp.json")),
    ("fvae", include_str!("../../assets/recipes/fvae.json")),
    ("arflow", include_str!("../../assets/recipes/arflow.json")),
    ("tarflow", include_str!("../../assets/recipes/tarflow.json")),
    ("waveflow", include_str!("../../assets/recipes/waveflow.json")),
    ("iresnet", include_str!("../../assets/recipes/iresnet.json")),
];

/// Part of a run limited in time that the warm-up may take.
const WARMUP_SHARE: f64 = 0.05;

/// A training run's design.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What the recipe is called.
    pub name: String,
    /// The mel convention.
    pub mel: MelConfig,
    /// The flow.
    pub flow: FlowConfig,
    /// Optimiser, batches, schedule.
    pub training: Training,
    /// Standard deviation of the noise that the voice will speak from; where it isn't said, 1, that of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f32>,
    /// How strongly the voice's last recursion will be driven below the top of the mel; where it isn't said, 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive: Option<f32>,
    /// Passes of refinement that the voice will ask for; where it isn't said,
    /// [`SynthesisConfig::DEFAULT_REFINE`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<usize>,
    /// How far beyond a hop that refinement listens; where it isn't said, over the whole utterance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine_lookahead: Option<Lookahead>,
    /// Which clips are held out.
    pub validation: Validation,
}

/// Optimiser, batches, schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Where the cosine decay ends, as a fraction of the peak.
    pub final_lr_fraction: f64,
    /// Optimiser steps of the whole run.
    pub steps: usize,
    /// Minutes of one core's time that the steps may take, evaluation and reading apart: the run ends
    /// with them if not with `steps`, and the schedule of the learning rate follows them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_minutes: Option<f64>,
    /// Segments per forward pass on a GPU; on the CPU it is divided ([`Training::graphs`]).
    pub batch: usize,
    /// Samples per segment: a multiple of the hop.
    pub segment_samples: usize,
    /// Batches per optimiser step.
    pub accumulate: usize,
    /// Global gradient norm above which gradients are scaled down.
    pub clip_norm: f64,
    /// Adam's decay of the first moment.
    pub beta1: f64,
    /// Adam's decay of the second moment.
    pub beta2: f64,
    /// Adam's guard of the denominator.
    pub eps: f64,
    /// Decoupled weight decay (AdamW).
    pub weight_decay: f64,
    /// Decay of the running average of the weights that becomes the voice.
    pub ema_decay: f64,
    /// Steps between held-out likelihoods.
    pub eval_every: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Segments of the batch for data-dependent initialisation.
    pub init_batch: usize,
    /// Copies of each training clip, each cut a little later against the grid of frames and steps:
    /// other mels and other groups of the same sound.
    #[serde(default = "one")]
    pub shifts: usize,
    /// Further copies of each training clip as other speakers and rooms would have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variety: Option<Variety>,
    /// Further copies of each training clip with mels as acoustic models give them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smooth: Option<SmoothMels>,
    /// Whether the whitening front's net goes on learning with the flow, by the same likelihood.
    #[serde(default)]
    pub joint_whitening: bool,
    /// Standard deviation of Gaussian noise that training adds to what the steps see, behind the
    /// whitening: TarFlow's augmentation. Held-out figures are without it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub noise: f64,
}

/// How far copies of training clips stray from the recording, each drawn evenly (speed and level by their
/// logarithms) between both bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variety {
    /// Copies of each clip, at most 64: they are kept in memory.
    pub copies: usize,
    /// Speed, and pitch and formants with it: from `1 / speed` to `speed`, at most 2, to the nearest fiftieth.
    pub speed: f64,
    /// Level: from `-level_db` to `level_db`, but never beyond full scale; dB, at most 60.
    pub level_db: f64,
    /// Colour: the sample before is added, times `-colour` to `colour`; at most 0.9. 0.5 moves the lowest
    /// frequencies 10 dB against the highest, up or down.
    pub colour: f64,
}

/// How smooth the mels of copies of training clips become, each drawn evenly from nothing to the bound; and of each
/// copy's mel a part, drawn from nothing to all of it, is the smoothed one, the rest its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmoothMels {
    /// Copies of each clip, at most 64: they are kept in memory. They are of those that `shifts` cuts, in turn.
    pub copies: usize,
    /// Standard deviation of the Gaussian mean over bands, at most 16.
    pub bands: f64,
    /// Standard deviation of the Gaussian mean over frames, at most 16.
    pub frames: f64,
    /// Kinds of frames, at most 4096, or 0: every other copy's smoothed mel, from the second on, has of each frame what
    /// frames of its kind have in common, as if told by a model that knows no more, in place of means over bands. Each
    /// of these copies has kinds of its own: so many, or fewer, down to a sixteenth.
    #[serde(default, skip_serializing_if = "is_default")]
    pub classes: usize,
}

impl SmoothMels {
    /// Names the first field that is out of range.
    fn problem(&self) -> Option<String> {
        let bounds = [
            ("copies", self.copies as f64, 0.0..=64.0),
            ("bands", self.bands, 0.0..=16.0),
            ("frames", self.frames, 0.0..=16.0),
            ("classes", self.classes as f64, 0.0..=4096.0),
        ];
        out_of_bounds("smooth", bounds)
    }
}

/// Names the first of a group's values that is out of range.
fn out_of_bounds<const N: usize>(group: &str, bounds: [(&str, f64, RangeInclusive<f64>); N]) -> Option<String> {
    let (name, value, range) = bounds.into_iter().find(|(_, value, range)| !range.contains(value))?;
    Some(format!("{group}.{name} is {value}, expected {} to {}", range.start(), range.end()))
}

impl Variety {
    /// Names the first field that is out of range.
    fn problem(&self) -> Option<String> {
        let bounds = [
            ("copies", self.copies as f64, 0.0..=64.0),
            ("speed", self.speed, 1.0..=2.0),
            ("level_db", self.level_db, 0.0..=60.0),
            ("colour", self.colour, 0.0..=0.9),
        ];
        out_of_bounds("variety", bounds)
    }
}

fn one() -> usize {
    1
}

/// Which clips are held out of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Validation {
    /// Clips by name; `A..B` means all names from A to B in alphabetical order, both included.
    Clips {
        /// Names and ranges.
        names: Vec<String>,
    },
    /// Every `every`-th clip in name order, starting with the last.
    EveryNth {
        /// One of how many.
        every: usize,
    },
}

impl Validation {
    /// Every 20th clip: where nothing better is known of the clips.
    pub const DEFAULT: Self = Self::EveryNth { every: 20 };

    /// Those of the clip `names` (in order) that are held out.
    pub fn held_out(&self, names: &[String]) -> HashSet<String> {
        let held = |&(i, name): &(usize, &String)| match self {
            Self::Clips { names: ranges } => ranges.iter().any(|range| in_range(name, range)),
            Self::EveryNth { every } => (names.len() - 1 - i).is_multiple_of(*every),
        };
        names.iter().enumerate().filter(held).map(|(_, name)| name.clone()).collect()
    }

    /// What stands in for it in a folder with these clips, where it names none of them: every 20th, if
    /// that leaves one to train on.
    pub fn stand_in(&self, names: &[String]) -> Option<Self> {
        let by_name = matches!(self, Self::Clips { names } if !names.is_empty());
        (by_name && names.len() > 1 && self.held_out(names).is_empty()).then_some(Self::DEFAULT)
    }
}

/// Those of the names and ranges that no clip of `names` goes by.
pub fn unknown<'a>(ranges: &'a [String], names: &[String]) -> Vec<&'a str> {
    let known = |range: &str| names.iter().any(|name| in_range(name, range));
    ranges.iter().map(String::as_str).filter(|range| !known(range)).collect()
}

/// Whether `name` is `range`, or within it if `range` is `A..B` (both ends included).
pub fn in_range(name: &str, range: &str) -> bool {
    match range.split_once("..") {
        Some((first, last)) => (first..=last).contains(&name),
        None => name == range,
    }
}

impl Recipe {
    /// Names of the recipes that the binary carries.
    pub fn names() -> impl Iterator<Item = &'static str> {
        RECIPES.iter().map(|(name, _)| *name)
    }

    /// The recipe of a name that the binary carries, or else of a file.
    ///
    /// # Errors
    /// If there is neither, or the JSON isn't a valid recipe.
    pub fn open(name_or_path: &str) -> Result<Self> {
        if let Some((_, json)) = RECIPES.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(json, name_or_path);
        }
        let path = Path::new(name_or_path);
        if !path.exists() && !name_or_path.contains(['/', '\\', '.']) {
            let names: Vec<_> = Self::names().collect();
            return Err(Error::invalid(format!(
                "there is no recipe {name_or_path}, neither a built-in one ({}) nor a file",
                names.join(", ")
            )));
        }
        let json = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Self::parse(&json, name_or_path)
    }

    /// The recipe for going on with a voice on other recordings: its own design, NVIDIA's learning
    /// rate and segments, every 20th clip held out.
    pub fn fine_tuning(voice: &VoiceConfig) -> Self {
        let hop = voice.mel.hop_length;
        Self {
            name: format!("fine-tuning {}", voice.name),
            sigma: Some(voice.synthesis.sigma),
            drive: Some(voice.synthesis.drive),
            refine: Some(voice.synthesis.refine),
            refine_lookahead: Some(voice.synthesis.refine_lookahead),
            mel: voice.mel.clone(),
            flow: voice.flow.clone(),
            training: Training {
                learning_rate: 1e-4,
                warmup_steps: 200,
                final_lr_fraction: 0.1,
                steps: 10_000,
                cpu_minutes: None,
                batch: 4,
                // NVIDIA trains on 16 000 samples, cut to whole hops
                segment_samples: (16_000 / hop).max(1) * hop,
                accumulate: 1,
                clip_norm: 10.0,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: 0.0,
                ema_decay: 0.999,
                eval_every: 500,
                checkpoint_every: 500,
                init_batch: 4,
                shifts: 1,
                variety: None,
                smooth: None,
                joint_whitening: false,
                noise: 0.0,
            },
            validation: Validation::DEFAULT,
        }
    }

    /// A recipe from JSON; `origin` is what errors call it.
    ///
    /// # Errors
    /// If the JSON isn't a valid recipe.
    pub fn parse(json: &str, origin: &str) -> Result<Self> {
        let recipe: Self = serde_json::from_str(json).map_err(|e| Error::invalid(format!("recipe {origin}: {e}")))?;
        recipe.validate().map_err(|e| Error::invalid(format!("recipe {origin}: {e}")))?;
        Ok(recipe)
    }

    /// Defaults at synthesis of the voice that it makes.
    pub fn synthesis(&self) -> SynthesisConfig {
        SynthesisConfig {
            sigma: self.sigma.unwrap_or(1.0),
            drive: self.drive.unwrap_or(1.0),
            refine: self.refine.unwrap_or(SynthesisConfig::DEFAULT_REFINE),
            refine_lookahead: self.refine_lookahead.unwrap_or_default(),
        }
    }

    /// Whether segments are whitened each time they are drawn: because the whitening learns, or because
    /// the noise before it is drawn by the flow.
    pub fn whitens_anew(&self) -> bool {
        self.training.joint_whitening || self.flow.dequantisation.is_some()
    }

    /// Checks ranges and relations.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        self.mel.validate()?;
        self.flow.validate(&self.mel)?;
        self.synthesis().validate_for(&self.flow)?;
        let t = &self.training;
        let hop = self.mel.hop_length;
        let unit = |v: f64| (0.0..1.0).contains(&v);
        let counts = [
            ("steps", t.steps),
            ("batch", t.batch),
            ("accumulate", t.accumulate),
            ("eval_every", t.eval_every),
            ("checkpoint_every", t.checkpoint_every),
            ("init_batch", t.init_batch),
            ("shifts", t.shifts),
        ];
        let problem = if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            format!("{name} is 0, expected at least 1")
        } else if self.flow.group == 0 || !hop.is_multiple_of(self.flow.group) {
            format!("hop_length {hop} must be a multiple of flow.group {}", self.flow.group)
        } else if t.segment_samples == 0 || !t.segment_samples.is_multiple_of(hop) {
            format!("segment_samples is {}, expected a multiple of hop_length {hop}", t.segment_samples)
        } else if t.shifts > hop {
            format!("shifts is {}, expected at most hop_length {hop}", t.shifts)
        } else if let Some(problem) = t.variety.as_ref().and_then(Variety::problem) {
            problem
        } else if let Some(problem) = t.smooth.as_ref().and_then(SmoothMels::problem) {
            problem
        } else if t.joint_whitening && self.flow.whitening.is_none() {
            "joint_whitening wants a flow with whitening".to_string()
        } else if !(t.learning_rate > 0.0 && t.learning_rate.is_finite()) {
            format!("learning_rate is {}, expected above 0", t.learning_rate)
        } else if t.cpu_minutes.is_some_and(|minutes| !(minutes > 0.0 && minutes.is_finite())) {
            "cpu_minutes must be above 0".to_string()
        } else if !(0.0..=1.0).contains(&t.final_lr_fraction) {
            format!("final_lr_fraction is {}, expected 0 to 1", t.final_lr_fraction)
        } else if !(unit(t.beta1) && unit(t.beta2) && unit(t.ema_decay)) {
            format!("beta1 {}, beta2 {} and ema_decay {} must be from 0 to below 1", t.beta1, t.beta2, t.ema_decay)
        } else if !(0.0..=10.0).contains(&t.noise) {
            format!("noise is {}, expected 0 to 10", t.noise)
        } else if !(t.clip_norm > 0.0 && t.eps > 0.0 && t.weight_decay >= 0.0) {
            "clip_norm and eps must be above 0, weight_decay at least 0".to_string()
        } else if matches!(self.validation, Validation::EveryNth { every } if every < 2) {
            "validation.every must be at least 2".to_string()
        } else {
            return Ok(());
        };
        Err(Error::invalid(problem))
    }
}

impl Training {
    /// Segments in a graph, and graphs at a time: on a GPU the batch in one. On the CPU few segments in each, on all
    /// threads, so that they wait for each other once a step; the parameters' part in a graph costs as much as some
    /// thousand samples do.
    pub fn graphs(&self, device: &Device) -> (usize, usize) {
        const SAMPLES: usize = 4096;
        match device.is_cpu() {
            true => (SAMPLES.div_ceil(self.segment_samples).min(self.batch), rayon::current_num_threads()),
            false => (self.batch, 1),
        }
    }

    /// Leaves out all copies of clips; whether there were any.
    pub fn leave_copies_out(&mut self) -> bool {
        let copies = self.shifts > 1 || self.variety.is_some() || self.smooth.is_some();
        (self.shifts, self.variety, self.smooth) = (1, None, None);
        copies
    }

    /// Learning rate of step `step` (counted from 0), `cpu_seconds` into the run: linear warm-up, then a
    /// cosine to `final_lr_fraction` at the end.
    ///
    /// With `cpu_minutes` the cosine follows the time, and the warm-up is over after a twentieth of it
    /// at the latest: how many steps there will be nobody knows.
    pub fn learning_rate_at(&self, step: usize, cpu_seconds: f64) -> f64 {
        let mut warm = (step + 1) as f64 / self.warmup_steps.max(1) as f64;
        let rest = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let mut done = step.saturating_sub(self.warmup_steps) as f64 / rest;
        if let Some(minutes) = self.cpu_minutes {
            let spent = cpu_seconds / (60.0 * minutes);
            warm = warm.max(spent / WARMUP_SHARE);
            done = done.max(spent);
        }
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
        self.learning_rate * warm.min(1.0) * (self.final_lr_fraction + (1.0 - self.final_lr_fraction) * cosine)
    }

    /// Whether a run is at its end after `steps` steps and `cpu_seconds`.
    pub fn is_over(&self, steps: usize, cpu_seconds: f64) -> bool {
        steps >= self.steps || self.cpu_minutes.is_some_and(|minutes| cpu_seconds >= 60.0 * minutes)
    }

    /// Samples of audio that one optimiser step sees.
    pub fn samples_per_step(&self) -> usize {
        self.batch * self.segment_samples * self.accumulate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_are_valid() {
        for name in Recipe::names() {
            assert_eq!(Recipe::open(name).unwrap().name, name);
        }
    }

    #[test]
    fn what_is_not_there_cannot_learn() {
        let mut recipe = Recipe::open("tiny").unwrap();
        recipe.flow.whitening = None;
        recipe.training.joint_whitening = true;
        let error = recipe.validate().unwrap_err().to_string();
        assert!(error.contains("joint_whitening wants a flow with whitening"), "{error}");
        let recipe = Recipe { drive: Some(0.5), ..Recipe::open("tiny").unwrap() };
        let error = recipe.validate().unwrap_err().to_string();
        assert!(error.contains("drive is 0.5, but the flow has no autoregressive step"), "{error}");
    }

    #[test]
    fn variety_has_its_bounds() {
        let mut recipe = Recipe::open("tiny").unwrap();
        for (copies, speed, level_db, colour, name) in [
            (65, 1.2, 6.0, 0.1, "copies"),
            (1, 0.9, 6.0, 0.1, "speed"),
            (1, 1.2, -1.0, 0.1, "level_db"),
            (1, 1.2, 6.0, 1.0, "colour"),
            (1, f64::NAN, 6.0, 0.1, "speed"),
        ] {
            recipe.training.variety = Some(Variety { copies, speed, level_db, colour });
            let error = recipe.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("variety.{name} is")), "{error}");
        }
    }

    #[test]
    fn smoothness_has_its_bounds() {
        let mut recipe = Recipe::open("tiny").unwrap();
        for (copies, bands, frames, classes, name) in [
            (65, 1.0, 1.0, 0, "copies"),
            (1, 17.0, 1.0, 0, "bands"),
            (1, 1.0, -1.0, 0, "frames"),
            (1, f64::NAN, 1.0, 0, "bands"),
            (1, 1.0, 1.0, 4097, "classes"),
        ] {
            recipe.training.smooth = Some(SmoothMels { copies, bands, frames, classes });
            let error = recipe.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("smooth.{name} is")), "{error}");
        }
        recipe.training.smooth = Some(SmoothMels { copies: 1, bands: 16.0, frames: 0.0, classes: 4096 });
        recipe.validate().unwrap();
    }

    #[test]
    fn ranges_hold_both_ends() {
        let names = ["a", "b", "c", "d", "e", "x"].map(String::from);
        let held_out = |validation: Validation| {
            let held = validation.held_out(&names);
            names.iter().filter(|name| held.contains(*name)).map(String::as_str).collect::<String>()
        };
        assert_eq!(held_out(Validation::Clips { names: vec!["b..d".into(), "x".into()] }), "bcdx");
        assert_eq!(held_out(Validation::EveryNth { every: 3 }), "cx");
        let ranges = ["b..d", "e", "y", "f..w"].map(String::from);
        assert_eq!(unknown(&ranges, &names), ["y", "f..w"]);
    }

    #[test]
    fn names_of_other_clips_have_a_stand_in() {
        let names = ["a", "b"].map(String::from);
        let clips = |name: &str| Validation::Clips { names: vec![name.to_string()] };
        assert_eq!(clips("LJ001-0001..LJ002").stand_in(&names), Some(Validation::EveryNth { every: 20 }));
        assert_eq!(clips("a..b").stand_in(&names), None);
        assert_eq!(clips("c").stand_in(&names[..1]), None, "one clip is trained on");
        assert_eq!((Validation::Clips { names: vec![] }).stand_in(&names), None, "it was meant so");
        assert_eq!(Validation::EveryNth { every: 9 }.stand_in(&names), None);
    }

    #[test]
    fn the_schedule_warms_up_and_decays() {
        let mut recipe: Recipe = serde_json::from_str(RECIPES[1].1).unwrap();
        recipe.training.steps = 1000;
        let t = &recipe.training;
        assert!((t.learning_rate_at(0, 0.0) - t.learning_rate / t.warmup_steps as f64).abs() < 1e-12);
        assert!((t.learning_rate_at(t.warmup_steps, 0.0) - t.learning_rate).abs() < 1e-12);
        assert!((t.learning_rate_at(1000, 0.0) - t.learning_rate * t.final_lr_fraction).abs() < 1e-12);
        assert!(t.is_over(1000, 0.0) && !t.is_over(999, 1e9));
    }

    #[test]
    fn a_run_limited_in_time_has_the_whole_schedule_at_any_speed() {
        let mut t = Recipe::open("lj").unwrap().training;
        t.cpu_minutes = Some(2.0);
        // a slow flow: four steps in all
        assert!((t.learning_rate_at(0, 0.0) - 0.01 * t.learning_rate).abs() < 1e-12);
        let middle = t.learning_rate * 0.5 * (1.0 + t.final_lr_fraction);
        assert!((t.learning_rate_at(2, 60.0) - middle).abs() < 1e-12);
        assert!((t.learning_rate_at(4, 120.0) - t.learning_rate * t.final_lr_fraction).abs() < 1e-12);
        // a fast one is warm before a twentieth of the time
        assert!(t.learning_rate_at(200, 1.0) > 0.99 * t.learning_rate);
        assert!(t.is_over(4, 120.0) && !t.is_over(4, 119.0) && t.is_over(t.steps, 1.0));
    }
}

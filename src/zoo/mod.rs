//! The zoo: flows of many designs, trained for the same time on the same segments, in one table.

mod measure;
mod table;

use crate::audio::wav::{self, WavFormat};
use crate::flow::WHITENING_PREFIX;
use crate::flow::config::WhiteningConfig;
use crate::net::Passes;
use crate::train::clock::cpu_seconds;
use crate::train::config::Validation;
use crate::train::dataset::{self, Clip, Dataset};
use crate::train::log::duration;
use crate::train::{self, Recipe, checkpoint, evaluate, front};
use crate::voice::Voice;
use crate::{Error, Result, atomic};
use candle_core::Device;
use measure::{Scorer, sound_file, speak};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
pub use table::{JSON_FILE, MARKDOWN_FILE, Row, Settings, Table};

/// Segments of a training step, and samples of each: of the sizes tried for recipe `parallel`, the best for
/// little training.
const BATCH: usize = 4;
const SEGMENT: usize = 2048;
/// What the name of a recipe without its whitening front ends with.
const RAW: &str = "-raw";
/// Recipes that are also trained without the whitening front where no recipes are named. Of WaveGlow the
/// small size: ten minutes are 56 steps of the large one.
const ALSO_RAW: [&str; 4] = ["nice", "realnvp", "glow", "waveglow-64"];
/// The recipe whose whitening front those get that have none.
const FRONT_OF: &str = "parallel";
/// More steps than the time allows.
const MAX_STEPS: usize = 1_000_000_000;

/// What to compare, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of clips.
    pub data: PathBuf,
    /// Folder of the zoo.
    pub out: PathBuf,
    /// Minutes of one core for each recipe.
    pub minutes: f64,
    /// Names or paths of recipes, `-raw` behind those to be trained without the whitening front; none:
    /// the built-in ones.
    pub recipes: Vec<String>,
    /// The clips whose likelihood is measured.
    pub held_out: Validation,
    /// How many of them are spoken.
    pub spoken: usize,
    /// Seed of weights and segments.
    pub seed: u64,
    /// A program that judges sounds: called with a recording and a sound, it prints a number last.
    pub scorer: Option<String>,
    /// The processor's name, for the table.
    pub machine: String,
}

/// Trains and measures every recipe; the table is written after each.
///
/// What is finished in `out` isn't done again, what was interrupted goes on. A recipe that fails is told
/// and left out.
///
/// # Errors
/// If a recipe, the data or the scorer can't be used, or a file can't be written; at the end, if a
/// recipe failed. [`Error::Interrupted`] soon after `stop` is set.
pub fn run(options: &Options, stop: &AtomicBool) -> Result<Table> {
    let recipes = recipes(options)?;
    let names = Dataset::names(&options.data)?;
    if let Validation::Clips { names: ranges } = &options.held_out {
        dataset::check_names(&options.data, ranges, &names)?;
    }
    let held = options.held_out.held_out(&names);
    if held.is_empty() || held.len() == names.len() {
        let problem = format!("{} of its {} clips are held out, expected some but not all", held.len(), names.len());
        return Err(Error::file(&options.data, problem));
    }
    let mut held_out: Vec<String> = held.into_iter().collect();
    held_out.sort();
    let settings = Settings {
        minutes: options.minutes,
        seed: options.seed,
        batch: BATCH,
        segment_samples: SEGMENT,
        training_clips: names.len() - held_out.len(),
        // at least one: its time is the speed
        spoken: options.spoken.clamp(1, held_out.len()),
        held_out,
        scorer: options.scorer.clone(),
        machine: options.machine.clone(),
    };
    let table = Table::open(&options.out, settings)?;
    atomic::check_folder(&options.out)?;
    let mut zoo = Zoo { options, table, stop };
    let mut failed = Vec::new();
    for recipes in by_front(&recipes) {
        if zoo.todo(&recipes)? {
            failed.extend(zoo.of_one_front(&recipes)?);
        }
    }
    if !failed.is_empty() {
        return Err(Error::invalid(format!(
            "{} of {} recipes failed: {}",
            failed.len(),
            recipes.len(),
            failed.join(", ")
        )));
    }
    Ok(zoo.table)
}

/// The recipes as they are trained here.
fn recipes(options: &Options) -> Result<Vec<Recipe>> {
    let names: Vec<String> = if options.recipes.is_empty() {
        let raw = Recipe::names().filter(|name| ALSO_RAW.contains(name)).map(|name| format!("{name}{RAW}"));
        Recipe::names().map(str::to_string).chain(raw).collect()
    } else {
        options.recipes.clone()
    };
    let recipes: Vec<Recipe> = names.iter().map(|name| recipe(name, options)).collect::<Result<_>>()?;
    for (i, recipe) in recipes.iter().enumerate() {
        let name = &recipe.name;
        if recipes[..i].iter().any(|other| other.name == *name) {
            return Err(Error::invalid(format!("recipe {name} is named twice")));
        }
        if recipe.mel != recipes[0].mel {
            return Err(Error::invalid(format!(
                "recipe {name} has another mel convention than {}: their likelihoods don't compare",
                recipes[0].name
            )));
        }
        let plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
        if !name.starts_with(char::is_alphanumeric) || !name.chars().all(plain) {
            return Err(Error::invalid(format!("recipe {name:?}: its name must do for a folder")));
        }
    }
    Ok(recipes)
}

/// One of them: with or without a front, its segments and its time those of all.
fn recipe(name: &str, options: &Options) -> Result<Recipe> {
    let base = name.strip_suffix(RAW);
    let mut recipe = Recipe::open(base.unwrap_or(name))?;
    match base {
        Some(_) => {
            recipe.flow.whitening = None;
            recipe.name += RAW;
        }
        None => {
            let front = Recipe::open(FRONT_OF)?.flow.whitening;
            let fit_steps = front.as_ref().map_or(0, |front| front.fit_steps);
            let own = recipe.flow.whitening.as_ref();
            // one that differs in its fit alone is the same, so that it is shared
            if own.is_none_or(|own| Some(&WhiteningConfig { fit_steps, ..own.clone() }) == front.as_ref()) {
                recipe.flow.whitening = front;
            }
        }
    }
    let t = &mut recipe.training;
    t.joint_whitening = false;
    t.leave_copies_out();
    t.batch = BATCH;
    t.segment_samples = (SEGMENT / recipe.mel.hop_length).max(1) * recipe.mel.hop_length;
    t.accumulate = 1;
    t.steps = MAX_STEPS;
    t.eval_every = MAX_STEPS;
    t.cpu_minutes = Some(options.minutes);
    recipe.validation = options.held_out.clone();
    recipe.validate().map_err(|e| Error::invalid(format!("recipe {}: {e}", recipe.name)))?;
    Ok(recipe)
}

/// Recipes that have the same front, or none: they share whitened clips.
fn by_front(recipes: &[Recipe]) -> Vec<Vec<&Recipe>> {
    let mut groups: Vec<Vec<&Recipe>> = Vec::new();
    for recipe in recipes {
        match groups.iter_mut().find(|group| group[0].flow.whitening == recipe.flow.whitening) {
            Some(group) => group.push(recipe),
            None => groups.push(vec![recipe]),
        }
    }
    groups
}

fn digest(value: &impl serde::Serialize) -> Result<String> {
    let json = serde_json::to_vec(value).map_err(|e| Error::invalid(e.to_string()))?;
    Ok(Sha256::digest(json).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The name of a front's row and folder: after the first recipe that has it.
fn front_name(recipes: &[&Recipe]) -> String {
    format!("whitening-of-{}", recipes[0].name)
}

struct Zoo<'a> {
    options: &'a Options,
    table: Table,
    stop: &'a AtomicBool,
}

impl Zoo<'_> {
    /// Whether something is left to do of recipes with one front.
    fn todo(&self, recipes: &[&Recipe]) -> Result<bool> {
        let front = &recipes[0].flow.whitening;
        let mut todo = front.is_some() && self.table.row(&front_name(recipes), &digest(front)?)?.is_none();
        for recipe in recipes {
            todo |= self.table.row(&recipe.name, &digest(recipe)?)?.is_none();
        }
        Ok(todo)
    }

    /// Recipes with one front; the names of those that failed.
    fn of_one_front(&mut self, recipes: &[&Recipe]) -> Result<Vec<String>> {
        let (clips, held) = train::run::data(&self.options.data, None, recipes[0])?;
        if held.len() != self.table.settings.held_out.len() {
            return Err(Error::file(&self.options.data, "a held-out clip can't be used; hold out others"));
        }
        let recordings = self.recordings(&held, recipes[0].mel.sample_rate)?;
        let front = self.front(recipes, &clips, &held, &recordings)?;
        let mut failed = Vec::new();
        for recipe in recipes {
            match self.of_one(recipe, front.as_ref(), (&clips, &held), &recordings) {
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => {
                    eprintln!("{}: {error}", recipe.name);
                    failed.push(recipe.name.clone());
                }
                Ok(()) => {}
            }
        }
        Ok(failed)
    }

    /// Writes the recordings of what will be spoken, and tries the scorer on one.
    fn recordings(&self, held: &[Clip], sample_rate: u32) -> Result<PathBuf> {
        let folder = self.options.out.join("recordings");
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        for clip in &held[..self.table.settings.spoken] {
            wav::write(&sound_file(&folder, clip), &clip.samples(), sample_rate, WavFormat::Int16)?;
        }
        if let (Some(scorer), Some(clip)) = (self.scorer(), held.first()) {
            let recording = sound_file(&folder, clip);
            scorer.score(&recording, &recording)?;
        }
        Ok(folder)
    }

    fn scorer(&self) -> Option<Scorer> {
        self.options.scorer.as_deref().map(Scorer::new)
    }

    /// The front that recipes share, fitted once; all clips are then whitened, so that no recipe's time
    /// goes there.
    fn front(
        &mut self,
        recipes: &[&Recipe],
        clips: &[Clip],
        held: &[Clip],
        recordings: &Path,
    ) -> Result<Option<Voice>> {
        let Recipe { mel, flow, .. } = recipes[0];
        let Some(whitening) = &flow.whitening else { return Ok(None) };
        let (name, digest) = (front_name(recipes), digest(&flow.whitening)?);
        let folder = self.options.out.join(&name);
        let done = self.table.row(&name, &digest)?.is_some();
        let begun = cpu_seconds();
        let voice = match done {
            true => Voice::open(&folder)?,
            false => front::fit(mel, whitening, clips, self.options.seed, self.stop)?,
        };
        let seconds = cpu_seconds() - begun;
        if !done {
            voice.save(&folder)?;
            self.add(&name, digest, &voice, (whitening.fit_steps, seconds), held, recordings)?;
        }
        let (flow, hop) = (voice.build_frozen_flow()?, mel.hop_length);
        let begun = cpu_seconds();
        clips.par_iter().try_for_each(|clip| clip.whitened(&flow, hop).map(|_| ()))?;
        eprintln!("clips whitened in {} of one core", duration(cpu_seconds() - begun));
        Ok(Some(voice))
    }

    /// Trains and measures one recipe, unless that is done.
    fn of_one(
        &mut self,
        recipe: &Recipe,
        front: Option<&Voice>,
        (clips, held): (&[Clip], &[Clip]),
        recordings: &Path,
    ) -> Result<()> {
        let (name, digest) = (&recipe.name, digest(recipe)?);
        if self.table.row(name, &digest)?.is_some() {
            return Ok(());
        }
        eprintln!("{name}:");
        let out = self.options.out.join("runs").join(name);
        let resumed = checkpoint::steps(&out)?.last().copied();
        let options = train::Options {
            data: self.options.data.clone(),
            mels: None,
            out: out.clone(),
            recipe: Some(recipe.clone()),
            from: None,
            steps: None,
            batch: None,
            seed: Some(self.options.seed),
            resume: resumed.is_some(),
            stop_after: None,
            device: Device::Cpu,
            passes: Passes::default(),
        };
        let recipe = train::run::recipe(&options, resumed)?;
        let job = train::run::Job { recipe, resumed, front: front.cloned(), teacher: None };
        // nothing held out: the likelihood is measured once, at the end
        let summary = train::run::run(&options, job, (clips, &[]), self.stop)?;
        if !summary.complete {
            return Err(Error::Interrupted);
        }
        let voice = Voice::open(&summary.checkpoint)?;
        voice.save(self.options.out.join(name))?;
        self.add(name, digest, &voice, (summary.step, summary.cpu_seconds.unwrap_or(0.0)), held, recordings)?;
        std::fs::remove_dir_all(&out).map_err(Error::io("remove", &out))
    }

    /// Measures a voice of the zoo and adds its row.
    fn add(
        &mut self,
        name: &str,
        recipe_sha256: String,
        voice: &Voice,
        (steps, cpu_seconds): (usize, f64),
        held: &[Clip],
        recordings: &Path,
    ) -> Result<()> {
        let mel = &voice.config().mel;
        let flow = voice.build_frozen_flow()?;
        let parameters: usize = voice
            .tensors()?
            .iter()
            .filter(|(n, _)| !n.starts_with(WHITENING_PREFIX))
            .map(|(_, t)| t.elem_count())
            .sum();
        let bits = evaluate::bits(&flow, mel, held, &Device::Cpu, self.stop)?;
        let spoken = &held[..self.table.settings.spoken];
        let sounds = self.options.out.join("sounds").join(name);
        let speech = speak(voice, spoken, &sounds, recordings, self.scorer().as_ref())?;
        let row = Row {
            name: name.to_string(),
            recipe_sha256,
            parameters,
            gmac_per_second: flow.macs_per_sample() * f64::from(mel.sample_rate) / 1e9,
            steps,
            cpu_seconds,
            likelihood: bits.likelihood,
            bits: bits.per_sample,
            bits_ci95: bits.ci95,
            left_out: bits.left_out.len(),
            real_time_factor: speech.real_time_factor,
            lookahead_frames: speech.lookahead_frames,
            score: speech.score,
        };
        let (figure, remark) = (evaluate::figure(row.bits), bits.remark());
        eprintln!("{name}: {figure} bits per sample{remark}; real-time factor {:.3}", row.real_time_factor);
        self.table.rows.push(row);
        self.table.write(&self.options.out)
    }
}

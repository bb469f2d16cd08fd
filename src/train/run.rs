//! A training run, from a folder of clips to checkpoints.

use super::checkpoint::{self, Best, State};
use super::config::Recipe;
use super::dataset::{Clip, Dataset, Sampler};
use super::evaluate;
use super::log::{Log, Progress, duration};
use super::optimiser::Optimiser;
use crate::flow::{self, Flow};
use crate::net::Params;
use crate::net::params::named_rng;
use crate::voice::Voice;
use crate::{Error, Result};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Steps between two lines of figures in the log.
const LOG_EVERY: usize = 10;
/// Gradient norms that the median is taken over; none is judged before there are so many.
const NORMS: usize = 101;
/// A norm that many times the median is a jump.
const JUMP: f32 = 10.0;
/// Steps skipped in a row before the run goes back to its last checkpoint.
const SKIPS: usize = 10;
/// Rollbacks before the run gives up.
const ROLLBACKS: usize = 5;
/// Clips that the whitening front is fitted to, at most.
const WHITENING_CLIPS: usize = 400;

/// What to train, on what, and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of clips.
    pub data: PathBuf,
    /// Folder of the run.
    pub out: PathBuf,
    /// The recipe; a resumed run has its own, and this one, if given, must be the same but for its steps.
    pub recipe: Option<Recipe>,
    /// Steps of the whole run in place of the recipe's.
    pub steps: Option<usize>,
    /// Segments per forward pass in place of the recipe's.
    pub batch: Option<usize>,
    /// Seed of weights and segments; 0 if not given.
    pub seed: Option<u64>,
    /// Continue from the last checkpoint in `out`.
    pub resume: bool,
    /// Save and leave after this step, as if interrupted there.
    pub stop_after: Option<usize>,
    /// Where to compute.
    pub device: Device,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub step: usize,
    /// Whether all steps were done.
    pub complete: bool,
    /// The last held-out likelihood, bits per sample.
    pub bits: Option<f64>,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
}

/// Trains until the recipe's steps are done or `stop` is set; the last step is always saved.
///
/// # Errors
/// If the data or the recipe can't be used, a file can't be written, or training diverges.
pub fn train(options: &Options, stop: &AtomicBool) -> Result<Summary> {
    let resumed = resume_from(options)?;
    let recipe = recipe(options, resumed)?;
    let (clips, held) = data(options, &recipe)?;
    std::fs::create_dir_all(&options.out).map_err(Error::io("create", &options.out))?;
    let sampler = Sampler::new(&clips, recipe.training.segment_samples / recipe.mel.hop_length, recipe.mel.hop_length)?;
    if sampler.clips() < clips.len() {
        eprintln!("{} clips are shorter than a segment and are left out", clips.len() - sampler.clips());
    }
    let seed = options.seed.unwrap_or(0);
    let mut run = match resumed {
        Some(step) => Run::resume(options, recipe, step, &sampler)?,
        None => Run::start(options, recipe, seed, &clips, &sampler, stop)?,
    };
    run.steps(&sampler, &held, options.stop_after, stop)
}

/// The step to resume from, if that was asked for.
fn resume_from(options: &Options) -> Result<Option<usize>> {
    let last = checkpoint::steps(&options.out)?.last().copied();
    match (options.resume, last) {
        (true, None) => Err(Error::file(&options.out, "holds no checkpoint to resume from")),
        (false, Some(step)) => {
            let problem = format!("holds a run at step {step}; add --resume, or choose another folder");
            Err(Error::file(&options.out, problem))
        }
        (_, last) => Ok(last),
    }
}

fn recipe(options: &Options, resumed: Option<usize>) -> Result<Recipe> {
    let mut recipe = match (resumed, &options.recipe) {
        (Some(step), given) => {
            let mut own = checkpoint::recipe(&options.out, step)?;
            if let Some(given) = given {
                let mut given = given.clone();
                given.training.steps = own.training.steps;
                given.training.batch = options.batch.unwrap_or(own.training.batch);
                if given != own {
                    let problem = "the run was started with another recipe; leave --recipe and --batch out";
                    return Err(Error::file(&options.out, problem));
                }
            }
            own.training.steps = options.steps.unwrap_or(own.training.steps);
            own
        }
        (None, Some(given)) => given.clone(),
        (None, None) => return Err(Error::invalid("a new run needs a recipe")),
    };
    recipe.training.steps = options.steps.unwrap_or(recipe.training.steps);
    recipe.training.batch = options.batch.unwrap_or(recipe.training.batch);
    recipe.validate()?;
    Ok(recipe)
}

/// Training clips and held-out clips; says what was left out.
fn data(options: &Options, recipe: &Recipe) -> Result<(Vec<Clip>, Vec<Clip>)> {
    let dataset = Dataset::read(&options.data, &recipe.mel, |_| true)?;
    for line in &dataset.skipped {
        eprintln!("skipped {line}");
    }
    if !dataset.skipped.is_empty() {
        eprintln!("{} clips skipped", dataset.skipped.len());
    }
    if dataset.resampled > 0 {
        eprintln!("{} clips resampled to {} Hz", dataset.resampled, recipe.mel.sample_rate);
    }
    let names: Vec<_> = dataset.clips.iter().map(|clip| clip.name.as_str()).collect();
    let held_out = recipe.validation.held_out(&names);
    let (clips, held) = dataset.split(&held_out);
    let hop = recipe.mel.hop_length;
    let seconds = |clips: &[Clip]| {
        clips.iter().map(|c| c.frames(hop) * hop).sum::<usize>() as f64 / f64::from(recipe.mel.sample_rate)
    };
    eprintln!(
        "{} clips, {}; held out {}, {}",
        clips.len(),
        duration(seconds(&clips)),
        held.len(),
        duration(seconds(&held))
    );
    Ok((clips, held))
}

/// A run under way.
struct Run {
    out: PathBuf,
    device: Device,
    recipe: Recipe,
    params: Params,
    flow: Flow,
    optimiser: Optimiser,
    rng: ChaCha8Rng,
    state: State,
    log: Log,
    /// Segments seen and time spent since the last line of figures.
    figures: Figures,
    bits: Option<f64>,
}

#[derive(Default)]
struct Figures {
    steps: usize,
    bits: f64,
    grad_norm: f64,
    seconds: f64,
}

/// Why a step wasn't taken.
enum Fault {
    NotFinite,
    Jump,
}

impl Run {
    fn start(
        options: &Options,
        recipe: Recipe,
        seed: u64,
        clips: &[Clip],
        sampler: &Sampler,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let params = Params::seeded(seed, &options.device);
        let flow = Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
        if flow.has_whitening() {
            fit_whitening(&flow, clips, seed, stop)?;
        }
        let mut rng = named_rng(seed, "initialise");
        let batch = sampler.draw(&flow, recipe.training.init_batch, &mut rng, &options.device)?;
        flow.initialise(&batch.x, &batch.mel)?;
        let optimiser = Optimiser::new(&params, &recipe.training)?;
        let state = State {
            step: 0,
            updates: 0,
            seed,
            rng_words: 0,
            lr_scale: 1.0,
            skipped_in_row: 0,
            rollbacks: 0,
            positions: sampler.positions(),
            best: None,
            norms: Vec::new(),
        };
        let run = Self::assemble(options, recipe, params, flow, optimiser, state)?;
        // a first checkpoint, so that the fitted whitening isn't lost and a rollback has a place to go
        run.save()?;
        Ok(run)
    }

    fn resume(options: &Options, recipe: Recipe, step: usize, sampler: &Sampler) -> Result<Self> {
        let voice = Voice::open(checkpoint::folder(&options.out, step))?;
        let (flow, params) = voice.build_flow_on(&options.device)?;
        let mut optimiser = Optimiser::new(&params, &recipe.training)?;
        let mut state = checkpoint::restore(&options.out, step, &mut optimiser)?;
        if state.positions != sampler.positions() {
            eprintln!("the clips are not those that the run was started with; it goes on, but not identically");
            state.positions = sampler.positions();
        }
        if options.seed.is_some_and(|seed| seed != state.seed) {
            return Err(Error::invalid(format!("the run was started with seed {}; leave --seed out", state.seed)));
        }
        Self::assemble(options, recipe, params, flow, optimiser, state)
    }

    fn assemble(
        options: &Options,
        recipe: Recipe,
        params: Params,
        flow: Flow,
        optimiser: Optimiser,
        state: State,
    ) -> Result<Self> {
        let mut rng = named_rng(state.seed, "segments");
        rng.set_word_pos(u128::from(state.rng_words));
        let log = Log::open(&options.out, state.step)?;
        eprintln!("{} parameters; step {} of {}", optimiser.values(), state.step, recipe.training.steps);
        Ok(Self {
            out: options.out.clone(),
            device: options.device.clone(),
            recipe,
            params,
            flow,
            optimiser,
            rng,
            state,
            log,
            figures: Figures::default(),
            bits: None,
        })
    }

    fn steps(
        &mut self,
        sampler: &Sampler,
        held: &[Clip],
        stop_after: Option<usize>,
        stop: &AtomicBool,
    ) -> Result<Summary> {
        let t = self.recipe.training.clone();
        let end = stop_after.unwrap_or(t.steps).min(t.steps);
        let mut progress = Progress::new("train", self.state.step, t.steps);
        if self.state.step == 0 {
            self.evaluate(held, &progress)?;
        }
        let mut shown = String::new();
        while self.state.step < end && !stop.load(Ordering::Relaxed) {
            self.step(sampler, &progress)?;
            let step = self.state.step;
            if step.is_multiple_of(LOG_EVERY) || step == end {
                shown = self.log_figures(&t)?.unwrap_or(shown);
            }
            if step.is_multiple_of(t.eval_every) || step == t.steps {
                self.evaluate(held, &progress)?;
            }
            if step.is_multiple_of(t.checkpoint_every) && step < end {
                self.save()?;
            }
            progress.at(step, || shown.clone());
        }
        let step = self.state.step;
        self.save()?;
        let complete = step >= t.steps;
        if !complete {
            progress.say(&format!("saved at step {step}; go on with --resume"));
        }
        Ok(Summary { step, complete, bits: self.bits, checkpoint: checkpoint::folder(&self.out, step) })
    }

    /// One optimiser step: `accumulate` forward and backward passes and an update, or a skip.
    fn step(&mut self, sampler: &Sampler, progress: &Progress) -> Result<()> {
        let begun = Instant::now();
        let t = &self.recipe.training;
        let samples = (t.batch * t.segment_samples) as f64;
        let (mut nats, mut clips) = (0.0, Vec::new());
        for _ in 0..t.accumulate {
            let batch = sampler.draw(&self.flow, t.batch, &mut self.rng, &self.device)?;
            let (z, log_det) = self.flow.forward(&batch.x, &batch.mel)?;
            let loss = (flow::nll(&z, &log_det)?.sum_all()? / (samples * t.accumulate as f64))?;
            nats += f64::from(loss.to_scalar::<f32>()?) - batch.whitening_log_det / t.accumulate as f64;
            self.optimiser.accumulate(&mut loss.backward()?)?;
            clips.extend(batch.clips);
        }
        let norm = self.optimiser.grad_norm();
        let lr = t.learning_rate_at(self.state.step) * self.state.lr_scale;
        match self.fault(nats, norm) {
            None => {
                self.optimiser.step(lr, norm)?;
                self.state.updates = self.optimiser.updates();
                self.state.skipped_in_row = 0;
                self.state.norms.push(norm as f32);
                if self.state.norms.len() > NORMS {
                    self.state.norms.remove(0);
                }
                self.figures.steps += 1;
                self.figures.bits += flow::bits_per_sample(nats);
                self.figures.grad_norm += norm;
            }
            Some(fault) => self.skip(&fault, norm, &clips, progress)?,
        }
        self.figures.seconds += begun.elapsed().as_secs_f64();
        self.state.step += 1;
        self.state.rng_words = self.rng.get_word_pos() as u64;
        Ok(())
    }

    /// What is wrong with a loss or a gradient norm, if something is.
    fn fault(&self, nats: f64, norm: f64) -> Option<Fault> {
        if !nats.is_finite() || !norm.is_finite() {
            return Some(Fault::NotFinite);
        }
        let norms = &self.state.norms;
        if norms.len() < NORMS {
            return None;
        }
        let mut sorted = norms.clone();
        let (_, median, _) = sorted.select_nth_unstable_by(NORMS / 2, f32::total_cmp);
        // a norm below the clip can't do harm, however small the usual ones are
        let harmful = norm > self.recipe.training.clip_norm;
        (harmful && norm as f32 > JUMP * *median).then_some(Fault::Jump)
    }

    /// Leaves a step out; goes back to the last checkpoint if that happens too often in a row.
    fn skip(&mut self, fault: &Fault, norm: f64, clips: &[String], progress: &Progress) -> Result<()> {
        self.optimiser.discard();
        let step = self.state.step + 1;
        let reason = match fault {
            Fault::NotFinite => "loss or gradient is not finite".to_string(),
            Fault::Jump => format!("gradient norm jumps to {norm:.3}"),
        };
        progress.say(&format!("step {step} skipped: {reason}; clips {}", clips.join(", ")));
        self.log.line(&json!({"step": step, "event": "skipped", "reason": reason, "clips": clips}))?;
        self.state.skipped_in_row += 1;
        if self.state.skipped_in_row < SKIPS {
            return Ok(());
        }
        if self.state.rollbacks == ROLLBACKS {
            let lr = self.recipe.training.learning_rate;
            return Err(Error::invalid(format!(
                "training diverges at step {step} after {ROLLBACKS} rollbacks; lower learning_rate, now {lr}"
            )));
        }
        let Some(last) = checkpoint::steps(&self.out)?.last().copied() else {
            return Err(Error::file(&self.out, "its checkpoints are gone"));
        };
        // weights, moments and norms go back; the segments go on, so that others come up
        let (rollbacks, best) = (self.state.rollbacks + 1, self.state.best);
        let lr_scale = self.state.lr_scale * 0.5;
        self.state = checkpoint::restore(&self.out, last, &mut self.optimiser)?;
        self.state.rollbacks = rollbacks;
        self.state.best = best;
        self.state.lr_scale = lr_scale;
        self.state.skipped_in_row = 0;
        progress.say(&format!("back to step {last} at half the learning rate"));
        self.log.line(&json!({"step": step, "event": "rollback", "to": last, "lr_scale": lr_scale}))
    }

    /// Writes the means since the last line, and gives them for the progress bar.
    fn log_figures(&mut self, t: &super::config::Training) -> Result<Option<String>> {
        let figures = std::mem::take(&mut self.figures);
        if figures.steps == 0 {
            return Ok(None);
        }
        let n = figures.steps as f64;
        let (bits, norm) = (figures.bits / n, figures.grad_norm / n);
        let rate = n * t.samples_per_step() as f64 / figures.seconds;
        let lr = t.learning_rate_at(self.state.step.saturating_sub(1)) * self.state.lr_scale;
        self.log.line(&json!({
            "step": self.state.step, "bits": bits, "grad_norm": norm, "lr": lr, "samples_per_s": rate,
        }))?;
        let held = self.bits.map_or_else(String::new, |b| format!(" held out {b:.4}"));
        Ok(Some(format!("{bits:.3} bits{held} |g| {norm:.2} {:.0} k samples/s", rate / 1000.0)))
    }

    /// Held-out likelihood with the averaged weights.
    fn evaluate(&mut self, held: &[Clip], progress: &Progress) -> Result<()> {
        if held.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        // plain tensors, not variables: no graph is kept, so that whole clips fit
        let tensors = checkpoint::averaged(&self.params, &self.optimiser, &self.device)?;
        let builder = VarBuilder::from_tensors(tensors, DType::F32, &self.device);
        let flow = Flow::new(&self.recipe.flow, &self.recipe.mel, builder)?;
        let bits = evaluate::bits(&flow, &self.recipe.mel, held, &self.device)?;
        let (step, value) = (self.state.step, bits.per_sample);
        self.log.line(&json!({
            "step": step, "held_out_bits": value, "held_out_mean": bits.mean, "held_out_ci95": bits.ci95,
        }))?;
        progress
            .say(&format!("step {step}: held out {value:.4} bits per sample ({:.1} s)", begun.elapsed().as_secs_f64()));
        self.bits = Some(value);
        if value.is_finite() && self.state.best.is_none_or(|best| value < best.bits) {
            self.state.best = Some(Best { step, bits: value });
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        checkpoint::save(&self.out, &self.recipe, &self.params, &self.optimiser, &self.state)
    }
}

/// Fits the whitening front to a part of the clips, evenly spread.
fn fit_whitening(flow: &Flow, clips: &[Clip], seed: u64, stop: &AtomicBool) -> Result<()> {
    let stride = clips.len().div_ceil(WHITENING_CLIPS);
    let clips: Vec<_> = clips.iter().step_by(stride).map(|clip| (clip.dequantised(), &clip.mel)).collect();
    let pairs: Vec<_> = clips.iter().map(|(samples, mel)| (samples.as_slice(), *mel)).collect();
    let mut progress: Option<Progress> = None;
    flow.fit_whitening(&pairs, seed, &mut |step, steps, loss| {
        let progress = progress.get_or_insert_with(|| Progress::new("whitening", 0, steps));
        progress.at(step, || format!("loss {loss:.4}"));
        !stop.load(Ordering::Relaxed)
    })
}

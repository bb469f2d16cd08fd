//! The loop of a training run.

use super::checkpoint::{self, Best, State};
use super::config::Recipe;
use super::dataset::{Clip, Sampler};
use super::evaluate;
use super::guard::{self, Fault};
use super::log::{Log, Progress};
use super::optimiser::Optimiser;
use super::run::{Options, Summary};
use super::tensorboard::EventWriter;
use super::warm::WarmStart;
use crate::flow::{self, Flow};
use crate::net::Params;
use crate::net::params::named_rng;
use crate::voice::{TrainedOn, Voice};
use crate::{Error, Result};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Steps between two lines of figures in the log.
const LOG_EVERY: usize = 10;
/// Steps skipped in a row before the run goes back to its last checkpoint.
const SKIPS: usize = 10;
/// Rollbacks before the run gives up.
const ROLLBACKS: usize = 5;

/// A run under way.
pub(super) struct Session {
    out: PathBuf,
    device: Device,
    recipe: Recipe,
    trained_on: TrainedOn,
    params: Params,
    flow: Flow,
    optimiser: Optimiser,
    rng: ChaCha8Rng,
    state: State,
    log: Log,
    events: EventWriter,
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

impl Session {
    /// A new run with a flow whose whitening front is fitted.
    pub(super) fn start(
        options: &Options,
        (recipe, trained_on): (Recipe, TrainedOn),
        seed: u64,
        (params, flow): (Params, Flow),
        warm: Option<&WarmStart>,
        sampler: &Sampler,
    ) -> Result<Self> {
        let mut rng = named_rng(seed, "initialise");
        let batch = sampler.draw(&flow, recipe.training.init_batch, &mut rng, &options.device)?;
        flow.initialise(&batch.x.detach(), &batch.mel, &|step| warm.is_none_or(|warm| warm.is_fresh(step)))?;
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
        let run = Self::assemble(options, (recipe, trained_on), (params, flow), optimiser, state)?;
        // a first checkpoint, so that the fitted whitening isn't lost and a rollback has a place to go
        run.save()?;
        Ok(run)
    }

    /// The run in `options.out`, from the checkpoint of `step`.
    pub(super) fn resume(
        options: &Options,
        (recipe, trained_on): (Recipe, TrainedOn),
        step: usize,
        sampler: &Sampler,
    ) -> Result<Self> {
        let voice = Voice::open(checkpoint::folder(&options.out, step))?;
        let trained_on = trained_on.after(&voice);
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
        Self::assemble(options, (recipe, trained_on), (params, flow), optimiser, state)
    }

    fn assemble(
        options: &Options,
        (recipe, trained_on): (Recipe, TrainedOn),
        (params, flow): (Params, Flow),
        optimiser: Optimiser,
        state: State,
    ) -> Result<Self> {
        let mut rng = named_rng(state.seed, "segments");
        rng.set_word_pos(u128::from(state.rng_words));
        let log = Log::open(&options.out, state.step)?;
        let events = EventWriter::create(&options.out.join("tensorboard"))?;
        Ok(Self {
            out: options.out.clone(),
            device: options.device.clone(),
            recipe,
            trained_on,
            params,
            flow,
            optimiser,
            rng,
            state,
            log,
            events,
            figures: Figures::default(),
            bits: None,
        })
    }

    /// Trains until the steps are done, `stop_after` is reached or `stop` is set; saves.
    pub(super) fn run(
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
            self.evaluate(held, &progress, stop)?;
        }
        let mut shown = String::new();
        while self.state.step < end && !stop.load(Ordering::Relaxed) {
            self.step(sampler, &progress)?;
            let step = self.state.step;
            if step.is_multiple_of(LOG_EVERY) || step == end {
                shown = self.log_figures(&t)?.unwrap_or(shown);
            }
            let due = step.is_multiple_of(t.eval_every) || step == t.steps;
            let better = due && self.evaluate(held, &progress, stop)?;
            if (better || step.is_multiple_of(t.checkpoint_every)) && step < end {
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
            let nll = flow::nll(&z, &(log_det + batch.whitening_log_det)?)?;
            let loss = (nll.sum_all()? / (samples * t.accumulate as f64))?;
            nats += f64::from(loss.to_scalar::<f32>()?);
            self.optimiser.accumulate(&mut loss.backward()?)?;
            clips.extend(batch.clips);
        }
        let norm = self.optimiser.grad_norm();
        let lr = t.learning_rate_at(self.state.step) * self.state.lr_scale;
        self.state.rng_words = self.rng.get_word_pos() as u64;
        match guard::fault(nats, norm, &self.state.norms) {
            None => {
                self.optimiser.step(lr, norm)?;
                self.state.updates = self.optimiser.updates();
                self.state.skipped_in_row = 0;
                guard::remember(&mut self.state.norms, norm);
                self.state.step += 1;
                self.figures.steps += 1;
                self.figures.bits += flow::bits_per_sample(nats);
                self.figures.grad_norm += norm;
            }
            Some(fault) => self.skip(fault, &clips, progress)?,
        }
        self.figures.seconds += begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// Leaves a step out; goes back to the last checkpoint if that happens too often in a row.
    fn skip(&mut self, fault: Fault, clips: &[String], progress: &Progress) -> Result<()> {
        self.optimiser.discard();
        let step = self.state.step + 1;
        let reason = fault.to_string();
        progress.say(&format!("step {step} skipped: {reason}; clips {}", clips.join(", ")));
        self.log.line(&json!({"step": step, "event": "skipped", "reason": reason, "clips": clips}))?;
        self.state.step = step;
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
        let lr_scale = self.state.lr_scale * 0.5;
        let old = checkpoint::restore(&self.out, last, &mut self.optimiser)?;
        self.state = State {
            rng_words: self.state.rng_words,
            rollbacks: self.state.rollbacks + 1,
            best: self.state.best,
            lr_scale,
            skipped_in_row: 0,
            ..old
        };
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
        self.note(&[("bits", bits), ("grad_norm", norm), ("lr", lr), ("samples_per_s", rate)])?;
        let held = self.bits.map_or_else(String::new, |b| format!(" held out {b:.4}"));
        Ok(Some(format!("{bits:.3} bits{held} |g| {norm:.2} {:.0} k samples/s", rate / 1000.0)))
    }

    /// Held-out likelihood with the averaged weights; whether it is the best so far.
    fn evaluate(&mut self, held: &[Clip], progress: &Progress, stop: &AtomicBool) -> Result<bool> {
        if held.is_empty() {
            return Ok(false);
        }
        let begun = Instant::now();
        // plain tensors, not variables: no graph is kept, so that whole clips fit
        let tensors = checkpoint::averaged(&self.params, &self.optimiser, &self.device)?;
        let builder = VarBuilder::from_tensors(tensors, DType::F32, &self.device);
        let flow = Flow::new(&self.recipe.flow, &self.recipe.mel, builder)?;
        let bits = match evaluate::bits(&flow, &self.recipe.mel, held, &self.device, stop) {
            Err(Error::Interrupted) => return Ok(false),
            bits => bits?,
        };
        let (step, value) = (self.state.step, bits.per_sample);
        self.note(&[("held_out_bits", value), ("held_out_mean", bits.mean), ("held_out_ci95", bits.ci95)])?;
        let seconds = begun.elapsed().as_secs_f64();
        progress.say(&format!("step {step}: held out {value:.4} bits per sample ({seconds:.1} s)"));
        self.bits = Some(value);
        let better = value.is_finite() && self.state.best.is_none_or(|best| value < best.bits);
        if better {
            self.state.best = Some(Best { step, bits: value });
        }
        Ok(better)
    }

    /// A line of figures for this step, in the log and for TensorBoard.
    fn note(&mut self, figures: &[(&str, f64)]) -> Result<()> {
        let mut line = Map::from_iter([("step".to_string(), self.state.step.into())]);
        for &(name, value) in figures {
            line.insert(name.to_string(), value.into());
            self.events.scalar(name, self.state.step, value)?;
        }
        self.log.line(&Value::Object(line))
    }

    fn save(&self) -> Result<()> {
        let known = (&self.recipe, &self.trained_on);
        checkpoint::save(&self.out, known, &self.params, &self.optimiser, &self.state)
    }
}

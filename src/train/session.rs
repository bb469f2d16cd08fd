//! The loop of a training run.

use super::checkpoint::{self, HeldOut, State};
use super::clock::cpu_seconds;
use super::config::Recipe;
use super::dataset::{self, Clip, Sampler};
use super::distill::{self, Teacher};
use super::evaluate::{self, figure};
use super::guard::{self, Fault};
use super::log::{Log, Progress};
use super::optimiser::Optimiser;
use super::run::{Options, Summary};
use super::tensorboard::EventWriter;
use super::warm::WarmStart;
use crate::flow::{self, Flow};
use crate::net::Params;
use crate::net::params::{named_rng, normal};
use crate::voice::{TrainedOn, Voice};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
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
    /// Whom the flow learns from, if not from the clips.
    teacher: Option<Teacher>,
    optimiser: Optimiser,
    rng: ChaCha8Rng,
    state: State,
    log: Log,
    events: EventWriter,
    /// Segments seen and time spent since the last line of figures.
    figures: Figures,
    held_out: Option<HeldOut>,
}

#[derive(Default)]
struct Figures {
    steps: usize,
    nats: f64,
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
        teacher: Option<Teacher>,
        sampler: &Sampler,
    ) -> Result<Self> {
        let mut rng = named_rng(seed, "initialise");
        let batch = sampler.draw(&flow, recipe.training.init_batch, &mut rng, &options.device)?;
        flow.initialise(&batch.x.detach(), &batch.mel, &|step| warm.is_none_or(|warm| warm.is_fresh(step)))?;
        if teacher.is_some() {
            distill::check_student(&flow, &recipe.name, sampler, &options.device)?;
        }
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
            cpu_seconds: recipe.training.cpu_minutes.map(|_| 0.0),
            teacher: teacher.as_ref().map(|teacher| teacher.digest().to_string()),
            given_mels: options.mels.is_some(),
            best: None,
            norms: Vec::new(),
        };
        let mut run = Self::assemble(options, (recipe, trained_on), (params, flow), teacher, optimiser, state)?;
        // a first checkpoint, so that the fitted whitening isn't lost and a rollback has a place to go
        run.save(sampler)?;
        Ok(run)
    }

    /// The run in `options.out`, from the checkpoint of `step`.
    pub(super) fn resume(
        options: &Options,
        (recipe, trained_on): (Recipe, TrainedOn),
        step: usize,
        teacher: Option<Teacher>,
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
        if state.given_mels != options.mels.is_some() {
            let problem = match state.given_mels {
                true => "the run was started with --mels; give them again",
                false => "the run was started without --mels; leave them out",
            };
            return Err(Error::file(&options.out, problem));
        }
        if state.teacher.as_deref() != teacher.as_ref().map(Teacher::digest) {
            let problem = match (&state.teacher, &teacher) {
                (None, _) => "the run learns from clips alone; go on with melglow train",
                (_, None) => "the run learns from a teacher; go on with melglow distill",
                _ => "the run was started with another teacher",
            };
            return Err(Error::file(&options.out, problem));
        }
        Self::assemble(options, (recipe, trained_on), (params, flow), teacher, optimiser, state)
    }

    fn assemble(
        options: &Options,
        (recipe, trained_on): (Recipe, TrainedOn),
        (params, mut flow): (Params, Flow),
        teacher: Option<Teacher>,
        optimiser: Optimiser,
        state: State,
    ) -> Result<Self> {
        flow.set_passes(options.passes);
        let mut rng = named_rng(state.seed, "segments");
        rng.set_word_pos(u128::from(state.rng_words));
        std::fs::create_dir_all(&options.out).map_err(Error::io("create", &options.out))?;
        let log = Log::open(&options.out, state.step)?;
        let events = EventWriter::create(&options.out.join("tensorboard"))?;
        Ok(Self {
            out: options.out.clone(),
            device: options.device.clone(),
            recipe,
            trained_on,
            params,
            flow,
            teacher,
            optimiser,
            rng,
            state,
            log,
            events,
            figures: Figures::default(),
            held_out: None,
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
        let mut progress = match t.cpu_minutes {
            Some(minutes) => Progress::new("train, seconds", self.seconds() as usize, (60.0 * minutes) as usize),
            None => Progress::new("train", self.state.step, t.steps),
        };
        if self.state.step == 0 {
            self.evaluate(held, &progress, stop)?;
        }
        let mut shown = String::new();
        while self.state.step < end && !self.is_over() && !stop.load(Ordering::Relaxed) {
            let begun = cpu_seconds();
            // among rayon's threads: from outside, every piece of work would wake one and wait for it
            rayon::scope(|_| self.step(sampler, &progress))?;
            if let Some(seconds) = &mut self.state.cpu_seconds {
                *seconds += cpu_seconds() - begun;
            }
            let (step, over) = (self.state.step, self.is_over());
            if step.is_multiple_of(LOG_EVERY) || step == end || over {
                shown = self.log_figures(&t)?.unwrap_or(shown);
            }
            let due = step.is_multiple_of(t.eval_every) || over;
            let better = due && self.evaluate(held, &progress, stop)?;
            if (better || step.is_multiple_of(t.checkpoint_every)) && step < end && !over {
                self.save(sampler)?;
            }
            progress.at(t.cpu_minutes.map_or(step, |_| self.seconds() as usize), || shown.clone());
        }
        let step = self.state.step;
        self.save(sampler)?;
        let complete = self.is_over();
        if !complete {
            progress.say(&format!("saved at step {step}; go on with --resume"));
        }
        let checkpoint = checkpoint::folder(&self.out, step);
        Ok(Summary { step, complete, cpu_seconds: self.state.cpu_seconds, held_out: self.held_out, checkpoint })
    }

    /// Time of one core that the steps took, where the recipe limits it.
    fn seconds(&self) -> f64 {
        self.state.cpu_seconds.unwrap_or(0.0)
    }

    fn is_over(&self) -> bool {
        self.recipe.training.is_over(self.state.step, self.seconds())
    }

    /// One optimiser step: forward and backward passes over its segments, and an update or a skip.
    fn step(&mut self, sampler: &Sampler, progress: &Progress) -> Result<()> {
        let begun = Instant::now();
        let t = self.recipe.training.clone();
        let places = sampler.places(t.batch * t.accumulate, &mut self.rng);
        let samples = (places.len() * t.segment_samples) as f64;
        let (seed, position) = (self.state.seed, self.rng.get_word_pos());
        let lesson = Lesson {
            flow: &self.flow,
            teacher: self.teacher.as_ref(),
            sampler,
            deviation: t.noise,
            device: &self.device,
        };
        let graphs = t.graphs(&self.device);
        let nats = self.optimiser.learn(places.len(), graphs, |part| {
            // a stream of its own: what is drawn here doesn't decide which segments come
            let mut rng = named_rng(seed, &format!("noise {position} {}", part.start));
            Ok((lesson.nats(&places[part], &mut rng)?.sum_all()? / samples)?)
        })?;
        let norm = self.optimiser.grad_norm()?;
        let lr = t.learning_rate_at(self.state.step, self.seconds()) * self.state.lr_scale;
        self.state.rng_words = self.rng.get_word_pos() as u64;
        match guard::fault(nats, norm, &self.state.norms) {
            None => {
                self.optimiser.step(lr, norm)?;
                self.state.updates = self.optimiser.updates();
                self.state.skipped_in_row = 0;
                guard::remember(&mut self.state.norms, norm);
                self.state.step += 1;
                self.figures.steps += 1;
                self.figures.nats += nats;
                self.figures.grad_norm += norm;
            }
            Some(fault) => self.skip(fault, &dataset::names(&places), progress)?,
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
            cpu_seconds: self.state.cpu_seconds,
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
        let (nats, norm) = (figures.nats / n, figures.grad_norm / n);
        let (name, bits) = match self.teacher {
            Some(_) => ("divergence", nats / std::f64::consts::LN_2),
            None => ("bits", flow::bits_per_sample(nats)),
        };
        let rate = n * t.samples_per_step() as f64 / figures.seconds;
        let lr = t.learning_rate_at(self.state.step.saturating_sub(1), self.seconds()) * self.state.lr_scale;
        let mut line = vec![(name, bits), ("grad_norm", norm), ("lr", lr), ("samples_per_s", rate)];
        line.extend(self.state.cpu_seconds.map(|seconds| ("cpu_seconds", seconds)));
        self.note(&line)?;
        let what = if self.teacher.is_some() { "bits from the teacher" } else { "bits" };
        let held = self.held_out.map_or_else(String::new, |held| format!(" held out {:.4}", held.bits));
        Ok(Some(format!("{bits:.3} {what}{held} |g| {norm:.2} {:.0} k samples/s", rate / 1000.0)))
    }

    /// Held-out likelihood with the averaged weights; whether it is the best so far.
    fn evaluate(&mut self, held: &[Clip], progress: &Progress, stop: &AtomicBool) -> Result<bool> {
        if held.is_empty() {
            return Ok(false);
        }
        let begun = Instant::now();
        let bits = match evaluate::bits(&self.averaged()?, &self.recipe.mel, held, &self.device, stop) {
            Err(Error::Interrupted) => return Ok(false),
            bits => bits?,
        };
        let (step, left_out) = (self.state.step, bits.left_out.len());
        let mut line = vec![("held_out_bits", bits.per_sample), ("held_out_mean", bits.mean)];
        line.extend([("held_out_ci95", bits.ci95), ("held_out_left_out", (left_out > 0).then_some(left_out as f64))]);
        self.note(&line.into_iter().filter_map(|(name, value)| Some((name, value?))).collect::<Vec<_>>())?;
        let (figure, remark, seconds) = (figure(bits.per_sample), bits.remark(), begun.elapsed().as_secs_f64());
        progress.say(&format!("step {step}: held out {figure} bits per sample{remark} ({seconds:.1} s)"));
        self.held_out = bits.per_sample.map(|bits| HeldOut { step, bits, left_out });
        let best = self.state.best;
        let better = self.held_out.filter(|held| best.is_none_or(|best| held.beats(&best)));
        self.state.best = better.or(best);
        Ok(better.is_some())
    }

    /// The flow of the averaged weights, those that are saved. Plain tensors, not variables: no graph is kept, so that
    /// whole clips fit.
    fn averaged(&self) -> Result<Flow> {
        let tensors = checkpoint::averaged(&self.params, &self.optimiser, &self.device)?;
        let builder = VarBuilder::from_tensors(tensors, DType::F32, &self.device);
        Flow::new(&self.recipe.flow, &self.recipe.mel, builder)
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

    fn save(&mut self, sampler: &Sampler) -> Result<()> {
        let level = || sampler.residual_level(&self.averaged()?);
        self.trained_on.residual_level = self.flow.has_whitening().then(level).transpose()?;
        let known = (&self.recipe, &self.trained_on);
        checkpoint::save(&self.out, known, &self.params, &self.optimiser, &self.state)
    }
}

/// What segments are judged by.
struct Lesson<'a> {
    flow: &'a Flow,
    teacher: Option<&'a Teacher>,
    sampler: &'a Sampler<'a>,
    /// Of noise that is added to the data.
    deviation: f64,
    device: &'a Device,
}

impl Lesson<'_> {
    /// What each of the segments costs, nats, `[segments]`.
    fn nats(&self, places: &[(&Clip, usize)], rng: &mut ChaCha8Rng) -> Result<Tensor> {
        if let Some(teacher) = self.teacher {
            return teacher.divergence(self.flow, self.sampler, places, rng, self.device);
        }
        let batch = self.sampler.segments(self.flow, places, self.device)?;
        let x = if self.deviation > 0.0 { (&batch.x + noise(&batch.x, self.deviation, rng)?)? } else { batch.x };
        let (z, log_det) = self.flow.forward(&x, &batch.mel)?;
        flow::nll(&z, &(log_det + batch.whitening_log_det)?)
    }
}

/// Gaussian noise in the shape of `like`.
fn noise(like: &Tensor, deviation: f64, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let values: Vec<f32> = (0..like.elem_count()).map(|_| deviation as f32 * normal(rng)).collect();
    Ok(Tensor::from_vec(values, like.shape(), like.device())?)
}

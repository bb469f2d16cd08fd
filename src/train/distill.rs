//! Distillation: a flow learns from another flow's density instead of from clips.
//!
//! The student speaks, `x = f⁻¹(z; mel)` with mels of real clips, and the teacher, frozen, says how
//! likely that is. What falls is the reverse divergence, `KL(student ‖ teacher)`: van den Oord et al.
//! 2017, §4 (Parallel WaveNet), from a flow of any design to one whose inverse passes a gradient. Both work on the residual of
//! one whitening front, the teacher's; its log-determinant cancels.

use super::dataset::{Clip, Sampler};
use super::run::{self, Job, Options, Summary};
use super::{Recipe, front};
use crate::flow::{self, Flow, Likelihood};
use crate::net::params::{named_rng, normal};
use crate::voice::{Voice, VoiceConfig};
use crate::{Error, Result, atomic};
use candle_core::{Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use std::sync::atomic::AtomicBool;

/// Trains the student that `options.recipe` describes until its steps are done or `stop` is set, as
/// [`super::train`] does from clips; the clips give mels, and the held-out likelihood.
///
/// The student gets the teacher's whitening front in place of its recipe's.
///
/// # Errors
/// If teacher, recipe or data don't fit each other, no gradient passes through the student's inverse,
/// or as [`super::train`].
pub fn distill(teacher: &Voice, options: &Options, stop: &AtomicBool) -> Result<Summary> {
    let resumed = run::resume_from(options)?;
    atomic::check_folder(&options.out)?;
    let given = options.recipe.as_ref().map(|recipe| student(recipe, teacher.config())).transpose()?;
    let options = Options { recipe: given, from: None, ..options.clone() };
    let recipe = run::recipe(&options, resumed)?;
    let front = front::of(teacher)?;
    let teacher = Teacher::new(teacher, &options.device)?;
    let kind = teacher.flow.likelihood_kind();
    if kind != Likelihood::Exact {
        eprintln!("the teacher's likelihood is {kind}, and so the divergence: if a bound, it is at most what is told");
    }
    let (clips, held) = run::data(&options.data, options.mels.as_ref(), &recipe)?;
    run::run(&options, Job { recipe, resumed, front, teacher: Some(teacher) }, (&clips, &held), stop)
}

/// The recipe with the teacher's whitening, which stays as it is.
fn student(recipe: &Recipe, teacher: &VoiceConfig) -> Result<Recipe> {
    if recipe.mel != teacher.mel {
        return Err(Error::invalid(format!(
            "recipe {} has another mel convention than teacher {}; change its mel section, or choose another teacher",
            recipe.name, teacher.name
        )));
    }
    let mut recipe = recipe.clone();
    recipe.flow.whitening = teacher.flow.whitening.clone();
    recipe.training.joint_whitening = false;
    Ok(recipe)
}

/// A voice's density, frozen: gradients pass through it to its data, never to its weights.
pub struct Teacher {
    flow: Flow,
    digest: String,
}

impl Teacher {
    /// The density of a voice.
    ///
    /// # Errors
    /// If the weights don't fit the flow.
    pub fn new(voice: &Voice, device: &Device) -> Result<Self> {
        let flow = voice.build_frozen_flow_on(device)?;
        Ok(Self { flow, digest: voice.config().weights_sha256.clone() })
    }

    /// SHA-256 of the voice's weights.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// `log q(x) − log p(x)` of the student's own sounds, nats per segment, `[batch]`: their mean is the
    /// divergence of the student `q` from the teacher `p`.
    ///
    /// # Errors
    /// If a flow fails.
    pub fn divergence(
        &self,
        student: &Flow,
        sampler: &Sampler,
        places: &[(&Clip, usize)],
        rng: &mut ChaCha8Rng,
        device: &Device,
    ) -> Result<Tensor> {
        let mel = sampler.mels(student, places, device)?;
        let z = noise(student, places.len(), sampler.samples(), rng, device)?;
        let x = student.inverse(&z, &mel)?;
        // the inverse has no log-determinant of its own: the forward pass of what it made tells it, and
        // gives back z, whose density doesn't depend on the weights
        let (_, log_det) = student.forward(&x, &mel)?;
        let (theirs, their_log_det) = self.flow.forward(&x, &sampler.mels(&self.flow, places, device)?)?;
        Ok((flow::nll(&theirs, &their_log_det)? - flow::nll(&z, &log_det)?)?)
    }
}

/// Latents of a batch of segments, `[batch, group, steps]`.
fn noise(flow: &Flow, batch: usize, samples: usize, rng: &mut ChaCha8Rng, device: &Device) -> Result<Tensor> {
    let z: Vec<f32> = (0..batch * samples).map(|_| normal(rng)).collect();
    Ok(Tensor::from_vec(z, (batch, flow.group(), samples / flow.group()), device)?)
}

/// Makes sure that a flow can learn from a teacher: its likelihood is exact, and gradients pass through its
/// inverse, so that each channel of the latents gets one.
///
/// # Errors
/// If that isn't so, or the inverse fails.
pub(super) fn check_student(flow: &Flow, name: &str, sampler: &Sampler, device: &Device) -> Result<()> {
    let mut rng = named_rng(0, "student");
    let places = sampler.places(1, &mut rng);
    let mel = sampler.mels(flow, &places, device)?;
    let kind = flow.likelihood_kind();
    if kind != Likelihood::Exact {
        return Err(Error::invalid(format!(
            "recipe {name} cannot be a student: its likelihood is {kind}, and a divergence wants the student's own"
        )));
    }
    let z = Var::from_tensor(&noise(flow, 1, sampler.samples(), &mut rng, device)?)?;
    let x = flow.inverse(z.as_tensor(), &mel)?;
    let direction = Tensor::from_vec((0..sampler.samples()).map(|_| normal(&mut rng)).collect(), x.dims(), device)?;
    let grads = (x * direction)?.sum_all()?.backward()?;
    let channels: Vec<f32> = match grads.get(&z) {
        Some(grad) => grad.abs()?.sum((0, 2))?.to_vec1()?,
        None => vec![0.0],
    };
    if channels.iter().all(|sum| *sum > 0.0) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "recipe {name} cannot be a student: no gradient passes through the inverse of one of its steps"
    )))
}

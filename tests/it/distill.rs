//! Distillation: the divergence, its gradients, and runs that lower it.

use super::train::{Place, bytes, recipe, rich_recipe};
use super::{seeded_voice, tiny_mel};
use candle_core::{Device, Tensor};
use melglow::flow::Flow;
use melglow::flow::config::{Block, ConditioningConfig, FlowConfig, StepConfig};
use melglow::net::Params;
use melglow::net::params::named_rng;
use melglow::train::dataset::{Clip, Sampler};
use melglow::train::distill::{Teacher, distill};
use melglow::train::{Options, Recipe};
use melglow::voice::{Voice, VoiceConfig};
use std::collections::HashMap;
use std::fs;
use std::sync::atomic::AtomicBool;

static NEVER: AtomicBool = AtomicBool::new(false);

fn clips(recipe: &Recipe) -> Vec<Clip> {
    let sound: Vec<f32> = (0..12_000).map(|t| 0.2 * (t as f32 * 0.05).sin()).collect();
    vec![Clip::new("a", &sound, &recipe.mel).unwrap()]
}

/// A flow of one actnorm, `z = (x + shift) · e^log_scale` in both of its channels, as tensors.
fn gaussian(recipe: &Recipe, log_scale: f32, shift: f32) -> (FlowConfig, HashMap<String, Tensor>) {
    let flow = FlowConfig {
        dequantisation: None,
        latent: None,
        whitening: None,
        conditioning: ConditioningConfig::Mel {},
        group: 2,
        blocks: vec![Block { repeat: 1, steps: vec![StepConfig::Actnorm {}] }],
    };
    flow.validate(&recipe.mel).unwrap();
    let both = |value: f32| Tensor::new(&[value, value], &Device::Cpu).unwrap();
    let named = [("steps.0.log_scale", both(log_scale)), ("steps.0.shift", both(shift))];
    (flow, named.map(|(name, tensor)| (name.to_string(), tensor)).into())
}

fn voice(recipe: &Recipe, flow: FlowConfig, tensors: HashMap<String, Tensor>) -> Voice {
    let config = VoiceConfig::new("teacher", recipe.mel.clone(), flow, recipe.synthesis());
    Voice::from_parts(config, &tensors.into_iter().collect::<Vec<_>>()).unwrap()
}

/// Between Gaussians it is known: ln(s₂/s₁) + (s₁² + (m₁ − m₂)²) / 2s₂² − ½ for each sample.
#[test]
fn the_divergence_of_gaussians_is_the_known_one() {
    let recipe = recipe(1);
    let (config, tensors) = gaussian(&recipe, 0.3, 0.2);
    let teacher = Teacher::new(&voice(&recipe, config, tensors), &Device::Cpu).unwrap();
    let (config, tensors) = gaussian(&recipe, -0.1, -0.4);
    let student = Flow::new(&config, &recipe.mel, Params::loaded(tensors, &Device::Cpu).builder()).unwrap();
    let clips = clips(&recipe);
    let sampler = Sampler::new(&clips, &recipe).unwrap();
    let mut rng = named_rng(0, "test");
    let places = sampler.places(512, &mut rng);
    let cost = teacher.divergence(&student, &sampler, &places, &mut rng, &Device::Cpu).unwrap();
    let found = cost.mean_all().unwrap().to_scalar::<f32>().unwrap() / sampler.samples() as f32;
    // x = z · e^−log_scale − shift
    let (m1, s1, m2, s2) = (0.4_f32, 0.1_f32.exp(), -0.2_f32, (-0.3_f32).exp());
    let known = (s2 / s1).ln() + (s1 * s1 + (m1 - m2).powi(2)) / (2.0 * s2 * s2) - 0.5;
    // a million samples, each with a deviation of 1.5: four standard errors
    assert!((found - known).abs() < 0.006, "{found}, known {known}");
}

/// Through the student's inverse and the teacher's forward pass, at batch 2.
#[test]
fn gradients_of_the_divergence_are_right() {
    let mut recipe = recipe(1);
    recipe.training.segment_samples = 256;
    let teacher = seeded_voice("teacher", recipe.mel.clone(), super::tiny_flow());
    let teacher = Teacher::new(&teacher, &Device::Cpu).unwrap();
    let params = Params::seeded(3, &Device::Cpu);
    let student = Flow::new(&recipe.flow, &recipe.mel, params.builder()).unwrap();
    // away from the identity that training begins with
    for (name, var) in params.named() {
        if name.contains(".end.") || name.contains("log_scale") || name.contains("shift") {
            let mut rng = named_rng(4, &name);
            let values = (0..var.elem_count()).map(|_| 0.2 * melglow::net::params::normal(&mut rng)).collect();
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
    }
    let clips = clips(&recipe);
    let sampler = Sampler::new(&clips, &recipe).unwrap();
    let cost = || {
        let mut rng = named_rng(0, "test");
        let places = sampler.places(2, &mut rng);
        teacher.divergence(&student, &sampler, &places, &mut rng, &Device::Cpu).unwrap().sum_all().unwrap()
    };
    let grads = cost().backward().unwrap();
    for (name, var) in params.named() {
        // along the gradient: what f32 leaves of a difference is then a small part of it
        let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient")).detach();
        let norm = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let before = var.as_detached_tensor().copy().unwrap();
        let step = 2e-3_f64;
        let at = |sign: f64| {
            var.set(&(&before + (&grad * (sign * step / f64::from(norm))).unwrap()).unwrap()).unwrap();
            f64::from(cost().to_scalar::<f32>().unwrap())
        };
        let numeric = (at(1.0) - at(-1.0)) / (2.0 * step);
        var.set(&before).unwrap();
        let off = (numeric - f64::from(norm)).abs();
        assert!(off < 0.02 * f64::from(norm) + 0.3, "{name}: {norm} by the graph, {numeric} by differences");
    }
}

fn student(steps: usize) -> Recipe {
    let mut recipe = recipe(steps);
    recipe.name = "student".to_string();
    recipe.flow.blocks[0].repeat = 1;
    recipe.training.segment_samples = 1024;
    recipe.training.ema_decay = 0.8;
    recipe
}

#[test]
fn a_student_comes_nearer_to_its_teacher_and_shares_its_whitening() {
    let place = Place::new();
    let teacher = Voice::open(place.train(&rich_recipe(40), "teacher").checkpoint).unwrap();
    let summary = distill(&teacher, &place.options(&student(120), "run"), &NEVER).unwrap();
    assert!(summary.complete && summary.held_out.is_some_and(|held| held.step == 120));
    let curve: Vec<f64> = place.log("run").iter().filter_map(|line| line["divergence"].as_f64()).collect();
    assert_eq!(curve.len(), 12);
    assert!(curve[11] < 0.7 * curve[0] && curve[11] > 0.0, "{curve:?}");
    let whitening = |voice: &Voice| {
        let mut tensors: Vec<_> = voice.tensors().unwrap().into_iter().collect();
        tensors.retain(|(name, _)| name.starts_with("whiten."));
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors.into_iter().map(|(_, t)| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect::<Vec<_>>()
    };
    let voice = Voice::open(summary.checkpoint).unwrap();
    assert_eq!(whitening(&voice).len(), 7);
    assert!(whitening(&voice) == whitening(&teacher));
    let vocoder = melglow::vocoder::Vocoder::new(&voice).unwrap();
    let sound = vocoder.vocode(&tiny_mel(10), &Default::default(), None).unwrap();
    assert!(sound.samples.iter().all(|s| s.is_finite()));
}

#[test]
fn a_resumed_distillation_is_straight_to_the_bit() {
    let place = Place::new();
    let teacher = Voice::open(place.train(&recipe(5), "teacher").checkpoint).unwrap();
    let straight = distill(&teacher, &place.options(&student(9), "straight"), &NEVER).unwrap();
    let halves = place.options(&student(9), "halves");
    distill(&teacher, &Options { stop_after: Some(4), ..halves.clone() }, &NEVER).unwrap();
    let resumed = distill(&teacher, &Options { resume: true, recipe: None, ..halves }, &NEVER).unwrap();
    for (straight, resumed) in bytes(&straight.checkpoint).into_iter().zip(bytes(&resumed.checkpoint)) {
        assert!(straight == resumed, "{} differs", straight.0);
    }
}

#[test]
fn what_does_not_fit_is_one_line() {
    let place = Place::new();
    place.train(&recipe(2), "teacher");
    place.train(&recipe(3), "other");
    fs::write(place.path("student.json"), serde_json::to_string(&student(2)).unwrap()).unwrap();
    let distill = |args: &[&str]| {
        let (code, out, err) = place.run(&[&["distill", "--data", "data", "--threads", "1"], args].concat());
        assert!(out.is_empty());
        (code, err.lines().last().unwrap_or_default().to_string())
    };
    let (teacher, student) = (["--teacher", "teacher/step-2"], ["--recipe", "student.json", "--out", "run"]);
    let mut other = self::student(2);
    other.mel.f_max = 7000.0;
    fs::write(place.path("mel.json"), serde_json::to_string(&other).unwrap()).unwrap();
    let (code, err) = distill(&[&teacher[..], &["--recipe", "mel.json", "--out", "run"]].concat());
    assert_eq!(code, 1);
    assert!(err.starts_with("melglow: recipe student has another mel convention than teacher tiny; "), "{err}");
    for (recipe, problem) in [
        ("arflow", "no gradient passes through the inverse of one of its steps"),
        ("lj-live", "no gradient passes through the inverse of one of its steps"),
        ("fvae", "its likelihood is a lower bound, and a divergence wants the student's own"),
    ] {
        let (code, err) = distill(&[&teacher[..], &["--recipe", recipe, "--out", "run"]].concat());
        assert_eq!((code, err), (1, format!("melglow: recipe {recipe} cannot be a student: {problem}")));
    }
    let (code, err) = distill(&[&["--teacher", "nobody"], &student[..]].concat());
    assert_eq!((code, err.starts_with("melglow: there is no voice nobody: ")), (1, true), "{err}");
    assert_eq!(distill(&teacher).0, 2, "no recipe");
    assert!(!place.path("run").exists(), "something is left behind");

    assert_eq!(distill(&[&teacher[..], &student].concat()).0, 0);
    let resume = ["--out", "run", "--resume", "--steps", "4"];
    let (code, err) = distill(&[&["--teacher", "other/step-3"], &resume[..]].concat());
    assert_eq!((code, err.as_str()), (1, "melglow: run: the run was started with another teacher"));
    let (code, err) = distill(&[&teacher[..], &["--out", "teacher", "--resume", "--steps", "4"]].concat());
    let expected = "melglow: teacher: the run learns from clips alone; go on with melglow train";
    assert_eq!((code, err.as_str()), (1, expected));
    let (code, _, err) = place.run(&["train", "--data", "data", "--out", "run", "--resume", "--steps", "4"]);
    let expected = "melglow: run: the run learns from a teacher; go on with melglow distill";
    assert_eq!((code, err.lines().last()), (1, Some(expected)), "{err}");
}

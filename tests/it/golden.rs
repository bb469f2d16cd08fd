//! Golden values of NVIDIA's own WaveGlow: audio, latents, loss, gradients, Adam steps.
//!
//! They lie beside the checkout (`../shared/parity`, or `$MELGLOW_SHARED/parity`); without them
//! these tests say so and pass.

use candle_core::{Device, Tensor};
use melglow::flow::{Flow, nll};
use melglow::import::{Design, Halves};
use melglow::mel::file::{TensorData, read_array, read_arrays};
use melglow::mel::{MelConfig, MelSpectrogram};
use melglow::net::Params;
use melglow::train::Recipe;
use melglow::train::config::Training;
use melglow::train::optimiser::Optimiser;
use std::collections::HashMap;
use std::path::PathBuf;

const CPU: Device = Device::Cpu;
const HOP: usize = 256;

/// The folder of golden files, if it is there.
pub(crate) fn parity() -> Option<PathBuf> {
    let shared = std::env::var_os("MELGLOW_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let folder = shared.join("parity");
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("SKIPPED: no golden files at {}", folder.display());
    None
}

pub(crate) fn tensor(name: &str) -> Tensor {
    let TensorData { shape, values, .. } = read_array(&parity().unwrap().join(name)).unwrap();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn arrays(name: &str, prefix: &str) -> HashMap<String, Tensor> {
    read_arrays(&parity().unwrap().join(name))
        .unwrap()
        .into_iter()
        .filter_map(|(name, data)| {
            let name = name.strip_prefix(prefix)?.trim_start_matches("module.").to_string();
            Some((name, Tensor::from_vec(data.values, data.shape, &CPU).unwrap()))
        })
        .collect()
}

/// A published model's design, and the mel that it is made for.
struct Model {
    design: Design,
    mel: MelConfig,
}

impl Model {
    fn of(theirs: &HashMap<String, Tensor>) -> Self {
        let shapes = theirs.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
        let design = Design::of(&shapes, false).unwrap();
        let mel = MelConfig { n_mels: design.n_mels, ..MelConfig::nvidia() };
        Self { design, mel }
    }

    /// Our names and layouts from a state dict's (or from gradients of the same names).
    fn rename(&self, theirs: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
        let mut get = |name: &str| Ok(theirs.get(name).cloned());
        let table = self.design.table(Halves::Same, HOP);
        table.iter().flat_map(|part| part.convert(self.design.weight_norm, &mut get).unwrap()).collect()
    }

    fn load(file: &str, prefix: &str) -> (Self, Flow, Params) {
        let theirs = arrays(file, prefix);
        let model = Self::of(&theirs);
        let params = Params::loaded(model.rename(&theirs), &CPU);
        let config = model.design.flow_config(Halves::Same, |layer| 1 << layer);
        let flow = Flow::new(&config, &model.mel, params.builder()).unwrap();
        assert_eq!(params.surplus(), Vec::<String>::new());
        (model, flow, params)
    }
}

/// A `[batch, n_mels, frames]` mel with three frames of zeros in front, cut to `frames`.
pub(crate) fn window(mel: &Tensor, frames: usize) -> Tensor {
    let mel = if mel.rank() == 2 { mel.unsqueeze(0).unwrap() } else { mel.clone() };
    mel.narrow(2, 0, frames).unwrap().pad_with_zeros(2, 3, 0).unwrap()
}

pub(crate) fn max_abs(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

pub(crate) fn audio_from_noise(flow: &Flow, set: &str, sigma: f64) -> Tensor {
    let z = Tensor::cat(&[2, 1, 0].map(|i| tensor(&format!("{set}_z{i}.npy"))), 1);
    // the reference starts from z0 and puts z1, then z2, in front
    let z = (z.unwrap() * sigma).unwrap();
    let mel = tensor(&format!("{set}_mel.npy"));
    let frames = mel.dims()[1];
    flow.inverse(&z, &window(&mel, frames)).unwrap().squeeze(1).unwrap()
}

#[test]
fn audio_equals_the_references() {
    if parity().is_none() {
        return;
    }
    // float32 itself is 1e-6 from float64 here; half precision weights carry 11 bits
    let a = [
        ("a_dle_state_dict.pt", "state_dict.", 1e-5),
        ("a_dle_state_dict_ddp_legacy.pt", "state_dict.", 1e-5),
        ("a_model_state_dict.pt", "model.", 1e-5),
        ("a_state_dict_no_weightnorm.pt", "state_dict.", 1e-5),
        ("a_state_dict_no_weightnorm_fp16.pt", "state_dict.", 2e-2),
    ];
    for (file, prefix, tolerance) in a {
        let (_, flow, _) = Model::load(file, prefix);
        for sigma in ["0.0", "0.6", "1.0"] {
            let audio = audio_from_noise(&flow, "a", sigma.parse().unwrap());
            let error = max_abs(&audio, &tensor(&format!("a_audio_sigma{sigma}.npy")));
            assert!(error < tolerance, "{file}, sigma {sigma}: {error}");
        }
    }
    let (_, flow, _) = Model::load("b_state_dict.pt", "state_dict.");
    for sigma in ["0.6", "1.0"] {
        let audio = audio_from_noise(&flow, "b", sigma.parse().unwrap());
        let error = max_abs(&audio, &tensor(&format!("b_audio_sigma{sigma}.npy")));
        assert!(error < 2e-5, "set B, sigma {sigma}: {error}");
    }
}

/// The reference's loss: without the constant, per sample.
fn reference_loss(flow: &Flow, audio: &Tensor, mel: &Tensor, sigma: f64) -> (Tensor, Tensor) {
    let (z, log_det) = flow.forward(audio, mel).unwrap();
    let energy = (z.sqr().unwrap().sum((1, 2)).unwrap() / (2.0 * sigma * sigma)).unwrap();
    let loss = (energy - log_det).unwrap().sum_all().unwrap();
    (z.clone(), (loss / z.elem_count() as f64).unwrap())
}

fn scalar(t: &Tensor) -> f64 {
    f64::from(t.to_scalar::<f32>().unwrap())
}

#[test]
fn latents_loss_and_gradients_equal_the_references() {
    if parity().is_none() {
        return;
    }
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(parity().unwrap().join(name)).unwrap()).unwrap()
    };
    for (set, checkpoint, frames) in [("a", "a_init_state_dict.pt", 4), ("b", "b_state_dict.pt", 16)] {
        let (model, flow, params) = Model::load(checkpoint, "state_dict.");
        let audio = tensor(&format!("{set}_train_audio.npy")).unsqueeze(1).unwrap();
        let mel = window(&tensor(&format!("{set}_train_mel.npy")), frames);
        let (z, loss) = reference_loss(&flow, &audio, &mel, 1.0);
        assert!(max_abs(&z, &tensor(&format!("{set}_train_z.npy"))) < 1e-5, "set {set}: latents");
        let expected = json(&format!("{set}_train.json"))["loss_sigma1"].as_f64().unwrap();
        assert!((scalar(&loss) - expected).abs() < 1e-6, "set {set}: loss {} expected {expected}", scalar(&loss));
        // our likelihood is the same number, with the Gaussian's constant
        let (z, log_det) = flow.forward(&audio, &mel).unwrap();
        let nats = scalar(&nll(&z, &log_det).unwrap().sum_all().unwrap()) / z.elem_count() as f64;
        assert!((nats - expected - 0.5 * (2.0 * std::f64::consts::PI).ln()).abs() < 1e-5);

        let grads = loss.backward().unwrap();
        let golden = arrays(&format!("{set}_train_grads.npz"), "");
        let mut compared = 0;
        for (name, var) in params.named() {
            let Some(expected) = model.rename(&golden).remove(&name) else { continue };
            let got = grads.get(&var).unwrap();
            let scale = expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(max_abs(got, &expected) < 1e-4 * scale, "set {set}: gradient of {name}");
            compared += 1;
        }
        assert!(compared >= 5, "set {set}: only {compared} gradients compared");
        if set == "a" {
            assert_eq!(compared, params.named().len(), "every parameter of set A has a golden gradient");
            let sigma = "0.7071";
            let (_, loss) = reference_loss(&flow, &audio, &mel, sigma.parse().unwrap());
            let expected = json("a_train.json")["loss_by_sigma"][sigma].as_f64().unwrap();
            assert!((scalar(&loss) - expected).abs() < 1e-6);
        }
    }
}

#[test]
fn three_adam_steps_equal_the_references() {
    if parity().is_none() {
        return;
    }
    let golden = std::fs::read(parity().unwrap().join("a_train.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let losses: Vec<f64> = golden["adam"]["losses_before_step_0_1_2_and_after"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss.as_f64().unwrap())
        .collect();
    let (model, flow, params) = Model::load("a_init_state_dict.pt", "state_dict.");
    let audio = tensor("a_train_audio.npy").unsqueeze(1).unwrap();
    let mel = window(&tensor("a_train_mel.npy"), 4);
    let adam = Training {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        clip_norm: f64::MAX,
        ..Recipe::open("waveglow").unwrap().training
    };
    let mut optimiser = Optimiser::new(&params, &adam).unwrap();
    for (step, expected) in losses.iter().enumerate() {
        let (z, loss) = reference_loss(&flow, &audio, &mel, 1.0);
        assert!((scalar(&loss) - expected).abs() < 1e-5, "step {step}: loss {} expected {expected}", scalar(&loss));
        if step + 1 == losses.len() {
            assert!(max_abs(&z, &tensor("a_train_z_after3.npy")) < 1e-3, "latents after {step} steps");
            break;
        }
        optimiser.accumulate(&mut loss.backward().unwrap()).unwrap();
        let norm = optimiser.grad_norm().unwrap();
        optimiser.step(1e-3, norm).unwrap();
    }
    let weights = model.rename(&arrays("a_train_after3.npz", ""));
    let ours: HashMap<_, _> = params.named().into_iter().collect();
    for (name, expected) in &weights {
        // tiny gradients may take the other sign, and Adam makes them as large as the others
        let off = max_abs(ours[name].as_tensor(), expected);
        assert!(off < 1e-4, "{name} is off by {off}");
    }
    assert_eq!(weights.len(), 10, "every golden parameter was compared");
}

#[test]
fn a_whole_clip_returns_from_the_latent() {
    if parity().is_none() {
        return;
    }
    let (_, flow, _) = Model::load("b_state_dict.pt", "state_dict.");
    let mel = tensor("lj_mel.npy");
    let frames = mel.dims()[1];
    let mel = MelSpectrogram::new(mel.flatten_all().unwrap().to_vec1().unwrap(), 80).unwrap();
    let sound = melglow::audio::decode::read(&parity().unwrap().join("LJ001-0002.wav")).unwrap();
    let whole = (frames - 1) * HOP;
    let x = Tensor::from_vec(sound.samples[..whole].to_vec(), (1, 1, whole), &CPU).unwrap();
    let window = flow.mel_window(&mel, 0, frames - 1).unwrap();
    let (z, _) = flow.forward(&x, &window).unwrap();
    let back = flow.inverse(&z, &window).unwrap();
    assert!(max_abs(&x, &back) < 1e-5, "{}", max_abs(&x, &back));
}

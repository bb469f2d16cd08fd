//! Foreign checkpoints: every layout gives the same sound, and bad files one line.

use super::Place;
use super::golden::{audio_from_noise, max_abs, parity, tensor};
use candle_core::{Device, Tensor};
use melglow::flow::Flow;
use melglow::import::{self, Halves, Imported, Kind, Options};
use melglow::voice::Voice;
use std::path::PathBuf;

/// A checkpoint of the parity folder as a voice; `None` without the folder.
fn imported(file: &str, options: &Options) -> Option<(PathBuf, Imported)> {
    let path = parity()?.join(file);
    let imported = import::import(&path, "x", options).unwrap_or_else(|e| panic!("{file}: {e}"));
    Some((path, imported))
}

fn flow(imported: &Imported) -> Flow {
    imported.voice.build_flow().unwrap().0
}

/// Every file of set A after three steps, of the two families of serialisation and all layouts.
const SET_A: [&str; 11] = [
    "a_nvidia_train_module.pt",
    "a_nvidia_train_module_legacy.pt",
    "a_model_state_dict.pt",
    "a_dle_state_dict.pt",
    "a_dle_state_dict_ddp_legacy.pt",
    "a_module_no_weightnorm.pt",
    "a_module_no_weightnorm_legacy.pt",
    "a_state_dict_no_weightnorm.pt",
    "a_old_layers_state_dict.pt",
    "a_state_dict_no_weightnorm_fp16.pt",
    "a_init_state_dict.pt",
];

#[test]
fn every_layout_of_waveglow_sounds_as_the_reference() {
    for file in SET_A {
        let Some((_, imported)) = imported(file, &Options::default()) else { return };
        let flow = flow(&imported);
        // float32 itself is 1e-6 from float64 here; half precision weights carry 11 bits
        let tolerance = if file.contains("fp16") { 2e-2 } else { 1e-5 };
        for sigma in ["0.0", "0.6", "1.0"] {
            let audio = audio_from_noise(&flow, "a", sigma.parse().unwrap());
            let error = max_abs(&audio, &tensor(&format!("a_audio_sigma{sigma}.npy")));
            // the initial weights are another model
            assert_eq!(error < tolerance, file != "a_init_state_dict.pt", "{file}, sigma {sigma}: {error}");
        }
        let norm = imported.voice.tensors().unwrap().keys().any(|name| name.ends_with("magnitude"));
        assert_eq!(norm, !file.contains("no_weightnorm"), "{file}");
        let half = imported.voice.tensors().unwrap().values().all(|t| t.dtype() == candle_core::DType::F16);
        assert_eq!(half, file.contains("fp16"), "{file}");
    }
    let (_, imported) = imported("b_state_dict.pt", &Options::default()).unwrap();
    let flow = flow(&imported);
    for sigma in ["0.6", "1.0"] {
        let audio = audio_from_noise(&flow, "b", sigma.parse().unwrap());
        let error = max_abs(&audio, &tensor(&format!("b_audio_sigma{sigma}.npy")));
        assert!(error < 2e-5, "set B, sigma {sigma}: {error}");
    }
}

/// SqueezeWave's noise in our order: what comes in front after flow 2, then the start. The reference
/// scales only the former.
fn squeezewave_noise(set: &str, sigma: f64) -> Tensor {
    let early = (tensor(&format!("{set}_z1.npy")) * sigma).unwrap();
    Tensor::cat(&[early, tensor(&format!("{set}_z0.npy"))], 1).unwrap()
}

#[test]
fn squeezewave_sounds_as_the_reference_and_returns_its_latents() {
    for set in ["s128", "s256"] {
        for (form, sigmas) in [("", &["0.6", "1.0"][..]), ("_fused", &["1.0"])] {
            let file = format!("{set}{form}_state_dict.pt");
            let Some((_, imported)) = imported(&file, &Options::default()) else { return };
            let flow = flow(&imported);
            let mel = tensor(&format!("{set}_mel.npy")).unsqueeze(0).unwrap();
            for sigma in sigmas {
                let z = squeezewave_noise(set, sigma.parse().unwrap());
                let audio = flow.inverse(&z, &mel).unwrap().squeeze(1).unwrap();
                let error = max_abs(&audio, &tensor(&format!("{set}{form}_audio_sigma{sigma}.npy")));
                assert!(error < 1e-4, "{file}, sigma {sigma}: {error}");
            }
            let audio = tensor(&format!("{set}_audio_sigma1.0.npy")).unsqueeze(1).unwrap();
            let (z, _) = flow.forward(&audio, &mel).unwrap();
            let error = max_abs(&z, &tensor(&format!("{set}_back_z.npy")));
            // the fused form is another model at the edges
            assert_eq!(error < 1e-4, form.is_empty(), "{file}: latents are off by {error}");
        }
    }
}

/// In the first files odd flows moved the first half: the same as exchanging the halves around them.
#[test]
fn alternating_halves_are_what_the_first_reference_did() {
    let alternating = Options { halves: Halves::Alternating, ..Options::default() };
    let Some((_, same)) = imported("a_dle_state_dict.pt", &Options::default()) else { return };
    let (_, other) = imported("a_dle_state_dict.pt", &alternating).unwrap();
    let (same, other) = (flow(&same), flow(&other));
    let audio = tensor("a_train_audio.npy").unsqueeze(1).unwrap();
    let mel = super::golden::window(&tensor("a_train_mel.npy"), 4);
    let ((z, log_det), (z_other, log_det_other)) =
        (same.forward(&audio, &mel).unwrap(), other.forward(&audio, &mel).unwrap());
    assert!(max_abs(&z, &z_other) > 1e-3 && max_abs(&log_det, &log_det_other) > 1e-3);
    assert!(max_abs(&other.inverse(&z_other, &mel).unwrap(), &audio) < 1e-5);
}

//! `melglow denoise` and `synth --denoise`: the same samples, exact messages; the hum of NVIDIA's model.

use super::Place;
use super::cli::{failure, run, samples, synth};
use super::golden::{parity, tensor};
use super::import::imported;
use melglow::audio::wav::{self, WavFormat};
use melglow::import::Options;
use melglow::vocoder::Vocoder;
use melglow::vocoder::denoise::Denoiser;
use std::fs;

#[test]
fn while_speaking_and_afterwards_are_the_same() {
    let place = Place::new();
    place.mel("a.npy", 40);
    let bytes = |name: &str| fs::read(place.path(name)).unwrap();
    for (output, strength) in [("plain.wav", None), ("zero.wav", Some("0")), ("clean.wav", Some("1"))] {
        let args = ["a.npy", "-o", output, "--bits", "32f"];
        let strength: Vec<&str> = strength.into_iter().flat_map(|s| ["--denoise", s]).collect();
        assert_eq!(synth(&place, &[&args[..], &strength].concat()).0, 0, "{output}");
    }
    assert_eq!(bytes("plain.wav"), bytes("zero.wav"));
    assert!(bytes("plain.wav") != bytes("clean.wav") && bytes("plain.wav").len() == bytes("clean.wav").len());
    let after = |strength: &str, format: &str| {
        let args = ["denoise", "plain.wav", "-o", "-", "--voice", "voice", "--strength", strength, "--bits", format];
        let (code, out, err) = run(&place, &args, b"");
        assert_eq!(code, 0, "{err}");
        out
    };
    assert!(after("1", "32f") == bytes("clean.wav"));
    assert!(after("0", "32f") == bytes("plain.wav"));
    assert_eq!(samples(&after("0.1", "16")), 40 * 256);
}

#[test]
fn what_cannot_be_denoised_is_one_line() {
    let place = Place::new();
    place.mel("a.npy", 40);
    wav::write(&place.path("a.wav"), &[0.1; 100], 16_000, WavFormat::Int16).unwrap();
    let message = failure(&place, &["a.npy", "-o", "b.wav", "--stream", "--denoise", "0.1"]);
    assert!(message.starts_with("--denoise needs the whole sound: leave out --stream"), "{message}");
    let message = failure(&place, &["a.npy", "-o", "b.wav", "--denoise", "11"]);
    assert_eq!(message, "denoising strength is 11, expected 0 to 10");
    for (args, expected) in [
        (
            ["a.wav", "--strength", "0.1"],
            "a.wav: has 16000 Hz, voice tiny speaks at 22050 Hz; name the voice that made it",
        ),
        (["a.wav", "--strength", "nan"], "denoising strength is NaN, expected 0 to 10"),
        (["none.wav", "--strength", "0.1"], "cannot read none.wav: No such file or directory (os error 2)"),
    ] {
        let (code, out, err) =
            run(&place, &[&["denoise"], &args[..], &["-o", "b.wav", "--voice", "voice"]].concat(), b"");
        assert_eq!((code, out.len(), err), (1, 0, format!("melglow: {expected}\n")));
        assert!(!place.path("b.wav").exists());
    }
}

/// The hum of a whole model: 88 frames of a mel of zeros, no noise.
#[test]
fn the_hum_equals_the_references() {
    if parity().is_none() {
        return;
    }
    let (_, imported) = imported("b_state_dict.pt", &Options::default()).unwrap();
    let denoiser = Denoiser::new(&Vocoder::new(&imported.voice).unwrap()).unwrap();
    let expected = tensor("d_bias_spec.npy").flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let worst = denoiser.bias().iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(expected.len() == denoiser.bias().len() && worst < 1e-4, "{worst}");
}

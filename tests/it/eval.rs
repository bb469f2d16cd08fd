//! `melglow eval` in a temporary folder: figures, files, messages.

use super::Place;
use super::cli::run;
use melglow::audio::wav::{self, WavFormat};
use melglow::voice::{TrainedOn, Voice, VoiceConfig};
use serde_json::Value;
use std::fs;

/// A data folder with half a second of a buzz, of silence, and less than a hop.
fn place() -> Place {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    let buzz: Vec<f32> = (0..11_000).map(|i| 0.3 * ((i as f32 / 110.0).fract() - 0.5)).collect();
    write(&place, "buzz", &buzz, 22_050);
    write(&place, "silence", &[0.0; 6000], 22_050);
    write(&place, "tiny", &[0.1; 100], 22_050);
    place
}

fn write(place: &Place, name: &str, samples: &[f32], rate: u32) {
    wav::write(&place.path(format!("data/{name}.wav")), samples, rate, WavFormat::Int16).unwrap();
}

fn eval(place: &Place, args: &[&str]) -> (i32, String, String) {
    let (code, out, err) = run(place, &[&["eval", "--voice", "voice", "--data", "data"], args].concat(), b"");
    (code, String::from_utf8(out).unwrap(), err)
}

#[test]
fn figures_wavs_and_a_page() {
    let place = place();
    let args = ["--out", "out", "--report-clips", "1", "--json", "scores.json", "--clips", "buzz,silence"];
    let (code, out, err) = eval(&place, &args);
    assert_eq!((code, &err[..]), (0, ""));
    assert!(out.contains("2 clips, 0.8 s; ") && out.contains("VDE %") && !out.contains("NaN"), "{out}");
    let json: Value = serde_json::from_slice(&fs::read(place.path("scores.json")).unwrap()).unwrap();
    let (buzz, silence) = (&json["clips"][0], &json["clips"][1]);
    assert_eq!((buzz["clip"].as_str(), silence["clip"].as_str()), (Some("buzz"), Some("silence")));
    assert!(buzz["voice"]["mcd_db"].as_f64().unwrap() > 1.0);
    assert!(buzz["bits"]["voiced"].is_number() && buzz["bits"]["silence"].is_null());
    assert!(silence["voice"]["mcd_db"].is_null() && silence["bits"]["silence"].is_number());
    let griffin_lim = json["means"]["griffin_lim"]["mel_l1"]["mean"].as_f64().unwrap();
    assert!(griffin_lim < json["means"]["voice"]["mel_l1"]["mean"].as_f64().unwrap());
    assert_eq!(place.names("out"), ["griffin-lim", "recording", "report.html", "voice"]);
    for folder in ["recording", "voice", "griffin-lim"] {
        assert_eq!(place.names(&format!("out/{folder}")), ["buzz.wav", "silence.wav"]);
    }
    assert!(fs::read(place.path("out/recording/buzz.wav")).unwrap() == fs::read(place.path("data/buzz.wav")).unwrap());
    let page = fs::read_to_string(place.path("out/report.html")).unwrap();
    assert_eq!((page.matches("<audio").count(), page.matches("<h3>buzz").count()), (3, 1));

    let likelihood = |args: &[&str]| -> Value {
        let (code, out, _) = eval(&place, &[args, &["--clips", "buzz,silence", "--json"]].concat());
        assert_eq!(code, 0);
        serde_json::from_str(&out).unwrap()
    };
    // the same figure without speaking, and the same speech again
    let alone = likelihood(&["--likelihood-only"])["per_sample"].as_f64().unwrap();
    assert!((alone - json["per_sample"].as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(likelihood(&[])["clips"][0]["voice"], buzz["voice"]);
}

#[test]
fn clips_are_left_out_resampled_and_known_with_a_word() {
    let place = place();
    write(&place, "other", &[0.1, -0.1].repeat(8000), 16_000);
    let voice = Voice::open(place.path("voice")).unwrap();
    let known =
        TrainedOn { clips: vec!["a..buzz".into()], low: vec![-12.0; 80], high: vec![2.0; 80], residual_level: None };
    let config = VoiceConfig { trained_on: Some(known), ..voice.config().clone() };
    let tensors: Vec<_> = voice.tensors().unwrap().into_iter().collect();
    Voice::from_parts(config, &tensors).unwrap().save(place.path("voice")).unwrap();
    let (code, out, err) = eval(&place, &["--likelihood-only"]);
    assert_eq!(code, 0, "{err}");
    assert!(!out.contains("buzz") && out.contains("silence") && out.contains("other"), "{out}");
    assert!(err.contains("skipped tiny: only 100 samples\n"), "{err}");
    assert!(err.contains("melglow: 1 clip resampled to 22050 Hz, the voice's\n"), "{err}");
    let (_, _, err) = eval(&place, &["--likelihood-only", "--clips", "buzz,silence"]);
    let expected = "these clips were trained on, by their names: buzz (1 clip of 2); figures flatter the voice";
    assert_eq!(err, format!("melglow: {expected}\n"));
}

#[test]
fn what_cannot_be_evaluated_is_one_line() {
    let place = place();
    fs::create_dir(place.path("empty")).unwrap();
    let before = place.names(".");
    for (args, expected) in [
        (&["--clips", "nobody"][..], "data: none of its clips has such a name"),
        (&["--clips", "tiny"], "data: none of its clips can be used; tiny: only 100 samples"),
        (&["--out", "no/where"], "cannot create folder no/where: No such file or directory (os error 2)"),
        (&["--refine", "1001"], "refine is 1001, expected 0 to 1000"),
        (&["--denoise", "11"], "denoising strength is 11, expected 0 to 10"),
        // said before the data is read, which isn't there
        (&["--data", "nowhere", "--out", "no/where"], "cannot create folder no/where: No such file"),
        (&["--data", "nowhere", "--out", "voice/config.json/x"], "cannot create voice/config.json/x: not a directory"),
        (&["--data", "nowhere", "--json", "no/where"], "cannot write no/where: No such file"),
        (&["--data", "nowhere", "--likelihood-only", "--json", "no/where"], "cannot write no/where: No such file"),
        (&["--data", "nowhere", "--json", "empty"], "cannot write empty: it is a folder"),
    ] {
        let (code, out, err) = eval(&place, args);
        // figures that are there aren't lost for a wrong name
        assert_eq!((code, out.is_empty()), (1, !args.contains(&"--json")), "{args:?}: {out}");
        let lines: Vec<&str> = err.lines().filter(|line| !line.contains("skipped")).collect();
        assert!(lines.len() == 1 && lines[0].starts_with(&format!("melglow: {expected}")), "{args:?}: {err}");
        assert_eq!(place.names("."), before, "{args:?}: something is left behind");
    }
    let (code, _, err) = eval(&place, &["--likelihood-only", "--out", "out"]);
    assert!(code == 2 && err.contains("cannot be used with"), "{err}");
}

//! `melglow eval` in a temporary folder: figures, files, messages.

use super::cli::run;
use super::{Place, seeded_voice, tiny_flow};
use melglow::audio::wav::{self, WavFormat};
use melglow::flow::config::{Block, StepConfig};
use melglow::mel::MelConfig;
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
    let data = if args.contains(&"--data") { &[][..] } else { &["--data", "data"] };
    let (code, out, err) = run(place, &[&["eval", "--voice", "voice"], data, args].concat(), b"");
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
    let known = TrainedOn {
        clips: vec!["a..buzz".into()],
        low: vec![-12.0; 80],
        high: vec![2.0; 80],
        residual_level: None,
        detail: None,
    };
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
        (
            &["--clips", "silence,nobody,buzz,x..z,buzz.wav"][..],
            "data: has no clip nobody, x..z, buzz.wav; a clip's name is its file's without the extension",
        ),
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
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}");
        let lines: Vec<&str> = err.lines().filter(|line| !line.contains("skipped")).collect();
        assert!(lines.len() == 1 && lines[0].starts_with(&format!("melglow: {expected}")), "{args:?}: {err}");
        assert_eq!(place.names("."), before, "{args:?}: something is left behind");
    }
    for refused in [["--out", "out"], ["--precision", "int16"], ["--precision", "f32"]] {
        let (code, _, err) = eval(&place, &[&["--likelihood-only"], &refused[..]].concat());
        assert!(code == 2 && err.contains("cannot be used with"), "{err}");
    }
}

/// Noise at full scale, whose likelihood by the voice `far` overflows, and noise a thousand times quieter.
fn overwhelmed() -> Place {
    let place = place();
    // latents of full scale are 10⁵, far from any that count
    let mut flow = tiny_flow();
    flow.blocks[0] = Block { repeat: 1, steps: vec![StepConfig::Actnorm {}] };
    let voice = seeded_voice("far", MelConfig::nvidia(), flow);
    let mut tensors: Vec<_> = voice.tensors().unwrap().into_iter().collect();
    let (_, scale) = tensors.iter_mut().find(|(name, _)| name == "steps.0.log_scale").unwrap();
    *scale = (&*scale + 1e5_f64.ln()).unwrap();
    Voice::from_parts(voice.config().clone(), &tensors).unwrap().save(place.path("far")).unwrap();
    let mut state = 1_u32;
    let mut noise = |level: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            level * (state as f32 / u32::MAX as f32 - 0.5)
        };
        (0..8000).map(|_| next()).collect()
    };
    let (white, quiet) = (noise(2.0), noise(0.002));
    write(&place, "white", &white, 22_050);
    write(&place, "quiet", &quiet, 22_050);
    place
}

#[test]
fn a_likelihood_that_overflows_counts_in_no_total() {
    let place = overwhelmed();
    let eval = |args: &[&str]| {
        let (code, out, err) =
            run(&place, &[&["eval", "--voice", "far", "--data", "data", "--clips"], args].concat(), b"");
        assert_eq!(code, 0, "{err}");
        (String::from_utf8(out).unwrap(), err)
    };
    let json = |args: &[&str]| -> Value { serde_json::from_str(&eval(&[args, &["--json"]].concat()).0).unwrap() };
    let remark = "the likelihood of these clips overflows, no total counts them: white (1 clip of 2)";
    let (out, err) = eval(&["quiet,white", "--likelihood-only"]);
    assert_eq!(err, format!("melglow: {remark}\n"));
    assert!(out.contains("\nwhite           7936  –\nall but 1       7936  "), "{out}");
    assert!(out.contains("\nmean of 1 clip ") && !out.contains("NaN") && !out.contains('±'), "{out}");
    assert!(out.ends_with(", without 1 clip of 2, whose likelihood overflows\n"), "{out}");
    let (both, alone) = (json(&["quiet,white", "--likelihood-only"]), json(&["quiet", "--likelihood-only"]));
    assert!(both["per_sample"].is_number() && both["per_sample"] == alone["per_sample"]);
    assert!(both["ci95"].is_null() && alone["ci95"].is_null() && both["clips"][1]["bits"].is_null());
    assert_eq!((&both["left_out"][0], alone["left_out"].as_array().unwrap().len()), (&Value::from("white"), 0));
    let (out, _) = eval(&["white", "--likelihood-only"]);
    assert!(out.ends_with("  –\nno total: the likelihood of every clip overflows\n"), "{out}");

    let (out, err) = eval(&["quiet,white", "--refine", "0", "--out", "out", "--json", "scores.json"]);
    assert_eq!(err, format!("melglow: {remark}\n"));
    let total = "bits per sample over all samples, without 1 clip of 2, whose likelihood overflows";
    let page = fs::read_to_string(place.path("out/report.html")).unwrap();
    assert!(out.contains(total) && page.contains(total) && page.contains(remark), "{out}");
    let spoken: Value = serde_json::from_slice(&fs::read(place.path("scores.json")).unwrap()).unwrap();
    assert!((spoken["per_sample"].as_f64().unwrap() - alone["per_sample"].as_f64().unwrap()).abs() < 1e-9);
    assert!(spoken["clips"][1]["bits"]["all"].is_null() && spoken["remarks"][0] == remark);
}

#[test]
fn one_clip_has_no_interval() {
    let place = place();
    let (code, out, _) = eval(&place, &["--clips", "buzz", "--likelihood-only"]);
    assert_eq!(code, 0);
    let last = out.lines().last().unwrap();
    assert!(last.starts_with("mean of 1 clip ") && !last.contains('±') && !last.contains('%'), "{out}");
}

#[test]
fn the_precision_is_told() {
    let place = place();
    // into the folder that it makes itself
    let args = ["--clips", "silence", "--precision", "int16", "--out", "out/", "--json", "out/scores.json"];
    let (code, out, err) = eval(&place, &args);
    assert_eq!((code, err.as_str()), (0, ""));
    let json: Value = serde_json::from_slice(&fs::read(place.path("out/scores.json")).unwrap()).unwrap();
    assert_eq!(json["precision"], "int16");
    let page = fs::read_to_string(place.path("out/report.html")).unwrap();
    assert!(out.contains("seed 0, in int16, ") && page.contains("seed 0, in int16, "), "{out}");
}

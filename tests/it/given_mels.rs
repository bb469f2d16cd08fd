//! `--mels`: training and evaluation on mels that another program made of the clips.

use super::train::{Place, recipe, rich_recipe};
use melglow::mel::convention::Convention;
use melglow::mel::extract::Extractor;
use melglow::mel::{MelConfig, MelSpectrogram, file};
use melglow::train::config::Validation;
use melglow::{audio, train};
use serde_json::Value;
use std::fs;

/// The mels of clips a to f in a convention, changed, in the folder `mels`.
fn write_mels(place: &Place, convention: &str, change: impl Fn(MelSpectrogram) -> MelSpectrogram) {
    fs::create_dir_all(place.path("mels")).unwrap();
    let extractor = Extractor::of(&Convention::named(convention, &MelConfig::nvidia()).unwrap()).unwrap();
    for name in ["a", "b", "c", "d", "e", "f"] {
        let sound = audio::decode::read(&place.path(format!("data/wavs/{name}.wav"))).unwrap();
        let mel = change(extractor.extract(&sound.samples).unwrap());
        file::write_npy(&place.path(format!("mels/{name}.npy")), &mel).unwrap();
    }
}

/// Trains with a recipe and more arguments: the exit code and standard error.
fn trained(place: &Place, recipe: &train::Recipe, more: &[&str]) -> (i32, String) {
    fs::write(place.path("own.json"), serde_json::to_string(recipe).unwrap()).unwrap();
    let args = ["train", "--data", "data", "--recipe", "own.json", "--threads", "1"];
    let (code, _, err) = place.run(&[&args[..], more].concat());
    (code, err)
}

fn weights(place: &Place, checkpoint: &str) -> Vec<u8> {
    fs::read(place.path(checkpoint).join("model.safetensors")).unwrap()
}

#[test]
fn the_sounds_own_mels_make_the_same_voice_and_others_another() {
    let place = Place::new();
    let mut recipe = rich_recipe(4);
    // copies of clips have no mels
    let (code, err) = trained(&place, &recipe, &["--out", "copies", "--mels", "mels"]);
    assert!(code == 1 && err.starts_with("recipe tiny trains on copies of its clips"), "{err}");
    recipe.training.leave_copies_out();
    let (code, err) = trained(&place, &recipe, &["--out", "sound"]);
    assert_eq!(code, 0, "{err}");
    write_mels(&place, "nvidia", |mel| mel);
    let (code, err) = trained(&place, &recipe, &["--out", "given", "--mels", "mels"]);
    assert_eq!(code, 0, "{err}");
    let remark = "the given mels are 0.00 nats from those of the sounds on average, 0.00 at most (f)\n";
    assert!(err.contains(remark), "{err}");
    assert!(weights(&place, "sound/step-4") == weights(&place, "given/step-4"));

    write_mels(&place, "nvidia", |mel| {
        MelSpectrogram::new(mel.values().iter().map(|value| value + 0.25).collect(), 80).unwrap()
    });
    let (code, err) = trained(&place, &recipe, &["--out", "louder", "--mels", "mels"]);
    assert!(code == 0 && err.contains("mels are 0.25 nats from those of the sounds on average, 0.25 at most"), "{err}");
    assert!(weights(&place, "sound/step-4") != weights(&place, "louder/step-4"));
    // and its likelihoods are of these mels
    let bits = |mels: &[&str]| {
        let args = ["eval", "--data", "data", "--voice", "louder/step-4", "--likelihood-only", "--json"];
        let (code, out, err) = place.run(&[&args[..], mels].concat());
        assert_eq!(code, 0, "{err}");
        (serde_json::from_str::<Value>(&out).unwrap()["per_sample"].as_f64().unwrap(), err)
    };
    let ((given, said), (own, _)) = (bits(&["--mels", "mels"]), bits(&[]));
    assert!(given != own && said.contains("the given mels are 0.25 nats"), "{given} {own} {said}");
    let log = place.log("louder");
    let held_out = log.iter().rev().find_map(|line| line["held_out_bits"].as_f64()).unwrap();
    assert!((held_out - given).abs() < 1e-4, "{held_out} {given}");
}

#[test]
fn mels_of_other_programs_are_learnt_from_in_their_convention() {
    let place = Place::new();
    write_mels(&place, "log10", |mel| mel);
    let (code, err) = trained(&place, &recipe(1), &["--out", "a", "--mels", "mels"]);
    assert!(
        code == 0 && err.contains("are they of these clips, and as the voice expects (--mel-convention)?"),
        "{err}"
    );
    let (code, err) = trained(&place, &recipe(1), &["--out", "b", "--mels", "mels", "--mel-convention", "log10"]);
    assert!(code == 0 && err.contains("the given mels are 0.00 nats from"), "{err}");
    // frames half a hop later: the sound is cut to where they are, all but the ends' reflections the same
    write_mels(&place, "hifigan", |mel| mel);
    let (code, err) = trained(&place, &recipe(1), &["--out", "c", "--mels", "mels", "--mel-convention", "hifigan"]);
    let far: f32 = err.split("the given mels are ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(code == 0 && far < 0.05, "{err}");
    let args = ["--out", "d", "--mels", "mels", "--mel-convention", "espnet"];
    let (code, err) = trained(&place, &recipe(1), &args);
    assert!(code == 1 && err.contains("can't be turned into the voice's exactly"), "{err}");
}

/// Clips in folders by speaker have their mels in folders of the same names, or by key in an archive.
#[test]
fn speakers_in_folders_have_their_mels_in_folders() {
    let place = Place::new();
    write_mels(&place, "nvidia", |mel| mel);
    fs::remove_file(place.path("data/metadata.csv")).unwrap();
    for (one, two) in [("data/wavs/a.wav", "data/wavs/she/a.wav"), ("mels/a.npy", "mels/wavs/she/mel-a.npy")] {
        fs::create_dir_all(place.path(two).parent().unwrap()).unwrap();
        fs::rename(place.path(one), place.path(two)).unwrap();
    }
    for name in ["b", "c", "d", "e", "f"] {
        fs::rename(place.path(format!("mels/{name}.npy")), place.path(format!("mels/wavs/{name}.npy"))).unwrap();
    }
    let mut recipe = recipe(1);
    recipe.validation = Validation::Clips { names: vec!["wavs/f".into()] };
    let (code, err) = trained(&place, &recipe, &["--out", "run", "--mels", "mels"]);
    assert!(code == 0 && err.contains("5 clips, 3 s; held out 1, 1 s") && !err.contains("skipped"), "{err}");
}

#[test]
fn what_does_not_fit_is_said_on_a_line() {
    let place = Place::new();
    write_mels(&place, "nvidia", |mel| mel);
    fs::remove_file(place.path("mels/a.npy")).unwrap();
    fs::rename(place.path("mels/b.npy"), place.path("mels/mel-b.npy")).unwrap();
    fs::rename(place.path("mels/c.npy"), place.path("mels/c-feats.npy")).unwrap();
    let short = file::read(&place.path("mels/d.npy"), 80).unwrap().section(0..20);
    file::write_npy(&place.path("mels/d.npy"), &short).unwrap();
    let (code, err) = trained(&place, &recipe(2), &["--out", "run", "--mels", "mels"]);
    assert_eq!(code, 0, "{err}");
    let skipped: Vec<&str> = err.lines().filter(|line| line.starts_with("skipped ")).collect();
    assert_eq!(
        skipped,
        [
            "skipped a: mels: has no mel of the name a",
            "skipped d: mels/d.npy: has 20 frames, and its clip's 11300 samples are 45"
        ]
    );
    assert!(err.contains("2 clips, 1 s; held out 2, 1 s"), "{err}");
    // a run goes on with what it began with
    let (code, _, err) = place.run(&["train", "--data", "data", "--out", "run", "--resume", "--steps", "3"]);
    assert_eq!(
        (code, err.lines().last().unwrap()),
        (1, "melglow: run: the run was started with --mels; give them again")
    );
    let again = ["train", "--data", "data", "--out", "run", "--resume", "--steps", "3", "--mels", "mels"];
    let (code, _, err) = place.run(&again);
    assert_eq!(code, 0, "{err}");
    place.train(&recipe(1), "own");
    let (code, _, err) = place.run(&[&again[..4], &["own"], &again[5..]].concat());
    assert_eq!(
        (code, err.lines().last().unwrap()),
        (1, "melglow: own: the run was started without --mels; leave them out")
    );

    let refusal = |more: &[&str]| {
        let (code, err) = trained(&place, &recipe(1), &[&["--out", "bad"], more].concat());
        assert_eq!((code, err.lines().count()), (1, 1), "{err}");
        err
    };
    let err = refusal(&["--mel-convention", "hifigan"]);
    assert_eq!(err, "melglow: --mel-convention and --mel-stats are for --mels\n");
    fs::create_dir(place.path("none")).unwrap();
    assert!(refusal(&["--mels", "none"]).starts_with("melglow: none: no mel files in this folder"));
    fs::copy(place.path("mels/e.npy"), place.path("none/z.npy")).unwrap();
    let err = refusal(&["--mels", "none"]);
    assert_eq!(err, "melglow: data: none of its clips can be used; a: none: has no mel of the name a\n");
    fs::copy(place.path("mels/e.npy"), place.path("none/z.npz")).unwrap();
    let err = refusal(&["--mels", "none"]);
    assert!(err.starts_with("melglow: none/z.np") && err.ends_with(" are mels of one clip\n"), "{err}");
}

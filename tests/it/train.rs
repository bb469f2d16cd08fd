//! Training: what it reads, what it writes, and that it goes on exactly where it stopped.

use assert_cmd::Command;
use candle_core::Device;
use melglow::audio::wav::{self, WavFormat};
use melglow::flow::config::{Block, StepConfig, WhiteningConfig};
use melglow::kernels::choice::Kernel;
use melglow::kernels::multiply::Products;
use melglow::mel::MelConfig;
use melglow::net::Passes;
use melglow::train::config::{SmoothMels, Validation, Variety};
use melglow::train::dataset::{Dataset, Sampler};
use melglow::train::{Options, Recipe, Summary, checkpoint, train};
use melglow::voice::Voice;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// A folder with `data/` in the LJSpeech layout: clips a to f, each of about half a second.
pub(super) struct Place(tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(place.path("data/wavs")).unwrap();
        let mut metadata = String::new();
        for (i, name) in ["a", "b", "c", "d", "e", "f"].iter().enumerate() {
            let pitch = 0.02 + 0.01 * i as f32;
            let mut noise = 1u32;
            let samples: Vec<f32> = (0..11_000 + 100 * i)
                .map(|t| {
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    0.3 * (pitch * t as f32).sin() + 0.02 * (noise as f32 / u32::MAX as f32 - 0.5)
                })
                .collect();
            let path = place.path(format!("data/wavs/{name}.wav"));
            wav::write(&path, &samples, 22_050, WavFormat::Int16).unwrap();
            metadata += &format!("{name}|Some text.|Some text.\n");
        }
        fs::write(place.path("data/metadata.csv"), metadata).unwrap();
        place
    }

    pub(super) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn options(&self, recipe: &Recipe, out: &str) -> Options {
        Options {
            data: self.path("data"),
            mels: None,
            out: self.path(out),
            recipe: Some(recipe.clone()),
            from: None,
            steps: None,
            batch: None,
            seed: None,
            resume: false,
            stop_after: None,
            device: Device::Cpu,
            passes: Passes::default(),
        }
    }

    pub(super) fn train(&self, recipe: &Recipe, out: &str) -> Summary {
        train(&self.options(recipe, out), &AtomicBool::new(false)).unwrap()
    }

    /// The lines of a run's log.
    pub(super) fn log(&self, out: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(out).join("log.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The real program: exit code and standard output and error.
    pub(super) fn run(&self, args: &[&str]) -> (i32, String, String) {
        let mut command: Command = assert_cmd::cargo::cargo_bin_cmd!("melglow");
        let output = command.current_dir(self.path("")).args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().expect("no signal"), text(output.stdout), text(output.stderr))
    }
}

/// The tiny recipe for a handful of steps.
pub(super) fn recipe(steps: usize) -> Recipe {
    let mut recipe = Recipe::open("tiny").unwrap();
    recipe.training.steps = steps;
    recipe.training.init_batch = 4;
    recipe.training.eval_every = 5;
    recipe.training.checkpoint_every = 7;
    recipe.validation = Validation::Clips { names: vec!["e..f".into()] };
    recipe
}

/// A recipe with every step and every feature of training.
pub(super) fn rich_recipe(steps: usize) -> Recipe {
    let mut recipe = recipe(steps);
    recipe.flow.whitening =
        Some(WhiteningConfig { order: 8, filters_per_hop: 2, hidden: 8, context: 1, fit_steps: 3, lookahead: None });
    recipe
        .flow
        .blocks
        .insert(0, Block { repeat: 1, steps: vec![StepConfig::Asinh { scale: 0.5 }, StepConfig::Gain {}] });
    recipe.flow.blocks.push(Block { repeat: 1, steps: vec![StepConfig::early(2), StepConfig::mix()] });
    recipe.training.accumulate = 2;
    recipe.training.batch = 3;
    recipe.training.weight_decay = 0.01;
    recipe.training.shifts = 3;
    recipe.training.variety = Some(Variety { copies: 1, speed: 1.2, level_db: 6.0, colour: 0.3 });
    recipe.training.smooth = Some(SmoothMels { copies: 2, bands: 1.0, frames: 2.0, classes: 4 });
    recipe
}

/// All files of a checkpoint, by name.
pub(super) fn bytes(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    ["config.json", "model.safetensors", "train/optimiser.safetensors", "train/state.json"]
        .map(|name| (name.to_string(), fs::read(checkpoint.join(name)).unwrap()))
        .into()
}

#[test]
fn resumed_is_straight_to_the_bit() {
    resumed_is_straight(&rich_recipe(20));
}

/// The same with a whitening that learns; it must move, but for the part that is only fitted.
#[test]
fn resumed_joint_training_is_straight_to_the_bit() {
    let mut recipe = rich_recipe(20);
    recipe.training.joint_whitening = true;
    recipe.training.checkpoint_every = 10;
    let place = resumed_is_straight(&recipe);
    let (first, last) = (weights(&place, "halves/step-10"), weights(&place, "halves/step-20"));
    let whitening = || first.keys().filter(|name| name.starts_with("whiten."));
    assert_eq!(whitening().count(), 7);
    for name in whitening() {
        assert_eq!(first[name] == last[name], name == "whiten.high", "{name}");
    }
}

/// Trains straight and in halves and compares; the place with the runs `straight` and `halves`.
fn resumed_is_straight(recipe: &Recipe) -> Place {
    let place = Place::new();
    let straight = place.train(recipe, "straight");
    assert!(straight.complete);

    let stopped =
        train(&Options { stop_after: Some(10), ..place.options(recipe, "halves") }, &AtomicBool::new(false)).unwrap();
    assert_eq!((stopped.step, stopped.complete), (10, false));
    // activations that are computed again are those that were kept
    let passes = Passes { recompute: true, ..Passes::default() };
    let resumed = Options { resume: true, passes, ..place.options(recipe, "halves") };
    let resumed = train(&resumed, &AtomicBool::new(false)).unwrap();
    assert_eq!((resumed.step, resumed.complete), (20, true));
    for (straight, resumed) in bytes(&straight.checkpoint).into_iter().zip(bytes(&resumed.checkpoint)) {
        assert!(straight == resumed, "{} differs", straight.0);
    }
    // and so do the figures, but for the clock's
    let figures = |out| {
        let mut log = place.log(out);
        log.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("samples_per_s")));
        log
    };
    assert_eq!(figures("straight"), figures("halves"));
    place
}

#[test]
fn the_level_of_the_residual_is_that_of_the_saved_weights_and_of_recordings() {
    let mut recipe = rich_recipe(20);
    recipe.training.joint_whitening = true;
    let place = Place::new();
    let voice = Voice::open(place.train(&recipe, "run").checkpoint).unwrap();
    let recordings = Dataset::read(&place.path("data"), &recipe.mel, None, |name| name < "e").unwrap();
    let (recordings, _) = recordings.split(|_| false);
    let sampler = Sampler::new(&recordings, &recipe).unwrap();
    let level = sampler.residual_level(&voice.build_flow().unwrap().0).unwrap();
    assert_eq!(voice.config().trained_on.as_ref().unwrap().residual_level, Some(level));
}

#[test]
fn a_resumed_log_forgets_what_came_after_the_checkpoint() {
    let place = Place::new();
    let recipe = recipe(20);
    place.train(&recipe, "run");
    let before = place.log("run").len();
    fs::remove_dir_all(place.path("run/step-20")).unwrap();
    train(&Options { resume: true, ..place.options(&recipe, "run") }, &AtomicBool::new(false)).unwrap();
    assert_eq!(place.log("run").len(), before);
}

#[test]
fn training_learns_and_keeps_few_checkpoints_and_the_best() {
    let place = Place::new();
    let mut recipe = recipe(120);
    recipe.training.eval_every = 40;
    let summary = place.train(&recipe, "run");
    let bits: Vec<f64> = place.log("run").iter().filter_map(|line| line["held_out_bits"].as_f64()).collect();
    assert_eq!(bits.len(), 4);
    assert!(bits[3] < bits[0] - 1.0, "{bits:?}");
    assert_eq!(summary.held_out.map(|held| (held.step, held.bits)), Some((120, bits[3])));
    let steps = checkpoint::steps(&place.path("run")).unwrap();
    assert!(steps.len() <= 4 && steps.contains(&120), "{steps:?}");
    // a checkpoint is a voice, and nothing else lies around
    Voice::open(&summary.checkpoint).unwrap();
    let strange: Vec<_> = fs::read_dir(place.path("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("step-") && name != "log.jsonl" && name != "tensorboard")
        .collect();
    assert!(strange.is_empty(), "{strange:?}");
}

#[test]
fn eval_says_what_training_said() {
    let place = Place::new();
    let mut recipe = recipe(6);
    recipe.flow = rich_recipe(6).flow;
    let summary = place.train(&recipe, "run");
    let (code, out, err) =
        place.run(&["eval", "--voice", "run/step-6", "--data", "data", "--likelihood-only", "--json"]);
    assert_eq!(code, 0, "{err}");
    let eval: Value = serde_json::from_str(&out).unwrap();
    // JSON's decimals may cost the last bit
    assert!((eval["per_sample"].as_f64().unwrap() - summary.held_out.unwrap().bits).abs() < 1e-12);
    assert_eq!(eval["clips"].as_array().unwrap().len(), 2);
    let (code, out, err) =
        place.run(&["eval", "--voice", "run/step-6", "--data", "data", "--clips", "a..b,e", "--likelihood-only"]);
    assert_eq!(code, 0);
    assert!(out.contains("mean of 3 clips "), "{out}");
    assert!(err.contains("these clips were trained on, by their names: a, b (2 clips of 3)"), "{err}");
}

#[test]
fn divergence_skips_rolls_back_and_gives_up() {
    let place = Place::new();
    let mut recipe = recipe(500);
    recipe.training.learning_rate = 1e15;
    recipe.training.eval_every = 1000;
    recipe.training.checkpoint_every = 1000;
    let error = train(&place.options(&recipe, "run"), &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.starts_with("training diverges at step "), "{error}");
    let log = place.log("run");
    let events = |name: &str| log.iter().filter(|line| line["event"] == name).count();
    assert_eq!((events("skipped"), events("rollback")), (60, 5));
    let skipped = log.iter().find(|line| line["event"] == "skipped").unwrap();
    assert_eq!(skipped["clips"].as_array().unwrap().len(), recipe.training.batch);
    // the checkpoint that it went back to is whole
    Voice::open(place.path("run/step-0")).unwrap();
}

#[test]
fn bad_clips_are_named_and_skipped_all_at_once() {
    let place = Place::new();
    let good = fs::read(place.path("data/wavs/a.wav")).unwrap();
    fs::write(place.path("data/wavs/b.wav"), &good[..30]).unwrap();
    fs::write(place.path("data/wavs/c.wav"), "no sound at all").unwrap();
    fs::write(place.path("data/wavs/d.wav"), &good[..44]).unwrap();
    fs::write(place.path("data/metadata.csv"), "a|x|x\r\n\r\nb|x|x\r\nc|x|x\r\nd|x|x\r\nmissing|x|x\r\n\n").unwrap();
    let dataset = Dataset::read(&place.path("data"), &MelConfig::nvidia(), None, |_| true).unwrap();
    assert_eq!(dataset.clips.iter().map(|clip| clip.name.as_str()).collect::<Vec<_>>(), ["a"]);
    let names: Vec<_> = dataset.skipped.iter().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(names, ["b", "c", "d", "missing"], "{:?}", dataset.skipped);
    assert!(dataset.skipped.iter().all(|line| !line.contains('\n')), "{:?}", dataset.skipped);
}

/// Trains from a voice; standard error.
fn train_from(place: &Place, voice: &Path, more: &[&str], out: &str) -> (i32, String) {
    let from = ["train", "--data", "data", "--from", voice.to_str().unwrap(), "--out", out, "--threads", "1"];
    let (code, _, err) = place.run(&[&from[..], more].concat());
    (code, err)
}

/// The weights of a run's checkpoint.
fn weights(place: &Place, checkpoint: &str) -> std::collections::BTreeMap<String, Vec<f32>> {
    let tensors = Voice::open(place.path(checkpoint)).unwrap().tensors().unwrap();
    tensors.into_iter().map(|(name, t)| (name, t.flatten_all().unwrap().to_vec1().unwrap())).collect()
}

#[test]
fn a_run_starts_from_a_voice_of_its_own_design() {
    let place = Place::new();
    let voice = place.train(&rich_recipe(3), "first").checkpoint;
    // fine-tuning takes segments of 0.7 s
    for name in ["a", "b", "c"] {
        let samples: Vec<f32> = (0..20_000).map(|t| 0.3 * (0.03 * t as f32).sin()).collect();
        wav::write(&place.path(format!("data/wavs/{name}.wav")), &samples, 22_050, WavFormat::Int16).unwrap();
    }
    // nothing moves in one step at a tiny rate, but for what is initialised afresh: nothing
    let (code, err) = train_from(&place, &voice, &["--steps", "1"], "second");
    assert_eq!(code, 0, "{err}");
    let name = &Voice::open(&voice).unwrap().config().name.clone();
    let taken = weights(&place, "first/step-3").len();
    assert!(err.contains(&format!("from voice {name}: {taken} tensors taken, none starts fresh\n")), "{err}");
    let (old, new) = (weights(&place, "first/step-3"), weights(&place, "second/step-1"));
    assert_eq!(old.keys().collect::<Vec<_>>(), new.keys().collect::<Vec<_>>());
    for (name, old) in &old {
        let off = old.iter().zip(&new[name]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-3, "{name} moved by {off}");
    }
    // a checkpoint goes on by itself: --from is for new runs
    let (code, err) = train_from(&place, &voice, &["--resume"], "second");
    assert_eq!(code, 2, "{err}");
    let (code, _, err) = place.run(&["train", "--data", "data", "--out", "second", "--resume", "--steps", "2"]);
    assert_eq!(code, 0, "{err}");
}

#[test]
fn a_run_of_another_design_takes_what_fits_and_says_so() {
    let place = Place::new();
    let voice = place.train(&recipe(3), "first").checkpoint;
    let mut other = recipe(1);
    other.flow.blocks[0].repeat = 3;
    other.training.learning_rate = 1e-12;
    fs::write(place.path("other.json"), serde_json::to_string(&other).unwrap()).unwrap();
    let (code, err) = train_from(&place, &voice, &["--recipe", "other.json"], "second");
    assert_eq!(code, 0, "{err}");
    assert!(err.contains(" start fresh (steps.6.log_scale, steps.6.shift, steps.7.weight, "), "{err}");
    let (old, new) = (weights(&place, "first/step-3"), weights(&place, "second/step-1"));
    assert!(old["steps.0.shift"].iter().zip(&new["steps.0.shift"]).all(|(a, b)| (a - b).abs() < 1e-6));
    // the fresh actnorm is initialised from data
    assert!(new["steps.6.log_scale"].iter().any(|v| v.abs() > 1e-3));

    let mut mel = recipe(1);
    mel.mel.f_max = 7000.0;
    fs::write(place.path("mel.json"), serde_json::to_string(&mel).unwrap()).unwrap();
    let (code, err) = train_from(&place, &voice, &["--recipe", "mel.json"], "third");
    assert_eq!(code, 1);
    assert!(err.contains("has another mel convention than voice"), "{err}");
    let mut nothing = recipe(1);
    nothing.flow.group = 32;
    nothing.flow.conditioning = melglow::flow::config::ConditioningConfig::Frame {
        channels: 3,
        residual_layers: 0,
        lookahead: None,
        norm: false,
    };
    if let StepConfig::Coupling { net, .. } = &mut nothing.flow.blocks[0].steps[2] {
        net.channels = 5;
    }
    fs::write(place.path("nothing.json"), serde_json::to_string(&nothing).unwrap()).unwrap();
    let (code, err) = train_from(&place, &voice, &["--recipe", "nothing.json"], "fourth");
    assert_eq!(code, 1);
    assert!(err.lines().last().unwrap().starts_with("melglow: nothing of voice "), "{err}");
}

/// An imported WaveGlow: weight norm trains on, its halves and upsampler stay, and `eval` knows it.
#[test]
fn an_imported_checkpoint_is_fine_tuned() {
    let Some(folder) = super::golden::parity() else { return };
    let place = Place::new();
    for checkpoint in ["a_nvidia_train_module.pt", "s128_state_dict.pt"] {
        let from = folder.join(checkpoint);
        let (code, _, err) = place.run(&["import", from.to_str().unwrap(), "-o", "mine", "--halves", "alternating"]);
        assert_eq!(code, 0, "{err}");
        let _ = fs::remove_dir_all(place.path("run"));
        let mut recipe = Recipe::fine_tuning(Voice::open(place.path("mine")).unwrap().config());
        recipe.training.segment_samples = 2048;
        recipe.training.warmup_steps = 0;
        fs::write(place.path("own.json"), serde_json::to_string(&recipe).unwrap()).unwrap();
        let more = ["--recipe", "own.json", "--steps", "12"];
        let (code, err) = train_from(&place, &place.path("mine"), &more, "run");
        assert_eq!(code, 0, "{err}");
        assert!(err.contains("none starts fresh"), "{err}");
        let bits = |voice: &str| {
            let (code, out, err) =
                place.run(&["eval", "--voice", voice, "--data", "data", "--clips", "f", "--likelihood-only", "--json"]);
            assert_eq!(code, 0, "{err}");
            serde_json::from_str::<Value>(&out).unwrap()["per_sample"].as_f64().unwrap()
        };
        let (before, after) = (bits("mine"), bits("run/step-12"));
        assert!(after < before, "{checkpoint}: {before} bits before, {after} after");
    }
}

#[test]
fn a_plain_folder_of_audio_will_do() {
    let place = Place::new();
    fs::write(place.path("data/wavs/notes.txt"), "not sound").unwrap();
    let dataset = Dataset::read(&place.path("data/wavs"), &MelConfig::nvidia(), None, |_| true).unwrap();
    assert_eq!((dataset.clips.len(), dataset.skipped.len(), dataset.resampled), (6, 0, 0));
    // with folders in it, as those of several speakers
    fs::create_dir(place.path("data/wavs/two")).unwrap();
    fs::rename(place.path("data/wavs/b.wav"), place.path("data/wavs/two/a.wav")).unwrap();
    let names = Dataset::names(&place.path("data/wavs")).unwrap();
    assert_eq!(names, ["a", "c", "d", "e", "f", "two/a"]);
    let other = MelConfig { sample_rate: 16_000, ..MelConfig::nvidia() };
    let dataset = Dataset::read(&place.path("data/wavs"), &other, None, |name| name == "a").unwrap();
    assert_eq!((dataset.clips.len(), dataset.resampled), (1, 1));
}

#[test]
fn the_program_says_what_is_wrong_on_one_line() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    let refusal = |args: &[&str]| {
        let (code, out, err) = place.run(args);
        assert_eq!((code, out.as_str(), err.lines().count()), (1, "", 1), "{err}");
        err.trim_end().strip_prefix("melglow: ").unwrap().to_string()
    };
    let train = |data, recipe, more: &[&str]| {
        refusal(&[&["train", "--data", data, "--recipe", recipe, "--out", "run"], more].concat())
    };
    assert_eq!(
        train("data", "grande", &[]),
        format!(
            "there is no recipe grande, neither a built-in one ({}) nor a file",
            Recipe::names().collect::<Vec<_>>().join(", ")
        )
    );
    fs::write(place.path("own.json"), "{\"name\": \"own\", \"colour\": 3}").unwrap();
    assert!(train("data", "own.json", &[]).starts_with("recipe own.json: unknown field `colour`"));
    assert_eq!(train("empty", "tiny", &[]), "empty: no clips: expected metadata.csv with wavs/, or audio files");
    assert!(train("nowhere", "tiny", &[]).starts_with("cannot read nowhere: "));
    assert_eq!(train("data", "tiny", &["--resume"]), "run: holds no checkpoint to resume from");
    assert!(!place.path("run").exists(), "something is left behind");
    let (code, _, err) = place.run(&["train", "--data", "data", "--recipe", "tiny", "--out", "run", "--steps", "2"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(train("data", "tiny", &[]), "run: holds a run at step 2; add --resume, or choose another folder");
    assert_eq!(
        train("data", "lj", &["--resume"]),
        "run: the run was started with another recipe; leave --recipe and --batch out"
    );
}

#[test]
fn the_held_out_figure_is_that_of_its_step() {
    let place = Place::new();
    fs::write(place.path("own.json"), serde_json::to_string(&recipe(20)).unwrap()).unwrap();
    let train = |more: &[&str]| {
        let args = ["train", "--data", "data", "--recipe", "own.json", "--out", "run", "--threads", "1"];
        let (_, _, err) = place.run(&[&args[..], more].concat());
        err.lines().last().unwrap().to_string()
    };
    let held = |line: usize| {
        let measured: Vec<Value> = place.log("run").into_iter().filter(|l| l["held_out_bits"].is_number()).collect();
        format!("held out {:.4} bits per sample", measured[line]["held_out_bits"].as_f64().unwrap())
    };
    assert_eq!(train(&["--stop-after", "3"]), format!("step 3, {} at step 0: run/step-3", held(0)));
    assert_eq!(train(&["--resume", "--stop-after", "4"]), "step 4: run/step-4");
    assert_eq!(train(&["--resume", "--stop-after", "5"]), format!("step 5, {}: run/step-5", held(1)));
    assert_eq!(train(&["--resume", "--steps", "6"]), format!("step 6, {}: run/step-6", held(2)));
}

#[test]
fn bf16_learns_as_f32_does_on_any_number_of_threads() {
    let place = Place::new();
    let mut recipe = recipe(60);
    recipe.training.eval_every = 60;
    let products = Products::Bfloats(Kernel::Scalar);
    let run = |products, out: &str, threads| {
        let options = Options { passes: Passes { products, ..Passes::default() }, ..place.options(&recipe, out) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let summary = pool.install(|| train(&options, &AtomicBool::new(false))).unwrap();
        (summary.held_out.unwrap().bits, bytes(&summary.checkpoint))
    };
    let floats = run(Products::default(), "floats", 1);
    let bfloats = run(products, "bfloats", 1);
    assert!(bfloats == run(products, "threads", 3));
    let first = place.log("floats")[0]["held_out_bits"].as_f64().unwrap();
    assert!(floats.0 < first - 0.5 && floats.1 != bfloats.1, "{first}, {}", floats.0);
    assert!((floats.0 - bfloats.0).abs() < 0.005, "{} and {}", floats.0, bfloats.0);
}

#[test]
fn bf16_is_said_to_be_missing_where_it_is() {
    let place = Place::new();
    let args = ["train", "--data", "data", "--recipe", "tiny", "--out", "run", "--precision", "bf16", "--steps", "1"];
    let (code, _, err) = place.run(&args);
    let said = "melglow: no bf16 here, without AVX512_BF16, AMX or leave to use that: training runs in f32\n";
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let there = flags.contains("avx512_bf16") || flags.contains("amx_bf16");
    assert!(code == 0 && err.contains(said) != there, "{err}");
}

#[test]
fn one_held_out_clip_has_no_interval_in_the_log() {
    let place = Place::new();
    let mut recipe = recipe(1);
    for (names, interval) in [("f", false), ("e..f", true)] {
        recipe.validation = Validation::Clips { names: vec![names.into()] };
        place.train(&recipe, names);
        let line = place.log(names).into_iter().find(|line| line["held_out_mean"].is_number()).unwrap();
        assert_eq!(line["held_out_ci95"].is_number(), interval, "{line}");
    }
}

/// The recipe of a place whose clips have none of the names that it holds out.
fn of_other_clips(steps: usize) -> Recipe {
    let mut recipe = recipe(steps);
    recipe.validation = Recipe::open("lj").unwrap().validation;
    recipe
}

#[test]
fn every_twentieth_clip_is_held_out_where_the_recipe_names_none() {
    let place = Place::new();
    fs::write(place.path("own.json"), serde_json::to_string(&of_other_clips(9)).unwrap()).unwrap();
    let train = |more: &[&str]| {
        let args = ["train", "--data", "data", "--out", "run", "--threads", "1"];
        let (code, _, err) = place.run(&[&args[..], more].concat());
        assert!(code == 0 || code == 130, "{err}");
        err
    };
    let said = "recipe tiny names clips to hold out, none of which is here: every 20th is held out instead\n";
    let err = train(&["--recipe", "own.json", "--stop-after", "4"]);
    assert!(err.starts_with(said) && err.contains("5 clips, 3 s; held out 1, 1 s\n"), "{err}");
    // and still when the run goes on, with its recipe or without
    for more in [&["--recipe", "own.json", "--stop-after", "6"][..], &[]] {
        let err = train(&[&["--resume"], more].concat());
        assert!(!err.contains("every 20th") && err.contains("5 clips, 3 s; held out 1, 1 s\n"), "{err}");
        assert!(!err.contains("not identically"), "{err}");
    }
    let straight = place.train(&of_other_clips(9), "straight");
    for (straight, resumed) in bytes(&straight.checkpoint).into_iter().zip(bytes(&place.path("run/step-9"))) {
        assert!(straight == resumed, "{} differs", straight.0);
    }
    // eval judges the same clip
    let (code, out, err) = place.run(&["eval", "--voice", "run/step-9", "--data", "data", "--likelihood-only"]);
    assert!(code == 0 && out.contains("\nf  ") && out.contains("mean of 1 clip ") && err.is_empty(), "{out}{err}");
}

#[test]
fn a_run_that_held_nothing_out_goes_on_so() {
    let place = Place::new();
    let mut recipe = recipe(4);
    recipe.validation = Validation::Clips { names: vec![] };
    let start = Options { stop_after: Some(2), ..place.options(&recipe, "run") };
    train(&start, &AtomicBool::new(false)).unwrap();
    // as it was before names of other clips had a stand-in
    let file = place.path("run/step-2/train/recipe.json");
    fs::write(&file, serde_json::to_string(&of_other_clips(4)).unwrap()).unwrap();
    let resumed = Options { resume: true, stop_after: None, ..place.options(&of_other_clips(4), "run") };
    let summary = train(&resumed, &AtomicBool::new(false)).unwrap();
    assert_eq!((summary.step, summary.held_out), (4, None));
    let (code, _, err) = place.run(&["eval", "--voice", "run/step-4", "--data", "data", "--likelihood-only"]);
    let expected = "melglow: data: has none of the clips that the voice's recipe holds out; choose by --clips\n";
    assert_eq!((code, err.as_str()), (1, expected));
}

#[test]
fn nothing_left_to_train_on_is_said() {
    let place = Place::new();
    let mut recipe = recipe(1);
    let mut refusal = |names: &str| {
        recipe.validation = Validation::Clips { names: vec![names.into()] };
        train(&place.options(&recipe, "run"), &AtomicBool::new(false)).unwrap_err().to_string()
    };
    let expected = |clips: usize| {
        let data = place.path("data");
        format!(
            "{}: all of its clips ({clips}) are held out by the recipe's validation, none is left to train on; hold \
             out fewer",
            data.display()
        )
    };
    assert_eq!(refusal("a..z"), expected(6));
    fs::write(place.path("data/wavs/a.wav"), "no sound").unwrap();
    assert_eq!(refusal("b..f"), expected(5));
    assert!(!place.path("run").exists(), "something is left behind");
}

#[test]
fn a_place_that_cannot_be_written_is_refused_before_anything_is_read() {
    let place = Place::new();
    place.train(&recipe(1), "teacher");
    // which would be told when it was read
    fs::write(place.path("data/wavs/a.wav"), "no sound").unwrap();
    let distill = ["distill", "--teacher", "teacher/step-1", "--recipe", "tiny"];
    for command in [&["train", "--recipe", "tiny"][..], &distill, &["zoo", "--minutes", "1", "--recipes", "tiny"]] {
        let args = [command, &["--data", "data", "--out", "teacher/log.jsonl/run"]].concat();
        let (code, _, err) = place.run(&args);
        let expected = "melglow: cannot create teacher/log.jsonl/run: not a directory\n";
        assert_eq!((code, err.as_str()), (1, expected), "{args:?}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_leaves() {
    let place = Place::new();
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("melglow"))
        .current_dir(place.path(""))
        .args(["train", "--data", "data", "--recipe", "tiny", "--out", "run", "--steps", "1000000"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let begun = std::time::Instant::now();
    // wait for the first line of figures: the loop is running
    while fs::read_to_string(place.path("run/log.jsonl")).map_or(0, |log| log.lines().count()) < 3 {
        assert!(begun.elapsed().as_secs() < 100, "training does not start");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let step = *checkpoint::steps(&place.path("run")).unwrap().last().unwrap();
    assert!(step > 0);
    Voice::open(checkpoint::folder(&place.path("run"), step)).unwrap();
}

#[test]
fn the_live_recipe_trains_a_voice_that_streams_at_once() {
    let place = Place::new();
    let mut live = Recipe::open("lj-live").unwrap();
    live.training = recipe(3).training;
    live.validation = recipe(3).validation;
    live.flow.whitening.as_mut().unwrap().fit_steps = 2;
    live.flow.blocks[1].repeat = 1;
    let summary = place.train(&live, "run");
    assert_eq!(summary.step, 3);
    let voice = Voice::open(place.path("run/step-3")).unwrap();
    let vocoder = melglow::vocoder::Vocoder::new(&voice).unwrap();
    // the flow's three frames, and two of the refinement
    assert_eq!(vocoder.stream(&Default::default()).unwrap().latency_frames(), 5);
}

//! A voice's folder: whole, faithful, and picky.

use super::{Place, tiny_flow, tiny_mel, tiny_voice};
use candle_core::{DType, Device, Tensor};
use melglow::mel::{MelConfig, MelSpectrogram, file};
use melglow::vocoder::denoise::Denoiser;
use melglow::vocoder::{SynthOptions, Vocoder};
use melglow::voice::{SynthesisConfig, Voice, VoiceConfig};
use std::fs;
use std::path::Path;

fn tensors(voice: &Voice) -> Vec<(String, Tensor)> {
    voice.tensors().unwrap().into_iter().collect()
}

fn config() -> VoiceConfig {
    let synthesis = SynthesisConfig::new(0.02, 2);
    VoiceConfig::new("tiny", MelConfig::nvidia(), tiny_flow(), synthesis)
}

/// What [`Voice::open`] says, without the name of the folder.
fn refusal(dir: &Path) -> String {
    let message = Voice::open(dir).expect_err("a refusal").to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(&format!("{}/", dir.display()), "")
}

#[test]
fn saved_and_loaded_is_the_same_bytes() {
    let place = Place::new();
    let first = place.path("voice");
    let voice = Voice::open(&first).unwrap();
    let again = Voice::from_parts(voice.config().clone(), &tensors(&voice)).unwrap();
    again.save(place.path("again")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        let same = fs::read(first.join(file)).unwrap() == fs::read(place.path("again").join(file)).unwrap();
        assert!(same, "{file}");
    }
    assert_eq!(place.names("."), ["again", "voice"]);
    assert_eq!(place.names("voice"), ["config.json", "model.safetensors"]);
}

/// Digital silence, which no recording of its training had, gave numbers that aren't; so did a mel far
/// louder than speech.
#[test]
fn the_built_in_voice_answers_silence_and_noise_with_numbers() {
    let Ok(voice) = Voice::embedded() else { return eprintln!("SKIPPED: no voice is built in") };
    let vocoder = Vocoder::new(&voice).unwrap();
    let loudest = |value: f32, sigma: f32, refine| {
        let mel = MelSpectrogram::new(vec![value; 80 * 20], 80).unwrap();
        let options = SynthOptions { sigma: Some(sigma), refine: Some(refine), ..SynthOptions::default() };
        let samples = vocoder.vocode(&mel, &options, None).unwrap().samples;
        assert!(samples.iter().all(|s| s.is_finite()), "{value}, sigma {sigma}, {refine} passes");
        samples.iter().fold(0.0f32, |most, s| most.max(s.abs()))
    };
    for (sigma, refine) in [(0.0, 0), (1.0, 0), (1.0, 3)] {
        let most = loudest(MelConfig::nvidia().silence(), sigma, refine);
        assert!(most < 1e-3, "{most} in silence, sigma {sigma}, {refine} passes");
        loudest(0.0, sigma, refine);
        loudest(-4.0, sigma, refine);
    }
    let hum = Denoiser::new(&vocoder).unwrap();
    assert!(hum.bias().iter().all(|&bin| bin < 1e-2), "a hum of 1e-5 of full scale at most");
}

/// What a flow of one speaker answers with 10²⁰ and more: silence cut into speech, and louder speech.
#[test]
fn the_built_in_voices_keep_their_level_where_the_flow_loses_its_way() {
    let mel = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/mels/LJ002-0155.npy");
    let mel = file::read(&mel, 80).unwrap();
    let rms = |samples: &[f32]| (samples.iter().map(|s| s * s).sum::<f32>() / samples.len() as f32).sqrt();
    for name in ["lj", "lj-live"] {
        let vocoder = Vocoder::new(&Voice::embedded_as(name).unwrap()).unwrap();
        for refine in [0, 4] {
            let options = SynthOptions { refine: Some(refine), ..SynthOptions::default() };
            let speak = |mel: &MelSpectrogram| vocoder.vocode(mel, &options, None).unwrap().samples;
            let plain = rms(&speak(&mel));
            let altered = |change: &dyn Fn(usize, &mut f32)| {
                let mut rows = mel.transposed().values().to_vec();
                rows.iter_mut().enumerate().for_each(|(i, value)| change(i / 80, value));
                speak(&MelSpectrogram::new(rows, mel.frames()).unwrap().transposed())
            };
            let louder = rms(&altered(&|_, value| *value += 1.5));
            assert!(
                (1.0..1.5_f32.exp() * 1.5).contains(&(louder / plain)),
                "{name}, {refine} passes: {}",
                louder / plain
            );
            let silence = MelConfig::nvidia().silence();
            let cut = altered(&|frame, value| {
                if (100..130).contains(&frame) {
                    *value = silence
                }
            });
            assert!((0.5..1.5).contains(&(rms(&cut) / plain)), "{name}, {refine} passes: {}", rms(&cut) / plain);
            assert!(rms(&cut[105 * 256..125 * 256]) < 1e-2 * plain, "{name}, {refine} passes");
        }
    }
}

#[test]
fn a_voice_replaces_a_voice_and_nothing_else() {
    let place = Place::new();
    let voice = tiny_voice("other");
    voice
        .save_with(place.path("voice"), |dir| {
            fs::write(dir.join("extra"), "x").unwrap();
            Ok(())
        })
        .unwrap();
    assert_eq!(place.names("voice"), ["config.json", "extra", "model.safetensors"]);
    assert_eq!(Voice::open(place.path("voice")).unwrap().config().name, "other");

    let failed = voice.save_with(place.path("voice"), |_| Err(melglow::Error::Interrupted));
    assert!(failed.is_err());
    assert_eq!(Voice::open(place.path("voice")).unwrap().config().name, "other");

    place.file("letters/a.txt", b"dear");
    let message = voice.save(place.path("letters")).unwrap_err().to_string();
    assert!(message.ends_with("letters: is there already and is not a voice's folder"), "{message}");
    assert_eq!(place.names("letters"), ["a.txt"]);
    assert_eq!(place.names("."), ["letters", "voice"]);
}

#[test]
fn half_precision_is_kept() {
    let place = Place::new();
    let halves: Vec<_> =
        tensors(&tiny_voice("tiny")).into_iter().map(|(name, t)| (name, t.to_dtype(DType::BF16).unwrap())).collect();
    Voice::from_parts(config(), &halves).unwrap().save(place.path("half")).unwrap();
    let voice = Voice::open(place.path("half")).unwrap();
    assert!(tensors(&voice).iter().all(|(_, t)| t.dtype() == DType::BF16));
    voice.build_flow().unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let place = Place::new();
    let mut good = tensors(&tiny_voice("tiny"));
    good.sort_by(|a, b| a.0.cmp(&b.0));
    let (name, tensor) = good[0].clone();
    let save = |folder: &str, tensors: &[(String, Tensor)]| {
        let dir = place.path(folder);
        Voice::from_parts(config(), tensors).unwrap().save(&dir).unwrap();
        refusal(&dir)
    };
    assert_eq!(
        save("missing", &good[1..]),
        format!("model.safetensors: tensor {name} {:?} is missing", tensor.shape())
    );

    let mut shape = tensor.dims().to_vec();
    shape[0] += 1;
    let mut wrong = good.clone();
    wrong[0].1 = Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(
        save("shape", &wrong),
        format!("model.safetensors: tensor {name} has shape {shape:?}, expected {:?}", tensor.dims())
    );

    let mut surplus = good.clone();
    surplus.push(("stray".into(), tensor.clone()));
    assert_eq!(save("surplus", &surplus), "model.safetensors: tensor stray is not part of the flow");
    surplus.push(("stray2".into(), tensor.clone()));
    assert_eq!(save("surplus2", &surplus), "model.safetensors: tensor stray and 1 more are not part of the flow");

    let mut integer = good.clone();
    integer.push((name.clone(), tensor));
    let message = Voice::from_parts(config(), &integer).err().unwrap().to_string();
    assert_eq!(message, format!("two tensors are named {name}"));
}

#[test]
fn damaged_folders_are_refused_in_one_line() {
    let place = Place::new();
    let dir = place.path("voice");
    let (json, weights) = (dir.join("config.json"), dir.join("model.safetensors"));
    let (good, bytes) = (fs::read_to_string(&json).unwrap(), fs::read(&weights).unwrap());
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        fs::write(&json, good.replacen(from, to, 1)).unwrap();
        refusal(&dir)
    };
    assert!(with("\"name\"", "\"colour\": 1, \"name\"").starts_with("config.json: unknown field `colour`, expected"));
    assert!(with("\"sigma\"", "\"sigmoid\"").starts_with("config.json: unknown field `sigmoid`, expected"));
    assert!(with("\"name\": \"tiny\",", "").starts_with("config.json: missing field `name` at line"));
    assert_eq!(
        with("\"weights_sha256\"", "\"trained_on\": {\"clips\": [], \"low\": [0], \"high\": []}, \"weights_sha256\""),
        "config.json: trained_on has 1 low and 0 high values, expected 80"
    );
    assert_eq!(
        with("\"format\": 1", "\"format\": 2"),
        "config.json: format is 2, expected 1: another version of melglow wrote this voice"
    );
    assert_eq!(with("\"sigma\": 0.02", "\"sigma\": -1"), "config.json: sigma is -1, expected 0 to 10");
    assert_eq!(
        with("\"hop_length\": 256", "\"hop_length\": 250"),
        "config.json: flow config: group is 16, expected 2 to 256 and a divisor of the hop 250"
    );
    fs::write(&json, &good[..good.len() / 2]).unwrap();
    assert!(refusal(&dir).starts_with("config.json: EOF while parsing"));
    fs::write(&json, vec![b' '; (1 << 20) + 1]).unwrap();
    assert_eq!(refusal(&dir), "config.json: is larger than 1048576 bytes");
    fs::write(&json, &good).unwrap();

    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&flipped[..], &bytes[..bytes.len() - 5], b"", b"nonsense"] {
        fs::write(&weights, damaged).unwrap();
        let message = refusal(&dir);
        assert!(message.starts_with("model.safetensors: SHA-256 is "), "{message}");
        assert!(message.ends_with(": the file is damaged or belongs to another voice"), "{message}");
    }
    fs::remove_file(&weights).unwrap();
    assert_eq!(refusal(&dir), format!("cannot read {}", "model.safetensors"));
    assert!(
        refusal(&place.path("nowhere"))
            .ends_with("nowhere: no such folder; a voice is a folder with config.json and model.safetensors")
    );
}

#[test]
fn whole_equals_blocks_and_any_number_of_threads() {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    // more than two blocks, the last one ragged
    let mel = tiny_mel(2 * 256 + 37);
    let options = SynthOptions { seed: 3, ..SynthOptions::default() };
    let sounds = [1, 2, 5].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| vocoder.vocode(&mel, &options, None).unwrap())
    });
    assert_eq!(sounds[0].samples.len(), mel.frames() * 256);
    assert!(sounds[0] == sounds[1] && sounds[0] == sounds[2]);

    let bare = SynthOptions { seed: 3, refine: Some(0), ..SynthOptions::default() };
    let blocks = vocoder.vocode(&mel, &bare, None).unwrap();
    // a shorter mel starts with the same sound, up to what its end influences
    let rows: Vec<f32> = (0..80).flat_map(|b| mel.band(b)[..300].to_vec()).collect();
    let start = melglow::mel::MelSpectrogram::new(rows, 80).unwrap();
    let start = vocoder.vocode(&start, &bare, None).unwrap();
    let worst = (0..280 * 256).map(|i| (blocks.samples[i] - start.samples[i]).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

#[test]
fn progress_rises_to_one() {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    let seen = std::cell::RefCell::new(vec![0.0]);
    let progress = |part: f32| seen.borrow_mut().push(part);
    vocoder.vocode(&tiny_mel(600), &SynthOptions::default(), Some(&progress)).unwrap();
    let seen = seen.into_inner();
    assert!(seen.windows(2).all(|pair| pair[0] <= pair[1]), "{seen:?}");
    assert_eq!(seen.last(), Some(&1.0));
}

#[test]
fn options_out_of_range_are_refused() {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    let say = |options: SynthOptions| vocoder.vocode(&tiny_mel(2), &options, None).unwrap_err().to_string();
    let sigma = |sigma| SynthOptions { sigma: Some(sigma), ..SynthOptions::default() };
    assert_eq!(say(sigma(f32::NAN)), "sigma is NaN, expected 0 to 10");
    assert_eq!(say(sigma(-0.5)), "sigma is -0.5, expected 0 to 10");
    let refine = SynthOptions { refine: Some(1001), ..SynthOptions::default() };
    assert_eq!(say(refine), "refine is 1001, expected 0 to 1000");
}

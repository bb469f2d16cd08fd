//! Conventions, containers and `inspect` through the real program.

use super::cli::{failure, run, samples, synth};
use super::mels::golden;
use super::{Place, tiny_mel};
use melglow::mel::{MelSpectrogram, file};
use std::fs;

/// A mel file with each value changed.
fn mapped(place: &Place, name: &str, frames: usize, map: impl Fn(f32) -> f32) {
    let values = tiny_mel(frames).values().iter().map(|&v| map(v)).collect();
    file::write_npy(&place.path(name), &MelSpectrogram::new(values, 80).unwrap()).unwrap();
}

fn wav(place: &Place, args: &[&str]) -> (Vec<u8>, String) {
    let (code, _, err) = synth(place, &[args, &["-o", "out.wav", "--bits", "32f"]].concat());
    assert_eq!(code, 0, "{err}");
    (fs::read(place.path("out.wav")).unwrap(), err)
}

#[test]
fn foreign_values_are_warned_of_stopped_at_or_read() {
    let place = Place::new();
    place.mel("a.npy", 20);
    let (expected, err) = wav(&place, &["a.npy"]);
    assert_eq!(err.lines().count(), 1, "{err}");
    for (name, map) in [("log10", f32::log10 as fn(f32) -> f32), ("linear", |v| v), ("db", |v| 20.0 * v.log10())] {
        mapped(&place, "b.npy", 20, |v| map(v.exp()));
        let (read, err) = wav(&place, &["b.npy", "--mel-convention", name]);
        assert_eq!(err.lines().count(), 1, "{name}: {err}");
        let floats = |wav: &[u8]| -> Vec<f32> {
            wav[58..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let (a, b) = (floats(&expected), floats(&read));
        assert!(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-3), "{name}");
        let (_, err) = wav(&place, &["b.npy"]);
        assert!(err.starts_with("melglow: b.npy: looks like "), "{name}: {err}");
        assert!(err.contains(", voice tiny expects natural logarithms of magnitudes; "), "{name}: {err}");
    }
    fs::remove_file(place.path("out.wav")).unwrap();
    mapped(&place, "b.npy", 20, |v| v.exp().log10());
    let message = failure(&place, &["b.npy", "-o", "out.wav", "--strict"]);
    assert!(message.starts_with("b.npy: looks like base-10 logarithms (values from "), "{message}");
    assert!(
        message.ends_with(
            "voice tiny expects natural logarithms of magnitudes; --mel-convention log10, if the bands are the voice's"
        ),
        "{message}"
    );
    // the right values under a wrong name are strange again
    let message = failure(&place, &["a.npy", "-o", "out.wav", "--strict", "--mel-convention", "log10"]);
    assert!(message.starts_with("a.npy: looks like "), "{message}");
}

#[test]
fn conventions_that_fit_and_that_do_not() {
    let place = Place::new();
    place.mel("a.npy", 20);
    for name in ["hifigan", "parakeet", "nvidia", "squeezewave"] {
        let (code, _, err) = synth(&place, &["a.npy", "-o", "a.wav", "--mel-convention", name]);
        assert_eq!(code, 0, "{err}");
        assert_eq!(samples(&fs::read(place.path("a.wav")).unwrap()), 20 * 256, "{name}");
    }
    fs::remove_file(place.path("a.wav")).unwrap();
    let message = failure(&place, &["a.npy", "-o", "a.wav", "--mel-convention", "r9y9"]);
    assert_eq!(
        message,
        "mels of convention r9y9 can't be turned into the voice's exactly: f_min is 125 (voice: 0), \
         f_max is 7600 (voice: 8000); make them from the sound again with \"melglow mel\""
    );
    let (code, _, err) = synth(&place, &["a.npy", "-o", "a.wav", "--mel-convention", "nobody"]);
    assert_eq!(code, 2, "{err}");
}

#[test]
fn statistics() {
    let place = Place::new();
    mapped(&place, "a.npy", 20, |v| (v + 6.0) / 1.5);
    let stats: Vec<f32> = [vec![-6.0; 80], vec![1.5; 80]].concat();
    // written as a mel of two bands, read as [2, 80]
    file::write_npy(&place.path("stats.npy"), &MelSpectrogram::new(stats, 2).unwrap()).unwrap();
    place.mel("b.npy", 20);
    let (_, err) = wav(&place, &["a.npy", "--mel-stats", "stats.npy"]);
    assert_eq!(err.lines().count(), 1, "{err}");
    fs::remove_file(place.path("out.wav")).unwrap();
    let with = |stats: &str| failure(&place, &["a.npy", "-o", "a.wav", "--mel-stats", stats]);
    assert!(with("gone.npy").starts_with("cannot read gone.npy: No such file"));
    assert!(with("b.npy").starts_with("b.npy: holds no statistics we know; expected mean and scale"));
    let few = MelSpectrogram::new(vec![1.0; 2 * 40], 2).unwrap();
    file::write_npy(&place.path("few.npy"), &few).unwrap();
    assert_eq!(with("few.npy"), "few.npy: holds statistics of 40 bands, expected 80");
    place.file("noise.h5", &[b"\x89HDF\r\n\x1a\n" as &[u8], &[7; 300]].concat());
    assert!(with("noise.h5").starts_with("noise.h5: truncated or damaged HDF5 ("), "{}", with("noise.h5"));
}

#[test]
fn archives_become_folders() {
    let place = Place::new();
    let ark = fs::read(golden("plain.ark")).unwrap();
    place.file("feats.ark", &ark);
    place.file("feats.scp", b"x/1 feats.ark:6\nx/2 feats.ark:99999999\n");
    let options = ["--mel-convention", "log10"];
    let (code, _, err) = synth(&place, &[&["feats.ark", "-o", "wavs"], &options[..]].concat());
    assert_eq!(code, 0, "{err}");
    assert_eq!(place.names("wavs"), ["utt-1.wav", "utt-2.wav"]);
    assert_eq!(samples(&fs::read(place.path("wavs/utt-1.wav")).unwrap()), 7 * 256);
    let (code, _, err) = synth(&place, &[&["feats.scp", "-o", "two/"], &options[..]].concat());
    assert_eq!(code, 1);
    assert!(err.starts_with("melglow: feats.ark: key x/2: byte 99999999 lies beyond the end"), "{err}");
    assert_eq!(place.names("two"), ["x_1.wav"]);
    assert_eq!(
        failure(&place, &["feats.ark", "-o", "a.wav"]),
        "a.wav: 2 mels need a folder for their WAV files; write a.wav/ if that is its name"
    );
    assert_eq!(
        failure(&place, &["feats.ark", "-o", "-"]),
        "standard output takes one mel, not 2; give a folder with -o"
    );
    place.file("cut.ark", &ark[..1000]);
    let message = failure(&place, &["cut.ark", "-o", "wavs"]);
    assert_eq!(message, "cut.ark: key utt-1: truncated: 979 of 2240 bytes of a matrix");
    place.file("noise.ark", &[0x11; 100]);
    assert_eq!(failure(&place, &["noise.ark", "-o", "wavs"]), "noise.ark: damaged: expected a key and a blank");
    place.file("vector.ark", b"a \0BFV \x04\x02\0\0\0\0\0\0\0\0\0\0\0");
    let message = failure(&place, &["vector.ark", "-o", "a.wav"]);
    assert!(message.starts_with("vector.ark: key a: shape is [2], expected [80, frames]"), "{message}");
}

#[test]
fn mels_are_written_in_a_convention() {
    let place = Place::new();
    let wav = golden("sound.wav").display().to_string();
    for (name, bands) in [("espnet", 80), ("hifigan", 80), ("rayhane", 80), ("bigvgan-44k", 128)] {
        let (code, _, err) = run(&place, &["mel", &wav, "-o", "a.npy", "--mel-convention", name], b"");
        assert_eq!(code, 0, "{err}");
        let array = file::read_array(&place.path("a.npy")).unwrap();
        let frames_first = ["espnet", "rayhane"].contains(&name);
        assert_eq!(array.shape[usize::from(frames_first)], bands, "{name}");
        if bands == 80 {
            let expected = file::read_array(&golden(&format!("{name}.npy"))).unwrap();
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-3;
            assert!(array.shape == expected.shape && array.values.iter().zip(&expected.values).all(close), "{name}");
        }
    }
    let (code, _, err) = run(&place, &["mel", &wav, "-o", "a.npy", "--voice", "voice"], b"");
    assert_eq!(code, 0, "{err}");
    assert_eq!(file::read(&place.path("a.npy"), 80).unwrap().frames(), 31);
    let options = ["--voice", "voice", "--mel-convention", "espnet"];
    let (code, _, err) = run(&place, &[&["mel", &wav, "-o", "b.npy"], &options[..]].concat(), b"");
    let message = "melglow: the voice isn't of convention espnet: leave out --voice or --mel-convention\n";
    assert_eq!((code, err.as_str()), (1, message));
    let stats = golden("stats.h5").display().to_string();
    let options = ["--mel-convention", "espnet", "--mel-stats", &stats];
    let (code, _, err) = run(&place, &[&["mel", &wav, "-o", "a.npy"], &options[..]].concat(), b"");
    assert_eq!(code, 0, "{err}");
    let options = ["--mel-convention", "bigvgan-44k", "--mel-stats", &stats];
    let (code, _, err) = run(&place, &[&["mel", &wav, "-o", "b.npy"], &options[..]].concat(), b"");
    assert_eq!((code, place.path("b.npy").exists()), (1, false));
    assert!(err.ends_with("stats.h5: holds statistics of 80 bands, expected 128\n"), "{err}");
}

/// With the built-in voice, which knows how much detail speech has.
#[test]
fn a_mel_smoother_than_speech_is_told() {
    let place = Place::new();
    let bent = |i: usize| -4.0 - (i / 60) as f32 / 20.0 + 0.1 * (i / 60 % 8) as f32;
    let flat = MelSpectrogram::new((0..80 * 60).map(bent).collect(), 80).unwrap();
    file::write_npy(&place.path("flat.npy"), &flat).unwrap();
    let told = "the mel is smoother than speech";
    let speak = |more: &[&str]| {
        let (code, _, err) = run(&place, &[&["synth", "flat.npy", "-o", "out.wav"], more].concat(), b"");
        assert_eq!(code, 0, "{err}");
        (std::fs::read(place.path("out.wav")).unwrap(), err)
    };
    let (sound, err) = speak(&[]);
    assert!(err.contains(told), "{err}");
    assert!(speak(&["--stream"]).1.contains(told));
    let (refined, err) = speak(&["--refine-smooth"]);
    assert!(!err.contains(told) && refined != sound, "{err}");
    let (bare, err) = speak(&["--refine", "0"]);
    assert!(err.contains(told), "{err}");
    assert_ne!(speak(&["--refine", "0", "--sharpen", "0"]).0, bare);
    let (code, out, _) = run(&place, &["inspect", "flat.npy"], b"");
    let out = String::from_utf8(out).unwrap();
    assert!(code == 0 && out.contains("detail    0.00 nats") && out.contains("smoother than speech"), "{out}");
}

#[test]
fn inspect_tells_what_files_are() {
    let place = Place::new();
    place.mel("a.npy", 20);
    place.mel("b.npy", 3);
    mapped(&place, "log.npy", 20, |v| v.exp().log10());
    let tell = |args: &[&str]| {
        let (code, out, err) = run(&place, &[&["inspect"], args, &["--voice", "voice"]].concat(), b"");
        (code, String::from_utf8(out).unwrap(), err)
    };
    let good = |args: &[&str], parts: &[&str]| {
        let (code, out, err) = tell(args);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        parts.iter().for_each(|part| assert!(out.contains(part), "no {part:?} in\n{out}"));
    };
    good(
        &["a.npy"],
        &[
            "a.npy: float32 [80, 20], a mel [bands, frames]: 80 bands, 20 frames, 0.23 s",
            "looks     like natural logarithms of magnitudes",
            "expected  voice tiny: 22050 Hz, FFT 1024, window 1024, hop 256, 80 bands 0 to 8000 Hz (Slaney), ln, floor 1e-5",
            "type      melglow synth a.npy -o a.wav --voice voice\n",
        ],
    );
    good(&["log.npy"], &["looks     like base-10 logarithms", "-o log.wav --voice voice --mel-convention log10"]);
    for (name, may_be) in [
        ("nvidia", "nvidia, squeezewave, hifigan, parakeet (values don't tell these apart)"),
        ("vits", "vits\n"),
        ("coqui", "rayhane, coqui ("),
        ("vocos-24k", "vocos-24k\n"),
        ("flowavenet", "flowavenet\n"),
        ("espnet", "espnet, espnet-24k, r9y9 ("),
    ] {
        good(&[&golden(&format!("{name}.npy")).display().to_string()], &[&format!("may be    {may_be}")]);
    }
    let at = |name: &str| golden(name).display().to_string();
    good(&[&at("vocos-24k.npy")], &["bands     100 don't suit the voice's 80"]);
    good(&[&at("sound.wav")], &["sound, 7777 samples at 22050 Hz, 0.35 s", "peak -11.3 dB", "type      melglow mel "]);
    good(
        &[&at("plain.ark")],
        &["2 mels by key", "key utt-2: 80 bands, 3 frames", "-o FOLDER --voice voice --mel-convention log10"],
    );
    good(&["voice"], &["voice: voice tiny, ", "mels      22050 Hz", "synthesis sigma 0.02, 2 passes"]);
    good(&["voice/model.safetensors"], &["tensors, ", "float32 ["]);
    let (code, out, err) = tell(&["gone.npy", "a.npy"]);
    assert_eq!((code, out.lines().count() > 3), (1, true));
    assert!(err.starts_with("melglow: cannot read gone.npy: No such file"), "{err}");
    assert!(err.ends_with("melglow: 1 of 2 files failed\n"), "{err}");
    place.file("noise", &[0x11; 300]);
    place.file("flat.npy", &super::npy("<f4", "(3,)", &[0; 12]));
    place.file("cut.wav", b"RIFF");
    for name in ["noise", "flat.npy", "cut.wav", "."] {
        let (code, out, err) = tell(&[name]);
        assert_eq!((code, out.as_str(), err.lines().count()), (1, "", 1), "{err}");
        assert!(err.starts_with(&format!("melglow: {name}: ")), "{err}");
    }
}

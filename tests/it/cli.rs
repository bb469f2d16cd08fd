//! The real program in a temporary folder: exit codes, exact messages, bytes.

use super::{Place, npy, seeded_voice, tiny_flow, tiny_mel};
use assert_cmd::Command;
use melglow::flow::config::{MapConfig, StepConfig};
use melglow::kernels::choice::Kernel;
use melglow::mel::MelConfig;
use melglow::voice::Voice;
use std::fs;
use std::path::Path;

/// A run of the program: exit code, standard output, standard error.
pub(super) type Outcome = (i32, Vec<u8>, String);

pub(super) fn run(place: &Place, args: &[&str], input: &[u8]) -> Outcome {
    let mut command: Command = assert_cmd::cargo::cargo_bin_cmd!("melglow");
    outcome(command.current_dir(place.path("")).args(args).write_stdin(input))
}

fn outcome(command: &mut Command) -> Outcome {
    let output = command.output().unwrap();
    let code = output.status.code().expect("no signal");
    (code, output.stdout, String::from_utf8(output.stderr).unwrap())
}

/// `melglow synth … --voice voice`.
pub(super) fn synth(place: &Place, args: &[&str]) -> Outcome {
    run(place, &[&["synth"], args, &["--voice", "voice"]].concat(), b"")
}

/// The one line that a failing run leaves.
pub(super) fn failure(place: &Place, args: &[&str]) -> String {
    let before = place.names(".");
    let (code, out, err) = synth(place, args);
    assert_eq!(code, 1, "{err}");
    assert!(out.is_empty());
    assert_eq!(err.lines().count(), 1, "{err}");
    assert_eq!(place.names("."), before, "something is left behind");
    err.trim_end().strip_prefix("melglow: ").expect("our name in front").to_string()
}

/// Samples of a 16-bit mono WAV with the plain 44-byte header.
pub(super) fn samples(wav: &[u8]) -> usize {
    assert_eq!((&wav[..4], &wav[36..40]), (&b"RIFF"[..], &b"data"[..]));
    (wav.len() - 44) / 2
}

pub(super) fn floats(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

#[test]
fn one_mel_to_one_wav_of_exactly_frames_times_hop() {
    let place = Place::new();
    place.mel("a.npy", 40);
    let (code, out, err) = synth(&place, &["a.npy", "-o", "a.wav", "--threads", "1"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.is_empty());
    assert_eq!(samples(&fs::read(place.path("a.wav")).unwrap()), 40 * 256);
    let line = err.trim_end();
    assert!(line.starts_with("melglow: 0.46 s of sound in "), "{err}");
    assert!(line.contains("real-time factor ") && line.ends_with("(1 thread)"), "{err}");
    // an existing file is replaced, a folder is written into
    fs::write(place.path("a.wav"), "old").unwrap();
    fs::create_dir(place.path("out")).unwrap();
    assert_eq!(synth(&place, &["a.npy", "-o", "a.wav"]).0, 0);
    assert_eq!(synth(&place, &["a.npy", "-o", "out"]).0, 0);
    assert_eq!(synth(&place, &["a.npy", "-o", "new/"]).0, 0);
    let wav = fs::read(place.path("a.wav")).unwrap();
    assert_eq!(wav, fs::read(place.path("out/a.wav")).unwrap());
    assert_eq!(wav, fs::read(place.path("new/a.wav")).unwrap());
}

#[test]
fn same_seed_same_bytes_for_any_threads() {
    let place = Place::new();
    place.mel("a.npy", 700);
    let wav = |args: &[&str]| {
        let (code, _, err) = synth(&place, &[&["a.npy", "-o", "a.wav"], args].concat());
        assert_eq!(code, 0, "{err}");
        fs::read(place.path("a.wav")).unwrap()
    };
    let one = wav(&["--threads", "1"]);
    assert!(one == wav(&["--threads", "2"]));
    assert!(one == wav(&["--threads", "5", "--seed", "0"]));
    assert!(one != wav(&["--seed", "1"]));
    assert!(one != wav(&["--sigma", "0.1"]));
    assert!(one == wav(&["--drive", "1"]));
    assert!(one != wav(&["--refine", "0"]));
    assert_eq!(wav(&["--bits", "24"]).len(), 44 + 3 * 700 * 256);
    assert_eq!(wav(&["--bits", "32f"]).len(), 58 + 4 * 700 * 256);
}

#[test]
fn kernels_by_name() {
    let place = Place::new();
    place.mel("a.npy", 20);
    let speak = |kernel: &str| {
        let mut command: Command = assert_cmd::cargo::cargo_bin_cmd!("melglow");
        let args = ["synth", "a.npy", "-o", "a.wav", "--voice", "voice", "--refine", "0", "--bits", "32f"];
        outcome(command.current_dir(place.path("")).args(args).env("MELGLOW_KERNEL", kernel))
    };
    let mut heard: Vec<Vec<f32>> = Vec::new();
    for kernel in Kernel::ALL {
        let (code, _, err) = speak(kernel.name());
        assert_eq!(code, i32::from(!kernel.runs_here()), "{err}");
        if !kernel.runs_here() {
            assert!(err.contains("which this processor hasn't") && err.lines().count() == 1, "{err}");
            continue;
        }
        let wav = fs::read(place.path("a.wav")).unwrap();
        heard.push(wav[58..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect());
        fs::remove_file(place.path("a.wav")).unwrap();
    }
    let loudest = heard[0].iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for other in &heard {
        let worst = other.iter().zip(&heard[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(loudest > 1e-3 && worst < 1e-4 * loudest, "{worst} of {loudest}");
    }
    let (code, _, err) = speak("sse9");
    assert_eq!((code, err.lines().count(), place.path("a.wav").exists()), (1, 1, false), "{err}");
    assert!(err.starts_with("melglow: MELGLOW_KERNEL is \"sse9\", which nobody knows; here there are scalar"), "{err}");
}

#[test]
fn standard_input_to_standard_output() {
    let place = Place::new();
    place.mel("a.npy", 30);
    synth(&place, &["a.npy", "-o", "a.wav"]);
    let mel = fs::read(place.path("a.npy")).unwrap();
    let (code, out, err) = run(&place, &["synth", "-", "-o", "-", "--voice", "voice"], &mel);
    assert_eq!(code, 0, "{err}");
    assert!(out == fs::read(place.path("a.wav")).unwrap());
    let (code, out, err) = run(&place, &["synth", "-", "-o", "-", "--voice", "voice"], b"nonsense");
    assert_eq!((code, out.len()), (1, 0));
    assert_eq!(
        err,
        "melglow: standard input: is not a mel file we can read; expected .npy, .npz, .pt, .safetensors, .h5 or .ark\n"
    );
}

#[test]
fn many_mels_go_to_a_folder_past_bad_ones() {
    let place = Place::new();
    place.mel("mels/b.npy", 10);
    place.mel("mels/a.npy", 20);
    place.file("mels/bad.npy", b"nonsense");
    place.file("mels/notes.txt", b"not a mel");
    let (code, _, err) = synth(&place, &["mels", "-o", "out"]);
    assert_eq!(code, 1);
    assert_eq!(place.names("out"), ["a.wav", "b.wav"]);
    let lines: Vec<_> = err.lines().collect();
    assert_eq!(lines.len(), 3, "{err}");
    assert!(lines[0].starts_with("melglow: mels/bad.npy: is not a mel file"), "{err}");
    assert!(lines[1].contains("real-time factor"), "{err}");
    assert_eq!(lines[2], "melglow: 1 of 3 mels failed");

    place.mel("c.npy", 5);
    let (code, _, err) = synth(&place, &["c.npy", "mels/a.npy", "-o", "two"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(place.names("two"), ["a.wav", "c.wav"]);

    // nothing but bad mels leaves no folder
    let (code, _, _) = synth(&place, &["mels/bad.npy", "mels/gone.npy", "-o", "none"]);
    assert_eq!(code, 1);
    assert!(!place.path("none").exists());
}

/// The built-in voice is a recursion, whose mels are spoken several at a time.
#[test]
fn many_mels_at_a_time_are_the_same_as_one_after_the_other() {
    if Voice::embedded().is_err() {
        return eprintln!("SKIPPED: no voice is built in");
    }
    let place = Place::new();
    for (i, frames) in [40, 1, 25, 90, 10].into_iter().enumerate() {
        place.mel(&format!("mels/{i}.npy"), frames);
    }
    place.file("mels/bad.npy", b"nonsense");
    let speak = |threads: &str, out: &str| {
        let (code, _, err) = run(&place, &["synth", "mels", "-o", out, "--threads", threads], b"");
        assert_eq!(code, 1, "{err}");
        let mut lines: Vec<_> = err.lines().collect();
        assert_eq!(lines.pop(), Some("melglow: 1 of 6 mels failed"));
        let threads = format!("({threads} thread{})", if threads == "1" { "" } else { "s" });
        assert!(lines.pop().is_some_and(|line| line.ends_with(&threads)), "{err}");
        assert!(lines.iter().any(|line| line.starts_with("melglow: mels/bad.npy: is not a mel file")), "{err}");
        place.names(out).into_iter().map(|name| fs::read(place.path(out).join(name)).unwrap()).collect::<Vec<_>>()
    };
    let one = speak("1", "one");
    assert_eq!(one.len(), 5);
    for (threads, out) in [("3", "three"), ("11", "eleven")] {
        assert!(speak(threads, out) == one, "{threads} threads");
    }
}

#[test]
fn outputs_that_cannot_be() {
    let place = Place::new();
    place.mel("a.npy", 2);
    place.mel("mels/a.npy", 2);
    place.file("file", b"x");
    assert_eq!(failure(&place, &["a.npy", "-o", "no/a.wav"]), "cannot write no/a.wav: no folder no");
    assert_eq!(failure(&place, &["a.npy", "-o", "file/a.wav"]), "cannot write file/a.wav: no folder file");
    let message = failure(&place, &["mels", "-o", "file/out"]);
    assert!(message.starts_with("cannot create folder file/out: "), "{message}");
    assert_eq!(
        failure(&place, &["mels", "-o", "file"]),
        "file: is not a folder; several mels need one for their WAV files"
    );
    let message = failure(&place, &["mels", "-o", "no/out"]);
    assert!(message.starts_with("cannot create folder no/out: "), "{message}");
    assert_eq!(
        failure(&place, &["a.npy", "mels", "-o", "out"]),
        "a.npy and mels/a.npy would both be written to out/a.wav"
    );
    assert_eq!(
        failure(&place, &["a.npy", "mels", "-o", "-"]),
        "standard output takes one mel, not 2; give a folder with -o"
    );
    assert_eq!(failure(&place, &["a.npy", "-o", "a.npy"]), "a.npy: is what is read; give the WAV another name");
    assert_eq!(
        failure(&place, &["a.npy", "-o", "mels/../a.npy"]),
        "mels/../a.npy: is what is read; give the WAV another name"
    );
    assert_eq!(
        failure(&place, &["a.npy", "-o", "a.mp3"]),
        "a.mp3: what is written is WAV; give the file a name that ends so"
    );
    assert_eq!(fs::read(place.path("a.npy")).unwrap(), fs::read(place.path("mels/a.npy")).unwrap());
    assert_eq!(fs::read(place.path("file")).unwrap(), b"x");
    #[cfg(target_os = "linux")]
    if Path::new("/dev/full").exists() {
        let message = failure(&place, &["a.npy", "-o", "/dev/full"]);
        assert!(message.starts_with("cannot write /dev/full: No space left"), "{message}");
    }
}

#[test]
fn inputs_that_are_not_mels() {
    let place = Place::new();
    let out = ["-o", "out.wav"];
    let say = |name: &str| failure(&place, &[&[name], &out[..]].concat());
    let of = |name: &str, bytes: &[u8]| {
        place.file(name, bytes);
        say(name)
    };
    assert!(say("gone.npy").starts_with("cannot read gone.npy: No such file"), "{}", say("gone.npy"));
    fs::create_dir(place.path("empty")).unwrap();
    assert!(say("empty").starts_with("empty: no mel files in this folder (.npy, "));
    assert_eq!(of("zero.npy", b""), "zero.npy: is empty (0 bytes)");
    assert_eq!(
        of("random.pt", &[0x11; 300]),
        "random.pt: is not a mel file we can read; expected .npy, .npz, .pt, .safetensors, .h5 or .ark"
    );

    let good = npy("<f4", "(80, 3)", &floats(tiny_mel(3).values().iter().copied()));
    for keep in [8, 20, 127, 128, 500] {
        let message = of("cut.npy", &good[..keep]);
        assert!(message.starts_with("cut.npy: "), "{message}");
    }
    assert!(
        of("bins.npy", &npy("<f4", "(64, 3)", &[0; 64 * 3 * 4]))
            .starts_with("bins.npy: shape is [64, 3], expected [80, frames]")
    );
    assert!(of("flat.npy", &npy("<f4", "(240,)", &[0; 240 * 4])).starts_with("flat.npy: shape is [240]"));
    assert_eq!(of("none.npy", &npy("<f4", "(80, 0)", &[])), "none.npy: the mel is empty (shape [80, 0])");
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let values = (0..240).map(|i| if i == 3 * 7 + 2 { bad } else { -5.0 });
        assert_eq!(
            of("nan.npy", &npy("<f4", "(80, 3)", &floats(values))),
            format!("nan.npy: value {name} at band 7, frame 2 is not finite")
        );
    }
    for (descr, size) in [("<i4", 4), ("|u1", 1), ("<c8", 8), ("|O", 8)] {
        let message = of("type.npy", &npy(descr, "(80, 3)", &vec![0; 240 * size]));
        assert!(message.contains("expected float16, float32 or float64"), "{descr}: {message}");
    }
}

#[test]
fn transposed_and_one_frame_mels_are_spoken() {
    let place = Place::new();
    let mel = tiny_mel(3);
    place.file("right.npy", &npy("<f4", "(80, 3)", &floats(mel.values().iter().copied())));
    place.file("turned.npy", &npy("<f4", "(3, 80)", &floats(mel.transposed().values().iter().copied())));
    assert_eq!(synth(&place, &["right.npy", "-o", "a.wav"]).0, 0);
    for transpose in [&[][..], &["--transpose"]] {
        assert_eq!(synth(&place, &[&["turned.npy", "-o", "b.wav"], transpose].concat()).0, 0);
        assert!(fs::read(place.path("a.wav")).unwrap() == fs::read(place.path("b.wav")).unwrap());
    }
    place.mel("one.npy", 1);
    assert_eq!(synth(&place, &["one.npy", "-o", "one.wav"]).0, 0);
    assert_eq!(samples(&fs::read(place.path("one.wav")).unwrap()), 256);
}

#[test]
fn loud_sound_is_saturated_and_counted() {
    let place = Place::new();
    place.mel("a.npy", 10);
    let (code, _, err) = synth(&place, &["a.npy", "-o", "a.wav", "--sigma", "10", "--refine", "0"]);
    assert_eq!(code, 0, "{err}");
    let line = err.lines().next().unwrap();
    assert!(line.starts_with("melglow: a.wav: ") && line.ends_with(" samples saturated"), "{err}");
}

#[test]
fn voices_that_are_not() {
    let place = Place::new();
    place.mel("a.npy", 2);
    let say = |voice: &str| {
        let (code, _, err) = run(&place, &["synth", "a.npy", "-o", "a.wav", "--voice", voice], b"");
        assert_eq!((code, place.path("a.wav").exists()), (1, false));
        err
    };
    assert_eq!(
        say("nobody"),
        "melglow: there is no voice nobody: neither a folder, nor a built-in voice (lj, lj-live)\n"
    );
    assert_eq!(
        say("a.npy"),
        "melglow: a.npy: is not a folder; a voice is a folder with config.json and model.safetensors\n"
    );
    fs::create_dir_all(place.path("runs/a")).unwrap();
    assert!(say("runs/a").starts_with("melglow: cannot read runs/a/config.json: "));
    super::tiny_voice("tiny").save(place.path("runs/a/step-20")).unwrap();
    place.file("runs/a/step-20/train/state.json", b"{}");
    let run = say("runs/a");
    assert!(
        run.starts_with("melglow: runs/a: is a training run; name one of its checkpoints, runs/a/step-20"),
        "{run}"
    );
    fs::remove_file(place.path("voice/model.safetensors")).unwrap();
    assert!(say("voice").starts_with("melglow: cannot read voice/model.safetensors: No such file"));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let place = Place::new();
    place.mel("a.npy", 2);
    for args in [
        &["sing"][..],
        &["synth"],
        &["synth", "a.npy"],
        &["synth", "a.npy", "-o", "a.wav", "--bits", "8"],
        &["synth", "a.npy", "-o", "a.wav", "--threads", "0"],
        &["synth", "a.npy", "-o", "a.wav", "--seed", "-1"],
    ] {
        let (code, out, err) = run(&place, args, b"");
        assert_eq!((code, out.len()), (2, 0), "{args:?}: {err}");
    }
    assert_eq!(failure(&place, &["a.npy", "-o", "a.wav", "--sigma", "nan"]), "sigma is NaN, expected 0 to 10");
    assert_eq!(failure(&place, &["a.npy", "-o", "a.wav", "--drive", "2.1"]), "drive is 2.1, expected 0 to 2");
    let no_recursion = "drive is 0.5, but the flow of tiny has no recursion that streams";
    place.mel("mels/a.npy", 2);
    place.mel("mels/b.npy", 2);
    for args in [&["mels", "-o", "out"][..], &["mels/a.npy", "-o", "a.wav", "--stream"]] {
        assert_eq!(failure(&place, &[args, &["--drive", "0.5"]].concat()), no_recursion);
    }
    assert_eq!(failure(&place, &["a.npy", "-o", "a.wav", "--refine", "5000"]), "refine is 5000, expected 0 to 1000");
    let (code, out, _) = run(&place, &["synth", "--help"], b"");
    assert_eq!(code, 0);
    assert!(String::from_utf8(out).unwrap().contains("melglow synth - -o - < a.npy | aplay"));
}

/// Frames of a mel file, frame after frame, as raw floats.
fn raw_frames(frames: usize) -> Vec<u8> {
    floats(tiny_mel(frames).transposed().values().iter().copied())
}

#[test]
fn streamed_files_are_the_same_files() {
    let place = Place::new();
    place.mel("mels/a.npy", 40);
    place.mel("mels/b.npy", 3);
    assert_eq!(synth(&place, &["mels", "-o", "whole"]).0, 0);
    let (code, _, err) = synth(&place, &["mels", "-o", "streamed", "--stream"]);
    assert!(code == 0 && err.contains("real-time factor"), "{err}");
    for name in ["a.wav", "b.wav"] {
        let read = |folder: &str| fs::read(place.path(folder).join(name)).unwrap();
        assert!(read("whole") == read("streamed"), "{name}");
    }
    let wav = fs::read(place.path("whole/a.wav")).unwrap();
    let stream = |args: &[&str], input: &[u8]| {
        let args = [&["synth", "--stream", "--voice", "voice", "-"], args].concat();
        let (code, out, err) = run(&place, &args, input);
        assert_eq!(code, 0, "{err}");
        out
    };
    // raw frames to a file: the header is that of the whole; to a pipe: of unknown length, or none
    assert!(stream(&["-o", "c.wav"], &raw_frames(40)).is_empty());
    assert!(fs::read(place.path("c.wav")).unwrap() == wav);
    assert!(stream(&["-o", "-", "--raw"], &raw_frames(40)) == wav[44..]);
    let piped = stream(&["-o", "-"], &raw_frames(40));
    assert!(piped[44..] == wav[44..] && piped[40..44] == [255; 4] && piped[4..8] == [255; 4]);
    let npy = fs::read(place.path("mels/a.npy")).unwrap();
    assert!(stream(&["-o", "-"], &npy) == wav);
}

#[test]
fn a_live_stream_cut_within_a_frame_says_where() {
    let place = Place::new();
    let args = ["synth", "--stream", "--raw", "-", "-o", "-", "--voice", "voice"];
    let (code, out, err) = run(&place, &args, &raw_frames(10)[..9 * 320 + 7]);
    assert_eq!((code, out.len()), (1, 9 * 512));
    assert_eq!(err, "melglow: standard input: ends within frame 9, after 7 of its 320 bytes\n");
    let (code, out, err) = run(&place, &args, b"");
    assert_eq!((code, out.len(), err.as_str()), (1, 0, "melglow: standard input: is empty (0 bytes)\n"));
}

#[test]
fn raw_samples_have_no_wav_in_their_name() {
    let place = Place::new();
    place.mel("mels/a.npy", 3);
    place.mel("mels/b.npy", 2);
    assert_eq!(synth(&place, &["mels", "-o", "out", "--stream", "--raw"]).0, 0);
    assert_eq!(place.names("out"), ["a.raw", "b.raw"]);
    assert_eq!(fs::metadata(place.path("out/b.raw")).unwrap().len(), 2 * 512);
}

/// Mels in base-10 logarithms, as a whole and as they arrive.
#[test]
fn live_mels_that_are_plainly_others_are_told() {
    let place = Place::new();
    let frames: Vec<f32> = tiny_mel(300).transposed().values().iter().map(|v| v * 0.434 - 20.0).collect();
    let args = ["synth", "--stream", "--raw", "-", "-o", "-", "--voice", "voice", "--refine", "0"];
    let (code, out, err) = run(&place, &args, &floats(frames.clone()));
    assert_eq!((code, out.len()), (0, 300 * 512), "{err}");
    assert!(err.starts_with("melglow: standard input: looks like "), "{err}");
    let (code, out, err) = run(&place, &[&args[..], &["--strict"]].concat(), &floats(frames));
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    assert!(err.starts_with("melglow: standard input: looks like ") && out.len() < 300 * 512, "{err}");
    let (code, _, err) = run(&place, &[&args[..], &["--strict"]].concat(), &raw_frames(300));
    assert!(code == 0 && !err.contains("looks"), "{err}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_stream_keeps_what_was_made() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_melglow"))
        .current_dir(place.path(""))
        .args(["synth", "--stream", "-", "-o", "a.wav", "--voice", "voice", "--refine", "0"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&raw_frames(40)).unwrap();
    input.flush().unwrap();
    // until there is sound in the temporary file
    let begun = std::time::Instant::now();
    let growing = || {
        let part = place.names(".").into_iter().find(|name| name.ends_with(".part"));
        part.is_some_and(|name| fs::metadata(place.path(name)).is_ok_and(|file| file.len() > 44))
    };
    while !growing() {
        assert!(begun.elapsed().as_secs() < 60, "nothing is made");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{err}");
    assert!(err.ends_with("melglow: left early: a.wav ends there\n"), "{err}");
    assert_eq!(samples(&fs::read(place.path("a.wav")).unwrap()), 40 * 256);
    assert_eq!(place.names("."), ["a.wav", "voice"]);
    drop(input);
}

#[test]
fn a_live_frame_that_is_not_finite_is_muted_and_reported() {
    let place = Place::new();
    let mut bytes = raw_frames(30);
    bytes[20 * 320..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let args = ["synth", "--stream", "--raw", "-", "-o", "-", "--voice", "voice", "--refine", "0"];
    let (code, out, err) = run(&place, &args, &bytes);
    assert_eq!((code, out.len()), (0, 30 * 512), "{err}");
    assert!(err.starts_with("melglow: standard input: 1 frame with values that are not finite was muted\n"), "{err}");
    assert!(out[20 * 512 + 128..21 * 512].iter().all(|b| *b == 0));
}

#[test]
fn frames_are_spoken_as_they_arrive_and_a_closed_pipe_is_a_quiet_end() {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_melglow"))
        .current_dir(place.path(""))
        .args(["synth", "--stream", "--raw", "-", "-o", "-", "--voice", "voice", "--refine", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    // the tiny voice looks 5 frames ahead; nothing else may be held back
    input.write_all(&raw_frames(20)).unwrap();
    input.flush().unwrap();
    let mut heard = vec![0; 15 * 512];
    output.read_exact(&mut heard).unwrap();
    drop(output);
    // the program notices at its next write, or is done before
    for _ in 0..50 {
        if input.write_all(&raw_frames(20)).is_err() {
            break;
        }
    }
    drop(input);
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.len()), (Some(0), 0), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn bench_compares_streams_with_the_whole() {
    let place = Place::new();
    place.mel("a.npy", 60);
    let args = ["bench", "--stream", "--voice", "voice", "--mel", "a.npy", "--rounds", "1", "--json", "-"];
    let (code, out, err) = run(&place, &args, b"");
    assert_eq!(code, 0, "{err}");
    let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
    // 5 frames for the flow, 3 for each of two passes
    assert_eq!(report["look_ahead_frames"], 11);
    let streams = report["streams"].as_array().unwrap();
    let chunks: Vec<_> = streams.iter().map(|s| s["chunk_frames"].as_u64().unwrap()).collect();
    assert_eq!(chunks, [1, 4, 16, 60]);
    // the first sample cannot come before the frames it depends on
    assert!(streams[0]["first_audio_ms"].as_f64().unwrap() >= report["look_ahead_ms"].as_f64().unwrap());
    assert!(streams.iter().all(|s| s["cost_ratio"].as_f64().unwrap() > 0.0));
    assert_eq!(report["precision"], "f32");
    let int16 = [&args[..7], &["1", "--precision", "int16"]].concat();
    let (code, out, err) = run(&place, &int16, b"");
    assert_eq!(code, 0, "{err}");
    let table = String::from_utf8(out).unwrap();
    assert!(table.starts_with("voice tiny, refine 2, in int16, "), "{table}");
    place.mel("short.npy", 11);
    let (code, _, err) = run(&place, &["bench", "--stream", "--voice", "voice", "--mel", "short.npy"], b"");
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
}

#[test]
fn bench_measures_synthesis_with_each_number_of_threads() {
    let place = Place::new();
    place.mel("a.npy", 60);
    // more threads than any machine has: as many as it has, and said
    let args =
        ["bench", "--voice", "voice", "--mel", "a.npy", "--rounds", "2", "--threads", "1,1000", "--json", "b.json"];
    let (code, out, err) = run(&place, &args, b"");
    assert_eq!(code, 0, "{err}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(place.path("b.json")).unwrap()).unwrap();
    let cores = report["machine"]["cores"].as_u64().unwrap();
    assert_eq!(report["name"], "tiny");
    assert!(err.starts_with("melglow: 1000 threads are more than this machine's cores: "), "{err}");
    let runs = report["runs"].as_array().unwrap();
    let threads: Vec<_> = runs.iter().map(|run| run["threads"].as_u64().unwrap()).collect();
    assert_eq!(threads, if cores == 1 { vec![1] } else { vec![1, cores] });
    for run in runs {
        assert!((run["audio_seconds"].as_f64().unwrap() - 60.0 * 256.0 / 22_050.0).abs() < 1e-9);
        assert_eq!(run["refined"]["passes"], 2);
        let bare = |figure: &str| run["bare"][figure].as_f64().unwrap();
        assert!(0.0 < bare("min") && bare("min") <= bare("median") && bare("median") <= bare("max"));
        let share = run["macs_per_audio_second"].as_f64().unwrap()
            / bare("median")
            / run["gemm_macs_per_second"]["median"].as_f64().unwrap();
        if cfg!(target_os = "linux") {
            assert!(
                run["bare_cpu"]["median"].as_f64().unwrap() >= 0.0 && run["peak_memory_bytes"].as_u64() > Some(1 << 20)
            );
        }
        assert!((run["gemm_share"].as_f64().unwrap() / share - 1.0).abs() < 1e-9);
        // nothing is faster than what waits for nothing, but for the moment at which it is measured
        let rate = |of: &str| run[of]["median"].as_f64().unwrap();
        assert!(rate("fma_macs_per_second") > 0.5 * rate("gemm_macs_per_second"), "{run}");
    }
    // the table has the same runs
    let table = String::from_utf8(out).unwrap();
    assert_eq!(table.lines().count(), 3 + runs.len(), "{table}");
}

#[test]
fn bench_tells_what_short_numbers_do() {
    let place = Place::new();
    place.mel("a.npy", 60);
    let args = ["bench", "--voice", "voice", "--mel", "a.npy", "--rounds", "1", "--threads", "1", "--json", "b.json"];
    for (precision, most) in [("int16", 1e-3), ("int8", 2e-2), ("bf16", 1e-2)] {
        let mut command: Command = assert_cmd::cargo::cargo_bin_cmd!("melglow");
        command.current_dir(place.path("")).args(args).args(["--precision", precision]);
        // forced kernels do as they are told, with instructions for it or without
        let (code, out, err) = outcome(command.env("MELGLOW_KERNEL", "scalar"));
        assert_eq!((code, err.as_str()), (0, ""));
        let report: serde_json::Value = serde_json::from_slice(&std::fs::read(place.path("b.json")).unwrap()).unwrap();
        let run = &report["runs"][0];
        assert_eq!(run["precision"], precision);
        let effect = |figure: &str| run["effect"][figure].as_f64().unwrap();
        assert!(effect("speed") > 0.0);
        assert!((effect("mel_l1") - effect("mel_l1_f32")).abs() < most * effect("mel_l1_f32"));
        assert!(String::from_utf8(out).unwrap().contains("× as fast as f32"));
    }
}

/// Where there are no instructions for them int8 and bf16 are left alone, which is said once; the rest is as if nothing
/// had been asked.
#[test]
fn some_numbers_are_for_processors_that_have_them() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |some: [&str; 2]| some.iter().any(|flag| flags.contains(flag));
    for (precision, there, without) in [
        ("bf16", has(["avx512_bf16", "amx_bf16"]), "AVX512_BF16, AMX or leave to use that"),
        ("int8", has(["avx512_vnni", "avx_vnni"]), "VNNI"),
    ] {
        let place = Place::new();
        for mel in ["a.npy", "b.npy"] {
            place.mel(mel, 9);
        }
        let args = ["synth", "a.npy", "b.npy", "-o", "out/", "--voice", "voice", "--precision", precision];
        let (code, _, err) = run(&place, &args, b"");
        let said = format!("melglow: tiny: no {precision} here, without {without}: it runs in f32\n");
        assert!(code == 0 && err.matches(precision).count() == usize::from(!there), "{err}");
        assert!(there || err.starts_with(&said), "{err}");
        assert!(place.path("out/a.wav").exists() && place.path("out/b.wav").exists());
    }
}

#[test]
fn precision_is_refused_or_said_where_it_is_unknown() {
    let place = Place::new();
    place.mel("a.npy", 9);
    for unknown in ["f16", "int4"] {
        let args = ["synth", "a.npy", "-o", "a.wav", "--voice", "voice", "--precision", unknown];
        let (code, _, err) = run(&place, &args, b"");
        let message = format!(
            "error: invalid value '{unknown}' for '--precision <NUMBERS>'\n  [possible values: f32, int16, int8, bf16]"
        );
        assert!(code == 2 && err.starts_with(&message), "{err}");
        assert!(!place.path("a.wav").exists());
    }
    // a map without a streaming form
    let mut flow = tiny_flow();
    for step in &mut flow.blocks[0].steps {
        if let StepConfig::Coupling { map, .. } = step {
            *map = MapConfig::MixLogistic { components: 2 };
        }
    }
    seeded_voice("whole", MelConfig::nvidia(), flow).save(place.path("whole")).unwrap();
    for (voice, said) in
        [("voice", ""), ("whole", "melglow: whole: no int16 here for a flow of this design: it runs in f32\n")]
    {
        let synth = |precision| {
            let args = ["synth", "a.npy", "-o", "-", "--voice", voice, "--precision", precision];
            run(&place, &args, b"")
        };
        let (code, whole, err) = synth("int16");
        // and the line that every run ends with
        assert!(code == 0 && err.starts_with(said) && err.lines().count() == said.lines().count() + 1, "{err}");
        // a voice that has just begun does nothing in its couplings
        assert!(whole == synth("f32").1);
    }
}

#[test]
fn bench_measures_training_steps() {
    let place = Place::new();
    let args = ["bench", "--train", "--arch", "tiny", "--rounds", "2", "--threads", "1", "--json", "-"];
    let (code, out, err) = run(&place, &args, b"");
    assert_eq!(code, 0, "{err}");
    let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
    let figures = &report["runs"][0];
    assert_eq!((figures["batch"].as_u64(), figures["segment_samples"].as_u64()), (Some(4), Some(2048)));
    let figure = |name: &str| figures[name].as_f64().unwrap();
    assert!(figure("loss_after") < figure("loss_before"));
    assert!(figures["samples_per_second"]["min"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_refuses_what_it_cannot_measure() {
    let place = Place::new();
    for (args, code, message) in [
        (&["--arch", "wavegloow"][..], 1, "melglow: --arch wavegloow is neither of squeezewave-a128-c256, "),
        (&["--voice", "nowhere", "--threads", "1,2"], 1, "melglow: there is no voice nowhere: neither a folder, nor "),
        (&["--voice", "voice", "--mel", "nothing.npy"], 1, "melglow: "),
        (&["--json", "no/b.json"], 1, "melglow: cannot write no/b.json: No such file"),
        (&["--threads", "0"], 2, "error: invalid value '0' for '--threads <N,…>': 0 is not in 1..=1024"),
        (&["--threads", "10000"], 2, "error: invalid value '10000' for '--threads <N,…>'"),
        (&["--seconds", "0"], 2, "error: invalid value '0' for '--seconds <SECONDS>': expected 0.1 to 600"),
        (&["--train"], 2, "error: the following required arguments were not provided:"),
        (&["--rounds", "0"], 2, "error: invalid value '0' for '--rounds <ROUNDS>'"),
    ] {
        let json = if args.contains(&"--json") { &[][..] } else { &["--json", "-"] };
        let (found, out, err) = run(&place, &[&["bench"], json, args].concat(), b"");
        assert_eq!((found, out.len()), (code, 0), "{args:?}: {err}");
        assert!(err.starts_with(message), "{args:?}: {err}");
        assert!(code == 2 || err.lines().count() == 1, "{args:?}: {err}");
    }
}

#[test]
fn threads_beyond_reason_are_refused_everywhere() {
    let place = Place::new();
    let synth = ["synth", "a.npy", "-o", "a.wav", "--threads"];
    let train = ["train", "--data", ".", "--recipe", "tiny", "--out", "run", "--threads"];
    let zoo = ["zoo", "--data", ".", "--minutes", "1", "--out", "zoo", "--threads"];
    for command in [&synth[..], &train[..], &zoo[..]] {
        for count in ["0", "10000", "-1", "many"] {
            let (code, _, err) = run(&place, &[command, &[count]].concat(), b"");
            assert!(code == 2 && err.starts_with("error: "), "{command:?} {count}: {err}");
        }
    }
}

//! `melglow plot` in a temporary folder: pictures, messages.

use super::Place;
use super::cli::run;
use melglow::audio::wav::{self, WavFormat};
use std::fs;

/// Width and height of a PNG, and whether it shows more than one colour.
fn png(bytes: &[u8]) -> (u32, u32, bool) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    (info.width, info.height, rgb.chunks(3).any(|pixel| pixel != &rgb[..3]))
}

#[test]
fn mels_sounds_and_logs_become_pictures() {
    let place = Place::new();
    place.mel("a.npy", 40);
    let sound: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.3).sin() * 0.5).collect();
    wav::write(&place.path("a.wav"), &sound, 16_000, WavFormat::Int16).unwrap();
    place.file("run/log.jsonl", b"{\"bits\":7.9,\"step\":10}\n{\"bits\":7.5,\"step\":20}\n");
    for input in ["a.npy", "a.wav", "run", "run/log.jsonl"] {
        let (code, out, err) = run(&place, &["plot", input, "-o", "a.png"], b"");
        assert_eq!((code, out.len(), &err[..]), (0, 0, ""), "{input}");
        assert_eq!(png(&fs::read(place.path("a.png")).unwrap()), (1200, 480, true), "{input}");
    }
    let mel = fs::read(place.path("a.npy")).unwrap();
    let (code, out, _) = run(&place, &["plot", "-", "-o", "-", "--width", "300", "--height", "250"], &mel);
    assert_eq!((code, png(&out)), (0, (300, 250, true)));
}

#[test]
fn what_cannot_be_drawn_is_one_line() {
    let place = Place::new();
    place.mel("a.npy", 40);
    place.file("bad.wav", b"RIFFnothing");
    place.file("bad.jsonl", b"hello\n");
    place.file("bad.npy", b"hello");
    fs::create_dir(place.path("empty")).unwrap();
    let before = place.names(".");
    for (args, expected) in [
        (&["missing.npy"][..], "cannot read missing.npy"),
        (&["missing.wav"], "cannot read missing.wav"),
        (&["bad.wav"], "bad.wav: "),
        (&["bad.npy"], "bad.npy: is not a mel file we can read"),
        (&["bad.jsonl"], "bad.jsonl: line 1 is no line of a training log"),
        (&["empty"], "empty: is a folder without log.jsonl"),
        (&["a.npy", "--key", "x"], "a.npy: holds no mel of key x"),
        (&["a.npy", "--mel-convention", "bigvgan-24k"], "a.npy: "),
        (&["a.npy", "-o", "no/a.png"], "cannot write no/a.png"),
    ] {
        let output: &[&str] = if args.contains(&"-o") { &[] } else { &["-o", "a.png"] };
        let (code, out, err) = run(&place, &[&["plot"], args, output].concat(), b"");
        assert_eq!((code, out.len(), err.lines().count()), (1, 0, 1), "{args:?}: {err}");
        assert!(err.starts_with(&format!("melglow: {expected}")), "{args:?}: {err}");
        assert_eq!(place.names("."), before, "{args:?}: something is left behind");
    }
}

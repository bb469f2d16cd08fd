//! Mel conventions and containers against what the other programs write (`tests/golden/mels.py`).

use super::{Place, tiny_mel};
use melglow::audio::decode;
use melglow::mel::convention::{CONVENTIONS, Convention, Encoding};
use melglow::mel::diagnosis::diagnose;
use melglow::mel::extract::Extractor;
use melglow::mel::file::{self, Layout, utterances};
use melglow::mel::stats::MelStats;
use melglow::mel::{MelConfig, MelSpectrogram};
use std::path::{Path, PathBuf};

pub(super) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn sound() -> Vec<f32> {
    decode::read(&golden("sound.wav")).unwrap().samples
}

fn read(name: &str, n_mels: usize) -> MelSpectrogram {
    file::read(&golden(name), n_mels).unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The references compute in double precision, we in single: up to 1e-3 nats in the quietest bins, and
/// as much of the largest value where there is no logarithm.
#[test]
fn every_convention_equals_its_reference() {
    let sound = sound();
    for convention in CONVENTIONS {
        let name = convention.name;
        let mel = Extractor::of(&convention).unwrap().extract(&sound).unwrap();
        let array = file::read_array(&golden(&format!("{name}.npy"))).unwrap();
        let stored = if convention.frames_first { mel.transposed() } else { mel };
        assert_eq!(array.shape, [stored.n_mels(), stored.frames()], "{name}");
        let difference = worst(stored.values(), &array.values);
        let nats = match convention.encoding {
            Encoding::Log { gain, .. } => f64::from(difference) / gain,
            Encoding::Linear => f64::from(difference / array.values.iter().copied().fold(0.0, f32::max)),
        };
        assert!(nats < 1e-3, "{name}: {nats}");
    }
}

#[test]
fn names_are_found_and_unique() {
    let voice = MelConfig::nvidia();
    let mut seen = std::collections::HashSet::new();
    for (name, aliases, about) in melglow::mel::convention::names() {
        assert!(!about.is_empty());
        for name in aliases.iter().chain([&name]) {
            assert!(seen.insert(*name), "{name} is there twice");
            Convention::named(name, &voice).unwrap();
        }
    }
    let message = Convention::named("nobody", &voice).unwrap_err().to_string();
    assert!(message.starts_with("no mel convention nobody, expected one of voice, log10, "), "{message}");
}

/// Where the bands are the voice's, a convention's values become the voice's.
#[test]
fn other_encodings_of_the_voices_magnitudes_are_exact() {
    let (voice, sound) = (MelConfig::nvidia(), sound());
    let own = Extractor::new(&voice).unwrap().extract(&sound).unwrap();
    for name in ["voice", "log10", "db", "linear", "nvidia", "tacotron2"] {
        let convention = Convention::named(name, &voice).unwrap();
        let written = Extractor::of(&convention).unwrap().extract(&sound).unwrap();
        let decoded = convention.decoder(&voice, None).unwrap().decode(written).unwrap();
        assert!(worst(decoded.mel.values(), own.values()) < 1e-5, "{name}");
        assert_eq!(decoded.samples, 0..own.frames() * 256, "{name}");
    }
    // mean and variance on top
    let stats = MelStats::new((0..80).map(|b| b as f32 / 10.0 - 6.0).collect(), vec![1.5; 80]).unwrap();
    let written = stats.normalise(&own).unwrap();
    let decoder = Convention::of_voice(&voice).decoder(&voice, Some(stats)).unwrap();
    assert!(worst(decoder.decode(written).unwrap().mel.values(), own.values()) < 1e-5);
}

/// Frames between hops are the voice's frames of a sound that begins half a hop later; so one more is put
/// in front, and half a hop is cut off the sound.
#[test]
fn frames_between_hops_are_set_right() {
    let (voice, sound) = (MelConfig::nvidia(), sound());
    let later = Extractor::new(&voice).unwrap().extract(&sound[128..]).unwrap();
    for name in ["hifigan", "matcha"] {
        let convention = Convention::named(name, &voice).unwrap();
        let written = Extractor::of(&convention).unwrap().extract(&sound).unwrap();
        let decoded = convention.decoder(&voice, None).unwrap().decode(written.clone()).unwrap();
        let (mel, frames) = (&decoded.mel, written.frames());
        assert_eq!((frames, mel.frames()), (30, 31), "{name}");
        assert_eq!(decoded.samples, 128..128 + 30 * 256, "{name}");
        for band in 0..80 {
            let row = mel.band(band);
            assert_eq!(row[0], row[1]);
            // the first and last frames see the mirrored edge; the epsilon under the root is heard in silence
            for frame in 3..20 {
                let (ours, theirs) = (row[frame + 1], later.band(band)[frame]);
                assert!((ours - theirs).abs() < 2e-3, "{name} band {band} frame {frame}: {ours} {theirs}");
            }
        }
    }
}

#[test]
fn what_cannot_be_undone_is_refused() {
    let voice = MelConfig::nvidia();
    let exact = ["nvidia", "squeezewave", "hifigan", "matcha", "vits", "parakeet"];
    for convention in CONVENTIONS {
        let decoder = convention.decoder(&voice, None);
        assert_eq!(decoder.is_ok(), exact.contains(&convention.name), "{}", convention.name);
    }
    let problem = |name| Convention::named(name, &voice).unwrap().decoder(&voice, None).unwrap_err().to_string();
    assert_eq!(
        problem("espnet"),
        "mels of convention espnet can't be turned into the voice's exactly: f_min is 80 (voice: 0), \
         f_max is 7600 (voice: 8000); make them from the sound again with \"melglow mel\""
    );
    assert!(problem("flowavenet").contains("powers, not magnitudes, are summed in the bands"));
    assert!(problem("vocos-24k").contains("scale is Htk's (voice: Slaney's)"));
    // a voice of those bands takes them
    let espnet = Convention::named("espnet", &voice).unwrap();
    let own = MelConfig { floor: 1e-5, ..espnet.mel.clone() };
    let mel = Extractor::of(&espnet).unwrap().extract(&sound()).unwrap();
    let decoded = espnet.decoder(&own, None).unwrap().decode(mel).unwrap();
    let expected = Extractor::new(&own).unwrap().extract(&sound()).unwrap();
    assert!(worst(decoded.mel.values(), expected.values()) < 1e-4);
}

#[test]
fn every_container_holds_the_same_mels() {
    let expected = file::read_array(&golden("espnet.npy")).unwrap().values[5 * 80..12 * 80].to_vec();
    let expected = MelSpectrogram::new(expected, 7).unwrap().transposed();
    let layout = Layout { n_mels: 80, transpose: true };
    assert_eq!(read("pwg.h5", 80), expected);
    assert_eq!(utterances(&golden("pwg.h5")).unwrap(), None);
    // compressed matrices have 8 or 16 bits over a range of about 9, CM's columns more finely
    for (name, tolerance) in
        [("plain.ark", 0.0), ("cm.ark", 0.03), ("cm2.ark", 1e-4), ("cm3.ark", 0.02), ("espnet.h5", 0.0)]
    {
        let all = utterances(&golden(name)).unwrap().unwrap();
        assert_eq!(all.iter().map(|u| u.key.as_str()).collect::<Vec<_>>(), ["utt-1", "utt-2"], "{name}");
        let (first, second) = (all[0].read(layout).unwrap(), all[1].read(layout).unwrap());
        assert!(worst(first.values(), expected.values()) <= tolerance, "{name}");
        assert_eq!((first.frames(), second.frames()), (7, 3), "{name}");
        for band in 0..80 {
            assert!(worst(second.band(band), &expected.band(band)[..3]) <= tolerance, "{name}");
        }
    }
    let text = utterances(&golden("text.ark")).unwrap().unwrap();
    let (first, second) = (text[0].read(layout).unwrap(), text[1].read(layout).unwrap());
    assert_eq!((first.frames(), second.frames()), (2, 1));
    assert!(
        worst(first.band(7), &expected.band(7)[..2]) < 1e-6 && worst(second.band(7), &expected.band(7)[2..3]) < 1e-6
    );
}

#[test]
fn scripts_name_mels_in_archives_and_files() {
    let place = Place::new();
    for name in ["plain.ark", "text.ark", "espnet.h5"] {
        std::fs::copy(golden(name), place.path(name)).unwrap();
    }
    place.mel("whole.npy", 4);
    let ark = std::fs::read(golden("plain.ark")).unwrap();
    let second = ark.windows(6).position(|w| w == b"utt-2 ").unwrap() + 6;
    let lines = format!("a plain.ark:6\nb\tplain.ark:{second}\n\nc espnet.h5:utt-2\nd whole.npy\n");
    let script = place.file("feats.scp", lines.as_bytes());
    let layout = Layout { n_mels: 80, transpose: true };
    let frames: Vec<_> = utterances(&script)
        .unwrap()
        .unwrap()
        .iter()
        .map(|u| (u.key.clone(), u.read(layout).unwrap().frames()))
        .collect();
    let expected = [("a", 7), ("b", 3), ("c", 3), ("d", 4)].map(|(key, frames)| (key.to_string(), frames));
    assert_eq!(frames, expected);

    let problem = |lines: &str| {
        let script = place.file("bad.scp", lines.as_bytes());
        let problem = match utterances(&script) {
            Err(error) => error,
            Ok(found) => found.unwrap()[0].read(layout).unwrap_err(),
        };
        problem.to_string().replace(&place.path("").display().to_string(), "")
    };
    assert_eq!(problem(""), "bad.scp: names no mels");
    assert_eq!(problem("a\n"), "bad.scp: line 1: expected a key and a file");
    assert!(problem("a gunzip -c feats.gz |\n").contains("line 1: names a command, and we run none"));
    assert!(problem("a plain.ark:6[0:3]\n").contains("line 1: takes a part of a matrix"));
    assert_eq!(problem("a plain.ark:6\na plain.ark:6\n"), "bad.scp: key a stands there twice");
    assert_eq!(problem("a plain.ark:99999999\n"), "plain.ark: key a: byte 99999999 lies beyond the end of the archive");
    assert_eq!(problem("a plain.ark:7\n"), "plain.ark: key a: holds no Kaldi matrix (expected \\0B or a bracket)");
    assert_eq!(problem("a espnet.h5:utt-9\n"), "espnet.h5: key a: the file has no dataset utt-9");
    assert!(problem("a gone.ark:6\n").starts_with("cannot read gone.ark"));
}

#[test]
fn statistics_files() {
    let stats = MelStats::read(&golden("stats.h5"), 80).unwrap();
    let (mean, scale) = stats.of(3);
    assert!((-6.0..0.0).contains(&mean) && scale > 0.1, "{mean} {scale}");
    let problem = |path: &Path, n_mels| MelStats::read(path, n_mels).unwrap_err().to_string();
    assert!(problem(&golden("stats.h5"), 100).ends_with("stats.h5: holds statistics of 80 bands, expected 100"));
    assert!(problem(&golden("nvidia.npy"), 80).contains("holds no statistics we know"));
    assert!(problem(&golden("gone.npy"), 80).starts_with("cannot read "));
}

/// Cut and changed files give an error of one line, or a mel, and never panic.
#[test]
fn damaged_containers() {
    let place = Place::new();
    let mut state = 7u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize
    };
    let layout = Layout { n_mels: 80, transpose: true };
    for name in ["plain.ark", "cm.ark", "cm2.ark", "text.ark", "espnet.h5", "pwg.h5", "stats.h5"] {
        let whole = std::fs::read(golden(name)).unwrap();
        for round in 0..150 {
            let mut bytes = whole.clone();
            if round % 2 == 0 {
                bytes.truncate(random() % whole.len());
            } else {
                let reach = if round % 3 == 0 { whole.len() } else { 600.min(whole.len()) };
                for _ in 0..1 + random() % 4 {
                    bytes[random() % reach] = random() as u8;
                }
            }
            let path = place.file(name, &bytes);
            let line = |error: melglow::Error| assert!(!error.to_string().contains('\n'), "{error}");
            match utterances(&path) {
                Ok(Some(all)) => all.iter().take(3).for_each(|u| drop(u.read(layout).map_err(line))),
                Ok(None) => drop(file::read(&path, 80).map_err(line)),
                Err(error) => line(error),
            }
            let _ = MelStats::read(&path, 80).map_err(line);
            // the last bytes of a text archive are the bracket and the line's end
            if round % 2 == 0 && name.ends_with("ark") && bytes.len() + 3 < whole.len() {
                let arrays = file::read_arrays(&path);
                assert!(arrays.map_or(true, |arrays| arrays.len() < 2), "{name} cut to {}", bytes.len());
            }
        }
    }
}

/// Good mels, quiet and smooth ones among them, raise no warning; mels of other kinds do.
#[test]
fn diagnosis_tells_foreign_values_from_the_voices() {
    let voice = MelConfig::nvidia();
    let serious = |mel: &MelSpectrogram| {
        let findings = diagnose(mel, &voice).unwrap();
        findings.into_iter().find(|finding| finding.serious).map(|finding| finding.what)
    };
    let sound = sound();
    let mut good = vec![tiny_mel(40)];
    for gain in [1.0, 0.1, 0.01, 0.0] {
        let quieter: Vec<f32> = sound.iter().map(|x| x * gain).collect();
        good.push(Extractor::new(&voice).unwrap().extract(&quieter).unwrap());
    }
    for name in ["LJ002-0155", "LJ002-0163", "LJ002-0171"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("assets/mels/{name}.npy"));
        good.push(file::read(&path, 80).unwrap());
    }
    for mel in &good {
        assert_eq!(serious(mel), None);
        // as an acoustic model predicts it: blurred over time
        let smooth = (0..80).flat_map(|b| {
            let row = mel.band(b);
            (0..row.len()).map(move |f| (row[f.saturating_sub(1)] + row[f] + row[(f + 1).min(row.len() - 1)]) / 3.0)
        });
        assert_eq!(serious(&MelSpectrogram::new(smooth.collect(), 80).unwrap()), None);
    }
    assert_eq!(serious(&read("espnet.npy", 80)).unwrap(), "base-10 logarithms");
    assert_eq!(serious(&read("matcha.npy", 80)).unwrap(), "a mel normalised to mean 0 and deviation 1");
    for (name, least) in [("nvidia", -11.513), ("vits", -10.011), ("espnet", -10.0), ("rayhane", -4.0)] {
        let convention = Convention::named(name, &voice).unwrap();
        assert!((convention.silence() - least).abs() < 1e-3, "{name}: {}", convention.silence());
    }
    let speech = &good[5];
    let mapped = |map: &dyn Fn(f32) -> f32| {
        let values = speech.values().iter().map(|&v| map(v)).collect();
        serious(&MelSpectrogram::new(values, 80).unwrap()).unwrap_or_default()
    };
    let encoded = |encoding: Encoding| mapped(&|v| encoding.encode(v.exp(), 1e-5));
    assert_eq!(encoded(Encoding::LOG10), "base-10 logarithms");
    assert_eq!(encoded(Encoding::DB), "decibels");
    assert_eq!(encoded(Encoding::Linear), "magnitudes or powers without the logarithm");
    assert_eq!(encoded(Encoding::range(0.0, 1.0)), "values normalised to 0 to 1");
    assert_eq!(encoded(Encoding::range(-4.0, 4.0)), "decibels normalised to -4 to 4");
    assert_eq!(mapped(&|v| (v + 5.54) / 2.12), "a mel normalised to mean 0 and deviation 1");
    assert_eq!(mapped(&|v| v + 32_768f32.ln()), "the mel of samples that aren't in ±1");
    assert_eq!(mapped(&|v| 2.0 * v), "natural logarithms of powers");
    // a lower floor is raised, no more
    let lower = |v: f32| if v < -9.0 { -16.1 } else { v };
    assert_eq!(mapped(&lower), "");
    let values = speech.values().iter().map(|&v| lower(v)).collect();
    let decoder = Convention::of_voice(&voice).decoder(&voice, None).unwrap();
    let decoded = decoder.decode(MelSpectrogram::new(values, 80).unwrap()).unwrap();
    assert!(
        decoded.mel.values().contains(&voice.silence()) && decoded.mel.values().iter().all(|&v| v >= voice.silence())
    );
}

//! Playing for real: through cpal and ALSA into a sound server without a card, into a file, and into
//! a card of our own (`card.c`) that takes what it is told to, is busy or goes.

use super::{Place, seeded_voice, tiny_flow, tiny_mel, tiny_voice};
use melglow::audio::resample::resample;
use melglow::flow::config::{Block, ConditioningConfig, FlowConfig, LipschitzConfig, StepConfig};
use melglow::mel::{MelConfig, file};
use melglow::vocoder::{SynthOptions, Vocoder};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// One server at a time: sound needs its share of the processor.
static ONE: Mutex<()> = Mutex::new(());

/// A PulseAudio server of its own with a null sink, and what records its monitor.
pub struct Server {
    server: Child,
    pub folder: PathBuf,
    _one: MutexGuard<'static, ()>,
}

impl Server {
    /// `None`, loudly, where there is no PulseAudio.
    pub fn start(place: &Place, sink: &str) -> Option<Self> {
        let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !there("pulseaudio") || !there("parec") {
            eprintln!("SKIPPED: no pulseaudio and parec here (packages pulseaudio, pulseaudio-utils)");
            return None;
        }
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = place.path("pulse");
        fs::create_dir_all(folder.join("run")).unwrap();
        let socket = folder.join("native");
        let server = in_folder(Command::new("pulseaudio"), &folder)
            .args(["-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", "--realtime=no"])
            .arg(format!("--load=module-native-protocol-unix socket={} auth-anonymous=1", socket.display()))
            // without rewinds: a sink that takes back silence has already shown it to whoever records
            .arg(format!("--load=module-null-sink sink_name=test norewinds=1 {sink}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let this = Self { server, folder, _one: one };
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < Duration::from_secs(20), "pulseaudio does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(this)
    }

    /// Records while `during` runs, and until what it played has arrived.
    pub fn record(&self, spec: &[&str], during: impl FnOnce()) -> Vec<u8> {
        let path = self.folder.join("recorded");
        let mut recorder = in_folder(Command::new("parec"), &self.folder)
            .args(["--device=test.monitor", "--raw", "--latency-msec=200"])
            .args(spec)
            .stdout(fs::File::create(&path).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let arrived = || fs::metadata(&path).unwrap().len();
        let until = |least: u64| {
            let start = Instant::now();
            while arrived() < least {
                assert!(start.elapsed() < Duration::from_secs(20), "nothing is recorded");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        until(1);
        during();
        // two more pieces: the first may have been under way
        let now = arrived();
        until(now + 1);
        let now = arrived();
        until(now + 1);
        recorder.kill().unwrap();
        recorder.wait().unwrap();
        fs::read(path).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A command that has a home, a server and an ALSA configuration of its own.
pub fn in_folder(mut command: Command, folder: &Path) -> Command {
    let alsa = folder.join("asound.conf");
    if !alsa.exists() {
        fs::write(&alsa, "</usr/share/alsa/alsa.conf>\npcm.!default { type pulse }\n").unwrap();
    }
    command
        .env("HOME", folder)
        .env("XDG_RUNTIME_DIR", folder.join("run"))
        .env("PULSE_RUNTIME_PATH", folder.join("run"))
        .env("PULSE_SERVER", format!("unix:{}", folder.join("native").display()))
        .env("ALSA_CONFIG_PATH", alsa);
    command
}

/// The folder of an ALSA configuration whose only card is `card.c` with these options; what it is
/// given goes to the file `sound` there.
pub fn card(place: &Place, options: &str) -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("card.so");
        // under a name of its own first: another run of the tests may use the library just now
        let fresh = library.with_extension(std::process::id().to_string());
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/card.c");
        let cc = Command::new("cc").args(["-O1", "-shared", "-fPIC", source, "-lasound", "-o"]).arg(&fresh).status();
        assert!(cc.expect("a C compiler").success());
        fs::rename(fresh, &library).unwrap();
        library
    });
    let folder = place.path("card");
    fs::create_dir(&folder).unwrap();
    let conf = format!(
        "</usr/share/alsa/alsa.conf>\npcm_type.melglow_test {{ lib \"{}\" }}\n\
         pcm.!default {{ type melglow_test file \"{}\" {options} }}\n",
        library.display(),
        folder.join("sound").display()
    );
    fs::write(folder.join("asound.conf"), conf).unwrap();
    folder
}

/// `melglow play …` with the voice of the place, its sound going where `folder` says.
pub fn play(place: &Place, folder: &Path, args: &[&str]) -> Command {
    let mut command = in_folder(Command::new(env!("CARGO_BIN_EXE_melglow")), folder);
    command.current_dir(place.path("")).args(["play", "--voice", "voice"]).args(args).stdin(Stdio::null());
    command
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The samples that `play` should make of a mel.
pub fn expected(frames: usize) -> Vec<f32> {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    vocoder.vocode(&tiny_mel(frames), &SynthOptions::default(), None).unwrap().samples
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Where `sound` begins in `recorded`, silence around it; every sample is compared.
fn find(recorded: &[f32], sound: &[f32]) -> usize {
    let lead = sound.iter().position(|s| *s != 0.0).unwrap();
    let first = recorded.iter().position(|s| *s != 0.0).expect("only silence is recorded");
    let start = first.checked_sub(lead).expect("the beginning is lost");
    let heard = recorded.get(start..start + sound.len()).expect("the end is lost");
    let wrong = heard.iter().zip(sound).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "sample {wrong:?} of {} differs", sound.len());
    assert!(recorded[start + sound.len()..].iter().all(|s| *s == 0.0), "there is more than was made");
    start
}

#[test]
fn a_sound_server_gets_every_sample_of_two_mels_in_sequence() {
    let place = Place::new();
    let Some(server) = Server::start(&place, "format=float32le rate=22050 channels=1") else { return };
    place.mel("a.npy", 100);
    place.mel("b.npy", 40);
    let recorded = server.record(&["--format=float32le", "--rate=22050", "--channels=1"], || {
        let args = ["a.npy", "b.npy", "--save", "all.wav", "--latency-ms", "200"];
        let output = play(&place, &server.folder, &args).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "melglow: 1.63 s played at 22050 Hz, 1 channel, f32: no underrun\n");
    });
    let sound = [expected(100), expected(40)].concat();
    find(&floats(&recorded), &sound);
    let saved = fs::read(place.path("all.wav")).unwrap();
    let sixteen = |s: &f32| (f64::from(*s) * 32_768.0).round().clamp(-32_768.0, 32_767.0) as i16;
    assert!(saved[44..].chunks_exact(2).map(|b| i16::from_le_bytes([b[0], b[1]])).eq(sound.iter().map(sixteen)));
}

#[test]
fn a_48_khz_stereo_card_of_16_bits_gets_resampled_sound() {
    let place = Place::new();
    let Some(server) = Server::start(&place, "format=s16le rate=48000 channels=2") else { return };
    place.mel("a.npy", 100);
    let recorded = server.record(&["--format=s16le", "--rate=48000", "--channels=2"], || {
        let output =
            play(&place, &server.folder, &["a.npy", "--rate", "48000", "--latency-ms", "200"]).output().unwrap();
        assert!(stderr(&output).ends_with(" played at 48000 Hz, 1 channel, f32: no underrun\n"), "{}", stderr(&output));
    });
    let sound = resample(&expected(100), 22_050, 48_000).unwrap();
    let both: Vec<[i16; 2]> = recorded
        .chunks_exact(4)
        .map(|b| [i16::from_le_bytes([b[0], b[1]]), i16::from_le_bytes([b[2], b[3]])])
        .collect();
    assert!(both.iter().all(|[left, right]| left == right));
    let heard: Vec<f32> = both.iter().map(|[left, _]| f32::from(*left) / 32_768.0).collect();
    // the start, by the best match of its first loud stretch; then all within rounding
    let loud = sound.iter().position(|s| s.abs() > 0.01).unwrap();
    let first = heard.iter().position(|s| s.abs() > 0.01).unwrap();
    let off = |start: usize| {
        let heard = heard.get(start..start + sound.len())?;
        Some(heard.iter().zip(&sound).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max))
    };
    let worst = (first.saturating_sub(loud + 3)..=first + 3 - loud).filter_map(off).fold(f32::INFINITY, f32::min);
    assert!(worst < 2.5 / 32_768.0, "{worst}");
}

#[test]
fn a_file_as_device_gets_everything_to_the_last_sample() {
    let place = Place::new();
    let folder = place.path("alsa");
    fs::create_dir(&folder).unwrap();
    let out = folder.join("sound");
    let conf = format!(
        "</usr/share/alsa/alsa.conf>\npcm.!default {{ type file slave {{ pcm null }} file \"{}\" format raw }}\n",
        out.display()
    );
    fs::write(folder.join("asound.conf"), conf).unwrap();
    place.mel("a.npy", 50);
    // no card's clock holds it back: all must be ready before
    let output = play(&place, &folder, &["a.npy", "--prebuffer", "60"]).output().unwrap();
    assert_eq!(stderr(&output), "melglow: 0.58 s played at 22050 Hz, 1 channel, f32: no underrun\n");
    assert_eq!(find(&floats(&fs::read(&out).unwrap()), &expected(50)), 0);
}

#[test]
fn every_kind_of_card_gets_everything_to_the_last_sample() {
    for (format, channels, rate, kind) in [
        ("S16_LE", 2, 48_000, "i16"),
        ("S32_LE", 1, 44_100, "i32"),
        ("U16_LE", 6, 22_050, "u16"),
        ("FLOAT_LE", 8, 48_000, "f32"),
        ("S16_LE", 1, 22_050, "i16"),
        ("FLOAT_LE", 2, 16_000, "f32"),
    ] {
        let place = Place::new();
        let folder = card(&place, &format!("format {format} channels {channels} rate {rate} speed 10"));
        place.mel("a.npy", 60);
        // a card in such haste must find all ready
        let output = play(&place, &folder, &["a.npy", "--prebuffer", "60"]).output().unwrap();
        let plural = if channels == 1 { "" } else { "s" };
        let said = format!("melglow: 0.70 s played at {rate} Hz, {channels} channel{plural}, {kind}: no underrun\n");
        assert_eq!(stderr(&output), said);
        let bytes = fs::read(folder.join("sound")).unwrap();
        let values: Vec<f32> = match kind {
            "f32" => floats(&bytes),
            "i32" => bytes
                .chunks_exact(4)
                .map(|b| (f64::from(i32::from_le_bytes(b.try_into().unwrap())) / 2_147_483_648.0) as f32)
                .collect(),
            kind => bytes
                .chunks_exact(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
                .map(|v| if kind == "u16" { f32::from(v) - 32_768.0 } else { f32::from(v as i16) })
                .map(|v| v / 32_768.0)
                .collect(),
        };
        assert!(values.chunks_exact(channels).all(|frame| frame.iter().all(|v| *v == frame[0])));
        let heard: Vec<f32> = values.chunks_exact(channels).map(|frame| frame[0]).collect();
        let sound = resample(&expected(60), 22_050, rate).unwrap();
        let (heard, after) = heard.split_at(sound.len());
        // 16 bits are those of `synth`; a single holds more of the quietest samples than 32 bits do
        let rounded = |s: f32| match kind {
            "i16" | "u16" => (s * 32_768.0).round().clamp(-32_768.0, 32_767.0) / 32_768.0,
            _ => s,
        };
        let step = if kind == "i32" { 3e-10 } else { 0.0 };
        let worst = heard.iter().zip(&sound).map(|(a, b)| (a - rounded(*b)).abs()).fold(0.0, f32::max);
        assert!(worst <= step, "{format}, {rate} Hz: {worst}");
        assert!(after.iter().all(|s| *s == 0.0), "{format}, {rate} Hz: there is more than was made");
    }
}

#[test]
fn a_card_that_is_busy_goes_or_takes_other_sound_costs_one_line_and_no_file() {
    for (options, says) in [
        ("busy 1", "melglow: cannot open the sound device: "),
        ("format FLOAT_LE channels 1 rate 22050 lose_after 5000", "melglow: the sound device is lost after 0."),
        ("format U8", "melglow: the sound device takes neither f32, i32, i16 nor u16 samples\n"),
    ] {
        let place = Place::new();
        let folder = card(&place, options);
        place.mel("a.npy", 80);
        for save in [&[][..], &["--save", "all.wav"]] {
            let output = play(&place, &folder, &[&["a.npy"], save].concat()).output().unwrap();
            let err = stderr(&output);
            assert_eq!((output.status.code(), err.lines().count()), (Some(1), 1), "{err}");
            assert!(err.starts_with(says), "{err}");
        }
        assert_eq!(fs::metadata(place.path("all.wav")).unwrap().len(), 44 + 2 * 80 * 256);
    }
}

#[test]
fn live_frames_are_muted_when_not_finite_and_end_where_they_are_cut() {
    let place = Place::new();
    let folder = card(&place, "format FLOAT_LE channels 1 rate 22050 speed 10");
    let mut frames: Vec<u8> = tiny_mel(40).transposed().values().iter().flat_map(|value| value.to_le_bytes()).collect();
    frames[20 * 320..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    frames.truncate(39 * 320 + 9);
    fs::write(place.path("frames"), frames).unwrap();
    let mut command = play(&place, &folder, &["-", "--prebuffer", "60", "--refine", "0", "--save", "said.wav"]);
    let output = command.stdin(fs::File::open(place.path("frames")).unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<String> = stderr(&output).lines().map(String::from).collect();
    assert_eq!(
        lines,
        [
            "melglow: standard input: 1 frame with values that are not finite was muted",
            "melglow: 0.45 s played at 22050 Hz, 1 channel, f32: no underrun",
            "melglow: standard input: ends within frame 39, after 9 of its 320 bytes",
        ]
    );
    let heard = floats(&fs::read(folder.join("sound")).unwrap());
    assert!(heard[20 * 256 + 64..21 * 256].iter().all(|s| *s == 0.0));
    assert_eq!(fs::metadata(place.path("said.wav")).unwrap().len(), 44 + 2 * 39 * 256);
    assert!(heard[38 * 256..39 * 256].iter().any(|s| *s != 0.0) && heard[39 * 256..].iter().all(|s| *s == 0.0));
}

#[test]
fn a_voice_that_cannot_stream_is_played_when_it_has_spoken() {
    let place = Place::new();
    let folder = card(&place, "format FLOAT_LE channels 1 rate 22050 speed 10");
    let net = LipschitzConfig { channels: 8, kernel: 3, layers: 2, coefficient: 0.6 };
    let flow = FlowConfig::new(
        ConditioningConfig::Frame { channels: 8, residual_layers: 1, lookahead: None, norm: false },
        32,
        vec![Block { repeat: 1, steps: vec![StepConfig::mix(), StepConfig::Residual { net, terms: 8, probes: 2 }] }],
    );
    let voice = seeded_voice("residual", MelConfig::nvidia(), flow);
    voice.save(place.path("residual")).unwrap();
    place.mel("a.npy", 40);
    place.mel("b.npy", 3);
    let mut command = in_folder(Command::new(env!("CARGO_BIN_EXE_melglow")), &folder);
    let args = ["play", "a.npy", "b.npy", "--save", "all.wav", "--voice", "residual"];
    let output = command.current_dir(place.path("")).args(args).output().unwrap();
    assert!(output.status.success());
    let lines: Vec<String> = stderr(&output).lines().map(String::from).collect();
    assert_eq!(
        lines,
        [
            "melglow: voice residual cannot stream: a step of its flow has no streaming form: playing begins when all \
             is made",
            "melglow: 0.50 s played at 22050 Hz, 1 channel, f32: no underrun",
        ]
    );
    let vocoder = Vocoder::new(&voice).unwrap();
    let speak = |frames| vocoder.vocode(&tiny_mel(frames), &SynthOptions::default(), None).unwrap().samples;
    let sound = [speak(40), speak(3)].concat();
    assert_eq!(find(&floats(&fs::read(folder.join("sound")).unwrap()), &sound), 0);
    assert_eq!(fs::metadata(place.path("all.wav")).unwrap().len(), 44 + 2 * 43 * 256);
}

#[test]
fn a_device_that_goes_gives_one_line_and_the_file_is_whole() {
    let place = Place::new();
    let Some(mut server) = Server::start(&place, "rate=22050 channels=1") else { return };
    place.mel("a.npy", 400);
    let child = play(&place, &server.folder, &["a.npy", "--save", "all.wav"]).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let playing = || {
        let output = in_folder(Command::new("pactl"), &server.folder).args(["list", "short", "sink-inputs"]).output();
        !output.unwrap().stdout.is_empty()
    };
    while !playing() {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing plays");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_millis(500));
    server.server.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let err = stderr(&output);
    assert!(err.starts_with("melglow: the sound device is lost after ") && err.lines().count() == 1, "{err}");
    assert_eq!(fs::metadata(place.path("all.wav")).unwrap().len(), 44 + 2 * 400 * 256);
}

#[test]
fn no_device_and_unknown_devices_say_what_there_is() {
    let place = Place::new();
    let folder = place.path("alsa");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("asound.conf"), "</usr/share/alsa/alsa.conf>\npcm.!default { type hw card 77 }\n").unwrap();
    place.mel("a.npy", 5);
    let run = |args: &[&str]| {
        let output = play(&place, &folder, args).output().unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, err) = run(&["a.npy"]);
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert!(err.starts_with("melglow: cannot open the sound device: "), "{err}");
    let (code, err) = run(&["a.npy", "--device", "gramophone"]);
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert!(err.starts_with("melglow: no sound device gramophone; there are ") && err.contains("null"), "{err}");
    let (code, err) = run(&["a.npy", "--save", "a.wav"]);
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert_eq!(fs::metadata(place.path("a.wav")).unwrap().len(), 44 + 2 * 5 * 256);
    for (args, says) in [
        (&["missing.npy"][..], "melglow: cannot read missing.npy: "),
        (&["a.npy", "--volume", "9"], "melglow: volume is 9, expected 0 to 4"),
        (&["-", "-"], "melglow: standard input can be played once"),
    ] {
        let (code, err) = run(args);
        assert!(code == Some(1) && err.starts_with(says), "{err}");
    }
    assert_eq!(run(&[]).0, Some(2));
}

#[test]
fn a_slow_voice_waits_and_does_not_stutter() {
    let place = Place::new();
    let Some(server) = Server::start(&place, "rate=22050 channels=1") else { return };
    // refinement that takes about as long as the sound lasts
    seeded_voice("slow", MelConfig::nvidia(), tiny_flow()).save(place.path("slow")).unwrap();
    file::write_npy(&place.path("a.npy"), &tiny_mel(150)).unwrap();
    let args = ["a.npy", "--voice", "slow", "--refine", "1000", "--latency-ms", "200"];
    let mut command = in_folder(Command::new(env!("CARGO_BIN_EXE_melglow")), &server.folder);
    let output = command.current_dir(place.path("")).arg("play").args(args).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).ends_with("1.74 s played at 22050 Hz, 1 channel, f32: no underrun\n"),
        "{}",
        stderr(&output)
    );
}

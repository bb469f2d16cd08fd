//! `melglow play` on a terminal: a pty with keys, a line that is drawn, and a state to give back.

use super::play::{Server, card, expected, floats, in_folder, play, stderr};
use super::{Place, seeded_voice, tiny_flow};
use melglow::mel::MelConfig;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The tiny voice's sample rate.
const RATE: usize = 22_050;

/// A program at a terminal of 80 columns, or as many as are asked for.
struct Terminal {
    child: Child,
    keyboard: File,
    /// Our own hold on the terminal, to see its state.
    slave: OwnedFd,
    before: Termios,
    shown: Arc<Mutex<Vec<u8>>>,
    reader: std::thread::JoinHandle<()>,
}

/// A new terminal: our end of it, and the program's.
fn open(size: Option<&Winsize>) -> (File, OwnedFd) {
    let pty = openpty(size, None).unwrap();
    // copies are closed in the programs of other tests, which would keep the terminal open
    (pty.master.try_clone().unwrap().into(), pty.slave.try_clone().unwrap())
}

/// What is left when the program has ended.
struct Ended {
    code: Option<i32>,
    /// How long that took.
    took: Duration,
    shown: String,
}

impl Terminal {
    fn run(mut command: Command, columns: u16) -> Self {
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let (master, slave) = open(Some(&size));
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        // the command holds the terminal, too
        drop(command);
        let shown: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (mut screen, seen) = (master.try_clone().unwrap(), shown.clone());
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // an error is the other end's way to be gone
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                seen.lock().unwrap().extend(&bytes[..count]);
            }
        });
        Self { child, keyboard: master, slave, before, shown, reader }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    fn raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    /// Waits until `what` holds.
    fn until(&self, what: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !what(self) {
            assert!(start.elapsed() < Duration::from_secs(30), "it doesn't come: {:?}", self.shown());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the line has come to a second, tenths given.
    fn until_position(&self, tenths: usize) {
        self.until(|this| positions(&this.shown()).last().is_some_and(|last| *last >= tenths));
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for the end; the terminal must be as before.
    fn end(mut self) -> Ended {
        let start = Instant::now();
        let code = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status.code();
            }
            if start.elapsed() > Duration::from_secs(60) {
                self.child.kill().unwrap();
                panic!("it doesn't end: {:?}", self.shown());
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let took = start.elapsed();
        assert!(tcgetattr(&self.slave).unwrap() == self.before, "the terminal is not as before");
        drop(self.slave);
        self.reader.join().unwrap();
        let shown = String::from_utf8(self.shown.lock().unwrap().clone()).unwrap();
        // no line begins where the one before has ended
        for (at, _) in shown.match_indices('\n') {
            assert!(shown[..at].ends_with('\r'), "{shown:?}");
        }
        Ended { code, took, shown }
    }
}

impl Ended {
    /// The line was wiped, and what stands after it.
    fn last_words(&self) -> &str {
        let (_, words) = self.shown.rsplit_once("\r\x1b[K").expect("the line is wiped");
        words
    }
}

/// The positions that were drawn, tenths of a second.
fn positions(shown: &str) -> Vec<usize> {
    let drawn = shown.split('\r').filter_map(|line| {
        let (clock, _) = line.split_once([' ', '['])?;
        let (minutes, seconds) = clock.split_once(':')?;
        Some(600 * minutes.parse::<usize>().ok()? + (10.0 * seconds.parse::<f64>().ok()?).round() as usize)
    });
    drawn.collect()
}

/// A card at the speed of sound that keeps what it is given.
const CARD: &str = "format FLOAT_LE channels 1 rate 22050";

fn given(folder: &Path) -> Vec<f32> {
    floats(&fs::read(folder.join("sound")).unwrap())
}

/// How many of the first samples are the same.
fn same(a: &[f32], b: &[f32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[test]
fn the_line_tells_position_and_level_and_is_gone_at_the_end() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 100);
    let ended = Terminal::run(play(&place, &folder, &["a.npy"]), 80).end();
    assert_eq!(ended.code, Some(0), "{}", ended.shown);
    assert_eq!(ended.last_words(), "melglow: 1.16 s played at 22050 Hz, 1 channel, f32: no underrun\r\n");
    let positions = positions(&ended.shown);
    assert!(positions.is_sorted() && positions.len() > 5 && *positions.last().unwrap() >= 9, "{positions:?}");
    assert!(ended.shown.contains(" / 0:01.1  [||"), "{}", ended.shown);
    assert_eq!(same(&given(&folder), &expected(100)), expected(100).len());
}

#[test]
fn a_narrow_terminal_is_not_scrolled() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 30);
    let ended = Terminal::run(play(&place, &folder, &["a.npy"]), 20).end();
    let drawn: Vec<&str> = ended.shown.split('\r').filter(|line| line.contains(" / ")).collect();
    assert!(drawn.iter().all(|line| line.trim_end_matches("\x1b[K").len() == 19) && drawn.len() > 2, "{drawn:?}");
}

#[test]
fn space_pauses_and_goes_on_where_it_was() {
    let place = Place::new();
    let Some(server) = Server::start(&place, "format=float32le rate=22050 channels=1") else { return };
    place.mel("a.npy", 250);
    let recorded = server.record(&["--format=float32le", "--rate=22050", "--channels=1"], || {
        let mut terminal = Terminal::run(play(&place, &server.folder, &["a.npy", "--latency-ms", "200"]), 80);
        terminal.until_position(8);
        terminal.press(" ");
        terminal.until(|this| this.shown().contains("paused"));
        // the fade has its time
        std::thread::sleep(Duration::from_millis(300));
        let from = terminal.shown().len();
        std::thread::sleep(Duration::from_millis(700));
        let while_paused = positions(&terminal.shown()[from..]);
        assert!(while_paused.len() > 3, "{while_paused:?}");
        assert!(while_paused.iter().all(|position| *position == while_paused[0]), "{while_paused:?}");
        terminal.press(" ");
        terminal.until_position(while_paused[0] + 5);
        let ended = terminal.end();
        assert_eq!(ended.code, Some(0));
        assert_eq!(ended.last_words(), "melglow: 2.90 s played at 22050 Hz, 1 channel, f32: no underrun\r\n");
    });
    let (heard, sound) = (floats(&recorded), expected(250));
    let first = heard.iter().position(|s| *s != 0.0).unwrap() - sound.iter().position(|s| *s != 0.0).unwrap();
    let end = heard.iter().rposition(|s| *s != 0.0).unwrap() + 1;
    let end = end + sound.iter().rev().take_while(|s| **s == 0.0).count();
    let heard = &heard[first..end];
    let (before, after) = (same(heard, &sound), heard.iter().rev().zip(sound.iter().rev()).take_while(|(a, b)| a == b));
    let after = after.count();
    // two fades of 5 ms, and silence of a second between them
    let faded = sound.len() - before - after;
    assert!(before > RATE / 2 && after > RATE / 2 && (1..=2 * RATE / 200 + 4).contains(&faded), "{before} {after}");
    let silence = heard.len() - sound.len();
    assert!(silence > RATE * 9 / 10, "{silence}");
    let weaker = |(a, b): (&f32, &f32)| a.abs() <= b.abs() && a * b >= 0.0;
    let (out, back) = (&heard[before..], &heard[..heard.len() - after]);
    let fade = out.iter().zip(&sound[before..]).take_while(|pair| weaker(*pair) && *pair.0 != 0.0).count();
    let rise = sound[..sound.len() - after].iter().rev();
    let rise = back.iter().rev().zip(rise).take_while(|pair| weaker(*pair) && *pair.0 != 0.0).count();
    // a sample whose gain is 0 is not taken
    assert!((faded..=faded + 2).contains(&(fade + rise)), "{fade} and {rise} of {faded}");
}

#[test]
fn q_leaves_at_once() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 1000);
    for (key, save) in [("q", false), ("\x1b", false), ("q", true)] {
        let args: &[&str] = if save { &["a.npy", "--save", "all.wav"] } else { &["a.npy"] };
        let mut terminal = Terminal::run(play(&place, &folder, args), 80);
        terminal.until_position(3);
        assert!(terminal.raw());
        terminal.press(key);
        let ended = terminal.end();
        assert!(ended.took < Duration::from_secs(2), "{:?}", ended.took);
        let words = ended.last_words();
        let (played, rest) = words.split_once('\n').unwrap();
        assert!(played.starts_with("melglow: 0.") || played.starts_with("melglow: 1."), "{words}");
        assert!(played.ends_with(" s played at 22050 Hz, 1 channel, f32: no underrun\r"), "{words}");
        assert_eq!(ended.code, Some(0));
        if save {
            // all may be made long before all is heard
            let whole = fs::metadata(place.path("all.wav")).unwrap().len() == 44 + 2 * 1000 * 256;
            assert_eq!(rest, if whole { "" } else { "melglow: left early: all.wav ends there\r\n" });
        }
    }
}

#[test]
fn ctrl_c_fades_out_within_50_ms() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 1000);
    let sound = expected(1000);
    // seconds of sound that the card is given after the asking
    let late = |by_key: bool| {
        let _ = fs::remove_file(folder.join("sound"));
        let mut terminal = Terminal::run(play(&place, &folder, &["a.npy"]), 80);
        terminal.until_position(5);
        let before = given(&folder).len();
        if by_key {
            terminal.press("\x03");
        } else {
            kill(Pid::from_raw(terminal.child.id() as i32), Signal::SIGTERM).unwrap();
        }
        let ended = terminal.end();
        assert_eq!(ended.code, Some(130), "{}", ended.shown);
        assert!(ended.last_words().ends_with(": no underrun\r\n"), "{}", ended.shown);
        assert!(ended.took < Duration::from_secs(2), "{:?}", ended.took);
        let heard = given(&folder);
        let whole = same(&heard, &sound);
        let last = heard.iter().rposition(|s| *s != 0.0).unwrap() + 1;
        // a fade and no cut: 5 ms in which it grows weaker
        let fade = RATE / 200;
        assert!(whole >= before && (1..=fade + 1).contains(&(last - whole)), "{whole} of {before}, {last}");
        let halfway = whole + fade / 2;
        let gain = heard[halfway] / sound[halfway];
        assert!(gain > 0.3 && gain < 0.7, "{gain}");
        (last - before) as f64 / RATE as f64
    };
    for by_key in [true, false] {
        // The card holds 40 ms, in two pieces. Asked when it holds all, the next piece begins with
        // the fade; asked when it holds one, another may be under way. A busy machine does worse,
        // but not always.
        let tries: Vec<f64> = (0..5).map(|_| late(by_key)).take_while(|late| *late > 0.03).collect();
        assert!(tries.len() < 5, "by key: {by_key}, seconds too late: {tries:?}");
    }
}

#[test]
fn pausing_before_the_first_sound_holds_it() {
    let place = Place::new();
    let folder = card(&place, CARD);
    seeded_voice("slow", MelConfig::nvidia(), tiny_flow()).save(place.path("slow")).unwrap();
    place.mel("a.npy", 150);
    let mut command = in_folder(Command::new(env!("CARGO_BIN_EXE_melglow")), &folder);
    command.current_dir(place.path("")).args(["play", "a.npy", "--voice", "slow", "--refine", "1000"]);
    command.args(["--prebuffer", "3600"]);
    let mut terminal = Terminal::run(command, 80);
    terminal.until(Terminal::raw);
    terminal.press(" ");
    terminal.until(|this| this.shown().contains("paused"));
    // it begins when all is ready
    terminal.until(|_| folder.join("sound").exists() && given(&folder).len() > RATE / 4);
    assert!(given(&folder).iter().all(|s| *s == 0.0));
    assert!(positions(&terminal.shown()).iter().all(|position| *position == 0));
    terminal.press(" ");
    let ended = terminal.end();
    assert_eq!(ended.last_words(), "melglow: 1.74 s played at 22050 Hz, 1 channel, f32: no underrun\r\n");
}

#[test]
fn a_program_that_was_held_for_long_goes_on() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 100);
    let terminal = Terminal::run(play(&place, &folder, &["a.npy"]), 80);
    terminal.until_position(3);
    let pid = Pid::from_raw(terminal.child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    // longer than a device may be silent
    std::thread::sleep(Duration::from_millis(3300));
    kill(pid, Signal::SIGCONT).unwrap();
    let ended = terminal.end();
    assert_eq!(ended.code, Some(0), "{}", ended.shown);
    assert_eq!(same(&given(&folder), &expected(100)), expected(100).len());
}

#[test]
fn a_device_that_goes_leaves_the_terminal_as_it_was() {
    let place = Place::new();
    let folder = card(&place, &format!("{CARD} lose_after 5000"));
    place.mel("a.npy", 200);
    let ended = Terminal::run(play(&place, &folder, &["a.npy"]), 80).end();
    assert_eq!(ended.code, Some(1));
    assert!(ended.last_words().starts_with("melglow: the sound device is lost after 0.2"), "{}", ended.shown);
    assert_eq!(ended.last_words().matches('\n').count(), 1);
}

#[test]
fn without_a_terminal_to_show_it_there_is_no_line_and_keys_are_left_alone() {
    let place = Place::new();
    let folder = card(&place, CARD);
    place.mel("a.npy", 50);
    let (mut keyboard, slave) = open(None);
    keyboard.write_all(b"q").unwrap();
    let output = play(&place, &folder, &["a.npy"]).stdin(slave).output().unwrap();
    assert_eq!(stderr(&output), "melglow: 0.58 s played at 22050 Hz, 1 channel, f32: no underrun\n");
}

#[test]
fn frames_that_never_come_can_be_left() {
    let place = Place::new();
    let folder = card(&place, CARD);
    let mut command = play(&place, &folder, &["-", "--refine", "0", "--save", "said.wav"]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let frames = super::tiny_mel(60).transposed();
    let bytes: Vec<u8> = frames.values().iter().flat_map(|value| value.to_le_bytes()).collect();
    input.write_all(&bytes).unwrap();
    let start = Instant::now();
    while fs::metadata(folder.join("sound")).is_ok_and(|sound| sound.len() == 0) || !folder.join("sound").exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing plays");
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = Instant::now();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("left early: said.wav ends there"), "{}", stderr(&output));
    let said = fs::metadata(place.path("said.wav")).unwrap().len();
    assert!(said > 44 && said <= 44 + 2 * 60 * 256, "{said}");
    drop(input);
}

//! The works of `melglow play`: a thread that makes the sound, and this one that watches the device,
//! the keys and the clock.

use super::conventions::MelReader;
use super::play::PlayArgs;
use super::source::sources;
use super::synth_stream::{Frames, Spoken, report_muted, speak};
use super::{say, use_threads, voice, watched};
use crate::atomic;
use crate::audio::playback::{Card, Feed, Player, devices};
use crate::audio::resample::ResampleStream;
use crate::audio::wav::{self, WavFormat};
use crate::vocoder::{SynthOptions, Vocoder};
use crate::{Error, Result};
use anyhow::bail;
use crossterm::event::{Event, KeyCode, KeyModifiers};
use crossterm::{event, terminal};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

/// Least sound to have ready before the first of it plays, seconds.
const PREBUFFER: f64 = 0.1;
/// Sound over which the speed is measured, seconds.
const MEASURE: f64 = 0.1;
/// The part of the measured speed that is relied on.
const RELIED_ON: f64 = 0.85;
/// Room in the ring beyond what is ready at the start, seconds.
const ROOM: f64 = 0.5;
/// How often the watching thread looks.
const TICK: Duration = Duration::from_millis(10);
/// A device that asks for nothing for so long has gone.
const STALL: Duration = Duration::from_secs(3);

/// Runs the command.
pub(super) fn run(args: PlayArgs) -> anyhow::Result<()> {
    if args.list_devices {
        let mut out = io::stdout().lock();
        for device in devices()? {
            writeln!(out, "{}\t{}", device.id, device.description)?;
        }
        return Ok(());
    }
    if !(0.0..=4.0).contains(&args.volume) {
        bail!("volume is {}, expected 0 to 4", args.volume);
    }
    if args.prebuffer.is_some_and(|seconds| !(0.0..=3600.0).contains(&seconds)) {
        bail!("prebuffer is {} s, expected 0 to 3600", args.prebuffer.unwrap_or_default());
    }
    if args.mels.iter().filter(|mel| mel.as_os_str() == "-").count() > 1 {
        bail!("standard input can be played once");
    }
    use_threads(None)?;
    let voice = voice(args.voice.as_deref())?;
    let options = SynthOptions {
        sigma: args.sigma,
        seed: args.seed,
        refine: args.refine,
        refine_lookahead: args.refine_lookahead,
    };
    let vocoder = Vocoder::new(&voice)?;
    vocoder.stream(&options)?;
    let mel = &vocoder.config().mel;
    let reader = MelReader::new(&args.mel, voice.config())?;
    let mut sound = Vec::new();
    for source in sources(&args.mels)? {
        sound.push((source.name(), Frames::open(&source, &reader)?));
    }
    let samples = sound.iter().map(|(_, frames)| frames.samples(mel.hop_length)).sum::<Option<usize>>();
    let seconds = samples.map(|samples| samples as f64 / f64::from(mel.sample_rate));

    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    ctrlc::set_handler(move || asked.store(true, Ordering::Relaxed))
        .map_err(|e| Error::invalid(format!("cannot watch for Ctrl-C: {e}")))?;
    let card = Card::choose(args.device.as_deref(), args.rate.unwrap_or(mel.sample_rate), args.latency_ms);
    let (card, mut trouble) = match card {
        Ok(card) => (Some(card), None),
        // what is to be saved is made all the same
        Err(error) if args.save.is_some() => (None, Some(error)),
        Err(error) => return Err(error.into()),
    };
    let (orders, desk) = channel();
    let maker = Maker {
        vocoder: &vocoder,
        options,
        rate: card.as_ref().map_or(mel.sample_rate, Card::sample_rate),
        seconds,
        prebuffer: args.prebuffer.map(f64::from),
        save: args.save.as_deref(),
        stop: &stop,
        sink: if card.is_some() { Sink::Early { ready: Vec::new(), since: None, orders } } else { Sink::Gone },
        heard: card.is_some(),
    };
    let (made, watched) = std::thread::scope(|scope| {
        let making = scope.spawn(move || maker.run(sound));
        let watch = Watch { stop: &stop, seconds, keys: Keys::watch(&args.mels) };
        let watched = card.map(|card| watch.run(&card, &desk, args.volume));
        (making.join(), watched)
    });
    let made = made.map_err(|_| Error::invalid("the thread that makes the sound failed"))?;
    if let Some(Err(error)) = watched {
        trouble = trouble.or(Some(error));
    }
    match (made, trouble) {
        (Err(Error::Interrupted), None) => match args.save {
            Some(path) => bail!("left early: {} is not written", path.display()),
            None => Ok(()),
        },
        (Err(error), _) => Err(error.into()),
        (Ok(()), Some(error)) => Err(error.into()),
        (Ok(()), None) => Ok(()),
    }
}

/// What is ready when the sound may begin.
struct Order {
    ready: Vec<f32>,
    /// It is all there is.
    ended: bool,
    capacity: usize,
    reply: SyncSender<Option<Feed>>,
}

/// The thread that makes the sound.
struct Maker<'a> {
    vocoder: &'a Vocoder,
    options: SynthOptions,
    /// Of the device.
    rate: u32,
    seconds: Option<f64>,
    prebuffer: Option<f64>,
    save: Option<&'a Path>,
    stop: &'a AtomicBool,
    sink: Sink,
    /// Whether there was a device to begin with.
    heard: bool,
}

/// Where the sound goes.
enum Sink {
    /// Nothing sounds yet: samples that are ready, and when the first of them were, with their number.
    Early { ready: Vec<f32>, since: Option<(Instant, usize)>, orders: std::sync::mpsc::Sender<Order> },
    /// To the device.
    Playing(Feed),
    /// There is no device, or no longer.
    Gone,
}

impl Maker<'_> {
    /// Speaks all mels, and saves them.
    fn run(mut self, mut sound: Vec<(PathBuf, Frames)>) -> Result<()> {
        let rate = self.vocoder.config().mel.sample_rate;
        let Some(path) = self.save else { return self.speak(&mut sound, &mut io::sink()).map(|_| ()) };
        let mut failure = None;
        let written = atomic::write_with_head(
            path,
            |out| {
                out.write_all(&wav::header(None, rate, WavFormat::Int16)?)?;
                self.speak(&mut sound, out).map_err(|error| {
                    failure = Some(error);
                    io::Error::other("stopped")
                })
            },
            |samples| wav::header(Some(*samples), rate, WavFormat::Int16),
        );
        match failure {
            Some(error) => Err(error),
            None => written.map(|_| ()),
        }
    }

    fn speak(&mut self, sound: &mut [(PathBuf, Frames)], out: &mut dyn Write) -> Result<u64> {
        let (vocoder, options) = (self.vocoder, self.options.clone());
        let mut resampler = ResampleStream::new(vocoder.config().mel.sample_rate, self.rate)?;
        let (mut samples, mut saturated) = (0, 0);
        let mut resampled = Vec::new();
        for (name, frames) in sound {
            let Spoken { samples: count, muted, cut } = speak(vocoder, &options, frames, |samples| -> Result<bool> {
                saturated += wav::write_samples(&mut *out, samples, WavFormat::Int16)
                    .map_err(Error::io("write", self.save.unwrap_or(Path::new("-"))))?;
                resampled.clear();
                resampler.push(samples, &mut resampled)?;
                Ok(self.play(&resampled))
            })?;
            samples += count;
            report_muted(name, muted);
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            if let Some(error) = cut {
                self.end(&mut resampler)?;
                return Err(error);
            }
        }
        self.end(&mut resampler)?;
        if let (Some(path), 1..) = (self.save, saturated) {
            say(&format!("{}: {saturated} samples saturated", path.display()));
        }
        Ok(samples)
    }

    /// Hands over what is left and says that it is all.
    fn end(&mut self, resampler: &mut ResampleStream) -> Result<()> {
        let mut rest = Vec::new();
        resampler.finish(&mut rest)?;
        self.play(&rest);
        if let Sink::Early { ready, .. } = &self.sink {
            let capacity = ready.len();
            self.begin(capacity, true);
        }
        if let Sink::Playing(feed) = &self.sink {
            feed.end();
        }
        Ok(())
    }

    /// Plays samples at the device's rate, waiting as long as it takes; whether to go on.
    fn play(&mut self, samples: &[f32]) -> bool {
        let stop = || self.stop.load(Ordering::Relaxed);
        match &mut self.sink {
            Sink::Early { ready, since, .. } => {
                ready.extend_from_slice(samples);
                let (start, first) = *since.get_or_insert((Instant::now(), ready.len()));
                let rate = f64::from(self.rate);
                let (have, measured) = (ready.len() as f64 / rate, (ready.len() - first) as f64 / rate);
                let speed = measured / start.elapsed().as_secs_f64().max(1e-9);
                if let Some(wanted) = wanted(have, measured, speed, self.seconds, self.prebuffer)
                    && have >= wanted
                {
                    let capacity = ready.len() + (ROOM * rate) as usize;
                    self.begin(capacity, false);
                }
            }
            Sink::Playing(feed) => {
                if !feed.put(samples, stop) {
                    self.sink = Sink::Gone;
                }
            }
            Sink::Gone => {}
        }
        let gone = matches!(self.sink, Sink::Gone) && (self.heard && self.save.is_none());
        !self.stop.load(Ordering::Relaxed) && !gone
    }

    /// Lets the device begin with what is ready.
    fn begin(&mut self, capacity: usize, ended: bool) {
        if let Sink::Early { ready, orders, .. } = std::mem::replace(&mut self.sink, Sink::Gone) {
            let (reply, answer) = sync_channel(1);
            let sent = orders.send(Order { ready, ended, capacity, reply });
            if let (Ok(()), Ok(Some(feed))) = (sent, answer.recv()) {
                self.sink = Sink::Playing(feed);
            }
        }
    }
}

/// Seconds of sound to have before the first of it plays, once that can be told: enough to reach the
/// end without a break at a speed (seconds of sound a second), `measured` seconds of sound long.
fn wanted(have: f64, measured: f64, speed: f64, total: Option<f64>, asked: Option<f64>) -> Option<f64> {
    if asked.is_some() {
        return asked;
    }
    // how fast frames arrive on standard input says nothing of the voice
    let Some(total) = total else { return Some(PREBUFFER) };
    if measured < MEASURE {
        return None;
    }
    let relied_on = speed * RELIED_ON;
    if relied_on >= 1.0 || have >= total {
        return Some(PREBUFFER);
    }
    Some(PREBUFFER + total * (1.0 - relied_on))
}

/// The watching thread.
struct Watch<'a> {
    stop: &'a AtomicBool,
    seconds: Option<f64>,
    keys: Keys,
}

impl Watch<'_> {
    fn run(mut self, card: &Card, desk: &Receiver<Order>, volume: f32) -> Result<()> {
        let started = Instant::now();
        let mut waiting_said = false;
        let player = loop {
            match desk.recv_timeout(TICK) {
                Ok(order) => match Self::open(card, volume, &order) {
                    Ok((player, feed)) => {
                        let _ = order.reply.send(Some(feed));
                        break player;
                    }
                    Err(error) => {
                        let _ = order.reply.send(None);
                        return Err(error);
                    }
                },
                // the maker has ended before there was any sound; it tells why
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => self.keys(None),
            }
            if !waiting_said && started.elapsed() > Duration::from_secs(2) && self.seconds.is_some() {
                say("the voice is slower than real time here: playing begins when enough is ready");
                waiting_said = true;
            }
        };
        self.follow(&player, card)
    }

    fn open(card: &Card, volume: f32, order: &Order) -> Result<(Player, Feed)> {
        let (player, mut feed) = card.open(order.capacity, volume)?;
        feed.offer(&order.ready);
        if order.ended {
            feed.end();
        }
        player.start()?;
        Ok((player, feed))
    }

    /// Until the last sample is heard.
    fn follow(&mut self, player: &Player, card: &Card) -> Result<()> {
        let meter = watched();
        let (mut calls, mut moved) = (0, Instant::now());
        let (mut leaving, mut level) = (false, 0.0_f32);
        let position = |player: &Player| player.played() as f64 / f64::from(card.sample_rate());
        let tail = loop {
            if let Some(tail) = player.drained() {
                break tail;
            }
            if player.calls() != calls {
                (calls, moved) = (player.calls(), Instant::now());
            }
            let stalled = moved.elapsed() > STALL;
            if let Some(cause) = player.lost().or(stalled.then_some("it takes no more sound")) {
                clear(meter);
                let cause = cause.lines().next().unwrap_or_default().trim_end_matches('.');
                return Err(Error::invalid(format!(
                    "the sound device is lost after {:.2} s: {cause}",
                    position(player)
                )));
            }
            self.keys(Some(player));
            if self.stop.load(Ordering::Relaxed) && !leaving {
                player.leave();
                leaving = true;
            }
            if meter {
                level = player.peak().max(0.9 * level);
                self.meter(position(player), level);
            }
            std::thread::sleep(TICK);
        };
        // what the device holds is still to be heard
        std::thread::sleep(tail + Duration::from_millis(if leaving { 10 } else { 100 }));
        clear(meter);
        let (count, missing) = player.underruns();
        let gaps = match count {
            0 => "no underrun".to_string(),
            1 => format!("1 underrun ({missing} samples)"),
            count => format!("{count} underruns ({missing} samples)"),
        };
        say(&format!(
            "{:.2} s played at {} Hz, {} channel{}, {}: {gaps}",
            position(player),
            card.sample_rate(),
            card.channels(),
            if card.channels() == 1 { "" } else { "s" },
            card.format(),
        ));
        Ok(())
    }

    fn keys(&mut self, player: Option<&Player>) {
        match self.keys.pressed() {
            Some(Key::Leave) => self.stop.store(true, Ordering::Relaxed),
            Some(Key::Pause) => {
                self.keys.paused = !self.keys.paused;
                player.iter().for_each(|player| player.pause(self.keys.paused));
            }
            None => {}
        }
    }

    fn meter(&self, position: f64, level: f32) {
        let clock = |s: f64| format!("{}:{:04.1}", (s / 60.0) as u64, s % 60.0);
        // 60 dB over 30 signs
        let signs = ((20.0 * level.max(1e-6).log10() + 60.0) / 2.0).clamp(0.0, 30.0) as usize;
        let total = self.seconds.map(|s| format!(" / {}", clock(s))).unwrap_or_default();
        let state = if self.keys.paused { "  paused" } else { "" };
        let _ = write!(io::stderr(), "\r{}{total}  [{:<30}]{state}\x1b[K", clock(position), "|".repeat(signs));
    }
}

fn clear(meter: bool) {
    if meter {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
}

enum Key {
    Pause,
    Leave,
}

/// Keys, where a person has them; the terminal is as before when this is gone.
struct Keys {
    on: bool,
    paused: bool,
}

impl Keys {
    fn watch(mels: &[PathBuf]) -> Self {
        let person = io::stdin().is_terminal() && watched() && !mels.iter().any(|mel| mel.as_os_str() == "-");
        Self { on: person && terminal::enable_raw_mode().is_ok(), paused: false }
    }

    fn pressed(&self) -> Option<Key> {
        if !self.on || !event::poll(Duration::ZERO).ok()? {
            return None;
        }
        let Event::Key(key) = event::read().ok()? else { return None };
        match key.code {
            KeyCode::Char(' ') => Some(Key::Pause),
            KeyCode::Char('q') | KeyCode::Esc => Some(Key::Leave),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Key::Leave),
            _ => None,
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if self.on {
            let _ = terminal::disable_raw_mode();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_voices_wait_for_enough() {
        // fast: at once; slow: what the rest will lack; unknown length: little; asked for: that
        assert_eq!(wanted(0.3, 0.2, 5.0, Some(60.0), None), Some(PREBUFFER));
        assert_eq!(wanted(0.05, 0.05, 5.0, Some(60.0), None), None);
        assert_eq!(wanted(0.3, 0.2, 0.1, None, None), Some(PREBUFFER));
        assert_eq!(wanted(0.3, 0.0, 0.0, Some(60.0), Some(2.0)), Some(2.0));
        for speed in [0.1, 0.5, 0.9, 1.1] {
            let ready = wanted(0.3, 0.2, speed, Some(60.0), None).unwrap();
            // made by the time the last of it is due
            let made_at_end = ready + speed * 60.0;
            assert!(made_at_end >= 60.0 && ready <= 60.2, "{speed}: {ready}");
        }
    }
}

//! The works of `melglow play`: a thread that makes the sound, and this one that watches the device,
//! the keys and the clock.

use super::conventions::MelReader;
use super::live_input::LiveInput;
use super::play::PlayArgs;
use super::screen::{Key, Screen, say_beside_line};
use super::source::{is_stdio, sources};
use super::synth_stream::{Frames, Spoken, speak, speak_whole};
use super::{say, target, use_threads, voice};
use crate::atomic;
use crate::audio::playback::{Card, Feed, Player, devices};
use crate::audio::resample::ResampleStream;
use crate::audio::wav::{self, WavFormat};
use crate::vocoder::{SynthOptions, Vocoder};
use crate::{Error, Result};
use anyhow::{Context, bail};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::time::{Duration, Instant};

/// Least sound to have ready before the first of it plays, seconds.
const PREBUFFER: f64 = 0.1;
/// Sound over which the speed is measured, seconds.
const MEASURE: f64 = 0.1;
/// The part of the measured speed that is relied on.
const RELIED_ON: f64 = 0.85;
/// Room in the ring beyond what is ready at the start, seconds.
const ROOM: f64 = 0.5;
/// How often the watching thread looks: part of the time that Ctrl-C takes.
const TICK: Duration = Duration::from_millis(5);
/// A device that asks for nothing for so many ticks has gone: about three seconds, not counting
/// time for which the whole program stood still.
const STALL: u32 = 600;
/// Samples that go to the device together where all are made already.
const PIECE: usize = 4096;

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
    if let Some(path) = &args.save {
        if is_stdio(path) {
            bail!("--save wants a file; \"melglow synth --stream\" writes to standard output");
        }
        target::check(path, ("WAV", target::NOT_WAV), args.mels.iter().map(PathBuf::as_path))?;
    }
    use_threads(None)?;
    let voice = voice(args.voice.as_deref())?;
    let options = args.speak.options()?;
    let vocoder = args.precision.vocoder(&voice)?;
    vocoder.asked(&options)?;
    let cannot_stream = vocoder.stream(&options).err();
    let mel = &vocoder.config().mel;
    let reader = MelReader::new(&args.mel, voice.config())?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut sounds = Vec::new();
    for source in sources(&args.mels)? {
        let input = || Box::new(LiveInput::new(io::stdin(), stop.clone())) as _;
        sounds.push((source.name(), Sound::Frames(Frames::open(&source, &reader, input)?)));
    }
    let card = Card::choose(args.device.as_deref(), args.rate.unwrap_or(mel.sample_rate), args.latency_ms);
    let (card, mut trouble) = match card {
        Ok(card) => (Some(card), None),
        // what is to be saved is made all the same
        Err(error) if args.save.is_some() => (None, Some(error)),
        Err(error) => return Err(error.into()),
    };
    if let Some(cause) = cannot_stream {
        if card.is_some() {
            say(&format!("{cause}: playing begins when all is made"));
        }
        // nothing is open yet that Ctrl-C could leave behind
        for (name, sound) in &mut sounds {
            let Sound::Frames(frames) = sound else { continue };
            *sound = Sound::Made(speak_whole(&vocoder, &options, frames).with_context(|| name.display().to_string())?);
        }
    }
    let samples = sounds.iter().map(|(_, sound)| sound.samples(mel.hop_length)).sum::<Option<usize>>();
    let seconds = samples.map(|samples| samples as f64 / f64::from(mel.sample_rate));

    let interrupted = Arc::new(AtomicBool::new(false));
    let (asked, by_signal) = (stop.clone(), interrupted.clone());
    ctrlc::set_handler(move || {
        by_signal.store(true, Ordering::Relaxed);
        asked.store(true, Ordering::Relaxed);
    })
    .map_err(|e| Error::invalid(format!("cannot watch for Ctrl-C: {e}")))?;
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
        let making = scope.spawn(move || maker.run(sounds));
        let watched = card.map(|card| {
            let screen = Screen::open(!args.mels.iter().any(|mel| mel.as_os_str() == "-"));
            let (stop, interrupted) = (&*stop, &*interrupted);
            let measured = args.prebuffer.is_none() && seconds.is_some();
            Watch { stop, interrupted, seconds, measured, screen, paused: false }.run(&card, &desk, args.volume)
        });
        (making.join(), watched)
    });
    let made = made.map_err(|_| Error::invalid("the thread that makes the sound failed"))?;
    if let Some(Err(error)) = watched {
        trouble = trouble.or(Some(error));
    }
    match made {
        Ok(()) => {}
        Err(Error::Interrupted) => {
            if let Some(path) = &args.save {
                say(&format!("left early: {} ends there", path.display()));
            }
        }
        Err(error) => return Err(error.into()),
    }
    match (interrupted.load(Ordering::Relaxed), trouble) {
        (true, trouble) => {
            trouble.iter().for_each(|trouble| say(&trouble.to_string()));
            Err(Error::Interrupted.into())
        }
        (false, Some(trouble)) => Err(trouble.into()),
        (false, None) => Ok(()),
    }
}

/// What is to be played.
enum Sound {
    /// Spoken while it plays.
    Frames(Frames),
    /// Spoken before.
    Made(Vec<f32>),
}

impl Sound {
    /// Samples in all, where that is known, at `hop` samples a frame.
    fn samples(&self, hop: usize) -> Option<usize> {
        match self {
            Self::Frames(frames) => frames.samples(hop),
            Self::Made(samples) => Some(samples.len()),
        }
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
    fn run(mut self, mut sounds: Vec<(PathBuf, Sound)>) -> Result<()> {
        let rate = self.vocoder.config().mel.sample_rate;
        let Some(path) = self.save else { return self.speak(&mut sounds, &mut io::sink())?.1.map_or(Ok(()), Err) };
        let mut failure = None;
        let spoken = atomic::write_with_head(
            path,
            |out| {
                out.write_all(&wav::header(None, rate, WavFormat::Int16)?)?;
                self.speak(&mut sounds, out).map_err(|error| {
                    failure = Some(error);
                    io::Error::other("stopped")
                })
            },
            |(samples, _)| wav::header(Some(*samples), rate, WavFormat::Int16),
        );
        // what was made before an end of another kind is kept
        failure.map_or_else(|| spoken?.1.map_or(Ok(()), Err), Err)
    }

    /// The number of samples, and what made an end of them before theirs.
    fn speak(&mut self, sounds: &mut [(PathBuf, Sound)], out: &mut dyn Write) -> Result<(u64, Option<Error>)> {
        let (vocoder, options) = (self.vocoder, self.options.clone());
        let mut resampler = ResampleStream::new(vocoder.config().mel.sample_rate, self.rate)?;
        let (mut samples, mut saturated) = (0, 0);
        let mut resampled = Vec::new();
        for (name, sound) in sounds {
            let mut sink = |samples: &[f32]| -> Result<bool> {
                saturated += wav::write_samples(&mut *out, samples, WavFormat::Int16)
                    .map_err(Error::io("write", self.save.unwrap_or(Path::new("-"))))?;
                resampled.clear();
                resampler.push(samples, &mut resampled)?;
                Ok(self.play(&resampled))
            };
            let spoken = match sound {
                Sound::Frames(frames) => speak(vocoder, &options, frames, sink)?,
                Sound::Made(made) => {
                    for piece in made.chunks(PIECE) {
                        if !sink(piece)? {
                            break;
                        }
                    }
                    Spoken::made(made.len() as u64)
                }
            };
            samples += spoken.samples;
            spoken.remarks(name).for_each(|remark| say_beside_line(&remark));
            if self.stop.load(Ordering::Relaxed) {
                return Ok((samples, Some(Error::Interrupted)));
            }
            if let Some(error) = spoken.cut {
                self.end(&mut resampler)?;
                return Ok((samples, Some(error)));
            }
        }
        self.end(&mut resampler)?;
        if let (Some(path), 1..) = (self.save, saturated) {
            say_beside_line(&format!("{}: {saturated} samples saturated", path.display()));
        }
        Ok((samples, None))
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
    /// The stop is Ctrl-C's.
    interrupted: &'a AtomicBool,
    seconds: Option<f64>,
    /// When to begin is by the voice's measured speed.
    measured: bool,
    screen: Screen,
    paused: bool,
}

impl Watch<'_> {
    fn run(mut self, card: &Card, desk: &Receiver<Order>, volume: f32) -> Result<()> {
        let started = Instant::now();
        let mut waiting_said = false;
        let player = loop {
            match desk.try_recv() {
                Ok(order) => match self.open(card, volume, &order) {
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
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => self.keys(None),
            }
            self.screen.draw(0.0, self.seconds, || 0.0, self.paused);
            if !waiting_said && self.measured && started.elapsed() > Duration::from_secs(2) {
                say_beside_line("the voice is slower than real time here: playing begins when enough is ready");
                waiting_said = true;
            }
        };
        let played = self.follow(&player, card);
        // the terminal as it was, before the last words
        drop(self);
        say(&played?);
        Ok(())
    }

    fn open(&self, card: &Card, volume: f32, order: &Order) -> Result<(Player, Feed)> {
        let (player, mut feed) = card.open(order.capacity, volume)?;
        feed.offer(&order.ready);
        if order.ended {
            feed.end();
        }
        player.pause(self.paused);
        player.start()?;
        Ok((player, feed))
    }

    /// Until the last sample is heard; gives what there is to say about it.
    fn follow(&mut self, player: &Player, card: &Card) -> Result<String> {
        let (mut calls, mut idle, mut leaving) = (0, 0, false);
        let position = || player.played() as f64 / f64::from(card.sample_rate());
        let tail = loop {
            if let Some(tail) = player.drained() {
                break tail;
            }
            idle = if player.calls() == calls { idle + 1 } else { 0 };
            calls = player.calls();
            let stalled = idle > STALL;
            if let Some(cause) = player.lost().or(stalled.then_some("it takes no more sound")) {
                let cause = cause.lines().next().unwrap_or_default().trim_end_matches('.');
                return Err(Error::invalid(format!("the sound device is lost after {:.2} s: {cause}", position())));
            }
            if self.stop.load(Ordering::Relaxed) && !leaving {
                player.leave();
                leaving = true;
            }
            self.screen.draw(position(), self.seconds, || player.peak(), self.paused);
            self.keys(Some(player));
        };
        // what the device holds is still to be heard
        std::thread::sleep(tail + Duration::from_millis(if leaving { 10 } else { 100 }));
        let (count, missing) = player.underruns();
        let gaps = match count {
            0 => "no underrun".to_string(),
            1 => format!("1 underrun ({missing} samples)"),
            count => format!("{count} underruns ({missing} samples)"),
        };
        Ok(format!(
            "{:.2} s played at {} Hz, {} channel{}, {}: {gaps}",
            position(),
            card.sample_rate(),
            card.channels(),
            if card.channels() == 1 { "" } else { "s" },
            card.format(),
        ))
    }

    /// Waits a tick, or for a key and does what it asks.
    fn keys(&mut self, player: Option<&Player>) {
        match self.screen.key(TICK) {
            Some(Key::Leave) => self.stop.store(true, Ordering::Relaxed),
            Some(Key::Interrupt) => {
                self.interrupted.store(true, Ordering::Relaxed);
                self.stop.store(true, Ordering::Relaxed);
            }
            Some(Key::Pause) => {
                self.paused = !self.paused;
                player.iter().for_each(|player| player.pause(self.paused));
            }
            None => {}
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

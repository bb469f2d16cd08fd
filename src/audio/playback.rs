//! The sound card: samples go through a lock-free ring to a callback that only copies, mutes and
//! counts.

use crate::{Error, Result};
use cpal::traits::{DeviceTrait, HostTrait, StreamTrait};
use cpal::{
    BufferSize, Device, ErrorKind, OutputCallbackInfo, SampleFormat, SizedSample, StreamConfig, SupportedBufferSize,
    SupportedStreamConfigRange,
};
use rtrb::{Consumer, Producer, RingBuffer};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Time of a fade, seconds: pausing, going on, leaving.
const FADE: f32 = 0.005;
/// Periods in a device's buffer, as cpal asks for them.
const PERIODS: u32 = 2;
/// How long the feeding thread sleeps while the ring is full.
const NAP: Duration = Duration::from_millis(2);

/// Keeps the system's sound library from writing to standard error, in this thread.
fn quiet() {
    #[cfg(target_os = "linux")]
    drop(alsa::Output::local_error_handler());
}

/// A device that sound can go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName {
    /// What `--device` takes.
    pub id: String,
    /// What it is.
    pub description: String,
}

/// The devices there are.
///
/// # Errors
/// If the system has no sound at all.
pub fn devices() -> Result<Vec<DeviceName>> {
    quiet();
    Ok(all_devices()?.into_iter().map(|(name, _)| name).collect())
}

fn all_devices() -> Result<Vec<(DeviceName, Device)>> {
    let devices = cpal::default_host().output_devices().map_err(|e| cannot("list sound devices", &e))?;
    let named = devices.filter_map(|device| {
        let id = device.id().ok()?.id().to_string();
        let description = device.description().map(|d| d.name().to_string()).unwrap_or_default();
        Some((DeviceName { id, description }, device))
    });
    Ok(named.collect())
}

fn cannot(what: &str, cause: &cpal::Error) -> Error {
    let cause = cause.to_string();
    Error::invalid(format!("cannot {what}: {}", cause.lines().next().unwrap_or_default().trim_end_matches('.')))
}

/// A device and how it will be driven; nothing sounds yet.
pub struct Card {
    device: Device,
    config: StreamConfig,
    format: SampleFormat,
}

impl Card {
    /// Picks a device, or the default one, and the configuration nearest to mono sound at `rate`.
    ///
    /// # Errors
    /// If there is no such device (the message lists what there is), or it takes no sound of a kind
    /// we make.
    pub fn choose(name: Option<&str>, rate: u32, latency_ms: u32) -> Result<Self> {
        quiet();
        let device = match name {
            None => cpal::default_host()
                .default_output_device()
                .ok_or_else(|| Error::invalid("there is no sound device"))?,
            Some(name) => named(name)?,
        };
        let ranges = device.supported_output_configs().map_err(|e| cannot("open the sound device", &e))?;
        let best = ranges.filter_map(|range| rank(&range, rate)).min_by_key(|(rank, ..)| *rank);
        let Some((_, range, rate)) = best else {
            return Err(Error::invalid("the sound device takes neither f32, i32, i16 nor u16 samples"));
        };
        // the device's whole buffer is what is heard late
        let frames = (u64::from(rate) * u64::from(latency_ms) / 1000 / u64::from(PERIODS)).max(16) as u32;
        let buffer_size = match range.buffer_size() {
            SupportedBufferSize::Range { min, max } => BufferSize::Fixed(frames.clamp(*min, *max)),
            SupportedBufferSize::Unknown => BufferSize::Fixed(frames),
        };
        let config = StreamConfig { channels: range.channels(), sample_rate: rate, buffer_size };
        Ok(Self { device, config, format: range.sample_format() })
    }

    /// Samples per second that the device wants.
    pub fn sample_rate(&self) -> u32 {
        self.config.sample_rate
    }

    /// Channels that the device has: all of them get the sound.
    pub fn channels(&self) -> u16 {
        self.config.channels
    }

    /// The kind of samples that the device takes.
    pub fn format(&self) -> String {
        self.format.to_string()
    }

    /// Opens the device with a ring of `capacity` samples before it. Nothing sounds before
    /// [`Player::start`].
    ///
    /// # Errors
    /// If the device is busy or gone.
    pub fn open(&self, capacity: usize, volume: f32) -> Result<(Player, Feed)> {
        let (producer, consumer) = RingBuffer::new(capacity.max(1));
        let shared = Arc::new(Shared::default());
        let tap = Tap {
            consumer,
            shared: shared.clone(),
            gain: 1.0,
            step: 1.0 / (FADE * self.config.sample_rate as f32),
            volume,
            channels: usize::from(self.config.channels),
            starving: false,
        };
        let stream = match self.format {
            SampleFormat::F32 => self.build::<f32>(tap),
            SampleFormat::I32 => self.build::<i32>(tap),
            SampleFormat::U16 => self.build::<u16>(tap),
            _ => self.build::<i16>(tap),
        };
        let stream = stream.map_err(|e| cannot("open the sound device", &e))?;
        Ok((Player { stream, shared: shared.clone() }, Feed { producer, shared }))
    }

    fn build<T: Quantised>(&self, mut tap: Tap) -> Result<cpal::Stream, cpal::Error> {
        let shared = tap.shared.clone();
        let heard = move |error: cpal::Error| match error.kind() {
            ErrorKind::Xrun => drop(shared.device_underruns.fetch_add(1, Ordering::Relaxed)),
            ErrorKind::DeviceNotAvailable
            | ErrorKind::DeviceBusy
            | ErrorKind::HostUnavailable
            | ErrorKind::StreamInvalidated => drop(shared.lost.set(error.to_string())),
            // a card may fail to tell its delay, and plays all the same
            _ => {}
        };
        let fill = move |out: &mut [T], info: &OutputCallbackInfo| tap.fill(out, info);
        self.device.build_output_stream(self.config, fill, heard, None)
    }
}

fn named(name: &str) -> Result<Device> {
    let all = all_devices()?;
    let matches = |d: &DeviceName| d.id == name || d.description == name;
    let known: Vec<String> = all.iter().map(|(d, _)| d.id.clone()).collect();
    all.into_iter().find(|(d, _)| matches(d)).map(|(_, device)| device).ok_or_else(|| {
        let there = if known.is_empty() { "there is none".into() } else { format!("there are {}", known.join(", ")) };
        Error::invalid(format!("no sound device {name}; {there}"))
    })
}

/// How well a configuration suits us (less is better), and at which rate.
fn rank(range: &SupportedStreamConfigRange, rate: u32) -> Option<((u32, u32, usize), SupportedStreamConfigRange, u32)> {
    let formats = [SampleFormat::F32, SampleFormat::I32, SampleFormat::I16, SampleFormat::U16];
    let format = formats.iter().position(|f| *f == range.sample_format())?;
    let (min, max) = (range.min_sample_rate(), range.max_sample_rate());
    // our own rate, or the lowest above it (48 kHz before exotic ones), or the highest below
    let (distance, rate) = match rate {
        rate if (min..=max).contains(&rate) => (0, rate),
        rate if min > rate && (min..=max).contains(&48_000) => (1, 48_000),
        rate if min > rate => (2, min),
        _ => (3, max),
    };
    // stereo before surround; mono is best
    let channels = u32::from(range.channels());
    Some(((distance, channels, format), *range, rate))
}

/// What the callback, the feeding thread and the watching thread share.
#[derive(Default)]
struct Shared {
    paused: AtomicBool,
    leaving: AtomicBool,
    /// Everything has been fed.
    ended: AtomicBool,
    /// Everything has been handed to the device, or faded out.
    drained: AtomicBool,
    /// Samples handed to the device.
    played: AtomicU64,
    /// Calls of the callback.
    calls: AtomicU64,
    /// Gaps in the sound, and the samples they lasted.
    underruns: AtomicU64,
    missing: AtomicU64,
    /// Underruns that the device reports.
    device_underruns: AtomicU64,
    /// Loudest sample since it was asked for, as bits.
    peak: AtomicU32,
    /// What the device still had to play when everything was handed over, microseconds.
    tail: AtomicU64,
    lost: OnceLock<String>,
}

/// A sample as a device takes it.
trait Quantised: SizedSample {
    /// The nearest to a value within ±1: integers are those of [`wav`](super::wav).
    fn nearest(value: f32) -> Self;
}

impl Quantised for f32 {
    fn nearest(value: f32) -> Self {
        value
    }
}

impl Quantised for i32 {
    fn nearest(value: f32) -> Self {
        // the conversion saturates
        (f64::from(value) * 2_147_483_648.0).round() as i32
    }
}

impl Quantised for i16 {
    fn nearest(value: f32) -> Self {
        (value * 32_768.0).round() as i16
    }
}

impl Quantised for u16 {
    fn nearest(value: f32) -> Self {
        // silence stands in the middle
        (i16::nearest(value) as u16) ^ 0x8000
    }
}

/// The callback's end.
struct Tap {
    consumer: Consumer<f32>,
    shared: Arc<Shared>,
    gain: f32,
    step: f32,
    volume: f32,
    channels: usize,
    starving: bool,
}

impl Tap {
    fn fill<T: Quantised>(&mut self, out: &mut [T], info: &OutputCallbackInfo) {
        let shared = &*self.shared;
        let leaving = shared.leaving.load(Ordering::Relaxed);
        let target = if leaving || shared.paused.load(Ordering::Relaxed) { 0.0 } else { 1.0 };
        // there is nothing to fade out where pausing came before the first sound
        if shared.calls.fetch_add(1, Ordering::Relaxed) == 0 {
            self.gain = target;
        }
        // read before the ring: what was fed before it was set is then in the ring
        let ended = shared.ended.load(Ordering::Acquire);
        let (mut peak, mut played, mut missing) = (0.0_f32, 0, 0);
        let mut drained = false;
        for frame in out.chunks_mut(self.channels) {
            if self.gain < target {
                self.gain = (self.gain + self.step).min(target);
            } else if self.gain > target {
                self.gain = (self.gain - self.step).max(target);
            }
            let mut value = 0.0;
            if self.gain == 0.0 && target == 0.0 {
                drained |= leaving;
            } else if let Ok(sample) = self.consumer.pop() {
                value = sample * self.gain * self.volume;
                peak = peak.max(value.abs());
                played += 1;
                self.starving = false;
            } else if ended || leaving {
                drained = true;
            } else {
                missing += 1;
                if !self.starving {
                    shared.underruns.fetch_add(1, Ordering::Relaxed);
                }
                self.starving = true;
            }
            frame.fill(T::nearest(value.clamp(-1.0, 1.0)));
        }
        shared.peak.fetch_max(peak.to_bits(), Ordering::Relaxed);
        shared.played.fetch_add(played, Ordering::Relaxed);
        shared.missing.fetch_add(missing, Ordering::Relaxed);
        if drained && !shared.drained.load(Ordering::Relaxed) {
            let at = info.timestamp();
            let tail = at.playback.saturating_duration_since(at.callback);
            shared.tail.store(tail.as_micros() as u64, Ordering::Relaxed);
            shared.drained.store(true, Ordering::Release);
        }
    }
}

/// Where samples go in.
pub struct Feed {
    producer: Producer<f32>,
    shared: Arc<Shared>,
}

impl Feed {
    /// Puts samples into the ring; gives how many found room.
    pub fn offer(&mut self, samples: &[f32]) -> usize {
        let (taken, _) = self.producer.push_partial_slice(samples);
        taken.len()
    }

    /// Puts samples into the ring and waits while it is full; `false` if nobody takes them any more
    /// or `gone` says so.
    pub fn put(&mut self, mut samples: &[f32], gone: impl Fn() -> bool) -> bool {
        loop {
            samples = &samples[self.offer(samples)..];
            if samples.is_empty() {
                return true;
            }
            if gone() || self.producer.is_abandoned() || self.shared.lost.get().is_some() {
                return false;
            }
            std::thread::sleep(NAP);
        }
    }

    /// Says that no more will come.
    pub fn end(&self) {
        self.shared.ended.store(true, Ordering::Release);
    }
}

/// The playing device.
pub struct Player {
    stream: cpal::Stream,
    shared: Arc<Shared>,
}

impl Player {
    /// Lets it sound.
    ///
    /// # Errors
    /// If the device doesn't.
    pub fn start(&self) -> Result<()> {
        self.stream.play().map_err(|e| cannot("start the sound device", &e))
    }

    /// Fades out and holds, or goes on.
    pub fn pause(&self, paused: bool) {
        self.shared.paused.store(paused, Ordering::Relaxed);
    }

    /// Fades out and ends.
    pub fn leave(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
    }

    /// Once everything has been handed over (or faded out): the time until it has been heard.
    pub fn drained(&self) -> Option<Duration> {
        let drained = self.shared.drained.load(Ordering::Acquire);
        drained.then(|| Duration::from_micros(self.shared.tail.load(Ordering::Relaxed)))
    }

    /// What went wrong with the device, if it is lost.
    pub fn lost(&self) -> Option<&str> {
        self.shared.lost.get().map(String::as_str)
    }

    /// Samples handed to the device.
    pub fn played(&self) -> u64 {
        self.shared.played.load(Ordering::Relaxed)
    }

    /// Calls of the callback so far: one that stands still is a device that has gone.
    pub fn calls(&self) -> u64 {
        self.shared.calls.load(Ordering::Relaxed)
    }

    /// Gaps so far, ours and the device's, and the samples that ours lasted.
    pub fn underruns(&self) -> (u64, u64) {
        let shared = &self.shared;
        let count = shared.underruns.load(Ordering::Relaxed) + shared.device_underruns.load(Ordering::Relaxed);
        (count, shared.missing.load(Ordering::Relaxed))
    }

    /// The loudest sample since the last call.
    pub fn peak(&self) -> f32 {
        f32::from_bits(self.shared.peak.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpal::{OutputStreamTimestamp, StreamInstant};

    fn tap(channels: usize, samples: &[f32]) -> (Tap, Feed) {
        let (producer, consumer) = RingBuffer::new(1000);
        let shared = Arc::new(Shared::default());
        let tap =
            Tap { consumer, shared: shared.clone(), gain: 1.0, step: 0.01, volume: 1.0, channels, starving: false };
        let mut feed = Feed { producer, shared };
        assert_eq!(feed.offer(samples), samples.len());
        (tap, feed)
    }

    fn fill<T: Quantised>(tap: &mut Tap, frames: usize) -> Vec<T> {
        let mut out = vec![T::EQUILIBRIUM; frames * tap.channels];
        let at = OutputStreamTimestamp { callback: StreamInstant::ZERO, playback: StreamInstant::ZERO };
        tap.fill(&mut out, &OutputCallbackInfo::new(at));
        out
    }

    #[test]
    fn every_format_on_every_channel() {
        let samples = [0.0, 0.5, -0.5, 1.5, -1.5, 0.7 / 32_768.0, -0.5 / 32_768.0];
        let (mut a, _feed) = tap(2, &samples);
        assert_eq!(fill::<f32>(&mut a, 5), [0.0, 0.0, 0.5, 0.5, -0.5, -0.5, 1.0, 1.0, -1.0, -1.0]);
        let (mut a, _feed) = tap(1, &samples);
        assert_eq!(fill::<i16>(&mut a, 7), [0, 16_384, -16_384, 32_767, -32_768, 1, -1]);
        let (mut a, _feed) = tap(1, &samples);
        assert_eq!(fill::<u16>(&mut a, 7), [32_768, 49_152, 16_384, 65_535, 0, 32_769, 32_767]);
        let (mut a, _feed) = tap(3, &samples[..2]);
        assert_eq!(fill::<i32>(&mut a, 2), [0, 0, 0, 1 << 30, 1 << 30, 1 << 30]);
    }

    #[test]
    fn gaps_are_counted_and_the_end_is_none() {
        let (mut a, mut feed) = tap(1, &[0.1; 10]);
        assert_eq!(fill::<f32>(&mut a, 16)[10..], [0.0; 6]);
        assert_eq!(fill::<f32>(&mut a, 4), [0.0; 4]);
        feed.offer(&[0.2; 4]);
        assert_eq!(fill::<f32>(&mut a, 4), [0.2; 4]);
        let count = |a: &Tap| (a.shared.underruns.load(Ordering::Relaxed), a.shared.missing.load(Ordering::Relaxed));
        assert_eq!((count(&a), a.shared.drained.load(Ordering::Relaxed)), ((1, 10), false));
        feed.end();
        fill::<f32>(&mut a, 4);
        assert_eq!((count(&a), a.shared.drained.load(Ordering::Relaxed)), ((1, 10), true));
        assert_eq!(a.shared.played.load(Ordering::Relaxed), 14);
    }

    #[test]
    fn pausing_fades_and_keeps_what_is_not_heard() {
        let (mut a, _feed) = tap(1, &[1.0; 500]);
        fill::<f32>(&mut a, 10);
        a.shared.paused.store(true, Ordering::Relaxed);
        let out = fill::<f32>(&mut a, 200);
        assert!(out[..100].windows(2).all(|w| w[1] < w[0] && w[0] - w[1] < 0.02) && out[101..] == [0.0; 99]);
        let heard = a.shared.played.load(Ordering::Relaxed);
        assert!((109..=111).contains(&heard), "{heard}");
        a.shared.paused.store(false, Ordering::Relaxed);
        let out = fill::<f32>(&mut a, 200);
        assert!(out[..99].windows(2).all(|w| w[1] > w[0]) && out[100..] == [1.0; 100]);
        // leaving: a fade, then nothing, and that is the end
        a.shared.leaving.store(true, Ordering::Relaxed);
        let out = fill::<f32>(&mut a, 120);
        assert!(out[110..] == [0.0; 10] && a.shared.drained.load(Ordering::Relaxed));
    }
}

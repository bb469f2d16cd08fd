//! From mel to sound with a voice.

pub mod denoise;
mod guard;
pub mod noise;
mod pieces;
pub mod refine;
mod refine_live;
mod refine_stream;
mod sharpen;
pub mod stream;
pub(crate) mod trust;

use crate::audio::Waveform;
use crate::flow::Flow;
use crate::flow::filters::Filters;
use crate::flow::stream::{self as flow_stream, State};
use crate::kernels::choice::Kernel;
pub use crate::kernels::choice::Precision;
use crate::mel::MelSpectrogram;
use crate::voice::{Lookahead, SynthesisConfig, Voice, VoiceConfig};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use noise::Noise;
use refine::Refiner;
use sharpen::Sharpener;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
pub use stream::Streamer;
use trust::Trust;

/// Frames of a block at least: long enough for its halo to cost little, short enough to be cheap
/// to hold.
const MIN_BLOCK: usize = 256;

/// Bound of what leaves the flow, so that whatever follows stays finite: speech has residuals to about 11
/// (three-second stretches of six LJSpeech clips).
const MAX_RESIDUAL: f32 = 1e4;

/// Turns mels into sound with one voice.
///
/// The voice's parts are shared and never change: one vocoder serves any number of threads.
pub struct Vocoder {
    config: VoiceConfig,
    engine: Engine,
    refiner: Refiner,
    macs_per_sample: f64,
    precision: Precision,
}

/// How the flow runs.
#[expect(clippy::large_enum_variant, reason = "a vocoder has one, which never moves far")]
enum Engine {
    /// On slices, remembering its past.
    Stream(Packed),
    /// On tensors in blocks, for designs with a step that has no streaming form.
    Blocks(Flow, Option<Filters>),
}

/// A flow's inverse in streaming form.
struct Packed {
    flow: flow_stream::Packed,
    filters: Option<Filters>,
}

/// Where a recursion's drive is half way to that of training, as a part of the mel's range: at the top of
/// that, all but a fortieth is there.
const DRIVE_CORNER: f64 = 0.5;

/// How far a flow whose samples depend on all before them has come.
struct Turn {
    state: State,
    /// Frames that it was given.
    heard: usize,
    /// Samples that nobody has taken yet.
    ready: Vec<f32>,
}

/// Choices at synthesis; the default is the voice's own, with seed 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SynthOptions {
    /// Standard deviation of the latent noise, 0 to 10; `None`: the voice's.
    pub sigma: Option<f32>,
    /// How strongly the flow's last recursion is driven below the top of the mel, 0 to 2, 1 being what it was trained
    /// with; `None`: the voice's.
    pub drive: Option<f32>,
    /// Which noise.
    pub seed: u64,
    /// Passes of mel-consistency refinement, 0 to 1000; `None`: the voice's.
    pub refine: Option<usize>,
    /// How far beyond a hop refinement listens; `None`: the voice's.
    pub refine_lookahead: Option<Lookahead>,
    /// Whether mels that are smoother than speech are taken as all others are: refined, and not sharpened. No sound
    /// has them, and one that is bent towards them loses by it: acoustic models' mels sound better without.
    pub refine_smooth: bool,
    /// How much of their bands' differences is given back to mels that are smoother than speech, 0 to 2; `None`: 1, as
    /// measured best.
    pub sharpen: Option<f32>,
}

impl SynthOptions {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the option that is out of range.
    pub fn validate(&self) -> Result<()> {
        if let Some(sharpen) = self.sharpen.filter(|sharpen| !(0.0..=2.0).contains(sharpen)) {
            return Err(Error::invalid(format!("sharpen is {sharpen}, expected 0 to 2")));
        }
        self.or(&SynthesisConfig::new(1.0, 0)).validate()
    }

    /// These, and where nothing is said, a voice's.
    fn or(&self, voice: &SynthesisConfig) -> SynthesisConfig {
        SynthesisConfig {
            sigma: self.sigma.unwrap_or(voice.sigma),
            drive: self.drive.unwrap_or(voice.drive),
            refine: self.refine.unwrap_or(voice.refine),
            refine_lookahead: self.refine_lookahead.unwrap_or(voice.refine_lookahead),
        }
    }
}

impl Vocoder {
    /// Builds the voice's flow, to run in f32.
    ///
    /// # Errors
    /// If the weights don't fit the flow.
    pub fn new(voice: &Voice) -> Result<Self> {
        let flow = voice.build_frozen_flow()?;
        let config = voice.config().clone();
        let refiner = Refiner::new(&config.mel)?;
        let macs_per_sample = flow.macs_per_sample().max(1.0);
        let kernel = Kernel::chosen()?;
        let filters = flow.filters(kernel)?;
        let engine = match flow.pack(kernel)? {
            Some(flow) => Engine::Stream(Packed { flow, filters }),
            None => Engine::Blocks(flow, filters),
        };
        Ok(Self { config, engine, refiner, macs_per_sample, precision: Precision::F32 })
    }

    /// Builds the voice's flow, to run in the fastest precision whose effect can't be heard: integers of 16 bits, 58 dB
    /// and more below the sound, for WaveGlow's nets of 64 channels and more on processors with AVX2 or AVX-512; f32
    /// for all others.
    ///
    /// # Errors
    /// As [`Vocoder::new`].
    pub fn fastest(voice: &Voice) -> Result<Self> {
        let vocoder = Self::new(voice)?;
        let gains = vocoder.packed().is_some_and(|packed| packed.flow.gains_from_integers());
        vocoder.in_precision(if gains { Precision::Int16 } else { Precision::F32 })
    }

    /// Builds the voice's flow, to run in a precision as far as its design and the processor's kernels
    /// have it: [`Self::precision`] tells.
    ///
    /// # Errors
    /// As [`Vocoder::new`].
    pub fn with_precision(voice: &Voice, precision: Precision) -> Result<Self> {
        Self::new(voice)?.in_precision(precision)
    }

    /// A vocoder in f32 taken to another precision, as far as that goes.
    fn in_precision(mut self, precision: Precision) -> Result<Self> {
        if let (Some(numbers), Engine::Stream(packed)) = (precision.short(), &mut self.engine)
            && Kernel::chosen()?.takes(numbers)
            && packed.flow.quantise(numbers)
        {
            self.precision = precision;
        }
        Ok(self)
    }

    /// The precision that the flow runs in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether a sample depends on all before it, so that more than a few threads are little help within an utterance.
    pub(crate) fn recursive(&self) -> bool {
        self.packed().is_some_and(|packed| packed.flow.recursive())
    }

    /// What the voice and options come to.
    ///
    /// # Errors
    /// If an option is out of range, or the flow has nothing that it could be for.
    pub(crate) fn asked(&self, options: &SynthOptions) -> Result<SynthesisConfig> {
        options.validate()?;
        let asked = options.or(&self.config.synthesis);
        if asked.drive != 1.0 && !self.recursive() {
            let name = &self.config.name;
            return Err(Error::invalid(format!(
                "drive is {}, but the flow of {name} has no recursion that streams",
                asked.drive
            )));
        }
        Ok(asked)
    }

    /// Frames of a mel that are sharpened and not refined, since the mel is smoother than speech there: see
    /// [`SynthOptions::refine_smooth`].
    pub fn smooth_frames(&self, mel: &MelSpectrogram, options: &SynthOptions) -> usize {
        let mut sharpener = self.sharpener(options);
        sharpener.run(&mut mel.columns(0..mel.frames()));
        sharpener.smooth_frames()
    }

    /// What tells how far a mel can be trusted and gives it detail, before its first frame.
    fn sharpener(&self, options: &SynthOptions) -> Sharpener {
        let natural = self.config.trained_on.as_ref().and_then(|known| known.detail);
        let trust = Trust::new(&self.config.mel, natural.filter(|_| !options.refine_smooth));
        Sharpener::new(trust, options.sharpen.unwrap_or(1.0), &self.config.mel)
    }

    /// A flow before its first frame, driven.
    fn driven(&self, state: State, drive: f32) -> State {
        let mel = &self.config.mel;
        state.driven(drive, DRIVE_CORNER * mel.f_max / f64::from(mel.sample_rate))
    }

    fn packed(&self) -> Option<&Packed> {
        match &self.engine {
            Engine::Stream(packed) => Some(packed),
            Engine::Blocks(..) => None,
        }
    }

    /// The voice's configuration.
    pub fn config(&self) -> &VoiceConfig {
        &self.config
    }

    /// Multiply-adds of the flow per sample of sound, its convolutions counted plainly.
    pub fn macs_per_sample(&self) -> f64 {
        self.macs_per_sample
    }

    /// Speaks a mel: exactly `frames · hop_length` samples.
    ///
    /// The same mel, options and voice give the same samples, whatever the number of threads.
    /// `progress` is called now and then with the part of the work done, 0 to 1.
    ///
    /// # Errors
    /// If the mel has another number of bands than the voice, or an option is out of range.
    pub fn vocode(
        &self,
        mel: &MelSpectrogram,
        options: &SynthOptions,
        progress: Option<&dyn Fn(f32)>,
    ) -> Result<Waveform> {
        let mut samples = Vec::with_capacity(mel.frames() * self.config.mel.hop_length);
        self.vocode_in_pieces(mel, options, progress, |piece| {
            samples.extend_from_slice(piece);
            Ok::<_, Error>(())
        })?;
        Ok(Waveform { samples, sample_rate: self.config.mel.sample_rate })
    }

    /// Level of the residual of speech, where the voice says it.
    fn residual_level(&self) -> Option<f32> {
        self.config.trained_on.as_ref()?.residual_level
    }

    /// The mel with detail, within what the voice has heard in training, and which frames the refinement, which sees
    /// it as it is, is to trust.
    fn known<'a>(
        &self,
        mel: &'a MelSpectrogram,
        options: &SynthOptions,
    ) -> Result<(Cow<'a, MelSpectrogram>, Vec<bool>)> {
        let Some(trained_on) = &self.config.trained_on else {
            return Ok((Cow::Borrowed(mel), vec![true; mel.frames()]));
        };
        let mut columns = mel.columns(0..mel.frames());
        let trusted = self.sharpener(options).run(&mut columns);
        trained_on.bound(&mut columns);
        Ok((Cow::Owned(MelSpectrogram::new(columns, mel.frames())?.transposed()), trusted))
    }

    /// The flow's inverse of noise for the frames of a range. If the nets are small and the range is
    /// long, each thread has a stretch of frames, with what lies within its reach on either side.
    fn residual(
        &self,
        packed: &Packed,
        mel: &MelSpectrogram,
        range: Range<usize>,
        (noise, sigma): (&Noise, f32),
        progress: &dyn Fn(f32),
    ) -> Vec<f32> {
        let (hop, n_mels) = (self.config.mel.hop_length, mel.n_mels());
        let (halo, frames) = (packed.flow.reach_frames(), packed.flow.piece_frames(1));
        let threads = rayon::current_num_threads();
        let stretches = if packed.flow.shares_well(frames) { 1 } else { range.len() / (4 * halo + frames) };
        let workers = threads.min(stretches).max(1);
        // without a stretch for each, they share the pieces
        let threads = if workers == 1 { threads } else { 1 };
        let frames = packed.flow.piece_frames(threads);
        let stretch = range.len().div_ceil(workers);
        let seen = range.start.saturating_sub(halo)..(range.end + halo).min(mel.frames());
        let columns = mel.columns(seen.clone());
        let mut residual = vec![0.0; range.len() * hop];
        let (sender, done) = mpsc::channel();
        std::thread::scope(|scope| {
            for (i, out) in residual.chunks_mut(stretch * hop).enumerate() {
                let (sender, columns) = (sender.clone(), &columns);
                let start = range.start + i * stretch;
                let (from, to) = (start.saturating_sub(halo), (start + out.len() / hop + halo).min(seen.end));
                scope.spawn(move || {
                    let draw = |step: usize, rows: &mut [f32]| {
                        noise.fill_scaled(from * hop + step * packed.flow.group, sigma, rows);
                    };
                    let mut state = State::new(&packed.flow, threads);
                    // samples to drop in front, and where the next go
                    let (mut skip, mut at) = ((start - from) * hop, 0);
                    let mut piece = Vec::new();
                    for first in (from..to).step_by(frames) {
                        let end = (first + frames).min(to);
                        let rows = &columns[(first - seen.start) * n_mels..(end - seen.start) * n_mels];
                        piece.clear();
                        state.push(&packed.flow, rows, end == to, draw, &mut piece);
                        let dropped = skip.min(piece.len());
                        skip -= dropped;
                        let count = (piece.len() - dropped).min(out.len() - at);
                        out[at..at + count].copy_from_slice(&piece[dropped..dropped + count]);
                        at += count;
                        // that nobody listens is no reason to stop
                        let _ = sender.send(end - first);
                    }
                });
            }
            drop(sender);
            let total = (seen.len() + 2 * halo * (workers - 1)) as f32;
            let mut sum = 0;
            for count in done {
                sum += count;
                progress((sum as f32 / total).min(1.0));
            }
        });
        residual
    }

    /// [`residual`](Self::residual) of a flow whose samples depend on all before them: range follows range, and
    /// `turn` remembers what was.
    fn residual_in_turn(
        &self,
        packed: &Packed,
        mel: &MelSpectrogram,
        range: Range<usize>,
        (noise, sigma): (&Noise, f32),
        turn: &mut Turn,
        progress: &dyn Fn(f32),
    ) -> Vec<f32> {
        let hop = self.config.mel.hop_length;
        let draw = |step: usize, rows: &mut [f32]| noise.fill_scaled(step * packed.flow.group, sigma, rows);
        let wanted = range.len() * hop;
        let at_once = packed.flow.piece_frames(1);
        turn.ready.reserve((wanted + at_once * hop).saturating_sub(turn.ready.len()));
        while turn.ready.len() < wanted && (turn.heard < mel.frames() || turn.state.under_way()) {
            if turn.heard < mel.frames() {
                let end = (turn.heard + at_once).min(mel.frames());
                let frames = mel.columns(turn.heard..end);
                turn.state.push(&packed.flow, &frames, end == mel.frames(), draw, &mut turn.ready);
                turn.heard = end;
            } else {
                turn.state.go_on(&packed.flow, &mut turn.ready);
            }
            progress((turn.ready.len() as f32 / wanted as f32).min(1.0));
        }
        let rest = turn.ready.split_off(wanted);
        std::mem::replace(&mut turn.ready, rest)
    }

    /// Frames of a block, and of its halo on either side; all of them where the inverse's reach has no
    /// limit.
    fn block_frames(&self, flow: &Flow, frames: usize) -> (usize, usize) {
        match flow.halo_steps() {
            Some(steps) => {
                let halo = (steps * flow.group()).div_ceil(self.config.mel.hop_length);
                (MIN_BLOCK.max(8 * halo), halo)
            }
            None => (frames, 0),
        }
    }

    /// The flow's inverse of noise for the frames of a range, in blocks at fixed positions from its
    /// start, several at a time.
    ///
    /// Each worker has its own small thread pool: in a common one, a worker that waits for a part
    /// of its block would take up another block and hold the memory of both.
    fn residual_in_blocks(
        &self,
        flow: &Flow,
        mel: &MelSpectrogram,
        range: Range<usize>,
        (noise, sigma): (&Noise, f32),
        progress: &dyn Fn(f32),
    ) -> Result<Vec<f32>> {
        let hop = self.config.mel.hop_length;
        let (block, halo) = self.block_frames(flow, mel.frames());
        let mut residual = vec![0.0; range.len() * hop];
        let blocks = range.len().div_ceil(block);
        let (threads, first_frame) = (rayon::current_num_threads(), range.start);
        let workers = threads.min(blocks);

        let work = Mutex::new(residual.chunks_mut(block * hop).enumerate());
        let next = || work.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        let failed = AtomicBool::new(false);
        let (done, finished) = mpsc::channel();
        let mut failure: Option<(usize, Error)> = None;
        std::thread::scope(|scope| -> Result<()> {
            for _ in 0..workers {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads((threads / workers).max(1))
                    .build()
                    .map_err(|e| Error::invalid(format!("cannot start threads: {e}")))?;
                let (done, next, failed) = (done.clone(), &next, &failed);
                scope.spawn(move || {
                    while !failed.load(Ordering::Relaxed)
                        && let Some((index, out)) = next()
                    {
                        let start = first_frame + index * block;
                        let result = pool.install(|| self.block(flow, mel, (start, halo), (noise, sigma), out));
                        failed.fetch_or(result.is_err(), Ordering::Relaxed);
                        if done.send((index, result)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(done);
            for (count, (index, result)) in finished.iter().enumerate() {
                if let Err(error) = result
                    && failure.as_ref().is_none_or(|(first, _)| index < *first)
                {
                    failure = Some((index, error));
                }
                progress((count + 1) as f32 / blocks as f32);
            }
            Ok(())
        })?;
        match failure {
            Some((_, error)) => Err(error),
            None => Ok(residual),
        }
    }

    /// One block: frames from `start` for as long as `out` is, worked out with `halo` frames more
    /// on each side where the mel has them.
    fn block(
        &self,
        flow: &Flow,
        mel: &MelSpectrogram,
        (start, halo): (usize, usize),
        (noise, sigma): (&Noise, f32),
        out: &mut [f32],
    ) -> Result<()> {
        let (hop, group) = (self.config.mel.hop_length, flow.group());
        let from = start.saturating_sub(halo);
        let to = (start + out.len() / hop + halo).min(mel.frames());
        let (first_step, steps) = (from * hop / group, (to - from) * hop / group);
        let z = noise.latents(first_step, steps, group, sigma);
        let z = Tensor::from_vec(z, (1, group, steps), &Device::Cpu)?;
        let window = flow.mel_window(mel, from, to - from)?;
        let samples = flow.inverse(&z, &window)?.flatten_all()?;
        let samples = samples.narrow(0, (start - from) * hop, out.len())?.to_vec1::<f32>()?;
        out.copy_from_slice(&samples);
        Ok(())
    }
}

/// Brings what leaves the flow into a range in which all that follows is finite; what isn't a number
/// becomes 0.
fn bound(residual: &mut [f32]) {
    for e in residual {
        *e = if e.is_nan() { 0.0 } else { e.clamp(-MAX_RESIDUAL, MAX_RESIDUAL) };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::flow::FlowConfig;
    use crate::flow::config::{Block, ConditioningConfig, StepConfig, WaveNetConfig};
    use crate::mel::MelConfig;
    use crate::net::Params;
    use crate::net::params::scattered;

    /// A voice whose parameters are away from the identity that training begins with.
    pub fn seeded(name: &str, mel: MelConfig, flow: FlowConfig, synthesis: SynthesisConfig) -> Voice {
        let params = Params::seeded(1, &Device::Cpu);
        Flow::new(&flow, &mel, params.builder()).unwrap();
        let tensors: Vec<_> = params
            .named()
            .into_iter()
            .enumerate()
            .map(|(i, (name, var))| {
                let size = if name.contains(".end.") { 0.3 } else { 0.0 };
                let moved = (var.as_tensor() + scattered(i as u64, size, var.shape())).unwrap();
                (name, moved)
            })
            .collect();
        Voice::from_parts(VoiceConfig::new(name, mel, flow, synthesis), &tensors).unwrap()
    }

    #[test]
    fn a_design_that_cannot_stream_speaks_in_blocks() {
        let mel = MelConfig { n_fft: 64, win_length: 64, hop_length: 16, n_mels: 5, ..MelConfig::nvidia() };
        let dilations = vec![1, 2, 4];
        let net = WaveNetConfig { channels: 6, kernel: 3, dilations, weight_norm: true, skip: true, causal: false };
        let steps = vec![StepConfig::mix(), StepConfig::coupling(net, Some(2.0))];
        let flow = FlowConfig::new(
            ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: false },
            4,
            vec![Block { repeat: 2, steps }],
        );
        let voice = seeded("small", mel, flow, SynthesisConfig::new(0.7, 0));
        let stream = Vocoder::new(&voice).unwrap();
        let blocks =
            Vocoder { engine: Engine::Blocks(voice.build_flow().unwrap().0, None), ..Vocoder::new(&voice).unwrap() };

        let mel = MelSpectrogram::new((0..5 * 600).map(|i| (i as f32 * 0.7).sin() - 4.0).collect(), 5).unwrap();
        let speak = |vocoder: &Vocoder| vocoder.vocode(&mel, &SynthOptions::default(), None).unwrap().samples;
        let (a, b) = (speak(&stream), speak(&blocks));
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 && a.iter().any(|s| s.abs() > 0.1), "{worst}");
        let error = blocks.stream(&SynthOptions::default()).err().unwrap();
        assert_eq!(error.to_string(), "voice small cannot stream: a step of its flow has no streaming form");
    }
}

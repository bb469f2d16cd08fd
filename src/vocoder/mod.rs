//! From mel to sound with a voice.

pub mod noise;
pub mod refine;

use crate::audio::Waveform;
use crate::flow::Flow;
use crate::mel::MelSpectrogram;
use crate::voice::{SynthesisConfig, Voice, VoiceConfig};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use noise::Noise;
use refine::Refiner;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

/// Frames of a block at least: long enough for its halo to cost little, short enough to be cheap
/// to hold.
const MIN_BLOCK: usize = 256;

/// Arithmetic of one refinement pass over one sample, in multiply-adds of the flow: a measured
/// ratio of times, for progress alone.
const REFINE_COST: f64 = 1000.0;

/// Turns mels into sound with one voice.
///
/// The voice's parts are shared and never change: one vocoder serves any number of threads.
pub struct Vocoder {
    config: VoiceConfig,
    flow: Flow,
    refiner: Refiner,
}

/// Choices at synthesis; the default is the voice's own, with seed 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SynthOptions {
    /// Standard deviation of the latent noise, 0 to 10; `None`: the voice's.
    pub sigma: Option<f32>,
    /// Which noise.
    pub seed: u64,
    /// Passes of mel-consistency refinement, 0 to 1000; `None`: the voice's.
    pub refine: Option<usize>,
}

impl SynthOptions {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the option that is out of range.
    pub fn validate(&self) -> Result<()> {
        let (sigma, refine) = (self.sigma.unwrap_or_default(), self.refine.unwrap_or_default());
        SynthesisConfig { sigma, refine }.validate()
    }
}

impl Vocoder {
    /// Builds the voice's flow.
    ///
    /// # Errors
    /// If the weights don't fit the flow.
    pub fn new(voice: &Voice) -> Result<Self> {
        let flow = voice.build_frozen_flow()?;
        let config = voice.config().clone();
        let refiner = Refiner::new(&config.mel)?;
        Ok(Self { config, flow, refiner })
    }

    /// The voice's configuration.
    pub fn config(&self) -> &VoiceConfig {
        &self.config
    }

    /// Bytes that [`Vocoder::vocode`] holds at most for a mel of `frames` frames, beside the
    /// activations of one block per thread.
    pub fn memory(&self, frames: usize) -> usize {
        let mel = &self.config.mel;
        // the mel and its transpose; residual or output, estimate, its predecessor, extrapolation
        frames.saturating_mul(4 * (2 * mel.n_mels + 4 * mel.hop_length))
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
        let config = &self.config;
        if mel.n_mels() != config.mel.n_mels {
            return Err(Error::invalid(format!(
                "the mel has {} bands, voice {} expects {}",
                mel.n_mels(),
                config.name,
                config.mel.n_mels
            )));
        }
        options.validate()?;
        let sigma = options.sigma.unwrap_or(config.synthesis.sigma);
        let refine = options.refine.unwrap_or(config.synthesis.refine);

        let flow_cost = self.flow.macs_per_sample().max(1.0);
        let flow_share = (flow_cost / (flow_cost + REFINE_COST * refine as f64)) as f32;
        let report = |part: f32| progress.iter().for_each(|progress| progress(part));
        let residual = self.residual(mel, sigma, options.seed, &|part| report(part * flow_share))?;
        let samples = self.flow.unwhiten(&residual, mel)?;
        drop(residual);
        let samples = self.refiner.refine(samples, mel, refine, &|part| {
            report(flow_share + part * (1.0 - flow_share));
        })?;
        report(1.0);
        Ok(Waveform { samples, sample_rate: config.mel.sample_rate })
    }

    /// The flow's inverse of noise, in blocks at fixed positions, several at a time.
    ///
    /// Each worker has its own small thread pool: in a common one, a worker that waits for a part
    /// of its block would take up another block and hold the memory of both.
    fn residual(&self, mel: &MelSpectrogram, sigma: f32, seed: u64, progress: &dyn Fn(f32)) -> Result<Vec<f32>> {
        let hop = self.config.mel.hop_length;
        let halo = (self.flow.halo_steps() * self.flow.group()).div_ceil(hop);
        let block = MIN_BLOCK.max(8 * halo);
        let mut residual = vec![0.0; mel.frames() * hop];
        let blocks = mel.frames().div_ceil(block);
        let threads = rayon::current_num_threads();
        let workers = threads.min(blocks);
        let noise = Noise::new(seed);

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
                        let start = index * block;
                        let result = pool.install(|| self.block(mel, start, halo, &noise, sigma, out));
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
        mel: &MelSpectrogram,
        start: usize,
        halo: usize,
        noise: &Noise,
        sigma: f32,
        out: &mut [f32],
    ) -> Result<()> {
        let (hop, group) = (self.config.mel.hop_length, self.flow.group());
        let from = start.saturating_sub(halo);
        let to = (start + out.len() / hop + halo).min(mel.frames());
        let (first_step, steps) = (from * hop / group, (to - from) * hop / group);
        let z = noise.latents(first_step, steps, group, sigma);
        let z = Tensor::from_vec(z, (1, group, steps), &Device::Cpu)?;
        let window = self.flow.mel_window(mel, from, to - from)?;
        let samples = self.flow.inverse(&z, &window)?.flatten_all()?;
        let samples = samples.narrow(0, (start - from) * hop, out.len())?.to_vec1::<f32>()?;
        out.copy_from_slice(&samples);
        Ok(())
    }
}

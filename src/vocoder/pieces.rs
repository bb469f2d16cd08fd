//! Sound in pieces: however long a mel is, no more than a piece of its sound is held.

use super::noise::Noise;
use super::refine_live::LiveRefinement;
use super::{Engine, SynthOptions, Turn, Vocoder, bound, guard};
use crate::flow::stream::State;
use crate::mel::MelSpectrogram;
use crate::voice::{Lookahead, SynthesisConfig};
use crate::{Error, Result};

/// Frames of a piece at least: a minute and a half of sound, of which the halo of sixty passes of
/// refinement is a small part.
const PIECE: usize = 8192;

/// Arithmetic of one refinement pass over one sample, in multiply-adds of the flow: a measured
/// ratio of times, for progress alone.
const REFINE_COST: f64 = 1000.0;

impl Vocoder {
    /// Bytes that [`Vocoder::vocode_in_pieces`] holds at most for a mel of `frames` frames with
    /// `passes` of refinement (`None`: the voice's), beside the activations of one block per thread.
    pub fn memory(&self, frames: usize, passes: Option<usize>) -> usize {
        let mel = &self.config.mel;
        let halo = self.refiner.reach(passes.unwrap_or(self.config.synthesis.refine));
        let filters = self.config.flow.whitening.as_ref().map_or(0, |w| w.order * w.filters_per_hop);
        // the mel's part twice, filters; residual, sound, refinement's estimate, its predecessor, result
        let piece = frames.min(PIECE + 2 * halo) * (2 * mel.n_mels + filters + 5 * mel.hop_length);
        4 * (frames.saturating_mul(mel.n_mels + 1) + piece)
    }

    /// [`Vocoder::vocode`] in little memory: `sink` gets the samples in pieces as they are made, the
    /// same samples.
    ///
    /// # Errors
    /// As [`Vocoder::vocode`], and what `sink` returns.
    pub fn vocode_in_pieces<E: From<Error>>(
        &self,
        mel: &MelSpectrogram,
        options: &SynthOptions,
        progress: Option<&dyn Fn(f32)>,
        sink: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.speak(mel, options, progress, PIECE, sink)
    }

    /// [`Vocoder::vocode_in_pieces`] with pieces of at least `piece` frames.
    fn speak<E: From<Error>>(
        &self,
        mel: &MelSpectrogram,
        options: &SynthOptions,
        progress: Option<&dyn Fn(f32)>,
        piece: usize,
        mut sink: impl FnMut(&[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let config = &self.config;
        if mel.n_mels() != config.mel.n_mels {
            return Err(E::from(Error::invalid(format!(
                "the mel has {} bands, voice {} expects {}",
                mel.n_mels(),
                config.name,
                config.mel.n_mels
            ))));
        }
        let SynthesisConfig { sigma, drive, refine: passes, refine_lookahead } = self.asked(options)?;
        let (noise, hop, frames) = (Noise::new(options.seed), config.mel.hop_length, mel.frames());
        let mut live = match refine_lookahead {
            Lookahead::Frames(ahead) if passes > 0 => {
                Some(LiveRefinement::new(&self.refiner, mel.n_mels(), passes, ahead))
            }
            _ => None,
        };
        let halo = self.refiner.reach(passes);
        let (known, trusted) = self.known(mel, options)?;
        let (piece, filters) = match &self.engine {
            Engine::Stream(packed) => (piece, &packed.filters),
            // blocks keep their places
            Engine::Blocks(flow, filters) => (piece.next_multiple_of(self.block_frames(flow, frames).0), filters),
        };

        let flow_share = self.macs_per_sample / (self.macs_per_sample + REFINE_COST * passes as f64);
        // frames of which the flow, and the refinement, are done
        let report = |flowed: f32, refined: f32| {
            let part = (flow_share as f32 * flowed + (1.0 - flow_share as f32) * refined) / frames as f32;
            progress.iter().for_each(|progress| progress(part.min(1.0)));
        };
        let (mut past, mut held, mut held_from, mut refined) = (Vec::new(), Vec::new(), 0, 0);
        let mut turn = self.packed().filter(|packed| packed.flow.recursive()).map(|packed| Turn {
            state: self.driven(
                match rayon::current_num_threads() {
                    1 => State::new(&packed.flow, 1),
                    _ => State::in_sections(&packed.flow),
                },
                drive,
            ),
            heard: 0,
            ready: Vec::new(),
        });
        for start in (0..frames).step_by(piece) {
            let end = (start + piece).min(frames);
            let flowing = |part: f32| report(start as f32 + part * (end - start) as f32, refined as f32);
            let draw = (&noise, sigma);
            let mut residual = match (&self.engine, &mut turn) {
                (Engine::Stream(packed), Some(turn)) => {
                    self.residual_in_turn(packed, &known, start..end, draw, turn, &flowing)
                }
                (Engine::Stream(packed), None) => self.residual(packed, &known, start..end, draw, &flowing),
                (Engine::Blocks(flow, _), _) => self.residual_in_blocks(flow, &known, start..end, draw, &flowing)?,
            };
            if let Some(level) = self.residual_level() {
                guard::repair(&mut residual, hop, start, level, (&noise, sigma * drive));
            }
            bound(&mut residual);
            let sound = match filters {
                Some(filters) => filters.inverse(&residual, &known, start..end, &mut past),
                None => residual,
            };
            if let Some(live) = &mut live {
                live.aim(&mel.columns(start..end), &trusted[start..end]);
                let mut out = Vec::with_capacity(sound.len());
                live.push(&self.refiner, &sound, end == frames, &mut out);
                refined += out.len() / hop;
                report(end as f32, refined as f32);
                sink(&out)?;
                continue;
            }
            // what the frames to come don't reach
            let ready = if end == frames { frames } else { end.saturating_sub(halo) };
            if held.is_empty() {
                held = sound;
            } else {
                held.extend_from_slice(&sound);
            }
            if ready <= refined {
                continue;
            }
            let keep = if end == frames { end } else { ready.saturating_sub(halo) };
            // with what reaches into it on either side
            let kept = held[(keep - held_from) * hop..].to_vec();
            let (section, trusted) = (mel.section(held_from..end), &trusted[held_from..end]);
            let sound = self.refiner.refine_trusted(held, &section, trusted, passes, &|part| {
                report(end as f32, refined as f32 + part * (ready - refined) as f32);
            })?;
            sink(&sound[(refined - held_from) * hop..(ready - held_from) * hop])?;
            (held, held_from, refined) = (kept, keep, ready);
        }
        report(frames as f32, frames as f32);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::seeded;
    use super::super::{Packed, SynthOptions, Vocoder};
    use super::*;
    use crate::flow::Flow;
    use crate::flow::FlowConfig;
    use crate::flow::config::{Block, MapConfig, SequenceConfig, StepConfig, WaveNetConfig};
    use crate::flow::drive::Drive;
    use crate::net::Params;
    use crate::train::Recipe;
    use crate::voice::{Voice, VoiceConfig};
    use candle_core::Device;

    /// The samples of a made-up mel in pieces of so many frames, and how many pieces there were.
    fn speak(vocoder: &Vocoder, frames: usize, (passes, ahead): (usize, Lookahead), piece: usize) -> (Vec<f32>, usize) {
        let values = (0..80 * frames).map(|i| -6.0 + (i as f32 * 0.37).sin() - (i / frames) as f32 / 40.0);
        let mel = MelSpectrogram::new(values.collect(), 80).unwrap();
        let options =
            SynthOptions { seed: 3, refine: Some(passes), refine_lookahead: Some(ahead), ..Default::default() };
        let (mut samples, mut pieces) = (Vec::new(), 0);
        let sink = |piece: &[f32]| {
            samples.extend_from_slice(piece);
            pieces += 1;
            Ok::<_, Error>(())
        };
        vocoder.speak(&mel, &options, None, piece, sink).unwrap();
        (samples, pieces)
    }

    /// Small voices of couplings alone, and of a recursion.
    fn voices() -> [Voice; 2] {
        let tiny = Recipe::open("tiny").unwrap();
        let net = |causal| WaveNetConfig {
            channels: 8,
            kernel: 3,
            dilations: vec![1, 2],
            weight_norm: false,
            skip: false,
            causal,
        };
        let recursive = FlowConfig {
            group: 4,
            blocks: vec![Block {
                repeat: 1,
                steps: vec![
                    StepConfig::Actnorm {},
                    StepConfig::Autoregressive {
                        by: 4,
                        reversed: false,
                        net: SequenceConfig::Wavenet(net(true)),
                        bound: Some(2.0),
                        hears: Some(1.0),
                        map: MapConfig::Affine,
                    },
                    StepConfig::Squeeze { by: 4 },
                    StepConfig::coupling(net(false), Some(2.0)),
                ],
            }],
            ..tiny.flow.clone()
        };
        let synthesis = |drive| SynthesisConfig { drive, ..SynthesisConfig::new(0.7, 0) };
        [(tiny.flow, 1.0), (recursive, 0.6)]
            .map(|(flow, drive)| seeded("small", tiny.mel.clone(), flow, synthesis(drive)))
    }

    /// A flow that leaves the noise as it is says what stands in front of its recursion.
    #[test]
    fn a_recursion_is_driven_through_a_shelf() {
        let [couplings, recursive] = voices();
        let VoiceConfig { mel, flow, .. } = recursive.config();
        let flow = FlowConfig { whitening: None, ..flow.clone() };
        // as training begins
        let params = Params::seeded(1, &Device::Cpu);
        Flow::new(&flow, mel, params.builder()).unwrap();
        let tensors: Vec<_> = params.named().into_iter().map(|(n, v)| (n, v.as_tensor().clone())).collect();
        let config = VoiceConfig::new("plain", mel.clone(), flow, SynthesisConfig::new(1.0, 0));
        let plain = Vocoder::new(&Voice::from_parts(config, &tensors).unwrap()).unwrap();
        let silence = MelSpectrogram::new(vec![-8.0; 80 * 20], 80).unwrap();
        let speak = |vocoder: &Vocoder, drive| {
            let options = SynthOptions { drive, ..Default::default() };
            vocoder.vocode(&silence, &options, None).map(|sound| sound.samples)
        };
        let free = speak(&plain, None).unwrap();
        assert!(speak(&plain, Some(1.0)).unwrap() == free && free.iter().any(|x| x.abs() > 1.0));
        let mut expected = free.clone();
        Drive::new(0.6, 4000.0 / 22_050.0).run(&mut expected);
        let driven = speak(&plain, Some(0.6)).unwrap();
        let worst = driven.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5 && driven != free, "{worst}");

        let error = |voice: &Voice, drive| speak(&Vocoder::new(voice).unwrap(), Some(drive)).unwrap_err().to_string();
        assert_eq!(error(&couplings, 0.5), "drive is 0.5, but the flow of small has no recursion that streams");
        assert_eq!(error(&recursive, f32::NAN), "drive is NaN, expected 0 to 2");
    }

    #[test]
    fn pieces_make_the_samples_of_the_whole() {
        for voice in voices() {
            let vocoder = Vocoder::new(&voice).unwrap();
            // shorter pieces than the refinement reaches, too
            let (all, two) = (Lookahead::All, Lookahead::Frames(2));
            for (passes, ahead, piece, expected) in [(0, all, 37, 5), (3, all, 64, 3), (3, all, 7, 23), (3, two, 37, 5)]
            {
                let speak = |piece, threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| speak(&vocoder, 160, (passes, ahead), piece))
                };
                let (whole, _) = speak(1000, 1);
                assert_eq!(whole.len(), 160 * 256);
                for threads in [1, 3] {
                    let (parts, pieces) = speak(piece, threads);
                    let case = format!("{passes} passes, look-ahead {ahead}, pieces of {piece}, {threads} threads");
                    assert!(whole == parts, "{case}");
                    assert!(pieces >= expected - 2 && pieces <= expected, "{case}: {pieces}");
                }
                assert!(speak(1000, 3).0 == whole);
            }
        }
    }

    #[test]
    fn blocks_make_the_samples_of_the_whole_in_pieces_too() {
        let [voice, _] = voices();
        let Vocoder { config, engine: Engine::Stream(Packed { filters, .. }), refiner, macs_per_sample, precision } =
            Vocoder::new(&voice).unwrap()
        else {
            panic!("couplings stream")
        };
        let engine = Engine::Blocks(voice.build_frozen_flow().unwrap(), filters);
        let vocoder = Vocoder { config, engine, refiner, macs_per_sample, precision };
        let (whole, _) = speak(&vocoder, 500, (1, Lookahead::All), 1000);
        let (parts, pieces) = speak(&vocoder, 500, (1, Lookahead::All), 1);
        assert!(whole == parts && pieces > 1, "{pieces}");
    }
}

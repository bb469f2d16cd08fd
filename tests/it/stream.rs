//! Streams: the same samples as the whole utterance, whatever the pieces.

use super::{seeded_voice, tiny_mel, tiny_voice};
use candle_core::{Device, Tensor};
use melglow::flow::Flow;
use melglow::flow::config::{
    Block, ConditioningConfig, FlowConfig, MapConfig, MixForm, SeparableConfig, SequenceConfig, Split, StepConfig,
    WaveNetConfig, WhiteningConfig,
};
use melglow::kernels::choice::Kernel;
use melglow::mel::{MelConfig, MelSpectrogram};
use melglow::net::Params;
use melglow::net::params::{named_rng, normal};
use melglow::train::Recipe;
use melglow::vocoder::noise::Noise;
use melglow::vocoder::{Precision, SynthOptions, Vocoder};
use melglow::voice::{Lookahead, SynthesisConfig, TrainedOn, Voice, VoiceConfig};

/// A convention with a hop of 16.
fn mel_config() -> MelConfig {
    MelConfig { n_fft: 64, win_length: 64, hop_length: 16, n_mels: 5, ..MelConfig::nvidia() }
}

fn coupling(weight_norm: bool, skip: bool, causal: bool, bound: Option<f64>) -> StepConfig {
    StepConfig::coupling(net(weight_norm, skip, causal), bound)
}

fn net(weight_norm: bool, skip: bool, causal: bool) -> WaveNetConfig {
    WaveNetConfig { channels: 6, kernel: 3, dilations: vec![1, 2, 4], weight_norm, skip, causal }
}

fn frame(lookahead: Option<usize>) -> ConditioningConfig {
    ConditioningConfig::Frame { channels: 7, residual_layers: 2, lookahead, norm: lookahead.is_some() }
}

fn whitening(lookahead: Option<usize>) -> Option<WhiteningConfig> {
    Some(WhiteningConfig { order: 24, filters_per_hop: 2, hidden: 6, context: 2, fit_steps: 1, lookahead })
}

/// Every design that streams: name, design, frames of look-ahead without refinement.
fn designs() -> Vec<(&'static str, FlowConfig, usize)> {
    let design = |whitening, conditioning, group, rounds: &[Vec<StepConfig>]| {
        let blocks = rounds.iter().map(|steps| Block { repeat: 1, steps: steps.clone() }).collect();
        FlowConfig { whitening, ..FlowConfig::new(conditioning, group, blocks) }
    };
    let ours = |causal| {
        let round = vec![StepConfig::Actnorm {}, StepConfig::mix(), coupling(false, false, causal, Some(2.0))];
        vec![vec![StepConfig::Asinh { scale: 0.5 }, StepConfig::Gain {}], round.clone(), round]
    };
    let waveglow = vec![
        StepConfig::mix(),
        coupling(true, true, false, None),
        StepConfig::early(2),
        StepConfig::mix(),
        coupling(true, true, false, None),
    ];
    let by = |map, split| StepConfig::Coupling { net: net(false, false, false), bound: None, map, split };
    let squeezed = vec![
        by(MapConfig::Tanh, Split::Even),
        StepConfig::Squeeze { by: 2 },
        StepConfig::Mix { form: MixForm::Plu },
        by(MapConfig::Additive, Split::Swapped),
        StepConfig::Early { channels: 2, prior: Some(net(false, true, false)) },
        StepConfig::Squeeze { by: 2 },
        StepConfig::Gain {},
        by(MapConfig::Affine, Split::Odd),
        StepConfig::Swap {},
        StepConfig::Scale {},
    ];
    let separable = |kernel, layers, norm| StepConfig::SeparableCoupling {
        net: SeparableConfig { channels: 9, kernel, layers, weight_norm: true, norm },
        bound: None,
    };
    let squeezewave =
        vec![StepConfig::mix(), separable(3, 2, true), StepConfig::early(2), StepConfig::mix(), separable(5, 1, false)];
    let squeezed_mel =
        vec![separable(3, 3, true), StepConfig::Squeeze { by: 2 }, StepConfig::mix(), separable(3, 2, true)];
    let in_turn = |by, map, bound| StepConfig::Autoregressive {
        by,
        reversed: false,
        net: SequenceConfig::Wavenet(net(false, false, true)),
        bound,
        hears: Some(1.0),
        map,
    };
    let recursive = |causal| {
        vec![
            StepConfig::Asinh { scale: 0.5 },
            StepConfig::Actnorm {},
            in_turn(2, MapConfig::Affine, Some(2.0)),
            StepConfig::Squeeze { by: 2 },
            in_turn(1, MapConfig::Tanh, None),
            StepConfig::mix(),
            coupling(false, false, causal, Some(2.0)),
        ]
    };
    let by_step = vec![in_turn(2, MapConfig::Affine, None), StepConfig::mix(), coupling(true, false, true, None)];
    let (upsample, by_frame) = (ConditioningConfig::Upsample { kernel: 32 }, frame(Some(1)));
    let every_step = vec![StepConfig::mix(), coupling(false, true, true, None)];
    vec![
        // 3 rows after, one more to interpolate; two nets of 7 steps of 4 samples
        ("ours", design(whitening(None), frame(None), 4, &ours(false)), 5 + 4),
        ("live", design(whitening(Some(1)), frame(Some(1)), 4, &ours(true)), 2),
        ("live, whitening last", design(whitening(Some(2)), frame(Some(0)), 4, &ours(true)), 3),
        ("no whitening", design(None, frame(None), 8, &ours(false)), 5 + 7),
        ("waveglow", design(None, ConditioningConfig::Upsample { kernel: 64 }, 8, &[waveglow]), 7),
        // nets of 7 steps of 2, 4, 4 and 8 samples
        ("squeezed", design(None, frame(None), 2, &[squeezed]), 5 + 8),
        // nets of 2 steps each
        ("squeezewave", design(None, ConditioningConfig::Mel {}, 8, std::slice::from_ref(&squeezewave)), 2),
        ("squeezewave, a step per frame", design(None, ConditioningConfig::Mel {}, 16, &[squeezewave]), 4),
        // nets of 3 steps of 4 samples and 2 of 8
        ("squeezewave, squeezed", design(None, ConditioningConfig::Mel {}, 4, &[squeezed_mel]), 2),
        ("recursive", design(whitening(Some(1)), by_frame.clone(), 2, &[recursive(true)]), 2),
        // a net of 7 steps of 4 samples
        ("recursive, then seeing ahead", design(whitening(Some(1)), by_frame, 2, &[recursive(false)]), 2 + 2),
        ("recursive, features by step", design(None, upsample, 2, &[by_step]), 0),
        ("a step per frame", design(None, ConditioningConfig::Upsample { kernel: 16 }, 16, &[every_step]), 0),
    ]
}

/// A voice of a design whose parameters are all away from where training begins.
fn voice(name: &str, flow: &FlowConfig) -> Voice {
    let params = Params::seeded(7, &Device::Cpu);
    Flow::new(flow, &mel_config(), params.builder()).unwrap();
    let mut rng = named_rng(3, "stream");
    let tensors: Vec<_> = params
        .named()
        .into_iter()
        .map(|(name, var)| {
            let dims = var.dims().to_vec();
            let noise: Vec<f32> = (0..var.elem_count()).map(|_| 0.1 * normal(&mut rng)).collect();
            let noise = Tensor::from_vec(noise, dims, &Device::Cpu).unwrap();
            (name, (var.as_tensor() + noise).unwrap())
        })
        .collect();
    let synthesis = SynthesisConfig::new(0.7, 0);
    Voice::from_parts(VoiceConfig::new(name, mel_config(), flow.clone(), synthesis), &tensors).unwrap()
}

fn mel(frames: usize) -> MelSpectrogram {
    let mut rng = named_rng(frames as u64, "mel");
    MelSpectrogram::new((0..5 * frames).map(|_| -4.0 + normal(&mut rng)).collect(), 5).unwrap()
}

fn options(refine: usize) -> SynthOptions {
    SynthOptions { seed: 5, refine: Some(refine), ..Default::default() }
}

/// Passes over one hop after the other, with frames of look-ahead.
fn live(refine: usize, ahead: usize) -> SynthOptions {
    SynthOptions { refine_lookahead: Some(Lookahead::Frames(ahead)), ..options(refine) }
}

/// The samples of a stream that gets `chunk` frames at a time.
fn streamed(vocoder: &Vocoder, mel: &MelSpectrogram, options: &SynthOptions, chunk: usize) -> Vec<f32> {
    let mut stream = vocoder.stream(options).unwrap();
    let mut out = Vec::new();
    for frames in mel.transposed().values().chunks(chunk * mel.n_mels()) {
        stream.push(frames, &mut out).unwrap();
    }
    stream.finish(&mut out);
    out
}

fn bits(samples: &[f32]) -> Vec<u32> {
    samples.iter().map(|s| s.to_bits()).collect()
}

#[test]
fn streamed_equals_whole_for_every_design_and_chunking() {
    for (name, flow, _) in designs() {
        let vocoder = Vocoder::new(&voice(name, &flow)).unwrap();
        let passes = [(1, 0), (1, 3), (2, 2), (3, 1), (70, 0), (70, 4)].map(|(frames, n)| (frames, options(n)));
        let hops = [(1, 3, 2), (2, 1, 0), (4, 2, 3), (70, 0, 5), (70, 3, 0), (70, 4, 2)];
        for (frames, options) in passes.into_iter().chain(hops.map(|(frames, n, ahead)| (frames, live(n, ahead)))) {
            let mel = mel(frames);
            let whole = vocoder.vocode(&mel, &options, None).unwrap().samples;
            assert_eq!(whole.len(), frames * 16);
            let loudest = whole.iter().fold(0.0_f32, |m, s| m.max(s.abs()));
            assert!(loudest > 1e-3 && loudest.is_finite(), "{name}: {loudest}");
            for chunk in [1, 3, 17, frames] {
                let stream = streamed(&vocoder, &mel, &options, chunk);
                assert!(
                    bits(&stream) == bits(&whole),
                    "{name}: {frames} frames, {options:?}, {chunk} at a time: first difference at {:?}",
                    whole.iter().zip(&stream).position(|(a, b)| a.to_bits() != b.to_bits())
                );
            }
        }
    }
}

/// The flow hears values outside of the range of training at its ends, in streams too; the refinement
/// aims at the mel as it is.
#[test]
fn mels_beyond_training_sound_as_its_ends() {
    let plain = voice("plain", &designs()[0].1);
    let known =
        TrainedOn { clips: Vec::new(), low: vec![-4.5; 5], high: vec![-3.8; 5], residual_level: None, detail: None };
    let config = VoiceConfig { trained_on: Some(known.clone()), ..plain.config().clone() };
    let tensors: Vec<_> = plain.tensors().unwrap().into_iter().collect();
    let bounded = Vocoder::new(&Voice::from_parts(config, &tensors).unwrap()).unwrap();
    let plain = Vocoder::new(&plain).unwrap();
    let mel = mel(40);
    let mut columns = mel.transposed().values().to_vec();
    known.bound(&mut columns);
    let ends = MelSpectrogram::new(columns, 40).unwrap().transposed();
    let speak = |vocoder: &Vocoder, mel, passes| vocoder.vocode(mel, &options(passes), None).unwrap().samples;
    assert!(bits(&speak(&bounded, &mel, 0)) == bits(&speak(&plain, &ends, 0)));
    assert!(bits(&speak(&bounded, &mel, 0)) != bits(&speak(&plain, &mel, 0)));
    assert!(bits(&speak(&bounded, &mel, 2)) != bits(&speak(&plain, &ends, 2)));
    for passes in [0, 2] {
        assert!(bits(&streamed(&bounded, &mel, &options(passes), 3)) == bits(&speak(&bounded, &mel, passes)));
    }
}

/// Where a mel is smoother than those of training it is sharpened and its sound stays as the flow made it, in streams
/// as in the whole.
#[test]
fn smooth_stretches_are_not_refined() {
    let plain = voice("plain", &designs()[0].1);
    let known = TrainedOn {
        clips: Vec::new(),
        low: vec![-99.0; 5],
        high: vec![99.0; 5],
        residual_level: None,
        detail: Some(1.8),
    };
    let config = VoiceConfig { trained_on: Some(known), ..plain.config().clone() };
    let tensors: Vec<_> = plain.tensors().unwrap().into_iter().collect();
    let (plain, knowing) =
        (Vocoder::new(&plain).unwrap(), Vocoder::new(&Voice::from_parts(config, &tensors).unwrap()).unwrap());
    // its second half hardly changes from band to band
    let mut columns = mel(1200).transposed().values().to_vec();
    columns[5 * 400..].iter_mut().for_each(|v| *v = -4.0 + 0.05 * (*v + 4.0));
    let mel = MelSpectrogram::new(columns, 1200).unwrap().transposed();
    let speak = |vocoder: &Vocoder, options: &SynthOptions| vocoder.vocode(&mel, options, None).unwrap().samples;
    let bare = speak(&plain, &options(0));
    for options in [options(3), live(3, 2)].map(|options| SynthOptions { sharpen: Some(0.0), ..options }) {
        let sound = speak(&knowing, &options);
        let smooth = knowing.smooth_frames(&mel, &options);
        assert!((400..790).contains(&smooth), "{smooth}");
        assert!(sound[..16 * 380] == speak(&plain, &options)[..16 * 380]);
        // through windows and back again
        let (from, till) = (16 * (1200 - smooth + 20), 16 * 1190);
        let apart = sound[from..till].iter().zip(&bare[from..till]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let loudest = bare[from..till].iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        assert!(apart < 1e-4 * loudest, "{apart} of {loudest}");
        let sharpened = SynthOptions { sharpen: None, ..options.clone() };
        let sharp = speak(&knowing, &sharpened);
        assert!(sharp[..16 * 380] == sound[..16 * 380] && sharp[from..till] != sound[from..till]);
        for chunk in [1, 7] {
            assert!(bits(&streamed(&knowing, &mel, &options, chunk)) == bits(&sound), "{chunk} at a time");
            assert!(bits(&streamed(&knowing, &mel, &sharpened, chunk)) == bits(&sharp), "{chunk} at a time");
        }
        let mut stream = knowing.stream(&options).unwrap();
        stream.push(&mel.columns(0..1200), &mut Vec::new()).unwrap();
        assert_eq!(stream.smooth_frames(), smooth);
        let all = SynthOptions { refine_smooth: true, ..options };
        assert!(
            knowing.smooth_frames(&mel, &all) == 0 && bits(&speak(&knowing, &all)) == bits(&speak(&plain, &options))
        );
    }
    let odd = SynthOptions { sharpen: Some(2.1), ..options(0) };
    assert_eq!(knowing.vocode(&mel, &odd, None).unwrap_err().to_string(), "sharpen is 2.1, expected 0 to 2");
}

/// Where the flow loses its way, streams draw the same noise in its place as the whole does.
#[test]
fn hops_beyond_speech_are_the_same_in_any_pieces() {
    let (name, flow, _) = designs().swap_remove(0);
    let plain = voice(name, &flow);
    let tensors: Vec<_> = plain.tensors().unwrap().into_iter().collect();
    let speak = |level| {
        let known = TrainedOn {
            clips: Vec::new(),
            low: vec![-99.0; 5],
            high: vec![99.0; 5],
            residual_level: level,
            detail: None,
        };
        let config = VoiceConfig { trained_on: Some(known), ..plain.config().clone() };
        let vocoder = Vocoder::new(&Voice::from_parts(config, &tensors).unwrap()).unwrap();
        let whole = vocoder.vocode(&mel(40), &options(0), None).unwrap().samples;
        for chunk in [1, 3, 17] {
            assert!(bits(&streamed(&vocoder, &mel(40), &options(0), chunk)) == bits(&whole), "{level:?}, {chunk}");
        }
        whole
    };
    let free = speak(None);
    // the filter carries a change on: what tells is where it begins
    let begins = |level| speak(Some(level)).iter().zip(&free).position(|(a, b)| a != b);
    assert_eq!(begins(1e-3), Some(0));
    // hop 4 is the first far above the first level, hop 24 far below the second; all are far below the last
    assert_eq!([4.0, 20.0, 1e4].map(begins), [Some(4 * 16), Some(24 * 16), Some(0)]);
}

#[test]
fn a_stream_computes_what_the_flow_defines() {
    for (name, config, _) in designs() {
        let voice = voice(name, &config);
        let (flow, _) = voice.build_flow().unwrap();
        let (mel, steps) = (mel(50), 50 * 16 / config.group);
        let z = Noise::new(5).latents(0, steps, config.group, 0.7);
        let z = Tensor::from_vec(z, (1, config.group, steps), &Device::Cpu).unwrap();
        let residual = flow.inverse(&z, &flow.mel_window(&mel, 0, 50).unwrap()).unwrap();
        let residual = residual.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let defined = flow.unwhiten(&residual, &mel).unwrap();
        let whole = Vocoder::new(&voice).unwrap().vocode(&mel, &options(0), None).unwrap().samples;
        let loudest = whole.iter().fold(0.0_f32, |m, s| m.max(s.abs()));
        let worst = whole.iter().zip(&defined).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 * loudest, "{name}: {worst} of {loudest}");
    }
}

#[test]
fn whole_is_the_same_for_any_threads() {
    for (name, flow, _) in designs() {
        let vocoder = Vocoder::new(&voice(name, &flow)).unwrap();
        let mel = mel(700);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| vocoder.vocode(&mel, &options(2), None).unwrap().samples)
        };
        let one = run(1);
        assert!(bits(&one) == bits(&run(3)), "{name}");
        assert!(bits(&one) == bits(&streamed(&vocoder, &mel, &options(2), 5)), "{name}");
    }
}

#[test]
fn integers_are_the_same_in_any_pieces_and_threads() {
    for precision in [Precision::Int16, Precision::Int8] {
        for (name, flow, _) in designs() {
            let vocoder = Vocoder::with_precision(&voice(name, &flow), precision).unwrap();
            let mel = mel(200);
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| bits(&vocoder.vocode(&mel, &options(0), None).unwrap().samples))
            };
            let whole = run(1);
            assert!(whole == run(2), "{name}");
            for chunk in [1, 3, 17] {
                assert!(whole == bits(&streamed(&vocoder, &mel, &options(0), chunk)), "{name}, {chunk} at a time");
            }
        }
    }
}

/// Threads share the layers of large nets.
#[test]
fn large_nets_sound_the_same_for_any_threads() {
    let net = WaveNetConfig { channels: 168, dilations: vec![1; 2], ..net(true, true, false) };
    let steps = vec![StepConfig::mix(), StepConfig::coupling(net, None)];
    let blocks = vec![Block { repeat: 12, steps }];
    let voice = voice("wide", &FlowConfig::new(ConditioningConfig::Upsample { kernel: 32 }, 4, blocks));
    let vocoder = Vocoder::with_precision(&voice, Precision::Int16).unwrap();
    for frames in [150, 400] {
        let mel = mel(frames);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| bits(&vocoder.vocode(&mel, &options(0), None).unwrap().samples))
        };
        let one = run(1);
        assert!(one.len() == frames * 16 && one == run(2) && one == run(3), "{frames} frames");
    }
}

/// The difference is 60 dB and more below the sound in these small nets, or with eight bits 20 and more.
#[test]
fn integers_are_close_to_floats() {
    for (precision, expected) in [(Precision::Int16, 60.0..200.0), (Precision::Int8, 20.0..80.0)] {
        let mut integers = 0;
        for (name, flow, _) in designs() {
            let voice = voice(name, &flow);
            let vocoder = Vocoder::with_precision(&voice, precision).unwrap();
            if vocoder.precision() != precision {
                assert_eq!(integers, 0, "{name}");
                eprintln!("SKIPPED: {name}: no {} on this processor", precision.name());
                continue;
            }
            integers += 1;
            let speak = |vocoder: &Vocoder| vocoder.vocode(&mel(200), &options(0), None).unwrap().samples;
            let (whole, float) = (speak(&vocoder), speak(&Vocoder::new(&voice).unwrap()));
            let power = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let difference = power(&mut whole.iter().zip(&float).map(|(a, b)| a - b));
            let snr = 10.0 * (power(&mut float.iter().copied()) / difference).log10();
            // infinite if nothing were in integers
            assert!(expected.contains(&snr), "{name}: {snr} dB");
        }
    }
}

/// Where nothing is said about numbers, integers are for wide nets that are conditioned at every step.
#[test]
fn the_fastest_precision_is_integers_for_wide_nets_alone() {
    let precision = |channels: usize, dilations: usize, conditioning: ConditioningConfig| {
        let net = WaveNetConfig { channels, dilations: vec![1; dilations], ..net(true, true, false) };
        let steps = vec![StepConfig::mix(), StepConfig::coupling(net, None)];
        let voice = voice("wide", &FlowConfig::new(conditioning, 4, vec![Block { repeat: 1, steps }]));
        let (fastest, floats) = (Vocoder::fastest(&voice).unwrap(), Vocoder::new(&voice).unwrap());
        let speak = |vocoder: &Vocoder| bits(&vocoder.vocode(&mel(20), &options(0), None).unwrap().samples);
        assert_eq!(speak(&fastest) == speak(&floats), fastest.precision() == Precision::F32);
        fastest.precision()
    };
    let upsample = || ConditioningConfig::Upsample { kernel: 32 };
    // 20 features beside three taps
    let wide = precision(168, 2, upsample());
    let fast = matches!(Kernel::chosen().unwrap(), Kernel::Avx2 | Kernel::Avx512);
    assert_eq!(wide, if fast { Precision::Int16 } else { Precision::F32 });
    for narrow in [precision(160, 2, upsample()), precision(168, 1, upsample()), precision(160, 2, frame(None))] {
        assert_eq!(narrow, Precision::F32);
    }
}

#[test]
fn look_ahead_is_what_is_stated_and_no_more() {
    for (name, flow, expected) in designs() {
        let vocoder = Vocoder::new(&voice(name, &flow)).unwrap();
        // a pass sees half a window after each frame that touches a sample: three hops
        let whole = [0, 1, 4].map(|passes| (options(passes), 3 * passes));
        let hops = [(0, 7, 0), (3, 0, 0), (3, 2, 2)].map(|(passes, ahead, after)| (live(passes, ahead), after));
        for (options, after) in whole.into_iter().chain(hops) {
            let mut stream = vocoder.stream(&options).unwrap();
            let latency = stream.latency_frames();
            assert_eq!(latency, expected + after, "{name}, {options:?}");
            let (mel, mut out) = (mel(60).transposed(), Vec::new());
            for (i, frame) in mel.values().chunks(5).enumerate() {
                stream.push(frame, &mut out).unwrap();
                let least = (i + 1).saturating_sub(latency) * 16;
                assert!((least..least + 16).contains(&out.len()), "{name}: {} after {} frames", out.len(), i + 1);
            }
        }
    }
}

#[test]
fn streams_share_a_vocoder_across_threads() {
    let (name, flow, _) = designs().swap_remove(0);
    let vocoder = Vocoder::new(&voice(name, &flow)).unwrap();
    let mels: Vec<_> = [33, 40, 51].map(mel).into();
    std::thread::scope(|scope| {
        for (mel, chunk) in mels.iter().zip([1, 4, 7]) {
            let vocoder = &vocoder;
            scope.spawn(move || {
                let whole = vocoder.vocode(mel, &options(2), None).unwrap().samples;
                assert!(bits(&streamed(vocoder, mel, &options(2), chunk)) == bits(&whole));
            });
        }
    });
}

#[test]
fn a_stream_without_frames_is_silent_and_half_a_frame_is_refused() {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    let mut out = Vec::new();
    vocoder.stream(&SynthOptions::default()).unwrap().finish(&mut out);
    assert!(out.is_empty());
    let mut stream = vocoder.stream(&SynthOptions::default()).unwrap();
    let error = stream.push(&[0.0; 81], &mut out).unwrap_err();
    assert_eq!(error.to_string(), "81 values are no whole frames of 80 bands");
    assert!(vocoder.stream(&SynthOptions { sigma: Some(-1.0), ..Default::default() }).is_err());
}

#[test]
fn frames_that_are_not_finite_are_muted_and_the_stream_goes_on() {
    let vocoder = Vocoder::new(&tiny_voice("tiny")).unwrap();
    let mel = tiny_mel(40);
    let whole = streamed(&vocoder, &mel, &options(0), 40);
    let mut rows = mel.transposed().values().to_vec();
    rows[20 * 80 + 3] = f32::NAN;
    rows[21 * 80] = f32::INFINITY;
    let mut stream = vocoder.stream(&options(0)).unwrap();
    let mut out = Vec::new();
    stream.push(&rows, &mut out).unwrap();
    assert_eq!(stream.muted_frames(), 2);
    stream.finish(&mut out);
    assert!(out.iter().all(|s| s.is_finite()) && out.len() == 40 * 256);
    assert!(out[20 * 256 + 64..22 * 256].iter().all(|&s| s == 0.0));
    assert!(out[22 * 256 + 64..23 * 256].iter().any(|&s| s != 0.0));
    assert_eq!(bits(&out[..10 * 256]), bits(&whole[..10 * 256]));
    assert_eq!(bits(&out[35 * 256..]), bits(&whole[35 * 256..]));
}

#[test]
fn recipes_stream() {
    for (name, frames, lookahead) in [("tiny", 9, 5), ("parallel", 40, 29), ("lj", 20, 3), ("lj-live", 20, 3)] {
        let recipe = Recipe::open(name).unwrap();
        let vocoder = Vocoder::new(&seeded_voice(name, recipe.mel, recipe.flow)).unwrap();
        assert_eq!(vocoder.stream(&options(0)).unwrap().latency_frames(), lookahead, "{name}");
        let mel = tiny_mel(frames);
        let whole = vocoder.vocode(&mel, &options(1), None).unwrap().samples;
        for chunk in [1, 7] {
            assert!(bits(&streamed(&vocoder, &mel, &options(1), chunk)) == bits(&whole), "{name}, {chunk} at a time");
        }
    }
}

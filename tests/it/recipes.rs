//! The literature's flows as recipes: each learns, says what its figure is worth, and speaks.

use super::tiny_mel;
use super::train::Place;
use candle_core::{Device, Tensor};
use melglow::flow::config::{ConditioningConfig, FlowConfig, SequenceConfig, Split, StepConfig, WaveNetConfig};
use melglow::flow::{Flow, Likelihood};
use melglow::mel::MelSpectrogram;
use melglow::train::Recipe;
use melglow::train::config::Validation;
use melglow::vocoder::noise::Noise;
use melglow::vocoder::{SynthOptions, Vocoder};
use melglow::voice::Voice;

/// Recipes, what their likelihood is worth, and whether they stream.
const RECIPES: [(&str, Likelihood, bool); 10] = [
    ("arflow", Likelihood::Exact, false),
    ("tarflow", Likelihood::Exact, false),
    ("waveflow", Likelihood::Exact, false),
    ("iresnet", Likelihood::Estimate, false),
    ("nice", Likelihood::Exact, true),
    ("realnvp", Likelihood::Exact, true),
    ("glow", Likelihood::Exact, true),
    ("flowavenet", Likelihood::Exact, true),
    ("flowpp", Likelihood::LowerBound, false),
    ("fvae", Likelihood::LowerBound, false),
];

/// The recipe's design with small nets and a hasty whitening, for a few steps.
fn hasty(name: &str) -> Recipe {
    let mut recipe = Recipe::open(name).unwrap();
    let shrink = |net: &mut WaveNetConfig| net.channels = 12;
    let flow = &mut recipe.flow;
    let steps = flow.blocks.iter_mut().flat_map(|block| &mut block.steps);
    for step in steps {
        match step {
            StepConfig::Coupling { net, .. }
            | StepConfig::Early { prior: Some(net), .. }
            | StepConfig::Autoregressive { net: SequenceConfig::Wavenet(net), .. } => shrink(net),
            StepConfig::Autoregressive { net: SequenceConfig::Transformer(net), .. } => {
                (net.channels, net.layers, net.window) = (16, 1, 12);
            }
            StepConfig::Rowwise { net, .. } => net.channels = 8,
            StepConfig::Residual { net, terms, .. } => (net.channels, *terms) = (16, 4),
            _ => {}
        }
    }
    flow.dequantisation.iter_mut().for_each(|d| shrink(&mut d.net));
    flow.conditioning = ConditioningConfig::Frame { channels: 16, residual_layers: 1, lookahead: None, norm: false };
    let whitening = flow.whitening.as_mut().unwrap();
    // order 1 leaves something to learn
    (whitening.order, whitening.hidden, whitening.fit_steps) = (1, 8, 1);
    let t = &mut recipe.training;
    (t.learning_rate, t.warmup_steps, t.steps, t.eval_every, t.checkpoint_every) = (0.01, 5, 40, 40, 40);
    (t.batch, t.segment_samples, t.init_batch, t.ema_decay) = (2, 1024, 8, 0.8);
    recipe.validation = Validation::Clips { names: vec!["e..f".into()] };
    recipe
}

#[test]
fn every_recipe_learns_and_speaks() {
    for (name, likelihood, streams) in RECIPES {
        let place = Place::new();
        let summary = place.train(&hasty(name), "run");
        // of the two seconds that it is trained on, ten steps at a time
        let bits: Vec<f64> = place.log("run").iter().filter_map(|line| line["bits"].as_f64()).collect();
        assert!(bits.len() == 4 && bits[3] < bits[0] - 0.15, "{name}: {bits:?}");

        let voice = Voice::open(&summary.checkpoint).unwrap();
        let (flow, _) = voice.build_flow().unwrap();
        assert_eq!(flow.likelihood_kind(), likelihood, "{name}");
        let vocoder = Vocoder::new(&voice).unwrap();
        let options = SynthOptions { refine: Some(0), ..Default::default() };
        assert_eq!(vocoder.stream(&options).is_ok(), streams, "{name}");
        let mel = tiny_mel(40);
        let sound = vocoder.vocode(&mel, &options, None).unwrap().samples;
        assert!(sound.len() == 40 * 256 && sound.iter().all(|s| s.is_finite()), "{name}");

        // the flow itself, all at once, of the mel as far as it knows it: neither blocks nor streams change
        // what it says
        let mut known = mel.transposed().values().to_vec();
        voice.config().trained_on.as_ref().unwrap().bound(&mut known);
        let mel = MelSpectrogram::new(known, mel.frames()).unwrap().transposed();
        let (group, steps) = (flow.group(), 40 * 256 / flow.group());
        let z = Tensor::from_vec(Noise::new(0).latents(0, steps, group, 1.0), (1, group, steps), &Device::Cpu).unwrap();
        let residual = flow.inverse(&z, &flow.mel_window(&mel, 0, 40).unwrap()).unwrap();
        let whole = flow.unwhiten(&residual.flatten_all().unwrap().to_vec1::<f32>().unwrap(), &mel).unwrap();
        let loudest = whole.iter().fold(0.0_f32, |m, s| m.max(s.abs()));
        let worst = whole.iter().zip(&sound).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(loudest > 0.0 && worst < 1e-3 * loudest, "{name}: {worst} of {loudest}");
    }
}

#[test]
fn a_bound_is_called_a_bound() {
    let place = Place::new();
    let mut recipe = hasty("fvae");
    recipe.training.steps = 1;
    let summary = place.train(&recipe, "run");
    let voice = summary.checkpoint.to_str().unwrap();
    for only in [&["--likelihood-only"][..], &["--refine", "0"]] {
        let eval = [&["eval", "--voice", voice, "--data", "data"], only].concat();
        let (code, out, _) = place.run(&eval);
        assert!(code == 0 && out.contains(", at most (the likelihood is a lower bound)\n"), "{out}");
        let (_, json, _) = place.run(&[&eval[..], &["--json"]].concat());
        assert!(json.contains("\"likelihood\": \"lower_bound\""), "{json}");
    }
    let (_, out, _) = place.run(&["inspect", voice]);
    assert!(out.contains("its likelihood is a lower bound"), "{out}");
}

#[test]
fn a_step_that_does_not_fit_is_named_with_its_place() {
    type Change = fn(&mut FlowConfig);
    let cases: [(&str, Change, &str); 5] = [
        (
            "glow",
            |flow| flow.blocks[1].steps[0] = StepConfig::Squeeze { by: 3 },
            "flow config: step 3 (squeeze): by 3 does not fit the 64 steps of a frame",
        ),
        (
            "realnvp",
            |flow| flow.blocks[4].steps[0] = StepConfig::early(7),
            "flow config: step 10 (early): takes 7 channels of steps squeezed by 2, expected a multiple",
        ),
        (
            "nice",
            |flow| {
                flow.blocks[0].steps[0] = StepConfig::early(1);
                let StepConfig::Coupling { split, .. } = &mut flow.blocks[0].steps[1] else { panic!("a coupling") };
                *split = Split::Odd;
            },
            "flow config: step 2 (coupling): cannot take every other one of 15 channels, expected an even number",
        ),
        (
            "nice",
            |flow| {
                let StepConfig::Coupling { bound, .. } = &mut flow.blocks[0].steps[1] else { panic!("a coupling") };
                *bound = Some(1.0);
            },
            "flow config: step 2 (coupling): its map has no bound",
        ),
        (
            "flowpp",
            |flow| flow.dequantisation.as_mut().unwrap().couplings = 0,
            "flow config: dequantisation: couplings is 0, expected 1 to 32",
        ),
    ];
    for (name, change, expected) in cases {
        let mut recipe = Recipe::open(name).unwrap();
        change(&mut recipe.flow);
        assert_eq!(recipe.validate().unwrap_err().to_string(), expected, "{name}");
    }
}

/// The search for a mixture's root says when it finds none, and where.
#[test]
fn a_root_that_is_not_found_is_an_error_that_names_the_step() {
    let mut recipe = hasty("flowpp");
    recipe.flow.whitening = None;
    let params = melglow::net::Params::seeded(1, &Device::Cpu);
    let flow = Flow::new(&recipe.flow, &recipe.mel, params.builder()).unwrap();
    let z = Tensor::full(f32::NAN, (1, 16, 16), &Device::Cpu).unwrap();
    let error = flow.inverse(&z, &flow.mel_window(&tiny_mel(1), 0, 1).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "step 20 (coupling): the search for a root of the mixture of logistics does not converge");
}

//! Sequential and residual steps: what depends on what, what is exact, what is refused.

use candle_core::{Device, Tensor};
use melglow::flow::config::{
    Block, ConditioningConfig, FlowConfig, LipschitzConfig, RowwiseConfig, SequenceConfig, StepConfig,
    TransformerConfig, WaveNetConfig,
};
use melglow::flow::{Flow, Likelihood};
use melglow::mel::MelConfig;
use melglow::net::Params;
use melglow::net::params::{named_rng, normal};

fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = named_rng(seed, "test");
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| normal(&mut rng)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn mel_config() -> MelConfig {
    MelConfig { n_fft: 64, win_length: 64, hop_length: 16, n_mels: 5, ..MelConfig::nvidia() }
}

/// Of one step in groups of 4, away from its beginning; parameters by name.
fn flow(step: StepConfig) -> (Flow, Params) {
    let config = FlowConfig {
        whitening: None,
        conditioning: ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: false },
        group: 4,
        blocks: vec![Block { repeat: 1, steps: vec![step] }],
        ..plain()
    };
    let params = Params::seeded(7, &Device::Cpu);
    let flow = Flow::new(&config, &mel_config(), params.builder()).unwrap();
    for (i, (name, var)) in params.named().into_iter().enumerate() {
        // strong feedback would drown a change in what grows without bounds
        let size = if name.contains(".end.") { 0.05 } else { 0.2 };
        let moved = (var.as_tensor() + noise(i as u64, var.dims()).affine(size, 0.0).unwrap()).unwrap();
        var.set(&moved).unwrap();
    }
    (flow, params)
}

fn plain() -> FlowConfig {
    serde_json::from_value(serde_json::json!({
        "whitening": null, "conditioning": {"kind": "mel"}, "group": 4, "blocks": []
    }))
    .unwrap()
}

fn wavenet() -> WaveNetConfig {
    WaveNetConfig { channels: 5, kernel: 3, dilations: vec![1, 2], weight_norm: false, skip: false, causal: true }
}

fn autoregressive(by: usize, reversed: bool, net: SequenceConfig) -> StepConfig {
    StepConfig::Autoregressive { by, reversed, net, bound: Some(2.0), hears: None, map: Default::default() }
}

fn residual(probes: usize) -> StepConfig {
    let net = LipschitzConfig { channels: 6, kernel: 3, layers: 3, coefficient: 0.9 };
    StepConfig::Residual { net, terms: 25, probes }
}

/// Samples that a changed latent of sample `at` moves.
fn moved(flow: &Flow, at: usize) -> Vec<usize> {
    let frames = 6;
    let context = flow.context();
    let mel = noise(2, &[1, 5, context.left + frames + context.right]);
    let z = noise(1, &[1, frames * 16]);
    let bump: Vec<f32> = (0..frames * 16).map(|i| if i == at { 1.0 } else { 0.0 }).collect();
    let bumped = (&z + Tensor::from_vec(bump, (1, frames * 16), &Device::Cpu).unwrap()).unwrap();
    let sound = |z: &Tensor| {
        let z = z.reshape((1, frames * 4, 4)).unwrap().transpose(1, 2).unwrap();
        flow.inverse(&z, &mel).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (a, b) = (sound(&z), sound(&bumped));
    (0..a.len()).filter(|&i| a[i] != b[i]).collect()
}

#[test]
fn samples_follow_their_past_alone_in_the_order_of_the_step() {
    let transformer = TransformerConfig { channels: 6, heads: 2, layers: 1, window: 4, expansion: 2 };
    for net in [SequenceConfig::Wavenet(wavenet()), SequenceConfig::Transformer(transformer)] {
        // sample by sample: the sample itself, then those after it, beyond what the net sees
        let (flow, _) = self::flow(autoregressive(1, false, net.clone()));
        assert_eq!(flow.halo_steps(), None);
        let later = moved(&flow, 41);
        assert!(later[0] == 41 && later[1] == 42 && later.len() > 8, "{net:?} {later:?}");
        // from the end, in rows of two: the sample itself but not its neighbour, then rows before
        let (flow, _) = self::flow(autoregressive(2, true, net.clone()));
        let before = moved(&flow, 41);
        assert!(before.ends_with(&[38, 39, 41]) && before.len() > 8, "{net:?} {before:?}");
    }
}

#[test]
fn rows_follow_the_rows_before_them_within_reach() {
    let net = RowwiseConfig { channels: 5, kernel: [2, 3], dilations: vec![[1, 1], [1, 2]] };
    let (flow, _) = self::flow(StepConfig::Rowwise { net, bound: Some(2.0), map: Default::default() });
    // three steps a row; the third row follows from the second and so reaches as far again
    assert_eq!(flow.halo_steps(), Some(3 * 3));
    let step = 12;
    let later = moved(&flow, 4 * step + 1);
    assert!(later.contains(&(4 * step + 1)) && !later.contains(&(4 * step)));
    assert!(later.iter().all(|i| i % 4 >= 1 && (i / 4).abs_diff(step) <= 6), "{later:?}");
    assert!(later.iter().filter(|&i| i % 4 == 1).eq([&(4 * step + 1)]), "{later:?}");
    assert!(later.iter().any(|i| (i / 4).abs_diff(step) > 3), "{later:?}");
}

/// Means over random signs come near what unit vectors give exactly.
#[test]
fn probes_estimate_the_log_determinant_without_bias() {
    let n = 128;
    let (exact, params) = self::flow(residual(n));
    assert_eq!(exact.likelihood_kind(), Likelihood::Estimate);
    let tensors = params.named().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
    let config: FlowConfig = FlowConfig {
        conditioning: ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: false },
        blocks: vec![Block { repeat: 1, steps: vec![residual(n - 1)] }],
        ..plain()
    };
    let random = Flow::new(&config, &mel_config(), Params::loaded(tensors, &Device::Cpu).builder()).unwrap();
    let context = exact.context();
    let (x, mel) = (noise(1, &[2, 1, n]), noise(2, &[2, 5, context.left + 8 + context.right]));
    let of = |flow: &Flow| flow.forward(&x, &mel).unwrap().1.to_vec1::<f32>().unwrap();
    let (stated, estimated) = (of(&exact), of(&random));
    assert_eq!(estimated, of(&random), "the same sound has the same figure");
    for (a, b) in stated.iter().zip(&estimated) {
        assert!(a.abs() > 0.1 && (a - b).abs() < 0.5 * a.abs() && a != b, "{a} {b}");
    }
}

#[test]
fn what_does_not_converge_is_an_error_that_names_the_step() {
    let broken = |step: StepConfig, part: &str| {
        let (flow, params) = self::flow(step);
        let (_, var) = params.named().into_iter().find(|(name, _)| name.contains(part)).unwrap();
        var.set(&(var.as_tensor() * f64::NAN).unwrap()).unwrap();
        let context = flow.context();
        let mel = noise(2, &[1, 5, context.left + 1 + context.right]);
        flow.inverse(&noise(1, &[1, 4, 4]), &mel).unwrap_err().to_string()
    };
    let error = broken(residual(1), "layers.1.bias");
    assert!(error.starts_with("step 1 (residual): the fixed point is not reached in 200 rounds"), "{error}");
    let error = broken(autoregressive(1, false, SequenceConfig::Wavenet(wavenet())), "end.bias");
    assert_eq!(error, "step 1 (autoregressive): the inverse has no finite value at row 0");
}

#[test]
fn what_does_not_fit_is_named() {
    let mel = mel_config();
    let frame = ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: false };
    let say = |step, conditioning: &ConditioningConfig| {
        let blocks = vec![Block { repeat: 1, steps: vec![step] }];
        let config = FlowConfig { conditioning: conditioning.clone(), blocks, ..plain() };
        config.validate(&mel).unwrap_err().to_string()
    };
    let wavenet = |causal| SequenceConfig::Wavenet(WaveNetConfig { causal, ..wavenet() });
    let transformer = TransformerConfig { channels: 6, heads: 4, layers: 1, window: 4, expansion: 2 };
    let rowwise = |kernel| {
        let net = RowwiseConfig { channels: 5, kernel, dilations: vec![[1, 1]] };
        StepConfig::Rowwise { net, bound: None, map: Default::default() }
    };
    let upsample = ConditioningConfig::Upsample { kernel: 64 };
    let cases = [
        (
            autoregressive(3, false, wavenet(true)),
            &frame,
            "(autoregressive): by is 3, expected a divisor of the 4 channels",
        ),
        (autoregressive(4, false, wavenet(false)), &frame, "(autoregressive): wavenet: causal is false, expected true"),
        (
            autoregressive(4, false, SequenceConfig::Transformer(transformer)),
            &frame,
            "(autoregressive): transformer: heads is 4, expected a divisor of the 6 channels",
        ),
        (
            autoregressive(1, false, wavenet(true)),
            &upsample,
            "(autoregressive): by is 1 of 4 channels, which wants frame conditioning",
        ),
        (
            rowwise([2, 4]),
            &frame,
            "(rowwise): rowwise net: kernel is [2, 4], expected 1 to 15 rows and an odd number of steps up to 63",
        ),
        (rowwise([2, 3]), &ConditioningConfig::Mel {}, "(rowwise): wants upsample or frame conditioning"),
        (StepConfig::Reverse { parts: 3 }, &frame, "(reverse): parts is 3, expected a divisor of the 4 channels"),
        (residual(0), &frame, "(residual): probes is 0, expected 1 to 256"),
    ];
    for (step, conditioning, expected) in cases {
        assert_eq!(say(step, conditioning), format!("flow config: step 1 {expected}"));
    }
}

//! The laws of flows: inverse, log-determinant, gradients, fused against graph.

use candle_core::{DType, Device, Tensor, Var};
use melglow::flow::config::{
    Block, ConditioningConfig, DequantisationConfig, FlowConfig, LatentConfig, LipschitzConfig, MapConfig, MixForm,
    RowwiseConfig, SeparableConfig, SequenceConfig, Split, StepConfig, TransformerConfig, WaveNetConfig,
    WhiteningConfig,
};
use melglow::flow::{Flow, Likelihood, Segment, nll};
use melglow::mel::{MelConfig, MelSpectrogram, extract::extract};
use melglow::net::{CondNet, Conditioning, Params, Passes, Projection, WaveNet};

const CPU: Device = Device::Cpu;

/// A small mel convention with a hop of 16.
fn small_mel() -> MelConfig {
    MelConfig { n_fft: 64, win_length: 64, hop_length: 16, n_mels: 5, ..MelConfig::nvidia() }
}

fn net(weight_norm: bool, skip: bool) -> WaveNetConfig {
    WaveNetConfig { channels: 5, kernel: 3, dilations: vec![1, 2, 4], weight_norm, skip, causal: false }
}

fn frame() -> ConditioningConfig {
    ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: None, norm: false }
}

fn ahead(frames: usize) -> ConditioningConfig {
    ConditioningConfig::Frame { channels: 6, residual_layers: 1, lookahead: Some(frames), norm: true }
}

fn design(conditioning: ConditioningConfig, group: usize, steps: Vec<StepConfig>) -> FlowConfig {
    FlowConfig::new(conditioning, group, vec![Block { repeat: 1, steps }])
}

/// Every step, alone and together.
fn designs() -> Vec<(&'static str, FlowConfig)> {
    let coupling = |weight_norm, skip, bound| StepConfig::coupling(net(weight_norm, skip), bound);
    let causal = WaveNetConfig { causal: true, ..net(false, false) };
    let causal = StepConfig::coupling(causal, Some(2.0));
    let all = vec![
        StepConfig::Asinh { scale: 0.5 },
        StepConfig::Gain {},
        StepConfig::Actnorm {},
        StepConfig::mix(),
        coupling(false, false, Some(2.0)),
        StepConfig::early(2),
        StepConfig::mix(),
        coupling(false, true, None),
    ];
    let waveglow = vec![
        StepConfig::mix(),
        coupling(true, true, None),
        StepConfig::early(2),
        StepConfig::mix(),
        coupling(true, true, None),
    ];
    let separable = |weight_norm, norm| StepConfig::SeparableCoupling {
        net: SeparableConfig { channels: 5, kernel: 3, layers: 2, weight_norm, norm },
        bound: None,
    };
    let squeezewave = vec![
        StepConfig::mix(),
        separable(true, true),
        StepConfig::early(2),
        StepConfig::mix(),
        separable(false, false),
    ];
    let alternating = vec![
        StepConfig::mix(),
        coupling(true, true, None),
        StepConfig::mix(),
        StepConfig::Swap {},
        coupling(true, true, None),
        StepConfig::Swap {},
    ];
    let by = |map, split| {
        let bound = matches!(map, MapConfig::MixLogistic { .. }).then_some(2.0);
        StepConfig::Coupling { net: net(false, false), bound, map, split }
    };
    let mixture = || MapConfig::MixLogistic { components: 3 };
    let plu = StepConfig::Mix { form: MixForm::Plu };
    let squeezed = vec![
        by(MapConfig::Tanh, Split::Even),
        by(MapConfig::Tanh, Split::Odd),
        StepConfig::Squeeze { by: 2 },
        StepConfig::Gain {},
        plu.clone(),
        by(mixture(), Split::Swapped),
        StepConfig::Early { channels: 2, prior: Some(net(false, true)) },
        by(MapConfig::Additive, Split::Halves),
    ];
    let wavenet = || SequenceConfig::Wavenet(WaveNetConfig { causal: true, ..net(false, false) });
    let transformer = TransformerConfig { channels: 6, heads: 2, layers: 2, window: 3, expansion: 2 };
    let transformer = || SequenceConfig::Transformer(transformer.clone());
    let autoregressive = |by, reversed, net, map| {
        let bound = Some(2.0);
        // some values are louder
        StepConfig::Autoregressive { by, reversed, net, bound, hears: Some(1.0), map }
    };
    let rowwise = |map| StepConfig::Rowwise {
        net: RowwiseConfig { channels: 5, kernel: [2, 3], dilations: vec![[1, 1], [2, 2]] },
        bound: (map != MapConfig::Tanh).then_some(2.0),
        map,
    };
    // as many probes as the longest sound here has values: the traces are exact
    let residual = StepConfig::Residual {
        net: LipschitzConfig { channels: 5, kernel: 3, layers: 3, coefficient: 0.6 },
        terms: 30,
        probes: 112,
    };
    let affine = || MapConfig::Affine;
    let sequential = vec![
        StepConfig::Gain {},
        autoregressive(4, true, transformer(), affine()),
        rowwise(affine()),
        StepConfig::Squeeze { by: 2 },
        autoregressive(2, false, wavenet(), affine()),
        StepConfig::Reverse { parts: 2 },
        rowwise(affine()),
    ];
    let upsampled = vec![autoregressive(8, true, wavenet(), affine()), rowwise(affine()), residual.clone()];
    vec![
        ("sample by sample", design(frame(), 2, vec![autoregressive(1, false, wavenet(), mixture())])),
        ("from the end", design(frame(), 4, vec![autoregressive(2, true, wavenet(), affine())])),
        ("transformer", design(frame(), 2, vec![autoregressive(2, false, transformer(), affine())])),
        ("rowwise", design(frame(), 4, vec![rowwise(MapConfig::Tanh), StepConfig::Reverse { parts: 1 }])),
        ("reverse", design(frame(), 4, vec![StepConfig::Reverse { parts: 2 }])),
        ("residual", design(frame(), 4, vec![residual.clone(), residual])),
        ("sequential", design(frame(), 4, sequential)),
        ("upsampled", design(ConditioningConfig::Upsample { kernel: 64 }, 8, upsampled)),
        ("scale", design(frame(), 4, vec![StepConfig::Scale {}])),
        ("factored mix", design(frame(), 4, vec![plu])),
        ("additive", design(frame(), 4, vec![by(MapConfig::Additive, Split::Swapped)])),
        ("learned bound", design(frame(), 4, vec![by(MapConfig::Tanh, Split::Odd)])),
        ("mixture", design(frame(), 2, vec![by(mixture(), Split::Halves)])),
        ("prior", design(frame(), 4, vec![StepConfig::Early { channels: 1, prior: Some(net(true, true)) }])),
        ("squeezed", design(frame(), 2, squeezed)),
        ("asinh", design(frame(), 4, vec![StepConfig::Asinh { scale: 0.5 }])),
        ("gain", design(frame(), 4, vec![StepConfig::Gain {}])),
        ("actnorm", design(frame(), 4, vec![StepConfig::Actnorm {}])),
        ("mix", design(frame(), 4, vec![StepConfig::mix()])),
        ("causal", design(ahead(0), 4, vec![StepConfig::Gain {}, causal])),
        ("coupling", design(frame(), 2, vec![coupling(false, false, Some(2.0))])),
        ("all", design(frame(), 8, all)),
        ("waveglow", design(ConditioningConfig::Upsample { kernel: 64 }, 8, waveglow)),
        ("swap", design(frame(), 4, vec![StepConfig::Swap {}])),
        ("alternating halves", design(ConditioningConfig::Upsample { kernel: 64 }, 8, alternating)),
        ("squeezewave, 2 steps a frame", design(ConditioningConfig::Mel {}, 8, squeezewave.clone())),
        ("squeezewave, 1 step a frame", design(ConditioningConfig::Mel {}, 16, squeezewave)),
    ]
}

/// A flow whose every parameter is away from its initial value.
fn unsettled(config: &FlowConfig) -> (Flow, Vec<(String, Var)>) {
    let params = Params::seeded(7, &CPU);
    let flow = Flow::new(config, &small_mel(), params.builder()).unwrap();
    for (i, (name, var)) in params.named().into_iter().enumerate() {
        let small = noise(i as u64, var.dims()).affine(0.15, 0.0).unwrap();
        let origin = match var.dims() {
            // a mix: well-conditioned, with a negative determinant, as the reference's may have
            &[n, m] if n == m && name.ends_with("weight") && name.split('.').count() == 3 => {
                let flip: Vec<f32> =
                    (0..n * n).map(|k| if k == 0 { -1.0 } else { f32::from(k % (n + 1) == 0) }).collect();
                Tensor::from_vec(flip, (n, n), &CPU).unwrap()
            }
            _ => var.as_tensor().copy().unwrap(),
        };
        var.set(&(origin + small).unwrap()).unwrap();
    }
    (flow, params.named())
}

fn noise(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = melglow::net::params::named_rng(seed, "test");
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| melglow::net::params::normal(&mut rng)).collect();
    Tensor::from_vec(values, shape, &CPU).unwrap()
}

fn inputs(flow: &Flow, batch: usize, frames: usize) -> (Tensor, Tensor) {
    let context = flow.context();
    let mel = noise(99, &[batch, 5, context.left + frames + context.right]);
    (noise(98, &[batch, 1, frames * 16]), mel)
}

fn max_abs(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn inverse_returns_the_data() {
    for (name, config) in designs() {
        let (flow, _) = unsettled(&config);
        for (batch, frames) in [(1, 1), (3, 7)] {
            let (x, mel) = inputs(&flow, batch, frames);
            let (z, _) = flow.forward(&x, &mel).unwrap();
            let back = flow.inverse(&z, &mel).unwrap();
            assert!(max_abs(&x, &back) < 2e-3, "{name}: {}", max_abs(&x, &back));
            assert!(max_abs(&z, &noise(98, z.dims())) > 1e-2, "{name} is the identity here: the test says nothing");
        }
    }
}

#[test]
fn log_det_is_that_of_the_numerical_jacobian() {
    for (name, config) in designs() {
        let (flow, _) = unsettled(&config);
        let (x, mel) = inputs(&flow, 1, 1);
        let n = 16;
        let (_, log_det) = flow.forward(&x, &mel).unwrap();
        let log_det = log_det.to_vec1::<f32>().unwrap()[0];
        let h = 3e-3_f32;
        let mut columns = Vec::new();
        for i in 0..n {
            let unit: Vec<f32> = (0..n).map(|j| if i == j { h } else { 0.0 }).collect();
            let unit = Tensor::from_vec(unit, (1, 1, n), &CPU).unwrap();
            let at = |x: Tensor| flow.forward(&x, &mel).unwrap().0.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (up, down) = (at((&x + &unit).unwrap()), at((&x - &unit).unwrap()));
            columns.push(up.iter().zip(down).map(|(u, d)| f64::from(u - d) / f64::from(2.0 * h)).collect::<Vec<f64>>());
        }
        let numerical = log_abs_det(columns);
        assert!((numerical - f64::from(log_det)).abs() < 0.02, "{name}: numerical {numerical}, stated {log_det}");
    }
}

/// Log-determinants by step sum up to the whole, and belong to their time: a changed last step leaves
/// those alone that it is out of reach of.
#[test]
fn log_det_by_step_is_local_and_sums_up() {
    for (name, config) in designs() {
        let (flow, _) = unsettled(&config);
        let (x, mel) = inputs(&flow, 2, 20);
        let (z, whole) = flow.forward(&x, &mel).unwrap();
        let (z_by_step, by_step) = flow.forward_by_step(&x, &mel).unwrap();
        assert_eq!(max_abs(&z, &z_by_step), 0.0, "{name}");
        assert!(max_abs(&whole, &by_step.sum(1).unwrap()) < 1e-3, "{name}");
        // each step has its own, but for designs whose log-determinant doesn't depend on the data
        let spread = max_abs(&by_step, &by_step.mean_keepdim(1).unwrap().broadcast_as(by_step.shape()).unwrap());
        let fixed = ["additive", "actnorm", "mix", "factored mix", "reverse", "scale", "swap"];
        assert_eq!(spread < 1e-5, fixed.contains(&name), "{name}: {spread}");
        // without a limit to its reach nothing is out of it, and estimates draw other probes
        let (Some(halo), Likelihood::Exact) = (flow.halo_steps(), flow.likelihood_kind()) else { continue };
        let (samples, group) = (20 * 16, flow.group());
        let last: Vec<f32> = (0..samples).map(|i| if i + group < samples { 0.0 } else { 2.0 }).collect();
        let changed = x.broadcast_add(&Tensor::from_vec(last, (1, 1, samples), &CPU).unwrap()).unwrap();
        let (_, after) = flow.forward_by_step(&changed, &mel).unwrap();
        let steps = samples / group - 1 - halo;
        let early = |t: &Tensor| t.narrow(1, 0, steps).unwrap();
        assert!(max_abs(&early(&by_step), &early(&after)) < 1e-6, "{name}");
    }
}

/// Gaussian elimination with pivoting.
fn log_abs_det(mut a: Vec<Vec<f64>>) -> f64 {
    let n = a.len();
    let mut sum = 0.0;
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs())).unwrap();
        a.swap(k, pivot);
        sum += a[k][k].abs().ln();
        let (done, rest) = a.split_at_mut(k + 1);
        for row in rest {
            let factor = row[k] / done[k][k];
            row.iter_mut().zip(&done[k]).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    sum
}

/// A design whose log_det is a bound, so that no Jacobian has it.
fn latent() -> FlowConfig {
    let latent = Some(LatentConfig { width: 3, hidden: 7 });
    FlowConfig {
        latent,
        ..design(frame(), 4, vec![StepConfig::Gain {}, StepConfig::coupling(net(false, false), None)])
    }
}

#[test]
fn gradients_are_those_of_finite_differences_at_batch_3() {
    for (name, config) in designs().into_iter().chain([("latent", latent())]) {
        let (flow, params) = unsettled(&config);
        let (x, mel) = inputs(&flow, 3, 3);
        let likelihood = || {
            let (z, log_det) = flow.forward(&x, &mel).unwrap();
            (nll(&z, &log_det).unwrap().sum_all().unwrap() / 100.0).unwrap()
        };
        check_gradients(name, &params, &likelihood);
    }
}

#[test]
fn gradients_of_the_inverse_are_those_of_finite_differences_at_batch_3() {
    // these work on slices, or by a fixed point
    let has_none = |step: &StepConfig| matches!(step, StepConfig::Autoregressive { .. } | StepConfig::Residual { .. });
    let has_gradient = |config: &FlowConfig| !config.steps().any(has_none);
    for (name, config) in designs().into_iter().filter(|(_, config)| has_gradient(config)) {
        let (flow, params) = unsettled(&config);
        let (x, mel) = inputs(&flow, 3, 3);
        let z = flow.forward(&x, &mel).unwrap().0.detach();
        let weight = noise(8, x.dims());
        let sound = || (flow.inverse(&z, &mel).unwrap() * &weight).unwrap().sum_all().unwrap();
        check_gradients(name, &params, &sound);
    }
}

/// The change of a loss along a random direction of a parameter, by differences over `h` and as its gradient
/// states it; every entry takes part.
fn along_a_direction(var: &Var, grad: &Tensor, h: f64, loss: &dyn Fn() -> Tensor) -> (f64, f64) {
    let direction = noise(5, var.dims());
    let stated = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    let origin = var.as_tensor().copy().unwrap();
    let at = |h: f64| {
        var.set(&(&origin + (&direction * h).unwrap()).unwrap()).unwrap();
        loss().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap()
    };
    let numerical = (at(h) - at(-h)) / (2.0 * h);
    var.set(&origin).unwrap();
    (numerical, f64::from(stated))
}

/// Holds the gradient of every parameter, along a random direction, to the loss's change there.
fn check_gradients(name: &str, params: &[(String, Var)], loss: &dyn Fn() -> Tensor) {
    let grads = loss().backward().unwrap();
    for (param, var) in params {
        let Some(grad) = grads.get(var) else {
            // conditioning that no step reads has no gradient, nor what a factored mix keeps
            let stays = ["conditioning", "moves", "flips"].iter().any(|part| param.contains(part));
            assert!(stays, "{name}: {param} receives no gradient");
            continue;
        };
        let (numerical, stated) = along_a_direction(var, grad, 1e-3, loss);
        let tolerance = 0.02 * numerical.abs().max(stated.abs()) + 0.02;
        assert!((numerical - stated).abs() < tolerance, "{name}: {param}: numerical {numerical}, stated {stated}");
    }
}

#[test]
fn fused_wavenet_equals_its_graph_in_values_and_gradients() {
    for (weight_norm, skip, up, steps) in
        [(true, true, 1, 37), (false, false, 4, 37), (false, true, 4, 3), (true, false, 1, 1)]
    {
        let params = Params::seeded(3, &CPU);
        // causal where there is no skip: each kind once
        let config = WaveNetConfig { causal: !skip, ..net(weight_norm, skip) };
        let wavenet = WaveNet::new(&config, 3, 4, up, params.builder()).unwrap();
        for (i, (_, var)) in params.named().iter().enumerate() {
            var.set(&(var.as_tensor() + noise(i as u64, var.dims()).affine(0.2, 0.0).unwrap()).unwrap()).unwrap();
        }
        let x = Var::from_tensor(&noise(1, &[3, steps, 3])).unwrap();
        let features = Var::from_tensor(&noise(2, &[3, wavenet.shape().cond_rows(steps), 6])).unwrap();
        let builder = params.builder().pp("cond");
        let projection = Projection::new(6, wavenet.cond_width(), weight_norm, builder).unwrap();
        let weight = noise(4, &[3, steps, 4]);
        let cond = |recompute| Conditioning {
            features: features.as_tensor(),
            projection: &projection,
            passes: Passes { recompute, ..Passes::default() },
        };
        let fused = wavenet.forward(&x, cond(false)).unwrap();
        let again = wavenet.forward(&x, cond(true)).unwrap();
        let graph = wavenet.forward_graph(&x, cond(false)).unwrap();
        assert!(max_abs(&fused, &graph) < 1e-5, "{}", max_abs(&fused, &graph));
        let grads = |y: Tensor| (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
        let (fused, again, graph) = (grads(fused), grads(again), grads(graph));
        let all = params.named().into_iter().chain([("x".into(), x), ("features".into(), features.clone())]);
        for (name, var) in all {
            let (Some(a), Some(b)) = (fused.get(&var), graph.get(&var)) else { panic!("{name} has no gradient") };
            let scale = b.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(max_abs(a, b) <= 1e-4 * scale.max(1e-3), "{name}: {} of {scale}", max_abs(a, b));
            assert_eq!(max_abs(a, again.get(&var).unwrap()), 0.0, "{name}: computed again");
        }
    }
}

#[test]
fn initialised_actnorm_leaves_zero_mean_and_unit_variance() {
    let flow =
        Flow::new(&design(frame(), 4, vec![StepConfig::Actnorm {}]), &small_mel(), Params::seeded(1, &CPU).builder());
    let flow = flow.unwrap();
    let (x, mel) = inputs(&flow, 5, 9);
    let x = x.affine(0.3, 2.0).unwrap();
    flow.initialise(&x, &mel, &|_| true).unwrap();
    let z = flow.forward(&x, &mel).unwrap().0.transpose(0, 1).unwrap().flatten_from(1).unwrap();
    for channel in z.to_vec2::<f32>().unwrap() {
        let n = channel.len() as f32;
        let mean = channel.iter().sum::<f32>() / n;
        let variance = channel.iter().map(|z| (z - mean).powi(2)).sum::<f32>() / n;
        assert!(mean.abs() < 1e-4 && (variance - 1.0).abs() < 1e-3, "{mean} {variance}");
    }
}

#[test]
fn initialised_mixes_are_the_same_rotation_in_either_form() {
    let mixed = |form| {
        let config = design(frame(), 8, vec![StepConfig::Mix { form }]);
        let flow = Flow::new(&config, &small_mel(), Params::seeded(1, &CPU).builder()).unwrap();
        let (x, mel) = inputs(&flow, 2, 3);
        flow.initialise(&x, &mel, &|_| true).unwrap();
        let (z, log_det) = flow.forward(&x, &mel).unwrap();
        let power = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((power(&x) - power(&z)).abs() < 1e-3 * power(&x));
        assert!(max_abs(&log_det, &log_det.zeros_like().unwrap()) < 1e-4);
        z
    };
    assert!(max_abs(&mixed(MixForm::Direct), &mixed(MixForm::Plu)) < 1e-5);
}

/// What the first versions of WaveGlow did in odd flows: the second half is known, the first moves.
#[test]
fn swaps_around_a_coupling_exchange_the_roles_of_the_halves() {
    let coupling = StepConfig::coupling(net(true, true), None);
    let conditioning = || ConditioningConfig::Upsample { kernel: 64 };
    let plain = design(conditioning(), 8, vec![coupling.clone()]);
    let (plain, params) = unsettled(&plain);
    let renamed = |(name, var): &(String, Var)| (name.replace("steps.0.", "steps.1."), var.as_tensor().clone());
    let swapped = design(conditioning(), 8, vec![StepConfig::Swap {}, coupling, StepConfig::Swap {}]);
    let params = Params::loaded(params.iter().map(renamed).collect(), &CPU);
    let swapped = Flow::new(&swapped, &small_mel(), params.builder()).unwrap();
    let (x, mel) = inputs(&plain, 2, 3);
    let exchange = |x: &Tensor| {
        let halves = x.reshape((2, 6, 2, 4)).unwrap();
        let halves = Tensor::cat(&[halves.narrow(2, 1, 1).unwrap(), halves.narrow(2, 0, 1).unwrap()], 2).unwrap();
        halves.reshape((2, 1, 48)).unwrap()
    };
    let (z, log_det) = plain.forward(&exchange(&x), &mel).unwrap();
    let (z_swapped, log_det_swapped) = swapped.forward(&x, &mel).unwrap();
    let half = |z: &Tensor, from| z.narrow(1, from, 4).unwrap();
    assert!(max_abs(&half(&z, 0), &half(&z_swapped, 4)) == 0.0 && max_abs(&half(&z, 4), &half(&z_swapped, 0)) == 0.0);
    assert!(max_abs(&log_det, &log_det_swapped) == 0.0);
    let data = x.reshape((2, 6, 8)).unwrap().transpose(1, 2).unwrap();
    assert!(max_abs(&half(&z_swapped, 4), &half(&data, 4)) == 0.0);
    assert!(max_abs(&half(&z_swapped, 0), &half(&data, 0)) > 1e-2);
}

/// A second of a gliding tone in noise.
fn sound(samples: usize) -> Vec<f32> {
    noise(11, &[samples])
        .to_vec1::<f32>()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(i, n)| 0.3 * (i as f32 * (0.05 + 1e-6 * i as f32)).sin() + 0.02 * n)
        .collect()
}

#[test]
fn whitening_keeps_the_laws_and_pays() {
    let mel = MelConfig { n_fft: 256, win_length: 256, hop_length: 64, n_mels: 20, ..small_mel() };
    let mut config = design(frame(), 8, vec![]);
    config.whitening =
        Some(WhiteningConfig { order: 32, filters_per_hop: 2, hidden: 8, context: 1, fit_steps: 30, lookahead: None });
    let params = Params::seeded(1, &CPU);
    let flow = Flow::new(&config, &mel, params.builder()).unwrap();
    let x = sound(8000);
    let spectrogram: MelSpectrogram = extract(&x, &mel).unwrap();
    let nats = |flow: &Flow| {
        let (e, log_det) = flow.whiten(&x, &spectrogram).unwrap();
        e.iter().zip(log_det).map(|(e, l)| 0.5 * f64::from(e * e) + 0.919 - f64::from(l)).sum::<f64>() / 8000.0
    };
    let mut losses = Vec::new();
    flow.fit_whitening(&[(&x, &spectrogram)], 1, &mut |_, _, loss| {
        losses.push(loss);
        true
    })
    .unwrap();
    assert!(losses[29] < losses[0], "{losses:?}");
    let variance = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / 8000.0;
    let gaussian = 0.5 * (2.0 * std::f64::consts::PI * std::f64::consts::E * variance).ln();
    assert!(nats(&flow) < gaussian - 1.0, "whitened {} nats a sample, one Gaussian {gaussian}", nats(&flow));

    let (e, log_det) = flow.whiten(&x, &spectrogram).unwrap();
    let back = flow.unwhiten(&e, &spectrogram).unwrap();
    assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-3));
    // the filter is causal, so the Jacobian is triangular: its diagonal is all there is
    for at in [0, 63, 64, 4001] {
        let mut moved = x.clone();
        moved[at] += 0.1;
        let changed = flow.whiten(&moved, &spectrogram).unwrap().0;
        assert!(changed[..at].iter().zip(&e).all(|(a, b)| a == b), "sample {at} changes its past");
        assert!((((changed[at] - e[at]) / 0.1).ln() - log_det[at]).abs() < 1e-2);
    }
}

#[test]
fn a_changed_future_leaves_the_past_alone() {
    // two frames of look-ahead in the conditioning, one more to interpolate towards; causal nets
    let causal = WaveNetConfig { causal: true, ..net(false, false) };
    let steps = vec![StepConfig::Gain {}, StepConfig::coupling(causal, Some(2.0))];
    let (flow, _) = unsettled(&design(ahead(2), 4, steps));
    let (z, frames, context) = (noise(1, &[1, 4, 80]), 20, flow.context());
    let mel = |changed: usize| {
        let values = noise(2, &[5 * frames]).to_vec1::<f32>().unwrap();
        let values = values.iter().enumerate().map(|(i, v)| if i % frames == changed { v + 1.0 } else { *v });
        let mel = MelSpectrogram::new(values.collect(), 5).unwrap();
        flow.mel_window(&mel, 0, frames).unwrap()
    };
    assert_eq!(context.right, 3);
    let sound =
        |z: &Tensor, mel: &Tensor| flow.inverse(z, mel).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let origin = sound(&z, &mel(frames));
    let changed = sound(&z, &mel(10));
    assert!(origin[..7 * 16] == changed[..7 * 16] && origin[7 * 16..8 * 16] != changed[7 * 16..8 * 16]);
    // a changed latent moves nothing before its step
    let bump: Vec<f32> = (0..320).map(|i| if i % 80 == 40 { 1.0 } else { 0.0 }).collect();
    let moved = sound(&(&z + Tensor::from_vec(bump, (1, 4, 80), &CPU).unwrap()).unwrap(), &mel(frames));
    assert!(origin[..40 * 4] == moved[..40 * 4] && origin[40 * 4..41 * 4] != moved[40 * 4..41 * 4]);
}

/// At the clip's start, with some of the filters' memory before it, in the middle, at the end.
#[test]
fn whitened_segments_are_those_of_the_whole_clip() {
    let mel = MelConfig { n_fft: 256, win_length: 256, hop_length: 64, n_mels: 20, ..small_mel() };
    let mut config = design(frame(), 8, vec![]);
    config.whitening =
        Some(WhiteningConfig { order: 100, filters_per_hop: 4, hidden: 8, context: 2, lookahead: None, fit_steps: 1 });
    let params = Params::seeded(1, &CPU);
    let flow = Flow::new(&config, &mel, params.builder()).unwrap();
    for (i, (_, var)) in params.named().iter().enumerate() {
        var.set(&(var.as_tensor() + noise(i as u64, var.dims()).affine(0.05, 0.0).unwrap()).unwrap()).unwrap();
    }
    let x = sound(64 * 20);
    let spectrogram = extract(&x, &mel).unwrap();
    let (e, log_det) = flow.whiten(&x, &spectrogram).unwrap();
    let frames = 3;
    let starts = [0, 1, 9, 17];
    let segments = starts.map(|start| {
        let from = (start * 64_usize).saturating_sub(flow.whitening_memory());
        Segment { mel: &spectrogram, start, samples: x[from..(start + frames) * 64].to_vec() }
    });
    let (residuals, log_dets) = flow.whiten_segments(&segments, frames).unwrap();
    let (residuals, log_dets) =
        (residuals.squeeze(1).unwrap().to_vec2::<f32>().unwrap(), log_dets.to_vec1::<f32>().unwrap());
    for (i, start) in starts.into_iter().enumerate() {
        let range = start * 64..(start + frames) * 64;
        let worst = residuals[i].iter().zip(&e[range.clone()]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4 && e[range.clone()].iter().any(|e| e.abs() > 0.1), "frame {start}: {worst}");
        let expected: f32 = log_det[range].iter().sum();
        assert!((log_dets[i] - expected).abs() < 1e-4 * expected.abs(), "{} against {expected}", log_dets[i]);
    }
}

/// A design with learned noise below a 16-bit step, and a sound so quiet that it matters.
fn dequantised() -> (FlowConfig, Vec<f32>) {
    let mut config = design(frame(), 4, vec![StepConfig::Gain {}, StepConfig::coupling(net(false, false), None)]);
    config.whitening =
        Some(WhiteningConfig { order: 6, filters_per_hop: 2, hidden: 6, context: 1, lookahead: None, fit_steps: 1 });
    config.dequantisation = Some(DequantisationConfig { couplings: 2, net: net(false, false) });
    (config, sound(16 * 20).iter().map(|x| x * 3e-4).collect())
}

#[test]
fn learned_dequantisation_keeps_the_samples_and_counts_its_density() {
    let (config, x) = dequantised();
    let plain = FlowConfig { dequantisation: None, ..config.clone() };
    let spectrogram = extract(&x, &small_mel()).unwrap();
    let fresh = |config: &FlowConfig| Flow::new(config, &small_mel(), Params::seeded(1, &CPU).builder()).unwrap();
    let (a, b) = (fresh(&config).whiten(&x, &spectrogram).unwrap(), fresh(&plain).whiten(&x, &spectrogram).unwrap());
    let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst(&a.0, &b.0) < 1e-2 && worst(&a.1, &b.1) < 1e-2, "at first the noise is as it was");

    let no_front = FlowConfig { whitening: None, ..config };
    let (flow, _) = unsettled(&no_front);
    let x: Vec<f32> = x[..16].to_vec();
    let mel = MelSpectrogram::new(spectrogram.values().chunks(spectrogram.frames()).map(|band| band[0]).collect(), 5);
    let mel = mel.unwrap();
    let (noisy, log_det) = flow.whiten(&x, &mel).unwrap();
    let step = |x: f32| (x * 32_768.0 + 0.5).floor();
    assert!(x.iter().zip(&noisy).all(|(a, b)| step(*a) == step(*b)), "{x:?} {noisy:?}");
    assert!(worst(&x, &noisy) > 0.05 / 32_768.0, "the noise is as it was: the test says nothing");
    let h = 1e-2 / 32_768.0;
    let inside = |x: f32| (x + 2.0 * h).min((step(x) + 0.48) / 32_768.0).max((step(x) - 0.48) / 32_768.0);
    let x: Vec<f32> = x.into_iter().map(inside).collect();
    let log_det_there: f32 = flow.whiten(&x, &mel).unwrap().1.iter().sum();
    let columns = (0..16).map(|i| {
        let at = |h: f32| {
            let mut moved = x.clone();
            moved[i] += h;
            flow.whiten(&moved, &mel).unwrap().0
        };
        at(h).iter().zip(at(-h)).map(|(a, b)| f64::from(a - b) / f64::from(2.0 * h)).collect::<Vec<f64>>()
    });
    let numerical = log_abs_det(columns.collect());
    assert!((numerical - f64::from(log_det_there)).abs() < 0.02, "numerical {numerical}, stated {log_det_there}");
    assert!(log_det.iter().any(|l| l.abs() > 0.01));
}

#[test]
fn learned_dequantisation_has_the_gradient_of_finite_differences_at_batch_3() {
    let (config, x) = dequantised();
    let (flow, params) = unsettled(&config);
    let spectrogram = extract(&x, &small_mel()).unwrap();
    let (_, mel) = inputs(&flow, 3, 4);
    let segments = || {
        [0, 5, 16].map(|start| {
            let from = (start * 16_usize).saturating_sub(flow.whitening_memory());
            Segment { mel: &spectrogram, start, samples: x[from..(start + 4) * 16].to_vec() }
        })
    };
    let loss = || {
        let (e, front) = flow.whiten_segments(&segments(), 4).unwrap();
        let (z, log_det) = flow.forward(&e, &mel).unwrap();
        (nll(&z, &(log_det + front).unwrap()).unwrap().sum_all().unwrap() / 100.0).unwrap()
    };
    let grads = loss().backward().unwrap();
    let mut largest = 0.0_f64;
    for (name, var) in params.iter().filter(|(name, _)| name.starts_with("dequantise.")) {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} receives no gradient"));
        let (numerical, stated) = along_a_direction(var, grad, 3e-3, &loss);
        largest = largest.max(numerical.abs());
        let tolerance = 0.03 * numerical.abs().max(stated.abs()) + 0.01;
        assert!((numerical - stated).abs() < tolerance, "{name}: numerical {numerical}, stated {stated}");
    }
    assert!(largest > 0.1, "{largest} says nothing");
}

#[test]
fn whitening_has_the_gradient_of_finite_differences_at_batch_3() {
    let mut config = designs().into_iter().find(|(name, _)| *name == "all").unwrap().1;
    config.whitening =
        Some(WhiteningConfig { order: 20, filters_per_hop: 2, hidden: 6, context: 1, lookahead: None, fit_steps: 1 });
    let (flow, params) = unsettled(&config);
    // strong enough to matter to every layer
    for (i, (_, var)) in params.iter().filter(|(name, _)| name.starts_with("whiten.layers.")).enumerate() {
        var.set(&noise(40 + i as u64, var.dims()).affine(0.4, 0.0).unwrap()).unwrap();
    }
    let x = sound(16 * 20);
    let spectrogram = extract(&x, &small_mel()).unwrap();
    let (_, mel) = inputs(&flow, 3, 4);
    let segments = || {
        [0, 5, 16].map(|start| {
            let from = (start * 16_usize).saturating_sub(flow.whitening_memory());
            Segment { mel: &spectrogram, start, samples: x[from..(start + 4) * 16].to_vec() }
        })
    };
    let loss = || {
        let (e, whitening) = flow.whiten_segments(&segments(), 4).unwrap();
        let (z, log_det) = flow.forward(&e, &mel).unwrap();
        (nll(&z, &(log_det + whitening).unwrap()).unwrap().sum_all().unwrap() / 10.0).unwrap()
    };
    let grads = loss().backward().unwrap();
    for (name, var) in params.iter().filter(|(name, _)| name.starts_with("whiten.layers.")) {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} receives no gradient"));
        let (numerical, stated) = along_a_direction(var, grad, 1e-3, &loss);
        let tolerance = 0.02 * numerical.abs().max(stated.abs()) + 0.01;
        assert!(numerical.abs() > 0.1, "{name}: {numerical} says nothing");
        assert!((numerical - stated).abs() < tolerance, "{name}: numerical {numerical}, stated {stated}");
    }
}

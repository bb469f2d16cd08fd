//! The parts that speed is made of, one thread: `cargo bench --bench kernels -- gated` picks by name.

use candle_core::{Device, Tensor};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use melglow::mel::extract::Extractor;
use melglow::mel::{MelConfig, MelSpectrogram};
use melglow::net::wavenet::{Projection, WaveNet, WaveNetConfig};
use melglow::net::{CondNet, Conditioning, Params, Passes};
use melglow::vocoder::refine::Refiner;
use melglow::vocoder::{SynthOptions, Vocoder};
use melglow::voice::Voice;
use std::time::Duration;

/// Steps of a segment for the layers: WaveGlow's training segment.
const STEPS: usize = 2016;
/// Features of a row of conditioning: few, so that their projection takes little of the time.
const FEATURES: usize = 8;

/// A conditioner of one layer: inputs of 4 channels, a row of conditioning a step.
struct Layer {
    net: WaveNet,
    x: Tensor,
    features: Tensor,
    projection: Projection,
}

impl Layer {
    fn new(channels: usize) -> candle_core::Result<Self> {
        let config =
            WaveNetConfig { channels, kernel: 3, dilations: vec![4], weight_norm: false, skip: true, causal: false };
        let params = Params::seeded(0, &Device::Cpu);
        let net = WaveNet::new(&config, 4, 8, 1, params.builder())?;
        Ok(Self {
            projection: Projection::new(FEATURES, net.cond_width(), false, params.builder().pp("cond"))?,
            net,
            x: Tensor::randn(0f32, 1.0, (1, STEPS, 4), &Device::Cpu)?,
            features: Tensor::randn(0f32, 1.0, (1, STEPS, FEATURES), &Device::Cpu)?,
        })
    }

    fn forward(&self) -> Tensor {
        let Self { features, projection, .. } = self;
        self.net.forward(&self.x, Conditioning { features, projection, passes: Passes::default() }).unwrap()
    }
}

fn layers(c: &mut Criterion) {
    let mut group = c.benchmark_group("layer");
    for channels in [64, 256] {
        let layer = Layer::new(channels).unwrap();
        group.throughput(Throughput::Elements((STEPS * layer.net.macs_per_step()) as u64));
        group.bench_function(format!("gated {channels}, forward"), |b| b.iter(|| layer.forward()));
        group.throughput(Throughput::Elements((3 * STEPS * layer.net.macs_per_step()) as u64));
        group.bench_function(format!("gated {channels}, forward and backward"), |b| {
            b.iter(|| layer.forward().sqr().unwrap().sum_all().unwrap().backward().unwrap());
        });
    }
    group.finish();
}

/// Two seconds of a made-up mel.
fn mel(config: &MelConfig) -> MelSpectrogram {
    let frames = 2 * config.sample_rate as usize / config.hop_length;
    let value = |i: usize| -6.0 + (i as f32 * 0.37).sin() - (i / frames) as f32 / 40.0;
    MelSpectrogram::new((0..config.n_mels * frames).map(value).collect(), config.n_mels).unwrap()
}

fn sound(c: &mut Criterion) {
    let config = MelConfig::nvidia();
    let mel = mel(&config);
    let samples: Vec<f32> = (0..mel.frames() * config.hop_length).map(|i| 0.3 * (i as f32 * 0.03).sin()).collect();
    let mut group = c.benchmark_group("two seconds");
    group.throughput(Throughput::Elements(samples.len() as u64));
    let extractor = Extractor::new(&config).unwrap();
    group.bench_function("mel extraction", |b| b.iter(|| extractor.extract(&samples).unwrap()));
    let refiner = Refiner::new(&config).unwrap();
    group.bench_function("a pass of refinement", |b| {
        let refine = |samples| refiner.refine(samples, &mel, 1, &|_| ()).unwrap();
        b.iter_batched(|| samples.clone(), refine, BatchSize::LargeInput);
    });
    let vocoder = Vocoder::new(&Voice::embedded().unwrap()).unwrap();
    for (name, refine) in [("built-in voice, bare flow", Some(0)), ("built-in voice", None)] {
        let options = SynthOptions { refine, ..Default::default() };
        group.bench_function(name, |b| b.iter(|| vocoder.vocode(&mel, &options, None).unwrap()));
    }
    group.finish();
}

fn one_thread() -> Criterion {
    // SAFETY: nothing else runs yet that could read the environment; candle's own pool only spins
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3))
}

criterion_group! { name = all; config = one_thread(); targets = layers, sound }
criterion_main!(all);

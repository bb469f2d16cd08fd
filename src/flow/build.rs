//! Steps out of their configs: the one place that knows every kind.

use super::autoregressive::Autoregressive;
use super::config::{MapConfig, Place, SequenceConfig, Split, StepConfig, WaveNetConfig};
use super::coupling::Coupling;
use super::mix::Mix;
use super::pointwise::{Actnorm, Asinh, Gain, Scale, Swap};
use super::residual::Residual;
use super::rowwise::{Reverse, Rowwise};
use super::split::Parts;
use super::{Bijector, Step};
use crate::net::{CondNet, LipschitzNet, SeparableNet, Transformer, WaveNet};
use candle_nn::VarBuilder;

/// Bound of the log-scales of a learned prior.
const PRIOR_BOUND: f64 = 3.0;

/// What conditioners find at a level of squeezing.
pub(super) struct Level {
    pub features: usize,
    pub up: usize,
}

impl Level {
    /// A coupling with a WaveNet.
    pub fn coupling(
        &self,
        parts: Parts,
        net: &WaveNetConfig,
        map: (&MapConfig, Option<f64>),
        vb: VarBuilder,
    ) -> candle_core::Result<Coupling> {
        let of = |inputs, outputs| -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
            Ok(Box::new(WaveNet::new(net, inputs, outputs, self.up, vb.clone())?))
        };
        Coupling::new(parts, map, of, (self.features, net.weight_norm), vb.clone())
    }

    /// A causal net over `rows` rows a step.
    fn sequence(
        &self,
        config: &SequenceConfig,
        (inputs, outputs): (usize, usize),
        rows: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
        let up = self.up * rows;
        Ok(match config {
            SequenceConfig::Wavenet(net) => Box::new(WaveNet::new(net, inputs, outputs, up, vb)?),
            SequenceConfig::Transformer(net) => Box::new(Transformer::new(net, inputs, outputs, up, vb)?),
        })
    }
}

/// What steps cost and how far they reach, in samples.
pub(super) struct Cost {
    /// `None` once a step's inverse reaches as far as the sound does.
    pub reach: Option<usize>,
    pub macs_per_sample: f64,
    /// Samples that a row of conditioning stands for.
    row: usize,
}

impl Cost {
    /// Adds multiply-adds per step (of `step` samples) and per row of conditioning, and the steps that the
    /// inverse reaches on either side.
    pub fn add(&mut self, (per_step, per_row): (usize, usize), reach: Option<usize>, step: usize) {
        self.reach = self.reach.zip(reach).map(|(sum, reach)| sum + reach * step);
        self.macs_per_sample += per_step as f64 / step as f64 + per_row as f64 / self.row as f64;
    }
}

/// Builds one step after the other, data → latent.
pub(super) struct Builder {
    /// Where the next step stands.
    pub place: Place,
    /// Of the steps so far.
    pub cost: Cost,
    /// Features of a row of conditioning.
    features: usize,
    /// Groups of samples per row of conditioning.
    up: usize,
    /// Samples of a group.
    group: usize,
}

impl Builder {
    /// Before the first step.
    pub fn new(features: usize, up: usize, group: usize) -> Self {
        let cost = Cost { reach: Some(0), macs_per_sample: 0.0, row: group * up };
        Self { place: Place { channels: group, squeezed: 1 }, cost, features, up, group }
    }

    /// The next step, with its tensors from `vb`.
    pub fn step(&mut self, config: &StepConfig, vb: VarBuilder) -> candle_core::Result<Step> {
        let Place { channels, squeezed } = self.place;
        let (features, cost) = (self.features, &mut self.cost);
        let level = Level { features, up: self.up / squeezed };
        let samples = squeezed * self.group;
        let map = |map: Box<dyn Bijector + Send + Sync>| Step::Map(map);
        let built = match config {
            StepConfig::Asinh { scale } => map(Box::new(Asinh { scale: *scale })),
            StepConfig::Gain {} => map(Box::new(Gain::new(features, channels, vb)?)),
            StepConfig::Actnorm {} => map(Box::new(Actnorm::new(channels, vb)?)),
            StepConfig::Mix { form } => {
                cost.add((channels * channels, 0), Some(0), samples);
                map(Box::new(Mix::new(channels, *form, vb)?))
            }
            StepConfig::Scale {} => map(Box::new(Scale::new(channels, vb)?)),
            StepConfig::Coupling { net, bound, map: scalar, split } => {
                let coupling = level.coupling(split.of(channels), net, (scalar, *bound), vb)?;
                cost.add(coupling.macs(), Some(coupling.reach()), samples);
                map(Box::new(coupling))
            }
            StepConfig::SeparableCoupling { net, bound } => {
                let of = |inputs, outputs| -> candle_core::Result<Box<dyn CondNet + Send + Sync>> {
                    Ok(Box::new(SeparableNet::new(net, inputs, outputs, level.up, vb.clone())?))
                };
                let (parts, sizes) = (Split::Halves.of(channels), (features, net.weight_norm));
                let coupling = Coupling::new(parts, (&MapConfig::Affine, *bound), of, sizes, vb.clone())?;
                cost.add(coupling.macs(), Some(coupling.reach()), samples);
                map(Box::new(coupling))
            }
            StepConfig::Swap {} => map(Box::new(Swap)),
            StepConfig::Squeeze { by } => Step::Squeeze(*by),
            StepConfig::Early { channels: done, prior } => {
                let parts = Parts::Blocks { known: channels - done, moved: *done, known_first: false };
                let of = |net| level.coupling(parts, net, (&MapConfig::Affine, Some(PRIOR_BOUND)), vb.pp("prior"));
                let prior = prior.as_ref().map(of).transpose()?;
                prior.iter().for_each(|prior| cost.add(prior.macs(), Some(prior.reach()), samples));
                Step::Early { done: *done, prior }
            }
            StepConfig::Autoregressive { by, reversed, net, bound, hears, map: scalar } => {
                let rows = channels / by;
                let net = |inputs, outputs| level.sequence(net, (inputs, outputs), rows, vb.clone());
                let order = (*by, *reversed);
                let step = Autoregressive::new(order, (scalar, *bound), (net, *hears), features, vb.clone())?;
                let (per_row, conditioning) = step.macs();
                cost.add((rows * per_row, conditioning), None, samples);
                map(Box::new(step))
            }
            StepConfig::Rowwise { net, bound, map: scalar } => {
                let step = Rowwise::new(net, (scalar, *bound), (features, level.up), vb)?;
                let (per_value, conditioning) = step.macs();
                cost.add((channels * per_value, conditioning), Some((channels - 1) * step.reach()), samples);
                map(Box::new(step))
            }
            StepConfig::Reverse { parts } => map(Box::new(Reverse { parts: *parts })),
            StepConfig::Residual { net, terms, probes } => {
                let step = Residual::new(LipschitzNet::new(net, channels, features, vb)?, *terms, *probes);
                cost.add(step.macs(), None, samples);
                map(Box::new(step))
            }
        };
        self.place = config.after(self.place);
        Ok(built)
    }
}

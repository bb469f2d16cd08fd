//! The conditioners that run on packed weights, whichever they are.

use super::features::Features;
use super::quantise::Numbers;
use super::{separable, stream};

/// A conditioner's weights in panels.
pub enum Weights {
    /// A WaveNet's.
    WaveNet(stream::Weights),
    /// SqueezeWave's.
    Separable(separable::Weights),
}

impl Weights {
    /// Output channels.
    pub fn outputs(&self) -> usize {
        match self {
            Self::WaveNet(net) => net.shape.outputs,
            Self::Separable(net) => net.shape.outputs,
        }
    }

    /// Steps before a step that its output depends on.
    pub fn reach(&self) -> usize {
        match self {
            Self::WaveNet(net) => net.shape.reach(),
            Self::Separable(net) => net.shape.reach(),
        }
    }

    /// Steps after a step that its output depends on.
    pub fn lookahead(&self) -> usize {
        match self {
            Self::WaveNet(net) => net.shape.lookahead(),
            Self::Separable(net) => net.shape.reach(),
        }
    }

    /// Whether integers are faster, and not heard.
    pub(crate) fn gains_from_integers(&self) -> bool {
        matches!(self, Self::WaveNet(net) if net.gains_from_integers())
    }

    /// Goes over to short numbers where that pays; whether anything changed.
    pub(crate) fn quantise(&mut self, numbers: Numbers) -> bool {
        match self {
            Self::WaveNet(net) => net.quantise(numbers),
            Self::Separable(net) => net.quantise(numbers),
        }
    }

    /// The short numbers that features are read in, if they are.
    pub(crate) fn short_features(&self) -> Option<Numbers> {
        match self {
            Self::WaveNet(net) => net.short_features(),
            Self::Separable(_) => None,
        }
    }

    /// Multiply-adds of so many steps in a layer, by which threads share it.
    pub fn macs(&self, steps: usize) -> usize {
        match self {
            Self::WaveNet(net) => net.macs(steps),
            Self::Separable(net) => net.macs(steps),
        }
    }
}

/// What a conditioner remembers of one sequence.
pub enum State {
    /// A WaveNet.
    WaveNet(Box<stream::State>),
    /// SqueezeWave's net.
    Separable(Box<separable::State>),
}

impl State {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        match weights {
            Weights::WaveNet(net) => Self::WaveNet(Box::new(stream::State::new(net))),
            Weights::Separable(net) => Self::Separable(Box::new(separable::State::new(net))),
        }
    }

    /// As [`stream::State::push`].
    ///
    /// # Panics
    /// If the weights are of another kind of net.
    pub fn push(
        &mut self,
        weights: &Weights,
        x: (&[f32], usize),
        features: &Features,
        last: bool,
        threads: usize,
    ) -> &[f32] {
        match (self, weights) {
            (Self::WaveNet(state), Weights::WaveNet(net)) => state.push(net, x, features, last, threads),
            (Self::Separable(state), Weights::Separable(net)) => state.push(net, x, features.rows(), last, threads),
            _ => panic!("weights and state are of different nets"),
        }
    }
}
